"""What one evaluation of a run does: a pure function from what is known before it to a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from .plan import Action, StepPlan, plan
from .settings import CfgAfterGate, TGateSettings

POSITIVE, NEGATIVE = 0, 1
Uuids = tuple[UUID, ...]

_IN_FULL = StepPlan(Action.COMPUTE, Action.COMPUTE)


@dataclass(frozen=True)
class Situation:
    """What is known before an evaluation.

    Attributes:
        step: the run's step that it belongs to.
        gate, full_from: the first step that reuses attention, and the first one that does so no longer.
        prompts: for each list of conds (positive, negative) its conds; None: the list is left out (CFG 1).
        active: of these, the ones that act at this noise level.
        combines_as_cfg: the guider mixes exactly a positive and a negative prediction.
        needs_uncond: the sampler or another node asked for a real negative prediction.
        reuses_text, reuses_any: the network has cross-attention, any attention, that may be reused.
        holds_mean: every cross-attention holds the mean of both prompts.
        has_guidance: a step that computed both prompts has been kept (``refresh_every``).
        negative_is_old: the negative prompt was left out since both were last computed.
        last: the last step that was computed; None: the one before. Another cache may have skipped some since.
    """

    step: int
    gate: int
    full_from: int
    prompts: tuple[Uuids | None, ...]
    active: tuple[Uuids, ...]
    combines_as_cfg: bool = True
    needs_uncond: bool = False
    reuses_text: bool = True
    reuses_any: bool = True
    holds_mean: bool = False
    has_guidance: bool = False
    negative_is_old: bool = False
    last: int | None = None

    @property
    def since(self) -> range:
        """Return this step, and the ones before it that were not computed."""
        return range(self.step if self.last is None else min(self.last + 1, self.step), self.step + 1)


@dataclass(frozen=True)
class EvaluationPlan:
    """What an evaluation does.

    Attributes:
        attention: what self- and cross-attention do.
        pair: the one positive and one negative cond whose mean is stored or reused; None: each cond for itself.
        kept: index of the only list of conds that is evaluated; None: all are.
        stores: the conds whose attention is worth keeping, where each is stored for itself.
        refreshes: the gate is closed for this step (``refresh_every``).
        stores_late: it stores after the gate, because nothing that can be reused was stored before.
        keeps_guidance: the difference between the two prompts is to be kept.
        must_compute: another cache must not answer in the network's place.
        notes: what the user should know.
    """

    attention: StepPlan
    pair: tuple[UUID, UUID] | None = None
    kept: int | None = None
    stores: frozenset[UUID] = frozenset()
    refreshes: bool = False
    stores_late: bool = False
    keeps_guidance: bool = False
    must_compute: bool = False
    notes: tuple[str, ...] = ()

    def stored_again(self) -> EvaluationPlan:
        """Return the plan for another try, where what was stored did not fit: all prompts are computed and stored."""
        storing = StepPlan(Action.COMPUTE, Action.STORE)
        return replace(self, attention=storing, kept=None, stores_late=True, must_compute=True)


def plan_evaluation(settings: TGateSettings, now: Situation) -> EvaluationPlan:
    """Return what an evaluation does."""
    if now.step >= now.full_from:
        return EvaluationPlan(_IN_FULL, must_compute=now.negative_is_old)
    notes: list[str] = []
    may_drop = settings.drops_cfg and _may_drop(now, notes)
    pair = _pair(settings, now) if may_drop else None
    kept = _kept(settings, now, pair, notes) if may_drop else None
    keeps_guidance = kept is not None and settings.keeps_guidance
    refreshes = any(step >= now.gate and settings.refreshes(step - now.gate) for step in now.since)
    # What a cond needs that is stored for itself is computed and stored when it first appears; a mean needs both prompts.
    ready = (pair is None or now.holds_mean) and (now.has_guidance or not keeps_guidance)
    opened = now.step >= now.gate and not refreshes and ready
    evaluated = kept if opened else None
    lists = now.active if kept is None else (now.active[kept],)
    return EvaluationPlan(
        attention=_attention(settings, now, opened) if now.reuses_any else _IN_FULL,
        pair=pair,
        kept=evaluated,
        stores=frozenset(uuid for conds in lists for uuid in conds),
        refreshes=refreshes,
        stores_late=now.step >= now.gate and not opened and not refreshes,
        keeps_guidance=keeps_guidance and evaluated is None,
        must_compute=refreshes or (evaluated is None and now.negative_is_old),
        notes=tuple(notes),
    )


def _attention(settings: TGateSettings, now: Situation, opened: bool) -> StepPlan:
    """Return what attention does; what a step that another cache skipped should have stored, this one stores."""
    plans = [plan(step if opened else min(step, now.gate - 1), now.gate, settings) for step in now.since]
    chosen = plans[-1]
    if chosen.self_attention is Action.REUSE and any(one.self_attention is Action.STORE for one in plans):
        return replace(chosen, self_attention=Action.STORE)
    return chosen


def has_no_negative(prompts: Sequence[Uuids | None]) -> bool:
    """Return whether the sampler evaluates one prompt only: CFG 1, or a guider that has no other."""
    return len(prompts) == 2 and bool(prompts[POSITIVE]) and not prompts[NEGATIVE]


def _may_drop(now: Situation, notes: list[str]) -> bool:
    if len(now.prompts) > 2:
        notes.append("the guider uses more than a positive and a negative prompt, so all of them are kept")
    elif len(now.prompts) == 2 and now.prompts[POSITIVE] and now.prompts[NEGATIVE]:
        if not now.combines_as_cfg:
            notes.append("the guider does not combine its prompts as plain CFG, so the negative prompt is kept")
        elif now.needs_uncond:
            notes.append("the sampler or another node needs the negative prompt at every step, so it is kept")
        else:
            return True
    return False


def _pair(settings: TGateSettings, now: Situation) -> tuple[UUID, UUID] | None:
    """Return the positive and the negative cond whose mean is stored: where there is one of each, and both act.

    A run that begins behind the gate has no step in which both are computed: the positive prompt's own attention is stored.
    """
    positive, negative = now.prompts
    if not now.reuses_text or len(positive or ()) != 1 or len(negative or ()) != 1 or not all(now.active):
        return None
    if now.gate <= 0 and not settings.keeps_guidance:
        return None
    return now.active[POSITIVE][0], now.active[NEGATIVE][0]


def _kept(settings: TGateSettings, now: Situation, pair: tuple[UUID, UUID] | None, notes: list[str]) -> int | None:
    """Return which list of conds is evaluated after the gate; None: both, because the positive one does not act."""
    behind = now.step >= now.gate
    if not now.active[POSITIVE]:
        if behind:
            notes.append("the positive prompt does not act in every step after the gate; there, nothing is dropped")
        return None
    if settings.cfg_after_gate is not CfgAfterGate.DROP_KEEP_NEGATIVE:
        return POSITIVE
    if pair is not None:
        return NEGATIVE
    if not now.reuses_text:
        notes.append("the positive prompt is kept instead of the negative: no cache holds any of it")
    elif not now.active[NEGATIVE]:
        if behind:
            notes.append("the negative prompt does not act in every step after the gate; there, the positive one is kept")
    elif len(now.active[POSITIVE]) == len(now.active[NEGATIVE]) == 1 and now.gate <= 0:
        notes.append("this run begins after the gate, so the positive prompt is kept instead of the negative")
    else:
        notes.append("several prompts act together, so the positive ones are kept instead of the negative")
    return POSITIVE
