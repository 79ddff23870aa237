"""Stored outputs of attention modules."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock
from uuid import UUID

import torch

from .. import host
from ..networks.blocks import AttentionSite


@dataclass
class AttentionCache:
    """Outputs of attention modules, (batch of one cond, tokens, channels), in the model's dtype.

    ``conds`` has one entry per site and conditioning; ``means`` one per site, the weighted mean of the positive and the
    negative output; ``halves`` are what a mean still waits for, where the two prompts come in separate model calls, which on
    several GPUs may run at the same time.

    Attributes:
        device: where outputs are kept; None: where they were computed.
        placed: whether that has been decided for this run; keeps_self: whether there is room for self-attention.
    """

    device: torch.device | None
    conds: dict[tuple[str, UUID], torch.Tensor] = field(default_factory=dict)
    means: dict[str, torch.Tensor] = field(default_factory=dict)
    halves: dict[str, torch.Tensor] = field(default_factory=dict)
    placed: bool = False
    keeps_self: bool = True
    lock: Lock = field(default_factory=Lock, repr=False)
    _source: torch.device | None = None
    _several: bool = False

    def store(self, site: str, uuids: list[UUID], output: torch.Tensor, wanted: frozenset[UUID] | None = None) -> None:
        """Keep each cond's chunk of ``output`` (conds * batch, tokens, channels); only the ``wanted`` ones, if given."""
        self.means.pop(site, None)
        for uuid, chunk in zip(uuids, output.chunk(len(uuids)), strict=True):
            if wanted is None or uuid in wanted:
                self.conds[site, uuid] = self._own(chunk)

    def store_mean(self, site: str, shares: list[float], output: torch.Tensor) -> None:
        """Keep the weighted mean of the two prompts' chunks; a prompt that comes alone waits for the other one."""
        parts = [chunk * share for chunk, share in zip(output.chunk(len(shares)), shares, strict=True)]
        with self.lock:
            if len(parts) == 1 and site not in self.halves:
                self.halves[site] = self._moved(parts[0])
                return
            other = parts[1] if len(parts) == 2 else self.halves.pop(site).to(output.device)
            self.means[site] = self._moved(parts[0] + other)

    def begin_store(self, sites: list[AttentionSite]) -> None:
        """Forget what an earlier evaluation left for these sites, halves that never met their other half included."""
        self.forget(sites)
        self.halves.clear()

    def holds_means(self, sites: set[str]) -> bool:
        """Return whether there are sites, and a mean for each of them."""
        return bool(sites) and sites <= self.means.keys()

    def holds(self, sites: set[str], uuids: list[UUID]) -> bool:
        """Return whether there are sites, each of which has the output of every cond."""
        return bool(sites) and all((site, uuid) in self.conds for site in sites for uuid in uuids)

    def load(self, site: str, uuids: list[UUID], like: torch.Tensor, mean: bool) -> torch.Tensor | None:
        """Return the stored output for a batch of conds, or None where something is missing or of another shape."""
        parts = [self.means.get(site) if mean else self.conds.get((site, uuid)) for uuid in uuids]
        known = [part for part in parts if part is not None and part.shape[1:-1] == like.shape[1:-1]]
        if len(known) < len(parts) or sum(part.shape[0] for part in known) != like.shape[0]:
            return None
        known = [part.to(device=like.device, dtype=like.dtype, non_blocking=True) for part in known]
        return known[0] if len(known) == 1 else torch.cat(known)

    def forget(self, sites: list[AttentionSite]) -> None:
        """Drop everything stored for some sites."""
        names = {site.name for site in sites}
        self.means = {name: value for name, value in self.means.items() if name not in names}
        self.conds = {key: value for key, value in self.conds.items() if key[0] not in names}

    def evict(self, active: set[UUID]) -> None:
        """Drop the outputs of conds that no longer act; should one come back, it is stored again."""
        self.conds = {key: value for key, value in self.conds.items() if key[1] in active}

    def clear(self) -> None:
        """Drop everything."""
        self.conds.clear()
        self.means.clear()
        self.halves.clear()

    @property
    def bytes(self) -> int:
        """Return what the stored outputs take."""
        tensors = (*self.conds.values(), *self.means.values(), *self.halves.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _own(self, chunk: torch.Tensor) -> torch.Tensor:
        """Return a copy: a chunk is a view of the module's output, which a later patch may write to."""
        return chunk.clone() if self.device is None or self.device == chunk.device else self._moved(chunk)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of our own where outputs are kept.

        A copy that nothing waits for is in order with what the same GPU reads later; another GPU has to find it complete.
        """
        if self.device is None or self.device == tensor.device:
            return tensor
        if self._source not in (None, tensor.device) and not self._several:
            self._several = True
            host.wait_for(self._source)
        self._source = tensor.device
        return host.copy_to(tensor, self.device, waits=self._several)
