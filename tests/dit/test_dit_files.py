"""DiT files as people have them: the network is found in any of them, and a relative of DiT is named."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.lora
import comfy.sd
import comfy.utils
import folder_paths
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_dit import Weights, bare, diffusers_network, dit_files, dit_host, labels, latent, load_dit, sample, tiny, write

pytestmark = pytest.mark.newest

SMALL = {"depth": 2, "classes": 10}
Load = Callable[[str, Any], Any]


@pytest.fixture(scope="module")
def network() -> Any:
    return tiny(**SMALL)


@pytest.fixture(scope="module")
def weights(network: Any) -> Weights:
    return bare(network)


@pytest.fixture(scope="module")
def raw(weights: Weights) -> Weights:
    return {name: value + float(name != "pos_embed") for name, value in weights.items()}


@pytest.fixture
def read(tmp_path: Path) -> Load:
    return lambda name, content: dit_files.read_dit(write(tmp_path / name, content))


def holds(file: Any, network: Any) -> bool:
    return all(torch.equal(file.weights[name], value) for name, value in network.state_dict().items())


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: value for name, value in weights.items()}


# --- which copy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["ema", "model_ema", "ema_model", "state_dict_ema", "EMA", "ema_0.9999", "swa_model", "averaged"]
)
def test_averaged_weights_count_whatever_their_name(read: Load, network: Any, weights: Weights, raw: Weights, name: str) -> None:
    for content in ({"model": raw, name: weights}, {name: {"module": weights, "decay": 0.99}, "state_dict": raw, "epoch": 3}):
        file = read("x.pt", content)
        assert holds(file, network)
        assert file.copies[0].startswith(name) and len(file.copies) == 2
    optimizer = {"exp_avg": dict(raw), "state": {0: {"exp_avg": torch.zeros(3)}}}
    assert holds(read("y.pt", {"model": raw, "optimizer": optimizer, name: weights}), network)


@pytest.mark.parametrize(
    ("last", "averaged"), [("model.", "ema."), ("net.", "net_ema."), ("online_model.", "ema_model."), ("", "ema.")]
)
def test_averaged_weights_in_one_flat_dictionary(
    read: Load, network: Any, weights: Weights, raw: Weights, last: str, averaged: str
) -> None:
    counters = {"step": torch.tensor(7), "ema_model.initted": torch.tensor(True)}
    assert holds(read("x.safetensors", {**prefixed(last, raw), **prefixed(averaged, weights), **counters}), network)


def test_averages_without_the_networks_names(read: Load, network: Any, weights: Weights, raw: Weights) -> None:
    trained = {name: value for name, value in weights.items() if name != "pos_embed"}
    squeezed = {f"model_ema.diffusion_model{name.replace('.', '')}": value for name, value in trained.items()}
    counted = {**squeezed, "model_ema.decay": torch.tensor(0.99)}
    assert holds(read("ldm.pt", {"state_dict": {**prefixed("model.diffusion_model.", raw), **counted}}), network)
    listed = {"model": raw, "ema": {"shadow_params": list(trained.values()), "decay": 0.99}}
    assert holds(read("list.pt", listed), network)
    unread = read("other.pt", {"model": raw, "ema": [torch.ones(3)]})
    assert not holds(unread, network) and "not its averaged weights 'ema'" in unread.summary


@pytest.mark.parametrize(
    "averages",
    [
        lambda ema, other: {"ema": (ema, 0.9999)},
        lambda ema, other: {"emas": [{"decay": 0.9999, "module": ema}, {"decay": 0.99}]},
        lambda ema, other: {"ema_0.99": other, "ema_0.9999": ema},
        lambda ema, other: {"ema": {"0.99": other, "0.9999": ema}},
    ],
    ids=["tuple", "list", "two names", "two decays"],
)
def test_the_one_or_the_longest_average_counts(
    read: Load, network: Any, weights: Weights, raw: Weights, averages: Callable[[Weights, Weights], dict[str, Any]]
) -> None:
    assert holds(read("x.pt", {"model": raw, **averages(weights, raw)}), network)


def test_averages_of_which_none_is_the_one_are_named(read: Load, network: Any, weights: Weights, raw: Weights) -> None:
    file = read("x.pt", {"model": weights, "emas": [raw, raw]})
    assert holds(file, network)
    assert "but not its averaged weights 'emas', a list of 2: to use one, save it in a file of its own" in file.summary


def test_the_log_says_which_copy_was_taken(
    tmp_path: Path, weights: Weights, raw: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="fovea")
    load_dit(write(tmp_path / "x.pt", {"model": raw, "net_ema": weights}))
    assert "weights: 'net_ema' (the file also has 'model')" in caplog.text


@pytest.mark.parametrize(
    "part", ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module."]
)
def test_wrappers_mean_nothing_wherever_they_stand(read: Load, network: Any, weights: Weights, part: str) -> None:
    inside = {re.sub(r"^(blocks\.\d+\.)", rf"\g<1>{part}", name): value for name, value in weights.items()}
    assert holds(read("inside.safetensors", inside), network)
    assert holds(read("front.pt", {"ema": prefixed(f"module.{part}", weights)}), network)


def test_a_dictionary_that_contains_itself_is_read(read: Load, network: Any, weights: Weights) -> None:
    loop: dict[str, Any] = {"ema": weights}
    loop["args"] = loop
    for name in "abc":
        loop[name] = loop
    assert holds(read("loop.pt", loop), network)


# --- precision and parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_precision_loads_and_samples(tmp_path: Path, weights: Weights, dtype: torch.dtype) -> None:
    cast = {name: value.to(dtype) for name, value in weights.items()}
    model = load_dit(write(tmp_path / "all.safetensors", cast))
    assert torch.isfinite(sample(model, labels(3), steps=1)).all()
    back = {name: value.float() for name, value in cast.items()}
    assert dit_files.read_dit(write(tmp_path / "back.safetensors", back)).grid is not None


def test_scaled_float8_is_what_it_stands_for(read: Load, network: Any, weights: Weights) -> None:
    kept = {name: value for name, value in weights.items() if ".mlp.fc1.weight" not in name}
    scaled = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name in weights.keys() - kept.keys():
        scale = weights[name].abs().max() / 448
        scaled |= {name: (weights[name] / scale).to(torch.float8_e4m3fn), name.replace("weight", "scale_weight"): scale}
    file = read("scaled.safetensors", {**kept, **scaled})
    for name, value in network.state_dict().items():
        assert (file.weights[name].float() - value).abs().max() <= 0.07 * value.abs().max(), name


def test_shards_are_one_file(tmp_path: Path, network: Any, weights: Weights) -> None:
    names = list(weights)
    paths = [
        write(tmp_path / f"model-0000{part + 1}-of-00002.safetensors", {name: weights[name] for name in names[part::2]})
        for part in (0, 1)
    ]
    assert all(holds(dit_files.read_dit(path), network) for path in paths)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../../" + Path(paths[0]).name)}))
    assert holds(dit_files.read_dit(str(index)), network), "a name leads nowhere but to its own folder"
    Path(paths[1]).unlink()
    with pytest.raises(ValueError, match=r"one of several files .*needs all 2 .*Missing: model-00002-of-00002\.safetensors"):
        dit_files.read_dit(paths[0])


def test_a_folder_of_diffusers(tmp_path: Path, node_classes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "DiT-XL-2-256" / "transformer"
    folder.mkdir(parents=True)
    path = write(folder / "diffusion_pytorch_model.safetensors", diffusers_network().state_dict())
    config = {"_class_name": "DiTTransformer2DModel", "num_embeds_ada_norm": 1000, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps(config))
    assert dit_files.read_dit(path).network["heads"] == dit_files.read_dit(str(folder.parent)).network["heads"] == 4
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusers", ([str(tmp_path)], {"folder"}))
    node = node_classes["DiTLoader"]
    assert node.define_schema().inputs[0].options[-1] == "DiT-XL-2-256/"
    assert isinstance(node.execute("DiT-XL-2-256/")[0].model, dit_host.DiTModel)
    (folder / "config.json").write_text("[1, {")
    assert dit_files.read_dit(path).network["heads"] == 2
    with pytest.raises(ValueError, match="holds no weights"):
        dit_files.read_dit(str(tmp_path))


def test_mapping_into_memory_can_be_forbidden(tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked = write(tmp_path / "x.pt", weights), []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: asked.append(kwargs["mmap"]) or load(*args, **kwargs))
    for forbidden in (False, True):
        monkeypatch.setattr(comfy.utils, "DISABLE_MMAP", forbidden)
        dit_files.read_dit(path)
    assert asked == [True, False]


# --- what the file says of itself -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "prediction"),
    [
        (None, None),
        ("configs/b2.yaml", None),
        (3, None),
        (torch.ones(2), None),
        ({"lr": 1e-4, "model": {"prediction": None}}, None),
        ({"transport": {"prediction": "velocity", "path_type": "Linear"}}, "velocity"),
        (["--model", "SiT-B/2", "--prediction", "velocity"], "velocity"),
        (["--prediction=velocity"], "velocity"),
        ('{"prediction": "velocity"}', "velocity"),
        (argparse.Namespace(lr=1e-4), "epsilon"),
        (argparse.Namespace(best=np.float64(2.5), data=Path("data")), "epsilon"),
    ],
    ids=str,
)
def test_settings_of_any_type(read: Load, weights: Weights, settings: Any, prediction: str | None) -> None:
    assert read("x.pt", {"ema": weights, "args": settings}).prediction == prediction


def test_settings_of_other_libraries_are_data_and_are_not_imported(
    tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes of the libraries' names are only there while the file is written, and would show that they were made again."""
    made: list[object] = []
    module = ModuleType("omegaconf.dictconfig")
    config = type("DictConfig", (), {"__module__": module.__name__, "__setstate__": lambda self, state: made.append(self)})
    module.DictConfig = config  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "omegaconf", ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    settings = config()
    settings.__dict__.update(_content={"transport": {"prediction": {"_val": "velocity"}}}, data=Path("data"))
    path = write(tmp_path / "x.pt", {"ema": weights, "config": settings, "args": argparse.Namespace(results=Path("results"))})
    monkeypatch.delitem(sys.modules, module.__name__)
    assert dit_files.read_dit(path).prediction == "velocity" and made == []


