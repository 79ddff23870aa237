"""Observing and replacing attention calls, and their arguments in one form.

The arguments are those of ComfyUI's attention functions, in every form they take: (batch, tokens, heads * channels) or
(batch, heads, tokens, channels), fewer key than query heads, boolean and additive masks of two to four dimensions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .patching import ModelOptions, TransformerOptions

# transformer_options: a function that takes the place of every attention call that passes its transformer_options on.
_ATTENTION_OVERRIDE = "optimized_attention_override"

# An additive mask at or below this hides a key.
_HIDDEN = -1e4


def activations_size(options: TransformerOptions) -> tuple[int, int] | None:
    """Return the height and width of the feature map that a U-Net's attention call belongs to."""
    shape = options.get("activations_shape")
    return None if shape is None else (shape[-2], shape[-1])


def has_patches(options: TransformerOptions, name: str) -> bool:
    """Return whether a patch or a replacement under ``name`` ("attn1", "attn2") changes what its module receives."""
    return bool(options.get("patches", {}).get(f"{name}_patch")) or bool(options.get("patches_replace", {}).get(name))


def has_input_patches(options: TransformerOptions, name: str) -> bool:
    """Return whether a patch changes the tokens or the context before module ``name`` sees them."""
    return bool(options.get("patches", {}).get(f"{name}_patch"))


def has_output_patches(options: TransformerOptions) -> bool:
    """Return whether a patch receives attention outputs and might write to them."""
    patches = options.get("patches", {})
    return bool(patches.get("attn1_output_patch") or patches.get("attn2_output_patch"))


def has_replacements(options: TransformerOptions, name: str) -> bool:
    """Return whether another node computes the attention of module ``name`` itself, so that no attention call is to be seen."""
    return bool(options.get("patches_replace", {}).get(name))


def acting_replacements(options: ModelOptions | TransformerOptions, name: str, sigma: float) -> tuple[bool, ...]:
    """Return which parts of the replacements of ``name`` act at ``sigma``, where they tell between which sigmas they do.

    IPAdapter's do: a callable with ``kwargs``, a list of settings with ``sigma_start`` and ``sigma_end``.
    """
    options = options.get("transformer_options", options)
    replacements = options.get("patches_replace", {}).get(name, {}).values()
    return tuple(start >= sigma >= end for replacement in replacements for start, end in _sigma_ranges(replacement))


def changes_unseen(options: TransformerOptions, name: str) -> bool:
    """Return whether something changes module ``name`` without telling between which sigmas it acts."""
    replacements = options.get("patches_replace", {}).get(name, {}).values()
    return has_input_patches(options, name) or not all(_sigma_ranges(replacement) for replacement in replacements)


def _sigma_ranges(replacement: Any) -> list[tuple[float, float]]:
    settings = getattr(replacement, "kwargs", None)
    settings = settings if isinstance(settings, list) else []
    return [(one["sigma_start"], one["sigma_end"]) for one in settings if {"sigma_start", "sigma_end"} <= set(one)]


def without_replacements(options: TransformerOptions, name: str) -> TransformerOptions:
    """Return the options without the replacements of ``name``: the block then calls its own attention module."""
    replacements = {k: v for k, v in options.get("patches_replace", {}).items() if k != name}
    return {**options, "patches_replace": replacements}


def with_attention_observer(options: TransformerOptions, observe: Callable[..., None]) -> TransformerOptions:
    """Return options whose attention calls first show their arguments to ``observe`` and then go the way they would have gone.

    What was installed before is called as before; the result is passed on untouched. ``observe`` runs in inference mode, also
    where another node has left it for a call. (A plain closure: 0.3.75 copies objects that it finds in the options.)
    """
    previous = options.get(_ATTENTION_OVERRIDE)

    def override(attention: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.is_inference_mode_enabled():
            observe(*args, **kwargs)
        else:
            with torch.inference_mode():
                observe(*args, **kwargs)
        return attention(*args, **kwargs) if previous is None else previous(attention, *args, **kwargs)

    return {**options, _ATTENTION_OVERRIDE: override}


def with_attention(options: TransformerOptions, attention: Callable[..., torch.Tensor]) -> TransformerOptions:
    """Return options whose attention calls are made by ``attention(comfy_function, *args, **kwargs)`` alone."""

    def override(comfy_function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        return attention(comfy_function, *args, **kwargs)

    return {**options, _ATTENTION_OVERRIDE: override}


@contextmanager
def options_for_attention(modules: tuple[str, ...], options: TransformerOptions) -> Iterator[None]:
    """Let the attention calls of ``modules``, which drop transformer_options, carry ``options`` while the block lasts."""
    loaded = [sys.modules[name] for name in modules if name in sys.modules]
    before = [(module, module.optimized_attention) for module in loaded]

    def carrying(attention: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: attention(*args, **{"transformer_options": options, **kwargs})

    try:
        for module, attention in before:
            module.optimized_attention = carrying(attention)  # type: ignore[attr-defined]
        yield
    finally:
        for module, attention in before:
            module.optimized_attention = attention  # type: ignore[attr-defined]


@dataclass(frozen=True)
class AttentionInputs:
    """One attention call.

    Attributes:
        q: (batch, heads, queries, channels).
        k: (batch, heads, keys, channels).
        mask: broadcastable to (batch, heads, queries, keys), boolean (True: may look) or additive; or None.
    """

    q: Tensor
    k: Tensor
    mask: Tensor | None
    scale: float

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def queries(self) -> int:
        return self.q.shape[2]

    @property
    def keys(self) -> int:
        return self.k.shape[2]


def attention_inputs(
    q: Tensor, k: Tensor, heads: int, *, mask: Tensor | None = None, skip_reshape: bool = False, scale: float | None = None
) -> AttentionInputs:
    """Return the arguments of one of ComfyUI's attention functions, in one form."""
    if not skip_reshape:
        q, k = q.flatten(2), k.flatten(2)
        channels = q.shape[-1] // heads
        q, k = (x.unflatten(-1, (-1, channels)).transpose(1, 2) for x in (q, k))
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return AttentionInputs(q, k, None if mask is None else _broadcastable(mask, shape), scale or q.shape[-1] ** -0.5)


def _broadcastable(mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Return a mask with four dimensions: (queries, keys), (batch, keys), (batch, queries, keys) or all four come in."""
    batch, _, queries, _ = shape
    if mask.ndim == 2 and mask.shape[0] not in (1, queries) and mask.shape[0] == batch:
        return mask[:, None, None]
    if mask.ndim == 3:
        return mask[:, None]
    return mask.view((1,) * (4 - mask.ndim) + mask.shape)


def masked_logits(logits: Tensor, mask: Tensor | None, queries: slice, keys: slice = slice(None)) -> Tensor:
    """Return the logits (batch, heads, queries, keys) of a part of an attention call with its mask applied.

    Args:
        mask: of the whole call, as ``AttentionInputs`` has it.
        queries, keys: the part that the logits are of.
    """
    if mask is None:
        return logits
    mask = (mask[..., queries, :] if mask.shape[-2] > 1 else mask)[..., keys]
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min) if mask.dtype == torch.bool else logits + mask


def visible_keys(inputs: AttentionInputs) -> Tensor | None:
    """Return (keys,), whether any query may look there; None where nothing is hidden, or not alike for a whole batch."""
    if inputs.mask is None or inputs.batch > 1:
        return None
    mask = inputs.mask if inputs.mask.dtype == torch.bool else inputs.mask > _HIDDEN
    return mask.expand(1, -1, -1, inputs.keys).flatten(0, 2).any(0)
