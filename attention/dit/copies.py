"""Finding the network in whatever a training script has saved: every copy of it, and among them the averaged weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor

from .diffusers_keys import Weights

PATCH_EMBEDDING = "x_embedder.proj.weight"
DIFFUSERS_CLASSES = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
_FIRST_LAYERS = (PATCH_EMBEDDING, DIFFUSERS_CLASSES)

# Modules that wrap others for a training run; their names say nothing of the network, wherever they stand in a name.
_WRAPPERS = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_fpw_module", "_module")
)
_AVERAGED = re.compile(r"emas?|averaged?|avg|swa|shadow|polyak|(model|net|net[gd]|state|dit)ema|ema(model|net|weights|\d+)")
_OF_TRAINING = frozenset(("opt", "optim", "optimizer", "optimizers", "exp", "grad", "grads", "momentum"))
_OF_OTHERS = frozenset(("teacher", "discriminator", "critic", "fake", "target", "pretrained", "init", "initial"))
_PREFERRED = ("model", "state", "module")  # among copies that are not averaged
# A hostile file can hold a dictionary that contains itself: how deep is searched, and how often in the same one.
_DEEPEST, _MOST = 12, 8
_LOOKED_AT = 64  # entries of a dictionary or list, to tell whether it holds weights
_DECAY = re.compile(r"(?<!\d)0\.\d+")  # of an average: ema_0.9999


@dataclass(frozen=True)
class Copy:
    """One copy of a network in a file.

    Attributes:
        name: where it stands, as the file says it; "" for the file itself.
        weights: by the names in the network.
        nested: a dictionary inside the file holds it.
        averaged: it is a running average of the weights, which is what a paper's results are made with.
    """

    name: str
    weights: Weights
    nested: bool
    averaged: bool


def plain_name(name: str) -> str:
    """Return the name of a tensor without the parts that wrappers have put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def tensors_of(tree: Mapping[Any, Any]) -> Weights:
    """Return every tensor in nested dictionaries, by its path: {"ema": {"a.b": t}} holds "ema.a.b"."""
    return {name: value for name, value, _ in _walk(tree) if isinstance(value, Tensor)}


def _walk(tree: Mapping[Any, Any]) -> list[tuple[str, Any, str]]:
    """Return what is in nested dictionaries: its path, itself, and the path of the dictionary.

    A list or tuple in which one dictionary holds weights is that dictionary: {"ema": (weights, 0.9999)}.
    """
    uses: Counter[int] = Counter()

    def walk(inner: Mapping[Any, Any], path: str, depth: int) -> Iterator[tuple[str, Any, str]]:
        uses[id(inner)] += 1
        for key, held in inner.items():
            holders = _holders(held)
            value = holders[0] if len(holders) == 1 else held
            if not isinstance(value, Mapping):
                yield f"{path}{key}", value, path
            elif depth < _DEEPEST and uses[id(value)] < _MOST:
                yield from walk(value, f"{path}{key}.", depth + 1)

    return list(walk(tree, "", 0))


def _holders(value: Any) -> list[Mapping[Any, Any]]:
    """Return the dictionaries in a list or tuple that hold weights."""
    parts = value if isinstance(value, (list, tuple)) else ()
    return [part for part in parts if isinstance(part, Mapping) and _holds_weights(part)]


def _holds_weights(value: Any, depth: int = 2) -> bool:
    """Return whether it is a tensor that is no counter, or holds one not far inside."""
    if isinstance(value, Tensor):
        return value.ndim > 0
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return depth > 0 and any(_holds_weights(part, depth - 1) for part in islice(parts, _LOOKED_AT))


