"""Class labels of a DiT: what people type, and the conditioning that carries class indices to the model."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..host import CLASS_LABELS as LABELS
from .blends import MOST_CLASSES, to_rows

Conditioning = list[list[Any]]

_SEPARATORS = re.compile("[,;\N{IDEOGRAPHIC COMMA}\n\r\t|]")
_BRACKETS = (
    "\"'`[]{}\N{LEFT BLACK LENTICULAR BRACKET}\N{RIGHT BLACK LENTICULAR BRACKET}\N{LEFT CORNER BRACKET}\N{RIGHT CORNER BRACKET}"
)
_NUMBER = re.compile(r"(?:class(?:es)?|labels?|index)?[\s:_#]*(\d+)", re.IGNORECASE)
_NUMBERED_NAME = re.compile(r"(\d+)(?:\s*:\s*|\s+-\s+|\s+)(.+)")
_NAME_OF_NUMBER = re.compile(r"(.*[^\W\d].*?)\s*:\s*(\d+)")  # the other way round: "golden retriever: 207"
_QUOTED_KEY = re.compile(r"""["']\s*:\s*[\["'\s]*""")  # of JSON and Python: "207": ["n02099601", "golden_retriever"]
_WORDNET = re.compile(r"(n\d{8})(?:[\s_:]+(.*))?", re.IGNORECASE)


def _lines(file: str) -> tuple[str, ...]:
    return tuple(Path(__file__).with_name(file).read_text(encoding="utf-8").splitlines())


@cache
def imagenet_names() -> tuple[str, ...]:
    """Return the 1000 classes of ILSVRC 2012 by index: WordNet's name, and after commas its synonyms."""
    return _lines("imagenet_names.txt")


@cache
def imagenet_ids() -> dict[str, int]:
    """Return the index of each class by its WordNet id, which is the name of its folder in ImageNet ("n02099601": 207)."""
    return {name: index for index, name in enumerate(_lines("imagenet_ids.txt"))}


@cache
def _synonyms() -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(line.split(", ")) for line in imagenet_names())


@cache
def _plain_synonyms() -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(map(_plain, names)) for names in _synonyms())


def label_options() -> list[str]:
    """Return one line per class, to choose and to search: "207: golden retriever"."""
    return [f"{index}: {names}" for index, names in enumerate(imagenet_names())]


def parse_labels(text: str) -> list[int]:
    """Return class indices of a list of numbers, names and WordNet ids, in any of the ways lists are written.

    Entries are separated by commas, semicolons or lines, and may be in brackets and quotes. A class with its synonyms, such as
    an entry of the node's own list, is one entry in spite of its commas; so is a number or id with the names of its class.

    Raises:
        ValueError: a name that is not there or means several classes; the message names those that come close.
    """
    return [index for index, _ in _read(text)]


def described_labels(text: str) -> str:
    """Return what ``parse_labels`` reads in a list, in one line: "207, 281 (tabby)".

    An entry that is a name or a WordNet id has the first name of its class after the number. A number stands alone, because a
    model may have been trained on other classes than ImageNet's.
    """
    most = 12
    read = _read(text)
    rest = f" and {len(read) - most} more" if len(read) > most else ""
    return ", ".join(_shown(index) if by_name else str(index) for index, by_name in read[:most]) + rest


def _read(text: str) -> list[tuple[int, bool]]:
    """Return the class of each entry of a list, and whether it is there by a name."""
    entries = _entries(text)
    read: list[tuple[int, bool]] = []
    while entries:
        index, used = _first(entries)
        by_name = not any(form.fullmatch(entries[0]) for form in (_NUMBER, _NUMBERED_NAME, _NAME_OF_NUMBER))
        read.append((index, by_name))
        entries = entries[used:]
    return read


def _entries(text: str) -> list[str]:
    """Return the parts of a list as somebody pasted it: full-width signs, brackets and quotes mean nothing."""
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'").strip()
    text = re.sub(r"^\s*(?:np\.|torch\.)?(?:array|tensor)\s*(?=\()", "", text)
    while text[:1] == "(" and text[-1:] == ")" and "(" not in text[1:-1]:
        text = text[1:-1]
    text = re.sub(r"\s*=\s*", ": ", _QUOTED_KEY.sub(": ", text))
    parts = [part.strip().strip(_BRACKETS).strip().removesuffix(".") for part in _SEPARATORS.split(text)]
    spaced = (part.split() if re.fullmatch(r"\d+(\s+\d+)+", part) else [part] for part in parts)
    return [part for group in spaced for part in group if part]


def _first(entries: Sequence[str]) -> tuple[int, int]:
    """Return the class that a list begins with, and how many of its entries name it."""
    entry = entries[0]
    number, numbered, wordnet = _NUMBER.fullmatch(entry), _NUMBERED_NAME.fullmatch(entry), _WORDNET.fullmatch(entry)
    if number:
        index = _checked(number[1])
        return index, 1 + _spelled(index, entries[1:])
    if numbered:
        index = _checked(numbered[1])
        if id_of_it := _WORDNET.fullmatch(numbered[2]):
            _check_same_class(index, id_of_it[1], entry)
            return index, 1 + _spelled(index, entries[1:])
        same = _spelled(index, [numbered[2], *entries[1:]])
        if same or ":" in entry:  # the names of other classes than ImageNet's are not known
            return index, same or 1
    if wordnet:
        found = _of_id(wordnet[1], entry)
        names = [wordnet[2], *entries[1:]] if wordnet[2] else entries[1:]
        return found, max(1, _spelled(found, names) + (not wordnet[2]))
    name_first = _NAME_OF_NUMBER.fullmatch(entry)
    if name_first:
        return _checked(name_first[2]), 1
    spelled = {index: used for index in range(len(imagenet_names())) if (used := _spelled(index, entries)) > 1}
    if spelled:
        index = max(spelled, key=lambda index: spelled[index])
        return index, spelled[index]
    return _named(entry), 1


