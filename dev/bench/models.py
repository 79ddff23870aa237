"""Networks to measure on: SD1.5's, SDXL's and PixArt's at real size with random weights, for ComfyUI and for diffusers.

Speed and memory do not depend on what the weights are, and no checkpoint has to be fetched.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

TOKENS = 77
CFG = 7.5
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Target:
    """Where a network is, and what it computes in."""

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    @classmethod
    def here(cls, dtype: str | None = None) -> Target:
        """Choose ComfyUI's device, and what ``dtype`` names or else suits it: float32 on a CPU, float16 on a GPU."""
        import comfy.model_management

        device = comfy.model_management.get_torch_device()
        return cls(device, getattr(torch, dtype or ("float32" if device.type == "cpu" else "float16")))

    @property
    def on_gpu(self) -> bool:
        return self.device.type != "cpu"

    @property
    def exact(self) -> bool:
        """Whether two ways of the same sum agree in all but the last digits. (A GPU's convolutions round float32 to TF32.)"""
        return not self.on_gpu and self.dtype == torch.float32

    @property
    def precision(self) -> str:
        return name_of(self.dtype)

    def put(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)


CPU = Target()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="of the real-size network (default float32; on a GPU float16)")


def add_shape_arguments(parser: argparse.ArgumentParser, shapes: Iterable[str]) -> None:
    parser.add_argument("--shape", choices=tuple(shapes), default="sd15", help="the network's layout (default sd15)")
    parser.add_argument("--tiny", action="store_true", help="a tiny network and few steps, to try the benchmark itself")


@dataclass(frozen=True)
class Shape:
    """A network's layout and width, the channels of the text and of the pooled text it is told, and an image's least side."""

    layout: str
    channels: int
    context: int
    pooled: int = 0
    least: int = 0

    @property
    def title(self) -> str:
        return f"{self.layout}-shaped {'U-Net' if self.layout in ('SD1.5', 'SDXL') else 'transformer'}"

    def side(self, wanted: int) -> int:
        """Return the pixels of an image's side: as wanted, where the network can do that."""
        return max(wanted, self.least)


def tiny(shape: Shape) -> Shape:
    return replace(shape, channels=32, context=64)


SD15 = Shape("SD1.5", 320, 768)
SDXL = Shape("SDXL", 320, 2048, 1280)
PIXART = Shape("PixArt", 1152, 4096, least=320)  # below, ComfyUI divides by 0
WAN = Shape("Wan", 1536, 4096)  # as its smallest model, 1.3B
UNETS = {"sd15": SD15, "sdxl": SDXL}
SHAPES = {**UNETS, "pixart": PIXART}
TINY = tiny(SD15)  # to try a benchmark itself

_UNET: dict[str, Any] = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "use_spatial_transformer": True, "legacy": False,
    "use_temporal_attention": False, "use_checkpoint": False,
}  # fmt: skip
_LAYOUTS: dict[str, dict[str, Any]] = {
    "SD1.5": {
        **_UNET,
        "num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "transformer_depth": [1] * 6 + [0] * 2,
        "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1, "num_heads": 8, "num_head_channels": -1,
        "use_linear_in_transformer": False, "adm_in_channels": None,
    },
    "SDXL": {
        **_UNET,
        "num_res_blocks": [2] * 3, "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0] * 3 + [2] * 3 + [10] * 3, "transformer_depth_middle": 10, "num_heads": -1,
        "num_head_channels": 64, "use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 2816,
    },
    "PixArt": {
        "image_model": "pixart_alpha", "input_size": 64, "patch_size": 2, "in_channels": 4, "depth": 28, "num_heads": 16,
        "model_max_length": 120, "micro_condition": False, "pe_interpolation": 1,
    },
    "Wan": {
        "image_model": "wan2.1", "model_type": "t2v", "patch_size": (1, 2, 2), "text_len": TOKENS, "in_dim": 16, "out_dim": 16,
        "freq_dim": 256, "num_layers": 30,
    },
}  # fmt: skip
_KINDS = {"SD1.5": "SD15", "SDXL": "SDXL", "PixArt": "PixArtAlpha", "Wan": "WAN21_T2V"}  # ComfyUI's


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Fill in small random weights in place, with ones in the norms; no weight wants a gradient."""
    generators: dict[torch.device, torch.Generator] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(False)
            if name == "weight" and "Norm" in type(module).__name__:
                parameter.fill_(1.0)
                continue
            device = parameter.device
            generator = generators.setdefault(device, torch.Generator(device).manual_seed(seed))
            parameter.normal_(0, 0.02, generator=generator)


def host_network(shape: Shape = SD15, target: Target = CPU) -> Any:
    """Build the network with random weights, as ComfyUI does."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    width = {"model_channels": shape.channels, "context_dim": shape.context}
    if shape.layout == "PixArt":
        width = {"hidden_size": shape.channels, "caption_channels": shape.context}
    if shape.layout == "Wan":
        heads, inner = max(shape.channels // 128, 1), shape.channels * 35 // 6
        width = {"dim": shape.channels, "ffn_dim": inner, "num_heads": heads, "text_dim": shape.context}
    kind = getattr(comfy.supported_models, _KINDS[shape.layout])
    config = {**_LAYOUTS[shape.layout], **width, "dtype": target.dtype}
    model = kind(config).get_model({}, device=target.device)
    randomise(model)
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    offload = comfy.model_management.unet_offload_device()
    return patcher(model.eval(), load_device=target.device, offload_device=offload)


def precision_of(model: Any) -> str:
    """Return the type that ComfyUI's model computes in."""
    return name_of(model.model.manual_cast_dtype or model.model.get_dtype())


def diffusers_unet(shape: Shape = SD15) -> Any:
    """Build diffusers' network of SD1.5's layout, without weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        channels = tuple(shape.channels * times for times in (1, 2, 4, 4))
        unet: Any = UNet2DConditionModel(block_out_channels=channels, cross_attention_dim=shape.context, attention_head_dim=8)
    return unet.eval()


def as_diffusers(model: Any, shape: Shape = SD15) -> Any:
    """Build diffusers' network on the very weights of ComfyUI's (not copies), which want gradients as loaded ones do."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = diffusers_unet(shape)
    weights = {f"model.diffusion_model.{name}": value for name, value in model.model.diffusion_model.state_dict().items()}
    unet.load_state_dict(convert_ldm_unet_checkpoint(weights, unet.config), assign=True)
    return unet.requires_grad_()


def random_tensor(seed: int, *shape: int) -> Tensor:
    """Draw on the CPU, where ComfyUI's nodes make noise and prompts too."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs_of_a_run(latent: Tensor, context: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return noise, positive and negative prompt, the same in every run."""
    return random_tensor(0, *latent.shape), random_tensor(1, 1, TOKENS, context), random_tensor(2, 1, TOKENS, context)


def sampler(model: Any, steps: int, latent: Tensor, context: int, pooled: int = 0, cfg: float = CFG) -> Callable[[], Tensor]:
    """Return a function that does one sampling run with fixed noise and prompts."""
    import comfy.sample

    noise, positive, negative = inputs_of_a_run(latent, context)
    told = {"pooled_output": random_tensor(3, 1, pooled)} if pooled else {}

    def run() -> Tensor:
        with torch.inference_mode():
            return comfy.sample.sample(
                model, noise, steps, cfg, "euler", "normal", [[positive, {**told}]], [[negative, {**told}]], latent,
                seed=0, disable_pbar=True,
            )  # fmt: skip

    return run
