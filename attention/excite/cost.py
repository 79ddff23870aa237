"""What guiding a run will cost, told before its first step."""

from __future__ import annotations

from ..gradient.cost import in_words, times_as_long
from .settings import ExciteSettings


def cost_line(settings: ExciteSettings, steps: int, entries: int, prompts: int) -> str:
    """Return the line that a node shows before a guided run.

    Args:
        entries: of the positive prompt that are guided, each with a gradient pass of its own.
        prompts: that the sampler computes in each step.
    """
    acting = sum(settings.acts_in(step, steps) for step in range(steps))
    thresholds = sum(settings.wanted(step, steps) is not None for step in range(steps))
    refinements = thresholds * settings.max_refinements
    passes = [count * max(entries, 1) for count in (acting, acting + refinements)]
    least, most = (times_as_long(count, steps * prompts, settings.memory) for count in passes)
    text = f"Attend-and-Excite: {acting} of {steps} steps are guided, {passes[0]} gradient passes"
    if refinements:
        text += f" and up to {passes[1] - passes[0]} more for the thresholds"
    return f"{text}: {in_words(least, most)} as without"
