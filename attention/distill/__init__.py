"""Attention Distillation: style, appearance and texture from a reference."""

from .inputs import target_latent
from .job import DistillJob, prepare
from .published import distilled_layers, published
from .sampler import sample_distilled
from .settings import Adain, DistillSettings, Method

__all__ = [
    "Adain",
    "DistillJob",
    "DistillSettings",
    "Method",
    "distilled_layers",
    "prepare",
    "published",
    "sample_distilled",
    "target_latent",
]
