"""A DiT samples on ComfyUI as published: schedule, guidance on three channels, learned variance, labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import torch
from tiny_dit import (
    TINY,
    Published,
    bare,
    dit_labels,
    dit_sampling,
    labels,
    latent,
    load_dit,
    sample,
    sample_custom,
    spaced,
    tiny,
    training_file,
    write,
)

NULL = TINY["classes"]
# Float32 on ComfyUI against float64 schedules here, over all steps, relative to the largest value.
SAME = 2e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dit")


@pytest.fixture(scope="module")
def network() -> Any:
    return tiny()


@pytest.fixture(scope="module")
def path(folder: Path, network: Any) -> str:
    return write(folder / "DiT.safetensors", bare(network))


@pytest.fixture(scope="module")
def load(path: str) -> Callable[..., Any]:
    return lambda **options: load_dit(path, **options)


def difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max())


def published_sigmas(model: Any, timesteps: list[int]) -> torch.Tensor:
    return torch.cat([model.model.model_sampling.sigmas[timesteps], torch.zeros(1)])


def randn(count: int = 1, batch: int = 2, height: int = 8, width: int = 8, seed: int = 11) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 4, height, width, generator=generator) for _ in range(count)]


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_sigmas_are_those_of_the_linear_schedule(load: Callable[..., Any]) -> None:
    bars = Published([], lambda *_: torch.zeros(0), 1).alpha_bars
    expected = ((1 - bars) / bars).sqrt()
    sigmas = load().model.model_sampling.sigmas
    torch.testing.assert_close(sigmas.double(), expected, rtol=1e-5, atol=0)
    assert sigmas[0] == pytest.approx(0.0100, abs=1e-4) and sigmas[-1] == pytest.approx(157.4, abs=0.1)


def test_the_normal_scheduler_gives_the_published_timesteps(load: Callable[..., Any]) -> None:
    sampling = load().model.model_sampling
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 250)
    assert sampling.timestep(sigmas[:-1]).tolist() == spaced(250)


# --- guidance and samplers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cfg", "channels"), [(4.0, 3), (4.0, 4), (1.0, 3)])
def test_euler_equals_ddim_as_published(load: Callable[..., Any], network: Any, cfg: float, channels: int) -> None:
    timesteps, (noise,) = spaced(20), randn()
    model = load(cfg_channels=channels)
    result = sample_custom(
        model,
        comfy.samplers.sampler_object("euler"),
        published_sigmas(model, timesteps),
        noise,
        labels(207, 360),
        labels(-1),
        cfg,
    )
    with torch.inference_mode():
        expected = Published(timesteps, network, cfg, channels).ddim(noise, torch.tensor([207, 360]), NULL)
        other = Published(timesteps, network, cfg, 7 - channels).ddim(noise, torch.tensor([207, 360]), NULL)
    assert difference(result, expected) < SAME
    assert cfg == 1 or difference(other, expected) > 1e-2, "three and four channels are different images"


@pytest.mark.parametrize("channels", [3, 4])
def test_ddpm_equals_the_published_sampler(load: Callable[..., Any], network: Any, channels: int) -> None:
    timesteps, (noise, *noises) = spaced(30), randn(31)
    waiting = iter(noises)
    sampler = comfy.samplers.KSAMPLER(dit_sampling.sample_ddpm, {"noise_sampler": lambda sigma, following: next(waiting)})
    model = load(cfg_channels=channels)
    result = sample_custom(model, sampler, published_sigmas(model, timesteps), noise, labels(207, 360), labels(-1), 4.0)
    with torch.inference_mode():
        expected = Published(timesteps, network, 4.0, channels).ddpm(noise, torch.tensor([207, 360]), NULL, noises)
    assert difference(result, expected) < SAME


def test_the_learned_variance_matters(load: Callable[..., Any]) -> None:
    model, (noise,) = load(), randn()
    sigmas = published_sigmas(model, spaced(10))
    ours, theirs = (
        sample_custom(model, sampler, sigmas, noise, labels(207), labels(-1), 4.0)
        for sampler in (dit_sampling.dit_sampler(), comfy.samplers.sampler_object("ddpm"))
    )
    assert difference(ours, theirs) > 1e-2


def test_the_smallest_variance_is_the_hosts_ddpm(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    """With v = -1 everywhere and the same noise, our sampler is ComfyUI's own, which has the posterior's variance."""
    model, (noise,) = load(), randn()
    network = model.model.diffusion_model
    with torch.no_grad():
        decoder = network.final_layer.linear
        rows = torch.arange(decoder.weight.shape[0]) % 8 >= 4
        weight, bias = decoder.weight.clone(), decoder.bias.clone()
        weight[rows], bias[rows] = 0.0, -1.0
    monkeypatch.setattr(decoder, "weight", torch.nn.Parameter(weight, requires_grad=False))
    monkeypatch.setattr(decoder, "bias", torch.nn.Parameter(bias, requires_grad=False))
    sigmas = published_sigmas(model, spaced(10))
    ours, theirs = (
        sample_custom(model, sampler, sigmas, noise, labels(207), labels(-1), 4.0)
        for sampler in (dit_sampling.dit_sampler(), comfy.samplers.sampler_object("ddpm"))
    )
    assert difference(ours, theirs) < SAME


def test_one_step_between_the_smallest_and_the_largest_variance() -> None:
    x = torch.zeros(1, 4, 1, 1)
    bar, following = torch.tensor(0.5).double(), torch.tensor(0.8).double()
    beta, posterior = 0.375, 0.375 * 0.2 / 0.5
    noise = torch.ones_like(x)
    for v, variance in ((-1.0, posterior), (1.0, beta), (0.0, (posterior * beta) ** 0.5)):
        moved = dit_sampling.ddpm_step(x, x, torch.full_like(x, v), bar, following, noise)
        assert float(moved[0, 0]) == pytest.approx(variance**0.5, rel=1e-6)
    assert torch.equal(dit_sampling.ddpm_step(x + 2, x + 3, x, torch.tensor(0.5), torch.tensor(1.0), None), x + 3)


@pytest.mark.parametrize("repeated", [[14.0, 5.0, 5.0, 1.0, 0.0], [14.0, 14.0, 5.0, 5.0, 5.0, 1.0, 0.0, 0.0]], ids=str)
def test_a_step_between_equal_sigmas_changes_nothing(load: Callable[..., Any], repeated: list[float]) -> None:
    model, (noise,), sampler = load(), randn(batch=1), dit_sampling.dit_sampler()
    result, expected = (
        sample_custom(model, sampler, torch.tensor(sigmas), noise, labels(1), labels(-1), 2.0)
        for sigmas in (repeated, [14.0, 5.0, 1.0, 0.0])
    )
    assert torch.equal(result, expected) and torch.isfinite(result).all()


@pytest.mark.parametrize("together", [True, False], ids=["one call", "separate calls"])
def test_the_variance_is_the_positive_classs(load: Callable[..., Any], network: Any, together: bool) -> None:
    model, (noise, *noises) = load(), randn(5)
    if not together:
        model.model.memory_required = lambda *args, **kwargs: float("inf")
    waiting = iter(noises)
    sampler = comfy.samplers.KSAMPLER(dit_sampling.sample_ddpm, {"noise_sampler": lambda *_: next(waiting)})
    result = sample_custom(model, sampler, published_sigmas(model, spaced(5)), noise, labels(1), labels(2), 3.0)
    reference = Published(spaced(5), network, 3.0)
    with torch.inference_mode():
        assert difference(result, reference.ddpm(noise, torch.tensor([1, 1]), 2, noises)) < SAME


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpmpp_sde", "ddpm", "uni_pc", "euler_cfg_pp"])
@pytest.mark.parametrize("size", [(8, 8), (4, 14), (7, 5)])
def test_the_hosts_samplers_run_on_any_latent(load: Callable[..., Any], sampler: str, size: tuple[int, int]) -> None:
    result = sample(load(), start=latent(*size), sampler=sampler)
    assert result.shape == (1, 4, *size) and torch.isfinite(result).all() and result.std() > 0


@pytest.mark.parametrize("sampler", ["euler", "ddpm of DiT"])
def test_core_caches_work(load: Callable[..., Any], sampler: str) -> None:
    """EasyCache skips the network in some steps; the learned variance is then the last one that was heard of."""
    from comfy_extras.nodes_easycache import EasyCacheNode

    model, (noise,) = load(), randn(batch=1)
    calls: list[int] = []
    model.model.diffusion_model.blocks[0].register_forward_pre_hook(lambda module, args: calls.append(1))
    cached = EasyCacheNode.execute(model, 1.0, 0.15, 0.95, False)[0]
    chosen = comfy.samplers.sampler_object("euler") if sampler == "euler" else dit_sampling.dit_sampler()
    result = sample_custom(cached, chosen, published_sigmas(model, spaced(12)), noise, labels(1), labels(-1), 4.0)
    assert torch.isfinite(result).all() and 0 < len(calls) < 12


def test_ddpm_on_a_part_of_the_image_keeps_the_rest(load: Callable[..., Any]) -> None:
    model = load()
    start, mask = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    sigmas = published_sigmas(model, spaced(6))
    with torch.inference_mode():
        result = comfy.sample.sample_custom(
            model,
            torch.randn_like(start),
            3.0,
            dit_sampling.dit_sampler(),
            sigmas,
            labels(1),
            labels(-1),
            start,
            mask,
            disable_pbar=True,
            seed=1,
        )
    torch.testing.assert_close(result[..., 4:], start[..., 4:], atol=1e-4, rtol=1e-4)
    assert (result[..., :4] - start[..., :4]).abs().max() > 0.1


# --- velocity ---------------------------------------------------------------------------------------------------------


def test_velocity_models_follow_sits_time(load: Callable[..., Any], network: Any) -> None:
    """SiT: x moves from noise (time 0) to image (time 1) with the velocity that the network predicts."""
    model, (noise,) = load(prediction="velocity"), randn()
    sigmas = torch.linspace(1, 0, 9)
    result = sample_custom(model, comfy.samplers.sampler_object("euler"), sigmas, noise, labels(207, 360), labels(-1), 4.0)
    x, y = noise, torch.tensor([207, 360])
    with torch.inference_mode():
        for step in range(8):
            time = torch.full((2,), step / 8)
            cond, uncond = (network(x, time, label)[:, :4] for label in (y, torch.full_like(y, NULL)))
            velocity = uncond + 4.0 * (cond - uncond)
            velocity[:, 3] = cond[:, 3]
            x = x + velocity / 8
    assert difference(result, x) < SAME


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_ddpm_says_where_it_does_not_apply(load: Callable[..., Any], folder: Path) -> None:
    from tiny_unet import cond, small_model

    (noise,) = randn(batch=1)
    fixed = load_dit(write(folder / "fixed.safetensors", bare(tiny(out_channels=4))))
    for model, conds, message in (
        (load(prediction="velocity"), (labels(1), labels(-1)), "predicts velocity"),
        (fixed, (labels(1), labels(-1)), "without a learned variance"),
        (small_model(), (cond(1), cond(2)), "works with models from Load DiT, not with BaseModel"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_custom(model, dit_sampling.dit_sampler(), torch.tensor([10.0, 0.0]), noise, *conds, 2.0)


def test_ddpm_refuses_sigmas_that_rise(load: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"sigmas rise from 1 to 5\. Remove .*FlipSigmas"):
        sample_custom(
            load(),
            dit_sampling.dit_sampler(),
            torch.tensor([1.0, 5.0, 14.0]),
            randn(batch=1)[0],
            labels(1),
            labels(-1),
            2.0,
        )


def test_ddpm_refuses_labels_for_parts_of_the_image(load: Callable[..., Any]) -> None:
    corner = [[labels(3)[0][0], {**labels(3)[0][1], "area": (4, 4, 0, 0), "strength": 1.0}]]
    with pytest.raises(ValueError, match="one variance for the whole image"):
        sample_custom(
            load(),
            dit_sampling.dit_sampler(),
            torch.tensor([10.0, 1.0, 0.0]),
            randn(batch=1)[0],
            labels(1) + corner,
            labels(-1),
            2.0,
        )


def text() -> list[list[Any]]:
    return [[torch.randn(1, 77, 768), {"pooled_output": torch.randn(1, 768)}]]


def test_labels_that_do_not_fit_are_errors_before_sampling(load: Callable[..., Any]) -> None:
    model, steps = load(), []
    for positive, message in (
        (text(), "takes a class, not a prompt: connect DiT Class Label"),
        (labels(1000), "label 1000 is none of this model's 1000 classes"),
        (labels(1, 2, 3), "labels names 3 classes, but the latent is a batch of 1: set its batch_size to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(model, positive, callback=lambda step, *_: steps.append(step))
    controlled = [[labels(1)[0][0], {**labels(1)[0][1], "control": object()}]]
    with pytest.raises(ValueError, match="no ControlNet for a DiT"):
        model.model.extra_conds(**controlled[0][1], noise=latent())
    with pytest.raises(ValueError, match="takes a class"):
        sample(model, labels(1), text(), callback=lambda step, *_: steps.append(step))
    assert steps == []


@pytest.mark.parametrize("shape", [(1, 16, 1, 8, 8), (1, 4, 8)], ids=["video", "sound"])
def test_latents_of_no_image_are_errors_before_sampling(load: Callable[..., Any], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"the latent has {len(shape)} dimensions.*connect Empty Latent Image"):
        sample(load(), labels(1), start=torch.zeros(shape))


# --- labels -----------------------------------------------------------------------------------------------------------


class Labels:
    """What reaches the network's label embedding."""

    def __init__(self, model: Any) -> None:
        self.seen: list[torch.Tensor] = []
        model.model.diffusion_model.y_embedder.register_forward_pre_hook(lambda module, args: self.seen.append(args[0]))


