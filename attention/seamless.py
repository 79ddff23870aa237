"""Images that repeat without a seam: what leaves an image on one side comes in on the other.

Every convolution of a U-Net that pads its input with zeros pads it with the opposite edge instead, so that the network does
not know where the image ends. Its attention does not know either: it has no positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import host
from .host import AXES, Edges
from .networks.table import network_layout

__all__ = ["AXES", "VIEWS", "Wrap", "crop", "decode_seamless", "encode_seamless", "look", "seamless", "wrap"]

# No convolution of an SD decoder or encoder reaches further, in latent pixels.
VAE_REACH = 18


def seamless(model: Any, axis: str = "both") -> Any:
    """Return a clone of a MODEL that samples images which repeat in both directions, or along one axis.

    Raises:
        ValueError: the network is no U-Net, or ``axis`` is none of ``AXES``.
    """
    edges = Edges.of_axis(axis)
    network = host.diffusion_model(model.model)
    layout = network_layout(network)
    if layout is None or layout.family != "U-Net":
        raise ValueError(
            f"{type(network).__name__} knows the place of every part of its image, so its edges cannot be joined. Seamless "
            "Tiling works with U-Nets: SD1.5, SD2 and SDXL."
        )
    return host.join_edges(model, network, edges)


def decode_seamless(vae: Any, latent: Tensor, axis: str = "both") -> Tensor:
    """Return images (batch, height, width, 3) of a latent (batch, channels, height, width) that repeats without a seam.

    The latent is decoded with as much of its repetitions around it as the decoder's convolutions see.

    Raises:
        ValueError: a latent of a video, or another ``axis``.
    """
    if latent.ndim == 5 and latent.shape[2] == 1:
        latent = latent[:, :, 0]
    if latent.ndim != 4:
        raise ValueError(
            f"samples is a latent of shape {tuple(latent.shape)}: a video has no repetitions to be joined to. Use VAE Decode."
        )
    height, width = latent.shape[-2:]
    top, left = _margins(axis, VAE_REACH)
    surrounded = _surrounded(latent, top, left)
    decoded = vae.decode(surrounded)
    decoded = decoded.reshape(-1, *decoded.shape[-3:])
    up, across = (size // places for size, places in zip(decoded.shape[1:3], surrounded.shape[-2:], strict=True))
    return decoded[:, top * up : (top + height) * up, left * across : (left + width) * across]


def encode_seamless(vae: Any, images: Tensor, axis: str = "both") -> Tensor:
    """Return the latent (batch, channels, height, width) of images (batch, height, width, 3) that repeat without a seam.

    Raises:
        ValueError: sides that the VAE would crop, which would cut a piece out of the pattern; a VAE for video; no image.
    """
    unit = int(vae.spacial_compression_encode())
    images = host.colour_images(images, "pixels", unit)
    edges = Edges.of_axis(axis)
    for name, side, joined in (("height", images.shape[1], edges.top_bottom), ("width", images.shape[2], edges.left_right)):
        if joined and side % unit:
            raise ValueError(
                f"pixels has a {name} of {side}, which the VAE would crop to {side // unit * unit}, and then the image would not "
                f"repeat any more. Scale it to a multiple of {unit} pixels."
            )
    top, left = _margins(axis, VAE_REACH)
    height, width = (side // unit for side in images.shape[1:3])
    surrounded = _surrounded(images.movedim(-1, 1), top * unit, left * unit).movedim(1, -1)
    latent = vae.encode(surrounded)
    if latent.ndim != 4:
        raise ValueError("vae is one for video, whose latents do not repeat. Use the VAE of an SD1.5, SD2 or SDXL checkpoint.")
    return latent[..., top : top + height, left : left + width]


def _margins(axis: str, size: int) -> tuple[int, int]:
    """Return what to put around: at top and bottom, at left and right."""
    edges = Edges.of_axis(axis)
    return size * edges.top_bottom, size * edges.left_right


def _surrounded(x: Tensor, rows: int, columns: int) -> Tensor:
    """Return (..., height, width) with so many rows and columns of its repetitions on every side."""
    below, beside = (
        torch.arange(-margin, side + margin, device=x.device) % side
        for margin, side in zip((rows, columns), x.shape[-2:], strict=True)
    )
    return x[..., below, :][..., beside]


# Around nodes that know nothing of repetitions: upscalers, second passes, filters.


@dataclass(frozen=True)
class Wrap:
    """How an image was surrounded: its own size and what stands on each side of it, in pixels."""

    height: int
    width: int
    rows: int
    columns: int


def wrap(images: Tensor, margin: int, axis: str = "both") -> tuple[Tensor, Wrap]:
    """Return images (batch, height, width, channels) surrounded by their repetitions, and what ``crop`` needs."""
    rows, columns = _margins(axis, margin)
    done = Wrap(images.shape[1], images.shape[2], rows, columns)
    return _surrounded(images.movedim(-1, 1), rows, columns).movedim(1, -1), done


def crop(images: Tensor, done: Wrap) -> Tensor:
    """Return the part of wrapped images that ``wrap`` was given, also after they were scaled.

    Raises:
        ValueError: images whose size is not a multiple of a wrapped one's.
    """
    sides, starts = (done.height, done.width), (done.rows, done.columns)
    found = []
    for name, size, side, start in zip(("height", "width"), images.shape[1:3], sides, starts, strict=True):
        first, length = start * size / (side + 2 * start), side * size / (side + 2 * start)
        if start and (abs(first - round(first)) > 1e-6 or abs(length - round(length)) > 1e-6):
            raise ValueError(
                f"images has a {name} of {size}, but the wrapped image had {side + 2 * start}: the edges of the tile would fall "
                "between two pixels. Scale by a whole number, or choose a margin that the factor leaves whole."
            )
        found.append((round(first), round(length)))
    (top, height), (left, width) = found
    return images[:, top : top + height, left : left + width]


def look(images: Tensor, view: str) -> Tensor:
    """Return images as their seams are best seen: "2 x 2" copies side by side, or "offset" by half of each side.

    Raises:
        ValueError: another view.
    """
    if view == VIEWS[0]:
        return images.repeat(1, 2, 2, 1)
    if view == VIEWS[1]:
        return images.roll((images.shape[1] // 2, images.shape[2] // 2), (1, 2))
    raise ValueError(f"view is '{view}': use {' or '.join(VIEWS)}.")


VIEWS = ("2 x 2", "offset")
