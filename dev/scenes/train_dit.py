"""Train the embedded DiT on drawn scenes, and write it as the file that is shipped.

    cd dev && COMFYUI_PATH=... python -m scenes.train_dit --minutes 90 [--resume STATE] [--seed N] [--out STATE] [--export FILE]

It is a SiT (Ma et al., arXiv:2401.08740): DiT's network (adaLN-Zero) that predicts velocity on the straight path, told one of
``draw.CLASSES``. On a CPU float32, on a CUDA GPU bfloat16 and bigger batches, same code.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import torch
from host_inprocess import ROOT, load_pack, start_host
from safetensors.torch import save
from torch import Tensor, nn

from scenes import draw
from scenes.optimise import AveragedAdamW

CHECKPOINT = Path(__file__).resolve().parent / "fovea-scenes-dit.safetensors"
STATE = ROOT / ".fovea" / "scenes-dit.pt"
NETWORK: dict[str, Any] = {"depth": 6, "width": 192, "heads": 3, "patch_size": 4, "in_channels": 3, "out_channels": 3}
LABEL_DROPOUT = 0.1
SAVE_EVERY, LOG_EVERY = 120.0, 30.0  # seconds
LONGEST_STEP = 20.0  # seconds; more means that the process was stopped for a while, which does not count
NULL = len(draw.CLASSES)


class PartedLabels(nn.Module):
    """The embedding of a class as the sum of its look's, colour's and shape's: few images teach all classes.

    The exported table is that of the paper, one row per class (``table``).
    """

    parts: Tensor  # (classes + 1, 3): rows of the embedding below; the null class is a part of its own, thrice

    def __init__(self, width: int) -> None:
        super().__init__()
        first_colour, first_shape = len(draw.LOOKS), len(draw.LOOKS) + len(draw.COLOURS)
        nothing = first_shape + len(draw.SHAPES)
        rows = [[nothing] * 3]
        for index in reversed(range(len(draw.CLASSES))):
            look, colour, shape = draw.class_parts(index)
            place = draw.LOOKS.index(look), list(draw.COLOURS).index(colour), draw.SHAPES.index(shape)
            rows.insert(0, [place[0], first_colour + place[1], first_shape + place[2]])
        self.register_buffer("parts", torch.tensor(rows), persistent=False)
        self.embedding = nn.Embedding(nothing + 1, width)
        nn.init.normal_(self.embedding.weight, std=0.3)

    def forward(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        return self.embedding(self.parts[y]).sum(1).to(dtype)

    def table(self) -> Tensor:
        return self.embedding.weight.detach()[self.parts].sum(1)


def make_network() -> Any:
    """Build the paper's network with its initial values: every block starts as the identity. Labels in parts."""
    import comfy.ops

    load_pack()
    from fovea_attention.attention.dit import DiT

    network: Any = DiT(**NETWORK, classes=NULL, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    for part in network.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.view(len(part.weight), -1))
            _zero(part.bias)
    for layer in (network.t_embedder.mlp[0], network.t_embedder.mlp[2]):
        nn.init.normal_(layer.weight, std=0.02)
    for modulation in (*(block.adaLN_modulation[-1] for block in network.blocks), network.final_layer.adaLN_modulation[-1]):
        _zero(modulation.weight)
    _zero(network.final_layer.linear.weight)
    network.y_embedder = PartedLabels(NETWORK["width"])
    return network


def _zero(weight: Tensor | None) -> None:
    if weight is not None:
        nn.init.zeros_(weight)


