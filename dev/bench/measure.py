"""Measure side by side: variants take turns in one process, and only ratios are reported."""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from host_inprocess import load_pack, start_host
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from bench.memory import AllocatedMemory
from bench.models import Target

Run = Callable[[], object]
SAME_KERNEL = ("--use-pytorch-cross-attention",)  # of attention: what ComfyUI takes by itself on a GPU, and other libraries too


class Moment:
    """A point in time; one minus another is seconds.

    Where there is a GPU it is an event in the queue of its work, for which nothing waits until it is subtracted.

    Attributes:
        clock: seconds that pass, or ``time.thread_time``: of this thread's work, which other programs do not lengthen.
    """

    clock: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self._clock = Moment.clock()
        self._event = torch.cuda.Event(enable_timing=True) if torch.cuda.is_initialized() else None
        if self._event is not None:
            self._event.record()

    def __sub__(self, earlier: Moment) -> float:
        if self._event is None or earlier._event is None:
            return self._clock - earlier._clock
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1000


def now() -> Moment:
    return Moment()


@dataclass
class Timings:
    """Seconds of one variant's runs, in the order in which they took turns with the others."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def take_turns(
    variants: Mapping[str, Run], repeats: int, say: Callable[[str], None] = print, *, memory: bool = False
) -> dict[str, Timings]:
    """Run every variant ``repeats`` times, in turn, after one round that is not counted.

    Args:
        memory: read how far memory rises as well, the GPU's where there is one, else the process's: in a round of its own, for
            reading it every few milliseconds takes time from a variant's Python.
    """
    load_pack()
    from fovea_attention.attention.host import on_one_stack  # for all: how deep a variant runs is not its merit

    timings = {name: Timings() for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            with _own_garbage_only():
                start = now()
                on_one_stack(run)
                seconds = now() - start
            if turn:
                timings[name].seconds.append(seconds)
            say(f"  {'warm-up' if not turn else f'{turn}/{repeats}'}  {name}: {seconds:.2f} s")
    if memory:
        for name, run in variants.items():
            with AllocatedMemory("cuda") if torch.cuda.is_initialized() else ResidentMemory() as read:
                run()
            timings[name].peak_bytes = read.peak
    return timings


@contextmanager
def _own_garbage_only() -> Iterator[None]:
    """Collect no garbage among what is there already: to look through it takes Python a tenth of a second, always in the turn of
    the same variant."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def ratios(slow: Timings, fast: Timings) -> tuple[float, float, float]:
    """Return the median, lowest and highest of the ratios slow/fast, pair by pair."""
    pairs = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    return statistics.median(pairs), min(pairs), max(pairs)


def multiply_accumulates(run: Run) -> float:
    """Count the multiply-accumulates of matrix products, convolutions and attention in one run."""
    with _Operations() as counter:
        run()
    return counter.total / 2


def _attention_on_a_cpu(query: Any, key: Any, value: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    found: int = sdpa_flop_count(query.shape, key.shape, value.shape)
    return found


# torch's own registry has only a GPU's.
_COUNTED = {**flop_registry, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_a_cpu}


class _Operations(TorchDispatchMode):
    """Counts what ``FlopCounterMode`` counts, without its account of modules, which takes longer than a small network."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._simple: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        count = _COUNTED.get(func._overloadpacket)
        if count is None and func not in self._simple:
            with self:
                result = func.decompose(*args, **kwargs)  # under inference mode, linear layers and convolutions come whole
            if result is not NotImplemented:
                return result
            self._simple.add(func)
        result = func(*args, **kwargs)
        if count is not None:
            self.total += count(*args, **kwargs, out_val=result)
        return result


class ResidentMemory:
    """How far this process's resident memory rises above its value at the start, sampled every few milliseconds."""

    def __enter__(self) -> ResidentMemory:
        self.peak = 0
        self._process = psutil.Process()
        self._start = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, self._process.memory_info().rss - self._start)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference, as a share of the largest value."""
    a, b = a.float().cpu(), b.float().cpu()
    return float((a - b).abs().max() / b.abs().max())


def require_same(names: str, ours: torch.Tensor, theirs: torch.Tensor, at_most: float) -> float:
    """Return how far apart two tensors are; too far ends the benchmark, which would compare different work."""
    found = difference(ours, theirs)
    if not found <= at_most:
        raise SystemExit(f"{names} end {found:.1e} apart, so their times cannot be compared.")
    return found


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def memory_name(device: torch.device) -> str:
    """Say what the memory of ``take_turns`` is."""
    return "resident" if device.type == "cpu" else "allocated on the GPU"


def publish(report: str, out: Path | None) -> None:
    """Print a benchmark's report, and write it where ``--out`` says."""
    print(f"\n{report}")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(report + "\n")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that every benchmark takes."""
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--out", type=Path, help="write the report here as well")


def start(args: argparse.Namespace, host_argv: tuple[str, ...] = ()) -> None:
    """Start ComfyUI in this process, unless it runs there, without progress bars, on so many threads."""
    if "comfy" not in sys.modules:
        start_host(argv=host_argv)
    import comfy.utils

    comfy.utils.set_progress_bar_enabled(False)
    if args.threads:
        torch.set_num_threads(args.threads)


def machine(target: Target) -> str:
    """Describe in one line what the figures were measured on."""
    import comfyui_version

    device = torch.cuda.get_device_name(target.device) if target.on_gpu else f"CPU, {torch.get_num_threads()} threads"
    versions = f"ComfyUI {comfyui_version.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    return f"{device}; {versions}; {target.precision}"
