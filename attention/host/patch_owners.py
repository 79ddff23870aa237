"""Which nodes a model's patches come from."""

from __future__ import annotations

from typing import Any


def patch_owners(model_options: dict[str, Any], *names: str) -> str:
    """Return where the patches with these names ("attn2_patch", ...) were made, for a message: modules, each once."""
    patches = model_options.get("transformer_options", {}).get("patches", {})
    functions = [function for name in names for function in patches.get(name, ())]
    modules = (getattr(function, "__module__", None) or type(function).__module__ for function in functions)
    return ", ".join(dict.fromkeys(modules))
