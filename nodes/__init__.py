"""Nodes: schema and wiring. The maths lives in ``attention``."""

from .tgate import TGateCache

NODES = [TGateCache]
