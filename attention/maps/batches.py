"""What is decided once for the attention calls of a run, and layers of one size that are computed together.

Where a GPU waits for Python, what a capture costs is the number of its operations, so layers of one size share them: what a
layer's attention is made of is copied as it comes, and the softmax and its sums are computed for all of them at once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..networks.grids import Grid
from ..networks.layers import AttentionLayer
from ..networks.placement import Placement
from .probabilities import calls_at_once

# Room for less is kept for the run: new memory in every step costs more than what is done in it.
_KEPT_BYTES = 32 * 2**20


@dataclass(frozen=True)
class CallSize:
    """The size of an attention call, as ComfyUI's attention functions get it.

    Attributes:
        heads_first: (batch, heads, tokens, channels) and not (batch, tokens, heads * channels).
    """

    batch: int
    heads: int
    queries: int
    keys: int
    channels: int
    scale: float
    heads_first: bool
    device: torch.device


@dataclass(eq=False)
class Site:
    """An attention call of a layer, as it comes again in every step.

    Attributes:
        place: where text and image are in it; None: it cannot be recorded.
        size: None where it is not computed together with others.
        batch: what it is computed with; None: by itself.
    """

    layer: AttentionLayer
    place: Placement | None
    size: CallSize | None = None
    batch: LayerBatch | None = None


@dataclass(eq=False)
class CallPlan:
    """What is known of model calls of one form: the same prompts, on a latent of the same size.

    Attributes:
        sites: by what tells attention calls apart.
        planned: the sites for which batches have been made, in the order of their calls.
    """

    sites: dict[Hashable, Site] = field(default_factory=dict)
    batches: list[LayerBatch] = field(default_factory=list)
    planned: list[Site] = field(default_factory=list)

    def plan(self, met: list[Site]) -> None:
        """Let layers of one size be computed together from the next model call on.

        Only where all on a grid have one size: what is added up on a grid is added in the order of the layers.

        Args:
            met: the sites of a model call that look at the text, in order.
        """
        for site in self.planned:
            site.batch = None
        self.planned, self.batches = met, []
        by_grid: dict[Grid, list[Site]] = {}
        for site in met:
            if site.place is not None:
                by_grid.setdefault(site.place.grid, []).append(site)
        for grid, sites in by_grid.items():
            size = sites[0].size
            if size is None or any(site.size != size for site in sites):
                continue
            capacity = min(calls_at_once(size.batch, size.heads, size.queries, size.keys), len(sites))
            if capacity > 1:
                batch = LayerBatch(size, grid, capacity)
                self.batches.append(batch)
                for site in sites:
                    site.batch = batch


class LayerBatch:
    """Attention calls of one size, computed together; what it takes is copied, since others may write to it later."""

    def __init__(self, size: CallSize, grid: Grid, capacity: int) -> None:
        self.size = size
        self.grid = grid
        self.capacity = capacity
        self.names: list[str] = []  # of the layers that it holds
        self._copies: tuple[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]] | None = None
        self._result: Tensor | None = None
        tokens = (size.batch, -1, size.heads, size.channels)
        self._form = (size.batch, size.heads, -1, size.channels) if size.heads_first else tokens

    def take(self, name: str, q: Tensor, k: Tensor) -> bool:
        """Keep one layer's call. Return whether no other one has room."""
        if self._copies is None:
            self._copies = self._room_for_copies()
        _, _, queries, keys = self._copies
        at = len(self.names)
        queries[at].copy_(q.view(self._form))
        keys[at].copy_(k.view(self._form))
        self.names.append(name)
        return at + 1 == self.capacity

    def columns(self) -> tuple[list[str], Tensor]:
        """Return the layers that it holds, and their probabilities (layers, batch, heads, keys, queries); it is empty then.

        In this layout they need not be transposed to be maps. The next result may take their place.
        """
        names, self.names = self.names, []
        size = self.size
        assert self._copies is not None
        if self._result is None:
            self._result = self._empty(size.keys, size.queries)
        held = *self._copies[:2], self._result
        q, k, columns = (tensor[: len(names) * size.batch * size.heads] for tensor in held)
        torch.bmm(k, q.mul_(size.scale).transpose(-1, -2), out=columns)
        torch.softmax(columns, -2, out=columns)
        if sum([tensor.nbytes for tensor in held]) > _KEPT_BYTES:
            self._copies = self._result = None
        return names, columns.view(len(names), size.batch, size.heads, size.keys, size.queries)

    def drop(self) -> None:
        """Forget what it holds: the model call has ended early."""
        self.names, self._copies, self._result = [], None, None

    def _empty(self, *shape: int) -> Tensor:
        size = self.size
        return torch.empty(self.capacity * size.batch * size.heads, *shape, dtype=torch.float32, device=size.device)

    def _room_for_copies(self) -> tuple[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]]:
        """Return room for queries and keys as they are multiplied, and its parts in the form in which a call has them."""
        size = self.size
        q, k = self._empty(size.queries, size.channels), self._empty(size.keys, size.channels)
        by_layer = (self.capacity, size.batch, size.heads)
        queries = q.view(*by_layer, size.queries, size.channels)
        keys = k.view(*by_layer, size.keys, size.channels)
        if not size.heads_first:
            queries, keys = queries.transpose(2, 3), keys.transpose(2, 3)
        return q, k, queries.unbind(0), keys.unbind(0)


def size_of_call(
    q: Tensor, k: Tensor, heads: int, scale: float | None, place: Placement, *, heads_first: bool
) -> CallSize | None:
    """Return the size of a call in which all queries, the image's, look at all keys, the text's; None: another one."""
    if heads_first:
        queries, keys, channels = q.shape[2], k.shape[2], q.shape[3]
        same = q.shape[1] == k.shape[1] == heads
    else:
        queries, keys = q.shape[1], k.shape[1]
        channels = math.prod(q.shape[2:]) // heads
        same = math.prod(k.shape[2:]) == channels * heads
    whole = place.text == slice(0, keys) and place.rows == slice(0, queries) and place.repeated_text is None
    if not same or not whole or math.prod(place.grid) != queries:
        return None
    return CallSize(q.shape[0], heads, queries, keys, channels, scale or channels**-0.5, heads_first, q.device)
