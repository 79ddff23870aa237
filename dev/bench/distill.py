"""Measure Attention Distillation's time and memory beside a plain restatement of the authors' guided sampling.

    python dev bench distill [--size PX] [--steps N] [--pairs N] [--iterations N] [--dtype T] [--tiny] [--out FILE]

The restatement is the one that the tests hold the node against (``tests/distill_reference.py``): hooks, autograd through the
whole network, the reference looked at in every step of every run. Both sides sample with the same random weights in SD1.5's
shape, the same noise, prompts, sigmas and published settings, taking turns in one process; losses and latents are compared
too, for both must have done the same work. "First run" is ours with nothing kept from before; "repeated run" finds what the
network sees in the reference as the run before has left it.

Distilling is what follows a denoising step: a pass over the reference, and some iterations of a forward, a backward and a step
of Adam. Memory is beyond the resting state (``bench.memory``), while one step is distilled with one iteration.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from host_inprocess import ROOT, load_pack, pack_nodes
from torch import Tensor

from bench.measure import Timings, add_run_arguments, machine, now, publish, ratios, start, table, take_turns
from bench.memory import AllocatedMemory, HeldTensors
from bench.models import CPU, SD15, TINY, TOKENS, Shape, Target, add_dtype_argument, host_network, random_tensor

CFG, LEARNING_RATE = 7.5, 0.015
LAYERS = (10, 16)  # as the authors count SD1.5's self-attentions
THEIRS = "plain restatement"
FIRST, AGAIN, LOW = "ours, first run", "ours, repeated run", "ours, repeated run, low memory"
SAME_LOSS, SAME_ROUNDED_LOSS = 1e-4, 0.25


@dataclass(frozen=True)
class Case:
    shape: Shape = SD15
    size: int = 256
    steps: int = 4
    iterations: int = 3

    @property
    def side(self) -> int:
        return self.size // 8

    def latent(self, seed: int) -> Tensor:
        return random_tensor(seed, 1, 4, self.side, self.side)

    def prompt(self, seed: int) -> Tensor:
        return random_tensor(seed, 1, TOKENS, self.shape.context)


@dataclass
class Ran:
    """One run: seconds of distilling in each step, of everything, the losses and the clean latent it ended with."""

    distilling: list[float] = field(default_factory=list)
    whole: float = 0.0
    losses: list[float] = field(default_factory=list)
    latent: Tensor = field(default_factory=lambda: torch.zeros(()))


Meter = Callable[[Callable[[], Any]], Any]


class Noise:
    """The NOISE of a known tensor."""

    seed = 0

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def generate_noise(self, latent: Any) -> Tensor:
        return self.noise


# --- the two sides ---------------------------------------------------------------------------------------------------------


def restatement() -> Any:
    """Load the restatement from the tests; it needs nothing but torch."""
    path = ROOT / "tests" / "distill_reference.py"
    spec = importlib.util.spec_from_file_location("fovea_distill_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def casting(network: torch.nn.Module, target: Target) -> torch.nn.Module:
    """Wrap the network so that it casts its inputs to its device and type, as ComfyUI would, and answers in float32."""

    def cast(module: Any, args: tuple[Tensor, Tensor], kwargs: dict[str, Tensor]) -> Any:
        z, times = args
        return (target.put(z), times.to(target.device)), {name: target.put(value) for name, value in kwargs.items()}

    network.register_forward_pre_hook(cast, with_kwargs=True)
    network.register_forward_hook(lambda module, args, output: output.float())
    return network


class Setup:
    """Our model, and the restatement with weights of its own that have the same values."""

    def __init__(self, shape: Shape, target: Target = CPU) -> None:
        load_pack()
        from fovea_attention.attention.distill import references as distill_reference
        from fovea_attention.attention.distill import run as distill

        self.target = target
        self.model = host_network(shape, target)
        self.distill, self.features = distill, distill_reference
        self.stated = restatement()
        self.twin = casting(self.stated.plain_copy(self.model.model.diffusion_model), target)

    def sigmas(self, steps: int) -> Tensor:
        import comfy.samplers

        return comfy.samplers.calculate_sigmas(self.model.get_model_object("model_sampling"), "ddim_uniform", steps)

    def ours(self, case: Case, meter: Meter, *, again: bool = True, memory: str = "fast") -> Ran:
        import comfy.samplers

        guider = comfy.samplers.CFGGuider(self.model)
        guider.set_conds([[case.prompt(1), {}]], [[case.prompt(2), {}]])
        guider.set_cfg(CFG)
        if not again:
            self.features.CACHE.clear()
        base_model = self.model.model
        images = (torch.zeros_like(case.latent(0)), base_model.process_latent_out(case.latent(3)))
        ran = Ran()
        began = now()
        with torch.inference_mode(), metered(self.distill.DistillRun, "after_step", ran, meter):
            output, _, report = pack_nodes()["AttentionDistillSampler"].execute(
                Noise(case.latent(0)), guider, comfy.samplers.sampler_object("euler"), self.sigmas(case.steps),
                *({"samples": image} for image in images), [[case.prompt(4), {}]], iterations=case.iterations,
                learning_rate=LEARNING_RATE, memory=memory,
            ).args  # fmt: skip
        ran.whole = now() - began
        ran.losses = [loss for step in json.loads(report)["steps"] for loss in step["loss"]]
        ran.latent = base_model.process_latent_in(output["samples"])
        return ran

    def theirs(self, case: Case, meter: Meter) -> Ran:
        sampling = self.model.get_model_object("model_sampling")
        sigmas = [float(sigma) for sigma in self.sigmas(case.steps)]
        times = [self.stated.diffusion_time(sampling, sigma) for sigma in sigmas]
        least = self.stated.diffusion_time(sampling, float(sampling.sigma_min))
        ran = Ran()
        given = (case.latent(0), case.latent(3), *map(case.prompt, (4, 1, 2)))
        noise, reference, null, positive, negative = (tensor.to(self.target.device) for tensor in given)
        with mock.patch.object(self.stated, "plain_copy", lambda network: network):
            official = self.stated.Official(
                self.twin, LAYERS, "eps", null, reference,
                lambda like, sigma, purpose, place: self.features.fixed_noise(like, sigma, self.features.Purpose(purpose), place),
                lr=LEARNING_RATE, iterations=case.iterations, adain=True,
            )  # fmt: skip
        at_the_top = sigmas[0] >= float(sampling.sigma_max) * (1 - 1e-5)
        start = noise * (1.0 if at_the_top else times[0].sigma)
        began = now()
        with metered(self.stated.Official, "_distil", ran, meter):
            ran.latent = official.sample(start, times, least, positive, negative, CFG).cpu()
        ran.whole = now() - began
        ran.losses = official.losses
        return ran

    def sides(self) -> dict[str, Callable[[Case, Meter], Ran]]:
        return {
            THEIRS: self.theirs,
            FIRST: functools.partial(self.ours, again=False),
            AGAIN: self.ours,
            LOW: functools.partial(self.ours, memory="low"),
        }


@contextmanager
def metered(owner: Any, name: str, ran: Ran, meter: Meter) -> Iterator[None]:
    """Time every call of a method within ``meter``."""
    method = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        began = now()
        found = meter(functools.partial(method, *args, **kwargs))
        ran.distilling.append(now() - began)
        return found

    with mock.patch.object(owner, name, watched):
        yield


def unmetered(call: Callable[[], Any]) -> Any:
    return call()


# --- measuring -------------------------------------------------------------------------------------------------------------


def difference(found: Ran, other: Ran) -> tuple[float, float]:
    """Compare the first losses, as a share, and the final latents, on average, as a share of their spread."""
    first = abs(found.losses[0] - other.losses[0]) / other.losses[0]
    return first, float((found.latent - other.latent).abs().mean() / other.latent.std())


def measure_time(setup: Setup, case: Case, pairs: int, say: Callable[[str], None] = print) -> dict[str, list[Ran]]:
    """Time every run of each side after the first."""
    runs: dict[str, list[Ran]] = {}

    def whole_run(name: str, side: Callable[[Case, Meter], Ran]) -> None:
        runs.setdefault(name, []).append(side(case, unmetered))

    take_turns({name: functools.partial(whole_run, name, side) for name, side in setup.sides().items()}, pairs, say)
    found = {name: ran[1:] for name, ran in runs.items()}
    same = SAME_LOSS if setup.target.exact else SAME_ROUNDED_LOSS
    for name, ran in found.items():
        first, _ = difference(ran[0], found[THEIRS][0])
        if len(ran[0].losses) != case.steps * case.iterations or not first <= same:
            raise SystemExit(
                f"{name} has not done the same work: its first loss differs by {first:.1e}, so nothing can be compared."
            )
    return found


def within(memory: HeldTensors | AllocatedMemory, call: Callable[[], Any]) -> Any:
    gc.collect()
    memory.start()
    try:
        return call()
    finally:
        memory.stop()


def measure_memory(setup: Setup, case: Case) -> dict[str, dict[str, int]]:
    """Measure peak bytes while one step is distilled with one iteration: of held tensors, and by the allocator.

    On a GPU there is the allocator's record alone.
    """
    alone = replace(case, steps=1, iterations=1)
    found: dict[str, dict[str, int]] = {}
    for name, side in setup.sides().items():
        side(alone, unmetered)
        found[name] = {}
        kinds: dict[str, HeldTensors | AllocatedMemory] = {} if setup.target.on_gpu else {"tensors held": HeldTensors()}
        for kind, memory in (kinds | {"allocated": AllocatedMemory(setup.target.device)}).items():
            side(alone, functools.partial(within, memory))
            found[name][kind] = memory.peak
    return found


# --- the report ------------------------------------------------------------------------------------------------------------


def time_table(case: Case, runs: dict[str, list[Ran]]) -> str:
    parts: dict[str, Callable[[Ran], float]] = {
        "distilling, per iteration": lambda ran: sum(ran.distilling) / len(ran.losses),
        "whole run": lambda ran: ran.whole,
    }
    timings = {part: {name: Timings([of(one) for one in ran]) for name, ran in runs.items()} for part, of in parts.items()}
    rows = []
    for name, ran in runs.items():
        cells: list[str] = []
        for part in parts:
            ratio, low, high = ratios(timings[part][name], timings[part][THEIRS])
            cells += [f"{timings[part][name].median:.3f} s", f"{ratio:.2f} ({low:.2f} to {high:.2f})"]
        first, end = difference(ran[0], runs[THEIRS][0])
        rows.append([name, *cells, f"{first:.0e}, {end:.0e}"])
    header = ["median", *(cell for part in parts for cell in (part, "times theirs")), "differs in first loss, in latent"]
    return table(header, rows)


def memory_table(found: dict[str, dict[str, int]]) -> str:
    theirs = found[THEIRS]
    rows = [
        (name, *(f"{peaks[kind] / 2**20:.1f} MiB, {100 * peaks[kind] / other:.0f} %" for kind, other in theirs.items()))
        for name, peaks in found.items()
    ]
    return table(("peak while a step is distilled, and share of theirs", *theirs), rows)


def report(case: Case, pairs: int, target: Target) -> str:
    setup = Setup(case.shape, target)
    title = f"## Attention Distillation: U-Net of {case.shape.channels} channels in SD1.5's shape, {case.size} px"
    print(title, flush=True)
    peaks = measure_memory(setup, case)
    print(memory_table(peaks), flush=True)
    runs = measure_time(setup, case, pairs)
    settings = (
        f"Guided sampling, {case.steps} steps of ddim_uniform, {case.iterations} iterations of {LEARNING_RATE:g} after each, "
        f"AdaIN, cfg {CFG:g}, one reference of the image's size. Median of {pairs} pairs (lowest to highest)."
    )
    return "\n\n".join([title, f"Measured on: {machine(target)}.", settings, time_table(case, runs), memory_table(peaks)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python dev bench distill", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, help="pixels of the side, in multiples of 64 (default 256; on a GPU 512)")
    parser.add_argument("--steps", type=int, help="steps of a run (default 4; on a GPU 6)")
    add_dtype_argument(parser)
    parser.add_argument("--iterations", type=int, default=3, help="after each step (published: 3)")
    parser.add_argument("--pairs", type=int, default=5, help="counted turns of all variants")
    parser.add_argument("--tiny", action="store_true", help="a tiny network and a small image, to try the benchmark itself")
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    if args.size and args.size % 64:
        parser.error(f"--size {args.size}: the network halves the latent three times, so use a multiple of 64")
    start(args)
    target = Target.here(args.dtype)
    shape, size, steps = (TINY, 128, 4) if args.tiny else (SD15, 512, 6) if target.on_gpu else (SD15, 256, 4)
    written = report(Case(shape, args.size or size, args.steps or steps, args.iterations), args.pairs, target)
    publish(written, args.out)


if __name__ == "__main__":
    main()
