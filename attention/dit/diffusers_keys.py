"""diffusers' ``DiTTransformer2DModel``: its parameters under the names of ours.

It is the paper's network with two details changed (``DIFFUSERS_DETAILS``). The weights do not show them, so a file counts as
what the library that saved it would compute.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

Weights = dict[str, Tensor]
DIFFUSERS_DETAILS = {"frequency_shift": 1, "mlp_eps": 1e-5}  # arguments of ``DiT``
_OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
_EMBEDDERS = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "class_embedder.embedding_table": "y_embedder.embedding_table",
}
_IN_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)\.(weight|bias)$")


def from_diffusers(weights: Weights, name: str = "the file") -> Weights:
    """Return the weights by the names of ``DiT``: query, key and value joined, the embedders that all blocks repeat as one.

    Raises:
        ValueError: those embedders differ.
    """
    converted: Weights = {}
    for key, value in weights.items():
        new = _renamed(key)
        if new in converted and not torch.equal(converted[new], value):
            raise ValueError(
                f"{name} is a changed DiT that Load DiT does not support: its blocks embed the timestep or the class differently."
            )
        converted[new] = value
    for prefix in {key.rsplit(".", 2)[0] for key in converted if key.endswith((".q.weight", ".q.bias"))}:
        for kind in ("weight", "bias"):
            parts = [converted.pop(f"{prefix}.{part}.{kind}", None) for part in "qkv"]
            if not any(part is None for part in parts):
                converted[f"{prefix}.qkv.{kind}"] = torch.cat([part for part in parts if part is not None])
    if "pos_embed.pos_embed" in converted:
        converted["pos_embed"] = converted.pop("pos_embed.pos_embed")
    return converted


def _renamed(key: str) -> str:
    """Return the name of one tensor here, or a foreign one where it is not known."""
    module, _, kind = key.rpartition(".")
    match = _BLOCK.match(key)
    if match is None:
        return f"{_OUTSIDE.get(module, module)}.{kind}"
    block, inner, kind = match.groups()
    if inner.startswith("norm1.emb."):
        embedder = inner.removeprefix("norm1.emb.")
        return f"{_EMBEDDERS.get(embedder, inner)}.{kind}"
    if inner in ("attn1.to_q", "attn1.to_k", "attn1.to_v"):
        return f"blocks.{block}.attn.{inner[-1]}.{kind}"
    return f"blocks.{block}.{_IN_BLOCK.get(inner, inner)}.{kind}"
