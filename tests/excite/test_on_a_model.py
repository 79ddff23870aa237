"""Attend-and-Excite on a MODEL: KSampler and its kin do what the guider does, bit by bit."""

from __future__ import annotations

import comfy.model_management
import comfy.samplers
import pytest
import torch
from host_inprocess import host_node
from leftovers import snapshot
from scenes import evaluate
from tiny_unet import cond, small_model

pytestmark = pytest.mark.newest

STEPS, SEED = 4, 3
BRIEF = {"subjects": "2, 5", "max_refinements": 1, "scale_factor": 200.0}


def start(batch=1, **more):
    return {"samples": torch.zeros(batch, 4, 12, 12), **more}


@torch.inference_mode()
def with_k_sampler(model, positive, negative, latent, sampler="euler", steps=STEPS, cfg=7.5, **settings):
    return host_node("KSampler")(
        model=model, seed=SEED, steps=steps, cfg=cfg, sampler_name=sampler, scheduler="normal", positive=positive,
        negative=negative, latent_image=latent, denoise=1.0, **settings,
    )[0]["samples"]  # fmt: skip


@torch.inference_mode()
def with_guider(guider, model, latent, sampler="euler", steps=STEPS):
    run = evaluate.sampling_node
    return run(
        "SamplerCustomAdvanced", noise=run("RandomNoise", noise_seed=SEED), guider=guider, latent_image=latent,
        sampler=run("KSamplerSelect", sampler_name=sampler),
        sigmas=run("BasicScheduler", model=model, scheduler="normal", steps=steps, denoise=1.0),
    )["samples"]  # fmt: skip


@pytest.fixture
def both(node_classes):
    """The same run with the node on a MODEL in KSampler, and with the guider."""

    def sample(model, positive, negative, latent, sampler="euler", cfg=7.5, steps=STEPS, **settings):
        with torch.inference_mode():
            guided = node_classes["FoveaAttendExcite"].execute(model, **settings)[0]
            guider = node_classes["AttendExciteGuider"].execute(model, positive, negative, cfg=cfg, **settings)[0]
        ours = with_k_sampler(guided, positive, negative, latent, sampler, steps, cfg)
        return ours, with_guider(guider, model, latent, sampler, steps)

    return sample


def test_equals_the_guider_on_a_trained_model(both, node_classes):
    model, clip, _ = evaluate.load()
    with torch.inference_mode():
        positive = node_classes["FoveaPrompt"].execute(clip, "a [red circle] and a [blue square] and a white [star]")[0]
        negative = host_node("CLIPTextEncode")(clip, "")[0]
        latent = host_node("EmptyLatentImage")(width=256, height=256, batch_size=1)[0]
    settings = {"attention_grid": 16, "layers": "output", "max_refinements": 3}
    ours, guider = both(model, positive, negative, latent, cfg=5.0, steps=6, **settings)
    assert torch.equal(ours, guider)
    plain = with_k_sampler(model, positive, negative, latent, steps=6, cfg=5.0)
    assert (ours - plain).abs().max() > 1e-2


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m_sde", "ddim"])
def test_equals_the_guider_with_every_kind_of_sampler(both, sampler):
    ours, guider = both(small_model(), cond(1), cond(2), start(), sampler, **BRIEF)
    assert torch.equal(ours, guider)


def test_equals_the_guider_with_batches_masks_areas_and_cfg_one(both, node_classes):
    area = host_node("ConditioningSetArea")(cond(4), 64, 64, 0, 0, 1.0)[0]
    mask = torch.zeros(1, 12, 12)
    mask[:, :6] = 1
    for positive, latent, cfg in (
        (cond(1), start(2), 7.5),
        (cond(1), start(noise_mask=mask), 7.5),
        ([*cond(1), *area], start(), 7.5),
        (cond(1), start(), 1.0),
    ):
        ours, guider = both(small_model(), positive, cond(2), latent, cfg=cfg, **BRIEF)
        assert torch.equal(ours, guider)
    gated = node_classes["TGateCache"].execute(small_model(), gate_at=0.5)[0]
    ours, guider = both(gated, cond(1), cond(2), start(), **BRIEF)
    assert torch.equal(ours, guider)


def test_an_area_of_the_negative_prompt(both):
    """ComfyUI then puts a copy of the positive prompt for that area behind the positive ones."""
    negative = host_node("ConditioningSetArea")(cond(2), 48, 48, 0, 0, 1.0)[0]
    ours, guider = both(small_model(), cond(1), [*cond(5), *negative], start(), **BRIEF)
    assert torch.equal(ours, guider)


def test_a_part_of_a_schedule_in_k_sampler_advanced(node_classes):
    model = small_model()
    guided = node_classes["FoveaAttendExcite"].execute(model, **BRIEF)[0]
    inputs = {
        "add_noise": "enable", "noise_seed": SEED, "steps": 8, "cfg": 7.5, "sampler_name": "euler", "scheduler": "normal",
        "positive": cond(1), "negative": cond(2), "latent_image": start(), "start_at_step": 0, "end_at_step": STEPS,
        "return_with_leftover_noise": "enable",
    }  # fmt: skip
    with torch.inference_mode():
        ours = host_node("KSamplerAdvanced")(model=guided, **inputs)[0]["samples"]
        guider = node_classes["AttendExciteGuider"].execute(model, cond(1), cond(2), **BRIEF)[0]
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 8)[: STEPS + 1]
        run = evaluate.sampling_node
        theirs = run(
            "SamplerCustomAdvanced", noise=run("RandomNoise", noise_seed=SEED), guider=guider, sigmas=sigmas,
            sampler=run("KSamplerSelect", sampler_name="euler"), latent_image=start(),
        )["samples"]  # fmt: skip
    assert torch.equal(ours, theirs)


