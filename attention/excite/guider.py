"""The guider: classifier-free guidance whose latent is moved before each guided step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import host
from ..host import check_sampler, log, with_steps
from ..networks.grids import layer_grid
from ..networks.table import network_layout
from .layers import GuidedLayers, guided_layers
from .run import ExciteRun
from .settings import ExciteSettings
from .subjects import GuidedPrompt

# A subject needs a few places of the grid to be told from the others.
_PLACES_PER_SUBJECT = 4


class ExciteGuider(host.CFGGuider):
    """Classifier-free guidance whose latent is moved before each guided step."""

    fovea_whole_latent = "Attend-and-Excite, which looks for every subject in the whole image"

    def __init__(self, model: Any, settings: ExciteSettings, prompts: Sequence[GuidedPrompt | None]) -> None:
        super().__init__(model)
        self.settings = settings
        self.prompts = list(prompts)

    def inner_sample(
        self, noise: Tensor, latent_image: Tensor, device: Any, sampler: Any, sigmas: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        steps, settings = len(sigmas) - 1, self.settings
        if not any(settings.acts_in(step, steps) for step in range(steps)):
            return super().inner_sample(noise, latent_image, device, sampler, sigmas, *args, **kwargs)
        check_sampler(sampler)
        latent = (kwargs.get("latent_shapes") or [noise.shape])[0]  # of video with sound, which comes packed, the video's
        chosen = guided_layers(host.diffusion_model(self.inner_model), latent, settings)
        self._check_room(chosen, latent)
        runs: list[ExciteRun] = []

        def before_step(model: Any, step: int, x: Tensor, sigma: Tensor, call: dict[str, Any]) -> None:
            if not runs:
                prompts = [(cond, prompt) for cond, prompt in zip(self.conds["positive"], self.prompts, strict=True) if prompt]
                runs.append(ExciteRun(self.inner_model, prompts, settings, chosen, steps, call.get("model_options", {})))
            runs[0].before_step(model, step, x, sigma, call)

        sampler = with_steps(sampler, before_step, lambda step: settings.acts_in(step, steps))
        result = super().inner_sample(noise, latent_image, device, sampler, sigmas, *args, **kwargs)
        for run in runs:
            log.info(run.summary())
        return result

    def _check_room(self, chosen: GuidedLayers, latent: Sequence[int]) -> None:
        network = host.diffusion_model(self.inner_model)
        known = layer_grid(network, network_layout(network), chosen.layers[0].name, latent)
        grid = chosen.grid or (known[1:] if known is not None else (1, 1))
        room = max(math.prod(grid) // _PLACES_PER_SUBJECT, 1)
        for prompt in self.prompts:
            if prompt is not None and len(prompt.subjects) > room:
                raise ValueError(
                    f"subjects: {len(prompt.subjects)} subjects are more than an attention grid of {grid[0]} x {grid[1]} can "
                    f"hold ({room}). Name fewer, make the image larger, or raise attention_grid."
                )
