"""Labels: which tokens of the target attend to which tokens of the references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..networks.grids import Grid, layer_grid, resize_maps
from ..networks.layers import AttentionLayer
from ..networks.table import network_layout
from .masks import Marks
from .windows import Window


class Regions:
    """Which tokens of the target attend to which tokens of the references: those of the same label.

    The published code gives the attention a (queries, keys) mask of equal labels. Here every label's queries and keys are
    gathered instead, which is the same attention and never as large.

    Args:
        target: labels (1 or images, height, width); references: one (height, width) for each reference.
        grids: for each layer, the grid of the target and of every reference, in tokens.
        one_each: whether every image follows the reference of its own place; its keys are counted from the first of that one.
    """

    def __init__(
        self,
        target: Tensor,
        references: Sequence[Tensor],
        grids: Mapping[str, tuple[Grid, Sequence[Grid]]],
        *,
        one_each: bool = False,
    ) -> None:
        self.target = target
        self.references = list(references)
        self.grids = grids
        self.one_each = one_each
        self._pairs: dict[tuple[str, int, torch.device], list[tuple[Tensor, Tensor]]] = {}

    def pairs(self, layer: str, image: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Return indices of the queries and of the keys of every label that both have."""
        image = image if len(self.target) > 1 or self.one_each else 0
        found = self._pairs.get((layer, image, device))
        if found is None:
            own, others = self.grids[layer]
            queries = token_labels(self.target[image if len(self.target) > 1 else 0], own)
            seen = list(zip(self.references, others, strict=True))
            keys = torch.cat([token_labels(labels, grid) for labels, grid in ([seen[image]] if self.one_each else seen)])
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


def regions_of(
    network: torch.nn.Module,
    layers: Sequence[AttentionLayer],
    latent: Tensor,
    windows: Sequence[Window],
    references: Sequence[Tensor],
    marks: Marks,
    *,
    one_each: bool,
) -> list[Regions]:
    """Return the regions of each window.

    Raises:
        ValueError: a network that does not tell image tokens apart, or a mask that leaves no token of a layer.
    """
    if any(layer.kind != "self" for layer in layers):
        raise ValueError(
            f"reference_mask and target_mask need a model whose image tokens have an attention of their own (SD1.5, SD2, SDXL, "
            f"PixArt), and {type(network).__name__} mixes them with the text. Disconnect the masks."
        )
    layout = network_layout(network)
    grids: dict[str, tuple[Grid, list[Grid]]] = {}
    seen = windows[0].of(latent)
    for layer in layers:
        own, *others = (layer_grid(network, layout, layer.name, tuple(each.shape)) for each in (seen, *references))
        known = [grid for grid in others if grid is not None]
        if own is None or len(known) < len(others):
            raise ValueError(f"reference_mask cannot be used: the places of {type(network).__name__}'s tokens are not known.")
        grids[layer.name] = (own, known)
    labels = list(marks.reference.expand(len(references), -1, -1))
    if marks.part is not None:
        _check_part(layers, labels, grids, one_each=one_each)
    if len(windows) == 1:
        return [Regions(marks.target, labels, grids, one_each=one_each)]
    targets = resize_maps(marks.target, tuple(latent.shape[-2:]), "nearest")
    return [Regions(window.of(targets), labels, grids, one_each=one_each) for window in windows]


def _check_part(
    layers: Sequence[AttentionLayer],
    references: Sequence[Tensor],
    grids: Mapping[str, tuple[Grid, Sequence[Grid]]],
    *,
    one_each: bool,
) -> None:
    for layer in layers:
        marked = [bool(token_labels(one, grid).any()) for one, grid in zip(references, grids[layer.name][1], strict=True)]
        if not (all(marked) if one_each else any(marked)):
            which = f" {marked.index(False) + 1}" if one_each and len(marked) > 1 else ""
            raise ValueError(
                f"reference_mask marks so little of the reference{which} that no token of layer {layer.name} is in it. Paint "
                "more of it white, or use a larger reference."
            )
