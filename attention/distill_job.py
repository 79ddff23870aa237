"""What an Attention Distillation run is asked to do: settings, what was published, and checks before sampling.

The published values are those of the authors' code for SD1.5, SDXL and Flux (arXiv:2502.20235).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import host
from .distill_losses import MAX_LABELS, Regions, labels_of
from .excite import ExciteGuider
from .gradient import Memory
from .layer_names import parse_layers
from .seamless import is_seamless
from .sites import CaptureLayer, capture_layers, check_differentiable, layer_grid, network_layout
from .stepping import sampler_name
from .windows import Window, windows_of


class Method(str, Enum):
    GUIDED = "guided sampling"
    OPTIMISE = "optimise"


class Adain(str, Enum):
    """Whether the latent first gets the references' mean and spread of each channel. Auto: as published for the method."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


LEAST_WINDOW = 64


@dataclass(frozen=True)
class DistillSettings:
    """What the artist chose; iterations and learning_rate 0 are the published values for the method and the model.

    Attributes:
        window, window_stride: in pixels of the picture; window 0 is the whole.
    """

    method: Method = Method.GUIDED
    iterations: int = 0
    learning_rate: float = 0.0
    content_weight: float = 0.25
    adain: Adain = Adain.AUTO
    start_at: float = 0.0
    end_at: float = 1.0
    every_n_steps: int = 1
    attn_scale: float = 1.0
    layers: str = ""
    memory: Memory = Memory.AUTO
    window: int = 0
    window_stride: int = 64

    def __post_init__(self) -> None:
        for name in ("iterations", "learning_rate", "content_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name):g}: use 0 or more.")
        for name in ("start_at", "end_at"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name):g}: it is a fraction of the run, so use 0 to 1.")
        if self.start_at > self.end_at:
            raise ValueError(
                f"start_at is {self.start_at:g} and end_at is {self.end_at:g}: the end comes before the start. Exchange them, "
                "or use 0 and 1 for the whole run."
            )
        if self.every_n_steps < 1:
            raise ValueError(f"every_n_steps is {self.every_n_steps}: it counts steps, so use 1 (every step) or more.")
        if not self.attn_scale > 0:
            raise ValueError(f"attn_scale is {self.attn_scale:g}: use more than 0 (1 as published, more is sharper).")
        if self.window < 0 or 0 < self.window < LEAST_WINDOW:
            raise ValueError(f"window is {self.window}: use 0 (the whole picture) or at least {LEAST_WINDOW} pixels.")
        if self.window and not 0 < self.window_stride <= self.window:
            raise ValueError(
                f"window_stride is {self.window_stride} and window {self.window}: windows that are further apart than they are "
                "wide leave gaps, so use 1 to the window's side, best an eighth to a half of it."
            )

    @property
    def uses_adain(self) -> bool:
        return self.adain is Adain.ON or (self.adain is Adain.AUTO and self.method is Method.GUIDED)

    def chosen_steps(self, steps: int) -> range:
        """The steps that are followed by optimisation."""
        return range(round(self.start_at * steps), round(self.end_at * steps), self.every_n_steps)


# --- what was published ----------------------------------------------------------------------------------------------------

# Self-attentions at the end of the network: 10 to 15 of 16 (SD1.5), 64 to 69 of 70 (SDXL); 50 to 56 of 57 (Flux), an eighth.
_UNET_LAYERS = 6
_SHARE_OF_TRANSFORMER = 1 / 8
_LEAST_LAYERS = 3
_SD1_LAYERS = 16


def distilled_layers(network: torch.nn.Module, text: str = "") -> list[CaptureLayer]:
    """The layers that ``text`` names, or the published ones for the network; by their rule where none were published.

    Raises:
        ValueError: a name that the network does not have, or a network whose self-attention is not known.
    """
    layers = [layer for layer in capture_layers(network) if layer.kind in ("self", "joint")]
    if not layers:
        raise ValueError(
            f"Attention Distillation does not know where {type(network).__name__} attends to the picture. It works with "
            "SD1.5, SD2, SDXL and Flux, and as an experiment with the other models that Capture Attention Maps can show."
        )
    layout = network_layout(network)
    check_differentiable(network, "Attention Distillation")
    if text.strip():
        names = set(parse_layers(text, list(dict.fromkeys(layer.name for layer in layers))))
        return [layer for layer in layers if layer.name in names]
    if layout is not None and layout.family == "U-Net":
        return [layer for layer in layers if layer.name.startswith("output")][-_UNET_LAYERS:]
    return layers[-max(round(len(layers) * _SHARE_OF_TRANSFORMER), _LEAST_LAYERS) :]


