"""What the host's door knows of networks in general."""

from __future__ import annotations

from typing import Any

import torch
from families import FAMILIES


def test_modules_are_named_as_torch_names_them(pack: Any) -> None:
    from fovea_attention.attention import host

    network = FAMILIES["sdxl"].build().model
    shared = torch.nn.Linear(2, 2)
    odd = torch.nn.Sequential(shared, torch.nn.ModuleDict({"again": shared, "none": torch.nn.Sequential()}))
    odd.register_module("nothing", None)
    odd.add_module("itself", odd)
    for module in (network, odd, shared):
        assert list(host.named_modules(module)) == list(module.named_modules())
