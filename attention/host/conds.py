"""Conds: what a prompt carries, where it acts, and the form in which a model call needs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import comfy.model_management
import comfy.model_sampling
import comfy.ops
import comfy.patcher_extension
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch

# In a conditioning of DiT Class Label: (n,) int64, one class for each image of the batch; below 0: no class.
CLASS_LABELS = "fovea_class_labels"


def cond_region(cond: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
    """Return the part of ``x`` that a cond with an area works on, as a view."""
    area: Sequence[int] = cond.get("area") or ()
    for dimension in range(len(area) // 2):
        start = area[len(area) // 2 + dimension]
        x = x.narrow(dimension + 2, start, min(x.shape[dimension + 2] - start, area[dimension]))
    return x


def cond_mask(cond: Mapping[str, Any]) -> torch.Tensor | None:
    """Return where a running guider's cond acts in its area, (1 or batch, height, width), of a video the mean over its frames.

    None: everywhere.
    """
    mask: torch.Tensor | None = cond.get("mask")
    return None if mask is None else cond_region(cond, mask[:, None]).float().flatten(1, -3).mean(1)


def is_active(cond: Mapping[str, Any], sigma: float) -> bool:
    """Return whether a running guider's cond acts at ``sigma``: its timestep range, if it has one, holds it."""
    start, end = cond.get("timestep_start"), cond.get("timestep_end")
    return (start is None or sigma <= start) and (end is None or sigma >= end)


# What a prompt may carry that makes it act somewhere, sometime or through another network only.
_LIMITS_OF_A_PROMPT = (
    "area", "strength", "mask", "mask_strength", "set_area_to_bounds", "start_percent", "end_percent", "timestep_start",
    "timestep_end", "control", "control_apply_to_uncond", "gligen", "hooks", "default",
)  # fmt: skip

# Of these, what cannot be cut into windows, and its name for users.
LIMITS_OF_A_WINDOW = {"gligen": "GLIGEN"}


def prompts_of(guider: Any) -> list[Sequence[Mapping[str, Any]]]:
    """Return the prompts of a guider before it samples: for each kind (positive, negative, ...) the list of its conds."""
    return list(getattr(guider, "original_conds", {}).values())


def limited_prompts(guider: Any) -> bool:
    """Return whether a prompt of a running guider is for a part of the image, or its ControlNet's image is of the whole."""
    limits = ("area", "mask", "control")
    return any(cond.get(name) is not None for conds in guider.conds.values() for cond in conds for name in limits)


@contextmanager
def prompts_by_area(guider: Any, areas: Sequence[tuple[int, ...]]) -> Iterator[None]:
    """Let every prompt of a running guider act in each of the areas (sizes, then starts), which ComfyUI then averages."""
    before = guider.conds
    guider.conds = {
        name: [{**cond, "area": area, "uuid": uuid4()} for cond in conds for area in areas] for name, conds in before.items()
    }
    try:
        yield
    finally:
        guider.conds = before


def prompt_everywhere(conditioning: Sequence[Any], **defaults: Any) -> dict[str, Any]:
    """Return the first prompt of a CONDITIONING, for the whole image and the whole run, without ControlNet.

    Args:
        defaults: what it carries where it does not say otherwise itself.
    """
    cond = comfy.sampler_helpers.convert_cond(conditioning[:1])[0]
    return {**defaults, **{name: value for name, value in cond.items() if name not in _LIMITS_OF_A_PROMPT}}


def processed_cond(
    base_model: Any, cond: dict[str, Any], like: torch.Tensor, seed: int | None, latent_image: torch.Tensor, mask: Any = None
) -> dict[str, Any]:
    """Return a prompt as model calls on latents of the size of ``like`` need it."""
    conds = {"negative": [cond]}
    shapes = [tuple(like.shape)]
    done = comfy.samplers.process_conds(base_model, like, conds, like.device, latent_image, mask, seed, latent_shapes=shapes)
    return done["negative"][0]


def cond_values(cond: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the network is given of a processed prompt: tensors, lists of them, and plain values."""
    return {name: value.cond for name, value in sorted(cond["model_conds"].items())}


def text_widths(guider: Any) -> dict[str, int]:
    """Return how many values a model's prompts have for each token ("context") and as a whole ("pooled"), as far as is known.

    A U-Net says it itself; of other networks the guider's own prompts are asked.
    """
    config = getattr(getattr(guider.model_patcher.model, "model_config", None), "unet_config", {})
    found = {name: width for name, key in (("context", "context_dim"),) if isinstance(width := config.get(key), int)}
    for conds in prompts_of(guider):
        for cond in conds:
            for name, key in (("context", "cross_attn"), ("pooled", "pooled_output")):
                value = cond.get(key)
                if isinstance(value, torch.Tensor) and value.ndim:
                    found.setdefault(name, value.shape[-1])
    return found
