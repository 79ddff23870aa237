"""Find a drawn object in an image by colour and shape: no learning, no chance.

Images of any multiple of 32 pixels are reduced to 32 x 32 by area first. Made for plain scenes (any ground or pattern),
not for the neon, pastel and sketch styles.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from scenes import draw

GRID = 32
MIN_AREA = 14  # pixels of the 32 x 32 grid; the smallest drawn object has about 20
MIN_OVERLAP = 0.62
_COLOUR_DISTANCE = 0.2  # squared, in RGB 0..1: farther from every known colour is no colour


@dataclass(frozen=True)
class Finding:
    """What was found of one wanted object."""

    present: bool  # an area of the wanted colour is there
    right: bool  # and it has the wanted shape
    overlap: float  # intersection over union with the best placed drawing of the wanted shape
    shape: str | None  # the shape that fits best
    mask: Tensor  # [32, 32] bool: the object's pixels

    @property
    def box(self) -> tuple[float, float, float, float] | None:
        """Left, top, right, bottom in fractions of the image."""
        if not self.present:
            return None
        rows, columns = self.mask.nonzero().unbind(1)
        left, top, right, bottom = (int(v) / GRID for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
        return left, top, right, bottom


@cache
def _palette() -> Tensor:
    grounds = torch.tensor(list(draw.GROUNDS.values()))
    return torch.cat([torch.tensor(list(draw.COLOURS.values())), grounds, grounds * 0.9 + 0.22])


def reduce(image: Tensor) -> Tensor:
    """Reduce [H, W, 3] to [32, 32, 3] by area average."""
    return nn.functional.adaptive_avg_pool2d(image.float().movedim(-1, 0), GRID).movedim(0, -1)


def colour_mask(image: Tensor, colour: str) -> Tensor:
    """Mark the pixels [32, 32] of a reduced image that are nearer to ``colour`` than to any other colour or ground."""
    distance = (image[..., None, :] - _palette()).square().sum(-1)
    return (distance.argmin(-1) == list(draw.COLOURS).index(colour)) & (distance.amin(-1) < _COLOUR_DISTANCE)


def components(mask: Tensor) -> list[Tensor]:
    """Split a mask into its 8-connected parts, largest first."""
    labels = torch.where(mask, torch.arange(1, mask.numel() + 1).view_as(mask), 0).float()
    while True:
        spread = nn.functional.max_pool2d(labels[None], 3, 1, 1)[0] * mask
        if torch.equal(spread, labels):
            break
        labels = spread
    return sorted((labels == value for value in labels.unique() if value > 0), key=lambda part: -int(part.sum()))


def _grow(mask: Tensor, pixels: int) -> Tensor:
    return nn.functional.max_pool2d(mask[None].float(), 2 * pixels + 1, 1, pixels)[0] > 0


def coverage(image: Tensor, part: Tensor) -> Tensor:
    """Return how far the object whose pixels are ``part`` covers each pixel [32, 32]: 0..1, with soft edges."""
    near = _grow(part, 1)
    beside = _grow(part, 2) & ~near
    if not beside.any():  # it fills the image
        return part.float()
    inside, around = image[part].median(0).values, image[beside].median(0).values
    axis = inside - around
    return (((image - around) @ axis) / axis.square().sum().clamp(min=1e-3)).clamp(0, 1) * near


def _best_place(
    shape: str, cover: Tensor, centre: tuple[float, float], radius: float, reach: float, spread: float
) -> tuple[float, tuple[float, float], float]:
    """Find overlap, centre and radius of the best drawing of ``shape``, up to ``reach`` pixels and ``spread`` off."""
    y, x = torch.meshgrid(*(torch.arange(side) + 0.5 for side in cover.shape), indexing="ij")
    shifts, sizes = torch.linspace(-reach, reach, 5), radius * torch.linspace(1 - spread, 1 + spread, 5)
    scale = sizes[:, None, None, None, None]
    local_y = (y - centre[0] - shifts[:, None, None, None]) / scale
    local_x = (x - centre[1] - shifts[:, None, None]) / scale
    drawn = (0.5 - draw.shape_distance(shape, *torch.broadcast_tensors(local_x, local_y)) * scale).clamp(0, 1)
    ratio = torch.minimum(drawn, cover).sum((-2, -1)) / torch.maximum(drawn, cover).sum((-2, -1))
    size, down, right = (int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
    place = (centre[0] + float(shifts[down]), centre[1] + float(shifts[right]))
    return float(ratio.max()), place, float(sizes[size])


def overlaps(image: Tensor, mask: Tensor) -> dict[str, float]:
    """Return the best intersection over union of the object at ``mask`` with each shape, over places and sizes around its own."""
    rows, columns = mask.nonzero().unbind(1)
    top, left, bottom, right = int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1
    margin = 3
    cover = nn.functional.pad(coverage(image, mask), (margin,) * 4)[top : bottom + 2 * margin, left : right + 2 * margin]
    height, width = cover.shape
    found = {}
    for shape in draw.SHAPES:
        _, centre, radius = _best_place(shape, cover, (height / 2, width / 2), max(height, width) / 2 - margin, 1.5, 0.2)
        found[shape], _, _ = _best_place(shape, cover, centre, radius, 0.5, 0.08)
    return found


def find(image: Tensor, colour: str, shape: str) -> Finding:
    """Look for a ``colour`` ``shape`` in an image [H, W, 3] of 0..1. Of two areas of that colour the better counts."""
    best = Finding(False, False, 0.0, None, torch.zeros(GRID, GRID, dtype=torch.bool))
    image = reduce(image)
    for part in components(colour_mask(image, colour))[:2]:
        if part.sum() < MIN_AREA:
            break
        fits = overlaps(image, part)
        likely = max(fits, key=fits.__getitem__)
        right = likely == shape and fits[shape] >= MIN_OVERLAP
        if not best.present or (right, fits[shape]) > (best.right, best.overlap):
            best = Finding(True, right, fits[shape], likely, part)
    return best
