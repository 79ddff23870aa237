"""Weights that autograd never holds: gradients with respect to a network's input, and nothing else.

ComfyUI streams weights in and out, casts them for every call and loads them as inference tensors, so a graph that saves
a weight is refused, keeps a copy of the model alive, or finds another layer's numbers in the buffer when it comes back.
Inside ``frozen_ops`` every weighted operation runs as ComfyUI runs it, saves no weight, and asks ComfyUI for the weight
once more when its gradient is due (with the same casts, LoRA functions and quantisation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from .. import host

_aten = torch.ops.aten


def plain_tensor(tensor: Tensor) -> Tensor:
    """Return a plain tensor on the memory of an inference tensor, which ``detach`` and ``view`` would not give."""
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


# They keep their input for the gradient, and transformers add to their tokens in place right behind them. (Where blocks are
# computed again nothing notices that, so a copy is the only remedy.)
_NORMS = ("rms_norm", "layer_norm")


class Differentiable(TorchFunctionMode):
    """Lets networks that were written for inference run with a gradient.

    Outside inference mode every torch function sees ordinary tensors in place of inference tensors (bare parameters,
    conditioning, position tables), norms keep a copy of what they need, and ComfyUI's fused kernels run as plain torch.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_inference_mode_enabled():
            args = tuple(_plain_tensors_in(value) for value in args)
            kwargs = {name: _plain_tensors_in(value) for name, value in kwargs.items()}
            func = host.plain_kernel(func)
            if getattr(func, "__name__", "") in _NORMS:
                args = _with_copy(args)
        return func(*args, **kwargs)


def _with_copy(args: tuple[Any, ...]) -> tuple[Any, ...]:
    kept = args and isinstance(args[0], Tensor) and args[0].requires_grad and torch.is_grad_enabled()
    return (args[0].clone(), *args[1:]) if kept else args


def saving_copies(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` with copies of all that it saves for its gradient: FreeU writes to what it has just multiplied."""

    def saving(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda tensor: tensor):
            return function(*args, **kwargs)

    return saving


def _plain_tensors_in(value: Any) -> Any:
    if isinstance(value, Tensor):
        return plain_tensor(value) if value.is_inference() else value
    if type(value) in (list, tuple):
        return type(value)(_plain_tensors_in(item) for item in value)
    return value


# (module, gradient of the output, input or None, weight, bias, shape of the input) -> gradient of the input
Rule = Callable[[Any, Tensor, Any, Any, Any, torch.Size], Tensor]


def _linear(module: Any, gradient: Tensor, x: Any, weight: Tensor, bias: Any, shape: torch.Size) -> Tensor:
    return gradient.matmul(weight)


def _convolution(module: Any, gradient: Tensor, x: Any, weight: Tensor, bias: Any, shape: torch.Size) -> Tensor:
    pads = None
    if module.padding_mode != "zeros" or isinstance(module.padding, str):  # circular for seamless images; "same"
        pads = module._reversed_padding_repeated_twice
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded_shape = nn.functional.pad(gradient.new_empty(1, device="meta").expand(shape), pads, mode=mode).shape
    like_input = gradient.new_empty(1).expand(shape if pads is None else padded_shape)
    dimensions = [0] * (gradient.ndim - 2)
    padding = module.padding if pads is None else dimensions
    settings = (module.stride, padding, module.dilation, False, dimensions, module.groups, (True, False, False))
    result = _aten.convolution_backward(gradient, like_input, weight, None, *settings)[0]
    if pads is None:
        return result
    with torch.inference_mode(False), torch.enable_grad():
        unpadded = torch.zeros(shape, dtype=result.dtype, device=result.device, requires_grad=True)  # padding is linear
        return torch.autograd.grad(nn.functional.pad(unpadded, pads, mode=mode), unpadded, result.clone())[0]


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


# Class -> its rule, and whether the rule needs the input. Other weighted operations take autograd's way.
_RULES: tuple[tuple[type[nn.Module], Rule, bool], ...] = (
    (nn.Conv1d, _convolution, False),
    (nn.Conv2d, _convolution, False),
    (nn.Conv3d, _convolution, False),
    (nn.GroupNorm, _group_norm, True),
    (nn.LayerNorm, _layer_norm, True),
    (nn.RMSNorm, _rms_norm, True),
)


def _rule(module: nn.Module) -> tuple[Rule, bool] | None:
    for cls, rule, keeps_input in _RULES:
        if isinstance(module, cls):
            return rule, keeps_input
    # ComfyUI's quantised Linear is no torch.nn.Linear.
    return (_linear, False) if isinstance(module, nn.Linear) or type(module).__name__ == "Linear" else None


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, forward: Callable[[Tensor], Tensor], rule: Rule, kept: Any) -> Tensor:
        ctx.module, ctx.rule, ctx.shape = module, rule, x.shape
        if kept is not None:
            ctx.save_for_backward(kept)
        with torch.inference_mode():
            y = forward(x.detach())
        return plain_tensor(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        saved = ctx.saved_tensors
        with torch.inference_mode(), host.cast_weights(ctx.module, gradient) as (weight, bias):
            result = ctx.rule(ctx.module, gradient, saved[0] if saved else None, weight, bias, ctx.shape)
        return plain_tensor(result) if result.is_inference() else result, None, None, None, None


def _frozen_forward(module: nn.Module, rule: Rule, keeps_input: bool, adds_in_place: bool) -> Callable[..., Tensor]:
    forward = module.forward
    in_place_safe = isinstance(module, nn.GroupNorm) and not adds_in_place

    def frozen(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            return forward(x, *args, **kwargs)
        if torch.is_grad_enabled() and x.requires_grad:
            kept = (x if in_place_safe else x.detach().clone()) if keeps_input else None
            return _Frozen.apply(x, module, forward, rule, kept)
        with torch.inference_mode():
            y = forward(x.detach())
        return plain_tensor(y)

    return frozen


@contextmanager
def frozen_ops(network: nn.Module, *, adds_in_place: bool = False) -> Iterator[None]:
    """Run the weighted operations of ``network`` without autograd ever seeing a weight.

    An operation that another node replaced is left as it is. Outside inference mode, forwards with a gradient may run in
    the block; afterwards every module is as it was.

    Args:
        adds_in_place: this call of a convolutional network changes its feature maps in place (ControlNet's residuals, FreeU).
    """
    replacements = []
    for module in network.modules():
        rule = _rule(module) if host.is_weighted_operation(module) and "forward" not in module.__dict__ else None
        if rule is not None:
            replacements.append((module, _frozen_forward(module, *rule, adds_in_place)))
    with host.swapped_forward(replacements), Differentiable():
        yield
