"""A latent seen through windows that overlap, for images larger than what a model can hold together.

Bar-Tal et al., "MultiDiffusion: Fusing Diffusion Paths for Controlled Image Generation" (arXiv:2302.08113): every step is done
in each window, and the windows' results are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


def windows_for(guider: Any, network: torch.nn.Module, latent: Tensor, window: int, stride: int) -> tuple[list[Window], Any]:
    """Return the windows of a latent, and the MODEL that goes through them.

    Windows go over the edges that a seamless MODEL joins. In a window, which is a part of the image, nothing is joined.

    Args:
        window, stride: in pixels; window 0 is the whole image.

    Raises:
        ValueError: a guider, a prompt or a tiling of another node that cannot be cut into windows.
    """
    model = guider.model_patcher
    ratio = host.pixels_per_latent(model)
    side, step = (max(round(pixels / ratio), 1) for pixels in (window, stride))
    height, width = latent.shape[-2:]
    side = side if window else 0
    joined = host.joined_edges(model, network) if side and side < max(height, width) else NO_EDGES
    found = windows_of(height, width, side, step, joined)
    if len(found) == 1:
        return found, model
    reason = host.needs_whole_latent(guider)
    if reason is not None:
        raise ValueError(f"window cannot be used with {reason}. Set window to 0, or use CFGGuider.")
    for name, where in host.LIMITS_OF_A_WINDOW.items():
        if any(name in cond for conds in host.prompts_of(guider) for cond in conds):
            raise ValueError(f"window cannot be used with {where}, made for the whole image. Set window to 0, or take it out.")
    uncut = host.uncut_control([cond for conds in host.prompts_of(guider) for cond in conds])
    if uncut is not None:
        raise ValueError(
            f"window cannot be used with a ControlNet that has no image ({uncut}), because each window is to see its part of the "
            "image. Set window to 0, or take it out."
        )
    if not any(joined):
        return found, model
    if any(host.joined_edges(host.join_edges(model, network, NO_EDGES), network)):
        raise ValueError(
            "window cannot be used with another node's tiling, which would join the edges of every window too. Use Seamless "
            "Tiling in its place, or set window to 0."
        )
    whole = host.Edges(joined.top_bottom and side >= height, joined.left_right and side >= width)
    return found, host.join_edges(model, network, whole)


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
