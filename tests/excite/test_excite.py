"""Attend-and-Excite equals the authors' implementation, with every sampler, batch and kind of prompt."""

from __future__ import annotations

import comfy.cldm.cldm
import comfy.controlnet
import comfy.samplers
import comfy.utils
import pytest
import tiny_dit
import tiny_text
import torch
from families import FAMILIES
from tiny_unet import UNET_CONFIG, cond, randomise, reference_cases, small_model, vector_model

import nodes

CASES = reference_cases("ae")


@pytest.fixture(scope="module")
def excite(pack):
    import fovea_attention.attention.excite as excite

    return excite


@pytest.fixture
def guider(node_classes):
    """The node, with subjects at token positions 2 and 5 and few refinements unless told otherwise; returns its guider."""

    def make(model, positive=None, negative=None, **settings):
        settings = {"subjects": "2, 5", "max_refinements": 3, **settings}
        return node_classes["AttendExciteGuider"].execute(model, positive or cond(1), negative or cond(2), **settings)[0]

    return make


def run(guider, *, noise, sigmas, sampler="euler", latent_image=None, seed=3, **options):
    """What SamplerCustomAdvanced does, under the executor's inference mode; each step's latent and denoised as well."""
    steps = []

    def callback(step, denoised, x, total):
        steps.append((x.clone(), denoised.clone()))

    latent_image = torch.zeros_like(noise) if latent_image is None else latent_image
    sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    with torch.inference_mode():
        result = guider.sample(noise, latent_image, sampler, sigmas, callback=callback, disable_pbar=True, seed=seed, **options)
    return result, steps


def case_guider(guider, case, **settings):
    steps = case["steps"]
    thresholds = ", ".join(f"{int(step) / steps}:{wanted}" for step, wanted in case["thresholds"].items())
    return guider(
        vector_model(),
        [[case["cond"], {}]],
        [[case["uncond"], {}]],
        cfg=case["cfg"],
        subjects=", ".join(map(str, case["token_indices"])),
        guide_until=case["max_iter_to_alter"] / steps,
        scale_factor=case["scale_factor"],
        scale_end=case["scale_range"][1],
        thresholds=thresholds,
        max_refinements=case["max_refinement_steps"],
        smoothing=case["smooth_attentions"],
        sigma=case["gaussian_sigma"],
        kernel_size=case["gaussian_kernel"],
        **settings,
    )


@pytest.fixture
def recorded(excite, monkeypatch):
    """Every measured loss and gradient, as they are used: (rows, gradient in the units of z)."""
    found = []
    measure = excite.ExciteRun._gradient

    def watched(self, seen, sigma, rows):
        gradient = measure(self, seen, sigma, rows)
        found.append(
            (gradient.loss.clone(), gradient.latent / excite.run.host.input_scale(self.base_model, sigma).view(-1, 1, 1, 1))
        )
        return gradient

    monkeypatch.setattr(excite.ExciteRun, "_gradient", watched)
    return found


