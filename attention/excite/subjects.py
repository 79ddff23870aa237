"""Subjects: which tokens of each entry of the positive conditioning are guided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..prompts.conditioning import METADATA, PromptInfo, prompt_infos
from ..prompts.encoder_rows import UnknownEncoder
from ..prompts.token_map import TokenMap, WordTokens
from ..prompts.word_list import is_token_group, parse_token_groups, parse_word_list, token_group


@dataclass(frozen=True)
class Subject:
    """A thing that must be seen: its name and the positions of its tokens among the text tokens."""

    name: str
    positions: tuple[int, ...]


@dataclass(frozen=True)
class GuidedPrompt:
    """One entry of the positive conditioning.

    Attributes:
        columns: the text tokens that compete for a place, in order; it has every subject's positions.
        note: what the user should know of this prompt.
    """

    subjects: tuple[Subject, ...]
    columns: tuple[int, ...]
    note: str = ""


_ARTICLES = {"a", "an", "the"}

# CLIP's tokens 1 to 75 compete (the start token and the last position do not); of OpenCLIP-H's and of other encoders' only
# the prompt's own, whose padding says nothing.
_PADDING_COMPETES = {"", "l", "g"}


def guided_prompts(conditioning: Sequence[Any], subjects: str, clip: Any = None, text: str = "") -> list[GuidedPrompt | None]:
    """Return what to guide in each entry of the positive conditioning; None where an entry has none of the subjects.

    Args:
        subjects: a list of words, see ``parse_word_list``; or of token positions, those of one subject joined by ``+``.
            Empty: the subjects that are marked in the prompt.

    Raises:
        ValueError: no subjects, or one that no entry has.
    """
    wanted = _wanted(subjects)
    if not conditioning:
        raise ValueError("'positive' is empty. Connect the output of 'Prompt with Subjects'.")
    groups = parse_token_groups(wanted)
    if groups is not None:
        return [_at_positions(entry, groups, clip, text) for entry in conditioning]
    infos = prompt_infos(conditioning, clip, text.strip() or None)
    chosen = _named(infos, wanted) if wanted else [_marked(info.tokens, info.subjects) for info in infos]
    if not any(chosen):
        raise ValueError(
            "No subjects are given. Write words of the prompt in 'subjects', separated by commas, or put them in square "
            f"brackets in 'Prompt with Subjects'. {_words_of(infos)}"
        )
    return [
        GuidedPrompt(tuple(some), _columns(info.tokens, some), info.note) if some else None
        for info, some in zip(infos, chosen, strict=True)
    ]


def check_subjects(subjects: str) -> None:
    """Raise ``ValueError`` where a list of subjects cannot be read, whatever the prompt is."""
    parse_token_groups(_wanted(subjects))


def _wanted(subjects: str) -> list[str]:
    try:
        return parse_word_list(subjects)
    except ValueError as error:
        raise ValueError(f"subjects: {error}") from error


def _words_of(infos: Sequence[PromptInfo]) -> str:
    words = ", ".join(dict.fromkeys(word for info in infos for word in info.tokens.words()))
    return f"Words in the prompt: {words}" if words else "This prompt has no words: it is empty, or it was zeroed out."


def _marked(tokens: TokenMap, subjects: Sequence[WordTokens]) -> list[Subject]:
    names = [subject.word for subject in subjects]
    return [
        Subject(
            f"{subject.word}#{subject.occurrence}" if names.count(subject.word) > 1 else subject.word,
            _without_articles(tokens, subject.positions),
        )
        for subject in subjects
    ]


def _named(infos: Sequence[PromptInfo], wanted: Sequence[str]) -> list[list[Subject]]:
    """Return the subjects with these names in each entry. A number that is no word of the prompt is a token position."""
    chosen: list[list[Subject]] = [[] for _ in infos]
    for item in wanted:
        missing: list[ValueError] = []
        for info, some in zip(infos, chosen, strict=True):
            try:
                some.append(_find(info.tokens, item))
            except ValueError as error:
                missing.append(error)
        if len(missing) == len(infos):
            raise ValueError(f"subjects: {missing[0]}") from missing[0]
    return chosen


def _find(tokens: TokenMap, item: str) -> Subject:
    try:
        words = tokens.find(item)
    except ValueError:
        if not is_token_group(item):
            raise
        return _group(tokens, token_group(item))
    positions = tuple(sorted({position for word in words for position in word.positions}))
    return Subject(item, _without_articles(tokens, positions))


def _without_articles(tokens: TokenMap, positions: tuple[int, ...]) -> tuple[int, ...]:
    """Return the tokens of a subject that say what it is: attention to "a" would pass for attention to "a red circle"."""
    kept = tuple(position for position in positions if tokens.at(position).word.strip().lower() not in _ARTICLES)
    return kept or positions


def _group(known: TokenMap | None, positions: tuple[int, ...]) -> Subject:
    names = [f"token {position}" if known is None else known.at(position).word for position in positions]
    return Subject("+".join(names), positions)


def _at_positions(entry: Any, groups: Sequence[tuple[int, ...]], clip: Any, text: str) -> GuidedPrompt:
    """Return what to guide in one entry for subjects given as token positions, which need no known words."""
    tensor, options = (entry["cross_attn"], entry) if isinstance(entry, dict) else entry
    known: TokenMap | None = None
    if METADATA in options or (clip is not None and text.strip()):
        try:
            known = prompt_infos([entry], clip, text.strip() or None)[0].tokens
        except UnknownEncoder:
            known = None
    if known is not None and not known.tokens:
        raise ValueError("subjects: 'positive' has no words: it was zeroed out. Connect the encoded prompt itself.")
    length = known.length if known is not None else int(tensor.shape[1])
    for position in sorted({position for group in groups for position in group}):
        if not 0 <= position < length:
            raise ValueError(
                f"subjects: token position {position} is outside this prompt, which has {length} tokens (0 to {length - 1})."
            )
    chosen = [_group(known, group) for group in groups]
    if known is not None:
        return GuidedPrompt(tuple(chosen), _columns(known, chosen))
    positions = {position for group in groups for position in group}
    return GuidedPrompt(tuple(chosen), tuple(sorted({*range(1, length - 1), *positions})))


def _columns(tokens: TokenMap, subjects: Sequence[Subject]) -> tuple[int, ...]:
    """Return the tokens that compete for a place, see ``_PADDING_COMPETES``."""
    padding = {token.encoder for token in tokens.tokens} <= _PADDING_COMPETES
    left_out = ("start",) if padding else ("start", "end", "pad", "template")
    kept = {token.position for token in tokens.tokens if token.kind not in left_out}
    if padding:
        kept.discard(tokens.length - 1)
    return tuple(sorted(kept.union(position for subject in subjects for position in subject.positions)))
