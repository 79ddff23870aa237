"""What a training script has written down beside the weights: the network's target, its classes and their names.

Scripts save a ``Namespace``, a dictionary, their command line or nothing; what is not understood is not used.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_KEYS = ("args", "config", "cfg", "opts", "hparams", "hyper_parameters", "settings", "options")
_NAMES = ("class_names", "classes", "id2label", "idx_to_class", "class_to_idx", "label_names")


@dataclass(frozen=True)
class TrainingSettings:
    """What a file says of itself.

    Attributes:
        prediction: "epsilon" or "velocity", or None where it does not say.
        from_image: time counts from image (0) to noise (1), as in REPA and in ComfyUI; SiT counts the other way.
        classes: their number, or None.
        null_class: False where labels were never dropped in training.
        heads: of attention, or None.
        names: the classes' own names by index, or none.
    """

    prediction: str | None = None
    from_image: bool = False
    classes: int | None = None
    null_class: bool = True
    heads: int | None = None
    names: tuple[str, ...] = ()


def settings_of(tree: Mapping[Any, Any], beside: Any) -> TrainingSettings:
    """Return what a file says of itself.

    Args:
        tree: the file's dictionary.
        beside: metadata of a .safetensors file, or diffusers' ``config.json``.

    Raises:
        ValueError: it was trained to predict something that Load DiT does not know.
    """
    said = [_as_mapping(tree.get(key)) for key in _KEYS] + [_as_mapping(beside)]
    entries = [entry for source in said for entry in _entries(source)]
    prediction, from_image = _prediction(entries, isinstance(tree.get("args"), argparse.Namespace))
    return TrainingSettings(
        prediction,
        from_image,
        _whole_number(entries, "num_classes"),
        not any(key == "class_dropout_prob" and _number(value) == 0 for key, value in entries),
        _whole_number(list(_as_mapping(beside).items()), "num_attention_heads"),
        next((names for source in (tree, *said) for key in _NAMES if (names := _names(source.get(key)))), ()),
    )


def _as_mapping(value: Any) -> Mapping[Any, Any]:
    """Return settings of any type as a dictionary; an empty one where they are none."""
    if isinstance(value, argparse.Namespace):
        return vars(value)
    if isinstance(value, Mapping):
        return value
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return _as_mapping(json.loads(value))
        except ValueError:
            return {}
    if isinstance(value, (list, tuple)):  # a command line: --prediction velocity
        texts = [str(part) for part in value if isinstance(part, (str, int, float))]
        pairs = zip(texts, texts[1:], strict=False)
        options = {key.lstrip("-").replace("-", "_"): text for key, text in pairs if key.startswith("--")}
        return {**options, **dict(text.lstrip("-").replace("-", "_").split("=", 1) for text in texts if "=" in text)}
    return {}


def _entries(source: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings, those of inner groups last; each group once, for a hostile file can hold one that contains itself."""
    groups, seen = [source], set()
    for group in groups:
        if id(group) in seen:
            continue
        seen.add(id(group))
        for key, value in group.items():
            value = value["_val"] if isinstance(value, Mapping) and "_val" in value else value  # a node of OmegaConf
            if isinstance(value, (Mapping, argparse.Namespace)):
                groups.append(_as_mapping(value))
            elif isinstance(key, str):
                yield key, value


def _text(entries: Sequence[tuple[str, Any]], name: str) -> str | None:
    return next((value for key, value in entries if key == name and isinstance(value, str)), None)


def _number(value: Any) -> float | None:
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _whole_number(entries: Sequence[tuple[str, Any]], name: str) -> int | None:
    number = next((number for key, value in entries if key == name and (number := _number(value)) is not None), None)
    return int(number) if number is not None and number == int(number) and number > 0 else None


def _prediction(entries: Sequence[tuple[str, Any]], authors_script: bool) -> tuple[str | None, bool]:
    """Return what the network predicts, and whether its time counts from the image.

    SiT's script says "velocity" on the path "Linear"; REPA's says "v" on "linear", and counts time the other way. DiT's script
    knows only noise and says nothing.
    """
    target, path = _text(entries, "prediction"), _text(entries, "path_type")
    if target is None:
        return "epsilon" if authors_script else None, False
    straight = path is None or path.lower() == "linear"
    if target.lower() in ("epsilon", "eps"):
        return "epsilon", False
    if target == "velocity" and straight:
        return "velocity", False
    if target == "v" and straight:
        return "velocity", True
    raise ValueError(
        f"the file was trained to predict '{target}' on the path '{path or 'Linear'}', which Load DiT does not know: SiT models "
        "must predict velocity on the linear path."
    )


def _names(value: Any) -> tuple[str, ...]:
    """Return class names by index, of a list, of {index: name} or of {name: index}."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except ValueError:
            return ()
    if isinstance(value, Mapping):
        pairs = [(key, name) if isinstance(name, str) else (name, key) for key, name in value.items()]
        numbered = {int(number): str(name) for index, name in pairs if (number := _number(index)) is not None}
        value = [numbered[index] for index in range(len(pairs))] if set(numbered) == set(range(len(pairs))) else []
    if isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(name, str) for name in value):
        return tuple(value)
    return ()
