"""Measure whether Attend-and-Excite puts every subject into the image: plain and guided runs of the same prompts and noise.

    python dev eval excite [--prompts N] [--objects 2|3] [--mark WORDS] [--steps N] [--cfg X] [--seed N] [--only NAME ...]
                           [--json FILE]

Three objects by default: of two, the model forgets one too seldom to tell methods apart. Subjects are phrases of two tokens; with
``--mark mixed``, a third each are phrases, nouns, and phrases with an article: two, one and three tokens. Every run is a real
``SamplerCustomAdvanced``; images are judged by ``detect``, whose settings no run knows. What it costs is counted in gradient
passes, which do not depend on the machine. With ``--json`` every batch is kept, and a run that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from host_inprocess import pack_nodes, start_host
from torch import Tensor

from scenes import evaluate
from scenes.evaluate import Prompt

# What is compared: settings of the node; ``None`` is the plain run. The embedded model lays its objects out at 16 x 16, which is
# half of its latent's side and not the quarter of the paper's rule, and of its two layers there the decoder's tells sooner which
# subject will be missing.
FREE: dict[str, Any] = {"attention_grid": 16, "layers": "output"}
SHIPPED: dict[str, Any] = {**FREE, "layout": "own places"}
RUNS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "shipped": SHIPPED,
    "free layout": FREE,
    "higher thresholds": {**FREE, "thresholds": "0:0.05, 0.2:0.9, 0.4:0.95"},
    "published layers": {},
    "attention_grid 16": {"attention_grid": 16},
    "overlap 0.5": {**FREE, "overlap": 0.5},
    "self_overlap 0.5": {**FREE, "self_overlap": 0.5},
    "divide-and-bind": {**FREE, "loss": "divide-and-bind", "scale_factor": 1.0},
}

# How an object of the caption is marked as a subject, by the words of it that are: one, two or three tokens.
FORMS = {"colour": "a [{}] {}", "shape": "a {} [{}]", "both": "a [{} {}]", "all": "[a {} {}]"}
_MIXED = ("both", "shape", "all")


def form_of(number: int, count: int, mark: str) -> str:
    """Return how the objects of prompt ``number`` of ``count`` are marked; of ``mixed`` marks, each third has its own."""
    return _MIXED[number * len(_MIXED) // count] if mark == "mixed" else mark


def marked_text(prompt: Prompt, form: str) -> str:
    """Put the caption's subjects in brackets."""
    return " and ".join(FORMS[form].format(*item) for item in prompt.items)


@torch.inference_mode()
def marked_conditioning(clip: Any, chosen: Sequence[Prompt], form: str) -> list:
    """Encode the prompts as one batch. Their words are one token each, so all subjects are where the first prompt's are."""
    encode = pack_nodes()["FoveaPrompt"].execute
    encoded = [encode(clip, marked_text(prompt, form))[0][0] for prompt in chosen]
    return [[torch.cat([tokens for tokens, _ in encoded]), encoded[0][1]]]


def batches(numbers: Sequence[int], count: int, mark: str, size: int) -> Iterator[list[int]]:
    """Yield the numbers of some of ``count`` prompts in batches, whose prompts are marked alike."""
    groups: dict[str, list[int]] = {}
    for number in numbers:
        groups.setdefault(form_of(number, count, mark), []).append(number)
    for group in groups.values():
        yield from (group[start : start + size] for start in range(0, len(group), size))


@contextmanager
def counted_passes() -> Iterator[list[float]]:
    """Collect the gradient passes an image that guided runs tell in the log."""
    found: list[float] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told = re.search(r"([\d.]+) gradient passes an image", record.getMessage())
            if told:
                found.append(float(told[1]))

    log, listener = logging.getLogger("fovea"), Listener()
    level = log.level
    log.addHandler(listener)
    log.setLevel(logging.INFO)
    try:
        yield found
    finally:
        log.removeHandler(listener)
        log.setLevel(level)


