"""Memory as ComfyUI counts it."""

from __future__ import annotations

import sys
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.ops
import comfy.patcher_extension
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch


def free_system_memory() -> float:
    """Return the free bytes of RAM."""
    return float(comfy.model_management.get_free_memory(torch.device("cpu")))


def forward_memory(base_model: Any, x: torch.Tensor) -> float:
    """Return the bytes that ComfyUI reckons for one forward on ``x``."""
    return float(base_model.memory_required(list(x.shape)))


def empty_cache() -> None:
    """Give memory that torch holds for later back to the device."""
    comfy.model_management.soft_empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ComfyUI calls an error out of memory; on a machine without a GPU only torch's own counts."""
    kind = comfy.model_management.OOM_EXCEPTION
    return isinstance(error, torch.OutOfMemoryError) or (kind is not Exception and isinstance(error, kind))


def spare_memory(device: torch.device) -> float:
    """Return the bytes on ``device`` beyond what ComfyUI keeps free for inference; unlimited on the CPU.

    Weights that dynamic VRAM (0.30.0) can give back count as free, as they do where ComfyUI decides on its batches.
    """
    if device.type == "cpu":
        return float("inf")
    return _free_memory(device) - comfy.model_management.minimum_inference_memory()


def _free_memory(device: torch.device) -> float:
    for model in comfy.model_management.loaded_models():
        counts = getattr(model, "get_free_memory", None)  # the same for every model on the device
        if counts is not None:
            return float(counts(device))
    return float(comfy.model_management.get_free_memory(device))


def free_other_models(base_model: Any, device: torch.device) -> bool:
    """Ask ComfyUI to take every model off ``device`` that the current run does not use; whether one was."""
    loaded = comfy.model_management.current_loaded_models
    kept = [one for one in loaded if one.currently_used or getattr(one.model, "model", None) is base_model]
    freed = comfy.model_management.free_memory(1e30, device, keep_loaded=kept)
    comfy.model_management.soft_empty_cache()
    return bool(freed)


def end_prefetch() -> None:
    """Let go of weights that ComfyUI 0.30.0 has fetched ahead, where a forward ended before it came to them."""
    prefetch = sys.modules.get("comfy.model_prefetch")
    if prefetch is not None:
        prefetch.cleanup_prefetch_queues()


def intermediate_device() -> torch.device:
    """Return the device on which ComfyUI keeps what nodes hand to each other."""
    return comfy.model_management.intermediate_device()
