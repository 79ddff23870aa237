"""Auto mode: how much cross-attention changes from step to step."""

from __future__ import annotations

from uuid import UUID

import torch

SETTLED = 0.5  # of the largest change of the run
EVERY = 8  # of so many tokens one is compared: two steps of both prompts are then half of one prompt's stored attention


class ConvergenceMeter:
    """Relative L2 change of all cross-attention outputs from one step to the next, over every eighth token.

    Args:
        device: where samples are kept; None: where they were computed.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self._before: dict[tuple[str, UUID], torch.Tensor] = {}
        self._now: dict[tuple[str, UUID], torch.Tensor] = {}

    def add(self, site: str, uuids: list[UUID], output: torch.Tensor) -> None:
        """Keep a sample of each cond's chunk of ``output`` (conds * batch, tokens, channels)."""
        for uuid, chunk in zip(uuids, output.chunk(len(uuids)), strict=True):
            sample = chunk[:, ::EVERY]
            self._now[site, uuid] = sample.clone() if self.device is None else sample.to(self.device, copy=True)

    def finish_step(self) -> float | None:
        """Return ||now - before|| / ||now|| over all modules and conds, or None where there is no last step to compare with."""
        before, now = self._before, self._now
        self._before, self._now = now, {}
        if not now or now.keys() != before.keys() or any(now[key].shape != before[key].shape for key in now):
            return None
        difference = sum((now[key] - before[key]).float().square().sum() for key in now)
        norm = sum(value.float().square().sum() for value in now.values())
        return float(torch.as_tensor(difference / norm).sqrt())

    @property
    def bytes(self) -> int:
        """Return what the samples take."""
        return sum(value.numel() * value.element_size() for part in (self._before, self._now) for value in part.values())

    def clear(self) -> None:
        """Forget both steps."""
        self._before.clear()
        self._now.clear()
