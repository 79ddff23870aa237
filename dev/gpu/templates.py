"""Every template on the real server, as a user runs it; some again with fp8 weights and nothing left on the GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
import time
from pathlib import Path

from environment import host_version_of
from host_server import HostServer, Prompt, ServerError, WorkflowError

from gpu.trial import Trial
from workflows import workflow_files

AGAIN = ("T-GATE", "Attend-and-Excite")  # with fewer resources: those that begin so
LIMIT = 60  # seconds for a template


def _modes(host: Path) -> dict[str, tuple[str, ...]]:
    """Return the arguments of each server; an older ComfyUI knows no dynamic VRAM."""
    knows = "--disable-dynamic-vram" in (host / "comfy" / "cli_args.py").read_text(encoding="utf-8")
    little = ("--novram", *(("--disable-dynamic-vram",) if knows else ()))
    return {"as usual": (), "fp8 weights, --novram": ("--fp8_e4m3fn-unet", *little)}


def _without_pages(folder: Path) -> tuple[str, ...]:
    """Return arguments for a server that need not show a front end, which a machine without a network may lack."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.html").write_text("<html></html>", encoding="utf-8")
    return "--front-end-root", str(folder)


def prompts_of(server: HostServer, folder: Path | None) -> dict[str, Prompt]:
    """Return the templates in the server's form: those of a folder, or the shipped ones, which comfy-cli converts."""
    if folder is not None:
        return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    if importlib.util.find_spec("comfy_cli") is None:
        raise WorkflowError("comfy-cli is not here: write the templates elsewhere with --write-prompts, and name them: --prompts")
    known = server.object_info()
    return {path.stem: workflow_files.convert(workflow_files.load(path), known) for path in workflow_files.shipped()}


def write_prompts(host: Path, folder: Path) -> int:
    """Write every template in the server's form, for a machine that lacks comfy-cli. Return how many there are."""
    with tempfile.TemporaryDirectory() as base:
        with HostServer(host, Path(base), cpu=True, arguments=_without_pages(Path(base) / "pages")) as server:
            found = prompts_of(server, None)
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompt in found.items():
        (folder / f"{name}.json").write_text(json.dumps(prompt), encoding="utf-8")
    return len(found)


def report(trial: Trial) -> None:
    """Say a line for each template as soon as it has run."""
    host = Path(os.environ["COMFYUI_PATH"])
    trial.say(f"ComfyUI {host_version_of(host)}.\n")
    for mode, arguments in _modes(host).items():
        with tempfile.TemporaryDirectory() as base:
            began = time.monotonic()
            server = HostServer(host, Path(base), arguments=(*_without_pages(Path(base) / "pages"), *arguments))
            try:
                with server:
                    trial.say(f"\n{mode}: the server is up in {time.monotonic() - began:.0f} s.\n")
                    _run_all(trial, server, mode)
            except (ServerError, WorkflowError) as error:
                trial.say(f"\n{mode}: {error}")
        if trial.tiny:
            break


def _run_all(trial: Trial, server: HostServer, mode: str) -> None:
    for name, prompt in prompts_of(server, trial.prompts).items():
        if (mode != "as usual" or trial.tiny) and not name.startswith(AGAIN):
            continue
        began = time.monotonic()
        try:
            made = f"{len(server.run(prompt, timeout=LIMIT).images)} images"
        except (ServerError, WorkflowError, TimeoutError) as error:
            made = f"FAILED: {type(error).__name__}: {error}"
        trial.say(f"- {name}: {time.monotonic() - began:.1f} s, {made}")
        if trial.tiny:
            break
