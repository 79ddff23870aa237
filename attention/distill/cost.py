"""What a run will cost, told before its first step."""

from __future__ import annotations

from ..gradient.cost import in_words, times_as_long
from ..gradient.model_pass import Memory
from .settings import Method


def cost_line(
    method: Method, memory: Memory, steps: int, optimised: int, iterations: int, windows: int, latents: int, prompts: int
) -> str:
    """Return the line that a node shows before a run.

    Args:
        steps: of the run; optimised: those that are followed by optimisation.
        latents: references and content, each of which goes through the model once in every optimised step.
        prompts: that the sampler computes in each step.
    """
    passes = optimised * iterations * windows
    text = (
        f"Attention Distillation: {optimised} of {steps} steps with {iterations} optimisation step{'s' * (iterations != 1)} each"
    )
    text += f"{f' in {windows} windows' if windows > 1 else ''}, {passes} gradient passes"
    if method is Method.OPTIMISE:
        return f"{text} and no denoising"
    if windows > 1:
        return text
    times = times_as_long(passes, steps * prompts, memory, optimised * latents)
    return f"{text}: {in_words(times, times)} as without"
