"""What a run is asked to do, checked before sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import host
from ..networks.grids import layer_grid, resize_maps
from ..networks.layers import AttentionLayer
from ..networks.table import network_layout
from .inputs import check_content, check_null_prompt, check_reference, chosen, fitting, weights_of
from .masks import mask_images, matching_labels, part_of
from .published import distilled_layers, published
from .regions import Regions, token_labels
from .settings import DistillSettings, Method
from .windows import NO_EDGES, Window, windows_of

# A reference with more pixels than this many images makes every step clearly slower.
_LARGE_REFERENCE = 4


@dataclass(frozen=True)
class DistillJob:
    """What one run of the node does, checked.

    Attributes:
        model: the MODEL that is sampled: the guider's, or one whose windows do not join the edges that the image does.
        references, content: clean latents (n, channels, ...), as they come from the VAE.
        reference_weights: how much each reference counts.
        reference_part: (1 or n, height, width), bool: what of the references the image follows; None: everything.
        null_prompt: CONDITIONING of the empty prompt.
        windows: parts of the latent that go through the model separately.
        circular: whether windows go over the edges of the image.
        regions: for each window.
        costs: what will take long, for the log before sampling; notes: how inputs were changed, for the log and the report.
    """

    settings: DistillSettings
    model: Any
    layers: list[AttentionLayer]
    iterations: int
    learning_rate: float
    references: Tensor
    reference_weights: Sequence[float]
    null_prompt: Sequence[Any]
    windows: Sequence[Window]
    circular: bool = False
    content: Tensor | None = None
    reference_part: Tensor | None = None
    regions: Sequence[Regions] | None = None
    costs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def weights_of_pixels(self) -> list[Tensor] | None:
        """Return how much each pixel of each reference counts, (1, 1, ...) as large as it; None: all alike."""
        if self.reference_part is None and len(set(self.reference_weights)) == 1:
            return None
        size = self.references.shape[-2:]
        found = torch.tensor(self.reference_weights).view(-1, 1, 1).expand(-1, *size)
        if self.reference_part is not None:
            found = found * resize_maps(self.reference_part.float(), size, "area")
        places = self.references.shape[2:]
        return [each.expand(places)[None, None] for each in found]


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
    reference_weights: str = "",
) -> DistillJob:
    """Check everything that can go wrong before the model is loaded.

    Args:
        latent: (batch, channels, ..., height, width), what is sampled; the others are latents of the same model.
        reference_mask, target_mask: (n, height, width), or another form of MASK.
        reference_weights: numbers with commas between them.

    Raises:
        ValueError: says which input is wrong, and what to do.
    """
    model = guider.model_patcher
    network = host.diffusion_model(model.model)
    layers = distilled_layers(network, settings.layers)
    iterations, rate = published(network, settings.method, flow=host.is_flow(model.model))
    if settings.method is Method.GUIDED:
        _check_sampler(sampler)
    check_null_prompt(null_prompt, guider)
    reference = fitting(reference, "reference", model)
    check_reference(reference, host.pixels_per_latent(model))
    if content is not None:
        content = fitting(content, "content", model)
        check_content(content, latent)
    windows, model = _windows(settings, guider, network, latent)
    weights = weights_of(reference_weights, len(reference))
    keep = [weight > 0 for weight in weights]
    masks = _masks(network, layers, latent, reference, reference_mask, target_mask)
    reference = chosen(reference, keep)
    part, regions, notes = None, None, []
    if masks:
        of_reference, of_target = chosen(masks[0], keep), masks[1]
        if of_target is None:
            part = part_of(of_reference)
            labels = part.long().expand(len(reference), -1, -1)
            regions = _regions(network, layers, latent, windows, reference, labels, torch.ones(1, 1, 1, dtype=torch.long))
            _check_part(layers, regions[0])
        else:
            matched = matching_labels(of_reference, of_target)
            notes = matched.notes
            labels = matched.reference.expand(len(reference), -1, -1)
            regions = _regions(network, layers, latent, windows, reference, labels, matched.target)
    return DistillJob(
        settings,
        model,
        layers,
        settings.iterations or iterations,
        settings.learning_rate or rate,
        reference,
        chosen(weights, keep),
        null_prompt,
        windows,
        model is not guider.model_patcher,
        content,
        part,
        regions,
        _costs(reference, windows[0].of(latent)),
        notes,
    )


def _check_sampler(sampler: Any) -> None:
    if host.hides_latent(sampler):
        raise ValueError(
            f"The sampler {host.sampler_name(sampler)} cannot be stopped after each step. Use euler (as published), heun, "
            "dpmpp_2m, or the method 'optimise', which needs no sampler."
        )


def _costs(reference: Tensor, seen: Tensor) -> list[str]:
    times = reference.shape[-1] * reference.shape[-2] / (seen.shape[-1] * seen.shape[-2])
    if times <= _LARGE_REFERENCE:
        return []
    return [
        f"the reference is large, {reference.shape[-1]} x {reference.shape[-2]} latent pixels, {times:.0f} times as many as the "
        f"model sees of the image at once ({seen.shape[-1]} x {seen.shape[-2]}). Every step takes several times as long as with "
        "a reference of the image's size: scale it down before VAE Encode"
    ]


def _windows(settings: DistillSettings, guider: Any, network: torch.nn.Module, latent: Tensor) -> tuple[list[Window], Any]:
    """Return the windows of a latent, and the MODEL that goes through them.

    Windows go over the edges that a seamless MODEL joins. In a window, which is a part of the image, nothing is joined.
    """
    model = guider.model_patcher
    ratio = host.pixels_per_latent(model)
    side, stride = (max(round(pixels / ratio), 1) for pixels in (settings.window, settings.window_stride))
    height, width = latent.shape[-2:]
    side = side if settings.window else 0
    joined = host.joined_edges(model, network) if side and side < max(height, width) else NO_EDGES
    found = windows_of(height, width, side, stride, joined)
    if len(found) == 1:
        return found, model
    reason = host.needs_whole_latent(guider)
    if reason is not None:
        raise ValueError(f"window cannot be used with {reason}. Set window to 0, or use CFGGuider.")
    for name, where in host.LIMITS_OF_A_WINDOW.items():
        if any(name in cond for conds in host.prompts_of(guider) for cond in conds):
            raise ValueError(f"window cannot be used with {where}, made for the whole image. Set window to 0, or take it out.")
    if not any(joined):
        return found, model
    if any(host.joined_edges(host.join_edges(model, network, NO_EDGES), network)):
        raise ValueError(
            "window cannot be used with another node's tiling, which would join the edges of every window too. Use Seamless "
            "Tiling in its place, or set window to 0."
        )
    whole = host.Edges(joined.top_bottom and side >= height, joined.left_right and side >= width)
    return found, host.join_edges(model, network, whole)


def _masks(
    network: torch.nn.Module,
    layers: Sequence[AttentionLayer],
    latent: Tensor,
    reference: Tensor,
    reference_mask: Tensor | None,
    target_mask: Tensor | None,
) -> tuple[Tensor, Tensor | None] | None:
    """Return the masks of reference and target as (n, height, width); the second is None where there is only the first."""
    if reference_mask is None and target_mask is None:
        return None
    if reference_mask is None:
        raise ValueError(
            "reference_mask is not connected: labels say what of the image follows what of the reference, so connect both. "
            "(reference_mask alone limits what of the reference is followed.)"
        )
    if any(layer.kind != "self" for layer in layers):
        raise ValueError(
            f"reference_mask and target_mask need a model whose image tokens have an attention of their own (SD1.5, SD2, SDXL, "
            f"PixArt), and {type(network).__name__} mixes them with the text. Disconnect the masks."
        )
    found = []
    for name, mask, images, whose in (
        ("reference_mask", reference_mask, len(reference), "reference"),
        ("target_mask", target_mask, len(latent), "latent_image"),
    ):
        if mask is None:
            continue
        mask = mask_images(mask, name)
        if len(mask) not in (1, images):
            raise ValueError(f"{name} holds {len(mask)} masks, but {whose} holds {images} images: use one mask, or as many.")
        found.append(mask)
    return found[0], found[1] if len(found) > 1 else None


def _regions(
    network: torch.nn.Module,
    layers: Sequence[AttentionLayer],
    latent: Tensor,
    windows: Sequence[Window],
    reference: Tensor,
    references: Tensor,
    targets: Tensor,
) -> list[Regions]:
    """Return the regions of each window.

    Args:
        references, targets: labels (n, height, width).
    """
    layout = network_layout(network)
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


def _check_part(layers: Sequence[AttentionLayer], regions: Regions) -> None:
    for layer in layers:
        others = regions.grids[layer.name][1]
        if not any(bool(token_labels(labels, grid).any()) for labels, grid in zip(regions.references, others, strict=True)):
            raise ValueError(
                f"reference_mask marks so little of the reference that no token of layer {layer.name} is in it. Paint more of it "
                "white, or use a larger reference."
            )
