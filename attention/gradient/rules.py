"""Gradients of ComfyUI's own weighted operations with respect to their input.

Each rule gets the weight as the operation used it, so that autograd need not hold it meanwhile, and the input only where it
needs that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .plain import plain_tensor

_aten = torch.ops.aten
_convolution_backward = _aten.convolution_backward.default

# (module, gradient of the output, input or None, weight, bias, shape of the input) -> gradient of the input
Rule = Callable[[Any, Tensor, Any, Any, Any, torch.Size], Tensor]


def _linear(module: Any, gradient: Tensor, x: Any, weight: Tensor, bias: Any, shape: torch.Size) -> Tensor:
    result = gradient.matmul(weight)
    smoothing = getattr(module, "pre_quant_scale", None)  # the input is multiplied by it first
    return result if smoothing is None else result * smoothing.to(result.device, result.dtype)


def _convolution(module: Any, gradient: Tensor, x: Any, weight: Tensor, bias: Any, shape: torch.Size) -> Tensor:
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return _unpadded(module, gradient, weight, shape, module.padding)
    pads = module._reversed_padding_repeated_twice  # circular for seamless images; "same"
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = nn.functional.pad(gradient.new_empty(1, device="meta").expand(shape), pads, mode=mode).shape
    result = _unpadded(module, gradient, weight, padded, (0,) * (gradient.ndim - 2))
    with torch.inference_mode(False), torch.enable_grad():
        unpadded = torch.zeros(shape, dtype=result.dtype, device=result.device, requires_grad=True)  # padding is linear
        return torch.autograd.grad(nn.functional.pad(unpadded, pads, mode=mode), unpadded, result.clone())[0]


def _unpadded(module: Any, gradient: Tensor, weight: Tensor, shape: torch.Size, padding: Any) -> Tensor:
    return _convolution_backward(
        gradient, only_shaped(shape, gradient.dtype, gradient.device), weight, None, module.stride, padding, module.dilation,
        False, (0,) * (gradient.ndim - 2), module.groups, (True, False, False),
    )[0]  # fmt: skip


def only_shaped(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return one number, expanded: an input for the gradient of a convolution, which reads nothing of it but the shape."""
    return torch.empty(1, dtype=dtype, device=device).expand(shape)


def _group_norm(module: Any, gradient: Tensor, x: Tensor, weight: Any, bias: Any, shape: torch.Size) -> Tensor:
    x = x.contiguous()
    batch, channels, pixels = shape[0], shape[1], x[0, 0].numel()
    _, mean, scale = _aten.native_group_norm(x, None, None, batch, channels, pixels, module.num_groups, module.eps)
    sizes = (batch, channels, pixels, module.num_groups)
    return _aten.native_group_norm_backward(gradient.contiguous(), x, mean, scale, weight, *sizes, (True, False, False))[0]


def _layer_norm(module: Any, gradient: Tensor, x: Tensor, weight: Any, bias: Any, shape: torch.Size) -> Tensor:
    normalized = list(module.normalized_shape)
    _, mean, scale = _aten.native_layer_norm(x, normalized, None, None, module.eps)
    return _aten.native_layer_norm_backward(gradient, x, normalized, mean, scale, weight, bias, (True, False, False))[0]


def _rms_norm(module: Any, gradient: Tensor, x: Tensor, weight: Any, bias: Any, shape: torch.Size) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        weight = None if weight is None else plain_tensor(weight)
        y = nn.functional.rms_norm(x, module.normalized_shape, weight, module.eps)
        return torch.autograd.grad(y, x, gradient.clone())[0]


# Class -> its rule, and whether the rule needs the input.
_RULES: tuple[tuple[type[nn.Module], Rule, bool], ...] = (
    (nn.Conv1d, _convolution, False),
    (nn.Conv2d, _convolution, False),
    (nn.Conv3d, _convolution, False),
    (nn.GroupNorm, _group_norm, True),
    (nn.LayerNorm, _layer_norm, True),
    (nn.RMSNorm, _rms_norm, True),
)


def rule_of(module: nn.Module) -> tuple[Rule, bool] | None:
    """Return the rule of one of ComfyUI's own operations and whether it needs the input, or None where there is no rule."""
    for cls, rule, keeps_input in _RULES:
        if isinstance(module, cls):
            return rule, keeps_input
    # ComfyUI's quantised Linear is no torch.nn.Linear.
    return (_linear, False) if isinstance(module, nn.Linear) or type(module).__name__ == "Linear" else None
