"""Lists of words as people type or paste them into a node: ``cat, (red frog:1.2), "red, white flag"``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from .syntax import Span, key, parse_subjects, readings

_SEPARATORS = ",\N{FULLWIDTH COMMA}\N{IDEOGRAPHIC COMMA};\N{FULLWIDTH SEMICOLON}\r\n"
_QUOTES = {'"': '"', "\N{LEFT DOUBLE QUOTATION MARK}": "\N{RIGHT DOUBLE QUOTATION MARK}"}
_GROUP = re.compile(r"\d+(\s*\+\s*\d+)*")


def parse_word_list(text: str) -> list[str]:
    r"""Return the words and phrases of a list, in order, each once (case and width do not matter).

    Entries are separated by commas, semicolons (Western or Chinese) or new lines. Weights, parentheses and escapes are read
    as a prompt reads them: ``(red frog:1.2)`` is ``red frog``, ``saber \(fate\)`` is ``saber (fate)``. Square brackets and
    double quotes hold a phrase together: ``[red, white and blue flag]`` is one entry.

    Raises:
        ValueError: brackets that mark no subject, such as ``[cat:0.8]``; see ``parse_subjects``.
    """
    plain, subjects = parse_subjects(text)
    reading = readings(plain)[0]
    whole = [any(start <= origin < end for start, end in subjects) for origin in reading.origin]
    entries: dict[str, str] = {}
    for start, end in _entries(reading.chars, whole):
        entry = _tidy(reading.chars[start:end])
        if entry:
            entries.setdefault(key(entry), entry)
    return list(entries.values())


def parse_token_groups(items: Sequence[str]) -> list[tuple[int, ...]] | None:
    """Return the positions that each entry of a list names (``2+3, 5`` -> (2, 3), (5,)); None where not all are positions."""
    if not items or not all(is_token_group(item) for item in items):
        return None
    return [token_group(item) for item in items]


def is_token_group(item: str) -> bool:
    """Return whether an entry of a list is a token position, or several joined by ``+``."""
    return _GROUP.fullmatch(item.strip()) is not None


def token_group(item: str) -> tuple[int, ...]:
    """Return the token positions of one entry, ascending; see ``is_token_group``."""
    return tuple(sorted({int(number) for number in item.split("+")}))


def _entries(chars: str, whole: Sequence[bool]) -> Iterator[Span]:
    """Yield the entries between separators. Characters that are part of a ``whole`` or of a quotation separate nothing."""
    start, at = 0, 0
    while at < len(chars):
        closing = _closing_quote(chars, at) if not chars[start:at].strip() else None
        if closing is not None:
            at = closing
        elif chars[at] in _SEPARATORS and not whole[at]:
            yield start, at
            start = at + 1
        at += 1
    yield start, len(chars)


def _closing_quote(chars: str, at: int) -> int | None:
    """Return where the quotation that begins at ``at`` ends; None where none does."""
    if chars[at] not in _QUOTES:
        return None
    closing = chars.find(_QUOTES[chars[at]], at + 1)
    return closing if closing > at else None


def _tidy(entry: str) -> str:
    """Return an entry without its quotation marks, doubled spaces, and parentheses whose other half is elsewhere."""
    entry = " ".join(entry.split())
    if entry and _closing_quote(entry, 0) is not None:
        closing = entry.index(_QUOTES[entry[0]], 1)
        entry = entry[1:closing].strip() + entry[closing + 1 :]
    while entry.endswith(")") and entry.count(")") > entry.count("("):
        entry = entry[:-1].rstrip()
    while entry.startswith("(") and entry.count("(") > entry.count(")"):
        entry = entry[1:].lstrip()
    return entry
