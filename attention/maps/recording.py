"""What a recorded run leaves: plain data and tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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


@dataclass
class Recording:
    """One sampling run."""

    sigmas: list[float]  # steps + 1
    batch: int
    grid: Grid
    prompts: list[PromptMaps]
    notes: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
