"""Watching the attention calls of one model call, and recording what they attend to."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import host
from ..host import AttentionInputs, TransformerOptions, attention_inputs
from ..networks.layers import AttentionLayer
from ..networks.placement import Placement
from .batches import LayerBatch, Site, size_of_call
from .probabilities import row_probabilities
from .recorder import CaptureRun
from .sums import Track, pooled_mass, pooled_queries, self_grid
from .token_places import Features, TokenPlaces, WatchedModel


class Running:
    """A layer while its module runs: how often it has called attention, and what the module was given."""

    __slots__ = ("at", "calls", "given", "layer")

    def __init__(self, layer: AttentionLayer, at: int) -> None:
        self.layer = layer
        self.at = at
        self.calls = 0
        self.given: Any = None


class ModelCall:
    """One call of the network: knows which layer is running, and records what it attends to."""

    def __init__(
        self,
        run: CaptureRun,
        model: WatchedModel,
        tracks: list[Track],
        args: Sequence[Any],
        arguments: Mapping[str, Any],
        options: TransformerOptions,
    ) -> None:
        self.run = run
        self.model = model
        self.tracks = tracks
        layout = model.layout
        self.layout = layout
        self.latent = host.latent_shape(args, arguments)
        text = host.apply_model_text(args, arguments, layout.text if layout else "c_crossattn")
        self.text = 0 if text is None else text.shape[1]
        self.repeats_text = layout is None or layout.repeats_text
        self.has_features = layout is not None and layout.patch is None
        self.arguments = arguments
        self.options = options
        self.in_worker = host.in_worker_thread(options)
        self.places = TokenPlaces(model, self.latent, self.text, arguments, run.note)
        self.plan = run.plan_of(self._form())
        self.running: list[Running] = []
        self.seen: dict[str, int] = {}  # attention to the text, by layer
        self.met: list[Site] = []  # that look at the text, in order
        self.is_new = False  # one of them came in no earlier model call of this form

    def _form(self) -> Hashable:
        """Return what the places of tokens depend on."""
        others = tuple([(name, _form_of(value)) for name, value in self.arguments.items()])
        return id(self.model), tuple(map(id, self.tracks)), self.latent, self.text, others

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the layers' modules for the length of the model call, and record what was kept for later at its end."""
        layers = self.model.layers
        forwards = [(layer.module, self._marked(Running(layer, at), layer.module.forward)) for at, layer in enumerate(layers)]
        try:
            with host.swapped_forward(forwards), ExitStack() as stack:
                for kind in [kind for kind, name in _PATCHED.items() if host.has_replacements(self.options, name)]:
                    for layer in layers:
                        if layer.kind == kind and hasattr(layer.module, "to_q"):
                            self._watch_projections(stack, layer)
                yield
            with torch.inference_mode():
                for batch in self.plan.batches:
                    if batch.names:
                        self._add_batch(batch)
            if self.plan.batches:
                grids = dict.fromkeys([site.place.grid for site in self.met if site.place is not None])
                self.run.sort_steps(self.tracks, list(grids))
            if self.is_new and not self.in_worker:
                self.plan.plan(self.met)
        finally:
            for batch in self.plan.batches:
                if batch.names:
                    batch.drop()
        for layer in layers:
            if layer.kind != "self" and layer.name not in self.seen:
                self.run.missed[layer.name] += 1

    def _marked(self, running: Running, forward: Callable[..., Any]) -> Callable[..., Any]:
        stack = self.running

        def marked(*args: Any, **kwargs: Any) -> Any:
            running.calls = 0
            running.given = args[0] if args else None
            stack.append(running)
            try:
                return forward(*args, **kwargs)
            finally:
                stack.pop()
                running.given = None

        return marked

    def _watch_projections(self, stack: ExitStack, layer: AttentionLayer) -> None:
        """Another node computes this layer's attention from the module's own projections: what they return is to be seen."""
        queries: list[Tensor] = []

        def query(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
            queries[:] = [output]

        def key(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
            if queries and not any(running.layer is layer for running in self.running):
                self.run.note("another node replaces attention modules; shown is the text's attention without what it adds")
                inputs = attention_inputs(queries[0], output, layer.module.heads)  # type: ignore[arg-type]
                self._record(layer, inputs, self._features(None, self.options) if self.has_features else None)
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
        running = self.running[-1]
        running.calls += 1
        layer = running.layer
        if running.calls <= layer.skip:
            return
        options = transformer_options or self.options
        features = self._features(running.given, options) if self.has_features else None
        key = (running.at, running.calls, q.shape, k.shape, heads, skip_reshape, scale, mask is None, features, q.device)
        site = self.plan.sites.get(key)
        by_itself = self.run.memory.side is not None or q.requires_grad or k.requires_grad
        if site is None or site.batch is None or by_itself:
            inputs = attention_inputs(q, k, heads, mask=mask, skip_reshape=skip_reshape, scale=scale)
            place = self._record(layer, inputs, features, site)
            if site is None:
                size = None
                if place is not None and mask is None and layer.kind != "unknown" and not self.in_worker:
                    size = size_of_call(q, k, heads, scale, place, heads_first=skip_reshape)
                site = self.plan.sites[key] = Site(layer, place, size)
            if place is not None and place.text is not None:
                self.is_new = self.is_new or site not in self.plan.planned
                self.met.append(site)
        else:
            self.met.append(site)
            if site.batch.take(layer.name, q, k):
                self._add_batch(site.batch)

    def _features(self, given: Any, options: TransformerOptions) -> Features:
        if isinstance(given, Tensor) and given.ndim == 4:
            return given.shape[2], given.shape[3]
        return host.activations_size(options)

    @torch.inference_mode()
    def _record(
        self, layer: AttentionLayer, inputs: AttentionInputs, features: Features, site: Site | None = None
    ) -> Placement | None:
        """Record one attention call by itself. Return where text and image are in it."""
        if inputs.batch % len(self.tracks) or inputs.batch != self.latent[0]:
            self.run.note("another node changes the batch inside attention, so some of it is left out")
            return None
        place = self.places.of(layer, inputs, features) if site is None else site.place
        if place is None:
            return None
        keeps_self = self.run.settings.self_attention and place.image is not None
        if place.text is not None or keeps_self:
            self._add(layer, inputs, place, keeps_self)
        return place

    def _add(self, layer: AttentionLayer, inputs: AttentionInputs, place: Placement, keeps_self: bool) -> None:
        """Cut text and image columns out of every row's softmax, and add them to each prompt's sums."""
        batch, heads, queries = inputs.batch, inputs.heads, math.prod(place.grid)
        text = place.text
        if text is not None:
            for waiting in self.plan.batches:  # what is added up on one grid is added in the order of the layers
                if waiting.names and waiting.grid == place.grid:
                    self._add_batch(waiting)
        kept = self._kept_heads(batch, heads, 0 if text is None else text.stop - text.start, queries)
        own = self_grid(place.grid, self.run.memory.self_tokens)
        parts: list[list[Tensor]] = [[] for _ in self.tracks]
        looks = inputs.q.new_empty(batch, queries, math.prod(own), dtype=torch.float32) if keeps_self else None
        for start, rows in row_probabilities(inputs, place.rows):
            if text is not None:
                columns = rows[..., text]
                if place.repeated_text is not None:
                    repeated = place.repeated_text.stop - place.repeated_text.start
                    columns = torch.cat([columns[..., :-repeated], columns[..., -repeated:] + rows[..., place.repeated_text]], -1)
                columns = columns.transpose(-1, -2)
                for track, chunk, part in zip(self.tracks, columns.chunk(len(self.tracks)), parts, strict=True):
                    part.append(self._shown(chunk, track, kept).contiguous())
            if looks is not None:
                looks[:, start : start + rows.shape[2]] = pooled_mass(rows[..., place.image].sum(1), place.grid, own)
        name = layer.name
        if text is not None:
            if layer.kind == "unknown" and name in self.seen:  # a layer that nothing is known of may look at the text again
                name = f"{name}.{self.seen[name]}"
                if name not in self.run.order:
                    self.run.order.append(name)
            self.seen[layer.name] = self.seen.get(layer.name, 0) + 1
        for index, (track, part) in enumerate(zip(self.tracks, parts, strict=True)):
            if part:
                maps = part[0] if len(part) == 1 else torch.cat(part, -1)
                self.run.add_text(track, name, heads, maps.unflatten(-1, place.grid))
            if looks is not None:
                mine = slice(index * batch // len(self.tracks), (index + 1) * batch // len(self.tracks))
                self.run.add_self(track, own, heads, pooled_queries(looks[mine], place.grid, own))

    def _add_batch(self, batch: LayerBatch) -> None:
        """Add the attention of several layers to each prompt's sums."""
        size, grid = batch.size, batch.grid
        tracks = self.tracks
        kept = self._kept_heads(size.batch, size.heads, size.keys, size.queries)
        names, columns = batch.columns()
        for name in names:
            self.seen[name] = 1
        chunks = columns.chunk(len(tracks), 1)
        maps = [self._shown(chunk, track, kept, whole=True) for track, chunk in zip(tracks, chunks, strict=True)]
        if kept == 1:
            sums = [each.squeeze(2).sum(0) * size.heads for each in maps]
        elif all([each.shape[-2] == size.keys for each in maps]):
            sums = list(columns.sum(2).sum(0).chunk(len(tracks)))  # of all tracks at once
        else:
            sums = [each.sum(2).sum(0) for each in maps]
        maps, sums = ([each.view(*each.shape[:-1], *grid) for each in tensors] for tensors in (maps, sums))
        self.run.add_texts(tracks, names, size.heads, maps, sums)

    def _kept_heads(self, batch: int, heads: int, tokens: int, queries: int) -> int:
        """Return how many heads are kept apart of an attention call: all of them, or only their mean."""
        size = 4 * batch * heads * self._stored(tokens) * queries if tokens else 0
        return heads if self.run.keeps_heads(size) else 1

    def _stored(self, tokens: int) -> int:
        """Return how many of a text's tokens get maps of their own, the mean over the prompts of the batch."""
        return max(tokens - sum([len(track.padding) for track in self.tracks]) // len(self.tracks), 1)

    def _shown(self, columns: Tensor, track: Track, kept: int, *, whole: bool = False) -> Tensor:
        """Return attention (..., heads, text, image) to the tokens that a view may show: (..., heads or 1, tokens, image).

        Args:
            whole: the image attends to nothing but the text.
        """
        if kept == 1:
            columns = columns.mean(-3, keepdim=True)
        return track.without_padding(self._folded(columns, track), whole=whole and not self._is_cut(columns, track))

    def _folded(self, columns: Tensor, track: Track) -> Tensor:
        """Return attention (..., tokens, image) to the prompt's own rows.

        ComfyUI repeats a shorter prompt to the length of a longer one it is batched with, and pads some on the left.
        """
        tokens, rows = columns.shape[-2], track.rows
        if not rows or rows == tokens:
            return columns
        if self._is_cut(columns, track):
            return columns[..., tokens - rows :, :]
        if self.repeats_text and tokens == self.text and tokens % rows == 0:
            return columns.unflatten(-2, (-1, rows)).sum(-3)
        return columns

    def _is_cut(self, columns: Tensor, track: Track) -> bool:
        """Return whether attention (..., tokens, image) has rows in front that are not the prompt's own."""
        return self.model.left_padded and 0 < track.rows < columns.shape[-2]


# The options under which other nodes replace a layer's attention.
_PATCHED = {"self": "attn1", "cross": "attn2"}


def _form_of(value: Any) -> Hashable:
    """Return what the places of tokens may depend on in an argument of a model call: its shape, or whether it is there."""
    return value.shape if isinstance(value, Tensor) else value is None