class Pool:
    """Drawn images (uint8) with their classes; new ones replace the oldest while training goes on."""

    def __init__(self, size: int, rng: random.Random) -> None:
        self.rng = rng
        self.images = torch.empty(size, 3, 32, 32, dtype=torch.uint8)
        self.labels = torch.empty(size, dtype=torch.long)
        self.drawn = 0

    def draw(self, count: int) -> None:
        labels, scenes = zip(*(draw.sample_class(self.rng) for _ in range(count)), strict=True)
        rows = torch.arange(self.drawn, self.drawn + count) % len(self.images)
        self.images[rows] = (draw.render(scenes)[0] * 255).round().byte()
        self.labels[rows] = torch.tensor(labels)
        self.drawn += count

    def batch(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Draw random images [B, 3, 32, 32] in -1..1, half of them mirrored, and classes [B], some of them the null class."""
        rows = torch.randint(min(self.drawn, len(self.images)), (count,))
        images, labels = self.images[rows].to(device).float() / 127.5 - 1, self.labels[rows].to(device)
        images = torch.where(torch.rand(count, device=device)[:, None, None, None] < 0.5, images.flip(3), images)
        return images, torch.where(torch.rand(count, device=device) < LABEL_DROPOUT, NULL, labels)


class Trainer:
    """The network, its optimiser and its averaged weights."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        from scenes.network import use_plain_attention

        if device.type == "cpu":
            use_plain_attention()
        self.args, self.device = args, device
        self.network = make_network()
        state = torch.load(args.resume, map_location="cpu", weights_only=True) if args.resume else {}
        if state:
            self.network.load_state_dict(state["raw"])
        self.network.to(device)
        self.optimiser = AveragedAdamW(self.network.parameters(), args.lr)
        self.totals = {key: state.get(key, 0) for key in ("steps", "samples", "seconds")}
        if state:
            self.optimiser.resume(state["optimiser"], state["average"])

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the squared error of the velocity, more often where shapes are decided (logit-normal times)."""
        count = len(images)
        quantile = (torch.arange(count, device=self.device) + torch.rand(count, device=self.device)) / count
        sigma = torch.sigmoid(0.4 + torch.special.ndtri(quantile.clamp(1e-4, 1 - 1e-4)))
        level, gauss = sigma[:, None, None, None], torch.randn_like(images)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            velocity = self.network((1 - level) * images + level * gauss, 1 - sigma, labels)
        return nn.functional.mse_loss(velocity.float(), images - gauss)

    def step(self, progress: float) -> None:
        self.totals["steps"] += 1
        self.totals["samples"] += self.args.batch
        self.optimiser.step(progress, self.totals["steps"])

    def save(self, seconds: float) -> dict[str, float]:
        """Save everything needed to go on; returns the totals."""
        totals = {**self.totals, "seconds": self.totals["seconds"] + seconds}
        raw = {name: value.cpu() for name, value in self.network.state_dict().items()}
        average = [value.cpu() for value in self.optimiser.average]
        partial = self.args.out.with_suffix(".part")
        torch.save({"raw": raw, "average": average, "optimiser": self.optimiser.adamw.state_dict(), **totals}, partial)
        os.replace(partial, self.args.out)
        return totals


def train(args: argparse.Namespace) -> None:
    """Run until the time budget is spent; the learning rate follows the clock, not the step count."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
        torch.set_flush_denormal(True)
    trainer = Trainer(args, device)
    seed = args.seed + trainer.totals["steps"]  # a resumed run sees new scenes
    torch.manual_seed(seed)
    pool = Pool(30000, random.Random(seed))
    pool.draw(16 * args.batch)
    started = logged = saved = before = time.monotonic()
    trained = 0.0
    losses: list[float] = []
    progress, step = 0.0, 0
    while progress < 1:
        pool.draw(args.batch // 2)
        loss = trainer.loss(*pool.batch(args.batch, device))
        loss.backward()
        step += 1
        trainer.step(progress)
        losses.append(loss.item())
        now = time.monotonic()
        trained, before = trained + min(now - before, LONGEST_STEP), now
        progress = trained / (args.minutes * 60)
        if now - logged > LOG_EVERY:
            mean, speed = sum(losses) / len(losses), len(losses) * args.batch / (now - logged)
            print(f"{now - started:6.0f} s  step {step}  loss {mean:.4f}  {speed:.0f} images/s", flush=True)
            logged, losses = now, []
        if now - saved > SAVE_EVERY:
            trainer.save(now - started)
            saved = now
    print(f"{trainer.save(time.monotonic() - started)} -> {args.out}")


def export(state_file: Path, out: Path) -> None:
    """Export the averaged weights as a bare DiT in fp16, for the pack's loader."""
    network, state = make_network(), torch.load(state_file, map_location="cpu", weights_only=True)
    for parameter, average in zip(network.parameters(), state["average"], strict=True):
        parameter.detach().copy_(average)
    weights = {name: value for name, value in network.state_dict().items() if not name.startswith("y_embedder.")}
    weights["y_embedder.embedding_table.weight"] = network.y_embedder.table()
    about = {
        "format": "pt",
        "title": "Fovea Scenes DiT",
        "license": "GPL-3.0-or-later",
        "prediction": "velocity",
        "steps": str(state["steps"]),
        "classes": json.dumps(draw.CLASSES),
    }
    partial = out.with_suffix(".part")
    partial.write_bytes(save({name: value.half().contiguous() for name, value in weights.items()}, metadata=about))
    os.replace(partial, out)
    print(f"{out}: {len(weights)} tensors, {out.stat().st_size:,} bytes, {state['steps']} steps, {state['samples']} samples")


def main(argv: list[str] | None = None) -> None:
    """Run the trainer."""
    parser = argparse.ArgumentParser(prog="scenes.train_dit", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=90.0, help="wall time to train (0: only export)")
    parser.add_argument("--resume", type=Path, help="state to start from")
    parser.add_argument("--out", type=Path, default=STATE, help="where the state is saved")
    parser.add_argument("--export", type=Path, default=CHECKPOINT, help="the file to write at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--batch", type=int, default=0, help="images per step (default: 64, on a GPU 512)")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--comfyui", help="ComfyUI folder (default: $COMFYUI_PATH)")
    args = parser.parse_args(argv)
    start_host(args.comfyui)
    args.batch = args.batch or (512 if torch.cuda.is_available() else 64)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.minutes:
        train(args)
    export(args.out, args.export)


if __name__ == "__main__":
    main()
