"""Attention probabilities recomputed beside ComfyUI's attention: softmax(q k^T * scale + mask), float32, in chunks."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .. import host
from ..host import AttentionInputs

# A chunk of rows: 64 MB of logits, besides the same again for their softmax.
_CHUNK_ELEMENTS = 16 * 1024 * 1024

# The most that is held at once while attention is recorded: a chunk's logits, their softmax, and the copies they are made of.
WORKING_BYTES = 3 * 4 * _CHUNK_ELEMENTS


def calls_at_once(batch: int, heads: int, queries: int, keys: int) -> int:
    """Return how many attention calls of this size have their logits in one chunk."""
    return _CHUNK_ELEMENTS // max(batch * heads * queries * keys, 1)


def row_probabilities(inputs: AttentionInputs, rows: slice) -> Iterator[tuple[int, Tensor]]:
    """Yield chunks of the queries ``rows``: the offset from the first, and (batch, heads, chunk, keys), whose rows sum to 1."""
    first, last, _ = rows.indices(inputs.queries)
    size = max(_CHUNK_ELEMENTS // (inputs.batch * inputs.heads * inputs.keys), 1)
    keys = inputs.k.float().transpose(-1, -2)
    for start in range(first, last, size):
        end = min(start + size, last)
        logits = (inputs.q[:, :, start:end].float() * inputs.scale) @ keys
        logits = host.masked_logits(logits, inputs.mask, slice(start, end))
        yield start - first, logits.softmax(dim=-1)
