"""The settings of a capture."""

from __future__ import annotations

from dataclasses import dataclass

NO_SELF_ATTENTION = "Self-attention cannot be recorded"  # how the note begins that says why


@dataclass(frozen=True)
class CaptureSettings:
    """User settings of a capture.

    Attributes:
        layers: names in the syntax of ``layer_names``; empty: what DAAM uses, or every layer of other networks.
        per_step: keep the map of every step (over all layers) besides the sums.
        per_head: keep heads apart.
        self_attention: record image tokens attending to image tokens too.
        max_memory_mb: resolution, then heads, then steps are given up to stay below it.
    """

    layers: str = ""
    per_step: bool = True
    per_head: bool = False
    self_attention: bool = False
    max_memory_mb: int = 512

    def __post_init__(self) -> None:
        if self.max_memory_mb < 1:
            raise ValueError(f"max_memory_mb is {self.max_memory_mb}: maps need memory, so use 1 or more (512 is a good start).")
