"""ComfyUI's EasyCache, which skips whole model calls and so lets other caches' steps pass without an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from .patching import ModelOptions, TransformerOptions

_KEY, _NAME = "easycache", "EasyCache"  # LazyCache keeps its state under the same key


def _easycache(options: ModelOptions | TransformerOptions) -> Any:
    """Return EasyCache's state of this run, or None."""
    state = options.get("transformer_options", options).get(_KEY)
    return state if getattr(state, "name", None) == _NAME else None


def easycache_skipped(options: ModelOptions | TransformerOptions) -> bool:
    """Return whether EasyCache took the place of the network in the evaluation that has just been made."""
    return bool(getattr(_easycache(options), "skip_current_step", False))


def make_easycache_compute(options: ModelOptions | TransformerOptions) -> None:
    """Keep EasyCache from skipping the next evaluation, as where what it remembers of a prompt is old."""
    state = _easycache(options)
    if state is not None:
        state.cumulative_change_rate = float("inf")


def make_caches_compute(options: ModelOptions | TransformerOptions) -> None:
    """Keep EasyCache and LazyCache from skipping the sampler's next evaluation."""
    state = options.get("transformer_options", options).get(_KEY)
    if hasattr(state, "cumulative_change_rate"):
        state.cumulative_change_rate = float("inf")


def move_easycache(options: TransformerOptions, uuids: Sequence[UUID], evaluated: Sequence[UUID]) -> None:
    """Let EasyCache judge changes by a prompt that is still evaluated.

    It compares the outputs of the first cond of the run; without that cond it never skips again. Its memory of another cond,
    output minus input, says what that one's output was.

    Args:
        uuids: the conds of the model call that is about to be made, the first one of its evaluation.
        evaluated: all conds of the evaluation.
    """
    state = _easycache(options)
    if state is None or state.first_cond_uuid is None or state.first_cond_uuid in evaluated:
        return
    state.first_cond_uuid = uuids[0]
    kept, before = state.uuid_cache_diffs.get(uuids[0]), state.x_prev_subsampled
    if kept is not None and before is not None:
        every = state.subsample_factor
        kept = kept[..., ::every, ::every] if every > 1 else kept
        if kept.shape == before.shape:
            state.output_prev_subsampled = before + kept.to(before.device)
            return
    state.x_prev_subsampled = state.output_prev_subsampled = state.output_prev_norm = None  # it begins anew
