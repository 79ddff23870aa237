"""Say in one report what a machine with a GPU does with the pack: is it right there, and how fast?

    python dev gpu [--minutes N] [--parts NAME ...] [--out FILE] [--prompts FOLDER] [--tiny]
    python dev gpu --write-prompts FOLDER

Gradients, maps and T-GATE beside the same on the CPU, with weights in fp16, bf16, fp8, packed as in GGUF files and with LoRA,
with dynamic VRAM and without, and with nothing left on the GPU; every template on the real server; the benchmarks at real size
and where launches decide. Each part has a time limit, and parts run in the order of their worth until the minutes are over. What
a part has said is kept however it ends. Without a GPU it all runs on the CPU, which is of use with ``--tiny`` only.

A machine without a network needs ComfyUI, its packages, and the templates as ``--write-prompts`` leaves them elsewhere. There
FOVEA_INSIDE=1 and COMFYUI_PATH let this command use the Python that it is started with.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from environment import DEV, home

from gpu.parts import PARTS
from gpu.worker import START

START_LIMIT = 240  # seconds until ComfyUI is there
GRACE = 10  # until a part that is to end is killed


@dataclass
class Outcome:
    """How a part ended, and after how many seconds."""

    how: str
    seconds: float = 0.0


@dataclass
class Run:
    """The parts of one report, on their way."""

    folder: Path
    names: list[str]
    deadline: float
    settings: dict[str, str | bool | None]
    worker: Sequence[str] = (sys.executable, "-m", "gpu.worker")
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    ends: dict[str, float] = field(default_factory=dict)

    def all(self) -> None:
        """Run every part in as few processes as can be."""
        while left := [name for name in self.names if name not in self.outcomes]:
            if self.deadline - time.monotonic() < 1:
                self.outcomes.update({name: Outcome("not reached") for name in left})
                return
            self._process(left)

    def _process(self, names: Sequence[str]) -> None:
        """Run some parts in one process until all are done, one takes too long, or the process ends."""
        for file in self.folder.glob(f"{START}.*"):
            file.unlink()
        command = [*self.worker, str(self.folder), json.dumps(self.settings), *names]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(DEV), os.environ.get("PYTHONPATH"))))}
        with (self.folder / "worker.log").open("ab") as log:
            worker = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=self.folder, env=env)
            try:
                stopped = self._follow(worker, names)
            finally:
                end(worker)
        self._take_note(names)
        missing = [name for name in names if name not in self.outcomes]
        begun = [name for name in missing if self._is(name, "started")]
        if missing and not stopped and (begun or not any(self._is(name, "done") for name in names)):
            self._say((begun or missing)[0], Outcome(f"the process ended ({worker.returncode})"))

    def _follow(self, worker: subprocess.Popen[bytes], names: Sequence[str]) -> bool:
        """Wait until the process ends, and return False; return True where a part has taken too long."""
        while worker.poll() is None:
            self._take_note(names)
            now = time.time()
            running = [name for name in (START, *names) if self._is(name, "started") and not self._is(name, "done")]
            for name in running:
                limit = START_LIMIT if name == START else PARTS[name].limit
                seconds = now - (self.folder / f"{name}.started").stat().st_mtime
                over = time.monotonic() > self.deadline
                if seconds > limit or over:
                    blamed = next(each for each in names if each not in self.outcomes) if name == START else name
                    reason = "the report's time was over" if over else f"over its limit of {limit:.0f} s"
                    self._say(blamed, Outcome(reason, seconds))
                    return True
            time.sleep(0.1)
        return False

    def _is(self, name: str, state: str) -> bool:
        return (self.folder / f"{name}.{state}").exists()

    def _take_note(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.outcomes and self._is(name, "done"):
                done = self.folder / f"{name}.done"
                seconds = done.stat().st_mtime - (self.folder / f"{name}.started").stat().st_mtime
                self._say(name, Outcome(done.read_text(encoding="utf-8") or "ok", seconds))

    def _say(self, name: str, outcome: Outcome) -> None:
        self.outcomes[name] = outcome
        print(f"{name:20} {outcome.seconds:6.1f} s  {outcome.how.splitlines()[0]}", flush=True)

    def text(self) -> str:
        """Write the report as far as it has come."""
        said = {name: self._said(name) for name in (START, *self.names)}
        rows = [
            f"| {PARTS[name].title} | {self.outcomes[name].how.splitlines()[0]} | {self.outcomes[name].seconds:.0f} s |"
            for name in self.names
        ]
        parts = [f"## {PARTS[name].title}\n\n{_lower_titles(said[name])}" for name in self.names if said[name]]
        head = ["# On a GPU", f"Made by `python dev gpu`, {datetime.date.today():%Y-%m-%d}. {said[START]}.", "", "| part | | |"]
        return "\n".join([*head[:1], "", *head[1:], "|---|---|---|", *rows, "", "\n\n".join(parts), ""])

    def _said(self, name: str) -> str:
        file = self.folder / f"{name}.md"
        return file.read_text(encoding="utf-8").strip() if file.exists() else ""


def _lower_titles(text: str) -> str:
    return "\n".join(f"#{line}" if line.startswith("#") else line for line in text.splitlines())


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that may have started others, which it ends on its way out."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python dev gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8, help="for everything (default 8)")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--out", type=Path, help="the report (default: .fovea/gpu/report.md)")
    parser.add_argument("--prompts", type=Path, help="the templates in the server's form, where comfy-cli is missing")
    parser.add_argument("--write-prompts", type=Path, metavar="FOLDER", help="write the templates in that form, and nothing else")
    parser.add_argument("--tiny", action="store_true", help="small networks and few steps, to try the report itself")
    args = parser.parse_args(argv)
    if args.write_prompts:
        from gpu.templates import write_prompts

        count = write_prompts(Path(os.environ["COMFYUI_PATH"]), args.write_prompts)
        print(f"{count} templates are in {args.write_prompts}")
        return 0
    out = (args.out or home() / "gpu" / "report.md").resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"tiny": args.tiny, "prompts": None if args.prompts is None else str(args.prompts.resolve())}
        run = Run(Path(folder), args.parts, time.monotonic() + 60 * args.minutes, settings)
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            run.all()
        finally:
            run.outcomes = {name: run.outcomes.get(name, Outcome("not reached")) for name in run.names}
            out.write_text(run.text(), encoding="utf-8")
            log = Path(folder, "worker.log")
            if log.exists():
                out.with_suffix(".log").write_bytes(log.read_bytes())
    print(f"The report: {out}")
    return int(any(outcome.how != "ok" for outcome in run.outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
