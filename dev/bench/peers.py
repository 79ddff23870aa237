"""Other node packs beside ours: what ``--peer NAME=PATH`` names, loaded as ComfyUI loads a pack.

A benchmark asks for the node that does what it measures; it knows that node by its inputs and outputs, not by its name.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

Found = TypeVar("Found")
NodeClass = Any  # of nodes in ComfyUI's first way to define them


def add_peer_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="measure another node pack too")


def of_each_pack(named: Sequence[str], find: Callable[[list[NodeClass]], Found | None], wanted: str) -> dict[str, Found]:
    """Return what ``find`` makes of each pack's nodes, by the pack's name; packs without it are reported and left out.

    Args:
        named: ``NAME=PATH`` of each pack.
        wanted: what is looked for, for the message.
    """
    found: dict[str, Found] = {}
    for item in named:
        name, _, path = item.partition("=")
        made = find(_nodes(name, Path(path)))
        if made is None:
            print(f"--peer {name}: has no {wanted}")
        else:
            found[name] = made
    return found


def inputs_of(node: NodeClass) -> dict[str, Any]:
    types = node.INPUT_TYPES()
    return {**types.get("required", {}), **types.get("optional", {})}


def defaults_of(node: NodeClass) -> dict[str, Any]:
    return {key: value[1]["default"] for key, value in inputs_of(node).items() if len(value) > 1 and "default" in value[1]}


def choices_of(node: NodeClass, name: str) -> list[str]:
    """Return what one can choose for an input; nothing where it is no list."""
    options = inputs_of(node).get(name, ((),))[0]
    return list(options) if isinstance(options, list | tuple) else []


def call(node: NodeClass, **inputs: Any) -> Any:
    """Return the outputs of a node in whose graph all of them are used."""
    used = {"2": {"inputs": {str(index): ["1", index] for index in range(len(node.RETURN_TYPES))}}}
    told = {"PROMPT": used, "UNIQUE_ID": "1"}
    hidden = {key: told[kind] for key, kind in node.INPUT_TYPES().get("hidden", {}).items() if kind in told}
    return getattr(node(), node.FUNCTION)(**hidden, **inputs)


def _nodes(name: str, folder: Path) -> list[NodeClass]:
    """Return all that are not deprecated."""
    entry = folder.resolve() / "__init__.py"
    spec = importlib.util.spec_from_file_location(f"peer_{name}", entry, submodule_search_locations=[str(entry.parent)])
    if spec is None or spec.loader is None or not entry.is_file():
        raise SystemExit(f"--peer {name}: {folder} is not a folder of nodes")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    titles = getattr(module, "NODE_DISPLAY_NAME_MAPPINGS", {})
    return [node for key, node in module.NODE_CLASS_MAPPINGS.items() if "deprecated" not in titles.get(key, "").lower()]
