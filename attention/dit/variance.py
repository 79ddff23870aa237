"""The variance that a DiT predicts, from the network to the sampler."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock

from torch import Tensor

# transformer_options: a VarianceOfStep that the network fills while the sampler waits for its prediction.
VARIANCE = "fovea.dit.variance"


@dataclass
class VarianceOfStep:
    """What the network says about the variance in one evaluation: v in -1..1 (B, C, H, W), by positive (0) and negative (1).

    On several GPUs its calls may come at the same time.
    """

    sums: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def add(self, variance: Tensor, kinds: list[int]) -> None:
        """Add the variance (B, C, H, W) of one call, whose equal parts are of the prompts ``kinds``."""
        for kind, chunk in zip(kinds, variance.chunk(len(kinds)), strict=True):
            with self.lock:
                total = self.sums.get(kind)
                if total is not None and total.shape != chunk.shape:
                    raise ValueError(ONE_LABEL)
                self.sums[kind] = chunk.float() if total is None else total + chunk.float().to(total.device)
                self.counts[kind] = self.counts.get(kind, 0) + 1

    def of_positive(self, x: Tensor) -> Tensor | None:
        """Return the positive class's, as published; the mean of several; what there is, where only the negative was computed."""
        if not self.sums:
            return None
        kind = min(self.sums)
        v = self.sums[kind].to(x.device) / self.counts[kind]
        if v.shape != x.shape:
            raise ValueError(ONE_LABEL)
        return v


ONE_LABEL = (
    "DiT's ddpm sampler needs one variance for the whole image, and here parts of it have labels of their own (areas, tiles or "
    "windows). Use another sampler."
)
