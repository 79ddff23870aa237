"""Build the VAE in plain torch, under the key names of ComfyUI's TAESD. Images and decoded images are in 0..1."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from emoji.device import autocast, channels_last
from emoji.layout import layout

WIDTH = 64
# Blocks (by position) that work; the others are zeros. Left out is most of what works at or near the size of whole images, which
# would more than double the arithmetic of training. ComfyUI computes every block: no choice here changes how fast it decodes.
ENCODER_BLOCKS, DECODER_BLOCKS = (3, 7, 8, 11, 12, 13), (3, 4, 5, 8, 9, 10, 13, 14, 15)


def _conv(channels: int, out: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=bias)


class _Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH))
        self.skip, self.fuse, self.idle = nn.Identity(), nn.ReLU(), False

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(x) if self.idle else self.fuse(self.conv(x) + x)

    @torch.no_grad()
    def start(self, idle: bool) -> None:
        """Start by adding nothing; an idle block is zeros for good."""
        self.idle = idle
        parts = [part for part in self.conv if isinstance(part, nn.Conv2d)]
        for part in parts if idle else parts[-1:]:
            for parameter in part.parameters():
                parameter.zero_()
        self.requires_grad_(not idle)


def _encoder() -> nn.Sequential:
    parts: list[nn.Module] = [_conv(3, WIDTH), _Block()]
    for _ in range(3):
        parts += [_conv(WIDTH, WIDTH, stride=2, bias=False), _Block(), _Block(), _Block()]
    return nn.Sequential(*parts, _conv(WIDTH, layout.LATENT_CHANNELS))


def _decoder() -> nn.Sequential:
    parts: list[nn.Module] = [_Clamp(), _conv(layout.LATENT_CHANNELS, WIDTH), nn.ReLU()]
    for _ in range(3):
        parts += [_Block(), _Block(), _Block(), nn.Upsample(scale_factor=2), _conv(WIDTH, WIDTH, bias=False)]
    return nn.Sequential(*parts, _Block(), _conv(WIDTH, 3))


def _convolutions(parts: Iterable[nn.Module]) -> list[nn.Conv2d]:
    return [part for part in parts if isinstance(part, nn.Conv2d)]


class Autoencoder(nn.Module):
    """Code images in TAESD's layout, with four channels at an eighth of the side."""

    def __init__(self) -> None:
        super().__init__()
        self.taesd_encoder, self.taesd_decoder = _encoder(), _decoder()
        self.vae_scale, self.vae_shift = (nn.Parameter(torch.tensor(value), requires_grad=False) for value in (1.0, 0.0))
        for part, working in ((self.taesd_encoder, ENCODER_BLOCKS), (self.taesd_decoder, DECODER_BLOCKS)):
            for position, block in enumerate(part):
                if isinstance(block, _Block):
                    block.start(position not in working)
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """Start as an area average of the colours, in the first three channels, and its smooth enlargement."""
        down, up = _convolutions(self.taesd_encoder), _convolutions(self.taesd_decoder)
        for part in (*down[1:-1], *up[1:-1]):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
        for part in (*down[:-1], *up[:-1]):
            part.weight[:3] = 0
            if part.bias is not None:
                part.bias[:3] = 0
        down[-1].weight.mul_(0.3)[:3] = 0
        up[-1].weight.mul_(0.1)
        up[-1].weight[:, :3] = 0
        for bias in (down[-1].bias, up[0].bias, up[-1].bias):
            assert bias is not None
        tent = torch.tensor([0.25, 0.5, 0.25])
        for colour in range(3):
            down[0].weight[colour, colour, 1, 1] = 1
            for part in down[1:-1]:
                part.weight[colour, colour, 1:, 1:] = 0.25
            down[-1].weight[colour, colour, 1, 1] = 4.0
            down[-1].bias[colour] = -2.0  # type: ignore[index]
            up[0].weight[colour, colour, 1, 1] = 0.27
            up[0].bias[colour] = 0.5  # type: ignore[index]
            for part in up[1:-1]:
                part.weight[colour, colour] = tent[:, None] * tent
            up[-1].weight[colour, colour, 1, 1] = 1
        up[-1].bias.zero_()  # type: ignore[union-attr]

    def encode(self, images: Tensor) -> Tensor:
        """Return latents [B, 4, H / 8, W / 8] of images [B, 3, H, W]."""
        return self.taesd_encoder(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Return images [B, 3, 8H, 8W] of latents [B, 4, H, W]; somewhat below 0 and above 1 is possible."""
        return self.taesd_decoder(latents)


@torch.no_grad()
def encode(vae: Autoencoder, images: Tensor) -> Tensor:
    with autocast(images.device, torch.float16):
        return vae.encode(channels_last(images)).float()


@torch.no_grad()
def decode(vae: Autoencoder, latents: Tensor, at_once: int = 64) -> Tensor:
    """Return images in 0..1, ``at_once`` at a time: a whole batch at full size would take gigabytes."""
    with autocast(latents.device, torch.float16):
        return torch.cat([vae.decode(part).float().clamp(0, 1) for part in latents.split(at_once)])
