"""Fonts for images: Pillow's bundled one, which has the Latin letters of English only, and the system's for the rest."""

from __future__ import annotations

from functools import cache

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Asked by file name; Pillow looks into the system's font folders. Wide coverage first.
_SYSTEM_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "msyh.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "Arial Unicode.ttf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "simhei.ttf",
    "DejaVuSans.ttf",
    "segoeui.ttf",
    "arial.ttf",
    "Helvetica.ttc",
    "seguiemj.ttf",
)


@cache
def _bundled(size: int) -> Font:
    return ImageFont.load_default(size=size)


@cache
def _system(name: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(name, size)
    except (OSError, ImportError):
        return None


@cache
def _draws(font: Font, char: str) -> bool:
    """Return whether the font has the character, told by its image: a missing one looks like a code that no font has."""
    return bytes(font.getmask(char)) != bytes(font.getmask("\uffff"))


def _coverage(font: Font, text: str) -> int:
    return sum(char.isspace() or _draws(font, char) for char in text)


@cache
def font_for(text: str, size: int) -> Font:
    """Return the bundled font where it can write the text, else the font of the system that can write most of it."""
    bundled = _bundled(size)
    if text.isascii():
        return bundled
    candidates: list[Font] = [bundled]
    for name in _SYSTEM_FONTS:
        font = _system(name, size)
        if font is not None:
            candidates.append(font)
    return max(candidates, key=lambda font: _coverage(font, text))


def fit(text: str, font: Font, room: float) -> str:
    """Return ``text``, or as much of its beginning as fits into ``room`` pixels."""
    if font.getlength(text) <= room:
        return text
    shorter = text
    while shorter and font.getlength(shorter + "...") > room:
        shorter = shorter[:-1]
    return shorter.rstrip() + "..." if shorter else ""
