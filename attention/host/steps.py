"""Time inside one sampling run: the noise level and the step that a model call belongs to, whatever the sampler does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import Any

import torch

from .patching import ModelOptions, run_state, sampler_scope
from .sampling import is_k_sampler
from .stack import on_one_stack


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
    """The sigmas of one run, as numbers; of KSamplerAdvanced, split sigmas and low denoise they are a slice of a schedule.

    Samplers that evaluate twice a step, between steps, or out of order are served too.
    """

    sigmas: tuple[float, ...]

    @classmethod
    def from_sigmas(cls, sigmas: torch.Tensor) -> StepClock:
        """Return the clock of a sampler's ``sigmas`` (steps + 1,)."""
        return cls(tuple(sigmas.tolist()))

    @property
    def steps(self) -> int:
        """Return the number of steps."""
        return max(len(self.sigmas) - 1, 0)

    @cached_property
    def descends(self) -> bool:
        """Return whether every step begins at a lower sigma than the one before, so that a sigma tells the step."""
        return all(after < before for before, after in pairwise(self.sigmas[:-1]))

    def step_at(self, sigma: float, done: int | None = None) -> int:
        """Return the index, 0 .. steps - 1, of the step that an evaluation at ``sigma`` belongs to.

        On a schedule that descends, that is the last step whose sigma is not below it. On any other one (flipped, restarted,
        repeated sigmas) the sampler's progress says which step is being made, and sigma only whether the next one has begun.

        Args:
            done: steps that the sampler has told its progress bar of; None: not known.
        """
        if done is None or self.descends:
            reached = sum(start >= sigma * (1 - _RELATIVE_SLACK) for start in self.sigmas[:-1])
            return max(reached - 1, 0)
        earlier, later = max(done - 1, 0), min(done, self.steps - 1)
        if earlier >= later:
            return max(later, 0)
        start = self.sigmas[later]
        rises = start > self.sigmas[earlier]
        begun = sigma >= start * (1 - _RELATIVE_SLACK) if rises else sigma <= start * (1 + _RELATIVE_SLACK)
        return later if begun else earlier


class NoiseLevels:
    """The noise levels that a sampler evaluates, told from its progress calls as far as that is certain.

    A value that Python reads from a tensor makes it wait until the GPU has done all that it was asked for. So not every level is
    read: most of ComfyUI's own loops evaluate at ``sigmas[i]`` only, between the progress calls of steps i - 1 and i. Whether
    this one does shows in its first steps, which are read; where one of them is at another level, all are.
    """

    def __init__(self, sigmas: torch.Tensor, sampler: Any) -> None:
        self._sigmas: list[float] = sigmas.tolist()
        self.done = 0  # steps that the sampler has told its progress bar of
        self._follows_schedule = is_comfy_loop(sampler)

    def hearing(self, progress: Callable[..., None] | None) -> Callable[..., None]:
        """Return ``progress(step, denoised, x, steps)``, which the sampler calls once in each step, listened to."""

        def heard(step: int, *args: Any) -> None:
            self.done = step + 1
            if progress is not None:
                progress(step, *args)

        return heard

    def at(self, timestep: torch.Tensor) -> float:
        """Return the level of one evaluation, whose batch has ``timestep`` (sigmas, all equal)."""
        expected = self._sigmas[self.done] if self.done < len(self._sigmas) - 1 else None
        if self._follows_schedule and self.done >= _CHECKED_STEPS and expected is not None:
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
        return on_one_stack(executor, guider, sigmas, extra_args, levels.hearing(progress), *args, **kwargs)


def read_sigma(timestep: torch.Tensor, options: ModelOptions) -> tuple[float, ModelOptions]:
    """Return the noise level of a sampler's evaluation, and the options to go on with, which tell it to the other nodes."""
    sigma = options.get(_SIGMA)
    if sigma is None:
        levels: NoiseLevels | None = run_state(options, _LEVELS)
        sigma = float(timestep.max()) if levels is None else levels.at(timestep)
        options = {**options, _SIGMA: sigma}
    return sigma, options


def acting_controls(conds: Iterable[Sequence[Mapping[str, Any]] | None], sigma: float) -> tuple[bool, ...]:
    """Return which ControlNets of a running guider's prompts act at ``sigma``: those whose range of the schedule holds it."""
    acting = []
    for cond in chain.from_iterable(some or () for some in conds):
        control = cond.get("control")
        while control is not None:
            start, end = getattr(control, "timestep_range", None) or (math.inf, 0.0)
            acting.append(start >= sigma >= end)
            control = getattr(control, "previous_controlnet", None)
    return tuple(acting)


def acting_hooks(conds: Iterable[Sequence[Mapping[str, Any]] | None], sigma: float) -> tuple[int, ...]:
    """Return for each hook of a running guider's prompts how many of its keyframes have begun at ``sigma``: a LoRA's strength."""
    groups = [cond.get("hooks") for cond in chain.from_iterable(some or () for some in conds)]
    hooks = chain.from_iterable(group.hooks for group in groups if group is not None)
    return tuple(sum(keyframe.start_t >= sigma for keyframe in hook.hook_keyframe.keyframes) for hook in hooks)


def steps_done(options: ModelOptions) -> int | None:
    """Return how many steps the sampler has told its progress bar of; None where ``follow_sampler`` does not listen."""
    levels: NoiseLevels | None = run_state(options, _LEVELS)
    return None if levels is None else levels.done
