"""Where text and image tokens stand in one attention call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .grids import Grid, layer_grid, scaled_grid, token_grid
from .layers import AttentionLayer
from .table import NetworkLayout
from .token_order import JointCall


@dataclass(frozen=True)
class Placement:
    """Image queries on a grid, text keys, image keys; ``repeated_text`` is a second copy of the last text tokens."""

    grid: Grid
    rows: slice
    text: slice | None
    image: slice | None
    repeated_text: slice | None = None


@dataclass(frozen=True)
class CallContext:
    """The model call that an attention call belongs to.

    Attributes:
        latent: (batch, channels, [frames,] height, width).
        text: rows of the text, as the network gets it.
        arguments: the other conditioning.
    """

    network: torch.nn.Module
    layout: NetworkLayout | None
    latent: tuple[int, ...]
    text: int
    arguments: Mapping[str, Any]


def joint_placement(context: CallContext, keys: int, queries: int, grid: Grid) -> Placement | None:
    """Return the placement in an attention of text and image together; None where the tokens cannot be told apart."""
    assert context.layout is not None and context.layout.order is not None
    image = math.prod(grid)
    if keys == image:  # SD3.5 medium: a second attention of the image alone
        return Placement(grid, slice(0, image), None, slice(0, image))
    spans = context.layout.order(JointCall(keys, queries, image, context.text, context.network, context.arguments))
    if spans is None or max(spans.text.stop, spans.image.stop) > keys or context.text == 0:
        return None
    rows = spans.rows or (spans.image if queries == keys else slice(0, image))
    return Placement(grid, rows, spans.text, spans.image, spans.repeated_text)


def image_rows(context: CallContext, queries: int, grid: Grid) -> slice:
    """Return the image's own tokens among the queries of a cross-attention network; others may stand around them."""
    layout, image = context.layout, math.prod(grid)
    start = 0
    for name in layout.leading if layout is not None else ():
        other = context.arguments.get(name)
        tokens = None if other is None else token_grid(context.network, layout, other.shape, 0)
        start += math.prod(tokens) if tokens is not None else 0
    start = min(start, queries - image)  # a network may have no use for what it is given
    return slice(start, start + image)


def text_placement(layer: AttentionLayer, context: CallContext, keys: int, queries: int) -> Placement | None:
    """Return the placement in a call of a layer that the table knows; None where its tokens cannot be told apart.

    The cross-attention of a U-Net may come with scaled features: its grid is then told from the number of queries.
    """
    grid = layer_grid(context.network, context.layout, layer.name, context.latent)
    if grid is not None and layer.kind == "cross" and context.layout is not None and context.layout.family == "U-Net":
        grid = scaled_grid(grid, queries)
    if grid is None or queries < math.prod(grid):
        return None
    if layer.kind == "joint":
        return joint_placement(context, keys, queries, grid)
    rows = image_rows(context, queries, grid)
    if layer.kind == "self":
        return Placement(grid, rows, None, rows)
    return Placement(grid, rows, slice(0, keys), None)