@pytest.mark.parametrize(
    ("rows", "settings", "classes"),
    [
        (1, None, 1),
        (10, argparse.Namespace(num_classes=10), 10),
        (10, {"model": {"class_dropout_prob": 0}}, 10),
        (11, argparse.Namespace(num_classes=10), 10),
        (1000, None, 1000),
        (11, None, 10),
    ],
    ids=str,
)
def test_class_counts_with_and_without_a_null_class(tmp_path: Path, rows: int, settings: Any, classes: int) -> None:
    model = load_dit(write(tmp_path / "x.pt", {"ema": bare(tiny(depth=1, classes=rows - 1)), "args": settings}))
    assert model.model.diffusion_model.classes == classes
    assert torch.isfinite(sample(model, labels(classes - 1), labels(-1), cfg=1.0, steps=1)).all()
    if classes == rows:
        with pytest.raises(ValueError, match="without a null class.*set cfg to 1"):
            sample(model, labels(0), labels(-1), cfg=4.0, steps=1)
        config = model.model.model_config
        saved = config.process_unet_state_dict_for_saving(model.model.diffusion_model.state_dict())
        assert load_dit(write(tmp_path / "saved.safetensors", saved)).model.diffusion_model.classes == classes
    else:
        assert torch.isfinite(sample(model, labels(0), labels(-1), cfg=4.0, steps=1)).all()


