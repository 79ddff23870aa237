"""The families that the tests run one by one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from families.family import Family, pooled, randn
from families.networks import (
    AURA,
    BOOGU,
    CASCADE,
    CHROMA,
    COGVIDEOX,
    COSMOS2,
    ERNIE,
    FLUX,
    FLUX2,
    HIDREAM,
    HUNYUAN_IMAGE,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO15,
    HUNYUAN_VIDEO_OPTIONS,
    HYDIT,
    JOYIMAGE,
    KANDINSKY5,
    KREA2,
    LENS,
    LTXV,
    LUMINA,
    MAGE_FLOW,
    OMNIGEN2,
    PIXART,
    PIXELDIT,
    QWEN,
    SD3,
    SDXL,
    SVD,
    UNET,
    UNET_MODULE,
    WAN,
    ZIMAGE,
)


def _hydit_extras(generator: torch.Generator) -> dict[str, Any]:
    mask, mask_t5 = torch.ones(1, 77), torch.ones(1, 24)
    mask[:, 9:] = 0
    mask_t5[:, 14:] = 0
    return {"attention_mask": mask, "conditioning_mt5xl": randn(generator, 1, 24, 48), "attention_mask_mt5xl": mask_t5}


def _ltxv_extras(generator: torch.Generator) -> dict[str, Any]:
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[:, :6] = 0
    return {"attention_mask": mask, "frame_rate": 25}


def wan_i2v_extras(generator: torch.Generator) -> dict[str, Any]:
    return {"clip_vision_output": SimpleNamespace(penultimate_hidden_states=randn(generator, 1, 257, 1280))}


def hunyuan_video15_extras(generator: torch.Generator) -> dict[str, Any]:
    return {
        **pooled(32)(generator),
        "conditioning_byt5small": randn(generator, 1, 5, 1472),
        "clip_vision_output": SimpleNamespace(last_hidden_state=randn(generator, 1, 7, 48)),
    }


def _token_count(generator: torch.Generator) -> dict[str, Any]:
    """Return a mask: these networks read the number of tokens from it. Zeros fail in 0.3.75's sub-quadratic attention."""
    return {"attention_mask": torch.ones(1, 20, dtype=torch.long)}


