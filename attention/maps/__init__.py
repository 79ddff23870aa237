"""Attention maps: recording them while a sampler runs, and showing them."""

from .attn_maps import AttnMaps
from .capture import Capture, chosen_layers
from .recording import LayerMaps, PromptMaps, Recording, SelfAttention, StepFigures
from .settings import CaptureSettings

__all__ = [
    "AttnMaps",
    "Capture",
    "CaptureSettings",
    "LayerMaps",
    "PromptMaps",
    "Recording",
    "SelfAttention",
    "StepFigures",
    "chosen_layers",
]
