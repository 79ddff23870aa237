"""The generated tables, of families and of other nodes, are what their commands measure, and miss nothing of the host's list."""

from __future__ import annotations

import re

import comfy.supported_models
import matrix
import neighbours
import pytest
import tables
from tables import WORKS, Cell, Outcome
from trial import Counts, Log, Trial

pytestmark = pytest.mark.newest

TABLE_OF = "0.30.0"


@pytest.fixture
def of_this_host(host_version: str) -> None:
    if host_version != TABLE_OF:
        pytest.skip(f"the table is that of ComfyUI {TABLE_OF}, whose list of models is longer than that of {host_version}")


@pytest.mark.usefixtures("of_this_host")
def test_every_class_of_the_hosts_list_is_in_the_table_or_left_out_by_name():
    families = matrix.builders()
    built = {config for family in families.values() for config in matrix.own_configs(family)}
    same = {config for row in matrix.ROWS for config in row.same}
    hosts_own = {cls.__name__ for cls in comfy.supported_models.models if cls.__module__ == comfy.supported_models.__name__}
    assert hosts_own == {*built, *same, *matrix.LEFT_OUT}
    assert sorted(name for row in matrix.ROWS for name in row.families) == sorted(families)


def rows_of(text: str) -> set[str]:
    """Of a table, without the numbers of its notes: those go by which rows there are."""
    return {re.sub(r" \[\d+\]", "", line) for line in text.splitlines() if line.startswith("|")}


def assert_shown(page: tables.Page, lines: list[tables.Line]) -> None:
    """The rows, and what is said in them, are on the page."""
    assert [text for line in lines for text in line.faults] == []
    assert rows_of(tables.render(lines, page.first)) <= rows_of(page.text()), f"run `python dev {page.command} --write`"
    text = " ".join(page.text().split())
    said = {" ".join(cell.message.split()) for line in lines for cell in line.cells.values() if cell.message}
    assert [message for message in said if message not in text] == []


# Every second row is measured here, which takes long; `python dev matrix` and `python dev neighbours` measure all.


@pytest.mark.slow
@pytest.mark.usefixtures("of_this_host")
def test_the_readme_shows_what_is_measured():
    lines = matrix.measure(matrix.ROWS[::2])
    assert [line.cells[tables.BUILD].message for line in lines if tables.BUILD in line.cells] == []
    assert_shown(matrix.PAGE, lines)
    shown = [line.split(" | ")[0].removeprefix("| ") for line in matrix.PAGE.text().splitlines() if line.startswith("| ")]
    assert [row.name for row in matrix.ROWS if not any(name.startswith(row.name) for name in shown)] == []


@pytest.mark.usefixtures("of_this_host")
def test_the_page_of_other_nodes_shows_what_is_measured():
    chosen = [neighbour for neighbour in neighbours.NEIGHBOURS if neighbour not in neighbours.SLOW][::2]
    lines = neighbours.measure(chosen)
    assert [line.name for line in lines] == [neighbour.name for neighbour in chosen]
    assert_shown(neighbours.PAGE, lines)


def test_a_row_that_is_not_on_the_page_is_seen():
    wrong = [tables.Line("SD1.5", [], dict.fromkeys(tables.COLUMNS, Cell(Outcome.REFUSED, message="no such words")))]
    with pytest.raises(AssertionError, match="python dev matrix --write"):
        assert_shown(matrix.PAGE, wrong)


def test_a_node_that_does_nothing_and_says_nothing_is_a_fault():
    trial = Trial.__new__(Trial)
    trial.log, trial.counts, trial.untouched = Log(), Counts(), None
    trial.state = lambda: None  # type: ignore[method-assign]

    def late() -> Cell:
        trial.counts.prompts.append(0)
        raise ValueError("no")

    def refusal() -> Cell:
        raise ValueError("connect a model")

    assert trial.judged(refusal) == Cell(Outcome.REFUSED, message="connect a model")
    assert trial.judged(late).outcome is Outcome.FAULT
    assert trial.judged(lambda: [][0]).outcome is Outcome.FAULT
    trial.state = lambda: "a hook"  # type: ignore[method-assign]
    assert "left something" in trial.judged(lambda: WORKS).detail
