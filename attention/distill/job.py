"""What a run is asked to do, checked before sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import host
from ..host import is_seamless, sampler_name
from ..networks.grids import layer_grid, resize_maps
from ..networks.layers import AttentionLayer
from ..networks.table import network_layout
from .published import distilled_layers, published
from .regions import MAX_LABELS, Regions, labels_of
from .settings import DistillSettings, Method
from .windows import Window, windows_of


@dataclass(frozen=True)
class DistillJob:
    """What one run of the node does, checked.

    Attributes:
        references, content: clean latents (n, channels, ...), as they come from the VAE.
        null_prompt: CONDITIONING of the empty prompt.
        windows: what of the latent is looked at together.
        regions: for each window.
    """

    settings: DistillSettings
    layers: list[AttentionLayer]
    iterations: int
    learning_rate: float
    references: Tensor
    null_prompt: Sequence[Any]
    windows: Sequence[Window]
    content: Tensor | None = None
    regions: Sequence[Regions] | None = None


def prepare(
    settings: DistillSettings,
    guider: Any,
    sampler: Any,
    latent: Tensor,
    reference: Tensor,
    null_prompt: Sequence[Any],
    content: Tensor | None = None,
    reference_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
) -> DistillJob:
    """Check everything that can go wrong before the model is loaded.

    Args:
        latent: (batch, channels, ..., height, width), what is sampled; the others are latents of the same model.
        reference_mask, target_mask: (n, height, width).

    Raises:
        ValueError: says which input is wrong, and what to do.
    """
    model = guider.model_patcher
    network = host.diffusion_model(model.model)
    layers = distilled_layers(network, settings.layers)
    iterations, rate = published(network, settings.method, flow=host.is_flow(model.model))
    if settings.method is Method.GUIDED:
        _check_sampler(sampler)
    if not null_prompt:
        raise ValueError('null_prompt is empty. Connect the encoding of an empty prompt (CLIP Text Encode with "").')
    if getattr(latent, "is_nested", False):
        raise ValueError(
            "latent_image holds several latents at once (video with sound), which cannot be distilled. Use an image."
        )
    reference = _fitting(reference, "reference", model)
    if content is not None:
        content = _fitting(content, "content", model)
        _check_content(content, latent)
    windows = _windows(settings, guider, latent)
    regions = None
    if (reference_mask is None) != (target_mask is None):
        missing = "target_mask" if target_mask is None else "reference_mask"
        raise ValueError(
            f"{missing} is not connected: labels say what of the image follows what of the reference, so connect both."
        )
    if reference_mask is not None and target_mask is not None:
        regions = _regions(network, layers, latent, windows, reference, reference_mask, target_mask)
    return DistillJob(
        settings,
        layers,
        settings.iterations or iterations,
        settings.learning_rate or rate,
        reference,
        null_prompt,
        windows,
        content,
        regions,
    )


def _check_sampler(sampler: Any) -> None:
    if host.hides_latent(sampler):
        raise ValueError(
            f"The sampler {sampler_name(sampler)} cannot be stopped after each step. Use euler (as published), heun, dpmpp_2m, "
            "or the method 'optimise', which needs no sampler."
        )


def _fitting(latent: Tensor, name: str, model: Any) -> Tensor:
    channels, dimensions = host.latent_channels(model)
    if host.packs_latents(model):
        raise ValueError(
            f"{type(model.model).__name__} packs its latents in another form than its VAE, so {name} cannot be compared with "
            "what it samples. Attention Distillation does not work with this model."
        )
    if dimensions == 3 and latent.ndim == 4:
        latent = latent.unsqueeze(2)
    if latent.ndim != dimensions + 2 or latent.shape[1] != channels:
        raise ValueError(
            f"{name} is a latent of shape {tuple(latent.shape)}, but this model's latents have {channels} channels and "
            f"{dimensions} dimensions. Encode the image with the VAE that belongs to the model."
        )
    if not bool(latent.isfinite().all()):
        raise ValueError(
            f"{name} holds values that are no numbers (NaN). Encode the image again, with the VAE in fp32 (--fp32-vae)."
        )
    return latent


def _check_content(content: Tensor, latent: Tensor) -> None:
    if content.shape[2:] != latent.shape[2:]:
        raise ValueError(
            f"content is {_size(content)} but latent_image is {_size(latent)} (in latent pixels). The content loss compares them "
            "place by place: scale the content image to the size of the latent, or connect content to latent_image as well."
        )
    if len(content) not in (1, len(latent)):
        raise ValueError(f"content holds {len(content)} images and latent_image {len(latent)}: use one, or as many.")


def _size(latent: Tensor) -> str:
    return f"{latent.shape[-1]} x {latent.shape[-2]}"


def _windows(settings: DistillSettings, guider: Any, latent: Tensor) -> list[Window]:
    ratio = host.pixels_per_latent(guider.model_patcher)
    side, stride = (max(round(pixels / ratio), 1) for pixels in (settings.window, settings.window_stride))
    height, width = latent.shape[-2:]
    found = windows_of(height, width, side if settings.window else 0, stride)
    if len(found) == 1:
        return found
    reason = host.needs_whole_latent(guider)
    if reason is not None:
        raise ValueError(f"window cannot be used with {reason}. Set window to 0, or use CFGGuider.")
    for name, where in host.LIMITS_OF_A_WINDOW.items():
        if any(name in cond for conds in host.prompts_of(guider) for cond in conds):
            raise ValueError(f"window cannot be used with {where}, made for the whole image. Set window to 0, or take it out.")
    if is_seamless(guider.model_patcher):
        raise ValueError(
            "window cannot be used with Seamless Tiling, which joins the edges of what the model sees. Set window to 0: a larger "
            "latent_image gives a larger seamless texture too."
        )
    return found


def _regions(
    network: torch.nn.Module,
    layers: Sequence[AttentionLayer],
    latent: Tensor,
    windows: Sequence[Window],
    reference: Tensor,
    of_reference: Tensor,
    of_target: Tensor,
) -> list[Regions]:
    layout = network_layout(network)
    if any(layer.kind != "self" for layer in layers):
        raise ValueError(
            f"reference_mask and target_mask need a model whose image tokens have an attention of their own (SD1.5, SD2, SDXL, "
            f"PixArt), and {type(network).__name__} mixes them with the text. Disconnect the masks."
        )
    for name, mask, images, whose in (
        ("reference_mask", of_reference, len(reference), "reference"),
        ("target_mask", of_target, len(latent), "latent_image"),
    ):
        if len(mask) not in (1, images):
            raise ValueError(f"{name} holds {len(mask)} masks, but {whose} holds {images} images: use one mask, or as many.")
    targets, references = labels_of(of_target), labels_of(of_reference).expand(len(reference), -1, -1)
    for name, labels in (("reference_mask", references), ("target_mask", targets)):
        count = len(labels.unique())
        if count > MAX_LABELS:
            raise ValueError(
                f"{name} has {count} different grey values, each of which would be a region of its own (at most {MAX_LABELS}). "
                "Draw it with hard edges and a few flat greys, and scale it with nearest-exact."
            )
    if not set(targets.unique().tolist()) & set(references.unique().tolist()):
        raise ValueError(
            f"reference_mask has the grey values {_greys(references)} and target_mask {_greys(targets)}: none is in both. Equal "
            "greys belong together, so paint each region of the image in the grey of the reference's region it follows."
        )
    grids = {}
    seen = windows[0].of(latent)
    for layer in layers:
        own, other = (layer_grid(network, layout, layer.name, tuple(each.shape)) for each in (seen, reference))
        if own is None or other is None:
            raise ValueError(f"reference_mask cannot be used: the places of {type(network).__name__}'s tokens are not known.")
        grids[layer.name] = (own, [other] * len(reference))
    if len(windows) == 1:
        return [Regions(targets, list(references), grids)]
    targets = resize_maps(targets, tuple(latent.shape[-2:]), "nearest")
    return [Regions(window.of(targets), list(references), grids) for window in windows]


def _greys(labels: Tensor) -> list[int]:
    return labels.unique().tolist()[:8]
