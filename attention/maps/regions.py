"""Connected areas of a heat map."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..networks.grids import resize_maps

_MOST_SIDE = 128


def largest_part(heat: torch.Tensor, threshold: float, size: tuple[int, int]) -> torch.Tensor:
    """Return 1 in the largest connected area of at least ``threshold`` and next to it, 0 elsewhere, at ``size``.

    Args:
        heat: 0..1, (rows, columns). Cells that touch at a corner are connected.
    """
    factor = min(_MOST_SIDE / max(heat.shape), 1.0)
    grid = [max(round(side * factor), 1) for side in heat.shape]
    region = resize_maps(heat[None].float(), grid, "area")[0] >= threshold
    labels = torch.arange(1, region.numel() + 1, dtype=torch.float32).view(region.shape) * region
    while True:
        grown = F.max_pool2d(labels[None, None], 3, 1, 1)[0, 0] * region
        if torch.equal(grown, labels):
            break
        labels = grown
    found, counts = labels[region].unique(return_counts=True)
    if not len(found):
        return torch.zeros(size)
    kept = (labels == found[counts.argmax()]).float()
    soft = F.max_pool2d(kept[None, None], 3, 1, 1)[0]  # one cell more, so that the soft edge stays
    return resize_maps(soft, size, "bilinear")[0].clamp(0, 1)
