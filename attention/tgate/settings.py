"""The settings of T-GATE."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum

MAX_SHARE = 3.0


class CfgAfterGate(str, Enum):
    """What happens to classifier-free guidance once the gate is open."""

    DROP_KEEP_POSITIVE = "drop (keep positive)"
    DROP_KEEP_NEGATIVE = "drop (keep negative, as published)"
    KEEP = "keep"


class Mode(str, Enum):
    FIXED = "fixed"
    AUTO = "auto"


class GateOn(str, Enum):
    """What ``gate_at`` and ``full_at_end`` are shares of."""

    STEPS = "steps of this run"
    SCHEDULE = "whole noise schedule"


class Schedule(str, Enum):
    """What happens after the gate: whole steps are skipped, or T-GATE's own schedule is followed."""

    SKIP = "skip steps"
    PUBLISHED = "as published"


class CacheDevice(str, Enum):
    AUTO = "auto"
    GPU = "gpu"
    CPU = "cpu"


@dataclass(frozen=True)
class TGateSettings:
    """The user's settings.

    Attributes:
        gate_at: share of ``gate_on`` before the gate, in (0, 1]; 1 means never.
        sp_interval: self-attention is computed every so many steps before the gate (1: always).
        fi_interval: the same from the gate on.
        warm_up: steps at the start in which self-attention is always computed.
        positive_share: how much of the positive prompt's attention is in what the gate stores, the rest being the negative's:
            0.5 is the mean, as published; 1 the positive alone; above 1 away from the negative. Only where one is dropped, and
            not where guidance is kept: then it is the kept prompt's own.
        refresh_every: from the gate on, every so many steps are computed in full; 0: none, as published.
        tolerance: auto mode only; the gate opens once cross-attention changes by less than this from one step to the
            next (relative L2 norm over all modules), and by less than half of the run's largest change.
        gate_on: the steps of the run, of which a slice of a schedule has its own; or the whole noise schedule, which all its
            slices share.
        full_at_end: share of ``gate_on`` at the end that is computed in full, in [0, 1).
        schedule: what happens after the gate. ``SKIP`` uses of all settings only ``gate_at``, ``gate_on``, ``full_at_end`` and
            ``max_error``.
        max_error: the largest error to expect of the image after a skipped step, as a share of the image's norm.
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
    gate_on: GateOn = GateOn.STEPS
    full_at_end: float = 0.0
    schedule: Schedule = Schedule.PUBLISHED
    max_error: float = 0.03

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
        if not 0 <= self.full_at_end < 1:
            raise ValueError(f"full_at_end is {self.full_at_end:g}: it is a share of the steps, so use 0 (none) to less than 1.")
        if self.gate_at < 1 and self.gate_at + self.full_at_end >= 1:
            raise ValueError(
                f"gate_at is {self.gate_at:g} and full_at_end is {self.full_at_end:g}, so no step is left between them in which "
                "attention could be reused: choose values whose sum is less than 1."
            )
        if not 0 < self.max_error <= 1:
            raise ValueError(
                f"max_error is {self.max_error:g}: it is a share of the image, so use more than 0 (0.03 stays close to it) "
                "to 1. To skip nothing, set gate_at to 1."
            )
        if self.mode is Mode.AUTO and not self.tolerance > 0:
            raise ValueError(f"tolerance is {self.tolerance:g}: auto mode needs more than 0 (0.05 is a good start).")

    @property
    def unused(self) -> tuple[str, ...]:
        """Return the names of settings that were changed and do not act, because whole steps are skipped."""
        used = ("gate_at", "gate_on", "full_at_end", "schedule", "max_error")
        others = [field for field in fields(self) if field.name not in used and self.schedule is Schedule.SKIP]
        return tuple(field.name for field in others if getattr(self, field.name) != field.default)

    @property
    def drops_cfg(self) -> bool:
        return self.cfg_after_gate is not CfgAfterGate.KEEP

    @property
    def keeps_guidance(self) -> bool:
        return self.drops_cfg and self.refresh_every > 0

    @property
    def averages_self_attention(self) -> bool:
        """Return whether intervals before the gate keep one mean for both prompts, where there is one of each."""
        return self.cfg_after_gate is CfgAfterGate.DROP_KEEP_POSITIVE and not self.keeps_guidance

    def refreshes(self, steps_since_gate: int) -> bool:
        """Return whether a step at or after the gate is computed in full again."""
        return self.refresh_every > 0 and (steps_since_gate + 1) % self.refresh_every == 0

    def gate_step(self, steps: int) -> int:
        """Return the first step that reuses cross-attention; at least 1, since one step has to fill the cache."""
        return max(round(self.gate_at * steps), 1)