@pytest.mark.parametrize("memory", ["fast", pytest.param("low", marks=pytest.mark.newest)])
@pytest.mark.parametrize("name", list(CASES))
def test_equals_the_official_implementation(guider, recorded, caplog, name, memory):
    caplog.set_level("INFO", logger="fovea")
    case = CASES[name]
    result, steps = run(case_guider(guider, case, memory=memory), noise=case["noise"], sigmas=case["sigmas"])
    sigmas = case["sigmas"].view(-1, 1, 1, 1, 1)
    start, denoised = (torch.stack(values) for values in zip(*steps, strict=True))
    x = start + (start - denoised) / sigmas[:-1] * sigmas.diff(dim=0)  # Euler's step
    torch.testing.assert_close(x[-1], result * 0.18215, rtol=0, atol=1e-5)
    assert (x - case["x"]).abs().max() / case["x"].abs().max() < 1e-4
    z = start / (sigmas[:-1] ** 2 + 1).sqrt()
    assert (z - case["z_in"]).abs().max() / case["z_in"].abs().max() < 1e-4
    eps, expected = (values.diff(dim=0) / sigmas[1:].diff(dim=0) for values in (x, case["x"]))
    worst = max((got - wanted).abs().max() / wanted.abs().max() for got, wanted in zip(eps, expected, strict=True))
    assert worst < 2e-3
    first = recorded[0]
    torch.testing.assert_close(first[0], case["loss_first"][:1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first[1], case["grad0_z"], rtol=1e-3, atol=1e-4 * case["grad0_z"].abs().max().item())
    refinements = sum(case["updates_per_step"]) - case["max_iter_to_alter"]
    assert f"{case['max_iter_to_alter']} guided steps, {refinements} refinements" in caplog.text


# ----------------------------------------------------------------------------------------------- the losses, restated


@pytest.fixture(scope="module")
def losses(pack):
    import fovea_attention.attention.excite.losses as losses

    return losses


def some_subjects(count=3, seed=0):
    return torch.rand(2, count, 6, 5, generator=torch.Generator().manual_seed(seed))


def test_smoothing_kernel_is_the_published_one(losses):
    kernel = losses.smoothing_kernel(0.5, 3)
    assert kernel.sum().item() == pytest.approx(1)
    assert (kernel[1, 1] / kernel[0, 1]).item() == pytest.approx(torch.e)
    assert (kernel[1, 1] / kernel[0, 0]).item() == pytest.approx(torch.e**2)


def test_extra_terms_are_what_their_papers_say(losses):
    subjects = some_subjects()
    for picture in range(2):
        maps = subjects[picture]
        pairs = [(0, 1), (0, 2), (1, 2)]
        shared = [torch.minimum(maps[a], maps[b]).sum() / (maps[a].sum() + maps[b].sum()) for a, b in pairs]
        torch.testing.assert_close(losses.overlap(subjects)[picture], torch.stack(shared).mean())
        variations = []
        for each in maps:
            down = sum(abs(each[y + 1, x] - each[y, x]) for y in range(5) for x in range(5))
            across = sum(abs(each[y, x + 1] - each[y, x]) for y in range(6) for x in range(4))
            variations.append(down + across)
        torch.testing.assert_close(losses.variation(subjects)[picture], -torch.stack(variations).min())
        torch.testing.assert_close(losses.neglect(subjects)[picture], 1 - maps.amax((1, 2)).min())
    looks = torch.rand(2, 30, 30, generator=torch.Generator().manual_seed(4)).softmax(-1)
    rows = [looks[1, subjects[1, index].argmax()] for index in range(3)]
    shared = [torch.minimum(rows[a], rows[b]).sum() / (rows[a].sum() + rows[b].sum()) for a, b in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(losses.self_overlap(subjects, looks)[1], torch.stack(shared).mean())
    assert losses.overlap(subjects[:, :1]).tolist() == [0, 0]


# ------------------------------------------------------------------------------------------------ samplers and schedules

STEPS = 5
REFUSED = {"uni_pc", "uni_pc_bh2", "dpm_fast", "dpm_adaptive"}


def noise_of(batch=1, seed=3, size=(12, 12)):
    return torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(seed))


def schedule(model, steps=STEPS, scheduler="normal"):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)


def modules_of(model):
    """What each module carries: its attributes' names, its hooks, and whose forward it runs."""
    return {
        name: (
            sorted(module.__dict__),
            {key: sorted(value) for key, value in module.__dict__.items() if key.endswith("_hooks")},
            module.__dict__.get("forward"),
        )
        for name, module in model.model.named_modules()
    }


