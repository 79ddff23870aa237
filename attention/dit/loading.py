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
from .model import DiTConfig

GUIDED_CHANNELS = 3  # of 4, as published


def load_dit(
    path: str, prediction: str = "auto", cfg_channels: int = GUIDED_CHANNELS, disable_dynamic: bool = False
) -> ModelPatcher:
    """Return a DiT or SiT as a MODEL, in ComfyUI's hands for memory, precision and patches.

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
    model = host.patcher_for(DiTConfig(file.network, kind), file.weights, disable_dynamic)
    if cfg_channels < file.network["in_channels"]:
        model.set_model_sampler_post_cfg_function(guide_some_channels(cfg_channels))
    model.cached_patcher_init = (load_dit, (path, prediction, cfg_channels))
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
