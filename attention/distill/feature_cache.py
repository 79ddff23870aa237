"""Keys and values of references, kept across runs in system memory."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import host
from .losses import CallKey

# Kept for all models together, in system memory: 50 steps of one reference are 1.1 GB (SD1.5, 512 px) or 3 GB (SDXL, 1024 px).
MAX_CACHE_BYTES = 4 * 1024**3
MAX_IDLE_RUNS = 8
Stored = dict[CallKey, tuple[Tensor, Tensor]]


@dataclass
class _Entry:
    stored: Stored
    bytes: int
    used: int


class FeatureCache:
    """Keys and values by model; they go with the model, where memory gets short, or when some runs did without them."""

    def __init__(self, limit: float = MAX_CACHE_BYTES) -> None:
        self.limit = limit
        self.run = 0
        self._models: WeakKeyDictionary[Any, OrderedDict[Any, _Entry]] = WeakKeyDictionary()

    def begin_run(self) -> None:
        """Begin a run: drop what the last runs have not used, and keep what this one stores or uses longer than the rest."""
        self.run += 1
        for model, key, entry in self._entries():
            if entry.used < self.run - MAX_IDLE_RUNS:
                del self._models[model][key]
        self._make_room(0)

    def get(self, model: Any, key: Any) -> Stored | None:
        entry = self._models.get(model, {}).get(key)
        if entry is None:
            return None
        entry.used = self.run
        return entry.stored

    def put(self, model: Any, key: Any, stored: Stored) -> None:
        """Keep a copy in system memory, where there is room beside what this run has used."""
        size = sum(tensor.numel() * tensor.element_size() for pair in stored.values() for tensor in pair)
        if self._make_room(size):
            kept = {name: (k.to("cpu", copy=True), v.to("cpu", copy=True)) for name, (k, v) in stored.items()}
            self._models.setdefault(model, OrderedDict())[key] = _Entry(kept, size, self.run)

    def clear(self) -> None:
        self._models.clear()

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for _, _, entry in self._entries())

    def _entries(self) -> Iterator[tuple[Any, Any, _Entry]]:
        for model, entries in list(self._models.items()):
            for key, entry in list(entries.items()):
                yield model, key, entry

    def _make_room(self, size: int) -> bool:
        held = self.bytes
        room = min(self.limit, (held + host.free_system_memory()) / 2)
        older = sorted((e for e in self._entries() if e[2].used < self.run), key=lambda e: e[2].used)
        for model, key, entry in older:
            if held + size <= room:
                break
            del self._models[model][key]
            held -= entry.bytes
        return held + size <= room


CACHE = FeatureCache()


def fingerprint(value: Any) -> str:
    """Return a name for the contents of tensors, in lists and dictionaries with plain values."""
    digest = hashlib.blake2b(digest_size=16)

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            digest.update(f"{tuple(part.shape)}{part.dtype}".encode())
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, Mapping):
            for name in sorted(part):
                digest.update(str(name).encode())
                add(part[name])
        elif isinstance(part, (list, tuple)):
            digest.update(f"[{len(part)}".encode())
            for item in part:
                add(item)
        else:
            digest.update(repr(part).encode())

    add(value)
    return digest.hexdigest()
