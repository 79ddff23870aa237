"""One differentiable forward for the whole pack: how a loss on attention changes with the latent.

ComfyUI prepares the model call as for any sampler (areas, ControlNet, hooks, casts) and the network runs where it would
have run, but with a gradient, only as deep as the last layer that is measured, and without saving a weight
(``frozen_ops``). ControlNet's residuals are taken as given. Nothing of it outlives the call.

Memory: everything between the latent and the last layer is kept (``fast``), or blocks are computed again when their
gradient is due, one image at a time (``low``); ``auto`` goes by the free memory, and further when that runs out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from .. import host
from ..host import ModelOptions, log
from ..networks.layers import AttentionLayer, checkpoint_blocks
from ..networks.placement import CallContext
from ..networks.table import network_layout
from .blocks import ChangedInPlace, recomputing_blocks
from .frozen_ops import Lanes
from .levels import Level, Memory, first_level
from .missing import every_layer_passes_a_gradient, is_about_gradients, no_gradient
from .plain import differentiable, plain_tensors_in, saving_copies
from .watch import AttentionCall, Gradient, LastLayerSeen, Measure, Measurements, Objective, Watch

# Half precision loses gradients below 6e-8: the loss is multiplied before the backward pass, and by less where that overflows.
_HALF_PRECISION_SCALES = (2.0**16, 2.0**8, 1.0)

# What torch says where a network needs more care than was taken.
_NEEDS_CARE = ("Inference tensor", "inference tensor", "modified by an inplace operation", "used in an in-place operation")


class _Care(IntEnum):
    """What is done for networks that were written for inference, from nothing to all."""

    NONE = 0  # U-Nets: all that a gradient needs are their weights and arguments, and nothing is changed in place
    COPIES = 1  # every torch function sees plain tensors, norms and blocks work on copies
    KEPT_COPIES = 2  # and what is kept of a block's arguments are copies


class ModelPass:
    """Forwards of one model that look at some of its layers, for one sampling run.

    Args:
        base_model: ComfyUI's model that is being sampled.
        options: the sampler's model options.
        layers: in the network's order; nothing behind the last one is computed.
        keeps_patches: whether other nodes' block patches act in these passes.
    """

    def __init__(
        self,
        base_model: Any,
        options: ModelOptions,
        layers: Sequence[AttentionLayer],
        memory: Memory = Memory.AUTO,
        *,
        keeps_patches: bool = True,
    ) -> None:
        self.base_model = base_model
        self.network = host.diffusion_model(base_model)
        self.layout = network_layout(self.network)
        self.options = host.with_wrapped_patches(host.internal_options(options, keeps_patches=keeps_patches), saving_copies)
        self.layers = list(layers)
        self.memory = memory
        self.level = Level.KEEP_ALL
        self._level_chosen = False
        self._lanes = Lanes(self.network)
        self._blocks = checkpoint_blocks(self.network)
        self._care = _Care.NONE if self.layout is not None and self.layout.family == "U-Net" else _Care.COPIES
        self._checked = self._asked_for_memory = False

    def observe(self, cond: dict[str, Any], x: Tensor, sigma: Tensor, measure: Measure) -> Measurements:
        """Run one forward without a gradient. Empty where the cond is not active at this sigma."""
        found: Measurements = []

        def body(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            watch = Watch(self.layers, measure, self._context([x, *args], kwargs))
            with self._watched(watch, host.apply_model_options([x, *args])) as options:
                _forward(executor, host.with_apply_model_options([x, *args], options), kwargs)
            found.extend(watch.found)
            return torch.zeros_like(x)

        host.call_with_cond(self.base_model, cond, x, sigma, self.options, body)
        return found

    def gradient(
        self, cond: dict[str, Any], x: Tensor, sigma: Tensor, objective: Objective, rows: Tensor | None = None
    ) -> Gradient | None:
        """Return the loss of each image and its gradient with respect to ``x``; None where the cond is not active at this sigma.

        Args:
            x: (batch, channels, ..., height, width), the sampler's latent; sigma: (batch,).
            rows: indices of the images that matter; the others are not computed.

        Raises:
            RuntimeError: none of the layers was seen.
            ValueError: a layer of the network has no gradient.
        """
        rows = torch.arange(len(x), device=x.device) if rows is None else rows
        while True:
            try:
                return self._gradient(cond, x, sigma, objective, self.parts(x, rows))
            except Exception as error:
                if not (self._takes_more_care(error) or self._saves_memory(error, x.device)):
                    raise

    def _takes_more_care(self, error: Exception) -> bool:
        careless = isinstance(error, ChangedInPlace) or any(words in str(error) for words in _NEEDS_CARE)
        if not careless or not isinstance(error, RuntimeError) or self._care == max(_Care):
            return False
        self._care = _Care(self._care + 1)
        return True

    def _saves_memory(self, error: Exception, device: torch.device) -> bool:
        """Go on with less memory where it ran out, or when that is all, with what other models give back."""
        if not host.is_out_of_memory(error) or self.memory is Memory.FAST:
            return False
        if self.level < max(Level):
            self.level = Level(self.level + 1)
            log.info("Out of memory in a gradient pass: trying again with less (memory 'low' does so from the start).")
            host.empty_cache()
            return True
        if self._asked_for_memory:
            return False
        self._asked_for_memory = True
        self._lanes.forget()
        if not host.free_other_models(self.base_model, device):
            return False
        log.info("Out of memory in a gradient pass: other models were taken off the device, trying again.")
        return True

    def parts(self, x: Tensor, rows: Tensor) -> list[Tensor]:
        """Return the images of a gradient pass as they are computed: together, or one at a time to save memory."""
        if not self._level_chosen:
            self.level, self._level_chosen = first_level(self.memory, self.base_model, x), True
        return list(rows.split(1)) if self.level == Level.ONE_IMAGE_AT_A_TIME else [rows]

    def _gradient(
        self, cond: dict[str, Any], x: Tensor, sigma: Tensor, objective: Objective, parts: list[Tensor]
    ) -> Gradient | None:
        found: list[Gradient] = []

        def body(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
            batch = len(args[0])
            with ExitStack() as stack:
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.enable_grad())
                stack.enter_context(host.differentiable_kernels())
                adds_in_place = host.changes_features(args)
                care = self._care if not adds_in_place else _Care.KEPT_COPIES
                stack.enter_context(host.swapped_forward(self._lanes.forwards(adds_in_place=adds_in_place)))
                if care != _Care.NONE:
                    stack.enter_context(differentiable())
                if not self._checked:
                    stack.enter_context(every_layer_passes_a_gradient(self.network))
                plain_args, plain_kwargs = plain_tensors_in(tuple(args)), plain_tensors_in(kwargs)
                for part in parts:
                    mine = [_rows(value, part, batch) for value in plain_args[:-1]]
                    mine.append(host.apply_model_options(plain_args))
                    others = _rows(plain_kwargs, part, batch)
                    found.append(self._differentiate(executor, mine, others, objective, part, care))
            return torch.zeros_like(args[0])

        host.call_with_cond(self.base_model, cond, x, sigma, self.options, body)
        if not found:
            return None
        self._checked = True
        latent = torch.zeros_like(x[torch.cat(parts)], dtype=_at_least_float32(x))
        host.cond_region(cond, latent).copy_(torch.cat([gradient.latent for gradient in found]))
        return Gradient(torch.cat([gradient.loss for gradient in found]), latent)

    def _differentiate(
        self, executor: Any, args: list[Any], kwargs: dict[str, Any], objective: Objective, rows: Tensor, care: _Care
    ) -> Gradient:
        leaf = args[0].to(_at_least_float32(args[0]), copy=True).requires_grad_()
        context = self._context(args, kwargs)

        def measure(layer: AttentionLayer, call: AttentionCall) -> Any:
            with differentiable():  # objectives bring inference tensors along
                return objective.measure(layer, call, rows)

        watch = Watch(self.layers, measure, context, checks=not self._checked)
        with ExitStack() as stack:
            options = stack.enter_context(self._watched(watch, host.apply_model_options(args)))
            if self.level != Level.KEEP_ALL:
                copies, keeps_copies = care >= _Care.COPIES, care >= _Care.KEPT_COPIES
                stack.enter_context(recomputing_blocks(self._blocks, watch, copies=copies, keeps_copies=keeps_copies))
            _forward(executor, host.with_apply_model_options([leaf, *args[1:]], options), kwargs)
            if not watch.found:
                raise RuntimeError(
                    "None of the layers to guide was seen: another node replaces this model's attention. "
                    "Take it out, or choose other layers."
                )
            with differentiable():
                loss = objective.loss(watch.found, rows)
            watch.found = []
            if not loss.requires_grad:
                raise no_gradient(f"{type(self.network).__module__}.{type(self.network).__qualname__}")
            return Gradient(loss.detach(), self._backward(loss, leaf))

    def _backward(self, loss: Tensor, leaf: Tensor) -> Tensor:
        try:
            return self._scaled_backward(loss, leaf)
        except RuntimeError as error:
            if is_about_gradients(error):
                raise no_gradient(f"{type(self.network).__module__}.{type(self.network).__qualname__}") from error
            raise

    def _scaled_backward(self, loss: Tensor, leaf: Tensor) -> Tensor:
        half = host.compute_dtype(self.base_model) == torch.float16
        scales = _HALF_PRECISION_SCALES if half else (1.0,)
        gradient = leaf.detach()
        for scale in scales:
            last = scale == scales[-1]
            gradient = torch.autograd.grad(loss.sum() * scale, leaf, retain_graph=not last)[0] / scale
            if last or bool(gradient.isfinite().all()):
                break
        return gradient

    def _context(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> CallContext:
        text = host.apply_model_text(args, kwargs, self.layout.text if self.layout else "c_crossattn")
        rows = 0 if text is None else text.shape[1]
        return CallContext(self.network, self.layout, host.latent_shape(args, kwargs), rows, kwargs)

    @contextmanager
    def _watched(self, watch: Watch, options: host.TransformerOptions) -> Iterator[host.TransformerOptions]:
        """Options for a forward whose attention ``watch`` sees, for as long as its blocks may run."""
        watched = host.with_attention(options, watch.attention)
        swapped = self.layout.drops_options if self.layout is not None else ()
        with watch.installed(), host.options_for_attention(swapped, watched):
            yield watched


def _forward(executor: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    try:
        executor(*args, **kwargs)
    except LastLayerSeen:
        host.end_prefetch()


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _rows(value: Any, rows: Tensor, batch: int) -> Any:
    """Return some images of everything in a model call that has one row per image."""
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.ndim and value.shape[0] == batch and len(rows) < batch else value
    if isinstance(value, dict):
        return {key: _rows(item, rows, batch) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_rows(item, rows, batch) for item in value)
    return value
