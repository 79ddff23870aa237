"""Words of scripts that are written without spaces: as the encoder's tokens have them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import tiny_text

pytestmark = pytest.mark.newest

CHINESE = "一只红色的猫坐在沙发上，旁边有一只蓝色的狗"


@pytest.fixture(scope="module")
def read(pack: ModuleType) -> Callable[..., Any]:
    prompts = importlib.import_module(f"{pack.__name__}.attention.prompts")
    return lambda family, text: prompts.tokenize(tiny_text.tiny(family), text)


def places(read_text: Any, words: str) -> list[tuple[int, ...]]:
    return [found.positions for found in read_text.find(words)]


def test_words_are_those_of_the_tokens(read: Callable[..., Any]) -> None:
    """No word has tokens of two others, and no two words have the same."""
    known = read("qwen-image", CHINESE)
    assert known.words() == ["一只", "红色", "的", "猫", "坐在", "沙发上", "旁边", "有一", "只", "蓝色", "狗"]
    assert places(known, "一只") == [(0,)]
    assert places(known, "只") == [(9,)]  # and not the one that is a part of another word
    assert places(known, "的") == [(2,), (11,)]
    assert places(known, "红色的猫") == [(1, 2, 3)]
    assert places(known, "红") == [(1,)]  # a part of a word is found where it is nothing else
    assert places(known, "沙发") == [(5,)]


def test_an_encoder_that_reads_characters_has_them_as_words(read: Callable[..., Any]) -> None:
    known = read("sd1", "红色的猫")
    assert known.words() == ["红", "色", "的", "猫"]
    assert places(known, "红色") == [(1, 2, 3, 4, 5, 6)]


def test_two_encoders_keep_apart_what_one_of_them_does(read: Callable[..., Any]) -> None:
    known = read("sd3", "红色的猫")  # T5's vocabulary has one "unknown" for all of it
    assert known.words() == ["红", "色", "的", "猫"]


def test_korean_words_end_at_spaces(read: Callable[..., Any]) -> None:
    known = read("qwen-image", "소파 위의 빨간 고양이")
    assert known.words() == ["소파", "위의", "빨간", "고양이"]
    assert places(known, "고양") == [(8, 9)]
    assert known.within((0, 2)).word == "소파"


def test_japanese(read: Callable[..., Any]) -> None:
    known = read("qwen-image", "ソファの上の赤い猫")
    assert places(known, "ソファ") == [(0, 1)]
    assert places(known, "の") == [(2,)]
    assert known.within((6, 8)).word == "赤い"
