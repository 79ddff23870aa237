"""Marks in file names that ComfyUI's browser page replaces for its own nodes, for workflows that come through the API."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

_MARK = re.compile(r"%([^%]+)%")
_DATE_PART = re.compile(r"dd?|MM?|hh?|mm?|ss?|yyyy|yyy|yy")
_FORBIDDEN = re.compile(r'[/?<>\\:*|"\x00-\x1F\x7F]')


def with_values(text: str, prompt: Mapping[str, Any]) -> str:
    """Return ``text`` with ``%date:yyyy-MM-dd%`` and ``%Node.widget%`` replaced; all else is left as it is.

    Args:
        prompt: the workflow in the form of the API, in which a node is found by its title or its class.
    """
    now = datetime.now()

    def value(match: re.Match[str]) -> str:
        mark = match[1]
        if mark.startswith("date:"):
            return _FORBIDDEN.sub("_", _date(mark.removeprefix("date:"), now))
        title, dot, widget = mark.partition(".")
        found = _widget(prompt, title, widget) if dot else None
        return match[0] if found is None else _FORBIDDEN.sub("_", str(found))

    return _MARK.sub(value, text)


def _date(form: str, now: datetime) -> str:
    parts = {"d": now.day, "M": now.month, "h": now.hour, "m": now.minute, "s": now.second}

    def part(match: re.Match[str]) -> str:
        if match[0].startswith("y"):
            return str(now.year)[2:] if match[0] == "yy" else str(now.year)
        return str(parts[match[0][0]]).rjust(len(match[0]), "0")

    return _DATE_PART.sub(part, form)


def _widget(prompt: Mapping[str, Any], title: str, widget: str) -> Any:
    """Return the value of a widget; None where no node has that title or class, or its input is a link."""
    named = [node for node in prompt.values() if title in (node.get("_meta", {}).get("title"), node.get("class_type"))]
    values = (node.get("inputs", {}).get(widget) for node in named)
    return next((value for value in values if isinstance(value, (str, int, float))), None)
