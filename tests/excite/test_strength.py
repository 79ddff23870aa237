"""How strong a subject of several tokens is."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from host_inprocess import host_node
from scenes import evaluate
from tiny_unet import cond, small_model

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def excite(pack):
    import fovea_attention.attention.excite as excite

    return excite


@pytest.fixture(scope="module")
def losses(excite):
    from fovea_attention.attention.excite import losses

    return losses


def prompt_of(excite, *subjects):
    return excite.GuidedPrompt(tuple(excite.Subject(str(p), p) for p in subjects), tuple(range(1, 76)))


def maps_with():
    """Attention of 77 tokens on a grid, all of it on token 40."""
    maps = torch.zeros(1, 16, 16, 77)
    maps[..., 40] = 1.0
    return maps


@pytest.mark.parametrize("tokens", [1, 2, 3, 6])
@pytest.mark.parametrize("shared", [False, True])
def test_a_subject_of_any_number_of_tokens_can_be_fully_present(excite, losses, tokens, shared):
    positions, maps = tuple(range(2, 2 + tokens)), maps_with()
    maps[:, 4:9, 4:9] = 0
    given = positions if shared else positions[:1]
    maps[:, 4:9, 4:9, list(given)] = 1.0 / len(given)
    found = losses.subject_maps(maps, prompt_of(excite, positions), excite.LossSettings())
    assert float(losses.strengths(found)) == pytest.approx(1, abs=1e-3)
    assert float(found.max()) <= 1 + 1e-6


def test_a_long_word_that_is_seen_does_not_draw_the_gradient(excite, losses):
    maps = maps_with()
    maps[:, 2:7, 2:7] = 0
    maps[:, 2:7, 2:7, 2:5] = 1 / 3  # three tokens, everything of 25 places
    maps[:, 10, 10, 40], maps[:, 10, 10, 7] = 0.5, 0.495  # one token, hardly anywhere
    maps.requires_grad_()
    found = losses.subject_maps(maps, prompt_of(excite, (2, 3, 4), (7,)), excite.LossSettings(smoothing=False))
    (gradient,) = torch.autograd.grad(losses.neglect(found).sum(), maps)
    assert float(gradient[:, 10, 10, 7].abs()) > 0
    assert float(gradient[:, 2:7, 2:7].abs().sum()) == 0


def test_phrases_reach_their_thresholds_on_a_trained_model(excite, node_classes, caplog):
    """Two words a subject: the refinements end when all subjects are there."""
    caplog.set_level("INFO", logger="fovea")
    model, clip, _ = evaluate.load()
    with torch.inference_mode():
        positive = node_classes["FoveaPrompt"].execute(clip, "a [red circle] and a [blue square]")[0]
        negative = host_node("CLIPTextEncode")(clip, "")[0]
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 8)
        noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))

        settings = {"cfg": 5.0, "attention_grid": 16, "layers": "output", "guide_until": 0.0, "thresholds": "0.7:0.8"}
        guider = node_classes["AttendExciteGuider"].execute(model, positive, negative, **settings)[0]
        euler = comfy.samplers.sampler_object("euler")
        guider.sample(noise, torch.zeros_like(noise), euler, sigmas[:4], disable_pbar=True, seed=1)
    (said,) = (line for line in caplog.messages if line.startswith("Attend-and-Excite"))
    assert "not reached" not in said
    assert int(said.split(" refinements")[0].split()[-1]) < 20


def test_a_threshold_that_is_missed_is_said(node_classes, caplog):
    caplog.set_level("INFO", logger="fovea")
    model = small_model()
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 2)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        settings = {"subjects": "2, 5", "thresholds": "0:0.9", "max_refinements": 1}
        guider = node_classes["AttendExciteGuider"].execute(model, cond(1), cond(2), **settings)[0]
        guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=1)
    said = "thresholds not reached after 1 refinements (the highest possible is 1.00): 0.9 in 2 of 2 images"
    assert said in caplog.text


def test_a_nudge_is_as_far_for_a_phrase_as_for_a_word(losses):
    """The weakest subject alone is moved, by its loss over its tokens; with one token each it is the published loss."""
    subjects = torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(0)) * 0.5
    subjects[0, 1], subjects[1, 2] = subjects[0, 1] / 9, subjects[1, 2] / 9
    expected = torch.stack([(1 - subjects[0, 1].max()) / 2, (1 - subjects[1, 2].max()) / 3])
    torch.testing.assert_close(losses.neglect(subjects, [1, 2, 3]), expected)
    assert torch.equal(losses.neglect(subjects, [1, 1, 1]), losses.neglect(subjects))
