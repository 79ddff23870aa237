"""The state of one sampling run with T-GATE."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import torch

from .. import host
from ..host import StepClock
from ..networks.blocks import AttentionSite, Kind, attention_sites
from .cache import AttentionCache
from .convergence import ConvergenceMeter
from .evaluation import NEGATIVE, POSITIVE, EvaluationPlan, Situation
from .guidance import TINY_SIGMA, Guidance, GuidancePoint
from .plan import Action, GateWindow, StepPlan
from .report import Report
from .settings import CacheDevice, Mode, TGateSettings

MOST_MISFITS = 2  # successive evaluations in which stored attention did not fit, before cross-attention is always computed


class Misfit(Exception):
    """Raised inside an evaluation that cannot go on: stored attention does not fit it."""


class TGateRun:
    """The state of one sampling run, made when it starts.

    Args:
        clock: the run's sigmas.
        combines_as_cfg: the guider mixes a positive and a negative prediction as CFG does.
        window: the steps that reuse attention; None: by the settings and the number of steps.
        images: that are sampled.
    """

    def __init__(
        self,
        settings: TGateSettings,
        clock: StepClock,
        combines_as_cfg: bool,
        window: GateWindow | None = None,
        images: int = 1,
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.images = images
        self.gate = settings.gate_step(clock.steps) if window is None else window.gate
        self.full_from = clock.steps if window is None else window.full_from
        self.combines_as_cfg = combines_as_cfg
        device = torch.device("cpu") if settings.cache_device is CacheDevice.CPU else None
        self.cache = AttentionCache(device)
        self.cache_peak_bytes = 0

        self.step = -1
        self.sigma = 0.0
        self.first_at_step = False  # not a second evaluation of the same step (Heun and its kin)
        self.latent_shape = torch.Size()  # what the sampler evaluates; context windows hand on a part of it
        self.awaits_main_call = False  # the next batch of conds is the sampler's own
        self.call: MainCall | None = None  # that batch, while it runs
        self.main_conds: set[UUID] = set()  # what it holds
        self.guidance: Guidance | None = None  # through the last two steps that computed both prompts, where it is kept
        self.negative_is_old = False  # it was left out since both prompts were last computed
        self.last: int | None = None  # the last step that was computed
        self.acted: tuple[Any, ...] = ()  # which of other nodes' attention replacements and hooks acted in the last evaluation
        self.misfits = 0  # successive evaluations in which stored attention did not fit
        self.reuses_text = True
        self.stopped = False

        self.change = ConvergenceMeter(device)
        self.changes: dict[int, float] = {}
        self.report = Report()
        self._sites: dict[int, list[AttentionSite]] = {}
        self.seen_sites: set[str] = set()  # cross-attention modules that this run has called

    def sites(self, model: Any) -> list[AttentionSite]:
        """Return the attention modules of a BaseModel that this run may skip; looked up once a run."""
        network = host.diffusion_model(model)
        if id(network) not in self._sites:
            self._sites[id(network)] = [] if host.is_compiled(model) else attention_sites(network)
        found = self._sites[id(network)]
        return found if self.reuses_text else [site for site in found if site.kind != "cross"]

    def begin_evaluation(self, sigma: float, latent_shape: torch.Size, done: int | None = None) -> None:
        """Take note of a sampler's evaluation at ``sigma``, which has told its progress bar of ``done`` steps."""
        self.latent_shape, self.sigma = latent_shape, sigma
        step = self.clock.step_at(sigma, done)
        self.first_at_step = step != self.step
        self.step = step
        self.awaits_main_call = True

    def situation(self, sites: list[AttentionSite], conds: list[Any], needs_uncond: bool) -> Situation:
        """Return what is known before an evaluation of ``conds``, the sampler's lists of prompts."""
        return Situation(
            step=self.step,
            gate=self.gate,
            full_from=self.full_from,
            prompts=tuple(None if one is None else tuple(cond["uuid"] for cond in one) for one in conds),
            active=tuple(tuple(cond["uuid"] for cond in one or () if host.is_active(cond, self.sigma)) for one in conds),
            combines_as_cfg=self.combines_as_cfg,
            needs_uncond=needs_uncond,
            reuses_text=any(site.kind == "cross" for site in sites),
            reuses_any=bool(sites),
            holds_mean=self.cache.holds_means(self.seen_sites),
            has_guidance=self.guidance is not None,
            negative_is_old=self.negative_is_old,
            last=self.last,
        )

    def prepare_cache(self, plan: EvaluationPlan, sites: list[AttentionSite], active: set[UUID]) -> None:
        """Forget what an evaluation is going to store anew, and what no evaluation will ask for any more."""
        if self.step >= self.full_from:
            self.cache.clear()
        self.cache.evict(active)
        storing = [site for site in sites if plan.attention.action(site.kind) is Action.STORE]
        if storing:
            self.cache.begin_store(storing)
        if plan.attention.self_attention is Action.COMPUTE:
            self.cache.forget([site for site in sites if site.kind == "self"])

    def see_others(self, acting: tuple[Any, ...], sites: list[AttentionSite]) -> None:
        """Forget stored cross-attention where another node's replacement (IPAdapter) or another keyframe of a LoRA acts since."""
        if acting != self.acted and (self.cache.means or self.cache.conds):
            self.cache.forget([site for site in sites if site.kind == "cross"])
            self.report.misfits.add(self.step)
        self.acted = acting

    def keep_guidance(self, outputs: list[torch.Tensor]) -> None:
        """Keep both prompts' predictions of this evaluation; a later one of the same step takes its place."""
        sigma, before = max(self.sigma, TINY_SIGMA), None
        if self.guidance is not None:
            before = self.guidance.before if self.guidance.step == self.step else self.guidance.point
        if before is not None and before.sigma <= sigma:  # the noise level has gone up since: another descent
            before = None
        point = GuidancePoint((outputs[POSITIVE] - outputs[NEGATIVE]) / sigma, sigma)
        self.guidance = Guidance(self.step, point, before)

    @property
    def measures(self) -> bool:
        """Return whether the change of cross-attention is measured in this evaluation."""
        return self.settings.mode is Mode.AUTO and self.step < self.gate - 1 and self.first_at_step

    def count_memory(self) -> None:
        """Take note of the most that the run keeps."""
        self.cache_peak_bytes = max(self.cache_peak_bytes, self.cache.bytes + self.change.bytes)

    def note(self, text: str) -> None:
        """Say something to the user, once, in the run's log line."""
        self.report.notes[text] = None

    def stop(self, reason: str) -> None:
        """Do nothing for the rest of the run: a plain image is better than a wrong one."""
        self.note(f"switched off in this run: {reason}")
        self.stopped = True
        self.cache.clear()
        self.guidance = None

    def release(self) -> None:
        """Free all tensors."""
        self.cache.clear()
        self.guidance = None
        self.change.clear()
        self._sites.clear()
        self.call = None

    def summary(self) -> str:
        """Return the run's log line."""
        return self.report.line(self.settings, self.clock.steps, self.gate, self.full_from, self.stopped)


@dataclass
class MainCall:
    """The sampler's own evaluation of all conds (other nodes' extra evaluations pass T-GATE by).

    Attributes:
        plan: what this evaluation does.
        active: all conds that are evaluated.
        seen: conds that a model call has had already; one that comes back means tiles or windows.
        served, computed: attention modules that returned what was stored, and modules that were computed in spite of the plan.
        misfit: why it cannot go on with what was stored.
    """

    plan: EvaluationPlan
    active: list[UUID] = field(default_factory=list)
    seen: set[UUID] = field(default_factory=set)
    served: dict[Kind, int] = field(default_factory=lambda: {"self": 0, "cross": 0})
    computed: dict[Kind, int] = field(default_factory=lambda: {"self": 0, "cross": 0})
    misfit: str | None = None

    @property
    def attention(self) -> StepPlan:
        """Return what self- and cross-attention do."""
        return self.plan.attention

    @property
    def pair(self) -> tuple[UUID, UUID] | None:
        """Return the two conds whose mean is stored or reused."""
        return self.plan.pair

    def give_up(self, reason: str) -> None:
        """End the evaluation, which is then made in full.

        Raises:
            Misfit: always.
        """
        self.misfit = reason
        raise Misfit(reason)
