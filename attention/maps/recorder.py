"""What a capture adds up during one sampling run: which calls count, and to which prompt they belong.

A ``Track`` holds the sums of one entry of a prompt's conditioning, ``CaptureRun`` all of them. ``memory`` decides how finely
they are kept, ``finish`` makes the recording of them.

Tensors: sums are (batch of one prompt, heads, text tokens, frames, height, width), float32.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import torch
from torch import Tensor

from .. import host
from ..host import StepClock, TransformerOptions
from ..networks.grids import Grid
from ..networks.layer_names import list_layers
from ..prompts import METADATA, encoded_fingerprint, known_metadata
from .batches import CallPlan
from .finish import filled_tracks, finished
from .memory import CaptureMemory
from .padding import padding_of
from .recording import Recording
from .settings import CaptureSettings
from .sums import LayerSum, SelfSum, Track, lowered, pooled, pooled_self, size_of


class CaptureRun:
    """The state of one sampling run, of so many ``images``."""

    def __init__(self, settings: CaptureSettings, clock: StepClock, guider: Any, images: int = 1) -> None:
        self.settings = settings
        self.clock = clock
        self.images = images
        self.prompts: dict[str, Sequence[Any]] = guider.conds
        self.lock = threading.Lock()

        self.step = -1
        self.awaits_main_call = False  # the next batch of conds is the sampler's own
        self.names: list[str] | None = None  # while that batch runs: the prompt of each list of conds
        self.conds: list[Any] = []
        self.image: tuple[int, int] = (1, 1)  # the whole latent
        self.evaluated = images  # in that batch
        self.seen_steps: set[int] = set()
        self.seen: set[tuple[str, UUID]] = set()  # prompts that had their model call in this evaluation

        self.tracks: dict[tuple[str, UUID], Track] = {}
        self.models: dict[int, Any] = {}  # what is watched in each model
        self.plans: dict[Hashable, CallPlan] = {}
        self.order: list[str] = []  # of the layers, in the network
        self.meta: dict[str, Any] = {}
        self.notes: dict[str, None] = {}
        self.missed: Counter[str] = Counter()  # layer -> model calls in which its attention was not to be seen

        self.memory = CaptureMemory(settings, self.tracks, self.note)

    # Which calls count

    def begin_evaluation(self, images: int, sigma: float, done: int | None = None) -> None:
        """Take note of an evaluation of ``images`` at ``sigma``, after ``done`` steps of the sampler where that is known."""
        self.step = self.clock.step_at(sigma, done)
        self.awaits_main_call = self.step not in self.seen_steps
        if images < self.images:
            self.awaits_main_call = False
            why = "the sampler evaluates the images of a batch one by one"
            self.note(f"{why}: sample one image at a time, or choose another sampler")

    @contextmanager
    def main_call(self, conds: list[Any], latent: Tensor) -> Iterator[None]:
        """Record while the sampler's own evaluation of its prompts runs."""
        self.awaits_main_call = False
        self.seen_steps.add(self.step)
        self.seen.clear()
        self.conds = conds
        self.image = (latent.shape[-2], latent.shape[-1])
        self.evaluated = len(latent)
        self.names = [self._prompt_of(index, entries) for index, entries in enumerate(conds)]
        try:
            yield
            with torch.inference_mode():
                for track in self.tracks.values():
                    track.finish_step(self.step, self.memory.keeps_steps)
            steps_left = self.clock.steps - len(self.seen_steps)
            self.memory.fit(lambda: self.memory.projected_bytes(steps_left))
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

    def tracks_for(self, options: TransformerOptions, batch: int) -> list[Track] | None:
        """Return one track for each chunk of a model call's batch; None where this call is not to be recorded."""
        assert self.names is not None
        entries = [cond["uuid"] for conds in self.conds for cond in conds or ()]
        prompts = host.prompts_of_call(options, batch, self.evaluated, entries)
        if prompts is None:
            self.note("another node changes the batch of a model call, so its attention is not recorded")
            return None
        keys = []
        for index, uuid in prompts:
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
        mask = host.cond_mask(cond)
        if mask is not None and not bool(mask.all()):
            self.note(
                f"the {prompt} prompt acts inside its mask only; attention to it outside, which maps show too, had no effect"
            )
        rows = 0 if text is None else text.shape[1]
        fingerprint = "" if text is None else encoded_fingerprint(text)
        return Track(prompt, rows, placed, known, padding_of(known, text), fingerprint)

    def note(self, text: str) -> None:
        """Keep something that the user should know, for the run's log line and the maps."""
        self.notes[text] = None

    def plan_of(self, form: Hashable) -> CallPlan:
        """Return what is known of model calls of one form."""
        plan = self.plans.get(form)
        if plan is None:
            plan = self.plans[form] = CallPlan()
        return plan

    # Adding up

    def add_text(self, track: Track, layer: str, heads: int, maps: Tensor) -> None:
        """Add one call's attention: (batch, heads or 1, tokens, frames, height, width)."""
        with self.lock:
            first = next(iter(track.layers.values()), None)  # the others have its tokens and frames, or were left out
            if first is not None and first.total.shape[2:4] != maps.shape[2:4]:
                self.note("another node gives some layers other text tokens, and those are left out")
                return
            memory = self.memory
            memory.longest = max(memory.longest, *maps.shape[-2:])
            step_maps = maps.sum(1) if maps.shape[1] == heads else maps.mean(1) * heads
            known = track.layers.get(layer)
            if known is None:
                memory.fit(lambda: memory.bytes() + size_of(memory.reduced(maps)) + size_of(pooled(step_maps, memory.side)))
                device = memory.choose_device(maps.device)
                track.layers[layer] = known = LayerSum(heads, torch.zeros_like(memory.reduced(maps), device=device))
            known.add(memory.reduced(maps).to(known.total.device))
            track.add_step(pooled(step_maps, memory.side).to(known.total.device), heads)

    def add_texts(
        self, tracks: Sequence[Track], layers: Sequence[str], heads: int, maps: Sequence[Tensor], sums: Sequence[Tensor]
    ) -> None:
        """Add one call's attention of several layers on one grid to each prompt's sums.

        Args:
            maps: for each track (layers, batch, heads or 1, tokens, frames, height, width).
            sums: the same, summed over layers and heads.
        """
        with self.lock:
            is_known = self._adds_in_place(tracks, layers, heads, maps, sums)
        if not is_known:
            for track, together in zip(tracks, maps, strict=True):
                for layer, each in zip(layers, together.unbind(0), strict=True):
                    self.add_text(track, layer, heads, each)

    def _adds_in_place(
        self, tracks: Sequence[Track], layers: Sequence[str], heads: int, maps: Sequence[Tensor], sums: Sequence[Tensor]
    ) -> bool:
        """Return whether sums of this size were there, so that all could be added at once."""
        memory, side = self.memory, self.memory.side
        totals: list[Tensor] = []
        added: list[Tensor] = []
        for track, together in zip(tracks, maps, strict=True):
            reduced = pooled(together if memory.heads_apart else together.mean(2, keepdim=True), side)
            shape, device = reduced.shape[1:], reduced.device
            for layer in layers:
                known = track.layers.get(layer)
                if known is None or known.total.shape != shape or known.total.device != device:
                    return False
                totals.append(known.total)
            added += reduced.unbind(0)
        torch._foreach_add_(totals, added)
        for track, each in zip(tracks, sums, strict=True):
            track.add_step(pooled(each, side), len(layers) * heads)
        return True

    def sort_steps(self, tracks: Sequence[Track], grids: Sequence[Grid]) -> None:
        """Bring what this step has added into the order of the layers' calls, in which it is added up at its end."""
        with self.lock:
            for track in tracks:
                track.sort_step([lowered(grid, self.memory.side) for grid in grids])

    def add_self(self, track: Track, grid: Grid, heads: int, matrix: Tensor) -> None:
        """Add one call's self-attention, summed over heads: (batch, queries, keys) on ``grid``."""
        with self.lock:
            memory = self.memory
            memory.longest = max(memory.longest, *grid[1:])
            if grid not in track.self_sums:
                memory.fit(lambda: memory.bytes() + size_of(pooled_self(matrix, grid, memory.self_tokens)[0]))
            matrix, grid = pooled_self(matrix, grid, memory.self_tokens)
            track.add_self(matrix.to(memory.choose_device(matrix.device)), grid, heads)

    def keeps_heads(self, size: int) -> bool:
        """Return whether heads are kept apart, before a call's maps of ``size`` bytes are made."""
        with self.lock:
            return self.memory.keeps_heads(size)

    # The end

    def recording(self) -> Recording:
        """Return what the run leaves, on the CPU, in ordinary tensors."""
        tracks = filled_tracks(self.tracks.values())
        side, limit = self.memory.side, self.memory.limit
        if side is not None:
            self.note(f"maps were lowered to at most {side} x {side} to stay within {self.settings.max_memory_mb} MB")
        self._note_missed()
        prompts = finished(tracks, self.order, limit, per_head=self.settings.per_head)
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

    def _note_missed(self) -> None:
        unseen = [name for name in self.order if name in self.missed and not any(name in t.layers for t in self.tracks.values())]
        if unseen and len(unseen) == len(self.order):
            self.note("no layer's attention to the text could be seen")
        elif unseen:
            self.note(f"these layers could not be read: {list_layers(unseen)}")
        recorded = {step for track in self.tracks.values() for step in track.steps}
        without = len(self.seen_steps - recorded)
        if recorded and without:
            self.note(f"{without} of {self.clock.steps} steps have no maps: their attention was not computed anew")

    def summary(self) -> str:
        tracks = filled_tracks(self.tracks.values())
        layers = {name for track in tracks for name in track.layers}
        steps = max((len(track.steps) for track in tracks), default=0) if layers else len(self.seen_steps)
        what = f"{len(layers)} layers" if layers else "self-attention" if tracks else "nothing"
        text = f"Attention maps: {what} in {steps} of {self.clock.steps} steps"
        text += ", " + " and ".join(dict.fromkeys(track.prompt for track in tracks)) + " prompt" if tracks else ""
        return "; ".join([text, *self.notes])
