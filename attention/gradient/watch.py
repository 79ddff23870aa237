"""Watching the attention calls of some layers in one differentiable forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import host
from ..host import AttentionInputs, attention_inputs
from ..networks.layers import AttentionLayer
from ..networks.placement import CallContext


@dataclass
class AttentionCall:
    """One attention call of a watched layer.

    Attributes:
        inputs: q and k (batch, heads, tokens, channels), mask and scale.
        v: (batch, heads, keys, channels).
        context: the model call it belongs to.
        index: its place among the layer's calls in one forward.
    """

    inputs: AttentionInputs
    v: Tensor
    context: CallContext
    compute: Callable[[], Tensor] = field(repr=False)
    keeps_heads: bool = False
    index: int = 0

    @cached_property
    def returned(self) -> Tensor:
        """Return the call's result in the form in which the network wants it."""
        return self.compute()

    @property
    def output(self) -> Tensor:
        """softmax(q k^T * scale + mask) v, before the output projection: (batch, heads, queries, channels)."""
        return self.returned if self.keeps_heads else self.returned.unflatten(-1, (self.inputs.heads, -1)).transpose(1, 2)


# Looks at one call; what it returns comes back in order of execution. May be called again for the same call when blocks
# are computed again, so it must have no effect but its result.
Measure = Callable[[AttentionLayer, AttentionCall], Any]
Measurements = list[tuple[AttentionLayer, Any]]


class Objective(Protocol):
    """A loss on the attention of some layers."""

    def measure(self, layer: AttentionLayer, call: AttentionCall, rows: Tensor) -> Any:
        """Return what the loss needs of one call; ``rows`` are the images of the batch that this pass is about."""

    def loss(self, measurements: Measurements, rows: Tensor) -> Tensor:
        """Return (len(rows),), float32: each image's own loss."""


@dataclass(frozen=True)
class Gradient:
    """loss: (rows,). latent: d loss / d x, (rows, channels, ..., height, width), in the units of the sampler's latent."""

    loss: Tensor
    latent: Tensor


class _LastLayerSeen(Exception):
    """Ends a forward that has shown all that was asked for."""


class _Watch:
    """Knows which layer is running in one forward, and passes its attention calls to ``measure``."""

    def __init__(self, layers: Sequence[AttentionLayer], measure: Measure, context: CallContext) -> None:
        self.layers = layers
        self.context = context
        self.measure = measure
        self.running: list[tuple[AttentionLayer, list[None]]] = []
        self.found: Measurements | None = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        modules: dict[torch.nn.Module, AttentionLayer] = {layer.module: layer for layer in self.layers}
        with host.swapped_forward([(module, self._marked(module.forward, layer)) for module, layer in modules.items()]):
            yield

    def _marked(self, forward: Callable[..., Any], layer: AttentionLayer) -> Callable[..., Any]:
        def marked(*args: Any, **kwargs: Any) -> Any:
            self.running.append((layer, []))
            try:
                return forward(*args, **kwargs)
            finally:
                self.running.pop()

        return marked

    def attention(
        self,
        host_function: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Takes the place of every attention call: torch's own kernels, which have a gradient."""

        def compute() -> Tensor:
            forms = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape, "_inside_attn_wrapper": True}
            return host.attention_pytorch(q, k, v, heads, mask, attn_precision, **{**kwargs, **forms})

        if not self.running:
            return compute()
        layer, calls = self.running[-1]
        calls.append(None)
        if len(calls) <= layer.skip:
            return compute()
        inputs = attention_inputs(q, k, heads, mask=mask, skip_reshape=skip_reshape, scale=kwargs.get("scale"))
        values = attention_inputs(q, v, heads, skip_reshape=skip_reshape).k
        call = AttentionCall(inputs, values, self.context, compute, skip_output_reshape, len(calls) - 1 - layer.skip)
        result = self.measure(layer, call)
        if self.found is not None:
            self.found.append((layer, result))
            if layer is self.layers[-1]:
                raise _LastLayerSeen
        return call.returned

    def close(self) -> Measurements:
        """End the forward; calls that are seen after this belong to blocks that are computed again."""
        found, self.found = self.found or [], None
        return found
