"""Read the model's layout. It lives with the demo's node, because a server gets that folder alone.

The file is read by its path: the trainers run where there is no ComfyUI, which the node's package needs.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent


def _read(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


layout = _read(HERE.parent / "custom_nodes" / "fovea_demo_model" / "emoji_layout.py")
