"""The parts of the report, in the order of their worth: what each runs, and how long it may take."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpu.trial import Trial


@dataclass(frozen=True)
class Part:
    """One part of the report.

    Attributes:
        limit: seconds after which it is stopped; what it has said until then is kept.
        inside: whether it needs ComfyUI in its own process.
    """

    title: str
    limit: float
    run: Callable[[Trial], None]
    inside: bool = True


def _same(trial: Trial) -> None:
    from gpu.same import report

    report(trial.say, tiny=trial.tiny)


def _templates(trial: Trial) -> None:
    from gpu.templates import report

    report(trial)


def _size(name: str) -> Callable[[Trial], None]:
    def run(trial: Trial) -> None:
        from gpu.sizes import SIZES, report

        trial.say(report(SIZES[name], tiny=trial.tiny))

    return run


def _benchmark(module: str, usual: Sequence[str], tiny: Sequence[str]) -> Callable[[Trial], None]:
    def run(trial: Trial) -> None:
        importlib.import_module(f"bench.{module}").main([*(tiny if trial.tiny else usual), "--out", str(trial.out)])

    return run


_LAUNCHES = ("--shapes", "sd15", "--pairs")
PARTS: dict[str, Part] = {
    "same": Part("The same as on the CPU", 75, _same),
    "templates": Part("Templates on the real server", 100, _templates, inside=False),
    "sizes-sd15": Part("Sampling, SD1.5's size", 30, _size("sd15")),
    "excite": Part(
        "Attend-and-Excite beside diffusers", 40,
        _benchmark("excite", ("--pairs", "2", "--steps", "10"), ("--tiny", "--pairs", "1", "--size", "64", "--steps", "2")),
    ),
    "distill": Part(
        "Attention Distillation beside a restatement", 40,
        _benchmark("distill", ("--pairs", "2", "--steps", "4"), ("--tiny", "--pairs", "1", "--size", "64", "--steps", "2")),
    ),
    "sizes-sdxl": Part("Sampling, SDXL's size", 40, _size("sdxl")),
    "gradient": Part(
        "Gradient passes", 40,
        _benchmark("gradient", ("--shapes", "sd15", "sdxl", "--pairs", "3"),
                   ("--tiny", "--pairs", "1", "--shapes", "sd15", "--size", "64")),
    ),
    "launches": Part(
        "Where launches decide", 45,
        _benchmark("launches", (*_LAUNCHES, "3"), (*_LAUNCHES, "1", "--parts", "maps")),
    ),
    "sizes-sdxl-batch": Part("Sampling, SDXL's size, four images", 45, _size("sdxl-batch")),
    "sizes-pixart": Part("Sampling, PixArt's size", 30, _size("pixart")),
    "sizes-wan": Part("Sampling, Wan's size", 40, _size("wan")),
}  # fmt: skip
