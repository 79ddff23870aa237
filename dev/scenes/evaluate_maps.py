"""Measure whether word maps lie on the objects that the words name, with the pack's own nodes at every step.

    python dev eval maps [--prompts N] [--steps N] [--cfg X] [--seed N] [--json FILE]

Half of the prompts name one object, half two. Each image is made by ``FoveaPrompt``, ``AttnMapCapture`` and ComfyUI's
KSampler; its maps are the masks of ``AttnMapPreview``. They are compared with the object's region as ``detect`` finds it, for
objects that were drawn right: intersection over union at threshold 0.4, and whether the map's maximum lies inside.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from host_inprocess import pack_nodes, start_host
from torch import Tensor

from scenes import detect, evaluate
from scenes.evaluate import Prompt

THRESHOLD = 0.4
FORMS = ("colour", "shape", "phrase")


def asked_words(prompt: Prompt) -> list[str]:
    """Return, for each object, its colour word, its shape word and both."""
    return [word for colour, shape in prompt.items for word in (colour, shape, f"{colour} {shape}")]


@torch.inference_mode()
def image_and_masks(
    model: Any, clip: Any, vae: Any, prompt: Prompt, *, steps: int, cfg: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Generate the image [256, 256, 3] and a mask for each of ``asked_words`` [words, 256, 256]."""
    ours, core = pack_nodes(), evaluate.host_node
    positive = ours["FoveaPrompt"].execute(clip, prompt.text)[0]
    negative = core("CLIPTextEncode")(clip=clip, text="")[0]
    watched, maps = ours["AttnMapCapture"].execute(model)[:2]
    latent = core("EmptyLatentImage")(width=evaluate.SIDE, height=evaluate.SIDE, batch_size=1)[0]
    sampled = core("KSampler")(
        model=watched, seed=seed, steps=steps, cfg=cfg, sampler_name="euler", scheduler="normal", positive=positive,
        negative=negative, latent_image=latent, denoise=1.0,
    )[0]  # fmt: skip
    image = core("VAEDecode")(vae=vae, samples=sampled)[0]
    masks = ours["AttnMapPreview"].execute(maps, image, words=", ".join(asked_words(prompt)), threshold=THRESHOLD)[1]
    return image[0].float().clamp(0, 1), masks


def overlap(mask: Tensor, region: Tensor) -> tuple[float, bool]:
    """Return the intersection over union of ``mask`` above the threshold with ``region``, and whether its maximum lies inside."""
    size = mask.shape[0] // region.shape[0]
    whole = region.repeat_interleave(size, 0).repeat_interleave(size, 1)
    seen = mask >= THRESHOLD
    inside = bool(whole.flatten()[mask.argmax()])
    return float((seen & whole).sum() / (seen | whole).sum().clamp(min=1)), inside


def measure(model: Any, clip: Any, vae: Any, chosen: Sequence[Prompt], **sampling: Any) -> dict[str, dict[str, Any]]:
    """Measure the mean overlap and the share of maxima inside, for each form of word."""
    overlaps: dict[str, list[float]] = defaultdict(list)
    hits: dict[str, list[bool]] = defaultdict(list)
    for number, prompt in enumerate(chosen):
        image, masks = image_and_masks(model, clip, vae, prompt, **{**sampling, "seed": sampling["seed"] + number})
        for index, (colour, shape) in enumerate(prompt.items):
            found = detect.find(image, colour, shape)
            if found.right:
                for form, mask in zip(FORMS, masks[3 * index : 3 * index + 3], strict=True):
                    value, inside = overlap(mask, found.mask)
                    overlaps[form].append(value)
                    hits[form].append(inside)
    return {
        form: {"mean IoU": sum(overlaps[form]) / len(overlaps[form]), "maximum inside": evaluate.share(hits[form])}
        for form in FORMS
        if hits[form]
    }


def main(argv: list[str] | None = None) -> None:
    """Run ``python dev eval maps``."""
    parser = argparse.ArgumentParser(prog="python dev eval maps", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=evaluate.CHECKPOINT)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the next ones count up")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args(argv)
    start_host()
    import comfy.utils

    comfy.utils.set_progress_bar_enabled(False)
    model, clip, vae = evaluate.load(args.checkpoint.resolve())
    sampling = {"steps": args.steps, "cfg": args.cfg, "seed": args.seed}
    report: dict[str, Any] = {**sampling, "prompts": args.prompts}
    print(f"{args.prompts} prompts, {args.steps} steps, cfg {args.cfg:g}; objects that were drawn right, threshold {THRESHOLD}")
    for objects in (1, 2):
        chosen = evaluate.prompts(args.prompts // 2, objects)
        report[f"{objects} objects"] = figures = measure(model, clip, vae, chosen, **sampling)
        for form, found in figures.items():
            inside = found["maximum inside"]
            print(
                f"  {objects} object{'s' * (objects > 1)}, {form:6s}  mean IoU {found['mean IoU']:.3f}  maximum inside "
                f"{inside['share']:.3f} ({inside['low']:.3f} to {inside['high']:.3f}; {inside['hits']} of {inside['count']})",
                flush=True,
            )
    if args.json:
        evaluate.write_json(args.json, report)


if __name__ == "__main__":
    main()
