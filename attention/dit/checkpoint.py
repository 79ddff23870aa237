"""DiT checkpoints: telling from their tensors which network they hold.

Three layouts are known: the bare network (the published .pt files), what the paper's and SiT's training scripts and their forks
save (copies of the network beside an optimizer and settings, where the averaged weights count), and diffusers'
``DiTTransformer2DModel``. Each may be a .pt or a .safetensors file, in any precision.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .copies import PATCH_EMBEDDING, Copy, copies_of, tensors_of, unread_averages
from .diffusers_keys import DIFFUSERS_DETAILS, Weights, from_diffusers
from .embeddings import position_table
from .network import Conditioning, DiT, heads_of
from .reading import read_file
from .relatives import changed_dit, incomplete, not_a_dit, some
from .settings import TrainingSettings, settings_of

# Empty tensors in a file that ComfyUI saved: what the weights alone do not say. That of the heads has as many rows.
DIFFUSERS_MARK, HEADS_MARK, FROM_IMAGE_MARK = "fovea_diffusers_network", "fovea_heads", "fovea_time_from_image"
VELOCITY_MARK, EPSILON_MARK = "fovea_predicts_velocity", "fovea_predicts_epsilon"
NULL_MARK, NO_NULL_MARK = "fovea_null_class", "fovea_no_null_class"
_MARKS = (DIFFUSERS_MARK, HEADS_MARK, FROM_IMAGE_MARK, VELOCITY_MARK, EPSILON_MARK, NULL_MARK, NO_NULL_MARK)

_IMAGENET = 1000
_PROJECTORS = "projectors."  # of REPA's training (arXiv:2410.06940), which sampling has no use for
_SCALES = ("scale_weight", "weight_scale")  # of a scaled float8 weight
_QUANTISER = re.compile(r"(^|\.)(scaled_fp8|comfy_quant|scale_input|input_scale)$")


@dataclass(frozen=True)
class DiTFile:
    """What a checkpoint holds.

    Attributes:
        layout: "bare", "train.py" (beside other things) or "diffusers".
        network: arguments of ``DiT``.
        weights: by the names of ``DiT``'s parameters.
        grid: side of the token grid it was trained on, or None where the file does not say.
        prediction: "epsilon" or "velocity" where the file says so, else None.
        from_image: time counts from image (0) to noise (1), not the way SiT counts.
        copies: names of the copies of the network in the file; the first is the one in ``weights``.
        unread: an average of the weights in the file that could not be used and why, or None.
        names: the classes' own names, where the file has them.
    """

    layout: str
    network: dict[str, Any]
    weights: Weights
    grid: int | None
    prediction: str | None
    from_image: bool = False
    copies: tuple[str, ...] = ("",)
    unread: str | None = None
    names: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """Return one line for the log."""
        n = self.network
        null = "" if n.get("null_class", True) else " and no null class"
        trained = f", trained on {self.grid * n['patch_size'] * 8} px" if self.grid else ""
        taken, *others = (f"'{name}'" if name else "those without a name in front" for name in self.copies)
        weights = f", weights: {taken} (the file also has {', '.join(others)})" if others else ""
        unread = f", but not its averaged weights {self.unread}" if self.unread else ""
        return (
            f"{n['conditioning']}, {n['depth']} blocks of width {n['width']}, patch {n['patch_size']}, {n['classes']} classes"
            f"{null}{trained}, {self.layout} layout{weights}{unread}"
        )


def read_dit(path: str) -> DiTFile:
    """Return the DiT in a file.

    Raises:
        ValueError: the file is damaged, holds code, or holds something else; the message says which and what to do.
    """
    name = Path(path).name
    tree, beside = read_file(path)
    copies = copies_of(tree)
    if not copies:
        raise not_a_dit(tensors_of(tree), name)
    settings = settings_of(tree, beside)
    weights, layout = _in_our_names(copies[0], name)
    marks = {mark: weights.pop(mark) for mark in _MARKS if mark in weights}
    projectors = [key for key in weights if key.startswith(_PROJECTORS)]
    weights = _dequantised({key: value for key, value in weights.items() if key not in projectors})
    table = weights.pop("pos_embed", None)
    network = _network(weights, name, settings, marks)
    if layout == "diffusers" or DIFFUSERS_MARK in marks:
        network |= DIFFUSERS_DETAILS
    _check_complete(network, weights, name)
    return DiTFile(
        layout,
        network,
        weights,
        _trained_grid(table, network, name),
        "velocity" if VELOCITY_MARK in marks or projectors else "epsilon" if EPSILON_MARK in marks else settings.prediction,
        FROM_IMAGE_MARK in marks or bool(projectors) or settings.from_image,
        tuple(copy.name for copy in copies),
        None if copies[0].averaged else unread_averages(tree),
        settings.names if len(settings.names) == network["classes"] else (),
    )


def _in_our_names(copy: Copy, name: str) -> tuple[Weights, str]:
    """Return the weights of a copy by the names of ``DiT``'s parameters, and the layout."""
    if PATCH_EMBEDDING in copy.weights:
        return dict(copy.weights), "train.py" if copy.nested else "bare"
    return from_diffusers(copy.weights, name), "diffusers"


