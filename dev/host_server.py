"""Start a real ComfyUI server with the pack in it, talk to it, and leave nothing running.

The server gets a base folder of its own (`--base-directory`), so ComfyUI's folder is only read: the pack and the demo
model's node folder are linked into `custom_nodes`, the embedded checkpoint into `models/checkpoints`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

DEV = Path(__file__).resolve().parent
ROOT = DEV.parent
CHECKPOINT = DEV / "scenes" / "fovea-scenes.safetensors"
DIT_CHECKPOINT = DEV / "scenes" / "fovea-scenes-dit.safetensors"
DEMO_NODES = DEV / "custom_nodes" / "fovea_demo_model"
PACK_FOLDER = "fovea-attention"  # the folder name a user gets from the registry
ADDRESS = "127.0.0.1"

Prompt = dict[str, dict[str, Any]]
OnProgress = Callable[[str, int, int], None]


class ServerError(RuntimeError):
    """The server could not start, stopped, or did not answer."""


class WorkflowError(RuntimeError):
    """The server refused a workflow or a node of it failed."""


@dataclass(frozen=True)
class SavedImage:
    """An image the server holds, and the node that made it."""

    node: str
    filename: str
    subfolder: str
    kind: str


@dataclass
class Result:
    """What a finished workflow left behind."""

    images: list[SavedImage] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)

    @property
    def pictures(self) -> list[SavedImage]:
        """The images, under the name that older scripts know."""
        return self.images


def has_accelerator() -> bool:
    """Return whether torch finds something faster than the CPU here."""
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        if os.name != "nt":  # there it would allow two servers on one port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except OSError:
            return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return int(probe.getsockname()[1])


def link(source: Path, target: Path) -> None:
    """Make `target` show `source`: a link, or a copy where links are not allowed (Windows without developer mode)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.is_dir():
        shutil.rmtree(target)
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(".git", ".fovea", "__pycache__"))
        else:
            shutil.copy2(source, target)


def furnish(base: Path) -> None:
    """Fill the server's base folder: the pack, the embedded models and what loads them."""
    link(ROOT, base / "custom_nodes" / PACK_FOLDER)
    for source, target in (
        (DEMO_NODES, base / "custom_nodes" / DEMO_NODES.name),
        (CHECKPOINT, base / "models" / "checkpoints" / CHECKPOINT.name),
        (DIT_CHECKPOINT, base / "models" / "diffusion_models" / DIT_CHECKPOINT.name),
    ):
        if source.exists():
            link(source, target)


def _die_with_parent() -> Callable[[], None] | None:
    """End the server, on Linux, even when this process is killed without a chance to tidy up."""
    if sys.platform != "linux":
        return None
    libc, set_parent_death_signal = ctypes.CDLL(None), 1
    return lambda: libc.prctl(set_parent_death_signal, signal.SIGTERM)


