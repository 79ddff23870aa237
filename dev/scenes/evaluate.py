"""Measure the embedded model: do the images show what the prompts name, in the right colours and shapes?

    python dev eval [--prompts N] [--objects 1|2|3] [--steps N] [--cfg X] [--seed N] [--json FILE] [--sheet FILE]

Images come from ComfyUI's own nodes and are judged by ``detect``. The pieces are functions so that other measurements
can use the same prompts, noise and judge with a patched model.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from host_inprocess import host_node, register_demo_model, start_host
from torch import Tensor

from scenes import detect, draw

CHECKPOINT = Path(__file__).resolve().parent / "fovea-scenes.safetensors"
SIDE = 256


# ----------------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Prompt:
    """A caption and the (colour, shape) pairs it names."""

    text: str
    items: tuple[tuple[str, str], ...]

    def token(self, item: int, word: str) -> int:
        """Return where an item's ``"colour"`` or ``"shape"`` word is among the 77 tokens: start, then a-colour-shape-and."""
        return 4 * item + {"colour": 2, "shape": 3}[word]


def prompts(count: int, objects: int = 2, seed: int = 7) -> list[Prompt]:
    """Draw ``count`` prompts "a C S and a C S", colours and shapes different within each."""
    rng = random.Random(seed)
    chosen = []
    for _ in range(count):
        items = tuple(zip(rng.sample(list(draw.COLOURS), objects), rng.sample(draw.SHAPES, objects), strict=True))
        chosen.append(Prompt(" and ".join(f"a {colour} {shape}" for colour, shape in items), items))
    return chosen


# -------------------------------------------------------------------------------------- ComfyUI's nodes


def sampling_node(name: str, **inputs: Any) -> Any:
    """Return the first output of a core node of custom sampling."""
    return host_node(name, "comfy_extras.nodes_custom_sampler")(**inputs)[0]


def load(checkpoint: Path = CHECKPOINT) -> tuple[Any, Any, Any]:
    """Load MODEL, CLIP and VAE of the embedded model through CheckpointLoaderSimple."""
    import folder_paths

    register_demo_model()
    folder_paths.add_model_folder_path("checkpoints", str(checkpoint.parent))
    return host_node("CheckpointLoaderSimple")(ckpt_name=checkpoint.name)[:3]


@torch.inference_mode()  # as ComfyUI runs its nodes
def encode(clip: Any, texts: Sequence[str]) -> list:
    """Encode ``texts`` as a batch in one conditioning."""
    encoded = [host_node("CLIPTextEncode")(clip=clip, text=text)[0][0] for text in texts]
    return [[torch.cat([tokens for tokens, _ in encoded]), encoded[0][1]]]


@torch.inference_mode()
def generate(
    model: Any,
    clip: Any,
    vae: Any,
    chosen: Sequence[Prompt],
    *,
    steps: int = 25,
    cfg: float = 5.0,
    seed: int = 0,
    batch: int = 16,
    sampler: str = "euler",
    scheduler: str = "normal",
    numbers: Sequence[int] | None = None,
) -> Tensor:
    """Generate images [N, 256, 256, 3] in 0..1.

    Prompt i always gets noise i of ``seed``, whatever the batch size; ``numbers`` says which noise each gets instead.
    """
    negative, images = encode(clip, [""]), []
    noises = list(range(len(chosen)) if numbers is None else numbers)
    for start in range(0, len(chosen), batch):
        part = chosen[start : start + batch]
        latent = host_node("EmptyLatentImage")(width=SIDE, height=SIDE, batch_size=len(part))[0]
        latent["batch_index"] = noises[start : start + batch]
        sampled = host_node("KSampler")(
            model=model,
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler_name=sampler,
            scheduler=scheduler,
            positive=encode(clip, [prompt.text for prompt in part]),
            negative=negative,
            latent_image=latent,
            denoise=1.0,
        )[0]
        for some in sampled["samples"].split(4):  # a whole batch at full size would take gigabytes
            images.append(host_node("VAEDecode")(vae=vae, samples={"samples": some})[0].float().cpu().clamp(0, 1))
    return torch.cat(images)


# ----------------------------------------------------------------------------------------------- judging


