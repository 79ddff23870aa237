"""DiT inside ComfyUI: the model ComfyUI loads, samples and offloads.

ComfyUI's standard loaders do not know these files, and there is no list to add a network to without replacing ComfyUI's
detection for good; so ``load_dit`` does for a DiT what ComfyUI's loader of diffusion models does.
"""

from __future__ import annotations

from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ..host import CLASS_LABELS, cond_or_uncond
from .blends import NULL, from_rows
from .checkpoint import (
    DIFFUSERS_MARK,
    EPSILON_MARK,
    FROM_IMAGE_MARK,
    HEADS_MARK,
    NO_NULL_MARK,
    NULL_MARK,
    VELOCITY_MARK,
)
from .labels import listed
from .network import DiT, TransformerOptions
from .variance import VARIANCE, VarianceOfStep

# Arguments of the network beside the labels.
LABEL_WEIGHTS, TIME_UNIT = "label_weights", "time_unit"

NO_NULL_CLASS = (
    "This DiT was trained without a null class (no class), so CFG cannot be used: set cfg to 1, and leave out nodes that need a "
    "negative prompt or ConditioningZeroOut on a class."
)


class HostDiT(DiT):
    """The network as ComfyUI calls it: it returns the prediction alone, and in ComfyUI's sign and time."""

    def __init__(self, prediction: str, from_image: bool = False, **network: Any) -> None:
        super().__init__(**network)
        self.flows = prediction == "velocity"
        self.from_noise = self.flows and not from_image

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: Any = None,
        transformer_options: TransformerOptions | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = transformer_options or {}
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        executor = WrapperExecutor.new_class_executor(self._predict, self, wrappers)
        return executor.execute(x, timesteps, context, y, control, options, **kwargs)

    def _predict(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None,
        y: Tensor,
        control: Any,
        transformer_options: TransformerOptions,
        **kwargs: Any,
    ) -> Tensor:
        """Return the prediction (B, C, H, W) for a latent (B, C, H, W).

        SiT (Ma et al., arXiv:2401.08740) counts time from noise (0) to image (1) and predicts the velocity that way; ComfyUI
        counts from image to noise, and so does REPA (Yu et al., arXiv:2410.06940).
        """
        if not self.null_class and bool((y == self.classes).any()):
            raise ValueError(NO_NULL_CLASS)
        if self.flows:
            timesteps = timesteps / kwargs.get(TIME_UNIT, 1.0)
        time = 1 - timesteps if self.from_noise else timesteps
        output = super().forward(x, time, y, transformer_options, kwargs.get(LABEL_WEIGHTS))
        prediction, variance = output[:, : self.in_channels], output[:, self.in_channels :]
        wanted: VarianceOfStep | None = transformer_options.get(VARIANCE)
        if wanted is not None:
            wanted.add(variance, cond_or_uncond(transformer_options))
        return -prediction if self.from_noise else prediction


