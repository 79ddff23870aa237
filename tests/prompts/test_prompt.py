"""The "Prompt with Subjects" node with ComfyUI's own nodes before and after it."""

from __future__ import annotations

import copy
import importlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.controlnet
import comfy.hooks
import pytest
import tiny_text
import tiny_unet
import torch

TEXT = "a [cat] and a (shiny [red frog]:1.2)"
PLAIN = "a cat and a (shiny red frog:1.2)"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def forget_encoders() -> Iterator[None]:
    """Freed while ComfyUI is still there: its objects complain when the interpreter takes them down."""
    yield
    tiny_text.tiny.cache_clear()


@pytest.fixture(scope="module")
def tokens(pack: ModuleType) -> ModuleType:
    return importlib.import_module(f"{pack.__name__}.attention.prompts")


@pytest.fixture(scope="module")
def node(pack: ModuleType) -> Any:
    return importlib.import_module(f"{pack.__name__}.nodes.prompt").FoveaPrompt


@pytest.fixture(scope="module")
def prompt(node: Any) -> Callable[..., tiny_unet.Conditioning]:
    def encode(text: str = TEXT, family: str = "sd1") -> tiny_unet.Conditioning:
        return node.execute(tiny_text.tiny(family), text)[0]

    return encode


@pytest.fixture(scope="module")
def core() -> ModuleType:
    return importlib.import_module("nodes")


def assert_same(one: Any, two: Any) -> None:
    assert type(one) is type(two)
    if torch.is_tensor(one):
        assert torch.equal(one, two)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for name in one:
            assert_same(one[name], two[name])
    else:
        assert one == two


# --- the node itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd2", "flux", "qwen-image", "lumina2", "hunyuan-dit"])
def test_the_output_is_that_of_clip_text_encode(
    tokens: ModuleType, core: ModuleType, prompt: Callable[..., Any], family: str
) -> None:
    theirs = core.CLIPTextEncode().encode(tiny_text.tiny(family), PLAIN)[0]
    ours = prompt(TEXT, family)
    (info,) = tokens.prompt_infos(ours)
    assert [place.word for place in info.subjects] == ["cat", "red frog"]
    assert [place.positions for place in info.subjects] == [info.tokens.find(w)[0].positions for w in ("cat", "red frog")]
    without = [[rows, {name: value for name, value in options.items() if name != tokens.METADATA}] for rows, options in ours]
    assert_same(without, theirs)


