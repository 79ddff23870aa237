"""Train the embedded text-to-image model on drawn scenes, from nothing or from a saved state.

    cd dev && COMFYUI_PATH=... python -m scenes.train --minutes 60 [--resume STATE] [--seed N] [--out STATE]

On a CPU: single-thread workers with averaged gradients, float32. On a CUDA GPU: one process, bfloat16, a bigger batch.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import time
from pathlib import Path

import torch
from host_inprocess import ROOT, start_host
from torch import Tensor, nn

from scenes import draw
from scenes.optimise import AveragedAdamW

STATE = ROOT / ".fovea" / "scenes-train.pt"
CAPTION_DROPOUT = 0.1
SAVE_EVERY, LOG_EVERY = 180.0, 30.0  # seconds


class Pool:
    """Drawn images (uint8) with token ids; new ones replace the oldest while training goes on."""

    def __init__(self, size: int, tokens, rng: random.Random) -> None:
        self.tokens, self.rng = tokens, rng
        self.images = torch.empty(size, 3, 32, 32, dtype=torch.uint8)
        self.ids = torch.empty(size, 77, dtype=torch.int32)
        self.drawn = 0

    def draw(self, count: int) -> None:
        scenes = [draw.sample(self.rng) for _ in range(count)]
        images, _ = draw.render(scenes)
        rows = torch.arange(self.drawn, self.drawn + count) % len(self.images)
        self.images[rows] = (images * 255).round().byte()
        self.ids[rows] = self.tokens(scene.caption for scene in scenes).int()
        self.drawn += count

    def batch(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Draw random images [B, 3, 32, 32] in -1..1, half of them mirrored, and ids [B, 77], some of them emptied."""
        rows = torch.randint(min(self.drawn, len(self.images)), (count,))
        images, ids = self.images[rows].to(device).float() / 127.5 - 1, self.ids[rows].long()
        images = torch.where(torch.rand(count, device=device)[:, None, None, None] < 0.5, images.flip(3), images)
        return images, torch.where(torch.rand(count, 1) < CAPTION_DROPOUT, self.tokens([""]), ids).to(device)


class Noise:
    """Noise levels and targets of v-prediction, drawn more often where shapes are decided (sigma around 1 to 2)."""

    def __init__(self, alphas_cumprod: Tensor, device: torch.device) -> None:
        self.signal = alphas_cumprod.sqrt().float().to(device)
        self.noise = (1 - alphas_cumprod).sqrt().float().to(device)
        log_sigma = (self.noise / self.signal).log()
        self.cumulative = (1 + 1.5 * torch.exp(-0.5 * ((log_sigma - 0.5) / 1.0) ** 2)).cumsum(0)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return noisy images, timesteps [B] and targets v = signal * noise - noise_level * image."""
        count = len(images)
        strata = (torch.arange(count, device=images.device) + torch.rand(count, device=images.device)) / count
        steps = torch.searchsorted(self.cumulative, strata * self.cumulative[-1]).clamp(max=len(self.signal) - 1)
        signal, noise = self.signal[steps][:, None, None, None], self.noise[steps][:, None, None, None]
        gauss = torch.randn_like(images)
        return signal * images + noise * gauss, steps.float(), signal * gauss - noise * images


class GradientMean:
    """Averages the gradients of forked workers through shared memory; worker 0 also sets the pace for all."""

    def __init__(self, parameters: list[nn.Parameter], workers: int) -> None:
        self.parameters, self.workers = parameters, workers
        self.flat = torch.zeros(workers, sum(p.numel() for p in parameters)).share_memory_()
        self.progress = torch.zeros(1, dtype=torch.float64).share_memory_()
        self.barrier = multiprocessing.get_context("fork").Barrier(workers)

    def __call__(self, rank: int, progress: float) -> float:
        """Average in place; returns worker 0's progress (share of the time budget) so that all agree on it."""
        if self.workers == 1:
            return progress
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        torch.cat([gradient.flatten() for gradient in gradients], out=self.flat[rank])
        if rank == 0:
            self.progress[0] = progress
        self.barrier.wait(600)
        mean, progress = self.flat.mean(0), self.progress.item()
        self.barrier.wait(600)  # nobody writes the next gradients before everybody has read these
        for gradient, part in zip(gradients, mean.split([p.numel() for p in self.parameters]), strict=True):
            gradient.copy_(part.view_as(gradient))
        return progress


