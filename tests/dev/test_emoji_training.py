"""Training of the emoji model: it goes on where it stopped, what it saves is small, and ComfyUI's own loader reads it."""

from __future__ import annotations

import dataclasses
import math
import runpy
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emoji import codec, evaluate, export, optimise, piece, sets, state, train, train_judge, train_model, train_vae
from emoji.captions import Vocabulary
from emoji.compose import Composer
from emoji.concepts import ANIMALS, COLOURS, CONCEPTS, OBJECTS
from emoji.judge import Judge, Verdict, load_judge, see
from emoji.layout import layout
from emoji.model import sample
from emoji.optimise import Optimiser, Plan
from emoji.piece import Setting
from emoji.state import PartState
from host_inprocess import ROOT, host_node
from scenes import evaluate as scenes_evaluate
from torch import Tensor
from torch.nn import functional as F

pytestmark = pytest.mark.newest

CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------------- state


def test_packed_numbers_come_back_as_near_as_their_bits_allow():
    vector = noise(1000) * 0.03
    half = codec.unpack_rounded(codec.pack_rounded(vector, torch.float16))
    assert torch.equal(half, vector.half().float())
    assert torch.equal(codec.unpack_rounded(codec.pack_rounded(vector, torch.bfloat16)), vector.bfloat16().float())
    away = (codec.unpack_blocks(codec.pack_blocks(vector)) - vector).abs()
    assert away.max() <= vector.abs().max() / codec.LEVELS / 2 * 1.001
    variances = [noise(8, 4, 3, 3, seed=1).square() * 1e-8, noise(8, seed=2).square(), torch.zeros(4, 5)]
    back = codec.unpack_variances(codec.pack_variances(variances), variances)
    assert torch.equal(back[1], variances[1]) and back[2].max() < 1e-20
    ratio = (back[0] / variances[0])[variances[0] > 1e-10].log2().abs()
    assert ratio.max() <= codec.LOG_STEP / 2 * 1.01


def test_a_whole_state_stays_below_its_size():
    count = 102_400
    numbers = noise(320, 320)
    sizes = {
        "average": codec.pack_rounded(numbers.flatten() * 0.03, torch.bfloat16),
        "away": codec.pack_blocks(numbers.flatten()),
        "momentum": codec.pack_blocks(numbers.flatten()),
        "variance": codec.pack_variances([torch.exp(numbers)]),
        "weights": codec.pack_rounded(numbers.flatten() * 0.03, torch.float16),
    }
    bytes_each = {name: sum(part.numel() for part in packed.values()) / count for name, packed in sizes.items()}
    numbers_of = {part: sum(one.numel() for one in state.shapes(part) if one.requires_grad) for part in state.PARTS}
    finished = bytes_each.pop("weights")
    whole = numbers_of["model"] * sum(bytes_each.values()) + (numbers_of["vae"] + numbers_of["judge"]) * finished
    assert whole < state.MOST_BYTES, (whole, bytes_each)
    assert numbers_of["model"] > 13e6


def test_the_registrys_archive_leaves_the_state_out():
    ignored = (ROOT / ".comfyignore").read_text(encoding="utf-8").split()
    assert "/dev/" in ignored and state.PATH.is_relative_to(ROOT / "dev")


# ---------------------------------------------------------------------------------------------------- optimiser


def test_the_learning_rate_depends_on_samples_alone():
    plan = Plan(samples=1000, batch=10, lr=1.0, warm_up=5)
    assert plan.rate(0, 0) == pytest.approx(0.2) and plan.rate(50, 500) == 1.0
    assert plan.rate(85, 850) == pytest.approx(0.5) and plan.rate(100, 1000) == pytest.approx(0.0)


