"""Parts that ComfyUI gives to every network: layers, its attention function, padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.ldm.modules.attention
import comfy.ops
from comfy.ldm.common_dit import pad_to_patch_size
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor, nn

__all__ = ["attention_pytorch", "named_modules", "optimized_attention", "pad_to_patch_size", "plain_operations"]

# Layers that leave their weights as they are made, for a network outside ComfyUI's own loading.
plain_operations: Any = comfy.ops.disable_weight_init


def optimized_attention(*args: Any, **kwargs: Any) -> Tensor:
    """Call the attention function that ComfyUI has chosen for this machine, looked up at each call."""
    return comfy.ldm.modules.attention.optimized_attention(*args, **kwargs)


def named_modules(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the names and modules that ``network.named_modules()`` yields, in its order; torch's takes long in deep networks."""
    seen: set[nn.Module] = set()
    waiting = [("", network)]
    while waiting:
        name, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        if module._modules:
            prefix = f"{name}." if name else ""
            waiting += [(prefix + own, child) for own, child in reversed(module._modules.items()) if child is not None]