class DiTModel(comfy.model_base.HunyuanDiT):
    """ComfyUI's model around the network. Its conditioning is a list of class indices.

    ComfyUI's LoRA loader knows PEFT's names of layers (``base_model.model.``) for this ancestor and its subclasses; its two
    methods are replaced here.
    """

    diffusion_model: HostDiT

    def __init__(self, config: DiTConfig, model_type: Any, device: Any = None) -> None:
        comfy.model_base.BaseModel.__init__(self, config, model_type, device=device, unet_model=HostDiT)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """Return the labels as an integer tensor, which ComfyUI does not cast: in bfloat16 387 would become 388."""
        if kwargs.get("control") is not None:
            raise ValueError("There is no ControlNet for a DiT: remove it from the conditioning.")
        self._check_sampling()
        if kwargs["noise"].ndim != 4:
            raise ValueError(
                f"This DiT makes images, and the latent has {kwargs['noise'].ndim} dimensions instead of 4 (it is of video or "
                "sound): connect Empty Latent Image to the sampler."
            )
        classes, weights = self._labels(kwargs.get(CLASS_LABELS), kwargs.get("cross_attn"), kwargs["noise"])
        conds: dict[str, Any] = {"y": comfy.conds.CONDRegular(classes)}
        if weights is not None:
            conds[LABEL_WEIGHTS] = comfy.conds.CONDRegular(weights)
        unit = getattr(self.model_sampling, "multiplier", 1.0)
        if self.diffusion_model.flows and unit != 1:  # ModelSamplingSD3 counts time to 1000
            conds[TIME_UNIT] = comfy.conds.CONDConstant(unit)
        return conds

    def _check_sampling(self) -> None:
        """Raise where another node has put in a kind of sampling that this network was not trained for."""
        flow = isinstance(self.model_sampling, comfy.model_sampling.CONST)
        if flow and not self.diffusion_model.flows:
            raise ValueError(
                "This DiT predicts noise, so there is no shift to set: remove the node that changes its sampling "
                "(ModelSamplingSD3, ModelSamplingAuraFlow or ModelSamplingFlux). If it is a SiT, choose the prediction velocity "
                "in Load DiT."
            )
        if self.diffusion_model.flows and not flow:
            raise ValueError(
                "This model predicts velocity (SiT), and another node has changed its sampling to that of models which predict "
                "noise: remove that node (such as ModelSamplingDiscrete). ModelSamplingSD3 and ModelSamplingAuraFlow set a shift."
            )

    def _own_names(self) -> str:
        names = self.model_config.class_names
        return f" Its classes: {listed(names)}." if names else ""

    def _labels(self, labels: Tensor | None, rows: Tensor | None, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the classes for ``noise`` and, where they are blended, their shares, with the null class as the last."""
        if labels is None:
            raise ValueError(
                "This model takes a class, not a prompt: connect DiT Class Label to the sampler, its first output as positive "
                "and its second (no class) as negative."
            )
        classes, images = self.diffusion_model.classes, noise.shape[0]
        if len(labels) > images:
            raise ValueError(
                f"labels names {len(labels)} classes, but the latent is a batch of {images}: set its batch_size to {len(labels)}."
            )
        chosen, weights = (labels, None) if rows is None else from_rows(rows, labels)
        if int(chosen.max()) >= classes:
            raise ValueError(
                f"label {int(chosen.max())} is none of this model's {classes} classes: in DiT Class Label, fill in labels with "
                f"numbers from 0 to {classes - 1}.{self._own_names()}"
            )
        chosen = torch.where(chosen == NULL, classes, chosen).to(noise.device)
        return chosen, None if weights is None else weights.to(noise.device)


AUTO = "auto"
LATENT_FORMATS: dict[str, type[comfy.latent_formats.LatentFormat] | None] = {
    AUTO: None,
    "SD1.5": comfy.latent_formats.SD15,
    "SDXL": comfy.latent_formats.SDXL,
    "SD3": comfy.latent_formats.SD3,
    "Flux": comfy.latent_formats.Flux,
    "unscaled": None,
}


class PlainLatent(comfy.latent_formats.LatentFormat):
    """A latent of other than 4 channels is what the autoencoder makes, unscaled."""

    def __init__(self, channels: int) -> None:
        self.latent_channels = channels


def latents_of(name: str, channels: int) -> comfy.latent_formats.LatentFormat:
    """Return ComfyUI's format of the latents of a VAE.

    Args:
        name: a key of ``LATENT_FORMATS``; "auto" is SD1.5's for 4 channels, and for others what the VAE makes, unscaled.

    Raises:
        ValueError: the latents of that VAE have another number of channels.
    """
    chosen = LATENT_FORMATS[name]
    if chosen is None:
        published = comfy.latent_formats.SD15()
        return published if name == AUTO and channels == published.latent_channels else PlainLatent(channels)
    if chosen.latent_channels != channels:
        raise ValueError(
            f"latent_format is {name}, whose latents have {chosen.latent_channels} channels, but this model has {channels}. "
            f"Choose the VAE that it was trained with, or {AUTO}."
        )
    return chosen()


class DiTConfig(comfy.supported_models_base.BASE):
    """What ComfyUI keeps of a kind of model, for one file.

    Sampling is the paper's: 1000 steps with betas linear from 1e-4 to 0.02 (which ComfyUI calls "sqrt_linear"); SiT has time
    itself for its sigmas. Latents are those of SD1's autoencoder unless another is chosen.
    """

    unet_extra_config: dict[str, Any] = {}
    sampling_settings = {"beta_schedule": "sqrt_linear", "linear_start": 1e-4, "linear_end": 2e-2, "timesteps": 1000}
    latent_format = comfy.latent_formats.SD15
    memory_usage_factor = 0.5  # ComfyUI's own value for PixArt, which has this network's tokens and widths

    def __init__(
        self,
        network: dict[str, Any],
        prediction: str,
        from_image: bool = False,
        latent_format: str = AUTO,
        class_names: tuple[str, ...] = (),
    ) -> None:
        super().__init__({**network, "prediction": prediction, "from_image": from_image})
        self.latent_format = latents_of(latent_format, network["in_channels"])
        self.class_names = class_names
        if prediction == "velocity":
            self.sampling_settings = {"shift": 1.0, "multiplier": 1.0}

    def model_type(self, state_dict: Any, prefix: str = "") -> comfy.model_base.ModelType:
        kinds = comfy.model_base.ModelType
        return kinds.FLOW if self.unet_config["prediction"] == "velocity" else kinds.EPS

    def process_unet_state_dict_for_saving(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        velocity, null = self.unet_config["prediction"] == "velocity", self.unet_config.get("null_class", True)
        marks = {
            DIFFUSERS_MARK: self.unet_config.get("frequency_shift", 0) == 1,
            FROM_IMAGE_MARK: self.unet_config["from_image"],
            VELOCITY_MARK: velocity,
            EPSILON_MARK: not velocity,
            NULL_MARK: null,
            NO_NULL_MARK: not null,
        }
        heads = {HEADS_MARK: torch.zeros(self.unet_config["heads"], 0)}
        marked = {**state_dict, **heads, **{mark: torch.zeros(0) for mark, holds in marks.items() if holds}}
        return super().process_unet_state_dict_for_saving(marked)

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> DiTModel:
        return DiTModel(self, self.model_type(state_dict, prefix), device)
