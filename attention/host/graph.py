"""The workflow that is running: which node asks."""

from __future__ import annotations

from typing import NamedTuple

from comfy_execution.utils import get_executing_context


class NodeCall(NamedTuple):
    """One call of a node: the prompt of the queue, the node's id in it, and its place in a list of inputs."""

    prompt: str
    node: str
    list_index: int


def executing_node() -> NodeCall | None:
    """Return the node that ComfyUI is running; None where Python calls it without a queue."""
    context = get_executing_context()
    return None if context is None else NodeCall(str(context.prompt_id), str(context.node_id), context.list_index or 0)
