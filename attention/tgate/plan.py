"""What each step of a run does: the published schedule."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from ..networks.blocks import Kind, attention_sites
from .settings import TGateSettings


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
