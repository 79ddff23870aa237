"""Sums of attention over one sampling run.

A ``Track`` holds the sums of one entry of a prompt's conditioning. Tensors: sums are (batch of one prompt, heads, text
tokens, frames, height, width), float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..networks.grids import Grid, resize_maps

# Self-attention is kept on a grid of at most so many tokens.
SELF_TOKENS = 32 * 32


@dataclass
class LayerSum:
    """Attention of one layer to one prompt, summed over steps; ``heads`` of the network, kept apart or already averaged."""

    heads: int
    total: Tensor

    def add(self, maps: Tensor) -> None:
        """Add one call's maps; where a node shrinks the image in some steps, on the finer of both grids."""
        if maps.shape[-2] * maps.shape[-1] > self.total.shape[-2] * self.total.shape[-1]:
            self.total = resize_maps(self.total, grid_of(maps)[1:])
        self.total += resize_maps(maps, grid_of(self.total)[1:])


@dataclass
class SelfSum:
    """(batch, queries, keys), summed over heads, layers and steps."""

    weight: int
    total: Tensor


@dataclass
class Track:
    """Everything that one entry of a prompt's conditioning gets.

    Attributes:
        rows: of the conditioning tensor.
        padding: tokens that no view can show; their maps are added up to one.
        fingerprint: of the conditioning tensor.
        tokens: of the text in the network's context, once they are known.
        step: this step's maps by grid: the sum over layers and heads, and how many went in.
        before: the last step's maps on the finest grid, (batch, tokens, frames, height, width).
        step_maps: every step's, in half precision, where they were made: each copy to the CPU would be waited for.
    """

    prompt: str
    rows: int
    area: tuple[float, float, float, float] | None
    metadata: dict[str, Any] | None
    padding: frozenset[int] = frozenset()
    fingerprint: str = ""
    tokens: int | None = None
    layers: dict[str, LayerSum] = field(default_factory=dict)
    self_sums: dict[Grid, SelfSum] = field(default_factory=dict)
    step: dict[Grid, tuple[Tensor, int]] = field(default_factory=dict)
    before: Tensor | None = None
    steps: list[int] = field(default_factory=list)
    step_maps: list[Tensor] = field(default_factory=list)
    figures: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    @property
    def kept(self) -> list[int] | None:
        """Return the tokens that have maps of their own; None: all."""
        if self.tokens is None or not self.padding:
            return None
        return [position for position in range(self.tokens) if position not in self.padding]

    def without_padding(self, columns: Tensor, *, whole: bool = False) -> Tensor:
        """Return attention (..., tokens, image) with that to padding added up behind that to all other tokens.

        Args:
            whole: what each place of the image attends to sums to 1, so that padding has what is left.
        """
        tokens = columns.shape[-2]
        if self.tokens is None:
            self.tokens = tokens
        if not self.padding or tokens != self.tokens:
            return columns
        first = min(self.padding)
        if len(self.padding) == tokens - first:  # all of it is at the end: no indices to bring to the device
            chosen = columns[..., :first, :]
            rest = (1 - chosen.sum(-2, keepdim=True)).clamp_(min=0) if whole else columns[..., first:, :].sum(-2, keepdim=True)
            return torch.cat([chosen, rest], -2)
        chosen = columns[..., self.kept, :]
        return torch.cat([chosen, (columns.sum(-2, keepdim=True) - chosen.sum(-2, keepdim=True)).clamp(min=0)], -2)

    @property
    def finest(self) -> Grid:
        frames, height, width = 0, 0, 0
        for layer in self.layers.values():
            shape = layer.total.shape
            if shape[-2] * shape[-1] > height * width:
                frames, height, width = shape[-3:]
        return frames, height, width

    @property
    def bytes(self) -> int:
        tensors = [layer.total for layer in self.layers.values()] + [entry.total for entry in self.self_sums.values()]
        tensors += [*self.step_maps, *[maps for maps, _ in self.step.values()]]
        tensors += [] if self.before is None else [self.before]
        return sum([tensor.nbytes for tensor in tensors])

    def finish_step(self, step: int, keep_maps: bool) -> None:
        """Take this step's maps together on the finest grid."""
        if not self.step:
            return
        size = self.finest[1:]
        weight = sum([heads for _, heads in self.step.values()])
        first, *others = [resize_maps(total, size) for total, _ in self.step.values()]
        maps = first / weight
        for each in others:
            maps.add_(each, alpha=1 / weight)
        self.step.clear()
        before = self.before if self.before is not None and self.before.shape == maps.shape else None
        change = torch.full_like(maps[..., 0, 0, 0], math.nan) if before is None else (maps - before).square().sum((2, 3, 4))
        self.figures.append((maps.mean((2, 3, 4)), change, maps.square().sum((2, 3, 4))))
        self.steps.append(step)
        self.before = maps
        if keep_maps:
            self.step_maps.append(maps.half())

    def average_heads(self) -> None:
        for layer in self.layers.values():
            layer.total = layer.total.mean(1, keepdim=True)

    def lower(self, side: int, self_tokens: int) -> None:
        """Pool maps so that no side is longer than ``side``, and self-attention to at most ``self_tokens`` tokens."""
        for layer in self.layers.values():
            layer.total = pooled(layer.total, side)
        self.step_maps = [pooled(maps, side) for maps in self.step_maps]
        self.before = None if self.before is None else pooled(self.before, side)
        step, self.step = self.step, {}
        for maps, heads in step.values():
            self.add_step(pooled(maps, side), heads)
        self_sums, self.self_sums = self.self_sums, {}
        for grid, entry in self_sums.items():
            self.add_self(*pooled_self(entry.total, grid, self_tokens), entry.weight)

    def add_step(self, maps: Tensor, heads: int) -> None:
        grid = grid_of(maps)
        known = self.step.get(grid)
        self.step[grid] = (maps, heads) if known is None else (known[0] + maps, known[1] + heads)

    def sort_step(self, grids: Sequence[Grid]) -> None:
        """Bring this step's maps into the order of ``grids``."""
        if list(self.step) != grids:
            self.step = {grid: self.step[grid] for grid in dict.fromkeys([*grids, *self.step]) if grid in self.step}

    def add_self(self, matrix: Tensor, grid: Grid, weight: int) -> None:
        known = self.self_sums.get(grid)
        if known is None:
            self.self_sums[grid] = SelfSum(weight, matrix.clone())
        else:
            known.total += matrix
            known.weight += weight


