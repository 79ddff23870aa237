"""What a node knows of the workflow that it stands in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..attention import host
from ..attention.maps.origin import Origin


def origin_of(hidden: Any) -> Origin | None:
    """Return where the images of the running node come from; None where no queue runs it.

    Args:
        hidden: of a node that asks for ``unique_id`` and ``dynprompt``.
    """
    prompt, call = getattr(hidden, "dynprompt", None), host.executing_node()
    if prompt is None or call is None or hidden.unique_id is None:
        return None
    return Origin(str(hidden.unique_id), prompt.get_node, sorted(prompt.all_node_ids()), call.prompt)


def samples_of(latent: Mapping[str, Any] | None) -> torch.Tensor | None:
    """Return the tensor of a LATENT; of video and sound together, the video."""
    samples: Any = None if latent is None else latent["samples"]
    return samples.unbind()[0] if getattr(samples, "is_nested", False) and hasattr(samples, "unbind") else samples
