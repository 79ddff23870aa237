"""A tiny random DiT, its files in every layout, and the paper's formulas written a second time."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import families.dit
import host_inprocess
import pytest
import torch
import torch.nn.functional as F
from families.dit import TINY, tiny  # noqa: F401 (for the tests)
from safetensors.torch import save_file

host_inprocess.load_pack()

from fovea_attention.attention import networks as sites  # noqa: E402, F401 (for the tests)
from fovea_attention.attention.dit import checkpoint as dit_files  # noqa: E402, F401 (for the tests)
from fovea_attention.attention.dit import diffusers_keys as dit_diffusers  # noqa: E402, F401 (for the tests)
from fovea_attention.attention.dit import embeddings as dit_embeddings  # noqa: E402, F401 (for the tests)
from fovea_attention.attention.dit import labels as dit_labels  # noqa: E402, F401 (for the tests)
from fovea_attention.attention.dit import model as dit_host  # noqa: E402, F401 (for the tests)
from fovea_attention.attention.dit import network as dit  # noqa: E402, F401 (for the tests)
from fovea_attention.attention.dit import sampler as dit_sampling  # noqa: E402, F401 (for the tests)

DiT = dit.DiT
from fovea_attention.attention.dit import load_dit  # noqa: E402, F401

Weights = dict[str, torch.Tensor]

GRID = 4


def bare(network: DiT, grid: int = GRID) -> Weights:
    """The published layout, with its table of positions."""
    return {**network.state_dict(), "pos_embed": sincos(grid, grid, network.width)[None]}


def inputs(height: int = 8, width: int = 8, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A latent, timesteps and class labels; the last is the null class."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, 4, height, width, generator=generator), torch.tensor([0, 417, 999]), torch.tensor([207, 0, 1000])


def diffusers_network(seed: int = 0) -> Any:
    """Build diffusers' own tiny network."""
    pytest.importorskip("diffusers", reason="an older Python, for which there is none")
    return families.dit.diffusers_network(seed)


def write(path: Path, content: Any) -> str:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)
    return str(path)


def training_file(weights: Weights, **arguments: Any) -> dict[str, Any]:
    """What the authors' training script saves: averaged weights beside the last ones, an optimizer, and its command line."""
    last = {name: tensor + 1 for name, tensor in weights.items()}
    optimizer = {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}
    return {
        "model": last,
        "ema": weights,
        "opt": optimizer,
        "args": argparse.Namespace(model="DiT-B/2", epochs=1400, **arguments),
    }


# --- the paper's formulas ---------------------------------------------------------------------------------------------


def sincos(height: int, width: int, channels: int) -> torch.Tensor:
    """(height * width, channels), one token after the other."""
    table = torch.zeros(height, width, channels, dtype=torch.float64)
    quarter = channels // 4
    for row in range(height):
        for column in range(width):
            for k in range(quarter):
                omega = 10000 ** (-k / quarter)
                table[row, column, k] = math.sin(column * omega)
                table[row, column, quarter + k] = math.cos(column * omega)
                table[row, column, 2 * quarter + k] = math.sin(row * omega)
                table[row, column, 3 * quarter + k] = math.cos(row * omega)
    return table.reshape(height * width, channels).float()


