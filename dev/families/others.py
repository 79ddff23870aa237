"""The rest of ComfyUI's list: variants with a network or conditioning of their own, and networks the pack does not know."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from families.family import Extras, Family, pooled, randn
from families.networks import (
    CHROMA,
    COGVIDEOX,
    COSMOS2,
    FLUX,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO15,
    HUNYUAN_VIDEO_OPTIONS,
    KANDINSKY5,
    LTXV,
    PIXELDIT,
    SDXL,
    SVD,
    UNET,
    UNET_MODULE,
    WAN,
    ZIMAGE,
)
from families.tested import hunyuan_video15_extras, wan_i2v_extras


def _tensors(**shapes: tuple[int, ...]) -> Extras:
    return lambda generator: {name: randn(generator, *shape) for name, shape in shapes.items()}


def _references(*shape: int) -> Extras:
    return lambda generator: {"reference_latents": [randn(generator, *shape)]}


def _together(*extras: Extras) -> Extras:
    return lambda generator: {name: value for extra in extras for name, value in extra(generator).items()}


def _mochi_extras(generator: torch.Generator) -> dict[str, Any]:
    return {"attention_mask": torch.ones(1, 20, dtype=torch.long)}


def _wandancer_extras(generator: torch.Generator) -> dict[str, Any]:
    reference = SimpleNamespace(penultimate_hidden_states=randn(generator, 1, 257, 1280))
    return {**wan_i2v_extras(generator), "clip_vision_output_ref": reference, "audio_embed": randn(generator, 1, 8, 35)}


def _hidream_o1_extras(generator: torch.Generator) -> dict[str, Any]:
    from comfy.ldm.hidream_o1.model import TMS_TOKEN_ID

    words = torch.randint(0, 1000, (1, 12), generator=generator)
    return {"text_input_ids": torch.cat([words, torch.tensor([[TMS_TOKEN_ID]])], 1)}


_SD_X4: dict[str, Any] = {
    **UNET,
    "in_channels": 7,
    "num_classes": 1000,
    "use_linear_in_transformer": True,
    "disable_self_attentions": [True, False],
}
_MOCHI: dict[str, Any] = {
    "image_model": "mochi_preview",
    "depth": 2,
    "patch_size": 2,
    "num_heads": 4,
    "hidden_size_x": 128,
    "hidden_size_y": 64,
    "mlp_ratio_x": 96.0,  # ComfyUI insists on 12288 channels there
    "mlp_ratio_y": 2.0,
    "learn_sigma": False,
    "in_channels": 12,
    "qk_norm": True,
    "qkv_bias": False,
    "out_bias": True,
    "posenc_preserve_area": True,
    "timestep_scale": 1000.0,
    "use_t5": True,
    "t5_feat_dim": 64,
    "t5_token_length": 20,
}
_COSMOS1: dict[str, Any] = {
    "image_model": "cosmos",
    "max_img_h": 60,
    "max_img_w": 60,
    "max_frames": 8,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 128,
    "num_blocks": 2,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "block_x_format": "THWBD",
    "crossattn_emb_channels": 64,
    "pos_emb_cls": "rope3d",
    "affline_emb_norm": True,
    "use_adaln_lora": True,
    "adaln_lora_dim": 16,
    "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
}
_IDEOGRAM4: dict[str, Any] = {
    "image_model": "ideogram4",
    "in_channels": 128,
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "intermediate_size": 128,
    "adaln_dim": 32,
    "llm_features_dim": 64,
    "mrope_section": (6, 5, 5),
}
_HIDREAM_O1: dict[str, Any] = {
    "image_model": "hidream_o1",
    "text_config_overrides": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_dims": [4, 2, 2],
    },
    "vision_config_overrides": {
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 32,
        "depth": 1,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": (),
    },
}
_MINIMAX: dict[str, Any] = {
    "image_model": "minimax_h3",
    "hidden_size": 128,
    "num_layers": 2,
    "token_refiner_num_layers": 1,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "ffn_hidden_size": 128,
    "text_dim": 64,
    "timestep_input_dim": 64,
    "time_embed_hidden_size": 64,
    "time_embed_dim": 64,
    "rope_inv_freq_len": 4,
}
_LTXAV: dict[str, Any] = {
    **LTXV,
    "image_model": "ltxav",
    "audio_cross_attention_dim": 64,
    "audio_attention_head_dim": 16,
    "audio_num_attention_heads": 4,
    "connector_attention_head_dim": 16,
    "connector_num_attention_heads": 4,
    "connector_num_layers": 1,
}
_RADIANCE: dict[str, Any] = {
    **CHROMA,
    "image_model": "chroma_radiance",
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": 4,
    "nerf_hidden_size": 8,
    "nerf_mlp_ratio": 2,
    "nerf_depth": 1,
    "nerf_max_freqs": 4,
    "nerf_tile_size": 0,
    "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": torch.float32,
}
_RADIANCE_OPTIONS: dict[str, Any] = {"use_x0": False, "use_sequential_txt_ids": False, "vec_in_dim": None, "txt_ids_dims": []}
_ZIMAGE_PIXEL: dict[str, Any] = {
    **ZIMAGE,
    "image_model": "zimage_pixel",
    "in_channels": 3,
    "patch_size": 4,
    "decoder_in_channels": 48,
    "decoder_hidden_size": 32,
    "decoder_num_res_blocks": 1,
    "decoder_max_freqs": 4,
}
_PID: dict[str, Any] = {
    **PIXELDIT,
    "image_model": "pid",
    "lq_hidden_dim": 32,
    "lq_num_res_blocks": 1,
    "lq_interval": 1,
    "sr_scale": 1,
}
_CASCADE_B: dict[str, Any] = {
    "stable_cascade_stage": "b",
    "c_r": 64,
    "c_cond": 64,
    "c_hidden": [32, 64],
    "nhead": [-1, 4],
    "blocks": [[1, 1], [1, 1]],
    "block_repeat": [[1, 1], [1, 1]],
    "level_config": ["CT", "CTA"],
    "c_clip": 32,
    "dropout": [0.0, 0.0],
}
_SEEDVR2: dict[str, Any] = {
    "image_model": "seedvr2",
    "norm_eps": 1e-5,
    "num_layers": 2,
    "mlp_type": "swiglu",
    "vid_dim": 128,
    "heads": 4,
    "head_dim": 32,
    "mm_layers": 1,
    "rope_dim": 32,
    "vid_out_norm": True,
}
_HUNYUAN_REFINER: dict[str, Any] = {**HUNYUAN_VIDEO15, "in_channels": 128, "out_channels": 64}

_WAN_MODULE = "wan.model"
_HV_MODULE = "hunyuan_video.model"
_FLUX_OPTIONS: dict[str, Any] = {"optional": {"txt_ids_dims": []}, "parameters": "flux.model.FluxParams"}
_HV_OPTIONS: dict[str, Any] = {"optional": HUNYUAN_VIDEO_OPTIONS, "parameters": "hunyuan_video.model.HunyuanVideoParams"}


def _wan(
    name: str, config: str, module: str = _WAN_MODULE, channels: int = 16, extras: Extras = lambda generator: {}, **unet: Any
) -> Family:
    return Family(name, config, module, {**WAN, **unet}, channels=channels, frames=2, extras=extras)


_ALL = [
    Family("sd15_edit", "SD15_instructpix2pix", UNET_MODULE, {**UNET, "in_channels": 8}, channels=4, tokens=77),
    Family(
        "zero123", "Stable_Zero123", UNET_MODULE, {**UNET, "in_channels": 8}, channels=4, tokens=1, has_prompt=False,
        weights=lambda: {"cc_projection.weight": torch.zeros(64, 64), "cc_projection.bias": torch.zeros(64)},
    ),
    Family(
        "sd2_unclip", "SD21UnclipL", UNET_MODULE,
        {**UNET, "model_channels": 64, "use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 1536},
        channels=4, tokens=77,
    ),
    Family(
        "lotus", "LotusD", UNET_MODULE,
        {**UNET, "model_channels": 64, "use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 4},
        channels=4, tokens=77, start=1.0,
    ),
    Family("sd_x4", "SD_X4Upscaler", UNET_MODULE, _SD_X4, channels=4, tokens=77),
    Family("sdxl_refiner", "SDXLRefiner", UNET_MODULE, {**SDXL, "adm_in_channels": 32 + 5 * 256}, channels=4, tokens=77,
           extras=pooled(32)),
    Family("sv3d", "SV3D_u", UNET_MODULE, {**SVD, "adm_in_channels": 256}, channels=4, tokens=1, has_prompt=False),
    Family("cascade_b", "Stable_Cascade_B", "cascade.stage_b", _CASCADE_B, channels=4, size=(64, 48), tokens=77,
           extras=lambda generator: {"pooled_output": randn(generator, 1, 1, 32)}),
    Family("longcat", "LongCatImage", "flux.model", {**FLUX, "vec_in_dim": None, "guidance_embed": False}, **_FLUX_OPTIONS),
    Family("chroma_radiance", "ChromaRadiance", "chroma_radiance.model", _RADIANCE, channels=3, size=(32, 24), extras=pooled(32),
           optional=_RADIANCE_OPTIONS, parameters="chroma_radiance.model.ChromaRadianceParams"),
    Family("mochi", "GenmoMochi", "genmo.joint_model.asymm_models_joint", _MOCHI, channels=12, frames=2, extras=_mochi_extras),
    Family(
        "ltxav", "LTXAV", "lightricks.av_model", _LTXAV, channels=128, size=(8, 6), frames=2, audio=(8, 4, 16), width=128,
        extras=lambda generator: {"frame_rate": 25},
    ),
    Family("minimax", "MiniMaxH3", "minimax.model", _MINIMAX, channels=24, size=(8, 6), frames=2, audio=(32, 2, 4)),
    Family("hunyuan_video_i2v", "HunyuanVideoI2V", _HV_MODULE, {**HUNYUAN_VIDEO, "in_channels": 33}, frames=2,
           extras=pooled(32), **_HV_OPTIONS),
    Family(
        "hunyuan_video15_sr", "HunyuanVideo15_SR_Distilled", _HV_MODULE, {**HUNYUAN_VIDEO15, "in_channels": 98}, channels=32,
        size=(8, 6), frames=2, extras=hunyuan_video15_extras, parameters=_HV_OPTIONS["parameters"],
        optional={**HUNYUAN_VIDEO_OPTIONS, "byt5": True, "use_cond_type_embedding": True, "vision_in_dim": 48},
    ),
    Family("hunyuan_image_refiner", "HunyuanImage21Refiner", _HV_MODULE, _HUNYUAN_REFINER, channels=64, size=(8, 6), frames=1,
           **_HV_OPTIONS),
    Family("cosmos1", "CosmosT2V", "cosmos.model", _COSMOS1, frames=2),
    Family("anima", "Anima", "anima.model", {**COSMOS2, "image_model": "anima"}, frames=1),
    Family("z_image_pixel", "ZImagePixelSpace", "lumina.model", _ZIMAGE_PIXEL, channels=3, size=(32, 24)),
    Family("pid", "PiD", "pixeldit.pid", _PID, channels=3, size=(32, 24),
           extras=_tensors(lq_latent=(1, 16, 4, 3), degrade_sigma=(1,))),
    _wan("wan22", "WAN22_T2V", channels=48, in_dim=48, out_dim=48),
    _wan("wan_causal", "WAN21_CausalAR_T2V", "wan.ar_model"),
    _wan("wan_vace", "WAN21_Vace", model_type="vace", vace_layers=1, vace_in_dim=96),
    _wan("wan_camera", "WAN21_Camera", model_type="camera", in_dim=32, extras=wan_i2v_extras),
    _wan("wan_humo", "WAN21_HuMo", model_type="humo",
         extras=_together(_tensors(audio_embed=(1, 2, 8, 5, 1280)), _references(1, 16, 1, 16, 12))),
    _wan("wan_s2v", "WAN22_S2V", model_type="s2v", audio_inject_layers=[0],
         extras=_together(_tensors(audio_embed=(1, 25, 1024, 8)), _references(1, 16, 1, 16, 12))),
    _wan("wan_animate", "WAN22_Animate", "wan.model_animate", model_type="animate", in_dim=36,
         extras=_together(wan_i2v_extras, _tensors(pose_video_latent=(1, 16, 1, 16, 12)))),
    _wan("wan_animate2", "WAN_Animate2", "wan.model_animate2", model_type="animate2", in_dim=36,
         extras=_together(wan_i2v_extras, _tensors(pose_video_latent=(1, 16, 1, 16, 12)))),
    Family("wan_flowrvs", "WAN21_FlowRVS", _WAN_MODULE, WAN, frames=2, start=1.0),
    _wan("wan_scail", "WAN21_SCAIL", model_type="scail", in_dim=20,
         extras=_together(_references(1, 16, 1, 16, 12), _tensors(pose_video_latent=(1, 16, 2, 8, 6)))),
    _wan("wan_dancer", "WAN22_WanDancer", "wan.model_wandancer", model_type="wandancer", in_dim=36,
         audio_inject_layers=[0], extras=_wandancer_extras),
    Family("hidream_o1", "HiDreamO1", "hidream_o1.model", _HIDREAM_O1, channels=3, size=(128, 96), tokens=13,
           extras=_hidream_o1_extras),
    Family("seedvr2", "SeedVR2", "seedvr.model", _SEEDVR2, frames=2, tokens=20, width=5120, has_prompt=False,
           extras=_tensors(condition=(1, 17, 2, 16, 12))),
    Family("ideogram4", "Ideogram4", "ideogram4.model", _IDEOGRAM4, channels=128, size=(8, 6)),
    Family("kandinsky5_video", "Kandinsky5", "kandinsky5.model", {**KANDINSKY5, "visual_embed_dim": 132}, frames=2,
           extras=pooled(32)),
    Family("cogvideox_i2v", "CogVideoX_I2V", "cogvideo.model", {**COGVIDEOX, "in_channels": 32}, frames=2),
]  # fmt: skip

MORE_FAMILIES: dict[str, Family] = {family.name: family for family in _ALL if family.available}
