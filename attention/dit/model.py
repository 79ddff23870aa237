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
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ..host import cond_or_uncond
from .checkpoint import DIFFUSERS_MARK, VELOCITY_MARK
from .labels import LABELS, NULL
from .network import DiT, TransformerOptions
from .variance import VARIANCE, VarianceOfStep


class HostDiT(DiT):
    """The network as ComfyUI calls it: it returns the prediction alone, and in ComfyUI's sign and time."""

    def __init__(self, prediction: str, **network: Any) -> None:
        super().__init__(**network)
        self.flows = prediction == "velocity"

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

        SiT (Ma et al., arXiv:2401.08740) counts time from noise (0) to image (1) and predicts the velocity that way; the
        host counts from image to noise.
        """
        output = super().forward(x, 1 - timesteps if self.flows else timesteps, y, transformer_options)
        prediction, variance = output[:, : self.in_channels], output[:, self.in_channels :]
        wanted: VarianceOfStep | None = transformer_options.get(VARIANCE)
        if wanted is not None:
            wanted.add(variance, cond_or_uncond(transformer_options))
        return -prediction if self.flows else prediction


class DiTModel(comfy.model_base.BaseModel):
    """ComfyUI's model around the network. Its conditioning is a list of class indices."""

    diffusion_model: HostDiT

    def __init__(self, config: DiTConfig, model_type: Any, device: Any = None) -> None:
        super().__init__(config, model_type, device=device, unet_model=HostDiT)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """Return the labels as an integer tensor, which ComfyUI does not cast: in bfloat16 387 would become 388."""
        if kwargs.get("control") is not None:
            raise ValueError("There is no ControlNet for a DiT: remove it from the conditioning.")
        return {"y": comfy.conds.CONDRegular(self._labels(kwargs.get(LABELS), kwargs.get("cross_attn"), kwargs["noise"]))}

    def _labels(self, labels: Tensor | None, marker: Tensor | None, noise: Tensor) -> Tensor:
        if labels is None:
            raise ValueError(
                "This model is told a class, not a prompt: connect DiT Class Label to the sampler, its first output as positive "
                "and its second (no class) as negative."
            )
        classes, images = self.diffusion_model.classes, noise.shape[0]
        if len(labels) > images:
            raise ValueError(
                f"labels names {len(labels)} classes, but the latent is a batch of {images}: set its batch_size to {len(labels)}."
            )
        if int(labels.max()) >= classes:
            raise ValueError(
                f"label {int(labels.max())} is none of this model's {classes} classes: in DiT Class Label, fill in labels with "
                f"numbers from 0 to {classes - 1}."
            )
        if marker is not None and not marker.any():  # ConditioningZeroOut
            labels = torch.full_like(labels, NULL)
        return torch.where(labels == NULL, classes, labels).to(noise.device)


class PlainLatent(comfy.latent_formats.LatentFormat):
    """A latent of other than 4 channels is what the autoencoder makes, unscaled."""

    def __init__(self, channels: int) -> None:
        self.latent_channels = channels


class DiTConfig(comfy.supported_models_base.BASE):
    """What ComfyUI keeps of a kind of model, for one file.

    Sampling is the paper's: 1000 steps with betas linear from 1e-4 to 0.02 (which ComfyUI calls "sqrt_linear"); SiT has time
    itself for its sigmas. Latents are those of SD1's autoencoder.
    """

    unet_extra_config: dict[str, Any] = {}
    sampling_settings = {"beta_schedule": "sqrt_linear", "linear_start": 1e-4, "linear_end": 2e-2, "timesteps": 1000}
    latent_format = comfy.latent_formats.SD15
    memory_usage_factor = 0.5  # ComfyUI's own value for PixArt, which has this network's tokens and widths

    def __init__(self, network: dict[str, Any], prediction: str) -> None:
        super().__init__({**network, "prediction": prediction})
        if network["in_channels"] != comfy.latent_formats.SD15.latent_channels:
            self.latent_format = PlainLatent(network["in_channels"])
        if prediction == "velocity":
            self.sampling_settings = {"shift": 1.0, "multiplier": 1.0}

    def model_type(self, state_dict: Any, prefix: str = "") -> comfy.model_base.ModelType:
        kinds = comfy.model_base.ModelType
        return kinds.FLOW if self.unet_config["prediction"] == "velocity" else kinds.EPS

    def process_unet_state_dict_for_saving(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        marks = {
            DIFFUSERS_MARK: self.unet_config.get("frequency_shift", 0) == 1,
            VELOCITY_MARK: self.unet_config["prediction"] == "velocity",
        }
        marked = {**state_dict, **{mark: torch.zeros(0) for mark, holds in marks.items() if holds}}
        return super().process_unet_state_dict_for_saving(marked)

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> DiTModel:
        return DiTModel(self, self.model_type(state_dict, prefix), device)
