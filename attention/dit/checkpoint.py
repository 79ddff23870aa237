"""DiT checkpoints: reading them safely, and telling from their tensors which network they hold.

Three layouts are known: the bare network (the published .pt files), what the paper's and SiT's training script saves
(``{"model", "ema", "opt", "args"}``, where the averaged weights count), and diffusers' ``DiTTransformer2DModel``. Each may be a
.pt or a .safetensors file. A pickled file is read with torch's ``weights_only``: no code in it is ever run.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from .. import host
from .diffusers_keys import DIFFUSERS_DETAILS, Weights, from_diffusers
from .network import Conditioning, DiT, heads_of, position_table

_SAFE = (".safetensors", ".sft")
_PATCH_EMBEDDING = "x_embedder.proj.weight"
_DIFFUSERS = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"

# Empty tensors in a file that ComfyUI saved: what the weights alone do not say.
DIFFUSERS_MARK, VELOCITY_MARK = "fovea_diffusers_network", "fovea_predicts_velocity"
_NETWORKS_IN_A_FILE = ("ema", "model", "state_dict", "module")  # in the order in which they are preferred


@dataclass(frozen=True)
class DiTFile:
    """What a checkpoint holds.

    Attributes:
        layout: "bare", "train.py" or "diffusers".
        network: arguments of ``DiT``.
        weights: by the names of ``DiT``'s parameters.
        grid: side of the token grid it was trained on, or None where the file does not say.
        prediction: "epsilon" or "velocity" where the file says so, else None.
    """

    layout: str
    network: dict[str, Any]
    weights: Weights
    grid: int | None
    prediction: str | None

    @property
    def summary(self) -> str:
        n = self.network
        trained = f", trained on {self.grid * n['patch_size'] * 8} px" if self.grid else ""
        return (
            f"{n['conditioning']}, {n['depth']} blocks of width {n['width']}, patch {n['patch_size']}, {n['classes']} classes"
            f"{trained}, {self.layout} layout"
        )


def read_dit(path: str) -> DiTFile:
    """Return the DiT in a file.

    Raises:
        ValueError: the file is damaged, holds code, or holds something else; the message says which and what to do.
    """
    name = Path(path).name
    tree, arguments = _read(path, name)
    layout = "bare"
    inner = next((key for key in _NETWORKS_IN_A_FILE if _holds_tensors(tree.get(key))), None)
    if inner is not None:
        arguments = tree.get("args")
        layout = "train.py" if inner in ("ema", "model") else layout
        tree = tree[inner]
    weights = {key: value for key, value in tree.items() if isinstance(value, Tensor)}
    prefix = _prefix(weights, _PATCH_EMBEDDING)
    if prefix is None and (prefix := _prefix(weights, _DIFFUSERS)) is not None:
        layout = "diffusers"
    if prefix is None:
        raise ValueError(f"{name} is not a DiT: it seems to be {_guess(weights)}. {_WHERE_ELSE}")
    weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if layout == "diffusers":
        weights = from_diffusers(weights, name)
    of_diffusers = weights.pop(DIFFUSERS_MARK, None) is not None or layout == "diffusers"
    flows = weights.pop(VELOCITY_MARK, None) is not None
    table = weights.pop("pos_embed", None)
    network = _network(weights, name)
    if of_diffusers:
        network |= DIFFUSERS_DETAILS
    _check_complete(network, weights, name)
    grid = _trained_grid(table, network, name)
    return DiTFile(layout, network, weights, grid, "velocity" if flows else _prediction(arguments))


_WHERE_ELSE = (
    "Load DiT takes class-conditional DiT and SiT files only; for other models use Load Diffusion Model or Load Checkpoint."
)


def _read(path: str, name: str) -> tuple[Mapping[str, Any], Mapping[str, str] | None]:
    """Return the file's dictionary, and the metadata of a .safetensors file.

    Tensors stay on disk until they are used, so the optimizer in a training file costs no memory.
    """
    damaged = f"{name} cannot be read: the file is damaged or incomplete. Compare its size with the source and copy it again."
    metadata = None
    try:
        if path.lower().endswith(_SAFE):
            tree, metadata = host.load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                tree = _load_pickled(path)
    except UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code is None:
            raise ValueError(damaged) from error
        raise ValueError(
            f"{name} holds more than weights ({code[1]}), and such a file could run code on this computer. It was not opened. "
            "Get the weights as .safetensors, or from a source that saves weights only."
        ) from error
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # the readers raise whatever the damage leads them to
        raise ValueError(f"{damaged} ({str(error).splitlines()[0] if str(error) else type(error).__name__})") from error
    if not isinstance(tree, Mapping):
        raise ValueError(f"{name} is not a DiT: it holds a {type(tree).__name__} and no named weights. {_WHERE_ELSE}")
    return tree, metadata


def _load_pickled(path: str) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))


def _is_zip(path: str) -> bool:
    """torch's format since 1.6; older files cannot be mapped into memory."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(inner, Tensor) for inner in value.values())


def _prefix(weights: Weights, key: str) -> str | None:
    """Return the prefix of the network's names: "module." of data-parallel training, "model.diffusion_model." of ComfyUI."""
    found = sorted((name[: -len(key)] for name in weights if name.endswith(key)), key=len)
    return next((prefix for prefix in found if prefix == "" or prefix.endswith(".")), None)


