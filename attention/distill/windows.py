"""A latent seen through windows that overlap, for images larger than what a model can hold together.

Bar-Tal et al., "MultiDiffusion: Fusing Diffusion Paths for Controlled Image Generation" (arXiv:2302.08113): every step is done
in each window, and the windows' results are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import host
from ..host import Edges


@dataclass(frozen=True)
class Window:
    """A part of a latent, in latent pixels. What goes over the right or bottom edge comes in at the opposite one."""

    top: int
    left: int
    height: int
    width: int

    def of(self, x: Tensor) -> Tensor:
        """Return the same part of (..., height, width): a view, or a copy where it goes over an edge."""
        return host.part(x, self.area)

    @property
    def area(self) -> host.Area:
        """Return as ComfyUI writes the area of a prompt."""
        return self.height, self.width, self.top, self.left


NO_EDGES = Edges(False, False)


def windows_of(height: int, width: int, side: int, stride: int, joined: Edges = NO_EDGES) -> list[Window]:
    """Return windows of at most ``side`` that cover a latent, ``stride`` apart; the last ones end with the latent.

    Args:
        side: 0 is one window, the whole.
        joined: edges over which windows go, so that no place is nearer to an edge of the windows than another.
    """
    side = side or max(height, width)
    rows, columns = _starts(height, side, stride, joined.top_bottom), _starts(width, side, stride, joined.left_right)
    return [Window(top, left, min(side, height), min(side, width)) for top in rows for left in columns]


def _starts(length: int, side: int, stride: int, circular: bool) -> list[int]:
    last = max(length - side, 0)
    if circular and last:
        return list(range(0, length, stride))
    return [min(place * stride, last) for place in range(math.ceil(last / stride) + 1)]


def average(parts: Sequence[Tensor], windows: Sequence[Window], like: Tensor) -> Tensor:
    """Return what the windows' parts come to together: their mean wherever several overlap, (..., height, width) as ``like``."""
    if len(windows) == 1:
        return parts[0]
    total, count = torch.zeros_like(like), torch.zeros_like(like[:1, :1])
    for part, window in zip(parts, windows, strict=True):
        host.add_part(total, part, window.area)
        host.add_part(count, torch.ones_like(count[..., :1, :1]), window.area)
    return total / count
