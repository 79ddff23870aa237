"""DiT files: every layout loads the same network, nothing in a file is ever run, and a wrong file is named."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from safetensors.torch import save_file
from tiny_dit import (
    GRID,
    TINY,
    bare,
    diffusers_network,
    dit_files,
    dit_host,
    inputs,
    load_dit,
    sample,
    tiny,
    training_file,
    write,
)

SUFFIXES = pytest.mark.parametrize("suffix", [".pt", ".safetensors"])


def output_of(model: Any) -> torch.Tensor:
    x, t, y = inputs()
    with torch.inference_mode():
        return model.model.diffusion_model(x, t, y=y)


# --- layouts ----------------------------------------------------------------------------------------------------------


@SUFFIXES
@pytest.mark.parametrize("prefix", ["", "module.", "model.diffusion_model."])
def test_the_published_layout(tmp_path: Path, suffix: str, prefix: str) -> None:
    network = tiny()
    path = write(tmp_path / f"DiT{suffix}", {f"{prefix}{name}": tensor for name, tensor in bare(network).items()})
    file = dit_files.read_dit(path)
    assert (file.layout, file.grid, file.prediction) == ("bare", GRID, None)
    expected = {**TINY, "in_channels": 4, "out_channels": 8, "conditioning": "adaLN-Zero"}
    assert file.network == expected
    model = load_dit(path)
    assert isinstance(model.model, dit_host.DiTModel)
    for name, tensor in network.state_dict().items():
        assert torch.equal(model.model.diffusion_model.state_dict()[name], tensor), name
    with torch.inference_mode():
        x, t, y = inputs()
        assert torch.equal(output_of(model), network(x, t, y)[:, :4])


def test_the_training_scripts_layout_uses_the_averaged_weights(tmp_path: Path) -> None:
    network = tiny()
    path = write(tmp_path / "0400000.pt", training_file(bare(network)))
    file = dit_files.read_dit(path)
    assert (file.layout, file.prediction) == ("train.py", "epsilon")
    assert all(torch.equal(file.weights[name], tensor) for name, tensor in network.state_dict().items())


@SUFFIXES
def test_diffusers_layout_equals_diffusers(tmp_path: Path, suffix: str) -> None:
    theirs = diffusers_network()
    path = write(tmp_path / f"diffusion_pytorch_model{suffix}", theirs.state_dict())
    assert dit_files.read_dit(path).layout == "diffusers"
    x, t, y = inputs()
    with torch.inference_mode():
        expected = theirs(x, timestep=t, class_labels=y).sample[:, :4]
    assert (output_of(load_dit(path)) - expected).abs().max() < 1e-5


def test_a_file_of_the_old_torch_format(tmp_path: Path) -> None:
    network = tiny()
    torch.save(bare(network), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert dit_files.read_dit(str(tmp_path / "old.pt")).network["depth"] == TINY["depth"]


@pytest.mark.parametrize(
    "changes",
    [
        {"conditioning": "in-context"},
        {"conditioning": "cross-attention"},
        {"conditioning": "adaLN"},
        {"depth": 2, "width": 384, "heads": 6, "patch_size": 4},
        {"depth": 1, "width": 1152, "heads": 16, "patch_size": 8, "classes": 10},
        {"out_channels": 4},
        {"in_channels": 3, "out_channels": 6, "classes": 7},
    ],
    ids=str,
)
def test_the_tensors_say_which_network_it_is(tmp_path: Path, changes: dict[str, Any]) -> None:
    network = tiny(**changes)
    path = write(tmp_path / "some.safetensors", bare(network, grid=6))
    file = dit_files.read_dit(path)
    asked = {**TINY, "in_channels": 4, "out_channels": 8, "conditioning": "adaLN-Zero", **changes}
    assert file.network == asked
    assert file.grid == 6
    model = load_dit(path)
    assert model.model.latent_format.latent_channels == asked["in_channels"]
    scaled = model.model.latent_format.process_in(torch.ones(1))
    assert float(scaled) == pytest.approx(0.18215 if asked["in_channels"] == 4 else 1.0)


# --- what the network predicts --------------------------------------------------------------------------------------------


def flows(model: Any) -> bool:
    assert (
        type(model.model.model_sampling).__mro__[1].__name__ == "ModelSamplingDiscreteFlow"
    ) is model.model.diffusion_model.flows
    return model.model.diffusion_model.flows


def test_prediction_comes_from_the_settings_then_the_name(tmp_path: Path) -> None:
    weights = bare(tiny())
    sit = {"prediction": "velocity", "path_type": "Linear"}
    assert flows(load_dit(write(tmp_path / "a.pt", training_file(weights, **sit))))
    assert not flows(load_dit(write(tmp_path / "SiT-b.pt", training_file(weights))))
    assert flows(load_dit(write(tmp_path / "SiT-XL-2-256x256.pt", weights)))
    plain = write(tmp_path / "DiT.pt", weights)
    assert not flows(load_dit(plain))
    assert flows(load_dit(plain, "velocity")) and not flows(load_dit(str(tmp_path / "a.pt"), "epsilon"))
    save_file(weights, tmp_path / "c.safetensors", metadata={"prediction": "velocity"})
    assert flows(load_dit(str(tmp_path / "c.safetensors")))


@pytest.mark.parametrize("settings", [{"prediction": "score"}, {"prediction": "velocity", "path_type": "GVP"}], ids=str)
def test_another_kind_of_sit_is_refused(tmp_path: Path, settings: dict[str, str]) -> None:
    path = write(tmp_path / "x.pt", training_file(bare(tiny()), **settings))
    with pytest.raises(ValueError, match="velocity on the linear path"):
        load_dit(path)


# --- files that must not be trusted -----------------------------------------------------------------------------------


class Harmful:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("where", ["args", "model", "beside"])
def test_code_in_a_file_is_never_run(tmp_path: Path, where: str, old_format: bool) -> None:
    marker, path = tmp_path / "it ran", tmp_path / "evil.pt"
    content = training_file(bare(tiny()))
    if where == "args":
        content["args"] = argparse.Namespace(model=Harmful(marker))
    elif where == "model":
        content["ema"]["blocks.0.attn.qkv.weight"] = Harmful(marker)
    else:
        content["hook"] = Harmful(marker)
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(ValueError, match=r"evil\.pt holds more than weights \(.*mkdir\).*not opened"):
        load_dit(str(path))
    assert not marker.exists()


def test_reading_leaves_no_class_allowed(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    load_dit(write(tmp_path / "x.pt", training_file(bare(tiny()))))
    assert set(torch.serialization.get_safe_globals()) == before
    assert argparse.Namespace not in before


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.999])
@SUFFIXES
def test_a_truncated_file_is_called_damaged(tmp_path: Path, suffix: str, keep: float) -> None:
    path = Path(write(tmp_path / f"cut{suffix}", bare(tiny())))
    size = int(keep * path.stat().st_size) if isinstance(keep, float) else keep
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"cut\{suffix} cannot be read: the file is damaged or incomplete"):
        load_dit(str(path))


def test_a_file_of_something_else_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "page.pt").write_text("<html>404: Not Found</html>")
    with pytest.raises(ValueError, match="damaged"):
        load_dit(str(tmp_path / "page.pt"))


# --- files that hold something else -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (
            ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"],
            "Stable Diffusion checkpoint",
        ),
        (["joint_blocks.0.x_block.attn.qkv.weight", "x_embedder.proj.bias"], "Stable Diffusion 3"),
        (["double_blocks.0.img_attn.qkv.weight"], "Flux"),
        (["lora_unet_blocks_0_attn_qkv.lora_down.weight"], "a LoRA"),
        (["decoder.conv_in.weight", "encoder.conv_in.weight"], "a VAE"),
        (["text_model.embeddings.token_embedding.weight"], "a CLIP model"),
        (["x_embedder.proj.weight", "y_embedder.y_proj.fc1.weight", "blocks.0.cross_attn.q_linear.weight"], "PixArt"),
        (["weird.weight"], r"unknown kind of model \(its first weight is 'weird.weight'\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_file_is_named(tmp_path: Path, names: list[str], what: str) -> None:
    path = write(tmp_path / "other.safetensors", {name: torch.zeros(8, 4, 2, 2) for name in names})
    with pytest.raises(ValueError, match=rf"other\.safetensors is not a DiT: it seems to be .*{what}.*Load Diffusion Model"):
        load_dit(path)


def test_a_file_without_named_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a Tensor and no named weights"):
        load_dit(write(tmp_path / "x.pt", torch.zeros(3)))
    with pytest.raises(ValueError, match="a file without weights"):
        load_dit(write(tmp_path / "y.pt", {"epoch": 3}))


def changed(**edits: torch.Tensor | None) -> dict[str, torch.Tensor]:
    weights = bare(tiny())
    for name, value in edits.items():
        if value is None:
            del weights[name]
        else:
            weights[name] = value
    return weights


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"blocks.2.mlp.fc1.weight": None}, r"incomplete: blocks\.2\.mlp\.fc1\.weight missing"),
        ({"blocks.0.adaLN_modulation.1.weight": None}, r"incomplete: blocks\.0\.adaLN_modulation\.1\.weight missing"),
        (dict.fromkeys(name for name in bare(tiny()) if name.startswith("blocks.0.")), r"incomplete: blocks\.0\..* and 9 more"),
        ({"blocks.0.attn.q_norm.weight": torch.ones(64)}, r"it also has blocks\.0\.attn\.q_norm\.weight"),
        ({"heads.0.weight": torch.ones(4, 4)}, r"it also has heads\.0\.weight"),
        ({"blocks.1.attn.qkv.weight": torch.ones(128, 128)}, r"blocks\.1\.attn\.qkv\.weight in another shape"),
        ({"pos_embed": torch.randn(1, 16, 128)}, "positions are not the paper's"),
        ({"blocks.0.adaLN_modulation.1.weight": torch.ones(5 * 128, 128)}, "5 modulations"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_changed_network_is_refused_and_not_half_loaded(tmp_path: Path, edits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_dit(write(tmp_path / "x.safetensors", changed(**edits)))


def test_diffusers_blocks_with_embedders_of_their_own_are_refused(tmp_path: Path) -> None:
    weights = dict(diffusers_network().state_dict())
    weights["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"] += 1
    with pytest.raises(ValueError, match="embed the timestep or the class differently"):
        load_dit(write(tmp_path / "x.safetensors", weights))


# --- in ComfyUI's hands ----------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path / "DiT-T-2.safetensors", bare(tiny()))


def test_it_is_the_hosts_patcher_and_can_be_made_again(path: str) -> None:
    model = load_dit(path, cfg_channels=4)
    assert type(model).__module__ == "comfy.model_patcher"
    factory, arguments = model.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    assert again.model is not model.model
    assert torch.equal(sample(again), sample(model))


def test_clones_for_several_gpus(path: str) -> None:
    model = load_dit(path)
    if not hasattr(model, "deepclone_multigpu"):
        pytest.skip("this host runs on one GPU")
    expected = sample(model)
    clone = model.deepclone_multigpu(torch.device("cpu"))
    assert clone.model is not model.model
    assert torch.equal(sample(clone), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_are_cast_layer_by_layer(
    path: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """What ComfyUI does on a device that computes in float32 only, and what its offloading relies on."""
    expected = sample(load_dit(path))
    monkeypatch.setattr(comfy.model_management, "unet_dtype", lambda **kwargs: dtype)
    model = load_dit(path)
    assert model.model.get_dtype() == dtype and model.model.manual_cast_dtype == torch.float32
    assert {parameter.dtype for parameter in model.model.diffusion_model.parameters()} == {dtype}
    result = sample(model)
    assert (result - expected).abs().max() / expected.abs().max() < (0.01 if dtype == torch.float16 else 0.1)


def test_a_patch_on_the_weights_works_and_goes(path: str) -> None:
    model = load_dit(path)
    plain = sample(model)
    assert "diffusion_model.blocks.1.attn.qkv" in comfy.lora.model_lora_keys_unet(model.model, {})
    patched = model.clone()
    key = "diffusion_model.blocks.1.attn.qkv.weight"
    added = patched.add_patches({key: (torch.full((384, 128), 0.05),)}, 1.0)
    assert list(added) == [key]
    assert not torch.equal(sample(patched), plain)
    assert torch.equal(sample(model), plain)


@pytest.mark.parametrize(("layout", "prediction"), [("bare", "auto"), ("bare", "velocity"), ("diffusers", "auto")])
def test_saving_the_model_gives_a_file_that_loads(path: str, tmp_path: Path, layout: str, prediction: str) -> None:
    if layout == "diffusers":
        path = write(tmp_path / "theirs.safetensors", diffusers_network().state_dict())
    model = load_dit(path, prediction)
    config, network = model.model.model_config, model.model.diffusion_model
    saved = write(tmp_path / "saved.safetensors", config.process_unet_state_dict_for_saving(network.state_dict()))
    assert torch.equal(sample(load_dit(saved)), sample(model))


@pytest.mark.parametrize(
    ("classes", "said", "prediction"),
    [
        (1000, {"num_attention_heads": "4"}, "auto"),
        (999, {"num_classes": "999"}, "auto"),
        (1000, {"num_classes": "1000"}, "epsilon"),
    ],
    ids=["heads", "null class", "epsilon"],
)
def test_comfyuis_own_save_node_keeps_what_the_weights_do_not_say(
    tmp_path: Path, classes: int, said: dict[str, str], prediction: str
) -> None:
    from comfy_extras.nodes_model_merging import save_checkpoint

    save_file(bare(tiny(depth=1, classes=classes)), tmp_path / "x.safetensors", metadata=said)
    model = load_dit(str(tmp_path / "x.safetensors"), prediction)
    save_checkpoint(model, filename_prefix="SiT", output_dir=str(tmp_path / "saved"))
    again = load_dit(str(next((tmp_path / "saved").iterdir())))
    assert again.model.model_config.unet_config == model.model.model_config.unet_config
    assert torch.equal(sample(again), sample(model))


def test_the_hosts_own_loading_is_untouched(path: str, pack: Any) -> None:
    """Load DiT is the only door: ComfyUI's detection is not replaced, so no other file is loaded differently."""
    import comfy.model_detection
    import comfy.supported_models

    known = list(comfy.supported_models.models)  # other tests may have registered the demo's model
    load_dit(path)
    assert comfy.model_detection.detect_unet_config.__module__ == "comfy.model_detection"
    assert comfy.supported_models.models == known
    assert not any("fovea_attention" in cls.__module__ for cls in known)


