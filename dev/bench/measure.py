"""Measuring side by side: variants take turns in one process, and only ratios are reported."""

from __future__ import annotations

import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

Run = Callable[[], object]


@dataclass
class Timings:
    """Seconds of one variant's runs, in the order in which they took turns with the others."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def take_turns(variants: Mapping[str, Run], repeats: int, say: Callable[[str], None] = print) -> dict[str, Timings]:
    """Run every variant ``repeats`` times, in turn, after one round that is not counted."""
    timings = {name: Timings() for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            with peak_memory() as memory:
                start = time.perf_counter()
                run()
                seconds = time.perf_counter() - start
            if turn:
                timings[name].seconds.append(seconds)
                timings[name].peak_bytes = max(timings[name].peak_bytes, memory.rise)
            say(f"  {'warm-up' if not turn else f'{turn}/{repeats}'}  {name}: {seconds:.2f} s")
    return timings


def ratios(slow: Timings, fast: Timings) -> tuple[float, float, float]:
    """Median, lowest and highest of the ratios slow/fast, pair by pair."""
    pairs = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    return statistics.median(pairs), min(pairs), max(pairs)


def multiply_accumulates(run: Run) -> float:
    """Multiply-accumulates of matrix products, convolutions and attention in one run."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2


class peak_memory:
    """How far this process's resident memory rises above its value at the start, sampled every few milliseconds."""

    def __enter__(self) -> peak_memory:
        self.rise = 0
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
            self.rise = max(self.rise, self._process.memory_info().rss - self._start)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def machine() -> str:
    """What the figures were measured on, in one line."""
    import comfyui_version

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = f"ComfyUI {comfyui_version.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    return f"{device}; {versions}; float32"
