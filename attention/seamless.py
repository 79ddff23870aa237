"""Images that repeat without a seam: what leaves an image on one side comes in on the other.

Every convolution of a U-Net that pads its input with zeros pads it with the opposite edge instead, so that the network does
not know where the image ends. Its attention does not know either: it has no positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import host
from .networks.table import network_layout

# No convolution of an SD decoder reaches further, in latent pixels.
DECODER_REACH = 18


def seamless(model: Any) -> Any:
    """Return a clone of a MODEL that samples seamless images.

    Raises:
        ValueError: the network is no U-Net.
    """
    network = host.diffusion_model(model.model)
    layout = network_layout(network)
    if layout is None or layout.family != "U-Net":
        raise ValueError(
            f"{type(network).__name__} knows the place of every part of its image, so its edges cannot be joined. Seamless "
            "Tiling works with U-Nets: SD1.5, SD2 and SDXL."
        )
    clone = model.clone()
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Conv2d) and any(module.padding):
            clone.add_object_patch(f"diffusion_model.{name}.{host.PADDING_MODE}", "circular")
    return clone


def decode_seamless(vae: Any, latent: Tensor) -> Tensor:
    """Return images (batch, height, width, 3) of a latent (batch, channels, height, width) that repeats without a seam.

    The latent is decoded with as much of its repetitions around it as the decoder's convolutions see.

    Raises:
        ValueError: a latent of a video.
    """
    if latent.ndim != 4:
        raise ValueError(
            f"samples is a latent of shape {tuple(latent.shape)}: a video has no repetitions to be joined to. Use VAE Decode."
        )
    height, width = latent.shape[-2:]
    rows, columns = (torch.arange(-DECODER_REACH, side + DECODER_REACH) % side for side in (height, width))
    decoded = vae.decode(latent[..., rows, :][..., columns])
    decoded = decoded.reshape(-1, *decoded.shape[-3:])
    up, across = (size // places for size, places in zip(decoded.shape[1:3], (len(rows), len(columns)), strict=True))
    top, left = DECODER_REACH * up, DECODER_REACH * across
    return decoded[:, top : top + height * up, left : left + width * across]
