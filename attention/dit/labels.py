"""Class labels of a DiT: ImageNet's names, and the conditioning that carries class indices to the model."""

from __future__ import annotations

import difflib
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

LABELS = "fovea_class_labels"  # in a conditioning: (n,) int64, one for each image of the batch
NULL = -1  # "no class", whose index depends on the model
Conditioning = list[list[Any]]


@cache
def imagenet_names() -> tuple[str, ...]:
    """Return the 1000 classes of ILSVRC 2012 by index: WordNet's name, and after commas its synonyms."""
    text = Path(__file__).with_name("imagenet_names.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def label_options() -> list[str]:
    """Return one line per class, to choose and to search: "207: golden retriever"."""
    return [f"{index}: {names}" for index, names in enumerate(imagenet_names())]


def parse_labels(text: str) -> list[int]:
    """Return class indices of a comma separated list of numbers and names.

    Raises:
        ValueError: a name that is not there or means several classes; the message names those that come close.
    """
    entries = [entry.strip() for entry in text.replace("\n", ",").split(",")]
    return [_index(entry) for entry in entries if entry]


def _index(entry: str) -> int:
    number = re.match(r"(\d+)(:|$)", entry)
    if number:
        return int(number[1])
    found = _named(entry)
    if len(found) == 1:
        return found[0]
    if found:
        choices = ", ".join(_shown(index) for index in found)
        raise ValueError(f"labels has '{entry}', which is the name of several classes: {choices}. Write the number.")
    every = {name.lower(): index for index, names in reversed(list(enumerate(imagenet_names()))) for name in names.split(", ")}
    close = dict.fromkeys(every[name] for name in difflib.get_close_matches(entry.lower(), every, n=4))
    hint = f" Did you mean {' or '.join(_shown(index) for index in close)}?" if close else ""
    raise ValueError(
        f"labels has '{entry}', which is neither a class number nor one of ImageNet's names.{hint} Separate several by commas."
    )


def _shown(index: int) -> str:
    return f"{index} ({imagenet_names()[index].split(', ')[0]})"


def _named(name: str) -> list[int]:
    """Classes of that name. The first of a class's names counts before its synonyms, the exact letters before any case."""
    names = [line.split(", ") for line in imagenet_names()]
    tests = (
        lambda own: own[0] == name,
        lambda own: re.sub(r" \(.*", "", own[0]).lower() == name.lower(),
        lambda own: name.lower() in (one.lower() for one in own),
    )
    return next((found for test in tests if (found := [i for i, own in enumerate(names) if test(own)])), [])


def label_conditioning(labels: list[int]) -> Conditioning:
    """Return a CONDITIONING of class indices, one for each image of the batch.

    The indices are integers beside the tensor in which text has its features: that one ComfyUI casts to the model's
    precision. It is a mark instead, of one; where a node has zeroed it, the class is to be left out.
    """
    return [[torch.ones(1, 1, 1), {LABELS: torch.tensor(labels, dtype=torch.int64)}]]
