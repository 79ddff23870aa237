"""Reading the file of a DiT safely: only tensors, numbers and text come out of it, and no code in it is ever run."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from .. import host

_SAFE = (".safetensors", ".sft")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<suffix>\.\w+)$")

WHERE_ELSE = (
    "Load DiT takes class-conditional DiT and SiT files only; for other models use Load Diffusion Model or Load Checkpoint."
)


# What settings are kept in. A file names these classes, and plain data is put in their place: none of them is imported.
_CONTAINERS = (
    *(f"omegaconf.{name}" for name in (
        "dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata", "base.Metadata", "nodes.AnyNode",
        "nodes.StringNode", "nodes.IntegerNode", "nodes.FloatNode", "nodes.BooleanNode",
    )),
    "easydict.EasyDict", "addict.addict.Dict", "yacs.config.CfgNode", "ml_collections.config_dict.config_dict.ConfigDict",
    *(f"{name}.AttributeDict" for name in (
        "pytorch_lightning.utilities.parsing", "lightning_fabric.utilities.data", "lightning.fabric.utilities.data",
    )),
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    *(f"pathlib._local.{name}" for name in ("Path", "PosixPath", "WindowsPath")),
    *(f"numpy.{name}" for name in ("dtype", "core.multiarray.scalar", "_core.multiarray.scalar")),
    "typing.Any", "collections.defaultdict", "builtins.dict", "builtins.list", "builtins.str", "builtins.int", "builtins.float",
)  # fmt: skip


class _Inert(dict[Any, Any]):
    """What stands for an object of a settings library: the data that was saved of it, and no behaviour."""

    def __new__(cls, *arguments: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            self.update(state)


def _allowed() -> list[Any]:
    """Return the classes that a pickled file may name, of which only the first is the real one."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    can_stand_in = (major, minor) >= (2, 6)  # before, a class cannot be given another name
    return [argparse.Namespace, *((_Inert, name) for name in _CONTAINERS if can_stand_in)]


def read_file(path: str) -> tuple[Mapping[Any, Any], Any]:
    """Return the dictionary in a file, and what stands beside its weights: metadata, or the ``config.json`` of its folder.

    Tensors stay on disk until they are used, so the optimizer in a training file costs no memory (ComfyUI's
    ``--disable-mmap`` turns that off). One of several shards stands for all of them.

    Raises:
        ValueError: the file is damaged, holds code, or no named weights; or other shards are missing.
    """
    path = _file_of(path)
    shards = _shards(path)
    tree, metadata = _read(shards[0])
    if len(shards) > 1:
        tree = dict(tree)
        for shard in shards[1:]:
            tree.update(_read(shard)[0])
    return tree, _merged(_config_beside(path), metadata)


def _file_of(path: str) -> str:
    """Return the file with the weights: of a folder as diffusers saves it, or of an index of shards."""
    place = Path(path)
    if place.is_dir():
        folders = (place / "transformer", place)
        found = [
            file
            for folder in folders
            for suffix in (*_SAFE, ".bin")
            for file in sorted(folder.glob(f"*{suffix}"), key=lambda file: (len(file.name), file.name))
        ]
        if not found:
            raise ValueError(
                f"The folder {place.name} holds no weights of a DiT: there is no .safetensors file in it or its transformer."
            )
        return str(found[0])
    if place.name.endswith(".index.json"):
        try:
            names = json.loads(place.read_text(encoding="utf-8"))["weight_map"].values()
            return str(place.with_name(Path(min(names)).name))  # a name alone: an index must not lead out of its folder
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{place.name} is not an index of shards.") from error
    return path


def _shards(path: str) -> list[str]:
    """Return the file, or all the shards that it is one of."""
    name = Path(path).name
    match = _SHARD.match(name)
    if match is None or int(match["count"]) < 2:
        return [path]
    digits = len(match["number"])
    every = [
        Path(path).with_name(f"{match['stem']}-{number:0{digits}}-of-{match['count']}{match['suffix']}")
        for number in range(1, int(match["count"]) + 1)
    ]
    missing = [shard.name for shard in every if not shard.is_file()]
    if missing:
        raise ValueError(
            f"{name} is one of several files of one model (a shard), and Load DiT needs all {len(every)} in the same folder. "
            f"Missing: {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}."
        )
    return [str(shard) for shard in every]


def _read(path: str) -> tuple[Mapping[Any, Any], Mapping[str, str] | None]:
    name = Path(path).name
    damaged = f"{name} cannot be read: the file is damaged or incomplete. Compare its size with the source and copy it again."
    metadata = None
    try:
        if path.lower().endswith(_SAFE):
            tree, metadata = host.load_file(path)
        else:
            with torch.serialization.safe_globals(_allowed()):
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
        raise ValueError(f"{name} is not a DiT: it holds a {type(tree).__name__} and no named weights. {WHERE_ELSE}")
    return tree, metadata


def _load_pickled(path: str) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=host.maps_files() and _is_zip(path))


def _is_zip(path: str) -> bool:
    """Return whether it has torch's format since 1.6; older files cannot be mapped into memory."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def is_dit_config(file: Path) -> bool:
    """Return whether a ``config.json`` of diffusers is that of a class-conditional DiT."""
    config = _config(file) or {}
    return config.get("_class_name") in ("DiTTransformer2DModel", "Transformer2DModel") and "num_embeds_ada_norm" in config


def _config_beside(path: str) -> dict[str, Any] | None:
    """Return the ``config.json`` in the folder of a file as diffusers saves it."""
    return _config(Path(path).with_name("config.json")) if Path(path).name.startswith("diffusion_pytorch_model") else None


def _config(file: Path) -> dict[str, Any] | None:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def _merged(config: dict[str, Any] | None, metadata: Mapping[str, str] | None) -> Any:
    if config is None:
        return metadata
    return {**config, **(metadata or {})}
