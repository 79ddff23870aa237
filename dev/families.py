"""A tiny random model of every family of networks, built from the host's own classes, and conditioning that fits it.

``FAMILIES`` are those that the tests run one by one; ``families_more`` has the rest of the host's list.

Each one is the host's real configuration class -> BaseModel -> ModelPatcher with small numbers, so it samples through the
real sampler. Weights are seeded and scaled so that attention is neither uniform nor saturated and every gate is open.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models
import torch

try:
    from comfy.nested_tensor import NestedTensor
except ImportError:
    pass  # an older host has no such latents

Conditioning = list[list[Any]]
Extras = Callable[[torch.Generator], dict[str, Any]]

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Family:
    """How one family is built, prompted and sampled.

    Attributes:
        config: name of its class in ``comfy.supported_models``.
        network: module of the network, under ``comfy.ldm``; a host without it does not know the family.
        unet: what the network is built from.
        channels: of the latent; ``size`` is its height and width, ``frames`` its length for video networks (0: a picture).
        width, tokens: of the text features.
        extras: what else its conditioning carries.
        model_type: where the config would read it from a checkpoint's keys.
        optional: settings that only some hosts' networks know.
        weights: what the config reads from a checkpoint while it makes the model.
        audio: shape of a second latent (channels, ...) that is sampled together with the first.
        has_prompt: its text features come from words.
        start: spread of the latent that it starts from, where that is a picture and not noise.
    """

    name: str
    config: str
    network: str
    unet: dict[str, Any]
    channels: int = 16
    size: tuple[int, int] = (16, 12)
    frames: int = 0
    tokens: int = 20
    width: int = 64
    extras: Extras = lambda generator: {}
    model_type: str | None = None
    optional: dict[str, Any] = field(default_factory=dict)
    parameters: str = ""  # the class whose fields say which of `optional` this host knows
    weights: Callable[[], dict[str, torch.Tensor]] = dict
    audio: tuple[int, ...] = ()
    has_prompt: bool = True
    start: float = 0.0

    @property
    def available(self) -> bool:
        """Whether the host under test has this family."""
        try:
            import_module(f"comfy.ldm.{self.network}")
        except ImportError:
            return False
        return hasattr(comfy.supported_models, self.config)

    def build(self, seed: int = 0) -> comfy.model_patcher.ModelPatcher:
        config = getattr(comfy.supported_models, self.config)({**self.unet, **self._known_options(), "dtype": torch.float32})
        config.unet_config.update(self.unet)  # a config may put its checkpoint's sizes in place of what it is given
        if self.model_type is None:
            model = config.get_model(self.weights())
        else:
            model = comfy.model_base.BaseModel(config, getattr(comfy.model_base.ModelType, self.model_type))
        randomise(model, seed)
        kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
        return kind(model.eval(), load_device=CPU, offload_device=CPU)

    def conds(self, seed: int = 1, tokens: int | None = None) -> Conditioning:
        generator = torch.Generator().manual_seed(seed)
        context = torch.randn(1, tokens or self.tokens, self.width, generator=generator)
        return [[context, self.extras(generator)]]

    def latent(self, batch: int = 1, size: tuple[int, int] | None = None) -> Any:
        frames = (self.frames,) if self.frames else ()
        picture = torch.zeros(batch, self.channels, *frames, *(size or self.size))
        return NestedTensor((picture, torch.zeros(batch, *self.audio))) if self.audio else picture

    def _known_options(self) -> dict[str, Any]:
        if not self.optional:
            return {}
        module, name = self.parameters.rsplit(".", 1)
        known = inspect.signature(getattr(import_module(f"comfy.ldm.{module}"), name)).parameters
        return {key: value for key, value in self.optional.items() if key in known}


def sample(
    family: Family,
    model: comfy.model_patcher.ModelPatcher,
    *,
    positive: Conditioning | None = None,
    negative: Conditioning | None = None,
    steps: int = 2,
    cfg: float = 3.0,
    sampler: str = "euler",
    scheduler: str = "simple",
    latent_image: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    seed: int = 3,
    **options: Any,
) -> torch.Tensor:
    """What the KSampler node does, under the executor's inference mode."""
    start = family.latent() if latent_image is None else latent_image
    if noise is None:
        noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, scheduler, positive or family.conds(1), negative or family.conds(2), start,
            seed=seed, disable_pbar=True, **options,
        )  # fmt: skip


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Seeded weights that keep activations near one: norms one, matrices by fan-in, everything else small."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(False)
            if norm and name in ("weight", "scale"):
                parameter.fill_(1.0)
                continue
            std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 and name == "weight" else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        for name, buffer in module.named_buffers(recurse=False):
            if name in ("pos_embed", "inv_freq"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.5)


def pooled(width: int) -> Extras:
    return lambda generator: {"pooled_output": torch.randn(1, width, generator=generator)}


