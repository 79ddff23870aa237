"""Measure where launches and Python decide: real layouts with few channels and small latents, on one thread.

    python dev bench launches [--pairs N] [--shapes sd15 sdxl] [--parts gradient excite distill maps tgate] [--out FILE]

A GPU that waits for Python is not slowed by multiply-accumulates. The same faults show on any CPU in networks of SD1.5's and
SDXL's layout with 32 channels, where an operation costs what its dispatch costs. Compared are: one gradient of a loss on
attention and plain autograd through the same network; Attend-and-Excite and diffusers' pipeline; an iteration of Attention
Distillation and a plain restatement; sampling with maps captured, with T-GATE and without either. Time is the one thread's
own work, or the device's where there is one. Python calls are all that the profiler sees in one pass, torch's operations those
that reach its dispatcher.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from host_inprocess import pack_nodes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench import distill, excite, gradient
from bench.measure import SAME_KERNEL, Moment, Timings, add_run_arguments, machine, now, publish, ratios, start, table, take_turns
from bench.models import CFG, TINY, UNETS, Shape, Target, host_network, inputs_of_a_run, random_tensor, tiny

SIZE, STEPS = 128, 10
WORD_ROWS = 16  # of a usual prompt's 77
PARTS = ("gradient", "excite", "distill", "maps", "tgate")


class Operations(TorchDispatchMode):
    """Counts what reaches torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def calls_of(run: Callable[[], object]) -> int:
    """Count the calls of Python and built-in functions in one run."""
    calls = 0

    def seen(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def operations_of(run: Callable[[], object]) -> int:
    """Count torch's operations in one run."""
    with Operations() as operations:
        run()
    return operations.count


def in_words(ratio: tuple[float, float, float]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*ratio)


# --- gradients --------------------------------------------------------------------------------------------------------------


def gradient_part(name: str, shape: Shape, pairs: int, target: Target) -> str:
    """Compare one gradient pass, its model and run already there, with plain autograd's."""
    model = host_network(shape, target)
    latent = torch.zeros(1, 4, SIZE // 8, SIZE // 8)
    rows: list[Sequence[object]] = []
    for loss in (gradient.WORDS, gradient.STYLE):
        known = gradient.Loss(loss)
        layers = known.layers(model.model.diffusion_model, latent.shape)

        def body(call: gradient.Call, known: Any = known, layers: Any = layers, loss: str = loss) -> None:
            from fovea_attention.attention.gradient import Memory, ModelPass

            def ours(memory: str) -> Callable[[], object]:
                passes = ModelPass(call.base_model, call.options, layers, Memory(memory))

                def run() -> object:
                    with torch.inference_mode():
                        return passes.gradient(call.cond, call.x, call.sigma, known)

                return run

            runs: dict[str, Callable[[], object]] = {
                gradient.PLAIN: lambda: gradient.plainly(call, known, layers),
                gradient.FAST: ours("fast"),
                gradient.LOW: ours("low"),
            }
            found = take_turns(runs, pairs, say=lambda _: None)
            for side, run in runs.items():
                speed = in_words(ratios(found[gradient.PLAIN], found[side]))
                milliseconds = f"{1000 * found[side].median:.1f}"
                rows.append((loss, side, milliseconds, speed, f"{calls_of(run):,}", f"{operations_of(run):,}"))

        gradient.in_a_run(model, shape, latent, body)
    header = ("loss", "side", "ms", "times as fast (lowest to highest)", "Python calls", "torch operations")
    return f"### One gradient, {name}\n\n{table(header, rows)}"


def excite_part(pairs: int, target: Target) -> str:
    """Compare Attend-and-Excite's gradient pass and whole run with diffusers'."""
    setup, case = excite.Setup(TINY, target), excite.Case(TINY, SIZE, STEPS)
    excite.check_networks(setup, case)
    runs, _ = excite.measure_time(setup, case, ("fast", "low"), pairs, say=lambda _: None)
    rows = []
    for figure in ("gradient pass", "what each refinement adds", "whole run"):
        timings = {side: Timings([ran.figures(case)[figure] or 0.0 for ran in found]) for side, found in runs.items()}
        for side, timing in timings.items():
            rows.append((figure, side, f"{1000 * timing.median:.0f}", in_words(ratios(timings[excite.THEIRS], timing))))
    return f"### Attend-and-Excite, SD1.5's layout\n\n{table(('what', 'side', 'ms', 'times as fast as diffusers'), rows)}"


def distill_part(pairs: int, target: Target) -> str:
    """Compare an iteration of Attention Distillation with a plain restatement's."""
    setup, case = distill.Setup(TINY, target), distill.Case(TINY, SIZE, 3, 3)
    runs = distill.measure_time(setup, case, pairs, say=lambda _: None)
    timings = {side: Timings([sum(one.distilling) / len(one.losses) for one in ran]) for side, ran in runs.items()}
    rows = [
        (side, f"{1000 * timing.median:.0f}", in_words(ratios(timing, timings[distill.THEIRS])))
        for side, timing in timings.items()
    ]
    header = ("side", "ms an iteration", "times the restatement's time")
    return f"### Attention Distillation, SD1.5's layout\n\n{table(header, rows)}"


# --- sampling ---------------------------------------------------------------------------------------------------------------


def sampling(
    model: Any, shape: Shape, stamps: list[list[float]] | None = None, rows: int | None = None
) -> Callable[[], Tensor]:
    """Return a sampling run; the seconds of its steps are added to ``stamps``.

    Args:
        rows: of the prompts, behind which all are zeros, as encoders leave padding; None: every row is a word's.
    """
    import comfy.sample

    latent = torch.zeros(1, 4, SIZE // 8, SIZE // 8)
    noise, positive, negative = inputs_of_a_run(latent, shape.context)
    told = {"pooled_output": random_tensor(3, 1, shape.pooled)} if shape.pooled else {}
    if rows is not None:
        for prompt in (positive, negative):
            prompt[:, rows:] = 0

    def run() -> Tensor:
        moments = [now()]
        with torch.inference_mode():
            result = comfy.sample.sample(
                model, noise, STEPS, CFG, "euler", "normal", [[positive, {**told}]], [[negative, {**told}]], latent,
                seed=0, disable_pbar=True, callback=lambda *_: moments.append(now()),
            )  # fmt: skip
        if stamps is not None:
            stamps.append([later - earlier for earlier, later in zip(moments, moments[1:], strict=False)])
        return result

    return run


def _compared(
    variants: Mapping[str, Any], shape: Shape, pairs: int, rows: Mapping[str, int] | None = None
) -> dict[str, tuple[list[list[float]], int, int]]:
    """Return for every model: the seconds of each counted run's steps, its Python calls and its torch operations.

    Args:
        rows: of a variant's prompts, as in ``sampling``; all of them where it is not named.
    """
    rows = rows or {}
    stamps: dict[str, list[list[float]]] = {name: [] for name in variants}
    runs = {name: sampling(model, shape, stamps[name], rows.get(name)) for name, model in variants.items()}
    take_turns(runs, pairs, say=lambda _: None)
    found = {}
    for name, model in variants.items():
        run = sampling(model, shape, rows=rows.get(name))
        found[name] = (stamps[name][1:], calls_of(run), operations_of(run))
    return found


def _median(runs: list[list[float]], steps: slice) -> Timings:
    return Timings([statistics.median(run[steps]) for run in runs])


def maps_part(name: str, shape: Shape, pairs: int, target: Target) -> str:
    """Compare a step of sampling with and without maps captured."""
    model = host_network(shape, target)
    watched = pack_nodes()["AttnMapCapture"].execute(model)[0]
    padded = f"capture, {WORD_ROWS} rows of words"
    found = _compared({"plain": model, "capture": watched, padded: watched}, shape, pairs, {padded: WORD_ROWS})
    usual = slice(1, None)  # in the first step runs also get ready
    rows = []
    for side, (runs, calls, operations) in found.items():
        added = [100 * (x - 1) for x in ratios(_median(runs, usual), _median(found["plain"][0], usual))]
        milliseconds = f"{1000 * _median(runs, usual).median:.1f}"
        rows.append((side, milliseconds, "{:+.0f} ({:+.0f} to {:+.0f})".format(*added), f"{calls:,}", f"{operations:,}"))
    header = ("variant", "ms a step", "added time, %", "Python calls a run", "torch operations a run")
    return f"### Capture Attention Maps, {name}\n\n{table(header, rows)}"


def tgate_part(name: str, shape: Shape, pairs: int, target: Target) -> str:
    """Compare steps of sampling before and after T-GATE's gate with those without it."""
    node = pack_nodes()["TGateCache"].execute
    model = host_network(shape, target)
    gate = STEPS // 2
    variants = {"plain": model, "T-GATE": node(model, gate_at=gate / STEPS)[0], "off": node(model, gate_at=1.0)[0]}
    found = _compared(variants, shape, pairs)
    before, after = slice(1, gate - 1), slice(gate + 1, None)
    plain, _, plain_operations = found["plain"]
    rows = []
    for side, (runs, calls, operations) in found.items():
        speeds = [in_words(ratios(_median(plain, steps), _median(runs, steps))) for steps in (before, after)]
        whole = ratios(Timings([sum(run) for run in plain]), Timings([sum(run) for run in runs]))
        rows.append((side, *speeds, in_words(whole), f"{plain_operations / operations:.2f}", f"{calls:,}", f"{operations:,}"))
    header = ("variant", "before the gate", "after it", "whole run", "bound by operations", "Python calls", "torch operations")
    return f"### T-GATE, {name}: times as fast as plain\n\n{table(header, rows)}"


# --- the report -------------------------------------------------------------------------------------------------------------


def written_parts(
    parts: Sequence[str], shapes: Sequence[str], pairs: int, target: Target, keep: Callable[[list[str]], None] = lambda _: None
) -> list[str]:
    """Return the report's parts; ``keep`` is given those that there are, as soon as there is one more."""
    by_shape = {"gradient": gradient_part, "maps": maps_part, "tgate": tgate_part}
    once = {"excite": excite_part, "distill": distill_part}
    written = []
    for part in parts:
        if part in once:
            written.append(once[part](pairs, target))
        else:
            for shape in (tiny(UNETS[name]) for name in shapes):
                written.append(by_shape[part](f"{shape.layout}'s layout", shape, pairs, target))
        print(written[-1], flush=True)
        keep(written)
    return written


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python dev bench launches", description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="counted turns of all sides")
    parser.add_argument("--shapes", nargs="+", choices=UNETS, default=list(UNETS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    args.threads = 1
    start(args, SAME_KERNEL)
    target = Target.here()
    heading = f"## Where launches decide\n\nMeasured on: {machine(target)}."
    settings = (
        f"Networks of {TINY.channels} channels, {SIZE} px, {STEPS} steps. Medians of {args.pairs} turns (lowest to highest)."
    )

    def text(written: Sequence[str]) -> str:
        return "\n\n".join([heading, settings, *written])

    def keep(written: Sequence[str]) -> None:
        if args.out:
            args.out.write_text(text(written) + "\n")

    usual, Moment.clock = Moment.clock, staticmethod(time.thread_time)
    try:
        written = written_parts(args.parts, args.shapes, args.pairs, target, keep)
    finally:
        Moment.clock = staticmethod(usual)
    publish(text(written), args.out)


if __name__ == "__main__":
    main()
