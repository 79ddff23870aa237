"""What a run could leave behind on a model."""

from __future__ import annotations

import torch


def snapshot(model) -> dict[str, object]:
    """Everything a run could leave behind on the modules and the patcher."""
    modules = {
        name: (
            set(module.__dict__) - {"_forward_hooks"},
            "forward" in module.__dict__,
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for name, module in model.model.named_modules()
    }
    options = {key: sorted(value) for key, value in model.model_options.items() if isinstance(value, dict)}
    wrappers = {kind: {key: len(found) for key, found in keyed.items()} for kind, keyed in model.wrappers.items()}
    return {
        "modules": modules,
        "options": options,
        "wrappers": wrappers,
        "object_patches": sorted(model.object_patches),
        "inference_mode": torch.is_inference_mode_enabled(),
        "grad": torch.is_grad_enabled(),
    }