# --- the node ---------------------------------------------------------------------------------------------------------


def test_the_node_lists_and_loads_diffusion_models(
    path: str, node_classes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(Path(path).parent)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([folder], {".safetensors", ".pt"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    node = node_classes["DiTLoader"]
    offered = next(inp for inp in node.define_schema().inputs if inp.id == "model_name")
    assert offered.options == ["DiT-T-2.safetensors", *folder_paths.get_filename_list("checkpoints")]
    with caplog.at_level(logging.INFO, logger="fovea"):
        model = node.execute("DiT-T-2.safetensors")[0]
    assert (
        "Load DiT: DiT-T-2.safetensors: adaLN-Zero, 3 blocks of width 128, patch 2, 1000 classes, trained on 64 px" in caplog.text
    )
    assert isinstance(model.model, dit_host.DiTModel)
    assert len(model.model_options["sampler_post_cfg_function"]) == 1
    assert "sampler_post_cfg_function" not in node.execute("DiT-T-2.safetensors", "auto", "4")[0].model_options
    assert importlib.import_module("fovea_attention.nodes.dit").DiTLoader is node


@pytest.mark.newest
def test_files_in_checkpoints_are_listed_and_loaded_too(
    tmp_path: Path, node_classes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, classes, names in (("diffusion_models", 10, "ab"), ("checkpoints", 7, "bc")):
        (tmp_path / folder).mkdir()
        for name in names:
            write(tmp_path / folder / f"{name}.safetensors", bare(tiny(depth=1, classes=classes)))
        monkeypatch.setitem(folder_paths.folder_names_and_paths, folder, ([str(tmp_path / folder)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    node = node_classes["DiTLoader"]
    assert node.define_schema().inputs[0].options == ["a.safetensors", "b.safetensors", "c.safetensors"]
    found = [node.execute(f"{name}.safetensors")[0].model.diffusion_model.classes for name in "abc"]
    assert found == [10, 10, 7]
    with pytest.raises(FileNotFoundError):
        node.execute("d.safetensors")


@pytest.mark.newest
@pytest.mark.parametrize(
    ("channels", "chosen", "scale"),
    [
        (4, "auto", 0.18215),
        (4, "SDXL", 0.13025),
        (4, "unscaled", 1.0),
        (16, "auto", 1.0),
        (16, "SD3", 1.5305),
        (16, "Flux", 0.3611),
    ],
)
def test_latents_of_another_vae(tmp_path: Path, channels: int, chosen: str, scale: float) -> None:
    path = write(tmp_path / "x.safetensors", bare(tiny(depth=1, in_channels=channels, out_channels=channels)))
    model = load_dit(path, latent_format=chosen)
    ones = model.model.latent_format.process_in(torch.ones(1)) - model.model.latent_format.process_in(torch.zeros(1))
    assert float(ones) == pytest.approx(scale)
    factory, arguments = model.cached_patcher_init
    assert factory(*arguments, disable_dynamic=True).model.latent_format.scale_factor == model.model.latent_format.scale_factor
    if chosen in ("SDXL", "SD3"):
        other = write(tmp_path / "y.safetensors", bare(tiny(depth=1, in_channels=8, out_channels=8)))
        with pytest.raises(
            ValueError, match=f"latent_format is {chosen}, whose latents have {channels} channels, but this model has 8"
        ):
            load_dit(other, latent_format=chosen)


@pytest.mark.newest
def test_own_class_names_are_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="fovea")
    content = {"ema": bare(tiny(depth=1, classes=3)), "class_to_idx": {"cat": 0, "dog": 1, "hen": 2}}
    model = load_dit(write(tmp_path / "x.pt", content))
    assert "classes: 0 (cat), 1 (dog), 2 (hen)" in caplog.text
    with pytest.raises(ValueError, match=r"none of this model's 3 classes.*Its classes: 0 \(cat\)"):
        sample(model)
