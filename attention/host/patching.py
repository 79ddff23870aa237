"""Attaching a technique to a MODEL, and keeping its state for one sampling run.

Everything attaches to a clone through keyed wrappers (``attach``), keeps its state under one key of the run's own
``transformer_options`` (``run_scope``, ``run_state``), and changes a module only while one model call lasts
(``swapped_forward``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

ModelOptions = dict[str, Any]
TransformerOptions = dict[str, Any]
_WRAPPER_KINDS = {
    "prepare_sampling": WrappersMP.PREPARE_SAMPLING,
    "outer_sample": WrappersMP.OUTER_SAMPLE,
    "sampler_sample": WrappersMP.SAMPLER_SAMPLE,
    "predict_noise": WrappersMP.PREDICT_NOISE,
    "calc_cond_batch": WrappersMP.CALC_COND_BATCH,
    "apply_model": WrappersMP.APPLY_MODEL,
}


def attach(model: ModelPatcher, key: str, technique: object) -> ModelPatcher:
    """Return a clone of ``model`` whose sampling runs through ``technique``'s methods.

    A method named after a kind of wrapper (``prepare_sampling``, ``outer_sample``, ``sampler_sample``, ``predict_noise``,
    ``calc_cond_batch``, ``apply_model``) becomes that wrapper. Attaching the same key again replaces what was there.
    """
    clone = detach(model, key)
    for name, kind in _WRAPPER_KINDS.items():
        wrapper = getattr(technique, name, None)
        if wrapper is not None:
            clone.add_wrapper_with_key(kind, key, wrapper)
    return clone


def detach(model: ModelPatcher, key: str) -> ModelPatcher:
    """Return a clone of ``model`` without the wrappers of ``key``."""
    clone = model.clone()
    for kind in _WRAPPER_KINDS.values():
        clone.remove_wrappers_with_key(kind, key)
    return clone


@contextmanager
def run_scope(guider: Any, key: str, state: object) -> Iterator[None]:
    """Keep ``state`` in the guider's options while one sampling run lasts (inside an OUTER_SAMPLE wrapper)."""
    original = guider.model_options
    guider.model_options = {**original, "transformer_options": {**original.get("transformer_options", {}), key: state}}
    try:
        yield
    finally:
        guider.model_options = original


@contextmanager
def prepared_by(guider: Any, key: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Let a guider's runs be prepared through a PREPARE_SAMPLING ``wrapper`` while the block lasts."""
    original = guider.model_options
    transformer = original.get("transformer_options", {})
    kinds = dict(transformer.get("wrappers", {}))
    kinds[WrappersMP.PREPARE_SAMPLING] = {**kinds.get(WrappersMP.PREPARE_SAMPLING, {}), key: [wrapper]}
    guider.model_options = {**original, "transformer_options": {**transformer, "wrappers": kinds}}
    try:
        yield
    finally:
        guider.model_options = original


@contextmanager
def sampler_scope(options: ModelOptions, key: str, state: object) -> Iterator[None]:
    """Keep ``state`` in the options that a sampler hands to its model (inside a SAMPLER_SAMPLE wrapper).

    In those very options, and not a copy: another node may hold on to them and change them while the sampler runs.
    """
    transformer = options.setdefault("transformer_options", {})
    transformer[key] = state
    try:
        yield
    finally:
        del transformer[key]


def run_state(options: ModelOptions | TransformerOptions, key: str) -> Any:
    """Return the state that was put there, from model options or transformer options; None outside such a run."""
    return options.get("transformer_options", options).get(key)


@contextmanager
def swapped_forward(replacements: list[tuple[torch.nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Give modules another ``forward`` for the length of the block; what was there before comes back in any case."""
    before = [(module, module.__dict__.get("forward")) for module, _ in replacements]
    try:
        for module, forward in replacements:
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before:
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


# In transformer_options: the state of a technique that stops computing attention at a step, its ``gate``.
GATE = "fovea.tgate"


def gate_step(options: ModelOptions | TransformerOptions) -> int | None:
    """Return the step from which attention is reused in this run, or None."""
    return getattr(run_state(options, GATE), "gate", None)
