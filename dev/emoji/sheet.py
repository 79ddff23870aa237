"""Look at a state without ComfyUI: a sheet of images, and what the judge finds in images of pairs.

cd dev && python -m emoji.sheet [--state FILE] [--out FILE] [--pairs N]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from emoji import sets, state
from emoji.autoencoder import Autoencoder, decode
from emoji.captions import Vocabulary
from emoji.concepts import STYLES
from emoji.judge import see
from emoji.model import Model, sample
from emoji.train_judge import trained_judge
from emoji.train_model import trained_model
from emoji.train_vae import trained_vae

SINGLES = (
    "a cat", "a red car", "a lion in a meadow", "a frog and a yellow umbrella at night", "a horse in the desert",
    "a turtle by the sea", "a bear and a blue hat in the snow",
)  # fmt: skip
STYLED = ("a cat and a dog", "a rabbit", "a green guitar and a crown")


def prompts(each: int = 12) -> list[str]:
    """Return prompts of every kind: ``each`` of the three sets, single subjects, places and styles."""
    pairs = [pair.text for kind in sets.SETS for pair in sets.some(kind, each, seed=2)]
    return [*pairs, *SINGLES, *(f"{text} in {style} style" for style in list(STYLES)[1:] for text in STYLED)]


def generate(
    model: Model, vae: Autoencoder, texts: Sequence[str], device: torch.device, *, steps: int = 25, cfg: float = 5.0,
    seed: int = 0, batch: int = 128,
) -> Tensor:  # fmt: skip
    """Generate images [N, 3, 256, 256] in 0..1, on the CPU."""
    vocabulary, images = Vocabulary(), []
    empty = vocabulary([""]).to(device)
    for start in range(0, len(texts), batch):
        rows = vocabulary(texts[start : start + batch]).to(device)
        latents = sample(model, rows, empty, steps=steps, cfg=cfg, seed=seed + start)
        images.append(decode(vae, latents).cpu())
    return torch.cat(images)


def save_sheet(images: Tensor, texts: Sequence[str], path: Path, columns: int = 8, side: int = 208) -> None:
    """Save images with their prompts below them."""
    from PIL import Image, ImageDraw

    line = side + 14
    whole = Image.new("RGB", (columns * side, -(-len(images) // columns) * line), "white")
    draw = ImageDraw.Draw(whole)
    small = torch.nn.functional.interpolate(images, size=side, mode="area")
    for number, (image, text) in enumerate(zip(small, texts, strict=True)):
        place = (number % columns * side, number // columns * line)
        whole.paste(Image.fromarray((image * 255).round().byte().movedim(0, -1).numpy()), place)
        draw.text((place[0] + 2, place[1] + side + 1), text[:38], fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.save(path)


def main(argv: list[str] | None = None) -> None:
    """Make the sheet."""
    parser = argparse.ArgumentParser(prog="emoji.sheet", description=__doc__.splitlines()[0])
    parser.add_argument("--state", type=Path, default=state.PATH)
    parser.add_argument("--out", type=Path, help="where the sheet is saved")
    parser.add_argument("--each", type=int, default=12, help="prompts of each of the three sets on the sheet")
    parser.add_argument("--pairs", type=int, default=0, metavar="N", help="also judge N plain images of each set")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = state.load(args.state)
    vae = trained_vae(parts["vae"], device)
    model = trained_model(parts["model"], len(Vocabulary().ids), device)
    if args.out:
        texts = prompts(args.each)
        save_sheet(generate(model, vae, texts, device, steps=args.steps, seed=args.seed), texts, args.out)
    if args.pairs:
        judge = trained_judge(parts["judge"], device)
        for kind in sets.SETS:
            chosen = sets.some(kind, args.pairs)
            images = generate(model, vae, sets.texts(chosen), device, steps=args.steps, seed=args.seed)
            seen = see(judge, images.to(device))
            both = [all(seen.shows(i, concept) for concept, _ in pair.subjects) for i, pair in enumerate(chosen)]
            print(json.dumps({"set": kind, "pairs": len(both), "both subjects": round(sum(both) / len(both), 4)}), flush=True)


if __name__ == "__main__":
    main()
