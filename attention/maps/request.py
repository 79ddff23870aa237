"""What the user asks of the preview."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from .drawing.overlay import Style
from .drawing.scales import Normalize
from .origin import Origin


class View(str, Enum):
    OVERLAY = "overlay"
    STEPS = "steps"
    LAYERS = "layers"
    SELF_ATTENTION = "self-attention"
    CONVERGENCE = "convergence"
    SEGMENTS = "segments"


@dataclass(frozen=True)
class Request:
    """User settings of the preview.

    Attributes:
        query: x and y as fractions of width and height.
        latent: what the sampler returned, to name the run; origin: where the images come from in the workflow.
        batch_index, frame: only this image of the batch, this frame of the video; -1: all.
        largest_part: masks keep only the largest of the areas above the threshold.
    """

    view: View = View.OVERLAY
    prompt: str = "positive"
    words: str = ""
    normalize: Normalize = Normalize.EACH
    style: Style = Style()
    query: tuple[float, float] = (0.5, 0.5)
    clip: Any = None
    text: str = ""
    default_gate: Callable[[int], int] = lambda steps: round(0.4 * steps)
    latent: torch.Tensor | None = None
    origin: Origin | None = None
    batch_index: int = -1
    frame: int = -1
    largest_part: bool = False

    def __post_init__(self) -> None:
        for name, value in zip(("query_x", "query_y"), self.query, strict=True):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value:g}: it is a place in the image, from 0 to 1.")
