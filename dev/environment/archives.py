"""Fetch the archive of a pinned ComfyUI release, check its sha256 and unpack it."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from environment.releases import HostPin
from environment.stages import SetupError

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
    """Fetch the archive of `pin` and check its sha256; an incomplete or changed file from before is fetched anew."""
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
    """Yield the regular files of a tar.gz or zip, each as a name and a function that opens it. Links and devices are skipped."""
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
    """Read the version from a ComfyUI folder."""
    try:
        text = (folder / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    return next((line.split('"')[1] for line in text.splitlines() if line.startswith("__version__") and '"' in line), None)


def host_is_valid(pin: HostPin, folder: Path) -> bool:
    """Return whether `folder` is the ComfyUI of `pin`, with every file it was unpacked with still there in full."""
    try:
        stamp = json.loads((folder / "fovea-stamp.json").read_text(encoding="utf-8"))
        files = stamp["files"]
        whole = all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return whole and stamp["sha256"] == pin.sha256 and host_version_of(folder) == pin.version and set(HOST_FILES) <= set(files)


def ensure_host(pin: HostPin, base: Path, download: Callable[[HostPin, Path], None]) -> tuple[Path, bool]:
    """Unpack the ComfyUI of `pin` unless it is there already; returns its folder, and whether it was.

    It is unpacked beside its place and renamed into it, so a half-unpacked ComfyUI is never mistaken for one.
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
            f"{pin.archive} does not hold a whole ComfyUI {pin.version}",
            "Report this: the pins in dev/environment/releases.py are wrong.",
        )
    return folder, False
