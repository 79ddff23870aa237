"""Which rows of a prompt are padding: filled up to a fixed length, without a word that a view could show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Fewer rows than this part are not worth leaving out.
_WORTH = 0.25


def padding_of(metadata: Mapping[str, Any] | None, rows: Tensor | None) -> frozenset[int]:
    """Return the positions of a prompt's padding, as far as it is known.

    Args:
        metadata: what the encoder left in the conditioning (``prompts.metadata``).
        rows: the conditioning (batch, rows, channels); rows of zeros are what encoders make of masked tokens.
    """
    found: set[int] = set()
    total = 0 if rows is None else rows.shape[1]
    if metadata is not None and "tokens" in metadata:
        kinds: dict[int, set[str]] = {}
        for position, *_, kind, _ in metadata["tokens"]:
            kinds.setdefault(position, set()).add(kind)
        total = max(int(metadata["length"]), total)
        found = {position for position in range(int(metadata["length"])) if kinds.get(position, {"pad"}) == {"pad"}}
    if rows is not None and rows.ndim == 3:
        empty = (rows == 0).flatten(2).all(2).all(0).tolist()
        zeros = {position for position, is_zero in enumerate(empty) if is_zero}
        found |= zeros if len(zeros) < rows.shape[1] else set()
    return frozenset(found) if len(found) > max(_WORTH * total, 1) else frozenset()
