"""Saving and loading attention maps: nothing is lost, and nothing outside ComfyUI's folders is read or written."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
from pathlib import Path
from typing import Any

import folder_paths
import graph_runs
import pytest
import torch
from graph_runs import node
from safetensors import safe_open
from safetensors.torch import save_file
from saved_maps import files, maps  # noqa: F401 (fixtures)

pytestmark = pytest.mark.newest


IMAGE = torch.zeros(1, 8, 8, 3)


def save(files: Any, maps: Any, prefix: str = "attention/maps") -> Path:
    saved = files.FoveaSaveAttnMaps.execute(maps, IMAGE, prefix)
    assert saved.args[0] is maps
    return Path(folder_paths.get_output_directory(), saved.ui.as_dict()["text"][0])


def test_what_was_saved_is_loaded_again(files: Any, maps: Any) -> None:
    path = save(files, maps)
    assert path.name == "maps_00001_.attn.safetensors"
    loaded = files.FoveaLoadAttnMaps.execute(f"attention/{path.name} [output]").args[0]
    before, after = maps.state_dict(), loaded.state_dict()
    assert json.loads(after[1]["fovea.attn_maps"]) == json.loads(before[1]["fovea.attn_maps"])
    assert set(after[0]) == set(before[0])
    for name, tensor in before[0].items():
        assert torch.equal(after[0][name], tensor) and after[0][name].dtype == tensor.dtype, name
    for heat in ("heat", "self_attention"):
        arguments = () if heat == "heat" else (0.3, 0.7)
        assert torch.equal(getattr(loaded, heat)(*arguments), getattr(maps, heat)(*arguments))


def test_names_are_counted_and_never_taken_twice(files: Any, maps: Any) -> None:
    names = [save(files, maps, "deep/er/cat").name for _ in range(3)]
    assert names == [f"cat_0000{at}_.attn.safetensors" for at in (1, 2, 3)]


def test_the_workflow_is_saved_as_images_carry_it(files: Any, maps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hidden:
        prompt = {"1": {"class_type": "KSampler"}}
        extra_pnginfo = {"workflow": {"nodes": []}}

    monkeypatch.setattr(files.FoveaSaveAttnMaps, "hidden", Hidden, raising=False)
    with safe_open(str(save(files, maps)), "pt") as stored:
        metadata = stored.metadata()
    assert json.loads(metadata["prompt"]) == Hidden.prompt and json.loads(metadata["workflow"]) == {"nodes": []}
    monkeypatch.setattr(files.args, "disable_metadata", True)
    with safe_open(str(save(files, maps)), "pt") as stored:
        assert set(stored.metadata()) == {"fovea.attn_maps"}


def test_maps_without_a_run_cannot_be_saved(files: Any) -> None:
    empty = importlib.import_module("fovea_attention.attention.maps").AttnMaps()
    with pytest.raises(ValueError, match="no attention maps yet"):
        files.FoveaSaveAttnMaps.execute(empty, IMAGE, "attention/maps")
    assert list(Path(folder_paths.get_output_directory()).iterdir()) == []


def test_the_list_shows_files_of_the_input_folder_and_saved_ones(files: Any, maps: Any) -> None:
    save(files, maps)
    Path(folder_paths.get_input_directory(), "shared.attn.safetensors").write_bytes(b"")
    Path(folder_paths.get_input_directory(), "model.safetensors").write_bytes(b"")
    schema = files.FoveaLoadAttnMaps.define_schema()
    assert schema.inputs[0].options == ["shared.attn.safetensors", "attention/maps_00001_.attn.safetensors [output]"]


def test_an_upload_that_comfyui_has_numbered_is_listed_and_loaded(files: Any, maps: Any) -> None:
    """As ComfyUI renames a file whose name is taken: the number comes before the last suffix."""
    name = "shared.attn (1).safetensors"
    save(files, maps).rename(Path(folder_paths.get_input_directory(), name))
    assert files.FoveaLoadAttnMaps.define_schema().inputs[0].options == [name]
    assert files.FoveaLoadAttnMaps.validate_inputs(name) is True
    assert isinstance(files.FoveaLoadAttnMaps.execute(name)[0], type(maps))


def test_an_empty_host_has_an_empty_list(files: Any) -> None:
    assert files.FoveaLoadAttnMaps.define_schema().inputs[0].options == []
    assert "no file is chosen" in files.FoveaLoadAttnMaps.validate_inputs("")
    assert "no file is chosen" in files.FoveaLoadAttnMaps.validate_inputs(None)


def test_another_content_is_another_fingerprint(files: Any, maps: Any) -> None:
    path = save(files, maps)
    name = f"attention/{path.name} [output]"
    assert files.FoveaLoadAttnMaps.validate_inputs(name) is True
    first = files.FoveaLoadAttnMaps.fingerprint_inputs(name)
    assert files.FoveaLoadAttnMaps.fingerprint_inputs(name) == first
    os.utime(path, (1, 1))
    assert files.FoveaLoadAttnMaps.fingerprint_inputs(name) == first, "the content counts, not the date"
    path.write_bytes(path.read_bytes() + b" ")
    assert files.FoveaLoadAttnMaps.fingerprint_inputs(name) != first


@pytest.mark.parametrize(
    "name",
    [
        "../secret.attn.safetensors",
        "../output/../../secret.attn.safetensors",
        "/etc/passwd",
        "link.attn.safetensors",
        "linked/secret.attn.safetensors",
        "../secret.attn.safetensors [output]",
        "../secret.attn.safetensors [temp]",
        "missing.attn.safetensors",
        "a\0b.attn.safetensors",
        "plain.safetensors",
    ],
)
def test_nothing_outside_the_folders_is_read(files: Any, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret.attn.safetensors"
    save_file({"x": torch.zeros(1)}, secret, metadata={"fovea.attn_maps": "{}"})
    save_file({"x": torch.zeros(1)}, tmp_path / "input" / "plain.safetensors")
    (tmp_path / "input" / "link.attn.safetensors").symlink_to(secret)
    (tmp_path / "input" / "linked").symlink_to(tmp_path)
    refusal = files.FoveaLoadAttnMaps.validate_inputs(name)
    assert isinstance(refusal, str) and refusal.startswith("file")
    for call in (files.FoveaLoadAttnMaps.execute, files.FoveaLoadAttnMaps.fingerprint_inputs):
        with pytest.raises(ValueError, match="^file"):
            call(name)


@pytest.mark.parametrize(
    "prefix", ["../maps", "a/../../maps", "{tmp}/elsewhere/maps", "linked/maps", "a\0b", "", "  ", "folder/"]
)
def test_nothing_outside_the_output_folder_is_written(files: Any, maps: Any, tmp_path: Path, prefix: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "output" / "linked").symlink_to(elsewhere)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="^filename_prefix"):
        save(files, maps, prefix.replace("{tmp}", str(tmp_path)))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("prefix", ["", "folder/", "x" * 300, "folder/" + "猫" * 100])
def test_a_name_that_cannot_be_written_is_refused_before_the_run(files: Any, maps: Any, tmp_path: Path, prefix: str) -> None:
    refusal = files.FoveaSaveAttnMaps.validate_inputs(filename_prefix=prefix)
    assert isinstance(refusal, str) and refusal.startswith("filename_prefix")
    with pytest.raises(ValueError, match=re.escape(refusal)):
        save(files, maps, prefix)
    assert files.FoveaSaveAttnMaps.validate_inputs(filename_prefix=f"a/{'%KSampler.seed%' * 30}") is True


def test_the_longest_name_is_written(files: Any, maps: Any, tmp_path: Path) -> None:
    most = 255 - len("_00001_.attn.safetensors")
    assert save(files, maps, "x" * most).is_file()
    with pytest.raises(ValueError, match=f"name of {most + 1} bytes, and file systems take {most}"):
        save(files, maps, "x" * (most + 1))


def test_files_of_others_and_damaged_ones_are_refused(files: Any, maps: Any, tmp_path: Path) -> None:
    folder = Path(folder_paths.get_input_directory())
    save_file({"x": torch.zeros(1)}, folder / "model.attn.safetensors")
    with pytest.raises(ValueError, match="holds no attention maps"):
        files.FoveaLoadAttnMaps.execute("model.attn.safetensors")
    whole = save(files, maps).read_bytes()
    (folder / "half.attn.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        files.FoveaLoadAttnMaps.execute("half.attn.safetensors")


class TestName:
    """A file's name that another node makes."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("*",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"name": ("STRING", {})}}

    def make(self, name: str) -> tuple[str]:
        return (name,)


