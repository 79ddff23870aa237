"""The guider: classifier-free guidance whose latent is moved before each guided step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import host
from ..gradient import makes_room
from .guidance import NEEDS_WHOLE_LATENT, Guidance, is_guided
from .settings import ExciteSettings
from .subjects import GuidedPrompt


class ExciteGuider(host.CFGGuider):
    """Classifier-free guidance whose latent is moved before each guided step."""

    fovea_whole_latent = NEEDS_WHOLE_LATENT

    def __init__(self, model: Any, settings: ExciteSettings, prompts: Sequence[GuidedPrompt | None]) -> None:
        super().__init__(model)
        self.settings = settings
        self.prompts = list(prompts)
        self.text = host.NodeText()

    def sample(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample as ComfyUI's guider does, which makes room for gradient passes too."""
        with host.prepared_by(self, "fovea.excite", makes_room(self.settings.memory)):
            return super().sample(*args, **kwargs)

    def inner_sample(
        self, noise: Tensor, latent_image: Tensor, device: Any, sampler: Any, sigmas: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Sample as ComfyUI's guider does, with the sampler's latent moved (see ``Guidance``)."""
        if not is_guided(self.settings, sampler, sigmas):
            return super().inner_sample(noise, latent_image, device, sampler, sigmas, *args, **kwargs)
        latent = (kwargs.get("latent_shapes") or [noise.shape])[0]
        guidance = Guidance(self, self.settings, self.prompts, latent, len(sigmas) - 1)
        guidance.foretell(self.text)
        result = super().inner_sample(noise, latent_image, device, guidance.sampler(sampler), sigmas, *args, **kwargs)
        guidance.tell(self.text)
        return result
