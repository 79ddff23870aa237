"""The difference between the two prompts' predictions, kept between full steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

TINY_SIGMA = 1e-6  # what a sigma of 0 counts as where it is divided by


@dataclass(frozen=True)
class GuidancePoint:
    """How the positive prompt's prediction of the noise differed from the negative's, (batch, channels, ...), at ``sigma``."""

    noise: torch.Tensor
    sigma: float


@dataclass(frozen=True)
class Guidance:
    """The difference between the two prompts, on a straight line over log(sigma) through the last two steps that computed both.

    Steps that reuse self-attention are not among them: what they find is off, and a line doubles that.

    Attributes:
        step: the later one's.
        point: what it found.
        before: what the earlier one found; None: the difference stays as it is.
    """

    step: int
    point: GuidancePoint
    before: GuidancePoint | None

    def at(self, sigma: float) -> torch.Tensor:
        """Return the difference of the predicted images, x - sigma * noise; never further on than the two points lie apart."""
        noise, sigma = self.point.noise, max(sigma, TINY_SIGMA)
        if self.before is not None:
            apart = math.log(self.point.sigma / self.before.sigma)
            share = min(max(math.log(sigma / self.point.sigma) / apart, 0.0), 1.0)
            noise = noise + share * (noise - self.before.noise)
        return noise * sigma