_ALL = [
    Family("sd15", "SD15", UNET_MODULE, UNET, channels=4, tokens=77),
    Family(
        "sd2", "SD20", UNET_MODULE, {**UNET, "model_channels": 64, "use_linear_in_transformer": True}, channels=4, tokens=77,
        model_type="V_PREDICTION",
    ),
    Family("sdxl", "SDXL", UNET_MODULE, SDXL, channels=4, tokens=77, extras=pooled(32)),
    Family("svd", "SVD_img2vid", UNET_MODULE, SVD, channels=4, tokens=1, has_prompt=False),
    Family("sd3", "SD3", "modules.diffusionmodules.mmdit", SD3, extras=pooled(32)),
    Family("sd35_medium", "SD3", "modules.diffusionmodules.mmdit", {**SD3, "x_block_self_attn_layers": [0]}, extras=pooled(32)),
    Family(
        "flux", "Flux", "flux.model", FLUX, extras=pooled(32), optional={"txt_ids_dims": []}, parameters="flux.model.FluxParams"
    ),
    Family(
        "flux_kontext", "Flux", "flux.model", FLUX, optional={"txt_ids_dims": []}, parameters="flux.model.FluxParams",
        extras=lambda generator: {**pooled(32)(generator), "reference_latents": [randn(generator, 1, 16, 8, 12)]},
    ),
    Family(
        "chroma", "Chroma", "chroma.model", CHROMA, optional={"txt_ids_dims": [], "vec_in_dim": None},
        parameters="chroma.model.ChromaParams", extras=pooled(32),
    ),
    Family("pixart", "PixArtAlpha", "pixart.pixartms", PIXART, channels=4, size=(40, 28)),
    Family("hunyuan_dit", "HunyuanDiT", "hydit.models", HYDIT, channels=4, tokens=77, extras=_hydit_extras),
    Family("auraflow", "AuraFlow", "aura.mmdit", AURA, channels=4),
    Family("lumina2", "Lumina2", "lumina.model", LUMINA, extras=_token_count),
    Family("z_image", "ZImage", "lumina.model", ZIMAGE),
    Family("qwen_image", "QwenImage", "qwen_image.model", QWEN, frames=1),
    Family(
        "qwen_image_edit", "QwenImage", "qwen_image.model", QWEN, frames=1,
        extras=lambda generator: {"reference_latents": [randn(generator, 1, 16, 1, 8, 12)]},
    ),
    Family("wan_t2v", "WAN21_T2V", "wan.model", WAN, frames=2),
    Family("wan_i2v", "WAN21_I2V", "wan.model", {**WAN, "model_type": "i2v", "in_dim": 36}, frames=2, extras=wan_i2v_extras),
    Family("ltxv", "LTXV", "lightricks.model", LTXV, channels=128, size=(8, 6), frames=2, extras=_ltxv_extras),
    Family(
        "hidream", "HiDream", "hidream.model", HIDREAM, tokens=12,
        extras=lambda generator: {**pooled(32)(generator), "conditioning_llama3": randn(generator, 1, 4, 9, 48)},
    ),
    Family(
        "hunyuan_video", "HunyuanVideo", "hunyuan_video.model", HUNYUAN_VIDEO, frames=2, extras=pooled(32),
        optional=HUNYUAN_VIDEO_OPTIONS, parameters="hunyuan_video.model.HunyuanVideoParams",
    ),
    Family("cosmos_predict2", "CosmosT2IPredict2", "cosmos.predict2", COSMOS2, frames=1),
    Family(
        "cascade", "Stable_Cascade_C", "cascade.stage_c", CASCADE, size=(8, 6),
        extras=lambda generator: {"pooled_output": randn(generator, 1, 1, 32)},
    ),
    Family("omnigen2", "Omnigen2", "omnigen.omnigen2", OMNIGEN2, extras=_token_count),
    Family(
        "omnigen2_edit", "Omnigen2", "omnigen.omnigen2", OMNIGEN2,
        extras=lambda generator: {**_token_count(generator), "reference_latents": [randn(generator, 1, 16, 8, 12)]},
    ),
    Family("ernie_image", "ErnieImage", "ernie.model", ERNIE, channels=128, size=(8, 6)),
    Family("krea2", "Krea2", "krea2.model", KREA2, frames=1),
    Family(
        "flux2", "Flux2", "flux.model", FLUX2, channels=128, size=(8, 6), extras=pooled(32), optional={"txt_ids_dims": [3]},
        parameters="flux.model.FluxParams",
    ),
    Family("lens", "Lens", "lens.model", LENS, channels=128, size=(8, 6)),
    Family("joyimage", "JoyImage", "joyimage.model", JOYIMAGE, frames=1),
    Family(
        "joyimage_edit", "JoyImage", "joyimage.model", JOYIMAGE, frames=1,
        extras=lambda generator: {"reference_latents": [randn(generator, 1, 16, 1, 8, 12)]},
    ),
    Family("mage_flow", "MageFlow", "mage_flow.model", MAGE_FLOW, channels=128, size=(8, 6)),
    Family("boogu", "Boogu", "boogu.model", BOOGU, extras=_token_count),
    Family("pixeldit", "PixelDiTT2I", "pixeldit.model", PIXELDIT, channels=3, size=(32, 24)),
    Family("cogvideox", "CogVideoX_T2V", "cogvideo.model", COGVIDEOX, frames=2),
    Family("kandinsky5", "Kandinsky5Image", "kandinsky5.model", KANDINSKY5, extras=pooled(32)),
    Family(
        "hunyuan_image", "HunyuanImage21", "hunyuan_video.model", HUNYUAN_IMAGE, channels=64, size=(8, 6),
        extras=lambda generator: {"conditioning_byt5small": randn(generator, 1, 5, 1472)},
        optional={**HUNYUAN_VIDEO_OPTIONS, "byt5": True}, parameters="hunyuan_video.model.HunyuanVideoParams",
    ),
    Family(
        "hunyuan_video15", "HunyuanVideo15", "hunyuan_video.model", HUNYUAN_VIDEO15, channels=32, size=(8, 6), frames=2,
        extras=hunyuan_video15_extras, parameters="hunyuan_video.model.HunyuanVideoParams",
        optional={**HUNYUAN_VIDEO_OPTIONS, "byt5": True, "use_cond_type_embedding": True, "vision_in_dim": 48},
    ),
]  # fmt: skip

FAMILIES: dict[str, Family] = {family.name: family for family in _ALL if family.available}