def test_each_part_of_a_clip_schedule_is_described(tokens: ModuleType, core: ModuleType, node: Any) -> None:
    hooks = comfy.hooks.create_hook_lora({}, 1.0, 1.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    keyframes.add(comfy.hooks.HookKeyframe(1.0, start_percent=0.0))
    keyframes.add(comfy.hooks.HookKeyframe(0.5, start_percent=0.5))
    hooks.set_keyframes_on_hooks(keyframes)
    set_hooks = importlib.import_module("comfy_extras.nodes_hooks").SetClipHooks()
    (clip,) = set_hooks.apply_hooks(tiny_text.FAMILIES["sd1"].build(), True, True, hooks)
    ours, theirs = node.execute(clip, TEXT)[0], core.CLIPTextEncode().encode(clip, PLAIN)[0]
    assert len(ours) == len(theirs) == 2
    assert all(torch.equal(one[0], two[0]) for one, two in zip(ours, theirs, strict=True))
    assert [entry[1]["clip_start_percent"] for entry in ours] == [0.0, 0.5]
    assert [info.subjects[0].positions for info in tokens.prompt_infos(ours)] == [(2,), (2,)]


def test_what_is_wrong_is_said_at_once(node: Any) -> None:
    clip = tiny_text.tiny("sd1")
    for text, message in (
        ("a [cat", "never closed"),
        ("a [] cat", "marks no subject"),
        ("[a [cat]]", "inside another"),
        ("a cat]", "never opened"),
        ("a cat [()]", "is not in the prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            node.execute(clip, text)
    with pytest.raises(ValueError, match="'clip' is empty"):
        node.execute(None, "a cat")


def test_an_unknown_encoder_still_encodes(
    tokens: ModuleType, node: Any, core: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    clip = tiny_text.FAMILIES["sd1"].build()
    clip.cond_stage_model.projection = torch.nn.Linear(32, 32)
    with caplog.at_level(logging.WARNING, logger="fovea"):
        encoded = node.execute(clip, TEXT)[0]
    assert torch.equal(encoded[0][0], core.CLIPTextEncode().encode(clip, PLAIN)[0][0][0])
    assert "cannot be found in the output of this text encoder" in caplog.text
    with pytest.raises(tokens.UnknownEncoder):
        tokens.prompt_infos(encoded)


def test_the_schema(node: Any) -> None:
    schema = node.GET_SCHEMA()
    assert (schema.node_id, schema.display_name, schema.category) == ("FoveaPrompt", "Prompt with Subjects", "Fovea")
    assert [field.id for field in schema.inputs] == ["clip", "text"]
    assert schema.description and all(field.tooltip for field in [*schema.inputs, *schema.outputs])
    described = node.GET_NODE_INFO_V1()
    assert described["input"]["required"]["text"][1]["dynamicPrompts"] is True
    assert described["output"] == ["CONDITIONING"]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_translation_names_what_the_node_has(node: Any, language: str) -> None:
    schema = node.GET_SCHEMA()
    entry = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))[schema.node_id]
    assert entry["display_name"] and entry["description"]
    assert entry["inputs"].keys() == {field.id for field in schema.inputs}
    assert all(field["name"] and field["tooltip"] for field in [*entry["inputs"].values(), *entry["outputs"].values()])
    assert entry["outputs"].keys() == {"0"}
    if language == "en":
        assert [entry["inputs"][field.id]["tooltip"] for field in schema.inputs] == [field.tooltip for field in schema.inputs]
        assert (entry["display_name"], entry["description"]) == (schema.display_name, schema.description)


# --- ComfyUI's nodes behind it ---------------------------------------------------------------------------------------


def _control_net() -> comfy.controlnet.ControlNet:
    return comfy.controlnet.ControlNet(torch.nn.Linear(1, 1), load_device=torch.device("cpu"))


def _extra(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"comfy_extras.nodes_{module}"), name)


IMAGE = torch.rand(1, 64, 64, 3)
MASK = torch.ones(1, 64, 64)

AFTER: dict[str, Callable[[ModuleType, Any, Any], Any]] = {
    "ControlNetApply": lambda core, cond, other: core.ControlNetApply().apply_controlnet(cond, _control_net(), IMAGE, 0.8)[0],
    "ControlNetApplyAdvanced": lambda core, cond, other: core.ControlNetApplyAdvanced().apply_controlnet(
        cond, other, _control_net(), IMAGE, 0.8, 0.0, 1.0
    )[0],
    "ConditioningSetArea": lambda core, cond, other: core.ConditioningSetArea().append(cond, 64, 64, 0, 0, 1.0)[0],
    "ConditioningSetAreaPercentage": lambda core, cond, other: core.ConditioningSetAreaPercentage().append(
        cond, 0.5, 0.5, 0.0, 0.0, 1.0
    )[0],
    "ConditioningSetAreaStrength": lambda core, cond, other: core.ConditioningSetAreaStrength().append(cond, 0.7)[0],
    "ConditioningSetMask": lambda core, cond, other: core.ConditioningSetMask().append(cond, MASK, "default", 1.0)[0],
    "ConditioningSetTimestepRange": lambda core, cond, other: core.ConditioningSetTimestepRange().set_range(cond, 0.1, 0.9)[0],
    "ConditioningZeroOut": lambda core, cond, other: core.ConditioningZeroOut().zero_out(cond)[0],
    "ConditioningConcat": lambda core, cond, other: core.ConditioningConcat().concat(cond, other)[0],
    "ConditioningAverage": lambda core, cond, other: core.ConditioningAverage().addWeighted(cond, other, 0.7)[0],
    "unCLIPConditioning": lambda core, cond, other: core.unCLIPConditioning().apply_adm(cond, object(), 1.0, 0.0)[0],
    "FluxGuidance": lambda core, cond, other: _extra("flux", "FluxGuidance").execute(cond, 3.5)[0],
    "ConditioningSetProperties": lambda core, cond, other: _extra("hooks", "ConditioningSetProperties")().set_properties(
        cond, 1.0, "default", mask=MASK
    )[0],
    "ReferenceLatent": lambda core, cond, other: _extra("edit_model", "ReferenceLatent").execute(
        cond, {"samples": torch.zeros(1, 4, 8, 8)}
    )[0],
    "StyleModelApply": lambda core, cond, other: core.StyleModelApply().apply_stylemodel(
        cond, StyleModel(), object(), 1.0, "multiply"
    )[0],
}


class StyleModel:
    """Stands for a Redux model: image tokens that are joined behind the text."""

    def get_cond(self, clip_vision_output: object) -> torch.Tensor:
        return torch.randn(1, 9, 32)


@pytest.mark.parametrize("name", AFTER)
def test_words_survive_the_hosts_conditioning_nodes(
    tokens: ModuleType, core: ModuleType, prompt: Callable[..., Any], name: str
) -> None:
    before = prompt()
    kept = copy.deepcopy(before[0][1][tokens.METADATA])
    changed = AFTER[name](core, before, prompt("something else"))
    (info,) = tokens.prompt_infos(changed)
    words = [] if name == "ConditioningZeroOut" else [("cat", (2,)), ("red frog", (6, 7))]  # zeros say nothing of the prompt
    assert [(place.word, place.positions) for place in info.subjects] == words
    assert info.length == changed[0][0].shape[1]
    assert before[0][1][tokens.METADATA] == kept


def test_combined_prompts_keep_their_own_words(tokens: ModuleType, core: ModuleType, prompt: Callable[..., Any]) -> None:
    combined = core.ConditioningCombine().combine(prompt("a [cat]"), prompt("a blue [chair]"))[0]
    assert [info.subjects[0].word for info in tokens.prompt_infos(combined)] == ["cat", "chair"]
    paired = _extra("hooks", "PairConditioningCombine")().combine(
        prompt("a [cat]"), prompt("x"), prompt("a blue [chair]"), prompt("y")
    )
    assert [info.subjects[0].word for info in tokens.prompt_infos(paired[0])] == ["cat", "chair"]


def test_joined_prompts_have_the_words_of_both(tokens: ModuleType, core: ModuleType, prompt: Callable[..., Any]) -> None:
    joined = core.ConditioningConcat().concat(prompt("a [cat]"), prompt("a blue [chair]"))[0]
    (info,) = tokens.prompt_infos(joined)
    assert (info.length, [place.word for place in info.subjects]) == (154, ["cat", "chair"])
    assert info.subjects[1].positions == (77 + 3,)
    plain = core.CLIPTextEncode().encode(tiny_text.tiny("sd1"), "a photo")[0]
    (info,) = tokens.prompt_infos(core.ConditioningConcat().concat(plain, prompt("a [cat]"))[0])
    assert [(place.word, place.positions) for place in info.subjects] == [("cat", (77 + 2,))]
    with pytest.raises(ValueError, match="Prompt with Subjects"):
        tokens.prompt_infos(core.ConditioningConcat().concat(plain, plain)[0])


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_sampling_takes_no_notice(core: ModuleType, node: Any) -> None:
    clip = tiny_text.FAMILIES["sd1"].build(clip_l_model_config={**tiny_text.CLIP_CONFIG, "hidden_size": tiny_unet.CONTEXT})
    model = tiny_unet.small_model()
    with torch.inference_mode():
        ours, theirs = node.execute(clip, TEXT)[0], core.CLIPTextEncode().encode(clip, PLAIN)[0]
        long_negative = node.execute(clip, "ugly, " * 60)[0]
    area = core.ConditioningSetArea()
    for first, second in ((ours, theirs), (area.append(ours, 64, 64, 32, 0, 1.0)[0], area.append(theirs, 64, 64, 32, 0, 1.0)[0])):
        one = tiny_unet.sample(model, first, long_negative, steps=2)
        two = tiny_unet.sample(model, second, long_negative, steps=2)
        assert torch.equal(one, two)
        assert one.isfinite().all()
