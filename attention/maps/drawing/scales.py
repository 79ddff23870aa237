"""Which values the colours of a heat map stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch


class Normalize(str, Enum):
    """What a colour (and a mask's grey) stands for."""

    EACH = "each word"
    ALL = "all words"
    NONE = "none"


@dataclass(frozen=True)
class Scale:
    """The values that the two ends of the colour bar stand for."""

    low: float
    high: float

    @classmethod
    def around(cls, heat: torch.Tensor) -> Scale:
        finite = heat[torch.isfinite(heat)]
        return cls(float(finite.min()), float(finite.max())) if finite.numel() else cls(0.0, 0.0)

    def apply(self, heat: torch.Tensor) -> torch.Tensor:
        """Heat as 0..1; a map that is the same everywhere is 0 everywhere."""
        span = self.high - self.low
        if span <= 1e-6 * max(abs(self.high), abs(self.low)):
            return torch.zeros_like(heat)
        return ((heat - self.low) / span).clamp(0, 1)


SHARE = Scale(0.0, 1.0)


def scales(maps: Sequence[torch.Tensor], normalize: Normalize) -> list[Scale]:
    """Return the scale of each map: its own, one for all of them, or the plain share of attention."""
    if normalize is Normalize.NONE:
        return [SHARE] * len(maps)
    own = [Scale.around(heat) for heat in maps]
    if normalize is Normalize.EACH or not own:
        return own
    return [Scale(min(scale.low for scale in own), max(scale.high for scale in own))] * len(own)