@torch.inference_mode()
def generate(
    model: Any, clip: Any, vae: Any, chosen: Sequence[Prompt], numbers: Sequence[int], settings: dict[str, Any] | None, *,
    steps: int, cfg: float, seed: int, mark: str,
) -> tuple[Tensor, float, float]:  # fmt: skip
    """Generate one batch of images [N, 256, 256, 3]; return the seconds of its sampling and its gradient passes an image as well.

    Prompt number i gets noise number i of ``seed``.
    """
    import nodes

    run = evaluate.sampling_node
    negative = evaluate.encode(clip, [""])
    sigmas = run("BasicScheduler", model=model, scheduler="normal", steps=steps, denoise=1.0)
    sampler = run("KSamplerSelect", sampler_name="euler")
    noise = run("RandomNoise", noise_seed=seed)
    latent = nodes.EmptyLatentImage().generate(evaluate.SIDE, evaluate.SIDE, len(numbers))[0]
    latent["batch_index"] = list(numbers)
    part = [chosen[number] for number in numbers]
    positive = marked_conditioning(clip, part, form_of(numbers[0], len(chosen), mark))
    if settings is None:
        guider = run("CFGGuider", model=model, positive=positive, negative=negative, cfg=cfg)
    else:
        guider = pack_nodes()["AttendExciteGuider"].execute(model, positive, negative, cfg=cfg, **settings)[0]
    began = time.perf_counter()
    with counted_passes() as passes:
        sampled = run("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent)
    seconds = time.perf_counter() - began
    images = [
        nodes.VAEDecode().decode(vae, {"samples": some})[0].float().cpu().clamp(0, 1) for some in sampled["samples"].split(4)
    ]
    return torch.cat(images), seconds, sum(passes)


def judged(images: Tensor, part: Sequence[Prompt], seconds: float, passes: float) -> list[dict[str, Any]]:
    """Return what was found of each image's objects, and what it took."""
    return [
        {
            "present": all(finding.present for finding in found),
            "right": all(finding.right for finding in found),
            "seconds": seconds / len(part),
            "passes": passes,
        }
        for found in evaluate.score(images, part)
    ]


def line_of(name: str, found: Sequence[dict[str, Any]]) -> str:
    """Return a row of the table: shares with their 95 % intervals, and what an image took."""
    text = f"  {name:20s}"
    for key in ("present", "right"):
        share = evaluate.share([image[key] for image in found])
        text += f" {key} {share['share']:.3f} ({share['low']:.3f} to {share['high']:.3f}) "
    passes, seconds = (sum(image[key] for image in found) / len(found) for key in ("passes", "seconds"))
    return f"{text} {passes:5.1f} gradient passes, {seconds:.2f} s an image, {len(found)} images"


def compare(
    model: Any, clip: Any, vae: Any, chosen: Sequence[Prompt], runs: dict[str, dict[str, Any] | None], *, batch: int,
    kept: dict[str, dict[str, Any]], keep: Any = None, **sampling: Any,
) -> None:  # fmt: skip
    """Measure every run, printed as it ends.

    Args:
        kept: run -> number of a prompt -> what was found, which is left out here and completed.
        keep: called after each batch.
    """
    for name, settings in runs.items():
        found = kept.setdefault(name, {})
        left = [number for number in range(len(chosen)) if str(number) not in found]
        for numbers in batches(left, len(chosen), sampling["mark"], batch):
            images, seconds, passes = generate(model, clip, vae, chosen, numbers, settings, **sampling)
            results = judged(images, [chosen[number] for number in numbers], seconds, passes)
            found.update(zip(map(str, numbers), results, strict=True))
            if keep is not None:
                keep()
        print(line_of(name, [found[str(number)] for number in range(len(chosen))]), flush=True)


def main(argv: list[str] | None = None) -> None:
    """Run ``python dev eval excite``."""
    parser = argparse.ArgumentParser(prog="python dev eval excite", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=evaluate.CHECKPOINT)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--objects", type=int, choices=(2, 3), default=3)
    parser.add_argument(
        "--mark",
        choices=("mixed", *FORMS),
        default="both",
        help="the words that are the subjects",
    )
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), help="these runs only")
    parser.add_argument("--json", type=Path, help="keep all findings here, and go on from what is there")
    args = parser.parse_args(argv)
    start_host()
    import comfy.utils

    comfy.utils.set_progress_bar_enabled(False)
    model, clip, vae = evaluate.load(args.checkpoint.resolve())
    chosen = evaluate.prompts(args.prompts, args.objects)
    print(
        f"{args.prompts} prompts of {args.objects}, {args.steps} steps, cfg {args.cfg:g}, seed {args.seed}, subjects: {args.mark}"
    )
    runs = {name: RUNS[name] for name in args.only} if args.only else RUNS
    sampling = {"steps": args.steps, "cfg": args.cfg, "seed": args.seed, "mark": args.mark}
    report = evaluate.resumed(args.json, {**sampling, "prompts": args.prompts, "objects": args.objects})
    keep = (lambda: evaluate.write_json(args.json, report)) if args.json else None
    compare(model, clip, vae, chosen, runs, batch=args.batch, kept=report["runs"], keep=keep, **sampling)


if __name__ == "__main__":
    main()
