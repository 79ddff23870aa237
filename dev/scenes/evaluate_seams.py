"""Measure whether tiles have seams: how the step across an edge compares with the steps between neighbours inside.

    python dev eval seams [--images N] [--steps N] [--only ROW ...] [--checkpoint FILE] [--sheet FILE] [--json FILE]

An image repeats without a seam where its last column differs from its first no more than neighbouring columns inside do, and so
for rows: 1 is no seam, more is a step that shows. Every row is one way to make a tile, or to work on one, with the node that
knows of tiles and without it. All rows have the same prompts and noise. The image that is scaled up or made again in a second
pass is the tile of "Seamless Tiling, both".
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from host_inprocess import host_node, load_pack, pack_nodes, start_host
from torch import Tensor

from scenes import draw, evaluate
from scenes.evaluate import sampling_node
from scenes.evaluate_distill import draw_reference

LARGE = 384  # side of a texture that goes through windows
WINDOW = {"window": 192, "window_stride": 96}
TEXTURE: dict[str, Any] = {"iterations": 2, "learning_rate": 0.05, "adain": "off"}
SECOND_PASS = 0.6


def across_edges(images: Tensor) -> tuple[float, float]:
    """Return the step across the left and right edge, and that across top and bottom, in parts of the mean step inside.

    Args:
        images: (n, height, width, 3), 0 to 1.
    """
    found = []
    for dimension in (2, 1):
        steps = (images - images.roll(1, dimension)).abs().mean((3, 3 - dimension))
        found.append(float((steps[:, 0] / steps[:, 1:].mean(1)).mean()))
    return found[0], found[1]


@dataclass
class Tiles:
    """The embedded model, and the tiles that it made."""

    model: Any
    clip: Any
    vae: Any
    images: int = 4
    steps: int = 12
    seed: int = 0
    made: dict[str, Tensor] = field(default_factory=dict)

    def sampled(self, axis: str | None, *, start: Tensor | None = None) -> Tensor:
        """Return latents of textures, sampled with the edges of an axis joined or (None) as usual.

        Args:
            start: latents that a second pass begins with.
        """
        model, denoise = self.tiled(axis), 1.0 if start is None else SECOND_PASS
        latent = host_node("EmptyLatentImage")(width=evaluate.SIDE, height=evaluate.SIDE, batch_size=self.images)[0]
        latent = latent if start is None else {"samples": start}
        texts = [f"a {draw.PATTERNS[i % len(draw.PATTERNS)]} background" for i in range(self.images)]
        return sampling_node(
            "SamplerCustomAdvanced",
            noise=sampling_node("RandomNoise", noise_seed=self.seed),
            guider=self.guider(model, texts, 4.0),
            sampler=sampling_node("KSamplerSelect", sampler_name="euler"),
            sigmas=sampling_node("BasicScheduler", model=model, scheduler="normal", steps=self.steps, denoise=denoise),
            latent_image=latent,
        )["samples"]

    def distilled(self, axis: str | None, side: int, **settings: Any) -> Tensor:
        """Return a latent with the texture of a drawn reference, one image."""
        model = self.tiled(axis)
        reference = draw_reference("checkered", random.Random(5)).image[None]
        execute = pack_nodes()["AttentionDistillSampler"].execute
        return execute(
            noise=sampling_node("RandomNoise", noise_seed=self.seed),
            guider=self.guider(model, [""], 1.0),
            sampler=sampling_node("KSamplerSelect", sampler_name="euler"),
            sigmas=sampling_node("BasicScheduler", model=model, scheduler="ddim_uniform", steps=self.steps, denoise=1.0),
            latent_image=host_node("EmptyLatentImage")(width=side, height=side, batch_size=1)[0],
            reference={"samples": self.vae.encode(reference)},
            null_prompt=evaluate.encode(self.clip, [""]),
            **TEXTURE,
            **settings,
        )[0]["samples"]

    def tiled(self, axis: str | None) -> Any:
        return self.model if axis is None else pack_nodes()["FoveaSeamless"].execute(self.model, axis=axis)[0]

    def guider(self, model: Any, texts: Sequence[str], cfg: float) -> Any:
        negative = evaluate.encode(self.clip, [""])
        return sampling_node("CFGGuider", model=model, positive=evaluate.encode(self.clip, texts), negative=negative, cfg=cfg)

    def decoded(self, latent: Tensor, axis: str | None) -> Tensor:
        """Return images of latents; by VAE Decode where ``axis`` is None."""
        if axis is None:
            images = host_node("VAEDecode")(vae=self.vae, samples={"samples": latent})[0]
        else:
            images = pack_nodes()["FoveaSeamlessDecode"].execute({"samples": latent}, self.vae, axis=axis)[0]
        return images.float().cpu().clamp(0, 1)

    def tile(self) -> Tensor:
        """Return the images that other rows work on."""
        if "tile" not in self.made:
            self.made["tile"] = self.decoded(self.sampled("both"), "both")
        return self.made["tile"]

    def again(self, seamless: bool) -> Tensor:
        """Return the tile after a second pass, encoded with or without its repetitions."""
        if seamless:
            start = pack_nodes()["FoveaSeamlessEncode"].execute(self.tile(), self.vae)[0]["samples"]
        else:
            start = host_node("VAEEncode")(vae=self.vae, pixels=self.tile())[0]["samples"]
        axis = "both" if seamless else None
        return self.decoded(self.sampled(axis, start=start), axis)

    def enlarged(self, wrapped: bool) -> Tensor:
        """Return the tile at twice its size and sharpened, which sees what is around a pixel as upscalers do."""
        images, how = self.tile(), None
        if wrapped:
            images, how = pack_nodes()["FoveaTileWrap"].execute(images, margin=64).args
        images = host_node("ImageScaleBy")(image=images, upscale_method="lanczos", scale_by=2.0)[0]
        images = host_node("Sharpen", "comfy_extras.nodes_post_processing")(image=images, sharpen_radius=4, sigma=2.0, alpha=1.0)[
            0
        ]
        return images if how is None else pack_nodes()["FoveaTileCrop"].execute(images, how)[0]


ROWS: dict[str, Callable[[Tiles], Tensor]] = {
    "plain": lambda tiles: tiles.decoded(tiles.sampled(None), None),
    "Seamless Tiling, both; VAE Decode": lambda tiles: tiles.decoded(tiles.sampled("both"), None),
    "Seamless Tiling, both": lambda tiles: tiles.tile(),
    "Seamless Tiling, horizontal": lambda tiles: tiles.decoded(tiles.sampled("horizontal"), "horizontal"),
    "Seamless Tiling, vertical": lambda tiles: tiles.decoded(tiles.sampled("vertical"), "vertical"),
    "Attention Distillation": lambda tiles: tiles.decoded(tiles.distilled(None, evaluate.SIDE), None),
    "Attention Distillation, both": lambda tiles: tiles.decoded(tiles.distilled("both", evaluate.SIDE), "both"),
    "Attention Distillation, optimise, both": lambda tiles: tiles.decoded(
        tiles.distilled("both", evaluate.SIDE, method="optimise"), "both"
    ),
    f"{LARGE} px in windows": lambda tiles: tiles.decoded(tiles.distilled(None, LARGE, **WINDOW), None),
    f"{LARGE} px in windows, both": lambda tiles: tiles.decoded(tiles.distilled("both", LARGE, **WINDOW), "both"),
    f"{LARGE} px in windows, horizontal": lambda tiles: tiles.decoded(
        tiles.distilled("horizontal", LARGE, **WINDOW), "horizontal"
    ),
    "second pass of a tile, without tiling": lambda tiles: tiles.again(False),
    "second pass of a tile, VAE Encode (Seamless)": lambda tiles: tiles.again(True),
    "tile enlarged and sharpened": lambda tiles: tiles.enlarged(False),
    "the same between Wrap Tile and Crop Tile": lambda tiles: tiles.enlarged(True),
}


@torch.inference_mode()
def measure(tiles: Tiles, rows: Sequence[str]) -> tuple[dict[str, Any], list[Tensor]]:
    """Return the steps of every row, and its images."""
    report: dict[str, Any] = {}
    shown = []
    print(f"  {'step across the edge / mean step inside':48s} left-right  top-bottom")
    for row in rows:
        images = ROWS[row](tiles).float().cpu().clamp(0, 1)
        across, down = across_edges(images)
        report[row] = {"left and right": across, "top and bottom": down, "images": len(images)}
        print(f"  {row:48s} {across:10.2f}  {down:10.2f}", flush=True)
        shown.append(images)
    return report, shown


def main(argv: list[str] | None = None) -> None:
    """Run ``python dev eval seams``."""
    parser = argparse.ArgumentParser(prog="python dev eval seams", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=evaluate.CHECKPOINT)
    parser.add_argument("--images", type=int, default=4, help="a row; one for the rows of Attention Distillation")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--only", nargs="+", choices=list(ROWS))
    parser.add_argument("--sheet", type=Path, help="write a contact sheet here: each row's first image, twice across and down")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args(argv)
    start_host()
    import comfy.utils

    comfy.utils.set_progress_bar_enabled(False)
    load_pack()
    sampling = {"images": args.images, "steps": args.steps, "seed": args.seed}
    tiles = Tiles(*evaluate.load(args.checkpoint.resolve()), **sampling)
    print(", ".join(f"{name} {value}" for name, value in sampling.items()))
    report, images = measure(tiles, args.only or list(ROWS))
    if args.sheet:
        first = [one[:1].movedim(-1, 1) for one in images]
        small = [torch.nn.functional.interpolate(one, (128, 128), mode="area").movedim(1, -1) for one in first]
        evaluate.sheet(torch.cat(small).repeat(1, 2, 2, 1), args.sheet, columns=5, side=256)
    if args.json:
        evaluate.write_json(args.json, {**sampling, "rows": report})


if __name__ == "__main__":
    main()