class Trainer:
    """Networks, optimiser and averaged weights, and how they are saved."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        from scenes import network

        self.args, self.device = args, device
        self.tokens = network.CaptionTokens()
        if device.type == "cpu":
            network.use_plain_attention()
        self.unet = network.make_unet()
        self.text = network.TextEncoder(self.tokens.vocabulary)
        self.noise = Noise(network.alphas_cumprod(), device)
        state = torch.load(args.resume, map_location="cpu", weights_only=True) if args.resume else {}
        weights = state.get("raw", state)
        if weights:
            self.unet.load_state_dict(weights["unet"])
            self.text.load_words(weights["text"], state["vocabulary"])
        self.unet.to(device)
        self.text.to(device)
        self.modules = {"unet": self.unet, "text": self.text}
        self.optimiser = AveragedAdamW([*self.unet.parameters(), *self.text.parameters()], args.lr)
        self.totals = {key: state.get(key, 0) for key in ("steps", "samples", "seconds")}
        if "optimiser" in state and list(state["vocabulary"]) == self.tokens.vocabulary:
            averaged = [state[kind][name] for kind, module in self.modules.items() for name, _ in module.named_parameters()]
            self.optimiser.resume(state["optimiser"], averaged)

    def loss(self, images: Tensor, ids: Tensor) -> Tensor:
        noisy, steps, target = self.noise(images)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            prediction = self.unet(noisy, timesteps=steps, context=self.text(ids))
        return nn.functional.mse_loss(prediction.float(), target)

    def save(self, seconds: float) -> dict[str, float]:
        """Save averaged weights at the top level (what the export reads), with what it needs to go on; returns totals."""
        raw = {kind: {k: v.cpu().clone() for k, v in module.state_dict().items()} for kind, module in self.modules.items()}
        averages = iter(self.optimiser.average)
        averaged = {
            kind: weights | {name: next(averages).cpu() for name, _ in self.modules[kind].named_parameters()}
            for kind, weights in raw.items()
        }
        totals = {**self.totals, "seconds": self.totals["seconds"] + seconds}
        state = {
            **averaged,
            "raw": raw,
            "optimiser": self.optimiser.adamw.state_dict(),
            "vocabulary": self.tokens.vocabulary,
            **totals,
        }
        partial = self.args.out.with_suffix(".part")
        torch.save(state, partial)
        os.replace(partial, self.args.out)
        return totals


def train(args: argparse.Namespace) -> None:
    """Run until the time budget is spent; the learning rate follows the clock, not the step count."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workers = args.workers if device.type == "cpu" else 1
    if device.type == "cpu":
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    trainer = Trainer(args, device)
    mean = GradientMean(trainer.optimiser.parameters, workers)
    rank = next((r for r in range(1, workers) if os.fork() == 0), 0)
    seed = args.seed * 1000 + trainer.totals["steps"] * 10 + rank  # a resumed run sees new scenes
    torch.manual_seed(seed)
    pool = Pool(30000, trainer.tokens, random.Random(seed))
    pool.draw(8 * args.batch)

    started = logged = saved = time.monotonic()
    losses: list[float] = []
    progress, step = 0.0, 0
    while progress < 1:
        pool.draw(args.batch // 2)
        loss = trainer.loss(*pool.batch(args.batch, device))
        loss.backward()
        progress = mean(rank, (time.monotonic() - started) / (args.minutes * 60))
        step += 1
        trainer.totals["steps"] += 1
        trainer.totals["samples"] += args.batch * workers
        trainer.optimiser.step(progress, trainer.totals["steps"])
        losses.append(loss.item())
        now = time.monotonic()
        if rank == 0 and now - logged > LOG_EVERY:
            speed = len(losses) * args.batch * workers / (now - logged)
            mean_loss = sum(losses) / len(losses)
            print(f"{now - started:6.0f} s  step {step}  loss {mean_loss:.4f}  {speed:.0f} images/s", flush=True)
            logged, losses = now, []
        if rank == 0 and now - saved > SAVE_EVERY:
            trainer.save(now - started)
            saved = now
    if rank:
        os._exit(0)
    print(f"{trainer.save(time.monotonic() - started)} -> {args.out}")


def main(argv: list[str] | None = None) -> None:
    """Run the trainer."""
    parser = argparse.ArgumentParser(prog="scenes.train", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="wall time to train")
    parser.add_argument("--resume", type=Path, help="state to start from")
    parser.add_argument("--out", type=Path, default=STATE, help="where the state is saved")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=8e-4, help="peak learning rate")
    parser.add_argument("--batch", type=int, default=0, help="images per worker and step (default: 32, on a GPU 512)")
    parser.add_argument("--workers", type=int, default=2, help="processes on a CPU")
    parser.add_argument("--comfyui", help="ComfyUI folder (default: $COMFYUI_PATH)")
    args = parser.parse_args(argv)
    start_host(args.comfyui)
    args.batch = args.batch or (512 if torch.cuda.is_available() else 32)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