def plain_guider(model, positive=None, negative=None, cfg=7.5):
    plain = comfy.samplers.CFGGuider(model)
    plain.set_conds(positive or cond(1), negative or cond(2))
    plain.set_cfg(cfg)
    return plain


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.mark.newest
@pytest.mark.parametrize("name", [name for name in comfy.samplers.SAMPLER_NAMES if name not in REFUSED])
def test_an_update_at_the_first_step_equals_starting_from_the_moved_noise(guider, model, name):
    sigmas, noise = schedule(model), noise_of()
    guide = guider(model, guide_until=1 / STEPS, thresholds="", scale_factor=200)
    guided, steps = run(guide, noise=noise, sigmas=sigmas, sampler=name)
    untouched, plain_steps = run(plain_guider(model), noise=noise, sigmas=sigmas, sampler=name)
    factor = (1 + sigmas[0] ** 2).sqrt()
    start = steps[0][0] / factor
    assert (start - noise).abs().max() > 1e-3
    expected, _ = run(plain_guider(model), noise=start, sigmas=sigmas, sampler=name)
    assert (guided - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert (guided - untouched).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_samplers_that_hide_their_latent_are_refused_before_sampling(guider, model, name):
    with pytest.raises(ValueError, match=rf"The sampler {name} hides its latent.*euler"):
        run(guider(model), noise=noise_of(), sigmas=schedule(model), sampler=name)


@pytest.mark.parametrize("name", ["heun", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_sde", "dpm_2_ancestral", "heunpp2"])
def test_one_update_in_each_guided_step(guider, model, recorded, name):
    run(guider(model, guide_until=0.6, thresholds=""), noise=noise_of(), sigmas=schedule(model), sampler=name)
    assert len(recorded) == 3


def test_a_part_of_a_schedule_is_a_run_of_its_own(guider, model, recorded):
    """KSamplerAdvanced and Split Sigmas: fractions are of the steps that are sampled here."""
    run(guider(model, guide_until=0.5, thresholds="0.5:1", max_refinements=2), noise=noise_of(), sigmas=schedule(model, 10)[6:])
    assert len(recorded) == 2 + 1 + 2  # two guided steps; in the third one look, then a refinement and what it led to


def test_nothing_to_do_equals_plain_sampling(guider, model):
    noise, sigmas = noise_of(), schedule(model)
    expected, _ = run(plain_guider(model), noise=noise, sigmas=sigmas)
    idle = [{"guide_until": 0, "thresholds": ""}, {"scale_factor": 0, "thresholds": ""}, {"guide_until": 0, "max_refinements": 0}]
    for settings in idle:
        assert torch.equal(run(guider(model, **settings), noise=noise, sigmas=sigmas)[0], expected)


def test_the_noise_and_a_second_run_are_untouched(guider, model):
    noise, sigmas = noise_of(), schedule(model)
    kept = noise.clone()
    guide = guider(model)
    first, _ = run(guide, noise=noise, sigmas=sigmas)
    second, _ = run(guide, noise=noise, sigmas=sigmas)
    assert torch.equal(noise, kept)
    assert torch.equal(first, second)


# ------------------------------------------------------------------------------------------------- batches and prompts


def test_images_of_a_batch_do_not_know_each_other(guider, model):
    settings = {"thresholds": "0:0.1, 0.4:0.06", "max_refinements": 4, "scale_factor": 100}
    together = noise_of(3)
    result, _ = run(guider(model, **settings), noise=together, sigmas=schedule(model))
    for index in range(3):
        alone, _ = run(guider(model, **settings), noise=together[index : index + 1], sigmas=schedule(model))
        assert (result[index] - alone[0]).abs().max() < 2e-5 * alone.abs().max()


def test_cfg_one(guider, model):
    moved, _ = run(guider(model, cfg=1.0, scale_factor=200), noise=noise_of(), sigmas=schedule(model))
    plain, _ = run(plain_guider(model, cfg=1.0), noise=noise_of(), sigmas=schedule(model))
    assert moved.isfinite().all()
    assert not torch.equal(moved, plain)


def test_an_inpaint_mask_keeps_what_is_outside(guider, model):
    mask = torch.zeros(1, 1, 12, 12)
    mask[..., 3:9, 3:9] = 1
    image, noise = noise_of(seed=9), noise_of()
    guided, _ = run(guider(model, scale_factor=200), noise=noise, sigmas=schedule(model), latent_image=image, denoise_mask=mask)
    plain, _ = run(plain_guider(model), noise=noise, sigmas=schedule(model), latent_image=image, denoise_mask=mask)
    outside = (mask == 0).expand_as(image)
    assert torch.allclose(guided[outside], plain[outside], atol=1e-5)
    assert (guided - plain)[~outside].abs().max() > 1e-3


def test_regional_prompts_move_their_region_only(guider, model):
    regions = [[cond(1)[0][0], {"area": (12, 6, 0, 0), "strength": 1.0}], [cond(4)[0][0], {"strength": 1.0}]]
    settings = {"guide_until": 1 / STEPS, "thresholds": "", "scale_factor": 500}
    guide = guider(model, regions, **settings)
    guide.prompts[1] = None  # only the region has subjects
    _, steps = run(guide, noise=noise_of(), sigmas=schedule(model))
    _, plain = run(plain_guider(model, regions), noise=noise_of(), sigmas=schedule(model))
    change = (steps[0][0] - plain[0][0]).abs()
    assert change[..., :6].max() > 1e-3
    assert change[..., 6:].max() == 0


def test_a_prompt_that_is_not_active_guides_nothing(guider, model):
    late = [
        [cond(1)[0][0], {"start_percent": 0.6, "end_percent": 1.0}],
        [cond(4)[0][0], {"start_percent": 0.0, "end_percent": 1.0}],
    ]
    guide = guider(model, late, thresholds="")
    guide.prompts[1] = None
    guided, _ = run(guide, noise=noise_of(), sigmas=schedule(model))
    plain, _ = run(plain_guider(model, late), noise=noise_of(), sigmas=schedule(model))
    assert torch.equal(guided, plain)


# ----------------------------------------------------------------------------------------------------- other families

GUIDED = ["sd2", "sdxl", "pixart", "hunyuan_dit", "sd3", "flux", "qwen_image", "lumina2", "z_image", "cosmos_predict2", "wan_t2v"]


@pytest.mark.parametrize("name", [name for name in GUIDED if name in FAMILIES])
def test_other_families_are_guided(guider, name):
    family = FAMILIES[name]
    model = family.build()
    noise = torch.randn(family.latent().shape, generator=torch.Generator().manual_seed(3))
    sigmas = schedule(model, 4, "simple")
    settings = {"scale_factor": 50.0, "thresholds": "0:0.9", "max_refinements": 2, "overlap": 0.5, "self_overlap": 0.5}
    plain, _ = run(plain_guider(model, family.conds(1), family.conds(2)), noise=noise, sigmas=sigmas)
    before = modules_of(model)
    guided, _ = run(guider(model, family.conds(1), family.conds(2), **settings), noise=noise, sigmas=sigmas)
    assert guided.isfinite().all()
    assert (guided - plain).abs().max() > 1e-4
    assert modules_of(model) == before


@pytest.mark.parametrize("name", ["cascade"])
def test_networks_without_a_known_place_for_text_are_refused(guider, name):
    family = FAMILIES[name]
    with pytest.raises(ValueError, match="Attend-and-Excite cannot guide"):
        guider(family.build(), family.conds(1), family.conds(2))


# ------------------------------------------------------------------------------------------------------ what can go wrong


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"subjects": ""}, "Prompt with Subjects"),
        ({"subjects": "2, 99"}, "position 99 is outside this prompt, which has 77 tokens"),
        ({"thresholds": "0:0.05, 0.2"}, r"thresholds, entry 2 \('0.2'\): write a fraction"),
        ({"thresholds": "0:high"}, r"thresholds, entry 1 \('0:high'\): '0' and 'high' must be numbers"),
        ({"thresholds": "0:1.5"}, "both numbers go from 0 to 1"),
        ({"kernel_size": 4}, "kernel_size is 4"),
        ({"sigma": 0.0}, "sigma is 0.0"),
        ({"guide_until": 1.5}, "guide_until is 1.5"),
        ({"scale_factor": float("nan")}, "scale_factor is nan"),
        ({"overlap": -1.0}, "overlap is -1.0"),
        ({"layers": "output, middel"}, "layers names 'middel', which this model does not have. Its layers: input"),
        ({"layers": "output.9", "attention_grid": 16}, "layers names 'output.9'"),
    ],
)
def test_wrong_inputs_are_said_on_the_node(guider, model, settings, message):
    with pytest.raises(ValueError, match=message):
        guider(model, **settings)


