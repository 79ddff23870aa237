"""Measure whether the trained DiT draws the classes it is told, through the pack's loader, label and sampler nodes.

    python dev eval dit [--images N] [--steps N] [--cfg X] [--seed N] [--only ROW ...] [--sheet FILE] [--json FILE]

The classes are those that ``detect`` can judge: plain ones and patterned ones, in turn. Rows: ComfyUI's euler, the paper's
ddpm with the learned variance, T-GATE's self-attention intervals, and fewer steps at T-GATE's cost.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from host_inprocess import host_node, pack_nodes, start_host
from torch import Tensor

from scenes import detect, draw, evaluate
from scenes.train_dit import CHECKPOINT

JUDGED = len(draw.CLASSES) * (1 + len(draw.PATTERNS)) // len(draw.LOOKS)  # the styles come after these


def load(checkpoint: Path = CHECKPOINT) -> Any:
    """Load the DiT's MODEL through the pack's loader."""
    import folder_paths

    folder_paths.add_model_folder_path("diffusion_models", str(checkpoint.parent))
    return pack_nodes()["DiTLoader"].execute(checkpoint.name)[0]


def judged_classes(count: int) -> list[int]:
    """Choose ``count`` classes spread over those that can be judged."""
    stride = next(s for s in range(JUDGED * 5 // 8, JUDGED) if torch.gcd(torch.tensor(s), torch.tensor(JUDGED)) == 1)
    return [i * stride % JUDGED for i in range(count)]


@torch.inference_mode()
def generate(
    model: Any, vae: Any, labels: list[int], *, steps: int, cfg: float, seed: int, sampler: str = "euler", batch: int = 16
) -> Tensor:
    """Generate images [N, 256, 256, 3] in 0..1. Image number i always gets noise number i of ``seed``."""
    run = evaluate.sampling_node
    chosen = pack_nodes()["DiTSampler"].execute()[0] if sampler == "ddpm" else run("KSamplerSelect", sampler_name=sampler)
    sigmas = run("BasicScheduler", model=model, scheduler="normal", steps=steps, denoise=1.0)
    images = []
    for start in range(0, len(labels), batch):
        part = labels[start : start + batch]
        positive, negative = pack_nodes()["DiTClassLabel"].execute("0", ", ".join(map(str, part))).args[:2]
        latent = host_node("EmptyLatentImage")(width=evaluate.SIDE, height=evaluate.SIDE, batch_size=len(part))[0]
        latent["batch_index"] = list(range(start, start + len(part)))
        guider = run("CFGGuider", model=model, positive=positive, negative=negative, cfg=cfg)
        noise = run("RandomNoise", noise_seed=seed)
        sampled = run("SamplerCustomAdvanced", noise=noise, guider=guider, sampler=chosen, sigmas=sigmas, latent_image=latent)
        for some in sampled["samples"].split(4):
            images.append(host_node("VAEDecode")(vae=vae, samples={"samples": some})[0].float().cpu().clamp(0, 1))
    return torch.cat(images)


def score(images: Tensor, labels: list[int]) -> list[detect.Finding]:
    return [detect.find(image, *draw.class_parts(label)[1:]) for image, label in zip(images, labels, strict=True)]


def rows(model: Any, steps: int) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return, by name, each row's patched model and what is changed in its sampling."""

    def tgate(**settings: Any) -> Any:
        return pack_nodes()["TGateCache"].execute(model, **settings)[0]

    fewer = round(steps * 0.7)
    return {
        "euler": (model, {}),
        f"euler, {fewer} steps": (model, {"steps": fewer}),
        "ddpm, learned variance": (model, {"sampler": "ddpm", "steps": 4 * steps}),
        "T-GATE defaults": (tgate(), {}),
        "T-GATE, sp_interval 1 (negative dropped only)": (tgate(sp_interval=1), {}),
        "T-GATE, sp_interval 3": (tgate(sp_interval=3), {}),
        "T-GATE, fi_interval 2": (tgate(fi_interval=2), {}),
    }


def main(argv: list[str] | None = None) -> None:
    """Run ``python dev eval dit``."""
    parser = argparse.ArgumentParser(prog="python dev eval dit", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--images", "--pictures", type=int, default=168)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows whose name begins so")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first row here")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args(argv)
    if not args.checkpoint.is_file():
        raise SystemExit(f"{args.checkpoint} is not there: train it with scenes.train_dit, or name another with --checkpoint.")
    start_host()
    import comfy.utils

    comfy.utils.set_progress_bar_enabled(False)
    model, vae = load(args.checkpoint.resolve()), evaluate.load()[2]
    labels = judged_classes(args.images)
    sampling = {"steps": args.steps, "cfg": args.cfg, "seed": args.seed}
    print(f"{args.images} images, {args.steps} steps, cfg {args.cfg:g}, seed {args.seed}")
    report: dict[str, Any] = {}
    plain: Tensor | None = None
    for name, (patched, changed) in rows(model, args.steps).items():
        if args.only and not name.startswith(tuple(args.only)):
            continue
        began = time.perf_counter()
        images = generate(patched, vae, labels, **{**sampling, **changed})
        seconds = (time.perf_counter() - began) / len(labels)
        right = evaluate.share([finding.right for finding in score(images, labels)])
        plain = images if plain is None else plain
        difference = float((images - plain).square().mean().sqrt())
        report[name] = {"right": right, "seconds": seconds, "root mean square difference to the first row": difference}
        print(
            f"  {name:48s} right {right['share']:.3f} ({right['low']:.3f} to {right['high']:.3f})  "
            f"difference {difference:.3f}  {seconds:.2f} s an image",
            flush=True,
        )
    if args.sheet and plain is not None:
        evaluate.sheet(plain, args.sheet, columns=14, side=96)
    if args.json:
        evaluate.write_json(args.json, {**sampling, "rows": report})


if __name__ == "__main__":
    main()
