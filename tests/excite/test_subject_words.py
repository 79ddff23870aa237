"""Subjects as people name them: lists, positions, joined prompts, and prompts that other encoders made."""

from __future__ import annotations

import pytest
import tiny_text
import torch
from host_inprocess import host_node
from scenes import evaluate

import nodes

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def excite(pack):
    import fovea_attention.attention.excite as excite

    return excite


@pytest.fixture(scope="module")
def prompt(node_classes):
    return lambda text, family="sd1": node_classes["FoveaPrompt"].execute(tiny_text.tiny(family), text)[0]


@pytest.fixture
def found(excite):
    """Name and positions of every subject, for each entry of the prompt."""

    def find(conditioning, subjects="", clip=None, text=""):
        with torch.inference_mode():
            guided = excite.guided_prompts(conditioning, subjects, clip, text)
        return [[(s.name, s.positions) for s in prompt.subjects] if prompt else None for prompt in guided]

    return find


def clip_encode(text, family="sd1"):
    with torch.inference_mode():
        return nodes.CLIPTextEncode().encode(tiny_text.tiny(family), text)[0]


CAT_AND_FROG = [[("cat", (2,)), ("frog", (5,))]]


@pytest.mark.parametrize("subjects", ["cat, frog", "cat，frog", "cat; frog", "(cat:1.2)\nfrog", "[cat], ((frog)),"])
def test_lists_as_they_are_typed(found, prompt, subjects):
    assert found(prompt("a cat and a frog"), subjects) == CAT_AND_FROG


def test_token_positions_alone_in_groups_and_beside_words(found, prompt):
    conditioning = prompt("a red cat and a frog")
    assert found(conditioning, "2+3, 6") == [[("red+cat", (2, 3)), ("frog", (6,))]]
    assert found(conditioning, "3, frog") == [[("cat", (3,)), ("frog", (6,))]]
    assert found(prompt("2 cats and 3 dogs"), "2, dogs") == [[("2", (1,)), ("dogs", (5,))]]
    with pytest.raises(ValueError, match="position 77 is outside"):
        found(conditioning, "2+77")
    with pytest.raises(ValueError, match=r"subjects: Square brackets mark subjects here"):
        found(conditioning, "[cat:0.8]")


def test_words_of_all_joined_prompts_are_at_their_rows(found, prompt):
    one, two, three = prompt("a [cat]"), prompt("a blue [frog]"), clip_encode("a dog")
    concat = nodes.ConditioningConcat().concat
    joined = concat(one, two)[0]
    assert found(joined) == [[("cat", (2,)), ("frog", (80,))]]
    assert found(concat(joined, one)[0]) == [[("cat#1", (2,)), ("frog", (80,)), ("cat#2", (156,))]]
    assert found(concat(three, two)[0]) == [[("frog", (80,))]]
    nested = concat(one, concat(three, two)[0])[0]
    assert found(nested) == [[("cat", (2,)), ("frog", (157,))]]
    clip = tiny_text.tiny("sd1")
    assert found(nested, "cat, dog, frog", clip, "a dog") == [[("cat", (2,)), ("dog", (79,)), ("frog", (157,))]]
    plain = concat(clip_encode("a cat"), three)[0]
    assert found(plain, "cat, dog", clip, "a cat BREAK a dog") == [[("cat", (2,)), ("dog", (79,))]]


def test_rows_of_an_image_behind_the_prompt_move_nothing(found, prompt):
    ((rows, options),) = prompt("a [cat]")
    assert found([[torch.cat([rows, torch.rand(1, 16, rows.shape[-1])], 1), options]]) == [[("cat", (2,))]]


