"""Attention Distillation: give a picture the style, texture or appearance of references, by optimising its latent.

Zhou et al., "Attention Distillation: A Unified Approach to Visual Characteristics Transfer" (arXiv:2502.20235, CVPR 2025).
The loss (``distill_losses``) asks the last self-attentions of the network to give what they would give if they looked at the
references at the same noise level. Two methods, as published:

``guided sampling``: after every denoising step, some steps of a new Adam on the latent at the sigma it has arrived at.
``optimise``: no denoising. One Adam for the whole run; each sigma of the run is a time at which the network looks at the
clean latent, at the clean references and at the clean content.

Adam's learning rate is in the units of the network's input, z = x * input_scale, which are variance preserving for eps and v
models; the host's x is not. With one iteration a step, Adam moves every element by the learning rate, whatever the loss.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import host
from .distill_job import DistillJob, Method
from .distill_losses import CallKey, DistillObjective, adain, call_key
from .distill_reference import Purpose, References, noised_alike
from .gradient import ModelPass
from .host import log
from .layer_names import list_layers
from .windows import Window, average

# --- one run ---------------------------------------------------------------------------------------------------------------


@dataclass
class DistillReport:
    """What happened: one entry for each step that was optimised."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    reused: int = 0
    computed: int = 0

    def as_json(self, job: DistillJob) -> dict[str, Any]:
        settings = job.settings
        return {
            "method": settings.method.value,
            "iterations": job.iterations,
            "learning_rate": job.learning_rate,
            "adain": settings.uses_adain,
            "layers": [layer.name for layer in job.layers],
            "references": len(job.references),
            "content_weight": settings.content_weight if job.content is not None else None,
            "windows": len(job.windows),
            "reference_features": {"reused": self.reused, "computed": self.computed},
            "steps": self.steps,
        }

    def summary(self, job: DistillJob) -> str:
        text = f"Attention Distillation: {job.settings.method.value}, "
        if not self.steps:
            return text + "no step of the run was optimised"
        losses = [loss for step in self.steps for loss in step["loss"]]
        text += (
            f"{len(losses)} optimisation steps in {len(self.steps)} steps on {list_layers([layer.name for layer in job.layers])}"
        )
        text += f", loss {losses[0]:.4g} to {losses[-1]:.4g}"
        text += f", reference features reused {self.reused} of {self.reused + self.computed} times"
        if len(job.windows) > 1:
            text += f", in {len(job.windows)} windows"
        missing = set().union(*(regions.missing() for regions in job.regions or ()))
        if missing:
            text += f"; grey values {sorted(missing)} of target_mask are not in reference_mask and were left free"
        return text


class Progress:
    """Counts denoising and optimisation steps, and shows the picture as it is now.

    Args:
        callback: the host's ``callback(step, denoised, x, steps)``, which draws bar and preview.
        console: whether a bar is drawn in the console too.
    """

    def __init__(self, callback: Callable[..., None], total: int, *, console: bool = False) -> None:
        self.callback = callback
        self.total = total
        self.done = 0
        self.denoised: Tensor | None = None
        self.bar = tqdm(total=total, disable=not console, desc="Attention Distillation")

    def tick(self, x: Tensor, denoised: Tensor | None) -> None:
        self.denoised = denoised
        if denoised is not None:
            self.callback(self.done, denoised, x, self.total)
        self.done += 1
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


