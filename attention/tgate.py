"""T-GATE: cross-attention converges early, so after a gate step its cached output is reused.

Zhang et al., "Cross-Attention Makes Inference Cumbersome in Text-to-Image Diffusion Models" (arXiv:2404.02747), and the
authors' second version, which also reuses self-attention between intervals. The exact schedule is ``plan``.

A run of S steps has a gate step G. Before it (semantics planning) everything is computed, except that self-attention may
be reused within intervals. Step G-1 stores the output of every attention module, after its last projection and before the
residual sum. From G on (fidelity improving) cross-attention is the stored output: the module is not called at all. The
negative prompt is no longer computed either, so the stored value is the mean of the positive and the negative one.

Two things are not the paper's. Where the positive prompt is kept, self-attention within intervals is stored as the mean of
both prompts as well: half of the memory, and as near to the plain picture. And the gate can be opened again every so many
steps (``refresh_every``): such a step computes and stores everything anew, and until the next one the difference between
the two prompts' noise predictions goes on as it went through the last two of them (``Guidance``).

Nothing is kept on the model: a run's state (``TGateRun``) is made when sampling starts and emptied when it ends, and
modules get another ``forward`` only for the length of one model call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from uuid import UUID

import torch

from . import host
from .host import ModelOptions, TransformerOptions, log
from .run import StepClock, follow_sampler, read_sigma
from .sites import AttentionSite, Kind, attention_sites

KEY = "fovea.tgate"

POSITIVE, NEGATIVE = 0, 1
TINY_SIGMA = 1e-6  # what a sigma of 0 counts as where it is divided by
MAX_SHARE = 3.0
SETTLED = 0.5  # of the largest change of the run


class CfgAfterGate(str, Enum):
    """What happens to classifier-free guidance once the gate is open."""

    DROP_KEEP_POSITIVE = "drop (keep positive)"
    DROP_KEEP_NEGATIVE = "drop (keep negative, as published)"
    KEEP = "keep"


class Mode(str, Enum):
    FIXED = "fixed"
    AUTO = "auto"


class CacheDevice(str, Enum):
    AUTO = "auto"
    GPU = "gpu"
    CPU = "cpu"


@dataclass(frozen=True)
class TGateSettings:
    """What the artist chose.

    Attributes:
        gate_at: fraction of the run's steps before the gate, in (0, 1]; 1 means never.
        sp_interval: self-attention is computed every so many steps before the gate (1: always).
        fi_interval: the same from the gate on.
        warm_up: steps at the start in which self-attention is always computed.
        positive_share: how much of the positive prompt's attention is in what the gate stores, the rest being the negative's:
            0.5 is the mean, as published; 1 the positive alone; above 1 away from the negative. Only where one is dropped, and
            not where guidance is kept: then it is the kept prompt's own.
        refresh_every: from the gate on, every so many steps are computed in full; 0: none, as published.
        tolerance: auto mode only; the gate opens once cross-attention changes by less than this from one step to the
            next (relative L2 norm over all modules), and by less than half of the run's largest change.
    """

    gate_at: float = 0.4
    cfg_after_gate: CfgAfterGate = CfgAfterGate.DROP_KEEP_POSITIVE
    sp_interval: int = 5
    fi_interval: int = 1
    warm_up: int = 2
    mode: Mode = Mode.FIXED
    tolerance: float = 0.05
    cache_device: CacheDevice = CacheDevice.AUTO
    positive_share: float = 0.5
    refresh_every: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.gate_at <= 1:
            raise ValueError(
                f"gate_at is {self.gate_at:g}, but something has to be computed before it can be reused: "
                "choose more than 0 (0.4 reuses after 40 % of the steps), or 1 to switch T-GATE off."
            )
        for name in ("sp_interval", "fi_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it counts steps, so use 1 (always compute) or more.")
        if self.warm_up < 0:
            raise ValueError(f"warm_up is {self.warm_up}: it counts steps, so use 0 or more.")
        if not 0 <= self.positive_share <= MAX_SHARE:
            raise ValueError(
                f"positive_share is {self.positive_share:g}: use 0.5 (the mean of both prompts, as published), 1 (the positive "
                f"prompt alone), or at most {MAX_SHARE:g}."
            )
        if self.refresh_every < 0 or self.refresh_every == 1:
            raise ValueError(
                f"refresh_every is {self.refresh_every}: use 0 (never), or 2 or more steps from one full step to the next. "
                "(1 would compute everything: for that, set gate_at to 1.)"
            )
        if self.mode is Mode.AUTO and not self.tolerance > 0:
            raise ValueError(f"tolerance is {self.tolerance:g}: auto mode needs more than 0 (0.05 is a good start).")

    @property
    def drops_cfg(self) -> bool:
        return self.cfg_after_gate is not CfgAfterGate.KEEP

    @property
    def keeps_guidance(self) -> bool:
        return self.drops_cfg and self.refresh_every > 0

    @property
    def averages_self_attention(self) -> bool:
        """Whether intervals before the gate keep one mean for both prompts, where there is one of each."""
        return self.cfg_after_gate is CfgAfterGate.DROP_KEEP_POSITIVE and not self.keeps_guidance

    def refreshes(self, steps_since_gate: int) -> bool:
        """Whether a step at or after the gate is computed in full again."""
        return self.refresh_every > 0 and (steps_since_gate + 1) % self.refresh_every == 0

    def gate_step(self, steps: int) -> int:
        """The first step that reuses cross-attention; at least 1, since one step has to fill the cache."""
        return max(round(self.gate_at * steps), 1)


def reuses_attention(network: torch.nn.Module, settings: TGateSettings) -> bool:
    """Whether any attention of this network would be reused: cross-attention, or self-attention in intervals."""
    kinds = {site.kind for site in attention_sites(network)}
    return "cross" in kinds or ("self" in kinds and max(settings.sp_interval, settings.fi_interval) > 1)


class Action(Enum):
    COMPUTE = "compute"
    STORE = "compute and store"
    REUSE = "reuse"


@dataclass(frozen=True)
class StepPlan:
    self_attention: Action
    cross_attention: Action

    def action(self, kind: Kind) -> Action:
        return self.self_attention if kind == "self" else self.cross_attention


def plan(step: int, gate: int, settings: TGateSettings) -> StepPlan:
    """What one step does (the published ``tgate_scheduler``), for a gate that opens at step ``gate``.

    With intervals of 1 self-attention is never reused, and therefore not stored either.
    """
    if step < gate - 1:
        return StepPlan(_planning_self_attention(step, settings), Action.COMPUTE)
    if step == gate - 1:
        return StepPlan(Action.STORE if settings.fi_interval > 1 else Action.COMPUTE, Action.STORE)
    if settings.fi_interval == 1:
        return StepPlan(Action.COMPUTE, Action.REUSE)
    return StepPlan(Action.STORE if step % settings.fi_interval == 0 else Action.REUSE, Action.REUSE)


def _planning_self_attention(step: int, settings: TGateSettings) -> Action:
    if settings.sp_interval == 1 or step < settings.warm_up:
        return Action.COMPUTE
    if step == settings.warm_up or step % settings.sp_interval == 0:
        return Action.STORE
    return Action.REUSE


# --- cache ----------------------------------------------------------------------------------------------------------


@dataclass
class AttentionCache:
    """Outputs of attention modules, (batch of one cond, tokens, channels), in the model's dtype.

    ``conds`` has one entry per site and conditioning; ``means`` one per site, the weighted mean of the positive and the
    negative output; ``halves`` are what a mean still waits for, where the two prompts come in separate model calls.
    """

    device: torch.device | None
    conds: dict[tuple[str, UUID], torch.Tensor] = field(default_factory=dict)
    means: dict[str, torch.Tensor] = field(default_factory=dict)
    halves: dict[str, torch.Tensor] = field(default_factory=dict)

    def store(self, site: str, uuids: list[UUID], output: torch.Tensor) -> None:
        """Keep each cond's chunk of ``output`` (conds * batch, tokens, channels)."""
        self.means.pop(site, None)
        for uuid, chunk in zip(uuids, output.chunk(len(uuids)), strict=True):
            self.conds[site, uuid] = self._own(chunk)

    def store_mean(self, site: str, shares: list[float], output: torch.Tensor) -> None:
        """Keep the weighted mean of the two prompts' chunks; a prompt that comes alone waits for the other one."""
        parts = [chunk * share for chunk, share in zip(output.chunk(len(shares)), shares, strict=True)]
        if len(parts) == 1 and site not in self.halves:
            self.halves[site] = parts[0] if self.device is None else parts[0].to(self.device)
            return
        other = parts[1] if len(parts) == 2 else self.halves.pop(site).to(output.device)
        mean = parts[0] + other
        self.means[site] = mean if self.device is None else mean.to(self.device)

    def begin_store(self, sites: list[AttentionSite]) -> None:
        """Forget what an earlier evaluation left for these sites, halves that never met their other half included."""
        self.forget(sites)
        self.halves.clear()

    def holds(self, site: str, uuids: list[UUID], mean: bool) -> bool:
        return site in self.means if mean else all((site, uuid) in self.conds for uuid in uuids)

    def load(self, site: str, uuids: list[UUID], like: torch.Tensor, mean: bool) -> torch.Tensor | None:
        """The stored output for a batch of conds, or None where something is missing or of another shape."""
        parts = [self.means.get(site) if mean else self.conds.get((site, uuid)) for uuid in uuids]
        known = [part for part in parts if part is not None and part.shape[1:-1] == like.shape[1:-1]]
        if len(known) < len(parts) or sum(part.shape[0] for part in known) != like.shape[0]:
            return None
        known = [part.to(device=like.device, dtype=like.dtype) for part in known]
        return known[0] if len(known) == 1 else torch.cat(known)

    def forget(self, sites: list[AttentionSite]) -> None:
        """Drop everything stored for some sites."""
        names = {site.name for site in sites}
        self.means = {name: value for name, value in self.means.items() if name not in names}
        self.conds = {key: value for key, value in self.conds.items() if key[0] not in names}

    def clear(self) -> None:
        self.conds.clear()
        self.means.clear()
        self.halves.clear()

    @property
    def bytes(self) -> int:
        tensors = (*self.conds.values(), *self.means.values(), *self.halves.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _own(self, chunk: torch.Tensor) -> torch.Tensor:
        """A copy: a chunk is a view of the module's output, which a later patch may write to."""
        if self.device is None or self.device == chunk.device:
            return chunk.clone()
        return chunk.to(self.device)


# --- one run --------------------------------------------------------------------------------------------------------


class TGateRun:
    """The state of one sampling run, made when it starts; every decision of the run is taken here."""

    def __init__(self, settings: TGateSettings, clock: StepClock, combines_as_cfg: bool) -> None:
        self.settings = settings
        self.clock = clock
        self.gate = settings.gate_step(clock.steps)
        self.combines_as_cfg = combines_as_cfg
        self.cache = AttentionCache(torch.device("cpu") if settings.cache_device is CacheDevice.CPU else None)
        self.cache_peak_bytes = 0

        self.step = -1
        self.sigma = 0.0
        self.first_at_step = False  # not a second evaluation of the same step (Heun and its kin)
        self.latent_shape = torch.Size()  # what the sampler evaluates; context windows hand on a part of it
        self.awaits_main_call = False  # the next batch of conds is the sampler's own
        self.call: MainCall | None = None  # that batch, while it runs
        self.stored_means: bool | None = None  # what the cross-attention cache holds since the gate; None: nothing yet
        self.guidance: Guidance | None = None  # through the last two steps that computed both prompts, where it is kept
        self.stopped = False

        self.change = ConvergenceMeter()
        self.changes: dict[int, float] = {}
        self.reused: dict[Kind, set[int]] = {"self": set(), "cross": set()}
        self.dropped: set[int] = set()
        self.refreshed: set[int] = set()
        self.notes: dict[str, None] = {}
        self._sites: dict[int, list[AttentionSite]] = {}

    def sites(self, model: Any) -> list[AttentionSite]:
        """The attention modules of a BaseModel that this run may skip; looked up once a run."""
        network = host.diffusion_model(model)
        if id(network) not in self._sites:
            self._sites[id(network)] = [] if host.is_compiled(model) else attention_sites(network)
        return self._sites[id(network)]

    def begin_evaluation(self, sigma: float, latent_shape: torch.Size) -> None:
        self.latent_shape, self.sigma = latent_shape, sigma
        step = self.clock.step_at(sigma)
        self.first_at_step = step != self.step
        self.step = step
        self.awaits_main_call = True

    def keep_guidance(self, outputs: list[torch.Tensor]) -> None:
        """Both prompts' predictions of this evaluation; a later one of the same step takes its place."""
        sigma, before = max(self.sigma, TINY_SIGMA), None
        if self.guidance is not None:
            before = self.guidance.before if self.guidance.step == self.step else self.guidance.point
        if before is not None and before.sigma <= sigma:  # the noise level has gone up since: another descent
            before = None
        point = GuidancePoint((outputs[POSITIVE] - outputs[NEGATIVE]) / sigma, sigma)
        self.guidance = Guidance(self.step, point, before)

    def note(self, text: str) -> None:
        """Something the artist should know; said once, in the run's log line."""
        self.notes[text] = None

    def stop(self, reason: str) -> None:
        """Do nothing for the rest of the run: a plain picture is better than a wrong one."""
        self.note(f"switched off in this run: {reason}")
        self.stopped = True
        self.cache.clear()
        self.guidance = None

    def release(self) -> None:
        self.cache.clear()
        self.guidance = None
        self.change.clear()
        self._sites.clear()
        self.call = None

    def summary(self) -> str:
        steps = self.clock.steps
        text = f"T-GATE: cross-attention reused in {len(self.reused['cross'])} of {steps} steps"
        text += f", negative prompt skipped in {len(self.dropped)}"
        if self.reused["self"]:
            text += f", self-attention reused in {len(self.reused['self'])}"
        if self.refreshed:
            text += f", all computed again in {len(self.refreshed)}"
        if self.settings.mode is Mode.AUTO:
            text += f", gate opened at step {self.gate}"
        return "; ".join([text, *self.notes])


@dataclass(frozen=True)
class GuidancePoint:
    """How the positive prompt's prediction of the noise differed from the negative's, (batch, channels, ...), at ``sigma``."""

    noise: torch.Tensor
    sigma: float


@dataclass(frozen=True)
class Guidance:
    """The difference between the two prompts, on a straight line over log(sigma) through the last two steps that computed both.

    Steps that reuse self-attention are not among them: what they find is off, and a line doubles that.

    Attributes:
        step: the later one's.
        point: what it found.
        before: what the earlier one found; None: the difference stays as it is.
    """

    step: int
    point: GuidancePoint
    before: GuidancePoint | None

    def at(self, sigma: float) -> torch.Tensor:
        """Of the predictions of the picture, x - sigma * noise; never further on than the two points lie apart."""
        noise, sigma = self.point.noise, max(sigma, TINY_SIGMA)
        if self.before is not None:
            apart = math.log(self.point.sigma / self.before.sigma)
            share = min(max(math.log(sigma / self.point.sigma) / apart, 0.0), 1.0)
            noise = noise + share * (noise - self.before.noise)
        return noise * sigma


@dataclass
class MainCall:
    """The sampler's own evaluation of all conds (other nodes' extra evaluations pass T-GATE by).

    Attributes:
        plan: what this evaluation does.
        pair: the one positive and one negative cond whose mean is stored or reused; None: each cond for itself.
        seen: conds that a model call has had already; one that comes back means tiles or windows.
    """

    plan: StepPlan
    pair: tuple[UUID, UUID] | None
    seen: set[UUID] = field(default_factory=set)


class ConvergenceMeter:
    """Relative L2 change of all cross-attention outputs from one step to the next."""

    def __init__(self) -> None:
        self._before: dict[tuple[str, UUID], torch.Tensor] = {}
        self._now: dict[tuple[str, UUID], torch.Tensor] = {}

    def add(self, site: str, uuids: list[UUID], output: torch.Tensor) -> None:
        for uuid, chunk in zip(uuids, output.chunk(len(uuids)), strict=True):
            self._now[site, uuid] = chunk

    def finish_step(self) -> float | None:
        """||now - before|| / ||now|| over all modules and conds, or None where the last step cannot be compared with."""
        before, now = self._before, self._now
        self._before, self._now = now, {}
        if not now or now.keys() != before.keys() or any(now[key].shape != before[key].shape for key in now):
            return None
        difference = sum((now[key] - before[key]).float().square().sum() for key in now)
        norm = sum(value.float().square().sum() for value in now.values())
        return float(torch.as_tensor(difference / norm).sqrt())

    def clear(self) -> None:
        self._before.clear()
        self._now.clear()


# --- the technique --------------------------------------------------------------------------------------------------


class TGate:
    """Wrappers of one ``TGateCache`` node. Holds settings only: a run's state lives in that run's options."""

    def __init__(self, settings: TGateSettings) -> None:
        self.settings = settings

    def outer_sample(
        self, executor: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *args: Any, **kwargs: Any
    ) -> Any:
        guider = executor.class_obj
        run = TGateRun(self.settings, StepClock.from_sigmas(sigmas), host.combines_as_cfg(guider))
        try:
            with host.run_scope(guider, KEY, run):
                return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            log.info(run.summary())
            run.release()

    sampler_sample = staticmethod(follow_sampler)

    def predict_noise(
        self, executor: Any, x: torch.Tensor, timestep: torch.Tensor, model_options: ModelOptions, seed: Any = None
    ) -> Any:
        run = host.run_state(model_options, KEY)
        if run is not None:
            sigma, model_options = read_sigma(timestep, model_options)
            run.begin_evaluation(sigma, x.shape)
        return executor(x, timestep, model_options, seed)

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: list[Any], x: torch.Tensor, timestep: torch.Tensor, model_options: ModelOptions
    ) -> Any:
        run: TGateRun | None = host.run_state(model_options, KEY)
        private = host.run_state(model_options, host.PRIVATE_PASS)
        if run is None or run.stopped or private or not run.awaits_main_call:
            return executor(model, conds, x, timestep, model_options)
        run.awaits_main_call = False
        if x.shape != run.latent_shape:
            run.stop("context windows cut each step into several model calls")
            return executor(model, conds, x, timestep, model_options)

        def evaluate(wanted: list[Any]) -> list[torch.Tensor]:
            return executor(model, wanted, x, timestep, model_options)

        return self._main_call(run, model, conds, model_options, evaluate)

    def _main_call(
        self,
        run: TGateRun,
        model: Any,
        conds: list[Any],
        options: ModelOptions,
        evaluate: Callable[[list[Any]], list[torch.Tensor]],
    ) -> list[torch.Tensor]:
        sites = run.sites(model)
        may_drop = self._may_drop(run, conds, options)
        text_is_reused = any(site.kind == "cross" for site in sites)
        pair = _only_pair(conds) if may_drop and text_is_reused else None
        if not text_is_reused:
            run.note(_why_no_text_cache(model, sites, run.settings))
        keeps_guidance = may_drop and run.settings.keeps_guidance
        refresh = run.step >= run.gate and run.settings.refreshes(run.step - run.gate)
        # A sampler may jump over the step that stores (dpm_fast): then the first evaluation beyond it stores.
        opened = run.step >= run.gate and not refresh and (run.guidance is not None or not keeps_guidance)
        if sites:
            opened = opened and run.stored_means is (pair is not None)
            step = run.step if opened else min(run.step, run.gate - 1)
            step_plan = plan(step, run.gate, run.settings)
        else:
            step_plan = StepPlan(Action.COMPUTE, Action.COMPUTE)
        storing = [site for site in sites if step_plan.action(site.kind) is Action.STORE]
        if storing:
            run.cache.begin_store(storing)
        if step_plan.self_attention is Action.COMPUTE:  # what was kept of it is of no more use
            run.cache.forget([site for site in sites if site.kind == "self"])

        run.call = MainCall(step_plan, pair)
        try:
            if not (opened and may_drop):
                outputs = evaluate(conds)
                if keeps_guidance and step_plan.self_attention is not Action.REUSE:
                    run.keep_guidance(outputs)
            else:
                kept = self._kept_prompt(run, pair, text_is_reused)
                only = evaluate([cond if index == kept else None for index, cond in enumerate(conds)])[kept]
                outputs = self._both_prompts(run, only, kept)
                run.dropped.add(run.step)
            if refresh:
                run.refreshed.add(run.step)
        finally:
            run.call = None
        if not run.stopped:
            if step_plan.cross_attention is Action.STORE:
                run.stored_means = pair is not None
            if Action.STORE in (step_plan.cross_attention, step_plan.self_attention):
                run.cache_peak_bytes = max(run.cache_peak_bytes, run.cache.bytes)
            self._watch_convergence(run)
        return outputs

    @staticmethod
    def _both_prompts(run: TGateRun, only: torch.Tensor, kept: int) -> list[torch.Tensor]:
        """Predictions of both prompts from that of one.

        Without kept guidance they are equal: guidance between them is then the identity, for any scale and for every node
        that works on both.
        """
        if run.guidance is None:
            return [only, only]
        difference = run.guidance.at(run.sigma)
        return [only, only - difference] if kept == POSITIVE else [only + difference, only]

    def _may_drop(self, run: TGateRun, conds: list[Any], options: ModelOptions) -> bool:
        if not run.settings.drops_cfg:
            return False
        if len(conds) > 2:
            run.note("the guider uses more than a positive and a negative prompt, so all of them are kept")
        elif len(conds) == 2 and conds[POSITIVE] and conds[NEGATIVE]:
            if not run.combines_as_cfg:
                run.note("the guider does not combine its prompts as plain CFG, so the negative prompt is kept")
            elif host.needs_uncond(options):
                run.note("the sampler or another node needs the negative prompt at every step, so it is kept")
            else:
                return True
        return False

    def _kept_prompt(self, run: TGateRun, pair: tuple[UUID, UUID] | None, text_is_reused: bool) -> int:
        if run.settings.cfg_after_gate is not CfgAfterGate.DROP_KEEP_NEGATIVE:
            return POSITIVE
        if pair is None:  # without the mean in the cache nothing of the positive prompts would be left
            several = "several prompts act together, so the positive ones are kept instead of the negative"
            run.note(
                several if text_is_reused else "the positive prompt is kept instead of the negative: no cache holds any of it"
            )
            return POSITIVE
        return NEGATIVE

    def _watch_convergence(self, run: TGateRun) -> None:
        """Auto mode: once two successive steps agree, the next one stores and the gate opens after it.

        They must agree after having differed: in the first steps all is noise, and attention changes little before it settles.
        """
        if run.settings.mode is not Mode.AUTO or run.step >= run.gate - 1 or not run.first_at_step:
            return
        change = run.change.finish_step()
        if change is None:
            return
        run.changes[run.step] = change
        if change < run.settings.tolerance and change < SETTLED * max(run.changes.values()):
            run.gate = min(run.gate, run.step + 2)
            run.change.clear()

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = host.apply_model_options(args)
        run: TGateRun | None = host.run_state(options, KEY)
        call = run.call if run is not None else None
        if run is None or call is None or run.stopped:
            return executor(*args, **kwargs)
        uuids = host.cond_uuids(options)
        if call.seen.intersection(uuids):
            run.stop("each step calls the model several times for one prompt (tiles or windows)")
            return executor(*args, **kwargs)
        call.seen.update(uuids)

        sites = run.sites(executor.class_obj)
        actions = self._actions(run, call, options, sites, uuids)
        if Action.STORE in actions.values():
            self._choose_cache_device(run, args[0].device)
        with ExitStack() as stack:
            reusing = [site for site in sites if actions[site.kind] is Action.REUSE]
            stack.enter_context(
                host.swapped_forward([(site.module, _reuse(site, run, call, uuids, options)) for site in reusing])
            )
            for site in sites:
                if actions[site.kind] is Action.STORE:
                    hook = _store(site, run, call, uuids, options, batch=args[0].shape[0])
                elif site.kind == "cross" and self._measures(run):
                    hook = _measure(site, run, uuids)
                else:
                    continue
                stack.callback(site.projection.register_forward_hook(hook).remove)
            if actions["cross"] is Action.REUSE:
                args = tuple(host.with_apply_model_options(args, host.without_replacements(options, "attn2")))
            return executor(*args, **kwargs)

    def _actions(
        self, run: TGateRun, call: MainCall, options: TransformerOptions, sites: list[AttentionSite], uuids: list[UUID]
    ) -> dict[Kind, Action]:
        """The plan, corrected for what this model call cannot do."""
        actions: dict[Kind, Action] = {"self": call.plan.self_attention, "cross": call.plan.cross_attention}
        if actions["self"] is not Action.COMPUTE and host.has_patches(options, "attn1"):
            run.note("another node changes self-attention, so it is always computed")
            actions["self"] = Action.COMPUTE
        mean = call.pair is not None
        if actions["cross"] is Action.REUSE and not mean:
            # A cond that becomes active after the gate (a timestep range) fills the cache when it first appears.
            if not all(run.cache.holds(site.name, uuids, mean) for site in sites if site.kind == "cross"):
                actions["cross"] = Action.STORE
        return actions

    def _measures(self, run: TGateRun) -> bool:
        return run.settings.mode is Mode.AUTO and run.step < run.gate - 1 and run.first_at_step

    def _choose_cache_device(self, run: TGateRun, device: torch.device) -> None:
        if run.settings.cache_device is CacheDevice.AUTO and run.cache.device is None:
            if host.spare_memory(device) <= 0:
                run.cache.device = torch.device("cpu")
                run.note("little memory is free, so the cache is kept in system memory")


