"""The VAE in TAESD's layout: an encoder that is an exact area average, and where the enlarging decoder starts from.

ComfyUI's own TAESD class is used (start ComfyUI first); 32 x 32 latents of RGB in -1..1 stand for 256 x 256 images.
"""

from __future__ import annotations

import torch
from comfy.taesd.taesd import TAESD, Block
from torch import Tensor, nn

from scenes.network import initialise, layout


def _zero(*parts: nn.Conv2d) -> None:
    for part in parts:
        nn.init.zeros_(part.weight)
        if part.bias is not None:
            nn.init.zeros_(part.bias)


def _bias(convolution: nn.Conv2d) -> torch.Tensor:
    if convolution.bias is None:
        raise ValueError("this layer of TAESD has a bias")
    return convolution.bias


@torch.no_grad()
def _write_encoder(encoder: nn.Sequential) -> None:
    """Write the exact 8x area average of 0..1 pixels, mapped to -1..1.

    The colours travel in the first three channels; residual blocks add nothing, and their ReLU leaves 0..1 alone. A
    stride-2 convolution with padding 1 sees rows 2i-1..2i+1, so taps 1 and 2 hold the mean of one 2 x 2 square.
    """
    _zero(*(part for part in encoder.modules() if isinstance(part, nn.Conv2d)))
    convolutions = [part for part in encoder if isinstance(part, nn.Conv2d)]
    for colour in range(3):
        convolutions[0].weight[colour, colour, 1, 1] = 1.0
        for down in convolutions[1:-1]:
            down.weight[colour, colour, 1:, 1:] = 0.25
        convolutions[-1].weight[colour, colour, 1, 1] = 2.0
    nn.init.constant_(_bias(convolutions[-1]), -1.0)


@torch.no_grad()
def _write_decoder(decoder: nn.Sequential) -> None:
    """Write smooth enlargement: colours in the first three channels, a tent after each doubling, nothing from the blocks.

    The other channels start random and unread: free for training.
    """
    initialise(decoder)
    for block in decoder.modules():
        if isinstance(block, Block):
            _zero(block.conv[-1])
    first, *ups, last = (part for part in decoder if isinstance(part, nn.Conv2d))
    tent = torch.tensor([0.25, 0.5, 0.25])
    for part in (first, *ups, last):
        part.weight[:3] = 0
    _zero(last)
    gain = 1 / (3 * torch.tanh(torch.tensor(1 / 3)))  # undoes the entry's 3 tanh(x / 3) at both ends of -1..1
    for colour in range(3):
        first.weight[colour, colour, 1, 1] = 0.5 * gain
        _bias(first)[colour] = 0.5
        last.weight[colour, colour, 1, 1] = 1.0
        for up in ups:
            up.weight[colour, colour] = tent[:, None] * tent


def make_autoencoder() -> TAESD:
    """Build ComfyUI's TAESD with analytic weights."""
    autoencoder = TAESD(latent_channels=layout.LATENT_CHANNELS)
    _write_encoder(autoencoder.taesd_encoder)
    _write_decoder(autoencoder.taesd_decoder)
    return autoencoder


def idle_blocks(decoder: nn.Sequential) -> list[int]:
    """List the blocks that training leaves out: all but the first after each doubling, and the last one.

    Two thirds of the decoder's arithmetic are in them, little of what drawn shapes need.
    """
    blocks = [i for i, part in enumerate(decoder) if isinstance(part, Block)]
    kept = {i for i in blocks if i < 6} | {i for i in blocks[:-1] if not isinstance(decoder[i - 1], Block)}
    return [i for i in blocks if i not in kept]


def area_average(images: Tensor) -> Tensor:
    """Reduce images [B, 3, 8H, 8W] in 0..1 to latents [B, 3, H, W] in -1..1, as the encoder does."""
    return nn.functional.avg_pool2d(images, layout.DOWNSCALE) * 2 - 1
