"""The report of a GPU machine: its parts run tiny on a CPU, and none can spoil the others."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from gpu import report as gpu_report
from gpu.parts import PARTS, Part
from gpu.trial import Trial

pytestmark = pytest.mark.newest

# Does what the worker does, without ComfyUI: "a" is done, "b" says something and hangs, "c" ends the process, "d" is done.
WORKER = """
import os, pathlib, sys, time
folder, names = pathlib.Path(sys.argv[1]), sys.argv[3:]
for name in names:
    (folder / f"{name}.started").touch()
    (folder / f"{name}.md").write_text(f"## said by {name}")
    if name == "b":
        time.sleep(60)
    if name == "c":
        os._exit(3)
    (folder / f"{name}.done").write_text("ok")
"""


def in_time(limit: float) -> Part:
    return Part("A part", limit, lambda trial: None)


def test_a_part_that_hangs_or_dies_takes_nothing_from_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_report, "PARTS", {"a": in_time(30), "b": in_time(0.5), "c": in_time(30), "d": in_time(30)})
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER, encoding="utf-8")
    run = gpu_report.Run(tmp_path, ["a", "b", "c", "d"], time.monotonic() + 60, {}, (sys.executable, str(worker)))
    run.all()
    found = {name: outcome.how for name, outcome in run.outcomes.items()}
    assert found == {"a": "ok", "b": "over its limit of 0 s", "c": "the process ended (3)", "d": "ok"}
    written = run.text()
    assert [f"### said by {name}" in written for name in "abcd"] == [True] * 4


def test_what_there_is_no_time_for_is_named(tmp_path: Path):
    run = gpu_report.Run(tmp_path, ["same", "launches"], time.monotonic(), {})
    run.all()
    assert {outcome.how for outcome in run.outcomes.values()} == {"not reached"}
    assert "not reached" in run.text()


@pytest.mark.parametrize("name", ["same", "sizes-wan"])
def test_parts_run_on_a_cpu(name: str, tmp_path: Path):
    trial = Trial(tmp_path, tmp_path / "part.md", tiny=True)
    PARTS[name].run(trial)
    said = trial.out.read_text(encoding="utf-8")
    assert "All are the same." in said if name == "same" else "| T-GATE |" in said
