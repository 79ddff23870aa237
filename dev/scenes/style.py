"""Measure how far two images are apart in style: colours and texture as statistics, with no learning and no chance.

Where things lie does not count, only what there is and how much of it: every statistic is a distribution over the places of
an image, and two distributions are as far apart as their quantiles are on average (the Wasserstein distance). So images
may differ in size, and an image that is moved keeps its style.

Colours are compared along many directions of RGB (sliced Wasserstein). Texture is what derivatives of the brightness in four
directions at four scales answer. An answer of ``HALF`` counts half as much as the strongest possible edge, so that the
ground's faint pattern is not drowned by the outlines of objects. Both parts go from 0 to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

SIDE = 64  # images are reduced to this height by area: what is smaller is the decoder's business
SCALES = (1.0, 2.0, 4.0, 8.0)  # spread of the filters, in pixels of an image of that height
DIRECTIONS = 4
SLICES = 32
LEVELS = 128  # quantiles
HALF = 0.1  # the answer of a filter that counts half as much as the strongest edge


@dataclass(frozen=True)
class Style:
    """Quantiles of colours [SLICES, LEVELS] and of filter answers [filters, LEVELS]."""

    colours: Tensor
    texture: Tensor


@dataclass(frozen=True)
class Distance:
    """Two styles apart; 0 for equal statistics."""

    colours: float
    texture: float

    @property
    def total(self) -> float:
        return self.colours + self.texture


def style(image: Tensor) -> Style:
    """Compute the statistics of an image [H, W, 3] of 0..1."""
    reduced = _reduced(image)
    colours = _slices() @ reduced.flatten(1)
    return Style(_quantiles(colours), torch.cat([_quantiles(_answers(reduced, scale)) for scale in SCALES]))


def distance(one: Style, other: Style) -> Distance:
    """Return the mean difference of the quantiles, over slices and over filters."""
    colours, texture = (float((a - b).abs().mean()) for a, b in ((one.colours, other.colours), (one.texture, other.texture)))
    return Distance(colours, texture)


def _reduced(image: Tensor) -> Tensor:
    """Reduce to [3, SIDE, as wide as it is]."""
    height, width = image.shape[:2]
    size = SIDE, max(round(width * SIDE / height), 1)
    return nn.functional.adaptive_avg_pool2d(image.float().movedim(-1, 0), size)


@cache
def _slices() -> Tensor:
    """Return unit vectors [SLICES, 3], evenly spread over half of the sphere (a spiral of the golden angle)."""
    height = (torch.arange(SLICES) + 0.5) / SLICES
    angle = torch.arange(SLICES) * math.pi * (3 - math.sqrt(5))
    radius = (1 - height.square()).sqrt()
    return torch.stack([radius * angle.cos(), radius * angle.sin(), height], dim=1)


@cache
def _kernels(scale: float) -> Tensor:
    """Return first derivatives of a Gaussian [DIRECTIONS, 1, side, side]; the positive half of each adds up to 1."""
    reach = math.ceil(2 * scale)
    places = torch.arange(-reach, reach + 1).float()
    y, x = torch.meshgrid(places, places, indexing="ij")
    weight = torch.exp(-(x.square() + y.square()) / (2 * scale * scale))
    angles = [math.pi * i / DIRECTIONS for i in range(DIRECTIONS)]
    kernels = torch.stack([(x * math.cos(angle) + y * math.sin(angle)) * weight for angle in angles])
    return (kernels / kernels.clamp(min=0).sum((1, 2), keepdim=True))[:, None]


def _answers(image: Tensor, scale: float) -> Tensor:
    """Return compressed answers [DIRECTIONS, places] wherever a filter lies wholly inside the image."""
    brightness = image.mean(0, keepdim=True)[None]
    strength = nn.functional.conv2d(brightness, _kernels(scale))[0].abs().flatten(1)
    return strength / (strength + HALF)


def _quantiles(values: Tensor) -> Tensor:
    """Reduce [rows, places] to quantiles [rows, LEVELS]."""
    levels = (torch.arange(LEVELS) + 0.5) / LEVELS
    return torch.quantile(values, levels, dim=1).T
