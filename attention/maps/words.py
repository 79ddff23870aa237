"""Which words of a prompt a view is about.

A word may have several tokens, occur several times, and (where prompts are combined) in several entries of the conditioning.
``cat + dog`` is both, ``cat - eyes`` is the cat without its eyes; ``<start>`` and ``<end>`` are the tokens around a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..prompts import FINGERPRINT, METADATA, PromptInfo, TokenMap, UnknownEncoder, parse_word_list, prompt_infos
from ..prompts.syntax import EMBEDDING, atoms, joined_words, key
from .attn_maps import AttnMaps
from .recording import PromptMaps

_MARKS = {"<start>": "start", "<end>": "end"}
_OPERATOR = re.compile(r"\s+([+\N{MINUS SIGN}\N{EN DASH}-])\s+")


@dataclass(frozen=True)
class Word:
    """A word that is shown.

    Attributes:
        places: index of the conditioning's entry -> token positions. Empty: the word is not in this prompt.
        others: further words, each with whether it is added (union) or taken away (difference).
        missing: why there is no place.
    """

    name: str
    places: dict[int, list[int]]
    others: tuple[tuple[bool, Word], ...] = ()
    missing: str = ""

    @property
    def parts(self) -> list[Word]:
        """Return the words that it is made of."""
        return [Word(self.name, self.places), *(word for _, word in self.others)]


def read_prompt(maps: AttnMaps, prompt: str, clip: Any, text: str) -> list[PromptInfo]:
    """Return what is known of the prompt's words, for each entry of its conditioning.

    Raises:
        ValueError: nothing is known, or ``text`` is not the prompt that was sampled.
    """
    maps.of(prompt)  # says what to do where this prompt was not recorded
    if not maps.has_text:
        raise ValueError(
            "This model gave no attention to words (it has no text tokens, or its layers could not be read), so there are no "
            "word maps. Choose the view 'self-attention', with 'self_attention' switched on in Capture Attention Maps."
        )
    entries = [entry for entry in maps.require().prompts if entry.prompt == prompt]
    try:
        infos = prompt_infos([_known(entry) for entry in entries], clip, text)
    except ValueError as error:
        has_clip = clip is not None and not isinstance(error, UnknownEncoder)  # else no text helps
        if has_clip and not text.strip():
            raise ValueError(
                f"'clip' is connected but 'text' is empty: write the {prompt} prompt there, exactly as it was encoded."
            ) from error
        typed = " Write the prompt exactly as it was sampled." if has_clip else ""
        raise ValueError(f"The words of the {prompt} prompt cannot be read. {error}{typed}") from error
    for entry, info in zip(entries, infos, strict=True):
        rows = 0 if METADATA in _known(entry) or entry.fingerprint else entry.rows
        if info.tokens.length > entry.tokens or (rows and info.tokens.conditioning_length != rows):
            raise ValueError(
                f"The {prompt} prompt has {info.tokens.length} tokens, but the sampled one had {rows or entry.tokens}: "
                "'text' or 'clip' is not what was encoded. Write the prompt exactly as it was sampled, or use "
                "'Prompt with Subjects'."
            )
    return infos


def _known(maps: PromptMaps) -> dict[str, Any]:
    """Return what is known of a prompt, as it stands in an entry of a conditioning."""
    known = {} if not maps.metadata else maps.metadata if METADATA in maps.metadata else {METADATA: maps.metadata}
    return {**known, FINGERPRINT: maps.fingerprint} if maps.fingerprint else known


def choose_words(infos: Sequence[PromptInfo], words: str) -> list[Word]:
    """Return the words that were asked for; else the marked subjects; else every word of the prompt.

    A word that the prompt does not have stays in its place, without positions, so that prompts with wildcards give equal
    numbers of masks.

    Raises:
        ValueError: the prompt has none of the words.
    """
    try:
        wanted = parse_word_list(words)
    except ValueError as error:
        raise ValueError(f"words: {error}") from error
    if wanted:
        chosen = [_combined(item, infos) for item in wanted]
        if not any(word.places for word in chosen):
            raise ValueError(f"words: {chosen[0].missing}")
        return chosen
    if any(info.subjects for info in infos):
        return _subjects(infos)
    return every_word(infos)


def _combined(item: str, infos: Sequence[PromptInfo]) -> Word:
    """Return a word, or several joined by + and -."""
    name, *rest = _OPERATOR.split(item)
    first = _gather(name, infos)
    others = [(sign == "+", _gather(other, infos)) for sign, other in zip(rest[::2], rest[1::2], strict=True)]
    if not others:
        return first
    missing = "; ".join(word.missing for word in (first, *(word for _, word in others)) if word.missing)
    return Word(item, first.places, tuple((adds, word) for adds, word in others if word.places), missing)


def _gather(name: str, infos: Sequence[PromptInfo]) -> Word:
    """Return every occurrence of a word or phrase, taken together."""
    places: dict[int, list[int]] = {}
    missing = ""
    for cond, info in enumerate(infos):
        try:
            positions = _positions(name, info.tokens)
        except ValueError as error:
            missing = missing or str(error)
        else:
            places[cond] = sorted(positions)
    return Word(name, places, missing="" if places else missing)


def _positions(name: str, tokens: TokenMap) -> set[int]:
    kind = _MARKS.get(name.strip().lower())
    if kind is None:
        return {position for word in tokens.find(name) for position in word.positions}
    found = {token.position for token in tokens.tokens if token.kind == kind}
    if not found:
        raise ValueError(f"'{name}' is not in the prompt: its text encoder has no such token.")
    return found


def every_word(infos: Sequence[PromptInfo]) -> list[Word]:
    """Return all words of the prompt, each once; tokens of a word that occurs several times are taken together.

    In scripts without spaces a word is what one token covers; characters that share a token are one word.
    """
    found: dict[tuple[str, tuple[str, ...]], tuple[str, dict[int, set[int]]]] = {}
    for cond, info in enumerate(infos):
        for name, told, positions in _units(info.tokens):
            _, places = found.setdefault((key(name), told), (name, {}))
            places.setdefault(cond, set()).update(positions)
    if not found:
        raise ValueError(
            "This prompt has no words, so there is nothing to show. Look at the other prompt, or write something in it."
        )
    return [Word(name, {cond: sorted(positions) for cond, positions in places.items()}) for name, places in found.values()]


def _units(tokens: TokenMap) -> Iterable[tuple[str, tuple[str, ...], list[int]]]:
    """Yield the words of a prompt in order: name, what tells equal names apart, positions."""
    covering: dict[int, dict[int, str]] = {}
    for token in tokens.tokens:
        if token.kind in ("text", "embedding"):
            for char in range(token.start, token.end):
                covering.setdefault(char, {})[token.position] = token.text
    embeddings = {token.start for token in tokens.tokens if token.kind == "embedding"}
    spelt = [
        (start, end)
        for start, end in atoms(tokens.text)
        if any(char in covering for char in range(start, end))
        and not (start in embeddings and tokens.text.startswith(EMBEDDING, start))
    ]
    units: list[tuple[int, int, dict[int, str], bool]] = []
    for word in joined_words(tokens.text, spelt):
        start, end = word[0][0], word[-1][1]
        own = {position: text for span in word for char in range(*span) for position, text in covering.get(char, {}).items()}
        spaced = end - start > 1
        if units and units[-1][1] == start and not spaced and own.keys() & units[-1][2].keys():
            start, _, before, _ = units.pop()
            own = {**before, **own}
        units.append((start, end, own, spaced))
    for start, end, own, spaced in units:
        yield tokens.text[start:end], () if spaced or tokens.text[start:end].isascii() else tuple(own.values()), list(own)


def _subjects(infos: Sequence[PromptInfo]) -> list[Word]:
    """Return marked subjects, in order; the second of two equal names is called ``name#2``."""
    subjects: dict[str, dict[int, list[int]]] = {}
    for cond, info in enumerate(infos):
        names = [subject.word for subject in info.subjects]
        for subject in info.subjects:
            name = f"{subject.word}#{subject.occurrence}" if names.count(subject.word) > 1 else subject.word
            subjects.setdefault(name, {})[cond] = list(subject.positions)
    return [Word(name, places) for name, places in subjects.items()]
