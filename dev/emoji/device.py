"""Place networks on a device, channels last, and compute in half precision where that is faster."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def autocast(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    """Compute in ``dtype`` on a CUDA device, and in float32 on a CPU."""
    return torch.autocast(device.type, dtype, enabled=device.type == "cuda")


def channels_last(tensor: Tensor) -> Tensor:
    """Lay images or kernels out the way that convolutions are fast with."""
    return tensor.contiguous(memory_format=torch.channels_last)


def placed(network: Network, device: torch.device) -> Network:
    """Put a network on the device, its kernels channels last; returns it."""
    network.to(device)
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = channels_last(parameter.data)
    return network
