"""The ``FoveaSaveAttnMaps`` and ``FoveaLoadAttnMaps`` nodes: attention maps as files, in ComfyUI's own folders."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
from comfy.cli_args import args
from comfy_api.latest import io, ui
from safetensors import SafetensorError, safe_open

from ..attention.host import NodeText, log
from ..attention.maps import AttnMaps
from ..attention.maps.matching import maps_of_images
from ._file_names import with_values
from ._schema import node_schema
from ._types import AttnMapsSocket
from ._workflow import origin_of

_SUFFIX = ".attn.safetensors"
_IS_MAPS = re.compile(r"\.attn( \(\d+\))?\.safetensors$")  # ComfyUI numbers an upload whose name is taken
_LONGEST_NAME = 255  # bytes, in the file systems of Linux, macOS and Windows
_FOLDER = "attention"  # below the output folder; what Save writes there by default can be loaded without moving it


class FoveaSaveAttnMaps(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "FoveaSaveAttnMaps",
            display_name="Save Attention Maps",
            description="Saves the attention maps of a run to a file in the output folder, to view later or to share.",
            search_aliases=["export attention maps", "save heat maps", "daam"],
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id, io.Hidden.dynprompt],
            inputs=[
                AttnMapsSocket.Input("attn_maps", tooltip="From Capture Attention Maps."),
                io.Image.Input(
                    "images",
                    tooltip="The decoded image of the same run. It makes this node wait for the sampler and is not saved.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default=f"{_FOLDER}/maps",
                    tooltip="Start of the file's name, in the output folder. Folders and placeholders such as %year%, "
                    "%date:yyyy-MM-dd%, %width% or %KSampler.seed% work as in Save Image.",
                ),
            ],
            outputs=[AttnMapsSocket.Output(display_name="attn_maps", tooltip="The same attention maps.")],
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        try:
            if filename_prefix is not None:  # linked: known when the node runs
                _check_prefix(filename_prefix, is_final="%" not in filename_prefix)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, attn_maps: AttnMaps, images: io.Image.Type, filename_prefix: str) -> io.NodeOutput:
        maps = maps_of_images(attn_maps, images, None, origin_of(cls.hidden))
        tensors, metadata = maps.state_dict()
        path = _new_file(with_values(filename_prefix, _prompt_of(cls.hidden)), images)
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        comfy.utils.save_torch_file(tensors, str(path), metadata={**metadata, **cls._workflow()})
        log.info("Save Attention Maps: %s", path)
        name = path.relative_to(_real(folder_paths.get_output_directory())).as_posix()
        NodeText().show(f"output/{name}")
        return io.NodeOutput(attn_maps, ui=ui.PreviewText(name))

    @classmethod
    def _workflow(cls) -> dict[str, str]:
        """The workflow, as saved images carry it."""
        if args.disable_metadata or cls.hidden is None:
            return {}
        extra = cls.hidden.extra_pnginfo or {}
        return {"prompt": json.dumps(cls.hidden.prompt), **{name: json.dumps(value) for name, value in extra.items()}}


class FoveaLoadAttnMaps(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "FoveaLoadAttnMaps",
            display_name="Load Attention Maps",
            description="Loads attention maps saved by Save Attention Maps, from the input folder or from output/attention.",
            search_aliases=["import attention maps", "open heat maps", "daam"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=_files(),
                    tooltip=f"A file ending in {_SUFFIX}, in the input folder or, marked [output], in output/{_FOLDER}, "
                    "subfolders included.",
                )
            ],
            outputs=[AttnMapsSocket.Output(display_name="attn_maps", tooltip="The attention maps, for Attention Map Preview.")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = "") -> bool | str:
        try:
            if file is not None or not _files():  # None: linked and known when the node runs, or there is nothing to choose
                _existing_file(file)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str | None) -> str | float:
        if file is None:  # linked: nobody asks once it is known, so it is read anew
            return math.nan
        digest = hashlib.sha256()
        with open(_existing_file(file), "rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
        return digest.hexdigest()

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        path = _existing_file(file)
        try:
            with safe_open(str(path), framework="pt", device="cpu") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}
                metadata = stored.metadata()
        except SafetensorError as error:
            raise ValueError(f"file: {file} is damaged or not a safetensors file ({error}). Save the maps again.") from error
        return io.NodeOutput(AttnMaps.from_state_dict(tensors, metadata))


# --- names ----------------------------------------------------------------------------------------------------------


def _files() -> list[str]:
    """Files in the input folder, and those that Save writes by default, marked as ComfyUI marks them."""
    uploaded = _names(folder_paths.get_input_directory())
    saved = _names(os.path.join(folder_paths.get_output_directory(), _FOLDER))
    return [*uploaded, *(f"{_FOLDER}/{name} [output]" for name in saved)]


def _names(folder: str) -> list[str]:
    """Files in a folder and its subfolders, those of the folder itself first."""
    found = [os.path.join(path, name) for path, _, names in os.walk(folder) for name in names if _IS_MAPS.search(name)]
    names = [Path(os.path.relpath(path, folder)).as_posix() for path in found if os.path.isfile(path)]
    return sorted(names, key=lambda name: ("/" in name, name))


def _existing_file(name: str | None) -> Path:
    """The file that a name of the list stands for; nothing outside ComfyUI's folders, whatever the name is."""
    plain, folder = folder_paths.annotated_filepath(name or "")
    if not plain:
        raise ValueError(
            "file: no file is chosen. Save attention maps with Save Attention Maps, or put a file in the input folder."
        )
    path = _inside(folder or folder_paths.get_input_directory(), plain, "file")
    if not _IS_MAPS.search(plain) or not path.is_file():
        raise ValueError(f"file: there is no file {name!r}. Choose one that Save Attention Maps wrote (ending in {_SUFFIX}).")
    return path


