"""SDXL's two texts with subjects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny_text
import torch
from host_inprocess import host_node

pytestmark = pytest.mark.newest

SIZES = {"width": 1024, "height": 896, "crop_w": 0, "crop_h": 8, "target_width": 1024, "target_height": 896}
LONG = "a frog " * 45


@pytest.fixture(scope="module", autouse=True)
def forget_encoders() -> Iterator[None]:
    """Freed while ComfyUI is still there: its objects complain when the interpreter takes them down."""
    yield
    tiny_text.tiny.cache_clear()


@pytest.fixture
def encode(node_classes: dict[str, Any]) -> Any:
    def encoded(text_g: str, text_l: str, family: str = "sdxl") -> Any:
        return node_classes["FoveaPromptSDXL"].execute(tiny_text.tiny(family), **SIZES, text_g=text_g, text_l=text_l)[0]

    return encoded


@pytest.fixture
def infos(pack: Any) -> Any:
    from fovea_attention.attention.prompts import prompt_infos

    return prompt_infos


@pytest.mark.parametrize(
    ("text_g", "text_l"),
    [
        ("a [cat] and a [red frog]", "a cat and a red frog"),
        ("a [cat]", "photo of (a frog:1.3)"),
        (f"{LONG}[cat]", "a frog"),
        ("a frog", f"{LONG}[cat]"),
        ("a [cat]", ""),
    ],
)
def test_the_output_is_that_of_comfyuis_node(encode: Any, text_g: str, text_l: str) -> None:
    theirs = host_node("CLIPTextEncodeSDXL", "comfy_extras.nodes_clip_sdxl")(
        clip=tiny_text.tiny("sdxl"), **SIZES, text_g=text_g.replace("[", "").replace("]", ""),
        text_l=text_l.replace("[", "").replace("]", ""),
    )[0]  # fmt: skip
    ours = encode(text_g, text_l)
    assert torch.equal(ours[0][0], theirs[0][0])
    assert torch.equal(ours[0][1]["pooled_output"], theirs[0][1]["pooled_output"])
    assert {name: ours[0][1][name] for name in SIZES} == {name: theirs[0][1][name] for name in SIZES} == SIZES
    assert set(ours[0][1]) - set(theirs[0][1]) == {"fovea"}


def positions(infos: Any, conditioning: Any) -> list[tuple[str, tuple[int, ...]]]:
    return [(subject.word, subject.positions) for subject in infos(conditioning)[0].subjects]


def test_subjects_are_where_their_own_text_has_them(encode: Any, infos: Any) -> None:
    assert positions(infos, encode("a [cat] and a frog", "a photo of a frog")) == [("cat", (2,))]
    assert positions(infos, encode("a cat", "a photo of a [red frog]")) == [("red frog", (5, 6))]
    assert positions(infos, encode("a [cat]", "one photo of a [cat]")) == [("cat", (2,))]
    assert positions(infos, encode("a [red frog]", "a [red frog]")) == [("red frog", (2, 3))]
    assert positions(infos, encode("a red frog", "a [red frog]")) == [("red frog", (2, 3))]
    assert positions(infos, encode("a frog", f"{LONG}[cat]")) == [("cat", (93,))]  # 77 rows and 1 + 90 - 75 words


def test_words_are_those_of_both_texts(encode: Any, infos: Any) -> None:
    (info,) = infos(encode("a cat", "one photo of a cat"))
    assert info.tokens.words() == ["a", "cat", "one", "photo", "of"]
    assert [word.positions for word in info.tokens.find("cat")] == [(2,), (5,)]
    assert info.tokens.find("cat#2")[0].positions == (5,)
    assert info.tokens.length == info.tokens.conditioning_length == 77
    (same,) = infos(encode("a cat", "a cat"))
    assert [word.positions for word in same.tokens.find("cat")] == [(2,)]


def test_joined_behind_another_prompt(encode: Any, infos: Any) -> None:
    joined = host_node("ConditioningConcat")(encode("a [cat]", "a frog"), encode("a [frog]", "a photo"))[0]
    assert positions(infos, joined) == [("cat", (2,)), ("frog", (79,))]


@pytest.mark.parametrize("family", ["sd1", "flux", "sd2"])
def test_other_text_encoders_are_refused(encode: Any, family: str) -> None:
    with pytest.raises(ValueError, match="does not read two texts as SDXL's does"):
        encode("a [cat]", "a cat", family)


def test_brackets_are_read_as_everywhere(encode: Any) -> None:
    for texts in (("a [cat", "a cat"), ("a cat", "a [cat:0.8]")):
        with pytest.raises(ValueError, match=r"never closed|Square brackets mark subjects"):
            encode(*texts)
