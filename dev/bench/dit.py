"""Time DiT beside diffusers' DiTTransformer2DModel with the same weights.

    python dev bench dit [--size PX] [--steps N] [--pairs N] [--threads N] [--peer NAME=PATH] [--tiny] [--out FILE]

A network in DiT-XL/2's shape with random weights is written in diffusers' layout and loaded by our node. All sides sample with
classifier-free guidance of all channels, as diffusers' pipeline does, the same noise and labels, down the same sigmas with
Euler's steps (DDIM). ComfyUI takes torch's attention kernel, as the others do, and as it would by itself on a GPU.
``--peer`` adds another node pack's DiT, loaded from the same weights in the authors' layout.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from host_inprocess import load_pack, pack_nodes
from safetensors.torch import save_file
from torch import Tensor

from bench.measure import SAME_KERNEL, add_run_arguments, machine, publish, ratios, require_same, start, table, take_turns
from bench.models import Target, random_tensor
from bench.peers import NodeClass, add_peer_argument, call, choices_of, inputs_of, of_each_pack

CFG, GUIDED, NULL_CLASS, LABEL = 4.0, 4, 1000, 207
OURS, GATED, THEIRS = "ours", "ours, T-GATE Cache", "diffusers"
SAME = 1e-4
SIZE_NAME = "XL/2"
XL = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28}
TINY = {"num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 3}


def loaded(network: Any) -> Any:
    """Load the same weights through Load DiT, as from a file."""
    load_pack()
    from fovea_attention.attention.dit import load_dit

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "dit.safetensors"))
        save_file({name: tensor.clone() for name, tensor in network.state_dict().items()}, path)
        return load_dit(path, cfg_channels=GUIDED)


@dataclass(frozen=True)
class Peer:
    """Another pack's nodes: a checkpoint's MODEL, the CONDITIONING of a class, and that of none."""

    loader: NodeClass
    label: NodeClass
    null: NodeClass

    @classmethod
    def among(cls, nodes: list[NodeClass]) -> Peer | None:
        loader = next(
            (node for node in nodes if SIZE_NAME in choices_of(node, "model") and "image_size" in inputs_of(node)), None
        )
        label = next((node for node in nodes if {*inputs_of(node)} == {"model", "label_name"}), None)
        null = next((node for node in nodes if {*inputs_of(node)} == {"model"} and "Empty" in node.__name__), None)
        return cls(loader, label, null) if loader and label and null else None

    def run(self, path: Path, size: int, sigmas: Tensor, noise: Tensor) -> Callable[[], Tensor]:
        """Sample from a file in the authors' layout."""
        import folder_paths

        folder_paths.add_model_folder_path("checkpoints", str(path.parent))
        (model,) = call(self.loader, ckpt_name=path.name, model=SIZE_NAME, image_size=size)
        (positive,) = call(self.label, model=model, label_name=choices_of(self.label, "label_name")[LABEL])
        (null,) = call(self.null, model=model)
        return sampled(model, positive, null, sigmas, noise)


