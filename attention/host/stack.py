"""A stack for a whole run, which Python need not extend in every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

# In words of memory; a run's calls are some sixty frames deep, of ten to a hundred words each.
_ROOM = 25_000


def on_one_stack(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Return ``function(*args, **kwargs)``, called with room for all frames of a sampling run.

    Python keeps its frames in pieces of memory and gives a piece back as soon as it is empty. Where a loop's calls lie right
    behind the end of a piece, each of them asks the system for a new one (CPython's issue 142183; 3.11 and 3.12 have it for
    good). How deep a run lies is chance, and wrappers add to it: a network whose launches decide took up to 1.37 times as long.
    This frame is as large as two pieces, so that Python takes one that holds what comes behind it too.
    """
    return function(*args, **kwargs)


on_one_stack.__code__ = on_one_stack.__code__.replace(co_stacksize=_ROOM)
