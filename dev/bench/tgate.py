"""T-GATE: speed against plain sampling, and when its automatic gate opens.

    python dev bench tgate [--parts speed auto] [--shape sd15|sdxl] [--repeats N] [--out FILE] [--peer NAME=PATH]

Speed is measured on an SD1.5- or SDXL-shaped U-Net of real size (random weights) and on the embedded model, on which the gate
is watched too; what T-GATE does to pictures is in ``bench pareto``. ``--peer`` adds another node pack's T-GATE node to the table.
On a GPU only the speed is measured unless ``--parts`` says otherwise, at the usual size of a picture.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from host_inprocess import load_pack, pack_nodes, start_host
from scenes import evaluate

from bench.measure import machine, memory_name, multiply_accumulates, publish, ratios, table, take_turns
from bench.models import SHAPES, Target, add_dtype_argument, add_shape_arguments, host_unet, precision_of, sampler, tiny
from bench.similarity import peak_signal_to_noise

STEPS = 25


def tgate(model: Any, **settings: Any) -> Any:
    return pack_nodes()["TGateCache"].execute(model, **settings)[0]


@dataclass(frozen=True)
class Ran:
    """A run as it ended: its gate step, and the bytes of its cache at most and at the end."""

    gate: int
    peak: int
    kept: int


@contextmanager
def watched_runs() -> Iterator[list[Ran]]:
    """Collect each run's state as it ends."""
    load_pack()
    from fovea_attention.attention.tgate import TGateRun

    seen: list[Ran] = []
    release = TGateRun.release

    def note_and_release(run: TGateRun) -> None:
        seen.append(Ran(run.gate, run.cache_peak_bytes, run.cache.bytes))
        release(run)

    with mock.patch.object(TGateRun, "release", note_and_release):
        yield seen


# --- speed ----------------------------------------------------------------------------------------------------------


