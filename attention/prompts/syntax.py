"""Prompts as text: marked subjects, ComfyUI's weight syntax, and words.

Pure string work. Spans are ``(start, end)`` character positions in the prompt exactly as the text encoder's tokenizer is
given it: with its weights and escapes, without the brackets that mark subjects.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

Span = tuple[int, int]
EMBEDDING = "embedding:"


def parse_subjects(text: str) -> tuple[str, list[Span]]:
    r"""Return ``a [cat] and a [red frog]`` -> ``a cat and a red frog`` and where the subjects are in it.

    ``\[`` and ``\]`` are literal brackets. Everything else, weights and ``\(`` included, is left for the tokenizer.

    Raises:
        ValueError: brackets that are not closed, or that mean something else in other programs (``[cat:0.8]``, ``[cat|dog]``,
            ``[[cat]]``).
    """
    plain = ""
    subjects: list[Span] = []
    opened: int | None = None
    at = 0
    while at < len(text):
        char, at = text[at], at + 1
        if char == "\\" and text[at : at + 1] in ("[", "]") and at < len(text):
            plain, at = plain + text[at], at + 1
        elif char == "[":
            if opened is not None:
                raise ValueError(
                    f"A subject is marked inside another one in '{_around(text, at)}'. Square brackets mark subjects here: mark "
                    r"each on its own. Write (word:0.8) to weaken a word, and \[ for a bracket that is part of the prompt."
                )
            opened = len(plain)
        elif char == "]":
            if opened is None:
                raise ValueError(
                    f"']' closes a subject that was never opened in '{_around(text, at)}'. Add the missing '[', "
                    r"or write \] for a bracket that is part of the prompt."
                )
            subjects.append(_subject_span(plain, opened))
            opened = None
        else:
            plain += char
    if opened is not None:
        raise ValueError(
            f"The subject '[{plain[opened:][:40]}' is never closed. Add the missing ']', "
            r"or write \[ for a bracket that is part of the prompt."
        )
    return plain, subjects


def marked_subjects(text: str) -> list[Span]:
    """Return what stands in square brackets in a text whose brackets are encoded like any other sign."""
    spans = []
    for match in re.finditer(r"(?<!\\)\[([^\[\]|:]+)\]", text):
        inside = match[1]
        if inside.strip():
            spans.append((match.start(1) + len(inside) - len(inside.lstrip()), match.start(1) + len(inside.rstrip())))
    return spans


def _subject_span(plain: str, opened: int) -> Span:
    marked = plain[opened:]
    _check_other_programs(marked)
    if not marked.strip():
        raise ValueError(r"'[]' marks no subject. Write a word of the prompt between the brackets, or \[\] for literal brackets.")
    return opened + len(marked) - len(marked.lstrip()), opened + len(marked.rstrip())


def _check_other_programs(marked: str) -> None:
    """Raise ``ValueError`` for what other programs write between brackets: weights, schedules and alternations."""
    outside = re.sub(re.escape(EMBEDDING) + r"\S+", "", marked)
    while (inner := re.sub(r"(?<!\\)\([^()]*\)", "", outside)) != outside:
        outside = inner
    if "|" in outside:
        meaning = "to alternate between words. That is not possible here"
    elif re.search(r":[^:]*:\s*-?[\d.]+\s*$|::\s*[\d.]+\s*$", outside):
        meaning = "to change words during the run. That is not possible here"
    elif re.search(r":\s*-?[\d.]+\s*$", outside):
        word, _, number = outside.rpartition(":")
        meaning = f"for weights or to let words in later. For a weight, write ([{word.strip()}]:{number.strip()})"
    else:
        return
    raise ValueError(
        f"Square brackets mark subjects here; other programs write '[{marked[:40]}]' {meaning}. Mark a subject as [cat], "
        r"or write \[ and \] for brackets that are part of the prompt."
    )


def _around(text: str, at: int) -> str:
    return text[max(0, at - 20) : at + 20].strip()


@dataclass(frozen=True)
class Reading:
    """The characters that reach a tokenizer, each with its place in the prompt, and the runs they come in."""

    chars: str
    origin: list[int]
    segments: list[Span]


def readings(prompt: str) -> list[Reading]:
    """Return how an encoder may read the prompt: with ``(word:1.2)`` as weights, and literally where it knows no weights."""
    escaped = prompt.replace("\\)", "\0\1").replace("\\(", "\0\2")  # as ComfyUI does, and as long as before
    weighted = _reading(escaped, list(_weighted_segments(escaped, 0, len(escaped))))
    literal = _reading(escaped, [(0, len(escaped))])
    return [weighted] if weighted.chars == literal.chars else [weighted, literal]


def _reading(escaped: str, spans: list[Span]) -> Reading:
    chars: list[str] = []
    origin: list[int] = []
    segments: list[Span] = []
    for start, end in spans:
        first = len(chars)
        at = start
        while at < end:
            origin.append(at)
            parenthesis = {"\0\1": ")", "\0\2": "("}.get(escaped[at : at + 2])
            chars.append(parenthesis or escaped[at])
            at += 2 if parenthesis else 1
        segments.append((first, len(chars)))
    return Reading("".join(chars), origin, segments)


def _weighted_segments(text: str, start: int, end: int) -> Iterator[Span]:
    """Yield the runs of equal weight, without parentheses and numbers: ComfyUI's ``token_weights``, keeping positions."""
    for first, last in _top_level_items(text, start, end):
        if last - first < 2 or text[first] != "(" or text[last - 1] != ")":
            yield first, last
            continue
        first, last = first + 1, last - 1
        colon = text.rfind(":", first, last)
        if colon > first and _is_number(text[colon + 1 : last]):
            last = colon
        yield from _weighted_segments(text, first, last)


def _top_level_items(text: str, start: int, end: int) -> Iterator[Span]:
    first, level = start, 0
    for at in range(start, end):
        if text[at] == "(":
            if level == 0 and at > first:
                yield first, at
                first = at
            level += 1
        elif text[at] == ")":
            level -= 1
            if level == 0:
                yield first, at + 1
                first = at + 1
    if first < end:
        yield first, end


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def embedding_names(reading: Reading) -> list[Span]:
    """Return where ``embedding:name`` is written, in positions of ``reading.chars``."""
    found = []
    for start, end in reading.segments:
        for match in re.finditer(re.escape(EMBEDDING) + r"[^\s<\[]+", reading.chars[start:end]):
            if match.start() == 0 or reading.chars[start + match.start() - 1].isspace():
                found.append((start + match.start(), start + match.start() + len(match.group().rstrip(","))))
    return found


# Scripts written without spaces between words (and Hangul, where particles stick to words): every character is a word.
_UNSPACED = [
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x9FFF), (0xAC00, 0xD7AF), (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
]  # fmt: skip
_JOINERS = "-_'\u2019\u2010"
_ZERO_WIDTH_JOINER = "\u200d"


def atoms(text: str) -> list[Span]:
    """Return the smallest words: letters and digits between anything else, single characters of unspaced scripts, whole emoji."""
    spans: list[Span] = []
    at = 0
    while at < len(text):
        end = _atom_end(text, at)
        if end is None:
            at += 1
        else:
            spans.append((at, end))
            at = end
    return spans


def _atom_end(text: str, at: int) -> int | None:
    kind = _kind(text[at])
    if kind not in ("letter", "symbol"):
        return None
    whole_word = kind == "letter" and not _unspaced(text[at])
    end = at + 1
    while end < len(text):
        following = _kind(text[end])
        joined = kind == "symbol" and (text[end - 1] == _ZERO_WIDTH_JOINER or _is_flag(text, at, end))
        if following != "mark" and not joined and not (whole_word and following == "letter" and not _unspaced(text[end])):
            break
        end += 1
    return end


def _kind(char: str) -> str | None:
    category = unicodedata.category(char)
    if category[0] in "LN":
        return "letter"
    if category[0] == "M" or category == "Cf" or "\U0001f3fb" <= char <= "\U0001f3ff":  # accents, joiners, skin tones
        return "mark"
    return "symbol" if category == "So" else None


def _is_flag(text: str, at: int, end: int) -> bool:
    return end == at + 1 and all("\U0001f1e6" <= char <= "\U0001f1ff" for char in text[at : end + 1])


def _unspaced(char: str) -> bool:
    return any(first <= ord(char) <= last for first, last in _UNSPACED)


def _is_hangul(char: str) -> bool:
    return "\uac00" <= char <= "\ud7af"


def joined_words(text: str, spans: list[Span]) -> list[list[Span]]:
    """Return atoms grouped as people read them: ``sun-glasses``, ``don't`` and Korean between spaces are one word each."""
    words: list[list[Span]] = []
    for span in spans:
        if words and _joins(text, words[-1], span):
            words[-1].append(span)
        else:
            words.append([span])
    return words


def _joins(text: str, word: list[Span], span: Span) -> bool:
    between = text[word[-1][1] : span[0]]
    if not between and _is_hangul(text[span[0]]) and _is_hangul(text[word[-1][0]]):
        return True
    return len(between) == 1 and between in _JOINERS and not _unspaced(text[span[0]]) and not _unspaced(text[word[-1][0]])


def key(word: str) -> str:
    """Return what words are compared by: case, width and compatibility forms do not matter."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", word).casefold()).replace("\ufe0f", "")
