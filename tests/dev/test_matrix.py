"""The generated tables, of families and of other nodes, are what their commands measure, and miss nothing of ComfyUI's list."""

from __future__ import annotations

import comfy.supported_models
import pytest
from compatibility import matrix, other_nodes, tables
from compatibility.tables import WORKS, Cell, Outcome
from compatibility.trial import Counts, Log, Trial

pytestmark = pytest.mark.newest

TABLE_OF = "0.30.0"


@pytest.fixture
def of_this_host(host_version: str) -> None:
    if host_version != TABLE_OF:
        pytest.skip(f"the table is that of ComfyUI {TABLE_OF}, whose list of models is not that of {host_version}")


@pytest.mark.usefixtures("of_this_host")
def test_every_class_of_the_hosts_list_is_in_the_table_or_left_out_by_name():
    families = matrix.builders()
    built = {config for family in families.values() for config in matrix.own_configs(family)}
    same = {config for row in matrix.ROWS for config in row.same}
    hosts_own = {cls.__name__ for cls in comfy.supported_models.models if cls.__module__ == comfy.supported_models.__name__}
    assert hosts_own == {*built, *same, *matrix.LEFT_OUT}
    assert matrix.unknown_configs() == []
    assert sorted(name for row in matrix.ROWS for name in row.families) == sorted(families)
    assert matrix.rows_of_this_release() == matrix.ROWS


def test_a_release_that_is_not_pinned_has_no_class_that_the_table_does_not_know():
    assert matrix.unknown_rows() == [], "CONTRIBUTING.md says what a new ComfyUI asks for"


def test_families_of_later_releases_are_right():
    rows = [row for row in matrix.rows_of_this_release() if row in matrix.LATER_ROWS]
    if not rows:
        pytest.skip("this ComfyUI has none of them")
    lines = matrix.measure(rows)
    assert [text for line in lines for text in line.faults] == []
    (animate,) = (line for line in lines if line.configs == ["WAN_Animate2"])
    assert animate.cells["T-GATE Cache"] == animate.cells[tables.WORDS] == WORKS
    assert "together with that of its pose video" in animate.cells[tables.PLACES].message
    assert "writes the pose video's keys and values in place" in animate.cells["Attend-and-Excite"].message


def test_a_class_that_a_new_release_brings_is_listed(monkeypatch: pytest.MonkeyPatch):
    class WAN99_Animate(comfy.supported_models.WAN21_T2V):
        pass

    WAN99_Animate.__module__ = comfy.supported_models.__name__
    monkeypatch.setattr(comfy.supported_models, "models", [*comfy.supported_models.models, WAN99_Animate])
    assert matrix.unknown_configs() == ["WAN99_Animate"]
    assert [text.split(":")[0] for text in matrix.unknown_rows()] == ["WAN99_Animate"]


@pytest.mark.slow
@pytest.mark.usefixtures("of_this_host")
def test_the_readme_shows_what_is_measured():
    lines = matrix.measure(matrix.ROWS)
    assert [text for line in lines for text in line.faults] == []
    assert [line.cells[tables.BUILD].message for line in lines if tables.BUILD in line.cells] == []
    assert matrix.PAGE.holds(tables.render(lines, matrix.PAGE.first)), "run `python dev matrix --write` and look at its diff"


@pytest.mark.usefixtures("of_this_host")
def test_the_page_of_other_nodes_shows_what_is_measured():
    lines = other_nodes.measure([other for other in other_nodes.OTHER_NODES if other not in other_nodes.SLOW])
    assert [text for line in lines for text in line.faults] == []
    assert [line.name for line in lines] == [other.name for other in other_nodes.OTHER_NODES[: len(lines)]]
    page = other_nodes.PAGE.text()
    shown = set(page.splitlines())
    table, said = tables.render(lines, other_nodes.PAGE.first).split("\n\n", 1)
    assert set(table.splitlines()) <= shown, "run `python dev beside --write` and look at its diff"
    assert said in page


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
