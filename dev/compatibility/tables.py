"""Write tables of what the pack's nodes do, and publish each on its page.

A line is a family or another node, a cell says what one node of the pack does there. ``trial`` measures cells, ``matrix`` and
``other_nodes`` make lines of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from host_inprocess import start_host

BUILD, WORDS, PLACES, SAMPLER = "build", "words", "self-attention", "DiT Sampler (ddpm)"
COLUMNS = {
    "T-GATE Cache": "T-GATE Cache",
    WORDS: "maps: words",
    PLACES: "maps: self-attention",
    "Attend-and-Excite": "Attend-and-Excite",
    "Attention Distillation": "Attention Distillation",
}


class Outcome(str, Enum):
    WORKS = "works"
    PART = "in part"
    REFUSED = "refused"
    UNBUILT = "cannot be built here"
    FAULT = "FAULT"


@dataclass(frozen=True)
class Cell:
    """One cell; ``detail``: what works, or what is wrong; ``message``: what the artist is shown."""

    outcome: Outcome
    detail: str = ""
    message: str = ""


WORKS = Cell(Outcome.WORKS)


def fault(detail: str) -> Cell:
    return Cell(Outcome.FAULT, detail)


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    name: str
    configs: list[str]
    cells: dict[str, Cell]

    @property
    def faults(self) -> list[str]:
        return [f"{self.name}, {node}: {cell.detail}" for node, cell in self.cells.items() if cell.outcome is Outcome.FAULT]


class Named(Protocol):
    """What becomes a line, or more."""

    @property
    def name(self) -> str: ...


AnyNamed = TypeVar("AnyNamed", bound=Named)


# --- in Markdown ---------------------------------------------------------------------------------------------------------


class Messages:
    """What artists are shown, numbered as it first occurs."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def text(self, cell: Cell) -> str:
        parts = [cell.outcome.value + (f": {cell.detail}" if cell.detail else "")]
        if cell.message:
            parts.append(f"[{self.numbers.setdefault(cell.message, len(self.numbers) + 1)}]")
        return " ".join(parts)

    def listed(self) -> list[str]:
        return [
            textwrap.fill(f"{number}. `{message}`", 130, subsequent_indent="   ", break_long_words=False, break_on_hyphens=False)
            for message, number in self.numbers.items()
        ]


def render(lines: Sequence[Line], first: str) -> str:
    """Write the table in Markdown, and below it what each refusal says; ``first`` is the heading of the first column."""
    messages = Messages()
    rows = [f"| {' | '.join([first, *COLUMNS.values()])} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for line in lines:
        unbuilt = line.cells.get(BUILD)
        cells = [unbuilt] * len(COLUMNS) if unbuilt else [line.cells[node] for node in COLUMNS]
        rows.append(f"| {' | '.join([line.name, *map(messages.text, cells)])} |")
    sampler = [_elsewhere(SAMPLER, lines, messages), ""] if any(SAMPLER in line.cells for line in lines) else []
    return "\n".join([*rows, "", *sampler, "What is said where a node refuses, or does not do all:", "", *messages.listed()])


def _elsewhere(node: str, lines: Sequence[Line], messages: Messages) -> str:
    """Describe in one sentence a node whose answer is the same nearly everywhere."""
    answers: dict[str, list[str]] = {}
    for line in lines:
        if node in line.cells:
            answers.setdefault(messages.text(line.cells[node]), []).append(line.name)
    most = max(answers, key=lambda answer: len(answers[answer]))
    parts = [f"{', '.join(dict.fromkeys(names))}: {answer}" for answer, names in answers.items() if answer != most]
    return f"*{node}*: {'; '.join([*parts, f'all others: {most}'])}."


@dataclass(frozen=True)
class Page:
    """A file of the project with a table in it, between two marks.

    Attributes:
        command: of ``python dev``, that measures the table and writes it there.
        first: the heading of the table's first column.
    """

    command: str
    file: Path
    first: str

    def holds(self, table: str) -> bool:
        return self.text() == self._with(table)

    def text(self) -> str:
        return self.file.read_text(encoding="utf-8")

    def write(self, table: str) -> None:
        self.file.write_text(self._with(table), encoding="utf-8")

    def _with(self, table: str) -> str:
        page, begin = self.text(), f"<!-- python dev {self.command} --write -->"
        first, last = page.index(begin) + len(begin), page.index(f"<!-- end of {self.command} -->")
        return f"{page[:first]}\n\n{table}\n\n{page[last:]}"


def publish(
    page: Page,
    rows_here: Callable[[], Sequence[AnyNamed]],
    measure: Callable[[Sequence[AnyNamed], Callable[[str], None]], list[Line]],
    about: str,
    unknown: Callable[[], list[str]] = list,
) -> None:
    """Run a page's command: measure what was chosen, print it, and write it if asked to; a fault is an error.

    ``rows_here`` returns the rows for the ComfyUI that was started; ``unknown`` what ComfyUI has and the page does not, which
    is an error too where all rows were chosen.
    """
    parser = argparse.ArgumentParser(prog=f"python dev {page.command}", description=about.splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORD", help="only what has this in its name")
    parser.add_argument("--write", action="store_true", help=f"put the table into {page.file.name}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the cells here, with ComfyUI's name of each model")
    arguments = parser.parse_args()
    start_host(cpu=True)
    rows = rows_here()
    chosen = [row for row in rows if arguments.only.lower() in row.name.lower()]
    if not chosen or (arguments.write and len(chosen) < len(rows)):
        parser.error("--only leaves nothing" if not chosen else "--write needs the whole table: leave out --only")
    torch.set_num_threads(1)
    lines = measure(chosen, lambda name: print(name, file=sys.stderr))
    table = render(lines, page.first)
    print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n", encoding="utf-8")
    if arguments.write:
        page.write(table)
    faults = [text for line in lines for text in line.faults]
    if len(chosen) == len(rows):
        faults += unknown()
    if faults:
        sys.exit("\n".join(["", *faults]))
