"""What a capture adds up during one sampling run, and how it keeps within its memory.

A ``Track`` holds the sums of one entry of a prompt's conditioning, ``CaptureRun`` all of them together with the decisions
of the run: which calls count, what is given up when memory gets short, and what is left at the end.

Tensors: sums are (batch of one prompt, heads, text tokens, frames, height, width), float32.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import torch
from torch import Tensor

from .. import host
from ..host import StepClock, TransformerOptions
from ..networks.grids import Grid, resize_maps
from ..networks.layer_names import list_layers
from ..prompts import METADATA, encoded_fingerprint, known_metadata
from .padding import padding_of
from .recording import LayerMaps, PromptMaps, Recording, SelfAttention, StepFigures
from .settings import CaptureSettings
from .sums import SELF_TOKENS, LayerSum, SelfSum, Track, grid_of, pooled, pooled_self, size_of

# Maps are lowered to this side before detail is dropped, and to that one when nothing else is left to drop.
_SMALL_SIDE, _SMALLEST_SIDE = 32, 8


class CaptureRun:
    """The state of one sampling run."""

    def __init__(self, settings: CaptureSettings, clock: StepClock, guider: Any) -> None:
        self.settings = settings
        self.limit = settings.max_memory_mb * 2**20
        self.clock = clock
        self.prompts: dict[str, Sequence[Any]] = guider.conds
        self.lock = threading.Lock()

        self.step = -1
        self.awaits_main_call = False  # the next batch of conds is the sampler's own
        self.names: list[str] | None = None  # while that batch runs: the prompt of each list of conds
        self.conds: list[Any] = []
        self.image: tuple[int, int] = (1, 1)  # the whole latent
        self.seen_steps: set[int] = set()
        self.seen: set[tuple[str, UUID]] = set()  # prompts that had their model call in this evaluation

        self.tracks: dict[tuple[str, UUID], Track] = {}
        self.layers: dict[int, Any] = {}  # what is watched in each model
        self.order: list[str] = []  # of the layers, in the network
        self.meta: dict[str, Any] = {}
        self.notes: dict[str, None] = {}
        self.missed: Counter[str] = Counter()  # layer -> model calls in which its attention was not to be seen

        self.device: torch.device | None = None
        self.heads_apart = True  # until memory says otherwise; DAAM clamps every head for itself
        self.longest = 0  # side of the maps that came in
        self.side: int | None = None  # to which they are lowered
        self.keeps_steps = settings.per_step
        self.self_tokens = SELF_TOKENS

    # Which calls count

    def begin_evaluation(self, sigma: float, done: int | None = None) -> None:
        """Take note of an evaluation at ``sigma``, after ``done`` steps of the sampler where that is known."""
        self.step = self.clock.step_at(sigma, done)
        self.awaits_main_call = self.step not in self.seen_steps

    @contextmanager
    def main_call(self, conds: list[Any], latent: Tensor) -> Iterator[None]:
        """Record while the sampler's own evaluation of its prompts runs."""
        self.awaits_main_call = False
        self.seen_steps.add(self.step)
        self.seen.clear()
        self.conds = conds
        self.image = (latent.shape[-2], latent.shape[-1])
        self.names = [self._prompt_of(index, entries) for index, entries in enumerate(conds)]
        try:
            yield
            for track in self.tracks.values():
                track.finish_step(self.step, self.keeps_steps)
            self._fit(self._projected_bytes)
        finally:
            self.names = None
            self.conds = []

    def _prompt_of(self, index: int, entries: Any) -> str:
        """Return the guider's name for a list of conds; other nodes may have copied the list."""
        for name, known in self.prompts.items():
            if entries is known:
                return name
        uuids = {entry["uuid"] for entry in entries or []}
        for name, known in self.prompts.items():
            if uuids and uuids <= {entry["uuid"] for entry in known}:
                return name
        return ("positive", "negative")[index] if index < 2 else f"prompt {index}"

    def tracks_for(self, options: TransformerOptions) -> list[Track] | None:
        """Return one track for each chunk of a model call's batch; None where this call is not to be recorded."""
        assert self.names is not None
        keys = []
        for index, uuid in zip(host.cond_or_uncond(options), host.cond_uuids(options), strict=True):
            keys.append((self.names[index], uuid))
            if keys[-1] not in self.tracks:
                entry: Mapping[str, Any] = next((cond for cond in self.conds[index] or [] if cond["uuid"] == uuid), {})
                self.tracks[keys[-1]] = self._track(self.names[index], entry)
        if self.seen.intersection(keys):
            self.note("each step calls the model several times for one prompt (tiles or windows), and only the first is shown")
            return None
        self.seen.update(keys)
        return [self.tracks[key] for key in keys]

    def _track(self, prompt: str, cond: Mapping[str, Any]) -> Track:
        text = cond.get("cross_attn")
        area = cond.get("area")
        placed = None
        if area is not None:
            dims = len(area) // 2
            tall, wide = area[dims - 2 : dims]
            top, left = area[2 * dims - 2 :]
            height, width = self.image
            placed = (top / height, left / width, tall / height, wide / width)
        known = cond.get(METADATA)
        if known is None or "conditioning_length" in known:
            known = known_metadata(cond)
        rows = 0 if text is None else text.shape[1]
        fingerprint = "" if text is None else encoded_fingerprint(text)
        return Track(prompt, rows, placed, known, padding_of(known, text), fingerprint)

    def note(self, text: str) -> None:
        """Keep something that the user should know, for the run's log line and the maps."""
        self.notes[text] = None

    # Adding up

    def add_text(self, track: Track, layer: str, heads: int, maps: Tensor) -> None:
        """Add one call's attention: (batch, heads or 1, tokens, frames, height, width)."""
        with self.lock:
            first = next(iter(track.layers.values()), None)  # the others have its tokens and frames, or were left out
            if first is not None and first.total.shape[2:4] != maps.shape[2:4]:
                self.note("another node gives some layers other text tokens, and those are left out")
                return
            self.longest = max(self.longest, *maps.shape[-2:])
            step_maps = maps.mean(1) * heads
            known = track.layers.get(layer)
            if known is None:
                self._fit(lambda: self._bytes() + size_of(self._reduced(maps)) + size_of(pooled(step_maps, self.side)))
                device = self._choose_device(maps.device)
                track.layers[layer] = known = LayerSum(heads, torch.zeros_like(self._reduced(maps), device=device))
            known.add(self._reduced(maps).to(known.total.device))
            track.add_step(pooled(step_maps, self.side).to(known.total.device), heads)

    def add_self(self, track: Track, grid: Grid, heads: int, matrix: Tensor) -> None:
        """Add one call's self-attention, summed over heads: (batch, queries, keys) on ``grid``."""
        with self.lock:
            self.longest = max(self.longest, *grid[1:])
            if grid not in track.self_sums:
                self._fit(lambda: self._bytes() + size_of(pooled_self(matrix, grid, self.self_tokens)[0]))
            matrix, grid = pooled_self(matrix, grid, self.self_tokens)
            track.add_self(matrix.to(self._choose_device(matrix.device)), grid, heads)

    def keeps_heads(self, size: int) -> bool:
        """Return whether heads are kept apart, before a call's maps of ``size`` bytes are made."""
        with self.lock:
            if self.heads_apart and not self.settings.per_head and size > self.limit / 4:
                self._average_heads()
            return self.heads_apart

    def _reduced(self, maps: Tensor) -> Tensor:
        return pooled(maps if self.heads_apart else maps.mean(1, keepdim=True), self.side)

    def _choose_device(self, device: torch.device) -> torch.device:
        if self.device is None:
            self.device = device
            if host.spare_memory(device) < 2 * self.limit:
                self.device = torch.device("cpu")
        return self.device

    # Memory

    def _bytes(self) -> int:
        return sum(track.bytes for track in self.tracks.values())

    def _projected_bytes(self) -> int:
        """Return the bytes with the step maps that are still to come."""
        left = self.clock.steps - len(self.seen_steps)
        coming = sum(size_of(track.step_maps[-1]) * left for track in self.tracks.values() if track.step_maps)
        return self._bytes() + coming

    def _fit(self, needed: Callable[[], int]) -> None:
        while needed() > self.limit and self._give_up_detail():
            pass
        if needed() > self.limit:
            self.note(f"even the smallest maps need more than max_memory_mb ({self.settings.max_memory_mb})")

    def _give_up_detail(self) -> bool:
        """Return the next loss in the order of harm: a head's own clamp, resolution, heads, single steps, resolution again."""
        limit = f"to stay within {self.settings.max_memory_mb} MB"
        lower = (min(self.longest, self.side or self.longest) + 1) // 2
        if not self.settings.per_head and self.heads_apart:
            self._average_heads()
        elif lower >= self._small_side():
            self._lower(lower)
        elif self.heads_apart:
            self._average_heads()
            self.note(f"heads were averaged {limit}")
        elif self.keeps_steps:
            self.keeps_steps = False
            for track in self.tracks.values():
                track.step_maps.clear()
            self.note(f"the maps of single steps were dropped {limit}")
        elif lower >= _SMALLEST_SIDE:
            self._lower(lower)
        else:
            return False
        return True

    def _small_side(self) -> int:
        """Return the side below which other detail goes first; of a video, whose grids are coarse, half of the network's own."""
        video = any(track.layers and track.finest[0] > 1 for track in self.tracks.values())
        return min(_SMALL_SIDE, max((self.longest + 1) // 2, _SMALLEST_SIDE)) if video else _SMALL_SIDE

    def _average_heads(self) -> None:
        self.heads_apart = False
        for track in self.tracks.values():
            track.average_heads()

    def _lower(self, side: int) -> None:
        self.side = side
        self.self_tokens = min(self.self_tokens, side * side)
        for track in self.tracks.values():
            track.lower(side, self.self_tokens)

    # The end

    def recording(self) -> Recording:
        """Return what the run leaves, on the CPU, in ordinary tensors."""
        tracks = self._filled()
        if self.side is not None:
            self.note(f"maps were lowered to at most {self.side} x {self.side} to stay within {self.settings.max_memory_mb} MB")
        self._note_missed()
        with torch.inference_mode(False), torch.no_grad():
            fit = self._resized_bytes() <= self.limit
            prompts = [self._prompt_maps(track, fit) for track in tracks]
        whole = [maps.grid for maps in prompts if maps.area is None] or [maps.grid for maps in prompts] or [(1, 1, 1)]
        sums: list[LayerSum | SelfSum] = []
        for track in tracks:
            sums += [*track.layers.values(), *track.self_sums.values()]
        return Recording(
            sigmas=list(self.clock.sigmas),
            batch=max((entry.total.shape[0] for entry in sums), default=0),
            grid=max(whole, key=lambda grid: grid[1] * grid[2]),
            prompts=prompts,
            notes=list(self.notes),
            meta=self.meta,
        )

    def _filled(self) -> list[Track]:
        """Return the tracks that something was added to, the positive prompt's first."""
        order = {"positive": 0, "negative": 1}
        filled = (track for track in self.tracks.values() if track.layers or track.self_sums)
        return sorted(filled, key=lambda track: order.get(track.prompt, 2))

    def _prompt_maps(self, track: Track, resized_fit: bool) -> PromptMaps:
        grid = track.finest if track.layers else max(track.self_sums, key=lambda grid: grid[1] * grid[2])
        names = sorted(track.layers, key=self.order.index)
        layers = {
            name: LayerMaps(layer.heads, self._final(layer, grid, resized_fit)) for name in names if (layer := track.layers[name])
        }
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
                SelfAttention(own, entry.weight, (entry.total / entry.weight).cpu().clone())
                for own, entry in track.self_sums.items()
            ],
            area=track.area,
            metadata=track.metadata,
            rows=track.rows,
            kept=track.kept if layers else None,
            fingerprint=track.fingerprint,
        )

    def _final(self, layer: LayerSum, grid: Grid, resized_fit: bool) -> Tensor:
        """DAAM's order where heads are not asked for: each head to the finest grid, clamped, then the mean over heads."""
        total = layer.total
        if not self.settings.per_head and total.shape[1] > 1:
            if not resized_fit:
                total = total.mean(1, keepdim=True)
            else:
                total = torch.stack([resize_maps(maps, grid[1:]).mean(0, keepdim=True) for maps in total])
        return total.cpu().clone()

    def _resized_bytes(self) -> int:
        """Return size of all layers on their prompt's finest grid."""
        size = 0
        for track in self.tracks.values():
            totals = [layer.total for layer in track.layers.values()]
            cells = math.prod(track.finest) if totals else 0
            size += sum(size_of(total) // total.shape[1] // math.prod(grid_of(total)) * cells for total in totals)
        return size

    def _note_missed(self) -> None:
        unseen = [name for name in self.order if name in self.missed and not any(name in t.layers for t in self.tracks.values())]
        if unseen and len(unseen) == len(self.order):
            self.note("no layer's attention to the text could be seen")
        elif unseen:
            self.note(f"not to be seen: {list_layers(unseen)}")
        recorded = {step for track in self.tracks.values() for step in track.steps}
        without = len(self.seen_steps - recorded)
        if recorded and without:
            self.note(f"{without} of {self.clock.steps} steps have no maps: their attention was not computed anew")

    def summary(self) -> str:
        tracks = self._filled()
        layers = {name for track in tracks for name in track.layers}
        steps = max((len(track.steps) for track in tracks), default=0) if layers else len(self.seen_steps)
        what = f"{len(layers)} layers" if layers else "self-attention" if tracks else "nothing"
        text = f"Attention maps: {what} in {steps} of {self.clock.steps} steps"
        text += ", " + " and ".join(dict.fromkeys(track.prompt for track in tracks)) + " prompt" if tracks else ""
        return "; ".join([text, *self.notes])