def test_names_may_come_from_another_node(files: Any, maps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = graph_runs.executor(monkeypatch)
    import execution

    import nodes

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "TestName", TestName)
    path = save(files, maps)
    graph = {
        "1": node("TestName", name=f"attention/{path.name} [output]"),
        "2": node("FoveaLoadAttnMaps", file=["1", 0]),
        "3": node("EmptyImage", width=8, height=8, batch_size=1, color=0),
        "4": node("TestName", name="linked/maps"),
        "5": node("FoveaSaveAttnMaps", attn_maps=["2", 0], images=["3", 0], filename_prefix=["4", 0]),
    }
    valid = asyncio.run(execution.validate_prompt("1", graph, None))
    assert valid[0] and not valid[3], valid
    run(graph)
    assert (path.parents[1] / "linked" / path.name).is_file()
    graph["5"]["inputs"]["filename_prefix"] = "x" * 300
    refused = asyncio.run(execution.validate_prompt("2", graph, None))
    assert not refused[0] and "Write a shorter one" in json.dumps(refused[3])


# --- marks in names -----------------------------------------------------------------------------------------------------


def test_marks_in_names_are_replaced_through_the_api(files: Any, maps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ComfyUI's page does for Save Image: no mark and no character that Windows refuses is left."""
    sampler = {"class_type": "KSampler", "inputs": {"seed": 7, "sampler_name": "a/b:c"}, "_meta": {"title": "Mine"}}

    class Hidden:
        prompt, extra_pnginfo = {"3": sampler}, None

    monkeypatch.setattr(files.FoveaSaveAttnMaps, "hidden", Hidden, raising=False)
    path = save(files, maps, "attention/%date:yyyy-MM-dd hh:mm%/%KSampler.seed%_%Mine.sampler_name%_%width%x%height%_%No.such%")
    day, name = path.parts[-2:]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d_\d\d", day)
    assert name == f"7_a_b_c_{IMAGE.shape[2]}x{IMAGE.shape[1]}_%No.such%_00001_.attn.safetensors"


def test_files_in_folders_of_their_own_are_listed_and_loaded(files: Any, maps: Any) -> None:
    path = save(files, maps, "attention/2026-01/deep/maps")
    name = f"attention/2026-01/deep/{path.name} [output]"
    assert name in files.FoveaLoadAttnMaps.define_schema().inputs[0].options
    assert files.FoveaLoadAttnMaps.validate_inputs(name) is True
    assert files.FoveaLoadAttnMaps.execute(name).args[0].layers == maps.layers
