"""Measure whether Attention Distillation brings a reference's style into an image, and keeps the content of one.

    python dev eval distill [--images N] [--parts style transfer] [--steps N] [--transfer-steps N] [--cfg X] [--seed N]
                            [--only ROW ...] [--checkpoint FILE] [--sheet FILE] [--json FILE]

References are drawn, not sampled: patterned grounds, and the styles the model knows. They reach the node through VAEEncode.

``style``: the prompt names two objects and nothing of the style. How far is each image from its reference (``scenes.style``)
in a plain run, with the reference's keys and values in place of the image's own in the same layers and at the same sigma
(K/V injection), and with Attention Distillation? ``transfer``: a drawn scene is the content; how many of its objects does
``detect`` still find right? Some rows start from the content as image to image does, with its caption as prompt. All rows of a
part have the same prompts or contents, references and noise.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from host_inprocess import host_node, load_pack, pack_nodes, start_host
from torch import Tensor

from scenes import draw, evaluate
from scenes.evaluate import Prompt, sampling_node
from scenes.style import Distance, Style, distance, style

GROUPS = (*draw.PATTERNS, *draw.STYLES)
PER_REFERENCE = 4  # images that share a reference, and a batch

# Inputs of AttentionDistillSampler. Published: 3 iterations of 0.015 after every step, AdaIN, the last layers. Adam's steps that
# are too small to matter leave what AdaIN does by itself.
PUBLISHED: dict[str, Any] = {}
DISTILLED: dict[str, dict[str, Any]] = {
    "AdaIN alone": {"iterations": 1, "learning_rate": 1e-9},
    "distilled, published": PUBLISHED,
    "distilled, quick": {"iterations": 1, "learning_rate": 0.03},
    "distilled, end_at 0.9": {"end_at": 0.9},
    "distilled, start_at 0.2": {"start_at": 0.2},
    "distilled, every second step": {"every_n_steps": 2},
    "distilled, every second step at 0.03": {"every_n_steps": 2, "learning_rate": 0.03},
    "distilled, quick, end_at 0.8": {"iterations": 1, "learning_rate": 0.03, "end_at": 0.8},
}
STYLE_ROWS = ("plain", "K/V injection", *DISTILLED)
DENOISE = {f"guided from content, denoise {share:g}": share for share in (0.5, 0.7)}
GUIDED_CFG = 3.0
DRAWN = "another drawing in the style"  # of other objects
# Published: optimise, 1 iteration of 0.05 per step, content_weight 0.25.
TRANSFERRED: dict[str, dict[str, Any]] = {
    "optimised, published": {"method": "optimise"},
    "optimised, every second step at 0.1": {"method": "optimise", "every_n_steps": 2, "learning_rate": 0.1},
    "optimised, content weight 1": {"method": "optimise", "content_weight": 1.0},
    **{row: {"content_weight": 1.0} for row in DENOISE},
}


# ------------------------------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class Reference:
    """A drawn scene, its image [256, 256, 3] and its statistics."""

    group: str
    scene: draw.Scene
    image: Tensor
    style: Style


def drawn(scene: draw.Scene) -> Tensor:
    """Draw a scene [256, 256, 3]."""
    return draw.render([scene], evaluate.SIDE)[0][0].movedim(0, -1)


def draw_reference(group: str, rng: random.Random) -> Reference:
    """Draw a scene of two objects in a style, or on a patterned ground."""
    scene = draw.sample(rng, objects=2, style=group if group in draw.STYLES else None, pattern=False)
    if group in draw.PATTERNS:
        scene = replace(scene, pattern=group)
    image = drawn(scene)
    return Reference(group, scene, image, style(image))


def draw_references(count: int, groups: Sequence[str] = GROUPS, seed: int = 3) -> list[Reference]:
    """Draw references from the groups in turn."""
    rng = random.Random(seed)
    return [draw_reference(groups[i % len(groups)], rng) for i in range(count)]


def another_in_the_style(reference: Reference, number: int) -> Tensor:
    """Draw other objects in the style: as near as a good image in the style can be expected to come."""
    rng = random.Random(1000 + number)
    items = draw.sample(rng, objects=2, style=reference.scene.style, pattern=False).items
    return drawn(replace(reference.scene, items=items, shift=(rng.uniform(0, 8), rng.uniform(0, 8))))


def draw_contents(count: int, seed: int = 4) -> tuple[Tensor, list[Prompt]]:
    """Draw scenes of two objects on plain grounds [N, 256, 256, 3]; returns them and what is in them."""
    rng = random.Random(seed)
    scenes = [draw.sample(rng, objects=2, style=None, pattern=False) for _ in range(count)]
    return torch.stack([drawn(scene) for scene in scenes]), [
        Prompt(scene.caption, tuple((item.colour, item.shape) for item in scene.items)) for scene in scenes
    ]


# ------------------------------------------------------------------------------------------ K/V injection


class KeyValueInjection:
    """Lets the image attend to a reference's keys and values instead of its own, in some self-attentions at every sigma.

    Attributes:
        model: a clone that does so.
    """

    def __init__(self, model: Any, reference: Tensor, null: Tensor, layers: Sequence[str]) -> None:
        self.reference, self.null = reference, null
        self.noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(0))
        self.recording = False
        self.stored: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self.model = model.clone()
        self.model.set_model_unet_function_wrapper(self._call)
        for name in layers:
            place, _, number = name.partition(".")
            self.model.set_model_attn1_replace(self._attention, place, int(number))

    def _call(self, apply_model: Callable[..., Tensor], call: dict[str, Any]) -> Tensor:
        base_model, sigma = self.model.model, call["timestep"][:1]
        clean = base_model.process_latent_in(self.reference.to(sigma.device))
        noised = base_model.model_sampling.noise_scaling(sigma.view(1, 1, 1, 1), self.noise.to(clean), clean)
        alone = {"c_crossattn": self.null.to(clean), "transformer_options": call["c"]["transformer_options"]}
        self.recording = True
        apply_model(noised, sigma, **alone)
        self.recording = False
        return apply_model(call["input"], call["timestep"], **call["c"])

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        place = tuple(extra["block"][:2])
        if self.recording:
            self.stored[place] = k, v
        else:
            k, v = (stored.expand(len(q), -1, -1) for stored in self.stored[place])
        q, k, v = (part.unflatten(2, (extra["n_heads"], -1)).transpose(1, 2) for part in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


# ----------------------------------------------------------------------------------------------- sampling


@dataclass
class Setup:
    """The embedded model and how it is sampled."""

    model: Any
    clip: Any
    vae: Any
    steps: int = 25
    transfer_steps: int = 100
    cfg: float = 5.0
    seed: int = 0
    passes: int = 0  # gradient passes of the last run

    def run(
        self, model: Any, texts: Sequence[str], start: int, steps: int, cfg: float | None = None, denoise: float = 1.0
    ) -> dict[str, Any]:
        """Return the inputs of SamplerCustomAdvanced for images number ``start`` and on."""
        latent = host_node("EmptyLatentImage")(width=evaluate.SIDE, height=evaluate.SIDE, batch_size=len(texts))[0]
        latent["batch_index"] = list(range(start, start + len(texts)))
        prompts = {"positive": evaluate.encode(self.clip, texts), "negative": evaluate.encode(self.clip, [""])}
        return {
            "noise": sampling_node("RandomNoise", noise_seed=self.seed),
            "guider": sampling_node("CFGGuider", model=model, **prompts, cfg=self.cfg if cfg is None else cfg),
            "sampler": sampling_node("KSamplerSelect", sampler_name="euler"),
            "sigmas": sampling_node("BasicScheduler", model=model, scheduler="ddim_uniform", steps=steps, denoise=denoise),
            "latent_image": latent,
        }

    def encoded(self, images: Tensor) -> dict[str, Any]:
        return host_node("VAEEncode")(vae=self.vae, pixels=images)[0]

    @torch.inference_mode()
    def styled(self, row: str, reference: Reference, texts: Sequence[str], start: int) -> Tensor:
        """Generate images [N, 256, 256, 3] of one row of the first part."""
        model, inputs = self.model, {"reference": self.encoded(reference.image[None])}
        null = evaluate.encode(self.clip, [""])
        if row == "K/V injection":
            model = KeyValueInjection(model, inputs["reference"]["samples"], null[0][0], self.layers()).model
        run = self.run(model, texts, start, self.steps)
        self.passes = 0
        if row in DISTILLED:
            return self._distilled(**run, **inputs, null_prompt=null, **DISTILLED[row])
        return self._decoded([sampling_node("SamplerCustomAdvanced", **run)])

    @torch.inference_mode()
    def transferred(self, row: str, reference: Reference, contents: Tensor, texts: Sequence[str], start: int) -> Tensor:
        """Generate images [N, 256, 256, 3] of one row of the second part."""
        images = {"reference": self.encoded(reference.image[None]), "content": self.encoded(contents)}
        if row in DENOISE:
            run = self.run(self.model, texts, start, self.steps, GUIDED_CFG, DENOISE[row])
            run["latent_image"] = {**run["latent_image"], **images["content"]}
        else:
            run = self.run(self.model, [""] * len(contents), start, self.transfer_steps)
        return self._distilled(**run, **images, null_prompt=evaluate.encode(self.clip, [""]), **TRANSFERRED[row])

    def layers(self) -> list[str]:
        """Return the layers that the node compares unless told otherwise."""
        load_pack()
        from fovea_attention.attention.distill import distilled_layers

        return [layer.name for layer in distilled_layers(self.model.model.diffusion_model)]

    def _distilled(self, **inputs: Any) -> Tensor:
        output, _, report = pack_nodes()["AttentionDistillSampler"].execute(**inputs).args
        self.passes = sum(len(step["loss"]) for step in json.loads(report)["steps"])
        return self._decoded([output])

    def _decoded(self, outputs: Any) -> Tensor:
        return host_node("VAEDecode")(vae=self.vae, samples=outputs[0])[0].float().cpu().clamp(0, 1)


# ---------------------------------------------------------------------------------------------- measuring


def bootstrap(values: Tensor, statistic: Callable[[Tensor], Tensor], draws: int = 2000) -> dict[str, float]:
    """Return a statistic of ``values`` [N, ...] with its 95 % interval over images drawn again."""
    generator = torch.Generator().manual_seed(0)
    again = torch.stack([
        statistic(values[torch.randint(len(values), (len(values),), generator=generator)]) for _ in range(draws)
    ])  # fmt: skip
    low, high = torch.quantile(again, torch.tensor([0.025, 0.975], dtype=again.dtype)).tolist()
    return {"value": float(statistic(values)), "low": low, "high": high}


def distances(images: Tensor, chosen: Sequence[Reference]) -> list[Distance]:
    """Measure the distance of each image to its own reference."""
    return [distance(style(image), reference.style) for image, reference in zip(images, chosen, strict=True)]


def figures(found: Sequence[Distance], plain: Sequence[Distance]) -> dict[str, Any]:
    """Return means with intervals, the share of the first row's distance that is left, and every image's own."""
    table = torch.tensor([[one.total, one.colours, one.texture, other.total] for one, other in zip(found, plain, strict=True)])
    means = {name: bootstrap(table[:, i], torch.mean) for i, name in enumerate(("distance", "colours", "texture"))}
    left = bootstrap(table, lambda rows: rows[:, 0].mean() / rows[:, 3].mean())
    return {**means, "share of first row": left, "pictures": [vars(one) for one in found]}


def say(name: str, row: dict[str, Any]) -> None:
    left, total, share = row["share of first row"], row["distance"], row.get("objects right")
    text = (
        f"  {name:28s} {total['value']:.3f} ({total['low']:.3f} to {total['high']:.3f}) = colours {row['colours']['value']:.3f} "
        f"+ texture {row['texture']['value']:.3f}, {left['value']:.2f} ({left['low']:.2f} to {left['high']:.2f}) of the first row"
    )
    if share:
        text += f", objects right {share['share']:.3f} ({share['low']:.3f} to {share['high']:.3f})"
    print(f"{text}, {row['passes']} gradient passes, {row['seconds']:.1f} s an image", flush=True)


Maker = Callable[[str, Reference, int, int], Tensor]


def measure(
    setup: Setup, rows: Sequence[str], make: Maker, chosen: Sequence[Reference], prompts: Sequence[Prompt], *, judged: bool
) -> tuple[dict[str, Any], list[Tensor]]:
    """Measure figures and images of every row; the first is what the others are compared with.

    Args:
        make: (row, reference, first image, images) -> images.
        judged: whether objects are looked for in all images; else where ``detect`` can, on patterned grounds.
    """
    report: dict[str, Any] = {}
    shown: list[Tensor] = []
    plain: list[Distance] = []
    for row in rows:
        began, setup.passes = time.perf_counter(), 0
        starts = range(0, len(chosen), PER_REFERENCE)
        parts = [make(row, chosen[start], start, len(chosen[start : start + PER_REFERENCE])) for start in starts]
        seconds = (time.perf_counter() - began) / len(chosen)
        images = torch.cat(parts)
        found = distances(images, chosen)
        plain = plain or found
        report[row] = {**figures(found, plain), "seconds": seconds, "passes": setup.passes}
        seen = [place for place, reference in enumerate(chosen) if judged or reference.group in draw.PATTERNS]
        if seen and row != DRAWN:
            scored = evaluate.score(images[seen], [prompts[place] for place in seen])
            report[row]["objects right"] = evaluate.share([finding.right for image in scored for finding in image])
        say(row, report[row])
        shown.append(images)
    return report, shown


def spread(references: Sequence[Reference], count: int) -> list[Reference]:
    return [references[i // PER_REFERENCE] for i in range(count)]


def style_part(setup: Setup, count: int, rows: Sequence[str]) -> tuple[dict[str, Any], Tensor]:
    chosen = spread(draw_references(-(-count // PER_REFERENCE)), count)
    prompts = evaluate.prompts(count, 2)

    def make(row: str, reference: Reference, start: int, size: int) -> Tensor:
        if row == DRAWN:
            return torch.stack([another_in_the_style(reference, start + i) for i in range(size)])
        return setup.styled(row, reference, [prompt.text for prompt in prompts[start : start + size]], start)

    report, shown = measure(setup, ["plain", *rows, DRAWN], make, chosen, prompts, judged=False)
    for row, own in report.items():
        by_group: dict[str, list[float]] = {}
        for reference, one in zip(chosen, own["pictures"], strict=True):
            by_group.setdefault(reference.group, []).append(one["colours"] + one["texture"])
        own["groups"] = {group: sum(values) / len(values) for group, values in by_group.items()}
        print(f"    {row:28s} " + "  ".join(f"{group} {value:.3f}" for group, value in own["groups"].items()), flush=True)
    return report, side_by_side([reference.image for reference in chosen], shown)


def transfer_part(setup: Setup, count: int, rows: Sequence[str]) -> tuple[dict[str, Any], Tensor]:
    """Measure the second part, on patterned references only: ``detect`` can judge what has their style."""
    chosen = spread(draw_references(-(-count // PER_REFERENCE), draw.PATTERNS), count)
    contents, prompts = draw_contents(count)

    def make(row: str, reference: Reference, start: int, size: int) -> Tensor:
        own, texts = contents[start : start + size], [prompt.text for prompt in prompts[start : start + size]]
        return own if row == "content as it is" else setup.transferred(row, reference, own, texts, start)

    report, shown = measure(setup, ["content as it is", *rows], make, chosen, prompts, judged=True)
    return report, side_by_side([reference.image for reference in chosen], shown)


def side_by_side(references: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    """Arrange [images * (1 + rows), 256, 256, 3]: each reference, then every row's image of it."""
    return torch.stack([torch.stack(list(references)), *rows], dim=1).flatten(0, 1)