def randn(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


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
    """These networks read the number of tokens from a mask; one with zeros fails in 0.3.75's sub-quadratic attention."""
    return {"attention_mask": torch.ones(1, 20, dtype=torch.long)}


UNET: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 64,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "use_checkpoint": False,
}
SDXL: dict[str, Any] = {
    **UNET,
    "model_channels": 64,
    "transformer_depth": [0, 2],
    "transformer_depth_output": [0, 0, 2, 2],
    "transformer_depth_middle": 2,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 32 + 6 * 256,
}
SVD: dict[str, Any] = {
    **UNET,
    "model_channels": 64,
    "in_channels": 8,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 3 * 256,
    "use_temporal_attention": True,
    "use_temporal_resblock": True,
    "extra_ff_mix_layer": True,
    "use_spatial_context": True,
    "merge_strategy": "learned_with_images",
    "merge_factor": 0.0,
    "video_kernel_size": [3, 1, 1],
}
_SD3: dict[str, Any] = {
    "input_size": None,
    "patch_size": 2,
    "in_channels": 16,
    "depth": 2,
    "adm_in_channels": 32,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}},
    "pos_embed_max_size": 16,
    "num_patches": 256,
    "qk_norm": "rms",
    "pos_embed_scaling_factor": None,
}
FLUX: dict[str, Any] = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 32,
    "context_in_dim": 64,
    "hidden_size": 128,
    "mlp_ratio": 2.0,
    "num_heads": 4,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [4, 14, 14],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
}
CHROMA: dict[str, Any] = {
    **{key: value for key, value in FLUX.items() if key not in ("vec_in_dim", "guidance_embed")},
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "in_dim": 64,
    "out_dim": 128,
    "hidden_dim": 64,
    "n_layers": 1,
}
_PIXART: dict[str, Any] = {
    "image_model": "pixart_alpha",
    "input_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 128,
    "depth": 2,
    "num_heads": 4,
    "caption_channels": 64,
    "model_max_length": 20,
    "micro_condition": False,
    "pe_interpolation": 1,
}
_HYDIT: dict[str, Any] = {
    "image_model": "hydit",
    "input_size": None,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 128,
    "depth": 4,
    "num_heads": 4,
    "text_states_dim": 64,
    "text_states_dim_t5": 48,
    "text_len_t5": 24,
    "size_cond": False,
    "use_style_cond": False,
}
_AURA: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "dim": 128,
    "n_layers": 3,
    "n_double_layers": 1,
    "n_heads": 4,
    "global_conddim": 128,
    "cond_seq_dim": 64,
    "max_seq": 256,
}
_LUMINA: dict[str, Any] = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 128,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 2,
    "cap_feat_dim": 64,
    "qk_norm": True,
    "axes_dims": [8, 12, 12],
    "axes_lens": [300, 512, 512],
}
ZIMAGE: dict[str, Any] = {
    **_LUMINA,
    "dim": 256,
    "n_kv_heads": 4,
    "axes_dims": [16, 24, 24],
    "z_image_modulation": True,
    "pad_tokens_multiple": 32,
}
_QWEN: dict[str, Any] = {
    "image_model": "qwen_image",
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "axes_dims_rope": (8, 12, 12),
}
WAN: dict[str, Any] = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "patch_size": (1, 2, 2),
    "text_len": 20,
    "in_dim": 16,
    "dim": 128,
    "ffn_dim": 128,
    "freq_dim": 64,
    "text_dim": 64,
    "out_dim": 16,
    "num_heads": 4,
    "num_layers": 2,
}
LTXV: dict[str, Any] = {
    "image_model": "ltxv",
    "in_channels": 128,
    "cross_attention_dim": 128,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "caption_channels": 64,
    "num_layers": 2,
}
_HIDREAM: dict[str, Any] = {
    "image_model": "hidream",
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "caption_channels": [64, 48],
    "text_emb_dim": 32,
    "num_routed_experts": 2,
    "num_activated_experts": 1,
    "axes_dims_rope": (32, 16, 16),
    "max_resolution": (64, 64),
    "llama_layers": [0, 1, 2, 3],
}
HUNYUAN_VIDEO: dict[str, Any] = {
    **FLUX,
    "image_model": "hunyuan_video",
    "theta": 256,
    "patch_size": [1, 2, 2],
}
COSMOS2: dict[str, Any] = {
    "image_model": "cosmos_predict2",
    "max_img_h": 60,
    "max_img_w": 60,
    "max_frames": 8,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "concat_padding_mask": True,
    "model_channels": 128,
    "num_blocks": 2,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "crossattn_emb_channels": 64,
    "pos_emb_cls": "rope3d",
    "pos_emb_interpolation": "crop",
    "use_adaln_lora": True,
    "adaln_lora_dim": 16,
    "rope_enable_fps_modulation": False,
}
_CASCADE: dict[str, Any] = {
    "stable_cascade_stage": "c",
    "c_in": 16,
    "c_out": 16,
    "c_r": 64,
    "patch_size": 1,
    "c_cond": 64,
    "c_hidden": [64, 64],
    "nhead": [4, 4],
    "blocks": [[1, 1], [1, 1]],
    "c_clip_text": 64,
    "c_clip_text_pooled": 32,
    "c_clip_img": 768,
    "c_clip_seq": 4,
    "dropout": [0.0, 0.0],
    "self_attn": True,
}
_OMNIGEN2: dict[str, Any] = {
    "image_model": "omnigen2",
    "patch_size": 2,
    "in_channels": 16,
    "hidden_size": 128,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "axes_dim_rope": (8, 12, 12),
    "axes_lens": (64, 64, 64),
    "text_feat_dim": 64,
}
_ERNIE: dict[str, Any] = {
    "image_model": "ernie",
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_layers": 2,
    "ffn_hidden_size": 128,
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "text_in_dim": 64,
    "rope_axes_dim": (8, 12, 12),
}
_KREA2: dict[str, Any] = {
    "image_model": "krea2",
    "features": 128,
    "heads": 4,
    "kvheads": 2,
    "layers": 2,
    "txtdim": 64,
    "txtheads": 2,
    "txtkvheads": 2,
    "channels": 16,
    "patch": 2,
    "tdim": 64,
    "multiplier": 2,
    "txtlayers": 1,
}

