"""Measure what the pack's own Python costs in a step, whether that grows, and how often it waits for the device.

    python dev bench overhead [--steps N ...] [--threads N] [--out FILE]

With attention taken away nothing but overhead would be left. So the network has SD1.5's layout, all its blocks and layers, but
few channels and a latent of 8 x 8, and a profiler adds up the time spent in the pack's own lines (not in torch or ComfyUI that
they call). That is compared with one step of the same layout at its real width. A value that Python reads from a tensor makes it
wait for the GPU: those reads are counted, with the pack and without.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from host_inprocess import ROOT, pack_nodes
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure import add_run_arguments, machine, publish, start, table
from bench.models import CPU, SD15, TINY, Target, host_network, sampler

REAL_SIZE = 512
REPEATS = 5
SMALL = (1, 4, 8, 8)
OWN = tuple(f"{ROOT / folder}{os.sep}" for folder in ("attention", "nodes"))


def variants() -> dict[str, Callable[[Any], Any]]:
    nodes = pack_nodes()
    return {
        "T-GATE Cache, defaults": lambda model: nodes["TGateCache"].execute(model)[0],
        "T-GATE Cache, auto": lambda model: nodes["TGateCache"].execute(model, mode="auto")[0],
        "Capture Attention Maps": lambda model: nodes["AttnMapCapture"].execute(model)[0],
        "both": lambda model: nodes["AttnMapCapture"].execute(nodes["TGateCache"].execute(model)[0])[0],
    }


def own_seconds(run: Callable[[], object]) -> float:
    """Return one run's seconds in the pack's own lines. (The profiler slows them, so this is no less than the truth.)"""
    profile = cProfile.Profile()
    profile.enable()
    run()
    profile.disable()
    stats: Any = pstats.Stats(profile)
    return float(sum(line[2] for (file, _, _), line in stats.stats.items() if file.startswith(OWN)))


def per_step(apply: Callable[[Any], Any], model: Any, steps: int, repeats: int = REPEATS) -> float:
    """Return the milliseconds of the pack's own lines in a step, the median of some runs."""
    run = sampler(apply(model), steps, torch.zeros(SMALL), TINY.context)
    run()
    return 1000 * statistics.median(own_seconds(run) / steps for _ in range(repeats))


class _Values(TorchDispatchMode):
    READS = ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "equal", "allclose")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._overloadpacket.__name__ in self.READS
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    """What brings a tensor to the CPU by that name; there is no other trace of it where the tensor is on the CPU already."""

    COPIES = (torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.count += func in self.COPIES or (func is torch.Tensor.to and "cpu" in (*args[1:2], kwargs.get("device")))
        return func(*args, **kwargs)


class ValueReads:
    """Counts how often Python asks for a value of a tensor, or for all of them."""

    def __init__(self) -> None:
        self._modes = (_Values(), _Copies())

    def __enter__(self) -> ValueReads:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    @property
    def count(self) -> int:
        return sum(mode.count for mode in self._modes)


def reads_per_step(apply: Callable[[Any], Any], model: Any, steps: int = 10) -> float:
    """Count what a run of twice the steps reads more often, for each step."""
    counts = []
    for length in (steps, 2 * steps):
        run = sampler(apply(model), length, torch.zeros(SMALL), TINY.context)
        with ValueReads() as reads:
            run()
        counts.append(reads.count)
    return (counts[1] - counts[0]) / steps


def step_seconds() -> float:
    """Time one step of the real network with guidance, the faster of two."""
    run = sampler(host_network(SD15), 1, torch.zeros(1, 4, REAL_SIZE // 8, REAL_SIZE // 8), SD15.context)
    run()
    found = []
    for _ in range(2):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return min(found)


def report(steps: list[int], step: float) -> str:
    model = host_network(TINY, CPU)
    plain = reads_per_step(lambda model: model, model)
    rows = []
    for name, apply in variants().items():
        found = [per_step(apply, model, count) for count in steps]
        share, reads = 100 * max(found) / 1000 / step, reads_per_step(apply, model) - plain
        rows.append((name, *(f"{milliseconds:.2f}" for milliseconds in found), f"{share:.3f} %", f"{reads:+.1f}"))
    header = ("node", *(f"ms a step, {count} steps" for count in steps), "of a real step", "more reads a step")
    explained = (
        f"Milliseconds are medians of {REPEATS} runs. A step of the real network, {REAL_SIZE} px with guidance, takes "
        f"{step:.2f} s here (the faster of two). Without the pack a run reads {plain:.1f} more values of tensors for each step."
    )
    return f"{explained}\n\n{table(header, rows)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python dev bench overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25, 100], help="lengths of the runs")
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    start(args)
    text = report(args.steps, step_seconds())
    publish(f"## The pack's own overhead\n\nMeasured on: {machine(Target.here())}.\n\n{text}", args.out)


if __name__ == "__main__":
    main()