def forward(w: Weights, heads: int, patch: int, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The network of any of the four designs, from its weights alone."""
    batch, channels, height, width = x.shape
    h, q = height // patch, width // patch

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return F.linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, value: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(value, value.shape[-1:], w.get(f"{name}.weight"), w.get(f"{name}.bias"), 1e-6)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
        weights = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1)
        return (weights @ value).transpose(1, 2).flatten(2)

    def self_attention(name: str, value: torch.Tensor) -> torch.Tensor:
        return linear(f"{name}.proj", attend(*linear(f"{name}.qkv", value).chunk(3, -1)))

    def mlp(name: str, value: torch.Tensor) -> torch.Tensor:
        return linear(f"{name}.fc2", F.gelu(linear(f"{name}.fc1", value), approximate="tanh"))

    def adapted(value: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return value * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    patches = x.reshape(batch, channels, h, patch, q, patch).permute(0, 2, 4, 1, 3, 5).reshape(batch, h * q, -1)
    kernel = w["x_embedder.proj.weight"].flatten(1)
    tokens = F.linear(patches, kernel, w["x_embedder.proj.bias"]) + sincos(h, q, kernel.shape[0])
    frequencies = torch.exp(-math.log(1e4) * torch.arange(128) / 128)
    angles = t[:, None].float() * frequencies
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], -1))))
    label = w["y_embedder.embedding_table.weight"][y]
    c = time + label

    adaptive = "blocks.0.adaLN_modulation.1.weight" in w
    crossed = "blocks.0.cross_attn.q.weight" in w
    if not adaptive and not crossed:
        tokens = torch.cat([tokens, time[:, None], label[:, None]], 1)
    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    for index in range(depth):
        block = f"blocks.{index}"
        first, second = norm(f"{block}.norm1", tokens), None
        one = torch.ones(batch, tokens.shape[-1])
        gates = one, one
        if adaptive:
            parts = linear(f"{block}.adaLN_modulation.1", F.silu(c)).chunk(
                w[f"{block}.adaLN_modulation.1.bias"].numel() // c.shape[1], -1
            )
            if len(parts) == 6:
                first, second, gates = adapted(first, *parts[0:2]), parts[3:5], (parts[2], parts[5])
            else:
                first, second = adapted(first, *parts[0:2]), parts[2:4]
        tokens = tokens + gates[0].unsqueeze(1) * self_attention(f"{block}.attn", first)
        if crossed:
            key, value = linear(f"{block}.cross_attn.kv", torch.stack([time, label], 1)).chunk(2, -1)
            query = linear(f"{block}.cross_attn.q", norm(f"{block}.norm_cross", tokens))
            tokens = tokens + linear(f"{block}.cross_attn.proj", attend(query, key, value))
        again = norm(f"{block}.norm2", tokens)
        tokens = tokens + gates[1].unsqueeze(1) * mlp(f"{block}.mlp", adapted(again, *second) if second else again)
    tokens = norm("final_layer.norm_final", tokens[:, : h * q])
    if adaptive:
        tokens = adapted(tokens, *linear("final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, -1))
    out = linear("final_layer.linear", tokens)
    out = out.reshape(batch, h, q, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(batch, -1, height, width)


class Published:
    """Sampling as published: 1000 steps, betas linear from 1e-4 to 0.02, a part of the steps used, three channels guided."""

    def __init__(self, timesteps: list[int], predict: Callable[..., torch.Tensor], cfg: float, guided: int = 3) -> None:
        betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
        self.alpha_bars = torch.cumprod(1 - betas, 0)
        self.timesteps = timesteps
        self.predict = predict
        self.cfg = cfg
        self.guided = guided

    def _prediction(self, x: torch.Tensor, t: int, labels: torch.Tensor, null: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise after guidance, and the variance that the conditional half says."""
        times = torch.full((len(x),), t)
        cond, uncond = self.predict(x, times, labels), self.predict(x, times, torch.full_like(labels, null))
        eps = uncond[:, :4] + self.cfg * (cond[:, :4] - uncond[:, :4])
        eps[:, self.guided :] = cond[:, self.guided : 4]
        return eps, cond[:, 4:]

    def _pairs(self) -> list[tuple[int, float, float]]:
        bars = [float(self.alpha_bars[t]) for t in self.timesteps]
        return list(zip(self.timesteps, bars, [*bars[1:], 1.0], strict=True))

    def ddim(self, x: torch.Tensor, labels: torch.Tensor, null: int) -> torch.Tensor:
        for t, bar, following in self._pairs():
            eps, _ = self._prediction(x, t, labels, null)
            clean = (x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
            x = math.sqrt(following) * clean + math.sqrt(1 - following) * eps
        return x

    def ddpm(self, x: torch.Tensor, labels: torch.Tensor, null: int, noises: list[torch.Tensor]) -> torch.Tensor:
        for index, (t, bar, following) in enumerate(self._pairs()):
            eps, v = self._prediction(x, t, labels, null)
            beta = 1 - bar / following
            clean = (x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
            mean = beta * math.sqrt(following) / (1 - bar) * clean
            mean = mean + (1 - following) * math.sqrt(1 - beta) / (1 - bar) * x
            if following == 1.0:
                return mean
            largest, smallest = math.log(beta), math.log(beta * (1 - following) / (1 - bar))
            log_variance = (v + 1) / 2 * largest + (1 - v) / 2 * smallest
            x = mean + torch.exp(log_variance / 2) * noises[index]
        raise AssertionError("the last step ends at the image")


def spaced(count: int) -> list[int]:
    """``count`` of 1000 timesteps with the first and the last among them, largest first."""
    return [round(index * 999 / (count - 1)) for index in reversed(range(count))]


# --- on ComfyUI ----------------------------------------------------------------------------------------------------------


def labels(*indices: int) -> list[list[Any]]:
    return dit_labels.label_conditioning(list(indices))


def latent(height: int = 2 * GRID, width: int = 2 * GRID, batch: int = 1, channels: int = 4) -> torch.Tensor:
    return torch.zeros(batch, channels, height, width)


def sample(
    model: Any,
    positive: list[list[Any]] | None = None,
    negative: list[list[Any]] | None = None,
    *,
    steps: int = 4,
    cfg: float = 4.0,
    sampler: str = "euler",
    scheduler: str = "normal",
    start: torch.Tensor | None = None,
    seed: int = 3,
    **options: Any,
) -> torch.Tensor:
    """What the KSampler node does, under the executor's inference mode."""
    start = latent() if start is None else start
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, scheduler, positive or labels(207), negative or labels(-1), start,
            seed=seed, disable_pbar=True, **options,
        )  # fmt: skip


def sample_custom(
    model: Any, sampler: Any, sigmas: torch.Tensor, noise: torch.Tensor, positive: Any, negative: Any, cfg: float
) -> torch.Tensor:
    """SamplerCustom on an empty latent; the result is the network's latent, not the decoder's."""
    with torch.inference_mode():
        result = comfy.sample.sample_custom(
            model, noise, cfg, sampler, sigmas, positive, negative, torch.zeros_like(noise), disable_pbar=True, seed=0
        )
    return model.model.latent_format.process_in(result)