def _prompt_of(hidden: Any) -> dict[str, Any]:
    return (hidden.prompt if hidden is not None else None) or {}


def _check_prefix(prefix: str, *, is_final: bool = True) -> None:
    """Raise ``ValueError`` for what cannot start a file's name.

    Args:
        is_final: no placeholders are left, whose values may be shorter.
    """
    if not prefix.strip() or prefix.endswith(("/", "\\")):
        raise ValueError(f"filename_prefix is {prefix!r}: write the start of a name, such as {_FOLDER}/maps.")
    longest = max(len(os.fsencode(part)) for part in re.split(r"[/\\]", prefix))
    most = _LONGEST_NAME - len(f"_00000_{_SUFFIX}")
    if is_final and longest > most:
        raise ValueError(
            f"filename_prefix has a name of {longest} bytes, and file systems take {most} before the number and the ending. "
            "Write a shorter one."
        )


def _new_file(prefix: str, images: io.Image.Type) -> Path:
    """A name that is not taken, in the output folder."""
    _check_prefix(prefix)
    output = folder_paths.get_output_directory()
    _inside(output, prefix, "filename_prefix")  # before ComfyUI makes folders: older versions follow links out
    height, width = images.shape[1:3]
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, output, width, height)
    return _real(folder) / f"{name}_{counter:05}_{_SUFFIX}"


def _inside(folder: str, name: str, what: str) -> Path:
    """``folder/name`` with all links resolved, if that is still inside the folder."""
    try:
        base, path = _real(folder), _real(os.path.join(folder, name))
    except ValueError as error:  # a null character
        raise ValueError(f"{what} is {name!r}: this is not a file name.") from error
    if not path.is_relative_to(base):
        raise ValueError(f"{what} is {name!r}, which is outside the folder {folder}. Use a plain name without '..' or a drive.")
    return path


def _real(path: str) -> Path:
    return Path(os.path.realpath(path))
