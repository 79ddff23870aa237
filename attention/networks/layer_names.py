"""The syntax of the ``layers`` input: ``input.4, middle, output.3-5``.

A layer is named by its block (``input.4``, ``double.7``); a block with several transformers has one layer for each
(``output.3.0``, ``output.3.1``). A name stands for everything below it, and the last number may be a range.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_RANGE = re.compile(r"((?:[a-z]+\.)(?:\d+\.)*)(\d+)-(\d+)")


def parse_layers(text: str, names: Sequence[str]) -> list[str]:
    """Return the layers that ``text`` chooses among ``names``, in their order; all of them where it is empty."""
    wanted = [item.strip().lower() for item in text.replace(";", ",").split(",") if item.strip()]
    if not wanted:
        return list(names)
    chosen = {name for item in wanted for name in _chosen(item, names)}
    return [name for name in names if name in chosen]


def _chosen(item: str, names: Sequence[str]) -> list[str]:
    found = _below(item, names)
    part = _RANGE.fullmatch(re.sub(r"\s*-\s*", "-", item))
    if part is not None:
        first, last = int(part[2]), int(part[3])
        if _below(f"{part[1]}{first}", names) and _below(f"{part[1]}{last}", names):
            found = [name for index in range(first, last + 1) for name in _below(f"{part[1]}{index}", names)]
    if not found:
        raise ValueError(f"layers names '{item}', which this model does not have. Its layers: {list_layers(names)}.")
    return found


def _below(stem: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if name == stem or name.startswith(f"{stem}.")]


def list_layers(names: Sequence[str]) -> str:
    """Return names with runs of numbers drawn together: ``input.1-2, input.4-5, middle``."""
    parts: list[str] = []
    run: tuple[str, int, int] | None = None
    for name in dict.fromkeys(names):
        stem, _, number = name.rpartition(".")
        if not number.isdecimal():
            stem, number = name, ""
        if run is not None and number and stem == run[0] and int(number) == run[2] + 1:
            run = (stem, run[1], int(number))
            parts[-1] = f"{stem}.{run[1]}-{run[2]}"
        else:
            run = (stem, int(number), int(number)) if number else None
            parts.append(name)
    return ", ".join(parts)
