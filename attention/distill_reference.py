"""What the references look like to the model: keys and values of some layers at one sigma, kept across runs.

Every run of one model meets the same sigmas. The noise of a reference depends on nothing but the reference's place and the
sigma, so its keys and values at a sigma are the same in every run, whatever the seed, and need not be computed again.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import host
from .distill_losses import CallKey, Features, call_key
from .gradient import AttentionCall, ModelPass
from .probabilities import AttentionInputs
from .sites import CaptureLayer

# Kept for all models together, in system memory: 50 steps of one reference are 1.1 GB (SD1.5, 512 px) or 3 GB (SDXL, 1024 px).
MAX_CACHE_BYTES = 4 * 1024**3
MAX_IDLE_RUNS = 8


class Purpose(IntEnum):
    """What noise is for: each has its own, as in the published code."""

    FEATURES = 0
    COLOURS = 1
    CONTENT = 2


def fixed_noise(like: Tensor, sigma: float, purpose: Purpose, place: int) -> Tensor:
    """Normal noise that depends on sigma, purpose and place (of a picture among its kind) only, never on global state."""
    digest = hashlib.blake2b(struct.pack("<fii", sigma, purpose, place), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.randn(like.shape, generator=generator).to(like.device)


def noised_alike(base_model: Any, latents: Sequence[Tensor], sigma: float, purpose: Purpose) -> list[Tensor]:
    """Clean latents (1, channels, ...) at ``sigma``, each with its fixed noise."""
    noises = (fixed_noise(latent, sigma, purpose, place) for place, latent in enumerate(latents))
    return [host.noised(base_model, latent, noise, sigma) for latent, noise in zip(latents, noises, strict=True)]


# --- cache ---------------------------------------------------------------------------------------------------------------

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
        """What is stored or used from now on is not given up before what no run since has used."""
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
    """A name for the contents of tensors, in lists and dictionaries with plain values."""
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


# --- references ----------------------------------------------------------------------------------------------------------


class References:
    """The references of one run.

    Args:
        latents: (1, channels, ...) each, clean and in the model's units; sizes may differ.
        cond_for: a latent -> the null prompt for its size.
        weights: changes with what the model computes; None: nothing is kept across runs.
        with_noise: whether the model sees them with the noise of their sigma.
    """

    def __init__(
        self,
        passes: ModelPass,
        latents: Sequence[Tensor],
        cond_for: Callable[[Tensor], dict[str, Any]],
        weights: tuple[Any, ...] | None,
        *,
        with_noise: bool,
        cache: FeatureCache = CACHE,
    ) -> None:
        self.passes = passes
        self.latents = list(latents)
        self.conds = [cond_for(latent) for latent in latents]
        self.with_noise = with_noise
        self.cache = cache
        self.reused = self.computed = 0
        layers = tuple(layer.name for layer in passes.layers)
        contents = [fingerprint([latent, host.cond_values(cond)]) for latent, cond in zip(self.latents, self.conds, strict=True)]
        self.keys = [None if weights is None else (weights, layers, content, with_noise) for content in contents]
        cache.begin_run()

    def at(self, sigma: float, purpose: Purpose) -> list[Tensor]:
        """The references as the sampler would have them at ``sigma``; without noise: as they look in the model's own units."""
        base_model = self.passes.base_model
        if self.with_noise:
            return noised_alike(base_model, self.latents, sigma, purpose)
        scale = float(host.input_scale(base_model, torch.tensor([sigma])))
        return [latent / scale for latent in self.latents]

    def features(self, sigma: float) -> dict[CallKey, Features]:
        """Keys and values of all references in every call, side by side."""
        parts = [self._stored(place, sigma) for place in range(len(self.latents))]
        device = self.latents[0].device
        joined = {}
        for key in parts[0]:
            k, v = (torch.cat([part[key][which].to(device) for part in parts], dim=2) for which in (0, 1))
            joined[key] = Features(k, v)
        return joined

    def _stored(self, place: int, sigma: float) -> Stored:
        base_model, own = self.passes.base_model, self.keys[place]
        key = None if own is None else (*own, place, sigma, *host.schedule_key(base_model, sigma), host.compute_dtype(base_model))
        stored = None if key is None else self.cache.get(base_model, key)
        if stored is not None:
            self.reused += 1
            return stored
        self.computed += 1
        x = self.at(sigma, Purpose.FEATURES)[place]
        found = self.passes.look(self.conds[place], x, x.new_full((len(x),), sigma, dtype=torch.float32), _keys_and_values)
        if not found:
            raise RuntimeError(
                "None of the layers to distil was seen: another node replaces this model's attention. Take it out, or choose "
                "other layers."
            )
        stored = dict(value for _, value in found)
        if key is not None:
            self.cache.put(base_model, key, stored)
        return stored


def _keys_and_values(layer: CaptureLayer, call: AttentionCall) -> tuple[CallKey, tuple[Tensor, Tensor]]:
    """One reference's keys and values, (1, heads, tokens, channels), without those that a mask hides (padding of the text)."""
    k, v = _as_one(call.inputs.k), _as_one(call.v)
    seen = _visible_keys(call.inputs)
    pair = (k.clone(), v.clone()) if seen is None else (k[:, :, seen], v[:, :, seen])
    return call_key(layer, call), pair


def _as_one(x: Tensor) -> Tensor:
    """Rows of one picture (frames) side by side: (rows, heads, tokens, channels) -> (1, heads, rows * tokens, channels)."""
    return x if len(x) == 1 else x.transpose(0, 1).flatten(1, 2)[None]


def _visible_keys(inputs: AttentionInputs) -> Tensor | None:
    """(keys,): whether any query may look there."""
    if inputs.mask is None or inputs.batch > 1:
        return None
    mask = inputs.mask if inputs.mask.dtype == torch.bool else inputs.mask > -1e4
    return mask.expand(1, -1, -1, inputs.keys).flatten(0, 2).any(0)
