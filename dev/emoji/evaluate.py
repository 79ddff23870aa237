"""Measure whether every subject is drawn, on Attend-and-Excite's three sets: plain and guided runs of the same prompts and noise.

    python dev eval emoji [--checkpoint FILE] [--judge FILE] [--sets NAME ...] [--pairs N] [--runs NAME ...] [--json FILE]

Every run is a real ``SamplerCustomAdvanced`` in ComfyUI, for any checkpoint of this layout; the judge knows nothing of the runs.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from host_inprocess import pack_nodes, start_host
from scenes import evaluate
from torch import Tensor

from emoji import export, sets
from emoji.judge import Judge, load_judge, see
from emoji.sets import Pair

# What is compared: settings of the guider; ``None`` is the plain run. The model lays its subjects out at 16 x 16, half of its
# latent's side and not the quarter of the paper's rule.
RUNS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "guided": {"attention_grid": 16},
    "published grid": {},
    "output layers": {"attention_grid": 16, "layers": "output"},
    "overlap 0.5": {"attention_grid": 16, "overlap": 0.5},
    "divide-and-bind": {"attention_grid": 16, "loss": "divide-and-bind", "scale_factor": 1.0},
}


@torch.inference_mode()
def conditioning(clip: Any, chosen: Sequence[Pair]) -> list:
    """Encode prompts of one set as a batch: their words are one token each, so all subjects are where the first prompt's are."""
    encode = pack_nodes()["FoveaPrompt"].execute
    encoded = [encode(clip, pair.marked)[0][0] for pair in chosen]
    return [[torch.cat([tokens for tokens, _ in encoded]), encoded[0][1]]]


