"""What a run is asked to do, checked before sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import host
from ..networks.grids import resize_maps
from ..networks.layers import AttentionLayer
from .inputs import References, check_content, check_null_prompt, fitting, reference_latents, weights_of
from .masks import marks_of
from .published import distilled_layers, published
from .regions import Regions, regions_of
from .settings import DistillSettings, Method
from .windows import Window, windows_for

# A reference with more pixels than this many images makes every step clearly slower.
_LARGE_REFERENCE = 4


@dataclass(frozen=True)
class DistillJob:
    """What one run of the node does, checked.

    Attributes:
        model: the MODEL that is sampled: the guider's, or one whose windows do not join the edges that the image does.
        references: clean latents (1, channels, ...), as they come from the VAE; sizes may differ.
        content: the same, (1 or batch, channels, ...).
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
    references: list[Tensor]
    reference_weights: Sequence[float]
    null_prompt: Sequence[Any]
    windows: Sequence[Window]
    circular: bool = False
    content: Tensor | None = None
    reference_part: Tensor | None = None
    regions: Sequence[Regions] | None = None
    costs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def one_each(self) -> bool:
        """Return whether every image of the batch follows a reference of its own."""
        return self.settings.reference_per_image and len(self.references) > 1

    def weights_of_pixels(self) -> list[Tensor] | None:
        """Return how much each pixel of each reference counts, (1, 1, ...) as large as it; None: all alike."""
        if self.reference_part is None and len(set(self.reference_weights)) == 1:
            return None
        found = []
        for place, (reference, weight) in enumerate(zip(self.references, self.reference_weights, strict=True)):
            pixels = torch.full(tuple(reference.shape[-2:]), float(weight))
            if self.reference_part is not None:
                part = self.reference_part[place if len(self.reference_part) > 1 else 0]
                pixels = pixels * resize_maps(part.float(), tuple(pixels.shape), "area")
            found.append(pixels.expand(reference.shape[2:])[None, None])
        return found


def prepare(
    settings: DistillSettings,
    guider: Any,
    sampler: Any,
    latent: Tensor,
    references: References,
    null_prompt: Sequence[Any],
    content: Tensor | None = None,
    reference_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    vae: Any = None,
    reference_weights: str = "",
) -> DistillJob:
    """Check everything that can go wrong before the model is loaded.

    Args:
        latent: (batch, channels, ..., height, width), what is sampled; the others are latents of the same model.
        references: what is connected to each input for references (see ``reference_latents``); vae: for images among it.
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
    named = reference_latents(model, references, vae)
    if content is not None:
        content = fitting(content, "content", model)
        check_content(content, latent)
    windows, model = windows_for(guider, network, latent, settings.window, settings.window_stride)
    weights = weights_of(reference_weights, len(named))
    if settings.reference_per_image:
        _check_one_each(len(named), len(latent), reference_weights)
    used = [place for place, weight in enumerate(weights) if weight > 0]
    chosen = [named[place][1] for place in used]
    marks = marks_of(reference_mask, target_mask, len(named), used, len(latent))
    regions = None
    if marks is not None:
        one_each = settings.reference_per_image and len(chosen) > 1
        regions = regions_of(network, layers, latent, windows, chosen, marks, one_each=one_each)
    return DistillJob(
        settings,
        model,
        layers,
        settings.iterations or iterations,
        settings.learning_rate or rate,
        chosen,
        [weights[place] for place in used],
        null_prompt,
        windows,
        model is not guider.model_patcher,
        content,
        None if marks is None else marks.part,
        regions,
        _costs([named[place] for place in used], windows[0].of(latent)),
        [] if marks is None else marks.notes,
    )


def _check_sampler(sampler: Any) -> None:
    if host.hides_latent(sampler):
        raise ValueError(
            f"The sampler {host.sampler_name(sampler)} cannot be stopped after each step. Use euler (as published), heun, "
            "dpmpp_2m, or the method 'optimise', which needs no sampler."
        )


def _check_one_each(references: int, images: int, weights: str) -> None:
    if references not in (1, images):
        raise ValueError(
            f"reference_per_image is on, and there are {references} references for the {images} images of latent_image: connect "
            "as many references as images (or one for all), or turn reference_per_image off, and every image follows all of them."
        )
    if weights.strip():
        raise ValueError(
            f"reference_weights is '{weights}', but with reference_per_image every image has one reference, so there is nothing "
            "to weigh. Empty reference_weights, or turn reference_per_image off."
        )


def _costs(references: Sequence[tuple[str, Tensor]], seen: Tensor) -> list[str]:
    name, largest = max(references, key=lambda reference: reference[1].shape[-1] * reference[1].shape[-2])
    times = largest.shape[-1] * largest.shape[-2] / (seen.shape[-1] * seen.shape[-2])
    if times <= _LARGE_REFERENCE:
        return []
    which = "the reference" if len({name for name, _ in references}) == 1 else name
    return [
        f"{which} is large, {largest.shape[-1]} x {largest.shape[-2]} latent pixels, {times:.0f} times as many as the "
        f"model sees of the image at once ({seen.shape[-1]} x {seen.shape[-2]}). Every step takes several times as long as with "
        "a reference of the image's size: scale it down before VAE Encode"
    ]
