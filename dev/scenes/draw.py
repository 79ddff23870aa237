"""Draw procedural captioned scenes: coloured shapes on plain or patterned grounds, in a few global styles.

A scene is described in world units (the image is 32 x 32 of them) and rendered from signed distances, so the same
scene can be drawn at 32 pixels for the diffusion model and at 256 pixels for the decoder.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

WORLD = 32.0
COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.75, 0.15),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.98, 0.92, 0.10),
    "purple": (0.70, 0.15, 0.85),
    "orange": (1.00, 0.52, 0.05),
    "white": (0.98, 0.98, 0.98),
}
GROUNDS = {
    "black": (0.03, 0.03, 0.03),
    "gray": (0.38, 0.38, 0.38),
    "navy": (0.05, 0.07, 0.30),
    "brown": (0.30, 0.18, 0.10),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
PATTERNS = ("striped", "dotted", "checkered")
STYLES = ("neon", "pastel", "sketch")
WORDS = (*"a and with picture photo of on background , in style".split(), *SHAPES, *COLOURS, *GROUNDS, *PATTERNS, *STYLES)
MAX_ITEMS = 3

# For a model that is told a class instead of a prompt: one object, on a plain ground, on a pattern or in a style.
LOOKS = ("plain", *PATTERNS, *STYLES)
CLASSES = tuple(
    f"{colour} {shape}" + ("" if look == "plain" else f", {look}") for look in LOOKS for colour in COLOURS for shape in SHAPES
)

# Pastel grounds stand in for GROUNDS one by one; the other two styles have one ground each.
_PASTEL_GROUNDS = ((0.80, 0.86, 0.93), (0.88, 0.82, 0.92), (0.83, 0.91, 0.84), (0.94, 0.86, 0.79))
_NEON_GROUND = (0.02, 0.01, 0.06)
_PAPER = (0.95, 0.93, 0.87)


@dataclass(frozen=True)
class Item:
    """One coloured shape; centre and radius in world units."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """Everything that decides an image, and the caption that describes it."""

    items: tuple[Item, ...]
    ground: str
    pattern: str | None
    style: str | None
    shift: tuple[float, float]
    caption: str


# ---------------------------------------------------------------------------------------------- sampling


def _positions(rng: random.Random, radii: Sequence[float]) -> list[tuple[float, float]]:
    """Draw centres whose bounding squares keep one unit apart, or use a fixed row when chance does not find them."""
    for _ in range(60):
        centres = [(rng.uniform(r + 0.5, WORLD - 0.5 - r), rng.uniform(r + 0.5, WORLD - 0.5 - r)) for r in radii]
        if all(
            max(abs(centres[i][0] - centres[j][0]), abs(centres[i][1] - centres[j][1])) >= radii[i] + radii[j] + 1.0
            for i in range(len(radii))
            for j in range(i)
        ):
            return centres
    corners = [(8.0, 8.0), (24.0, 24.0), (24.0, 8.0)]
    rng.shuffle(corners)
    return corners[: len(radii)]


def _caption(rng: random.Random, items: Sequence[Item], ground: str, pattern: str | None, style: str | None) -> str:
    # Now and then the colour is left out, so that the shape word alone has to find its object.
    names = [f"a {item.shape}" if rng.random() < 0.07 else f"a {item.colour} {item.shape}" for item in items]
    joint = rng.choices((" and ", " with ", ", "), (0.8, 0.1, 0.1))[0]
    if joint == ", ":
        names = [name.removeprefix("a ") for name in names]
    caption = rng.choices(("", "a picture of ", "a photo of "), (0.86, 0.07, 0.07))[0] + joint.join(names)
    if style:
        return f"{caption} in {style} style"
    if pattern and rng.random() < 0.85:
        return f"{caption} on a {pattern} {ground} background" if rng.random() < 0.5 else f"{caption} on a {pattern} background"
    if not pattern and rng.random() < 0.45:
        return f"{caption} on a {ground} background"
    return caption


def sample(rng: random.Random, *, objects: int | None = None, style: str | None | bool = True, pattern: bool = True) -> Scene:
    """Draw one scene from ``rng``. ``style``: True = sometimes one, False or None = none, else that one."""
    count = objects or rng.choices((1, 2, 3), (0.32, 0.58, 0.10))[0]
    if style is True:
        style = rng.choice(STYLES) if rng.random() < 0.2 else None
    low, high = ((5.0, 9.5), (4.5, 7.0), (4.0, 5.5))[count - 1]
    if style and count < 3:
        low += 1.0  # outlines need room
    radii = [rng.uniform(low, high) for _ in range(count)]
    # A white outline cannot be seen on paper.
    colours = rng.sample([c for c in COLOURS if not (style == "sketch" and c == "white")], count)
    items = tuple(
        Item(shape, colour, x, y, radius)
        for shape, colour, (x, y), radius in zip(rng.sample(SHAPES, count), colours, _positions(rng, radii), radii, strict=True)
    )
    ground = rng.choice(list(GROUNDS))
    drawn = rng.choice(PATTERNS) if pattern and not style and rng.random() < 0.27 else None
    shift = (rng.uniform(0, 8), rng.uniform(0, 8))
    return Scene(items, ground, drawn, style or None, shift, _caption(rng, items, ground, drawn, style or None))


def class_parts(index: int) -> tuple[str, str, str]:
    """Return the look, colour and shape of class ``index`` of ``CLASSES``."""
    look, rest = divmod(index, len(COLOURS) * len(SHAPES))
    colour, shape = divmod(rest, len(SHAPES))
    return LOOKS[look], list(COLOURS)[colour], SHAPES[shape]


def sample_class(rng: random.Random) -> tuple[int, Scene]:
    """Draw a class and a scene of it. Plain ones come as often as all other looks together."""
    per_look = len(COLOURS) * len(SHAPES)
    look = rng.randrange(1, len(LOOKS)) if rng.random() < 0.5 else 0
    index = look * per_look + rng.randrange(per_look)
    name, colour, shape = class_parts(index)
    scene = sample(rng, objects=1, style=name if name in STYLES else None, pattern=False)
    item = replace(scene.items[0], colour=colour, shape=shape)
    return index, replace(scene, items=(item,), pattern=name if name in PATTERNS else None)


# --------------------------------------------------------------------------------------------- distances


def _wheel(count: int, radii: Sequence[float], down: float) -> list[tuple[float, float]]:
    """Place corners on a circle, starting at the top, with alternating radii, moved down by ``down``."""
    angles = [-math.pi / 2 + 2 * math.pi * i / count for i in range(count)]
    return [(radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a) + down) for i, a in enumerate(angles)]


_CORNERS = {"triangle": _wheel(3, (1.15,), 0.15), "star": _wheel(10, (1.2, 1.2 * 0.42), 0.05)}
_CROSS_ARM = 0.34


def _polygon_distance(x: Tensor, y: Tensor, corners: list[tuple[float, float]]) -> Tensor:
    """Compute the signed distance to a polygon: nearest edge, sign by crossing parity."""
    squared = torch.full_like(x, math.inf)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clamp_(0, 1)
        squared = torch.minimum(squared, (px - ex * along).square_() + (py - ey * along).square_())
        if ey:
            inside ^= ((y >= ay) != (y >= by)) & (px < py * (ex / ey))
    distance = squared.sqrt_()
    return torch.where(inside, -distance, distance)


def shape_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Compute the signed distance of points to a shape of unit size at the origin (negative inside)."""
    if shape in _CORNERS:
        return _polygon_distance(x, y, _CORNERS[shape])
    if shape == "circle":
        return torch.hypot(x, y) - 0.95
    if shape == "ring":
        return (torch.hypot(x, y) - 0.74).abs() - 0.24
    x, y = x.abs(), y.abs()
    if shape == "square":
        return torch.maximum(x, y) - 0.82
    if shape == "cross":
        return torch.maximum(torch.maximum(x, y) - 1.0, torch.minimum(x, y) - _CROSS_ARM)
    raise ValueError(f"Unknown shape {shape!r}; known: {', '.join(SHAPES)}.")


