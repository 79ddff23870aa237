"""Colour statistics: the mean and spread of each channel (AdaIN)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor


def adain(
    x: Tensor,
    references: Sequence[Tensor],
    *,
    epsilon: float = 1e-6,
    mask: Tensor | None = None,
    weights: Sequence[Tensor] | None = None,
) -> Tensor:
    """Return ``x`` with the mean and spread of each channel over all references (Huang and Belongie, arXiv:1703.06868, eq. 8).

    Args:
        x: (batch, channels, ...): each image has its own statistics; references: (n, channels, ...), of any size.
        mask: what of ``x`` is changed, 0 to 1, broadcastable to it; statistics are those of this part.
        weights: how much each place of each reference counts, (1, 1, ...) as large as it; None: all alike.
    """
    places = tuple(range(2, x.ndim))
    values = torch.cat([rearrange(reference, "n channels ... -> channels (n ...)") for reference in references], dim=1)
    shape = (1, -1, *[1] * len(places))
    if weights is None:
        mean_to, std_to = values.mean(1).view(shape), values.std(1).view(shape)
    else:
        mean_to, std_to = (each.view(shape) for each in _weighted(values, torch.cat([each.flatten() for each in weights])))
    if mask is None:
        mean, std = x.mean(places, keepdim=True), x.std(places, keepdim=True)
        return (x - mean) / (std + epsilon) * std_to + mean_to
    mask = mask.to(x).expand_as(x)
    size = mask.sum(places, keepdim=True)
    mean = (x * mask).sum(places, keepdim=True) / size.clamp(min=1)
    variance = (mask * (x - mean).square()).sum(places, keepdim=True) / (size - 1).clamp(min=1)
    moved = (x - mean) / (variance.sqrt() + epsilon) * std_to + mean_to
    return x + mask * (moved - x)


def _weighted(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and spread of (channels, places); weights of 0 and 1 give those of the places with 1."""
    weights = weights.to(values)
    total = weights.sum()
    mean = (values * weights).sum(1) / total
    freedom = (total - weights.square().sum() / total).clamp(min=1e-6 * float(total))
    return mean, ((values - mean[:, None]).square() * weights).sum(1).div(freedom).sqrt()
