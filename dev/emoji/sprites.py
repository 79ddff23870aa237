"""Render the icons of the npm packages into one atlas: sprites.xz and sprites.json.

    npm install --prefix FOLDER PACKAGE@VERSION ...      (python -m emoji.sprites --list prints them)
    cd dev && python -m emoji.sprites FOLDER [--sheet FILE]

Needs resvg_py and pillow; other renderers leave out the filters of some icons. The same packages give the same bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np

from emoji.concepts import ANIMALS, LICENCES, OBJECTS, OTHERS, PACKAGES
from emoji.layout import HERE

SIDE, LONGER_SIDE, RENDERED = 128, 120, 512  # pixels: a sprite, the icon in it, and the icon before it is reduced
FAINT = 12  # of 255: less alpha is no part of the icon
OTHER_SETS = (("sticker", "cartoon"), ("flat", "glossy"))  # in turn


def load_packages(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the icons of every set.

    Raises:
        SystemExit: a package has another version than the named one, or another licence than the allowed ones.
    """
    icons = {}
    for name, (package, version) in PACKAGES.items():
        inside = folder / "node_modules" / package
        about = json.loads((inside / "package.json").read_text(encoding="utf-8"))
        licence = json.loads((inside / "info.json").read_text(encoding="utf-8"))["license"]["spdx"]
        if about["version"] != version or licence not in LICENCES:
            raise SystemExit(f"{package}: found {about['version']} under {licence}; wanted {version} under {', '.join(LICENCES)}")
        icons[name] = json.loads((inside / "icons.json").read_text(encoding="utf-8"))
    return icons


def svg_of(package: dict[str, Any], name: str) -> str | None:
    """Return an icon as a whole SVG, or ``None`` where the set has none of that name."""
    name = name if name in package["icons"] else package.get("aliases", {}).get(name, {}).get("parent", name)
    icon = package["icons"].get(name)
    if icon is None:
        return None
    width, height = (icon.get(side, package.get(side, 16)) for side in ("width", "height"))
    body = icon["body"].replace("currentColor", "#000")
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{RENDERED}" height="{RENDERED}">{body}</svg>'
    )


def sprite(svg: str) -> np.ndarray | None:
    """Render an icon, crop it and reduce it to premultiplied RGBA [128, 128, 4]; ``None`` if nothing is drawn."""
    import resvg_py
    from PIL import Image

    picture = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg))))
    rgba = np.asarray(picture.convert("RGBA")).astype(np.float32)
    rows, columns = np.where(rgba[..., 3] > FAINT)
    if len(rows) == 0:
        return None
    rgba = rgba[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    rgba[..., :3] *= rgba[..., 3:] / 255
    scale = LONGER_SIDE / max(rgba.shape[:2])
    height, width = (max(1, round(side * scale)) for side in rgba.shape[:2])
    filtering = Image.Resampling.BOX if scale < 0.5 else Image.Resampling.LANCZOS
    planes = [np.asarray(Image.fromarray(rgba[..., i].copy()).resize((width, height), filtering)) for i in range(4)]
    small = np.stack(planes, -1).clip(0, 255)
    small[..., :3] = np.minimum(small[..., :3], small[..., 3:])
    whole = np.zeros((SIDE, SIDE, 4), np.float32)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    whole[top : top + height, left : left + width] = small
    return whole.round().astype(np.uint8)


def render(packages: dict[str, dict[str, Any]]) -> tuple[np.ndarray, list[dict[str, Any]], list[str]]:
    """Render every icon there is: sprites [S, 128, 128, 4], a row about each, and the icons that are missing."""
    sprites, rows, missing = [], [], []

    def add(concept: str | None, look: str, name: str, known: set[str]) -> None:
        svg = svg_of(packages[look], name)
        drawn = None if svg is None or svg in known else sprite(svg)
        if svg is None or drawn is None:
            missing.append(f"{look}:{name}")
            return
        known.add(svg)
        sprites.append(drawn)
        rows.append({"concept": concept, "look": look, "icon": name})

    for concept, names in {**ANIMALS, **OBJECTS}.items():
        for look in packages:
            known: set[str] = set()  # two names of one icon
            for name in names.split():
                add(concept, look, name, known)
    for number, name in enumerate(OTHERS):
        for look in OTHER_SETS[number % 2]:
            add(None, look, name, set())
    return np.stack(sprites), rows, missing


def pack(sprites: np.ndarray) -> bytes:
    """Compress the planes. Differences along the rows pack better; a cumulative sum modulo 256 undoes them."""
    planes = np.ascontiguousarray(sprites.transpose(0, 3, 1, 2))
    differences = planes.copy()
    differences[..., 1:] -= planes[..., :-1]
    return lzma.compress(differences.tobytes(), preset=6)


def save_sheet(sprites: np.ndarray, path: Path, columns: int = 24, side: int = 64) -> None:
    """Save all sprites on gray, to look at."""
    from PIL import Image

    lines = -(-len(sprites) // columns)
    sheet = Image.new("RGB", (columns * side, lines * side), (190, 190, 190))
    for number, one in enumerate(sprites):
        small = np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BOX)).astype(np.float32)
        place = (number % columns * side, number // columns * side)
        under = np.asarray(sheet.crop((*place, place[0] + side, place[1] + side))).astype(np.float32)
        mixed = under * (1 - small[..., 3:] / 255) + small[..., :3]
        sheet.paste(Image.fromarray(mixed.clip(0, 255).astype(np.uint8)), place)
    sheet.save(path)


def main(argv: list[str] | None = None) -> None:
    """Build the atlas."""
    parser = argparse.ArgumentParser(prog="emoji.sprites", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="where npm installed the packages (it holds node_modules)")
    parser.add_argument("--list", action="store_true", help="print the packages and their versions, for npm install")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of sprites.xz and sprites.json")
    parser.add_argument("--sheet", type=Path, help="also save an image of all sprites here")
    args = parser.parse_args(argv)
    if args.list or args.folder is None:
        print(*(f"{package}@{version}" for package, version in PACKAGES.values()))
        return
    sprites, rows, missing = render(load_packages(args.folder))
    shape = [len(sprites), 4, SIDE, SIDE]
    sets = {name: f"{package}@{version}" for name, (package, version) in PACKAGES.items()}
    (args.out / "sprites.xz").write_bytes(pack(sprites))
    (args.out / "sprites.json").write_text(json.dumps({"shape": shape, "sets": sets, "sprites": rows}, indent=0) + "\n")
    if args.sheet:
        save_sheet(sprites, args.sheet)
    print(f"{len(sprites)} sprites, {(args.out / 'sprites.xz').stat().st_size:,} bytes; not in their sets: {', '.join(missing)}")


if __name__ == "__main__":
    main()