# --------------------------------------------------------------------------------------------- rendering


def _cover(distance: Tensor, scale: float) -> Tensor:
    """Turn a signed distance in world units into anti-aliased coverage 0..1; ``scale`` = pixels per unit."""
    return (0.5 - distance * scale).clamp_(0, 1)


def _pattern_cover(pattern: str, x: Tensor, y: Tensor, scale: float) -> Tensor:
    if pattern == "striped":
        return _cover((((x + y) % 6 - 3).abs() - 1.5) * -0.7071, scale)
    if pattern == "dotted":
        return _cover(torch.hypot(x % 6 - 3, y % 6 - 3) - 1.55, scale)
    across, down = (_cover((axis % 8 - 4).abs() - 2, scale) for axis in (x, y))
    return across + down - 2 * across * down


def _grounds(scenes: Sequence[Scene], x: Tensor, y: Tensor, scale: float) -> Tensor:
    """Draw the backgrounds [B, 3, size, size] of scenes; ``x``, ``y`` are world coordinates [B, size, size]."""

    def colour(scene: Scene) -> tuple[float, ...]:
        if scene.style == "pastel":
            return _PASTEL_GROUNDS[list(GROUNDS).index(scene.ground)]
        return {"neon": _NEON_GROUND, "sketch": _PAPER}.get(scene.style or "", GROUNDS[scene.ground])

    base = torch.tensor([colour(scene) for scene in scenes])[:, :, None, None]
    image = base.expand(-1, -1, *x.shape[1:]).contiguous()
    shift = torch.tensor([scene.shift for scene in scenes])[:, :, None, None]
    for pattern in PATTERNS:
        rows = [i for i, scene in enumerate(scenes) if scene.pattern == pattern]
        if rows:
            cover = _pattern_cover(pattern, x[rows] + shift[rows, 0], y[rows] + shift[rows, 1], scale)
            image[rows] += cover[:, None] * (0.22 - 0.1 * base[rows])
    return image