def test_more_subjects_than_the_grid_has_room_for(guider, model):
    many = ", ".join(map(str, range(1, 20)))
    with pytest.raises(ValueError, match="19 subjects are more than an attention grid of 3 x 3 can hold"):
        run(guider(model, subjects=many), noise=noise_of(), sigmas=schedule(model))


def test_a_gradient_that_is_not_finite_is_left_out_and_counted(guider, model, excite, monkeypatch, caplog):
    caplog.set_level("INFO", logger="fovea")
    measure = excite.run.ModelPass.gradient

    def poisoned(self, *args):
        found = measure(self, *args)
        found.latent[0, 0, 0, 0] = float("nan")
        return found

    monkeypatch.setattr(excite.run.ModelPass, "gradient", poisoned)
    guided, _ = run(guider(model, thresholds="", guide_until=0.4), noise=noise_of(), sigmas=schedule(model))
    plain, _ = run(plain_guider(model), noise=noise_of(), sigmas=schedule(model))
    assert torch.equal(guided, plain)
    assert "2 updates left out because their gradient was not finite" in caplog.text


class Stopped(Exception):
    pass


@pytest.mark.parametrize("moment", ["forward", "backward", "interrupt"])
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_nothing_stays_after_a_failure(guider, excite, monkeypatch, moment, memory):
    model = small_model()
    noise, sigmas = noise_of(), schedule(model)
    expected, _ = run(plain_guider(model), noise=noise, sigmas=sigmas)
    before = modules_of(model)
    with monkeypatch.context() as patch:
        if moment == "interrupt":
            error = comfy.model_management.InterruptProcessingException
            patch.setattr(excite.run.host, "check_interrupted", lambda: (_ for _ in ()).throw(error()))
        elif moment == "forward":
            error = Stopped
            patch.setattr(excite.ExciteObjective, "measure", lambda *args: (_ for _ in ()).throw(Stopped()))
        else:
            error = Stopped
            patch.setattr(torch.autograd, "grad", lambda *args, **kwargs: (_ for _ in ()).throw(Stopped()))
        with pytest.raises(error):
            run(guider(model, thresholds="0:0.99", memory=memory), noise=noise, sigmas=sigmas)
    assert modules_of(model) == before
    assert not torch.is_inference_mode_enabled()
    assert torch.equal(run(plain_guider(model), noise=noise, sigmas=sigmas)[0], expected)


