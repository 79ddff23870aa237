"""Words -> token positions, proven against what ComfyUI's encoders do with the same words."""

from __future__ import annotations

import copy
import importlib
import random
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.conds
import comfy.sd
import comfy.sd1_clip
import pytest
import tiny_text
import torch
from safetensors.torch import save_file
from tiny_text import FAMILIES, tiny

CLIP_FAMILIES = ["sd1", "sdxl", "sd2", "cascade"]


@pytest.fixture(scope="module", autouse=True)
def forget_encoders() -> Iterator[None]:
    """Freed while ComfyUI is still there: its objects complain when the interpreter takes them down."""
    yield
    tiny.cache_clear()


@pytest.fixture(scope="module")
def tokens(pack: ModuleType) -> ModuleType:
    return importlib.import_module(f"{pack.__name__}.attention.prompts")


@pytest.fixture(scope="module")
def prompt_text(pack: ModuleType) -> ModuleType:
    return importlib.import_module(f"{pack.__name__}.attention.prompts.syntax")


@pytest.fixture(scope="module")
def token_text(pack: ModuleType) -> ModuleType:
    return importlib.import_module(f"{pack.__name__}.attention.prompts.alignment")


def family(name: str) -> comfy.sd.CLIP:
    if not FAMILIES[name].available():
        pytest.skip("this ComfyUI has no such text encoder")
    return tiny(name)


def context(clip: comfy.sd.CLIP, text: str) -> torch.Tensor:
    """The rows of text a model attends to: the conditioning, and what some models join behind it (one row per token)."""
    with torch.inference_mode():
        ((rows, options),) = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    parts = [rows[0]]
    if "conditioning_mt5xl" in options:
        parts.append(options["conditioning_mt5xl"][0])
    if "conditioning_llama3" in options:
        parts += [options["conditioning_llama3"][0, -1]] * 2
    if "t5xxl_ids" in options:
        ids = options["t5xxl_ids"].float().unsqueeze(-1)
        parts = [torch.nn.functional.pad(ids, (0, 0, 0, 512 - len(ids)))]
    width = max(part.shape[-1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in parts])


OTHERS = ["dog", "bird", "tan", "blue", "hen", "mule", "plum", "lynx", "sun", "sea", "狗", "鸟"]


def token_count(clip: comfy.sd.CLIP, text: str) -> list[int]:
    """Tokens of each encoder that are not padding."""
    counts = []
    for chunks in clip.tokenize(text, return_word_ids=True).values():
        flat = [token for chunk in chunks for token in chunk]
        numbered = any(len(token) > 2 and token[2] for token in flat)
        counts.append(sum(bool(token[2]) if numbered else token[0] != 151643 for token in flat))
    return counts


def changed_rows(clip: comfy.sd.CLIP, text: str, word: str, others: Sequence[str] = OTHERS) -> tuple[int, ...]:
    """The rows that change when ``word`` is exchanged for another of as many tokens and with no letter in common.

    Of several such words the one that changes least: others may take in the space before them.
    """
    original, count = context(clip, text), token_count(clip, text)
    if original.isnan().any():
        pytest.skip("this ComfyUI encodes weights of this family as NaN")
    changes: list[list[int]] = []
    for other in others:
        exchanged = text.replace(word, other, 1)
        if not set(other) & set(word) and token_count(clip, exchanged) == count:
            changes.append((context(clip, exchanged) != original).any(dim=-1).nonzero().flatten().tolist())
    assert changes and all(changes), f"no other word has as many tokens as {word}"
    fewest = min(changes, key=len)
    return tuple(fewest)


# --- proof: the rows that change with a word are its positions --------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_positions_are_the_rows_that_change_with_the_word(tokens: ModuleType, name: str) -> None:
    clip = family(name)
    text = "a cat and a red frog on the mat"
    mapped = tokens.tokenize(clip, text)
    rows = context(clip, text)
    assert mapped.length == len(rows)
    for word in ("cat", "red", "frog"):
        (found,) = mapped.find(word)
        assert found.positions == changed_rows(clip, text, word), word
    (phrase,) = mapped.find("red frog")
    assert phrase.positions == tuple(sorted(mapped.find("red")[0].positions + mapped.find("frog")[0].positions))
    assert mapped.words() == ["a", "cat", "and", "red", "frog", "on", "the", "mat"]


