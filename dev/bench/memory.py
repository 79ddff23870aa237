"""Measure the memory of tensors: what torch itself knows of it, not what the process happens to hold.

Resident memory says little about a short pass: freed pages stay, and are used again. There are two measures here, both
beyond what was held at the start. ``HeldTensors`` counts the results of operations for as long as anything holds them, the
graph of a gradient included; on a GPU it is left out, for tensors in system memory would count too. ``AllocatedMemory`` is
the allocator's own record, which also has what an operation needs while it runs; that depends on the device: a CPU's
convolution, for one, copies its weights into another order each time, which in SD1.5's largest takes 113 MiB. Scratch space
that a kernel library gets by itself is in neither.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HeldTensors(TorchDispatchMode):
    """Bytes of all tensors made between ``start`` and ``stop`` that are alive at once.

    Attributes:
        peak: at the highest point.
        kept: now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.kept = 0
        self._known: set[int] = set()

    def start(self) -> None:
        self.__enter__()

    def stop(self) -> None:
        self.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_storage(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and _storage(value) not in given | self._known:  # a view holds nothing of its own
                self._add(value)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _storage(tensor)
        self._known.add(key)
        self.kept += storage.nbytes()
        self.peak = max(self.peak, self.kept)
        weakref.finalize(storage, self._forget, key, storage.nbytes()).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.kept -= size


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class AllocatedMemory:
    """Bytes that torch's allocator handed out between ``start`` and ``stop``, as a GPU's counts them or the profiler a CPU's.

    Attributes:
        peak: at the highest point.
        kept: at ``stop``.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.peak = self.kept = 0
        self._device = torch.device(device)
        self._before = 0
        self._profile: Any = None

    def __enter__(self) -> AllocatedMemory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._profile.start()

    def stop(self) -> None:
        if self._device.type == "cuda":
            self.kept = torch.cuda.memory_allocated(self._device) - self._before
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(self._device) - self._before)
            return
        self._profile.stop()
        events = [event for event in self._profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            self.kept += event.nbytes()
            self.peak = max(self.peak, self.kept)
        self._profile = None


def bytes_of(value: Any) -> int:
    """Sum the bytes of all tensors in a structure of dataclasses, dictionaries and lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(bytes_of, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(bytes_of, value))
    return bytes_of(vars(value)) if hasattr(value, "__dataclass_fields__") else 0
