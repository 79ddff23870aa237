"""Attention maps of one sampling run: what was recorded, and how it becomes a picture.

Aggregation follows DAAM (Tang et al., "What the DAAM: Interpreting Stable Diffusion Using Cross Attention",
arXiv:2210.04885): attention to one text token is summed over the steps, every head of every layer is resized to the finest
grid with bicubic interpolation and clamped at zero, and the mean is taken over all heads of all layers.

Tensors: maps are (batch, heads, tokens, frames, height, width), in attention probability summed over steps; ``heads`` is 1
where a layer's heads are already averaged. A position of ``tokens`` is a position of the text in the network's context.
Pure torch: this module knows nothing of the host.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import interpolate

Grid = tuple[int, int, int]  # frames, height, width
Size = tuple[int, int]  # height, width

_FORMAT = "fovea.attn_maps"
_VERSION = 1


# --- what a run leaves --------------------------------------------------------------------------------------------------


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
        mass: attention a token gets, averaged over the picture.
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
        area: top, left, height, width of the part of the picture that the conditioning acts on, as fractions; None: all.
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


# --- the handle ---------------------------------------------------------------------------------------------------------


class AttnMaps:
    """The ATTN_MAPS socket: an empty handle until sampling fills it, then the maps of the last run.

    The run before the last one stays reachable as ``previous`` (a hires-fix samples twice with one model).
    """

    def __init__(self, recording: Recording | None = None, previous: Recording | None = None) -> None:
        self._recording = recording
        self._previous = previous

    def __deepcopy__(self, memo: dict[int, Any]) -> AttnMaps:
        """The same handle: the host copies what hangs on a model, and sampling has to fill the one the preview holds."""
        return self

    def fill(self, recording: Recording) -> None:
        """Take over a finished run."""
        self._recording, self._previous = recording, self._recording

    @property
    def ready(self) -> bool:
        """Whether a run was recorded."""
        return self._recording is not None

    @property
    def previous(self) -> AttnMaps | None:
        """The run before the last one."""
        return None if self._previous is None else AttnMaps(self._previous)

    def require(self) -> Recording:
        """The recording, or an error that says what to do."""
        if self._recording is None:
            raise ValueError(
                "There are no attention maps yet: no sampler has run with the model that comes out of Capture Attention Maps. "
                "Connect that model to the sampler and take the picture from this sampler. If the sampler is cached from an "
                "earlier run, change its seed."
            )
        return self._recording

    # What there is

    @property
    def steps(self) -> int:
        """Steps of the run; ``recorded_steps`` says which of them have a map of their own."""
        return max(len(self.sigmas) - 1, 0)

    @property
    def sigmas(self) -> list[float]:
        """Noise levels of the run, steps + 1 numbers."""
        return self.require().sigmas

    @property
    def batch(self) -> int:
        """Pictures in the batch."""
        return self.require().batch

    @property
    def grid(self) -> Size:
        """Height and width of the finest maps."""
        return self.require().grid[1:]

    @property
    def frames(self) -> int:
        """Latent frames of a video; 1 for pictures."""
        return self.require().grid[0]

    @property
    def notes(self) -> list[str]:
        """What the artist should know: layers that could not be seen, detail that was dropped."""
        return self.require().notes

    @property
    def meta(self) -> dict[str, Any]:
        """Plain facts: model, family, kind of attention."""
        return self.require().meta

    @property
    def prompts(self) -> list[str]:
        """Which prompts have maps: "positive", "negative"."""
        return list(dict.fromkeys(maps.prompt for maps in self.require().prompts))

    @property
    def layers(self) -> list[str]:
        """Names of the recorded layers, in the network's order."""
        return list(dict.fromkeys(name for maps in self.require().prompts for name in maps.layers))

    def count(self, prompt: str = "positive") -> int:
        """Entries of this prompt's conditioning that have maps (several where prompts are combined)."""
        return sum(maps.prompt == prompt for maps in self.require().prompts)

    def tokens(self, prompt: str = "positive", cond: int = 0) -> int:
        """Text tokens: the first dimension of ``heat``."""
        return self.of(prompt, cond).tokens

    def heads(self, layer: str) -> int:
        """Heads that are kept apart in a layer; 1 where only their mean is."""
        for maps in self.require().prompts:
            if layer in maps.layers:
                return maps.layers[layer].maps.shape[1]
        raise ValueError(f"Layer '{layer}' was not recorded. Recorded: {_listed(self.layers)}.")

    def recorded_steps(self, prompt: str = "positive", cond: int = 0) -> list[int]:
        """Steps (0 .. steps - 1) that ``convergence`` knows, and ``heat`` where step maps were kept."""
        return self.of(prompt, cond).steps

    @property
    def has_text(self) -> bool:
        """Whether attention to words was recorded at all."""
        return any(maps.layers for maps in self.require().prompts)

    @property
    def has_steps(self) -> bool:
        """Whether ``heat(step=...)`` works."""
        return any(maps.step_maps is not None for maps in self.require().prompts)

    @property
    def has_self_attention(self) -> bool:
        """Whether ``self_attention`` works."""
        return any(maps.self_attention for maps in self.require().prompts)

    def conditioning(self, prompt: str = "positive") -> list[dict[str, Any]]:
        """One dict per entry with what the prompt's encoder left there: for ``tokens.prompt_infos``."""
        return [dict(maps.metadata or {}) for maps in self.require().prompts if maps.prompt == prompt]

    def of(self, prompt: str = "positive", cond: int = 0) -> PromptMaps:
        """The recording of one entry of a prompt's conditioning."""
        recording = self.require()
        found = [maps for maps in recording.prompts if maps.prompt == prompt]
        if not recording.prompts:
            why = "; ".join(recording.notes) or "the sampler did not call the model"
            raise ValueError(f"Nothing could be recorded in this run: {why}.")
        if not found:
            raise ValueError(
                f"No attention was recorded for the {prompt} prompt; recorded: {_listed(self.prompts)}. With cfg 1, or after a "
                "T-GATE gate, the sampler does not compute the negative prompt."
            )
        if not 0 <= cond < len(found):
            raise ValueError(f"The {prompt} prompt has {len(found)} entries; there is no entry {cond}.")
        return found[cond]

    # Views

    def heat(
        self,
        prompt: str = "positive",
        batch: int = 0,
        *,
        cond: int = 0,
        positions: Sequence[int] | None = None,
        layers: Sequence[str] | None = None,
        heads: Sequence[int] | None = None,
        step: int | None = None,
        frame: int | None = None,
        size: Size | None = None,
    ) -> Tensor:
        """Attention to each text token as DAAM aggregates it: (tokens, height, width), float32, not normalised.

        Args:
            batch: which picture of the batch.
            positions: only these tokens, in this order.
            layers: only these layers (default: all recorded ones).
            heads: only these heads of each layer (needs ``per_head``).
            step: the map of one step instead of the sum over steps (needs ``per_step``; over all layers).
            frame: one latent frame of a video (default: the mean over frames).
            size: of the result; default ``grid``.
        """
        maps = self.of(prompt, cond)
        index = _index(batch, self.batch, "picture")
        if step is not None:
            if layers is not None or heads is not None:
                raise ValueError(
                    "The maps of single steps are kept for all captured layers together. To see one layer step by step, name it "
                    "in 'layers' of Capture Attention Maps."
                )
            chosen = _step_map(maps, step)[index].float()
            chosen = chosen if positions is None else chosen[_positions(positions, maps.tokens)]
        else:
            chosen = _aggregate(maps, index, positions, layers, heads)
        chosen = chosen.mean(1) if frame is None else chosen[:, _index(frame, chosen.shape[1], "frame")]
        return _on_canvas(chosen, maps.area, self.grid, size)

    def self_attention(
        self,
        x: float,
        y: float,
        *,
        prompt: str = "positive",
        batch: int = 0,
        cond: int = 0,
        frame: int = 0,
        size: Size | None = None,
    ) -> Tensor:
        """Where the point (x, y), as fractions of width and height, looks in the picture: (height, width).

        For a video: the point lies in latent frame ``frame``, and so does the answer.
        """
        maps = self.of(prompt, cond)
        if not maps.self_attention:
            raise ValueError(
                "Self-attention was not recorded. Switch on 'self_attention' in Capture Attention Maps and sample again."
            )
        index = _index(batch, self.batch, "picture")
        finest = max((entry.grid for entry in maps.self_attention), key=lambda grid: grid[1] * grid[2])
        total = sum(entry.weight for entry in maps.self_attention)
        answer = torch.zeros(1, *finest[1:])
        for entry in maps.self_attention:
            frames, height, width = entry.grid
            at = min(frame, frames - 1)
            top, left, tall, wide = maps.area or (0.0, 0.0, 1.0, 1.0)
            row = _cell((y - top) / tall, height)
            column = _cell((x - left) / wide, width)
            query = (at * height + row) * width + column
            looked = entry.matrix[index, query].float().view(frames, height, width)[at]
            answer += resized(looked[None] * (height * width), finest[1:]) * (entry.weight / total)
        return _on_canvas(answer / (finest[1] * finest[2]), maps.area, self.grid if maps.area else finest[1:], size)[0]

    def convergence(
        self, words: Sequence[Sequence[int]], *, prompt: str = "positive", batch: int = 0, cond: int = 0
    ) -> tuple[list[int], Tensor, Tensor]:
        """How words settle, step by step: steps, change (words, steps), mass (words, steps).

        Each word is a list of token positions. ``change`` is the relative L2 distance of the word's maps to those of the
        recorded step before (NaN in the first one), ``mass`` the share of all attention that the word gets.
        """
        maps = self.of(prompt, cond)
        if maps.figures is None or not maps.steps:
            raise ValueError("Nothing was recorded step by step in this run.")
        index = _index(batch, self.batch, "picture")
        mass, change, norm = (getattr(maps.figures, name)[:, index] for name in ("mass", "change", "norm"))
        rows = [_positions(positions, maps.tokens) for positions in words]
        changes = [(change[:, row].sum(1) / norm[:, row].sum(1).clamp_min(1e-30)).sqrt() for row in rows]
        masses = [mass[:, row].sum(1) for row in rows]
        empty = torch.zeros(0, len(maps.steps))
        return maps.steps, torch.stack(changes) if rows else empty, torch.stack(masses) if rows else empty

    # Saving

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and text metadata of the last run, as a safetensors file takes them."""
        recording = self.require()
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
                    "layers": [[name, layer.heads] for name, layer in maps.layers.items()],
                    "self_attention": [[entry.grid, entry.weight] for entry in maps.self_attention],
                }
            )
        described = {
            "version": _VERSION,
            "sigmas": recording.sigmas,
            "batch": recording.batch,
            "grid": recording.grid,
            "notes": recording.notes,
            "meta": recording.meta,
            "prompts": prompts,
        }
        return {name: tensor.contiguous() for name, tensor in tensors.items()}, {_FORMAT: json.dumps(described)}

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> AttnMaps:
        """The handle that ``state_dict`` described."""
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
            )
            _check_shapes(recording)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(f"This file of attention maps is damaged ({error!r}). Save the maps again.") from error
        return cls(recording)


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
    )


def _check_shapes(recording: Recording) -> None:
    """Raise TypeError where a tensor is not what its description says."""
    batch = recording.batch
    for maps in recording.prompts:
        shapes: list[tuple[Tensor, tuple[int, ...]]] = []
        for layer in maps.layers.values():
            _, heads, _, frames, height, width = layer.maps.shape
            shapes.append((layer.maps, (batch, heads, maps.tokens, frames, height, width)))
        for entry in maps.self_attention:
            shapes.append((entry.matrix, (batch, math.prod(entry.grid), math.prod(entry.grid))))
        if maps.step_maps is not None:
            shapes.append((maps.step_maps, (len(maps.steps), batch, maps.tokens, *maps.grid)))
        if maps.figures is not None:
            shapes += [(figure, (len(maps.steps), batch, maps.tokens)) for figure in vars(maps.figures).values()]
        for tensor, expected in shapes:
            if tuple(tensor.shape) != expected:
                raise TypeError(f"a tensor has the shape {tuple(tensor.shape)} instead of {expected}")


def _grid(values: Sequence[int]) -> Grid:
    frames, height, width = (int(value) for value in values)
    return frames, height, width


# --- aggregation --------------------------------------------------------------------------------------------------------


def resized(maps: Tensor, size: Size) -> Tensor:
    """(..., height, width) -> (..., *size), bicubic; what undershoots zero is cut off, as DAAM does."""
    if maps.shape[-2:] == torch.Size(size):
        return maps
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return interpolate(flat, size=tuple(size), mode="bicubic").clamp_(min=0).view(*maps.shape[:-2], *size)


def _aggregate(
    maps: PromptMaps, batch: int, positions: Sequence[int] | None, layers: Sequence[str] | None, heads: Sequence[int] | None
) -> Tensor:
    """The mean over heads of layers, on the prompt's grid: (tokens, frames, height, width)."""
    if not maps.layers:
        raise ValueError("Attention to words was not recorded in this run; only self-attention views are possible.")
    total, weight = torch.zeros(()), 0
    for name in maps.layers if layers is None else layers:
        if name not in maps.layers:
            raise ValueError(f"Layer '{name}' was not recorded. Recorded: {_listed(list(maps.layers))}.")
        layer = maps.layers[name]
        chosen = layer.maps[batch]
        kept = chosen.shape[0]
        if heads is not None:
            if kept == 1 and layer.heads > 1:
                raise ValueError("Single heads were not kept. Switch on 'per_head' in Capture Attention Maps and sample again.")
            chosen = chosen[[_index(head, kept, "head") for head in heads]]
        if positions is not None:
            chosen = chosen[:, _positions(positions, maps.tokens)]
        heads_here = layer.heads if heads is None else len(heads)
        total = total + resized(chosen.float(), maps.grid[1:]).mean(0) * heads_here
        weight += heads_here
    if not weight:
        raise ValueError("No layer or no head is chosen, so there is nothing to show. Leave 'layers' empty to use all of them.")
    return total / weight


