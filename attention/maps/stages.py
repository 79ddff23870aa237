"""One image that was sampled in several runs, each from where the one before stopped: KSampler (Advanced), split sigmas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..networks.grids import resize_maps
from .recording import LayerMaps, PromptMaps, Recording, SelfAttention, StepFigures
from .runs import Run, fingerprint

_RELATIVE_SLACK = 1e-3


def stages_of(last: Run, runs: Sequence[Run]) -> list[Run]:
    """Return the runs that led to ``last`` step by step, the first one first; ``last`` alone where it began from noise."""
    chain = [last]
    while True:
        before = next((run for run in reversed(runs) if run not in chain and _continues(chain[0], run)), None)
        if before is None:
            return chain
        chain.insert(0, before)


def _continues(run: Run, before: Run) -> bool:
    ours, theirs = run.recording.sigmas, before.recording.sigmas
    if not ours or not theirs or not theirs[-1] > 0 or run.start is None:
        return False
    close = math.isclose(ours[0], theirs[-1], rel_tol=_RELATIVE_SLACK)
    return close and fingerprint(run.start) == fingerprint(before.result)


def joined(stages: Sequence[Run]) -> Recording:
    """Return the recording of all stages as one run; only the last one's, with a note, where they recorded different things."""
    whole = stages[0].recording
    for stage in stages[1:]:
        together = _joined(whole, stage.recording)
        if together is None:
            note = "the image was sampled in several runs that recorded different prompts or layers; shown is the last one"
            last = stages[-1].recording
            return replace(last, notes=[*last.notes, note])
        whole = together
    return whole


def _joined(first: Recording, then: Recording) -> Recording | None:
    if first.batch != then.batch or first.grid[0] != then.grid[0]:
        return None
    offset = len(first.sigmas) - 1
    prompts: list[PromptMaps] = []
    left = list(then.prompts)
    for maps in first.prompts:
        other = next((entry for entry in left if _same_prompt(maps, entry)), None)
        if other is None:
            prompts.append(maps)  # a prompt for a part of the steps
            continue
        left.remove(other)
        if set(maps.layers) != set(other.layers):
            return None
        prompts.append(_joined_prompt(maps, other, offset))
    if left and any(entry.prompt == maps.prompt for entry in left for maps in prompts):
        return None
    prompts += [replace(maps, steps=[step + offset for step in maps.steps]) for maps in left]
    return Recording(
        sigmas=[*first.sigmas[:-1], *then.sigmas],
        batch=first.batch,
        grid=max(first.grid, then.grid, key=lambda grid: grid[1] * grid[2]),
        prompts=prompts,
        notes=list(dict.fromkeys([*first.notes, *then.notes])),
        meta={**first.meta, **then.meta},
        latent=then.latent,
    )


def _same_prompt(maps: PromptMaps, other: PromptMaps) -> bool:
    told = (maps.prompt, maps.tokens, maps.kept, maps.area, maps.rows, maps.fingerprint, maps.metadata)
    return told == (other.prompt, other.tokens, other.kept, other.area, other.rows, other.fingerprint, other.metadata)


def _joined_prompt(maps: PromptMaps, other: PromptMaps, offset: int) -> PromptMaps:
    grid = max(maps.grid, other.grid, key=lambda grid: grid[1] * grid[2])
    layers = {name: _joined_layer(layer, other.layers[name]) for name, layer in maps.layers.items()}
    step_maps = figures = None
    if maps.step_maps is not None and other.step_maps is not None:
        step_maps = torch.cat([resize_maps(each.step_maps, grid[1:]) for each in (maps, other) if each.step_maps is not None])
    if maps.figures is not None and other.figures is not None:
        change = other.figures.change.clone()
        if step_maps is not None and len(change) and maps.steps:  # the first step of a stage knows none before it
            pair = step_maps[len(maps.steps) - 1 : len(maps.steps) + 1].float()
            change[0] = (pair[1] - pair[0]).square().sum((2, 3, 4))
        figures = StepFigures(
            torch.cat([maps.figures.mass, other.figures.mass]),
            torch.cat([maps.figures.change, change]),
            torch.cat([maps.figures.norm, other.figures.norm]),
        )
    return replace(
        maps,
        grid=grid,
        layers=layers,
        steps=[*maps.steps, *(step + offset for step in other.steps)],
        step_maps=step_maps,
        figures=figures,
        self_attention=_joined_attention(maps, other),
    )


def _joined_layer(layer: LayerMaps, other: LayerMaps) -> LayerMaps:
    first, then = layer.maps, other.maps
    if first.shape[1] != then.shape[1]:
        first, then = (maps.mean(1, keepdim=True) for maps in (first, then))
    size = max(first.shape[-2:], then.shape[-2:], key=math.prod)
    return LayerMaps(layer.heads, resize_maps(first, size) + resize_maps(then, size))


def _joined_attention(maps: PromptMaps, other: PromptMaps) -> list[SelfAttention]:
    found: dict[tuple[int, int, int], tuple[int, Tensor]] = {}
    for entry in (*maps.self_attention, *other.self_attention):
        weight, total = found.get(entry.grid, (0, torch.zeros(())))
        found[entry.grid] = (weight + entry.weight, total + entry.matrix * entry.weight)
    return [SelfAttention(grid, weight, total / weight) for grid, (weight, total) in found.items()]