def test_labels_survive_bfloat16(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy.model_management, "unet_dtype", lambda **kwargs: torch.bfloat16)
    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", lambda *args: None)
    model = load_dit(path)
    assert model.model.get_dtype() == torch.bfloat16
    seen = Labels(model).seen
    result = sample(model, labels(387, 974, 979), start=latent(batch=3))
    assert torch.isfinite(result).all()
    for y in seen:
        assert y.dtype == torch.int64
        assert sorted(y.tolist()) == [387, 974, 979, NULL, NULL, NULL]


def test_a_batch_of_labels_is_each_image_alone(load: Callable[..., Any]) -> None:
    model = load()
    noise = torch.cat(randn(1, batch=3))
    sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "normal", 5)
    euler = comfy.samplers.sampler_object("euler")
    together = sample_custom(model, euler, sigmas, noise, labels(1, 207, 980), labels(-1), 4.0)
    for index, label in enumerate((1, 207, 980)):
        alone = sample_custom(model, euler, sigmas, noise[index : index + 1], labels(label), labels(-1), 4.0)
        assert difference(together[index : index + 1], alone) < SAME


def test_a_shorter_list_is_repeated(load: Callable[..., Any]) -> None:
    model = load()
    seen = Labels(model).seen
    sample(model, labels(1, 2), cfg=1.0, steps=1, start=latent(batch=4))
    assert seen[0].tolist() == [1, 2, 1, 2]


