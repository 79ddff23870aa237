"""The front page and the pages of docs: short, linked, and never behind what they show."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import unquote

import host_inprocess
import pytest
from markdown_pages import parsed
from quoted_messages import is_said

pytestmark = pytest.mark.newest

ROOT = host_inprocess.ROOT
README = ROOT / "README.md"
CHINESE = ROOT / "README.zh-CN.md"
INDEX = ROOT / "docs" / "README.md"
PAGES = [README, CHINESE, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MOST_LINES = {README: 170, CHINESE: 170}
SCREENFUL = 50
OUTSIDE = re.compile(r"[a-z]+:")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def targets(page: Path) -> list[str]:
    """Return what a page links to and shows inside the repository."""
    html = re.findall(r'(?:src|href)="([^"]+)"', page.read_text(encoding="utf-8"))
    shown = [*parsed(page).links, *parsed(page).images, *html]
    return [unquote(target) for target in shown if not OUTSIDE.match(target)]


def anchors(page: Path) -> set[str]:
    """Return the headings of a page as GitHub makes anchors of them."""
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for _, text in parsed(page).headings}


@each_page
def test_links_and_images_are_there(page: Path) -> None:
    for target in targets(page):
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists() and found.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(found), target


@each_page
def test_pages_are_short(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").count("\n")
    assert lines <= MOST_LINES.get(page, 5 * SCREENFUL)


def test_every_page_is_reached_from_the_index() -> None:
    seen, waiting = set(), [INDEX]
    while waiting:
        page = waiting.pop()
        seen.add(page)
        linked = {(page.parent / target.partition("#")[0]).resolve() for target in targets(page)}
        waiting += [each for each in linked if each.suffix == ".md" and each not in seen and each.is_relative_to(ROOT / "docs")]
    assert seen == {page for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert "docs/README.md" in targets(README) and "docs/README.md" in targets(CHINESE)


def test_the_chinese_front_page_is_that_of_the_whole_page() -> None:
    english, chinese = parsed(README), parsed(CHINESE)
    assert [level for level, _ in chinese.headings] == [level for level, _ in english.headings]
    assert [[len(row) for row in rows] for rows in chinese.tables] == [[len(row) for row in rows] for rows in english.tables]
    assert chinese.items == english.items
    assert {code for code in chinese.codes if code.startswith("python dev")} == {
        code for code in english.codes if code.startswith("python dev")
    }
    assert list(chinese.images) == list(english.images)
    swapped = {"README.zh-CN.md": "README.md"}
    assert [swapped.get(link, link) for link in english.links if link not in swapped] == [
        link for link in chinese.links if link not in swapped.values()
    ]
    figures = [{number for number in page.numbers if "." in number} for page in (english, chinese)]
    assert figures[0] == figures[1]


def test_messages_in_the_troubleshooting_table_are_what_the_pack_says() -> None:
    (rows,) = [rows for rows in parsed(README).tables if rows[0][0].plain == "message"]
    for row in rows[1:]:
        (message,) = row[0].codes
        filled = re.sub(r"subjects: 'dog'|The sampler uni_pc", "...", message)
        assert message.startswith("Value not in list") or is_said(filled), message


def test_parameters_are_described_once() -> None:
    """Inputs with their defaults stand in the help pages, and nowhere else."""
    for page in PAGES:
        assert not [rows for rows in parsed(page).tables if [cell.plain for cell in rows[0][:2]] == ["input", "default"]], page


@pytest.mark.parametrize(("front", "language"), [(README, "en"), (CHINESE, "zh")])
def test_the_front_page_shows_every_template_and_node(front: Path, language: str) -> None:
    shown = set(targets(front))
    for path in (ROOT / "workflows").glob("*.json"):
        assert f"workflows/{path.name}" in shown and f"workflows/{path.stem}.jpg" in shown, path.name
    read = " ".join(text.plain for text in parsed(front).texts)
    names = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert [texts["display_name"] for texts in names.values() if texts["display_name"] not in read] == []


def test_every_command_is_one_that_there_is() -> None:
    """Commands name their benchmark, evaluation or script; `python dev --help` knows them."""
    known = (ROOT / "dev" / "__main__.py").read_text(encoding="utf-8")
    benchmarks = {path.stem for path in (ROOT / "dev" / "bench").glob("*.py")}
    evaluations = {path.stem.removeprefix("evaluate_") for path in (ROOT / "dev" / "scenes").glob("evaluate_*.py")}
    commands = {code for page in PAGES for code in parsed(page).codes if code.startswith("python dev ")}
    assert len(commands) > 10
    for command in commands:
        name, *rest = command.split()[2:]
        assert name.startswith("-") or f'"{name}"' in known, command
        if rest and not rest[0].startswith("-") and name in ("bench", "eval"):
            assert rest[0] in (benchmarks if name == "bench" else evaluations) | {"NAME"}, command
