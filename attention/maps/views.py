"""The six views of one image's attention maps, each drawn as figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .attn_maps import AttnMaps
from .drawing.canvas import MIN_SIDE, Figure, number
from .drawing.chart import Marker, Plot, Series, line_chart
from .drawing.colormaps import colorize, word_color
from .drawing.layouts import Cell, captioned, grid, segments, strip
from .drawing.overlay import blend, draw_point
from .drawing.pixels import fitted, resize_heat, resize_image
from .drawing.scales import Normalize, Scale, scales
from .heats import Source
from .request import Request, View
from .words import Word

# All overlays together have at most this many pixels; with very many words they are drawn smaller.
_MOST_PIXELS = 64_000_000
_FRAMES, _FRAME_SIDE = 8, 256
_COLUMNS = 8
_HEADS = 16


@dataclass(frozen=True)
class Shown:
    """One image with the heat of its words, and the values that their colours stand for."""

    index: int
    count: int
    image: torch.Tensor
    source: Source
    words: Sequence[Word]
    heats: Sequence[torch.Tensor]
    scales: Sequence[Scale]

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[0], self.image.shape[1]

    def first(self, count: int) -> Shown:
        """Return the same image with the first of its words."""
        if count >= len(self.words):
            return self
        return replace(self, words=self.words[:count], heats=self.heats[:count], scales=self.scales[:count])

    def about(self, *facts: str) -> str:
        """Return the line under a title."""
        which = [f"image {self.index + 1} of {self.count}"] if self.count > 1 else []
        return ", ".join([f"{self.source.prompt} prompt", *which, *(fact for fact in facts if fact)])


def _overlays(entry: Shown, request: Request) -> Iterator[Figure]:
    """Yield one image for each word."""
    figures = entry.count * len(entry.words)
    longest = max(entry.size)
    side = min(longest, round(longest * math.sqrt(_MOST_PIXELS / (figures * math.prod(entry.size)))))
    shown = resize_image(entry.image, fitted(entry.image, max(side, MIN_SIDE)))
    about = entry.about(_plural(len(entry.source.steps(entry.words)), "step"), _plural(len(entry.source.maps.layers), "layer"))
    for word, heat, scale in zip(entry.words, entry.heats, entry.scales, strict=True):
        yield captioned(blend(shown, scale.apply(heat), request.style), word.name, about, scale, request.style)


def _strips(entry: Shown, request: Request) -> Iterator[Figure]:
    """Yield one film strip for each word; all its frames share a colour scale."""
    source = entry.source
    steps = chosen_steps(source.steps(entry.words), _FRAMES)
    rows = [[source.step_heat(word, step) for step in steps] for word in entry.words]
    shared = scales([torch.stack(row) for row in rows], request.normalize)
    frame = resize_image(entry.image, fitted(entry.image, _FRAME_SIDE))
    for word, row, scale in zip(entry.words, rows, shared, strict=True):
        cells = [
            Cell(blend(frame, scale.apply(heat), request.style), f"step {step + 1}", f"sigma {source.maps.sigmas[step]:.3g}")
            for step, heat in zip(steps, row, strict=True)
        ]
        about = entry.about(f"{len(steps)} of {_plural(source.maps.steps, 'step')}")
        yield strip(cells, word.name, about, scale, request.style)


def chosen_steps(steps: Sequence[int], most: int) -> list[int]:
    """Evenly spread, with the first and the last."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(at * (len(steps) - 1) / (most - 1))] for at in range(most)]


def _layers(entry: Shown, request: Request) -> Iterator[Figure]:
    """Layers by words, or, where single heads were kept, layers by heads for each word."""
    source, layers = entry.source, entry.source.maps.layers
    most_heads = max(source.maps.heads(layer) for layer in layers)
    if most_heads > 1:
        names = ["mean", *(f"head {head + 1}" for head in range(min(most_heads, _HEADS)))]
        for word in entry.words:
            table = [
                [source.layer_heat(word, layer, head) for head in _head_columns(source.maps.heads(layer))] for layer in layers
            ]
            yield _table(table, layers, names, word.name, entry, request)
    else:
        for start in range(0, len(entry.words), _COLUMNS):
            words = entry.words[start : start + _COLUMNS]
            table = [[source.layer_heat(word, layer) for word in words] for layer in layers]
            yield _table(table, layers, [word.name for word in words], "Layers", entry, request)


