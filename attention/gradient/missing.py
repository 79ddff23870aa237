"""Layers that pass no gradient: found in the first pass of a run, and named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import host
from .plain import has_gradient
from .rerun import is_floating, put_back, taken_out

_PERTURBATION, _CHANGED = 0.1, 1e-3  # of the input's spread, and how much of its spread an output must then move


def no_gradient(module: nn.Module | str) -> ValueError:
    """Return the error for a layer whose kernel has no gradient."""
    name = module if isinstance(module, str) else f"{type(module).__module__}.{type(module).__qualname__}"
    return ValueError(
        f"No gradient can be taken through this model: its layer {name} has none (the kernel of another node pack, or of a "
        "quantised format). Load the model as fp16, bf16, fp8 or GGUF with a loader whose layers have a gradient, and try again."
    )


def is_about_gradients(error: RuntimeError) -> bool:
    """Return whether one of torch's errors says that something has no gradient."""
    return any(words in str(error) for words in ("derivative for", "require grad", "automatic differentiation"))


@contextmanager
def every_layer_passes_a_gradient(network: nn.Module) -> Iterator[None]:
    """Raise ``ValueError`` in the block where a module depends on an input that requires a gradient, and its output has none."""

    def checked(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            if torch.is_grad_enabled() and has_gradient((args, kwargs)) and not has_gradient(result):
                if _depends(forward, args, kwargs, result):
                    raise no_gradient(module)
            return result

        return run

    modules = [module for _, module in host.named_modules(network) if type(module).forward is not nn.Module.forward]
    with host.swapped_forward([(module, checked(module, module.forward)) for module in modules]):
        yield


def _depends(forward: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> bool:
    """Return whether a result changes with its inputs. (A table of positions may be given a latent for its shape alone.)"""
    before: list[Tensor] = []
    taken_out(result, before, is_floating)
    if not before:
        return False
    before = [tensor.detach().clone() for tensor in before]  # the layer may write into a buffer of its own
    inputs: list[Tensor] = []
    call = taken_out((args, kwargs), inputs, lambda tensor: tensor.requires_grad)
    generator = torch.Generator().manual_seed(0)
    moved = []
    for x in inputs:
        noise = torch.randn(x.shape, generator=generator).to(x.device, x.dtype)
        moved.append(x.detach() + _PERTURBATION * x.detach().abs().mean() * noise)
    with torch.no_grad():
        own_args, own_kwargs = put_back(call, moved)
        after: list[Tensor] = []
        taken_out(forward(*own_args, **own_kwargs), after, is_floating)
    return any(float((y - x).abs().max()) > _CHANGED * float(x.abs().max()) for x, y in zip(before, after, strict=True))