def _prediction(arguments: Any) -> str | None:
    """Return what the network predicts, where the training script wrote it down: DiT's knows only noise, SiT's says it.

    ``arguments`` are those of the script, or the metadata of a .safetensors file.
    """
    if arguments is None:
        return None
    said = arguments if isinstance(arguments, Mapping) else vars(arguments)
    target, path = said.get("prediction"), said.get("path_type", "Linear")
    if target is None:
        return None if isinstance(arguments, Mapping) else "epsilon"
    if target == "epsilon" or (target, path) == ("velocity", "Linear"):
        return target
    raise ValueError(
        f"the file was trained to predict '{target}' on the path '{path}', which Load DiT does not know: SiT models must predict "
        "velocity on the linear path."
    )


def _network(weights: Weights, name: str) -> dict[str, Any]:
    """Arguments of ``DiT``, from names and shapes."""
    width, in_channels, patch, _ = weights[_PATCH_EMBEDDING].shape
    blocks = {int(match[1]) for key in weights if (match := re.match(r"blocks\.(\d+)\.", key))}
    modulation = weights.get("blocks.0.adaLN_modulation.1.weight")
    decoder, labels = weights.get("final_layer.linear.weight"), weights.get("y_embedder.embedding_table.weight")
    if labels is None and any(key.startswith("y_embedder.") for key in weights):
        raise ValueError(f"{name} is not a DiT: it seems to be PixArt, which takes text. {_WHERE_ELSE}")
    if decoder is None or labels is None or not blocks:
        raise ValueError(f"{name} has a DiT's first layer but not the rest: the file is incomplete, or it is {_guess(weights)}.")
    if modulation is not None:
        parts = modulation.shape[0] // width
        design = {6: Conditioning.ADALN_ZERO, 4: Conditioning.ADALN}.get(parts)
        if design is None:
            raise ValueError(f"{name} is not a DiT: its blocks have {parts} modulations, and adaLN has 4, adaLN-Zero 6.")
    else:
        crossed = any(".cross_attn." in key for key in weights)
        design = Conditioning.CROSS_ATTENTION if crossed else Conditioning.IN_CONTEXT
    return {
        "depth": max(blocks) + 1,
        "width": width,
        "heads": heads_of(width),
        "patch_size": patch,
        "classes": labels.shape[0] - 1,
        "in_channels": in_channels,
        "out_channels": decoder.shape[0] // (patch * patch),
        "conditioning": design.value,
    }


def _check_complete(network: dict[str, Any], weights: Weights, name: str) -> None:
    """Every parameter is there in its shape, and nothing else: another network would give images that are merely wrong."""
    expected = {key: value.shape for key, value in DiT(**network, device="meta").state_dict().items()}
    missing = [key for key in expected if key not in weights]
    foreign = [key for key in weights if key not in expected]
    resized = [key for key in expected if key in weights and weights[key].shape != expected[key]]
    if missing:
        raise ValueError(f"{name} is incomplete: {_some(missing)} missing. Copy the file again from its source.")
    if foreign:
        raise ValueError(f"{name} is a changed DiT that Load DiT cannot compute: it also has {_some(foreign)}.")
    if resized:
        raise ValueError(f"{name} is a changed DiT that Load DiT cannot compute: {_some(resized)} in another shape.")


def _some(keys: list[str]) -> str:
    rest = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return f"{keys[0]}{rest}"


def _trained_grid(table: Tensor | None, network: dict[str, Any], name: str) -> int | None:
    """Return the side of the grid of the stored positions, which must be those of the paper."""
    if table is None:
        return None
    side = math.isqrt(table.shape[-2])
    expected = position_table(side, side, network["width"])
    stored = table.reshape(-1, table.shape[-1]).float()
    if stored.shape != expected.shape or (stored - expected).abs().max() > 1e-2:
        raise ValueError(f"{name} is a changed DiT that Load DiT cannot compute: its positions are not the paper's fixed ones.")
    return side


# A pattern that only such files' names contain -> what to call them. The first that is found counts.
_OTHERS = (
    (r"lora_(down|up|A|B|unet|te)|\.lora\.", "a LoRA"),
    (r"^control_model\.|controlnet_|zero_convs\.|^input_hint_block", "a ControlNet"),
    (r"^model\.diffusion_model\.(input|output)_blocks\.", "a Stable Diffusion checkpoint"),
    (r"(^|\.)input_blocks\.|^down_blocks\.\d+\.(resnets|attentions)\.", "a Stable Diffusion U-Net"),
    (r"joint_blocks\.", "Stable Diffusion 3"),
    (r"double_blocks\.\d+\.img_attn", "Flux, HunyuanVideo or a relative of theirs"),
    (r"(^|\.)transformer_blocks\.\d+\.(img_mod|attn\.add_q_proj)", "Qwen-Image, Flux or SD3 in diffusers' layout"),
    (r"y_embedder\.y_proj|(^|\.)adaln_single\.|(^|\.)caption_projection", "PixArt, which takes text"),
    (r"(^|\.)blocks\.\d+\.cross_attn\.k_img|(^|\.)blocks\.\d+\.modulation$", "Wan"),
    (r"^(first_stage_model\.)?(decoder|encoder)\.(conv_in|mid|up|down|up_blocks|mid_block)\b", "a VAE"),
    (r"text_model\.|^transformer\.resblocks\.", "a CLIP model"),
    (r"^shared\.weight|encoder\.block\.\d+\.layer\.", "a T5 text encoder"),
    (r"^model\.layers\.\d+\.self_attn", "a language model"),
    (r"(^|\.)x_embedder\.", "another transformer (it takes text or other inputs)"),
)


def _guess(weights: Weights) -> str:
    for pattern, what in _OTHERS:
        if any(re.search(pattern, key) for key in weights):
            return what
    if not weights:
        return "a file without weights"
    return f"an unknown kind of model (its first weight is '{next(iter(weights))}')"
