"""What is known of a conditioning whose tensor is gone."""

from __future__ import annotations

import importlib
import json
from types import ModuleType
from typing import Any

import pytest
import tiny_text
import torch

import nodes

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def prompts(pack: ModuleType) -> ModuleType:
    return importlib.import_module(f"{pack.__name__}.attention.prompts")


def encode(text: str, family: str = "sd1") -> Any:
    with torch.inference_mode():
        return nodes.CLIPTextEncode().encode(tiny_text.tiny(family), text)[0]


@pytest.mark.parametrize("family", ["sd1", "sdxl", "flux", "qwen-image"])
def test_a_fingerprint_is_of_the_words_and_not_of_how_they_are_stored(prompts: ModuleType, family: str) -> None:
    clip, rows = tiny_text.tiny(family), encode("a red cat", family)[0][0]
    known = {prompts.encoded_fingerprint(rows.to(dtype)) for dtype in (torch.float32, torch.float64)}
    assert len(known) == 1
    for stored in (rows, rows.half(), rows.bfloat16(), rows * 1.5, rows + 0.01 * rows.std() * torch.randn(rows.shape)):
        entry = json.loads(json.dumps({prompts.FINGERPRINT: prompts.encoded_fingerprint(stored)}))
        (info,) = prompts.prompt_infos([entry], clip, "a red cat")
        assert info.length == rows.shape[1]
        with pytest.raises(ValueError, match="'text'"):
            prompts.prompt_infos([entry], clip, "a cat red")


def test_a_recording_without_fingerprint_is_believed(prompts: ModuleType) -> None:
    (info,) = prompts.prompt_infos([{prompts.METADATA: None}], tiny_text.tiny("sd1"), "a cat")
    assert info.tokens.find("cat")[0].positions == (2,)
    with pytest.raises(ValueError, match="Prompt with Subjects"):
        prompts.prompt_infos([{}])


def test_what_is_recorded_of_joined_prompts_needs_no_tensor(prompts: ModuleType, node_classes: dict[str, Any]) -> None:
    clip = tiny_text.tiny("sd1")
    one, two = (node_classes["FoveaPrompt"].execute(clip, text)[0] for text in ("a [cat]", "a [blue frog]"))
    ((rows, options),) = nodes.ConditioningConcat().concat(one, two)[0]
    recorded = json.loads(json.dumps(prompts.known_metadata([rows, options])))
    (info,) = prompts.prompt_infos([{prompts.METADATA: recorded, prompts.FINGERPRINT: prompts.encoded_fingerprint(rows)}])
    assert [(subject.word, subject.positions) for subject in info.subjects] == [("cat", (2,)), ("blue frog", (79, 80))]
    assert prompts.known_metadata(one[0]) == one[0][1][prompts.METADATA]
    assert prompts.known_metadata(encode("a dog nobody marked")[0]) is None