def copies_of(tree: Mapping[Any, Any]) -> list[Copy]:
    """Return the copies of a DiT in a file, the one to use first; none where there is no DiT.

    Averaged weights count before the last ones, whatever they are called, and the longer average before others; among equals
    the shorter name, then the order in the file.
    """
    found = _walk(tree)
    named = {plain_name(name): (value, where) for name, value, where in found if isinstance(value, Tensor)}
    copies = []
    for prefix, where in _places(named).items():
        inner = tuple(other for other in _places(named) if other != prefix and other.startswith(prefix))
        weights = {
            name[len(prefix) :]: value
            for name, (value, own) in named.items()
            if own == where and name.startswith(prefix) and not (inner and name.startswith(inner))
        }
        weights = {name: value for name, value in weights.items() if value.ndim or "." in name}  # counters: "step", "decay"
        copies.append(Copy(prefix.rstrip("."), weights, where != "", _is_averaged(prefix)))
    if copies and not any(copy.averaged for copy in copies):
        copies += _averages_without_names(found, min(copies, key=_rank))
    return sorted(copies, key=_rank)


def unread_averages(tree: Mapping[Any, Any]) -> str | None:
    """Return the name of something that is called an average and holds tensors, but is no one copy of the network, and why."""
    for name, value, _ in _walk(tree):
        if _holds_weights(value) and _is_averaged(name) and not _words(name) & _OF_TRAINING:
            several = len(_holders(value))
            why = f"a list of {several}: to use one, save it in a file of its own" if several else "whose form is unknown"
            return f"'{name.split('.')[0]}', {why}"
    return None


def _places(named: Mapping[str, tuple[Tensor, str]]) -> dict[str, str]:
    """Return what stands in front of a DiT's first layer in its name -> the path of the dictionary that holds it."""
    return {
        name[: -len(first)]: where
        for name, (_, where) in named.items()
        for first in _FIRST_LAYERS
        if (name == first or name.endswith(f".{first}")) and not _words(name[: -len(first)]) & _OF_TRAINING
    }


def _words(place: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", place.lower())) - {""}


def _is_averaged(place: str) -> bool:
    return any(_AVERAGED.fullmatch(word) for word in _words(place))


def _rank(copy: Copy) -> tuple[bool, bool, int, float, int]:
    words = _words(copy.name)
    known = next((i for i, word in enumerate(_PREFERRED) if word in words), len(_PREFERRED)) if words else 0
    decay = max(map(float, _DECAY.findall(copy.name)), default=0.0) if copy.averaged else 0.0
    return not copy.averaged, bool(words & _OF_OTHERS), known if not copy.averaged else 0, -decay, len(copy.name)


def _averages_without_names(found: Sequence[tuple[str, Any, str]], original: Copy) -> list[Copy]:
    """Return averages of a copy whose tensors do not have the network's names.

    Two are common: names without their dots (Stable Diffusion's training code: ``model_ema.blocks0attnqkvweight``), and a list
    in the order of the parameters (``shadow_params``).
    """
    trained = {name: value for name, value in original.weights.items() if name != "pos_embed"}
    kept = {name: value for name, value in original.weights.items() if name not in trained}
    averages = []
    ends = {
        name.rpartition(".")[2]: value
        for name, value, _ in found
        if isinstance(value, Tensor) and _is_averaged(name.rpartition(".")[0])
    }
    for start in _ends_of(original.name):
        squeezed = {name: ends[key] for name in trained if (key := f"{start}{name}".replace(".", "")) in ends}
        if len(squeezed) == len(trained):
            averages.append(Copy("model_ema", {**kept, **squeezed}, original.nested, True))
            break
    for name, value, _ in found:
        if isinstance(value, (list, tuple)) and _is_averaged(name) and _same_shapes(value, list(trained.values())):
            averages.append(Copy(name, {**kept, **dict(zip(trained, value, strict=True))}, True, True))
    return averages


def _ends_of(place: str) -> list[str]:
    """Return "model.diffusion_model." and what is left of it part by part, to ""."""
    parts = place.split(".") if place else []
    return ["".join(f"{part}." for part in parts[start:]) for start in range(len(parts) + 1)]


def _same_shapes(values: Sequence[Any], weights: Sequence[Tensor]) -> bool:
    return len(values) == len(weights) and all(
        isinstance(value, Tensor) and value.shape == weight.shape for value, weight in zip(values, weights, strict=True)
    )