@pytest.mark.parametrize("name", FAMILIES)
def test_words_stay_found_beside_weights_escapes_and_punctuation(tokens: ModuleType, name: str) -> None:
    clip = family(name)
    text = "((a cat), \\(very\\) small:1.3) -- and... (((red)) frog:0.8)! a mat"
    mapped = tokens.tokenize(clip, text)
    assert mapped.conditioning_length == clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0].shape[1]
    for word in ("cat", "red", "frog"):
        (found,) = mapped.find(word.upper() + ",")
        assert found.positions == changed_rows(clip, text, word), word


@pytest.mark.parametrize("name", [*CLIP_FAMILIES, "sd3", "flux", "qwen-image"])
def test_a_prompt_of_three_hundred_words(tokens: ModuleType, name: str) -> None:
    clip = family(name)
    words = ["house"] * 300
    words[20], words[150], words[299] = "cat", "frog", "cat"
    text = " ".join(words)
    mapped = tokens.tokenize(clip, text)
    first, second = mapped.find("cat")
    assert (first.occurrence, second.occurrence) == (1, 2)
    assert mapped.find("cat#2") == [second]
    assert first.positions == changed_rows(clip, text, "cat")
    with_dog = text.replace("cat", "dog", 1)
    assert second.positions == changed_rows(clip, with_dog, "cat")
    (frog,) = mapped.find("frog")
    assert frog.positions == changed_rows(clip, text, "frog")
    if name in CLIP_FAMILIES:  # chunks of 77 tokens with 75 of the prompt in each
        assert [place.positions for place in (first, frog, second)] == [(21,), (2 * 77 + 1,), (3 * 77 + 75,)]
        assert mapped.length == 4 * 77
        kinds = {token.position: token.kind for token in mapped.tokens}
        assert [kinds[chunk * 77] for chunk in range(4)] == ["start"] * 4
        assert [kinds[chunk * 77 + 76] for chunk in range(4)] == ["end"] * 4


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_a_causal_encoder_first_changes_at_the_word(tokens: ModuleType, name: str) -> None:
    clip = FAMILIES[name].build(zero_linear=False)
    text = "a photo of a cat beside a red frog"
    for word in ("photo", "cat", "frog"):
        (found,) = tokens.tokenize(clip, text).find(word)
        assert changed_rows(clip, text, word)[0] == found.positions[0]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", ["sd1", "flux", "aura", "qwen-image"])
def test_every_word_that_is_listed_can_be_found(tokens: ModuleType, name: str, seed: int) -> None:
    rng = random.Random(seed)
    alphabet = "abcXYZ019 _-'’.,;:()[]{}<>|/\\\n\té Ä ß ı ｆ 猫 蛙 か 고 ไ ท ที่ हि 🐱 ☃ 👍🏽 1️⃣ \u200d"
    text = "".join(rng.choices(alphabet, k=80))
    mapped = tokens.tokenize(family(name), text)
    words = mapped.words()
    assert words
    for word in words:
        for place in mapped.find(word):
            assert place.positions
            assert all(0 <= position < mapped.length for position in place.positions)


def test_a_word_of_several_tokens_has_all_their_positions(tokens: ModuleType) -> None:
    clip = tiny("sd1")
    mapped = tokens.tokenize(clip, "an axolotl in red")
    (found,) = mapped.find("axolotl")
    assert found.positions == (2, 3, 4, 5)
    assert [token.text for token in mapped.tokens if token.position in found.positions] == ["ax", "o", "lot", "l"]


@pytest.mark.parametrize("name", ["sd1", "sdxl", "flux", "aura", "qwen-image", "hunyuan-dit"])
def test_chinese_and_emoji(tokens: ModuleType, name: str) -> None:
    clip = family(name)
    text = "一只猫和青蛙 with a 🐱 and 👨‍👩‍👧 in 🇫🇷"
    mapped = tokens.tokenize(clip, text)
    (cat,) = mapped.find("猫")
    if name != "flux":  # T5 knows no Chinese: all of it is one unknown token
        assert set(changed_rows(clip, text, "猫")) <= set(cat.positions)  # its first bytes may be those of other characters
    frog, parts = mapped.find("青蛙")[0], [mapped.find(char)[0] for char in "青蛙"]
    assert set(frog.positions) == {position for part in parts for position in part.positions}
    assert ["🐱", "👨‍👩‍👧", "🇫🇷"] == [word for word in mapped.words() if word[0] > "\U0001f000"]
    for emoji in ("🐱", "👨‍👩‍👧", "🇫🇷"):
        assert mapped.find(emoji)[0].positions


