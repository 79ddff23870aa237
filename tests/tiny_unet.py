"""A tiny U-Net in SD1's layout, built from ComfyUI's classes, and one way to sample it.

The weights and cases in ``vectors/`` come from running the authors' implementations on this very network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.sample
import comfy.supported_models
import torch
from safetensors.torch import load_file

VECTORS = Path(__file__).parent / "vectors"
CONTEXT = 64

UNET_CONFIG = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [2] * 4,
    "channel_mult": [1, 1, 2, 1],
    "transformer_depth": [1] * 6 + [0] * 2,
    "transformer_depth_output": [1] * 9 + [0] * 3,
    "transformer_depth_middle": 1,
    "context_dim": CONTEXT,
    "num_heads": 8,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "use_checkpoint": False,
}

Conditioning = list[list[Any]]


def vector_model() -> comfy.model_patcher.ModelPatcher:
    """The network of the reference cases, with its recorded weights."""
    model = comfy.model_base.BaseModel(comfy.supported_models.SD15({**UNET_CONFIG, "dtype": torch.float32}))
    model.diffusion_model.load_state_dict(load_file(VECTORS / "tiny_unet.safetensors"))
    return patcher(model)


def small_model(in_channels: int = 4, seed: int = 0, **changes: Any) -> comfy.model_patcher.ModelPatcher:
    """A smaller random network with five attention blocks, for tests that only need a U-Net."""
    config = {
        **UNET_CONFIG,
        "in_channels": in_channels,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "num_heads": 2,
        "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1],
        "dtype": torch.float32,
        **changes,
    }
    model = comfy.model_base.BaseModel(comfy.supported_models.SD15(config))
    if in_channels > 4:
        model.set_inpaint()
    randomise(model, seed)
    return patcher(model)


def randomise(model: torch.nn.Module, seed: int, std: float = 0.05) -> None:
    """Small random weights everywhere (ComfyUI's layers start uninitialised), ones in the norms."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(False)
            if name == "weight" and "Norm" in type(module).__name__:
                parameter.fill_(1.0)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    model.eval()


def patcher(model: comfy.model_base.BaseModel) -> comfy.model_patcher.ModelPatcher:
    """A fresh ModelPatcher on the CPU, as ComfyUI's loaders make it there."""
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    cpu = torch.device("cpu")
    return kind(model.eval(), load_device=cpu, offload_device=cpu)


def cond(seed: int, tokens: int = 77, batch: int = 1, **extra: Any) -> Conditioning:
    """A CONDITIONING of random text features."""
    context = torch.randn(batch, tokens, CONTEXT, generator=torch.Generator().manual_seed(seed))
    return [[context, extra]]


def latent(height: int = 8, width: int = 8, batch: int = 1) -> torch.Tensor:
    return torch.zeros(batch, 4, height, width)


def sample(
    model: comfy.model_patcher.ModelPatcher,
    positive: Conditioning | None = None,
    negative: Conditioning | None = None,
    *,
    steps: int = 10,
    cfg: float = 7.0,
    sampler: str = "euler",
    scheduler: str = "normal",
    latent_image: torch.Tensor | None = None,
    seed: int = 3,
    **options: Any,
) -> torch.Tensor:
    """What the KSampler node does, without its progress bar, under the executor's inference mode."""
    start = latent() if latent_image is None else latent_image
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, scheduler, positive or cond(1), negative or cond(2), start,
            seed=seed, disable_pbar=True, **options,
        )  # fmt: skip


def reference_cases(name: str) -> dict[str, dict[str, Any]]:
    """The recorded cases of one technique: settings from the JSON, tensors beside them."""
    described = json.loads((VECTORS / f"{name}_cases.json").read_text())
    tensors = load_file(VECTORS / f"{name}_cases.safetensors")
    cases = {}
    for case, settings in described["cases"].items():
        own = {key.removeprefix(f"{case}/"): value for key, value in tensors.items() if key.startswith(f"{case}/")}
        cases[case] = {**described, **settings, **own}
    return cases
