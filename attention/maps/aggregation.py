"""From recorded sums to heat maps, as DAAM aggregates them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..networks.grids import resize_maps
from .recording import PromptMaps

Size = tuple[int, int]  # height, width


def aggregate(
    maps: PromptMaps, batch: int, positions: Sequence[int] | None, layers: Sequence[str] | None, heads: Sequence[int] | None
) -> Tensor:
    """Return the mean over heads of layers, on the prompt's grid: (tokens, frames, height, width)."""
    if not maps.layers:
        raise ValueError("Attention to words was not recorded in this run; only self-attention views are possible.")
    total, weight = torch.zeros(()), 0
    for name in maps.layers if layers is None else layers:
        if name not in maps.layers:
            raise ValueError(f"Layer '{name}' was not recorded. Recorded: {listed(list(maps.layers))}.")
        layer = maps.layers[name]
        chosen = layer.maps[batch]
        kept = chosen.shape[0]
        if heads is not None:
            if kept == 1 and layer.heads > 1:
                raise ValueError("Single heads were not kept. Switch on 'per_head' in Capture Attention Maps and sample again.")
            chosen = chosen[[checked_index(head, kept, "head") for head in heads]]
        chosen = maps.tokens_of(chosen, None if positions is None else checked_positions(positions, maps.tokens), 1)
        heads_here = layer.heads if heads is None else len(heads)
        total = total + resize_maps(chosen.float(), maps.grid[1:]).mean(0) * heads_here
        weight += heads_here
    if not weight:
        raise ValueError("No layer or no head is chosen, so there is nothing to show. Leave 'layers' empty to use all of them.")
    return total / weight


def step_map(maps: PromptMaps, step: int) -> Tensor:
    """Return the map of one step, (batch, stored tokens, frames, height, width), the mean over layers and heads."""
    if maps.step_maps is None:
        raise ValueError("Single steps were not kept. Switch on 'per_step' in Capture Attention Maps and sample again.")
    if step not in maps.steps:
        raise ValueError(f"Step {step} has no map; steps with one: {listed([str(known) for known in maps.steps])}.")
    return maps.step_maps[maps.steps.index(step)]


def looked_at(maps: PromptMaps, batch: int, x: float, y: float, frame: int) -> Tensor:
    """Return where the point (x, y) of the image, as fractions, looks: (1, height, width) of the finest self-attention grid."""
    finest = max((entry.grid for entry in maps.self_attention), key=lambda grid: grid[1] * grid[2])
    total = sum(entry.weight for entry in maps.self_attention)
    top, left, tall, wide = maps.area or (0.0, 0.0, 1.0, 1.0)
    answer = torch.zeros(1, *finest[1:])
    for entry in maps.self_attention:
        frames, height, width = entry.grid
        at = min(frame, frames - 1)
        query = (at * height + _cell_at((y - top) / tall, height)) * width + _cell_at((x - left) / wide, width)
        looked = entry.matrix[batch, query].float().view(frames, height, width)[at]
        answer += resize_maps(looked[None] * (height * width), finest[1:]) * (entry.weight / total)
    return answer / (finest[1] * finest[2])


def on_canvas(maps: Tensor, area: tuple[float, float, float, float] | None, grid: Size, size: Size | None) -> Tensor:
    """Return (n, height, width) of the conditioning's own area -> the whole image."""
    if area is None:
        return maps if size is None else resize_maps(maps, size)
    height, width = size or grid
    top, left = round(area[0] * height), round(area[1] * width)
    tall, wide = max(round(area[2] * height), 1), max(round(area[3] * width), 1)
    canvas = maps.new_zeros(maps.shape[0], height, width)
    part = canvas[:, top : top + tall, left : left + wide]
    part.copy_(resize_maps(maps, (tall, wide))[:, : part.shape[1], : part.shape[2]])
    return canvas


def _cell_at(fraction: float, cells: int) -> int:
    """Return the index of the cell at a fraction of a side, 0 .. cells - 1."""
    return min(max(int(fraction * cells), 0), cells - 1)


def checked_index(index: int, length: int, what: str) -> int:
    if not 0 <= index < length:
        raise ValueError(f"There is no {what} {index}: the recorded run has {length} (0 to {length - 1}).")
    return index


def checked_positions(positions: Sequence[int], tokens: int) -> list[int]:
    return [checked_index(position, tokens, "token") for position in positions]


def listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"
