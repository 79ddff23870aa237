"""Teach ComfyUI's standard loaders the demo models (in demos and tests only; users' ComfyUIs never see this).

One class for each in the list of supported models is enough: detection, sampling, text encoding and the VAE are ComfyUI's own.
"""

from __future__ import annotations

from types import ModuleType

import comfy.latent_formats
import comfy.model_base
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from comfy import sd1_clip

from . import emoji_layout, layout

NODE_CLASS_MAPPINGS: dict[str, type] = {}


class ScenesLatent(comfy.latent_formats.LatentFormat):
    """RGB in -1..1 at an eighth of the image: previews are exact."""

    latent_channels = layout.LATENT_CHANNELS
    spacial_downscale_ratio = layout.DOWNSCALE
    latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


class EmojiLatent(comfy.latent_formats.LatentFormat):
    """Four trained channels at an eighth of the image; there is no linear preview of them."""

    latent_channels = emoji_layout.LATENT_CHANNELS
    spacial_downscale_ratio = emoji_layout.DOWNSCALE


class ScenesTextEncoder(sd1_clip.SDClipModel):
    """CLIP-L's layout, narrow and short."""

    sizes: ModuleType = layout

    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(
            device=device,
            dtype=dtype,
            model_options=model_options or {},
            textmodel_json_config=dict(self.sizes.TEXT),
            return_projected_pooled=False,
        )


class EmojiTextEncoder(ScenesTextEncoder):
    """The same, wider and deeper."""

    sizes = emoji_layout


class ScenesClip(sd1_clip.SD1ClipModel):
    """ComfyUI's wrapper that runs the encoder on weighted tokens."""

    encoder: type[ScenesTextEncoder] = ScenesTextEncoder

    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=self.encoder)


class EmojiClip(ScenesClip):
    """The same for the wider encoder."""

    encoder = EmojiTextEncoder


def unet_config(sizes: ModuleType) -> dict:
    """Return what ComfyUI's detection must find in the weights."""
    return {
        **sizes.UNET_DETECTED,
        "adm_in_channels": None,
        "use_linear_in_transformer": False,
        "use_temporal_attention": False,
    }


class FoveaScenes(comfy.supported_models_base.BASE):
    """The model of coloured shapes as ComfyUI's detection sees it."""

    sizes: ModuleType = layout
    clip: type[ScenesClip] = ScenesClip
    unet_config = unet_config(layout)
    unet_extra_config = layout.UNET_DECLARED
    sampling_settings = {"beta_schedule": "linear", "linear_start": layout.BETA_START, "linear_end": layout.BETA_END}
    latent_format = ScenesLatent
    memory_usage_factor = 1.0

    def inpaint_model(self) -> bool:
        return False

    def model_type(self, state_dict, prefix=""):
        return comfy.model_base.ModelType.V_PREDICTION

    def process_clip_state_dict(self, state_dict):
        """Rename to ComfyUI's keys and spread the stored token rows over an otherwise empty table."""
        weights = comfy.utils.state_dict_prefix_replace(state_dict, {"cond_stage_model.": "clip_l."}, filter_keys=True)
        ids, rows = weights.pop("clip_l.vocab_ids"), weights.pop("clip_l.vocab_rows")
        table = torch.zeros(self.sizes.TOKEN_COUNT, self.sizes.TEXT_WIDTH, dtype=rows.dtype)
        table[ids.long()] = rows
        weights["clip_l.transformer.text_model.embeddings.token_embedding.weight"] = table
        # Nothing uses the pooled output, but a missing weight would stay uninitialised memory.
        weights["clip_l.transformer.text_projection.weight"] = torch.eye(self.sizes.TEXT_WIDTH)
        return weights

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(sd1_clip.SD1Tokenizer, self.clip)


class FoveaEmoji(FoveaScenes):
    """The model of animals and things."""

    sizes = emoji_layout
    clip = EmojiClip
    unet_config = unet_config(emoji_layout)
    unet_extra_config = emoji_layout.UNET_DECLARED
    sampling_settings = {"beta_schedule": "linear", "linear_start": emoji_layout.BETA_START, "linear_end": emoji_layout.BETA_END}
    latent_format = EmojiLatent


for known in (FoveaScenes, FoveaEmoji):
    if not any(other.__name__ == known.__name__ for other in comfy.supported_models.models):
        comfy.supported_models.models.append(known)
