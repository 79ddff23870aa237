"""Attention maps as the tensors and the text metadata of a safetensors file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any, cast

from torch import Tensor

from ..networks.grids import Grid
from .recording import LatentSize, LayerMaps, PromptMaps, Recording, SelfAttention, StepFigures

_FORMAT = "fovea.attn_maps"
# 2: padding has no maps of its own. Maps that hold all tokens are still written as 1, which older versions read.
_VERSION = 2


def to_tensors(recording: Recording) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the text metadata of a safetensors file."""
    tensors: dict[str, Tensor] = {}
    prompts = []
    for number, maps in enumerate(recording.prompts):
        for at, layer in enumerate(maps.layers.values()):
            tensors[f"{number}.layer.{at}"] = layer.maps
        for at, entry in enumerate(maps.self_attention):
            tensors[f"{number}.self.{at}"] = entry.matrix
        if maps.step_maps is not None:
            tensors[f"{number}.steps"] = maps.step_maps
        if maps.figures is not None:
            for name, values in vars(maps.figures).items():
                tensors[f"{number}.figures.{name}"] = values
        prompts.append(
            {
                "prompt": maps.prompt,
                "tokens": maps.tokens,
                "grid": maps.grid,
                "steps": maps.steps,
                "area": maps.area,
                "metadata": maps.metadata,
                "rows": maps.rows,
                "kept": maps.kept,
                "fingerprint": maps.fingerprint,
                "layers": [[name, layer.heads] for name, layer in maps.layers.items()],
                "self_attention": [[entry.grid, entry.weight] for entry in maps.self_attention],
            }
        )
    described = {
        "version": _VERSION if any(maps.kept is not None for maps in recording.prompts) else 1,
        "sigmas": recording.sigmas,
        "batch": recording.batch,
        "grid": recording.grid,
        "notes": recording.notes,
        "meta": recording.meta,
        "latent": None if recording.latent is None else list(astuple(recording.latent)),
        "prompts": prompts,
    }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, {_FORMAT: json.dumps(described)}


def from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> Recording:
    """Return the recording that ``to_tensors`` described.

    Raises:
        ValueError: the file holds no maps, is damaged, or was written by a newer version.
    """
    if not metadata or _FORMAT not in metadata:
        raise ValueError("This file holds no attention maps: choose one that Save Attention Maps wrote.")
    try:
        described = json.loads(metadata[_FORMAT])
        version = int(described["version"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"This file of attention maps is damaged ({error!r}). Save the maps again.") from error
    if version > _VERSION:
        raise ValueError(
            f"This file was written by a newer Fovea (maps format {version}, known: {_VERSION}). Update the node pack."
        )
    try:
        prompts = [_restored(number, entry, tensors) for number, entry in enumerate(described["prompts"])]
        recording = Recording(
            sigmas=[float(sigma) for sigma in described["sigmas"]],
            batch=int(described["batch"]),
            grid=_grid(described["grid"]),
            prompts=prompts,
            notes=[str(note) for note in described["notes"]],
            meta=dict(described["meta"]),
            latent=LatentSize(*(int(value) for value in described["latent"])) if described.get("latent") else None,
        )
        _check_shapes(recording)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"This file of attention maps is damaged ({error!r}). Save the maps again.") from error
    return recording


def _restored(number: int, entry: dict[str, Any], tensors: Mapping[str, Tensor]) -> PromptMaps:
    figures = {name: tensors.get(f"{number}.figures.{name}") for name in ("mass", "change", "norm")}
    complete = all(values is not None for values in figures.values())
    return PromptMaps(
        prompt=str(entry["prompt"]),
        tokens=int(entry["tokens"]),
        grid=_grid(entry["grid"]),
        layers={name: LayerMaps(int(heads), tensors[f"{number}.layer.{at}"]) for at, (name, heads) in enumerate(entry["layers"])},
        steps=[int(step) for step in entry["steps"]],
        step_maps=tensors.get(f"{number}.steps"),
        figures=StepFigures(**cast(dict[str, Tensor], figures)) if complete else None,
        self_attention=[
            SelfAttention(_grid(grid), int(weight), tensors[f"{number}.self.{at}"])
            for at, (grid, weight) in enumerate(entry["self_attention"])
        ],
        area=None if entry["area"] is None else cast(Any, tuple(float(side) for side in entry["area"])),
        metadata=entry["metadata"],
        rows=int(entry["rows"]),
        kept=None if entry.get("kept") is None else [int(position) for position in entry["kept"]],
        fingerprint=str(entry.get("fingerprint", "")),
    )


def _check_shapes(recording: Recording) -> None:
    """Raise TypeError where a tensor is not what its description says."""
    batch = recording.batch
    for maps in recording.prompts:
        if maps.kept is not None and not all(0 <= position < maps.tokens for position in maps.kept):
            raise TypeError(f"tokens {maps.kept} are not of a prompt of {maps.tokens}")
        shapes: list[tuple[Tensor, tuple[int, ...]]] = []
        for layer in maps.layers.values():
            _, heads, _, frames, height, width = layer.maps.shape
            shapes.append((layer.maps, (batch, heads, maps.stored, frames, height, width)))
        for entry in maps.self_attention:
            shapes.append((entry.matrix, (batch, math.prod(entry.grid), math.prod(entry.grid))))
        if maps.step_maps is not None:
            shapes.append((maps.step_maps, (len(maps.steps), batch, maps.stored, *maps.grid)))
        if maps.figures is not None:
            shapes += [(figure, (len(maps.steps), batch, maps.stored)) for figure in vars(maps.figures).values()]
        for tensor, expected in shapes:
            if tuple(tensor.shape) != expected:
                raise TypeError(f"a tensor has the shape {tuple(tensor.shape)} instead of {expected}")


def _grid(values: Sequence[int]) -> Grid:
    frames, height, width = (int(value) for value in values)
    return frames, height, width
