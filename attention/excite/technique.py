"""Attend-and-Excite on a MODEL: every sampler node guides its own positive prompt, KSampler too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .. import host
from ..gradient import makes_room
from .guidance import NEEDS_WHOLE_LATENT, Guidance, is_guided
from .guider import ExciteGuider
from .settings import ExciteSettings
from .subjects import guided_prompts

NAME = "Attend-and-Excite (Model)"


class ExciteTechnique:
    """Guides every sampling run of the MODEL that it is attached to; see ``host.attach``.

    A run does what the same run with ``ExciteGuider`` does: its sampler is the same one, watched in the same way.

    Args:
        subjects, clip, text: which words of the prompt to guide, see ``guided_prompts``; the prompt is the run's own.
    """

    key = "fovea.excite"
    fovea_whole_latent = NEEDS_WHOLE_LATENT

    def __init__(self, settings: ExciteSettings, subjects: str, clip: Any = None, text: str = "") -> None:
        self.settings = settings
        self._words = subjects, clip, text
        self.text = host.NodeText()
        self.prepare_sampling = makes_room(settings.memory)

    def outer_sample(
        self,
        executor: Callable[..., Any],
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run ComfyUI's sampling with the sampler's latent moved before each guided step.

        Raises:
            ValueError: the prompt has none of the subjects, or the sampler cannot be guided.
        """
        guider = executor.class_obj  # type: ignore[attr-defined]
        if isinstance(guider, ExciteGuider):
            self.text.tell(f"{NAME}: left out, because the Attend-and-Excite Guider guides this run with its own settings")
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        with _named():
            guidance = self._guidance(guider, noise, sampler, sigmas, kwargs.get("latent_shapes"))
        if guidance is None:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        guidance.foretell(self.text)
        result = executor(noise, latent_image, guidance.sampler(sampler), sigmas, *args, **kwargs)
        guidance.tell(self.text)
        return result

    def _guidance(self, guider: Any, noise: Tensor, sampler: Any, sigmas: Tensor, shapes: Any) -> Guidance | None:
        """Return what guides a run; None where no step of it is guided."""
        if not is_guided(self.settings, sampler, sigmas):
            return None
        prompts = guided_prompts(guider.original_conds.get("positive", []), *self._words)
        return Guidance(guider, self.settings, prompts, (shapes or [noise.shape])[0], len(sigmas) - 1)


@contextmanager
def _named() -> Iterator[None]:
    """Let messages begin with the node's name: they appear on the sampler's node."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{NAME}: {error}") from error