def test_a_gradient_that_is_not_finite_changes_nothing():
    network = torch.nn.Linear(3, 2)
    optimiser = Optimiser(network, Plan(samples=100, batch=1, lr=0.1, warm_up=1, averaged=True), None)
    network(torch.ones(1, 3)).sum().backward()
    optimiser.step(1)
    before = [value.clone() for value in (*network.parameters(), *optimiser.adamw.state[network.weight].values())]
    (network(torch.ones(1, 3)).sum() * math.inf).backward()
    optimiser.step(1)
    after = [*network.parameters(), *optimiser.adamw.state[network.weight].values()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert optimiser.left_out.item() == 1 and optimiser.steps == 2


# ------------------------------------------------------------------------------------------------------- trainers


@pytest.fixture(scope="module")
def composer() -> Composer:
    return Composer(CPU)


@pytest.fixture(scope="module")
def setting(composer) -> Setting:
    return Setting(CPU, composer, crop=64, pool=16, reuse=2)


@pytest.fixture
def small_model(monkeypatch) -> Iterator[None]:
    """A U-Net of a third of the width, and a short pool."""
    monkeypatch.setitem(layout.UNET_DETECTED, "model_channels", 32)
    monkeypatch.setattr(train_model, "FIRST", 1)
    yield


def keep(_: PartState) -> None:
    pass


def forever() -> float:
    return time.monotonic() + 600


def distance(one: PartState, other: PartState) -> float:
    return (codec.flat(one.weights) - codec.flat(other.weights)).norm().item()


def test_a_resumed_run_is_nearly_the_run_without_a_stop(setting, small_model, tmp_path, monkeypatch):
    monkeypatch.setattr(train_model.ModelPart, "figures", lambda self: {})
    monkeypatch.setattr(train_model, "encode", lambda vae, images: F.avg_pool2d(images[:, [0, 1, 2, 0]], 8) * 2 - 1)  # soon done
    vae = train_vae.Autoencoder()
    plan = dataclasses.replace(train_model.PLAN, samples=1000, batch=2, warm_up=2)

    def go_on(before: PartState | None, steps: int) -> PartState:
        torch.manual_seed(0)
        made = piece.run(train_model.ModelPart(setting, vae, plan), before, forever(), keep, most_steps=steps)
        return dataclasses.replace(made, weights=[value.clone() for value in made.weights])

    path = tmp_path / "state.safetensors"
    half = go_on(None, 2)
    state.save(path, {"model": half}, "model")
    whole = go_on(None, 4)
    saved = state.load(path)["model"]
    exact, resumed, cold = go_on(half, 2), go_on(saved, 2), go_on(dataclasses.replace(saved, moments=None), 2)
    assert (resumed.steps, resumed.samples, resumed.finished) == (4, 8, False)
    moved = distance(whole, half)
    assert distance(exact, whole) == 0
    assert distance(saved, half) < 0.03 * moved
    assert distance(resumed, whole) < 0.3 * moved
    assert distance(cold, whole) > 3 * distance(resumed, whole)
    averages = [codec.flat(one.average) for one in (resumed, whole, half)]
    assert (averages[0] - averages[1]).norm() < 0.3 * (averages[1] - averages[2]).norm()


def test_the_parts_are_trained_in_turn_from_one_file(setting, small_model, tmp_path, capsys):
    path = tmp_path / "state.safetensors"
    changes = ["vae.samples=2", "vae.batch=1", "judge.samples=3", "judge.batch=3", "model.samples=4", "model.batch=2"]
    plans = train.changed(train.PLANS, changes)
    with pytest.raises(SystemExit, match="the VAE comes first"):
        train.train({"model": 5}, path, setting, plans)
    parts = train.train({"vae": 5, "judge": 5, "model": 5}, path, setting, plans)
    assert {name: (part.samples, part.finished) for name, part in parts.items()} == {
        "vae": (2, True), "judge": (3, True), "model": (4, True)
    }  # fmt: skip
    assert all(part.moments is None for part in parts.values())
    assert 15 < parts["vae"].figures["psnr"] < 40 and 0 < parts["model"].figures["held_out_loss"] < 3
    assert set(parts["judge"].figures["drawn"]) >= {"recall", "precision", "exact", "colour"}
    again = train.train({"vae": 5}, path, setting, plans)
    assert "trained to the end already" in capsys.readouterr().out
    assert distance(again["vae"], parts["vae"]) == 0


def test_a_change_of_a_plan_names_a_number_of_a_part():
    assert train.changed(train.PLANS, ["model.batch=8", "vae.lr=1e-4"])["model"].batch == 8
    for wrong in ("model.size=8", "unet.batch=8", "model.averaged=1", "batch=8"):
        with pytest.raises(SystemExit, match="PART.NAME=VALUE"):
            train.changed(train.PLANS, [wrong])
    assert train.minutes("judge=1.5") == ("judge", 1.5)


def test_the_command_knows_the_trainer():
    commands = runpy.run_path(str(ROOT / "dev" / "__main__.py"))
    script, rest = commands["chosen_script"]("train", ["emoji", "vae=5"])
    assert script == ROOT / "dev" / "emoji" / "train.py" and rest == ["vae=5"]
    assert commands["chosen_script"]("eval", ["emoji"])[0] == ROOT / "dev" / "emoji" / "evaluate.py"
    assert all((ROOT / "dev" / script).is_file() for script in commands["TRAINERS"].values())
    with pytest.raises(SystemExit, match="choose one of: scenes, decoder, dit, emoji"):
        commands["chosen_script"]("train", ["emojis"])


def test_folding_moves_the_normalisation_into_the_last_layer():
    network = train_vae.Normalised()
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        network.encode(images)
    network.eval()
    assert torch.allclose(network.folded().encode(images), network.encode(images), atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- judge


def test_the_judge_says_what_where_and_in_which_colour(composer):
    presence = torch.full((1, len(CONCEPTS)), -3.0)
    presence[0, [CONCEPTS.index("cat"), CONCEPTS.index("car")]] = 3.0
    colour = torch.zeros(1, len(OBJECTS), len(COLOURS))
    colour[0, CONCEPTS.index("car") - len(ANIMALS), list(COLOURS).index("blue")] = 1.0
    verdict = Verdict(presence, colour, torch.zeros(1, len(CONCEPTS), 16, 16))
    assert verdict.shows(0, "cat") and verdict.shows(0, "car", "blue")
    assert not verdict.shows(0, "dog") and not verdict.shows(0, "car", "red")
    pair = sets.Pair("animal-object", (("cat", None), ("car", "red")))
    assert [all(verdict.shows(0, concept, colour) for concept, colour in pair.subjects)] == [False]


def test_the_judge_learns_a_batch_by_heart(composer):
    torch.manual_seed(0)
    composer.chance.restart(1)
    batch, judge = composer(2, masks=True), Judge()
    optimiser = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    losses = []
    for _ in range(6):
        loss = train_judge.judge_loss(judge, batch.images, batch)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    counts = train_judge.Counts()
    counts.add(judge.eval(), batch.images, batch)
    shares = counts.shares()
    assert shares["scenes"] == 2 and 0 <= shares["recall"] <= 1 and len(shares["worst"]) == 5


# --------------------------------------------------------------------------------------------- what is shipped


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> dict[str, Any]:
    """Networks with random weights everywhere, their files, and what ComfyUI's loader makes of them."""
    torch.manual_seed(3)
    parts = {}
    for name, network in (
        ("vae", train_vae.Autoencoder()), ("judge", Judge()), ("model", train_model.Model(len(Vocabulary().ids))),
    ):  # fmt: skip
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * (0.02 if parameter.ndim > 1 else 0.1))
        buffers = dict(network.named_buffers())
        parts[name] = PartState([value.detach() for value in network.parameters()], buffers, finished=True, steps=7)
    folder = tmp_path_factory.mktemp("emoji")
    paths = folder / "fovea-emoji-random.safetensors", folder / "judge.safetensors"
    export.export(parts, *paths)
    return {"parts": parts, "paths": paths, "loaded": scenes_evaluate.load(paths[0])}


def test_the_hosts_loader_takes_every_weight(shipped):
    from safetensors.torch import load_file

    weights = load_file(shipped["paths"][0])
    model, clip, vae = shipped["loaded"]
    assert type(model.model.model_config).__name__ == "FoveaEmoji"
    for prefix, network in (
        (layout.UNET_PREFIX, model.model.diffusion_model),
        (layout.VAE_PREFIX, vae.first_stage_model),
        (layout.TEXT_PREFIX, clip.cond_stage_model.clip_l.transformer.text_model),
    ):
        loaded = network.state_dict()
        saved = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        extra = {"embeddings.token_embedding.weight"} if prefix == layout.TEXT_PREFIX else set()
        assert set(loaded) == set(saved) | extra
        assert all(torch.allclose(loaded[name].float(), value.float(), atol=1e-3) for name, value in saved.items())
    assert {value.dtype for value in weights.values()} == {torch.float16, torch.int32}
    assert shipped["paths"][0].stat().st_size < 35_000_000


def test_the_host_computes_what_the_trainers_networks_compute(shipped, composer):
    model, clip, vae = shipped["loaded"]
    parts, vocabulary = shipped["parts"], composer.vocabulary
    own_vae = train_vae.trained_vae(parts["vae"], CPU)
    own = train_model.trained_model(parts["model"], len(vocabulary.ids), CPU)
    prompt = "a cat and a red car on a checkered blue background, in pixel style"
    with torch.inference_mode():
        conditioning = scenes_evaluate.encode(clip, [prompt])
        assert torch.allclose(conditioning[0][0].float(), own.text(vocabulary([prompt])), atol=2e-2)
        start = noise(1, 4, 32, 32, seed=4)
        sampled = host_node("KSampler")(
            model=model, seed=4, steps=2, cfg=5.0, sampler_name="euler", scheduler="normal", positive=conditioning,
            negative=scenes_evaluate.encode(clip, [""]), latent_image={"samples": torch.zeros(1, 4, 32, 32)}, denoise=1.0,
        )[0]["samples"]  # fmt: skip
        ours = sample(own, vocabulary([prompt]), vocabulary([""]), steps=2, noise=start)
        assert (sampled - ours).abs().max() < 0.02 * ours.abs().max()
        pixels = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
        encoded = host_node("VAEEncode")(vae=vae, pixels=pixels)[0]["samples"]
        assert torch.allclose(encoded.float(), own_vae.encode(pixels.movedim(-1, 1)), atol=2e-2)
        decoded = host_node("VAEDecode")(vae=vae, samples={"samples": encoded})[0]
        ours = own_vae.decode(encoded.float()).clamp(0, 1).movedim(1, -1)
        assert torch.allclose(decoded.float(), ours, atol=2e-2)


def test_the_shipped_judge_is_the_trained_one(shipped):
    judge, own = load_judge(shipped["paths"][1]), train_judge.trained_judge(shipped["parts"]["judge"], CPU)
    images = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(see(judge, images).presence, see(own, images).presence, atol=0.1)


def test_plain_and_guided_runs_are_judged_side_by_side(shipped):
    judge = load_judge(shipped["paths"][1])
    chosen = sets.some("animal-object", 1)
    runs = {"plain": None, "guided": {"attention_grid": 16, "thresholds": ""}}
    found, report = evaluate.compare(shipped["loaded"], judge, chosen, runs, steps=2, cfg=5.0, seed=0, batch=2)
    assert set(report) == {"plain", "guided"} and report["plain"]["both subjects"]["count"] == 1
    assert report["plain"]["subjects"]["count"] == 2 and 0 <= report["guided"]["p against plain"] <= 1
    assert len(found["guided"].right) == 1 and found["guided"].seconds > 0


def test_uneven_changes_are_told_from_chance():
    assert evaluate.better_by_chance([False] * 6, [True] * 6) == pytest.approx(2 / 64)
    assert evaluate.better_by_chance([True, False], [False, True]) == 1.0
    assert evaluate.better_by_chance([True] * 3, [True] * 3) == 1.0


def test_averages_follow_the_weights():
    network = torch.nn.Linear(2, 1)
    start = network.weight.detach().clone()
    optimiser = Optimiser(network, Plan(samples=100, batch=1, lr=0.1, warm_up=1, averaged=True), None)
    for _ in range(3):
        network(torch.ones(1, 2)).sum().backward()
        optimiser.step(1)
    assert optimiser.average is not None
    moved, averaged = (network.weight - start).norm(), (optimiser.average[0] - start).norm()
    assert 0 < averaged < moved
    assert optimise.EMA_DECAY == 0.999
