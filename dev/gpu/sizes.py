"""Sampling at the sizes that artists use, random weights: T-GATE and captured maps beside plain sampling."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from bench.measure import memory_name, multiply_accumulates, ratios, table, take_turns
from bench.models import PIXART, SD15, SDXL, WAN, Shape, Target, host_network, precision_of, sampler, tiny
from host_inprocess import pack_nodes

PAIRS = 2
PLAIN, GATED, CAPTURED = "plain", "T-GATE", "maps captured"


@dataclass(frozen=True)
class Size:
    """What is sampled: pixels of the side, images together, frames of the latent (0: an image), and steps of a run."""

    shape: Shape
    side: int
    batch: int = 1
    frames: int = 0
    steps: int = 10

    def latent(self) -> torch.Tensor:
        frames, channels = ((self.frames,), 16) if self.frames else ((), 4)
        return torch.zeros(self.batch, channels, *frames, self.side // 8, self.side // 8)

    def as_trial(self) -> Size:
        return replace(self, shape=tiny(self.shape), side=self.shape.side(64), frames=min(self.frames, 2), steps=3)


SIZES = {
    "sd15": Size(SD15, 512, steps=15),
    "sdxl": Size(SDXL, 1024),
    "sdxl-batch": Size(SDXL, 1024, batch=4, steps=6),
    "pixart": Size(PIXART, 512),
    "wan": Size(WAN, 480, frames=9, steps=6),
}


def report(size: Size, *, tiny: bool = False) -> str:
    """Return a table of seconds and memory; time is that of the device where it has events."""
    target = Target.here()
    size = size.as_trial() if tiny else size
    model = host_network(size.shape, target)
    nodes = pack_nodes()
    models = {
        PLAIN: model,
        GATED: nodes["TGateCache"].execute(model)[0],
        CAPTURED: nodes["AttnMapCapture"].execute(model)[0],
    }
    latent, shape = size.latent(), size.shape
    runs = {name: sampler(each, size.steps, latent, shape.context, shape.pooled) for name, each in models.items()}
    bound = multiply_accumulates(runs[PLAIN]) / multiply_accumulates(runs[GATED])
    pairs = 1 if tiny else PAIRS
    timings = take_turns(runs, pairs, say=lambda _: None, memory=True)
    rows = []
    for name, timing in timings.items():
        middle, low, high = ratios(timings[PLAIN], timing)
        of_bound = f"{bound:.2f}, {100 * middle / bound:.0f} %" if name == GATED else ""
        seconds, peak = f"{timing.median:.2f} s", f"{timing.peak_bytes / 2**20:.0f}"
        rows.append((name, seconds, f"{middle:.2f} ({low:.2f} to {high:.2f})", of_bound, peak))
    frames = f", {size.frames} frames of the latent" if size.frames else ""
    title = f"{shape.title}, {size.side} px{frames}, {size.batch} at a time, {size.steps} steps, {precision_of(model)}"
    header = ("variant", "run", "times as fast as plain", "bound by operations, reached",
              f"peak rise ({memory_name(target.device)}), MiB")  # fmt: skip
    return f"{title}. Medians of {pairs} turns (lowest to highest).\n\n{table(header, rows)}"