def score(images: Tensor, chosen: Sequence[Prompt]) -> list[list[detect.Finding]]:
    """Return, for every image, what was found of each object its prompt names."""
    return [
        [detect.find(image, colour, shape) for colour, shape in prompt.items]
        for image, prompt in zip(images, chosen, strict=True)
    ]


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share."""
    z, share = 1.959964, hits / count
    centre, spread = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (centre - spread) / (1 + z * z / count)), min(1.0, (centre + spread) / (1 + z * z / count))


def share(hits: Sequence[bool]) -> dict[str, Any]:
    """Return a share with its count and interval."""
    low, high = wilson(sum(hits), len(hits))
    return {"share": sum(hits) / len(hits), "low": low, "high": high, "hits": sum(hits), "count": len(hits)}


def summary(findings: Sequence[Sequence[detect.Finding]]) -> dict[str, dict[str, Any]]:
    """Return the shares over images and over objects."""
    objects = [finding for image in findings for finding in image]
    return {
        "images with every object right": share([all(f.right for f in image) for image in findings]),
        "images with every colour present": share([all(f.present for f in image) for image in findings]),
        "objects right": share([f.right for f in objects]),
        "objects with their colour present": share([f.present for f in objects]),
    }


# --------------------------------------------------------------------------------------------- word maps


class WordMaps:
    """Cross-attention probabilities of the prompt at 16 x 16, averaged over heads, layers and the whole run."""

    BLOCKS = (("input", 2), ("output", 2))
    GRID = 16

    def __init__(self, model: Any) -> None:
        self.total: Tensor | None = None
        self.calls = 0
        self.model = model.clone()
        for name, number in self.BLOCKS:
            self.model.set_model_attn2_replace(self._attention, name, number)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
        heads = extra["n_heads"]
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)
        kinds = extra["cond_or_uncond"]  # positive (0) and negative (1) come together or, short of memory, one by one
        for kind, part in zip(kinds, weights.mean(1).chunk(len(kinds)), strict=True):
            if kind == 0:
                self.total = part.clone() if self.total is None else self.total + part
                self.calls += 1
        return (weights @ v).transpose(1, 2).flatten(2)

    def maps(self) -> Tensor:
        """Return the maps [B, 16 * 16, 77]."""
        if self.total is None:
            raise RuntimeError("nothing was sampled yet")
        return self.total / self.calls


def pointing(model: Any, clip: Any, vae: Any, chosen: Sequence[Prompt], **sampling: Any) -> dict[str, dict[str, Any]]:
    """Count how often a word's map peaks inside its object, for colour words and shape words, over objects that are right."""
    hits: dict[str, list[bool]] = {"colour": [], "shape": []}
    maps = WordMaps(model)
    images = generate(maps.model, clip, vae, chosen, batch=len(chosen), **sampling)
    for word_maps, prompt, findings in zip(maps.maps(), chosen, score(images, chosen), strict=True):
        for i, finding in enumerate(findings):
            if finding.right:
                inside = torch.nn.functional.max_pool2d(finding.mask[None].float(), 2).flatten() > 0
                for word, found in hits.items():
                    found.append(bool(inside[word_maps[:, prompt.token(i, word)].argmax()]))
    return {f"{word} words that peak inside their object": share(found) for word, found in hits.items() if found}


# ------------------------------------------------------------------------------------------ command line


def seconds_per_picture(model: Any, clip: Any, vae: Any, prompt: Prompt, repeats: int = 5, **sampling: Any) -> float:
    """Return the median wall time of one image alone, from prompt to pixels, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        generate(model, clip, vae, [prompt], **sampling)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def show(figures: dict[str, dict[str, Any]]) -> None:
    """Print shares with their intervals."""
    for name, value in figures.items():
        hits = f"{value['hits']} of {value['count']}"
        print(f"  {name}: {value['share']:.3f} ({value['low']:.3f} to {value['high']:.3f}; {hits})", flush=True)


def resumed(path: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the report of these settings that a file has from an earlier run, or a new one: settings, and "runs".

    Raises:
        SystemExit: the file is of other settings.
    """
    report: dict[str, Any] = {**settings, "runs": {}}
    if path is None or not path.exists():
        return report
    before: dict[str, Any] = json.loads(path.read_text())
    if {**before, "runs": {}} != report:
        raise SystemExit(f"{path} is of other settings: { ({**before, 'runs': {}}) }. Name another file.")
    return before


def write_json(path: Path, figures: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1))


def sheet(images: Tensor, path: Path, columns: int = 8, side: int = 128) -> None:
    """Save a contact sheet; the order is that of the prompts, row by row."""
    from PIL import Image

    small = torch.nn.functional.adaptive_avg_pool2d(images.movedim(-1, 1), side)
    small = torch.nn.functional.pad(small, (2, 2, 2, 2), value=1.0)
    blank = small.new_ones(-len(small) % columns, *small.shape[1:])
    grid = torch.cat([small, blank]).unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((grid * 255).round().byte().numpy()).save(path)


def main(argv: list[str] | None = None) -> None:
    """Run ``python dev eval``."""
    parser = argparse.ArgumentParser(prog="python dev eval", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--objects", type=int, choices=(1, 2, 3), default=2)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise; the prompts are always the same")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pointing", type=int, default=32, metavar="N", help="also check word maps on N prompts (0: not)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet here")
    args = parser.parse_args(argv)
    start_host()
    import comfy.utils

    comfy.utils.set_progress_bar_enabled(False)
    model, clip, vae = load(args.checkpoint.resolve())
    sampling = {"steps": args.steps, "cfg": args.cfg, "seed": args.seed}
    chosen = prompts(args.prompts, args.objects)
    images = generate(model, clip, vae, chosen, batch=args.batch, **sampling)
    if args.sheet:
        sheet(images, args.sheet)
    findings = score(images, chosen)
    figures = summary(findings)
    print(f"{args.prompts} prompts of {args.objects}, {args.steps} steps, cfg {args.cfg:g}, seed {args.seed}")
    show(figures)
    if args.pointing:
        peaks = pointing(model, clip, vae, chosen[: args.pointing], **sampling)
        show(peaks)
        figures |= peaks
    seconds = seconds_per_picture(model, clip, vae, chosen[0], **sampling)
    print(f"  seconds per image (batch 1): {seconds:.2f}", flush=True)
    if args.json:
        images_found = [
            {"prompt": prompt.text, "objects": [{"present": f.present, "right": f.right, "overlap": f.overlap} for f in found]}
            for prompt, found in zip(chosen, findings, strict=True)
        ]
        report = {**sampling, "objects": args.objects, "figures": figures, "seconds_per_picture": seconds}
        write_json(args.json, {**report, "pictures": images_found})


if __name__ == "__main__":
    main()
