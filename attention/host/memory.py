"""Memory as ComfyUI counts it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
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


def forward_memory(base_model: Any, shape: Sequence[int]) -> float:
    """Return the bytes that ComfyUI reckons for one forward on a latent of this shape."""
    return float(base_model.memory_required(list(shape)))


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


def prepare_with_room(room: float, executor: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Call ComfyUI's preparation of a run, which then makes room for ``room`` bytes beside what it reckons for the network.

    Args:
        executor, model, args, kwargs: as a PREPARE_SAMPLING wrapper is given them.
    """
    base_model = model.model
    own, reckoned = base_model.__dict__.get("memory_required"), base_model.memory_required
    base_model.__dict__["memory_required"] = lambda *shapes, **conds: reckoned(*shapes, **conds) + room
    try:
        return executor(model, *args, **kwargs)
    finally:
        if own is None:
            del base_model.__dict__["memory_required"]
        else:
            base_model.__dict__["memory_required"] = own


def copy_to(tensor: torch.Tensor, device: torch.device, *, waits: bool) -> torch.Tensor:
    """Return a copy of a tensor on ``device``; from a GPU to system memory it is pinned, and nothing waits for it.

    Args:
        waits: whether the copy must be complete at once, since another device is going to read it.
    """
    if waits or device.type != "cpu" or tensor.device.type != "cuda":
        return tensor.to(device, copy=True)
    try:
        pinned = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format, pin_memory=True)
    except RuntimeError:  # no more memory may be pinned
        return tensor.to(device, copy=True)
    return pinned.copy_(tensor, non_blocking=True)


def wait_for(device: torch.device | None) -> None:
    """Wait until a GPU has done all that was asked of it."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def end_prefetch() -> None:
    """Let go of weights that ComfyUI 0.30.0 has fetched ahead, where a forward ended before it came to them."""
    prefetch = sys.modules.get("comfy.model_prefetch")
    if prefetch is not None:
        prefetch.cleanup_prefetch_queues()


def intermediate_device() -> torch.device:
    """Return the device on which ComfyUI keeps what nodes hand to each other."""
    return comfy.model_management.intermediate_device()
