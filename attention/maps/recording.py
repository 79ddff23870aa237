"""What a recorded run leaves: plain data and tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..networks.grids import Grid


@dataclass
class LayerMaps:
    """One layer's attention to the text.

    Attributes:
        heads: number of heads of the layer; its weight in a mean over layers.
        maps: (batch, heads or 1, tokens, frames, height, width), summed over the steps.
    """

    heads: int
    maps: Tensor


@dataclass
class SelfAttention:
    """Image tokens attending to image tokens on one grid, the mean over layers, heads and steps.

    Attributes:
        grid: of queries and keys alike.
        weight: how many heads of how many layers went in.
        matrix: (batch, queries, keys).
    """

    grid: Grid
    weight: int
    matrix: Tensor


@dataclass
class StepFigures:
    """Numbers of each recorded step: (steps, batch, tokens), over all layers.

    Attributes:
        mass: attention a token gets, averaged over the image.
        change: squared L2 distance of its map to the one of the step before (NaN in the first step).
        norm: squared L2 norm of its map.
    """

    mass: Tensor
    change: Tensor
    norm: Tensor


@dataclass
class PromptMaps:
    """Everything recorded for one entry of the positive or negative conditioning.

    Attributes:
        prompt: "positive", "negative", or the guider's name for another list of conds.
        tokens: text tokens in the context.
        layers: by name, in the network's order.
        grid: the finest grid among the layers; all maps of the prompt are aggregated there.
        steps: the steps that were recorded; a step whose attention was reused from a cache has no map.
        step_maps: (steps, batch, tokens, frames, height, width) on ``grid``, the mean over layers and heads, or None.
        area: top, left, height, width of the part of the image that the conditioning acts on, as fractions; None: all.
        metadata: what the prompt's encoder left in the conditioning (``tokens.METADATA``), plain data.
        rows: rows of the conditioning tensor (tokens that a network joins behind them are not counted).
        kept: the tokens that have maps of their own, in order; the sum of all others, padding, stands behind them. None: all.
        fingerprint: of the rows of the conditioning (``prompts.encoded_fingerprint``), to compare a typed prompt with.
    """

    prompt: str
    tokens: int
    grid: Grid
    layers: dict[str, LayerMaps] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    step_maps: Tensor | None = None
    figures: StepFigures | None = None
    self_attention: list[SelfAttention] = field(default_factory=list)
    area: tuple[float, float, float, float] | None = None
    metadata: dict[str, Any] | None = None
    rows: int = 0
    kept: list[int] | None = None
    fingerprint: str = ""

    @property
    def stored(self) -> int:
        """Return how many token maps each tensor holds."""
        return self.tokens if self.kept is None else len(self.kept) + 1

    def rows_of(self, positions: Sequence[int] | None) -> tuple[list[int] | None, list[float]]:
        """Return the index and the share of each token among the stored ones; None as indices: as they are.

        A token without a map of its own gets an equal part of the sum of all such tokens.
        """
        if self.kept is None:
            return (None, []) if positions is None else (list(positions), [1.0] * len(positions))
        own = {position: at for at, position in enumerate(self.kept)}
        others = max(self.tokens - len(self.kept), 1)
        wanted = range(self.tokens) if positions is None else positions
        return [own.get(each, len(self.kept)) for each in wanted], [1.0 if each in own else 1 / others for each in wanted]

    def tokens_of(self, values: Tensor, positions: Sequence[int] | None, dim: int) -> Tensor:
        """Return the entries of some tokens (default: all) along the dimension of a tensor that holds the stored ones."""
        rows, shares = self.rows_of(positions)
        if rows is None:
            return values
        chosen = values.index_select(dim, torch.tensor(rows, dtype=torch.long, device=values.device))
        if all(share == 1 for share in shares):
            return chosen
        shape = [1] * chosen.ndim
        shape[dim] = len(shares)
        return chosen * torch.tensor(shares, dtype=chosen.dtype, device=chosen.device).view(shape)


@dataclass(frozen=True)
class LatentSize:
    """The latent of a run.

    Attributes:
        height, width: in latent pixels.
        pixels: side of a latent pixel in the decoded image.
        frames: of the decoded video in one latent frame after the first.
    """

    height: int
    width: int
    pixels: int
    frames: int = 4

    @property
    def decoded(self) -> tuple[int, int]:
        """Return height and width of the decoded image."""
        return self.height * self.pixels, self.width * self.pixels


@dataclass
class Recording:
    """One sampling run."""

    sigmas: list[float]  # steps + 1
    batch: int
    grid: Grid
    prompts: list[PromptMaps]
    notes: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    latent: LatentSize | None = None
