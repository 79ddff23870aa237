"""Load the sprites and make the looks that are derived from them: a sticker's white border, and neon outlines."""

from __future__ import annotations

import json
import lzma
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from emoji.concepts import CONCEPTS, LEFT_OUT
from emoji.layout import HERE
from emoji.sprites import SIDE

# Look -> the set it is drawn from. The first four are coloured; "plain" is a sticker without its border.
LOOKS = {
    "flat": "flat",
    "glossy": "glossy",
    "cartoon": "cartoon",
    "plain": "sticker",
    "sticker": "sticker",
    "ink": "ink",
    "neon": "ink",
}
COLOURED_LOOKS = 4
LUMA = (0.30, 0.55, 0.15)


def load_sprites() -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Return the planes [S, 4, 128, 128] (premultiplied RGB and alpha, uint8) and what each of them is."""
    about = json.loads((HERE / "sprites.json").read_text(encoding="utf-8"))
    packed = lzma.decompress((HERE / "sprites.xz").read_bytes())
    differences = np.frombuffer(packed, np.uint8).reshape(about["shape"])
    return np.cumsum(differences, -1, dtype=np.uint8), about["sprites"]


def blur(planes: Tensor, sigma: float) -> Tensor:
    """Blur planes [N, 1, H, W] by a Gaussian of ``sigma`` pixels."""
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=planes.dtype) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    return F.conv2d(F.conv2d(planes, kernel, padding=(0, reach)), kernel.transpose(2, 3), padding=(reach, 0))


def _tones(rgb: Tensor, alpha: Tensor) -> Tensor:
    """Return each sprite's brightness [S, 1, H, W], its median at 0.5 and its ends at 0 and 1: where a ramp is read."""
    ends = torch.tensor([0.03, 0.5, 0.97])
    luma = (rgb * torch.tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True) / alpha.clamp(min=1e-3)
    for one, there in zip(luma, alpha > 0.6, strict=True):
        low, middle, high = one[there].quantile(ends)
        up, down = 0.42 / (high - middle).clamp(min=0.14), 0.42 / (middle - low).clamp(min=0.14)
        away = one - middle
        one.copy_((0.5 + torch.where(away > 0, away * up, away * down)).clamp(0, 1))
    return luma


def _smaller(planes: Tensor, side: int) -> Tensor:
    small = F.interpolate(planes, size=(side, side), mode="bilinear", antialias=True)
    return F.pad(small, ((SIDE - side) // 2,) * 4)


def _sticker(planes: Tensor) -> Tensor:
    """Make room for a white border and cut it around the icon [1, 5, 128, 128]."""
    small = _smaller(planes, 112)
    alpha = small[:, 3:4]
    wide = blur(F.max_pool2d((alpha > 0.3).float(), 11, 1, 5), 1.0).clamp(0, 1)
    wide = torch.maximum((wide * 1.6 - 0.3).clamp(0, 1), alpha)
    border = wide - alpha
    return torch.cat([small[:, :3] + border, wide, small[:, 4:] + border], 1)


def _neon(planes: Tensor) -> Tensor:
    """Make outlines that glow."""
    small = _smaller(planes[:, 3:4], 108)
    edge = F.max_pool2d(small, 3, 1, 1) + F.max_pool2d(-small, 3, 1, 1)
    core, glow = (blur(edge, 0.8) * 1.5).clamp(0, 1), (blur(edge, 4.0) * 1.6).clamp(0, 1)
    alpha = torch.maximum(core, 0.6 * glow)
    return torch.cat([alpha.expand(-1, 3, -1, -1), alpha, alpha * (0.42 + 0.5 * core * core)], 1)


class Atlas:
    """Hold all sprites on the device, and say which of them show a concept in a look."""

    planes: Tensor  # [S, 5, 128, 128] uint8: premultiplied RGB, alpha, premultiplied tone
    table: Tensor  # [looks, concepts, most] sprite numbers
    count: Tensor  # [looks, concepts] how many of them count
    others: Tensor  # sprites of nothing the model knows
    mean_colour: Tensor  # [S, 3]
    half_height: Tensor  # [S] of half a sprite: where its lowest pixel is

    def __init__(self, device: torch.device) -> None:
        sprites, about = load_sprites()
        planes = torch.from_numpy(sprites).float() / 255
        rgb, alpha = planes[:, :3], planes[:, 3:]
        planes = torch.cat([rgb, alpha, _tones(rgb, alpha) * alpha], 1)
        numbers: dict[tuple[str, str], list[int]] = {}
        derived: list[Tensor] = []
        for look, source in LOOKS.items():
            make = {"sticker": _sticker, "neon": _neon}.get(look)
            for number, one in enumerate(about):
                if one["look"] != source or not one["concept"] or one["icon"] in LEFT_OUT:
                    continue
                if make:
                    derived.append(make(planes[number : number + 1]))
                    number = len(planes) + len(derived) - 1
                numbers.setdefault((look, one["concept"]), []).append(number)
        planes = torch.cat([planes, *derived])
        most = max(len(some) for some in numbers.values())
        rows = [[numbers[look, concept] for concept in CONCEPTS] for look in LOOKS]
        self.table = torch.tensor([[some + some[:1] * (most - len(some)) for some in row] for row in rows], device=device)
        self.count = torch.tensor([[len(some) for some in row] for row in rows], device=device)
        self.others = torch.tensor([number for number, one in enumerate(about) if not one["concept"]], device=device)
        self.planes = (planes * 255).round().byte().to(device)
        weight = planes[:, 3:4].sum((2, 3)).clamp(min=1)
        self.mean_colour = (planes[:, :3].sum((2, 3)) / weight).to(device)
        tall = (planes[:, 3] > 0.3).any(2).float()
        centre = (torch.arange(SIDE) - SIDE / 2 + 0.5).abs()
        self.half_height = ((tall * centre).amax(1) / (SIDE / 2)).to(device)