def _head_columns(heads: int) -> list[int | None]:
    return [None, *(range(min(heads, _HEADS)) if heads > 1 else ())]


def _table(
    table: Sequence[Sequence[torch.Tensor | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    entry: Shown,
    request: Request,
) -> Figure:
    heats = [heat for line in table for heat in line if heat is not None]
    each = dict(zip(map(id, heats), scales(heats, request.normalize), strict=True))
    height, width = max((heat.shape for heat in heats), key=math.prod, default=(1, 1))
    nothing = Cell(torch.zeros(height, width, 3))

    def cell(heat: torch.Tensor | None) -> Cell:
        if heat is None:
            return nothing
        colors = colorize(each[id(heat)].apply(heat), request.style.colormap)
        return Cell(resize_image(colors, (height, width), blocky=True), corner=f"max {number(float(heat.max()))}")

    about = {
        Normalize.EACH: "each cell on its own scale",
        Normalize.ALL: "all cells on one scale",
        Normalize.NONE: "colours from 0 to 1",
    }
    return grid([[cell(heat) for heat in line] for line in table], rows, columns, title, entry.about(about[request.normalize]))


def _segments(entry: Shown, request: Request) -> Iterator[Figure]:
    """Yield each place in the colour of the word that looks there most."""
    size = fitted(entry.image, max(*entry.size, MIN_SIDE))
    heats = torch.stack([scale.apply(resize_heat(heat, size)) for heat, scale in zip(entry.heats, entry.scales, strict=True)])
    most, labels = heats.max(0)
    threshold = request.style.threshold
    labels = torch.where(most >= threshold, labels, -1)
    shares = [f"{100 * float((labels == index).float().mean()):.0f} %" for index in range(len(entry.words))]
    title = entry.about(f"heat of at least {threshold:g}" if threshold > 0 else "every place")
    yield segments(entry.image, labels, [word.name for word in entry.words], shares, request.style, title)


def _convergence(entry: Shown, request: Request) -> Iterator[Figure]:
    """Yield how each word settles, with the step at which T-GATE would stop looking."""
    changes: list[Series] = []
    masses: list[Series] = []
    maps = entry.source.maps
    for index, word in enumerate(entry.words):
        steps, change, mass = entry.source.convergence(word)
        for lines, values in ((changes, change), (masses, mass)):
            points = [(step + 1.0, value) for step, value in zip(steps, values.tolist(), strict=True)]
            lines.append(Series(word.name, word_color(index), points))
    plots = [Plot("change from one step to the next", changes), Plot("share of all attention", masses)]
    about = entry.about(_plural(maps.steps, "step"))
    yield line_chart(plots, "Convergence", about, "step", (1, max(maps.steps, 2)), [_gate(maps, request)])


def _gate(maps: AttnMaps, request: Request) -> Marker:
    """Return the gate of this run, or where T-GATE would open with its default."""
    opened = maps.meta.get("tgate_gate")
    step = request.default_gate(maps.steps) if opened is None else int(opened)
    return Marker(step + 0.5, "T-GATE gate" if opened is not None else "T-GATE gate (default)")


DRAWERS: dict[View, Callable[[Shown, Request], Iterator[Figure]]] = {
    View.OVERLAY: _overlays,
    View.STEPS: _strips,
    View.LAYERS: _layers,
    View.SEGMENTS: _segments,
    View.CONVERGENCE: _convergence,
}


def draw_query(entry: Shown, request: Request) -> Figure:
    """Return where the place ``request.query`` of one image looks."""
    x, y = request.query
    (heat,), (scale,) = entry.heats, entry.scales
    size = fitted(entry.image, max(*entry.size, MIN_SIDE))
    marked = draw_point(blend(resize_image(entry.image, size), scale.apply(heat), request.style), x, y)
    which = [f"image {entry.index + 1} of {entry.count}"] if entry.count > 1 else []
    about = ", ".join(["self-attention", *which, _plural(entry.source.maps.steps, "step")])
    return captioned(marked, f"looking from {x:.2f}, {y:.2f}", about, scale, request.style)


def _plural(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
