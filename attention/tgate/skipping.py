"""Whole steps after the gate are skipped where their predictions can be extrapolated.

On this pack's models dropping guidance is what costs T-GATE the image, and dropping attention saves little. So here both
prompts are computed, or none of them: a step's predictions are then taken from the straight line through the last two
computed ones (``Line``). Each computed step shows how far off that line would have been, which tells the error to expect of
the next step. The step is skipped where that error, in what the step changes of the image, is at most ``max_error``.

Like EasyCache it works with every network, also with compiled ones, those with joint attention and at CFG 1; unlike it, it
extrapolates, prompt by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any
from uuid import UUID

import torch

from .. import host
from ..host import ModelOptions, StepClock, follow_sampler, read_sigma
from .extrapolation import Line
from .plan import GateWindow, gate_window
from .report import evaluated_in_parts, no_step_left
from .settings import TGateSettings

KEY = host.GATE


class SkippingRun:
    """The state of one sampling run, made when it starts.

    Args:
        clock: the run's sigmas.
        window: the steps that may be skipped.
        images: that are sampled.
        multistep: the sampler goes on from the last predictions, too.
    """

    def __init__(
        self, settings: TGateSettings, clock: StepClock, window: GateWindow, images: int = 1, *, multistep: bool = False
    ) -> None:
        self.settings, self.clock, self.window, self.images = settings, clock, window, images
        self.grows = growth_of_errors(clock.sigmas[window.gate :]) if multistep else 1.0
        self.prompts, self.guided = Line(), Line()  # each prompt's prediction, and the guided one, whose error counts
        self.step = -1
        self.sigma = 0.0
        self.evaluations = 0  # of this step
        self.at_a_step = 1  # how many the last step had: 2 for Heun and its kin
        self.skips = False  # this step is skipped
        self.computed = False  # this evaluation was computed
        self.latent_shape = torch.Size()
        self.awaits_main_call = False  # the next batch of conds is the sampler's own
        self.acting: tuple[Any, ...] = ()  # prompts, ControlNets, hooks and attention replacements of the last evaluation
        self.another_skipped = False  # EasyCache or LazyCache answered since the last computed step
        self.skipped: set[int] = set()
        self.other_cache = ""  # EasyCache or LazyCache, where one acts in this run
        self.other_skips = 0  # how often it has skipped
        self.by_other_cache: set[int] = set()
        self.beside: set[int] = set()  # skipped steps in which a guider or another node evaluates prompts of its own
        self.refused: dict[int, float] = {}  # steps with too large an error to expect, and that error
        self.stopped = ""

    def begin_evaluation(self, sigma: float, latent_shape: torch.Size, done: int | None, cache: tuple[str, int]) -> None:
        """Take note of a sampler's evaluation at ``sigma``, and decide about its step where it is the first of it.

        Args:
            cache: ComfyUI's cache that acts in this run, and how often it has skipped.
        """
        step = self.clock.step_at(sigma, done)
        self.other_cache, skips = cache
        if skips > self.other_skips:
            self.by_other_cache |= set(range(self.step + 1, step)) or {self.step}
        self.other_skips = skips
        self.sigma, self.latent_shape, self.computed = sigma, latent_shape, False
        if step == self.step:
            self.evaluations, self.awaits_main_call = self.evaluations + 1, True
            return
        self.another_skipped |= step - self.step > 1 or self.awaits_main_call
        self.at_a_step, self.evaluations = max(self.evaluations, 1), 1
        self.step, self.awaits_main_call = step, True
        self.skips = not self.stopped and self._may_skip()

    @property
    def near_the_gate(self) -> bool:
        """Return whether what is computed now may be needed: a line takes three steps to be known."""
        return self.window.gate - 3 <= self.step < self.window.full_from

    def _may_skip(self) -> bool:
        if not self.window.gate <= self.step < self.window.full_from or self.another_skipped:
            return False
        error = self._expected_error()
        if error > self.settings.max_error:
            self.refused[self.step] = error
        return error <= self.settings.max_error

    def _expected_error(self) -> float:
        """Return the error to expect of the image after this step, were it skipped, as a share of the image's norm.

        A step takes that share of its prediction that the noise level falls. Where a step has several evaluations, the last
        one is at the next step's level. Multistep samplers carry it on, and it grows.
        """
        start, end = self.clock.sigmas[self.step : self.step + 2]
        changes = min(abs(1 - end / start), 1.0) if start > 0 else 1.0
        if self.at_a_step > 1 and end <= 0:
            return math.inf
        return changes * self.grows * self.guided.expected_error(self.sigma if self.at_a_step == 1 else end)

    def see(self, acting: tuple[Any, ...]) -> None:
        """Begin anew where something else acts than in the last evaluation: the line does not lead on from there."""
        if acting != self.acting:
            self.skips = False
            self.prompts.clear()
            self.guided.clear()
        self.acting = acting

    def stop(self, reason: str) -> None:
        """Skip nothing for the rest of the run."""
        self.stopped, self.skips = reason, False
        self.release()

    def release(self) -> None:
        """Free all tensors."""
        self.prompts.clear()
        self.guided.clear()

    def summary(self) -> str:
        """Return the run's log line."""
        text = f"T-GATE: {len(self.skipped)} of {self.clock.steps} steps skipped, their predictions extrapolated"
        return "; ".join([text, *self._reasons()])

    def _reasons(self) -> list[str]:
        reasons = []
        if unused := self.settings.unused:
            reasons.append(f"{', '.join(unused)} {'acts' if len(unused) == 1 else 'act'} only where schedule is 'as published'")
        if self.stopped:
            return [*reasons, f"switched off in this run: {self.stopped}"]
        if self.window.gate >= self.window.full_from:
            return [*reasons, no_step_left(self.settings, self.clock.steps)]
        if self.by_other_cache:
            reasons.append(f"{self.other_cache} skipped {len(self.by_other_cache)} more")
        elif self.other_cache and self.skipped:
            reasons.append(f"{self.other_cache} skipped none (the step after one that is skipped here is always computed)")
        if self.beside:
            reasons.append(
                f"in {len(self.beside)} of them prompts were computed that the guider or another node evaluates by themselves"
            )
        known = [error for error in self.refused.values() if math.isfinite(error)]
        if not self.skipped and self.by_other_cache:
            reasons.append("the step after one of those is always computed, which left too little to extrapolate")
        elif not self.skipped and known:
            reasons.append(
                f"the error to expect was {min(known):.2g} or more, and max_error is {self.settings.max_error:g} (samplers that "
                "add noise in every step, multistep samplers with long last steps, and few steps leave little to extrapolate)"
            )
        elif not self.skipped:
            reasons.append(
                "too few steps were computed one after the other, each at less noise than the last, to know what a skipped one "
                "would cost"
            )
        return reasons


