"""Give every ComfyUI the front end it asks for: the environment can hold one version only, the others lie beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

from environment.places import home
from environment.pythons import pip

FRONT_END = "comfyui-frontend-package"


def front_end_version(host: Path) -> str | None:
    """Return the version of the front end that a ComfyUI asks for."""
    lines = (host / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return next((line.split("==")[1].strip() for line in lines if line.startswith(f"{FRONT_END}==")), None)


def front_end_folder(version: str) -> Path:
    return home() / "front-ends" / version


def front_end_arguments(host: Path) -> tuple[str, ...]:
    """Return the arguments that make a server show its own front end; none where its Python has to provide one."""
    version = front_end_version(host)
    pages = front_end_folder(version or "none") / FRONT_END.replace("-", "_") / "static"
    return ("--front-end-root", str(pages)) if pages.is_dir() else ()


def ensure_front_end(python: Path, host: Path, log: Path) -> bool:
    """Install a ComfyUI's own front end beside the environment; returns whether it was there already."""
    version = front_end_version(host)
    if version is None or front_end_folder(version).is_dir():
        return True
    unfinished = front_end_folder(version).with_name(f"{version}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    pip(python, "install", "--no-deps", "--target", str(unfinished), f"{FRONT_END}=={version}", log=log)
    unfinished.rename(front_end_folder(version))
    return False
