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
from .guidance import TINY_SIGMA, Guidance, GuidancePoint
from .plan import StepPlan
from .settings import CacheDevice, Mode, TGateSettings

POSITIVE, NEGATIVE = 0, 1


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
        """Return the attention modules of a BaseModel that this run may skip; looked up once a run."""
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
        """Do nothing for the rest of the run: a plain image is better than a wrong one."""
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
