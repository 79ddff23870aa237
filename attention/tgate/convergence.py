"""Auto mode: how much cross-attention changes from step to step."""

from __future__ import annotations

from uuid import UUID

import torch

SETTLED = 0.5  # of the largest change of the run


class ConvergenceMeter:
    """Relative L2 change of all cross-attention outputs from one step to the next."""

    def __init__(self) -> None:
        self._before: dict[tuple[str, UUID], torch.Tensor] = {}
        self._now: dict[tuple[str, UUID], torch.Tensor] = {}

    def add(self, site: str, uuids: list[UUID], output: torch.Tensor) -> None:
        for uuid, chunk in zip(uuids, output.chunk(len(uuids)), strict=True):
            self._now[site, uuid] = chunk

    def finish_step(self) -> float | None:
        """||now - before|| / ||now|| over all modules and conds, or None where the last step cannot be compared with."""
        before, now = self._before, self._now
        self._before, self._now = now, {}
        if not now or now.keys() != before.keys() or any(now[key].shape != before[key].shape for key in now):
            return None
        difference = sum((now[key] - before[key]).float().square().sum() for key in now)
        norm = sum(value.float().square().sum() for value in now.values())
        return float(torch.as_tensor(difference / norm).sqrt())

    def clear(self) -> None:
        self._before.clear()
        self._now.clear()
