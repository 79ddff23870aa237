"""Write the shipped file: U-Net, text encoder and VAE as fp16 in SD1's single-file layout.

cd dev && COMFYUI_PATH=... python -m scenes.export [--state STATE] [--decoder STATE] [--out FILE]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from host_inprocess import start_host
from safetensors.torch import save
from torch import Tensor

from scenes import train, train_decoder

CHECKPOINT = Path(__file__).resolve().parent / "fovea-scenes.safetensors"


def checkpoint_weights(state: dict, decoder: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Turn trainer states into tensors under the single-file layout's names; without ``decoder`` the analytic one."""
    from scenes.autoencoder import make_autoencoder
    from scenes.network import CaptionTokens, TextEncoder, layout

    text = TextEncoder(CaptionTokens().vocabulary)
    text.load_words(state["text"], state["vocabulary"])
    words = text.state_dict()
    autoencoder = make_autoencoder()
    if decoder:
        autoencoder.taesd_decoder.load_state_dict(decoder)
    weights = {layout.UNET_PREFIX + name: value for name, value in state["unet"].items()}
    weights[layout.VOCABULARY_ROWS] = words.pop("embeddings.token_embedding.weight")
    weights |= {layout.TEXT_PREFIX + name: value for name, value in words.items()}
    weights |= {layout.VAE_PREFIX + name: value for name, value in autoencoder.state_dict().items()}
    weights = {name: value.half().contiguous() for name, value in weights.items()}
    weights[layout.VOCABULARY_IDS] = torch.tensor(text.vocabulary, dtype=torch.int32)
    return weights


def main(argv: list[str] | None = None) -> None:
    """Run the export."""
    parser = argparse.ArgumentParser(prog="scenes.export", description=__doc__.splitlines()[0])
    parser.add_argument("--state", type=Path, default=train.STATE, help="state saved by scenes.train")
    parser.add_argument("--decoder", type=Path, help="state saved by scenes.train_decoder (default: its own, if there)")
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    parser.add_argument("--comfyui", help="ComfyUI folder (default: $COMFYUI_PATH)")
    args = parser.parse_args(argv)
    start_host(args.comfyui)
    state = torch.load(args.state, map_location="cpu", weights_only=True)
    source = args.decoder or (train_decoder.STATE if train_decoder.STATE.is_file() else None)
    decoder = torch.load(source, map_location="cpu", weights_only=True)["decoder"] if source else None
    weights = checkpoint_weights(state, decoder)
    about = {"format": "pt", "title": "Fovea Scenes", "license": "GPL-3.0-or-later", "steps": str(state.get("steps", 0))}
    partial = args.out.with_suffix(".part")
    partial.write_bytes(save(weights, metadata=about))
    os.replace(partial, args.out)
    numbers = sum(value.numel() for value in weights.values())
    print(f"{args.out}: {len(weights)} tensors, {numbers / 1e6:.2f} M numbers, {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
