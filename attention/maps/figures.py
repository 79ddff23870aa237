"""Numbers of heat maps, as plain data that is strict JSON: what is not finite is None."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .drawing.scales import Scale
from .heats import Source
from .words import Word


def word_figures(source: Source, word: Word, heat: torch.Tensor, scale: Scale, threshold: float) -> dict[str, Any]:
    """Return the numbers of one word in one image; ``strength`` is its share of all attention."""
    positions = {position for part in word.parts for places in part.places.values() for position in places}
    figures = {"word": word.name, "tokens": sorted(positions)} | heat_figures(heat, scale, threshold)
    settling = _settling(source, word)
    return figures | {"strength": settling.get("mass", figures["mean"])} | settling


def heat_figures(heat: torch.Tensor, scale: Scale, threshold: float) -> dict[str, Any]:
    """Return numbers of one heat map.

    peak: its highest value and where it is (fractions of width and height, centre of the cell); mean: over all places;
    area: the part of the image at or above the threshold; entropy: 0 where all heat is in one place, 1 where it is the
    same everywhere.
    """
    rows, columns = heat.shape
    finite = heat.nan_to_num(0.0, 0.0, 0.0)
    row, column = divmod(int(finite.argmax()), columns)
    total = float(heat.sum())
    spread = heat.flatten() / total if total > 0 else torch.full((heat.numel(),), 1 / heat.numel())
    entropy = float(-(spread * spread.clamp(min=1e-30).log()).sum()) / math.log(max(heat.numel(), 2))
    return {
        "peak": {"x": short((column + 0.5) / columns), "y": short((row + 0.5) / rows), "value": short(float(heat.max()))},
        "lowest": short(float(heat.min())),
        "mean": short(float(heat.mean())),
        "area": short(float((scale.apply(heat) >= threshold).float().mean())),
        "entropy": short(entropy),
    }


def _settling(source: Source, word: Word) -> dict[str, Any]:
    """Return the word's share of all attention, and how it settled step by step (steps count from 1)."""
    if not word.places or any(source.maps.of(source.prompt, cond).figures is None for cond in word.places):
        return {}
    steps, change, mass = source.convergence(word)
    changes = [short(value) for value in change.tolist()]
    masses = [short(value) for value in mass.tolist()]
    steps_from_one = [step + 1 for step in steps]
    return {"mass": short(float(mass.mean())), "steps": {"step": steps_from_one, "change": changes, "mass": masses}}


def short(value: float) -> float | None:
    """Return the number with four digits; None where it is not finite."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def or_zero(value: float | None) -> float:
    """Return a number that a FLOAT socket can carry."""
    return 0.0 if value is None else float(value)


def has_gaps(figures: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a number is missing that a finite map would have. (The first step has no change from one before it.)"""
    for entry in (entry for picture in figures for entry in picture.get("words", [picture])):
        steps = entry.get("steps", {})
        told = [entry.get("mean"), entry.get("entropy"), entry["peak"]["value"], *steps.get("mass", [])]
        if any(value is None for value in told):
            return True
    return False


def flat_figures(figures: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return strength, area and peak by one key each, such as "cat area", for nodes that read one key of a JSON text.

    The keys of further images of a batch end in their number: "cat area 2".
    """
    flat: dict[str, float | None] = {}
    for picture in figures:
        number = picture.get("picture", 1)
        for entry in picture.get("words", [picture]):
            name = entry.get("word", "query")
            values = {
                "strength": entry["strength"],
                "area": entry["area"],
                **{f"peak {axis}": entry["peak"][axis] for axis in "xy"},
            }
            for what, value in values.items():
                flat[f"{name} {what}" if number == 1 else f"{name} {what} {number}"] = value
    return flat
