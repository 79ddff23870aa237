"""Run the tests, the command `python dev test`: ruff, mypy, then pytest on one pinned ComfyUI after the other.

pytest starts a process for each processor. By default the newest ComfyUI gets every test, an older one those whose result
depends on it (all but the marker `newest`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import environment
from environment import DEV, ROOT, Environment, host_version_of
from host_server import link

PACK = "fovea_attention"


@dataclass
class Count:
    """Count the tests that passed, failed and were skipped."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed" + (f", {self.skipped} skipped" if self.skipped else "")


def run(command: Sequence[str], cwd: Path = ROOT, **extra: str) -> int:
    """Run a command to its end with its output on ours; when we are stopped, it is stopped first."""
    child = subprocess.Popen(list(command), cwd=cwd, env=environment.clean_env(**extra))
    try:
        return child.wait()
    except BaseException:
        stop(child)
        raise


def stop(child: subprocess.Popen[Any]) -> None:
    """Let a command clean up behind itself; one that does not is killed."""
    if child.poll() is None:
        child.send_signal(signal.SIGINT if os.name != "nt" else signal.SIGTERM)
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def check_style(python: Path) -> int:
    """Run ruff over everything."""
    return run([str(python), "-m", "ruff", "check", "--no-cache", str(ROOT)])


def check_types(python: Path) -> int:
    """Run mypy over the pack and the developer commands.

    The pack is looked at through a link that is named like the module it is in tests: a checkout may have any name, and
    mypy takes the folder's name for the package's. It runs beside that link and not in the checkout, where it would take
    the pack's `nodes` for ComfyUI's `nodes.py`.
    """
    folder = environment.home() / "types"
    link(ROOT, folder / PACK)
    targets = [Path(PACK, name) for name in ("__init__.py", "attention", "nodes")]
    targets += [Path(PACK, path.relative_to(ROOT)) for path in sorted(DEV.rglob("*.py"))]
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(folder / "cache")]
    bases = os.pathsep.join((str(folder), str(folder / PACK / "dev")))
    return run([str(python), "-m", "mypy", *options, *map(str, targets)], cwd=folder, MYPYPATH=bases)


class HostTests:
    """Run pytest on one ComfyUI. Its lines appear on ours as they come, behind ComfyUI's version where there are several."""

    def __init__(self, python: Path, host: Path, arguments: Sequence[str], label: str = "") -> None:
        self.report = environment.home() / "log" / f"tests-{host.name}.xml"
        self.report.parent.mkdir(parents=True, exist_ok=True)
        self.report.unlink(missing_ok=True)
        # In the groups and the order that tests/conftest.py gives, so that what tests share is made once.
        shared = ["-n", str(os.cpu_count() or 1), "--dist", "loadgroup", "--no-loadscope-reorder"]
        command = [str(python), "-m", "pytest", "-c", str(ROOT / "tests" / "pytest.ini"), f"--junitxml={self.report}", *shared]
        command += arguments
        if not any(argument.split("::")[0].endswith(".py") for argument in arguments):
            command.append(str(ROOT / "tests"))
        env = environment.clean_env(COMFYUI_PATH=str(host), PYTHONUNBUFFERED="1")
        env.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for each other by spinning take the other process's time
        self.child = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.prefix = f"{label} | ".encode() if label else b""
        self.reader = threading.Thread(target=self._pass_on, daemon=True)
        self.reader.start()

    def _pass_on(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            sys.stdout.buffer.write(self.prefix + line)
            sys.stdout.buffer.flush()

    def result(self) -> Count:
        """Read the counts from its report file; without one, pytest itself broke, which is a failure."""
        code = self.child.wait()
        self.reader.join(10)
        count = read_report(self.report)
        if code and not count.failed:
            count.failed = 1
        return count


def run_tests(python: Path, hosts: Sequence[Path], arguments: Sequence[str], *, whole: bool = True) -> dict[str, Count]:
    """Run pytest on one ComfyUI after the other, the newest first; returns the counts by version.

    Unless it is to be ``whole``, the others get fewer tests than the first.
    """
    counts: dict[str, Count] = {}
    for host in hosts:
        version = host_version_of(host) or host.name
        less = [] if whole or not counts else ["-m", "not newest"]
        tests = HostTests(python, host, [*less, *arguments], version if len(hosts) > 1 else "")
        try:
            counts[version] = tests.result()
        except BaseException:
            stop(tests.child)
            raise
    return counts


def read_report(report: Path) -> Count:
    """Read the counts from pytest's report file."""
    count = Count()
    if not report.is_file():
        return count
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        tests, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
        failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        count += Count(tests - failed - skipped, failed, skipped)
    return count


def check(python: Path) -> int:
    """Run ruff and mypy, both of them even when the first one complains."""
    return int(any([check_style(python), check_types(python)]))


def announce(number: int, total: int, what: str) -> None:
    print(f"\n[{number}/{total}] {what}", flush=True)


def main(made: Environment, arguments: Sequence[str], *, whole: bool) -> int:
    """Run every check, all of them even when one fails; the last line sums up the tests."""
    broken, start = [], time.monotonic()
    announce(1, 3, "ruff")
    if check_style(made.python):
        broken.append("ruff")
    announce(2, 3, "mypy")
    if check_types(made.python):
        broken.append("mypy")
    versions = [host_version_of(host) or host.name for host in made.hosts]
    announce(3, 3, f"pytest on ComfyUI {' and '.join(versions)}")
    counts = run_tests(made.python, made.hosts, arguments, whole=whole)
    total = sum(counts.values(), Count())
    print(f"\n{time.monotonic() - start:.0f} s", *(f"ComfyUI {version}: {count}" for version, count in counts.items()), sep="\n")
    if broken:
        print(f"Not clean: {', '.join(broken)} (see above)")
    sys.stdout.flush()
    print(total, flush=True)
    return 1 if broken or total.failed or not total.passed else 0
