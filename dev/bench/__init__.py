"""Benchmarks: one module a technique, run as ``python dev bench NAME``."""