def _why_no_text_cache(model: Any, sites: list[AttentionSite], settings: TGateSettings) -> str:
    if host.is_compiled(model):
        return "the model is compiled, so only the negative prompt is dropped"
    text = f"{type(model).__name__} has no separate cross-attention, so only "
    text += "self-attention is reused and the negative prompt dropped" if sites else "the negative prompt is dropped"
    return text + (", and auto mode opens the gate at gate_at" if settings.mode is Mode.AUTO else "")


def _only_pair(conds: list[Any]) -> tuple[UUID, UUID] | None:
    """The uuids of the positive and the negative cond where there is exactly one of each."""
    if len(conds[POSITIVE]) == 1 and len(conds[NEGATIVE]) == 1:
        return conds[POSITIVE][0]["uuid"], conds[NEGATIVE][0]["uuid"]
    return None


def _reuse(
    site: AttentionSite, run: TGateRun, call: MainCall, uuids: list[UUID], options: TransformerOptions
) -> Callable[..., Any]:
    """A forward that returns the stored output instead of calling the attention module."""
    compute = site.module.forward
    mean = call.pair is not None and site.name in run.cache.means
    writable = host.has_output_patches(options)

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        stored = run.cache.load(site.name, uuids, x, mean)
        if stored is None:
            return compute(x, *args, **kwargs)
        run.reused[site.kind].add(run.step)
        return site.result(stored.clone() if writable else stored)

    return forward


