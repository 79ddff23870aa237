"""Attention probabilities recomputed beside the host's attention: softmax(q k^T * scale + mask), float32, in chunks.

The arguments are those of the host's attention functions, in every form they take: (batch, tokens, heads * channels) or
(batch, heads, tokens, channels), fewer key than query heads, boolean and additive masks of two to four dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# A chunk of rows: 64 MB of logits, besides the same again for their softmax.
_CHUNK_ELEMENTS = 16 * 1024 * 1024


@dataclass(frozen=True)
class AttentionInputs:
    """One attention call.

    Attributes:
        q: (batch, heads, queries, channels).
        k: (batch, heads, keys, channels).
        mask: broadcastable to (batch, heads, queries, keys), boolean (True: may look) or additive; or None.
    """

    q: Tensor
    k: Tensor
    mask: Tensor | None
    scale: float

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def queries(self) -> int:
        return self.q.shape[2]

    @property
    def keys(self) -> int:
        return self.k.shape[2]


def attention_inputs(
    q: Tensor, k: Tensor, heads: int, *, mask: Tensor | None = None, skip_reshape: bool = False, scale: float | None = None
) -> AttentionInputs:
    """The arguments of one of the host's attention functions, in one form."""
    if not skip_reshape:
        q, k = q.flatten(2), k.flatten(2)
        channels = q.shape[-1] // heads
        q, k = (x.unflatten(-1, (-1, channels)).transpose(1, 2) for x in (q, k))
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return AttentionInputs(q, k, None if mask is None else _broadcastable(mask, shape), scale or q.shape[-1] ** -0.5)


def _broadcastable(mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """A mask with four dimensions: (queries, keys), (batch, keys), (batch, queries, keys) or all four come in."""
    batch, _, queries, _ = shape
    if mask.ndim == 2 and mask.shape[0] not in (1, queries) and mask.shape[0] == batch:
        return mask[:, None, None]
    if mask.ndim == 3:
        return mask[:, None]
    return mask.view((1,) * (4 - mask.ndim) + mask.shape)


def row_probabilities(inputs: AttentionInputs, rows: slice) -> Iterator[tuple[int, Tensor]]:
    """Chunks of the queries ``rows``: offset from the first of them, and (batch, heads, chunk, keys); each row sums to 1."""
    first, last, _ = rows.indices(inputs.queries)
    size = max(_CHUNK_ELEMENTS // (inputs.batch * inputs.heads * inputs.keys), 1)
    keys = inputs.k.float().transpose(-1, -2)
    for start in range(first, last, size):
        end = min(start + size, last)
        logits = (inputs.q[:, :, start:end].float() * inputs.scale) @ keys
        if inputs.mask is not None:
            mask = inputs.mask[..., start:end, :] if inputs.mask.shape[-2] > 1 else inputs.mask
            if mask.dtype == torch.bool:
                logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
            else:
                logits = logits + mask
        yield start - first, logits.softmax(dim=-1)
