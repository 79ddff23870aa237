"""Find the shipped workflows, and turn what the browser saves into what the server runs.

The conversion is comfy-cli's; a warning from it means that a value was dropped or guessed, so here it is an error.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from host_server import Prompt, WorkflowError

FOLDER = Path(__file__).resolve().parent.parent.parent / "workflows"


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

    subgraphs = workflow.get("definitions", {}).get("subgraphs", ())
    types = {str(node.get("type")) for graph in (workflow, *subgraphs) for node in graph.get("nodes", ())}
    unknown = sorted(types - set(object_info) - {"Note", "MarkdownNote", "Reroute"} - {graph["id"] for graph in subgraphs})
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
