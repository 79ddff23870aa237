"""Weights of a network's layers as ComfyUI casts, streams and quantises them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.ops
import comfy.patcher_extension
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch


def weights_key(guider: Any) -> tuple[Any, ...] | None:
    """Return a key that changes whenever the model computes something else; None where that cannot be known."""
    model = guider.model_patcher
    values = {name: value for name, value in model.object_patches.items() if name != "model_sampling"}
    if any(model.injections.values()) or not all(isinstance(value, (str, int, float)) for value in values.values()):
        return None
    return (model.patches_uuid, *sorted(values.items()))


def is_weighted_operation(module: torch.nn.Module) -> bool:
    """Return one of ComfyUI's own operations, whose weights it casts and streams. (Not what a network derives from them.)"""
    return isinstance(module, comfy.ops.CastWeightBiasOp) and type(module).forward.__module__ == comfy.ops.__name__


@contextmanager
def cast_weights(module: Any, like: torch.Tensor) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Weight and bias of an operation as it would use them on ``like``; ComfyUI may take them back after the block."""
    if module.weight is None:
        yield None, None
        return
    weight, bias, stream = comfy.ops.cast_bias_weight(module, like, offloadable=True)
    try:
        plain = weight.dequantize() if type(weight) not in (torch.Tensor, torch.nn.Parameter) else weight
        yield plain, bias
    finally:
        comfy.ops.uncast_bias_weight(module, weight, bias, stream)


def plain_kernel(function: Any) -> Any:
    """Return the plain torch form of a fused kernel of 0.30.0 (RoPE), which has no gradient; other functions as they are."""
    namespace, _, name = str(function).partition(".")
    if namespace != "comfy_kitchen":
        return function
    from comfy_kitchen.backends.eager import rope

    return getattr(rope, name.removesuffix(".default"), function)


@contextmanager
def differentiable_kernels() -> Iterator[None]:
    """Let 0.30.0 choose kernels that have a gradient (RoPE, quantised matmul); 0.3.75 has no others."""
    before = getattr(comfy.model_management, "in_training", None)
    if before is not None:
        comfy.model_management.in_training = True
    try:
        yield
    finally:
        if before is not None:
            comfy.model_management.in_training = before


def compute_dtype(base_model: Any) -> torch.dtype:
    """Return what the network computes in."""
    return base_model.manual_cast_dtype or base_model.get_dtype()
