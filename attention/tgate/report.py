"""What a run tells the user: one line, with the reason for everything that is less than planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..networks.blocks import Kind
from .settings import GateOn, Mode, TGateSettings

SEVERAL_CALLS = "each step calls the model several times for one prompt (tiles or windows)"
CHANGED_BATCH = "another node changes the batch of a model call"


@dataclass
class Report:
    """The steps of a run by what was done in them, counted as it was done, and reasons.

    Attributes:
        reused: steps in which every attention module that was called returned what was stored.
        in_part: the same where some modules were computed: how many returned what was stored, and how many there were.
        dropped: steps without the negative prompt.
        refreshed: steps after the gate that were planned to be computed in full.
        stored_late: steps after the gate that had to store first, because the step before it had not.
        misfits: steps in which stored attention did not fit.
        skipped: steps in which EasyCache answered in the network's place.
        evaluated: steps that the sampler evaluated at all.
        beside_lazycache: ComfyUI's LazyCache, which skips whole evaluations, acts in this run.
        no_negative: the sampler had no negative prompt.
        one_by_one: the prompts of an evaluation came in several batches, of which only the first is T-GATE's.
        no_text: why no cross-attention can be reused, where it cannot.
    """

    reused: dict[Kind, set[int]] = field(default_factory=lambda: {"self": set(), "cross": set()})
    in_part: dict[int, tuple[int, int]] = field(default_factory=dict)
    dropped: set[int] = field(default_factory=set)
    refreshed: set[int] = field(default_factory=set)
    stored_late: set[int] = field(default_factory=set)
    misfits: set[int] = field(default_factory=set)
    skipped: set[int] = field(default_factory=set)
    evaluated: set[int] = field(default_factory=set)
    beside_lazycache: bool = False
    no_negative: bool = False
    one_by_one: bool = False
    no_text: str = ""
    notes: dict[str, None] = field(default_factory=dict)

    def line(self, settings: TGateSettings, steps: int, gate: int, full_from: int, stopped: bool) -> str:
        """Return the log line of a run of ``steps`` steps, ``gate`` to ``full_from`` of them planned to reuse attention."""
        text = f"T-GATE: cross-attention reused in {len(self.reused['cross'])} of {steps} steps"
        text += f", negative prompt skipped in {len(self.dropped)}"
        if self.reused["self"]:
            text += f", self-attention reused in {len(self.reused['self'])}"
        if self.refreshed:
            text += f", all computed again in {len(self.refreshed)}"
        if settings.mode is Mode.AUTO:
            text += f", gate opened at step {gate}"
        reasons = [] if stopped else self._reasons(settings, steps, gate, full_from)
        return "; ".join([text, *self.notes, *reasons])

    def _reasons(self, settings: TGateSettings, steps: int, gate: int, full_from: int) -> list[str]:
        """Return why less was done than the settings say."""
        planned = set(range(gate, full_from)) - self.refreshed
        if not planned:
            return [no_step_left(settings, steps)]
        reasons = self._limits(settings)
        for step, (served, called) in sorted(self.in_part.items()):
            reasons.append(
                f"in step {step} only {served} of {called} cross-attention modules were reused, as a prompt begins there"
            )
        if late := self.stored_late - self.misfits:
            why = f"step {gate - 1} was not computed in full" if gate > 0 else "this run begins after the gate"
            reasons.append(f"attention was stored only in step {_listed(late)}, because {why}")
        if self.misfits:
            reasons.append(
                f"stored attention did not fit in step {_listed(self.misfits)} (another node changed the size of the model's "
                "layers, or began to act), so both prompts were computed and stored again"
            )
        if skipped := self.skipped & planned:
            reasons.append(f"EasyCache skipped {len(skipped)} of the {len(planned)} steps after the gate")
        if missing := planned - self.evaluated:
            reasons.append(
                f"{len(missing)} of the {len(planned)} steps after the gate were not evaluated (skipped by "
                f"{'LazyCache' if self.beside_lazycache else 'the sampler or another cache'})"
            )
        done = min(len(self.reused["cross"]), len(self.dropped)) if settings.drops_cfg else len(self.reused["cross"])
        if done < len(planned) and not reasons and not self.notes:
            reasons.append(f"{len(planned) - done} of the {len(planned)} steps after the gate were computed in full")
        return reasons

    def _limits(self, settings: TGateSettings) -> list[str]:
        """Return why not all can be reused or dropped in this graph."""
        if self.one_by_one and not self.dropped:
            alone = "the prompts are computed one by one (by the guider or another node)"
            return [f"{alone}, so only the first one's attention is reused and none is dropped"]
        no_drop = "CFG is 1, so there is no negative prompt to drop" if self.no_negative and settings.drops_cfg else ""
        reuses = bool(self.reused["cross"] or self.reused["self"])
        if no_drop and not reuses:
            return [f"{self.no_text + ', and ' if self.no_text else ''}{no_drop}: nothing is gained, so bypass this node"]
        if no_drop:
            return [f"{no_drop}: hardly anything is gained and the image changes, so bypass this node"]
        if not self.no_text:
            return []
        only = [text for text, steps in _ONLY if (self.dropped if steps == "dropped" else self.reused["self"])]
        text = f"{self.no_text}, so {'only ' + ' and '.join(only) if only else 'none is reused'}"
        return [text + (", and auto mode opens the gate at gate_at" if settings.mode is Mode.AUTO else "")]


_ONLY = (("self-attention is reused", "reused"), ("the negative prompt is dropped", "dropped"))


def no_step_left(settings: TGateSettings, steps: int) -> str:
    """Return why nothing is reused in a run of which no step lies after the gate."""
    if settings.gate_on is GateOn.SCHEDULE:
        return "nothing is reused: no step of this run lies between the gate and the end on the noise schedule"
    return (
        f"nothing is reused: a run of {steps} step{'s' * (steps != 1)} has none after the gate (for a chain of short runs, set "
        f"gate_on to '{GateOn.SCHEDULE.value}')"
    )


def evaluated_in_parts(x: Tensor, evaluated: Sequence[int], images: int) -> str:
    """Return why a model call has a part of what is sampled, so that nothing it stores is the whole image's; "" where it has all.

    Args:
        x: what the network is given; evaluated: the shape of what the sampler asked for.
        images: that are sampled.
    """
    if x.shape != evaluated:
        return "context windows cut each step into several model calls"
    return "the sampler evaluates the images of a batch one by one" if len(x) < images else ""


def _listed(steps: set[int]) -> str:
    """Return step numbers as text, the first three of them."""
    first = [str(step) for step in sorted(steps)[:3]]
    return ", ".join(first) + (f" and {len(steps) - 3} more" if len(steps) > 3 else "")