def published(network: torch.nn.Module, method: Method, *, flow: bool) -> tuple[int, float]:
    """Iterations per step and learning rate: the authors' defaults for SD1.5, SDXL and Flux, and of these the nearest."""
    if method is Method.OPTIMISE:
        return 1, 0.05
    if flow:
        return 2, 0.01
    layout = network_layout(network)
    attentions = sum(layer.kind == "self" for layer in capture_layers(network))
    small = layout is not None and layout.family == "U-Net" and attentions <= _SD1_LAYERS
    return (3 if small else 2), 0.015


# --- the job: everything that is known before sampling ------------------------------------------------------------------


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
    layers: list[CaptureLayer]
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
            "latent_image holds several latents at once (video with sound), which cannot be distilled. Use a picture."
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
            f"{missing} is not connected: labels say what of the picture follows what of the reference, so connect both."
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


# Their step is a polynomial over several sigmas, or not one of the schedule at all.
_UNCUTTABLE = ("sample_unipc", "sample_unipc_bh2", "dpm_fast_function", "dpm_adaptive_function")


def _check_sampler(sampler: Any) -> None:
    own_loop = not host.is_k_sampler(sampler)
    if own_loop or getattr(sampler.sampler_function, "__name__", "") in _UNCUTTABLE:
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
            f"{dimensions} dimensions. Encode the picture with the VAE that belongs to the model."
        )
    if not bool(latent.isfinite().all()):
        raise ValueError(
            f"{name} holds values that are no numbers (NaN). Encode the picture again, with the VAE in fp32 (--fp32-vae)."
        )
    return latent


def _check_content(content: Tensor, latent: Tensor) -> None:
    if content.shape[2:] != latent.shape[2:]:
        raise ValueError(
            f"content is {_size(content)} but latent_image is {_size(latent)} (in latent pixels). The content loss compares them "
            "place by place: scale the content picture to the size of the latent, or connect content to latent_image as well."
        )
    if len(content) not in (1, len(latent)):
        raise ValueError(f"content holds {len(content)} pictures and latent_image {len(latent)}: use one, or as many.")


def _size(latent: Tensor) -> str:
    return f"{latent.shape[-1]} x {latent.shape[-2]}"


def _windows(settings: DistillSettings, guider: Any, latent: Tensor) -> list[Window]:
    ratio = host.pixels_per_latent(guider.model_patcher)
    side, stride = (max(round(pixels / ratio), 1) for pixels in (settings.window, settings.window_stride))
    height, width = latent.shape[-2:]
    found = windows_of(height, width, side if settings.window else 0, stride)
    if len(found) == 1:
        return found
    if isinstance(guider, ExciteGuider):
        raise ValueError(
            "window cannot be used with Attend-and-Excite, which looks for every subject in the whole picture. Set window to 0, "
            "or use CFGGuider."
        )
    for name, where in host.LIMITS_OF_A_WINDOW.items():
        if any(name in cond for conds in host.prompts_of(guider) for cond in conds):
            raise ValueError(f"window cannot be used with {where}, made for the whole picture. Set window to 0, or take it out.")
    if is_seamless(guider.model_patcher):
        raise ValueError(
            "window cannot be used with Seamless Tiling, which joins the edges of what the model sees. Set window to 0: a larger "
            "latent_image gives a larger seamless texture too."
        )
    return found


def _regions(
    network: torch.nn.Module,
    layers: Sequence[CaptureLayer],
    latent: Tensor,
    windows: Sequence[Window],
    reference: Tensor,
    of_reference: Tensor,
    of_target: Tensor,
) -> list[Regions]:
    layout = network_layout(network)
    if any(layer.kind != "self" for layer in layers):
        raise ValueError(
            f"reference_mask and target_mask need a model whose picture tokens have an attention of their own (SD1.5, SD2, SDXL, "
            f"PixArt), and {type(network).__name__} mixes them with the text. Disconnect the masks."
        )
    for name, mask, pictures, whose in (
        ("reference_mask", of_reference, len(reference), "reference"),
        ("target_mask", of_target, len(latent), "latent_image"),
    ):
        if len(mask) not in (1, pictures):
            raise ValueError(f"{name} holds {len(mask)} masks, but {whose} holds {pictures} pictures: use one mask, or as many.")
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
            "greys belong together, so paint each region of the picture in the grey of the reference's region it follows."
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
    targets = F.interpolate(targets[None].float(), size=tuple(latent.shape[-2:]), mode="nearest")[0].long()
    return [Regions(window.of(targets), list(references), grids) for window in windows]


def _greys(labels: Tensor) -> list[int]:
    return labels.unique().tolist()[:8]