def growth_of_errors(sigmas: Sequence[float]) -> float:
    """Return how much an error in one of two predictions grows in the steps of a multistep sampler of second order, at least 1.

    It goes on along the line through both, so a step that is long beside the last one takes the error many times over, as the
    last but one of the *normal* schedule does.
    """
    worst = 1.0
    for before, now, after in zip(sigmas, sigmas[1:], sigmas[2:], strict=False):
        if before > now > after > 0:
            worst = max(worst, (1 - after / now) * (1 + math.log(now / after) / math.log(before / now)))
    return worst


class StepSkipping:
    """Wrappers of one ``TGateCache`` node that skips whole steps. Holds settings only; a run's state lives in its options."""

    def __init__(self, settings: TGateSettings) -> None:
        self.settings = settings
        self.text = host.NodeText()

    def outer_sample(
        self, executor: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Make the state of a run, and say at its end what was done."""
        guider = executor.class_obj
        clock = StepClock.from_sigmas(sigmas)
        window = gate_window(self.settings, clock, partial(host.sigma_at_share, guider))
        run = SkippingRun(self.settings, clock, window, len(noise), multistep=host.uses_last_predictions(sampler))
        try:
            with host.run_scope(guider, KEY, run):
                return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            self.text.tell(run.summary())
            run.release()

    sampler_sample = staticmethod(follow_sampler)

    def predict_noise(
        self, executor: Any, x: torch.Tensor, timestep: torch.Tensor, model_options: ModelOptions, seed: Any = None
    ) -> Any:
        """Decide about an evaluation, and measure what it computed."""
        run: SkippingRun | None = host.run_state(model_options, KEY)
        if run is None:
            return executor(x, timestep, model_options, seed)
        sigma, model_options = read_sigma(timestep, model_options)
        run.begin_evaluation(sigma, x.shape, host.steps_done(model_options), host.cache_skips(model_options))
        image = executor(x, timestep, model_options, seed)
        if run.computed and run.near_the_gate:
            if run.step >= run.window.gate - 1:
                run.guided.measure(x, image, sigma)
            run.guided.add(x, [image], sigma)
        return image

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: list[Any], x: torch.Tensor, timestep: torch.Tensor, model_options: ModelOptions
    ) -> Any:
        """Return the predictions of the sampler's own evaluation: computed, or extrapolated."""
        run: SkippingRun | None = host.run_state(model_options, KEY)
        own = run is not None and run.awaits_main_call and not host.run_state(model_options, host.INTERNAL_PASS)
        if run is None or not own or run.stopped:
            if run is not None and run.skips and not host.run_state(model_options, host.INTERNAL_PASS):
                run.beside.add(run.step)
            return executor(model, conds, x, timestep, model_options)
        run.awaits_main_call = False
        in_parts = evaluated_in_parts(x, run.latent_shape, run.images)
        if in_parts:
            run.stop(in_parts)
            return executor(model, conds, x, timestep, model_options)
        acts = [tuple(_uuids(one, run.sigma)) for one in conds]
        others = host.acting_controls(conds, run.sigma), host.acting_hooks(conds, run.sigma)
        run.see((*acts, *others, host.acting_replacements(model_options, "attn2", run.sigma)))
        if run.skips:
            run.skipped.add(run.step)
            host.make_caches_compute(model_options)  # they compare with the last step, which was not computed
            predictions = iter(run.prompts.at(x, run.sigma))
            return [next(predictions) if active else torch.zeros_like(x) for active in acts]
        predictions = executor(model, conds, x, timestep, model_options)
        run.another_skipped = host.easycache_skipped(model_options)
        if run.another_skipped:
            run.by_other_cache.add(run.step)
        else:
            run.computed = True
            if run.near_the_gate:
                run.prompts.add(x, [image for image, active in zip(predictions, acts, strict=True) if active], run.sigma)
        return predictions


def _uuids(conds: Any, sigma: float) -> list[UUID]:
    """Return which conds of a list act at a noise level."""
    return [cond["uuid"] for cond in conds or () if host.is_active(cond, sigma)]
