"""Build text encoder and U-Net together, the noise they are trained on and a sampler, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emoji.chance import Chance
from emoji.device import autocast, channels_last
from emoji.layout import layout
from emoji.unet import UNet


class TextLayer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x: Tensor) -> Tensor:
        normed = self.layer_norm1(x)
        names = ("q_proj", "k_proj", "v_proj")
        q, k, v = (self.self_attn[name](normed).unflatten(2, (self.heads, -1)).transpose(1, 2) for name in names)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.self_attn["out_proj"](attended.transpose(1, 2).flatten(2))
        hidden = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](hidden * torch.sigmoid(1.702 * hidden))


class TextEncoder(nn.Module):
    """Encode prompts with the maths and key names of ComfyUI's CLIP text model, on the known words only."""

    def __init__(self, words: int) -> None:
        super().__init__()
        width, sizes = layout.TEXT_WIDTH, layout.TEXT
        tokens, positions = nn.Embedding(words, width), nn.Embedding(layout.TOKENS, width)
        nn.init.normal_(tokens.weight, std=0.5)
        nn.init.normal_(positions.weight, std=0.1)
        self.embeddings = nn.ModuleDict({"token_embedding": tokens, "position_embedding": positions})
        shape = (width, sizes["num_attention_heads"], sizes["intermediate_size"])
        layers = nn.ModuleList(TextLayer(*shape) for _ in range(sizes["num_hidden_layers"]))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, rows: Tensor) -> Tensor:
        """Encode rows of the vocabulary [B, 77] as conditioning [B, 77, 256]."""
        x = self.embeddings["token_embedding"](rows) + self.embeddings["position_embedding"](
            torch.arange(rows.shape[1], device=rows.device)
        )
        for layer in self.encoder["layers"].children():
            x = layer(x)
        return self.final_layer_norm(x)


class Model(nn.Module):
    """Join U-Net and text encoder: one graph to compile."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.unet, self.text = UNet(), TextEncoder(words)

    def forward(self, noisy: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
        return self.unet(noisy, timesteps, self.text(rows))


def alphas_cumprod() -> Tensor:
    """Return the signal's share by timestep [1000], float64."""
    betas = torch.linspace(layout.BETA_START**0.5, layout.BETA_END**0.5, layout.TIMESTEPS, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


class Noise:
    """Draw noise levels and targets of v-prediction, more often where the image is decided (sigma around 1 to 2)."""

    def __init__(self, device: torch.device) -> None:
        share = alphas_cumprod()
        self.signal, self.noise = (part.sqrt().float().to(device) for part in (share, 1 - share))
        log_sigma = (self.noise / self.signal).log()
        self.cumulative = (1 + 1.5 * torch.exp(-0.5 * (log_sigma - 0.4) ** 2)).cumsum(0)

    def __call__(self, latents: Tensor, chance: Chance) -> tuple[Tensor, Tensor, Tensor]:
        """Return noisy latents, timesteps [B] and targets v = signal * noise - noise level * latent."""
        n = len(latents)
        strata = (torch.arange(n, device=latents.device) + chance.uniform(n)) / n
        steps = torch.searchsorted(self.cumulative, strata * self.cumulative[-1]).clamp(max=len(self.signal) - 1)
        signal, noise = self.signal[steps][:, None, None, None], self.noise[steps][:, None, None, None]
        gauss = chance.normal(*latents.shape)
        noisy, target = signal * latents + noise * gauss, signal * gauss - noise * latents
        return channels_last(noisy), steps.float(), channels_last(target)


@torch.no_grad()
def sample(
    model: Model, rows: Tensor, empty: Tensor, *, steps: int = 25, cfg: float = 5.0, noise: Tensor | None = None, seed: int = 0
) -> Tensor:
    """Sample latents [B, 4, 32, 32] as ComfyUI does: ``euler`` on the scheduler ``normal``.

    ``rows`` [B, 77] are prompts, ``empty`` [1, 77] the negative one. Unless given, ``noise`` is drawn from ``seed`` on the CPU.
    """
    n, device = len(rows), rows.device
    sigmas = ((1 - alphas_cumprod()) / alphas_cumprod()).sqrt().log()
    times = torch.linspace(layout.TIMESTEPS - 1, 0, steps, dtype=torch.float64)
    below = times.floor().long()
    above = (below + 1).clamp(max=layout.TIMESTEPS - 1)
    levels = [*(sigmas[below] + (sigmas[above] - sigmas[below]) * (times - below)).exp().tolist(), 0.0]
    if noise is None:
        shape = (n, layout.LATENT_CHANNELS, layout.LATENT, layout.LATENT)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x = noise.to(device) * (1 + levels[0] ** 2) ** 0.5
    with autocast(device):
        context = model.text(torch.cat([rows, empty.expand(n, -1)]))
        for time, level, following in zip(times.tolist(), levels, levels[1:], strict=False):
            scale = (level * level + 1) ** 0.5
            timesteps = torch.full((2 * n,), time, device=device)
            v = model.unet(torch.cat([x, x]) / scale, timesteps, context).float().unflatten(0, (2, n))
            positive, negative = (x / scale**2 - part * (level / scale) for part in v)
            denoised = negative + cfg * (positive - negative)
            x = denoised + (x - denoised) * (following / level)
    return x