def _of_id(wordnet: str, entry: str) -> int:
    found = imagenet_ids().get(wordnet.lower())
    if found is None:
        raise ValueError(
            f"labels has '{entry}', which is the WordNet id of none of ImageNet's {len(imagenet_ids())} classes. Write the class "
            "number."
        )
    return found


def _check_same_class(index: int, wordnet: str, entry: str) -> None:
    """Raise ``ValueError`` for an entry whose number and WordNet id are those of two classes."""
    found = _of_id(wordnet, entry)
    if found != index:
        raise ValueError(f"labels has '{entry}', but {wordnet} is class {_shown(found)}. Write one of them.")


def _checked(digits: str) -> int:
    if len(digits) > 9 or int(digits) >= MOST_CLASSES:
        raise ValueError(f"labels has '{digits}', which is not a class number: ImageNet's are 0 to {len(imagenet_names()) - 1}.")
    return int(digits)


def _spelled(index: int, entries: Sequence[str]) -> int:
    """Return how many of the first entries are the names of a class, in their order and from the first on."""
    used = 0
    names = _plain_synonyms()[index] if index < len(imagenet_names()) else ()
    for entry, name in zip(map(_plain, entries), names, strict=False):
        if entry not in (name, _without_note(name)):
            break
        used += 1
    return used


def _plain(name: str) -> str:
    """Return a name as it is compared: without case, hyphens, underscores, double spaces, quotes around it and a last dot."""
    return re.sub(r"[\s_-]+", " ", name.strip(_BRACKETS)).strip(" .").lower()


def _without_note(name: str) -> str:
    """Return "crane" of "crane (bird)"."""
    return re.sub(r" \(.*", "", name)


def _named(entry: str) -> int:
    """Return the class of a name or of a word in names.

    Raises:
        ValueError: it is none, or the word of several.
    """
    found = _of_name(entry)
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"labels has '{entry}', which is the name of several classes: {_listed(found)}. Write the number.")
    found = _of_word(entry)
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"labels has '{entry}', which is a word in the names of several classes: {_listed(found)}. Write the number or the "
            "whole name."
        )
    every = {name: index for index, names in reversed(list(enumerate(_plain_synonyms()))) for name in names}
    close = dict.fromkeys(every[name] for name in difflib.get_close_matches(_plain(entry), every, n=4))
    hint = f" Did you mean {' or '.join(_shown(index) for index in close)}?" if close else ""
    raise ValueError(
        f"labels has '{entry}', which is neither a class number nor one of ImageNet's names.{hint} Separate several by commas."
    )


def _of_name(name: str) -> list[int]:
    """Return the classes of that name.

    The first of a class's names counts before its synonyms, the exact letters before any case.
    """
    plain = _plain(name)
    firsts = [i for i, own in enumerate(_synonyms()) if own[0] == name]
    firsts = firsts or [i for i, own in enumerate(_plain_synonyms()) if plain in (own[0], _without_note(own[0]))]
    return firsts or [i for i, own in enumerate(_plain_synonyms()) if plain in own]


def _of_word(word: str) -> list[int]:
    """Return the classes in whose names a word stands, whole, also in the plural; else those in which it is a part of a word."""
    plain = _plain(word)
    if len(plain) < 3 or not re.search(r"[a-z]", plain):
        return []
    whole = re.compile(rf"\b{re.escape(plain.removesuffix('s'))}s?\b")
    found = [i for i, own in enumerate(_plain_synonyms()) if any(whole.search(name) for name in own)]
    parts = [i for i, own in enumerate(_plain_synonyms()) if any(plain in name for name in own)]
    return found or (parts if len(parts) > 1 else [])


def _listed(indices: Sequence[int]) -> str:
    most = 12
    rest = f" and {len(indices) - most} more" if len(indices) > most else ""
    return ", ".join(_shown(index) for index in indices[:most]) + rest


def _shown(index: int) -> str:
    return f"{index} ({_synonyms()[index][0]})"


def listed(names: Sequence[str], most: int = 100) -> str:
    """Return a model's own class names with their numbers, in one line: "0 (cat), 1 (dog)"."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"{index} ({name[:40]})" for index, name in enumerate(names[:most])) + rest


def label_conditioning(labels: list[int]) -> Conditioning:
    """Return a CONDITIONING of class indices, one for each image of the batch.

    The indices are integers beside the tensor in which text has its features: that one ComfyUI casts to the model's precision.
    The tensor has them too (``blends``), so that nodes which zero or average it do so to classes.
    """
    return [[to_rows(labels), {LABELS: torch.tensor(labels, dtype=torch.int64)}]]
