"""Time inside one sampling run: which step a model call belongs to, whatever the sampler does."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# A sampler may hand back a sigma that went through float32 arithmetic or a table of timesteps.
_RELATIVE_SLACK = 1e-4


@dataclass(frozen=True)
class StepClock:
    """The sigmas of one run, as numbers.

    ``steps`` is what the artist typed: KSamplerAdvanced, split sigmas and low denoise hand the sampler a slice, and the
    slice is the run. Samplers that evaluate twice a step, between steps, or out of order are served too: a call belongs
    to the last step whose sigma is not below its own.
    """

    sigmas: tuple[float, ...]

    @classmethod
    def from_sigmas(cls, sigmas: torch.Tensor) -> StepClock:
        return cls(tuple(sigmas.tolist()))

    @property
    def steps(self) -> int:
        return max(len(self.sigmas) - 1, 0)

    def step_at(self, sigma: float) -> int:
        """Index of the step that sigma belongs to, 0 .. steps - 1."""
        reached = sum(start >= sigma * (1 - _RELATIVE_SLACK) for start in self.sigmas[:-1])
        return max(reached - 1, 0)
