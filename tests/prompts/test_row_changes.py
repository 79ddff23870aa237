"""Prompts whose rows another node has changed since they were encoded: mixed with others, replaced, one for each image."""

from __future__ import annotations

import importlib
import json
from types import ModuleType
from typing import Any

import comfy.hooks
import pytest
import tiny_text
import torch
from host_inprocess import host_node
from scenes import evaluate

import nodes

STAR, CIRCLE = "a [green star] and a yellow triangle", "a [red circle] and a [blue square]"


@pytest.fixture(scope="module")
def prompts(pack: ModuleType) -> ModuleType:
    return importlib.import_module(f"{pack.__name__}.attention.prompts")


@pytest.fixture(scope="module")
def prompt(node_classes: dict[str, Any]) -> Any:
    """Encodes with the demo model's encoder, or another one."""

    @torch.inference_mode()
    def encode(text: str, clip: Any = None) -> Any:
        return node_classes["FoveaPrompt"].execute(clip or evaluate.load()[1], text)[0]

    return encode


def average(one: Any, other: Any, strength: float) -> Any:
    return nodes.ConditioningAverage().addWeighted(one, other, strength)[0]


def recorded(prompts: ModuleType, conditioning: Any) -> list[dict[str, Any]]:
    """What a file of maps keeps of it."""
    kept = [(prompts.known_metadata(entry), prompts.encoded_fingerprint(entry[0])) for entry in conditioning]
    return json.loads(json.dumps([{prompts.METADATA: known, prompts.FINGERPRINT: told} for known, told in kept]))


@pytest.mark.parametrize(("one", "other"), [(STAR, CIRCLE), (CIRCLE, STAR), (STAR, "a [red circle]"), ("a [green star]", CIRCLE)])
def test_words_of_a_mixed_prompt_are_known_as_far_as_they_are_there(
    prompts: ModuleType, prompt: Any, one: str, other: str
) -> None:
    words = prompts.prompt_infos(prompt(one))[0].subjects
    for strength in (0.0, 0.3, 0.6, 0.9, 1.0):
        mixed = average(prompt(one), prompt(other), strength)
        for known in (mixed, [[mixed[0][0].half(), mixed[0][1]]], recorded(prompts, mixed)):
            if strength == 0:
                with pytest.raises(prompts.UnknownEncoder, match="replaced the prompt.*'conditioning_to'"):
                    prompts.prompt_infos(known)
            else:
                (info,) = prompts.prompt_infos(known)
                assert info.subjects == words and ("'conditioning_to'" in info.note) == (strength < 1)


def test_a_part_of_joined_prompts_may_be_mixed(prompts: ModuleType, prompt: Any) -> None:
    concat = nodes.ConditioningConcat().concat
    for strength, noted in ((0.5, True), (1.0, False)):
        joined = concat(average(prompt(STAR), prompt(CIRCLE), strength), prompt("a [red circle]"))[0]
        for known in (joined, recorded(prompts, joined)):
            (info,) = prompts.prompt_infos(known)
            assert [subject.word for subject in info.subjects] == ["green star", "red circle"] and bool(info.note) == noted
    with pytest.raises(ValueError, match="replaced the prompt"):
        prompts.prompt_infos(concat(average(prompt(STAR), prompt(CIRCLE), 0.0), prompt("a [red circle]"))[0])


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux", "qwen-image", "wan", "hunyuan-dit"])
def test_nothing_is_said_of_rows_that_are_what_was_encoded(prompts: ModuleType, prompt: Any, family: str) -> None:
    ((rows, options),) = prompt("a [cat] and a (red [frog]:1.3)", tiny_text.tiny(family))
    for kept in (
        rows, rows.half(), rows.bfloat16(), rows.double(), rows * 0.3, rows.repeat(3, 1, 1),
        rows.repeat(2, 1, 1) * torch.tensor([1.0, 1.003]).view(-1, 1, 1),
    ):  # fmt: skip
        for known in ([[kept, options]], recorded(prompts, [[kept, options]])):
            (info,) = prompts.prompt_infos(known)
            assert [subject.word for subject in info.subjects] == ["cat", "frog"] and not info.note
    before = {name: value for name, value in options[prompts.METADATA].items() if name != "encoded"}  # of an older version
    assert not prompts.prompt_infos([[rows + torch.randn_like(rows), {**options, prompts.METADATA: before}]])[0].note


def test_clip_skip_and_noise_do_not_replace_a_prompt(prompts: ModuleType, prompt: Any) -> None:
    ((rows, options),) = prompt(STAR, nodes.CLIPSetLastLayer().set_last_layer(evaluate.load()[1], -2)[0])
    assert not prompts.prompt_infos([[rows, options]])[0].note
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)) * rows.std()
    for strength in (0.1, 0.3):
        assert "changed the prompt" in prompts.prompt_infos([[rows + strength * noise, options]])[0].note
    zeroed = nodes.ConditioningZeroOut().zero_out([[rows, options]])[0]
    for known in (zeroed, recorded(prompts, zeroed)):
        assert not prompts.prompt_infos(known)[0].tokens.words()


def test_a_schedule_of_loras_is_no_change(prompts: ModuleType, prompt: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    lora = {f"{name}.lora_{part}.weight": torch.randn(32, 32, generator=generator) for part in ("up", "down")}
    hooks, keyframes = comfy.hooks.create_hook_lora(lora, 1.0, 1.0), comfy.hooks.HookKeyframeGroup()
    for strength, start in ((1.0, 0.0), (0.0, 0.5)):
        keyframes.add(comfy.hooks.HookKeyframe(strength, start_percent=start))
    hooks.set_keyframes_on_hooks(keyframes)
    clip = tiny_text.FAMILIES["sd1"].build(zero_linear=False)
    scheduled = prompt("a [cat] and a frog", host_node("SetClipHooks", "comfy_extras.nodes_hooks")(clip, True, True, hooks)[0])
    assert (scheduled[0][0] - scheduled[1][0]).norm() > 0.1 * scheduled[0][0].norm()
    for known in (scheduled, recorded(prompts, scheduled)):
        assert [(info.subjects[0].word, info.note) for info in prompts.prompt_infos(known)] == [("cat", "")] * 2


def test_a_prompt_for_each_image_is_refused(prompts: ModuleType, prompt: Any) -> None:
    clip = evaluate.load()[1]
    (one, options), (other, _) = prompt(STAR)[0], prompt(CIRCLE)[0]
    for carried, typed in ((options, ()), ({}, (clip, STAR)), ({}, ())):
        batch = [[torch.cat([one, other]), carried]]
        for known in (batch, recorded(prompts, batch)):
            with pytest.raises(prompts.UnknownEncoder, match="different prompt for each image"):
                prompts.prompt_infos(known, *typed)
        assert prompts.prompt_infos([[torch.cat([one, one]), carried or options]], *typed)