def test_a_typed_prompt_must_be_the_one_that_was_encoded(found, prompt):
    clip, encoded = tiny_text.tiny("sd1"), clip_encode("a cat and a frog")
    assert found(encoded, "cat, frog", clip, "a cat and a frog") == CAT_AND_FROG
    assert found(encoded, "", clip, "a [cat] and a [frog]") == CAT_AND_FROG
    bracketed = clip_encode("a [cat] and a frog")
    assert found(bracketed, "", clip, "a [cat] and a frog") == [[("cat", (3,))]]  # its brackets are tokens
    halved = [[(encoded[0][0] * 0.5).half(), {}]]
    assert found(halved, "cat, frog", clip, "a cat and a frog") == CAT_AND_FROG
    for other in ("a frog and a cat", "a big fluffy cat and a frog", "a cat and a frog."):
        with pytest.raises(ValueError, match="not the prompt that was encoded"):
            found(encoded, "cat", clip, other)
    with pytest.raises(ValueError, match="not the prompt that was encoded"):
        found(prompt("a cat and a frog"), "cat", clip, "a dog and a cat")


def test_two_texts_of_sdxl_are_refused_and_one_is_not(found):
    clip = tiny_text.tiny("sdxl")
    encode = host_node("CLIPTextEncodeSDXL", "comfy_extras.nodes_clip_sdxl")
    size = 1024, 1024, 0, 0, 1024, 1024
    with torch.inference_mode():
        same = encode(clip, *size, "a cat and a frog", "a cat and a frog")[0]
        two = encode(clip, *size, "a cat and a frog", "a frog and a cat")[0]
    assert found(same, "cat, frog", clip, "a cat and a frog") == CAT_AND_FROG
    with pytest.raises(ValueError, match="not the prompt that was encoded"):
        found(two, "cat, frog", clip, "a cat and a frog")


def test_rows_of_an_image_before_the_text_are_refused(found):
    clip = tiny_text.tiny("qwen-image")
    ((rows, _),) = clip_encode("make the cat blue", "qwen-image")
    edit = [[torch.cat([torch.rand(1, 16, rows.shape[-1]), rows + 0.2 * torch.randn(rows.shape)], 1), {}]]
    with pytest.raises(ValueError, match="image-edit encoders"):
        found(edit, "cat", clip, "make the cat blue")


def test_a_zeroed_prompt_has_no_words(found, prompt):
    zeroed = nodes.ConditioningZeroOut().zero_out(prompt("a [cat]"))[0]
    for subjects, said in (("", "zeroed out"), ("cat", "no words"), ("2", "zeroed out")):
        with pytest.raises(ValueError, match=said):
            found(zeroed, subjects)


def test_a_prompt_that_another_node_changed_is_noted_or_refused(node_classes, found, caplog):
    model, clip, _ = evaluate.load()
    with torch.inference_mode():
        one, other, negative = (
            node_classes["FoveaPrompt"].execute(clip, text)[0] for text in ("a [green star]", "a red [circle]", "")
        )
        guided = node_classes["FoveaAttendExcite"].execute(model, thresholds="", guide_until=1.0)[0]
    average = nodes.ConditioningAverage().addWeighted
    k_sampler = host_node("KSampler")

    def sample(positive):
        caplog.clear()
        with torch.inference_mode(), caplog.at_level("INFO", logger="fovea"):
            k_sampler(guided, 1, 1, 4.0, "euler", "normal", positive, negative, {"samples": torch.zeros(2, 3, 16, 16)})
        return caplog.text

    for strength, noted in ((1.0, False), (0.6, True), (0.3, True)):
        said = sample(average(one, other, strength)[0])
        assert "Attend-and-Excite: 1 guided steps" in said and ("another node changed the prompt" in said) == noted
    each_image = [[torch.cat([one[0][0], other[0][0]]), one[0][1]]]
    for changed, said in ((average(one, other, 0.0)[0], "replaced the prompt"), (each_image, "different prompt for each image")):
        with pytest.raises(ValueError, match=f"Attend-and-Excite.*{said}"):
            sample(changed)
        with pytest.raises(ValueError, match=said):
            node_classes["AttendExciteGuider"].execute(model, changed, negative)
        assert found(changed, "2+3") == [[("token 2+token 3", (2, 3))]]  # places that were named need no words
    same = [[torch.cat([one[0][0], one[0][0]]), one[0][1]]]
    assert "another node" not in sample(same)
