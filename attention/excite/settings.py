"""The settings of Attend-and-Excite."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..gradient.model_pass import Memory
from .losses import LossSettings
from .places import PlaceSettings


@dataclass(frozen=True)
class ExciteSettings:
    """User settings.

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
    places: PlaceSettings = field(default_factory=PlaceSettings)

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
        """Return the maximum that every subject must have in this step, or None."""
        found = [wanted for fraction, wanted in self.thresholds if min(round(fraction * steps), steps - 1) == step]
        return max(found) if found else None

    def acts_in(self, step: int, steps: int) -> bool:
        return step < self.guided_steps(steps) or (self.wanted(step, steps) is not None and self.max_refinements > 0)


def _check_fraction(name: str, value: float, hint: str) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}: it is a fraction, from 0 to 1 ({hint}).")


def parse_thresholds(text: str) -> tuple[tuple[float, float], ...]:
    """Turn ``0:0.05, 0.2:0.5`` into ((0.0, 0.05), (0.2, 0.5)). Empty: no refinement."""
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
