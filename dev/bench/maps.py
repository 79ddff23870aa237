"""Measure what capturing attention maps adds to a sampling run, and how much memory the maps take.

    python dev bench maps [--parts unet embedded] [--settings NAME ...] [--shape sd15|sdxl] [--size PX] [--steps N] [--pairs N]
                          [--daam PYTHON] [--peer NAME=PATH] [--tiny]

Plain sampling and sampling under AttnMapCapture take turns in one process, on an SD1.5- or SDXL-shaped U-Net of real size
(random weights) and on the embedded model. ``--daam`` (not needed for the rest) names the Python of an environment with
diffusers and daam (daam 0.2.0 runs with diffusers 0.42.1 when it is installed without its pinned dependencies, beside spacy
and matplotlib): its overhead over diffusers' own plain sampling is measured in the same turns, in a process of its own. Take
512 pixels for that: daam goes by the maps' sizes at 512. ``--peer`` adds another node pack's sampler that records maps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from host_inprocess import load_pack, pack_nodes
from scenes import evaluate

from bench.measure import Run, Timings, add_run_arguments, machine, memory_name, publish, ratios, start, table, take_turns
from bench.memory import bytes_of
from bench.models import (
    CFG,
    CPU,
    TINY,
    UNETS,
    Shape,
    Target,
    add_dtype_argument,
    add_shape_arguments,
    host_network,
    inputs_of_a_run,
    precision_of,
    sampler,
    tiny,
)
from bench.peers import NodeClass, add_peer_argument, call, inputs_of, of_each_pack

DEV = Path(__file__).resolve().parent.parent
EMBEDDED_STEPS = 25
PLAIN, THEIR_PLAIN = "plain", "diffusers, plain"
PARTS = ("unet", "embedded")

# name -> inputs of AttnMapCapture
SETTINGS: dict[str, dict[str, Any]] = {
    "capture": {},
    "capture, per_step off": {"per_step": False},
    "capture, self_attention on": {"self_attention": True},
}


class Measured:
    """Variants of one network's sampling, which take turns, and the largest maps that each made.

    Attributes:
        plain: name of each variant's run without maps.
        sums: bytes of the running sums at the end of sampling; kept: of the finished maps.
    """

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.plain: dict[str, str] = {}
        self.sums: dict[str, int] = {}
        self.kept: dict[str, int] = {}
        self.notes: list[str] = []

    def add_host(
        self, settings: Sequence[str], model: Any, steps: int, latent: torch.Tensor, context: int, pooled: int = 0
    ) -> None:
        inputs = latent, context, pooled
        self.runs[PLAIN] = sampler(model, steps, *inputs)
        for name in settings:
            watched, maps = pack_nodes()["AttnMapCapture"].execute(model, **SETTINGS[name]).args
            self.runs[name] = self._captured(name, sampler(watched, steps, *inputs), maps)
            self.plain[name] = PLAIN

    def _captured(self, name: str, run: Run, maps: Any) -> Run:
        def captured() -> None:
            with watched_sums() as sums:
                run()
            self.sums[name], self.kept[name] = max(sums), bytes_of(maps.require())
            self.notes += [f"{name}: {note}" for note in maps.notes if f"{name}: {note}" not in self.notes]

        return captured

    def add_peer(self, name: str, node: NodeClass, model: Any, steps: int, latent: torch.Tensor, context: int) -> None:
        """Add another pack's sampler, which records the positive and the negative prompt's maps."""
        _, positive, negative = inputs_of_a_run(latent, context)
        inputs = {
            "seed": 0, "steps": steps, "cfg": CFG, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
            "positive": [[positive, {}]], "negative": [[negative, {}]], "latent_image": {"samples": latent},
        }  # fmt: skip

        @torch.inference_mode()
        def captured() -> None:
            _, *maps = call(node, model=model.clone(), **inputs)
            self.sums[name] = self.kept[name] = bytes_of(maps)

        self.runs[name] = captured
        self.plain[name] = PLAIN

    def add_daam(self, wish: Callable[[str], int]) -> None:
        def captured() -> None:
            self.sums["daam"] = self.kept["daam"] = wish("daam")

        self.runs |= {THEIR_PLAIN: lambda: wish("plain"), "daam": captured}
        self.plain["daam"] = THEIR_PLAIN

    def table(self, timings: dict[str, Timings], memory: str) -> str:
        rows = []
        for name, timing in timings.items():
            cells = ["", "", ""]
            if name in self.kept:
                overhead = ", ".join(f"{100 * (r - 1):+.1f}" for r in ratios(timing, timings[self.plain[name]]))
                cells = [overhead, *(f"{sizes[name] / 2**20:.1f}" for sizes in (self.sums, self.kept))]
            peak = "" if name in ("daam", THEIR_PLAIN) else f"{timing.peak_bytes / 2**20:.0f}"  # of this process
            rows.append([name, f"{timing.median:.2f}", *cells, peak])
        header = (
            "variant", "seconds (median)", "added time, % (median, lowest, highest)", "maps while sampling, MiB",
            "maps kept, MiB", f"peak rise ({memory}), MiB",
        )  # fmt: skip
        return "\n\n".join([table(header, rows), *self.notes])


@contextmanager
def watched_sums() -> Iterator[list[int]]:
    """Collect the bytes of each run's sums, when they become maps."""
    load_pack()
    from fovea_attention.attention.maps.recorder import CaptureRun

    seen: list[int] = []
    recording = CaptureRun.recording

    def note_and_finish(run: CaptureRun) -> Any:
        seen.append(sum(track.bytes for track in run.tracks.values()))
        return recording(run)

    with mock.patch.object(CaptureRun, "recording", note_and_finish):
        yield seen


