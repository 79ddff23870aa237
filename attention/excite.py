"""Attend-and-Excite: the latent is nudged until every subject of the prompt is seen by cross-attention.

Source: Chefer et al., "Attend-and-Excite: Attention-Based Semantic Guidance for Text-to-Image Diffusion Models"
(SIGGRAPH 2023), algorithm 1 and its published code. At the start of a step the loss of ``excite_losses`` is measured in a
forward of the positive prompt alone; in threshold steps the latent is refined until every subject is strong enough, and in
guided steps it is moved once more:

    z <- z - scale_factor * sqrt(linspace(1, scale_end, steps)[i]) * dL/dz

with z the network's own input, x / sqrt(sigma^2 + 1) for eps and v models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from . import host
from .excite_losses import ExciteObjective, GuidedPrompt, LossSettings, Subject
from .gradient import Gradient, Memory, ModelPass
from .host import log
from .layer_names import parse_layers
from .sites import CaptureLayer, capture_layers, check_differentiable, layer_grid, network_layout
from .stepping import check_sampler, seen_by_the_model, with_steps
from .tokens import METADATA, TokenMap, UnknownEncoder, prompt_infos

# A subject needs a few places of the grid to be told from the others.
_PLACES_PER_SUBJECT = 4

# Levels of a network are the same for every size of picture.
_NOMINAL_LATENT = (64, 64)

# CLIP's tokens 1 to 75 compete (the start token and the last position do not); of OpenCLIP-H's and of other encoders' only
# the prompt's own, whose padding says nothing.
_PADDING_COMPETES = {"", "l", "g"}


@dataclass(frozen=True)
class ExciteSettings:
    """What the artist chose.

    Attributes:
        guide_until: fraction of the run's steps that are guided.
        scale_factor, scale_end: step size, and the fraction of it that is left (under the root) in the last step.
        thresholds: (fraction of the run's steps, wanted maximum of every subject).
        attention_grid: tokens along the longer side; 0: a quarter of the latent's.
        layers: names in the syntax of ``layer_names`` that the grid's layers must be among; empty: all.
    """

    guide_until: float = 0.5
    scale_factor: float = 20.0
    scale_end: float = 0.5
    thresholds: tuple[tuple[float, float], ...] = ((0.0, 0.05), (0.2, 0.5), (0.4, 0.8))
    max_refinements: int = 20
    attention_grid: int = 0
    losses: LossSettings = field(default_factory=LossSettings)
    memory: Memory = Memory.AUTO
    layers: str = ""

    def __post_init__(self) -> None:
        _check_fraction("guide_until", self.guide_until, "0.5 guides the first half of the steps")
        _check_fraction("scale_end", self.scale_end, "paper: 0.5")
        if not (math.isfinite(self.scale_factor) and self.scale_factor >= 0):
            raise ValueError(f"scale_factor is {self.scale_factor}: a step size is 0 or more (paper: 20).")
        if self.max_refinements < 0:
            raise ValueError(f"max_refinements is {self.max_refinements}: use 0 (no refinement) or more (paper: 20).")
        if self.attention_grid < 0:
            raise ValueError(f"attention_grid is {self.attention_grid}: use 0 (the paper's rule) or a number of tokens.")

    def guided_steps(self, steps: int) -> int:
        return round(self.guide_until * steps)

    def step_size(self, step: int, steps: int) -> float:
        share = 1 + (self.scale_end - 1) * step / max(steps - 1, 1)
        return self.scale_factor * math.sqrt(share)

    def wanted(self, step: int, steps: int) -> float | None:
        """The maximum that every subject must have in this step, or None."""
        found = [wanted for fraction, wanted in self.thresholds if min(round(fraction * steps), steps - 1) == step]
        return max(found) if found else None

    def acts_in(self, step: int, steps: int) -> bool:
        return step < self.guided_steps(steps) or (self.wanted(step, steps) is not None and self.max_refinements > 0)


def _check_fraction(name: str, value: float, hint: str) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}: it is a fraction, from 0 to 1 ({hint}).")


def parse_thresholds(text: str) -> tuple[tuple[float, float], ...]:
    """``0:0.05, 0.2:0.5`` -> ((0.0, 0.05), (0.2, 0.5)). Empty: no refinement."""
    pairs = []
    for number, item in enumerate((item for item in text.split(",") if item.strip()), start=1):
        where = f"thresholds, entry {number} ('{item.strip()}')"
        fraction, colon, wanted = item.partition(":")
        if not colon:
            raise ValueError(f"{where}: write a fraction of the steps, a colon and the wanted maximum, such as 0.2:0.5.")
        try:
            pair = float(fraction), float(wanted)
        except ValueError:
            raise ValueError(f"{where}: '{fraction.strip()}' and '{wanted.strip()}' must be numbers, such as 0.2:0.5.") from None
        if not all(0 <= value <= 1 for value in pair):
            raise ValueError(f"{where}: both numbers go from 0 to 1.")
        pairs.append(pair)
    return tuple(pairs)


# --- subjects --------------------------------------------------------------------------------------------------------------


def guided_prompts(conditioning: Sequence[Any], subjects: str, clip: Any = None, text: str = "") -> list[GuidedPrompt | None]:
    """What to guide in each entry of the positive conditioning; None where an entry has none of the subjects.

    Raises:
        ValueError: no subjects, or one that no entry has.
    """
    wanted = list(dict.fromkeys(item.strip() for item in subjects.split(",") if item.strip()))
    if not conditioning:
        raise ValueError("'positive' is empty. Connect the output of 'Prompt with Subjects'.")
    if wanted and all(item.isdecimal() for item in wanted):
        return [_at_positions(entry, [int(item) for item in wanted], clip, text) for entry in conditioning]
    infos = prompt_infos(conditioning, clip, text.strip() or None)
    found: list[GuidedPrompt | None] = []
    missing: dict[str, ValueError] = {}
    seen: set[str] = set()
    for info in infos:
        chosen = [Subject(_numbered(word, info.subjects), word.positions) for word in info.subjects] if not wanted else []
        for item in wanted:
            try:
                words = info.tokens.find(item)
            except ValueError as error:
                missing.setdefault(item, error)
            else:
                chosen.append(Subject(item, tuple(sorted({p for word in words for p in word.positions}))))
                seen.add(item)
        found.append(GuidedPrompt(tuple(chosen), _columns(info.tokens, chosen)) if chosen else None)
    for item in wanted:
        if item not in seen:
            raise ValueError(f"subjects: {missing[item]}") from missing[item]
    if not any(found):
        listed = ", ".join(dict.fromkeys(word for info in infos for word in info.tokens.words()))
        raise ValueError(
            "No subjects are given. Write words of the prompt in 'subjects', separated by commas, or put them in square "
            f"brackets in 'Prompt with Subjects'. Words in the prompt: {listed}"
        )
    return found


def _numbered(word: Any, subjects: Sequence[Any]) -> str:
    return f"{word.word}#{word.occurrence}" if [other.word for other in subjects].count(word.word) > 1 else word.word


def _at_positions(entry: Any, positions: list[int], clip: Any, text: str) -> GuidedPrompt:
    """Subjects given as token positions need no words, only a text."""
    tensor, options = (entry["cross_attn"], entry) if isinstance(entry, dict) else entry
    known: TokenMap | None = None
    if METADATA in options or (clip is not None and text.strip()):
        try:
            known = prompt_infos([entry], clip, text.strip() or None)[0].tokens
        except UnknownEncoder:
            known = None
    length = known.length if known is not None else int(tensor.shape[1])
    for position in positions:
        if not 0 <= position < length:
            raise ValueError(
                f"subjects: token position {position} is outside this prompt, which has {length} tokens (0 to {length - 1})."
            )
    chosen = [Subject(_name_at(known, position), (position,)) for position in positions]
    if known is not None:
        return GuidedPrompt(tuple(chosen), _columns(known, chosen))
    return GuidedPrompt(tuple(chosen), tuple(sorted({*range(1, length - 1), *positions})))


def _name_at(known: TokenMap | None, position: int) -> str:
    return known.at(position).word if known is not None else f"token {position}"


def _columns(tokens: TokenMap, subjects: Sequence[Subject]) -> tuple[int, ...]:
    """The tokens that compete for a place, see ``_PADDING_COMPETES``."""
    padding = {token.encoder for token in tokens.tokens} <= _PADDING_COMPETES
    left_out = ("start",) if padding else ("start", "end", "pad", "template")
    kept = {token.position for token in tokens.tokens if token.kind not in left_out}
    if padding:
        kept.discard(tokens.length - 1)
    return tuple(sorted(kept.union(position for subject in subjects for position in subject.positions)))


# --- layers ----------------------------------------------------------------------------------------------------------------


def check_network(network: torch.nn.Module) -> None:
    """Raises ``ValueError`` where there is no attention to text that could be guided."""
    layout = network_layout(network)
    if layout is None or layout.patch is None and layout.family != "U-Net":
        raise ValueError(
            f"Attend-and-Excite cannot guide {type(network).__name__}: it is not known where this model looks at its text. "
            "Use a U-Net (SD1.5, SD2, SDXL), PixArt, HunyuanDiT, SD3, Flux, Lumina 2 or Qwen-Image model."
        )
    check_differentiable(network, "Attend-and-Excite")
    if not any(layer.kind in ("cross", "joint") for layer in capture_layers(network)):
        raise ValueError(
            f"Attend-and-Excite cannot guide {type(network).__name__}: this model has no attention to text (it draws classes, "
            "not prompts). Use a model with a text prompt."
        )


@dataclass(frozen=True)
class GuidedLayers:
    """The layers to look at, and the grid that their maps are averaged down to (None: they have it)."""

    layers: list[CaptureLayer]
    grid: tuple[int, int] | None


def guided_layers(network: torch.nn.Module, latent: Sequence[int], settings: ExciteSettings) -> GuidedLayers:
    """U-Nets: every cross-attention of the wanted level. Transformers, whose layers all have one grid: their middle half.

    Where no level has the wanted grid, the next finer one is averaged down to it (or the finest there is is taken). Settings
    can name the layers that are left to choose from.
    """
    check_network(network)
    layout = network_layout(network)
    every = capture_layers(network)
    grids = {layer.name: layer_grid(network, layout, layer.name, latent) for layer in every if layer.kind in ("cross", "joint")}
    sides = {name: max(grid[1:]) for name, grid in grids.items() if grid is not None}
    if not sides:
        raise ValueError(f"Attend-and-Excite cannot guide a latent of shape {tuple(latent)} in {type(network).__name__}.")
    allowed = parse_layers(settings.layers, list(sides))
    wanted = settings.attention_grid or math.ceil(max(latent[-2:]) / 4)
    side = min((sides[name] for name in allowed if sides[name] >= wanted), default=max(sides[name] for name in allowed))
    names = [name for name in allowed if sides[name] == side]
    if layout is not None and layout.family != "U-Net" and not settings.layers.strip():
        names = names[len(names) // 4 : max(math.ceil(len(names) * 3 / 4), 1)]
    kinds = ("cross", "joint", "self") if settings.losses.self_overlap else ("cross", "joint")
    layers = [layer for layer in every if layer.name in names and layer.kind in kinds]
    grid = None
    if side > wanted:
        grid = math.ceil(latent[-2] * wanted / max(latent[-2:])), math.ceil(latent[-1] * wanted / max(latent[-2:]))
    return GuidedLayers(layers, grid)


def guided_names(network: torch.nn.Module, settings: ExciteSettings) -> str:
    """The layers that are guided, in the syntax of ``layer_names``; all that may be where that depends on the latent's size.

    Raises:
        ValueError: ``layers`` names one that the network does not have.
    """
    layers = guided_layers(network, (1, 4, *_NOMINAL_LATENT), settings).layers
    return settings.layers if settings.attention_grid else ", ".join(dict.fromkeys(layer.name for layer in layers))


# --- one sampling run ------------------------------------------------------------------------------------------------------


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
        """Move each picture until the loss it had before its last move is small enough; what is true of all of them then."""
        need = self._need(everything)
        active = (need > target).nonzero().flatten().to(everything.device)
        current, moved = _rows_of(found, active), torch.zeros_like(everything, dtype=torch.bool)
        for iteration in range(self.settings.max_refinements):
            if not len(active):
                break
            host.check_interrupted()
            if iteration:
                again = measured(active)
                if again is None:
                    break
                current = again
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
        """The paper's loss of some pictures when they were last measured, whatever loss moves them."""
        assert self.last is not None
        return (1 - self.last[rows.cpu()]).clamp(min=0).amax(1)

    def _gradient(self, seen: Tensor, sigma: Tensor, rows: Tensor) -> Gradient | None:
        """Over all entries of the prompt: each picture's is that of its most neglected entry."""
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
            picture, subject = divmod(int(self.first.argmin()), self.first.shape[1])
            before, after = (float(values[picture, subject]) for values in (self.first, self.last))
            text += f', weakest subject "{self.names[subject]}" {before:.2f} -> {after:.2f}'
        if counts.skipped:
            text += f"; {counts.skipped} updates left out because their gradient was not finite"
        return text


def _rows_of(found: Gradient, rows: Tensor) -> Gradient:
    return Gradient(found.loss[rows.to(found.loss.device)], found.latent[rows.to(found.latent.device)])


# --- the guider ------------------------------------------------------------------------------------------------------------


class ExciteGuider(comfy.samplers.CFGGuider):
    """Classifier-free guidance whose latent is moved before each guided step."""

    def __init__(self, model: Any, settings: ExciteSettings, prompts: Sequence[GuidedPrompt | None]) -> None:
        super().__init__(model)
        self.settings = settings
        self.prompts = list(prompts)

    def inner_sample(
        self, noise: Tensor, latent_image: Tensor, device: Any, sampler: Any, sigmas: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        steps, settings = len(sigmas) - 1, self.settings
        if not any(settings.acts_in(step, steps) for step in range(steps)):
            return super().inner_sample(noise, latent_image, device, sampler, sigmas, *args, **kwargs)
        check_sampler(sampler)
        latent = (kwargs.get("latent_shapes") or [noise.shape])[0]  # of video with sound, which comes packed, the video's
        chosen = guided_layers(host.diffusion_model(self.inner_model), latent, settings)
        self._check_room(chosen, latent)
        runs: list[ExciteRun] = []

        def before_step(model: Any, step: int, x: Tensor, sigma: Tensor, call: dict[str, Any]) -> None:
            if not runs:
                prompts = [(cond, prompt) for cond, prompt in zip(self.conds["positive"], self.prompts, strict=True) if prompt]
                runs.append(ExciteRun(self.inner_model, prompts, settings, chosen, steps, call.get("model_options", {})))
            runs[0].before_step(model, step, x, sigma, call)

        sampler = with_steps(sampler, before_step, lambda step: settings.acts_in(step, steps))
        result = super().inner_sample(noise, latent_image, device, sampler, sigmas, *args, **kwargs)
        for run in runs:
            log.info(run.summary())
        return result

    def _check_room(self, chosen: GuidedLayers, latent: Sequence[int]) -> None:
        network = host.diffusion_model(self.inner_model)
        known = layer_grid(network, network_layout(network), chosen.layers[0].name, latent)
        grid = chosen.grid or (known[1:] if known is not None else (1, 1))
        room = max(math.prod(grid) // _PLACES_PER_SUBJECT, 1)
        for prompt in self.prompts:
            if prompt is not None and len(prompt.subjects) > room:
                raise ValueError(
                    f"subjects: {len(prompt.subjects)} subjects are more than an attention grid of {grid[0]} x {grid[1]} can "
                    f"hold ({room}). Name fewer, make the picture larger, or raise attention_grid."
                )
