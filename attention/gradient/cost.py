"""How much longer a sampling run takes with gradient passes, for the user to know before it begins."""

from __future__ import annotations

from typing import Any

from .levels import Memory

# A gradient pass in forwards of one prompt, as `python dev bench gradient` measures it: 1.4 to 2.0 where everything is kept,
# 1.9 to 3.1 where blocks are computed again.
_FORWARDS_OF_A_PASS, _WITH_LOW_MEMORY = 1.9, 2.6


def times_as_long(passes: int, forwards: int, memory: Memory, others: int = 0) -> float:
    """Return how many times as long a run takes with gradient passes as without.

    Args:
        passes: gradient passes of the whole run.
        forwards: what the run computes anyway, in forwards of one prompt.
        others: what comes with the passes, in forwards of one prompt.
    """
    each = _WITH_LOW_MEMORY if memory is Memory.LOW else _FORWARDS_OF_A_PASS
    return 1 + (passes * each + others) / max(forwards, 1)


def in_words(least: float, most: float) -> str:
    """Return "about 1.5 to 2.7 times as long", with one number where both are about the same."""
    low, high = (f"{times:.1f}" if times < 10 else f"{times:.0f}" for times in (least, most))
    return f"about {low if low == high else f'{low} to {high}'} times as long"


def prompts_of_a_step(guider: Any) -> int:
    """Return how many prompts a guider computes in each step; with a CFG of 1 there is no negative one."""
    given = sum(bool(conds) for conds in getattr(guider, "original_conds", {}).values())
    return 1 if getattr(guider, "cfg", 1) == 1 else max(given, 1)
