"""Weights that autograd never holds: gradients with respect to a network's input, and nothing else.

ComfyUI streams weights in and out, casts them for every call and loads them as inference tensors, so a graph that saves
a weight is refused, keeps a copy of the model alive, or finds another layer's numbers in the buffer when it comes back.
Every layer with weights runs in one of three lanes:

``resident``: ComfyUI's own operation, its weight where and as it is used. Torch's functions run on a plain alias of it.
``cast``: ComfyUI's own operation, its weight offloaded, cast, patched or quantised. It runs as ComfyUI runs it, and ComfyUI
is asked for the weight once more when the gradient is due (``rules``).
``rerun``: any other layer. It runs as it is, and again when its gradient is due (``rerun``), whatever it does to its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from .. import host
from .missing import is_about_gradients, no_gradient
from .plain import differentiable, has_gradient, plain_tensor, plain_tensors_in
from .rerun import is_floating, put_back, requires_gradient, rerun, taken_out
from .rules import Rule, only_shaped, rule_of

Forward = Callable[..., Any]

# Autograd may hold the input of a convolution up to this size, which no gradient needs: to leave it out costs more Python than
# the room is worth.
_SMALL_BYTES = 2**18


# --- resident --------------------------------------------------------------------------------------------------------------


class _WeightKept:
    """Lets a convolution save its weight, and nothing but the shape of its input, which only the weight's gradient would need."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.data_ptr()
        self._inputs: dict[tuple[Any, ...], Tensor] = {}

    def pack(self, tensor: Tensor) -> Any:
        return tensor if tensor.data_ptr() == self._weight else (tensor.shape, tensor.dtype, tensor.device)

    def unpack(self, saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        found = self._inputs.get(saved)
        if found is None:
            found = self._inputs[saved] = only_shaped(*saved)
        return found


def _resident_forward(module: Any, adds_in_place: bool) -> Forward | None:
    """Return a forward on plain aliases of the weights, or None for an operation that is not known."""
    weight: Any
    bias: Any
    weight, bias = (None if tensor is None else _alias(tensor) for tensor in (module.weight, module.bias))
    if isinstance(module, nn.Linear):
        return lambda x: F.linear(x, weight, bias)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        kept = _WeightKept(weight)
        most = 0 if adds_in_place else _SMALL_BYTES

        def convolve(x: Tensor) -> Any:
            if x.nbytes <= most:
                return module._conv_forward(x, weight, bias)
            with saved_tensors_hooks(kept.pack, kept.unpack):
                return module._conv_forward(x, weight, bias)

        return convolve
    if isinstance(module, nn.GroupNorm):
        groups, eps = module.num_groups, module.eps
        if adds_in_place:
            return lambda x: F.group_norm(x.clone() if x.requires_grad else x, groups, weight, bias, eps)
        return lambda x: F.group_norm(x, groups, weight, bias, eps)
    if isinstance(module, nn.LayerNorm):
        shape, eps = module.normalized_shape, module.eps
        return lambda x: F.layer_norm(x, shape, weight, bias, eps)
    if isinstance(module, nn.RMSNorm):
        shape, precision = module.normalized_shape, module.eps
        return lambda x: F.rms_norm(x, shape, weight, precision)
    return None


def _alias(tensor: Tensor) -> Tensor:
    return plain_tensor(tensor) if tensor.is_inference() else tensor.detach()


# --- cast ------------------------------------------------------------------------------------------------------------------


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, forward: Forward, rule: Rule, kept: Any) -> Tensor:
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


