"""How much a differentiable pass keeps: everything, or less where memory is short."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    needed = _kept(base_model, x.shape)
    spare = host.spare_memory(x.device)
    if needed < spare:
        return Level.KEEP_ALL
    return Level.RECOMPUTE_BLOCKS if needed * _RECOMPUTED < spare else Level.ONE_IMAGE_AT_A_TIME


def room_for_passes(memory: Memory, base_model: Any, shape: Sequence[int]) -> float:
    """Return the bytes for which ComfyUI should make room before a run with gradient passes.

    For ``auto`` that is what blocks need which are computed again: taking weights off the device for more would cost more time
    than it saves.

    Args:
        shape: of the run's latent, (batch, channels, ..., height, width).
    """
    if memory is Memory.FAST:
        return _kept(base_model, shape)
    images = 1 if memory is Memory.LOW else shape[0]
    return _kept(base_model, (images, *shape[1:])) * _RECOMPUTED


def makes_room(memory: Memory) -> Callable[..., Any]:
    """Return a PREPARE_SAMPLING wrapper that lets ComfyUI make room for the gradient passes of a run."""

    def prepare(executor: Callable[..., Any], model: Any, noise_shape: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        room = room_for_passes(memory, model.model, noise_shape)
        return host.prepare_with_room(room, executor, model, noise_shape, *args, **kwargs)

    return prepare


def _kept(base_model: Any, shape: Sequence[int]) -> float:
    """Return about how many bytes a pass keeps that computes nothing again."""
    blocks = len(checkpoint_blocks(host.diffusion_model(base_model)))
    return host.forward_memory(base_model, shape) * _KEPT_PER_FORWARD * blocks / _BLOCKS_PER_FORWARD