def test_a_zeroed_label_is_the_null_class(load: Callable[..., Any]) -> None:
    import nodes

    model = load()
    zeroed = nodes.ConditioningZeroOut().zero_out(labels(207))[0]
    assert torch.equal(sample(model, negative=zeroed), sample(model, negative=labels(-1)))
    assert torch.equal(sample(model, labels(207)), sample(model)), "the label itself is as it was"


def test_several_labels_can_share_a_image(load: Callable[..., Any]) -> None:
    model = load()
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1
    left, right = (
        [[c[0], {**c[1], "mask": m, "set_area_to_bounds": False}] for c in labels(i)] for i, m in ((1, mask), (2, 1 - mask))
    )
    combined = sample(model, left + right)
    assert torch.isfinite(combined).all() and not torch.equal(combined, sample(model, labels(1)))


def test_training_files_sample_like_bare_ones(folder: Path, network: Any, load: Callable[..., Any]) -> None:
    assert torch.equal(sample(load_dit(write(folder / "ema.pt", training_file(bare(network))))), sample(load()))


# --- names ------------------------------------------------------------------------------------------------------------


def test_imagenets_names() -> None:
    names = dit_labels.imagenet_names()
    assert len(names) == len(set(names)) == 1000
    from torchvision.models import ResNet50_Weights

    theirs = ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
    differing = [index for index in range(1000) if names[index].split(", ")[0].lower() != theirs[index].lower()]
    assert differing == [134, 517, 638, 639], "two cranes and two maillots, which share a name"