def _dequantised(weights: Weights) -> Weights:
    """Return the weights without the scales of scaled float8 files, each multiplied by its own."""
    scales = {key: value for key, value in weights.items() if key.endswith(_SCALES)}
    plain = {key: value for key, value in weights.items() if key not in scales and not _QUANTISER.search(key)}
    for key, scale in scales.items():
        weight = f"{key.rpartition('.')[0]}.weight"
        if weight in plain:
            scale = scale.float()
            scale = scale.reshape(-1, *[1] * (plain[weight].ndim - 1)) if scale.numel() > 1 else scale
            plain[weight] = (plain[weight].float() * scale).to(torch.bfloat16)
    return plain


def _network(weights: Weights, name: str, settings: TrainingSettings, marks: Weights) -> dict[str, Any]:
    """Return the arguments of ``DiT``, from names, shapes and marks."""
    first = weights.get(PATCH_EMBEDDING)
    blocks = {int(match[1]) for key in weights if (match := re.match(r"blocks\.(\d+)\.", key))}
    modulations = (weights.get(f"blocks.{block}.adaLN_modulation.1.weight") for block in sorted(blocks))
    modulation = next((found for found in modulations if found is not None), None)
    decoder, labels = weights.get("final_layer.linear.weight"), weights.get("y_embedder.embedding_table.weight")
    if first is None or first.ndim != 4 or decoder is None or labels is None or not blocks:
        raise _without_the_rest(weights, name)
    width, in_channels, patch, _ = first.shape
    if modulation is not None:
        parts = modulation.shape[0] // width
        design = {6: Conditioning.ADALN_ZERO, 4: Conditioning.ADALN}.get(parts)
        if design is None:
            raise ValueError(f"{name} is not a DiT: its blocks have {parts} modulations, and adaLN has 4, adaLN-Zero 6.")
    else:
        crossed = any(".cross_attn." in key for key in weights)
        design = Conditioning.CROSS_ATTENTION if crossed else Conditioning.IN_CONTEXT
    rows = labels.shape[0]
    null = NULL_MARK in marks or (NO_NULL_MARK not in marks and _has_null_class(rows, settings))
    heads = len(marks[HEADS_MARK]) if HEADS_MARK in marks else settings.heads
    return {
        "depth": max(blocks) + 1,
        "width": width,
        "heads": heads if heads and width % heads == 0 else heads_of(width),
        "patch_size": patch,
        "classes": rows - null,
        "in_channels": in_channels,
        "out_channels": decoder.shape[0] // (patch * patch),
        "conditioning": design.value,
        **({} if null else {"null_class": False}),
    }


def _has_null_class(rows: int, settings: TrainingSettings) -> bool:
    """Return whether the last row of a label table is the null class.

    It is, unless the settings say otherwise, or the table has as many rows as ImageNet has classes, or one.
    """
    if settings.classes in (rows, rows - 1):
        return settings.classes == rows - 1
    return settings.null_class and rows not in (1, _IMAGENET)


def _without_the_rest(weights: Weights, name: str) -> ValueError:
    """Return the error for a file that has a DiT's first layer, and not what belongs to it."""
    parts = ("x_embedder.", "t_embedder.", "y_embedder.", "final_layer.", "pos_embed")
    known = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12]|adaLN_modulation\.1|norm[12]|norm_cross|cross_attn\.(q|kv|proj))\."
    foreign = [key for key in weights if not key.startswith(parts) and not re.match(known, key)]
    flat = PATCH_EMBEDDING in weights and weights[PATCH_EMBEDDING].ndim != 4
    if foreign and "y_embedder.embedding_table.weight" not in weights:
        return not_a_dit(weights, name)
    if foreign or flat:
        return changed_dit([*foreign, *([PATCH_EMBEDDING] if flat else [])], name)
    return incomplete(["most of its layers"], name)


def _check_complete(network: dict[str, Any], weights: Weights, name: str) -> None:
    """Raise where a parameter is missing or has another shape, or there are others: images would be merely wrong."""
    expected = {key: value.shape for key, value in DiT(**network, device="meta").state_dict().items()}
    missing = [key for key in expected if key not in weights]
    foreign = [key for key in weights if key not in expected]
    resized = [key for key in expected if key in weights and weights[key].shape != expected[key]]
    if foreign:
        raise changed_dit(foreign, name)
    if whole := [key for key, value in weights.items() if not value.is_floating_point()]:
        raise ValueError(
            f"{name} is quantised to whole numbers, which Load DiT does not support: {some(whole)}. Get it in fp16 or fp8."
        )
    if missing:
        raise incomplete(missing, name)
    if resized:
        raise ValueError(f"{name} is a changed DiT that Load DiT does not support: {some(resized)} in another shape.")


def _trained_grid(table: Tensor | None, network: dict[str, Any], name: str) -> int | None:
    """Return the side of the grid of the stored positions, which must be those of the paper."""
    if table is None:
        return None
    side = math.isqrt(table.shape[-2]) if table.ndim > 1 else 0
    expected = position_table(side, side, network["width"])
    stored = table.reshape(-1, table.shape[-1]).float() if table.ndim > 1 else table
    if stored.shape != expected.shape or not _is_rounded(stored, expected, table.dtype):
        raise ValueError(f"{name} is a changed DiT that Load DiT does not support: its positions are not the paper's fixed ones.")
    return side


def _is_rounded(stored: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a table of values up to 1 is the expected one, in its precision or in one that it went through before."""
    if not torch.isfinite(stored).all():
        return False
    tolerance = max(1e-2, torch.finfo(dtype).eps) if dtype.is_floating_point else 1e-2
    if (stored - expected).abs().max() <= tolerance:
        return True
    before = (torch.float8_e4m3fn, torch.float8_e5m2)
    return any((stored - expected.to(kind).float()).abs().max() <= 1e-2 for kind in before)
