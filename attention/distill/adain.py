"""Colour statistics: the mean and spread of each channel (AdaIN)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def adain(x: Tensor, references: Sequence[Tensor], *, epsilon: float = 1e-6, mask: Tensor | None = None) -> Tensor:
    """Return ``x`` with the mean and spread of each channel over all references (Huang and Belongie, arXiv:1703.06868, eq. 8).

    Args:
        x: (batch, channels, ...): each image has its own statistics; references: (n, channels, ...), of any size.
        mask: what of ``x`` is changed, 0 to 1, broadcastable to it; statistics are those of this part.
    """
    places = tuple(range(2, x.ndim))
    values = torch.cat([reference.movedim(1, 0).flatten(1) for reference in references], dim=1)
    shape = (1, -1, *[1] * len(places))
    mean_to, std_to = values.mean(1).view(shape), values.std(1).view(shape)
    if mask is None:
        mean, std = x.mean(places, keepdim=True), x.std(places, keepdim=True)
        return (x - mean) / (std + epsilon) * std_to + mean_to
    mask = mask.to(x).expand_as(x)
    size = mask.sum(places, keepdim=True)
    mean = (x * mask).sum(places, keepdim=True) / size.clamp(min=1)
    variance = (mask * (x - mean).square()).sum(places, keepdim=True) / (size - 1).clamp(min=1)
    moved = (x - mean) / (variance.sqrt() + epsilon) * std_to + mean_to
    return x + mask * (moved - x)
