"""Labels: which tokens of the target attend to which tokens of the references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..networks.grids import Grid, resize_maps

_GREY_LEVELS = 255  # of an 8 bit mask


def labels_of(mask: Tensor) -> Tensor:
    """Return grey values of a MASK (n, height, width) as whole numbers."""
    return (mask.detach().cpu().float() * _GREY_LEVELS).round().long()


class Regions:
    """Which tokens of the target attend to which tokens of the references: those of the same label.

    The published code gives the attention a (queries, keys) mask of equal labels. Here every label's queries and keys are
    gathered instead, which is the same attention and never as large.

    Args:
        target: labels (1 or images, height, width); references: one (height, width) for each reference.
        grids: for each layer, the grid of the target and of every reference, in tokens.
    """

    def __init__(self, target: Tensor, references: Sequence[Tensor], grids: Mapping[str, tuple[Grid, Sequence[Grid]]]) -> None:
        self.target = target
        self.references = list(references)
        self.grids = grids
        self._pairs: dict[tuple[str, int, torch.device], list[tuple[Tensor, Tensor]]] = {}

    def pairs(self, layer: str, image: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Return indices of the queries and of the keys of every label that both have."""
        image = image if len(self.target) > 1 else 0
        found = self._pairs.get((layer, image, device))
        if found is None:
            own, others = self.grids[layer]
            queries = token_labels(self.target[image], own)
            keys = torch.cat([token_labels(labels, grid) for labels, grid in zip(self.references, others, strict=True)])
            common = sorted(set(queries.tolist()) & set(keys.tolist()))
            found = [(_where(queries, label, device), _where(keys, label, device)) for label in common]
            self._pairs[layer, image, device] = found
        return found

    def missing(self) -> set[int]:
        """Return labels of the target that no reference has."""
        return set(self.target.unique().tolist()) - {label for labels in self.references for label in labels.unique().tolist()}


def _where(labels: Tensor, label: int, device: torch.device) -> Tensor:
    return (labels == label).nonzero()[:, 0].to(device)


def token_labels(labels: Tensor, grid: Grid) -> Tensor:
    """Return (tokens,): labels (height, width) at the nearest pixel of each token, the same for every frame."""
    resized = resize_maps(labels, grid[1:], "nearest")
    return resized.flatten().repeat(grid[0])
