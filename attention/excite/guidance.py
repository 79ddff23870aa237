"""Guiding one sampling run: the sampler is watched, and the latent of each guided step is moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import host
from ..gradient.cost import prompts_of_a_step
from ..host import check_sampler, with_steps
from ..networks.grids import layer_grid
from ..networks.table import network_layout
from .cost import cost_line
from .layers import GuidedLayers, guided_layers
from .places import check_places
from .run import ExciteRun
from .settings import ExciteSettings
from .subjects import GuidedPrompt

# A subject needs a few places of the grid to be told from the others.
_PLACES_PER_SUBJECT = 4

NEEDS_WHOLE_LATENT = "Attend-and-Excite, which looks for every subject in the whole image"


class Guidance:
    """Guides one sampling run of a guider.

    Args:
        guider: what samples; its positive prompt is looked up when the first guided step begins.
        prompts: what to guide in each entry of the positive prompt.
        latent: shape of the latents, (batch, channels, ..., height, width); of video with sound, the video's.
        steps: of this run.

    Raises:
        ValueError: the latent is too small for the subjects, or the network cannot be guided.
    """

    def __init__(
        self, guider: Any, settings: ExciteSettings, prompts: Sequence[GuidedPrompt | None], latent: Sequence[int], steps: int
    ) -> None:
        self._guider = guider
        self._settings = settings
        self._prompts = prompts
        self._steps = steps
        network = host.diffusion_model(guider.model_patcher.model)
        self._chosen = guided_layers(network, latent, settings)
        _check_room(network, self._chosen, latent, prompts)
        check_places(settings.places, prompts, any("area" in entry for entry in guider.original_conds.get("positive", [])))
        self._run: ExciteRun | None = None

    def sampler(self, sampler: Any) -> Any:
        """Return the same SAMPLER, whose latent is moved before each guided step.

        Raises:
            ValueError: its latent cannot be changed.
        """
        return with_steps(sampler, self._before_step, lambda step: self._settings.acts_in(step, self._steps))

    def _before_step(self, model: Any, step: int, x: Tensor, sigma: Tensor, call: dict[str, Any]) -> None:
        if self._run is None:
            # ComfyUI may have put copies for the areas of the negative prompt behind the positive one's own entries.
            entries = zip(self._guider.conds["positive"], self._prompts, strict=False)
            prompts = [(cond, prompt) for cond, prompt in entries if prompt]
            options = call.get("model_options", {})
            self._run = ExciteRun(self._guider.inner_model, prompts, self._settings, self._chosen, self._steps, options)
        self._run.before_step(model, step, x, sigma, call)

    def foretell(self, text: host.NodeText) -> None:
        """Show on a node how much longer the run will take."""
        entries = sum(prompt is not None for prompt in self._prompts)
        text.foretell(cost_line(self._settings, self._steps, entries, prompts_of_a_step(self._guider)))

    def tell(self, text: host.NodeText) -> None:
        """Log what was done, and show it on a node, at the end of a run."""
        if self._run is not None:
            notes = dict.fromkeys(prompt.note for prompt in self._prompts if prompt is not None and prompt.note)
            text.tell("; ".join([self._run.summary(), *notes]))


def is_guided(settings: ExciteSettings, sampler: Any, sigmas: Tensor) -> bool:
    """Return whether any step of a run is guided.

    Raises:
        ValueError: one is, and the sampler's latent cannot be changed.
    """
    steps = len(sigmas) - 1
    if not any(settings.acts_in(step, steps) for step in range(steps)):
        return False
    check_sampler(sampler)
    return True


def _check_room(network: Any, chosen: GuidedLayers, latent: Sequence[int], prompts: Sequence[GuidedPrompt | None]) -> None:
    known = layer_grid(network, network_layout(network), chosen.layers[0].name, latent)
    grid = chosen.grid or (known[1:] if known is not None else (1, 1))
    room = max(math.prod(grid) // _PLACES_PER_SUBJECT, 1)
    for prompt in prompts:
        if prompt is not None and len(prompt.subjects) > room:
            raise ValueError(
                f"subjects: {len(prompt.subjects)} subjects are more than an attention grid of {grid[0]} x {grid[1]} can "
                f"hold ({room}). Name fewer, make the image larger, or raise attention_grid."
            )