# --------------------------------------------------------------------------------------------------- with the pack's nodes


def test_gradient_passes_are_not_seen_by_capture_and_tgate(guider, node_classes, model, caplog):
    caplog.set_level("INFO", logger="fovea")
    gated = node_classes["TGateCache"].execute(model, gate_at=0.6)[0]
    watched, maps = node_classes["AttnMapCapture"].execute(gated)[0:2]
    guided, _ = run(guider(watched, guide_until=0.4), noise=noise_of(), sigmas=schedule(model))
    assert "cross-attention reused in 2 of 5 steps" in caplog.text
    assert maps.recorded_steps("positive", 0) == [0, 1, 2]
    alone, _ = run(guider(model, guide_until=0.4), noise=noise_of(), sigmas=schedule(model))
    assert (guided - alone).abs().max() > 0


def test_guided_maps_come_with_the_guider(node_classes, model):
    made = node_classes["AttendExciteGuider"].execute(model, cond(1), cond(2), subjects="2, 5")
    run(made[0], noise=noise_of(), sigmas=schedule(model))
    assert made[1].recorded_steps("positive", 0) == list(range(STEPS))


@pytest.mark.parametrize(
    ("settings", "guided"),
    [
        ({}, (["input.7", "input.8", "output.3", "output.4", "output.5"], None)),
        ({"layers": "output"}, (["output.3", "output.4", "output.5"], None)),
        ({"layers": "input", "attention_grid": 32}, (["input.1", "input.2"], None)),
        ({"layers": "input.1, output.8"}, (["output.8"], (8, 8))),
    ],
)
def test_the_layers_that_are_guided(excite, settings, guided):
    """Of the named layers those of the attention grid, or of the next finer one, whose maps are averaged down to it."""
    found = excite.guided_layers(vector_model().model.diffusion_model, (1, 4, 32, 32), excite.ExciteSettings(**settings))
    assert ([layer.name for layer in found.layers], found.grid) == guided


