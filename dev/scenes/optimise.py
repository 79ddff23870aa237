"""The optimiser of the trained networks: AdamW with averaged weights and a learning rate that follows the clock."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

EMA_DECAY, CLIP_NORM, WARM_UP_STEPS = 0.999, 1.0, 150


class AveragedAdamW:
    """Steps, counts them, and keeps an exponential average of the weights, which is what is shipped."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        self.parameters, self.lr = list(parameters), lr
        self.average = [p.detach().clone() for p in self.parameters]
        self.adamw = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.steps = 0  # since this process started

    def resume(self, state: dict[str, object], average: Iterable[Tensor]) -> None:
        """Go on from a saved state of ``adamw`` and saved averages."""
        self.adamw.load_state_dict(state)
        for mine, saved in zip(self.average, average, strict=True):
            mine.copy_(saved)

    def step(self, progress: float, total_steps: int) -> None:
        """Take one step at ``progress`` (0 to 1) of the time budget, the ``total_steps``-th of the weights' life."""
        nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        self.steps += 1
        for group in self.adamw.param_groups:
            group["lr"] = self.lr * min(1, self.steps / WARM_UP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1)))
        self.adamw.step()
        self.adamw.zero_grad()
        decay = min(EMA_DECAY, (1 + total_steps) / (10 + total_steps))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
