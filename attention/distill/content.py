"""What the content image looks like to the model: its queries in some layers at one sigma, in every window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import host
from ..gradient.model_pass import ModelPass
from .losses import CallKey, call_key
from .references import Purpose, noised_alike
from .windows import Window


class Content:
    """The content of one run.

    Args:
        latent: (1 or batch, channels, ...), clean and in the model's units.
        conds: the null prompt of each window.
        with_noise: whether the model sees it with the noise of its sigma.
    """

    def __init__(
        self, passes: ModelPass, latent: Tensor, windows: Sequence[Window], conds: Sequence[dict[str, Any]], *, with_noise: bool
    ) -> None:
        self.passes = passes
        self.latent = latent
        self.windows = windows
        self.conds = conds
        self.with_noise = with_noise

    def queries(self, sigma: float, level: Tensor) -> list[dict[CallKey, Tensor]]:
        """Return the queries of each window in every call, (batch, heads, tokens, channels).

        Args:
            level: (batch,), sigma for each image.
        """
        base_model, batch = self.passes.base_model, len(level)
        if self.with_noise:
            x = torch.cat(noised_alike(base_model, self.latent.split(1), sigma, Purpose.CONTENT, one_noise=True))
        else:
            x = self.latent / float(host.input_scale(base_model, torch.tensor([sigma])))
        x = x.expand(batch, *x.shape[1:])
        parts = zip(self.windows, self.conds, strict=True)
        return [self._observed(window.of(x), cond, level) for window, cond in parts]

    def _observed(self, x: Tensor, cond: dict[str, Any], level: Tensor) -> dict[CallKey, Tensor]:
        """Return the queries, computed in the latent's batches and by its kernels.

        Where the latent is the content, as at the start of 'optimise', any difference would be noise that Adam enlarges.
        """
        found: dict[CallKey, list[Tensor]] = {}
        with host.differentiable_kernels():
            for rows in self.passes.parts(x, torch.arange(len(x), device=x.device)):
                measured = self.passes.observe(
                    cond, x[rows], level[rows], lambda layer, call: (call_key(layer, call), call.inputs.q)
                )
                for _, (key, q) in measured:
                    found.setdefault(key, []).append(q.clone())
        return {key: torch.cat(queries) for key, queries in found.items()}