@contextmanager
def daam_process(python: Path, size: int, steps: int, shape: Shape, target: Target) -> Iterator[Callable[[str], int]]:
    """Start ``bench.daam_worker``; yields a function that asks it for one run and returns the bytes of the maps."""
    command = [str(python), "-m", "bench.daam_worker", "--size", str(size), "--steps", str(steps)]
    command += ["--threads", str(torch.get_num_threads()), "--device", target.device.type, "--dtype", target.precision]
    command += ["--tiny"] if shape == TINY else []
    with subprocess.Popen(command, cwd=DEV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        wishes, answers = process.stdin, process.stdout

        def wish(text: str) -> int:
            print(text, file=wishes, flush=True)
            answer = answers.readline()
            if not answer:
                raise SystemExit(f"--daam {python}: its process has ended, see above")
            return int(json.loads(answer))

        try:
            yield wish
        finally:
            process.stdin.close()


def peers(named: Sequence[str]) -> dict[str, NodeClass]:
    """Find each other pack's sampler that records maps: a node of a MODEL and two prompts with more outputs than a latent."""
    wanted = {"model", "positive", "negative", "latent_image"}

    def find(nodes: list[NodeClass]) -> NodeClass | None:
        return next((node for node in nodes if wanted <= {*inputs_of(node)} and "HEATMAP" in node.RETURN_TYPES), None)

    return of_each_pack(named, find, "sampler that records attention maps")


def unet_part(
    shape: Shape,
    size: int,
    steps: int,
    pairs: int,
    *,
    settings: Sequence[str] = tuple(SETTINGS),
    daam: Path | None = None,
    target: Target = CPU,
    peer: Sequence[str] = (),
) -> tuple[str, Measured]:
    measured = Measured()
    with ExitStack() as stack:
        latent = torch.zeros(1, 4, size // 8, size // 8)
        model = host_network(shape, target)
        measured.add_host(settings, model, steps, latent, shape.context, shape.pooled)
        for name, node in peers(peer).items():
            measured.add_peer(name, node, model, steps, latent, shape.context)
        if daam is not None:
            measured.add_daam(stack.enter_context(daam_process(daam, size, steps, shape, target)))
        text = measured.table(take_turns(measured.runs, pairs, memory=True), memory_name(target.device))
    title = f"### U-Net of {shape.channels} channels in {shape.layout}'s shape, {size} px, {steps} steps, {pairs} pairs"
    return f"{title}, {target.precision}\n\n{text}", measured


def embedded_part(steps: int, pairs: int, settings: Sequence[str] = tuple(SETTINGS)) -> tuple[str, Measured]:
    measured = Measured()
    model = evaluate.load()[0]
    measured.add_host(settings, model, steps, torch.zeros(1, 3, 32, 32), 96)
    text = measured.table(take_turns(measured.runs, pairs, memory=True), memory_name(model.load_device))
    return f"### Embedded model, 256 px, {steps} steps, {pairs} pairs, {precision_of(model)}\n\n{text}", measured


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python dev bench maps", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: both")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="default: all")
    parser.add_argument("--size", type=int, help="pixels of the real-size run (default 256; on a GPU 512, of SDXL 1024)")
    parser.add_argument("--steps", type=int, help="steps of the real-size run (default 5; on a GPU 25, of SDXL 10)")
    parser.add_argument("--pairs", type=int, default=5, help="counted turns of all variants")
    add_dtype_argument(parser)
    add_shape_arguments(parser, UNETS)
    parser.add_argument("--daam", type=Path, metavar="PYTHON", help="measure daam with this Python")
    add_peer_argument(parser)
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    if (args.daam or args.peer) and args.shape != "sd15":
        parser.error("--daam and --peer go with --shape sd15")
    start(args)
    target, shape, sdxl = Target.here(args.dtype), UNETS[args.shape], args.shape == "sdxl"
    size, steps = ((1024, 10) if sdxl else (512, 25)) if target.on_gpu else (256, 5)
    if args.tiny:
        shape, size, steps = tiny(shape), 128, 2
    written = [f"## Attention maps{', beside daam' if args.daam else ''}\n\nMeasured on: {machine(target)}."]
    if "unet" in args.parts:
        others = {"daam": args.daam, "peer": args.peer, "target": target, "settings": args.settings}
        written.append(unet_part(shape, args.size or size, args.steps or steps, args.pairs, **others)[0])
    if "embedded" in args.parts:
        written.append(embedded_part(2 if args.tiny else EMBEDDED_STEPS, args.pairs, args.settings)[0])
    publish("\n\n".join(written), args.out)


if __name__ == "__main__":
    main()
