"""Where image and text are among the tokens of an attention call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..host import AttentionInputs
from ..networks.grids import Grid, token_grid
from ..networks.layers import AttentionLayer
from ..networks.placement import CallContext, Placement, image_rows, joint_placement
from ..networks.table import NetworkLayout

Features = tuple[int, int] | None  # height and width of the feature map that an attention call of a U-Net belongs to


@dataclass(frozen=True)
class WatchedModel:
    """What is recorded of a model; the same in the whole run."""

    network: torch.nn.Module
    layout: NetworkLayout | None
    layers: list[AttentionLayer]
    left_padded: bool


class TokenPlaces:
    """Finds the tokens of the attention calls of one model call.

    Args:
        latent: its shape, (batch, channels, ..., height, width); text: tokens of its text.
        arguments: what the network is called with.
        note: takes what is to be said about calls whose tokens are not found.
    """

    def __init__(
        self, model: WatchedModel, latent: tuple[int, ...], text: int, arguments: Mapping[str, Any], note: Callable[[str], None]
    ) -> None:
        self._model = model
        self._layout = model.layout
        self._latent = latent
        self._text = text
        self._arguments = arguments
        self._note = note

    def of(self, layer: AttentionLayer, inputs: AttentionInputs, features: Features) -> Placement | None:
        """Return where image and text are; None where that is not known, or where a layer looks at neither."""
        grid = self._grid(inputs, features)
        if grid is None or inputs.queries < math.prod(grid):
            if not (self._layout is not None and self._layout.guided):
                self._note_unplaced(layer)
            return None
        if layer.kind == "joint":
            place = joint_placement(self._context(), inputs.keys, inputs.queries, grid)
            if place is None:
                self._note_unplaced(layer)
            return place
        rows = image_rows(self._context(), inputs.queries, grid)
        if inputs.keys == inputs.queries and layer.kind != "cross":
            return Placement(grid, rows, None, rows)
        if layer.kind == "self":
            return None
        if layer.kind == "unknown" and inputs.keys != self._text:
            self._note_unplaced(layer)
            return None
        return Placement(grid, rows, slice(0, inputs.keys), None)

    def _context(self) -> CallContext:
        return CallContext(self._model.network, self._layout, self._latent, self._text, self._arguments)

    def _grid(self, inputs: AttentionInputs, features: Features) -> Grid | None:
        if features is not None:
            return 1, *features
        return token_grid(self._model.network, self._layout, self._latent, inputs.queries)

    def _note_unplaced(self, layer: AttentionLayer) -> None:
        if layer.kind in ("cross", "joint"):
            self._note(
                "some attention has tokens that cannot be told apart: reference images, or another node merges or splits tokens"
            )
