"""Run a shipped workflow on a real ComfyUI, the command `python dev demo`: says where the images are and which page to open."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import environment
from environment import host_version_of
from host_server import HostServer, Prompt, Result, ServerError, WorkflowError

from workflows import workflow_files

WORKFLOW = "T-GATE - same image, faster"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workflow", default=WORKFLOW, metavar="NAME", help=f'which workflow to run (default: "{WORKFLOW}")')
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the images go (default: .fovea/demo)")
    parser.add_argument("--port", type=int, default=8188, help="the server's port (default: 8188; 0 = any free one)")
    parser.add_argument("--once", action="store_true", help="stop after the images instead of leaving the server open")
    parser.add_argument("--thumbnail", action="store_true", help="also remake the workflow's thumbnail from this run's images")


class ProgressLines:
    """One line per node on the terminal: its title, its steps while it runs, its seconds at the end."""

    def __init__(self, prompt: Prompt) -> None:
        self.titles = {node: entry.get("_meta", {}).get("title") or entry["class_type"] for node, entry in prompt.items()}
        self.width = max(map(len, self.titles.values()))
        self.live = sys.stdout.isatty()
        self.node, self.steps, self.since = "", "", 0.0

    def __call__(self, node: str, done: int, total: int) -> None:
        if node != self.node:
            self.close()
            self.node, self.steps, self.since = node, "", time.monotonic()
        if total > 1:
            self.steps = f"{done}/{total}"
        if self.live:
            print(f"\r  {self._text()}", end="", flush=True)

    def _text(self) -> str:
        return f"{self.titles.get(self.node, self.node):<{self.width}}  {self.steps:>7}"

    def close(self) -> None:
        """End the line of the current node."""
        if self.node:
            start = "\r" if self.live else ""
            print(f"{start}  {self._text()}  {time.monotonic() - self.since:6.1f} s", flush=True)
        self.node = ""


def save_images(server: HostServer, result: Result, prompt: Prompt, folder: Path) -> dict[Path, str]:
    """Write the images of a run, named after the nodes that made them; returns the files and those nodes' titles."""
    folder.mkdir(parents=True, exist_ok=True)
    saved: dict[Path, str] = {}
    for image in sorted(result.images, key=lambda image: int(image.node)):
        title = prompt[image.node].get("_meta", {}).get("title") or image.filename
        name = re.sub(r"[^\w-]+", "-", title).strip("-").lower()
        path = folder / f"{len(saved) + 1}-{name}{Path(image.filename).suffix}"
        path.write_bytes(server.fetch(image))
        saved[path] = title
    return saved


def run_workflow(server: HostServer, path: Path, folder: Path) -> dict[Path, str]:
    """Convert the workflow, run it with progress, and save its images."""
    prompt = workflow_files.convert(workflow_files.load(path), server.object_info())
    lines = ProgressLines(prompt)
    print(f"Running: {path.stem}", flush=True)
    try:
        result = server.run(prompt, lines)
    finally:
        lines.close()
    images = save_images(server, result, prompt, folder)
    if not images:
        raise WorkflowError(f"{path.stem} ran but made no image.")
    return images


def show(host: Path, arguments: argparse.Namespace) -> None:
    """Show the demo itself, with ComfyUI's Python."""
    path = workflow_files.find(arguments.workflow)
    folder = (arguments.out or environment.home() / "demo").resolve()
    server = HostServer(host, environment.home() / "server", port=arguments.port)
    print(f"Starting ComfyUI {host_version_of(host)} ... ", end="", flush=True)
    start = time.monotonic()
    with server:
        print(f"{time.monotonic() - start:.0f} s", flush=True)
        images = run_workflow(server, path, folder)
        print("Images:", *(f"  {image}" for image in images), sep="\n", flush=True)
        if arguments.thumbnail:
            make_thumbnail(path, images)
        if arguments.once:
            print(f"Done; the server at {server.url} is closed.")
            return
        print(f"ComfyUI is open at {server.url}\n  Workflow > Browse Templates > fovea-attention > {path.stem}")
        print("  Ctrl-C closes it.", flush=True)
        while True:
            time.sleep(0.5)
            server.check_alive("by itself")


def make_thumbnail(workflow: Path, images: dict[Path, str]) -> None:
    from workflows import thumbnails  # needs Pillow, which only the environment's Python has

    target = workflow.with_suffix(".jpg")
    thumbnails.make_thumbnail(list(images), list(images.values()), target)
    print(f"Thumbnail: {target}\n  to drag onto the canvas: {thumbnails.carry_workflow(workflow)}", flush=True)


def _stop(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def main(host: Path, arguments: argparse.Namespace) -> int:
    """Run the demo; whichever way it ends, the server ends with it."""
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _stop)
    try:
        show(host, arguments)
    except (ServerError, WorkflowError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nClosed.")
    return 0