@pytest.mark.parametrize(
    ("text", "indices"),
    [
        ("207", [207]),
        ("Golden Retriever", [207]),
        ("207, tabby, 980", [207, 281, 980]),
        ("mountain lion,\nvolcano,", [286, 980]),
        ("Cardigan, cardigan", [264, 474]),
        ("crane (bird), crane (machine)", [134, 517]),
        ("207: golden retriever", [207]),
        ("1234", [1234]),
        ("", []),
        (" , ", []),
    ],
)
def test_labels_are_numbers_or_names(text: str, indices: list[int]) -> None:
    assert dit_labels.parse_labels(text) == indices


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "crane",
            r"'crane', which is the name of several classes: 134 \(crane \(bird\)\), 517 \(crane \(machine\)\)\. Write",
        ),
        ("golden retreiver", r"neither a class number nor .*Did you mean 207 \(golden retriever\)"),
        ("-3", "neither a class number"),
        ("xyzzy", "neither a class number nor one of ImageNet's names. Separate"),
    ],
)
def test_wrong_labels_say_what_to_do(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dit_labels.parse_labels(text)


def test_the_node_gives_both_conditionings(node_classes: dict[str, Any], load: Callable[..., Any]) -> None:
    node = node_classes["DiTClassLabel"]
    positive, null = node.execute("281: tabby, tabby cat")
    assert positive[0][1][dit_labels.LABELS].tolist() == [281] and null[0][1][dit_labels.LABELS].tolist() == [-1]
    several, _ = node.execute("281: tabby, tabby cat", "7, hen")
    assert several[0][1][dit_labels.LABELS].tolist() == [7, 8]
    assert dit_labels.label_options()[281] == "281: tabby, tabby cat" and len(dit_labels.label_options()) == 1000
    assert torch.equal(sample(load(), positive, null), sample(load(), labels(281), labels(-1)))


def test_the_sampler_node_gives_a_sampler(node_classes: dict[str, Any], load: Callable[..., Any]) -> None:
    sampler = node_classes["DiTSampler"].execute()[0]
    model, (noise,) = load(), randn(batch=1)
    sigmas = published_sigmas(model, spaced(5))
    first, again = (sample_custom(model, sampler, sigmas, noise, labels(1), labels(-1), 2.0) for _ in range(2))
    assert torch.equal(first, again) and torch.isfinite(first).all()
