"""Build random DiTs and SiTs, the pack's and diffusers', and families of tiny ones that the pack's own nodes load and prompt."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import host_inprocess
import torch
from safetensors.torch import save_file

from families.family import Conditioning, randomise

TINY: dict[str, Any] = {"depth": 3, "width": 128, "heads": 2, "patch_size": 2, "classes": 1000}

TINY_DIFFUSERS = {"num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 3}  # the same in diffusers' words


def tiny(seed: int = 0, **changes: Any) -> Any:
    """Build the pack's network with seeded weights."""
    host_inprocess.load_pack()
    from fovea_attention.attention.dit import DiT

    network = DiT(**{**TINY, **changes}, dtype=torch.float32, device="cpu")
    randomise(network, seed)
    network.y_embedder.embedding_table.weight.mul_(8)  # a class that shows in the image
    return network.eval()


def diffusers_network(seed: int = 0, size: int = 64, **layout: int) -> Any:
    """Build diffusers' network with seeded weights, and embedders alike in all blocks, as in every converted checkpoint.

    Args:
        size: pixels of an image's side.
        layout: heads, channels of a head and layers; tiny by default.
    """
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    transformer: Any = DiTTransformer2DModel
    network = transformer(
        **{**TINY_DIFFUSERS, **layout}, out_channels=8, sample_size=size // 8, num_embeds_ada_norm=TINY["classes"]
    ).eval()
    first = network.transformer_blocks[0].norm1.emb.state_dict()
    for block in network.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    for name, parameter in network.named_parameters():
        if name.startswith("proj_out"):  # made as zeros
            parameter.data.normal_(0, 0.02)
    return network.requires_grad_(False)


@dataclass(frozen=True)
class ClassFamily:
    """A family loaded as ``DiTLoader`` does and prompted by ``DiTClassLabel``; otherwise a ``families.Family``."""

    name: str
    prediction: str
    size: tuple[int, int] = (8, 8)
    frames: int = 0
    has_prompt: bool = False
    start: float = 0.0

    def build(self) -> Any:
        network = tiny()
        from fovea_attention.attention.dit import load_dit

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{self.name}.safetensors"
            save_file(network.state_dict(), file)
            return load_dit(str(file), self.prediction)

    def conds(self, seed: int = 1) -> Conditioning:
        """Return a class for seed 1, the null class for any other."""
        return host_inprocess.pack_nodes()["DiTClassLabel"].execute("207: golden retriever")[0 if seed == 1 else 1]

    def latent(self, batch: int = 1, size: tuple[int, int] | None = None) -> torch.Tensor:
        return torch.zeros(batch, 4, *(size or self.size))


CLASS_FAMILIES = {family.name: family for family in (ClassFamily("dit", "epsilon"), ClassFamily("sit", "velocity"))}
