"""The figures that images of heat are put into: one with its caption, a film strip, a table, segments with a legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...networks.grids import resize_maps
from .canvas import BACKGROUND, MIN_SIDE, MUTED, Canvas, Figure
from .colormaps import word_color
from .fonts import fit, font_for
from .overlay import Style, draw_edges
from .pixels import fitted, resize_image
from .scales import Scale


@dataclass(frozen=True)
class Cell:
    """One image of a strip or grid and what stands under it; ``corner`` is printed into the image."""

    pixels: torch.Tensor
    left: str = ""
    right: str = ""
    corner: str = ""


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