_FLUX2: dict[str, Any] = {
    **FLUX,
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "vec_in_dim": None,
    "axes_dim": [8, 8, 8, 8],
    "qkv_bias": False,
    "guidance_embed": False,
}
_LENS: dict[str, Any] = {
    "image_model": "lens",
    "in_channels": 128,
    "out_channels": 32,
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "enc_hidden_dim": 32,
    "axes_dims_rope": (8, 12, 12),
    "selected_layer_index": (0, 1),
}
_JOYIMAGE: dict[str, Any] = {
    "image_model": "joyimage",
    "hidden_size": 256,
    "num_attention_heads": 2,
    "text_dim": 64,
    "num_layers": 2,
}
_MAGE_FLOW: dict[str, Any] = {
    "image_model": "mage_flow",
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "axes_dims_rope": (8, 12, 12),
}
_BOOGU: dict[str, Any] = {
    "image_model": "boogu",
    "hidden_size": 128,
    "num_layers": 2,
    "num_double_stream_layers": 1,
    "num_refiner_layers": 1,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "axes_dim_rope": (8, 12, 12),
    "axes_lens": (64, 64, 64),
    "instruction_feat_dim": 64,
}
PIXELDIT: dict[str, Any] = {
    "image_model": "pixeldit_t2i",
    "num_groups": 4,
    "hidden_size": 128,
    "pixel_hidden_size": 8,
    "pixel_attn_hidden_size": 64,
    "pixel_num_groups": 2,
    "patch_depth": 2,
    "pixel_depth": 1,
    "patch_size": 4,
    "txt_embed_dim": 64,
    "txt_max_length": 16,
}
COGVIDEOX: dict[str, Any] = {
    "image_model": "cogvideox",
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "time_embed_dim": 64,
    "text_embed_dim": 64,
    "num_layers": 2,
    "sample_width": 12,
    "sample_height": 16,
    "sample_frames": 5,
    "patch_size": 2,
    "max_text_seq_length": 20,
    "use_rotary_positional_embeddings": True,
}
KANDINSKY5: dict[str, Any] = {
    "image_model": "kandinsky5",
    "in_text_dim": 64,
    "in_text_dim2": 32,
    "time_dim": 64,
    "model_dim": 128,
    "ff_dim": 128,
    "visual_embed_dim": 64,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (8, 12, 12),
}
_HUNYUAN_IMAGE: dict[str, Any] = {
    **HUNYUAN_VIDEO,
    "in_channels": 64,
    "out_channels": 64,
    "vec_in_dim": None,
    "patch_size": [1, 1],
    "axes_dim": [16, 16],
    "guidance_embed": False,
}
HUNYUAN_VIDEO15: dict[str, Any] = {
    **HUNYUAN_VIDEO,
    "in_channels": 65,
    "out_channels": 32,
    "vec_in_dim": None,
    "patch_size": [1, 1, 1],
    "guidance_embed": False,
}

UNET_MODULE = "modules.diffusionmodules.openaimodel"
HUNYUAN_VIDEO_OPTIONS = {
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}

