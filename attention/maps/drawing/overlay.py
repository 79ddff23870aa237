"""Heat laid over an image: colour, the line along the threshold, the mark of a place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import ImageDraw

from .colormaps import Colormap, colorize
from .pixels import resize_heat, to_pillow, to_tensor


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