# --- independent oracles ----------------------------------------------------------------------------------------------


def random_prompt(rng: random.Random, words: int, alphabet: str = string.ascii_letters) -> list[str]:
    return ["".join(rng.choices(alphabet, k=rng.randint(1, 12))) for _ in range(words)]


@pytest.mark.parametrize("seed", range(12))
def test_tokens_at_a_random_words_positions_spell_it(tokens: ModuleType, seed: int) -> None:
    rng = random.Random(seed)
    words = random_prompt(rng, rng.randint(1, 120))
    text = "".join(word + rng.choice([" ", ", ", "\n", " - "]) for word in words)
    clip = tiny("sd1")
    flat = [token for chunk in clip.tokenize(text)["l"] for token, _ in chunk]
    mapped = tokens.tokenize(clip, text)
    assert mapped.length == len(flat)
    seen: dict[str, int] = {}
    for word in words:
        seen[word.lower()] = number = seen.get(word.lower(), 0) + 1
        (found,) = mapped.find(f"{word}#{number}")
        spelt = "".join(clip.tokenizer.clip_l.inv_vocab[flat[position]] for position in found.positions)
        assert spelt.replace("</w>", "") == word.lower()


@pytest.mark.parametrize("name", ["sd1", "flux", "qwen-image"])
@pytest.mark.parametrize("seed", range(6))
def test_spans_equal_the_tokenizer_librarys_own_offsets(token_text: ModuleType, name: str, seed: int) -> None:
    """Fast tokenizers can tell offsets themselves (ComfyUI's interface cannot); the slow ones of older releases cannot."""
    sub = {"sd1": "clip_l", "flux": "t5xxl", "qwen-image": "qwen25_7b"}[name]
    tokenizer = getattr(tiny(name).tokenizer, sub)
    if not getattr(tokenizer.tokenizer, "is_fast", False):
        pytest.skip("this transformers release has a slow tokenizer here")
    rng = random.Random(seed)
    # No character that Unicode composes or that a vocabulary lacks: there the library's offsets are not unique.
    text = " ".join(random_prompt(rng, 30, string.ascii_letters + string.digits + ".,!?;-猫青蛙"))
    encoded = tokenizer.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    pieces = [token_text.piece_reader(tokenizer)(token) for token in encoded["input_ids"]]
    compared = 0
    for piece, span, (start, end) in zip(pieces, token_text.align(pieces, text), encoded["offset_mapping"], strict=True):
        if span is not None and piece is not None and text[start:end].strip():
            start, end = start + len(text[start:end]) - len(text[start:end].lstrip()), end
            assert span == (start, end)
            compared += 1
    assert compared > 30


@pytest.mark.parametrize("seed", range(300))
def test_weights_are_read_as_the_host_reads_them(prompt_text: ModuleType, seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choices(["(", ")", ":1.2", ":", "a", "bc", " ", "\\(", "\\)", "\\", ".5", ":x)"], k=rng.randint(0, 16)))
    segments = comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(text), 1.0)
    expected = [comfy.sd1_clip.unescape_important(segment) for segment, _ in segments]
    reading = prompt_text.readings(text)[0]
    assert [reading.chars[start:end] for start, end in reading.segments if end > start] == [s for s in expected if s]
    for char, origin in zip(reading.chars, reading.origin, strict=True):
        assert text[origin] == char or text[origin : origin + 2] == "\\" + char


# --- subjects ---------------------------------------------------------------------------------------------------------


def test_subjects_are_cut_out_of_their_brackets(tokens: ModuleType) -> None:
    text, spans = tokens.parse_subjects(r"a [cat], \[not this\] and (a [ red frog ]:1.2)")
    assert text == "a cat, [not this] and (a  red frog :1.2)"
    assert [text[start:end] for start, end in spans] == ["cat", "red frog"]


