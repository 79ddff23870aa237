"""Line charts over the steps of a run, drawn with Pillow at twice the size and scaled down, for smooth lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from .canvas import LINE, MUTED, TEXT, Canvas, Figure, number
from .fonts import fit, font_for
from .pixels import to_tensor

_SMOOTH = 2
_MOST_NAMES = 16
Color = tuple[float, float, float]


@dataclass(frozen=True)
class Series:
    """One line: (x, y) points in order; a y that is not a number leaves a gap."""

    name: str
    color: Color
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """One pair of axes. The y axis starts at 0."""

    title: str
    series: Sequence[Series]


@dataclass(frozen=True)
class Marker:
    """A vertical line at ``x`` with its name."""

    x: float
    name: str


def line_chart(
    plots: Sequence[Plot],
    title: str,
    subtitle: str,
    x_title: str,
    x_range: tuple[float, float],
    markers: Sequence[Marker] = (),
    *,
    width: int = 1024,
) -> Figure:
    """Plots below each other over one x axis, with one legend."""
    unit = width * _SMOOTH / 512
    names = [(series.name, series.color) for series in plots[0].series] if plots else []
    legend, legend_height = _legend(names, width * _SMOOTH, unit)
    head, each, foot = 58 * unit, 150 * unit, 36 * unit
    canvas = Canvas(width * _SMOOTH, round(head + legend_height + len(plots) * each + foot), unit)
    canvas.text((14 * unit, 11 * unit), title, 18, room=484 * unit)
    canvas.text((14 * unit, 35 * unit), subtitle, 12, MUTED, room=484 * unit)
    for (x, y), (name, color) in zip(legend, names, strict=False):
        canvas.pen.line((x, head + y + 8 * unit, x + 16 * unit, head + y + 8 * unit), fill=_rgb(color), width=round(3 * unit))
        font = font_for(name, round(13 * unit))
        canvas.text((x + 21 * unit, head + y + 8 * unit), fit(name, font, 120 * unit), 13, anchor="lm")
    if len(names) > len(legend):
        canvas.text((498 * unit, head + legend_height - 12 * unit), f"and {len(names) - len(legend)} more", 12, MUTED, "rm")
    for index, plot in enumerate(plots):
        top = head + legend_height + index * each
        box = (52 * unit, top + 26 * unit, 496 * unit, top + each - 10 * unit)
        _draw_plot(canvas, plot, box, x_range, markers, named=index == 0)
    bottom = head + legend_height + len(plots) * each
    for x in ticks(*x_range, 9, whole=True):
        place = _at(x, x_range, (52 * unit, 496 * unit))
        canvas.text((place, bottom - 6 * unit), number(x), 12, MUTED, "ma")
    canvas.text((274 * unit, bottom + 28 * unit), x_title, 12, MUTED, "ms")
    small = canvas.sheet.resize((width, round(canvas.sheet.height / _SMOOTH)), Image.Resampling.LANCZOS)
    return Figure(to_tensor(small))


def _draw_plot(
    canvas: Canvas,
    plot: Plot,
    box: tuple[float, float, float, float],
    x_range: tuple[float, float],
    markers: Sequence[Marker],
    *,
    named: bool,
) -> None:
    unit, (left, top, right, bottom) = canvas.unit, box
    values = [y for series in plot.series for _, y in series.points if math.isfinite(y)]
    marks = ticks(0, max(values, default=0) or 1, 4)
    y_range = (0.0, max(marks[-1], max(values, default=0)))
    canvas.text((left, top - 8 * unit), plot.title, 13, anchor="ls", room=right - left)
    for value in marks:
        y = _at(value, y_range, (bottom, top))
        canvas.pen.line((left, y, right, y), fill=LINE, width=max(round(unit * 0.7), 1))
        canvas.text((left - 6 * unit, y), number(value), 12, MUTED, "rm")
    for marker in markers:
        x = _at(marker.x, x_range, (left, right))
        for dash in range(int(top), int(bottom), max(round(9 * unit), 2)):
            canvas.pen.line((x, dash, x, min(dash + 5 * unit, bottom)), fill=TEXT, width=max(round(1.4 * unit), 1))
        if named:
            on_left = x > (left + right) / 2
            canvas.text(
                (x - 6 * unit if on_left else x + 6 * unit, top + 3 * unit), marker.name, 12, TEXT, "ra" if on_left else "la"
            )
    for series in plot.series:
        _draw_series(
            canvas, [(_at(x, x_range, (left, right)), _at(y, y_range, (bottom, top))) for x, y in series.points], series.color
        )
    if not values:
        canvas.text(((left + right) / 2, (top + bottom) / 2), "needs at least two recorded steps", 13, MUTED, "mm")


def _draw_series(canvas: Canvas, points: Sequence[tuple[float, float]], color: Color) -> None:
    """Lines between neighbours, with a dot on each point where there is room for it."""
    fill, stroke = _rgb(color), max(round(2 * canvas.unit), 1)
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if math.isfinite(y0) and math.isfinite(y1):
            canvas.pen.line((x0, y0, x1, y1), fill=fill, width=stroke)
    radius = (1.0 if len(points) > 40 else 2.4) * canvas.unit
    for x, y in points:
        if math.isfinite(y):
            canvas.pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _legend(names: Sequence[tuple[str, Color]], width: float, unit: float) -> tuple[list[tuple[float, float]], float]:
    """Return where the first names go, and the height of all lines."""
    x, y = 14 * unit, 0.0
    places: list[tuple[float, float]] = []
    for name, _ in names[:_MOST_NAMES]:
        font = font_for(name, round(13 * unit))
        length = 37 * unit + font.getlength(fit(name, font, 120 * unit))
        if x + length > width and places:
            x, y = 14 * unit, y + 20 * unit
        places.append((x, y))
        x += length
    return places, y + (26 if len(names) <= _MOST_NAMES else 44) * unit


def _at(value: float, span: tuple[float, float], pixels: tuple[float, float]) -> float:
    low, high = span
    share = (value - low) / (high - low) if high > low else 0.5
    return pixels[0] + share * (pixels[1] - pixels[0])


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """At most about ``count`` round numbers from ``low`` on; the last one is not below ``high`` unless they are whole."""
    span = max(high - low, 1e-12)
    power = 10.0 ** math.floor(math.log10(span / count))
    factors = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next((factor * power for factor in factors if factor * power * count >= span), 10 * power)
    if whole:
        step = max(round(step), 1)
        return [value * step for value in range(math.ceil(low / step), math.floor(high / step) + 1)]
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [value * step for value in range(first, last + 1)]


def _rgb(color: Color) -> tuple[int, int, int]:
    red, green, blue = (round(channel * 255) for channel in color)
    return red, green, blue
