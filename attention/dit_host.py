"""DiT inside ComfyUI: the model the host loads, samples and offloads.

The host's standard loaders do not know these files, and there is no list to add a network to without replacing the host's
detection for good; so ``load_dit`` does for a DiT what the host's loader of diffusion models does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from .dit import DiT, TransformerOptions
from .dit_files import DIFFUSERS_MARK, VELOCITY_MARK, read_dit
from .dit_labels import LABELS, NULL
from .host import cond_or_uncond, log

GUIDED_CHANNELS = 3  # of 4, as published

# transformer_options: a VarianceOfStep that the network fills while the sampler waits for its prediction.
VARIANCE = "fovea.dit.variance"


# --- the model ------------------------------------------------------------------------------------------------------


class HostDiT(DiT):
    """The network as the host calls it: it returns the prediction alone, and in the host's sign and time."""

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
        """(B, C, H, W) -> (B, C, H, W).

        SiT (Ma et al., arXiv:2401.08740) counts time from noise (0) to picture (1) and predicts the velocity that way; the
        host counts from picture to noise.
        """
        output = super().forward(x, 1 - timesteps if self.flows else timesteps, y, transformer_options)
        prediction, variance = output[:, : self.in_channels], output[:, self.in_channels :]
        wanted: VarianceOfStep | None = transformer_options.get(VARIANCE)
        if wanted is not None:
            wanted.add(variance, cond_or_uncond(transformer_options))
        return -prediction if self.flows else prediction


class DiTModel(comfy.model_base.BaseModel):
    """The host's model around the network. Its conditioning is a list of class indices."""

    diffusion_model: HostDiT

    def __init__(self, config: DiTConfig, model_type: Any, device: Any = None) -> None:
        super().__init__(config, model_type, device=device, unet_model=HostDiT)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """The labels as an integer tensor, which the host does not cast: in bfloat16 387 would become 388."""
        if kwargs.get("control") is not None:
            raise ValueError("There is no ControlNet for a DiT: remove it from the conditioning.")
        return {"y": comfy.conds.CONDRegular(self._labels(kwargs.get(LABELS), kwargs.get("cross_attn"), kwargs["noise"]))}

    def _labels(self, labels: Tensor | None, marker: Tensor | None, noise: Tensor) -> Tensor:
        if labels is None:
            raise ValueError(
                "This model is told a class, not a prompt: connect DiT Class Label to the sampler, its first output as positive "
                "and its second (no class) as negative."
            )
        classes, pictures = self.diffusion_model.classes, noise.shape[0]
        if len(labels) > pictures:
            raise ValueError(
                f"labels names {len(labels)} classes, but the latent is a batch of {pictures}: "
                f"set its batch_size to {len(labels)}."
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
    """What the host keeps of a kind of model, for one file.

    Sampling is the paper's: 1000 steps with betas linear from 1e-4 to 0.02 (which the host calls "sqrt_linear"); SiT has time
    itself for its sigmas. Latents are those of SD1's autoencoder.
    """

    unet_extra_config: dict[str, Any] = {}
    sampling_settings = {"beta_schedule": "sqrt_linear", "linear_start": 1e-4, "linear_end": 2e-2, "timesteps": 1000}
    latent_format = comfy.latent_formats.SD15
    memory_usage_factor = 0.5  # the host's own value for PixArt, which has this network's tokens and widths

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


# --- loading --------------------------------------------------------------------------------------------------------


def load_dit(
    path: str, prediction: str = "auto", cfg_channels: int = GUIDED_CHANNELS, disable_dynamic: bool = False
) -> ModelPatcher:
    """A DiT or SiT as a MODEL, in the host's hands for memory, precision and patches.

    Args:
        prediction: "epsilon" (DiT), "velocity" (SiT) or "auto": what the file says, else what its name says.
        cfg_channels: how many of the latent's channels classifier-free guidance changes; 3 as published.
        disable_dynamic: of newer hosts, which call this again for a copy of the model (several GPUs, no dynamic VRAM).

    Raises:
        ValueError: see ``read_dit``.
    """
    file = read_dit(path)
    name = Path(path).name
    kind = _prediction(prediction, file.prediction, name)
    log.info("Load DiT: %s: %s, predicts %s", name, file.summary, kind)
    model = _patcher(DiTConfig(file.network, kind), file.weights, disable_dynamic)
    if cfg_channels < file.network["in_channels"]:
        model.set_model_sampler_post_cfg_function(guide_some_channels(cfg_channels))
    model.cached_patcher_init = (load_dit, (path, prediction, cfg_channels))
    return model


def _prediction(wanted: str, said: str | None, name: str) -> str:
    if wanted != "auto":
        return wanted
    return said or ("velocity" if name.lower().startswith("sit") else "epsilon")


def _patcher(config: DiTConfig, weights: dict[str, Tensor], disable_dynamic: bool) -> ModelPatcher:
    """As the host's ``load_diffusion_model_state_dict`` goes on once it knows the kind of model."""
    device = comfy.model_management.get_torch_device()
    offload_device = comfy.model_management.unet_offload_device()
    supported = list(config.supported_inference_dtypes)
    dtype = comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights),
        supported_dtypes=supported,
        weight_dtype=comfy.utils.weight_dtype(weights),
    )
    config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, device, supported))
    model = config.get_model(weights)
    kind = ModelPatcher if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", ModelPatcher)
    patcher = kind(model, load_device=device, offload_device=offload_device)
    if not comfy.model_management.is_device_cpu(offload_device):
        model.to(offload_device)
    dynamic = getattr(patcher, "is_dynamic", lambda: False)()
    model.load_model_weights(weights, "", **({"assign": True} if dynamic else {}))
    return patcher


# --- guidance on three channels -----------------------------------------------------------------------------------------


def guide_some_channels(channels: int) -> Callable[[dict[str, Any]], Tensor]:
    """A post-CFG function: beyond the first ``channels`` the latent stays the conditional prediction (appendix A of the paper).

    It comes after the guidance itself, so guidance that another node replaced is cut to these channels too, and where both
    predictions are the same (T-GATE after its gate, or CFG 1) the result is exactly that prediction.
    """

    def guided(args: dict[str, Any]) -> Tensor:
        return torch.cat([args["denoised"][:, :channels], args["cond_denoised"][:, channels:]], 1)

    return guided


# --- the learned variance -----------------------------------------------------------------------------------------------


@dataclass
class VarianceOfStep:
    """What the network says about the variance in one evaluation: v in -1..1 (B, C, H, W), by positive (0) and negative (1)."""

    sums: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)

    def add(self, variance: Tensor, kinds: list[int]) -> None:
        for kind, chunk in zip(kinds, variance.chunk(len(kinds)), strict=True):
            total = self.sums.get(kind)
            if total is not None and total.shape != chunk.shape:
                raise ValueError(ONE_LABEL)
            self.sums[kind] = chunk.float() if total is None else total + chunk.float().to(total.device)
            self.counts[kind] = self.counts.get(kind, 0) + 1

    def of_positive(self, x: Tensor) -> Tensor | None:
        """The positive class's, as published; the mean of several; what there is, where only the negative was computed."""
        if not self.sums:
            return None
        kind = min(self.sums)
        v = self.sums[kind].to(x.device) / self.counts[kind]
        if v.shape != x.shape:
            raise ValueError(ONE_LABEL)
        return v


ONE_LABEL = (
    "DiT's ddpm sampler needs one variance for the whole picture, and here parts of it have labels of their own (areas, tiles or "
    "windows). Use another sampler."
)