class Distillation:
    """Makes the SAMPLER of one job, and keeps what the run leaves to report."""

    def __init__(self, job: DistillJob, sampler: Any, steps: int, progress: Progress) -> None:
        self.job = job
        self.inner = sampler
        self.steps = job.settings.chosen_steps(steps)
        self.progress = progress
        self.report = DistillReport()

    @staticmethod
    def ticks(job: DistillJob, steps: int) -> int:
        """How often a run's progress moves."""
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
        """The inner sampler, a part at a time; between two parts the latent is optimised."""
        run = _Run(self, model, extra_args)
        with run.prompts_in_windows():
            return self._in_parts(run, model, x, sigmas, extra_args, callback, options)

    def _in_parts(
        self,
        run: _Run,
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
                x = run.after_step(x, self.steps[part], float(sigmas[end]), last.get("denoised"))
        return x

    def _optimise(
        self, model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None
    ) -> Tensor:
        """From the content, or from noise, without a denoising step."""
        run = _Run(self, model, extra_args)
        start = model.noise if run.content is None else run.content.expand_as(model.noise)
        clean = run.optimise(start.float(), [(step, float(sigmas[step])) for step in self.steps])
        return host.noised(run.base_model, clean, torch.zeros_like(clean), float(sigmas[-1]))


def _seed_of_part(seed: int | None, part: int) -> int | None:
    """Stochastic samplers draw all their noise from the seed, so each part gets its own; the first one keeps it."""
    return seed if seed is None or part == 0 else (seed + part * 0x9E3779B97F4A7C15) % 2**63


class _Run:
    """The state of one run; released when the sampler returns."""

    def __init__(self, owner: Distillation, model: Any, extra_args: Mapping[str, Any]) -> None:
        job, guider = owner.job, model.inner_model
        self.job, self.settings, self.progress, self.report = job, job.settings, owner.progress, owner.report
        self.model, self.extra_args = model, extra_args
        self.base_model = guider.inner_model
        self.passes = ModelPass(
            self.base_model, extra_args["model_options"], job.layers, job.settings.memory, keeps_patches=False
        )

        noise: Tensor = model.noise
        self.batch, self.device = len(noise), noise.device
        self.known = model.latent_image
        self.windows = job.windows
        seen = self.windows[0].of(noise)
        size = {"width": seen.shape[-1] * 8, "height": seen.shape[-2] * 8} if noise.ndim == 4 else {}
        prompt = host.prompt_everywhere(job.null_prompt, guidance=1.0)
        seed = extra_args.get("seed")
        mask = extra_args.get("denoise_mask")

        def cond_in(window: Window) -> dict[str, Any]:
            within = None if mask is None else window.of(mask)
            return host.processed_cond(self.base_model, prompt, window.of(noise), seed, window.of(self.known), within)

        self.conds = [cond_in(window) for window in self.windows]

        def cond_for(latent: Tensor) -> dict[str, Any]:
            """The null prompt for a reference. As published, SDXL is told the size of the target (of a window)."""
            return host.processed_cond(self.base_model, {**size, **prompt}, latent, seed, latent)

        self.references = References(
            self.passes,
            self._clean(job.references).split(1),
            cond_for,
            host.weights_key(guider),
            with_noise=self.settings.method is Method.GUIDED,
        )
        self.content: Tensor | None = None
        if job.content is not None:
            self.content = self._clean(job.content)

    def _clean(self, latent: Tensor) -> Tensor:
        """A latent from a VAE in the units of the model."""
        clean: Tensor = self.base_model.process_latent_in(latent.to(self.device, torch.float32))
        return clean

    # Methods

    def after_step(self, x: Tensor, step: int, sigma: float, denoised: Tensor | None) -> Tensor:
        """``x`` at the sigma where a denoising step has left it, optimised."""
        reached, sigma = sigma, sigma if host.is_flow(self.base_model) else max(sigma, host.smallest_sigma(self.base_model))
        scale = self._scale(sigma)
        before = x.float()
        z = _trainable(self._with_colours(before, sigma, 1 / scale) * scale)
        signal = float(host.noised(self.base_model, torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), reached))

        def estimate() -> Tensor | None:
            """The finished picture, if the noise that is left stays as it is."""
            if denoised is None or signal < 1e-3:
                return denoised
            return denoised + (z / scale - before) / signal

        self.progress.tick(before, denoised)
        self._descend(z, torch.optim.Adam([z], lr=self.job.learning_rate), step, sigma, scale, estimate)
        return (z / scale).to(x.dtype)

    def optimise(self, z: Tensor, steps: Sequence[tuple[int, float]]) -> Tensor:
        """The clean latent ``z`` after a descent at each (step, sigma), with one Adam for all."""
        z = _trainable(z)
        mask = self._mask(steps[0][1]) if steps else None
        if mask is not None:
            z.copy_(z * mask + self.known * (1 - mask))
        adam = torch.optim.Adam([z], lr=self.job.learning_rate)
        for step, sigma in steps:
            scale = self._scale(sigma)
            z.copy_(self._with_colours(z / scale, sigma, 1 / scale) * scale)
            self._descend(z, adam, step, sigma, scale, z.clone)
        return z.clone()

    def _descend(
        self,
        z: Tensor,
        adam: torch.optim.Optimizer,
        step: int,
        sigma: float,
        scale: float,
        estimate: Callable[[], Tensor | None],
    ) -> None:
        """Some steps of Adam on ``z``, in place."""
        mask = self._mask(sigma)
        level = z.new_full((self.batch,), sigma, dtype=torch.float32)
        objectives = self._objectives(sigma, level)
        losses: list[float] = []
        style: list[float] = []
        content: list[float] = []
        for _ in range(self.job.iterations):
            loss, gradient = self._gradient(z / scale, level, objectives)
            if not math.isfinite(loss) or not bool(gradient.isfinite().all()):
                raise RuntimeError(self._why_not_finite(z, objectives[0], step, len(losses)))
            losses.append(loss)
            style.append(_mean([objective.style_loss for objective in objectives]))
            content.append(_mean([objective.content_loss for objective in objectives]))
            _move(z, gradient / scale, adam, mask)
            self.progress.tick(z / scale, estimate())
        entry: dict[str, Any] = {"step": step, "sigma": sigma, "loss": losses}
        if self._keeps_content:
            entry.update(style_loss=style, content_loss=content)
        self.report.steps.append(entry)
        self.report.reused, self.report.computed = self.references.reused, self.references.computed

    # Parts

    def prompts_in_windows(self) -> AbstractContextManager[None]:
        """Lets the guider's prompts act in every window, while the block lasts."""
        if len(self.windows) == 1:
            return nullcontext()
        return host.prompts_by_area(self.model.inner_model, [window.area for window in self.windows])

    def _objectives(self, sigma: float, level: Tensor) -> list[DistillObjective]:
        """For each window; all share the references' features."""
        features, content = self.references.features(sigma), self._content_at(sigma)
        return [
            DistillObjective(
                features,
                None if content is None else self._content_queries(place, content, level),
                self.settings.content_weight,
                self.settings.attn_scale,
                self.job.regions[place] if self.job.regions else None,
            )
            for place in range(len(self.windows))
        ]

    def _gradient(self, x: Tensor, level: Tensor, objectives: Sequence[DistillObjective]) -> tuple[float, Tensor]:
        """The mean loss, and its gradient with respect to ``x``: of every window, averaged where they overlap."""
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for window, cond, objective in zip(self.windows, self.conds, objectives, strict=True):
            host.check_interrupted()
            found = self.passes.gradient(cond, window.of(x), level, objective)
            assert found is not None
            losses.append(found.loss)
            gradients.append(found.latent)
        return float(torch.stack(losses).mean()), average(gradients, self.windows, x)

    def _scale(self, sigma: float) -> float:
        return float(host.input_scale(self.base_model, torch.tensor([sigma])))

    def _mask(self, sigma: float) -> Tensor | None:
        return host.denoise_mask(self.model, self.extra_args, torch.full((self.batch,), sigma, device=self.device))

    def _with_colours(self, x: Tensor, sigma: float, unit: float) -> Tensor:
        if not self.settings.uses_adain:
            return x
        references = self.references.at(sigma, Purpose.COLOURS)
        return adain(x, references, epsilon=1e-6 * unit, mask=self._mask(sigma))

    @property
    def _keeps_content(self) -> bool:
        return self.content is not None and self.settings.content_weight != 0

    def _content_at(self, sigma: float) -> Tensor | None:
        """The content as the model is to see it, (batch, channels, ...); None where nothing of it is kept."""
        if self.content is None or not self._keeps_content:
            return None
        if self.settings.method is Method.GUIDED:
            x = torch.cat(noised_alike(self.base_model, self.content.split(1), sigma, Purpose.CONTENT))
        else:
            x = self.content / self._scale(sigma)
        return x.expand(self.batch, *x.shape[1:])

    def _content_queries(self, place: int, content: Tensor, level: Tensor) -> dict[CallKey, Tensor]:
        """The content's queries in every call of a window, computed in the same batches and by the same kernels as the latent's.

        Where the latent is the content, as at the start of 'optimise', any difference would be noise that Adam enlarges.
        """
        x = self.windows[place].of(content)
        found: dict[CallKey, list[Tensor]] = {}
        with host.differentiable_kernels():
            for rows in self.passes.parts(x, torch.arange(self.batch, device=x.device)):
                measured = self.passes.look(
                    self.conds[place], x[rows], level[rows], lambda layer, call: (call_key(layer, call), call.inputs.q)
                )
                for _, (key, q) in measured:
                    found.setdefault(key, []).append(q.clone())
        return {key: torch.cat(queries) for key, queries in found.items()}

    def _why_not_finite(self, z: Tensor, objective: DistillObjective, step: int, iteration: int) -> str:
        where = f"The loss of Attention Distillation is not a number in step {step}, iteration {iteration}"
        if not bool(z.isfinite().all()):
            cause = (
                "the latent already was none, so the model or another node on it gives NaN. Try without Attention Distillation"
            )
        elif not all(bool(f.k.isfinite().all() and f.v.isfinite().all()) for f in objective.features.values()):
            cause = "the model gives NaN for the reference. Try another reference, or start ComfyUI with --force-upcast-attention"
        else:
            cause = (
                "the latent was moved out of what the model can compute. Lower learning_rate, or run the model in bf16 or fp32"
            )
        return f"{where}. Likely cause: {cause}."


