"""Train the enlarging decoder: 32-pixel images as the diffusion model makes them -> crisp 256-pixel images.

cd dev && COMFYUI_PATH=... python -m scenes.train_decoder --minutes 25 [--resume STATE] [--out STATE]
"""

from __future__ import annotations

import argparse
import math
import os
import random
import time
from pathlib import Path

import torch
from host_inprocess import ROOT, start_host
from torch import Tensor, nn
from torch.nn import functional

from scenes import draw

STATE = ROOT / ".fovea" / "scenes-decoder.pt"
CROP = 16  # latent pixels; the image is eight times that
SAVE_EVERY, LOG_EVERY = 120.0, 30.0  # seconds


def _other_colours(images: Tensor) -> Tensor:
    """Mix the channels of some images, so that the decoder enlarges colours rather than remembers seven of them."""
    mix = torch.rand(len(images), 1, 1) * (torch.rand(len(images), 1, 1) < 0.4)
    matrix = torch.lerp(torch.eye(3).expand(len(images), 3, 3), torch.softmax(3 * torch.randn(len(images), 3, 3), 2), mix)
    return torch.einsum("bij,bjhw->bihw", matrix, images)


def _unsure(latents: Tensor) -> Tensor:
    """Make of exact latents what a sampler would leave: slightly displaced outlines, some blur, some noise."""
    count, _, size, _ = latents.shape
    strength = torch.rand(count, 1, 1, 1)
    offsets = functional.interpolate(torch.randn(count, 2, size // 2, size // 2), size=(size, size), mode="bicubic")
    steps = (torch.arange(size) + 0.5) * (2 / size) - 1
    grid = torch.stack([steps.expand(size, size), steps[:, None].expand(size, size)], 2)
    grid = grid + (0.35 * strength * offsets * (2 / size)).permute(0, 2, 3, 1)
    moved = functional.grid_sample(latents, grid, mode="bilinear", padding_mode="border", align_corners=False)
    blurred = functional.avg_pool2d(functional.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, 1)
    moved = moved.lerp(blurred, 0.25 * torch.rand(count, 1, 1, 1))
    return moved + 0.08 * torch.rand(count, 1, 1, 1) * torch.randn_like(moved)


def pairs(rng: random.Random, count: int) -> tuple[Tensor, Tensor]:
    """Draw latents [B, 3, 16, 16] and the 0..1 images [B, 3, 128, 128] they should become; windows of drawn scenes."""
    from scenes.autoencoder import area_average

    scenes = [draw.sample(rng, style=rng.choice(draw.STYLES) if rng.random() < 0.4 else None) for _ in range(count)]
    room = int(draw.WORLD) - CROP
    corner = torch.randint(-4, room + 5, (count, 2)).clamp(0, room).float()  # borders of the image come up often
    images = _other_colours(draw.render(scenes, 8 * CROP, corner=corner, extent=CROP)[0])
    exact = area_average(images)
    # A quarter stays exact: what the encoder gives.
    return torch.where(torch.rand(count, 1, 1, 1) < 0.25, exact, _unsure(exact)), images


def loss(decoded: Tensor, images: Tensor) -> Tensor:
    """Return the mean absolute error of colours and of their differences to the right and lower neighbour (edges)."""
    edges = [functional.l1_loss(decoded.diff(dim=axis), images.diff(dim=axis)) for axis in (2, 3)]
    return functional.l1_loss(decoded, images) + 0.5 * sum(edges)


def train(args: argparse.Namespace) -> None:
    """Run until the time budget is spent."""
    from scenes.autoencoder import idle_blocks, make_autoencoder

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    decoder = make_autoencoder().taesd_decoder
    totals = {"steps": 0, "samples": 0, "seconds": 0.0}
    if args.resume:
        state = torch.load(args.resume, weights_only=True)
        decoder.load_state_dict(state["decoder"])
        totals = {key: state[key] for key in totals}
    complete = decoder.state_dict()
    for position in idle_blocks(decoder):
        decoder[position] = nn.ReLU()  # what an idle block comes to
    decoder.to(device)
    average = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    seed = args.seed * 1000 + totals["steps"]
    torch.manual_seed(seed)
    rng = random.Random(seed)

    def save() -> dict[str, float]:
        weights = complete | {name: value.cpu() for name, value in average.items()}
        sums = {**totals, "seconds": totals["seconds"] + time.monotonic() - started}
        partial = args.out.with_suffix(".part")
        torch.save({"decoder": weights, **sums}, partial)
        os.replace(partial, args.out)
        return sums

    started = logged = saved = time.monotonic()
    losses: list[float] = []
    step, progress = 0, 0.0
    while progress < 1:
        latents, images = (part.to(device) for part in pairs(rng, args.batch))
        for group in optimiser.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * progress))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            error = loss(decoder(latents).float(), images)
        optimiser.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimiser.step()
        step += 1
        decay = min(0.99, step / (step + 10))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in decoder.parameters()], 1 - decay)
        totals["steps"] += 1
        totals["samples"] += args.batch
        losses.append(error.item())
        now = time.monotonic()
        progress = (now - started) / (args.minutes * 60)
        if now - logged > LOG_EVERY:
            mean_loss = sum(losses) / len(losses)
            print(f"{now - started:6.0f} s  step {step}  loss {mean_loss:.4f}", flush=True)
            logged, losses = now, []
        if now - saved > SAVE_EVERY:
            save()
            saved = now
    print(f"{save()} -> {args.out}")


def main(argv: list[str] | None = None) -> None:
    """Run the decoder's trainer."""
    parser = argparse.ArgumentParser(prog="scenes.train_decoder", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=25.0, help="wall time to train")
    parser.add_argument("--resume", type=Path, help="state to start from")
    parser.add_argument("--out", type=Path, default=STATE, help="where the state is saved")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--batch", type=int, default=8, help="crops per step")
    parser.add_argument("--comfyui", help="ComfyUI folder (default: $COMFYUI_PATH)")
    args = parser.parse_args(argv)
    start_host(args.comfyui)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