def _cast_forward(module: nn.Module, rule: Rule, keeps_input: bool, adds_in_place: bool) -> Forward:
    forward = module.forward
    in_place_safe = isinstance(module, nn.GroupNorm) and not adds_in_place
    other = _rerun_forward(module)

    def frozen(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1:
            return other(*args, **kwargs)
        x = args[0]
        if torch.is_grad_enabled() and x.requires_grad:
            kept = (x if in_place_safe else x.detach().clone()) if keeps_input else None
            return _Frozen.apply(x, module, forward, rule, kept)
        with torch.inference_mode():
            y = forward(x.detach())
        return plain_tensor(y)

    return frozen


# --- rerun -----------------------------------------------------------------------------------------------------------------


def _rerun_forward(module: nn.Module) -> Forward:
    forward = module.forward

    def rerunning(*args: Any, **kwargs: Any) -> Any:
        if not (torch.is_grad_enabled() and has_gradient((args, kwargs))):
            with torch.inference_mode():
                result = forward(*args, **kwargs)
            return plain_tensors_in(result)
        inputs: list[Tensor] = []
        call = taken_out((args, kwargs), inputs, requires_gradient)
        shape: list[Any] = []

        def run(tensors: Any) -> list[Tensor]:
            own_args, own_kwargs = put_back(call, tensors)
            outputs: list[Tensor] = []
            shape[:] = [taken_out(forward(*own_args, **own_kwargs), outputs, is_floating)]
            return outputs

        def first(tensors: Any) -> list[Tensor]:
            with torch.inference_mode():
                outputs = run(tensors)
            return [plain_tensor(tensor) if tensor.is_inference() else tensor.clone() for tensor in outputs]

        def again(tensors: Any) -> list[Tensor]:
            try:
                with differentiable(weights_apart=True):
                    outputs = run(tensors)
            except RuntimeError as error:
                if not host.is_out_of_memory(error) and is_about_gradients(error):
                    raise no_gradient(module) from error
                raise
            if not any(tensor.requires_grad for tensor in outputs):
                raise no_gradient(module)
            return outputs

        outputs = rerun(first, again, inputs)
        return put_back(shape[0], outputs)

    return rerunning


# --- the lanes of a network ------------------------------------------------------------------------------------------------


class Lanes:
    """What the layers of one network run as, for one sampling run; ComfyUI may offload or patch weights between two passes.

    Attributes:
        residents: whether resident weights run through torch's own autograd.
    """

    def __init__(self, network: nn.Module, *, residents: bool = True) -> None:
        self.modules = [module for _, module in host.named_modules(network) if host.holds_weights(module)]
        self.residents = residents
        self._states: list[tuple[Any, ...]] = []
        self._found: list[tuple[nn.Module, Forward]] = []
        self._held: list[list[Any]] = []  # parameters whose identity is part of a state
        self._adds_in_place = False

    def forwards(self, *, adds_in_place: bool) -> list[tuple[nn.Module, Forward]]:
        """Return a new forward for every layer with weights, whose state is looked up now.

        Args:
            adds_in_place: this call of a convolutional network changes its feature maps in place (ControlNet's residuals, FreeU).
        """
        states = host.weight_states(self.modules)
        if states == self._states and adds_in_place == self._adds_in_place:
            return self._found
        known = dict(self._found) if adds_in_place == self._adds_in_place else {}
        before = self._states if known else [()] * len(states)
        found = []
        for module, state, old in zip(self.modules, states, before, strict=True):
            forward = known[module] if state == old else self._forward(module, adds_in_place)
            found.append((module, forward))
        self._states, self._found, self._adds_in_place = states, found, adds_in_place
        self._held = [[*module._parameters.values()] for module in self.modules]
        return found

    def forget(self) -> None:
        """Let go of the weights' memory."""
        self._states, self._found, self._held = [], [], []

    def _forward(self, module: nn.Module, adds_in_place: bool) -> Forward:
        if host.is_own_operation(module):
            if self.residents and host.is_resident(module):
                forward = _resident_forward(module, adds_in_place)
                if forward is not None:
                    return _with_more_arguments(module, forward)
            rule = rule_of(module)
            if rule is not None:
                return _cast_forward(module, *rule, adds_in_place)
        return _rerun_forward(module)


def _with_more_arguments(module: nn.Module, forward: Forward) -> Forward:
    """Return the same forward for a module that may be called with more than its input (a causal convolution)."""
    if not isinstance(module, nn.Conv3d):
        return forward
    other = _rerun_forward(module)
    return lambda x, *args, **kwargs: other(x, *args, **kwargs) if args or kwargs else forward(x)