def test_named_layers_of_a_transformer(excite):
    network, latent = FAMILIES["pixart"].build().model.diffusion_model, FAMILIES["pixart"].latent().shape
    for layers, guided in (("", ["block.0", "block.1"]), ("block.1", ["block.1"])):
        found = excite.guided_layers(network, latent, excite.ExciteSettings(layers=layers))
        assert [layer.name for layer in found.layers] == guided


# ------------------------------------------------------------------------------------------------------ words and control


def encoded(node_classes, text, encoder="sd1"):
    return node_classes["FoveaPrompt"].execute(tiny_text.tiny(encoder), text)[0]


def named(prompts):
    return [[subject.name for subject in prompt.subjects] if prompt else None for prompt in prompts]


def test_subjects_are_the_brackets_or_the_words_that_are_named(excite, node_classes):
    marked = encoded(node_classes, "a [cat] and a [red frog]")
    (prompt,) = excite.guided_prompts(marked, "")
    assert [(subject.name, subject.positions) for subject in prompt.subjects] == [("cat", (2,)), ("red frog", (5, 6))]
    assert prompt.columns == tuple(range(1, 76))  # the published 1 to 75 of 77
    (prompt,) = excite.guided_prompts(marked, "frog, a")
    assert [(subject.name, subject.positions) for subject in prompt.subjects] == [("frog", (6,)), ("a", (1, 4))]
    (prompt,) = excite.guided_prompts(marked, "2, 6")
    assert named([prompt]) == [["cat", "frog"]]
    twins = encoded(node_classes, "a [cat] and a [cat]")
    assert named(excite.guided_prompts(twins, "")) == [["cat#1", "cat#2"]]


@pytest.mark.parametrize("encoder", ["sd1", "sd3", "flux"])
def test_articles_are_no_part_of_a_subject(excite, node_classes, encoder):
    """A map of "a" would pass for one of the whole phrase."""
    marked = [encoded(node_classes, text, encoder) for text in ("[a red cat] and [The frog]", "a [red cat] and The [frog]")]
    (first,), (second,) = (excite.guided_prompts(entry, "") for entry in marked)
    assert [subject.positions for subject in first.subjects] == [subject.positions for subject in second.subjects]
    (named,) = excite.guided_prompts(marked[1], "a red cat, the frog")
    assert [subject.positions for subject in named.subjects] == [subject.positions for subject in second.subjects]
    (alone,) = excite.guided_prompts(encoded(node_classes, "[a] cat", encoder), "")
    assert alone.subjects[0].positions


def test_padding_of_openclip_and_t5_does_not_compete(excite, node_classes):
    (prompt,) = excite.guided_prompts(encoded(node_classes, "a [cat] and a [frog]", "sd2"), "")
    assert prompt.columns == (1, 2, 3, 4, 5)
    (prompt,) = excite.guided_prompts(encoded(node_classes, "a [cat] and a [frog]", "pixart"), "")
    assert len(prompt.columns) < 20


