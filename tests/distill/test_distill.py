"""Attention Distillation equals the authors' loops, restated in ``distill_reference``."""

from __future__ import annotations

import json

import comfy.samplers
import pytest
import torch
from distill_reference import Official, diffusion_time, flow_time
from distill_runs import (  # noqa: F401 (fixtures)
    CFG,
    LR,
    NEGATIVE,
    NULL,
    POSITIVE,
    SIZE,
    TYPES,
    Noise,
    distill,
    features,
    fresh_cache,
    guider_of,
    models,
    node,
    plain,
    random_latent,
    run,
    sigmas_of,
)
from families import FAMILIES

OF_OFFICIAL = (5, 7)  # the same two of the seven self-attentions, counted as the authors do

# Adam moves every element by the learning rate, so where a gradient is zero but for rounding its sign is chance: a few elements
# in a thousand go the other way, and the steps that follow enlarge that. Any other mistake moves all of them.
FIRST_LOSS_TOLERANCE = 1e-5
LOSS_TOLERANCE = 1e-3
PATH_TOLERANCE = 1e-2
SAME = 1e-3  # the same code in other batches


def losses_of(report) -> torch.Tensor:
    return torch.tensor([loss for step in report["steps"] for loss in step["loss"]])


def official(features, model, prediction, references, **settings) -> Official:
    settings = {"lr": LR, "iterations": 2, **settings}
    if settings.get("content") is not None:
        settings["content"] = model.model.process_latent_in(settings["content"])
    return Official(
        model.model.diffusion_model,
        OF_OFFICIAL,
        prediction,
        NULL[0][0],
        model.model.process_latent_in(references),
        lambda like, sigma, purpose, place: features.fixed_noise(like, sigma, features.Purpose(purpose), place),
        **settings,
    )


def times_of(model, prediction, sigmas):
    model_sampling = model.get_model_object("model_sampling")
    if prediction == "flow":
        return [flow_time(model_sampling, float(sigma)) for sigma in sigmas], None
    return [diffusion_time(model_sampling, float(s)) for s in sigmas], diffusion_time(
        model_sampling, float(model_sampling.sigma_min)
    )


def assert_same_run(result, report, expected, losses, start) -> None:
    found = losses_of(report)
    assert len(found) == len(losses)
    assert found[0].item() == pytest.approx(losses[0], rel=FIRST_LOSS_TOLERANCE)
    assert (found - torch.tensor(losses)).abs().max() < LOSS_TOLERANCE * max(losses)
    assert (result - expected).abs().mean() < PATH_TOLERANCE * (expected - start).abs().mean()


GUIDED = {
    "one reference": {},
    "two references": {"references": 2},
    "adain": {"adain": "on"},
    "two references, adain": {"references": 2, "adain": "on"},
    "content": {"content": True},
    "sharper": {"attn_scale": 1.5},
}


@pytest.mark.parametrize(
    ("prediction", "case"),
    [("eps", case) for case in GUIDED]
    + [(kind, case) for kind in ("v", "flow") for case in ("two references, adain", "content")],
)
def test_guided_sampling_equals_the_official_loop(node, features, models, prediction, case):
    settings = {"references": 1, "adain": "off", "content": False, "attn_scale": 1.0, **GUIDED[case]}
    model = models[prediction]
    references = random_latent(11, settings.pop("references"))
    content = random_latent(21) if settings.pop("content") else None
    given = {} if content is None else {"content": {"samples": content}}
    result, report = run(node, model, reference=references, **settings, **given)

    sigmas = sigmas_of(model)
    times, least = times_of(model, prediction, sigmas)
    adain = settings.pop("adain") == "on"
    restated = official(features, model, prediction, references, adain=adain, content=content, **settings)
    noise = Noise().generate_noise({"samples": torch.zeros(1, 4, *SIZE)})
    top = model.get_model_object("model_sampling").sigma_max
    start = noise if prediction == "flow" or float(sigmas[0]) >= float(top) * (1 - 1e-5) else times[0].sigma * noise
    expected = restated.sample(start, times, least, POSITIVE[0][0], NEGATIVE[0][0], CFG)
    assert_same_run(result, report, expected, restated.losses, plain(model))


