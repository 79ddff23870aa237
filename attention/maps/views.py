"""What the preview shows: the six views of a run's attention maps, masks of words, and the figures behind them.

``preview`` pairs images with what was captured of them, chooses the words and draws. It returns images of one size, one
mask for each image and word (image by image, in the order of the words), and a report of plain data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from .words import Source, Word, choose_words, read_prompt

# All overlays together have at most this many pixels; with very many words they are drawn smaller.
_MOST_PIXELS = 64_000_000
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
    """What the artist asked for. ``query``: x and y as fractions of width and height."""

    view: View = View.OVERLAY
    prompt: str = "positive"
    words: str = ""
    normalize: Normalize = Normalize.EACH
    style: Style = Style()
    query: tuple[float, float] = (0.5, 0.5)
    clip: Any = None
    text: str = ""
    default_gate: Callable[[int], int] = lambda steps: round(0.4 * steps)

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
    """

    images: torch.Tensor
    masks: torch.Tensor
    report: dict[str, Any]
    drawn: list[Drawn]
    sources: list[Source]


def preview(maps: AttnMaps, images: torch.Tensor, request: Request) -> Preview:
    """Draw one view of the maps for a batch of images (images, height, width, 3), with progress; it can be cancelled."""
    images = images[..., :3].float().cpu()
    sources = pair(maps, images, request.prompt)
    if request.view is View.SELF_ATTENTION:
        drawn, masks, figures = _self_attention(sources, images, request)
    else:
        words = choose_words(read_prompt(maps, request.prompt, request.clip, request.text), request.words)
        drawn, masks, figures = _word_view(sources, images, words, request)
    report = {
        "view": request.view.value,
        "prompt": request.prompt,
        "normalize": request.normalize.value,
        "threshold": request.style.threshold,
        "steps": maps.steps,
        "layers": maps.layers,
        "pictures": figures,
        "notes": list(maps.notes),
    }
    return Preview(_stack([entry.figure for entry in drawn]), masks, report, drawn, sources)


def pair(maps: AttnMaps, images: torch.Tensor, prompt: str) -> list[Source]:
    """Return what was captured of each image.

    Image b belongs to entry b of the captured batch; the map of a single entry serves any number of images. The frames
    of a video are spread evenly over its latent frames.
    """
    maps.of(prompt)  # says why, where there is nothing
    count, height, width = images.shape[:3]
    rows, columns = maps.grid
    if abs(columns - rows * width / height) > 1 + 0.04 * columns and abs(rows - columns * height / width) > 1 + 0.04 * rows:
        raise ValueError(
            f"images is {width} x {height}, but the sampled image has another shape (its maps are {columns} x {rows}). "
            "Connect the image as VAE Decode gives it, before cropping or outpainting."
        )
    if count == maps.batch and maps.frames == 1:
        return [Source(maps, prompt, batch) for batch in range(count)]
    if count % maps.batch == 0 and (maps.batch == 1 or maps.frames > 1):
        each = count // maps.batch
        last = maps.frames - 1
        frames = [None if maps.frames == 1 else round(at * last / max(each - 1, 1)) for at in range(each)]
        return [Source(maps, prompt, batch, frame) for batch in range(maps.batch) for frame in frames]
    raise ValueError(
        f"images has {count} images, but {maps.batch} were sampled. Connect the whole batch as VAE Decode gives it, in the "
        "same order."
    )


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

    def about(self, *facts: str) -> str:
        """Return the line under a title."""
        which = [f"image {self.index + 1} of {self.count}"] if self.count > 1 else []
        return ", ".join([f"{self.source.prompt} prompt", *which, *(fact for fact in facts if fact)])


def _word_view(
    sources: Sequence[Source], images: torch.Tensor, words: Sequence[Word], request: Request
) -> tuple[list[Drawn], torch.Tensor, list[dict[str, Any]]]:
    draw = _DRAWERS[request.view]
    drawn: list[Drawn] = []
    masks = torch.empty(len(images) * len(words), *images.shape[1:3])
    figures = []
    progress = Progress(len(images))
    for index, (source, image) in enumerate(zip(sources, images, strict=True)):
        heats = source.heats(words)
        entry = _Shown(index, len(images), image, source, words, heats, scales(heats, request.normalize))
        for at, figure in enumerate(draw(entry, request), 1):
            drawn.append(Drawn(figure, index))
            progress.show(index + at / len(words) / 2)
        for at, (heat, scale) in enumerate(zip(heats, entry.scales, strict=True)):
            progress.show(index + 0.5 + at / len(words) / 2)
            masks[index * len(words) + at] = scale.apply(resize_heat(heat, entry.size))
        figures.append({"picture": index + 1, "words": [_figures(entry, at, request) for at in range(len(words))]})
        progress.show(index + 1)
    return drawn, masks, figures


def _figures(entry: _Shown, at: int, request: Request) -> dict[str, Any]:
    word, heat = entry.words[at], entry.heats[at]
    facts = {"word": word.name, "tokens": sorted({position for places in word.places.values() for position in places})}
    return facts | heat_figures(heat, entry.scales[at], request.style.threshold) | _settling(entry.source, word)


def heat_figures(heat: torch.Tensor, scale: Scale, threshold: float) -> dict[str, Any]:
    """Return numbers of one heat map.

    peak: its highest value and where it is (fractions of width and height, centre of the cell); mean: over all places;
    area: the part of the image at or above the threshold; entropy: 0 where all heat is in one place, 1 where it is the
    same everywhere.
    """
    rows, columns = heat.shape
    row, column = divmod(int(heat.argmax()), columns)
    total = float(heat.sum())
    spread = heat.flatten() / total if total > 0 else torch.full((heat.numel(),), 1 / heat.numel())
    entropy = float(-(spread * spread.clamp(min=1e-30).log()).sum()) / math.log(max(heat.numel(), 2))
    return {
        "peak": {"x": _short((column + 0.5) / columns), "y": _short((row + 0.5) / rows), "value": _short(float(heat.max()))},
        "lowest": _short(float(heat.min())),
        "mean": _short(float(heat.mean())),
        "area": _short(float((scale.apply(heat) >= threshold).float().mean())),
        "entropy": _short(entropy),
    }


def _settling(source: Source, word: Word) -> dict[str, Any]:
    """Return the word's share of all attention, and how it settled step by step (steps count from 1)."""
    if any(source.maps.of(source.prompt, cond).figures is None for cond in word.places):
        return {}
    steps, change, mass = source.convergence(word)
    changes = [None if math.isnan(value) else _short(value) for value in change.tolist()]
    masses = [_short(value) for value in mass.tolist()]
    steps_from_one = [step + 1 for step in steps]
    return {"mass": _short(float(mass.mean())), "steps": {"step": steps_from_one, "change": changes, "mass": masses}}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


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
        masks[index] = scale.apply(resize_heat(heat, (image.shape[0], image.shape[1])))
        facts = {"picture": index + 1, "query": {"x": x, "y": y}}
        figures.append(facts | heat_figures(heat, scale, style.threshold))
        progress.show(index + 1)
    return drawn, masks, figures


def _plural(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
