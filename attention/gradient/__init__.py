"""A differentiable model pass: how a loss on attention changes with the latent."""

from .levels import Memory, makes_room
from .model_pass import ModelPass
from .watch import AttentionCall, Gradient, Measurements, Objective

__all__ = [
    "AttentionCall",
    "Gradient",
    "Measurements",
    "Memory",
    "ModelPass",
    "Objective",
    "makes_room",
]
