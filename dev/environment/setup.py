"""Make everything `python dev ...` needs on a bare machine, with the standard library alone.

One ignored folder holds it all (`.fovea` in the checkout, or `$FOVEA_HOME`):

    downloads/        the archives ComfyUI's releases come from, by their sha256
    hosts/<version>/  ComfyUI, unpacked
    front-ends/<version>/  the front end of a ComfyUI that needs another one than the environment has
    venv/             Python with torch, ComfyUI's requirements and the developer tools
    log/              what pip said, one file per stage

Each part is used again when it is there and valid, and made again when it is broken, out of date or was interrupted.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from environment.archives import ensure_host
from environment.front_ends import ensure_front_end, front_end_version
from environment.packages import TORCH, environment_works, install_packages, packages_fingerprint
from environment.places import home
from environment.pythons import Venv, fingerprint_of, pip, pip_download, python_fingerprint, venv_python
from environment.releases import HOSTS, HostPin
from environment.stages import SetupError, Stages


@dataclass(frozen=True)
class Environment:
    """A Python that can run ComfyUI, and the ComfyUI folders to run, newest first."""

    python: Path
    hosts: tuple[Path, ...]


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Let one process at a time work on `folder`; the system frees the lock even when a process is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+") as handle:
        if not _try_lock(handle):
            print("Another `python dev` is setting up; waiting for it.", flush=True)
            while not _try_lock(handle):
                time.sleep(0.5)
        yield


def _try_lock(handle: IO[str]) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def ensure(pins: tuple[HostPin, ...] = HOSTS) -> Environment:
    """Make or reuse the environment, which is the newest ComfyUI's, and the releases of `pins`."""
    base = home()
    venv = base / "venv"
    with only_one(base):
        made = _ensure_once(base, pins)
        if made is None:
            print(f"The environment in {venv} is broken; making it again.", flush=True)
            shutil.rmtree(venv, ignore_errors=True)
            made = _ensure_once(base, pins)
    if made is None:
        raise SetupError(
            f"a fresh environment in {venv} cannot import torch and ComfyUI's packages",
            f"See what `{venv_python(venv)} -c 'import torch, torchvision, transformers'` says, or use another Python 3.",
        )
    return made


def _ensure_once(base: Path, pins: tuple[HostPin, ...]) -> Environment | None:
    """Go through all stages once; returns None when the finished environment turns out not to work."""
    every = dict.fromkeys((HOSTS[0], *pins))
    stages, log, venv = Stages(len(every) + 3), base / "log", Venv(base / "venv")
    with stages.stage(f"Python {sys.version_info[0]}.{sys.version_info[1]} environment") as close:
        fingerprint = python_fingerprint()
        if venv.is_usable(fingerprint):
            close("ready")
        else:
            venv.create(fingerprint, log / "venv.log")
    hosts: dict[HostPin, Path] = {}
    for pin in every:
        with stages.stage(f"ComfyUI {pin.version}") as close:
            folder, ready = ensure_host(pin, base, lambda pin, to: pip_download(venv.python, pin, to, log / "download.log"))
            if hosts and front_end_version(folder) != front_end_version(hosts[HOSTS[0]]):
                ready = ensure_front_end(venv.python, folder, log / "front-end.log") and ready
            hosts[pin] = folder
            if ready:
                close("ready")
    with stages.stage(" ".join(TORCH[0].split("=="))) as close:
        if venv.has("torch", fingerprint_of(*TORCH)):
            close("ready")
        else:
            with venv.working_on("torch", fingerprint_of(*TORCH)):
                pip(venv.python, "install", "--no-compile", *TORCH, log=log / "torch.log")
    with stages.stage("ComfyUI's packages and the developer tools") as close:
        newest = hosts[HOSTS[0]]
        if venv.has("packages", packages_fingerprint(newest)):
            close("ready")
        else:
            with venv.working_on("packages", packages_fingerprint(newest)):
                install_packages(venv.python, newest, log / "packages.log")
        return Environment(venv.python, tuple(hosts[pin] for pin in pins)) if environment_works(venv.python) else None
