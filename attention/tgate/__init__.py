"""T-GATE: converged cross-attention is reused after a gate.

``settings`` what the user sets, ``plan`` what each step does, ``cache`` stored outputs, ``guidance`` the kept difference of
the prompts, ``convergence`` auto mode, ``run`` the state of one run, ``technique`` the wrappers.
"""

from .cache import AttentionCache
from .plan import Action, plan, reuses_attention
from .run import TGateRun
from .settings import CacheDevice, CfgAfterGate, Mode, TGateSettings
from .technique import KEY, TGate

__all__ = [
    "Action",
    "AttentionCache",
    "CacheDevice",
    "CfgAfterGate",
    "KEY",
    "Mode",
    "TGate",
    "TGateRun",
    "TGateSettings",
    "plan",
    "reuses_attention",
]
