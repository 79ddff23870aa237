"""The picture the template browser shows for a workflow, made from the workflow's own run.

The same picture as a PNG that carries the workflow, to be dragged onto ComfyUI's canvas, is in docs/workflows. After a workflow
was edited by hand:

    python dev/thumbnail.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import workflow_files
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

SIDE, MARGIN, CAPTION = 512, 8, 44
BACKGROUND, TEXT = "#1e1f22", "#e8e8e8"
TO_DRAG = Path(__file__).resolve().parent.parent / "docs" / "workflows"


def make_thumbnail(pictures: Sequence[Path], captions: Sequence[str], target: Path) -> None:
    """Pictures side by side with their captions, centred in a square."""
    sheet = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(20)
    side = (SIDE - MARGIN * (len(pictures) + 1)) // len(pictures)
    top = (SIDE - side - CAPTION) // 2
    for index, (path, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = MARGIN + index * (side + MARGIN)
        with Image.open(path) as picture:
            sheet.paste(picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (left, top))
        draw.text((left + side // 2, top + side + CAPTION // 2), caption, fill=TEXT, font=font, anchor="mm")
    sheet.save(target, quality=88)


def carry_workflow(workflow: Path) -> Path:
    """Write the workflow's picture as a PNG with the workflow in it, as ComfyUI's own saved pictures have it."""
    target = TO_DRAG / f"{workflow.stem}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("workflow", json.dumps(workflow_files.load(workflow)))
    with Image.open(workflow.with_suffix(".jpg")) as picture:
        picture.quantize(256).save(target, pnginfo=chunks, optimize=True)
    return target


if __name__ == "__main__":
    for shipped in workflow_files.shipped():
        print(carry_workflow(shipped))
