"""From the sums of a run to what it leaves: a ``Recording`` on the CPU, in ordinary tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..networks.grids import Grid, resize_maps
from .recording import LayerMaps, PromptMaps, SelfAttention, StepFigures
from .sums import LayerSum, Track, grid_of, size_of


def filled_tracks(tracks: Iterable[Track]) -> list[Track]:
    """Return the tracks that something was added to, the positive prompt's first."""
    order = {"positive": 0, "negative": 1}
    filled = (track for track in tracks if track.layers or track.self_sums)
    return sorted(filled, key=lambda track: order.get(track.prompt, 2))


def finished(tracks: Sequence[Track], order: Sequence[str], limit: int, *, per_head: bool) -> list[PromptMaps]:
    """Return the maps of each track, its layers in the network's ``order``.

    Heads are resized one by one where that stays below ``limit`` bytes, and kept apart with ``per_head``.
    """
    with torch.inference_mode(False), torch.no_grad():
        resizes = not per_head and _resized_bytes(tracks) <= limit
        return [_prompt_maps(track, order, resizes=resizes, per_head=per_head) for track in tracks]


def _prompt_maps(track: Track, order: Sequence[str], *, resizes: bool, per_head: bool) -> PromptMaps:
    grid = track.finest if track.layers else max(track.self_sums, key=lambda grid: grid[1] * grid[2])
    layers = {}
    for name in sorted(track.layers, key=order.index):
        layer = track.layers[name]
        layers[name] = LayerMaps(layer.heads, _final(layer, grid, resizes=resizes, per_head=per_head))
    tokens = {layer.maps.shape[2] for layer in layers.values()}
    step_maps = figures = None
    if track.step_maps:
        step_maps = torch.stack([resize_maps(maps, grid[1:]).half() for maps in track.step_maps]).cpu()
    if track.figures:
        figures = StepFigures(*(torch.stack(values).cpu().clone() for values in zip(*track.figures, strict=True)))
    return PromptMaps(
        prompt=track.prompt,
        tokens=max(tokens, default=0) if track.kept is None else track.tokens or 0,
        grid=grid,
        layers=layers,
        steps=track.steps,
        step_maps=step_maps,
        figures=figures,
        self_attention=[
            SelfAttention(own, entry.weight, (entry.total / entry.weight).cpu().clone()) for own, entry in track.self_sums.items()
        ],
        area=track.area,
        metadata=track.metadata,
        rows=track.rows,
        kept=track.kept if layers else None,
        fingerprint=track.fingerprint,
    )


def _final(layer: LayerSum, grid: Grid, *, resizes: bool, per_head: bool) -> Tensor:
    """Return DAAM's order where heads are not asked for: each head to the finest grid, clamped, then the mean over heads."""
    total = layer.total
    if not per_head and total.shape[1] > 1:
        if not resizes:
            total = total.mean(1, keepdim=True)
        else:
            total = torch.stack([resize_maps(maps, grid[1:]).mean(0, keepdim=True) for maps in total])
    return total.cpu().clone()


def _resized_bytes(tracks: Sequence[Track]) -> int:
    """Return the size of all layers on their prompt's finest grid."""
    size = 0
    for track in tracks:
        totals = [layer.total for layer in track.layers.values()]
        cells = math.prod(track.finest) if totals else 0
        size += sum(size_of(total) // total.shape[1] // math.prod(grid_of(total)) * cells for total in totals)
    return size
