"""TODO"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import host
from ..gradient.model_pass import ModelPass
from ..gradient.watch import Gradient
from ..host import seen_by_the_model
from .layers import GuidedLayers
from .objective import ExciteObjective
from .settings import ExciteSettings
from .subjects import GuidedPrompt


@dataclass
class Counts:
    """What one run did."""

    guided: int = 0
    refinements: int = 0
    skipped: int = 0


class ExciteRun:
    """Moves the latent of one sampling run."""

    def __init__(
        self,
        base_model: Any,
        prompts: list[tuple[dict[str, Any], GuidedPrompt]],
        settings: ExciteSettings,
        chosen: GuidedLayers,
        steps: int,
        options: host.ModelOptions,
    ) -> None:
        self.base_model = base_model
        self.prompts = prompts
        self.settings = settings
        self.steps = steps
        self.chosen = chosen
        self.passes = ModelPass(self.base_model, options, self.chosen.layers, settings.memory)
        self.counts = Counts()
        self.first: Tensor | None = None  # (batch, subjects): before anything was moved, and last seen
        self.last: Tensor | None = None
        self.progress = host.Progress(steps)

    @property
    def names(self) -> list[str]:
        return [subject.name for _, prompt in self.prompts for subject in prompt.subjects]

    def before_step(self, model: Any, step: int, x: Tensor, sigma: Tensor, call: dict[str, Any]) -> None:
        """Change ``x`` in place, where the sampler may change it."""
        sigma = sigma.flatten().expand(len(x)) if sigma.numel() == 1 else sigma.flatten()
        latent = x.clone()
        scale = host.input_scale(self.base_model, sigma).view(-1, *(1,) * (x.ndim - 1))
        mask = host.denoise_mask(model, call, sigma)
        size = self.settings.step_size(step, self.steps)

        def measured(rows: Tensor) -> Gradient | None:
            return self._gradient(seen_by_the_model(model, latent, sigma, mask), sigma, rows)

        def move(rows: Tensor, found: Gradient) -> None:
            usable = found.latent.flatten(1).isfinite().all(1)
            self.counts.skipped += int((~usable).sum())
            shift = size * found.latent / scale[rows] ** 2
            usable &= found.loss != 0
            change = torch.where(usable.view(-1, *(1,) * (x.ndim - 1)), shift, torch.zeros_like(shift)).to(latent.dtype)
            latent[rows] -= change if mask is None else change * mask.expand_as(latent)[rows]

        everything = torch.arange(len(x), device=x.device)
        found = measured(everything)
        if found is None:
            return
        wanted = self.settings.wanted(step, self.steps)
        if wanted is not None and self.settings.max_refinements:
            found = self._refine(step, everything, found, 1 - wanted, measured, move)
        if step < self.settings.guided_steps(self.steps):
            move(everything, found)
            self.counts.guided += 1
        x.copy_(latent)

    def _refine(self, step: int, everything: Tensor, found: Gradient, target: float, measured: Any, move: Any) -> Gradient:
        """Move each image until the loss it had before its last move is small enough; what is true of all of them then."""
        need = self._need(everything)
        active = (need > target).nonzero().flatten().to(everything.device)
        current, moved = _rows_of(found, active), torch.zeros_like(everything, dtype=torch.bool)
        for iteration in range(self.settings.max_refinements):
            if not len(active):
                break
            host.check_interrupted()
            if iteration:
                measured_again = measured(active)
                if measured_again is None:
                    break
                current = measured_again
            move(active, current)
            moved[active] = True
            self.counts.refinements += 1
            self.progress.show(step + (iteration + 1) / (self.settings.max_refinements + 1))
            finite = current.latent.flatten(1).isfinite().all(1).to(active.device)
            active = active[(self._need(active).to(active.device) > target) & finite]
        rows = moved.nonzero().flatten()
        if len(rows):
            after = measured(rows)
            if after is not None:
                found = Gradient(found.loss.clone(), found.latent.clone())
                found.loss[rows], found.latent[rows] = after.loss, after.latent
        return found

    def _need(self, rows: Tensor) -> Tensor:
        """Return the paper's loss of some images when they were last measured, whatever loss moves them."""
        assert self.last is not None
        return (1 - self.last[rows.cpu()]).clamp(min=0).amax(1)

    def _gradient(self, seen: Tensor, sigma: Tensor, rows: Tensor) -> Gradient | None:
        """Over all entries of the prompt: each image's is that of its most neglected entry."""
        best: Gradient | None = None
        strengths: list[Tensor] = []
        for cond, prompt in self.prompts:
            objective = ExciteObjective(prompt, self.settings.losses, self.chosen.grid if "area" not in cond else None, len(seen))
            found = self.passes.gradient(cond, seen, sigma, objective, rows)
            strengths.append(objective.strengths if found is not None else torch.full_like(objective.strengths, math.nan))
            if found is None:
                continue
            if best is None:
                best = found
            else:
                worse = found.loss > best.loss
                shape = worse.view(-1, *(1,) * (found.latent.ndim - 1))
                best = Gradient(torch.where(worse, found.loss, best.loss), torch.where(shape, found.latent, best.latent))
        if best is not None:
            self._remember(torch.cat(strengths, 1), rows.cpu())
        return best

    def _remember(self, strengths: Tensor, rows: Tensor) -> None:
        strengths = strengths.nan_to_num(1.0)  # an entry that is not active lacks nothing
        if self.first is None or self.last is None:
            self.first, self.last = strengths, strengths.clone()
        else:
            self.last[rows] = strengths[rows]

    def summary(self) -> str:
        counts = self.counts
        text = f"Attend-and-Excite: {counts.guided} guided steps, {counts.refinements} refinements"
        if self.first is not None and self.last is not None:
            image, subject = divmod(int(self.first.argmin()), self.first.shape[1])
            before, after = (float(values[image, subject]) for values in (self.first, self.last))
            text += f', weakest subject "{self.names[subject]}" {before:.2f} -> {after:.2f}'
        if counts.skipped:
            text += f"; {counts.skipped} updates left out because their gradient was not finite"
        return text


def _rows_of(found: Gradient, rows: Tensor) -> Gradient:
    return Gradient(found.loss[rows.to(found.loss.device)], found.latent[rows.to(found.latent.device)])