def test_the_node_applied_twice_acts_once_and_the_guider_goes_before(both, node_classes, caplog):
    caplog.set_level("INFO", logger="fovea")
    model = small_model()
    ours, guider = both(model, cond(1), cond(2), start(), **BRIEF)
    before = snapshot(model)
    apply = node_classes["FoveaAttendExcite"].execute
    twice = apply(apply(model, **{**BRIEF, "scale_factor": 900.0})[0], **BRIEF)[0]
    assert torch.equal(with_k_sampler(twice, cond(1), cond(2), start()), ours)
    made = node_classes["AttendExciteGuider"].execute(apply(model, subjects="3")[0], cond(1), cond(2), **BRIEF)[0]
    assert torch.equal(with_guider(made, model, start()), guider)
    assert "Attend-and-Excite (Model): left out, because the Attend-and-Excite Guider guides this run" in caplog.text
    assert snapshot(model) == before


def test_each_run_is_guided_by_its_own_prompt(node_classes, caplog):
    caplog.set_level("INFO", logger="fovea")
    model, clip, _ = evaluate.load()
    latent = {"samples": torch.zeros(1, 3, 32, 32)}
    guided = node_classes["FoveaAttendExcite"].execute(model, max_refinements=0, guide_until=0.5)[0]
    with torch.inference_mode():
        texts = ("a [red circle]", "a [star] and a blue ring", "a star")
        first, second, unmarked = (node_classes["FoveaPrompt"].execute(clip, text)[0] for text in texts)
    with_k_sampler(guided, first, unmarked, latent, steps=2)
    with_k_sampler(guided, second, unmarked, latent, steps=2)
    told = [line for line in caplog.messages if line.startswith("Attend-and-Excite: 1 guided steps")]
    assert ['weakest subject "red circle"' in told[0], 'weakest subject "star"' in told[1]] == [True, True]
    with pytest.raises(ValueError, match=r"^Attend-and-Excite \(Model\): No subjects are given"):
        with_k_sampler(guided, unmarked, first, latent, steps=2)


def test_other_guiders_are_guided_by_their_positive_prompt(node_classes, caplog):
    caplog.set_level("INFO", logger="fovea")
    guided = node_classes["FoveaAttendExcite"].execute(small_model(), subjects="2, 5", thresholds="")[0]
    run = evaluate.sampling_node
    with torch.inference_mode():
        basic = run("BasicGuider", model=guided, conditioning=cond(1))
        dual = {"cond1": cond(1), "cond2": cond(3), "negative": cond(2), "cfg_conds": 4.0, "cfg_cond2_negative": 2.0}
        both_prompts = run("DualCFGGuider", model=guided, style="regular", **dual)
    for guider in (basic, both_prompts):
        with_guider(guider, guided, start(), steps=2)
    assert sum(line.startswith("Attend-and-Excite: 1 guided steps") for line in caplog.messages) == 2


def test_what_cannot_be_guided_is_refused_before_sampling(node_classes, monkeypatch):
    monkeypatch.setattr(comfy.samplers.CFGGuider, "outer_sample", lambda *_, **__: pytest.fail("sampling has begun"))
    guided = node_classes["FoveaAttendExcite"].execute(small_model(), **BRIEF)[0]
    with pytest.raises(ValueError, match=r"^Attend-and-Excite \(Model\): The sampler uni_pc hides its latent"):
        with_k_sampler(guided, cond(1), cond(2), start(), "uni_pc")
    with pytest.raises(ValueError, match=r"^Attend-and-Excite \(Model\): subjects: token position 99"):
        with_k_sampler(node_classes["FoveaAttendExcite"].execute(small_model(), subjects="99")[0], cond(1), cond(2), start())
    for settings, message in (
        ({"thresholds": "0.2"}, "thresholds, entry 1"),
        ({"layers": "output.99"}, "layers names"),
        ({"subjects": "[cat:0.8]"}, "subjects: "),
        ({"kernel_size": 2}, "kernel_size is 2"),
    ):
        with pytest.raises(ValueError, match=message):
            node_classes["FoveaAttendExcite"].execute(small_model(), **settings)


def test_windows_of_attention_distillation_are_refused(pack):
    from fovea_attention.attention import host
    from fovea_attention.attention.excite import ExciteSettings, ExciteTechnique

    model = small_model()
    assert host.needs_whole_latent(comfy.samplers.CFGGuider(model)) is None
    guided = host.attach(model, ExciteTechnique.key, ExciteTechnique(ExciteSettings(), "2"))
    assert "Attend-and-Excite" in host.needs_whole_latent(comfy.samplers.CFGGuider(guided))


class Stopped(Exception):
    pass


@pytest.mark.parametrize("moment", ["error", "interrupt", "out of memory"])
def test_nothing_stays_after_a_failure(node_classes, monkeypatch, moment):
    model = small_model()
    expected = with_k_sampler(model, cond(1), cond(2), start())
    before = snapshot(model)
    guided = node_classes["FoveaAttendExcite"].execute(model, **BRIEF, memory="fast")[0]
    fresh = with_k_sampler(guided, cond(1), cond(2), start())
    interrupted = comfy.model_management.InterruptProcessingException
    error = {"error": Stopped, "interrupt": interrupted, "out of memory": torch.OutOfMemoryError}[moment]
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", lambda *args, **kwargs: (_ for _ in ()).throw(error()))
        with pytest.raises(error):
            with_k_sampler(guided, cond(1), cond(2), start())
    assert snapshot(model) == before
    assert torch.equal(with_k_sampler(model, cond(1), cond(2), start()), expected)
    assert torch.equal(with_k_sampler(guided, cond(1), cond(2), start()), fresh)
