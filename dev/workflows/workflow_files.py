"""Find the shipped workflows, and turn what the browser saves into what the server runs.

The conversion is comfy-cli's; a warning from it means that a value was dropped or guessed, so here it is an error.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from host_server import CHECKPOINT, DIT_CHECKPOINT, Prompt, WorkflowError

FOLDER = Path(__file__).resolve().parent.parent.parent / "workflows"
NOTES = ("Note", "MarkdownNote")
MODEL_FILE = re.compile(r"\.(safetensors|pt|pth|ckpt)$")


def shipped() -> list[Path]:
    """List every workflow of the pack, by name."""
    return sorted(FOLDER.glob("*.json"))


def blueprints() -> list[Path]:
    """List every subgraph blueprint of the pack, by name."""
    return sorted((FOLDER.parent / "subgraphs").glob("*.json"))


def find(name: str) -> Path:
    """Find a workflow by its title, part of it, or a path to a file."""
    if Path(name).is_file():
        return Path(name)
    hits = [path for path in shipped() if name.lower() in path.stem.lower()]
    exact = [path for path in hits if path.stem.lower() == name.lower()]
    if len(exact or hits) == 1:
        return (exact or hits)[0]
    names = "\n".join(f"  {path.stem}" for path in (hits or shipped()))
    raise WorkflowError(f"{'Several workflows match' if hits else 'No workflow is called'} {name!r}. There are:\n{names}")


def load(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WorkflowError(f"{path} is not JSON: {error}") from error


def graphs(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the workflow and the sub-graphs in it, each with its `nodes` and `links`."""
    return [workflow, *workflow.get("definitions", {}).get("subgraphs", ())]


def computing_nodes(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the nodes that compute, those in sub-graphs too: no notes, and no nodes that stand for a sub-graph."""
    stand_ins = {graph["id"] for graph in graphs(workflow)[1:]}
    return [node for graph in graphs(workflow) for node in graph["nodes"] if node["type"] not in {*NOTES, *stand_ins}]


def other_models(workflow: dict[str, Any]) -> set[str]:
    """Return the model files that a workflow asks for besides the demo's own; where there are any, it cannot run here."""
    values = [value for node in computing_nodes(workflow) for value in node.get("widgets_values") or ()]
    files = {value for value in values if isinstance(value, str) and MODEL_FILE.search(value)}
    return files - {CHECKPOINT.name, DIT_CHECKPOINT.name}


class _Warnings(logging.Handler):
    """Collects what the converter complains about."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def convert(workflow: dict[str, Any], object_info: dict[str, Any]) -> Prompt:
    """Convert a workflow as saved by the browser into the form the server's `/prompt` takes."""
    os.environ["DO_NOT_TRACK"] = "1"
    from comfy_cli.workflow_to_api import WorkflowConversionError, convert_ui_to_api

    unknown = sorted({str(node.get("type")) for node in computing_nodes(workflow)} - set(object_info) - {"Reroute"})
    if unknown:
        raise WorkflowError(f"The workflow needs nodes this ComfyUI does not have: {', '.join(unknown)}")
    collector, logger = _Warnings(), logging.getLogger("comfy_cli")
    logger.addHandler(collector)
    try:
        prompt = convert_ui_to_api(workflow, object_info)
    except WorkflowConversionError as error:
        raise WorkflowError(f"The workflow cannot be converted: {error}") from error
    finally:
        logger.removeHandler(collector)
    if collector.lines:
        raise WorkflowError("The workflow does not fit this ComfyUI:\n" + "\n".join(f"  {line}" for line in collector.lines))
    return prompt