class HostServer:
    """One ComfyUI server process. Use it in a `with` block: whatever happens inside, the server is gone afterwards."""

    def __init__(
        self,
        host: Path,
        base: Path,
        *,
        python: str | os.PathLike[str] = sys.executable,
        port: int = 0,
        cpu: bool | None = None,
        arguments: tuple[str, ...] = (),
        ready_within: float = 300,
    ) -> None:
        self.host, self.base, self.python = host.resolve(), base.resolve(), os.fspath(python)
        self.port = port
        self.cpu = cpu
        self.arguments = arguments
        self.ready_within = ready_within
        self.log = self.base / "server.log"
        self.startup_log = ""  # what it logged until it was ready
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.port}"

    def __enter__(self) -> HostServer:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        if self.port and not port_is_free(self.port):
            raise ServerError(f"Port {self.port} is taken by another program. Stop it, or choose another: --port {free_port()}")
        self.port = self.port or free_port()
        self.base.mkdir(parents=True, exist_ok=True)
        furnish(self.base)
        for folder in ("input", "output", "temp", "user"):
            (self.base / folder).mkdir(exist_ok=True)
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                self.command(),
                cwd=self.host,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"},
                start_new_session=os.name != "nt",
                preexec_fn=_die_with_parent(),
            )
        self._wait_until_ready()

    def command(self) -> list[str]:
        cpu = self.cpu if self.cpu is not None else not has_accelerator()
        return [
            self.python, str(self.host / "main.py"),
            "--listen", ADDRESS,
            "--port", str(self.port),
            "--base-directory", str(self.base),
            "--database-url", "sqlite:///:memory:",
            "--disable-auto-launch",
            "--disable-api-nodes",
            *(["--cpu"] if cpu else []),
            *self.arguments,
        ]  # fmt: skip

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.ready_within
        while time.monotonic() < deadline:
            self.check_alive("before it was ready")
            with contextlib.suppress(ServerError):
                self.get("/system_stats", timeout=5)
                self.startup_log = self.log_text()
                return
            time.sleep(0.2)
        raise ServerError(f"ComfyUI did not answer within {self.ready_within:.0f} s. The end of its log:\n{self.log_tail()}")

    def check_alive(self, when: str) -> None:
        """Raise when the server process has ended."""
        if self.process is None:
            raise ServerError("ComfyUI is not running.")
        code = self.process.poll()
        if code is not None:
            raise ServerError(f"ComfyUI stopped {when} (exit code {code}). The end of its log:\n{self.log_tail()}")

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def log_tail(self, lines: int = 15) -> str:
        return "\n".join("    " + line for line in self.log_text().splitlines()[-lines:]) + f"\n  All of it: {self.log}"

    def stop(self) -> None:
        """End the server and everything it started: politely first, then for certain."""
        process, self.process = self.process, None
        if process is None:
            return
        self._signal_group(process, "TERM")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        self._signal_group(process, "KILL")
        process.wait()

    @staticmethod
    def _signal_group(process: subprocess.Popen[bytes], name: str) -> None:
        if os.name == "nt":
            if process.poll() is None:
                subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, getattr(signal, f"SIG{name}"))

    # -- talking to it

    def request(self, path: str, body: Any = None, timeout: float = 60) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers={"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no business on this machine
        try:
            with opener.open(request, timeout=timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError:
            raise
        except (OSError, TimeoutError) as error:
            raise ServerError(f"ComfyUI does not answer at {self.url}{path}: {error}") from error

    def get(self, path: str, timeout: float = 60) -> Any:
        return json.loads(self.request(path, timeout=timeout))

    def object_info(self) -> dict[str, Any]:
        """Return the schema of every node this server has."""
        return self.get("/object_info")

    def fetch(self, image: SavedImage) -> bytes:
        """Fetch the bytes of an image, as the server saved it."""
        query = {"filename": image.filename, "subfolder": image.subfolder, "type": image.kind}
        return self.request("/view?" + urllib.parse.urlencode(query))

    def run(self, prompt: Prompt, on_progress: OnProgress | None = None, timeout: float = 1800) -> Result:
        """Queue a workflow in API form and wait for its end. `on_progress(node, done, total)` is called on the way."""
        return asyncio.run(asyncio.wait_for(self._run(prompt, on_progress or (lambda node, done, total: None)), timeout))

    async def _run(self, prompt: Prompt, on_progress: OnProgress) -> Result:
        import aiohttp

        client = uuid.uuid4().hex
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.ws_connect(f"{self.url}/ws?clientId={client}", max_msg_size=0) as socket,
            ):
                prompt_id = self._queue(prompt, client)
                seconds = await self._follow(socket, prompt, prompt_id, on_progress)
        except aiohttp.ClientError as error:
            self.check_alive("while it ran the workflow")
            raise ServerError(f"The connection to ComfyUI broke: {error}") from error
        return self._collect(prompt_id, seconds)

    def _queue(self, prompt: Prompt, client: str) -> str:
        try:
            body = self.request("/prompt", {"prompt": prompt, "client_id": client})
        except urllib.error.HTTPError as error:
            raise WorkflowError(refusal(prompt, error.read())) from None
        answer = json.loads(body)
        if answer.get("node_errors"):  # it runs the parts of a workflow that are in order; half a workflow helps nobody
            self.request("/queue", {"delete": [answer["prompt_id"]]})
            self.request("/interrupt", {})
            raise WorkflowError(refusal(prompt, body))
        return answer["prompt_id"]

    async def _follow(self, socket: Any, prompt: Prompt, prompt_id: str, on_progress: OnProgress) -> dict[str, float]:
        """Read the server's messages until the workflow ends; returns the seconds each node took."""
        seconds: dict[str, float] = {}
        current, since = "", time.monotonic()
        async for message in socket:
            if not isinstance(message.data, str):
                continue  # preview images
            event = json.loads(message.data)
            kind, data = event["type"], event.get("data") or {}
            if data.get("prompt_id") != prompt_id:
                continue
            if kind == "executing":
                now = time.monotonic()
                if current:
                    seconds[current] = seconds.get(current, 0.0) + now - since
                current, since = str(data.get("node") or ""), now
                if not current:
                    return seconds
                on_progress(current, 0, 0)
            elif kind == "progress":
                on_progress(str(data.get("node") or current), int(data["value"]), int(data["max"]))
            elif kind == "execution_error":
                reason = f"{data['exception_type']}: {str(data['exception_message']).strip()}"
                raise WorkflowError(f"{label(prompt, str(data['node_id']))} failed: {reason}")
            elif kind == "execution_interrupted":
                raise WorkflowError(f"The run was interrupted at {label(prompt, str(data.get('node_id')))}.")
        self.check_alive("while it ran the workflow")
        raise ServerError("ComfyUI closed the connection before the workflow was done.")

    def outputs(self, prompt_id: str, timeout: float = 30) -> dict[str, Any]:
        """Return what each node of a run showed; ComfyUI tells of the run's end before it writes that down."""
        until = time.monotonic() + timeout
        while not (entry := self.get(f"/history/{prompt_id}").get(prompt_id)):
            if time.monotonic() > until:
                raise ServerError(f"ComfyUI has written nothing down of run {prompt_id} in {timeout:.0f} s.")
            time.sleep(0.05)
        found: dict[str, Any] = entry["outputs"]
        return found

    def _collect(self, prompt_id: str, seconds: dict[str, float]) -> Result:
        entry = self.get(f"/history/{prompt_id}").get(prompt_id)
        if not entry or entry["status"]["status_str"] != "success":
            raise WorkflowError(f"ComfyUI does not report success: {entry and entry['status']}")
        result = Result(seconds=seconds, outputs=entry["outputs"])
        for node, output in entry["outputs"].items():
            for image in output.get("images", ()):
                result.images.append(SavedImage(node, image["filename"], image["subfolder"], image["type"]))
        return result


def label(prompt: Prompt, node: str) -> str:
    """Name a node for a person: `node 7 (KSampler, "plain run")`."""
    entry = prompt.get(node, {})
    kind, title = entry.get("class_type", "unknown"), entry.get("_meta", {}).get("title")
    return f'node {node} ({kind}, "{title}")' if title and title != kind else f"node {node} ({kind})"


def refusal(prompt: Prompt, body: bytes) -> str:
    """Say why the server would not queue a workflow."""
    try:
        answer = json.loads(body)
    except ValueError:
        return f"ComfyUI refused the workflow: {body[:300]!r}"
    error, lines = answer.get("error") or {}, []
    lines.append(" ".join(filter(None, ("ComfyUI refused the workflow:", error.get("message"), error.get("details")))))
    for node, trouble in dict(answer.get("node_errors") or {}).items():
        lines += [f"  {label(prompt, node)}: {item['message']} - {item['details']}" for item in trouble["errors"]]
    return "\n".join(lines)
