"""Watching the attention calls of one model call, and recording what they attend to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor

from .. import host
from ..host import AttentionInputs, TransformerOptions, attention_inputs
from ..networks.grids import Grid, token_grid
from ..networks.layers import AttentionLayer
from ..networks.placement import CallContext, Placement, image_rows, joint_placement
from ..networks.table import LEFT_PADDED_MODELS, network_layout, unknown_network_message
from .probabilities import row_probabilities
from .recorder import CaptureRun
from .sums import Track, pooled_mass, pooled_queries, self_grid


class ModelCall:
    """One call of the network: knows which layer is running, and records what it attends to."""

    def __init__(
        self,
        run: CaptureRun,
        model: Any,
        layers: list[AttentionLayer],
        tracks: list[Track],
        args: Sequence[Any],
        arguments: Mapping[str, Any],
        options: TransformerOptions,
    ) -> None:
        self.run = run
        self.tracks = tracks
        self.network = host.diffusion_model(model)
        self.layout = network_layout(self.network)
        if self.layout is None:
            run.note(unknown_network_message(self.network))
        self.latent = host.latent_shape(args, arguments)
        text = host.apply_model_text(args, arguments, self.layout.text if self.layout else "c_crossattn")
        self.text = 0 if text is None else text.shape[1]
        self.left_padded = type(model).__name__ in LEFT_PADDED_MODELS
        self.repeats_text = self.layout is None or self.layout.repeats_text
        self.arguments = arguments
        self.options = options
        self.layers = layers
        self.running: list[tuple[AttentionLayer, Iterator[int], tuple[int, ...]]] = []
        self.seen: Counter[str] = Counter()  # attention to the text, by layer

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on the layers' modules for the length of the model call."""
        with ExitStack() as stack:
            for layer in self.layers:
                stack.callback(layer.module.register_forward_pre_hook(self._enter(layer)).remove)
                stack.callback(layer.module.register_forward_hook(self._leave).remove)
                if layer.kind in ("self", "cross") and self._is_replaced(layer):
                    self._watch_projections(stack, layer)
            yield
        for layer in self.layers:
            if layer.kind != "self" and layer.name not in self.seen:
                self.run.missed[layer.name] += 1

    def _enter(self, layer: AttentionLayer) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: Any) -> None:
            shape = tuple(inputs[0].shape) if inputs and torch.is_tensor(inputs[0]) else ()
            self.running.append((layer, count(), shape))

        return hook

    def _leave(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        self.running.pop()

    def _is_replaced(self, layer: AttentionLayer) -> bool:
        return hasattr(layer.module, "to_q") and host.has_replacements(self.options, "attn1" if layer.kind == "self" else "attn2")

    def _watch_projections(self, stack: ExitStack, layer: AttentionLayer) -> None:
        """Another node computes this layer's attention from the module's own projections: what they return is to be seen."""
        queries: list[Tensor] = []

        def query(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
            queries[:] = [output]

        def key(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
            if queries and not any(running is layer for running, _, _ in self.running):
                self.run.note("another node replaces attention modules; shown is the text's attention without what it adds")
                self._record(layer, attention_inputs(queries[0], output, layer.module.heads), (), self.options)  # type: ignore[arg-type]
                queries.clear()

        for name, hook in (("to_q", query), ("to_k", key)):
            stack.callback(layer.module.get_submodule(name).register_forward_hook(hook).remove)

    def observe(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        *,
        scale: float | None = None,
        transformer_options: TransformerOptions | None = None,
        **kwargs: Any,
    ) -> None:
        """Record one attention call, with the arguments of ComfyUI's attention functions."""
        if not self.running:
            return
        layer, calls, shape = self.running[-1]
        if next(calls) >= layer.skip:
            inputs = attention_inputs(q, k, heads, mask=mask, skip_reshape=skip_reshape, scale=scale)
            self._record(layer, inputs, shape, transformer_options or self.options)

    @torch.no_grad()
    def _record(
        self, layer: AttentionLayer, inputs: AttentionInputs, shape: tuple[int, ...], options: TransformerOptions
    ) -> None:
        if inputs.batch % len(self.tracks) or inputs.batch != self.latent[0]:
            self.run.note("another node changes the batch inside attention, so some of it is left out")
            return
        place = self._place(layer, inputs, shape, options)
        if place is None:
            return
        keeps_self = self.run.settings.self_attention and place.image is not None
        if place.text is None and not keeps_self:
            return
        self._add(layer, inputs, place, keeps_self)

    def _add(self, layer: AttentionLayer, inputs: AttentionInputs, place: Placement, keeps_self: bool) -> None:
        """Cut text and image columns out of every row's softmax, and add them to each prompt's sums."""
        batch, heads, queries = inputs.batch, inputs.heads, math.prod(place.grid)
        text = place.text
        size = 0 if text is None else 4 * batch * heads * self._stored(text.stop - text.start) * queries
        kept = heads if self.run.keeps_heads(size) else 1
        own = self_grid(place.grid, self.run.memory.self_tokens)
        parts: list[list[Tensor]] = [[] for _ in self.tracks]
        looks = inputs.q.new_empty(batch, queries, math.prod(own), dtype=torch.float32) if keeps_self else None
        for start, rows in row_probabilities(inputs, place.rows):
            if text is not None:
                columns = rows[..., text]
                if place.repeated_text is not None:
                    repeated = place.repeated_text.stop - place.repeated_text.start
                    columns = torch.cat([columns[..., :-repeated], columns[..., -repeated:] + rows[..., place.repeated_text]], -1)
                for track, chunk, part in zip(self.tracks, columns.chunk(len(self.tracks)), parts, strict=True):
                    shown = track.without_padding(self._folded(chunk if kept > 1 else chunk.mean(1, keepdim=True), track))
                    part.append(shown.transpose(-1, -2).contiguous())
            if looks is not None:
                looks[:, start : start + rows.shape[2]] = pooled_mass(rows[..., place.image].sum(1), place.grid, own)
        name = layer.name
        if text is not None:
            if layer.kind == "unknown" and self.seen[name]:  # a layer that nothing is known of may look at the text again
                name = f"{name}.{self.seen[name]}"
                if name not in self.run.order:
                    self.run.order.append(name)
            self.seen[layer.name] += 1
        for index, (track, part) in enumerate(zip(self.tracks, parts, strict=True)):
            if part:
                maps = part[0] if len(part) == 1 else torch.cat(part, -1)
                self.run.add_text(track, name, heads, maps.unflatten(-1, place.grid))
            if looks is not None:
                mine = slice(index * batch // len(self.tracks), (index + 1) * batch // len(self.tracks))
                self.run.add_self(track, own, heads, pooled_queries(looks[mine], place.grid, own))

    def _stored(self, tokens: int) -> int:
        """Return how many of a text's tokens get maps of their own, the mean over the prompts of the batch."""
        return max(tokens - sum(len(track.padding) for track in self.tracks) // len(self.tracks), 1)

    def _folded(self, columns: Tensor, track: Track) -> Tensor:
        """Return attention (..., tokens) to the prompt's own rows.

        ComfyUI repeats a shorter prompt to the length of a longer one it is batched with, and pads some on the left.
        """
        tokens, rows = columns.shape[-1], track.rows
        if rows and self.left_padded and tokens > rows:
            return columns[..., tokens - rows :]
        if rows and self.repeats_text and tokens == self.text and tokens % rows == 0:
            return columns.unflatten(-1, (-1, rows)).sum(-2)
        return columns

    # Where the tokens are

    def _place(
        self, layer: AttentionLayer, inputs: AttentionInputs, shape: tuple[int, ...], options: TransformerOptions
    ) -> Placement | None:
        grid = self._grid(layer, inputs, shape, options)
        if grid is None or inputs.queries < math.prod(grid):
            if not (self.layout is not None and self.layout.guided):
                self._note_unplaced(layer)
            return None
        if layer.kind == "joint":
            place = self._place_joint(inputs, grid)
            if place is None:
                self._note_unplaced(layer)
            return place
        rows = image_rows(self._context(), inputs.queries, grid)
        if inputs.keys == inputs.queries and layer.kind != "cross":
            return Placement(grid, rows, None, rows)
        if layer.kind == "self":
            return None
        if layer.kind == "unknown" and inputs.keys != self.text:
            self._note_unplaced(layer)
            return None
        return Placement(grid, rows, slice(0, inputs.keys), None)

    def _place_joint(self, inputs: AttentionInputs, grid: Grid) -> Placement | None:
        return joint_placement(self._context(), inputs.keys, inputs.queries, grid)

    def _context(self) -> CallContext:
        return CallContext(self.network, self.layout, self.latent, self.text, self.arguments)

    def _grid(
        self, layer: AttentionLayer, inputs: AttentionInputs, shape: tuple[int, ...], options: TransformerOptions
    ) -> Grid | None:
        if self.layout is not None and self.layout.patch is None:
            size = (shape[2], shape[3]) if len(shape) == 4 else host.activations_size(options)
            if size is not None:
                return 1, *size
        return token_grid(self.network, self.layout, self.latent, inputs.queries)

    def _note_unplaced(self, layer: AttentionLayer) -> None:
        if layer.kind in ("cross", "joint"):
            self.run.note(
                "some attention has tokens that cannot be told apart: reference images, or another node merges or splits tokens"
            )