def test_a_subject_may_be_in_one_of_several_prompts(excite, node_classes):
    both = encoded(node_classes, "a [cat]") + encoded(node_classes, "a [frog]")
    assert named(excite.guided_prompts(both, "")) == [["cat"], ["frog"]]
    assert named(excite.guided_prompts(both, "frog")) == [None, ["frog"]]


def test_a_word_that_is_not_there_lists_the_words_that_are(guider, node_classes):
    with pytest.raises(ValueError, match=r"subjects: 'dog' is not in the prompt.*a, cat, and, frog"):
        guider(small_model(), encoded(node_classes, "a cat and a frog"), subjects="dog")
    with pytest.raises(ValueError, match=r"No subjects are given.*square brackets.*Words in the prompt: a, cat"):
        guider(small_model(), encoded(node_classes, "a cat"), subjects="")
    with pytest.raises(ValueError, match="Prompt with Subjects"):
        guider(small_model(), cond(1), subjects="cat")


def test_other_encoders_prompts_with_clip_and_text(excite, node_classes):
    clip = tiny_text.tiny("sd1")
    plain = clip.encode_from_tokens_scheduled(clip.tokenize("a cat and a frog"))
    assert named(excite.guided_prompts(plain, "cat, frog", clip, "a cat and a frog")) == [["cat", "frog"]]


def test_controlnet_on_the_positive_prompt(guider, recorded):
    """Its residuals are there in the gradient passes too, taken as given."""
    model = small_model()
    config = {key: value for key, value in UNET_CONFIG.items() if key not in ("out_channels", "transformer_depth_output")}
    config.update(num_res_blocks=[1, 1], channel_mult=[1, 2], num_heads=2, transformer_depth=[1, 1], dtype=torch.float32)
    network = comfy.cldm.cldm.ControlNet(hint_channels=3, **config)
    randomise(network, 7)
    control = comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"), manual_cast_dtype=None)
    hint = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(1))
    positive, negative = nodes.ControlNetApplyAdvanced().apply_controlnet(cond(1), cond(2), control, hint, 1.0, 0.0, 1.0)
    noise, sigmas = noise_of(2), schedule(model)
    guided, _ = run(guider(model, positive, negative, thresholds="", scale_factor=200), noise=noise, sigmas=sigmas)
    with_control = recorded[0]
    recorded.clear()
    run(guider(model, positive, negative, thresholds="", memory="low"), noise=noise, sigmas=sigmas)
    torch.testing.assert_close(recorded[0], with_control, rtol=1e-4, atol=1e-5 * with_control[1].abs().max().item())
    recorded.clear()
    run(guider(model, thresholds=""), noise=noise, sigmas=sigmas)
    assert (with_control[0] - recorded[0][0]).abs().max() > 1e-6
    plain, _ = run(plain_guider(model, positive, negative), noise=noise, sigmas=sigmas)
    assert guided.isfinite().all()
    assert (guided - plain).abs().max() > 1e-4


def test_a_model_without_text_is_refused(guider, tmp_path):
    path = tiny_dit.write(tmp_path / "dit.safetensors", tiny_dit.bare(tiny_dit.tiny()))
    with pytest.raises(ValueError, match="no attention to text"):
        guider(tiny_dit.load_dit(path), cond(1), cond(2))


def test_progress_moves_during_refinements(guider, model, monkeypatch):
    shown = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *args, **kwargs: shown.append((value, total)))
    settings = {"guide_until": 0, "thresholds": "0.4:1", "max_refinements": 3}
    run(guider(model, **settings), noise=noise_of(), sigmas=schedule(model))
    assert shown[0] == (2.25, STEPS)
    assert set(shown) <= {(2.25, STEPS), (2.5, STEPS), (2.75, STEPS)}  # 0.30.0 leaves out what follows within 0.1 s
