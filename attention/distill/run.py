"""The state of one run: optimising the latent between denoising steps, or without any."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import host
from ..gradient.model_pass import ModelPass
from .adain import adain
from .content import Content
from .job import DistillJob
from .losses import CallKey, DistillObjective
from .references import Purpose, References
from .regions import Regions
from .report import DistillReport
from .settings import Method
from .windows import Window, average


class DistillRun:
    """The state of one run; released when the sampler returns."""

    def __init__(
        self, job: DistillJob, progress: host.Progress, report: DistillReport, model: Any, extra_args: Mapping[str, Any]
    ) -> None:
        guider = model.inner_model
        self.job, self.settings, self.progress, self.report = job, job.settings, progress, report
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
            """Return the null prompt for a reference. As published, SDXL is told the size of the target (of a window)."""
            return host.processed_cond(self.base_model, {**size, **prompt}, latent, seed, latent)

        self.references = References(
            self.passes,
            [self._clean(reference) for reference in job.references],
            cond_for,
            _weights_key(guider),
            with_noise=self.settings.method is Method.GUIDED,
            shares=job.reference_weights,
            one_each=job.one_each,
        )
        self.weights_of_pixels = job.weights_of_pixels()
        self.start = None if job.content is None else self._clean(job.content)
        self.content: Content | None = None
        if self.start is not None and self.settings.content_weight != 0:
            guided = self.settings.method is Method.GUIDED
            self.content = Content(self.passes, self.start, self.windows, self.conds, with_noise=guided)

    def _clean(self, latent: Tensor) -> Tensor:
        """Return a latent from a VAE in the units of the model."""
        clean: Tensor = self.base_model.process_latent_in(latent.to(self.device, torch.float32))
        return clean

    # Methods

    def after_step(self, x: Tensor, step: int, left: float, reached: float, denoised: Tensor | None) -> Tensor:
        """Return ``x`` optimised where a denoising step has brought it, from the sigma ``left`` to ``reached``."""
        sigma = reached if host.is_flow(self.base_model) else max(reached, host.smallest_sigma(self.base_model))
        scale, mask = self._scale(sigma), self._mask(left)
        before = x.float()
        z = _trainable(self._with_colours(before, sigma, 1 / scale, mask) * scale)
        signal = float(host.noised(self.base_model, torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), reached))

        def estimate() -> Tensor | None:
            """Return the finished image, if the noise that is left stays as it is."""
            if denoised is None or signal < 1e-3:
                return denoised
            return denoised + (z / scale - before) / signal

        self.progress.tick(before, denoised)
        self._descend(z, torch.optim.Adam([z], lr=self.job.learning_rate), step, sigma, scale, mask, estimate)
        return (z / scale).to(x.dtype)

    def optimise(self, z: Tensor, steps: Sequence[tuple[int, float]]) -> Tensor:
        """Return the clean latent ``z`` after a descent at each (step, sigma), with one Adam for all."""
        z = _trainable(z)
        mask = self._mask(steps[0][1]) if steps else None
        if mask is not None:
            z.copy_(z * mask + self.known * (1 - mask))
        adam = torch.optim.Adam([z], lr=self.job.learning_rate)
        for step, sigma in steps:
            scale, mask = self._scale(sigma), self._mask(sigma)
            z.copy_(self._with_colours(z / scale, sigma, 1 / scale, mask) * scale)
            self._descend(z, adam, step, sigma, scale, mask, z.clone)
        return z.clone()

    def _descend(
        self,
        z: Tensor,
        adam: torch.optim.Optimizer,
        step: int,
        sigma: float,
        scale: float,
        mask: Tensor | None,
        estimate: Callable[[], Tensor | None],
    ) -> None:
        """Some steps of Adam on ``z``, in place."""
        level = z.new_full((self.batch,), sigma, dtype=torch.float32)
        objectives = self._objectives(sigma, level)
        losses: list[float] = []
        style: list[float] = []
        content: list[float] = []
        for _ in range(self.job.iterations):
            found, gradient = self._gradient(z / scale, level, objectives)
            loss, finite = torch.stack([found, gradient.isfinite().all().to(found)]).tolist()  # the device is waited for once
            if not math.isfinite(loss) or not finite:
                raise RuntimeError(self._why_not_finite(z, objectives[0], step, len(losses)))
            losses.append(loss)
            if self.content is not None:
                style.append(_mean([objective.style_loss for objective in objectives]))
                content.append(_mean([objective.content_loss for objective in objectives]))
            _move(z, gradient / scale, adam, mask)
            self.progress.tick(z / scale, estimate())
        entry: dict[str, Any] = {"step": step, "sigma": sigma, "loss": losses}
        if self.content is not None:
            entry.update(style_loss=style, content_loss=content)
        self.report.steps.append(entry)
        self.report.reused, self.report.computed = self.references.reused, self.references.computed

    # Parts

    def prompts_in_windows(self) -> AbstractContextManager[None]:
        """Let the guider's prompts act in every window, while the block lasts."""
        if len(self.windows) == 1:
            return nullcontext()
        areas = [window.area for window in self.windows]
        if not self.job.circular and not host.limited_prompts(self.model.inner_model):
            return host.prompts_by_area(self.model.inner_model, areas)
        return host.calls_in_windows(
            self.extra_args["model_options"], areas, lambda place: self.progress.show_within(place / len(areas))
        )

    def _objectives(self, sigma: float, level: Tensor) -> list[DistillObjective]:
        """Return the loss of each window; all share the references' features."""
        features = self.references.features(sigma)
        none: list[None] = [None] * len(self.windows)
        content: Sequence[Mapping[CallKey, Tensor] | None] = none if self.content is None else self.content.queries(sigma, level)
        regions: Sequence[Regions | None] = self.job.regions or none
        return [
            DistillObjective(features, queries, self.settings.content_weight, self.settings.attn_scale, own_regions)
            for queries, own_regions in zip(content, regions, strict=True)
        ]

    def _gradient(self, x: Tensor, level: Tensor, objectives: Sequence[DistillObjective]) -> tuple[Tensor, Tensor]:
        """Return the mean loss, and its gradient with respect to ``x``: of every window, averaged where they overlap."""
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for place, (window, cond, objective) in enumerate(zip(self.windows, self.conds, objectives, strict=True)):
            self.progress.show_within(place / len(self.windows))
            found = self.passes.gradient(cond, window.of(x), level, objective)
            assert found is not None
            losses.append(found.loss)
            gradients.append(found.latent)
        return torch.stack(losses).mean(), average(gradients, self.windows, x)

    def _scale(self, sigma: float) -> float:
        return float(host.input_scale(self.base_model, torch.tensor([sigma])))

    def _mask(self, sigma: float) -> Tensor | None:
        """Return what a step from ``sigma`` may change, never more of a place than the noise mask says.

        Differential Diffusion ends with steps for the whole image, too small to harm what is black: AdaIN is not.
        """
        found = host.denoise_mask(self.model, self.extra_args, torch.full((self.batch,), sigma, device=self.device))
        return None if found is None else found.minimum(self.extra_args["denoise_mask"])

    def _with_colours(self, x: Tensor, sigma: float, unit: float, mask: Tensor | None) -> Tensor:
        if not self.settings.uses_adain:
            return x
        references, weights = self.references.at(sigma, Purpose.COLOURS), self.weights_of_pixels
        if not self.job.one_each:
            return adain(x, references, epsilon=1e-6 * unit, mask=mask, weights=weights)
        none: list[None] = [None] * len(x)
        masks: Sequence[Tensor | None] = none if mask is None else mask.expand(len(x), *mask.shape[1:]).split(1)
        own_weights: Sequence[Tensor | None] = none if weights is None else weights
        parts = zip(x.split(1), references, masks, own_weights, strict=True)
        return torch.cat([
            adain(image, [reference], epsilon=1e-6 * unit, mask=part, weights=None if weight is None else [weight])
            for image, reference, part, weight in parts
        ])  # fmt: skip

    def _why_not_finite(self, z: Tensor, objective: DistillObjective, step: int, iteration: int) -> str:
        where = f"The loss of Attention Distillation is not a number in step {step}, iteration {iteration}"
        if not bool(z.isfinite().all()):
            cause = (
                "the latent already was none, so the model or another node on it gives NaN. Try without Attention Distillation"
            )
        elif not all(bool(f.k.isfinite().all() and f.v.isfinite().all()) for each in objective.features for f in each.values()):
            cause = "the model gives NaN for the reference. Try another reference, or start ComfyUI with --force-upcast-attention"
        else:
            cause = (
                "the latent was moved out of what the model can compute. Lower learning_rate, or run the model in bf16 or fp32"
            )
        return f"{where}. Likely cause: {cause}."


def _weights_key(guider: Any) -> tuple[Any, ...] | None:
    """Return a key that changes with what the running model computes; None where that cannot be known."""
    weights, tiling = host.weights_key(guider), host.tiling_key(host.diffusion_model(guider.inner_model))
    return None if weights is None or tiling is None else (weights, tiling)


def _trainable(z: Tensor) -> Tensor:
    """Return a copy that Adam may change, under inference mode too."""
    with torch.inference_mode(False):
        return z.clone()


def _move(z: Tensor, gradient: Tensor, adam: torch.optim.Optimizer, mask: Tensor | None) -> None:
    with torch.inference_mode(False):
        before = None if mask is None else z.clone()
        z.grad = gradient.clone()
        adam.step()
        z.grad = None
        if mask is not None and before is not None:
            z.copy_(before + mask * (z - before))


def _mean(losses: Sequence[Mapping[int, Tensor]]) -> float:
    """Return the mean over all windows' images."""
    return float(torch.stack([loss for of_window in losses for loss in of_window.values()]).mean())
