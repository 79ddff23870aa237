"""The picture the template browser shows for a workflow, made from the workflow's own run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE, MARGIN, CAPTION = 512, 8, 44
BACKGROUND, TEXT = "#1e1f22", "#e8e8e8"


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