@torch.inference_mode()
def generate(
    model: Any, clip: Any, vae: Any, chosen: Sequence[Pair], settings: dict[str, Any] | None, *, steps: int, cfg: float,
    seed: int, batch: int = 16,
) -> tuple[Tensor, float]:  # fmt: skip
    """Generate images [N, 256, 256, 3] in 0..1 and time the sampling. Pair number i gets noise number i of ``seed``."""
    import nodes

    run = evaluate.sampling_node
    negative, images, seconds = evaluate.encode(clip, [""]), [], 0.0
    sigmas = run("BasicScheduler", model=model, scheduler="normal", steps=steps, denoise=1.0)
    sampler = run("KSamplerSelect", sampler_name="euler")
    noise = run("RandomNoise", noise_seed=seed)
    for start in range(0, len(chosen), batch):
        part = chosen[start : start + batch]
        latent = nodes.EmptyLatentImage().generate(evaluate.SIDE, evaluate.SIDE, len(part))[0]
        latent["batch_index"] = list(range(start, start + len(part)))
        positive = conditioning(clip, part)
        if settings is None:
            guider = run("CFGGuider", model=model, positive=positive, negative=negative, cfg=cfg)
        else:
            guider = pack_nodes()["AttendExciteGuider"].execute(model, positive, negative, cfg=cfg, **settings)[0]
        began = time.perf_counter()
        sampled = run("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent)
        seconds += time.perf_counter() - began
        for some in sampled["samples"].split(4):  # a whole batch at full size would take gigabytes
            images.append(nodes.VAEDecode().decode(vae, {"samples": some})[0].float().cpu().clamp(0, 1))
    return torch.cat(images), seconds


@dataclass
class Found:
    """Hold what the judge found in the images of a run."""

    subjects: list[tuple[bool, bool]] = field(default_factory=list)  # for each image
    right: list[bool] = field(default_factory=list)  # both subjects, in their colours
    seconds: float = 0.0

    @property
    def both(self) -> list[bool]:
        return [all(image) for image in self.subjects]

    def figures(self) -> dict[str, Any]:
        """Return shares with their 95 % intervals."""
        single = [found for image in self.subjects for found in image]
        return {
            "both subjects": evaluate.share(self.both),
            "both in their colours": evaluate.share(self.right),
            "subjects": evaluate.share(single),
            "seconds an image": self.seconds / max(len(self.right), 1),
        }


def judged(judge: Judge, images: Tensor, chosen: Sequence[Pair]) -> Found:
    """Judge images [N, 256, 256, 3] of pairs."""
    found, seen = Found(), see(judge, images.movedim(-1, 1).contiguous(), at_once=16)
    for number, pair in enumerate(chosen):
        (one, colour), (other, other_colour) = pair.subjects
        found.subjects.append((seen.shows(number, one), seen.shows(number, other)))
        found.right.append(seen.shows(number, one, colour) and seen.shows(number, other, other_colour))
    return found


def better_by_chance(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Return how likely so uneven changes of the same images would be by chance (McNemar's exact test, two-sided)."""
    gained = sum(new and not old for old, new in zip(before, after, strict=True))
    lost = sum(old and not new for old, new in zip(before, after, strict=True))
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**changed)


def compare(
    loaded: tuple[Any, Any, Any], judge: Judge, chosen: Sequence[Pair], runs: dict[str, dict[str, Any] | None], **sampling: Any
) -> tuple[dict[str, Found], dict[str, Any]]:
    """Measure the runs on pairs of one set, printed as they come."""
    found: dict[str, Found] = {}
    report: dict[str, Any] = {}
    for name, settings in runs.items():
        images, seconds = generate(*loaded, chosen, settings, **sampling)
        found[name] = judged(judge, images, chosen)
        found[name].seconds = seconds
        report[name] = found[name].figures()
        print(f" {name}", flush=True)
        evaluate.show({key: value for key, value in report[name].items() if isinstance(value, dict)})
        if "plain" in found and name != "plain":
            report[name]["p against plain"] = better_by_chance(found["plain"].both, found[name].both)
            print(f"  against plain: p = {report[name]['p against plain']:.4f}", flush=True)
    return found, report


def main(argv: list[str] | None = None) -> None:
    """Run ``python dev eval emoji``."""
    parser = argparse.ArgumentParser(prog="python dev eval emoji", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=export.CHECKPOINT)
    parser.add_argument("--judge", type=Path, default=export.JUDGE)
    parser.add_argument("--sets", nargs="+", choices=list(sets.SETS), default=list(sets.SETS))
    parser.add_argument("--pairs", type=int, metavar="N", help="N pairs of each set at random (default: every pair there is)")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=["plain", "guided"])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise; the prompts are always the same")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args(argv)
    for path in (args.checkpoint, args.judge):
        if not path.is_file():
            parser.error(f"{path} is not there; train the model and export it (python -m emoji.train, emoji.export)")
    start_host()
    import comfy.utils

    comfy.utils.set_progress_bar_enabled(False)
    loaded, judge = evaluate.load(args.checkpoint.resolve()), load_judge(args.judge)
    sampling = {"steps": args.steps, "cfg": args.cfg, "seed": args.seed, "batch": args.batch}
    runs = {name: RUNS[name] for name in args.runs}
    together: dict[str, Found] = {name: Found() for name in runs}
    report: dict[str, Any] = {}
    for kind in args.sets:
        chosen = sets.some(kind, args.pairs)
        print(f"{kind}: {len(chosen)} prompts, {args.steps} steps, cfg {args.cfg:g}, seed {args.seed}")
        found, report[kind] = compare(loaded, judge, chosen, runs, **sampling)
        for name, own in found.items():
            together[name].subjects += own.subjects
            together[name].right += own.right
            together[name].seconds += own.seconds
    report["all"] = {name: found.figures() for name, found in together.items()}
    print("all sets")
    for name, figures in report["all"].items():
        print(f" {name}: {figures['seconds an image']:.2f} s an image")
        evaluate.show({key: value for key, value in figures.items() if isinstance(value, dict)})
    if args.json:
        evaluate.write_json(args.json, {**sampling, "sets": report})


if __name__ == "__main__":
    main()
