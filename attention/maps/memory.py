"""The memory that a capture takes, and what it gives up to stay within it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import host
from .settings import CaptureSettings
from .sums import SELF_TOKENS, Track, pooled, size_of

# Maps are lowered to this side before detail is dropped, and to that one when nothing else is left to drop.
_SMALL_SIDE, _SMALLEST_SIDE = 32, 8


class CaptureMemory:
    """How finely the tracks of a run are kept, so that all of them stay within ``max_memory_mb``.

    Attributes:
        heads_apart: whether heads are kept apart, as DAAM does, which clamps every head for itself.
        longest: side of the maps that came in; side: to which they are lowered, None: not at all.
        keeps_steps: whether each step keeps its maps; self_tokens: on how many tokens self-attention is kept.
    """

    def __init__(self, settings: CaptureSettings, tracks: Mapping[Any, Track], note: Callable[[str], None]) -> None:
        self.settings = settings
        self.limit = settings.max_memory_mb * 2**20
        self.tracks = tracks
        self.note = note
        self.device: torch.device | None = None
        self.heads_apart = True
        self.longest = 0
        self.side: int | None = None
        self.keeps_steps = settings.per_step
        self.self_tokens = SELF_TOKENS

    def keeps_heads(self, size: int) -> bool:
        """Return whether heads are kept apart, before a call's maps of ``size`` bytes are made."""
        if self.heads_apart and not self.settings.per_head and size > self.limit / 4:
            self._average_heads()
        return self.heads_apart

    def reduced(self, maps: Tensor) -> Tensor:
        """Return maps (batch, heads, tokens, frames, height, width) as finely as they are kept."""
        return pooled(maps if self.heads_apart else maps.mean(1, keepdim=True), self.side)

    def choose_device(self, device: torch.device) -> torch.device:
        """Return where sums are kept: on the model's device where it has room, else on the CPU; decided once a run."""
        if self.device is None:
            self.device = device
            if host.spare_memory(device) < 2 * self.limit:
                self.device = torch.device("cpu")
        return self.device

    def bytes(self) -> int:
        return sum(track.bytes for track in self.tracks.values())

    def projected_bytes(self, steps_left: int) -> int:
        """Return the bytes with the step maps that are still to come."""
        coming = sum(size_of(track.step_maps[-1]) * steps_left for track in self.tracks.values() if track.step_maps)
        return self.bytes() + coming

    def fit(self, needed: Callable[[], int]) -> None:
        """Give up detail until ``needed`` is within the limit."""
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
