"""What each step of a run does: the published schedule, and where on the run's steps its gate stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch

from ..host import StepClock
from ..networks.blocks import Kind, attention_sites
from .settings import GateOn, TGateSettings

_RELATIVE_SLACK = 1e-4  # of a sigma that is as good as the gate's


def reuses_attention(network: torch.nn.Module, settings: TGateSettings) -> bool:
    """Return whether any attention of this network would be reused: cross-attention, or self-attention in intervals."""
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
    """Return what one step does (the published ``tgate_scheduler``), for a gate that opens at step ``gate``.

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


@dataclass(frozen=True)
class GateWindow:
    """The steps of a run in which attention is reused: ``gate`` and later, before ``full_from``."""

    gate: int
    full_from: int


def gate_window(settings: TGateSettings, clock: StepClock, sigma_at: Callable[[float], float]) -> GateWindow:
    """Return where the gate opens and closes among the steps of one run.

    On the noise schedule a step is before the gate where its sigma is above the gate's; where the noise level also rises, all
    is before the gate up to the last such step. A slice that lies behind the gate has it at 0.

    Args:
        sigma_at: the sigma at a share of the model's whole schedule.
    """
    if settings.gate_on is GateOn.STEPS:
        gate = settings.gate_step(clock.steps)
        return GateWindow(gate, max(clock.steps - round(settings.full_at_end * clock.steps), gate))
    gate = _steps_above(sigma_at(settings.gate_at), clock)
    end = _steps_above(sigma_at(1 - settings.full_at_end), clock) if settings.full_at_end else clock.steps
    return GateWindow(gate, max(end, gate))


def _steps_above(sigma: float, clock: StepClock) -> int:
    """Return how many steps there are up to the last one that begins above a sigma."""
    above = [step for step, start in enumerate(clock.sigmas[:-1]) if start > sigma * (1 + _RELATIVE_SLACK)]
    return above[-1] + 1 if above else 0
