"""Draw at random what is in scenes, for a whole batch: items and their looks and places, ground, style, colours.

No step waits for the device: numbers that decide stay tensors, and only the counts of grounds are fixed shares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from emoji.atlas import COLOURED_LOOKS, LOOKS, Atlas
from emoji.chance import Chance
from emoji.concepts import ANIMALS, COLOURS, CONCEPTS, GROUNDS, STYLES
from emoji.layout import layout

ITEMS = 3  # the most in a scene
GLOSSY, STICKER, INK, NEON, PIXEL = (list(STYLES).index(style) for style in ("glossy", "sticker", "ink", "neon", "pixel"))
ONE, TWO = 0.35, 0.55  # shares of scenes with one and with two items
NAMED = 0.5  # share of the objects whose colour is said, and painted
MOST_TILT = math.radians(13)
LOWEST, HIGHEST = (0.0, 120.0, 88.0, 70.0), (0.0, 200.0, 128.0, 94.0)  # sizes in pixels, by the number of items
TRIES = 14  # places drawn for each scene; the best is taken
ENOUGH = 1.15  # distance of two items over the sum of their radii that is as good as any greater one
BANNED = {"": (), "ink": ("white", "yellow"), "neon": ("black", "brown", "gray")}  # not to be seen on paper or in the dark


@dataclass
class Scenes:
    """Hold scenes [n] of up to three items; an item is an animal or object in a look, painted when its colour is said."""

    count: Tensor  # [n] items that are there: the first ones
    style: Tensor  # [n] of STYLES
    concept: Tensor  # [n, 3] of CONCEPTS
    sprite: Tensor  # [n, 3] of the atlas
    colour: Tensor  # [n, 3] of COLOURS
    named: Tensor  # [n, 3] the caption says the colour
    painted: Tensor  # [n, 3] the item has the colour
    centre: Tensor  # [n, 3, 2] x and y in pixels
    size: Tensor  # [n, 3] longer side in pixels
    angle: Tensor  # [n, 3] radians
    flip: Tensor  # [n, 3] -1: mirrored
    shadow: Tensor  # [n] darkness of the shadows
    ground: Tensor  # [n] of GROUNDS, in order: the number of each is the same in every batch
    ground_colour: Tensor  # [n] of COLOURS
    base: Tensor  # [n, 3] the ground's colour, RGB in 0..1

    @property
    def active(self) -> Tensor:
        """Mark the items [n, 3] that are there."""
        return torch.arange(ITEMS, device=self.count.device) < self.count[:, None]


def ground_counts(count: int) -> list[int]:
    """Return how many of ``count`` scenes have each ground; what is left over is plain."""
    counts = [int(count * share) for share in GROUNDS.values()]
    counts[0] += count - sum(counts)
    return counts


class SceneSampler:
    """Draw scenes. Constants are put on the device once: copying one there would wait for it."""

    def __init__(self, atlas: Atlas, chance: Chance) -> None:
        self.atlas, self.chance, device = atlas, chance, atlas.planes.device
        self.ramps = torch.tensor(list(COLOURS.values()), device=device)  # [colours, 3 stops, 3]
        self.styles = torch.tensor(list(STYLES.values()), device=device).cumsum(0)
        looks = [list(LOOKS).index(style) if style in LOOKS else -1 for style in STYLES]
        self.look_of_style = torch.tensor(looks, device=device)  # -1: any coloured one
        ban = [[-9.0 * (colour in banned) for colour in COLOURS] for banned in BANNED.values()]
        self.ban = torch.tensor(ban, device=device)
        self.lowest, self.highest = torch.tensor(LOWEST, device=device), torch.tensor(HIGHEST, device=device)
        self.grounds: dict[int, Tensor] = {}

    def __call__(self, n: int, *, styles: bool = True) -> Scenes:
        """Draw ``n`` scenes; without ``styles``, none has a style."""
        random, whole = self.chance.uniform, self.chance.integers
        drawn = random(n)
        count = 1 + (drawn > ONE).long() + (drawn > ONE + TWO).long()
        ranks = self.chance.ranks(n, len(CONCEPTS))
        ranks[:, : len(ANIMALS)] += 0.35  # animals a little more often than their share
        concept = ranks.topk(ITEMS, 1).indices
        style = torch.searchsorted(self.styles, random(n)).clamp(max=len(STYLES) - 1) * int(styles)
        look = self._looks(style)
        variant = (random(n, ITEMS) * self.atlas.count[look, concept]).long()
        sprite = self.atlas.table[look, concept, variant.clamp(max=self.atlas.table.shape[2] - 1)]
        ink, neon = style == INK, style == NEON
        colour = (random(n, len(COLOURS)) + self.ban[ink.long() + 2 * neon.long()]).topk(ITEMS, 1).indices
        named = (concept >= len(ANIMALS)) & (random(n, ITEMS) < NAMED)
        painted = named | neon[:, None]
        active = torch.arange(ITEMS, device=count.device) < count[:, None]
        centre, size = self._places(count, active)
        ground_colour, base = self._ground_colours(sprite, colour, painted, active)
        sometimes = ((style < STICKER) | (style == PIXEL)) & (random(n) < 0.5)
        return Scenes(
            count, style, concept, sprite, colour, named, painted, centre, size,
            angle=random(n, ITEMS, low=-MOST_TILT, high=MOST_TILT),
            flip=whole(2, n, ITEMS) * 2.0 - 1,
            shadow=0.3 * ((style == GLOSSY) | sometimes),
            ground=self._grounds(n),
            ground_colour=ground_colour,
            base=base,
        )  # fmt: skip

    def _looks(self, style: Tensor) -> Tensor:
        """Return the looks [n, 3]: the style's, or a coloured one for the whole scene or (3 of 10) for each item."""
        n, whole = len(style), self.chance.integers
        same = self.chance.uniform(n, 1) < 0.7
        free = torch.where(same, whole(COLOURED_LOOKS, n, 1), whole(COLOURED_LOOKS, n, ITEMS))
        fixed = self.look_of_style[style][:, None]
        return torch.where(fixed < 0, free, fixed)

    def _places(self, count: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """Return centres [n, 3, 2] and sizes [n, 3] of items that stay clear of each other where there is room."""
        n, random = len(count), self.chance.uniform
        lowest, highest = self.lowest[count][:, None], self.highest[count][:, None]
        size = lowest + (highest - lowest) * random(n, ITEMS)
        radius = size / 2
        margin = (radius + 3)[:, None, :, None]
        centre = margin + (layout.IMAGE - 2 * margin) * random(n, TRIES, ITEMS, 2)
        gap = torch.full((n, TRIES), 9.0, device=count.device)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            apart = (centre[:, :, i] - centre[:, :, j]).abs().amax(-1) / (radius[:, i] + radius[:, j])[:, None]
            gap = torch.minimum(gap, torch.where((active[:, i] & active[:, j])[:, None], apart, 9.0))
        best = (gap.clamp(max=ENOUGH) + 0.01 * random(n, TRIES)).argmax(1)
        return centre.gather(1, best.view(n, 1, 1, 1).expand(-1, -1, ITEMS, 2))[:, 0], size

    def _ground_colours(self, sprite: Tensor, colour: Tensor, painted: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """Return of three colours the one that differs most from the items [n], and its shade [n, 3]."""
        n, random = len(sprite), self.chance.uniform
        offered = self.chance.integers(len(COLOURS), n, 3)
        mean = torch.where(painted[..., None], self.ramps[colour, 1], self.atlas.mean_colour[sprite])
        apart = (self.ramps[offered, 1][:, :, None] - mean[:, None]).square().sum(-1).sqrt() + 9.0 * ~active[:, None]
        best = (apart.amin(2).clamp(max=0.6) + 0.02 * random(n, 3)).argmax(1, keepdim=True)
        chosen = offered.gather(1, best)[:, 0]
        shade = torch.lerp(self.ramps[chosen, 1], self.ramps[chosen, 2], random(n, 1, low=0.04, high=0.36))
        return chosen, (shade + random(n, 3, low=-0.025, high=0.025)).clamp(0, 1)

    def _grounds(self, n: int) -> Tensor:
        if n not in self.grounds:
            kinds = torch.arange(len(GROUNDS))
            self.grounds[n] = torch.repeat_interleave(kinds, torch.tensor(ground_counts(n))).to(self.ramps.device)
        return self.grounds[n]
