"""What the references look like to the model: keys and values of some layers at one sigma, kept across runs.

Every run of one model meets the same sigmas. The noise of a reference depends on nothing but the reference's place and the
sigma, so its keys and values at a sigma are the same in every run, whatever the seed, and need not be computed again.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .. import host
from ..gradient.model_pass import ModelPass
from ..gradient.watch import AttentionCall
from ..networks.layers import AttentionLayer
from .feature_cache import CACHE, FeatureCache, Stored, fingerprint
from .losses import CallKey, Features, call_key


class Purpose(IntEnum):
    """What noise is for: each has its own, as in the published code."""

    FEATURES = 0
    COLOURS = 1
    CONTENT = 2


def fixed_noise(like: Tensor, sigma: float, purpose: Purpose, place: int) -> Tensor:
    """Return normal noise that depends on sigma, purpose and place (of an image among its kind) only, never on global state."""
    digest = hashlib.blake2b(struct.pack("<fii", sigma, purpose, place), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.randn(like.shape, generator=generator).to(like.device)


def noised_alike(
    base_model: Any, latents: Sequence[Tensor], sigma: float, purpose: Purpose, *, one_noise: bool = False
) -> list[Tensor]:
    """Return clean latents (1, channels, ...) at ``sigma``, each with its fixed noise; or all with that of the first place."""
    noises = (fixed_noise(latent, sigma, purpose, 0 if one_noise else place) for place, latent in enumerate(latents))
    return [host.noised(base_model, latent, noise, sigma) for latent, noise in zip(latents, noises, strict=True)]


class References:
    """The references of one run.

    Args:
        latents: (1, channels, ...) each, clean and in the model's units; sizes may differ.
        cond_for: a latent -> the null prompt for its size.
        weights: changes with what the model computes; None: nothing is kept across runs.
        with_noise: whether the model sees them with the noise of their sigma.
        shares: how much each reference counts.
        one_each: whether every image of the batch follows the reference of its own place, as in a run of its own.
    """

    def __init__(
        self,
        passes: ModelPass,
        latents: Sequence[Tensor],
        cond_for: Callable[[Tensor], dict[str, Any]],
        weights: tuple[Any, ...] | None,
        *,
        with_noise: bool,
        shares: Sequence[float],
        one_each: bool = False,
        cache: FeatureCache = CACHE,
    ) -> None:
        self.passes = passes
        self.latents = list(latents)
        self.conds = [cond_for(latent) for latent in latents]
        self.with_noise = with_noise
        self.shares = list(shares)
        self.one_each = one_each
        self.cache = cache
        self.reused = self.computed = 0
        layers = tuple(layer.name for layer in passes.layers)
        contents = [fingerprint([latent, host.cond_values(cond)]) for latent, cond in zip(self.latents, self.conds, strict=True)]
        self.keys = [None if weights is None else (weights, layers, content, with_noise) for content in contents]
        cache.begin_run()

    def at(self, sigma: float, purpose: Purpose) -> list[Tensor]:
        """Return the references as the sampler would have them at ``sigma``; without noise, in the model's own units."""
        base_model = self.passes.base_model
        if self.with_noise:
            return noised_alike(base_model, self.latents, sigma, purpose, one_noise=self.one_each)
        scale = float(host.input_scale(base_model, torch.tensor([sigma])))
        return [latent / scale for latent in self.latents]

    def features(self, sigma: float) -> list[dict[CallKey, Features]]:
        """Return keys and values in every call: of all references side by side, or of each by itself."""
        device = self.latents[0].device
        parts = [self._stored(place, sigma) for place in range(len(self.latents))]
        if self.one_each:
            return [{key: Features(k.to(device), v.to(device)) for key, (k, v) in part.items()} for part in parts]
        joined = {}
        for key in parts[0]:
            k, v = (torch.cat([part[key][which].to(device) for part in parts], dim=2) for which in (0, 1))
            joined[key] = Features(k, v, self._bias([part[key][0].shape[2] for part in parts], device))
        return [joined]

    def _bias(self, tokens: Sequence[int], device: torch.device) -> Tensor | None:
        if len(set(self.shares)) == 1:
            return None
        logs = [torch.full((count,), math.log(share)) for count, share in zip(tokens, self.shares, strict=True)]
        return torch.cat(logs).to(device)

    def _stored(self, place: int, sigma: float) -> Stored:
        base_model, own = self.passes.base_model, self.keys[place]
        noise = 0 if self.one_each else place
        key = None if own is None else (*own, noise, sigma, *host.schedule_key(base_model, sigma), host.compute_dtype(base_model))
        stored = None if key is None else self.cache.get(base_model, key)
        if stored is not None:
            self.reused += 1
            return stored
        self.computed += 1
        x = self.at(sigma, Purpose.FEATURES)[place]
        found = self._observed(place, x, sigma)
        if not found:
            raise RuntimeError(
                "None of the layers to distil was seen: another node replaces this model's attention. Take it out, or choose "
                "other layers."
            )
        stored = dict(value for _, value in found)
        if key is not None:
            self.cache.put(base_model, key, stored)
        return stored

    def _observed(self, place: int, x: Tensor, sigma: float) -> list[tuple[AttentionLayer, Any]]:
        level = x.new_full((len(x),), sigma, dtype=torch.float32)
        try:
            return self.passes.observe(self.conds[place], x, level, _keys_and_values)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):  # a norm over the single pixel that is left of it
                raise
            raise ValueError(
                f"reference {place + 1} is {x.shape[-1]} x {x.shape[-2]} latent pixels, which is too small for this model: "
                "nothing is left of it where the model has halved it. Use a larger image: 256 pixels or more."
            ) from error


def _keys_and_values(layer: AttentionLayer, call: AttentionCall) -> tuple[CallKey, tuple[Tensor, Tensor]]:
    """Return one reference's keys and values, (1, heads, tokens, channels), without those that a mask hides (padding)."""
    k, v = _as_one(call.inputs.k), _as_one(call.v)
    seen = host.visible_keys(call.inputs)
    pair = (k.clone(), v.clone()) if seen is None else (k[:, :, seen], v[:, :, seen])
    return call_key(layer, call), pair


def _as_one(x: Tensor) -> Tensor:
    """Return rows of one image (frames) side by side: (rows, heads, tokens, channels) -> (1, heads, rows * tokens, channels)."""
    return x if len(x) == 1 else rearrange(x, "rows heads tokens channels -> 1 heads (rows tokens) channels")
