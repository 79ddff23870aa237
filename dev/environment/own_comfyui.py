"""Use a ComfyUI that somebody already has, with the Python that runs it. Nothing is installed into it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from environment.archives import HOST_FILES
from environment.packages import REQUIREMENTS, TOOLS, WITHOUT_DEPENDENCIES, install_alone
from environment.places import home
from environment.pythons import Venv, asks, fingerprint_of, pip, run_logged, venv_python
from environment.setup import Environment, only_one
from environment.stages import SetupError, Stages


def existing(comfyui: Path, python: Path | None = None) -> Environment:
    """Use a ComfyUI that is already there, with its Python. Nothing is installed into it."""
    host = comfyui.expanduser().resolve()
    missing = [name for name in HOST_FILES if not (host / name).is_file()]
    if missing:
        raise SetupError(
            f"{host} is not a ComfyUI folder: it has no {missing[0]}", "Give the folder that holds ComfyUI's main.py."
        )
    theirs = python or find_python(host)
    if asks(theirs, "import torch, aiohttp") is None:
        raise SetupError(
            f"{theirs} cannot import torch and aiohttp, so it does not run {host}", "Name the Python that does with --python."
        )
    if asks(theirs, _has_tools()) is not None:
        return Environment(theirs, (host,))
    with only_one(home()):
        return Environment(_with_tools(theirs), (host,))


def find_python(host: Path) -> Path:
    """Find the Python that belongs to a ComfyUI folder; without one, returns the one running us."""
    portable = host.parent / "python_embeded" / "python.exe"
    candidates = (venv_python(host / ".venv"), venv_python(host / "venv"), portable)
    return next((path for path in candidates if path.is_file()), Path(sys.executable))


def _has_tools() -> str:
    return f"import importlib.util as find\nassert all(find.find_spec(name) for name in {TOOLS!r})"


def _with_tools(theirs: Path) -> Path:
    """Make a thin environment on top of somebody's Python: it sees all their packages and adds the developer tools."""
    base = home()
    folder = base / f"tools-{fingerprint_of(str(theirs.absolute()))[:12]}"
    venv, log = Venv(folder), base / "log"
    fingerprint = fingerprint_of(
        REQUIREMENTS.read_text(encoding="utf-8"), *WITHOUT_DEPENDENCIES, asks(theirs, "import sys; print(sys.version)") or ""
    )
    stages = Stages(1)
    with stages.stage("Developer tools on top of your ComfyUI's Python") as close:
        if venv.is_usable(fingerprint) and asks(venv.python, "import torch\n" + _has_tools()) is not None:
            close("ready")
            return venv.python
        shutil.rmtree(folder, ignore_errors=True)
        by_hand = (
            f"{theirs} -m pip install -r {REQUIREMENTS} && {theirs} -m pip install --no-deps {' '.join(WITHOUT_DEPENDENCIES)}"
        )
        advice = f"Or install them yourself: {by_hand}"
        run_logged([str(theirs), "-m", "venv", str(folder)], log / "tools.log", advice)
        packages = asks(
            theirs, "import json, site, sysconfig; print(json.dumps([sysconfig.get_paths()['purelib'], *site.getsitepackages()]))"
        )
        own = asks(venv.python, "import sysconfig; print(sysconfig.get_paths()['purelib'])")
        assert packages is not None and own is not None, "both Pythons have just run"
        lines = [f"import site; site.addsitedir({path!r})" for path in dict.fromkeys(json.loads(packages))]
        (Path(own) / "fovea-below.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
        pip(venv.python, "install", "-r", str(REQUIREMENTS), log=log / "tools.log")
        install_alone(venv.python, log / "tools.log")
        venv.note.write_text(json.dumps({"python": fingerprint}), encoding="utf-8")
        return venv.python
