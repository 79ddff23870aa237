"""Make the image that the template browser shows for a workflow, from the workflow's own run.

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
BACKGROUND, TEXT = "#1e1f22", "#e8e8e8"
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


def make_thumbnail(images: Sequence[Path], captions: Sequence[str], target: Path) -> None:
    """Arrange images in a square with their captions: a column for each caption, or a grid where all have the same."""
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
        font = next(
            font
            for size in range(20, 0, -1)
            if (font := ImageFont.load_default(size)).getlength(caption) <= share - MARGIN or size < 9
        )
        draw.text((middle, top + rows * (side + MARGIN) + CAPTION // 2 - MARGIN), caption, fill=TEXT, font=font, anchor="mm")
    sheet.save(target, quality=88)


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
