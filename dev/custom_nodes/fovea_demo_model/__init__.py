"""Teach ComfyUI's standard loaders the embedded model (in demos and tests only; users' ComfyUIs never see this).

One class in the list of supported models is enough: detection, sampling, text encoding and the VAE are ComfyUI's own.
"""

from __future__ import annotations

import comfy.latent_formats
import comfy.model_base
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from comfy import sd1_clip

from . import layout

NODE_CLASS_MAPPINGS: dict[str, type] = {}


class ScenesLatent(comfy.latent_formats.LatentFormat):
    """RGB in -1..1 at an eighth of the image: previews are exact."""

    latent_channels = layout.LATENT_CHANNELS
    spacial_downscale_ratio = layout.DOWNSCALE
    latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


class ScenesTextEncoder(sd1_clip.SDClipModel):
    """CLIP-L's layout, narrow and short."""

    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(
            device=device,
            dtype=dtype,
            model_options=model_options or {},
            textmodel_json_config=dict(layout.TEXT),
            return_projected_pooled=False,
        )


class ScenesClip(sd1_clip.SD1ClipModel):
    """ComfyUI's wrapper that runs the encoder on weighted tokens."""

    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=ScenesTextEncoder)


class FoveaScenes(comfy.supported_models_base.BASE):
    """The embedded model as ComfyUI's detection sees it."""

    unet_config = {
        **layout.UNET_DETECTED,
        "adm_in_channels": None,
        "use_linear_in_transformer": False,
        "use_temporal_attention": False,
    }
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
        table = torch.zeros(layout.TOKEN_COUNT, layout.TEXT_WIDTH, dtype=rows.dtype)
        table[ids.long()] = rows
        weights["clip_l.transformer.text_model.embeddings.token_embedding.weight"] = table
        # Nothing uses the pooled output, but a missing weight would stay uninitialised memory.
        weights["clip_l.transformer.text_projection.weight"] = torch.eye(layout.TEXT_WIDTH)
        return weights

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(sd1_clip.SD1Tokenizer, ScenesClip)


if not any(known.__name__ == FoveaScenes.__name__ for known in comfy.supported_models.models):
    comfy.supported_models.models.append(FoveaScenes)
