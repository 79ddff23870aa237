"""Nodes that load a tiny random model of a family in place of ComfyUI's loaders: model, text encoder and VAE fit together."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.ldm.wan.vae
import comfy.sd
import comfy.taesd.taesd
import host_inprocess
import tiny_text
import torch
from families import FAMILIES, randomise

CHECKPOINT = host_inprocess.ROOT / "dev" / "scenes" / "fovea-scenes.safetensors"
# What the networks' text inputs have to be for the tiny text encoders: SDXL joins two, Flux and Wan read T5.
FITTED = {
    "sdxl": {"context_dim": 32 + 48, "adm_in_channels": 48 + 6 * 256},
    "flux": {"context_in_dim": 32, "vec_in_dim": 32},
    "wan_t2v": {"text_dim": 32},
}
ENCODERS = {"sdxl": "sdxl", "flux": "flux", "wan_t2v": "wan"}


@cache
def parts(family: str) -> tuple[Any, Any, Any]:
    """Return MODEL, CLIP and VAE of a family; ``scenes`` is the demo model."""
    if family == "scenes":
        host_inprocess.register_demo_model()
        return comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT), output_vae=True, output_clip=True)[:3]
    known = FAMILIES[family]
    model = dataclasses.replace(known, unet={**known.unet, **FITTED[family]}).build()
    clip = tiny_text.FAMILIES[ENCODERS[family]].build(zero_linear=False)
    return model, clip, vae(known.channels, bool(known.frames))


def vae(channels: int, video: bool) -> comfy.sd.VAE:
    """Return a VAE that ComfyUI recognises by its weights: Wan's for videos, else TAESD, which is small."""
    if video:
        made = comfy.ldm.wan.vae.WanVAE(
            dim=8, z_dim=channels, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
            temperal_downsample=[False, True, True], dropout=0.0,
        )  # fmt: skip
    else:
        made = comfy.taesd.taesd.TAESD(latent_channels=channels)
    randomise(made, 5)
    return comfy.sd.VAE(sd=made.state_dict())


def control_net(model: Any) -> comfy.controlnet.ControlNet:
    """Return a random ControlNet for the U-Net of a model."""
    unet = {key: value for key, value in model.model.model_config.unet_config.items() if key != "image_size"}
    for name in ("out_channels", "transformer_depth_output", "disable_unet_model_creation"):
        unet.pop(name, None)
    network = comfy.cldm.cldm.ControlNet(image_size=32, hint_channels=3, **{**unet, "dtype": torch.float32})
    randomise(network, 7)
    return comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"), manual_cast_dtype=None)


def loader(family: str, *wanted: int) -> type:
    """Return a node class that gives the wanted parts (0 MODEL, 1 CLIP, 2 VAE), whatever file it is asked for."""

    class Load:
        RETURN_TYPES = tuple(("MODEL", "CLIP", "VAE")[part] for part in wanted)
        FUNCTION, CATEGORY = "load", "test"

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {}}

        def load(self, **files: Any) -> tuple[Any, ...]:
            return tuple(parts(family)[part] for part in wanted)

    return Load


class LoadControlNet:
    """Gives a random ControlNet for the demo model."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONTROL_NET",), "load", "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def load(self, **files: Any) -> tuple[Any]:
        return (control_net(parts("scenes")[0]),)
