"""Make the image that the template browser shows for a workflow, from the workflow's own run.

A workflow for a model that is not here shows the same effect on the demo model, or its own graph, and says so: `shown_by_others`.
The same image as a PNG that carries the workflow, to be dragged onto ComfyUI's canvas, is in docs/workflows, and some are in
the help pages. After a workflow was edited by hand, or has a new thumbnail:

    python dev thumbnails
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from workflows import workflow_files

SIDE, MARGIN, CAPTION = 512, 8, 44
BACKGROUND, TEXT, FAINT, WIRE = "#1e1f22", "#e8e8e8", "#a8a8a8", "#8a93a6"
ROOT = Path(__file__).resolve().parent.parent.parent
TO_DRAG = ROOT / "docs" / "workflows"
IN_HELP = {
    "t-gate": "T-GATE - same image, faster",
    "attend-and-excite": "Attend-and-Excite - every subject in the image",
    "attention-distillation": "Attention Distillation - style from an image",
    "attention-maps": "Attention maps - where each word looks",
    "seamless": "Attention Distillation - seamless and large textures",
    "dit": "DiT - class to image",
}
HELP_SIDE = 384


def make_thumbnail(images: Sequence[Path], captions: Sequence[str], target: Path, below: str = "") -> None:
    """Arrange images in a square with their captions: a column for each caption, or a grid where all have the same.

    ``below`` is a small line under them.
    """
    groups: dict[str, list[Path]] = {}
    for path, caption in zip(images, captions, strict=True):
        groups.setdefault(caption, []).append(path)
    if len(groups) == 1:
        wide = math.ceil(math.sqrt(len(images)))
        columns = [list(images[column::wide]) for column in range(wide)]
    else:
        columns = list(groups.values())
    rows = max(map(len, columns))
    side = min((SIDE - MARGIN) // len(columns), (SIDE - CAPTION - MARGIN) // rows) - MARGIN
    left = (SIDE - len(columns) * (side + MARGIN) + MARGIN) // 2
    top = (SIDE - rows * (side + MARGIN) + MARGIN - CAPTION) // 2
    sheet = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for across, column in enumerate(columns):
        for down, path in enumerate(column):
            with Image.open(path) as image:
                small = ImageOps.pad(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS, color=BACKGROUND)
                sheet.paste(small, (left + across * (side + MARGIN), top + down * (side + MARGIN)))
    share = SIDE // len(groups)
    for index, caption in enumerate(groups):
        middle = left + index * (side + MARGIN) + side // 2 if len(groups) > 1 else SIDE // 2
        font = _font(caption, share - MARGIN)
        draw.text((middle, top + rows * (side + MARGIN) + CAPTION // 2 - MARGIN), caption, fill=TEXT, font=font, anchor="mm")
    _write_below(draw, below)
    sheet.save(target, quality=88)


def _font(text: str, width: float, most: int = 20) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Return the largest font in which the text fits."""
    return next(
        font for size in range(most, 0, -1) if (font := ImageFont.load_default(size)).getlength(text) <= width or size < 9
    )


def _write_below(draw: ImageDraw.ImageDraw, text: str) -> None:
    if text:
        font = _font(text, SIDE - 4 * MARGIN, 18)
        draw.text((SIDE // 2, SIDE - CAPTION // 2), text, fill=FAINT, font=font, anchor="mm")


def draw_graph(workflow: Path, target: Path, below: str) -> None:
    """Draw the nodes and wires of a workflow with the nodes' titles, for one whose images cannot be made here."""
    content = workflow_files.load(workflow)
    nodes = {node["id"]: node for node in content["nodes"] if node["type"] not in workflow_files.NOTES}
    columns = sorted({node["pos"][0] for node in nodes.values()})
    rows = [sorted((n for n in nodes.values() if n["pos"][0] == x), key=lambda node: node["pos"][1]) for x in columns]
    high, wide = 34, (SIDE - MARGIN) / len(columns) - 2 * MARGIN
    places = {}
    for across, column in enumerate(rows):
        for down, node in enumerate(column):
            gap = (SIDE - CAPTION) / (len(column) + 1)
            places[node["id"]] = (2 * MARGIN + across * (wide + 2 * MARGIN), gap * (down + 1) - high / 2)
    sheet = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for _, source, _, to, *_ in content["links"]:
        (left, top), (right, bottom) = places[source], places[to]
        draw.line([(left + wide, top + high / 2), (right, bottom + high / 2)], fill=WIRE, width=1)
    for key, (left, top) in places.items():
        node = nodes[key]
        draw.rounded_rectangle([left, top, left + wide, top + high], 5, fill=node.get("bgcolor", "#353535"), outline=WIRE)
        title = node.get("title") or node["type"]
        draw.text((left + wide / 2, top + high / 2), title, fill=TEXT, font=_font(title, wide - MARGIN, 14), anchor="mm")
    _write_below(draw, below)
    sheet.save(target, quality=90)


def carry_workflow(workflow: Path) -> Path:
    """Write the workflow's image as a PNG with the workflow in it, as ComfyUI's own saved images have it."""
    target = TO_DRAG / f"{workflow.stem}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("workflow", json.dumps(workflow_files.load(workflow)))
    with Image.open(workflow.with_suffix(".jpg")) as image:
        image.quantize(256).save(target, pnginfo=chunks, optimize=True)
    return target


def illustrate_help(name: str, workflow: str) -> Path:
    """Write the workflow's image where the help pages show it."""
    target = ROOT / "web" / "docs" / "images" / f"{name}.jpg"
    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(workflow_files.FOLDER / f"{workflow}.jpg") as image:
        image.resize((HELP_SIDE, HELP_SIDE), Image.Resampling.LANCZOS).save(target, quality=84)
    return target


if __name__ == "__main__":
    for name, title in IN_HELP.items():
        print(illustrate_help(name, title))
    for shipped in workflow_files.shipped():
        print(carry_workflow(shipped))
