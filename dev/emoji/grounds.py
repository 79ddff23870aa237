"""Draw the grounds of scenes: plain and patterned ones of a colour, and places with a sky, land or water."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from emoji.atlas import blur
from emoji.chance import Chance
from emoji.concepts import GROUNDS
from emoji.layout import layout

SIDE = layout.IMAGE
TURN = 2 * math.pi
_DOTTED_IMAGES, _DOTS = 24, 70  # kept images of random dots, and the dots in each


class Grounds:
    """Draw grounds [n, 3, 256, 256]. Lengths are in image widths, from the upper left."""

    def __init__(self, chance: Chance, dtype: torch.dtype) -> None:
        self.chance, self.device, self.dtype = chance, chance.device, dtype
        axis = (torch.arange(SIDE, dtype=torch.float32, device=self.device) + 0.5) / SIDE
        self.y, self.x = (part[None].to(dtype) for part in torch.meshgrid(axis, axis, indexing="ij"))
        fixed = torch.Generator().manual_seed(0)
        dots = torch.zeros(_DOTTED_IMAGES, 1, SIDE, SIDE)
        for one in dots:
            rows, columns = torch.randint(2, SIDE - 2, (2, _DOTS), generator=fixed)
            one[0, rows, columns] = torch.rand(_DOTS, generator=fixed) * 0.6 + 0.4
        self.stars = (blur(dots, 0.9) * 4.2).clamp(0, 1).to(self.device, dtype)
        self.flakes = (blur(dots, 1.8) * 14).clamp(0, 1).to(self.device, dtype)
        self.colours: dict[Sequence[float], Tensor] = {}

    def __call__(self, counts: Sequence[int], base: Tensor) -> Tensor:
        """Draw the grounds of consecutive scenes: ``counts`` says how many of each kind, ``base`` [n, 3] has their colours."""
        image = torch.empty(len(base), 3, SIDE, SIDE, device=self.device, dtype=self.dtype)
        colours = base.to(self.dtype)[:, :, None, None]
        for kind, out, colour in zip(GROUNDS, image.split(list(counts)), colours.split(list(counts)), strict=True):
            if len(out):
                out.copy_(getattr(self, "_" + kind)(len(out), colour))
        return image

    # ---------------------------------------------------------------------------------------- what they are made of

    def _random(self, n: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return self.chance.uniform(n, 1, 1, low=low, high=high).to(self.dtype)

    def _colour(self, n: int, red: float, green: float, blue: float, spread: float = 0.05) -> Tensor:
        middle = self.colours.setdefault((red, green, blue), torch.tensor((red, green, blue))).to(self.device)
        self.colours[red, green, blue] = middle
        return (middle + self.chance.uniform(n, 3, low=-spread, high=spread)).clamp(0, 1).to(self.dtype)[:, :, None, None]

    def _inside(self, distance: Tensor) -> Tensor:
        """Return how far each pixel is inside, where ``distance`` is positive: 0..1."""
        return (distance * SIDE + 0.5).clamp(0, 1)[:, None]

    def _below(self, height: Tensor) -> Tensor:
        return self._inside(self.y - height)

    def _disc(self, radius: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return self._inside(radius - torch.hypot(self.x - x, self.y - y))

    def _hills(self, n: int, height: float, swing: float, fastest: float) -> Tensor:
        wave = torch.sin(TURN * (self.x * self._random(n, 0.5, fastest) + self._random(n)))
        return height + self._random(n, 0.3, 1) * swing * wave

    def _sky(self, top: Tensor, bottom: Tensor) -> Tensor:
        return torch.lerp(top, bottom, self.y[:, None].expand(len(top), -1, -1, -1))

    def _one_of(self, images: Tensor, n: int) -> Tensor:
        return images[self.chance.integers(len(images), n)]

    # ------------------------------------------------------------------------------------------------ of one colour

    def _plain(self, n: int, colour: Tensor) -> Tensor:
        return colour

    def _gradient(self, n: int, colour: Tensor) -> Tensor:
        return (colour + (self._random(n, -0.28, 0.28) * (self.y - 0.5) * 1.6)[:, None]).clamp(0, 1)

    def _pattern(self, colour: Tensor, distance: Tensor, often: Tensor) -> Tensor:
        """Shift the colour where ``distance`` (in periods) is positive: down where it is light, else up."""
        shift = torch.where(colour.mean(1, keepdim=True) > 0.62, -0.17, 0.17)
        return (colour + shift * self._inside(distance / often)).clamp(0, 1)

    def _striped(self, n: int, colour: Tensor) -> Tensor:
        often, lean = self._random(n, 4, 9).round(), self._random(n, -1, 1).round()
        along = self.x * often * (1 - 0.5 * lean.abs()) + lean * self.y * often * 0.5 + self._random(n)
        return self._pattern(colour, (along.remainder(1) - 0.5).abs() - 0.25, often)

    def _dotted(self, n: int, colour: Tensor) -> Tensor:
        often = self._random(n, 4, 9).round()
        x, y = ((axis * often + self._random(n)).remainder(1) - 0.5 for axis in (self.x, self.y))
        return self._pattern(colour, 0.30 - torch.hypot(x, y), often)

    def _checkered(self, n: int, colour: Tensor) -> Tensor:
        often = self._random(n, 4, 9).round()
        x, y = ((axis * often * 0.5 + self._random(n)).remainder(1) - 0.5 for axis in (self.x, self.y))
        return self._pattern(colour, (0.25 - x.abs()) * (y.abs() - 0.25).sign(), often)

    # ------------------------------------------------------------------------------------------------------- places

    def _meadow(self, n: int, _: Tensor) -> Tensor:
        image = self._sky(self._colour(n, 0.45, 0.74, 0.97), self._colour(n, 0.86, 0.95, 1.0))
        horizon = self._random(n, 0.48, 0.72)
        image = torch.lerp(image, self._colour(n, 0.50, 0.78, 0.38), self._below(horizon + self._hills(n, -0.05, 0.05, 2.0)))
        near = self._below(horizon + self._hills(n, 0.06, 0.04, 1.5))
        grass = (self._colour(n, 0.36, 0.68, 0.26) * (1.25 - 0.35 * self.y)[:, None]).clamp(0, 1)
        image = torch.lerp(image, grass, near)
        return torch.lerp(image, self._colour(n, 0.97, 0.85, 0.60, 0.25), self._one_of(self.flakes, n) * near * 0.8)

    def _sea(self, n: int, _: Tensor) -> Tensor:
        dusk = self._random(n)[:, None]
        top = torch.lerp(self._colour(n, 0.48, 0.76, 0.97), self._colour(n, 0.97, 0.66, 0.50), dusk)
        bottom = torch.lerp(self._colour(n, 0.88, 0.95, 0.99), self._colour(n, 1.0, 0.88, 0.68), dusk)
        image = torch.lerp(top, bottom, (self.y * 1.6).clamp(0, 1)[:, None])
        horizon = self._random(n, 0.42, 0.62)
        sun = self._disc(self._random(n, 0.05, 0.09), self._random(n, 0.1, 0.9), horizon - self._random(n, 0.0, 0.3))
        image = torch.lerp(image, self._colour(n, 1.0, 0.93, 0.62), sun)
        sway = 0.18 * torch.sin(TURN * (self.x * self._random(n, 2, 5).round() + self._random(n)))
        wave = torch.sin(TURN * ((self.y - horizon) * self._random(n, 9, 14) + sway))
        water = self._colour(n, 0.10, 0.46, 0.76) * (1.15 - 0.45 * (self.y - horizon))[:, None] + 0.05 * wave[:, None]
        return torch.lerp(image, water.clamp(0, 1), self._below(horizon))

    def _night(self, n: int, _: Tensor) -> Tensor:
        image = self._sky(self._colour(n, 0.03, 0.04, 0.17, 0.03), self._colour(n, 0.16, 0.15, 0.42))
        image = torch.lerp(image, self._colour(n, 1.0, 0.98, 0.85, 0.02), self._one_of(self.stars, n))
        x, y, radius = self._random(n, 0.08, 0.92), self._random(n, 0.08, 0.25), self._random(n, 0.05, 0.085)
        moon = self._disc(radius, x, y) * (1 - self._disc(radius, x + radius * 0.5, y - radius * 0.2))
        return torch.lerp(image, self._colour(n, 0.99, 0.95, 0.72, 0.03), moon)

    def _desert(self, n: int, _: Tensor) -> Tensor:
        image = self._sky(self._colour(n, 0.98, 0.74, 0.48), self._colour(n, 1.0, 0.92, 0.74, 0.03))
        horizon = self._random(n, 0.48, 0.7)
        sun = self._disc(self._random(n, 0.05, 0.09), self._random(n, 0.1, 0.9), self._random(n, 0.1, 0.3))
        image = torch.lerp(image, self._colour(n, 1.0, 0.96, 0.80, 0.02), sun)
        image = torch.lerp(image, self._colour(n, 0.90, 0.70, 0.42), self._below(horizon + self._hills(n, -0.05, 0.06, 1.6)))
        return torch.lerp(image, self._colour(n, 0.84, 0.58, 0.31), self._below(horizon + self._hills(n, 0.10, 0.05, 1.3)))

    def _snow(self, n: int, _: Tensor) -> Tensor:
        image = self._sky(self._colour(n, 0.56, 0.70, 0.86), self._colour(n, 0.80, 0.88, 0.96, 0.03))
        land = self._below(self._random(n, 0.5, 0.72) + self._hills(n, 0.0, 0.05, 1.6))
        image = torch.lerp(image, self._colour(n, 0.94, 0.96, 0.99, 0.02), land)
        return torch.lerp(image, torch.ones_like(image), self._one_of(self.flakes, n))
