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
from .missing import no_gradient


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
        """Return softmax(q k^T * scale + mask) v, before the output projection: (batch, heads, queries, channels)."""
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


class LastLayerSeen(Exception):
    """Ends a forward that has shown all that was asked for."""


class Watch:
    """Knows which layer is running in one forward, and passes its attention calls to ``measure``.

    Attributes:
        found: what was measured, in order.
        checks: raise ``ValueError`` where the attention of a known layer does not depend on the latent.
    """

    def __init__(self, layers: Sequence[AttentionLayer], measure: Measure, context: CallContext, *, checks: bool = False) -> None:
        self.layers = layers
        self.context = context
        self.measure = measure
        self.checks = checks
        self.running: list[tuple[AttentionLayer, list[None]]] = []
        self.found: Measurements = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        modules: dict[torch.nn.Module, AttentionLayer] = {layer.module: layer for layer in self.layers}
        with host.swapped_forward([(module, self._marked(module.forward, layer)) for module, layer in modules.items()]):
            yield

    @contextmanager
    def into(self, found: Measurements) -> Iterator[None]:
        """Collect measurements in ``found`` while the block lasts: of a part of the network, or of one that is computed again."""
        before, self.found = self.found, found
        try:
            yield
        finally:
            self.found = before

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
        comfy_function: Callable[..., Tensor],
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
        """Take the place of every attention call: torch's own kernels, which have a gradient."""
        host.check_interrupted()

        def compute() -> Tensor:
            forms = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape, "_inside_attn_wrapper": True}
            return host.attention_pytorch(q, k, v, heads, mask, attn_precision, **{**kwargs, **forms})

        if not self.running:
            return compute()
        layer, calls = self.running[-1]
        calls.append(None)
        if len(calls) <= layer.skip:
            return compute()
        if self.checks and torch.is_grad_enabled() and layer.kind != "unknown" and not (q.requires_grad or k.requires_grad):
            raise no_gradient(f"{layer.name} ({type(layer.module).__name__})")
        inputs = attention_inputs(q, k, heads, mask=mask, skip_reshape=skip_reshape, scale=kwargs.get("scale"))
        values = attention_inputs(q, v, heads, skip_reshape=skip_reshape).k
        call = AttentionCall(inputs, values, self.context, compute, skip_output_reshape, len(calls) - 1 - layer.skip)
        self.found.append((layer, self.measure(layer, call)))
        if layer is self.layers[-1]:
            raise LastLayerSeen
        return call.returned
