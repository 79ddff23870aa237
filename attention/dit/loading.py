"""Loading a DiT or SiT as a MODEL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import host
from ..host import ModelPatcher, log
from .checkpoint import read_dit
from .labels import listed
from .model import AUTO, DiTConfig

GUIDED_CHANNELS, PUBLISHED_CHANNELS = 3, 4  # of the latent, as published
FEW_NAMES = 20  # of classes, which have room on a node


def load_dit(
    path: str,
    prediction: str = "auto",
    cfg_channels: int = GUIDED_CHANNELS,
    latent_format: str = AUTO,
    disable_dynamic: bool = False,
    tell: Callable[[str], Any] = log.info,
) -> ModelPatcher:
    """Return a DiT or SiT as a MODEL, in ComfyUI's hands for memory, precision and patches.

    Args:
        prediction: "epsilon" (DiT), "velocity" (SiT) or "auto": what the file says, else what its name says.
        cfg_channels: how many of a latent's 4 channels classifier-free guidance changes; 3 as published. A latent of other
            than 4 channels is guided as a whole.
        latent_format: a key of ``LATENT_FORMATS``, the VAE that the model was trained with.
        disable_dynamic: of newer ComfyUI, which calls this again for a copy of the model (several GPUs, no dynamic VRAM).
        tell: called with each line about what was loaded, and which of several copies of the weights was taken.

    Raises:
        ValueError: see ``read_dit``; or the latents of that VAE do not have the model's channels.
    """
    file = read_dit(path)
    name = Path(path).name
    kind = _prediction(prediction, file.prediction, name)
    tell(f"Load DiT: {name}: {file.summary}, predicts {kind}")
    if file.names:
        tell(f"Load DiT: classes: {listed(file.names, FEW_NAMES)}")
    if len(file.names) > FEW_NAMES:
        log.info("Load DiT: all classes: %s", listed(file.names))
    from_image = file.from_image and kind == "velocity"
    config = DiTConfig(file.network, kind, from_image, latent_format, file.names)
    model = host.patcher_for(config, file.weights, disable_dynamic)
    channels = file.network["in_channels"]
    if channels == PUBLISHED_CHANNELS > cfg_channels:
        model.set_model_sampler_post_cfg_function(guide_some_channels(cfg_channels))
    elif channels > cfg_channels:
        tell(f"Load DiT: CFG is applied to all {channels} channels: what was published holds for latents of 4")
    model.cached_patcher_init = (load_dit, (path, prediction, cfg_channels, latent_format))
    return model


def _prediction(wanted: str, declared: str | None, name: str) -> str:
    if wanted != "auto":
        return wanted
    return declared or ("velocity" if name.lower().startswith("sit") else "epsilon")


def guide_some_channels(channels: int) -> Callable[[dict[str, Any]], Tensor]:
    """Return a post-CFG function that guides the first ``channels`` of the latent only (appendix A of the paper).

    The others stay the conditional prediction.

    It comes after the guidance itself, so guidance that another node replaced is cut to these channels too, and where both
    predictions are the same (T-GATE after its gate, or CFG 1) the result is exactly that prediction.
    """

    def guided(args: dict[str, Any]) -> Tensor:
        return torch.cat([args["denoised"][:, :channels], args["cond_denoised"][:, channels:]], 1)

    return guided
