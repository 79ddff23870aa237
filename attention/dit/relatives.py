"""What a file that is no DiT of the paper's seems to be, and what loads it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .reading import WHERE_ELSE

_NOBODY = "ComfyUI has no node that computes it"

# Of changed DiTs, by parameters that the paper's does not have: pattern -> what it is. The first that is found counts.
_RELATIVES = (
    (r"\.base_layer\.|\.lora_[AB]\.", "a DiT with a LoRA still in it (PEFT). Merge the LoRA into the weights before saving "
     "(merge_and_unload), or save it as a file of its own and load that with LoraLoaderModelOnly"),
    (r"(^|\.)(moe|experts|shared_experts)\.|\.gate\.wg", f"a mixture of experts (DiT-MoE); {_NOBODY}"),
    (r"(^|\.)mask_token$|(^|\.)(en_inblocks|en_outblocks|de_blocks|sideblocks)\.|decoder_pos_embed|rel_pos_bias",
     f"MDT or MaskDiT; {_NOBODY}"),
    (r"(^|\.)(in_blocks|mid_block|out_blocks)\.\d*\.?.*attn|(^|\.)skip_linear\.|decoder_pred\.", f"U-ViT; {_NOBODY}"),
    (r"omega_embedder\.", f"a DiT with guidance as an input (GFT); {_NOBODY}"),
    (r"feat_rope\.|\.mlp\.w12\.|\.mlp\.w3\.", f"LightningDiT, FiT or another DiT with SwiGLU or rotary positions; {_NOBODY}"),
    (r"rel_pos_embed|freqs_(cis|cos|sin)|rope", f"FiT or another DiT with rotary positions; {_NOBODY}"),
    (r"\.(q|k)_norm\.|\.norm[12]\.weight$", f"a DiT with other norms (query and key norms, RMSNorm); {_NOBODY}"),
    (r"\.mixer\.|\.(A_log|dt_proj|x_proj)", f"a state-space model (DiM, Mamba); {_NOBODY}"),
)  # fmt: skip

# Of other models, by any parameter -> what it is, and what loads it if not the nodes that every message names.
_OTHERS = (
    (r"lora_(down|up|A|B|unet|te)|\.lora\.|\.hada_w|\.lokr_w", "a LoRA. Load its model here, then it with LoraLoaderModelOnly"),
    (r"^control_model\.|controlnet_|zero_convs\.|^input_hint_block", "a ControlNet. Load it with Load ControlNet Model"),
    (r"^model\.diffusion_model\.(input|output)_blocks\.", "a Stable Diffusion checkpoint"),
    (r"(^|\.)input_blocks\.|^down_blocks\.\d+\.(resnets|attentions)\.", "a Stable Diffusion U-Net"),
    (r"(^|\.)joint_blocks\.", "Stable Diffusion 3"),
    (r"(^|\.)double_blocks\.\d+\.img_attn", "Flux, HunyuanVideo or a relative of theirs"),
    (r"(^|\.)transformer_blocks\.\d+\.(img_mod|attn\.add_q_proj)", "Qwen-Image, Flux or SD3 in diffusers' layout"),
    (r"y_embedder\.y_proj|(^|\.)adaln_single\.|(^|\.)caption_projection", "PixArt, which takes text"),
    (r"(^|\.)(style_embedder|mlp_t5|text_embedding_padding)", "HunyuanDiT, which takes text"),
    (r"(^|\.)blocks\.\d+\.cross_attn\.k_img|(^|\.)blocks\.\d+\.modulation$", "Wan"),
    (r"(^|\.)(en_inblocks|en_outblocks|de_blocks|sideblocks)\.|(^|\.)mask_token$",
     f"MDT or MaskDiT, a relative of DiT; {_NOBODY}"),
    (r"(^|\.)(in_blocks|out_blocks)\.\d+\.attn|(^|\.)mid_block\.attn\.(qkv|proj)", f"U-ViT, a relative of DiT; {_NOBODY}"),
    (r"(^|\.)x_embedder\.proj[12]\.", f"JiT, a relative of DiT on pixels; {_NOBODY}"),
    (r"^(first_stage_model\.)?(decoder|encoder)\.(conv_in|mid|up|down|up_blocks|mid_block)\b", "a VAE. Load it with Load VAE"),
    (r"text_model\.|^transformer\.resblocks\.", "a CLIP model. Load it with Load CLIP"),
    (r"^shared\.weight|encoder\.block\.\d+\.layer\.", "a T5 text encoder. Load it with Load CLIP"),
    (r"^model\.layers\.\d+\.self_attn", "a language model"),
    (r"(^|\.)x_embedder\.", "another transformer (it takes text or other inputs)"),
)  # fmt: skip


def not_a_dit(names: Iterable[str], file: str) -> ValueError:
    """Return the error for a file without a DiT's first layer."""
    return ValueError(f"{file} is not a DiT: it seems to be {_other(list(names))}. {WHERE_ELSE}")


def changed_dit(foreign: Iterable[str], file: str) -> ValueError:
    """Return the error for a file with a DiT's first layer and layers that the paper's DiT does not have.

    Args:
        foreign: names of what does not belong to the paper's network.
    """
    names = list(foreign)
    for pattern, what in _RELATIVES:
        found = next((name for name in names if re.search(pattern, name)), None)
        if found is not None:
            ordered = [found, *(name for name in names if name != found)]
            return ValueError(
                f"{file} is a changed DiT that Load DiT does not support: it also has {some(ordered)}. It seems to be {what}."
            )
    return ValueError(f"{file} is a changed DiT that Load DiT does not support: it also has {some(names)}.")


def incomplete(missing: list[str], file: str) -> ValueError:
    """Return the error for a file in which only some layers are missing."""
    return ValueError(f"{file} is incomplete: {some(missing)} missing. Copy the file again from its source.")


def some(names: list[str]) -> str:
    """Return the first name and the number of the others."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _other(names: list[str]) -> str:
    for pattern, what in _OTHERS:
        if any(re.search(pattern, name) for name in names):
            return what
    return f"an unknown kind of model (its first weight is '{names[0]}')" if names else "a file without weights"
