"""DiT's own sampler: DDPM with the variance that the network has learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

from .. import host
from .model import HostDiT
from .variance import VARIANCE, VarianceOfStep


def ddpm_step(x: Tensor, denoised: Tensor, v: Tensor, alpha_bar: Tensor, alpha_bar_next: Tensor, noise: Tensor | None) -> Tensor:
    """Return one ancestral step of DDPM with a learned variance (Nichol & Dhariwal, arXiv:2102.09672, equation 15).

    Args:
        x: the latent at this step, of variance one (the paper's x_t); denoised: the predicted x_0.
        v: (B, C, H, W), -1 is the smallest possible variance (of the posterior), 1 the largest (beta).
        alpha_bar, alpha_bar_next: cumulative products at this and the next (less noisy) step.
        noise: None in the last step.
    """
    alpha = alpha_bar / alpha_bar_next
    beta = 1 - alpha
    mean = (beta * alpha_bar_next.sqrt() * denoised + (1 - alpha_bar_next) * alpha.sqrt() * x) / (1 - alpha_bar)
    if noise is None:
        return mean
    posterior = beta * (1 - alpha_bar_next) / (1 - alpha_bar)
    share = (v + 1) / 2
    return mean + torch.exp((share * beta.log() + (1 - share) * posterior.log()) / 2) * noise


@torch.no_grad()
def sample_ddpm(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: bool | None = None,
    noise_sampler: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Sample with the learned variance, in the form of ComfyUI's sampler functions.

    Latents are in sigma units, x_t * sqrt(1 + sigma^2), (B, C, H, W).

    Raises:
        ValueError: the model has no learned variance, or another node hides it; or sigmas rise.
    """
    extra_args = extra_args or {}
    _check_learns_variance(model.inner_model.inner_model)
    sigmas = torch.unique_consecutive(sigmas)  # a step between equal sigmas changes nothing, and its log variance is infinite
    _check_falling(sigmas)
    noise_sampler = noise_sampler or host.default_noise_sampler(x, seed=extra_args.get("seed"))
    options = extra_args.get("model_options", {})
    ones = x.new_ones([x.shape[0]])
    v = None
    for i in trange(len(sigmas) - 1, disable=disable):
        step = VarianceOfStep()
        watched = {**options, "transformer_options": {**options.get("transformer_options", {}), VARIANCE: step}}
        denoised = model(x, sigmas[i] * ones, **{**extra_args, "model_options": watched})
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        predicted = step.of_positive(x)
        v = v if predicted is None else predicted  # a node that caches the network's output repeats its last word
        if v is None:
            raise ValueError(
                "another node computes this model's output, so DiT's ddpm sampler cannot see the variance. Use ddim."
            )
        alpha_bar, alpha_bar_next = (1 / (1 + sigmas[j].cpu().double() ** 2) for j in (i, i + 1))
        noise = noise_sampler(sigmas[i], sigmas[i + 1]) if sigmas[i + 1] > 0 else None
        x = ddpm_step(x * alpha_bar.sqrt(), denoised, v, alpha_bar, alpha_bar_next, noise) / alpha_bar_next.sqrt()
    return x


def _check_learns_variance(model: Any) -> None:
    network = getattr(model, "diffusion_model", None)
    network = getattr(network, "_orig_mod", network)
    if not isinstance(network, HostDiT):
        raise ValueError(
            f"DiT's ddpm sampler works with models from Load DiT, not with {type(model).__name__}. Use ComfyUI's ddpm."
        )
    if network.flows:
        raise ValueError(
            "This model predicts velocity (SiT), so there is no variance for DiT's ddpm sampler. Use euler or dpmpp_2m."
        )
    if not network.learns_variance:
        raise ValueError("This DiT was trained without a learned variance. Use ComfyUI's ddpm sampler, or ddim.")


def _check_falling(sigmas: Tensor) -> None:
    rises = (sigmas[1:] > sigmas[:-1]).nonzero().flatten().tolist()
    if rises:
        low, high = sigmas[rises[0]], sigmas[rises[0] + 1]
        raise ValueError(
            f"DiT's ddpm sampler goes from noise to image, and these sigmas rise from {low:.4g} to {high:.4g}. Remove the node "
            "that turns them around (FlipSigmas), or use ddim."
        )


def dit_sampler() -> Any:
    """Return the SAMPLER."""
    return host.own_sampler(sample_ddpm)
