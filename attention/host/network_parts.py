"""Parts that ComfyUI gives to every network: layers, its attention function, padding."""

from __future__ import annotations

from typing import Any

import comfy.ldm.modules.attention
import comfy.ops
from comfy.ldm.common_dit import pad_to_patch_size
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor

__all__ = ["attention_pytorch", "optimized_attention", "pad_to_patch_size", "plain_operations"]

# Layers that leave their weights as they are made, for a network outside ComfyUI's own loading.
plain_operations: Any = comfy.ops.disable_weight_init


def optimized_attention(*args: Any, **kwargs: Any) -> Tensor:
    """Call the attention function that ComfyUI has chosen for this machine, looked up at each call."""
    return comfy.ldm.modules.attention.optimized_attention(*args, **kwargs)