_ALL = [
    Family("sd15", "SD15", UNET_MODULE, UNET, channels=4, tokens=77),
    Family(
        "sd2", "SD20", UNET_MODULE, {**UNET, "model_channels": 64, "use_linear_in_transformer": True}, channels=4, tokens=77,
        model_type="V_PREDICTION",
    ),
    Family("sdxl", "SDXL", UNET_MODULE, SDXL, channels=4, tokens=77, extras=pooled(32)),
    Family("svd", "SVD_img2vid", UNET_MODULE, SVD, channels=4, tokens=1, has_prompt=False),
    Family("sd3", "SD3", "modules.diffusionmodules.mmdit", _SD3, extras=pooled(32)),
    Family("sd35_medium", "SD3", "modules.diffusionmodules.mmdit", {**_SD3, "x_block_self_attn_layers": [0]}, extras=pooled(32)),
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
    Family("pixart", "PixArtAlpha", "pixart.pixartms", _PIXART, channels=4, size=(40, 28)),
    Family("hunyuan_dit", "HunyuanDiT", "hydit.models", _HYDIT, channels=4, tokens=77, extras=_hydit_extras),
    Family("auraflow", "AuraFlow", "aura.mmdit", _AURA, channels=4),
    Family("lumina2", "Lumina2", "lumina.model", _LUMINA, extras=_token_count),
    Family("z_image", "ZImage", "lumina.model", ZIMAGE),
    Family("qwen_image", "QwenImage", "qwen_image.model", _QWEN, frames=1),
    Family(
        "qwen_image_edit", "QwenImage", "qwen_image.model", _QWEN, frames=1,
        extras=lambda generator: {"reference_latents": [randn(generator, 1, 16, 1, 8, 12)]},
    ),
    Family("wan_t2v", "WAN21_T2V", "wan.model", WAN, frames=2),
    Family("wan_i2v", "WAN21_I2V", "wan.model", {**WAN, "model_type": "i2v", "in_dim": 36}, frames=2, extras=wan_i2v_extras),
    Family("ltxv", "LTXV", "lightricks.model", LTXV, channels=128, size=(8, 6), frames=2, extras=_ltxv_extras),
    Family(
        "hidream", "HiDream", "hidream.model", _HIDREAM, tokens=12,
        extras=lambda generator: {**pooled(32)(generator), "conditioning_llama3": randn(generator, 1, 4, 9, 48)},
    ),
    Family(
        "hunyuan_video", "HunyuanVideo", "hunyuan_video.model", HUNYUAN_VIDEO, frames=2, extras=pooled(32),
        optional=HUNYUAN_VIDEO_OPTIONS, parameters="hunyuan_video.model.HunyuanVideoParams",
    ),
    Family("cosmos_predict2", "CosmosT2IPredict2", "cosmos.predict2", COSMOS2, frames=1),
    Family(
        "cascade", "Stable_Cascade_C", "cascade.stage_c", _CASCADE, size=(8, 6),
        extras=lambda generator: {"pooled_output": randn(generator, 1, 1, 32)},
    ),
    Family("omnigen2", "Omnigen2", "omnigen.omnigen2", _OMNIGEN2, extras=_token_count),
    Family(
        "omnigen2_edit", "Omnigen2", "omnigen.omnigen2", _OMNIGEN2,
        extras=lambda generator: {**_token_count(generator), "reference_latents": [randn(generator, 1, 16, 8, 12)]},
    ),
    Family("ernie_image", "ErnieImage", "ernie.model", _ERNIE, channels=128, size=(8, 6)),
    Family("krea2", "Krea2", "krea2.model", _KREA2, frames=1),
    Family(
        "flux2", "Flux2", "flux.model", _FLUX2, channels=128, size=(8, 6), extras=pooled(32), optional={"txt_ids_dims": [3]},
        parameters="flux.model.FluxParams",
    ),
    Family("lens", "Lens", "lens.model", _LENS, channels=128, size=(8, 6)),
    Family("joyimage", "JoyImage", "joyimage.model", _JOYIMAGE, frames=1),
    Family(
        "joyimage_edit", "JoyImage", "joyimage.model", _JOYIMAGE, frames=1,
        extras=lambda generator: {"reference_latents": [randn(generator, 1, 16, 1, 8, 12)]},
    ),
    Family("mage_flow", "MageFlow", "mage_flow.model", _MAGE_FLOW, channels=128, size=(8, 6)),
    Family("boogu", "Boogu", "boogu.model", _BOOGU, extras=_token_count),
    Family("pixeldit", "PixelDiTT2I", "pixeldit.model", PIXELDIT, channels=3, size=(32, 24)),
    Family("cogvideox", "CogVideoX_T2V", "cogvideo.model", COGVIDEOX, frames=2),
    Family("kandinsky5", "Kandinsky5Image", "kandinsky5.model", KANDINSKY5, extras=pooled(32)),
    Family(
        "hunyuan_image", "HunyuanImage21", "hunyuan_video.model", _HUNYUAN_IMAGE, channels=64, size=(8, 6),
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
