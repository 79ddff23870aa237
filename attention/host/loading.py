"""Reading model files, and making a MODEL of a network that ComfyUI's own loaders do not know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher


def maps_files() -> bool:
    """Return whether files may be mapped into memory, which ComfyUI's ``--disable-mmap`` forbids."""
    return not comfy.utils.DISABLE_MMAP


def load_file(path: str) -> tuple[Mapping[str, Any], Mapping[str, str] | None]:
    """Return the tensors of a model file, mapped into memory, and its text metadata."""
    return comfy.utils.load_torch_file(path, return_metadata=True)


def patcher_for(config: Any, weights: dict[str, torch.Tensor], disable_dynamic: bool) -> ModelPatcher:
    """Return a MODEL for weights whose ``config`` (a ``supported_models_base.BASE``) is known.

    It does what ComfyUI's ``load_diffusion_model_state_dict`` does from there on.

    Args:
        disable_dynamic: give up dynamic VRAM, where this ComfyUI has it.
    """
    device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    supported = list(config.supported_inference_dtypes)
    dtype = comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights),
        supported_dtypes=supported,
        weight_dtype=comfy.utils.weight_dtype(weights),
    )
    config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, device, supported))
    model = config.get_model(weights)
    kind = ModelPatcher if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", ModelPatcher)
    patcher = kind(model, load_device=device, offload_device=offload_device)
    if not comfy.model_management.is_device_cpu(offload_device):
        model.to(offload_device)
    dynamic = getattr(patcher, "is_dynamic", lambda: False)()
    model.load_model_weights(weights, "", **({"assign": True} if dynamic else {}))
    return patcher
