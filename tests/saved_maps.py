"""Fixtures of attention maps in files."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch


@pytest.fixture
def files(pack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the nodes, on a host with empty folders."""
    for name in ("input", "output", "temp"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"get_{name}_directory", lambda name=name: str(tmp_path / name))
    return importlib.import_module("fovea_attention.nodes.attn_files")


@pytest.fixture
def maps(pack: Any) -> Any:
    """Maps of a run of two steps, with everything a recording can hold."""
    module = importlib.import_module("fovea_attention.attention.maps")
    random = torch.Generator().manual_seed(1)

    def some(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=random)

    prompt = module.PromptMaps(
        prompt="positive",
        tokens=5,
        grid=(1, 4, 6),
        layers={"input.1": module.LayerMaps(2, some(1, 2, 5, 1, 4, 6)), "middle": module.LayerMaps(2, some(1, 1, 5, 1, 2, 3))},
        steps=[0, 1],
        step_maps=some(2, 1, 5, 1, 4, 6).half(),
        figures=module.StepFigures(some(2, 1, 5), some(2, 1, 5), some(2, 1, 5)),
        self_attention=[module.SelfAttention((1, 2, 3), 4, some(1, 6, 6))],
        area=(0.0, 0.25, 1.0, 0.5),
        metadata={"version": 1, "text": "猫 and dog"},
        rows=5,
    )
    return module.AttnMaps(module.Recording([14.6, 1.0, 0.0], 1, (1, 4, 6), [prompt], ["a note"], {"model": "Tiny"}))
