"""The settings of Attention Distillation."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..gradient.model_pass import Memory


class Method(str, Enum):
    GUIDED = "guided sampling"
    OPTIMISE = "optimise"


class Adain(str, Enum):
    """Whether the latent first gets the references' mean and spread of each channel. Auto: as published for the method."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


LEAST_WINDOW = 64


@dataclass(frozen=True)
class DistillSettings:
    """User settings; iterations and learning_rate 0 are the published values for the method and the model.

    Attributes:
        window, window_stride: in pixels of the image; window 0 is the whole.
        reference_per_image: whether each image of a batch follows one reference; else every image follows all of them.
    """

    method: Method = Method.GUIDED
    iterations: int = 0
    learning_rate: float = 0.0
    content_weight: float = 0.25
    adain: Adain = Adain.AUTO
    start_at: float = 0.0
    end_at: float = 1.0
    every_n_steps: int = 1
    attn_scale: float = 1.0
    layers: str = ""
    memory: Memory = Memory.AUTO
    window: int = 0
    window_stride: int = 64
    reference_per_image: bool = False

    def __post_init__(self) -> None:
        for name in ("iterations", "learning_rate", "content_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name):g}: use 0 or more.")
        for name in ("start_at", "end_at"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name):g}: it is a fraction of the run, so use 0 to 1.")
        if self.start_at > self.end_at:
            raise ValueError(
                f"start_at is {self.start_at:g} and end_at is {self.end_at:g}: the end comes before the start. Exchange them, "
                "or use 0 and 1 for the whole run."
            )
        if self.every_n_steps < 1:
            raise ValueError(f"every_n_steps is {self.every_n_steps}: it counts steps, so use 1 (every step) or more.")
        if not self.attn_scale > 0:
            raise ValueError(f"attn_scale is {self.attn_scale:g}: use more than 0 (1 as published, more is sharper).")
        if self.window < 0 or 0 < self.window < LEAST_WINDOW:
            raise ValueError(f"window is {self.window}: use 0 (the whole image) or at least {LEAST_WINDOW} pixels.")
        if self.window and not 0 < self.window_stride <= self.window:
            raise ValueError(
                f"window_stride is {self.window_stride} and window {self.window}: windows that are further apart than they are "
                "wide leave gaps, so use 1 to the window's side, best an eighth to a half of it."
            )

    @property
    def uses_adain(self) -> bool:
        return self.adain is Adain.ON or (self.adain is Adain.AUTO and self.method is Method.GUIDED)

    def chosen_steps(self, steps: int) -> range:
        """Return the steps that are followed by optimisation."""
        return range(round(self.start_at * steps), round(self.end_at * steps), self.every_n_steps)
