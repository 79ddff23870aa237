"""The dark sheet that every figure is drawn on.

All sizes are multiples of a unit that is one pixel at an image width of 512, so that text reads the same whatever the
resolution. Every ``Figure`` knows where in it the image itself is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image, ImageDraw

from .colormaps import Colormap, palette
from .fonts import fit, font_for
from .pixels import to_pillow, to_tensor
from .scales import Scale

BACKGROUND, TEXT, MUTED, LINE = (22, 23, 27), (236, 237, 240), (158, 162, 172), (64, 67, 76)

# Canvases are at least this wide: below, captions would not be readable.
MIN_SIDE = 512
Color = tuple[int, int, int]


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
