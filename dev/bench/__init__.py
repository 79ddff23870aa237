"""Benchmarks, one module for each technique, run as ``python dev bench NAME``."""
