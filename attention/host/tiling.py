"""Whether a MODEL's convolutions join the edges of the image."""

from __future__ import annotations

from typing import Any

# The attribute of a convolution that an object patch of a seamless MODEL sets.
PADDING_MODE = "padding_mode"


def is_seamless(model: Any) -> bool:
    """Return whether a MODEL's convolutions are joined at the edges, by this pack or another."""
    return any(name.endswith(f".{PADDING_MODE}") for name in model.object_patches)
