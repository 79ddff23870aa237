"""What the pack tells its user: a line in the log, and the same line on the node that it is about."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from comfy_execution.progress import get_progress_state

from .graph import executing_node
from .log import log

EVENT = "fovea.text"  # web/node_text.js listens
_MOST_LINES = 4  # a MODEL may be sampled many times in one graph: the last runs are shown


class NodeText:
    """The text on one node: the one that ComfyUI is running when this is made.

    A technique is attached by its own node and acts while a sampler's node runs, perhaps in a later prompt in which ComfyUI
    takes the output of its own node from the cache. Such a node is declared ``not_idempotent``, so that what it gets from the
    cache is its own and never that of another node with the same settings. Without a queue (scripts, tests), without a browser
    that waits for the prompt, and where the node is not in the workflow that runs, there is only the log.
    """

    def __init__(self) -> None:
        call = executing_node()
        self._node = None if call is None else call.node

    def foretell(self, line: str) -> None:
        """Show on the node what a run is about to do, until the next ``tell``."""
        self._send([*self._lines(), line])

    def tell(self, line: str, level: int = logging.INFO) -> None:
        """Log what was done, and show it on the node. Lines of several runs in one prompt stand below each other."""
        log.log(level, "%s", line)
        self.show(line)

    def show(self, line: str) -> None:
        """Show a line on the node, below those of the same prompt."""
        lines = self._lines()
        lines.append(line)
        self._send(lines)

    def nothing(self) -> None:
        """Take away what an earlier prompt has left on the node, where there is nothing to tell now."""
        self._send(self._lines())

    def _lines(self) -> list[str]:
        """Return the lines of this node in the prompt that runs, which may be changed."""
        now = executing_node()
        return [] if now is None or self._node is None else _board.lines(now.prompt, self._node)

    def _send(self, lines: list[str]) -> None:
        now, server = executing_node(), _server()
        if self._node is None or now is None or server is None:
            return
        prompt = get_progress_state().dynprompt
        if not prompt.has_node(self._node):
            return
        node = prompt.get_display_node_id(self._node)  # the one on the canvas, of a node that was expanded from it
        message = {
            "node": node,
            "kind": prompt.get_node(node)["class_type"],
            "workflow": _workflow_id(server, now.prompt),
            "lines": lines[-_MOST_LINES:],
        }
        server.send_sync(EVENT, message, server.client_id)


class _Board:
    """The lines of the prompt that runs, by node."""

    def __init__(self) -> None:
        self._prompt = ""
        self._lines: dict[str, list[str]] = {}

    def lines(self, prompt: str, node: str) -> list[str]:
        if prompt != self._prompt:
            self._prompt, self._lines = prompt, {}
        return self._lines.setdefault(node, [])


_board = _Board()


def _server() -> Any:
    """Return ComfyUI's server; None where there is none, or no browser that waits for the prompt that runs."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    return None if getattr(server, "client_id", None) is None else server


def _workflow_id(server: Any, prompt: str) -> str | None:
    """Return the id of the browser's workflow that a prompt was made from; None where it is not known."""
    running = getattr(getattr(server, "prompt_queue", None), "currently_running", {})
    extra: Any = next((item[3] for item in list(running.values()) if item[1] == prompt), {})
    for name in ("extra_pnginfo", "workflow", "id"):
        extra = extra.get(name) if isinstance(extra, Mapping) else None
    return None if extra is None else str(extra)
