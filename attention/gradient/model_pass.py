"""One differentiable forward for the whole pack: how a loss on attention changes with the latent.

ComfyUI prepares the model call as for any sampler (areas, ControlNet, hooks, casts) and the network runs where it would
have run, but with a gradient, only as deep as the last layer that is looked at, and without saving a weight
(``frozen_ops``). ControlNet's residuals are taken as given. Nothing of it outlives the call.

Memory: everything between the latent and the last layer is kept (``fast``), or blocks are computed again when their
gradient is due, one image at a time (``low``); ``auto`` goes by the free memory, and further when that runs out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum, IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import host
from ..host import ModelOptions, log
from ..networks.layers import AttentionLayer, checkpoint_blocks
from ..networks.placement import CallContext
from ..networks.table import network_layout
from .frozen_ops import Differentiable, frozen_ops, saving_copies
from .watch import Gradient, Measure, Measurements, Objective, _LastLayerSeen, _Watch

# Half precision loses gradients below 6e-8: the loss is multiplied before the backward pass, and by less where that overflows.
_HALF_PRECISION_SCALES = (2.0**16, 2.0**8, 1.0)

# Kept activations of a differentiable pass, in units of what ComfyUI reckons for a forward of a network of 16 blocks:
# 0.65 GiB against 0.16 on SD1.5 at 512 px; blocks that are computed again need a fifth of it.
_KEPT_PER_FORWARD, _BLOCKS_PER_FORWARD, _RECOMPUTED = 4.0, 16, 0.2


class Memory(Enum):
    """How much a differentiable pass keeps."""

    AUTO = "auto"
    FAST = "fast"
    LOW = "low"


class _Level(IntEnum):
    KEEP_ALL = 0
    RECOMPUTE_BLOCKS = 1
    ONE_IMAGE_AT_A_TIME = 2


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
        self.level = _Level.KEEP_ALL
        self._level_chosen = False

    def observe(self, cond: dict[str, Any], x: Tensor, sigma: Tensor, measure: Measure) -> Measurements:
        """Run one forward without a gradient. Empty where the cond is not active at this sigma."""
        found: Measurements = []

        def body(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            watch = _Watch(self.layers, measure, self._context([x, *args], kwargs))
            with self._watched(watch, host.apply_model_options([x, *args])) as options:
                _forward(executor, host.with_apply_model_options([x, *args], options), kwargs)
            found.extend(watch.close())
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
        """
        rows = torch.arange(len(x), device=x.device) if rows is None else rows
        while True:
            try:
                return self._gradient(cond, x, sigma, objective, self.parts(x, rows))
            except Exception as error:
                if self.memory is not Memory.AUTO or not host.is_out_of_memory(error) or self.level == max(_Level):
                    raise
            self.level = _Level(self.level + 1)
            log.info("Out of memory in a gradient pass: trying again with less (memory 'low' does so from the start).")
            host.empty_cache()

    def parts(self, x: Tensor, rows: Tensor) -> list[Tensor]:
        """Return the images of a gradient pass as they are computed: together, or one at a time to save memory."""
        if not self._level_chosen:
            self.level, self._level_chosen = self._first_level(x), True
        return list(rows.split(1)) if self.level == _Level.ONE_IMAGE_AT_A_TIME else [rows]

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
                stack.enter_context(frozen_ops(self.network, adds_in_place=host.changes_features(args)))
                for part in parts:
                    mine, others = [_rows(value, part, batch) for value in args[:-1]], _rows(kwargs, part, batch)
                    mine.append(host.apply_model_options(args))
                    found.append(self._differentiate(executor, mine, others, objective, part))
            return torch.zeros_like(args[0])

        host.call_with_cond(self.base_model, cond, x, sigma, self.options, body)
        if not found:
            return None
        latent = torch.zeros_like(x[torch.cat(parts)], dtype=_at_least_float32(x))
        host.cond_region(cond, latent).copy_(torch.cat([gradient.latent for gradient in found]))
        return Gradient(torch.cat([gradient.loss for gradient in found]), latent)

    def _differentiate(
        self, executor: Any, args: list[Any], kwargs: dict[str, Any], objective: Objective, rows: Tensor
    ) -> Gradient:
        leaf = args[0].to(_at_least_float32(args[0]), copy=True).requires_grad_()
        context = self._context(args, kwargs)
        watch = _Watch(self.layers, lambda layer, call: objective.measure(layer, call, rows), context)
        with ExitStack() as stack:
            options = stack.enter_context(self._watched(watch, host.apply_model_options(args)))
            if self.level != _Level.KEEP_ALL:
                stack.enter_context(self._recomputing_blocks(watch, copies=host.changes_features(args)))
            _forward(executor, host.with_apply_model_options([leaf, *args[1:]], options), kwargs)
            measurements = watch.close()
            if not measurements:
                raise RuntimeError(
                    "None of the layers to guide was seen: another node replaces this model's attention. "
                    "Take it out, or choose other layers."
                )
            loss = objective.loss(measurements, rows)
            del measurements
            return Gradient(loss.detach(), self._backward(loss, leaf))

    def _backward(self, loss: Tensor, leaf: Tensor) -> Tensor:
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
    def _watched(self, watch: _Watch, options: host.TransformerOptions) -> Iterator[host.TransformerOptions]:
        """Options for a forward whose attention ``watch`` sees, for as long as its blocks may run."""
        watched = host.with_attention(options, watch.attention)
        swapped = self.layout.drops_options if self.layout is not None else ()
        with watch.installed(), host.options_for_attention(swapped, watched):
            yield watched

    # Memory

    def _first_level(self, x: Tensor) -> _Level:
        if self.memory is not Memory.AUTO:
            return _Level.KEEP_ALL if self.memory is Memory.FAST else _Level.ONE_IMAGE_AT_A_TIME
        blocks = len(checkpoint_blocks(self.network))
        needed = host.forward_memory(self.base_model, x) * _KEPT_PER_FORWARD * blocks / _BLOCKS_PER_FORWARD
        spare = host.spare_memory(x.device)
        if needed < spare:
            return _Level.KEEP_ALL
        return _Level.RECOMPUTE_BLOCKS if needed * _RECOMPUTED < spare else _Level.ONE_IMAGE_AT_A_TIME

    @contextmanager
    def _recomputing_blocks(self, watch: _Watch, *, copies: bool) -> Iterator[None]:
        """Blocks keep their inputs only (``copies`` of them where they are changed later), and run once more in the backward
        pass."""

        def block_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
            def checkpointed(*args: Any, **kwargs: Any) -> Any:
                failures: list[BaseException] = []

                def run(*args: Any, **kwargs: Any) -> Any:
                    try:
                        with Differentiable():  # the backward pass of a GPU runs in a thread of its own
                            return forward(*_fresh(args), **_fresh(kwargs))
                    except BaseException as error:
                        if watch.found is None:
                            raise
                        failures.append(error)  # raised in here it would leave torch's hooks behind until it is forgotten
                        return None

                kept = [(_fresh if copies else _own_options)(value) for value in (args, kwargs)]
                result = checkpoint(run, *kept[0], use_reentrant=False, preserve_rng_state=False, **kept[1])
                if failures:
                    raise failures[0]
                return result

            return checkpointed

        blocks = checkpoint_blocks(self.network)
        with host.swapped_forward([(block, block_forward(block.forward)) for block in blocks]):
            yield


def _forward(executor: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    try:
        executor(*args, **kwargs)
    except _LastLayerSeen:
        pass


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _own_options(value: Any) -> Any:
    """Return the same arguments with copies of their dictionaries."""
    if isinstance(value, dict):
        return {key: _own_options(item) for key, item in value.items()}
    return tuple(_own_options(item) for item in value) if type(value) is tuple else value


def _fresh(value: Any) -> Any:
    """Return the same arguments, not to be changed by what is done with these: dictionaries and floating tensors are copies.

    Networks write their progress into the options, and some add to their tokens in place.
    """
    if isinstance(value, dict):
        return {key: item if callable(item) else _fresh(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_fresh(item) for item in value)
    return value.clone() if isinstance(value, Tensor) and value.is_floating_point() else value


def _rows(value: Any, rows: Tensor, batch: int) -> Any:
    """Return some images of everything in a model call that has one row per image."""
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.ndim and value.shape[0] == batch and len(rows) < batch else value
    if isinstance(value, dict):
        return {key: _rows(item, rows, batch) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_rows(item, rows, batch) for item in value)
    return value