def _distances(scenes: Sequence[Scene], x: Tensor, y: Tensor) -> Tensor:
    """Compute signed distances in world units [B, MAX_ITEMS, size, size]; far away where a scene has fewer items."""
    distance = torch.full((len(scenes), MAX_ITEMS, *x.shape[1:]), WORLD)
    for shape in SHAPES:
        found = [(i, k, item) for i, scene in enumerate(scenes) for k, item in enumerate(scene.items) if item.shape == shape]
        if found:
            rows, slots, items = zip(*found, strict=True)
            cx, cy, radius = (torch.tensor(v)[:, None, None] for v in zip(*((i.x, i.y, i.radius) for i in items), strict=True))
            local_x, local_y = (x[list(rows)] - cx) / radius, (y[list(rows)] - cy) / radius
            distance[list(rows), list(slots)] = shape_distance(shape, local_x, local_y) * radius
    return distance


def _paint(image: Tensor, distance: Tensor, colour: Tensor, style: str | None, scale: float) -> Tensor:
    """Paint one object over each ``image`` [B, 3, size, size]; ``distance`` [B, 1, size, size], ``colour`` [B, 3, 1, 1]."""
    if style == "neon":
        line = (distance + 0.4).abs()  # a glowing tube just inside the outline
        glow = 0.6 * torch.exp(-(line - 0.6).clamp(min=0) / 1.2)
        image = image.lerp(colour, torch.maximum(glow, _cover(line - 0.7, scale)))
        return image.lerp(torch.ones_like(colour), 0.8 * _cover(line - 0.22, scale))
    if style == "sketch":
        line = (distance + 0.4).abs()
        image = image.lerp(colour, 0.12 * _cover(distance, scale))
        return image.lerp(0.85 * colour, _cover(line - 0.65, scale))
    if style == "pastel":
        colour = 0.55 * colour + 0.45 * 0.98
    return image.lerp(colour, _cover(distance, scale))


def render(
    scenes: Sequence[Scene], size: int = 32, *, corner: Tensor | None = None, extent: float = WORLD
) -> tuple[Tensor, Tensor]:
    """Draw ``scenes``: images [B, 3, size, size] in 0..1 and the objects' masks [B, MAX_ITEMS, size, size] in 0..1.

    ``corner`` [B, 2] and ``extent`` (world units) select a square window of each scene; default is all of it.
    """
    scale = size / extent
    steps = (torch.arange(size) + 0.5) / scale
    corner = torch.zeros(len(scenes), 2) if corner is None else corner
    x = (corner[:, 0, None, None] + steps).expand(-1, size, size)
    y = (corner[:, 1, None, None] + steps[:, None]).expand(-1, size, size)
    image, distance = _grounds(scenes, x, y, scale), _distances(scenes, x, y)
    for style in (None, *STYLES):
        for slot in range(MAX_ITEMS):
            rows = [i for i, scene in enumerate(scenes) if scene.style == style and len(scene.items) > slot]
            if rows:
                colour = torch.tensor([COLOURS[scenes[i].items[slot].colour] for i in rows])[:, :, None, None]
                image[rows] = _paint(image[rows], distance[rows, slot : slot + 1], colour, style, scale)
    return image, _cover(distance, scale)