def _step_map(maps: PromptMaps, step: int) -> Tensor:
    if maps.step_maps is None:
        raise ValueError("Single steps were not kept. Switch on 'per_step' in Capture Attention Maps and sample again.")
    if step not in maps.steps:
        raise ValueError(f"Step {step} has no map; steps with one: {_listed([str(known) for known in maps.steps])}.")
    return maps.step_maps[maps.steps.index(step)]


def _on_canvas(maps: Tensor, area: tuple[float, float, float, float] | None, grid: Size, size: Size | None) -> Tensor:
    """(n, height, width) of the conditioning's own area -> the whole picture."""
    if area is None:
        return maps if size is None else resized(maps, size)
    height, width = size or grid
    top, left = round(area[0] * height), round(area[1] * width)
    tall, wide = max(round(area[2] * height), 1), max(round(area[3] * width), 1)
    canvas = maps.new_zeros(maps.shape[0], height, width)
    part = canvas[:, top : top + tall, left : left + wide]
    part.copy_(resized(maps, (tall, wide))[:, : part.shape[1], : part.shape[2]])
    return canvas


def _cell(fraction: float, cells: int) -> int:
    return min(max(int(fraction * cells), 0), cells - 1)


def _index(index: int, length: int, what: str) -> int:
    if not 0 <= index < length:
        raise ValueError(f"There is no {what} {index}: the recorded run has {length} (0 to {length - 1}).")
    return index


def _positions(positions: Sequence[int], tokens: int) -> list[int]:
    return [_index(position, tokens, "token") for position in positions]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"
