"""What every node's schema shares: the category, and the fields that only newer versions of ComfyUI know."""

from dataclasses import fields
from typing import Any, TypeVar

from comfy_api.latest import io

CATEGORY = "Fovea"

_KNOWN = {field.name for field in fields(io.Schema)}
_Input = TypeVar("_Input", bound=io.Input)


def node_schema(node_id: str, *, search_aliases: list[str], **schema_fields: Any) -> io.Schema:
    """A schema in the pack's category; ``search_aliases`` are left out where ComfyUI (0.3.75) does not know them."""
    if "search_aliases" in _KNOWN:
        schema_fields["search_aliases"] = search_aliases
    return io.Schema(node_id=node_id, category=CATEGORY, **schema_fields)


def advanced(widget: _Input) -> _Input:
    """Mark an input as an expert setting. (0.3.75 has no ``advanced`` argument but passes ``extra_dict`` on.)"""
    widget.extra_dict["advanced"] = True
    return widget
