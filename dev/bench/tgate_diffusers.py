"""T-GATE in diffusers, restated: the published schedule as attention processors, for measuring beside the node.

Source: Zhang et al., "Cross-Attention Makes Inference Cumbersome in Text-to-Image Diffusion Models" (v1) and its published code
(v2, self-attention intervals): one cache for each attention module, the mean of both prompts' outputs in the last step before the
gate, and the negative prompt alone after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.models import CFG

GATE_AT, INTERVAL, WARM_UP = 0.4, 5, 2


@dataclass
class Schedule:
    """Where a run is, and what its modules do there."""

    gate: int
    step: int = 0

    def reuses(self, cross: bool) -> bool:
        if self.step >= self.gate:
            return cross
        planned = self.step == self.gate - 1 or self.step <= WARM_UP or self.step % INTERVAL == 0
        return not (cross or planned)


class Processor:
    """One attention module's, with its cache."""

    def __init__(self, schedule: Schedule, plain: Any) -> None:
        self.schedule = schedule
        self.plain = plain
        self.kept: Tensor | None = None

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **options: Any) -> Tensor:
        cross = encoder_hidden_states is not None
        if self.schedule.reuses(cross):
            assert self.kept is not None
            return self.kept
        found: Tensor = self.plain(attn, hidden_states, encoder_hidden_states, **options)
        if self.schedule.step == self.schedule.gate - 1:
            self.kept = torch.stack(found.chunk(2)).mean(0)
        elif self.schedule.step < self.schedule.gate and not cross:
            self.kept = found
        return found


def run_of(
    unet: Any, sampling: Any, sigmas: Tensor, noise: Tensor, prompts: Sequence[Tensor], gated: bool
) -> Callable[[], Tensor]:
    """Take Euler's steps with guidance by ``prompts`` (positive, negative), down ComfyUI's sigmas.

    Args:
        sampling: ComfyUI's ``model_sampling``, for its timesteps and its first latent.
    """
    positive, negative = prompts
    steps = len(sigmas) - 1
    both = torch.cat([negative, positive])
    scaled = sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), True)
    times = sampling.timestep(sigmas[:-1])

    @torch.inference_mode()
    def run() -> Tensor:
        schedule = Schedule(round(GATE_AT * steps) if gated else steps + 1)
        before = dict(unet.attn_processors)
        if gated:
            unet.set_attn_processor({name: Processor(schedule, plain) for name, plain in before.items()})
        try:
            x = scaled.clone()
            for step, (sigma, following, time) in enumerate(zip(sigmas, sigmas[1:], times, strict=False)):
                schedule.step = step
                seen = x / (sigma**2 + 1) ** 0.5
                if step < schedule.gate:
                    without, with_text = unet(seen.expand(2, -1, -1, -1), time, encoder_hidden_states=both).sample.split(1)
                    epsilon = without + CFG * (with_text - without)
                else:
                    epsilon = unet(seen, time, encoder_hidden_states=negative).sample
                x = x + (following - sigma) * epsilon
        finally:
            unet.set_attn_processor(before)
        return x

    return run
