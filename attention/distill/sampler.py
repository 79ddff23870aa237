"""Attention Distillation: give an image the style, texture or appearance of references, by optimising its latent.

Zhou et al., "Attention Distillation: A Unified Approach to Visual Characteristics Transfer" (arXiv:2502.20235, CVPR 2025).
The loss (``distill_losses``) asks the last self-attentions of the network to give what they would give with the keys and
values of the references at the same noise level. Two methods, as published:

``guided sampling``: after every denoising step, some steps of a new Adam on the latent at the sigma it has arrived at.
``optimise``: no denoising. One Adam for the whole run; each sigma of the run is a time at which the network is given the
clean latent, the clean references and the clean content.

Adam's learning rate is in the units of the network's input, z = x * input_scale, which are variance preserving for eps and v
models; ComfyUI's x is not. With one iteration a step, Adam moves every element by the learning rate, whatever the loss.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import host
from ..gradient.cost import prompts_of_a_step
from ..gradient.levels import makes_room
from ..host import log
from .cost import cost_line
from .job import DistillJob
from .report import DistillReport
from .run import DistillRun
from .settings import Method


class Distillation:
    """Makes the SAMPLER of one job, and keeps what the run leaves to report."""

    def __init__(self, job: DistillJob, sampler: Any, steps: int, progress: host.Progress) -> None:
        self.job = job
        self.inner = sampler
        self.steps = job.settings.chosen_steps(steps)
        self.progress = progress
        self.report = DistillReport()

    @staticmethod
    def ticks(job: DistillJob, steps: int) -> int:
        """Return how often a run's progress moves."""
        denoising = steps if job.settings.method is Method.GUIDED else 0
        return denoising + len(job.settings.chosen_steps(steps)) * job.iterations

    @property
    def sampler(self) -> Any:
        if self.job.settings.method is Method.OPTIMISE:
            return host.own_sampler(self._optimise)

        @functools.wraps(self.inner.sampler_function)
        def guided(*args: Any, **kwargs: Any) -> Tensor:
            return self._guided(*args, **kwargs)

        return host.own_sampler(guided, like=self.inner)

    def _guided(
        self,
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Any = None,
        callback: Any = None,
        disable: Any = None,
        **options: Any,
    ) -> Tensor:
        """Return the inner sampler, a part at a time; between two parts the latent is optimised."""
        run = DistillRun(self.job, self.progress, self.report, model, extra_args)
        with run.prompts_in_windows():
            return self._in_parts(run, model, x, sigmas, extra_args, callback, options)

    def _in_parts(
        self,
        run: DistillRun,
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Any,
        callback: Any,
        options: Mapping[str, Any],
    ) -> Tensor:
        last: dict[str, Any] = {}

        def on_step(state: Mapping[str, Any], start: int) -> None:
            last.update(state, i=start + state["i"])
            if callback is not None:
                callback(dict(last))

        ends = [step + 1 for step in self.steps]
        starts = [0, *ends]
        for part, (start, end) in enumerate(zip(starts, [*ends, len(sigmas) - 1], strict=True)):
            if end > start:
                arguments = {**extra_args, "seed": _seed_of_part(extra_args.get("seed"), part)}
                x = self.inner.sampler_function(
                    model,
                    x,
                    sigmas[start : end + 1].clone(),
                    extra_args=arguments,
                    callback=functools.partial(on_step, start=start),
                    disable=True,
                    **options,
                )
            if part < len(ends):
                x = run.after_step(x, self.steps[part], float(sigmas[end - 1]), float(sigmas[end]), last.get("denoised"))
        return x

    def _optimise(
        self, model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None
    ) -> Tensor:
        """From the content, or from noise, without a denoising step."""
        run = DistillRun(self.job, self.progress, self.report, model, extra_args)
        start = model.noise if run.start is None else run.start.expand_as(model.noise)
        clean = run.optimise(start.float(), [(step, float(sigmas[step])) for step in self.steps])
        return host.noised(run.base_model, clean, torch.zeros_like(clean), float(sigmas[-1]))


def _seed_of_part(seed: int | None, part: int) -> int | None:
    """Return the seed of one part: stochastic samplers draw all their noise from it, and the first part keeps the run's."""
    return seed if seed is None or part == 0 else (seed + part * 0x9E3779B97F4A7C15) % 2**63


def _cost_line(job: DistillJob, guider: Any, steps: int) -> str:
    settings = job.settings
    optimised, latents = len(settings.chosen_steps(steps)), len(job.references) + (job.content is not None)
    prompts, windows = prompts_of_a_step(guider), len(job.windows)
    return cost_line(settings.method, settings.memory, steps, optimised, job.iterations, windows, latents, prompts)


def _costs_of_windows(job: DistillJob, steps: int) -> list[str]:
    count, settings = len(job.windows), job.settings
    if count == 1:
        return []
    optimised = len(settings.chosen_steps(steps))
    parts = [f"{optimised} times {count * job.iterations} gradient passes"]
    if settings.method is Method.GUIDED:
        parts.insert(0, f"{steps} steps of {count} model calls for each prompt")
    return [
        f"{count} windows, so this run has {' and '.join(parts)}; a larger window_stride ({settings.window_stride}) needs fewer"
    ]


def sample_distilled(
    job: DistillJob, noise: Any, guider: Any, sampler: Any, sigmas: Tensor, latent: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return what SamplerCustomAdvanced does, with Attention Distillation: two latents, and the report.

    Args:
        latent: as ``host.fitting_latent`` returns it.
    """
    if job.model is not guider.model_patcher:
        guider = copy.copy(guider)
        guider.model_patcher = job.model
    text = host.NodeText()
    steps = max(len(sigmas) - 1, 0)
    optimises = job.settings.method is Method.OPTIMISE
    if not job.settings.chosen_steps(steps) and not (optimises and steps):
        report = DistillReport()
        output, denoised = host.sample_plainly(guider, noise, sampler, sigmas, latent)
        text.tell(report.summary(job))
        return output, denoised, report.as_json(job)
    costs = [*job.costs, *_costs_of_windows(job, steps)]
    for line in costs:
        log.info("Attention Distillation: %s.", line)
    text.foretell("; ".join([_cost_line(job, guider, steps), *costs]))
    ticks = Distillation.ticks(job, steps)
    show = host.preview_callback(guider.model_patcher, ticks)
    progress = host.Progress(ticks, preview=show, console="Attention Distillation" if host.shows_console_progress() else "")
    distillation = Distillation(job, sampler, steps, progress)

    def on_step(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        if step not in distillation.steps:
            progress.tick(x, denoised)

    try:
        with host.prepared_by(guider, "fovea.distill", makes_room(job.settings.memory)):
            samples = host.sample(guider, noise, distillation.sampler, sigmas, latent, on_step)
    finally:
        progress.close()
        text.tell(distillation.report.summary(job))
    output = {**latent, "samples": samples}
    if progress.denoised is None:
        return output, output, distillation.report.as_json(job)
    base_model = guider.model_patcher.model
    denoised = {**latent, "samples": base_model.process_latent_out(progress.denoised.cpu())}
    return output, denoised, distillation.report.as_json(job)