def _trainable(z: Tensor) -> Tensor:
    """A copy that Adam may change, under inference mode too."""
    with torch.inference_mode(False):
        return z.clone()


def _move(z: Tensor, gradient: Tensor, adam: torch.optim.Optimizer, mask: Tensor | None) -> None:
    with torch.inference_mode(False):
        before = z.clone()
        z.grad = gradient.clone()
        adam.step()
        z.grad = None
        if mask is not None:
            z.copy_(before + mask * (z - before))


def _mean(losses: Sequence[Mapping[int, Tensor]]) -> float:
    """Of all windows' pictures."""
    return float(torch.stack([loss for of_window in losses for loss in of_window.values()]).mean())


# --- the whole node --------------------------------------------------------------------------------------------------------


def sample_distilled(
    job: DistillJob, noise: Any, guider: Any, sampler: Any, sigmas: Tensor, latent: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What SamplerCustomAdvanced does, with Attention Distillation: two latents, and the report.

    Args:
        latent: as ``host.fitting_latent`` returns it.
    """
    steps = max(len(sigmas) - 1, 0)
    optimises = job.settings.method is Method.OPTIMISE
    if not job.settings.chosen_steps(steps) and not (optimises and steps):
        report = DistillReport()
        output, denoised = host.sample_plainly(guider, noise, sampler, sigmas, latent)
        log.info(report.summary(job))
        return output, denoised, report.as_json(job)
    ticks = Distillation.ticks(job, steps)
    show = host.preview_callback(guider.model_patcher, ticks)
    progress = Progress(show, ticks, console=host.shows_console_progress())
    distillation = Distillation(job, sampler, steps, progress)

    def on_step(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        if step not in distillation.steps:
            progress.tick(x, denoised)

    try:
        samples = host.sample(guider, noise, distillation.sampler, sigmas, latent, on_step)
    finally:
        progress.close()
        log.info(distillation.report.summary(job))
    output = {**latent, "samples": samples}
    if progress.denoised is None:
        return output, output, distillation.report.as_json(job)
    base_model = guider.model_patcher.model
    denoised = {**latent, "samples": base_model.process_latent_out(progress.denoised.cpu())}
    return output, denoised, distillation.report.as_json(job)
