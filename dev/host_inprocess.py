"""Start a real ComfyUI inside this process: for tests, benchmarks and evaluation.

The server is another matter (``host_server.py``); here only ComfyUI's Python modules are imported, the way
``main.py`` imports them, and the pack is loaded the way ComfyUI loads a custom node folder.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACK_MODULE = "fovea_attention"
_DEMO_NODES = Path(__file__).resolve().parent / "custom_nodes"


def start_host(path: str | os.PathLike[str] | None = None, *, cpu: bool | None = None, argv: tuple[str, ...] = ()) -> Path:
    """Put the ComfyUI folder at ``path`` (default: ``$COMFYUI_PATH``) on ``sys.path`` and parse its command line.

    ``cpu`` defaults to "no CUDA device here". Must run before anything imports ``comfy``.
    """
    host = Path(path or os.environ.get("COMFYUI_PATH", "")).resolve()
    if not (host / "comfy").is_dir():
        raise FileNotFoundError(f"{host} is not a ComfyUI folder (it has no 'comfy' inside). Set COMFYUI_PATH or pass --comfyui.")
    if "comfy" in sys.modules:
        raise RuntimeError("ComfyUI is already imported in this process; start_host() must come first.")
    # The pack's own `nodes` folder must not shadow ComfyUI's `nodes.py`.
    sys.path[:] = [p for p in sys.path if Path(p or os.getcwd()).resolve() != ROOT]
    sys.path.insert(0, str(host))
    own_argv, sys.argv = sys.argv, [sys.argv[0], *argv]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        from comfy.cli_args import args
    finally:
        sys.argv = own_argv
    if cpu is None:
        import torch

        cpu = not torch.cuda.is_available()
    args.cpu = cpu
    return host


def begin_dynamic_vram() -> bool:
    """Do what ComfyUI's ``main.py`` does (0.30.0) to stream weights on demand; return whether it does so here."""
    if importlib.util.find_spec("comfy_aimdo") is None:
        return False
    import comfy.cli_args
    import comfy.model_management as management

    wants = getattr(comfy.cli_args, "enables_dynamic_vram", None)
    if wants is None or not wants() or not management.is_nvidia() or management.is_wsl():
        return False
    import comfy.memory_management
    import comfy.model_patcher
    import comfy_aimdo.control

    comfy_aimdo.control.init()
    if not comfy_aimdo.control.init_devices([(device.index, 0) for device in management.get_all_torch_devices()]):
        return False
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
    return True


def dynamic_vram() -> bool:
    """Return whether ComfyUI streams weights on demand in this process."""
    found = sys.modules.get("comfy.memory_management")
    return bool(getattr(found, "aimdo_enabled", False))


def _load_folder(module_name: str, folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(module_name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module


def load_pack() -> ModuleType:
    """Import the pack under ``fovea_attention``; its submodules are then importable (``fovea_attention.attention.tgate``)."""
    return sys.modules.get(PACK_MODULE) or _load_folder(PACK_MODULE, ROOT)


def pack_nodes() -> dict[str, Any]:
    """Return the pack's node classes by node id, from its real entry point."""

    async def collect() -> list[Any]:
        extension = await load_pack().comfy_entrypoint()
        return await extension.get_node_list()

    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(collect())}


def host_node(name: str, module: str = "nodes") -> Callable[..., Any]:
    """Return a node of ComfyUI as a function of its inputs, by its class's name; ComfyUI defines nodes in two ways."""
    cls = getattr(importlib.import_module(module), name)
    return cls.execute if hasattr(cls, "execute") else getattr(cls(), cls.FUNCTION)


def register_demo_model() -> None:
    """Make ComfyUI's standard loaders recognise the embedded model (in demos and tests only)."""
    if "fovea_demo_model" not in sys.modules:
        _load_folder("fovea_demo_model", _DEMO_NODES / "fovea_demo_model")
