"""Finding a class in the tables of this room.

Keys are ``module.ClassName``, so that the tables import no model code.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


def class_name(cls: type) -> str:
    """Return the key of a class: its module and its name."""
    return f"{cls.__module__}.{cls.__qualname__}"


def entry_of(cls: type, table: Mapping[str, Entry | None], attribute: str) -> Entry | None:
    """Return what is known of a class, or None.

    A class of the pack's own carries its entry as ``attribute``. An entry of the table holds for the exact class, and for a
    subclass that inherits all of its methods: one with a ``forward`` of its own may do anything.
    """
    for ancestor in cls.__mro__:
        own: Entry | None = vars(ancestor).get(attribute)
        if own is not None:
            return own
        name = class_name(ancestor)
        if name in table:
            return table[name] if cls is ancestor or _inherits_methods(cls, ancestor) else None
    return None


def _inherits_methods(cls: type, ancestor: type) -> bool:
    """Return whether every method of ``ancestor`` is what ``cls`` runs, its constructor aside."""
    methods = (name for name, _ in inspect.getmembers(ancestor, inspect.isfunction) if not name.startswith("__"))
    return all(getattr(cls, name) is getattr(ancestor, name) for name in methods)
