"""ComfyUI's EasyCache, which skips model calls, and LazyCache, which skips steps: other caches' steps pass without either."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from .patching import ModelOptions, TransformerOptions

_KEY = "easycache"  # of both of them
_EASY, _LAZY = "EasyCache", "LazyCache"


def _state(options: ModelOptions | TransformerOptions, name: str) -> Any:
    """Return a cache's state of this run, or None."""
    state = options.get("transformer_options", options).get(_KEY)
    return state if getattr(state, "name", None) == name else None


def _make_compute(state: Any) -> None:
    if hasattr(state, "cumulative_change_rate"):
        state.cumulative_change_rate = float("inf")


def easycache_skipped(options: ModelOptions | TransformerOptions) -> bool:
    """Return whether EasyCache took the place of the network in the evaluation that has just been made."""
    return bool(getattr(_state(options, _EASY), "skip_current_step", False))


def make_easycache_compute(options: ModelOptions | TransformerOptions) -> None:
    """Keep EasyCache from skipping the next evaluation, as where what it remembers of a prompt is old."""
    _make_compute(_state(options, _EASY))


def make_lazycache_compute(options: ModelOptions | TransformerOptions) -> None:
    """Keep LazyCache from skipping the sampler's next evaluation: it would repeat a result that is partly extrapolated."""
    _make_compute(_state(options, _LAZY))


def lazycache_acts(options: ModelOptions) -> bool:
    """Return whether LazyCache acts in this run."""
    return _state(options, _LAZY) is not None


def cache_skips(options: ModelOptions) -> tuple[str, int]:
    """Return the name of ComfyUI's cache that acts in this run, "" where there is none, and how often it has skipped so far."""
    state = options.get("transformer_options", {}).get(_KEY)
    return getattr(state, "name", ""), getattr(state, "total_steps_skipped", 0)


def make_caches_compute(options: ModelOptions | TransformerOptions) -> None:
    """Keep EasyCache and LazyCache from skipping the sampler's next evaluation."""
    make_easycache_compute(options)
    make_lazycache_compute(options)


def move_easycache(options: TransformerOptions, uuids: Sequence[UUID], evaluated: Sequence[UUID]) -> None:
    """Let EasyCache judge changes by a prompt that is still evaluated.

    It compares the outputs of the first cond of the run; without that cond it never skips again. Its memory of another cond,
    output minus input, says what that one's output was.

    Args:
        uuids: the conds of the model call that is about to be made, the first one of its evaluation.
        evaluated: all conds of the evaluation.
    """
    state = _state(options, _EASY)
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
