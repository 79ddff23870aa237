"""The house: which room of ``attention/`` may import which, read from the code's own imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ATTENTION = ROOT / "attention"
TECHNIQUES = ("tgate", "maps", "excite", "distill", "dit", "seamless")

# Room -> the rooms that it may import.
BELOW = {
    "host": (),
    "networks": (),
    "prompts": ("host",),
    "gradient": ("host", "networks"),
    **{technique: ("host", "networks", "prompts", "gradient") for technique in TECHNIQUES},
}
COMFYUI = ("comfy", "comfy_extras", "comfy_execution", "comfy_api", "comfy_kitchen", "folder_paths", "latent_preview", "nodes")

# Besides the door: the class that ComfyUI has to find in its own hierarchy.
IMPORTS_COMFYUI = ("host/", "dit/model.py")

pytestmark = pytest.mark.newest


def imported(source: str, module: tuple[str, ...]) -> Iterator[str]:
    """Yield what a module imports, in full: "attention.host.memory", "comfy.samplers".

    Args:
        module: its place, ("attention", "tgate", "cache"); of a package's ``__init__`` the package's own and "__init__".
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(module[: len(module) - node.level]) if node.level else ""
            base = ".".join(part for part in (start, node.module) if part)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def complaints(path: str, source: str) -> list[str]:
    """Return what is wrong with the imports of ``attention/<path>``."""
    place = ("attention", *Path(path).with_suffix("").parts)
    room = place[1]
    found = []
    for name in imported(source, place):
        parts = name.split(".")
        if parts[0] in COMFYUI and not path.startswith(IMPORTS_COMFYUI):
            found.append(f"{path} imports {name}, and only attention/host may")
        if parts[0] == "attention" and len(parts) > 1 and parts[1] not in (room, *BELOW[room]):
            found.append(f"{path} imports {name}: {room} may import {', '.join(BELOW[room]) or 'no other room'}")
        if parts[0] in ("nodes", "tests", "dev") or (parts[0] != "attention" and parts[0].startswith("fovea")):
            found.append(f"{path} imports {name}")
    return found


def test_every_room_imports_only_what_is_below_it() -> None:
    modules = sorted(path.relative_to(ATTENTION) for path in ATTENTION.rglob("*.py") if path.parent != ATTENTION)
    modules.append(Path("seamless.py"))
    assert {module.parts[0].removesuffix(".py") for module in modules} == set(BELOW), "a room that BELOW does not know"
    found = [
        complaint for module in modules for complaint in complaints(module.as_posix(), (ATTENTION / module).read_text("utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("tgate/cache.py", "import comfy.samplers"),
        ("excite/guider.py", "from comfy.samplers import CFGGuider"),
        ("maps/capture.py", "from ..tgate import KEY"),
        ("distill/job.py", "from ..excite.guider import ExciteGuider"),
        ("host/steps.py", "from ..networks import Grid"),
        ("networks/table.py", "from .. import host"),
        ("prompts/syntax.py", "from ..networks.grids import Grid"),
        ("gradient/watch.py", "from ..maps.probabilities import row_probabilities"),
        ("maps/drawing/overlay.py", "from ...excite import losses"),
        ("seamless.py", "def late():\n    from .distill import windows"),
        ("tgate/technique.py", "from ...nodes import tgate"),
    ],
)
def test_an_import_the_wrong_way_is_found(path: str, line: str) -> None:
    source = (ATTENTION / path).read_text("utf-8")
    assert complaints(path, source) == []
    assert complaints(path, f"{source}\n{line}\n")


def test_nodes_are_above_the_rooms() -> None:
    """Nodes may import any room and ComfyUI's own interface; no node imports another one's file."""
    for path in sorted((ROOT / "nodes").glob("*.py")):
        if path.name != "__init__.py":
            others = [name for name in imported(path.read_text("utf-8"), ("nodes", path.stem)) if name.startswith("nodes.")]
            assert all(name.split(".")[1].startswith("_") for name in others), path.name
