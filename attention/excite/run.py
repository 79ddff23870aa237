"""One sampling run of Attend-and-Excite: the gradient passes and nudges of each step, and what is said of them at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import host
from ..gradient.model_pass import ModelPass
from ..gradient.watch import Gradient
from ..host import seen_by_the_model
from ..host.patch_owners import patch_owners
from .layers import GuidedLayers
from .losses import lack
from .objective import ExciteObjective
from .own_rows import OwnPrompt
from .places import Places
from .settings import ExciteSettings
from .subjects import GuidedPrompt


@dataclass
class Counts:
    """What one run did: guided steps, refinements of the whole batch, gradient passes of single images, nudges left out, and
    images whose threshold was missed."""

    guided: int = 0
    refinements: int = 0
    passes: int = 0
    skipped: int = 0
    missed: dict[float, int] = field(default_factory=dict)  # threshold -> images


@dataclass
class _Step:
    """The latent of one step while it is moved.

    Attributes:
        latent: (batch, channels, ..., height, width), moved in place.
        mask: of an inpaint run, where the latent may be changed; None: everywhere.
        scale: what turns the sampler's latent into the published algorithm's, (batch, 1, ...).
        size: how far a gradient moves it.
    """

    model: Any
    number: int
    latent: Tensor
    sigma: Tensor
    mask: Tensor | None
    scale: Tensor
    size: float

    def seen(self) -> Tensor:
        """Return the latent as the network will see it."""
        return seen_by_the_model(self.model, self.latent, self.sigma, self.mask)

    def move(self, rows: Tensor, found: Gradient) -> int:
        """Move some images down their gradient; return how many could not be moved, for a gradient that is not finite."""
        usable = found.latent.flatten(1).isfinite().all(1)
        skipped = int((~usable).sum())
        shift = self.size * found.latent / self.scale[rows] ** 2
        usable &= found.loss != 0
        change = torch.where(usable.view(-1, *(1,) * (self.latent.ndim - 1)), shift, torch.zeros_like(shift)).to(
            self.latent.dtype
        )
        self.latent[rows] -= change if self.mask is None else change * self.mask.expand_as(self.latent)[rows]
        return skipped


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
        self.owners = patch_owners(options, "attn2_patch")
        self.passes = ModelPass(self.base_model, options, self.chosen.layers, settings.memory)
        self.counts = Counts()
        self.first: Tensor | None = None  # (batch, subjects): before anything was moved, and last seen
        self.last: Tensor | None = None
        self.masks = [host.cond_mask(cond) for cond, _ in prompts]  # where each acts; None: everywhere
        self.black = [mask is not None and not bool(mask.any()) for mask in self.masks]
        self.looked = False  # a step has looked at the prompts
        self.active = [False] * len(prompts)  # which of them acted then
        self.places: Places | None = None
        self.progress = host.Progress(steps)

    @property
    def names(self) -> list[str]:
        """Return the subjects' names, in the order of ``first`` and ``last``."""
        return [subject.name for _, prompt in self.prompts for subject in prompt.subjects]

    def before_step(self, model: Any, step: int, x: Tensor, sigma: Tensor, call: dict[str, Any]) -> None:
        """Change ``x`` in place, where the sampler may change it: refinements up to the step's threshold, then one nudge."""
        state = self._step(model, step, x, sigma, call)
        everything = torch.arange(len(x), device=x.device)
        found = self._measured(state, everything)
        if found is None:
            return
        wanted = self.settings.wanted(step, self.steps)
        if wanted is not None and self.settings.max_refinements:
            found = self._refine(step, state, everything, found, wanted)
        if step < self.settings.guided_steps(self.steps):
            self._move(state, everything, found)
            self.counts.guided += 1
        x.copy_(state.latent)

    def _step(self, model: Any, step: int, x: Tensor, sigma: Tensor, call: dict[str, Any]) -> _Step:
        sigma = sigma.flatten().expand(len(x)) if sigma.numel() == 1 else sigma.flatten()
        scale = host.input_scale(self.base_model, sigma).view(-1, *(1,) * (x.ndim - 1))
        mask = host.denoise_mask(model, call, sigma)
        return _Step(model, step, x.clone(), sigma, mask, scale, self.settings.step_size(step, self.steps))

    def _measured(self, state: _Step, rows: Tensor) -> Gradient | None:
        return self._gradient(state.seen(), state.sigma, rows)

    def _move(self, state: _Step, rows: Tensor, found: Gradient) -> None:
        self.counts.skipped += state.move(rows, found)

    def _refine(self, step: int, state: _Step, everything: Tensor, found: Gradient, wanted: float) -> Gradient:
        """Move each image until the loss it had before its last move is small enough; what is true of all of them then."""
        target = 1 - wanted
        active = (self._need(everything) > target).nonzero().flatten().to(everything.device)
        current, moved = _rows_of(found, active), torch.zeros_like(everything, dtype=torch.bool)
        for iteration in range(self.settings.max_refinements):
            if not len(active):
                break
            host.check_interrupted()
            if iteration:
                measured_again = self._measured(state, active)
                if measured_again is None:
                    break
                current = measured_again
            self._move(state, active, current)
            moved[active] = True
            self.counts.refinements += 1
            self.progress.show(step + (iteration + 1) / (self.settings.max_refinements + 1))
            finite = current.latent.flatten(1).isfinite().all(1).to(active.device)
            active = active[(self._need(active).to(active.device) > target) & finite]
        found = self._after(state, moved.nonzero().flatten(), found)
        missed = int((self._need(everything) > target).sum())
        if missed:
            self.counts.missed[wanted] = max(missed, self.counts.missed.get(wanted, 0))
        return found

    def _after(self, state: _Step, moved: Tensor, found: Gradient) -> Gradient:
        """Return the gradients of all images, those of the moved ones measured anew."""
        after = self._measured(state, moved) if len(moved) else None
        if after is None:
            return found
        found = Gradient(found.loss.clone(), found.latent.clone())
        found.loss[moved], found.latent[moved] = after.loss, after.latent
        return found

    def _need(self, rows: Tensor) -> Tensor:
        """Return the paper's loss of some images when they were last measured, whatever loss moves them."""
        assert self.last is not None
        return lack(self.last[rows.cpu()])

    def _gradient(self, seen: Tensor, sigma: Tensor, rows: Tensor) -> Gradient | None:
        """Return the loss and gradient of some images; each image's is that of its most neglected entry of the prompt."""
        self.looked = True
        best: Gradient | None = None
        weakest = torch.zeros(len(rows))
        strengths: list[Tensor] = []
        if self.places is None and self.settings.places.active:
            tokens = [len(subject.positions) for _, prompt in self.prompts for subject in prompt.subjects]
            self.places = Places(self.settings.places, len(seen), tokens)
        for number, (cond, prompt) in enumerate(self.prompts):
            grid = self.chosen.grid if "area" not in cond else None
            own, mask = OwnPrompt(_text_of(cond), self.owners), self.masks[number]
            objective = ExciteObjective(prompt, self.settings.losses, grid, len(seen), own, self.places, mask)
            found = None if self.black[number] else self.passes.gradient(cond, seen, sigma, objective, rows)
            self.active[number] |= found is not None
            strengths.append(objective.strengths if found is not None else torch.full_like(objective.strengths, math.nan))
            if found is None:
                continue
            self.counts.passes += len(rows)
            lacking = lack(objective.strengths[rows.cpu()])
            if best is None:
                best, weakest = found, lacking
                continue
            worse = (lacking > weakest).to(found.loss.device)
            shape = worse.view(-1, *(1,) * (found.latent.ndim - 1))
            best = Gradient(torch.where(worse, found.loss, best.loss), torch.where(shape, found.latent, best.latent))
            weakest = torch.maximum(weakest, lacking)
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
        """Return the line that is logged at the end of a run."""
        counts = self.counts
        text = f"Attend-and-Excite: {counts.guided} guided steps, {counts.refinements} refinements"
        if self.first is not None and self.last is not None:
            text += f", {counts.passes / len(self.last):.1f} gradient passes an image"
            image, subject = divmod(int(self.first.argmin()), self.first.shape[1])
            before, after = (float(values[image, subject]) for values in (self.first, self.last))
            text += f', weakest subject "{self.names[subject]}" {before:.2f} -> {after:.2f}'
        idle = [prompt for (_, prompt), active in zip(self.prompts, self.active, strict=True) if not active]
        if self.looked and idle:
            names = ", ".join(f'"{subject.name}"' for prompt in idle for subject in prompt.subjects)
            text += f"; {names} not guided: that prompt acts in none of the guided steps"
        if counts.missed and self.last is not None:
            listed = ", ".join(f"{wanted:g} in {images}" for wanted, images in sorted(counts.missed.items()))
            text += (
                f"; thresholds not reached after {self.settings.max_refinements} refinements (the highest possible is 1.00): "
                f"{listed} of {len(self.last)} images"
            )
        if counts.skipped:
            text += f"; {counts.skipped} updates left out because their gradient was not finite"
        return text


def _text_of(cond: dict[str, Any]) -> Tensor | None:
    """Return the rows of the text as the network gets them, where it gets them as cross-attention's context."""
    value = cond.get("model_conds", {}).get("c_crossattn")
    return getattr(value, "cond", None)


def _rows_of(found: Gradient, rows: Tensor) -> Gradient:
    return Gradient(found.loss[rows.to(found.loss.device)], found.latent[rows.to(found.latent.device)])