def speed_part(args: argparse.Namespace) -> str:
    target, shape = args.target, tiny(SHAPES[args.shape]) if args.tiny else SHAPES[args.shape]
    networks: dict[str, Callable[[], tuple[Any, ...]]] = {
        f"{shape.layout}-shaped U-Net, {args.size} px, {args.steps} steps": lambda: (
            host_unet(shape, target), args.steps, torch.zeros(1, 4, args.size // 8, args.size // 8), shape.context, shape.pooled
        ),
        f"embedded model, 256 px, {args.embedded_steps} steps": lambda: (
            evaluate.load()[0], args.embedded_steps, torch.zeros(1, 3, 32, 32), 96
        ),
    }  # fmt: skip
    sections = []
    for network, build in networks.items():
        model, steps, *inputs = build()
        title = f"{network}, {precision_of(model)}"
        print(title)
        models = {"plain": model, "T-GATE": tgate(model), "T-GATE v1": tgate(model, sp_interval=1)}
        models["off"] = tgate(model, gate_at=1.0)
        # A peer may write to the network's modules for good, so each has a network of its own, with the same weights.
        models |= {name: apply(build()[0]) for name, apply in peers(args.peer).items()}
        runs = {name: sampler(patched, steps, *inputs) for name, patched in models.items()}
        macs = {name: multiply_accumulates(run) for name, run in runs.items()}
        with watched_runs() as seen:
            runs["T-GATE"]()
        timings = take_turns(runs, args.repeats)
        rows = []
        for name in models:
            ratio, low, high = ratios(timings["plain"], timings[name])
            bound = macs["plain"] / macs[name]
            rows.append(
                (name, f"{macs[name] / 1e9:.1f}", f"{bound:.3f}", f"{ratio:.3f} ({low:.3f} to {high:.3f})",
                 f"{100 * ratio / bound:.1f} %", f"{timings[name].peak_bytes / 2**20:.0f}")
            )  # fmt: skip
        speed = f"times as fast (median of {args.repeats} pairs)"
        header = ("variant", "GMAC", "MAC bound", speed, "of the bound", f"peak rise ({memory_name(target.device)}), MiB")
        cache = max(run.peak for run in seen) / 2**20
        sections.append(f"### {title}\n\n{table(header, rows)}\n\nLargest cache of the default run: {cache:.1f} MiB.")
    return "\n\n".join(sections)


def peers(named: list[str]) -> dict[str, Callable[[Any], Any]]:
    """Of each other pack its first T-GATE node that is not deprecated: one with a MODEL input and a fraction to start at."""
    found: dict[str, Callable[[Any], Any]] = {}
    for item in named:
        name, _, path = item.partition("=")
        folder = Path(path).resolve()
        entry = folder / "__init__.py"
        spec = importlib.util.spec_from_file_location(f"peer_{name}", entry, submodule_search_locations=[str(folder)])
        if spec is None or spec.loader is None:
            raise SystemExit(f"--peer {item}: {folder} is not a folder of nodes")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        titles = getattr(module, "NODE_DISPLAY_NAME_MAPPINGS", {})
        current = [node for key, node in module.NODE_CLASS_MAPPINGS.items() if "deprecated" not in titles.get(key, "").lower()]
        apply = next((apply for apply in map(_peer_node, current) if apply is not None), None)
        if apply is None:
            raise SystemExit(f"--peer {item}: no node there takes a MODEL and a fraction of the steps to start at")
        found[name] = apply
    return found


def _peer_node(node: Any) -> Callable[[Any], Any] | None:
    inputs = {**node.INPUT_TYPES().get("required", {}), **node.INPUT_TYPES().get("optional", {})}
    fraction = next((key for key in ("start_at", "gate_at", "start_percent", "gate_step") if key in inputs), None)
    if fraction is None or "model" not in inputs:
        return None
    defaults = {key: value[1]["default"] for key, value in inputs.items() if len(value) > 1 and "default" in value[1]}

    def apply(model: Any) -> Any:
        values = {**defaults, fraction: 0.4}
        return getattr(node(), node.FUNCTION)(model=model.clone(), **values)[0]

    return apply


# --- auto mode -----------------------------------------------------------------------------------------------------------


def auto_part(args: argparse.Namespace) -> str:
    """Which steps auto mode opens the gate at, prompt by prompt, and how near it stays to the fixed gate."""
    model, clip, vae = evaluate.load()
    prompts = evaluate.prompts(args.prompts)
    sampling = {"cfg": args.cfg, "seed": 0, "steps": STEPS, "batch": 1}
    plain = evaluate.generate(model, clip, vae, prompts, **sampling)
    fixed = evaluate.generate(tgate(model), clip, vae, prompts, **sampling)
    rows = [("fixed 0.4", "10", f"{peak_signal_to_noise(fixed, plain).median():.1f}", "")]
    for tolerance in (0.03, 0.05, 0.1, 0.2):
        with watched_runs() as seen:
            pictures = evaluate.generate(tgate(model, mode="auto", tolerance=tolerance), clip, vae, prompts, **sampling)
        steps = collections.Counter(run.gate for run in seen)
        chosen = ", ".join(f"{step} ({count})" for step, count in sorted(steps.items()))
        to_plain, to_fixed = (peak_signal_to_noise(pictures, other).median() for other in (plain, fixed))
        rows.append((f"auto, tolerance {tolerance:g}", chosen, f"{to_plain:.1f}", f"{to_fixed:.1f}"))
        print(*rows[-1], sep="  ", flush=True)
    header = ("mode", "gate step of 25 (prompts)", "median PSNR to plain, dB", "median PSNR to the fixed gate, dB")
    return f"### Auto mode: embedded model, {args.prompts} prompts\n\n{table(header, rows)}"


PARTS = {"speed": speed_part, "auto": auto_part}


def fill_in(args: argparse.Namespace) -> None:
    """What the command line leaves open, by the device."""
    args.target = Target.here(args.dtype)
    gpu, sdxl = args.target.on_gpu, args.shape == "sdxl"
    size, steps, repeats = ((1024, 15, 3) if sdxl else (512, 25, 5)) if gpu else (256, 10, 5)
    if args.tiny:
        size, steps, repeats = 128, 5, 1
    args.size, args.steps, args.repeats = args.size or size, args.steps or steps, args.repeats or repeats
    args.parts = args.parts or (["speed"] if gpu else list(PARTS))
    args.embedded_steps = 5 if args.tiny else STEPS


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python dev bench tgate", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all; on a GPU the speed")
    parser.add_argument("--repeats", type=int, help="counted pairs of runs (speed; default 5; on a GPU, of SDXL 3)")
    parser.add_argument("--size", type=int, help="pixels of the real-size run (default 256; on a GPU 512, of SDXL 1024)")
    parser.add_argument("--steps", type=int, help="steps of the real-size run (default 10; on a GPU 25, of SDXL 15)")
    add_dtype_argument(parser)
    add_shape_arguments(parser)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--cfg", type=float, default=5.0)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="measure another node pack too")
    parser.add_argument("--out", type=Path, help="write the report here as well")
    args = parser.parse_args(argv)
    start_host()
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False
    fill_in(args)
    report = "\n\n".join([f"## T-GATE\n\nMeasured on: {machine(args.target)}.", *(PARTS[part](args) for part in args.parts)])
    publish(report, args.out)


if __name__ == "__main__":
    main()
