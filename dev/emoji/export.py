"""Write what is shipped: the model as fp16 in SD1's single-file layout, and the judge beside it.

cd dev && python -m emoji.export [--state STATE] [--out FILE] [--judge FILE]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from emoji import state
from emoji.captions import Vocabulary
from emoji.layout import HERE, layout
from emoji.state import PartState
from emoji.train_judge import trained_judge
from emoji.train_model import trained_model
from emoji.train_vae import trained_vae

CHECKPOINT, JUDGE = HERE / "fovea-emoji.safetensors", HERE / "fovea-emoji-judge.safetensors"
LICENCE = "weights: GPL-3.0-or-later; trained on artwork under MIT, Apache-2.0 and CC BY 4.0 (see NOTICE.md)"
CREDIT = (
    "Fluent Emoji, (c) Microsoft Corporation, MIT; Noto Emoji, Google Inc, Apache-2.0; graphics from Twemoji, (c) Twitter, Inc "
    "and other contributors, CC BY 4.0; rendered, resized, recoloured, outlined and composed into scenes"
)


def checkpoint_weights(parts: dict[str, PartState]) -> dict[str, Tensor]:
    """Turn the parts into tensors under the single-file layout's names."""
    device, vocabulary = torch.device("cpu"), Vocabulary().ids
    model = trained_model(parts["model"], len(vocabulary), device)
    words = model.text.state_dict()
    weights = {layout.UNET_PREFIX + name: value for name, value in model.unet.state_dict().items()}
    weights[layout.VOCABULARY_ROWS] = words.pop("embeddings.token_embedding.weight")
    weights |= {layout.TEXT_PREFIX + name: value for name, value in words.items()}
    vae = trained_vae(parts["vae"], device).state_dict()
    weights |= {layout.VAE_PREFIX + name: value for name, value in vae.items()}
    weights = {name: value.half().contiguous() for name, value in weights.items()}
    weights[layout.VOCABULARY_IDS] = torch.tensor(vocabulary, dtype=torch.int32)
    return weights


def _save(weights: dict[str, Tensor], path: Path, about: dict[str, str]) -> None:
    partial = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, partial, metadata={"format": "pt", "license": LICENCE, "credit": CREDIT, **about})
    os.replace(partial, path)
    numbers = sum(value.numel() for value in weights.values())
    print(f"{path}: {len(weights)} tensors, {numbers / 1e6:.2f} M numbers, {path.stat().st_size:,} bytes")


def export(parts: dict[str, PartState], out: Path, judge: Path | None = None) -> None:
    """Write the checkpoint, and the judge if a path for it is given."""
    steps = str(parts["model"].steps)
    _save(checkpoint_weights(parts), out, {"title": "Fovea Emoji", "steps": steps, "samples": str(parts["model"].samples)})
    if judge:
        network = trained_judge(parts["judge"], torch.device("cpu"))
        halved = {name: value.half() if value.is_floating_point() else value for name, value in network.state_dict().items()}
        contiguous = {name: value.contiguous() for name, value in halved.items()}
        _save(contiguous, judge, {"title": "Fovea Emoji, judge", "samples": str(parts["judge"].samples)})


def main(argv: list[str] | None = None) -> None:
    """Run the export."""
    parser = argparse.ArgumentParser(prog="emoji.export", description=__doc__.splitlines()[0])
    parser.add_argument("--state", type=Path, default=state.PATH, help="state saved by emoji.train")
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    parser.add_argument("--judge", type=Path, default=JUDGE)
    args = parser.parse_args(argv)
    parts = state.load(args.state)
    missing = [name for name in ("vae", "model") if name not in parts]
    if missing:
        raise SystemExit(f"{args.state}: not trained yet: {', '.join(missing)}")
    export(parts, args.out, args.judge if "judge" in parts else None)


if __name__ == "__main__":
    main()
