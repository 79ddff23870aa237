"""Attend-and-Excite: early steps nudge the latent so that no subject is neglected."""

from .guider import ExciteGuider
from .layers import check_network, guided_layers, guided_names
from .losses import Loss, LossSettings
from .objective import ExciteObjective
from .places import Layout, PlaceSettings, check_places
from .run import ExciteRun
from .settings import ExciteSettings, parse_thresholds
from .subjects import GuidedPrompt, Subject, check_subjects, guided_prompts
from .technique import ExciteTechnique

__all__ = [
    "ExciteGuider",
    "ExciteObjective",
    "ExciteRun",
    "ExciteSettings",
    "ExciteTechnique",
    "GuidedPrompt",
    "Layout",
    "Loss",
    "LossSettings",
    "PlaceSettings",
    "Subject",
    "check_network",
    "check_places",
    "check_subjects",
    "guided_layers",
    "guided_names",
    "guided_prompts",
    "parse_thresholds",
]
