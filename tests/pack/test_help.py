"""Help pages as the front end finds them: whole, in every language, and never behind the nodes they are about.

The front end asks for `docs/<node>/<language>.md` and then for `docs/<node>.md`, which is the English page.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import host_inprocess
import pytest
from comfy_api.latest import io
from host_server import PACK_FOLDER, HostServer
from markdown_pages import Page, Text, parsed
from quoted_messages import is_said

pytestmark = pytest.mark.newest

ROOT = host_inprocess.ROOT
HELP = ROOT / "web" / "docs"
NODES = sorted(path.stem for path in HELP.glob("*.md"))
FILES = {"en": "{}.md", "zh": "{}/zh.md"}
SECTIONS = {
    "en": ["When to use it", "Inputs", "Outputs", "When it does not work", "Source"],
    "zh": ["何时使用", "输入", "输出", "出现问题时", "来源"],
}
INPUT_TABLE = {"en": ["input", "default", "what it does"], "zh": ["输入", "默认值", "作用"]}
BETWEEN = {"en": ", ", "zh": "、"}
WORDS = {"en": {"": "empty", True: "on", False: "off"}, "zh": {"": "空", True: "开", False: "关"}}

each_node = pytest.mark.parametrize("node", NODES)
each_language = pytest.mark.parametrize("language", FILES)


def _file(node: str, language: str) -> Path:
    return HELP / FILES[language].format(node)


def page(node: str, language: str) -> Page:
    return parsed(_file(node, language))


@cache
def names(language: str) -> Any:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


@cache
def schemas() -> dict[str, io.Schema]:
    return {name: node.GET_SCHEMA() for name, node in host_inprocess.pack_nodes().items()}


def schema_inputs(node: str) -> dict[str, Any]:
    return {field.id: field for field in schemas()[node].inputs}


def input_rows(node: str, language: str) -> list[list[Text]]:
    tables = [rows for rows in page(node, language).tables if [cell.plain for cell in rows[0][:3]] == INPUT_TABLE[language]]
    assert len(tables) == (1 if schema_inputs(node) else 0)
    return tables[0][1:] if tables else []


def default_text(node: str, field: Any, language: str) -> str | None:
    """The default as a page writes it, with an option named as the front end names it; None: the input has none."""
    default = getattr(field, "default", None)
    if default is None:
        return None
    if isinstance(default, str | bool) and default in WORDS[language]:
        return WORDS[language][default]
    if isinstance(default, str):
        return str(names(language)[node]["inputs"][field.id].get("options", {}).get(default, default))
    return f"{default:g}"


# ------------------------------------------------------------------------------------------ every page


def test_every_node_has_a_page_in_every_language(node_classes: dict[str, type]) -> None:
    expected = {_file(node, language) for node in node_classes for language in FILES}
    assert set(HELP.rglob("*.md")) == expected
    shown = {(HELP / image) for node in node_classes for language in FILES for image in page(node, language).images}
    assert {path for path in HELP.rglob("*") if path.is_file()} == expected | shown


@pytest.mark.server
def test_pages_are_served_where_the_browser_looks(server: HostServer) -> None:
    for node in NODES:
        for language in FILES:
            path = _file(node, language)
            for file in (path, *(HELP / image for image in page(node, language).images)):
                assert server.request(f"/extensions/{PACK_FOLDER}/docs/{file.relative_to(HELP).as_posix()}") == file.read_bytes()


@each_language
@each_node
def test_a_page_is_about_its_node_and_has_every_section(node: str, language: str) -> None:
    (level, title), *others = page(node, language).headings
    assert (level, title) == (1, names(language)[node]["display_name"])
    assert {level for level, _ in others} == {2}
    sections = [text for _, text in others]
    assert [text for text in sections if text in SECTIONS[language]] == SECTIONS[language]
    assert sections[-1] == SECTIONS[language][-1]
    assert [bool(description) for description in page(node, language).images.values()] == [True], "one image"
    assert " arXiv:" in " ".join(text.plain for text in page(node, language).texts[-1:]), "the paper"


@each_language
@each_node
def test_every_star_stresses_something(node: str, language: str) -> None:
    """Between Chinese characters and punctuation a closing star often closes nothing, and is shown as it is."""
    assert [text.plain for text in page(node, language).texts if text.stars] == []


# ------------------------------------------------------------------------------------------ inputs and outputs


@each_language
@each_node
def test_every_input_is_explained_under_its_name(node: str, language: str) -> None:
    rows = input_rows(node, language)
    assert [code for row in rows for code in row[0].codes] == list(schema_inputs(node)), "all of them, in the node's order"
    for row in rows:
        assert row[2].plain
        own = {code: names(language)[node]["inputs"][code]["name"] for code in row[0].codes}
        shown = [code if name == code else f"{name} {code}" for code, name in own.items()]
        assert row[0].plain == BETWEEN[language].join(shown)


@each_language
@each_node
def test_the_defaults_on_a_page_are_those_of_the_node(node: str, language: str) -> None:
    inputs = schema_inputs(node)
    for row in input_rows(node, language):
        defaults = [default_text(node, inputs[code], language) for code in row[0].codes]
        assert row[1].plain == ", ".join(text for text in defaults if text is not None), row[0].codes


@each_language
@each_node
def test_a_page_says_what_less_and_more_of_a_number_do(node: str, language: str) -> None:
    numbers = {name for name, field in schema_inputs(node).items() if isinstance(field, io.Int.Input | io.Float.Input)}
    for row in input_rows(node, language):
        if numbers & set(row[0].codes):
            assert all(cell.plain for cell in row[3:5]) and len(row) == 5, row[0].codes


@each_language
@each_node
def test_every_option_and_output_is_named(node: str, language: str) -> None:
    read = " ".join(text.plain for text in page(node, language).texts)
    own = names(language)[node]
    for index, output in enumerate(schemas()[node].outputs):
        assert output.display_name in page(node, language).codes
        assert own["outputs"][str(index)]["name"] in read
    for name, options in ((name, entry.get("options", {})) for name, entry in own["inputs"].items()):
        assert [label for label in options.values() if label not in read] == [], name


# ------------------------------------------------------------------------------------------ translations


@each_node
def test_a_translation_is_that_of_the_whole_page(node: str) -> None:
    """The same sections, tables and lists with the same inputs, values, figures, messages and nodes."""
    english, chinese = page(node, "en"), page(node, "zh")
    assert [level for level, _ in chinese.headings] == [level for level, _ in english.headings]
    assert [[len(row) for row in rows] for rows in chinese.tables] == [[len(row) for row in rows] for rows in english.tables]
    assert chinese.items == english.items
    assert chinese.codes == english.codes
    assert chinese.messages == english.messages
    assert chinese.numbers == english.numbers
    for other in NODES:
        shown = [names(language)[other]["display_name"] in page(node, language).italic for language in FILES]
        assert len(set(shown)) == 1, f"{other} is named on one page only"


# ------------------------------------------------------------------------------------------ what is quoted


@each_node
def test_quoted_messages_are_what_the_pack_says(node: str) -> None:
    for message in page(node, "en").messages:
        assert is_said(message), message