def test_a_wide_latent_is_guided_on_all_channels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="fovea")
    model = load_dit(write(tmp_path / "x.safetensors", bare(tiny(depth=1, in_channels=16, out_channels=16))))
    assert "CFG is applied to all 16 channels" in caplog.text
    plain, guided = (sample(model, start=latent(channels=16), cfg=cfg, steps=1) for cfg in (1.000001, 6.0))
    assert ((plain - guided).abs().amax((0, 2, 3)) > 1e-2 * plain.abs().max()).all()


# --- relatives ------------------------------------------------------------------------------------------------------------


def test_repas_sit_loads_without_its_projectors(tmp_path: Path, network: Any, weights: Weights) -> None:
    """Its time counts from image to noise, and its velocity points that way: both are ComfyUI's own."""
    content = {**weights, "projectors.0.0.weight": torch.ones(4, 4), "projectors.0.0.bias": torch.ones(4)}
    model = load_dit(
        write(tmp_path / "SiT-XL-2.pt", {"ema": content, "args": argparse.Namespace(prediction="v", path_type="linear")})
    )
    x, time, y = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.9]), torch.tensor([1, 10])
    with torch.inference_mode():
        assert torch.equal(model.model.diffusion_model(x, time, y=y), network(x, time, y)[:, :4])
    saved = model.model.model_config.process_unet_state_dict_for_saving(model.model.diffusion_model.state_dict())
    again = load_dit(write(tmp_path / "saved.safetensors", saved))
    assert torch.equal(sample(again, labels(1)), sample(model, labels(1)))


