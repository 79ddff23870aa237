"""Measure Attend-and-Excite's time and memory beside diffusers' StableDiffusionAttendAndExcitePipeline.

    python dev bench excite [--size PX] [--steps N] [--pairs N] [--refinements N] [--memory fast low] [--dtype T] [--tiny]

Both sides sample with the same random weights in SD1.5's shape, the same noise, prompts, token positions, times and
published settings, taking turns in one process. Before that their networks' predictions are compared, after it the latents
they end with: they must have done the same work. Random weights never meet a threshold, so the thresholds are set to 1 and
the number of refinements at each is fixed: the same small number on both sides. ComfyUI takes torch's attention kernel, as
diffusers does, and as it would by itself on a GPU.

Time comes from inside whole runs: step by step, and gradient pass by gradient pass (forward and backward). Memory is what
torch holds beyond the resting state, with and without the kernels' own scratch space (``bench.memory``; on a GPU only with
it), in one gradient pass and in a whole refined step.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass, field, replace
from typing import Any, Protocol
from unittest import mock

import torch
from host_inprocess import load_pack, pack_nodes
from torch import Tensor

from bench.measure import (
    SAME_KERNEL,
    Moment,
    Timings,
    add_run_arguments,
    difference,
    machine,
    now,
    publish,
    ratios,
    require_same,
    start,
    table,
    take_turns,
)
from bench.memory import AllocatedMemory, HeldTensors
from bench.models import CPU, SD15, TINY, TOKENS, Shape, Target, add_dtype_argument, as_diffusers, host_network, random_tensor

SUBJECTS = (2, 5)  # as in "a cat and a frog"
CFG = 7.5
PUBLISHED_FRACTIONS = (0.0, 0.2, 0.4)  # of the steps: where the published thresholds are
NEVER_MET = 1.0
THEIRS = "diffusers"
PLAIN_FORWARD = "a forward without a gradient, ours"
SAME_NETWORK, SAME_ROUNDED_NETWORK = 1e-4, 0.1


@dataclass(frozen=True)
class Case:
    """One run's settings: the published ones, scaled to the number of steps."""

    shape: Shape = SD15
    size: int = 256
    steps: int = 10
    refinements: int = 2
    guide_until: float = 0.5

    @property
    def guided(self) -> int:
        return round(self.guide_until * self.steps)

    @property
    def threshold_steps(self) -> list[int]:
        """Steps that are refined."""
        return sorted({min(round(fraction * self.steps), self.steps - 1) for fraction in PUBLISHED_FRACTIONS if self.refinements})

    def steps_of(self, guided: bool, refined: bool = False) -> list[int]:
        """Return the steps of one kind, without the very first, in which runs also get ready."""
        return [i for i in range(1, self.steps) if (i in self.threshold_steps) is refined and (i < self.guided) is guided]

    @property
    def noise(self) -> Tensor:
        return random_tensor(0, 1, 4, self.size // 8, self.size // 8)

    @property
    def prompts(self) -> tuple[Tensor, Tensor]:
        """Positive and negative."""
        return random_tensor(1, 1, TOKENS, self.shape.context), random_tensor(2, 1, TOKENS, self.shape.context)


# --- what is watched in a run ----------------------------------------------------------------------------------------------


class Meter(Protocol):
    """Told when a pass that keeps a graph begins, and when it has given its gradient."""

    def start(self) -> None: ...
    def stop(self) -> None: ...


@dataclass
class Passes:
    """Gradient passes of one run.

    Attributes:
        forwards: that kept a graph, whether or not a gradient was taken.
        seconds: of each gradient, with its forward.
    """

    forwards: int = 0
    seconds: list[float] = field(default_factory=list)
    _began: Moment = field(default_factory=now)

    def start(self) -> None:
        self.forwards += 1
        self._began = now()

    def stop(self) -> None:
        self.seconds.append(now() - self._began)


@dataclass
class Ran:
    """One whole run: when it began and when each step ended, its gradient passes, and the latent it ended with."""

    stamps: list[Moment]
    passes: Passes
    latent: Tensor

    def step_seconds(self, steps: Sequence[int]) -> float | None:
        return statistics.median(self.stamps[i + 1] - self.stamps[i] for i in steps) if steps else None

    def figures(self, case: Case) -> dict[str, float | None]:
        guided, refined = (self.step_seconds(case.steps_of(True, refined=refined)) for refined in (False, True))
        return {
            "whole run": self.stamps[-1] - self.stamps[0],
            "guided step": guided,
            f"guided step, refined {case.refinements} times": refined,
            "what each refinement adds": None if guided is None or refined is None else (refined - guided) / case.refinements,
            "step that is not guided": self.step_seconds(case.steps_of(False)),
            "gradient pass": statistics.median(self.passes.seconds),
        }


# --- the two sides ---------------------------------------------------------------------------------------------------------

Side = Callable[[Case, Meter], tuple[list[Moment], Tensor]]


class Setup:
    """Our model, and diffusers' pipeline around the same weights."""

    def __init__(self, shape: Shape, target: Target = CPU) -> None:
        from diffusers import DDIMScheduler, StableDiffusionAttendAndExcitePipeline
        from diffusers.utils import logging

        logging.set_verbosity_error()
        self.target = target
        self.model = host_network(shape, target)
        # Scheduled as published for SD1.x, down to a clean latent as ComfyUI's samplers go.
        scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
            set_alpha_to_one=True,
        )  # fmt: skip
        pipeline: Any = StableDiffusionAttendAndExcitePipeline
        self.pipe = pipeline(
            vae=None, text_encoder=None, tokenizer=None, unet=as_diffusers(self.model, shape), scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        self.pipe.set_progress_bar_config(disable=True)

    def sigmas(self, steps: int) -> Tensor:
        """Return, as ComfyUI's sigmas, the times at which diffusers samples."""
        self.pipe.scheduler.set_timesteps(steps)
        known = self.model.get_model_object("model_sampling").sigmas.cpu()
        return torch.cat([known[self.pipe.scheduler.timesteps.cpu()], known.new_zeros(1)])

    # Forwards

    def our_forward(self, case: Case) -> Tensor:
        noise, prompt = map(self.target.put, (case.noise, case.prompts[0]))
        with torch.inference_mode():
            return self.model.model.diffusion_model(noise, torch.tensor([500.0], device=noise.device), context=prompt)

    def their_forward(self, case: Case) -> Tensor:
        noise, prompt = map(self.target.put, (case.noise, case.prompts[0]))
        with torch.no_grad():
            return self.pipe.unet(noise, torch.tensor(500, device=noise.device), encoder_hidden_states=prompt).sample

    # Whole runs

    def ours(self, case: Case, meter: Meter, memory: str) -> tuple[list[Moment], Tensor]:
        """Sample as SamplerCustomAdvanced does, with our node's guider."""
        import comfy.samplers

        positive, negative = ([[prompt, {}]] for prompt in case.prompts)
        guider = pack_nodes()["AttendExciteGuider"].execute(
            self.model, positive, negative, cfg=CFG, subjects=", ".join(map(str, SUBJECTS)), guide_until=case.guide_until,
            thresholds=", ".join(f"{fraction}:{NEVER_MET}" for fraction in PUBLISHED_FRACTIONS if case.refinements),
            max_refinements=case.refinements, memory=memory,
        )[0]  # fmt: skip
        euler, sigmas = comfy.samplers.sampler_object("euler"), self.sigmas(case.steps)
        stamps = [now()]
        with torch.inference_mode(), our_passes(meter):
            sampled = guider.sample(
                case.noise, torch.zeros_like(case.noise), euler, sigmas, disable_pbar=True, seed=0,
                callback=lambda *_: stamps.append(now()),
            )  # fmt: skip
            return stamps, self.model.model.process_latent_in(sampled)

    def theirs(self, case: Case, meter: Meter) -> tuple[list[Moment], Tensor]:
        """Run the pipeline unchanged, except for the most refinements at a threshold, which it does not let one choose."""
        sigma = float(self.sigmas(case.steps)[0])
        start, positive, negative = map(self.target.put, (case.noise * sigma / (1 + sigma**2) ** 0.5, *case.prompts))
        refine = functools.partial(
            type(self.pipe)._perform_iterative_refinement_step, self.pipe, max_refinement_steps=case.refinements
        )
        stamps = [now()]
        with mock.patch.object(self.pipe, "_perform_iterative_refinement_step", refine), their_passes(self.pipe, meter):
            sampled = self.pipe(
                None, list(SUBJECTS), case.size, case.size, case.steps, CFG, latents=start,
                prompt_embeds=positive, negative_prompt_embeds=negative, output_type="latent",
                callback=lambda *_: stamps.append(now()), max_iter_to_alter=case.guided,
                thresholds=dict.fromkeys(case.threshold_steps, NEVER_MET), attn_res=(case.size // 32, case.size // 32),
            ).images  # fmt: skip
        return stamps, sampled

    def sides(self, memories: Sequence[str]) -> dict[str, Side]:
        found: dict[str, Side] = {THEIRS: self.theirs}
        return found | {f"ours, {memory}": functools.partial(self.ours, memory=memory) for memory in memories}


@contextmanager
def our_passes(meter: Meter) -> Iterator[None]:
    load_pack()
    from fovea_attention.attention.gradient import ModelPass

    gradient = ModelPass.gradient

    def watched(*args: Any, **kwargs: Any) -> Any:
        meter.start()
        found = gradient(*args, **kwargs)
        meter.stop()
        return found

    with mock.patch.object(ModelPass, "gradient", watched):
        yield


@contextmanager
def their_passes(pipe: Any, meter: Meter) -> Iterator[None]:
    """Watch diffusers' passes: one begins with a forward that keeps a graph and ends when the latent was moved."""
    forward, move = pipe.unet.forward, pipe._update_latent

    def watched_forward(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            meter.start()
        return forward(*args, **kwargs)

    def watched_move(*args: Any, **kwargs: Any) -> Any:
        moved = move(*args, **kwargs)
        meter.stop()
        return moved

    with mock.patch.object(pipe.unet, "forward", watched_forward), mock.patch.object(pipe, "_update_latent", watched_move):
        yield


# --- measuring -------------------------------------------------------------------------------------------------------------


def same_network(target: Target) -> float:
    return SAME_NETWORK if target.exact else SAME_ROUNDED_NETWORK


def check_networks(setup: Setup, case: Case) -> float:
    return require_same("The two networks", setup.our_forward(case), setup.their_forward(case), same_network(setup.target))


def measure_time(
    setup: Setup, case: Case, memories: Sequence[str], pairs: int, say: Callable[[str], None] = print
) -> tuple[dict[str, list[Ran]], dict[str, Timings]]:
    """Time every run of each side after the first, and single forwards in the same turns."""
    runs: dict[str, list[Ran]] = {}

    def whole_run(name: str, side: Side) -> None:
        passes = Passes()
        stamps, latent = side(case, passes)
        runs.setdefault(name, []).append(Ran([*stamps[:-1], now()], passes, latent))

    variants: dict[str, Callable[[], object]] = {
        "forward, ours": lambda: setup.our_forward(case), "forward, diffusers": lambda: setup.their_forward(case)
    }  # fmt: skip
    variants |= {name: functools.partial(whole_run, name, side) for name, side in setup.sides(memories).items()}
    timings = take_turns(variants, pairs, say)
    return {name: ran[1:] for name, ran in runs.items()}, {name: timings[name] for name in timings if name not in runs}


@dataclass(frozen=True)
class Peaks:
    """Bytes beyond the resting state: ``HeldTensors`` and ``AllocatedMemory`` of one gradient pass, and the latter of a step.

    The step is a whole run of one that is refined twice and guided; a plain forward, for comparison, is of no step. On a GPU
    there are no ``HeldTensors``.
    """

    held: int | None
    allocated: int
    step: int | None = None


def measure_memory(setup: Setup, case: Case, memories: Sequence[str] = ("fast", "low")) -> dict[str, Peaks]:
    """Measure the peaks of each side."""
    alone = replace(case, steps=1, guide_until=1.0, refinements=0)
    found = {}
    for name, side in setup.sides(memories).items():
        side(alone, Passes())
        held, allocated, step = meters(setup.target)
        for meter in (held, allocated):
            gc.collect()
            if meter is not None:
                side(alone, meter)
        gc.collect()
        with step:
            side(replace(alone, refinements=2), Passes())
        found[name] = Peaks(held.peak if held else None, allocated.peak, step.peak)
    return found | {PLAIN_FORWARD: forward_memory(setup, case)}


def meters(target: Target) -> tuple[HeldTensors | None, AllocatedMemory, AllocatedMemory]:
    return None if target.on_gpu else HeldTensors(), AllocatedMemory(target.device), AllocatedMemory(target.device)


def forward_memory(setup: Setup, case: Case) -> Peaks:
    held, allocated, _ = meters(setup.target)
    for meter in (held, allocated):
        with meter or nullcontext():
            setup.our_forward(case)
    return Peaks(held.peak if held else None, allocated.peak)


# --- the report ------------------------------------------------------------------------------------------------------------


def time_table(case: Case, runs: dict[str, list[Ran]], forwards: dict[str, Timings]) -> str:
    unit = forwards["forward, ours"].median
    others = [name for name in runs if name != THEIRS]
    figures = {name: [run.figures(case) for run in ran] for name, ran in runs.items()}
    rows: list[list[str]] = []
    for row in figures[THEIRS][0]:
        timings = {
            name: Timings([seconds for run in found if (seconds := run[row]) is not None]) for name, found in figures.items()
        }
        if not timings[THEIRS].seconds:
            continue
        cells = [f"{timing.median:.3f} s, {timing.median / unit:.2f} F" for timing in timings.values()]
        rows.append([row, *cells, *(in_words(ratios(timings[THEIRS], timings[name])) for name in others)])
    medians = ", ".join(f"{timing.median:.3f} s ({name.removeprefix('forward, ')})" for name, timing in forwards.items())
    header = ["median", *runs, *(f"{THEIRS} : {name} (lowest to highest)" for name in others)]
    return f"{table(header, rows)}\n\nF is a forward of the positive prompt alone: {medians}; ours is the unit."


def in_words(ratio: tuple[float, float, float]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*ratio)


def count_table(case: Case, runs: dict[str, list[Ran]]) -> str:
    refined = case.refinements * len(case.threshold_steps)
    rows = [
        (name, refined, ran[0].passes.forwards, len(ran[0].passes.seconds), "" if name == THEIRS else f"{end:.1e}")
        for name, ran in runs.items()
        for end in [difference(ran[0].latent, runs[THEIRS][0].latent)]
    ]
    header = ("one run", "refinements", "forwards that keep a graph", "gradients", f"latent at the end, difference to {THEIRS}")
    return table(header, rows)


def memory_table(found: dict[str, Peaks]) -> str:
    def cells(peaks: Peaks) -> list[str]:
        pairs = [pair for pair in zip(astuple(peaks), astuple(found[THEIRS]), strict=True) if pair[1] is not None]
        return ["" if size is None else f"{size / 2**20:.1f} MiB, {100 * size / theirs:.0f} %" for size, theirs in pairs]

    header = [
        "peak beyond the resting state", *(["gradient pass: tensors"] if found[THEIRS].held is not None else []),
        "gradient pass: with the kernels' scratch", "a whole step with 2 refinements, with scratch",
    ]  # fmt: skip
    return table(header, [[name, *cells(peaks)] for name, peaks in found.items()])


def report(case: Case, memories: Sequence[str], pairs: int, target: Target) -> str:
    import diffusers

    setup = Setup(case.shape, target)
    same = check_networks(setup, case)
    title = f"## Attend-and-Excite: U-Net of {case.shape.channels} channels in SD1.5's shape, {case.size} px, {case.steps} steps"
    print(f"{title}\nOne forward of both networks differs by {same:.1e}.", flush=True)
    peaks = measure_memory(setup, case)
    print(memory_table(peaks), flush=True)
    runs, forwards = measure_time(setup, case, memories, pairs)
    settings = (
        f"{case.guided} of {case.steps} steps guided, scale factor 20, cfg {CFG:g}. Thresholds are at steps "
        f"{', '.join(map(str, case.threshold_steps)) or 'none'}; they are set to {NEVER_MET:g}, which is never met, so that both "
        f"sides refine exactly {case.refinements} times at each. Median of {pairs} pairs."
    )
    return "\n\n".join([
        title, f"Measured on: {machine(target)}; diffusers {diffusers.__version__}.",
        f"Same weights: one forward of both networks differs by {same:.1e} of the largest value "
        f"(at most {same_network(target):.0e}).",
        settings, time_table(case, runs, forwards), count_table(case, runs), memory_table(peaks),
    ])  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python dev bench excite", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, help="pixels of the side, in multiples of 64 (default 256; on a GPU 512)")
    parser.add_argument("--steps", type=int, help="steps of a run (default 10; on a GPU 20)")
    add_dtype_argument(parser)
    parser.add_argument("--pairs", type=int, default=5, help="counted turns of all variants")
    parser.add_argument("--refinements", type=int, default=2, help="at each of the published thresholds")
    parser.add_argument("--memory", nargs="+", choices=("fast", "low"), default=["fast", "low"], help="time these")
    parser.add_argument("--tiny", action="store_true", help="a tiny network and a small image, to try the benchmark itself")
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    if args.size and args.size % 64:
        parser.error(f"--size {args.size}: diffusers reads attention on whole grids, so use a multiple of 64")
    start(args, SAME_KERNEL)
    target = Target.here(args.dtype)
    shape, size, steps = (TINY, 128, 10) if args.tiny else (SD15, 512, 20) if target.on_gpu else (SD15, 256, 10)
    case = Case(shape, args.size or size, args.steps or steps, args.refinements)
    written = report(case, args.memory, args.pairs, target)
    publish(written, args.out)


if __name__ == "__main__":
    main()
