"""Measure whether Attend-and-Excite puts every subject into the image: plain and guided runs of the same prompts and noise.

    python dev eval excite [--prompts N] [--objects 2|3] [--mark WORDS] [--steps N] [--cfg X] [--seed N] [--only NAME ...]

Three objects by default: of two, the model forgets one too seldom to tell methods apart.
Every run is a real ``SamplerCustomAdvanced``; images are judged by ``detect``, whose settings no run knows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
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
SHIPPED: dict[str, Any] = {"attention_grid": 16, "layers": "output"}
RUNS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "shipped": SHIPPED,
    "published layers": {},
    "attention_grid 16": {"attention_grid": 16},
    "overlap 0.5": {**SHIPPED, "overlap": 0.5},
    "self_overlap 0.5": {**SHIPPED, "self_overlap": 0.5},
    "divide-and-bind": {**SHIPPED, "loss": "divide-and-bind", "scale_factor": 1.0},
}


@torch.inference_mode()
def marked_conditioning(clip: Any, chosen: Sequence[Prompt], mark: str) -> list:
    """Encode the prompts as one batch. Their words are one token each, so all subjects are where the first prompt's are."""
    encode = pack_nodes()["FoveaPrompt"].execute
    encoded = [encode(clip, marked_text(prompt, mark))[0][0] for prompt in chosen]
    return [[torch.cat([tokens for tokens, _ in encoded]), encoded[0][1]]]


def marked_text(prompt: Prompt, mark: str) -> str:
    """Put the caption's subjects in brackets: their ``shape`` words, ``colour`` words, or ``both`` as a phrase."""
    forms = {"shape": "a {} [{}]", "colour": "a [{}] {}", "both": "a [{} {}]"}
    return " and ".join(forms[mark].format(colour, shape) for colour, shape in prompt.items)


@torch.inference_mode()
def generate(
    model: Any, clip: Any, vae: Any, chosen: Sequence[Prompt], settings: dict[str, Any] | None, *, steps: int, cfg: float,
    seed: int, batch: int = 16, mark: str = "both",
) -> tuple[Tensor, float]:  # fmt: skip
    """Generate images [N, 256, 256, 3] and time the sampling. Prompt number i gets noise number i of ``seed``."""
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
        positive = marked_conditioning(clip, part, mark)
        if settings is None:
            guider = run("CFGGuider", model=model, positive=positive, negative=negative, cfg=cfg)
        else:
            guider = pack_nodes()["AttendExciteGuider"].execute(model, positive, negative, cfg=cfg, **settings)[0]
        began = time.perf_counter()
        sampled = run("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent)
        seconds += time.perf_counter() - began
        for some in sampled["samples"].split(4):
            images.append(nodes.VAEDecode().decode(vae, {"samples": some})[0].float().cpu().clamp(0, 1))
    return torch.cat(images), seconds


def compare(
    model: Any, clip: Any, vae: Any, chosen: Sequence[Prompt], runs: dict[str, dict[str, Any] | None], **sampling: Any
) -> dict[str, dict[str, Any]]:
    """Measure the shares and times of every run, printed as they come."""
    report: dict[str, dict[str, Any]] = {}
    for name, settings in runs.items():
        images, seconds = generate(model, clip, vae, chosen, settings, **sampling)
        findings = evaluate.score(images, chosen)
        both = evaluate.share([all(f.present for f in image) for image in findings])
        right = evaluate.share([all(f.right for f in image) for image in findings])
        report[name] = {"present": both, "right": right, "seconds": seconds / len(chosen)}
        print(
            f"  {name:28s} subjects present {both['share']:.3f} ({both['low']:.3f} to {both['high']:.3f})  "
            f"right {right['share']:.3f} ({right['low']:.3f} to {right['high']:.3f})  {seconds / len(chosen):.2f} s an image",
            flush=True,
        )
    return report


def main(argv: list[str] | None = None) -> None:
    """Run ``python dev eval excite``."""
    parser = argparse.ArgumentParser(prog="python dev eval excite", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=evaluate.CHECKPOINT)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--objects", type=int, choices=(2, 3), default=3)
    parser.add_argument("--mark", choices=("colour", "shape", "both"), default="both", help="the words that are the subjects")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), help="these runs only")
    parser.add_argument("--json", type=Path, help="write all figures here")
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
    sampling = {"steps": args.steps, "cfg": args.cfg, "seed": args.seed, "batch": args.batch, "mark": args.mark}
    report = compare(model, clip, vae, chosen, runs, **sampling)
    if args.json:
        evaluate.write_json(args.json, {**sampling, "objects": args.objects, "runs": report})


if __name__ == "__main__":
    main()
