"""Weights of a network's layers as ComfyUI casts, streams and quantises them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import comfy.model_management
import comfy.model_sampling
import comfy.ops
import comfy.patcher_extension
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch

from .tiling import is_tiling_patch


def weights_key(guider: Any) -> tuple[Any, ...] | None:
    """Return a key that changes whenever the model computes something else; None where that cannot be known.

    How its convolutions meet the edges is not part of it: ``tiling_key``.
    """
    model = guider.model_patcher
    known = (name for name in model.object_patches if name != "model_sampling" and not is_tiling_patch(name))
    values = {name: model.object_patches[name] for name in known}
    if any(model.injections.values()) or not all(isinstance(value, (str, int, float)) for value in values.values()):
        return None
    return (model.patches_uuid, *sorted(values.items()))


# What an operation of ComfyUI is made of; another node pack may replace any of them, on a class or on one module.
_OWN_METHODS = ("forward", "forward_comfy_cast_weights", "_conv_forward", "_forward")
_OWN_MODULES = ("comfy.ops", "torch.nn.")
_OWN_PARAMETERS = {"weight", "bias", "pre_quant_scale", "input_scale", "weight_scale", "weight_scale_2"}
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def holds_weights(module: torch.nn.Module) -> bool:
    """Return whether a module is one of ComfyUI's operations, or another node pack's layer with tensors of its own."""
    if isinstance(module, comfy.ops.CastWeightBiasOp):
        return True
    kind: Any = type(module)
    if module._modules or _class_is_comfys(kind) and "forward" not in module.__dict__:
        return False
    tensors = (module._parameters, module._buffers, module.__dict__)
    return any(isinstance(value, torch.Tensor) for found in tensors for value in found.values())


@functools.cache
def _class_is_comfys(cls: Any) -> bool:
    return cls.__module__.startswith(("comfy.", "torch."))


@functools.cache
def _methods_are_comfys(cls: Any) -> bool:
    if not issubclass(cls, comfy.ops.CastWeightBiasOp) or not _class_is_comfys(cls):
        return False
    methods = [getattr(cls, name) for name in _OWN_METHODS if hasattr(cls, name)]
    return all(method.__module__.startswith(_OWN_MODULES) for method in methods)


def is_own_operation(module: torch.nn.Module) -> bool:
    """Return whether a module is one of ComfyUI's operations and nothing else acts in it: its forward, cast and parameters are
    ComfyUI's own."""
    own, kind = module.__dict__, cast(Any, type(module))
    if not _methods_are_comfys(kind) or any(name in own for name in _OWN_METHODS):
        return False
    return _OWN_PARAMETERS.issuperset(module._parameters) and "weight" in module._parameters and not module._buffers


def is_resident(module: Any) -> bool:
    """Return whether ComfyUI uses the weight of an operation as it lies there: nothing to cast, stream, patch or dequantise."""
    parameters = module._parameters
    if module.comfy_cast_weights or module.weight_function or module.bias_function or hasattr(module, "_v"):
        return False
    return len(parameters) <= 2 and all(value is None or type(value) in _PLAIN_TYPES for value in parameters.values())


def weight_states(modules: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return a key for each operation that changes when ComfyUI moves, patches or replaces its weight.

    This is asked before every pass through the network. ComfyUI moves weight and bias of a module together.
    """
    states = []
    for module in modules:
        own, parameters = module.__dict__, module._parameters
        weight = parameters["weight"] if "weight" in parameters else None
        place = weight.data_ptr() if weight is not None and type(weight) in _PLAIN_TYPES else 0
        patched = "weight_function" in own and bool(own["weight_function"]), "bias_function" in own and bool(own["bias_function"])
        casts = own["comfy_cast_weights"] if "comfy_cast_weights" in own else None
        forward = own["forward"] if "forward" in own else None
        states.append((forward, casts, "_conv_forward" in own, *patched, place, *map(id, parameters.values())))
    return states


def dequantised(tensor: torch.Tensor) -> torch.Tensor:
    """Return the plain tensor that a tensor of another class stands for."""
    own = type(tensor).dequantize is not torch.Tensor.dequantize
    return tensor.dequantize() if own else tensor.as_subclass(torch.Tensor)


@contextmanager
def cast_weights(module: Any, like: torch.Tensor) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Weight and bias of an operation as it would use them on ``like``; ComfyUI may take them back after the block."""
    if module.weight is None:
        yield None, None
        return
    weight, bias, stream = comfy.ops.cast_bias_weight(module, like, offloadable=True)
    try:
        plain = weight if type(weight) in _PLAIN_TYPES else dequantised(weight)
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
