"""Attention maps as images: overlays, film strips, grids and segments, with captions and colour bars.

Images are (height, width, 3), RGB 0..1; heat maps are (rows, columns) of any size. Drawn with what ComfyUI has: torch,
numpy and Pillow with its bundled font. All sizes are multiples of a unit that is one pixel at an image width of 512, so
that text reads the same whatever the resolution. Every ``Figure`` knows where in it the image itself is shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from ...networks.grids import resize_maps
from .colormaps import Colormap, colorize, palette, word_color
from .fonts import fit, font_for

BACKGROUND, TEXT, MUTED, LINE = (22, 23, 27), (236, 237, 240), (158, 162, 172), (64, 67, 76)

# Canvases are at least this wide: below, captions would not be readable.
MIN_SIDE = 512
Color = tuple[int, int, int]


class Normalize(str, Enum):
    """What a colour (and a mask's grey) stands for."""

    EACH = "each word"
    ALL = "all words"
    NONE = "none"


@dataclass(frozen=True)
class Style:
    """How heat is laid over an image.

    Attributes:
        opacity: 0 shows the image alone, 1 the heat alone.
        threshold: heat 0..1 at which a line is drawn; at 0 and 1 there is nothing to outline.
    """

    colormap: Colormap = Colormap.TURBO
    opacity: float = 0.6
    threshold: float = 0.4

    def __post_init__(self) -> None:
        for name in ("opacity", "threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name):g}: use a value from 0 to 1.")


@dataclass(frozen=True)
class Scale:
    """The values that the two ends of the colour bar stand for."""

    low: float
    high: float

    @classmethod
    def around(cls, heat: torch.Tensor) -> Scale:
        finite = heat[torch.isfinite(heat)]
        return cls(float(finite.min()), float(finite.max())) if finite.numel() else cls(0.0, 0.0)

    def apply(self, heat: torch.Tensor) -> torch.Tensor:
        """Heat as 0..1; a map that is the same everywhere is 0 everywhere."""
        span = self.high - self.low
        if span <= 1e-6 * max(abs(self.high), abs(self.low)):
            return torch.zeros_like(heat)
        return ((heat - self.low) / span).clamp(0, 1)


SHARE = Scale(0.0, 1.0)


def scales(maps: Sequence[torch.Tensor], normalize: Normalize) -> list[Scale]:
    """Return the scale of each map: its own, one for all of them, or the plain share of attention."""
    if normalize is Normalize.NONE:
        return [SHARE] * len(maps)
    own = [Scale.around(heat) for heat in maps]
    if normalize is Normalize.EACH or not own:
        return own
    return [Scale(min(scale.low for scale in own), max(scale.high for scale in own))] * len(own)


@dataclass(frozen=True)
class Panel:
    """Where in a figure an image is shown, in pixels."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class Figure:
    image: torch.Tensor
    panels: tuple[Panel, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One image of a strip or grid and what stands under it; ``corner`` is printed into the image."""

    pixels: torch.Tensor
    left: str = ""
    right: str = ""
    corner: str = ""


@dataclass
class Canvas:
    """A dark sheet; ``unit`` is the size of what would be one pixel on a sheet of 512."""

    width: int
    height: int
    unit: float
    sheet: Image.Image = field(init=False)
    pen: ImageDraw.ImageDraw = field(init=False)

    def __post_init__(self) -> None:
        self.sheet = Image.new("RGB", (max(self.width, 1), max(self.height, 1)), BACKGROUND)
        self.pen = ImageDraw.Draw(self.sheet)

    def text(
        self, place: tuple[float, float], text: str, size: float, color: Color = TEXT, anchor: str = "la", room: float = 0
    ) -> None:
        """Write ``text``, cut to ``room`` pixels; ``size`` in units, ``place`` in pixels."""
        font = font_for(text, max(round(size * self.unit), 8))
        if room:
            text = fit(text, font, room)
        self.pen.text(place, text, fill=color, font=font, anchor=anchor)

    def paste(self, pixels: torch.Tensor, x: int, y: int) -> Panel:
        image = to_pillow(pixels)
        self.sheet.paste(image, (x, y))
        return Panel(x, y, image.width, image.height)

    def bar(self, x: int, y: int, width: int, scale: Scale, colormap: Colormap) -> None:
        """Draw a colour bar with the numbers of its ends under it."""
        height = round(12 * self.unit)
        colors = palette(colormap)[torch.linspace(0, 255, max(width, 1)).long()]
        self.paste(colors[None].expand(max(height, 1), -1, -1), x, y)
        below = y + height + 4 * self.unit
        self.text((x, below), number(scale.low), 13, MUTED)
        self.text((x + width, below), number(scale.high), 13, MUTED, "ra")

    def figure(self, panels: Sequence[Panel] = ()) -> Figure:
        return Figure(to_tensor(self.sheet), tuple(panels))


def number(value: float) -> str:
    """Three digits, without an exponent where that stays short."""
    return f"{value:.3g}" if value == 0 or 1e-4 <= abs(value) < 1e5 else f"{value:.1e}"


def to_pillow(pixels: torch.Tensor) -> Image.Image:
    data = (pixels.detach().float().cpu().nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
    return Image.fromarray(data.numpy())


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)


def resize_heat(heat: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return heat (..., rows, columns) at another size, smooth and never below 0."""
    shrinks = size[0] < heat.shape[-2] or size[1] < heat.shape[-1]
    return resize_maps(heat.float(), size, antialias=shrinks).clamp(min=0)


def resize_image(pixels: torch.Tensor, size: tuple[int, int], *, blocky: bool = False) -> torch.Tensor:
    """Return an image at (height, width); ``blocky`` keeps the edges of its pixels."""
    if tuple(pixels.shape[:2]) == size:
        return pixels
    method = Image.Resampling.NEAREST if blocky else Image.Resampling.LANCZOS
    return to_tensor(to_pillow(pixels).resize((size[1], size[0]), method))


def fitted(pixels: torch.Tensor, side: int) -> tuple[int, int]:
    """Return (height, width) of the image with ``side`` as its longer side."""
    height, width = pixels.shape[:2]
    longest = max(height, width)
    return max(round(height * side / longest), 1), max(round(width * side / longest), 1)


def blend(pixels: torch.Tensor, heat: torch.Tensor, style: Style) -> torch.Tensor:
    """Lay heat (0..1, any size) over an image: the more heat, the more colour; a line runs along the threshold."""
    pixels = pixels.float().cpu()
    heat = resize_heat(heat.cpu(), (pixels.shape[0], pixels.shape[1])).clamp(0, 1)
    alpha = (style.opacity ** (2 - heat))[..., None] if style.opacity > 0 else torch.zeros(1)
    mixed = pixels * (1 - alpha) + colorize(heat, style.colormap) * alpha
    if style.opacity == 0 or not 0 < style.threshold < 1:
        return mixed
    return draw_edges(mixed, heat >= style.threshold, max(round(max(pixels.shape[:2]) / 340), 1))


def draw_edges(pixels: torch.Tensor, region: torch.Tensor, thickness: int) -> torch.Tensor:
    """White along the inside of a region (height, width), with a thin shadow outside, so that it shows on any colour."""
    inside = region.float()[None, None]
    size = 2 * thickness + 1
    eroded = -F.max_pool2d(-inside, size, 1, thickness)
    grown = F.max_pool2d(inside, size, 1, thickness)
    line = (inside - eroded)[0, 0, ..., None]
    shadow = (grown - inside)[0, 0, ..., None]
    pixels = pixels * (1 - 0.55 * shadow)
    return pixels * (1 - 0.9 * line) + 0.9 * line


def draw_point(pixels: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """Return a ring with a cross at a place given as fractions of width and height."""
    height, width = pixels.shape[:2]
    image = to_pillow(pixels)
    pen = ImageDraw.Draw(image)
    radius = max(max(height, width) / 42, 3)
    cx, cy = x * (width - 1), y * (height - 1)
    for color, thickness in (((0, 0, 0), 0.5), ((255, 255, 255), 0.22)):
        stroke = max(round(radius * thickness), 1)
        pen.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), outline=color, width=stroke)
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            ends = (cx + dx * radius * 0.45, cy + dy * radius * 0.45, cx + dx * radius * 1.7, cy + dy * radius * 1.7)
            pen.line(ends, fill=color, width=stroke)
    return to_tensor(image)


def captioned(pixels: torch.Tensor, title: str, subtitle: str, scale: Scale, style: Style) -> Figure:
    """Return an image with a caption under it: what it shows on the left, the colour bar with its numbers on the right."""
    size = fitted(pixels, max(*pixels.shape[:2], MIN_SIDE))
    width = max(size[1], MIN_SIDE)
    unit = width / MIN_SIDE
    margin = round(14 * unit)
    canvas = Canvas(width, size[0] + round(66 * unit), unit)
    panel = canvas.paste(resize_image(pixels, size), (width - size[1]) // 2, 0)
    bar = round(168 * unit)
    canvas.bar(width - margin - bar, size[0] + round(18 * unit), bar, scale, style.colormap)
    room = width - bar - 3 * margin
    canvas.text((margin, size[0] + 10 * unit), title, 21, room=room)
    canvas.text((margin, size[0] + 40 * unit), subtitle, 13, MUTED, room=room)
    return canvas.figure([panel])


def strip(cells: Sequence[Cell], title: str, subtitle: str, scale: Scale, style: Style, *, width: int = 1024) -> Figure:
    """Return frames in reading order, each with two notes under it, below a title and one colour bar for all of them."""
    unit = width / 640
    margin, gap = round(14 * unit), round(8 * unit)
    columns = strip_columns(len(cells), cells[0].pixels.shape[1] / cells[0].pixels.shape[0])
    across = max(columns, 2)  # a single frame does not fill the sheet
    cell_width = (width - 2 * margin - (across - 1) * gap) // across
    height, frame_width = _inside(cells[0].pixels, cell_width, round(cell_width * 1.5))
    note, head = round(30 * unit), round(72 * unit)
    rows = math.ceil(len(cells) / columns)
    canvas = Canvas(width, head + rows * (height + note) + margin, unit)
    bar = round(180 * unit)
    canvas.bar(width - margin - bar, round(16 * unit), bar, scale, style.colormap)
    canvas.text((margin, 12 * unit), title, 22, room=width - bar - 3 * margin)
    canvas.text((margin, 43 * unit), subtitle, 14, MUTED, room=width - bar - 3 * margin)
    panels = []
    for index, cell in enumerate(cells):
        x = margin + index % columns * (cell_width + gap) + (cell_width - frame_width) // 2
        y = head + index // columns * (height + note)
        panels.append(canvas.paste(resize_image(cell.pixels, (height, frame_width)), x, y))
        below = y + height + 5 * unit
        canvas.text((x, below), cell.left, 14, room=frame_width * 0.5)
        canvas.text((x + frame_width, below), cell.right, 14, MUTED, "ra", room=frame_width * 0.62)
    return canvas.figure(panels)


def strip_columns(count: int, aspect: float) -> int:
    """Return how many frames go side by side: at most four, and one row more rather than a nearly empty last row."""
    most = min(count, 3 if aspect > 1.6 else 4)
    return math.ceil(count / math.ceil(count / most))


def _inside(pixels: torch.Tensor, width: int, height: int) -> tuple[int, int]:
    """Return (height, width) of the image fitted into a box."""
    factor = min(width / pixels.shape[1], height / pixels.shape[0])
    return max(round(pixels.shape[0] * factor), 1), max(round(pixels.shape[1] * factor), 1)


def grid(
    cells: Sequence[Sequence[Cell]], row_names: Sequence[str], column_names: Sequence[str], title: str, subtitle: str
) -> Figure:
    """Return a table of heat maps with the edges of their own pixels: rows and columns are named, numbers stand in the cells.

    ``Cell.image`` is a coloured map; all cells get the shape of the first one.
    """
    columns = max(len(row) for row in cells)
    side = 112 if columns > 6 else 144 if columns > 3 else 176
    height, width = _inside(cells[0][0].pixels, side, side)
    names, gap, margin, head = 120, 6, 14, 104
    canvas = Canvas(max(2 * margin + names + columns * (width + gap), MIN_SIDE), head + len(cells) * (height + gap) + margin, 1)
    canvas.text((margin, 12), title, 21, room=canvas.width - 2 * margin)
    canvas.text((margin, 42), subtitle, 14, MUTED, room=canvas.width - 2 * margin)
    panels = []
    for column, name in enumerate(column_names):
        canvas.text((margin + names + column * (width + gap) + width / 2, head - 8), name, 15, anchor="ms", room=width)
    for row, (line, name) in enumerate(zip(cells, row_names, strict=True)):
        y = head + row * (height + gap)
        canvas.text((margin + names - 10, y + height / 2), name, 15, anchor="rm", room=names - 10)
        for column, cell in enumerate(line):
            x = margin + names + column * (width + gap)
            panels.append(canvas.paste(resize_image(cell.pixels, (height, width), blocky=True), x, y))
            if cell.corner:
                _corner(canvas, cell.corner, x, y + height)
    return canvas.figure(panels)


def _corner(canvas: Canvas, text: str, x: int, y: int) -> None:
    """Small text on a dark plate at the lower left of a cell."""
    size = max(round(12 * canvas.unit), 8)
    left, top, right, bottom = canvas.pen.textbbox((x + 5, y - 4), text, font=font_for(text, size), anchor="lb")
    canvas.pen.rectangle((x, top - 3, right + 4, y - 1), fill=BACKGROUND)
    canvas.text((x + 5, y - 4), text, 12, anchor="lb")


def segments(
    pixels: torch.Tensor, labels: torch.Tensor, words: Sequence[str], notes: Sequence[str], style: Style, title: str
) -> Figure:
    """Return each place in the colour of its word, and a legend.

    ``labels`` is (height, width) of the image: the index of a word, or -1 where no word looks. ``notes`` stand behind
    the words in the legend.
    """
    size = fitted(pixels, max(*pixels.shape[:2], MIN_SIDE))
    labels = resize_maps(labels, size, "nearest-exact")
    shown = resize_image(pixels.float().cpu(), size)
    table = torch.tensor([word_color(index) for index in range(len(words))] or [(0.0, 0.0, 0.0)])
    owned = (labels >= 0)[..., None]
    colors = table[labels.clamp(min=0)]
    gray = shown.mean(dim=-1, keepdim=True)
    shown = torch.where(owned, shown * (1 - style.opacity) + colors * style.opacity, shown * 0.35 + gray * 0.25)
    for index in labels.unique().tolist():
        if index >= 0:
            shown = draw_edges(shown, labels == index, max(round(max(size) / 400), 1))

    width = max(size[1], MIN_SIDE)
    unit = width / MIN_SIDE
    places, height = _legend_places(words, notes, width, unit)
    head = round(34 * unit)
    canvas = Canvas(width, size[0] + head + height + round(8 * unit), unit)
    panel = canvas.paste(shown, (width - size[1]) // 2, 0)
    canvas.text((14 * unit, size[0] + 10 * unit), title, 14, MUTED, room=width - 28 * unit)
    for index, (x, y) in enumerate(places):
        y += size[0] + head
        chip = tuple(round(channel * 255) for channel in word_color(index))
        canvas.pen.rounded_rectangle((x, y, x + 18 * unit, y + 18 * unit), radius=4 * unit, fill=chip)
        font = font_for(words[index], max(round(16 * unit), 8))
        word = fit(words[index], font, 200 * unit)
        canvas.text((x + 25 * unit, y + 9 * unit), word, 16, anchor="lm")
        canvas.text((x + 32 * unit + font.getlength(word), y + 9 * unit), notes[index], 13, MUTED, "lm")
    return canvas.figure([panel])


def _legend_places(words: Sequence[str], notes: Sequence[str], width: int, unit: float) -> tuple[list[tuple[int, int]], int]:
    """Return where the entries of a legend go, line by line, and how high all of it is."""
    margin, line = 14 * unit, 28 * unit
    x, y = margin, 0.0
    places = []
    for word, note in zip(words, notes, strict=True):
        font, small = font_for(word, max(round(16 * unit), 8)), font_for(note, max(round(13 * unit), 8))
        length = 52 * unit + font.getlength(fit(word, font, 200 * unit)) + small.getlength(note)
        if x + length > width and x > margin:
            x, y = margin, y + line
        places.append((round(x), round(y)))
        x += length
    return places, round(y + line)