PARTS = {"style": style_part, "transfer": transfer_part}
ROWS = {"style": STYLE_ROWS[1:], "transfer": tuple(TRANSFERRED)}


def main(argv: list[str] | None = None) -> None:
    """Run ``python dev eval distill``."""
    parser = argparse.ArgumentParser(prog="python dev eval distill", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=evaluate.CHECKPOINT)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--images", "--pictures", type=int, default=24, help=f"a row; every {PER_REFERENCE} share a reference")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--transfer-steps", type=int, default=100)
    parser.add_argument("--cfg", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0, help="of the noise; prompts and references are always the same")
    parser.add_argument(
        "--only", nargs="+", choices=[*STYLE_ROWS[1:], *TRANSFERRED], help="these rows, beside what is compared with"
    )
    parser.add_argument(
        "--sheet", type=Path, help="write contact sheets here, the part's name added: a line has the reference first"
    )
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args(argv)
    start_host()
    import comfy.utils

    comfy.utils.set_progress_bar_enabled(False)
    sampling = {"steps": args.steps, "transfer_steps": args.transfer_steps, "cfg": args.cfg, "seed": args.seed}
    setup = Setup(*evaluate.load(args.checkpoint.resolve()), **sampling)
    print(f"{args.images} images a row, {', '.join(f'{name} {value:g}' for name, value in sampling.items())}")
    report: dict[str, Any] = {**sampling, "layers": setup.layers()}
    for part in args.parts:
        print(f"{part}: distance to the reference (95 % interval)")
        rows = [row for row in ROWS[part] if not args.only or row in args.only]
        report[part], images = PARTS[part](setup, args.images, rows)
        if args.sheet:
            path = args.sheet.with_name(f"{args.sheet.stem}-{part}{args.sheet.suffix}")
            evaluate.sheet(images, path, columns=len(images) // args.images, side=96)
    if args.json:
        evaluate.write_json(args.json, report)


if __name__ == "__main__":
    main()
