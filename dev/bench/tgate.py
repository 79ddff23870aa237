"""Measure T-GATE's speed against plain sampling, and when its automatic gate opens.

    python dev bench tgate [--parts speed auto] [--shape sd15|sdxl|pixart] [--repeats N] [--out FILE] [--peer NAME=PATH]

Speed is measured on an SD1.5-, SDXL- or PixArt-shaped network of real size (random weights), SD1.5's beside diffusers with the
published schedule, and on the embedded model, on which the gate is watched too. What T-GATE does to images is in ``bench
pareto``. ``--peer`` adds another node pack's T-GATE node to the table.
On a GPU only the speed is measured unless ``--parts`` says otherwise, at the usual size of an image.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from host_inprocess import load_pack, pack_nodes
from scenes import evaluate

from bench.measure import (
    add_run_arguments,
    machine,
    memory_name,
    multiply_accumulates,
    publish,
    ratios,
    require_same,
    start,
    table,
    take_turns,
)
from bench.models import (
    SD15,
    SHAPES,
    Shape,
    Target,
    add_dtype_argument,
    add_shape_arguments,
    as_diffusers,
    host_network,
    inputs_of_a_run,
    precision_of,
    sampler,
    tiny,
)
from bench.peers import NodeClass, add_peer_argument, call, defaults_of, inputs_of, of_each_pack
from bench.similarity import peak_signal_to_noise
from bench.tgate_diffusers import run_of

STEPS = 25
SAME = 1e-3  # float32, over all steps
PLAIN, AS_PUBLISHED = "plain", "T-GATE, as published"
THEIR_PLAIN, THEIR_GATE = "diffusers", "diffusers, T-GATE"


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


@dataclass(frozen=True)
class Network:
    """What is sampled: a ComfyUI model and what ``sampler`` needs beside it."""

    title: str
    build: Callable[[], Any]
    steps: int
    latent: torch.Tensor
    context: int
    shape: Shape | None = None  # of random weights

    def run(self, model: Any) -> Callable[[], torch.Tensor]:
        return sampler(model, self.steps, self.latent, self.context, self.shape.pooled if self.shape else 0)


def networks(args: argparse.Namespace) -> list[Network]:
    """Build the network of the wanted shape; with SD1.5's, load the embedded model as well."""
    shape = tiny(SHAPES[args.shape]) if args.tiny else SHAPES[args.shape]
    title, latent = f"{shape.title}, {args.size} px, {args.steps} steps", torch.zeros(1, 4, args.size // 8, args.size // 8)
    real = Network(title, lambda: host_network(shape, args.target), args.steps, latent, shape.context, shape)
    if args.shape != "sd15":
        return [real]
    steps = args.embedded_steps
    title = f"embedded model, 256 px, {steps} steps"
    return [real, Network(title, lambda: evaluate.load()[0], steps, torch.zeros(1, 3, 32, 32), 96)]


def ours(model: Any) -> dict[str, Any]:
    return {
        PLAIN: model,
        "T-GATE": tgate(model),
        AS_PUBLISHED: tgate(model, cfg_after_gate="drop (keep negative, as published)"),
        "T-GATE v1": tgate(model, sp_interval=1),
        "off": tgate(model, gate_at=1.0),
    }


def theirs(network: Network, model: Any, shape: Shape) -> dict[str, Callable[[], torch.Tensor]]:
    """Return diffusers' runs with the same weights: plain, and with the published schedule."""
    import comfy.samplers

    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", network.steps)
    noise, *prompts = inputs_of_a_run(network.latent, network.context)
    unet = as_diffusers(model, shape)
    return {
        name: run_of(unet, sampling, sigmas, noise, prompts, gated) for name, gated in ((THEIR_PLAIN, False), (THEIR_GATE, True))
    }


def speed_part(args: argparse.Namespace) -> str:
    return "\n\n".join(speed_of(network, args) for network in networks(args))


def speed_of(network: Network, args: argparse.Namespace) -> str:
    model = network.build()
    title = f"{network.title}, {precision_of(model)}"
    print(title)
    models = ours(model)
    # A peer may write to the network's modules for good, so each has a network of its own, with the same weights.
    models |= {name: apply(network.build()) for name, apply in peers(args.peer).items()}
    runs = {name: network.run(patched) for name, patched in models.items()}
    if network.shape is not None and network.shape.layout == SD15.layout and args.target.exact:
        runs |= theirs(network, model, network.shape)
        for name, their_name in ((PLAIN, THEIR_PLAIN), (AS_PUBLISHED, THEIR_GATE)):
            latent = model.model.process_latent_in(runs[name]())
            require_same(f"'{name}' and '{their_name}'", latent, runs[their_name](), SAME)
    macs = {name: multiply_accumulates(run) for name, run in runs.items()}
    with watched_runs() as seen:
        runs["T-GATE"]()
    timings = take_turns(runs, args.repeats, memory=True)
    rows = []
    for name in runs:
        plain = THEIR_PLAIN if name == THEIR_GATE else PLAIN
        ratio, low, high = ratios(timings[plain], timings[name])
        bound = macs[plain] / macs[name]
        rows.append(
            (name, f"{macs[name] / 1e9:.1f}", f"{bound:.3f}", f"{ratio:.3f} ({low:.3f} to {high:.3f})",
             f"{100 * ratio / bound:.1f} %", f"{timings[name].peak_bytes / 2**20:.0f}")
        )  # fmt: skip
    speed = f"times as fast (median of {args.repeats} pairs)"
    header = ("variant", "GMAC", "MAC bound", speed, "of the bound", f"peak rise ({memory_name(args.target.device)}), MiB")
    beside = f" '{THEIR_GATE}' is compared with '{THEIR_PLAIN}', all others with '{PLAIN}'." if THEIR_GATE in runs else ""
    cache = max(run.peak for run in seen) / 2**20
    return f"### {title}\n\n{table(header, rows)}\n\nLargest cache of the default run: {cache:.1f} MiB.{beside}"


def peers(named: list[str]) -> dict[str, Callable[[Any], Any]]:
    """Find each other pack's first T-GATE node: one with a MODEL input and a fraction of the steps to start at."""

    def find(nodes: list[NodeClass]) -> Callable[[Any], Any] | None:
        return next((apply for apply in map(_as_t_gate, nodes) if apply is not None), None)

    return of_each_pack(named, find, "T-GATE node")


def _as_t_gate(node: NodeClass) -> Callable[[Any], Any] | None:
    inputs = inputs_of(node)
    fraction = next((key for key in ("start_at", "gate_at", "start_percent", "gate_step") if key in inputs), None)
    if fraction is None or "model" not in inputs:
        return None
    values = {**defaults_of(node), fraction: 0.4}
    return lambda model: call(node, model=model.clone(), **values)[0]


# --- auto mode -----------------------------------------------------------------------------------------------------------


def auto_part(args: argparse.Namespace) -> str:
    """Measure at which step auto mode opens the gate, prompt by prompt, and how near it stays to the fixed gate."""
    model, clip, vae = evaluate.load()
    prompts = evaluate.prompts(args.prompts)
    sampling = {"cfg": args.cfg, "seed": 0, "steps": STEPS, "batch": 1}
    plain = evaluate.generate(model, clip, vae, prompts, **sampling)
    fixed = evaluate.generate(tgate(model), clip, vae, prompts, **sampling)
    rows = [("fixed 0.4", "10", f"{peak_signal_to_noise(fixed, plain).median():.1f}", "")]
    for tolerance in (0.03, 0.05, 0.1, 0.2):
        with watched_runs() as seen:
            images = evaluate.generate(tgate(model, mode="auto", tolerance=tolerance), clip, vae, prompts, **sampling)
        steps = collections.Counter(run.gate for run in seen)
        chosen = ", ".join(f"{step} ({count})" for step, count in sorted(steps.items()))
        to_plain, to_fixed = (peak_signal_to_noise(images, other).median() for other in (plain, fixed))
        rows.append((f"auto, tolerance {tolerance:g}", chosen, f"{to_plain:.1f}", f"{to_fixed:.1f}"))
        print(*rows[-1], sep="  ", flush=True)
    header = ("mode", "gate step of 25 (prompts)", "median PSNR to plain, dB", "median PSNR to the fixed gate, dB")
    return f"### Auto mode: embedded model, {args.prompts} prompts\n\n{table(header, rows)}"


PARTS = {"speed": speed_part, "auto": auto_part}


def fill_in(args: argparse.Namespace) -> None:
    """Fill in what the command line leaves open, by the device."""
    args.target = Target.here(args.dtype)
    gpu, sdxl = args.target.on_gpu, args.shape == "sdxl"
    size, steps, repeats = ((1024, 15, 3) if sdxl else (512, 25, 5)) if gpu else (256, 10, 5)
    if args.tiny:
        size, steps, repeats = 128, 5, 1
    args.size, args.steps, args.repeats = args.size or SHAPES[args.shape].side(size), args.steps or steps, args.repeats or repeats
    args.parts = args.parts or (["speed"] if gpu else list(PARTS))
    args.embedded_steps = 5 if args.tiny else STEPS


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python dev bench tgate", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all; on a GPU the speed")
    parser.add_argument("--repeats", type=int, help="counted pairs of runs (speed; default 5; on a GPU, of SDXL 3)")
    parser.add_argument("--size", type=int, help="pixels (default 256, of PixArt 320; on a GPU 512, of SDXL 1024)")
    parser.add_argument("--steps", type=int, help="steps of the real-size run (default 10; on a GPU 25, of SDXL 15)")
    add_dtype_argument(parser)
    add_shape_arguments(parser, SHAPES)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--cfg", type=float, default=5.0)
    add_peer_argument(parser)
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    start(args)
    fill_in(args)
    title = SHAPES[args.shape].title if "speed" in args.parts else "auto mode"
    heading = f"## T-GATE: {title}\n\nMeasured on: {machine(args.target)}."
    publish("\n\n".join([heading, *(PARTS[part](args) for part in args.parts)]), args.out)


if __name__ == "__main__":
    main()
