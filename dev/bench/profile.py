"""Show where the time goes: operations of plain sampling and of each technique, by the torch profiler.

    python dev bench profile [--shape sd15|sdxl|pixart] [--size PX] [--steps N] [--threads N] [--tiny] [--out FILE]

Each variant runs once unwatched and once under the profiler, at real size with random weights. An operation's own time is
counted, without what it calls; on a GPU its kernels' time. The sum of a column is less than the run takes, which also has
Python between operations. What is read is values that Python takes from tensors: on a GPU each of them waits for the device.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from host_inprocess import pack_nodes
from torch.profiler import ProfilerActivity, profile

from bench.gradient import WORDS, Sides
from bench.measure import add_run_arguments, machine, now, publish, start, table
from bench.models import (
    PIXART,
    SHAPES,
    Shape,
    Target,
    add_dtype_argument,
    add_shape_arguments,
    host_network,
    sampler,
    tiny,
)

# What an operation is, by the first of these words that its name has.
KINDS = {
    "attention": ("scaled_dot_product", "softmax"),
    "convolutions": ("conv",),
    "matrix products": ("mm", "linear", "matmul"),
    "norms": ("norm",),
    "copies": ("copy", "cat", "clone", "fill", "zero"),
}
REST = "everything else"
READ = "aten::_local_scalar_dense"


@dataclass(frozen=True)
class Profile:
    """Seconds of one run: as it takes unwatched, and of each kind of operation; and how many values were read."""

    seconds: float
    kinds: Mapping[str, float]
    reads: int


def kind_of(operation: str) -> str:
    return next((kind for kind, words in KINDS.items() if any(word in operation for word in words)), REST)


def profile_of(run: Callable[[], object], target: Target) -> Profile:
    run()
    began = now()
    run()
    seconds = now() - began
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if target.on_gpu else [])]
    with profile(activities=activities) as watched:
        run()
    kinds: Counter[str] = Counter()
    reads = 0
    for operation in watched.key_averages():
        own = operation.self_device_time_total if target.on_gpu else operation.self_cpu_time_total
        kinds[kind_of(operation.key)] += own / 1e6
        reads += operation.count if operation.key == READ else 0
    return Profile(seconds, kinds, reads)


def profiles_table(found: Mapping[str, Profile]) -> str:
    rows = [
        (kind, *(f"{one.kinds[kind]:.2f} s, {100 * one.kinds[kind] / sum(one.kinds.values()):.0f} %" for one in found.values()))
        for kind in (*KINDS, REST)
    ]
    rows.append(("run, unwatched", *(f"{one.seconds:.2f} s" for one in found.values())))
    rows.append(("values read", *(str(one.reads) for one in found.values())))
    return table(("", *found), rows)


def report(shape: Shape, size: int, steps: int, target: Target) -> str:
    model = host_network(shape, target)
    nodes = pack_nodes()
    sampled = {
        "plain": model,
        "T-GATE Cache": nodes["TGateCache"].execute(model)[0],
        "Capture Attention Maps": nodes["AttnMapCapture"].execute(model)[0],
    }
    latent = torch.zeros(1, 4, size // 8, size // 8)
    of_sampling = {}
    for name, patched in sampled.items():
        of_sampling[name] = profile_of(sampler(patched, steps, latent, shape.context, shape.pooled), target)
    of_gradients = {name: profile_of(run, target) for name, run in Sides(model, shape, size, WORDS, target).runs.items()}
    return "\n\n".join([
        f"### Sampling, {steps} steps with guidance", profiles_table(of_sampling),
        "### One gradient of Attend-and-Excite's loss", profiles_table(of_gradients),
    ])  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python dev bench profile", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, help=f"pixels (default 256, of PixArt {PIXART.least}; on a GPU 512)")
    parser.add_argument("--steps", type=int, default=5)
    add_dtype_argument(parser)
    add_shape_arguments(parser, SHAPES)
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    start(args)
    target = Target.here(args.dtype)
    shape = tiny(SHAPES[args.shape]) if args.tiny else SHAPES[args.shape]
    size = args.size or shape.side(512 if target.on_gpu else 128 if args.tiny else 256)
    heading = f"## Where the time goes: {shape.title}, {size} px\n\nMeasured on: {machine(target)}."
    publish(f"{heading}\n\n{report(shape, size, args.steps, target)}", args.out)


if __name__ == "__main__":
    main()
