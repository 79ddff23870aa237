"""T-GATE: converged cross-attention is reused after a gate.

``settings`` what the user sets, ``plan`` the published schedule, ``evaluation`` what one evaluation does, ``cache`` stored
outputs, ``guidance`` the kept difference of the prompts, ``convergence`` auto mode, ``run`` the state of one run, ``report`` its
log line, ``modules`` what happens at attention modules, ``technique`` the wrappers. ``skipping`` is the other schedule, which
skips whole steps, with predictions from ``extrapolation``.
"""

from .cache import AttentionCache
from .convergence import ConvergenceMeter
from .evaluation import EvaluationPlan, Situation, plan_evaluation
from .plan import Action, plan, reuses_attention
from .run import TGateRun
from .settings import CacheDevice, CfgAfterGate, GateOn, Mode, Schedule, TGateSettings
from .skipping import SkippingRun, StepSkipping
from .technique import KEY, TGate

__all__ = [
    "Action",
    "AttentionCache",
    "CacheDevice",
    "CfgAfterGate",
    "ConvergenceMeter",
    "EvaluationPlan",
    "GateOn",
    "KEY",
    "Mode",
    "Schedule",
    "Situation",
    "SkippingRun",
    "StepSkipping",
    "TGate",
    "TGateRun",
    "TGateSettings",
    "plan",
    "plan_evaluation",
    "reuses_attention",
]
