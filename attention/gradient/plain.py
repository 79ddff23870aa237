"""Plain tensors in place of inference tensors, so that networks written for inference can run with a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from .. import host

# They keep their input for the gradient, and transformers add to their tokens in place right behind them.
_NORMS = ("rms_norm", "layer_norm")
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def plain_tensor(tensor: Tensor) -> Tensor:
    """Return a plain tensor on the memory of an inference tensor, which ``detach`` and ``view`` would not give."""
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def plain_tensors_in(value: Any) -> Any:
    """Return the same nested lists, tuples and dictionaries with plain tensors in place of inference tensors."""
    if isinstance(value, Tensor):
        return _plain(value) if value.is_inference() else value
    if type(value) in (list, tuple):
        return type(value)([plain_tensors_in(item) for item in value])
    if type(value) is dict:
        return {key: plain_tensors_in(item) for key, item in value.items()}
    return value


def _plain(tensor: Tensor) -> Tensor:
    if type(tensor) in _PLAIN_TYPES:
        return plain_tensor(tensor)
    with torch.inference_mode():  # a quantised class: what it stands for
        return plain_tensor(host.dequantised(tensor))


def has_gradient(value: Any) -> bool:
    """Return whether a tensor in nested lists, tuples and dictionaries requires a gradient."""
    if isinstance(value, Tensor):
        return value.requires_grad
    if type(value) in (list, tuple):
        return any(has_gradient(item) for item in value)
    return type(value) is dict and any(has_gradient(item) for item in value.values())


class _Differentiable(TorchFunctionMode):
    """Lets networks that were written for inference run with a gradient.

    Outside inference mode every torch function sees plain tensors in place of inference tensors (bare parameters,
    conditioning, position tables), norms keep a copy of what they need, and ComfyUI's fused kernels run as plain torch.

    Args:
        weights_apart: what has no gradient runs as in inference, with the very tensors that are there: how a layer casts, streams
            or dequantises its weight.
    """

    def __init__(self, *, weights_apart: bool = False) -> None:
        super().__init__()
        self.weights_apart = weights_apart

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled():
            return func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        of_args, of_kwargs = _any_inference(args), bool(kwargs) and _any_inference(kwargs.values())
        if of_args or of_kwargs:
            if self.weights_apart and not (has_gradient(args) or has_gradient(kwargs)):
                with torch.inference_mode():
                    return func(*args, **kwargs)
            args = plain_tensors_in(tuple(args)) if of_args else args
            kwargs = plain_tensors_in(kwargs) if of_kwargs else kwargs
        function, is_norm = _known(func)
        if is_norm and args and isinstance(args[0], Tensor) and args[0].requires_grad and torch.is_grad_enabled():
            args = (args[0].clone(), *args[1:])
        return function(*args, **kwargs)


def _any_inference(values: Any) -> bool:
    for value in values:
        if isinstance(value, Tensor):
            if value.is_inference():
                return True
        elif type(value) in (list, tuple) and _any_inference(value):
            return True
    return False


_functions: dict[Any, tuple[Callable[..., Any], bool]] = {}


def _known(func: Any) -> tuple[Callable[..., Any], bool]:
    """Return what runs for a torch function, and whether it is a norm."""
    found = _functions.get(func)
    if found is None:
        plain = host.plain_kernel(func)
        found = _functions[func] = (plain, getattr(plain, "__name__", "") in _NORMS)
    return found


@contextmanager
def differentiable(*, weights_apart: bool = False) -> Iterator[None]:
    """Let networks that were written for inference run with a gradient while the block lasts.

    Only in this thread, and not in the backward pass that runs in the block: torch takes such modes off for it.

    Args:
        weights_apart: what has no gradient runs as in inference.
    """
    with _Differentiable(weights_apart=weights_apart):
        yield


def saving_copies(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` with copies of all that it saves for its gradient: FreeU writes to what it has just multiplied."""

    def saving(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda tensor: tensor):
            return function(*args, **kwargs)

    return saving
