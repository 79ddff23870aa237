"""Build the U-Net in plain torch: the maths and key names of ComfyUI's UNetModel, which the trainers' machine need not have."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emoji.layout import layout


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    half = width // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angles = timesteps[:, None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


class ResBlock(nn.Module):
    def __init__(self, channels: int, embedding: int, out: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, out), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(out, out, 3, padding=1))
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.in_layers(x)
        h = h + self.emb_layers(embedding).to(h.dtype)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(of, width, bias=False) for of in (width, context, context))
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, -1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, width * 4), nn.Dropout(0.0), nn.Linear(width * 4, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(width, width, heads), Attention(width, context, heads)
        self.ff = FeedForward(width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        own = self.norm1(x)
        x = x + self.attn1(own, own)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, channels: int, context: int, heads: int, depth: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, context, heads) for _ in range(depth))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            y = block(y, context)
        return x + self.proj_out(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _run(parts: nn.Module, h: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
    for part in parts.children():
        if isinstance(part, ResBlock):
            h = part(h, embedding)
        else:
            h = part(h, context) if isinstance(part, SpatialTransformer) else part(h)
    return h


class UNet(nn.Module):
    """Build LDM's U-Net in the layout's size, level by level; every residual branch starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        sizes = layout.UNET_DECLARED
        width, latent = layout.UNET_DETECTED["model_channels"], layout.UNET_DETECTED["in_channels"]
        mults, blocks, last = sizes["channel_mult"], sizes["num_res_blocks"], len(sizes["channel_mult"]) - 1
        depth_in, depth_out = iter(sizes["transformer_depth"]), iter(reversed(sizes["transformer_depth_output"]))
        self.width, self.embedding = width, width * 4
        self.time_embed = nn.Sequential(nn.Linear(width, self.embedding), nn.SiLU(), nn.Linear(self.embedding, self.embedding))
        self.input_blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(latent, width, 3, padding=1))])
        channels, kept = width, [width]
        for level, mult in enumerate(mults):
            for _ in range(blocks[level]):
                self.input_blocks.append(self._level(channels, mult * width, next(depth_in)))
                channels = mult * width
                kept.append(channels)
            if level < last:
                self.input_blocks.append(nn.Sequential(Downsample(channels)))
                kept.append(channels)
        middle = self._level(channels, channels, sizes["transformer_depth_middle"])
        self.middle_block = middle.append(ResBlock(channels, self.embedding, channels))
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            for number in range(blocks[level] + 1):
                parts = self._level(channels + kept.pop(), mult * width, next(depth_out))
                channels = mult * width
                if level and number == blocks[level]:
                    parts.append(Upsample(channels))
                self.output_blocks.append(parts)
        self.out = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(width, latent, 3, padding=1))
        for name, part in self.named_modules():
            if isinstance(part, nn.Conv2d) and (name.endswith(("out_layers.3", "proj_out")) or name == "out.2"):
                nn.init.zeros_(part.weight)
                assert part.bias is not None
                nn.init.zeros_(part.bias)

    def _level(self, channels: int, out: int, depth: int) -> nn.Sequential:
        parts: list[nn.Module] = [ResBlock(channels, self.embedding, out)]
        if depth:
            heads = layout.UNET_DECLARED["num_heads"]
            parts.append(SpatialTransformer(out, layout.UNET_DETECTED["context_dim"], heads, depth))
        return nn.Sequential(*parts)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """Return v [B, 4, H, W] of noisy latents, timesteps [B] and encoded prompts [B, 77, 256]."""
        embedding = self.time_embed(timestep_embedding(timesteps, self.width).to(x.dtype))
        h, kept = x, []
        for parts in self.input_blocks:
            h = _run(parts, h, embedding, context)
            kept.append(h)
        h = _run(self.middle_block, h, embedding, context)
        for parts in self.output_blocks:
            h = _run(parts, torch.cat([h, kept.pop()], 1), embedding, context)
        return self.out(h)
