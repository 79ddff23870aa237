"""Draw the random numbers of one seed on the device: the same seed gives the same scenes, whatever else draws numbers."""

from __future__ import annotations

import torch
from torch import Tensor


class Chance:
    """Draw tensors from a generator of one's own."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device, self.generator = device, torch.Generator(device)
        self.generator.manual_seed(seed)

    def restart(self, seed: int) -> None:
        """Go on with the numbers of ``seed``. Nothing waits for the device."""
        self.generator.manual_seed(seed)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, device=self.device, generator=self.generator) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Draw whole numbers from 0 to ``high`` - 1."""
        return torch.randint(high, shape, device=self.device, generator=self.generator)

    def order(self, count: int) -> Tensor:
        """Draw an order of ``count`` things."""
        return torch.randperm(count, device=self.device, generator=self.generator)

    def ranks(self, *shape: int) -> Tensor:
        """Draw Gumbel noise: the largest of it plus log-weights is a draw without replacement."""
        return -torch.log(-torch.log(self.uniform(*shape).clamp(1e-6, 1 - 1e-6)))