def test_whole_numbers_are_not_taken_for_weights(read: Load, weights: Weights) -> None:
    with pytest.raises(ValueError, match=r"quantised to whole numbers.*blocks\.0\.attn\.qkv\.weight"):
        read("int8.safetensors", {**weights, "blocks.0.attn.qkv.weight": torch.ones(384, 128, dtype=torch.int8)})


def renamed(weights: Weights, *pairs: tuple[str, str]) -> Weights:
    for old, new in pairs:
        weights = {name.replace(old, new): value for name, value in weights.items()}
    return weights


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: renamed(w, (".mlp.fc1", ".mlp.w12"), (".mlp.fc2", ".mlp.w3")), ("changed", "w12", "LightningDiT")),
        (lambda w: renamed(w, (".mlp.fc1", ".moe.experts.0.gate_proj")), ("changed", "moe", "mixture of experts")),
        (lambda w: {**w, "omega_embedder.mlp.0.weight": torch.ones(4, 4)}, ("changed", "omega_embedder", "GFT")),
        (lambda w: {**renamed(w, ("blocks.", "en_inblocks.")), "mask_token": torch.ones(1, 1, 4)}, ("MDT",)),
        (lambda w: {**w, "x_embedder.proj.weight": torch.ones(128, 16), "rope.freqs": torch.ones(4)}, ("changed", "FiT")),
        (lambda w: renamed(w, ("x_embedder.", "patch_embed."), ("blocks.", "in_blocks.")), ("U-ViT",)),
        (lambda w: renamed(w, ("x_embedder.proj.", "x_embedder.proj1.")), ("JiT",)),
        (lambda w: prefixed("base_model.model.", renamed(w, ("qkv.", "qkv.base_layer."))), ("base_layer", "merge_and_unload")),
    ],
    ids=["LightningDiT", "MoE", "GFT", "MDT", "FiT", "U-ViT", "JiT", "PEFT"],
)  # fmt: skip
def test_relatives_are_named(read: Load, weights: Weights, change: Callable[[Weights], Weights], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        read("relative.safetensors", change(dict(weights)))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "copy" not in str(error.value).lower() and "damaged" not in str(error.value)


@pytest.mark.parametrize("prefix", ["base_model.model.", "diffusion_model."])
def test_pefts_loras_act_through_comfyuis_own_loader(tmp_path: Path, weights: Weights, prefix: str) -> None:
    model = load_dit(write(tmp_path / "DiT.safetensors", weights))
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=generator) * 0.1 for shape in ((4, 128), (384, 4)))
    lora = {f"{prefix}blocks.1.attn.qkv.lora_A.weight": down, f"{prefix}blocks.1.attn.qkv.lora_B.weight": up}
    plain = sample(model, labels(1))
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)
    changed = {**weights, "blocks.1.attn.qkv.weight": weights["blocks.1.attn.qkv.weight"] + up @ down}
    expected = sample(load_dit(write(tmp_path / "merged.safetensors", changed)), labels(1))
    torch.testing.assert_close(sample(patched, labels(1)), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(sample(model, labels(1)), plain) and not torch.allclose(expected, plain)


def test_nothing_of_the_ancestor_that_names_loras_is_inherited() -> None:
    import comfy.model_base

    own = {name for name, value in vars(comfy.model_base.HunyuanDiT).items() if callable(value)}
    assert own <= vars(dit_host.DiTModel).keys()


def test_a_lora_file_says_what_loads_it(tmp_path: Path) -> None:
    save_file({"base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.ones(4, 4)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="a LoRA.*LoraLoaderModelOnly"):
        load_dit(str(tmp_path / "lora.safetensors"))