def _store(
    site: AttentionSite, run: TGateRun, call: MainCall, uuids: list[UUID], options: TransformerOptions, batch: int
) -> Callable[..., None]:
    """A hook that keeps what the module's last layer returns; it also fires where another pack replaced the attention."""
    opening, planning = (call.plan.cross_attention is action for action in (Action.STORE, Action.COMPUTE))
    mean = call.pair is not None and (opening or planning and run.settings.averages_self_attention)
    shares = [_share_of(uuid, call.pair, run.settings) if opening else 0.5 for uuid in uuids] if call.pair is not None else []
    resized = site.kind == "cross" and host.has_input_patches(options, "attn2")

    def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.shape[0] % len(uuids) or (resized and output.shape[0] != batch):
            run.stop("another node changes the batch inside cross-attention")
        elif run.stopped:
            return
        elif mean:
            run.cache.store_mean(site.name, shares, output)
        else:
            run.cache.store(site.name, uuids, output)

    return hook


def _share_of(uuid: UUID, pair: tuple[UUID, UUID], settings: TGateSettings) -> float:
    """Of one of the two prompts in what the gate stores."""
    if settings.keeps_guidance:
        kept = NEGATIVE if settings.cfg_after_gate is CfgAfterGate.DROP_KEEP_NEGATIVE else POSITIVE
        return float(uuid == pair[kept])
    return settings.positive_share if uuid == pair[POSITIVE] else 1 - settings.positive_share


def _measure(site: AttentionSite, run: TGateRun, uuids: list[UUID]) -> Callable[..., None]:
    def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        run.change.add(site.name, uuids, output)

    return hook
