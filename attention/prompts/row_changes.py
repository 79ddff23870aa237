"""Whether the rows of a prompt's words are still those that were encoded, or another node mixed others in.

A row b that is mixed of what was encoded, e, and a share s of another row of the same length has |b - e|^2 = 2 s (e, e - b),
whatever the other row is. So the share is told from the sketch and the length of e alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .fingerprint import encoded_fingerprint, read_fingerprint, row_sketches
from .token_map import TokenMap

_ANGLES = 64  # more than to know a prompt again: a share of a row is told, too
_ROUNDING = 0.06  # root mean square over the angles; that of two sketches of one row in bfloat16 is below 0.03
_REPLACED = 0.78  # share of others: words at a strength of 0.2 or less
_WEAKENED = 0.1  # a row that keeps more of its own was not mixed with another; noise was added, for example


class Change(Enum):
    """What became of the rows."""

    NONE = "none"
    MIXED = "mixed"
    REPLACED = "replaced"


def word_rows(rows: Tensor, tokens: TokenMap) -> dict[str, Any]:
    """Return plain data by which ``change_of`` knows the rows of the prompt's words again.

    Args:
        rows: the conditioning (1, rows, ...) that the prompt was encoded to.
    """
    words = {token.position for token in tokens.tokens if token.kind in ("text", "embedding")}
    positions = sorted(position for position in words if position < rows.shape[1])
    chosen = rows[:1, positions]
    lengths = [round(length, 4) for length in _lengths(chosen).tolist()]
    return {"positions": positions, "lengths": lengths, "sketches": encoded_fingerprint(chosen, _ANGLES)}


def change_of(encoded: Mapping[str, Any], rows: Tensor) -> Change:
    """Return what became of the rows that ``word_rows`` described; rows that are all zeros or were cut off tell nothing."""
    positions, before = encoded["positions"], read_fingerprint(encoded["sketches"], _ANGLES)
    if before is None or max(positions) >= rows.shape[1] or not rows[0].any():
        return Change.NONE
    chosen = rows[:1, positions]
    now = row_sketches(chosen, _ANGLES)
    changed = (before - now).square().mean(1) > _ROUNDING**2
    if not changed.any():
        return Change.NONE
    own, length = torch.tensor(encoded["lengths"])[changed], _lengths(chosen)[changed]
    kept = own * length * torch.cosine_similarity(before[changed], now[changed])
    lost = own**2 - kept
    moved = torch.where(length > 0, own**2 + length**2 - 2 * kept, 2 * lost)  # where the other prompt is shorter, it has zeros
    weakened = lost.sum() > _WEAKENED * (own**2).sum()
    return Change.REPLACED if weakened and moved.sum() > 2 * _REPLACED * lost.sum() else Change.MIXED


def _lengths(rows: Tensor) -> Tensor:
    return rows.detach()[0].float().cpu().flatten(1).norm(dim=1)