@pytest.mark.parametrize(
    ("prediction", "case"),
    [("eps", "texture"), *((kind, case) for kind in TYPES for case in ("two references", "transfer"))],
)
def test_optimise_equals_the_official_loop(node, features, models, prediction, case):
    model = models[prediction]
    references = random_latent(11, 2 if case == "two references" else 1)
    content = random_latent(21) if case == "transfer" else None
    given = {} if content is None else {"content": {"samples": content}}
    result, report = run(node, model, method="optimise", reference=references, iterations=1, steps=3, **given)

    times, _ = times_of(model, prediction, sigmas_of(model, 3)[:-1])
    noise = Noise().generate_noise({"samples": torch.zeros(1, 4, *SIZE)})
    start = noise if content is None else model.model.process_latent_in(content)
    restated = official(features, model, prediction, references, content=content, iterations=1)
    expected = restated.optimise(noise, times)
    assert_same_run(result, report, expected, restated.losses, start)


# --- regions ------------------------------------------------------------------------------------------------------------


def halves(first: float, second: float, size=SIZE) -> torch.Tensor:
    mask = torch.full(size, first)
    mask[:, size[1] // 2 :] = second
    return mask[None]


def test_masks_equal_a_boolean_attention_mask(node, features, models):
    model, references = models["eps"], random_latent(11)
    of_reference, of_target = halves(1, 0), halves(0, 1).transpose(1, 2).contiguous()
    of_target[:, 5:9, 3:12] = 128 / 255
    of_reference[:, :4] = 128 / 255
    result, report = run(node, model, method="optimise", reference=references, reference_mask=of_reference, target_mask=of_target)
    times, _ = times_of(model, "eps", sigmas_of(model)[:-1])
    masks = {"target_mask": of_target[0], "reference_mask": of_reference[0]}
    restated = official(features, model, "eps", references, **masks)
    noise = Noise().generate_noise({"samples": torch.zeros(1, 4, *SIZE)})
    expected = restated.optimise(noise, times)
    assert_same_run(result, report, expected, restated.losses, noise)


def test_masks_of_other_sizes_and_several_references(node, models):
    """Any aspect of reference, target and mask; equal masks of one label change nothing."""
    model = models["eps"]
    settings = {"latent": torch.zeros(1, 4, 12, 20), "reference": random_latent(11, 2, (18, 10)), "method": "optimise"}
    free, _ = run(node, model, **settings)
    one, _ = run(node, model, **settings, reference_mask=torch.ones(1, 7, 9), target_mask=torch.ones(1, 5, 30))
    assert (one - free).abs().mean() < SAME * free.abs().mean()
    split, _ = run(node, model, **settings, reference_mask=halves(0, 1, (36, 20)), target_mask=halves(1, 0, (24, 40)))
    assert (split - free).abs().mean() > 0.01


def test_labels_that_the_reference_lacks_are_left_out(pack):
    from fovea_attention.attention.distill.losses import DistillObjective, Features
    from fovea_attention.attention.distill.masks import labels_of
    from fovea_attention.attention.distill.regions import Regions
    from fovea_attention.attention.gradient import AttentionCall
    from fovea_attention.attention.host import AttentionInputs
    from fovea_attention.attention.networks import AttentionLayer

    generator = torch.Generator().manual_seed(0)
    q, k, v, ks, vs = (torch.randn(1, 2, 16, 8, generator=generator) for _ in range(5))
    grid = (1, 4, 4)
    target = labels_of(halves(0, 1, (4, 4)))
    regions = Regions(target, [labels_of(torch.zeros(1, 4, 4))[0]], {"a": (grid, [grid])})
    call = AttentionCall(AttentionInputs(q, k, None, 8**-0.5), v, None, lambda: torch.zeros(1, 2, 16, 8), keeps_heads=True)
    objective = DistillObjective([{("a", 0): Features(ks, vs)}], regions=regions)
    style, _ = objective.measure(AttentionLayer("a", "self", torch.nn.Identity()), call, torch.arange(1))
    ideal = torch.nn.functional.scaled_dot_product_attention(q, ks, vs)
    left = (torch.arange(16) % 4) < 2
    torch.testing.assert_close(style[0], ideal[:, :, left].abs().mean())
    assert regions.missing() == {255}


# --- sizes of steps, and when there are none ---------------------------------------------------------------------------------


def test_one_iteration_moves_every_element_by_the_learning_rate(node, models, distill, monkeypatch):
    model, moves = models["eps"], []
    descend = distill.DistillRun._descend

    def watched(self, z, *args):
        before = z.clone()
        descend(self, z, *args)
        moves.append((z - before).abs())

    monkeypatch.setattr(distill.DistillRun, "_descend", watched)
    run(node, model, iterations=1, learning_rate=0.015)
    for moved in moves:
        assert moved.max() < 0.015 * 1.001
        assert moved.median() > 0.015 * 0.99


EMPTY = [{"start_at": 0.5, "end_at": 0.5}, {"start_at": 0.0, "end_at": 0.1}]


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral", "dpmpp_sde"])
@pytest.mark.parametrize("window", EMPTY)
def test_no_optimisation_is_the_plain_sampler_bit_for_bit(node, models, sampler, window):
    model = models["eps"]
    result, report = run(node, model, sampler=sampler, **window)
    assert torch.equal(result, plain(model, sampler=sampler)) and report["steps"] == []


def test_window_and_interval_choose_the_steps(node, models):
    _, report = run(node, models["eps"], steps=8, start_at=0.25, end_at=0.8, every_n_steps=2, iterations=1)
    assert [step["step"] for step in report["steps"]] == [2, 4]
    sigmas = sigmas_of(models["eps"], 8)
    assert [step["sigma"] for step in report["steps"]] == [float(sigmas[3]), float(sigmas[5])]


def test_published_values(pack):
    from fovea_attention.attention import distill as job

    network = torch.nn.Module()
    guided, optimise = job.Method.GUIDED, job.Method.OPTIMISE
    assert job.published(network, optimise, flow=False) == job.published(network, optimise, flow=True) == (1, 0.05)
    assert job.published(network, guided, flow=True) == (2, 0.01)
    assert job.published(FAMILIES["sd15"].build().model.diffusion_model, guided, flow=False) == (3, 0.015)


@pytest.mark.parametrize(
    ("config", "unet", "expected"),
    [
        ("SD15", {"num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
                  "transformer_depth_output": [1] * 9 + [0] * 3, "num_heads": 8},
         [f"output.{index}" for index in range(6, 12)]),
        ("SDXL", {"num_res_blocks": [2] * 3, "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
                  "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10,
                  "num_head_channels": 64},
         [f"output.{block}.{index}" for block in (3, 4, 5) for index in (0, 1)]),
    ],
)  # fmt: skip
def test_published_layers_of_unets(pack, config, unet, expected):
    """10 to 15 of 16, and 64 to 69 of 70, on the real layouts (without their weights)."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from fovea_attention.attention.distill import Method, distilled_layers, published
    from fovea_attention.attention.networks import attention_layers

    family = FAMILIES[config.lower()]
    settings = {**family.unet, **unet}
    settings.pop("num_classes", None), settings.pop("adm_in_channels", None)
    network = UNetModel(**settings, device="meta", dtype=torch.float32)
    order = [layer.name for layer in attention_layers(network) if layer.kind == "self"]
    first, last, total = (10, 16, 16) if config == "SD15" else (64, 70, 70)
    assert len(order) == total and order[first:last] == expected
    assert [layer.name for layer in distilled_layers(network)] == expected
    assert published(network, Method.GUIDED, flow=False) == ((3, 0.015) if config == "SD15" else (2, 0.015))


def test_published_layers_of_flux(pack):
    """50 to 56 of 57: the last seven single blocks of 19 double and 38 single ones."""
    from fovea_attention.attention.distill import distilled_layers

    network = FAMILIES["flux"].build().model.diffusion_model
    network.double_blocks = torch.nn.ModuleList([torch.nn.Identity() for _ in range(19)])
    network.single_blocks = torch.nn.ModuleList([torch.nn.Identity() for _ in range(38)])
    assert [layer.name for layer in distilled_layers(network)] == [f"single.{index}" for index in range(31, 38)]


# --- memory, batches, cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"method": "optimise", "content": {"samples": random_latent(21)}, "steps": 1}])
def test_low_memory_gives_the_same_image(node, models, settings):
    """One step with content: behind the kink of its loss, chance signs treble with every further step."""
    model, latent = models["eps"], torch.zeros(2, 4, *SIZE)
    fast, of_fast = run(node, model, latent=latent, memory="fast", iterations=1, **settings)
    low, of_low = run(node, model, latent=latent, memory="low", iterations=1, **settings)
    torch.testing.assert_close(losses_of(of_low), losses_of(of_fast), rtol=FIRST_LOSS_TOLERANCE, atol=0)
    assert (low - fast).abs().mean() < PATH_TOLERANCE * LR


class SameNoise(Noise):
    """Two different images' noise, of which a single run gets one."""

    def __init__(self, image: int | None = None) -> None:
        super().__init__()
        self.image = image

    def generate_noise(self, latent):
        noise = torch.randn(2, *latent["samples"].shape[1:], generator=torch.Generator().manual_seed(5))
        return noise if self.image is None else noise[self.image : self.image + 1]


@pytest.mark.parametrize("method", ["guided sampling", "optimise"])
def test_images_of_a_batch_do_not_meet(node, models, method):
    model = models["eps"]
    both, _ = run(node, model, latent=torch.zeros(2, 4, *SIZE), noise=SameNoise(), method=method, iterations=1)
    for image in range(2):
        alone, _ = run(node, model, noise=SameNoise(image), method=method, iterations=1)
        assert (both[image] - alone[0]).abs().mean() < SAME * alone.abs().mean()


@pytest.mark.parametrize("method", ["guided sampling", "optimise"])
def test_kept_reference_features_give_the_same_image(node, models, features, method):
    model = models["eps"]
    fresh, report = run(node, model, method=method, iterations=1)
    assert report["reference_features"] == {"reused": 0, "computed": 2}
    again, report = run(node, model, method=method, iterations=1)
    assert report["reference_features"] == {"reused": 2, "computed": 0}
    assert torch.equal(again, fresh)
    _, report = run(node, model, method=method, iterations=1, noise=Noise(6))
    assert report["reference_features"]["computed"] == 0  # another seed meets the same references


def test_what_changes_the_features_is_computed_again(node, models):
    model = models["eps"]
    brief = {"steps": 1, "iterations": 1}
    run(node, model, **brief)
    patched = model.clone()
    patched.add_patches({"diffusion_model.output_blocks.1.1.proj_in.weight": (torch.zeros(1),)})
    for change in (
        {"reference": random_latent(12)},
        {"layers": "output.1-3"},
        {"method": "optimise"},
        {"guider": guider_of(patched)},
    ):
        _, report = run(node, model, **brief, **change)
        assert report["reference_features"]["reused"] == 0, change
    _, report = run(node, model, **brief)
    assert report["reference_features"]["computed"] == 0


def test_the_cache_is_bounded_and_keeps_what_this_run_uses(features):
    model, cache = torch.nn.Identity(), features.FeatureCache(limit=1000)
    stored = {("a", 0): (torch.zeros(50), torch.zeros(50))}  # 400 bytes
    cache.begin_run()
    for key in range(4):
        cache.put(model, key, stored)
    assert cache.bytes == 800 and cache.get(model, 1) is not None and cache.get(model, 2) is None
    cache.begin_run()
    cache.get(model, 0)
    cache.put(model, 5, stored)
    assert cache.bytes == 800 and cache.get(model, 0) is not None and cache.get(model, 1) is None
    del model
    assert cache.bytes == 0


def test_the_cache_forgets_what_no_run_has_used_for_long(features):
    model, cache = torch.nn.Identity(), features.FeatureCache()
    cache.begin_run()
    for key in ("old", "used again"):
        cache.put(model, key, {("a", 0): (torch.zeros(5), torch.zeros(5))})
    from fovea_attention.attention.distill.feature_cache import MAX_IDLE_RUNS

    for _ in range(MAX_IDLE_RUNS):
        cache.begin_run()
        assert cache.get(model, "used again") is not None
    assert cache.bytes == 80
    cache.begin_run()
    assert cache.bytes == 40 and cache.get(model, "old") is None


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux", "sd3", "sd35_medium", "pixart", "qwen_image", "z_image"])
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_the_content_compared_with_itself_is_equal_bit_for_bit(node, name, memory):
    """Where the latent starts as the content, a difference of rounding would decide where Adam goes."""
    if name not in FAMILIES:
        pytest.skip("this host does not know the family")
    family = FAMILIES[name]
    model = family.build()
    content = torch.randn(family.latent(2).shape, generator=torch.Generator().manual_seed(2))
    guider = guider_of(model, 1.0, family.conds(1), family.conds(2))
    reference = torch.randn(family.latent().shape, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        report = node(
            Noise(), guider, comfy.samplers.sampler_object("euler"), torch.tensor([0.9, 0.5, 0.0]), {"samples": family.latent(2)},
            {"samples": reference}, family.conds(7), method="optimise", content={"samples": content}, memory=memory,
        )[2]  # fmt: skip
    first, second = json.loads(report)["steps"]
    assert first["content_loss"] == [0.0] and second["content_loss"][0] > 0