def grid_of(maps: Tensor) -> Grid:
    frames, height, width = maps.shape[-3:]
    return frames, height, width


def size_of(tensor: Tensor) -> int:
    return tensor.nbytes


def lowered(grid: Grid, side: int | None) -> Grid:
    """Return the grid halved until no side is longer than ``side``."""
    frames, height, width = grid
    while side is not None and max(height, width) > side:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    return frames, height, width


def pooled(maps: Tensor, side: int | None) -> Tensor:
    if side is None:
        return maps
    grid = grid_of(maps)
    kept = lowered(grid, side)
    return maps if kept == grid else resize_maps(maps, kept[1:], "area")


def self_grid(grid: Grid, tokens: int) -> Grid:
    """Return the grid on which self-attention is kept: halved until it has at most ``tokens`` tokens."""
    frames, height, width = grid
    while frames * height * width > tokens and max(height, width) > 1:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    return frames, height, width


def pooled_mass(rows: Tensor, grid: Grid, lowered: Grid) -> Tensor:
    """Return attention to fewer keys, (..., keys) -> (..., fewer keys), with the same sum where both sides are even."""
    if grid == lowered:
        return rows
    cells = resize_maps(rows.unflatten(-1, grid), lowered[1:], "area").flatten(-3)
    return cells * (math.prod(grid) / math.prod(lowered))


def pooled_queries(matrix: Tensor, grid: Grid, lowered: Grid) -> Tensor:
    """Return the mean of neighbouring queries: (batch, queries, keys) -> (batch, fewer queries, keys)."""
    if grid == lowered:
        return matrix
    frames, height, width = grid
    maps = rearrange(matrix, "b (f h w) k -> b k f h w", f=frames, h=height, w=width)
    return rearrange(resize_maps(maps, lowered[1:], "area"), "b k f h w -> b (f h w) k")


def pooled_self(matrix: Tensor, grid: Grid, tokens: int) -> tuple[Tensor, Grid]:
    """Return (batch, queries, keys) on a grid -> the same on a grid of at most ``tokens`` tokens."""
    lowered = self_grid(grid, tokens)
    return pooled_queries(pooled_mass(matrix, grid, lowered), grid, lowered), lowered
