"""Measure what T-GATE keeps in memory, at real width, in half precision.

    python dev bench cache [--steps N] [--out FILE]

Run on networks of SD1.5's and SDXL's layout, a tenth as wide and on an image of a quarter of the usual side: what is kept has as
many numbers for a token as the network has channels, and as many tokens as the image has pixels (or a fixed part of them), so
the real figure is 160 times as much.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch

from bench.measure import add_run_arguments, publish, start, table
from bench.models import SHAPES, Shape, host_network, sampler, tiny
from bench.tgate import tgate, watched_runs

SIZES = {"sd15": 512, "sdxl": 1024}
SMALLER = 4
HALF = 2  # bytes of a number
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "v1 (sp_interval 1)": {"sp_interval": 1},
    "as published": {"cfg_after_gate": "drop (keep negative, as published)"},
    "refresh_every 3": {"refresh_every": 3},
    "cfg kept": {"cfg_after_gate": "keep"},
    "fi_interval 2": {"fi_interval": 2},
}


@dataclass(frozen=True)
class Kept:
    """Bytes at real width in half precision, for one image."""

    peak: float
    after_gate: float


def measure(shape: Shape, size: int, steps: int, smaller: int = 1, **settings: Any) -> Kept:
    """Measure for an image of ``size`` pixels, on one that is ``smaller`` times smaller."""
    narrow, side = tiny(shape), size // 8 // smaller
    model = tgate(host_network(narrow), **settings)
    with watched_runs() as seen:
        sampler(model, steps, torch.zeros(1, 4, side, side), narrow.context, narrow.pooled)()
    factor = shape.channels / narrow.channels * HALF / 4 * smaller**2
    return Kept(seen[0].peak * factor, seen[0].kept * factor)


def report(steps: int) -> str:
    parts = []
    for name, size in SIZES.items():
        rows = []
        for setting, inputs in SETTINGS.items():
            kept = measure(SHAPES[name], size, steps, SMALLER, **inputs)
            rows.append((setting, f"{kept.peak / 2**20:.1f}", f"{kept.after_gate / 2**20:.1f}"))
        header = ("T-GATE Cache", "at most, MiB", "after the gate, MiB")
        parts.append(f"### {SHAPES[name].layout}, {size} px, one image, half precision\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python dev bench cache", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    start(args)
    publish(f"## What T-GATE keeps in memory\n\n{report(args.steps)}", args.out)


if __name__ == "__main__":
    main()
