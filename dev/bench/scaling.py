"""Measure how time and memory grow: with steps, pixels, images, subjects, references and captured layers.

    python dev bench scaling [--repeats N] [--threads N] [--out FILE]

On the embedded model. Every series is given as a straight line through its points (least squares) and how far the points are
from it. Time is that of a whole run; memory what torch holds at most beyond the resting state.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from host_inprocess import pack_nodes
from scenes import evaluate

from bench.measure import Run, add_run_arguments, machine, publish, start, table, take_turns
from bench.memory import HeldTensors
from bench.models import TOKENS, Target, random_tensor

STEPS, SIDE, CHANNELS, CONTEXT = 8, 32, 3, 96


@dataclass(frozen=True)
class Point:
    """One run of a series: its label, what it has how much of, and the run."""

    label: str
    amount: float
    run: Run


def latent(height: int = SIDE, width: int = SIDE, batch: int = 1) -> torch.Tensor:
    return torch.zeros(batch, CHANNELS, height, width)


def prompt(seed: int) -> list[Any]:
    return [[random_tensor(seed, 1, TOKENS, CONTEXT), {}]]


def guider_of(model: Any) -> Any:
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompt(1), prompt(2))
    guider.set_cfg(5.0)
    return guider


def sigmas_of(model: Any, steps: int) -> torch.Tensor:
    import comfy.samplers

    found: torch.Tensor = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
    return found


def sampling(guider: Any, start: torch.Tensor, steps: int = STEPS) -> Run:
    import comfy.samplers

    euler, sigmas = comfy.samplers.sampler_object("euler"), sigmas_of(guider.model_patcher, steps)
    noise = random_tensor(0, *start.shape)

    @torch.inference_mode()
    def run() -> object:
        return guider.sample(noise, start, euler, sigmas, disable_pbar=True, seed=0)

    return run


class Noise:
    seed = 0

    def generate_noise(self, start: dict[str, Any]) -> torch.Tensor:
        return random_tensor(0, *start["samples"].shape)


def distilling(model: Any, references: int) -> Run:
    import comfy.samplers

    execute = pack_nodes()["AttentionDistillSampler"].execute
    euler, sigmas = comfy.samplers.sampler_object("euler"), sigmas_of(model, 2)
    images = {"samples": random_tensor(3, references, CHANNELS, SIDE, SIDE)}

    @torch.inference_mode()
    def run() -> object:
        from fovea_attention.attention.distill.feature_cache import CACHE

        CACHE.clear()  # every run is a first run
        return execute(Noise(), guider_of(model), euler, sigmas, {"samples": latent()}, images, prompt(4), iterations=2)

    return run


def series(model: Any) -> Iterator[tuple[str, list[Point]]]:
    nodes = pack_nodes()
    gated = guider_of(nodes["TGateCache"].execute(model)[0])
    yield "T-GATE: steps", [Point(f"{n}", n, sampling(gated, latent(), n)) for n in (5, 10, 20, 40)]
    sizes = ((16, 16), (32, 16), (32, 32), (48, 32), (48, 48))
    yield (
        "T-GATE: pixels of the image",
        [Point(f"{8 * w} x {8 * h}", 64 * h * w, sampling(gated, latent(h, w))) for h, w in sizes],
    )
    yield "T-GATE: images in a batch", [Point(f"{n}", n, sampling(gated, latent(batch=n))) for n in (1, 2, 4, 8)]

    def guided(subjects: int) -> Run:
        positions = ", ".join(str(2 + 3 * place) for place in range(subjects))
        inputs = {"subjects": positions, "thresholds": "", "attention_grid": 16}
        return sampling(nodes["AttendExciteGuider"].execute(model, prompt(1), prompt(2), cfg=5.0, **inputs)[0], latent())

    yield "Attend-and-Excite: subjects", [Point(f"{n}", n, guided(n)) for n in (1, 2, 4, 8)]
    yield "Attention Distillation: references", [Point(f"{n}", n, distilling(model, n)) for n in (1, 2, 4)]

    def captured(layers: str) -> tuple[int, Run]:
        watched, maps = nodes["AttnMapCapture"].execute(model, layers=layers).args
        run = sampling(guider_of(watched), latent())
        run()
        return len(maps.require().prompts[0].layers), run

    found = [captured(layers) for layers in ("middle", "output", "middle, output", "input, middle, output")]
    points = sorted(((count, run) for count, run in found), key=lambda one: one[0])
    yield "maps: captured layers", [Point(f"{count}", count, run) for count, run in points]


def line(amounts: list[float], values: list[float]) -> tuple[float, float, float]:
    """Fit a line to the points; returns start, slope, and the largest distance from it as a share of the largest value."""
    slope, start = np.polyfit(amounts, values, 1)
    furthest = max(abs(start + slope * x - y) for x, y in zip(amounts, values, strict=True))
    return float(start), float(slope), float(furthest / max(values))


def held_bytes(run: Callable[[], object]) -> int:
    with HeldTensors() as memory:
        run()
    return memory.peak


def part(title: str, points: list[Point], repeats: int) -> str:
    timings = take_turns({point.label: point.run for point in points}, repeats)
    memory = [held_bytes(point.run) / 2**20 for point in points]
    seconds = [timings[point.label].median for point in points]
    rows = [(point.label, f"{s:.2f}", f"{m:.1f}") for point, s, m in zip(points, seconds, memory, strict=True)]
    amounts = [point.amount for point in points]
    fits = [f"{name} {100 * line(amounts, values)[2]:.0f} %" for name, values in (("time", seconds), ("memory", memory))]
    written = table((title.split(": ")[1], "seconds", "tensors, MiB"), rows)
    return f"### {title}\n\n{written}\n\nOff a straight line: {', '.join(fits)}."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python dev bench scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="counted turns of all points of a series")
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    start(args)
    model = evaluate.load()[0]
    parts = [part(title, points, args.repeats) for title, points in series(model)]
    publish("\n\n".join([f"## How it grows\n\nMeasured on: {machine(Target.here())}.", *parts]), args.out)


if __name__ == "__main__":
    main()
