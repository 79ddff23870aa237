"""What a CONDITIONING carries about its prompt: metadata that ``Prompt with Subjects`` leaves there, and its own rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

from torch import Tensor

from .encoder_rows import UnknownEncoder
from .fingerprint import encoded_fingerprint, read_fingerprint, row_sketches, same_for_all_images, same_rows
from .joined import JoinedPrompts, KnownPrompt, recent_prompts, remember
from .row_changes import Change, change_of, word_rows
from .syntax import Span
from .token_map import Token, TokenMap, WordTokens
from .tokenizing import tokenize
from .typed_text import TypedPrompt, typed_prompts

__all__ = ["FINGERPRINT", "METADATA", "PromptInfo", "encoded_fingerprint", "known_metadata", "metadata", "prompt_infos"]

METADATA = "fovea"
FINGERPRINT = "fovea_fingerprint"  # of an entry whose tensor is gone: ``encoded_fingerprint`` of it
_VERSION = 1
_CHANGED = "changed"  # true in metadata whose words are no longer what was encoded alone


@dataclass(frozen=True)
class PromptInfo:
    """What is known of one entry of a CONDITIONING; ``note``: what its user should know."""

    tokens: TokenMap
    subjects: list[WordTokens] = field(default_factory=list)
    length: int = 0  # rows of the conditioning now; more than the map's where a node joined something behind it
    note: str = ""


def metadata(
    clip: Any, text: str, subjects: Sequence[Span], conditioning_length: int, rows: Tensor | None = None,
    read: Callable[[Any, str], TokenMap] = tokenize,
) -> dict[str, Any]:  # fmt: skip
    """Return plain data for the dict of a conditioning of that many rows, under the key ``METADATA``.

    Args:
        rows: the conditioning, by which the prompt is found again where a node joins it behind another one, and known as changed.
        read: what makes the tokens of ``clip`` and ``text``.
    """
    info: dict[str, Any] = {"version": _VERSION, "text": text, "subjects": [list(span) for span in subjects]}
    try:
        tokens = read(clip, text)
        if tokens.conditioning_length != conditioning_length:
            raise UnknownEncoder(
                f"This text encoder gave {conditioning_length} tokens where {tokens.conditioning_length} were expected, so "
                "words cannot be found. Another node may have changed how 'clip' encodes: connect it without that node."
            )
    except UnknownEncoder as error:
        return {**info, "error": str(error)}
    for span in subjects:
        tokens.within(span)  # a subject that has no tokens is the user's to know now
    if rows is not None:
        remember(KnownPrompt(tokens, list(subjects), row_sketches(rows)))
        info["encoded"] = word_rows(rows, tokens)
    return {**info, **_plain(tokens)}


def known_metadata(entry: Any) -> dict[str, Any] | None:
    """Return what ``METADATA`` of an entry should say of all prompts that were joined in it; None where nothing is known.

    For recordings, in which the tensor is left out: a prompt that a node joined behind another one is found by its rows only,
    and so is what another node has changed.
    """
    tensor, options = _taken_apart(entry)
    stored = _compared(tensor, options)
    if tensor is None or (stored is not None and ("error" in stored or stored["conditioning_length"] == tensor.shape[1])):
        return stored
    found = _joined(row_sketches(tensor), stored, [])
    if found is None:
        return stored
    return {
        "version": _VERSION, "text": found.tokens.text, "subjects": [list(span) for span in found.subjects],
        **_plain(found.tokens), **({_CHANGED: stored[_CHANGED]} if stored and _CHANGED in stored else {}),
    }  # fmt: skip


def prompt_infos(conditioning: Sequence[Any], clip: Any = None, text: str | None = None) -> list[PromptInfo]:
    """Return what is known of each entry of a CONDITIONING (or of the sampler's list of conds).

    It is read from the entry's metadata, else from ``clip`` and the ``text`` that was encoded with it. What they encode is
    compared with what was encoded, row by row and within a tolerance (see ``fingerprint``): an entry may have its tensor, or
    only the fingerprint of it under ``FINGERPRINT``; one that has neither is believed where the number of rows fits. Prompts
    that a node joined behind one another have their words at the rows where they are now; in ``text``, BREAK stands between
    them. Square brackets in ``text`` mark subjects.

    Raises:
        ValueError: nothing is known of an entry, it was changed since, or ``text`` is not what was encoded;
            ``UnknownEncoder`` where its tokens cannot be told.
    """
    typed = typed_prompts(clip, text) if clip is not None and text and text.strip() else []
    infos = [_entry_info(entry, typed) for entry in conditioning]
    if typed and not any(prompt.used for prompt in typed):
        raise ValueError(_OTHER_TEXT)
    return infos


_OTHER_TEXT = (
    "'text' is not the prompt that was encoded (or 'clip' is not the encoder), so its words would be looked for at wrong places. "
    "Write it in 'text' exactly as it was encoded, weights included, or encode it with 'Prompt with Subjects' and leave 'text' "
    "empty."
)


def _taken_apart(entry: Any) -> tuple[Tensor | None, dict[str, Any]]:
    if isinstance(entry, dict):
        return entry.get("cross_attn"), entry
    tensor, options = entry
    return tensor, options


def _entry_info(entry: Any, typed: Sequence[TypedPrompt]) -> PromptInfo:
    tensor, options = _taken_apart(entry)
    stored = _compared(tensor, options)
    if stored is None and not typed and tensor is None and FINGERPRINT not in options:
        raise ValueError(_NOTHING_KNOWN)
    encoded = row_sketches(tensor) if tensor is not None else read_fingerprint(options.get(FINGERPRINT, ""))
    if encoded is not None and not encoded.any():
        for prompt in typed:
            prompt.used = True
        return PromptInfo(TokenMap("", (), len(encoded), len(encoded)), [], len(encoded))
    if stored is not None:
        return replace(_stored_info(stored, encoded, typed), note=_MIXED if stored.get(_CHANGED) else "")
    if encoded is None:
        return _believed(typed)
    for prompt in typed:
        if prompt.matches(encoded, options):
            return _info(prompt.known(), len(encoded))
    found = _joined(encoded, None, typed)
    if found is not None:
        return _info(found, len(encoded))
    raise ValueError(_refusal(typed, len(encoded)) if typed else _NOTHING_KNOWN)


_NOTHING_KNOWN = (
    "Nothing is known of this prompt's words. Encode it with 'Prompt with Subjects', or connect 'clip' and write the "
    "same prompt in 'text'."
)


_EACH_IMAGE = (
    "This conditioning holds a different prompt for each image of the batch, as batch schedules of prompts make them, so its "
    "words are not at the same places for all of them. Use one conditioning for each image, and sample the images one by one."
)
_REPLACED = (
    "Another node has replaced the prompt after it was encoded, so its words are no longer there. Connect the prompt without "
    "that node; in 'Conditioning (Average)', connect the prompt whose words you want to 'conditioning_to' and raise its strength."
)
_MIXED = (
    "another node changed the prompt after it was encoded: if it mixed in another one, as 'Conditioning (Average)' does, the "
    "words and their tokens are those of 'conditioning_to'"
)


def _compared(tensor: Tensor | None, options: dict[str, Any]) -> dict[str, Any] | None:
    """Return the entry's metadata, with what became of its words where the rows are not, or not only, what was encoded."""
    stored: dict[str, Any] | None = options.get(METADATA)
    if tensor is None:
        return stored
    if not same_for_all_images(tensor):
        return {"version": _VERSION, "text": "", "subjects": [], "error": _EACH_IMAGE}
    # Rows of a later part of a schedule of LoRAs were encoded by another state of the encoder than those in the metadata.
    if stored is None or "encoded" not in stored or options.get("clip_start_percent"):
        return stored
    change = change_of(stored["encoded"], tensor)
    if change is Change.REPLACED:
        return {name: stored[name] for name in ("version", "text", "subjects")} | {"error": _REPLACED}
    return {**stored, _CHANGED: True} if change is Change.MIXED else stored


def _stored_info(stored: dict[str, Any], encoded: Tensor | None, typed: Sequence[TypedPrompt]) -> PromptInfo:
    """Return what the entry's metadata says, and what is known of the rows that were joined behind its own."""
    if "error" in stored:
        raise UnknownEncoder(stored["error"])
    tokens, subjects = _restored(stored)
    for prompt in typed:
        prompt.used |= prompt.tokens.text == tokens.text
    length = tokens.conditioning_length if encoded is None else len(encoded)
    if length == tokens.conditioning_length:
        if encoded is not None:
            for prompt in typed:
                prompt.used |= same_rows(prompt.encoded[0], encoded)
    elif length < tokens.conditioning_length or tokens.length != tokens.conditioning_length:
        # Nodes that join rows put them behind, which moves nothing unless the model joins more itself.
        raise ValueError(
            f"The conditioning has {length} tokens, but its prompt has {tokens.conditioning_length}. A node after 'Prompt with "
            "Subjects' changed its length; connect the prompt without that node."
        )
    elif encoded is not None:
        found = _joined(encoded, stored, typed)
        if found is not None:
            return _info(found, length)
    return _info(KnownPrompt(tokens, subjects), length)


def _believed(typed: Sequence[TypedPrompt]) -> PromptInfo:
    """Return what 'text' says of an entry of which neither rows nor their fingerprint are left."""
    for prompt in typed:
        prompt.used = True
    return _info(typed[0].known(), typed[0].tokens.conditioning_length)


def _joined(encoded: Tensor, stored: dict[str, Any] | None, typed: Sequence[TypedPrompt]) -> KnownPrompt | None:
    """Return the prompts whose rows are found one behind the other; None where there are none beside the stored one."""
    prompts = JoinedPrompts(len(encoded))
    if stored is not None:
        prompts.add(0, KnownPrompt(*_restored(stored)))
    candidates = [(KnownPrompt(p.tokens, p.subjects, sketches), p) for p in typed for sketches in p.encoded]
    known: list[tuple[KnownPrompt, TypedPrompt | None]] = [*candidates, *((prompt, None) for prompt in recent_prompts())]
    found = prompts.search(encoded, [prompt for prompt, _ in known])
    for prompt, source in known:
        if source is not None and any(prompt is other for other in found):
            source.used = True
    return prompts.together() if found else None


def _info(known: KnownPrompt, length: int) -> PromptInfo:
    return PromptInfo(known.tokens, [known.tokens.within(span) for span in known.subjects], length)


def _refusal(typed: Sequence[TypedPrompt], length: int) -> str:
    expected = typed[0].tokens.conditioning_length
    if length == expected:
        return _OTHER_TEXT
    return (
        f"The conditioning has {length} tokens, but its prompt has {expected}, as 'text' has it, and those are not found in "
        "them. Write the prompt exactly as it was encoded, with the same clip, or use 'Prompt with Subjects'. Of prompts that "
        "were joined, write all, with BREAK between them. What image-edit encoders make of an image and a text cannot be read."
    )


def _plain(tokens: TokenMap) -> dict[str, Any]:
    return {
        "tokens": [list(astuple(token)) for token in tokens.tokens],
        "length": tokens.length,
        "conditioning_length": tokens.conditioning_length,
    }


def _restored(stored: dict[str, Any]) -> tuple[TokenMap, list[Span]]:
    tokens = tuple(Token(*token) for token in stored["tokens"])
    spans = [(start, end) for start, end in stored["subjects"]]
    return TokenMap(stored["text"], tokens, stored["length"], stored["conditioning_length"]), spans
