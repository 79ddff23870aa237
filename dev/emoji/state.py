"""Keep the one file that training goes on from: the three parts' weights, averages and optimiser, in less than 40 MB.

Only the part that was trained last keeps its optimiser, and a part that is trained to the end is only its weights.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from emoji import codec
from emoji.layout import HERE

PATH = HERE / "fovea-emoji-state.safetensors"
MOST_BYTES = 40_000_000
PARTS = ("vae", "judge", "model")


@dataclass
class Moments:
    """Hold Adam's memory, in the order of the parameters."""

    momentum: list[Tensor]
    variance: list[Tensor]


@dataclass
class PartState:
    """Hold one part: parameters in the network's order, its other numbers, and how far it is."""

    weights: list[Tensor]
    buffers: dict[str, Tensor] = field(default_factory=dict)
    average: list[Tensor] | None = None
    moments: Moments | None = None
    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    finished: bool = False
    figures: dict[str, Any] = field(default_factory=dict)

    def load_into(self, network: nn.Module, *, averaged: bool = False) -> None:
        """Put the weights, or their averages, into the network they came from."""
        chosen = self.average if averaged and self.average else self.weights
        with torch.no_grad():
            for parameter, value in zip(network.parameters(), chosen, strict=True):
                parameter.copy_(value)
            for name, buffer in network.named_buffers():
                if name in self.buffers:
                    buffer.copy_(self.buffers[name])

    def pack(self, optimiser: bool) -> dict[str, Tensor]:
        """Return named tensors. Averages are shipped, weights are kept as differences from them."""
        packed: dict[str, dict[str, Tensor]] = {}
        if self.average is None:
            packed["weights"] = codec.pack_rounded(codec.flat(self.weights), torch.float16)
        else:
            packed["average"] = codec.pack_rounded(codec.flat(self.average), torch.bfloat16)
            if optimiser:
                away = codec.flat(self.weights) - codec.unpack_rounded(packed["average"])
                packed["away"] = codec.pack_blocks(away)
        if self.moments is not None and optimiser:
            packed["momentum"] = codec.pack_blocks(codec.flat(self.moments.momentum))
            packed["variance"] = codec.pack_variances(self.moments.variance)
        packed["buffers"] = self.buffers
        return {f"{group}/{name}": value for group, tensors in packed.items() for name, value in tensors.items()}

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], about: dict[str, Any], like: list[Tensor]) -> PartState:
        """Read what ``pack`` returned; ``like`` has the shapes of the parameters."""
        groups: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            group, _, inner = name.partition("/")
            groups.setdefault(group, {})[inner] = value
        average = moments = None
        if "average" in groups:
            vector = codec.unpack_rounded(groups["average"])
            average = codec.split(vector, like)
            away = codec.unpack_blocks(groups["away"]) if "away" in groups else 0.0
            weights = codec.split(vector + away, like)
        else:
            weights = codec.split(codec.unpack_rounded(groups["weights"]), like)
        if "momentum" in groups:
            momentum = codec.split(codec.unpack_blocks(groups["momentum"]), like)
            moments = Moments(momentum, codec.unpack_variances(groups["variance"], like))
        return cls(weights, groups.get("buffers", {}), average, moments, **about)

    def about(self) -> dict[str, Any]:
        """Return what is said of the part in the file's header."""
        return {name: getattr(self, name) for name in ("steps", "samples", "seconds", "finished", "figures")}


def shapes(part: str) -> list[Tensor]:
    """Return parameters of a part without their numbers."""
    from emoji.autoencoder import Autoencoder
    from emoji.captions import Vocabulary
    from emoji.judge import Judge
    from emoji.model import Model

    with torch.device("meta"):
        networks = {"vae": Autoencoder, "judge": Judge, "model": lambda: Model(len(Vocabulary().ids))}
        return list(networks[part]().parameters())


def load(path: Path) -> dict[str, PartState]:
    """Return the parts of a state; none if there is no such file yet."""
    if not path.is_file():
        return {}
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["parts"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    parts = {}
    for part, about in header.items():
        own = {name.removeprefix(f"{part}/"): value for name, value in tensors.items() if name.startswith(f"{part}/")}
        parts[part] = PartState.unpack(own, about, shapes(part))
    return parts


def save(path: Path, parts: dict[str, PartState], trained: str | None) -> int:
    """Save the parts; ``trained`` is the one whose optimiser is kept. Returns the file's size in bytes."""
    tensors = {f"{part}/{name}": value for part, state in parts.items() for name, value in state.pack(part == trained).items()}
    header = {part: state.about() for part, state in parts.items()}
    partial = path.with_name(path.name + ".part")
    partial.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(tensors, partial, metadata={"format": "pt", "parts": json.dumps(header)})
    os.replace(partial, path)
    return path.stat().st_size
