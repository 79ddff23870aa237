"""What the preview shows: the six views of a run's attention maps, masks of words, and the figures behind them.

``preview`` pairs images with what was captured of them, chooses the words and draws. It returns images of one size, one
mask for each image and word (image by image, in the order of the words), and a report of plain data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch

from ..host import Progress
from .attn_maps import AttnMaps
from .drawing.chart import Marker, Plot, Series, line_chart
from .drawing.colormaps import colorize, word_color
from .drawing.render import (
    BACKGROUND,
    MIN_SIDE,
    Cell,
    Figure,
    Normalize,
    Scale,
    Style,
    blend,
    captioned,
    draw_point,
    fitted,
    grid,
    number,
    resize_heat,
    resize_image,
    scales,
    segments,
    strip,
)
from .figures import flat_figures, has_gaps, heat_figures, or_zero, word_figures
from .heats import Source
from .matching import maps_of_images
from .origin import Origin
from .pairing import pair, paired
from .regions import largest_part
from .words import Word, choose_words, read_prompt

__all__ = ["Drawn", "Preview", "Request", "View", "chosen_steps", "heat_figures", "pair", "preview"]

# All overlays together have at most this many pixels; with very many words they are drawn smaller.
_MOST_PIXELS = 64_000_000
_MOST_FIGURES = 64
_FRAMES, _FRAME_SIDE = 8, 256
_COLUMNS = 8
_HEADS = 16


class View(str, Enum):
    OVERLAY = "overlay"
    STEPS = "steps"
    LAYERS = "layers"
    SELF_ATTENTION = "self-attention"
    CONVERGENCE = "convergence"
    SEGMENTS = "segments"


@dataclass(frozen=True)
class Request:
    """User settings of the preview.

    Attributes:
        query: x and y as fractions of width and height.
        latent: what the sampler returned, to name the run; origin: where the images come from in the workflow.
        batch_index, frame: only this image of the batch, this frame of the video; -1: all.
        largest_part: masks keep only the largest of the areas above the threshold.
    """

    view: View = View.OVERLAY
    prompt: str = "positive"
    words: str = ""
    normalize: Normalize = Normalize.EACH
    style: Style = Style()
    query: tuple[float, float] = (0.5, 0.5)
    clip: Any = None
    text: str = ""
    default_gate: Callable[[int], int] = lambda steps: round(0.4 * steps)
    latent: torch.Tensor | None = None
    origin: Origin | None = None
    batch_index: int = -1
    frame: int = -1
    largest_part: bool = False

    def __post_init__(self) -> None:
        for name, value in zip(("query_x", "query_y"), self.query, strict=True):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value:g}: it is a place in the image, from 0 to 1.")


@dataclass(frozen=True)
class Drawn:
    """A figure and the image of the batch that it shows."""

    figure: Figure
    image_index: int


@dataclass(frozen=True)
class Preview:
    """Attributes:
    images: (figures, height, width, 3).
    masks: (images * words, height, width of the images).
    drawn: the figures, each with its place in ``images``, for pointing at things.
    sources: what each image was paired with.
    maps: of the run that made the images.
    strengths, areas: of each mask: the share of all attention, the part of the image at or above the threshold.
    """

    images: torch.Tensor
    masks: torch.Tensor
    report: dict[str, Any]
    drawn: list[Drawn]
    sources: list[Source]
    maps: AttnMaps
    strengths: list[float]
    areas: list[float]


def preview(maps: AttnMaps, images: torch.Tensor, request: Request) -> Preview:
    """Draw one view of the maps for a batch of images (images, height, width, 3), with progress; it can be cancelled."""
    images = images[..., :3].float().cpu()
    maps = maps_of_images(maps, images, request.latent, request.origin)
    chosen = paired(maps, images, request.prompt, request.batch_index, request.frame)
    images, sources, notes = chosen.images, chosen.sources, [*maps.notes, *chosen.notes]
    if request.view is View.SELF_ATTENTION:
        drawn, masks, figures = _self_attention(sources, images, request)
    else:
        infos = read_prompt(maps, request.prompt, request.clip, request.text)
        words = choose_words(infos, request.words)
        notes += [f"words: {word.missing} Its mask is empty." for word in words if word.missing]
        asked = bool(request.words.strip()) or any(info.subjects for info in infos)
        if not asked and len(words) * len(images) > _MOST_FIGURES:
            most = max(_MOST_FIGURES // len(images), 1)
            notes.append(f"the first {most} of {len(words)} words are shown; name others in 'words'")
            words = words[:most]
        drawn, masks, figures, left_out = _word_view(sources, images, words, request)
        if left_out:
            notes.append(f"the first {len(words) - left_out} of {len(words)} words are drawn; all have masks")
    entries = [entry for picture in figures for entry in picture.get("words", [picture])]
    strengths, areas = ([or_zero(entry.get(name)) for entry in entries] for name in ("strength", "area"))
    report = {
        "view": request.view.value,
        "prompt": request.prompt,
        "normalize": request.normalize.value,
        "threshold": request.style.threshold,
        "steps": maps.steps,
        "layers": maps.layers,
        "pictures": figures,
        "notes": notes,
        **flat_figures(figures),
    }
    if has_gaps(figures):
        notes.append("numbers that are not finite are null: the latent or the attention has NaN or infinite values")
    sheets = _stack([entry.figure for entry in drawn])
    return Preview(sheets, masks, report, drawn, sources, maps, strengths, areas)


def _stack(figures: Sequence[Figure]) -> torch.Tensor:
    """Return figures on sheets of one size, filled up at the right and below."""
    height = max(figure.image.shape[0] for figure in figures)
    width = max(figure.image.shape[1] for figure in figures)
    sheets = torch.tensor(BACKGROUND).div(255).expand(len(figures), height, width, 3).clone()
    for sheet, figure in zip(sheets, figures, strict=True):
        sheet[: figure.image.shape[0], : figure.image.shape[1]] = figure.image
    return sheets


@dataclass(frozen=True)
class _Shown:
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

    def first(self, count: int) -> _Shown:
        """Return the same image with the first of its words."""
        if count >= len(self.words):
            return self
        return replace(self, words=self.words[:count], heats=self.heats[:count], scales=self.scales[:count])

    def about(self, *facts: str) -> str:
        """Return the line under a title."""
        which = [f"image {self.index + 1} of {self.count}"] if self.count > 1 else []
        return ", ".join([f"{self.source.prompt} prompt", *which, *(fact for fact in facts if fact)])


def _word_view(
    sources: Sequence[Source], images: torch.Tensor, words: Sequence[Word], request: Request
) -> tuple[list[Drawn], torch.Tensor, list[dict[str, Any]], int]:
    """Return figures, masks, numbers, and how many of the words are not drawn."""
    draw = _DRAWERS[request.view]
    most = max(_MOST_FIGURES // len(images), 1)
    drawn: list[Drawn] = []
    masks = torch.empty(len(images) * len(words), *images.shape[1:3])
    figures = []
    progress = Progress(len(images))
    for index, (source, image) in enumerate(zip(sources, images, strict=True)):
        heats = source.heats(words)
        entry = _Shown(index, len(images), image, source, words, heats, scales(heats, request.normalize))
        for at, figure in enumerate(draw(entry.first(most), request), 1):
            drawn.append(Drawn(figure, index))
            progress.show(index + at / len(words) / 2)
        for at, (heat, scale) in enumerate(zip(heats, entry.scales, strict=True)):
            progress.show(index + 0.5 + at / len(words) / 2)
            mask = scale.apply(resize_heat(heat, entry.size))
            if request.largest_part:
                mask *= largest_part(scale.apply(heat), request.style.threshold, entry.size)
            masks[index * len(words) + at] = mask
        figures.append({"picture": index + 1, "words": [_word_figures(entry, at, request) for at in range(len(words))]})
        progress.show(index + 1)
    return drawn, masks, figures, max(len(words) - most, 0)


def _word_figures(entry: _Shown, at: int, request: Request) -> dict[str, Any]:
    return word_figures(entry.source, entry.words[at], entry.heats[at], entry.scales[at], request.style.threshold)


def _overlays(entry: _Shown, request: Request) -> Iterator[Figure]:
    """Yield one image for each word."""
    figures = entry.count * len(entry.words)
    longest = max(entry.size)
    side = min(longest, round(longest * math.sqrt(_MOST_PIXELS / (figures * math.prod(entry.size)))))
    shown = resize_image(entry.image, fitted(entry.image, max(side, MIN_SIDE)))
    about = entry.about(_plural(len(entry.source.steps(entry.words)), "step"), _plural(len(entry.source.maps.layers), "layer"))
    for word, heat, scale in zip(entry.words, entry.heats, entry.scales, strict=True):
        yield captioned(blend(shown, scale.apply(heat), request.style), word.name, about, scale, request.style)


def _strips(entry: _Shown, request: Request) -> Iterator[Figure]:
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


def _layers(entry: _Shown, request: Request) -> Iterator[Figure]:
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
    entry: _Shown,
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


def _segments(entry: _Shown, request: Request) -> Iterator[Figure]:
    """Yield each place in the colour of the word that looks there most."""
    size = fitted(entry.image, max(*entry.size, MIN_SIDE))
    heats = torch.stack([scale.apply(resize_heat(heat, size)) for heat, scale in zip(entry.heats, entry.scales, strict=True)])
    most, labels = heats.max(0)
    threshold = request.style.threshold
    labels = torch.where(most >= threshold, labels, -1)
    shares = [f"{100 * float((labels == index).float().mean()):.0f} %" for index in range(len(entry.words))]
    title = entry.about(f"heat of at least {threshold:g}" if threshold > 0 else "every place")
    yield segments(entry.image, labels, [word.name for word in entry.words], shares, request.style, title)


def _convergence(entry: _Shown, request: Request) -> Iterator[Figure]:
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


_DRAWERS: dict[View, Callable[[_Shown, Request], Iterator[Figure]]] = {
    View.OVERLAY: _overlays,
    View.STEPS: _strips,
    View.LAYERS: _layers,
    View.SEGMENTS: _segments,
    View.CONVERGENCE: _convergence,
}


def _self_attention(
    sources: Sequence[Source], images: torch.Tensor, request: Request
) -> tuple[list[Drawn], torch.Tensor, list[dict[str, Any]]]:
    """Return where one place of each image looks."""
    x, y = request.query
    style = request.style
    heats = [
        source.maps.self_attention(x, y, prompt=source.prompt, batch=source.batch, frame=source.frame or 0) for source in sources
    ]
    drawn, figures = [], []
    masks = torch.empty(images.shape[:3])
    progress = Progress(len(images))
    for index, (image, heat, scale) in enumerate(zip(images, heats, scales(heats, request.normalize), strict=True)):
        shown = blend(resize_image(image, fitted(image, max(*image.shape[:2], MIN_SIDE))), scale.apply(heat), style)
        which = f"image {index + 1} of {len(images)}, " if len(images) > 1 else ""
        about = f"self-attention, {which}{_plural(sources[index].maps.steps, 'step')}"
        drawn.append(Drawn(captioned(draw_point(shown, x, y), f"looking from {x:.2f}, {y:.2f}", about, scale, style), index))
        size = (image.shape[0], image.shape[1])
        masks[index] = scale.apply(resize_heat(heat, size))
        if request.largest_part:
            masks[index] *= largest_part(scale.apply(heat), style.threshold, size)
        facts = {"picture": index + 1, "query": {"x": x, "y": y}}
        numbers = heat_figures(heat, scale, style.threshold)
        figures.append(facts | numbers | {"strength": numbers["mean"]})
        progress.show(index + 1)
    return drawn, masks, figures


def _plural(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
