"""Compute something again when its gradient is due: only its inputs are kept, and the gradient is that of what really ran."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Outputs = list[Tensor]
Run = Callable[[Sequence[Tensor]], Outputs]


class _Rerun(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Run, again: Run, *inputs: Tensor) -> Any:
        ctx.again = again
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return tuple(first([x.detach() for x in inputs]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            outputs = ctx.again(inputs)
            pairs = [(y, g) for y, g in zip(outputs, gradients, strict=True) if g is not None and y.requires_grad]
            if not pairs:
                return (None, None, *(None for _ in inputs))
            found = torch.autograd.grad([y for y, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
        return (None, None, *found)


def rerun(first: Run, again: Run, inputs: Sequence[Tensor]) -> Outputs:
    """Return ``first(inputs)``, whose gradient is that of ``again(inputs)``, called in the backward pass with a gradient enabled.

    Args:
        first: returns floating tensors, without a gradient; none of them may share memory with the inputs.
        again: returns the same number of tensors.
        inputs: tensors that require a gradient; must not be changed before the backward pass.
    """
    outputs: Any = _Rerun.apply(first, again, *inputs)
    return list(outputs)


class _Place:
    """Where a tensor was in nested arguments."""

    def __init__(self, index: int) -> None:
        self.index = index


def taken_out(value: Any, tensors: list[Tensor], wanted: Callable[[Tensor], bool]) -> Any:
    """Return nested arguments with marks in place of the ``wanted`` tensors, which are appended to ``tensors``.

    Dictionaries, lists and tuples are copies: networks write their progress into the options.
    """
    if isinstance(value, Tensor):
        if not wanted(value):
            return value
        tensors.append(value)
        return _Place(len(tensors) - 1)
    if isinstance(value, dict):
        return {key: taken_out(item, tensors, wanted) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)([taken_out(item, tensors, wanted) for item in value])
    return value


def put_back(value: Any, tensors: Sequence[Tensor] | None, other: Callable[[Tensor], Tensor] | None = None) -> Any:
    """Return nested arguments in fresh containers, with tensors in place of their marks.

    Args:
        tensors: None leaves the marks.
        other: is done to all other tensors.
    """
    if type(value) is _Place:
        return value if tensors is None else tensors[value.index]
    if isinstance(value, dict):
        return {key: put_back(item, tensors, other) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)([put_back(item, tensors, other) for item in value])
    return other(value) if other is not None and isinstance(value, Tensor) else value


def requires_gradient(tensor: Tensor) -> bool:
    """Return whether a tensor requires a gradient."""
    return tensor.requires_grad


def is_floating(tensor: Tensor) -> bool:
    """Return whether a tensor is one that can have a gradient."""
    return tensor.is_floating_point()
