"""The widgets of a node, as the browser saves their values."""

from __future__ import annotations

from typing import Any

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def widget_names(info: dict[str, Any]) -> list[str]:
    """What the browser saves a value for, in its order: the widgets, and behind some of them what they are shown with."""
    names = []
    for section in ("required", "optional"):
        for name, (kind, *options) in info["input"].get(section, {}).items():
            settings = options[0] if options else {}
            if (isinstance(kind, list) or kind in WIDGET_TYPES) and not settings.get("forceInput"):
                names.append(name)
                if kind == "INT" and (settings.get("control_after_generate") or name in ("seed", "noise_seed")):
                    names.append("control_after_generate")
                elif settings.get("image_upload"):
                    names.append("upload")
    return names
