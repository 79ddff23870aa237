"""Lists of words as people type and paste them."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def prompts(pack: ModuleType) -> ModuleType:
    return importlib.import_module(f"{pack.__name__}.attention.prompts")


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("cat, red frog", ["cat", "red frog"]),
        ("猫，青蛙、狗；鸟", ["猫", "青蛙", "狗", "鸟"]),
        ("cat; frog\ndog\r\n", ["cat", "frog", "dog"]),
        (" Cat ,,cat, CAT,", ["Cat"]),
        ("(red frog:1.2), ((cat))", ["red frog", "cat"]),
        ("(red frog, cat:1.2), dog", ["red frog", "cat", "dog"]),
        ("([cat]:1.3), [(dog:0.8)]", ["cat", "dog"]),
        (r"saber \(fate\), cat", ["saber (fate)", "cat"]),
        ("cat), (frog", ["cat", "frog"]),
        ('"red, big frog", cat', ["red, big frog", "cat"]),
        ("“red, big frog”#2, cat", ["red, big frog#2", "cat"]),
        ("[red, white and blue flag], cat", ["red, white and blue flag", "cat"]),
        ('5" disk, cat', ['5" disk', "cat"]),
        ("cat#2, 2+3, don't", ["cat#2", "2+3", "don't"]),
        ("embedding:cat, dog", ["embedding:cat", "dog"]),
        (" ,\n; ", []),
    ],
)
def test_a_list_is_read_as_it_is_meant(prompts: ModuleType, typed: str, words: list[str]) -> None:
    assert prompts.parse_word_list(typed) == words


@pytest.mark.parametrize("text", ["[cat:0.8]", "[red cat:1.2]", "[cat:dog:0.5]", "[cat::10]", "[:dog:3]", "[cat|dog]", "[[cat]]"])
def test_brackets_of_other_programs_are_explained(prompts: ModuleType, text: str) -> None:
    for read in (prompts.parse_word_list, prompts.parse_subjects):
        with pytest.raises(ValueError, match="[Ss]quare brackets mark subjects here"):
            read(f"a {text} on grass")


@pytest.mark.parametrize(
    "text", ["[a (cat:1.2)]", "[embedding:cat]", "[Star Wars: the film]", r"\[cat:0.8\]", "[cat] (a dog:0.8)"]
)
def test_colons_that_mean_nothing_else_stay(prompts: ModuleType, text: str) -> None:
    plain, subjects = prompts.parse_subjects(text)
    escaped = text.startswith("\\")
    assert plain == (text.replace("\\", "") if escaped else text.replace("[", "").replace("]", ""))
    assert len(subjects) == (0 if escaped else text.count("["))


def test_positions_and_groups(prompts: ModuleType) -> None:
    assert prompts.parse_token_groups(["2+3", "5", "7 + 6+7"]) == [(2, 3), (5,), (6, 7)]
    for items in ([], ["2", "frog"], ["2+"], ["-1"], ["cat#2"]):
        assert prompts.parse_token_groups(items) is None