@pytest.mark.parametrize("text", ["", "a cat", "(a cat:1.2) \\(x\\)", "\\", "a\\\\b"])
def test_a_prompt_without_subjects_is_unchanged(tokens: ModuleType, text: str) -> None:
    assert tokens.parse_subjects(text) == (text, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a [red [cat]]", "inside another one"),
        ("a cat] and", "never opened"),
        ("a [cat and a frog", "never closed"),
        ("a [] cat", "marks no subject"),
        ("a [  ] cat", "marks no subject"),
    ],
)
def test_wrong_brackets_are_explained(tokens: ModuleType, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokens.parse_subjects(text)


@pytest.mark.parametrize("seed", range(40))
def test_random_subjects_come_back(tokens: ModuleType, seed: int) -> None:
    rng = random.Random(seed)
    words = random_prompt(rng, 12, string.ascii_letters + "[]()\\ ")
    escaped = [word.replace("\\", "").replace("[", r"\[").replace("]", r"\]") for word in words]
    marked = {index for index in range(12) if rng.random() < 0.4 and words[index].replace("\\", "").strip()}
    text = " ".join(f"[{word}]" if index in marked else word for index, word in enumerate(escaped))
    plain, spans = tokens.parse_subjects(text)
    assert plain == " ".join(word.replace("\\", "") for word in words)
    assert [plain[start:end] for start, end in spans] == [words[i].replace("\\", "").strip() for i in sorted(marked)]


def test_the_marked_occurrence_is_the_one_meant(tokens: ModuleType) -> None:
    text, spans = tokens.parse_subjects("a cat on a [cat] mat, (a [red cat]:1.2)")
    mapped = tokens.tokenize(tiny("sd1"), text)
    second, third = (mapped.within(span) for span in spans)
    assert (second.word, second.occurrence, second.positions) == ("cat", 2, mapped.find("cat#2")[0].positions)
    assert third.positions == mapped.find("red cat")[0].positions


# --- finding words ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mapped(tokens: ModuleType) -> Any:
    return tokens.tokenize(tiny("sd1"), "A cat and a Red-Frog, the cat's hat; don't")


def test_case_punctuation_and_joined_words(mapped: Any) -> None:
    assert [place.positions for place in mapped.find("CAT")] == [(2,), (10,)]
    assert mapped.find("red frog")[0].positions == mapped.find("red-frog")[0].positions == mapped.find("(Red_Frog)")[0].positions
    assert mapped.find("frog")[0].positions == (7,)
    assert mapped.find("don’t")[0].positions == mapped.find("don't")[0].positions
    assert mapped.words() == ["A", "cat", "and", "Red-Frog", "the", "cat's", "hat", "don't"]


def test_a_position_is_a_token_of_the_prompt(mapped: Any) -> None:
    assert mapped.at(2).positions == (2,) and mapped.at(2).word == "cat"
    with pytest.raises(ValueError, match="Token position 77 is outside"):
        mapped.at(77)


@pytest.mark.parametrize("wanted", ["dog", "ca", "red cat", "", ",", "cat#3", "cat#0"])
def test_what_is_not_there_is_an_error_that_helps(mapped: Any, wanted: str) -> None:
    with pytest.raises(ValueError) as error:
        mapped.find(wanted)
    assert "Words in the prompt: A, cat, and, Red-Frog" in str(error.value) or "occurs 2 times" in str(error.value)


def test_the_error_for_a_long_prompt_is_short_and_suggests_a_word(tokens: ModuleType) -> None:
    words = random_prompt(random.Random(5), 300, string.ascii_lowercase)
    long = tokens.tokenize(tiny("sd1"), " ".join([*words, "hedgehog"]))
    with pytest.raises(ValueError, match="Did you mean 'hedgehog'") as error:
        long.find("hedgehogs")
    assert len(str(error.value)) < 600
    assert "more" in str(error.value)


def test_an_empty_prompt_has_no_words(tokens: ModuleType) -> None:
    for text in ("", "   ", "...", "(:1.2)"):
        empty = tokens.tokenize(tiny("sd1"), text)
        assert empty.length == 77
        with pytest.raises(ValueError, match="the prompt has no words|Words in the prompt: 1, 2"):
            empty.find("cat")


def test_words_that_the_encoder_never_reads(tokens: ModuleType) -> None:
    cut = tokens.tokenize(family("hidream"), " ".join(["house"] * 200 + ["cat"]))  # its T5 reads 128 tokens, its Llama all
    assert all(place.positions[0] >= 128 for place in cut.find("cat"))
    weight = tokens.tokenize(tiny("sd1"), "a (cat:1.25)")
    with pytest.raises(ValueError, match="is written in the prompt, but"):
        weight.find("25")


# --- embeddings -------------------------------------------------------------------------------------------------------


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    save_file({"emb_params": torch.randn(3, 32)}, tmp_path / "bad-hands-5.safetensors")
    save_file({"emb_params": torch.randn(1, 32)}, tmp_path / "style.safetensors")
    save_file({"emb_params": torch.randn(2, 99)}, tmp_path / "foreign.safetensors")
    save_file({"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 48)}, tmp_path / "both.safetensors")
    return tmp_path


def test_the_vectors_of_an_embedding_are_one_word(tokens: ModuleType, embeddings: Path) -> None:
    clip = tiny_text.FAMILIES["sd1"].build(embeddings=embeddings)
    text = "a cat, (embedding:bad-hands-5:1.2) and embedding:style, embedding:missing a frog"
    mapped = tokens.tokenize(clip, text)
    assert mapped.find("bad-hands-5")[0].positions == mapped.find("embedding:bad-hands-5")[0].positions == (4, 5, 6)
    assert mapped.find("style")[0].positions == (8,)
    assert mapped.words() == ["a", "cat", "bad-hands-5", "and", "style", "frog"]
    for word in ("cat", "frog"):
        assert mapped.find(word)[0].positions == changed_rows(clip, text, word)
    with pytest.raises(ValueError, match="is written in the prompt, but"):
        mapped.find("missing")


def test_neighbouring_embeddings_are_told_apart(tokens: ModuleType, embeddings: Path) -> None:
    clip = tiny_text.FAMILIES["sd1"].build(embeddings=embeddings)
    mapped = tokens.tokenize(clip, "embedding:missing embedding:style embedding:bad-hands-5 cat")
    assert mapped.find("style")[0].positions == (1,)
    assert mapped.find("bad-hands-5")[0].positions == (2, 3, 4)
    assert mapped.find("cat")[0].positions == (5,)


def test_an_embedding_for_another_model_takes_no_place(tokens: ModuleType, embeddings: Path) -> None:
    clip = tiny_text.FAMILIES["sd1"].build(embeddings=embeddings)
    text = "a embedding:foreign cat"
    mapped = tokens.tokenize(clip, text)
    assert mapped.find("cat")[0].positions == changed_rows(clip, text, "cat") == (2,)


def test_sdxl_embeddings(tokens: ModuleType, embeddings: Path) -> None:
    clip = tiny_text.FAMILIES["sdxl"].build(embeddings=embeddings)
    mapped = tokens.tokenize(clip, "a embedding:both cat")
    assert mapped.find("both")[0].positions == (2, 3)
    assert mapped.find("cat")[0].positions == (4,)
    text = "a embedding:style cat"  # made for one of the two encoders: they no longer agree where the cat is
    assert tokens.tokenize(clip, text).find("cat")[0].positions == changed_rows(clip, text, "cat") == (2, 3)


# --- unknown encoders -------------------------------------------------------------------------------------------------


def test_encoders_that_cannot_be_followed_are_refused(tokens: ModuleType) -> None:
    mixing = copy.copy(tiny("sd1"))
    mixing.cond_stage_model = copy.deepcopy(mixing.cond_stage_model)
    mixing.cond_stage_model.projection = torch.nn.Linear(32, 32)
    with pytest.raises(tokens.UnknownEncoder, match="text encoder"):
        tokens.tokenize(mixing, "a cat")

    class Shuffled(type(tiny("sd1").cond_stage_model)):  # type: ignore[misc]
        def encode_token_weights(self, pairs: Any) -> Any:
            rows, pooled = super().encode_token_weights(pairs)
            return rows.cumsum(dim=1), pooled

    adding = copy.copy(tiny("sd1"))
    adding.cond_stage_model = copy.deepcopy(adding.cond_stage_model)
    adding.cond_stage_model.__class__ = Shuffled
    with pytest.raises(tokens.UnknownEncoder, match="Shuffled"):
        tokens.tokenize(adding, "a cat")


@pytest.mark.parametrize("name", ["sd1", "qwen-image"])
def test_looking_leaves_the_encoder_alone(tokens: ModuleType, name: str) -> None:
    clip = family(name)
    before = dict(clip.cond_stage_model._modules)
    encoded = context(clip, "a cat")
    tokens.tokenize(clip, "a cat and a frog")
    assert dict(clip.cond_stage_model._modules) == before
    assert torch.equal(context(clip, "a cat"), encoded)


# --- metadata ---------------------------------------------------------------------------------------------------------


def conditioning(clip: comfy.sd.CLIP, tokens: ModuleType, text: str, marked: bool = True) -> list[list[Any]]:
    plain, spans = tokens.parse_subjects(text)
    encoded = clip.encode_from_tokens_scheduled(clip.tokenize(plain))
    info = {tokens.METADATA: tokens.metadata(clip, plain, spans, encoded[0][0].shape[1])} if marked else {}
    return [[rows, {**options, **info}] for rows, options in encoded]


def test_metadata_holds_all_that_a_map_knows(tokens: ModuleType) -> None:
    clip = tiny("sdxl")
    (info,) = tokens.prompt_infos(copy.deepcopy(conditioning(clip, tokens, "a [cat] and a [red frog]")))
    assert info.tokens == tokens.tokenize(clip, "a cat and a red frog")
    assert [(place.word, place.positions) for place in info.subjects] == [("cat", (2,)), ("red frog", (5, 6))]
    assert info.length == 77


def test_metadata_is_plain_data(tokens: ModuleType) -> None:
    def check(value: Any) -> None:
        assert isinstance(value, (dict, list, str, int))
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
            check(item)

    check(tokens.metadata(tiny("sd1"), "a cat", [(2, 5)], 77))


def test_an_encoding_of_unexpected_length_is_not_described(tokens: ModuleType) -> None:
    known = tokens.metadata(tiny("sd1"), "a cat", [], 154)
    assert "gave 154 tokens where 77 were expected" in known["error"] and "tokens" not in known


def test_clip_and_text_stand_in_for_metadata(tokens: ModuleType) -> None:
    clip, text = tiny("sd1"), "a wolf"  # of no other test: prompts that the pack has encoded itself are known by their rows
    plain = conditioning(clip, tokens, text, marked=False)
    assert tokens.prompt_infos(plain, clip, text)[0].tokens.find("wolf")[0].positions == (2,)
    for arguments in ((), (clip, None), (clip, ""), (None, text)):
        with pytest.raises(ValueError, match="Prompt with Subjects"):
            tokens.prompt_infos(plain, *arguments)
    with pytest.raises(ValueError, match="has 77 tokens, but its prompt has 154"):
        tokens.prompt_infos(plain, clip, "cat " * 100)


def test_the_samplers_conds_are_understood(tokens: ModuleType) -> None:
    import comfy.sampler_helpers

    conds = comfy.sampler_helpers.convert_cond(conditioning(tiny("sd1"), tokens, "a [cat]"))
    assert tokens.prompt_infos(conds)[0].subjects[0].positions == (2,)


def test_several_prompts_in_one_conditioning(tokens: ModuleType) -> None:
    clip = tiny("sd1")
    both = conditioning(clip, tokens, "a [cat]") + conditioning(clip, tokens, "two red [frog]s")
    assert [info.subjects[0].word for info in tokens.prompt_infos(both)] == ["cat", "frogs"]


def test_a_conditioning_whose_tokens_moved_is_refused(tokens: ModuleType) -> None:
    ((rows, options),) = conditioning(tiny("sd1"), tokens, "a [cat]")
    with pytest.raises(ValueError, match="changed its length"):
        tokens.prompt_infos([[rows[:, :50], options]])
    ((rows, options),) = conditioning(tiny("hunyuan-dit"), tokens, "a [cat]")  # text of its second encoder follows
    with pytest.raises(ValueError, match="changed its length"):
        tokens.prompt_infos([[torch.cat([rows, rows], dim=1), options]])


def test_an_unknown_encoder_is_remembered(tokens: ModuleType) -> None:
    ((rows, options),) = conditioning(tiny("sd1"), tokens, "a cat", marked=False)
    unknown = {"version": 1, "text": "a cat", "subjects": [], "error": "no such encoder"}
    with pytest.raises(tokens.UnknownEncoder, match="no such encoder"):
        tokens.prompt_infos([[rows, {**options, tokens.METADATA: unknown}]])
