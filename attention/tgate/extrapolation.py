"""Predictions that go on along a straight line, and how far off the next one is to be expected."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .guidance import TINY_SIGMA

_SAME_LEVEL = 1e-4  # in log(sigma): two evaluations at one noise level


class Line:
    """A straight line over log(sigma) through the last two predictions of the noise, (x - image) / sigma.

    Along the path of a sampler that adds no noise it changes slowly, unlike the predicted image, from which each step removes
    noise. For models that predict a flow it is the velocity.

    Attributes:
        bend: how far the last prediction was from the line, as a share of the image's norm, for a distance of 1 in log(sigma)
            beyond two points that are 0 apart. An error of a straight line grows as h * (h + H), where h is the distance to the
            last point and H that between the two. None: not measured yet.
    """

    def __init__(self) -> None:
        self._levels: list[float] = []
        self._values: list[tuple[torch.Tensor, ...]] = []
        self.bend: float | None = None

    def clear(self) -> None:
        """Forget all points."""
        self._levels.clear()
        self._values.clear()
        self.bend = None

    def add(self, x: torch.Tensor, images: Sequence[torch.Tensor], sigma: float) -> None:
        """Go through another point: predicted ``images``, each of the shape of ``x``, which was evaluated at ``sigma``.

        One at the level of the last point takes its place. Where the noise level turns, the line begins anew.
        """
        level, value = _level(sigma), tuple((x - image) / max(sigma, TINY_SIGMA) for image in images)
        if self._levels and abs(level - self._levels[-1]) < _SAME_LEVEL:
            self._values[-1] = value
            return
        if len(self._levels) == 2 and (level - self._levels[1]) * (self._levels[1] - self._levels[0]) < 0:
            self.clear()
        self._levels, self._values = [*self._levels[-1:], level], [*self._values[-1:], value]

    def at(self, x: torch.Tensor, sigma: float) -> list[torch.Tensor]:
        """Return the images that the line predicts of ``x`` at ``sigma``."""
        (earlier, later), ahead, apart = self._values, *self._distances(sigma)
        share = ahead / apart
        return [x - max(sigma, TINY_SIGMA) * (b + share * (b - a)) for a, b in zip(earlier, later, strict=True)]

    def measure(self, x: torch.Tensor, image: torch.Tensor, sigma: float) -> None:
        """Note how far a computed ``image`` is from the line's first prediction; reads one value from the device."""
        if len(self._levels) < 2 or any(abs(_level(sigma) - level) < _SAME_LEVEL for level in self._levels):
            return
        (predicted, *_), (ahead, apart) = self.at(x, sigma), self._distances(sigma)
        error = (predicted - image).float().norm() / image.float().norm().clamp_min(TINY_SIGMA)
        self.bend = abs(float(error) / (ahead * (ahead + apart)))

    def expected_error(self, sigma: float) -> float:
        """Return the error to expect at ``sigma``, as a share of the image's norm; infinite where nothing is known of it."""
        if self.bend is None or len(self._levels) < 2:
            return math.inf
        ahead, apart = self._distances(sigma)
        return abs(self.bend * ahead * (ahead + apart)) if ahead * apart >= 0 else math.inf

    def _distances(self, sigma: float) -> tuple[float, float]:
        """Return how far a noise level lies beyond the last point, and how far the two are apart."""
        earlier, later = self._levels
        return _level(sigma) - later, later - earlier


def _level(sigma: float) -> float:
    return math.log(max(sigma, TINY_SIGMA))