def save_as_the_authors(model: Any, size: int, path: Path) -> None:
    """Save our model's weights with the table of positions, which is part of the authors' files."""
    from fovea_attention.attention.dit import position_table

    network = model.model.diffusion_model
    table = position_table(size // 16, size // 16, network.x_embedder.proj.out_channels)
    save_file({**network.state_dict(), "pos_embed": table[None].float().clone()}, path)


def peers(named: list[str]) -> dict[str, Peer]:
    return of_each_pack(named, Peer.among, "DiT nodes")


def their_run(network: Any, sigmas: Tensor, timesteps: Tensor, noise: Tensor) -> Callable[[], Tensor]:
    """Take Euler's steps on x = clean + sigma * noise, asking the network for the positive and the null class together."""
    labels = torch.tensor([LABEL, NULL_CLASS])

    @torch.inference_mode()
    def run() -> Tensor:
        x = noise * sigmas[0]
        for sigma, following, time in zip(sigmas, sigmas[1:], timesteps, strict=False):
            scaled = (x / (sigma**2 + 1) ** 0.5).expand(2, -1, -1, -1)
            found = network(scaled, timestep=time.expand(2), class_labels=labels).sample[:, : x.shape[1]]
            positive, null = found.split(1)
            epsilon = torch.cat([(null + CFG * (positive - null))[:, :GUIDED], positive[:, GUIDED:]], dim=1)
            x = x + (following - sigma) * epsilon
        return x

    return run


def our_run(model: Any, sigmas: Tensor, noise: Tensor) -> Callable[[], Tensor]:
    positive, null = pack_nodes()["DiTClassLabel"].execute(label="", labels=str(LABEL)).args
    return sampled(model, positive, null, sigmas, noise)


def sampled(model: Any, positive: Any, null: Any, sigmas: Tensor, noise: Tensor) -> Callable[[], Tensor]:
    """Sample as SamplerCustomAdvanced does."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, null)
    guider.set_cfg(CFG)
    euler = comfy.samplers.sampler_object("euler")

    def run() -> Tensor:
        with torch.inference_mode():
            found = guider.sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True, seed=0)
            return model.model.process_latent_in(found)

    return run


def runs(
    layout: dict[str, int], size: int, steps: int, packs: Mapping[str, Peer] | None = None
) -> dict[str, Callable[[], Tensor]]:
    """Return the sides, after comparing their latents."""
    load_pack()
    from families.dit import diffusers_network  # imports ComfyUI, which has been started by now
    from fovea_attention.attention.dit import load_dit

    network = diffusers_network(size=size, **layout)
    model = loaded(network)
    known = model.get_model_object("model_sampling").sigmas.cpu()
    timesteps = torch.linspace(len(known) - 1, 0, steps + 1).round().long()[:-1]
    sigmas = torch.cat([known[timesteps], known.new_zeros(1)])
    noise = random_tensor(0, 1, 4, size // 8, size // 8)
    gated = pack_nodes()["TGateCache"].execute(model)[0]
    found = {
        OURS: our_run(model, sigmas, noise),
        GATED: our_run(gated, sigmas, noise),
        THEIRS: their_run(network, sigmas, timesteps, noise),
    }
    require_same(f"'{OURS}' and '{THEIRS}'", found[OURS](), found[THEIRS](), SAME)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "dit.safetensors")
        for name, pack in (packs or {}).items():
            save_as_the_authors(model, size, path)
            found[name] = pack.run(path, size, sigmas, noise)
            # diffusers embeds times a little differently than the authors, so the same weights are not the same network.
            ours = our_run(load_dit(str(path), cfg_channels=GUIDED), sigmas, noise)
            require_same(f"'{name}' and '{OURS}'", found[name](), ours(), SAME)
    return found


def report(layout: dict[str, int], size: int, steps: int, pairs: int, packs: Mapping[str, Peer] | None = None) -> str:
    timings = take_turns(runs(layout, size, steps, packs), pairs)
    rows = [
        (name, f"{timing.median / steps:.2f}", "{:.2f} ({:.2f} to {:.2f})".format(*ratios(timings[THEIRS], timing)))
        for name, timing in timings.items()
    ]
    shape = f"{layout['num_layers']} blocks of {layout['num_attention_heads'] * layout['attention_head_dim']} channels"
    header = ("side", "seconds a step (median)", "times as fast as diffusers (lowest to highest)")
    settings = f"{shape}, {size} px, {steps} steps, cfg {CFG:g}; {pairs} pairs in turns."
    return f"{settings}\n\n{table(header, rows)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python dev bench dit", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="pixels of the side")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=5, help="counted turns of all sides")
    parser.add_argument("--tiny", action="store_true", help="a tiny network, to try the benchmark itself")
    add_peer_argument(parser)
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    if args.tiny and args.peer:
        parser.error("--peer goes without --tiny: other packs know the published sizes only")
    start(args, SAME_KERNEL)
    text = report(TINY if args.tiny else XL, args.size, args.steps, args.pairs, peers(args.peer))
    publish(f"## DiT\n\nMeasured on: {machine(Target.here())}.\n\n{text}", args.out)


if __name__ == "__main__":
    main()
