"""Sampling runs: guiders, samplers, latents and noise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.model_sampling
import comfy.ops
import comfy.patcher_extension
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from .stack import on_one_stack


def combines_as_cfg(guider: Any) -> bool:
    """Return True where the guider mixes exactly [positive, negative] as classifier-free guidance does."""
    return type(guider).predict_noise is comfy.samplers.CFGGuider.predict_noise


def input_scale(base_model: Any, sigma: torch.Tensor) -> torch.Tensor:
    """Return the scale (batch, 1, ...) from a sampler's latent to the network's own input, z = x * scale.

    z is variance preserving for eps and v models; the scale is 1 for flow models.
    """
    return base_model.model_sampling.calculate_input(sigma, torch.ones_like(sigma))


CFGGuider = comfy.samplers.CFGGuider
default_noise_sampler = comfy.k_diffusion.sampling.default_noise_sampler


def sample(
    guider: Any, noise: Any, sampler: Any, sigmas: torch.Tensor, latent: Mapping[str, Any], on_step: Callable[..., None]
) -> torch.Tensor:
    """Do what SamplerCustomAdvanced does, with ``on_step(step, denoised, x, steps)`` in place of its progress bar."""
    samples = guider.sample(
        noise.generate_noise(latent), latent["samples"], sampler, sigmas, denoise_mask=latent.get("noise_mask"),
        callback=on_step, disable_pbar=True, seed=noise.seed,
    )  # fmt: skip
    return samples.to(comfy.model_management.intermediate_device())


def sample_plainly(
    guider: Any, noise: Any, sampler: Any, sigmas: torch.Tensor, latent: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run ComfyUI's SamplerCustomAdvanced and return its two latents."""
    from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced

    output, denoised = SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).args
    return output, denoised


def fitting_latent(model: ModelPatcher, latent: Mapping[str, Any]) -> dict[str, Any]:
    """Return a latent that fits the model: an empty one with its channels, one of an image with the frames of a video model."""
    sizes = [latent[name] for name in ("downscale_ratio_spacial", "downscale_ratio_temporal") if name in latent]
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"], *sizes)
    kept = {name: value for name, value in latent.items() if not name.startswith("downscale_ratio")}
    return {**kept, "samples": samples}


def latent_channels(model: ModelPatcher) -> tuple[int, int]:
    """Return the channels of the model's latents, and their dimensions: 2 for images, 3 for video, 1 for sound."""
    latent_format = model.get_model_object("latent_format")
    return latent_format.latent_channels, latent_format.latent_dimensions


def pixels_per_latent(model: ModelPatcher) -> int:
    """Return the side in image pixels of one latent pixel. (0.3.75 does not say: 8 for all that this pack can name.)"""
    return int(getattr(model.get_model_object("latent_format"), "spacial_downscale_ratio", 8))


# Frames of a video in one latent frame, where a latent format of 0.3.75 does not say; all others that this pack can name have 4.
_LONG_FRAMES = {"LTXV": 8, "LTXAV": 8, "Mochi": 6, "Cosmos1CV8x8x8": 8}


def frames_per_latent(model: ModelPatcher) -> int:
    """Return the frames of the video that one latent frame after the first stands for."""
    latent_format = model.get_model_object("latent_format")
    known = _LONG_FRAMES.get(type(latent_format).__name__, 4)
    ratio = getattr(latent_format, "temporal_downscale_ratio", known)
    return int(ratio) if isinstance(ratio, (int, float)) and ratio > 1 else known


def packs_latents(model: ModelPatcher) -> bool:
    """Return whether the model samples latents of another shape than its VAE's (HunyuanImage's refiner)."""
    channels, dimensions = latent_channels(model)
    latent = torch.zeros(1, channels, *(1,) * dimensions)
    return model.get_model_object("latent_format").process_in(latent).shape != latent.shape


def own_sampler(function: Callable[..., torch.Tensor], like: Any = None) -> Any:
    """Return a SAMPLER whose loop is ``function(model, x, sigmas, extra_args, callback, disable, **options)``.

    Args:
        like: another SAMPLER whose options it takes over.
    """
    options = ({}, {}) if like is None else (like.extra_options, like.inpaint_options)

    @functools.wraps(function)
    def sample(*args: Any, **kwargs: Any) -> torch.Tensor:
        return on_one_stack(function, *args, **kwargs)

    return comfy.samplers.KSAMPLER(sample, *options)


def is_k_sampler(sampler: Any) -> bool:
    """Return whether a SAMPLER is one of the usual loops over sigmas."""
    return isinstance(sampler, comfy.samplers.KSAMPLER)


def denoise_mask(model: Any, call: Mapping[str, Any], sigma: torch.Tensor) -> torch.Tensor | None:
    """Return the part of the latent that a sampler may change at ``sigma`` (batch,); None: everything.

    Args:
        model: what a sampler's function is given; ``call`` its ``extra_args``.
    """
    mask = call.get("denoise_mask")
    function = call["model_options"].get("denoise_mask_function")
    if mask is None or function is None:
        return mask
    return function(sigma, mask, extra_options={"model": model.inner_model, "sigmas": model.sigmas})


def is_flow(base_model: Any) -> bool:
    """Return whether latents are mixed as (1 - sigma) * image + sigma * noise, so that sigma 0 is a time the model knows."""
    return isinstance(base_model.model_sampling, comfy.model_sampling.CONST)


def sigma_at_share(guider: Any, share: float) -> float:
    """Return the sigma at a share (0 to 1) of a guider's whole noise schedule, as ComfyUI's start_percent counts it."""
    return float(guider.model_patcher.get_model_object("model_sampling").percent_to_sigma(share))


def smallest_sigma(base_model: Any) -> float:
    return float(base_model.model_sampling.sigma_min)


def noised(base_model: Any, latent: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
    """Return a clean latent as the sampler would have it at ``sigma``."""
    level = latent.new_full((len(latent),), sigma, dtype=torch.float32)
    return base_model.model_sampling.noise_scaling(level, noise, latent)


def schedule_key(base_model: Any, sigma: float) -> tuple[float, float]:
    """Return how the model reads a sigma: the time it is told, and the scale of its input."""
    level = torch.tensor([sigma])
    sampling = base_model.model_sampling
    on_device = level.to(sampling.sigma_max.device) if isinstance(sampling.sigma_max, torch.Tensor) else level
    return float(sampling.timestep(on_device)), float(input_scale(base_model, level))


# On a guider or a technique: why the latent must be evaluated whole, "Attend-and-Excite, which ...".
WHOLE_LATENT = "fovea_whole_latent"


def needs_whole_latent(guider: Any) -> str | None:
    """Return why a guider's latent must not be cut into windows, for itself or for what its MODEL carries; None where it may."""
    wrappers = guider.model_patcher.get_all_wrappers(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE)
    owners = [guider, *(getattr(wrapper, "__self__", None) for wrapper in wrappers)]
    return next((reason for owner in owners if (reason := getattr(owner, WHOLE_LATENT, None))), None)
