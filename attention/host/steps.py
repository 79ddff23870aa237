"""Time inside one sampling run: which noise level and which step a model call belongs to, whatever the sampler does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .patching import ModelOptions, run_state, sampler_scope
from .sampling import is_k_sampler


def is_comfy_loop(sampler: Any) -> bool:
    """Return whether a SAMPLER's loop is one that ComfyUI brings, so that what it tells its progress bar is known.

    Noise added on the way (``s_churn``) gives it other sigmas than the schedule's.
    """
    if not is_k_sampler(sampler) or sampler.extra_options.get("s_churn"):
        return False
    return str(getattr(sampler.sampler_function, "__module__", "")).split(".")[0] == "comfy"


_LEVELS, _SIGMA = "fovea.noise_levels", "fovea.sigma"

# Steps in which every noise level is read, even where it could be known: as many as ComfyUI's multistep loops need to begin.
_CHECKED_STEPS = 4

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
        """Return index of the step that sigma belongs to, 0 .. steps - 1."""
        reached = sum(start >= sigma * (1 - _RELATIVE_SLACK) for start in self.sigmas[:-1])
        return max(reached - 1, 0)


class NoiseLevels:
    """The noise levels that a sampler evaluates, told from its progress calls as far as that is certain.

    A value that Python reads from a tensor makes it wait until the GPU has done all that it was asked for. So not every level is
    read: most of ComfyUI's own loops evaluate at ``sigmas[i]`` only, between the progress calls of steps i - 1 and i. Whether
    this one does shows in its first steps, which are read; where one of them is at another level, all are.
    """

    def __init__(self, sigmas: torch.Tensor, sampler: Any) -> None:
        self._sigmas: list[float] = sigmas.tolist()
        self._done = 0  # steps that the sampler has told its progress bar of
        self._follows_schedule = is_comfy_loop(sampler)

    def hearing(self, progress: Callable[..., None] | None) -> Callable[..., None]:
        """Return ``progress(step, denoised, x, steps)``, which the sampler calls once in each step, listened to."""

        def heard(step: int, *args: Any) -> None:
            self._done = step + 1
            if progress is not None:
                progress(step, *args)

        return heard

    def at(self, timestep: torch.Tensor) -> float:
        """Return the level of one evaluation, whose batch has ``timestep`` (sigmas, all equal)."""
        expected = self._sigmas[self._done] if self._done < len(self._sigmas) - 1 else None
        if self._follows_schedule and self._done >= _CHECKED_STEPS and expected is not None:
            return expected
        sigma = float(timestep.max())
        if expected is None or abs(sigma - expected) > _RELATIVE_SLACK * expected:
            self._follows_schedule = False
        return sigma


def follow_sampler(
    executor: Any, guider: Any, sigmas: torch.Tensor, extra_args: dict[str, Any], progress: Any, *args: Any, **kwargs: Any
) -> Any:
    """Return a SAMPLER_SAMPLE wrapper for techniques that ``read_sigma``; the first one of a run listens for all of them."""
    options = extra_args["model_options"]
    if run_state(options, _LEVELS) is not None:
        return executor(guider, sigmas, extra_args, progress, *args, **kwargs)
    levels = NoiseLevels(sigmas, executor.class_obj)
    with sampler_scope(options, _LEVELS, levels):
        return executor(guider, sigmas, extra_args, levels.hearing(progress), *args, **kwargs)


def read_sigma(timestep: torch.Tensor, options: ModelOptions) -> tuple[float, ModelOptions]:
    """Return the noise level of a sampler's evaluation, and the options to go on with, which tell it to the other nodes."""
    sigma = options.get(_SIGMA)
    if sigma is None:
        levels: NoiseLevels | None = run_state(options, _LEVELS)
        sigma = float(timestep.max()) if levels is None else levels.at(timestep)
        options = {**options, _SIGMA: sigma}
    return sigma, options
