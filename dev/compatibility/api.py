"""Look up every name of ComfyUI that the pack uses, the command `python dev api`: it judges a new release in a minute.

The names are read from the pack's sources, so that none can be forgotten: modules of ComfyUI that are imported, what is
imported from them, attributes of them that are used, and networks that are known by their dotted name. For
`transformer_options`, which is a dictionary, the keys are looked for in ComfyUI's own sources.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from host_inprocess import ROOT, load_pack, start_host

HOST_MODULES = ("comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "nodes", "latent_preview", "server")
# Names that only newer releases have: the pack asks before it uses them.
OPTIONAL = {"comfy.model_management.in_training"}
# Networks that came after the newest pinned release.
LATER = {"comfy.ldm.wan.model_animate2.WanAnimate2Block", "comfy.ldm.wan.model_animate2.WanAnimate2Model"}
OPTION_KEYS = (
    "activations_shape", "block", "block_index", "block_type", "cond_or_uncond", "optimized_attention_override", "patches",
    "patches_replace", "sample_sigmas", "sigmas", "total_blocks", "uuids", "wrappers",
)  # fmt: skip


@dataclass(frozen=True)
class Use:
    """A dotted name of ComfyUI, the first place that uses it, and whether the pack can do without."""

    name: str
    place: str
    optional: bool


def sources() -> list[Path]:
    return [ROOT / "__init__.py", *(path for folder in ("attention", "nodes") for path in sorted((ROOT / folder).rglob("*.py")))]


def uses() -> list[Use]:
    """Collect every name of ComfyUI in the pack's sources, once."""
    found: dict[str, Use] = {}
    for path in sources():
        for name, line, optional in _names(ast.parse(path.read_text(encoding="utf-8"))):
            use = Use(name, f"{path.relative_to(ROOT).as_posix()}:{line}", optional or name in OPTIONAL)
            found.setdefault(name, use)
    return sorted(found.values(), key=lambda use: use.name)


def _names(tree: ast.Module) -> Iterator[tuple[str, int, bool]]:
    bound: dict[str, str] = {}  # name in this file -> dotted name of ComfyUI
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if _of_host(alias.name):
                    bound[alias.asname or alias.name.split(".")[0]] = alias.name if alias.asname else alias.name.split(".")[0]
                    yield alias.name, node.lineno, False
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module and _of_host(node.module):
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}", node.lineno, False
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := _dotted(node, bound)):
            yield name, node.lineno, False
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"comfy\.ldm\.[\w.]+", node.value):
            yield node.value, node.lineno, True


def _of_host(module: str) -> bool:
    return module.split(".")[0] in HOST_MODULES


def _dotted(node: ast.expr, bound: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return bound.get(node.id)
    if isinstance(node, ast.Attribute) and (base := _dotted(node.value, bound)):
        return f"{base}.{node.attr}"
    return None


def resolve(name: str) -> Any:
    """Return the object of a dotted name.

    Raises:
        AttributeError, ImportError: ComfyUI has no such name.
    """
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ImportError(f"no module named {parts[0]}")


def missing(wanted: list[Use]) -> list[Use]:
    """Return those that this ComfyUI does not have."""
    absent = []
    for use in wanted:
        try:
            resolve(use.name)
        except (AttributeError, ImportError):
            absent.append(use)
    return absent


def missing_keys(host: Path) -> list[str]:
    """Return the keys of transformer_options that ComfyUI's sources do not name."""
    text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted((host / "comfy").rglob("*.py")))
    return [key for key in OPTION_KEYS if not re.search(rf"""['"]{key}['"]""", text)]


def main(argv: list[str] | None = None) -> int:
    """Run ``python dev api``."""
    parser = argparse.ArgumentParser(prog="python dev api", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print every name")
    args = parser.parse_args(argv)
    host = start_host()
    load_pack()
    wanted = uses()
    absent = missing(wanted)
    needed = [use for use in absent if not use.optional]
    keys = missing_keys(host)
    for use in wanted if args.list else absent:
        state = "missing" if use in needed else "missing, optional" if use in absent else "there"
        print(f"{state:18s} {use.name}  ({use.place})")
    for key in keys:
        print(f"{'missing':18s} transformer_options[{key!r}]")
    print(f"{len(wanted)} names and {len(OPTION_KEYS)} keys of ComfyUI in {host}: {len(needed) + len(keys)} missing")
    return 1 if needed or keys else 0


if __name__ == "__main__":
    raise SystemExit(main())
