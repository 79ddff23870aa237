"""Compose captioned scenes in batches on the device: no data loader, and no step that waits for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from emoji.atlas import Atlas
from emoji.captions import Captions, Vocabulary
from emoji.chance import Chance
from emoji.concepts import ANIMALS, COLOURS, CONCEPTS
from emoji.grounds import Grounds
from emoji.layout import layout
from emoji.scene import GLOSSY, INK, ITEMS, NEON, PIXEL, STICKER, Scenes, SceneSampler, ground_counts
from emoji.sprites import LONGER_SIDE, SIDE

IMAGE = layout.IMAGE
PAPER, GLOW = (0.97, 0.95, 0.90), (0.01, 0.005, 0.05)  # RGB of what ink and neon are drawn on
_CUT_SHARE = 0.10  # of the items in scenes with clutter: most of them is missing


@dataclass
class Batch:
    """Hold scenes as they are trained on."""

    images: Tensor  # [n, 3, 256, 256] in 0..1
    rows: Tensor  # [n, 77] rows of the vocabulary
    present: Tensor  # [n, concepts] 1 where the concept is there
    colour: Tensor  # [n, objects] colour of a painted object, else -1
    masks: Tensor | None  # [n, 3, 256, 256] what is seen of each item, 0..1
    scenes: Scenes
    counted: Tensor  # [n, 3] items that are there and whole

    def concept_masks(self, cells: int) -> Tensor:
        """Return what share of each of ``cells`` x ``cells`` squares shows each concept: [n, concepts, cells, cells]."""
        assert self.masks is not None, "compose with masks=True"
        small = F.adaptive_avg_pool2d(self.masks.float(), cells) * self.counted[:, :, None, None]
        shown = small.new_zeros(len(small), len(CONCEPTS), cells, cells)
        return shown.scatter_add_(1, self.scenes.concept[:, :, None, None].expand_as(small), small)


class Composer:
    """Compose scenes. Everything that is drawn at random comes from one seed."""

    def __init__(self, device: torch.device, seed: int = 0, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
        self.chance = Chance(device, seed)
        self.vocabulary = Vocabulary()
        self.atlas = Atlas(device)
        self.sample = SceneSampler(self.atlas, self.chance)
        self.captions = Captions(self.vocabulary, self.chance)
        self.grounds = Grounds(self.chance, self.dtype)
        pixels = torch.arange(IMAGE, device=device, dtype=torch.float32) + 0.5
        self.x, self.y = pixels[None, None, :], pixels[None, :, None]
        self.paper, self.glow = (torch.tensor(colour, device=device, dtype=self.dtype)[:, None, None] for colour in (PAPER, GLOW))

    @torch.no_grad()
    def __call__(self, n: int, *, dropout: float = 0.0, clutter: bool = False, styles: bool = True, masks: bool = False) -> Batch:
        """Compose ``n`` scenes, ordered by ground.

        ``dropout`` is the share of empty captions; ``clutter`` puts other things beneath the items and cuts some of them, for
        the judge; ``masks`` also returns what is seen of each item.
        """
        scenes = self.sample(n, styles=styles)
        image = self._style_ground(self.grounds(ground_counts(n), scenes.base), scenes.style)
        seen: list[Tensor] = []
        counted, cut = scenes.active, None
        if clutter:
            image = self._clutter(image)
            cut = scenes.active & (self.chance.uniform(n, ITEMS) < _CUT_SHARE)
            counted = scenes.active & ~cut
        for item in range(ITEMS):
            image, alpha = self._put(image, scenes, item, None if cut is None else cut[:, item])
            if masks:
                seen = [mask * (1 - alpha) for mask in seen] + [alpha]
        coarse = F.interpolate(F.avg_pool2d(image, 4), scale_factor=4.0, mode="nearest")
        image = torch.where((scenes.style == PIXEL)[:, None, None, None], coarse, image).clamp_(0, 1)
        present = torch.zeros(n, len(CONCEPTS), device=image.device).scatter_add_(1, scenes.concept, counted.float())
        colour = torch.full((n, len(CONCEPTS)), -1, dtype=torch.long, device=image.device)
        shown = counted & scenes.painted & (scenes.concept >= len(ANIMALS))
        colour.scatter_(1, scenes.concept, torch.where(shown, scenes.colour, -1))
        rows = self.captions(scenes, dropout)
        return Batch(image, rows, present, colour[:, len(ANIMALS) :], torch.cat(seen, 1) if masks else None, scenes, counted)

    # -------------------------------------------------------------------------------------------------------- items

    def _put(self, image: Tensor, scenes: Scenes, item: int, cut: Tensor | None) -> tuple[Tensor, Tensor]:
        """Put an item and its shadow into the images; returns them and what the item covers [n, 1, H, W]."""
        sprite, centre, size = scenes.sprite[:, item], scenes.centre[:, item], scenes.size[:, item]
        on = (item < scenes.count).to(self.dtype)[:, None, None]
        planes, across = self._place(sprite, centre, size, scenes.angle[:, item], scenes.flip[:, item])
        if cut is not None:
            edge = self.chance.uniform(len(image), 1, 1, low=0.15, high=0.55)
            kept = (across > edge if item != 1 else across < -edge).to(self.dtype)
            planes = planes * torch.where(cut[:, None, None], kept, torch.ones_like(kept))[:, None]
        radius = size / 2
        foot = centre[:, 1] + radius * (SIDE / LONGER_SIDE) * self.atlas.half_height[sprite] * 0.97
        right = (self.x - centre[:, 0, None, None]) / (radius * 0.8)[:, None, None]
        down = (self.y - foot[:, None, None]) / (radius * 0.17)[:, None, None]
        shade = (
            (1 - right.square() - down.square()).clamp(min=0).to(self.dtype) * scenes.shadow.to(self.dtype)[:, None, None] * on
        )
        image = image * (1 - shade)[:, None]
        return self._over(image, planes, scenes.painted[:, item], scenes.colour[:, item], on), planes[:, 3:4] * on[:, None]

    def _place(self, sprite: Tensor, centre: Tensor, size: Tensor, angle: Tensor, flip: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sprites' planes in place [n, 5, H, W], and each pixel's place across them, -1 to 1 [n, H, W]."""
        right, down = self.x - centre[:, 0, None, None], self.y - centre[:, 1, None, None]
        half = (size * (SIDE / LONGER_SIDE) / 2)[:, None, None]
        cos, sin = angle.cos()[:, None, None] / half, angle.sin()[:, None, None] / half
        across, along = (right * cos + down * sin) * flip[:, None, None], down * cos - right * sin
        planes = self.atlas.planes[sprite].to(self.dtype) * (1 / 255)
        grid = torch.stack([across, along], -1).to(self.dtype)
        return F.grid_sample(planes, grid, mode="bilinear", padding_mode="zeros", align_corners=False), across

    def _over(self, image: Tensor, planes: Tensor, painted: Tensor, colour: Tensor, on: Tensor) -> Tensor:
        """Lay sprites over the images; the painted ones get their tones from the colour's ramp."""
        rgb, alpha, tone = planes[:, :3], planes[:, 3:4], planes[:, 4:5]
        tone = (tone / alpha.clamp(min=2e-3)).clamp(0, 1)
        dark, middle, light = (self.sample.ramps[colour, stop].to(self.dtype)[:, :, None, None] for stop in range(3))
        ramp = (dark + (middle - dark) * (2 * tone).clamp(max=1) + (light - middle) * (2 * tone - 1).clamp(min=0)) * alpha
        rgb = torch.where(painted[:, None, None, None], ramp, rgb)
        return image * (1 - alpha * on[:, None]) + rgb * on[:, None]

    # ------------------------------------------------------------------------------------------------------ grounds

    def _style_ground(self, image: Tensor, style: Tensor) -> Tensor:
        """Light the middle for glossy ones, fade for stickers, make paper for ink, and darken for neon."""

        def share(of: int) -> Tensor:
            return (style == of)[:, None, None, None].to(self.dtype)

        light = 1.14 - 0.9 * ((self.grounds.x - 0.45).square() + (self.grounds.y - 0.4).square())
        image = image * (1 + share(GLOSSY) * (light[:, None] - 1))
        image = image + share(STICKER) * 0.30 * (1 - image)
        paper = self.paper * (0.86 + 0.14 * image.mean(1, keepdim=True))
        image = torch.lerp(image, paper, share(INK))
        return torch.lerp(image, image * 0.16 + self.glow, share(NEON)).clamp(0, 1)

    def _clutter(self, image: Tensor) -> Tensor:
        """Put other things and blobs of colour into the images."""
        n, random, whole, grounds = len(image), self.chance.uniform, self.chance.integers, self.grounds
        for _ in range(2):
            on = (random(n) < 0.35).to(self.dtype)[:, None, None]
            sprite = self.atlas.others[whole(len(self.atlas.others), n)]
            centre, size = random(n, 2, high=IMAGE), random(n, low=50, high=125)
            planes, _across = self._place(sprite, centre, size, random(n, low=-0.3, high=0.3), whole(2, n) * 2.0 - 1)
            image = self._over(image, planes, random(n) < 0.3, whole(len(COLOURS), n), on)
            x, y, wide = random(n, 1, 1), random(n, 1, 1), random(n, 1, 1, low=0.6, high=1.7)
            radius = random(n, 1, 1, low=0.02, high=0.10) * (random(n, 1, 1) < 0.4)
            blob = (radius - torch.hypot((grounds.x - x) * wide, grounds.y - y)) * IMAGE
            colour = self.sample.ramps[whole(len(COLOURS), n), 1].to(self.dtype)[:, :, None, None]
            image = torch.lerp(image, colour, (blob + 0.5).clamp(0, 1)[:, None].to(self.dtype))
        return image
