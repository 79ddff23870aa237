"""How much a differentiable pass keeps: everything, or less where memory is short."""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Any

from torch import Tensor

from .. import host
from ..networks.layers import checkpoint_blocks

# Kept activations of a differentiable pass, in units of what ComfyUI reckons for a forward of a network of 16 blocks:
# 0.65 GiB against 0.16 on SD1.5 at 512 px; blocks that are computed again need a fifth of it.
_KEPT_PER_FORWARD, _BLOCKS_PER_FORWARD, _RECOMPUTED = 4.0, 16, 0.2


class Memory(Enum):
    """How much a differentiable pass keeps."""

    AUTO = "auto"
    FAST = "fast"
    LOW = "low"


class Level(IntEnum):
    """What is done to save memory, from nothing to all."""

    KEEP_ALL = 0
    RECOMPUTE_BLOCKS = 1
    ONE_IMAGE_AT_A_TIME = 2


def first_level(memory: Memory, base_model: Any, x: Tensor) -> Level:
    """Return the level at which the passes of a run begin: for ``auto``, the one that fits the free memory.

    Args:
        x: (batch, channels, ..., height, width), the latent.
    """
    if memory is not Memory.AUTO:
        return Level.KEEP_ALL if memory is Memory.FAST else Level.ONE_IMAGE_AT_A_TIME
    blocks = len(checkpoint_blocks(host.diffusion_model(base_model)))
    needed = host.forward_memory(base_model, x) * _KEPT_PER_FORWARD * blocks / _BLOCKS_PER_FORWARD
    spare = host.spare_memory(x.device)
    if needed < spare:
        return Level.KEEP_ALL
    return Level.RECOMPUTE_BLOCKS if needed * _RECOMPUTED < spare else Level.ONE_IMAGE_AT_A_TIME
