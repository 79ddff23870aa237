"""Networks to measure on: SD1.5's U-Net at real size with random weights, for the host and for diffusers.

Speed and memory do not depend on what the weights are, and no checkpoint has to be fetched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOKENS = 77


@dataclass(frozen=True)
class Shape:
    """Width of a U-Net of SD1.5's layout, and of the text it looks at."""

    channels: int = 320
    context: int = 768


SD15 = Shape()
TINY = Shape(32, 64)  # to try a benchmark itself


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Small random weights everywhere, ones in the norms; no weight wants a gradient."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(False)
            if name == "weight" and "Norm" in type(module).__name__:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, 0.02, generator=generator)


def sd15_shaped(shape: Shape = SD15) -> Any:
    """The U-Net with random weights, as the host builds it."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    config = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": shape.channels, "num_res_blocks": [2] * 4,
        "channel_mult": [1, 2, 4, 4], "transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_output": [1] * 9 + [0] * 3,
        "transformer_depth_middle": 1, "context_dim": shape.context, "num_heads": 8, "num_head_channels": -1,
        "use_spatial_transformer": True, "use_linear_in_transformer": False, "legacy": False, "adm_in_channels": None,
        "use_temporal_attention": False, "use_checkpoint": False, "dtype": torch.float32,
    }  # fmt: skip
    model = comfy.model_base.BaseModel(comfy.supported_models.SD15(config))
    randomise(model)
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return kind(model.eval(), load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def diffusers_unet(shape: Shape = SD15) -> Any:
    """diffusers' network of the same layout, without weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        channels = tuple(shape.channels * times for times in (1, 2, 4, 4))
        unet: Any = UNet2DConditionModel(block_out_channels=channels, cross_attention_dim=shape.context, attention_head_dim=8)
    return unet.eval()


def as_diffusers(model: Any, shape: Shape = SD15) -> Any:
    """diffusers' network with the very weights of the host's (not copies of them), which want gradients as loaded ones do."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = diffusers_unet(shape)
    weights = {f"model.diffusion_model.{name}": value for name, value in model.model.diffusion_model.state_dict().items()}
    unet.load_state_dict(convert_ldm_unet_checkpoint(weights, unet.config), assign=True)
    return unet.requires_grad_()


def random_tensor(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sampler(model: Any, steps: int, latent: Tensor, context: int) -> Callable[[], Tensor]:
    """One sampling run with fixed noise and prompts."""
    import comfy.sample

    noise, positive, negative = (
        random_tensor(seed, *shape) for seed, shape in enumerate((latent.shape, (1, TOKENS, context), (1, TOKENS, context)))
    )

    def run() -> Tensor:
        with torch.inference_mode():
            return comfy.sample.sample(
                model, noise, steps, 7.5, "euler", "normal", [[positive, {}]], [[negative, {}]], latent,
                seed=0, disable_pbar=True,
            )  # fmt: skip

    return run
