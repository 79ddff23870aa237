"""T-GATE reuses only what it has stored, in graphs that get in its way, and says what it could not do.

What is computed is counted by prompt on the embedded model: a random network notices no wrong prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch
from host_inprocess import host_node
from scenes import evaluate
from tiny_unet import cond, latent, sample, small_model

PUBLISHED = "drop (keep negative, as published)"
KEPT = ("drop (keep positive)", PUBLISHED)
STEPS = 10

pytestmark = pytest.mark.newest


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level("INFO", logger="fovea")


@pytest.fixture
def tgate(node_classes):
    def apply(model, **settings):
        return node_classes["TGateCache"].execute(model, **{"sp_interval": 1, **settings})[0]

    return apply


@pytest.fixture(scope="module")
def scenes(pack):
    """The embedded model, and two prompts of things that have nothing in common."""
    model, clip, vae = evaluate.load()
    texts = "a red circle and a blue square", "a green triangle and a yellow star"
    return model, *(evaluate.encode(clip, [text]) for text in texts)


@dataclass
class Counter:
    """Forward calls of a model's network and of its cross-attention modules.

    Attributes:
        network: for each call of the network the lists of conds in it, (0,) being the positive prompt alone.
        cross: the same for each cross-attention module that was computed, with the number of network calls before it.
    """

    model: Any
    network: list[tuple[int, ...]] = field(default_factory=list)
    cross: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)

    def __enter__(self) -> Counter:
        root = self.model.model.diffusion_model
        self.handles = [root.register_forward_pre_hook(self._network, with_kwargs=True)]
        for name, module in root.named_modules():
            if name.endswith("attn2"):
                self.handles.append(
                    module.to_q.register_forward_hook(lambda *_: self.cross.append((len(self.network), self.now)))
                )
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _network(self, module: Any, args: Any, kwargs: Any) -> None:
        self.now = tuple(sorted(kwargs["transformer_options"]["cond_or_uncond"]))
        self.network.append(self.now)

    def _cross(self, *_: Any) -> None:
        self.cross.append((len(self.network), self.now))

    @property
    def from_the_negative_alone(self) -> int:
        return sum(prompts == (1,) for _, prompts in self.cross)


def generate(model, positive, negative, steps: int = STEPS, **options) -> torch.Tensor:
    return sample(model, positive, negative, steps=steps, latent_image=torch.zeros(1, 3, 32, 32), **options)


def distance(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


def along(model, sigmas, sampler: str = "euler", **start) -> torch.Tensor:
    """Sample the small model on any sigmas."""
    guider = custom.CFGGuider.execute(model, cond(1), cond(2), 7.0)[0]
    with torch.inference_mode():
        return custom.SamplerCustomAdvanced.execute(
            custom.RandomNoise.execute(3)[0], guider, custom.KSamplerSelect.execute(sampler)[0], sigmas,
            {"samples": latent(), **start},
        )[0]["samples"]  # fmt: skip


# --- stored, or not -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", KEPT)
def test_layers_that_change_size_after_the_gate(tgate, caplog, scenes, kept):
    """Deep Shrink that ends behind the gate: the evaluation is made again with both prompts, and stored."""
    model, positive, negative = scenes
    shrink = host_node("PatchModelAddDownscale", "comfy_extras.nodes_model_downscale")
    other = shrink(model, 2, 2.0, 0.0, 0.75, True, "bicubic", "bicubic")[0]
    with Counter(other) as counter:
        generate(tgate(other, cfg_after_gate=kept), positive, negative)
    assert counter.from_the_negative_alone == 0
    single = (0,) if kept == KEPT[0] else (1,)
    assert counter.network == [(0, 1)] * 4 + [single] * 4 + [(0, 1)] + [single] * 2, "one evaluation was made again"
    assert "cross-attention reused in 5 of 10 steps, negative prompt skipped in 5" in caplog.text
    assert "stored attention did not fit in step 7" in caplog.text


@pytest.mark.parametrize(("first", "kept"), [("EasyCache", PUBLISHED), ("T-GATE", KEPT[0])])
def test_easycache_skips_the_step_that_stores(tgate, caplog, scenes, kept, first):
    model, positive, negative = scenes
    easy = host_node("EasyCacheNode", "comfy_extras.nodes_easycache")
    cached = easy(model, 0.3, 0.15, 0.95, False)[0]
    with Counter(cached) as alone:
        generate(cached, positive, negative, steps=16)
    gate = 9
    gated = tgate(cached, cfg_after_gate=kept, gate_at=gate / 16)
    if first == "T-GATE":
        gated = easy(tgate(model, cfg_after_gate=kept, gate_at=gate / 16), 0.3, 0.15, 0.95, False)[0]
    with Counter(cached) as counter:
        generate(gated, positive, negative, steps=16)
    assert counter.from_the_negative_alone == 0
    computed = len({call for call, _ in counter.cross})
    assert "EasyCache skipped" in caplog.text
    assert computed < len(alone.network), "both help"


def test_full_steps_after_the_gate_are_not_left_to_easycache(tgate, caplog, scenes):
    """What it remembers of the negative prompt is old by then, and what such a step stores is what the next ones reuse."""
    model, positive, negative = scenes
    cached = host_node("EasyCacheNode", "comfy_extras.nodes_easycache")(model, 0.3, 0.15, 0.95, False)[0]
    with Counter(cached) as counter:
        generate(tgate(cached, refresh_every=3), positive, negative, steps=16)
    assert "all computed again in 3" in caplog.text
    assert {(call, (0, 1)) for call in (9, 12, 15)} <= set(counter.cross), "steps 8, 11 and 14, of both prompts"
    assert "negative prompt skipped in 0" not in caplog.text


def test_easycache_goes_on_after_the_gate_and_judges_by_the_prompt_that_is_kept(tgate, caplog, scenes):
    model, positive, negative = scenes
    caplog.set_level("INFO")
    easy = host_node("EasyCacheNode", "comfy_extras.nodes_easycache")
    cached = easy(model, 0.3, 0.15, 0.95, False)[0]

    def skipped(patched) -> int:
        caplog.clear()
        generate(patched, positive, negative, steps=16)
        return int(caplog.text.split("EasyCache - skipped ")[1].split("/")[0])

    alone = skipped(cached)
    assert skipped(tgate(cached)) >= 0.6 * alone > 0
    assert "steps after the gate" in caplog.text


def lazily(model, threshold: float):
    return host_node("LazyCacheNode", "comfy_extras.nodes_easycache")(model, threshold, 0.15, 0.95, False)[0]


def test_lazycache_skips_the_step_that_stores(tgate, caplog, scenes):
    """Self-attention that intervals have stored by then is no cross-attention that could be reused."""
    model, positive, negative = scenes
    with Counter(model) as counter:
        generate(tgate(lazily(model, 0.2), sp_interval=5, gate_at=9 / 16), positive, negative, steps=16)
    assert "attention was stored only in step" in caplog.text and "did not fit" not in caplog.text
    assert "steps after the gate were not evaluated (skipped by LazyCache)" in caplog.text
    assert (0,) in counter.network and counter.from_the_negative_alone == 0


@pytest.mark.parametrize("gate", [6, 7])
def test_a_refresh_that_lazycache_skipped_is_made_up_for(tgate, scenes, gate):
    """It skips every other step, for one of two gates just those that refresh: guidance was extrapolated to the end."""
    model, positive, negative = scenes
    with Counter(model) as counter:
        generate(tgate(lazily(model, 0.15), refresh_every=2, gate_at=gate / 16), positive, negative, steps=16)
    assert len(counter.network) <= 12 and counter.network.count((0,)) <= 1


def test_lazycache_repeats_no_extrapolated_guidance(tgate, scenes):
    """Where the gate leaves it steps of both prompts only now and then, the image is that without it."""
    model, positive, negative = scenes
    alone = generate(tgate(model, refresh_every=2), positive, negative, steps=16)
    beside = generate(tgate(lazily(model, 0.1), refresh_every=2), positive, negative, steps=16)
    assert distance(beside, alone) < 1e-3


@pytest.mark.parametrize("kept", KEPT)
def test_a_negative_prompt_that_ends(tgate, caplog, scenes, kept):
    """Behind its end there is nothing to evaluate of it: the positive prompt is kept, in any case."""
    model, positive, negative = scenes
    (ends,) = host_node("ConditioningSetTimestepRange")(negative, 0.0, 0.6)
    with Counter(model) as counter:
        result = generate(tgate(model, cfg_after_gate=kept), positive, ends)
    assert counter.from_the_negative_alone == 0 and counter.network[-3:] == [(0,)] * 3
    assert torch.isfinite(result).all() and result.abs().max() < 4
    assert ("the negative prompt does not act in every step" in caplog.text) is (kept == PUBLISHED)


def test_a_block_that_calls_the_layers_itself(tgate, caplog, scenes):
    """Other packs replace a block's forward: what reuses attention is never called, and what computes it has one prompt."""
    model, positive, negative = scenes
    other = model.clone()
    name = next(n for n, m in model.model.diffusion_model.named_modules() if type(m).__name__ == "BasicTransformerBlock")
    block = model.model.diffusion_model.get_submodule(name)

    def forward(x, context=None, transformer_options=None):
        x = x + block.attn1(block.norm1(x), context=None, transformer_options=transformer_options)
        x = x + type(block.attn2).forward(block.attn2, block.norm2(x), context=context, transformer_options=transformer_options)
        return x + block.ff(block.norm3(x))

    other.add_object_patch(f"diffusion_model.{name}.forward", forward)
    result = generate(tgate(other, cfg_after_gate=PUBLISHED), positive, negative)
    assert "cross-attention is no longer reused: another node computes cross-attention in its own way" in caplog.text
    expected = generate(tgate(model), positive, negative)
    assert distance(result, expected) < 0.5 * distance(generate(tgate(model), negative, positive), expected)


@pytest.mark.parametrize("published", [False, True])
def test_blocks_compiled_in_place_keep_the_positive_prompt(tgate, caplog, scenes, published):
    """``module.compile()`` leaves no shell to see; the network ignores another forward. (Nothing is compiled here.)"""
    model, positive, negative = scenes
    blocks = [m for m in model.model.diffusion_model.modules() if type(m).__name__ == "BasicTransformerBlock"]
    try:
        for block in blocks:
            block._compiled_call_impl = block._call_impl
        with Counter(model) as counter:
            generate(tgate(model, **({"cfg_after_gate": PUBLISHED} if published else {})), positive, negative)
    finally:
        for block in blocks:
            block._compiled_call_impl = None
    assert counter.network == [(0, 1)] * 4 + [(0,)] * 6
    assert "the model is compiled, so only the negative prompt is dropped" in caplog.text


# --- counted as it was ----------------------------------------------------------------------------------------------------


def test_a_step_counts_as_reused_where_every_module_was(tgate, caplog):
    """Two prompts share the image, one of them begins after the gate; ComfyUI runs them in one call or in two."""
    model = small_model()
    (late,) = host_node("ConditioningSetTimestepRange")(cond(4), 0.65, 1.0)
    model.model.memory_required = lambda *args, **kwargs: float("inf")  # each prompt in a call of its own
    sample(tgate(model), cond(1) + late)
    assert "cross-attention reused in 5 of 10 steps, negative prompt skipped in 6" in caplog.text
    assert "in step 6 only 7 of 14 cross-attention modules were reused, as a prompt begins there" in caplog.text


# --- and the reason -------------------------------------------------------------------------------------------------------


def test_cfg_1_gains_nothing(tgate, caplog):
    sample(tgate(small_model()), cfg=1.0)
    assert "CFG is 1" in caplog.text and "the image changes, so bypass this node" in caplog.text


def test_a_run_of_one_step_says_what_helps(tgate, caplog):
    sample(tgate(small_model()), steps=1)
    assert "a run of 1 step has none after the gate" in caplog.text and "whole noise schedule" in caplog.text


def test_prompts_that_come_one_by_one(tgate, caplog):
    """Some guiders and nodes evaluate each prompt in a batch of its own, as guidance with two models does."""
    other = small_model()
    calc = comfy.samplers.calc_cond_batch

    def one_by_one(args):
        model, (positive, negative) = args["model"], args["conds"]
        rest = args["input"], args["sigma"], args["model_options"]
        return [calc(model, [positive, None], *rest)[0], calc(model, [None, negative], *rest)[1]]

    other.set_model_sampler_calc_cond_batch_function(one_by_one)
    sample(tgate(other))
    assert "negative prompt skipped in 0" in caplog.text and "the prompts are computed one by one" in caplog.text


def test_a_guider_with_two_models(tgate, caplog):
    two = getattr(custom, "DualModelGuider", None)
    if two is None:
        pytest.skip("this ComfyUI has none")
    model = small_model()
    guider = two.execute(tgate(model), cond(1), 7.0, model_negative=small_model(seed=1), negative=cond(2))[0]
    sigmas = custom.BasicScheduler.execute(model, "normal", 6, 1.0)[0]
    with torch.inference_mode():
        custom.SamplerCustomAdvanced.execute(
            custom.RandomNoise.execute(3)[0], guider, custom.KSamplerSelect.execute("euler")[0], sigmas, {"samples": latent()}
        )
    assert "negative prompt skipped in 0" in caplog.text and "the prompts are computed one by one" in caplog.text


class Adapter:
    """IPAdapter's replacement of attn2: it tells between which sigmas it acts."""

    def __init__(self, start: float, end: float, told: bool) -> None:
        self.start, self.end, self.calls = start, end, 0
        if told:
            self.kwargs = [{"sigma_start": start, "sigma_end": end}]

    def __call__(self, q, k, v, extra):
        self.calls += 1
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return out + 3.0 if self.start >= float(extra["sigmas"].max()) >= self.end else out


@pytest.mark.parametrize(("kept", "told"), [(KEPT[0], True), (KEPT[0], False), (PUBLISHED, True), ("keep", True)])
def test_a_replacement_that_starts_after_the_gate_acts_or_is_named(tgate, caplog, kept, told):
    model = small_model()
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS).tolist()

    def run(start: float) -> tuple[torch.Tensor, str]:
        other = model.clone()
        adapter = Adapter(start, 0.0, told)
        for block in (("input", 1), ("input", 3), ("middle", 0), ("output", 0), ("output", 1), ("output", 2), ("output", 3)):
            other.set_model_attn2_replace(adapter, *block)
        caplog.clear()
        return sample(tgate(other, cfg_after_gate=kept)), caplog.text

    (acts, said), (never, _) = run(sigmas[6]), run(-1.0)
    assert torch.equal(acts, never) is not told
    assert ("stored attention did not fit in step 6" in said) is told
    assert ("another node changes cross-attention" in said) is not told


# --- memory ---------------------------------------------------------------------------------------------------------------


def test_auto_mode_keeps_no_more_than_a_part_of_the_cache(tgate, pack, monkeypatch):
    from fovea_attention.attention import tgate as room

    held, peaks = [], []
    finish, release = room.ConvergenceMeter.finish_step, room.TGateRun.release
    monkeypatch.setattr(room.ConvergenceMeter, "finish_step", lambda self: held.append(owned(self)) or finish(self))
    monkeypatch.setattr(room.TGateRun, "release", lambda self: peaks.append(self.cache_peak_bytes) or release(self))
    sample(tgate(small_model(), mode="auto"), latent_image=latent(16, 16))
    assert 0 < max(held) <= 0.6 * peaks[0]


def owned(meter) -> int:
    """Bytes of the memory behind a meter's samples, views' whole tensors included."""
    return sum(sample.untyped_storage().nbytes() for part in (meter._before, meter._now) for sample in part.values())


def test_prompts_that_have_ended_are_forgotten_and_a_dropped_one_is_not_kept(tgate, pack, monkeypatch):
    from fovea_attention.attention import tgate as room

    kept = []
    release = room.TGateRun.release
    monkeypatch.setattr(
        room.TGateRun, "release", lambda self: kept.append(len({uuid for _, uuid in self.cache.conds})) or release(self)
    )
    (early,) = host_node("ConditioningSetTimestepRange")(cond(1), 0.0, 0.7)
    (late,) = host_node("ConditioningSetTimestepRange")(cond(4), 0.7, 1.0)
    sample(tgate(small_model()), early + late)
    assert kept == [1]


def test_what_is_stored_late_is_counted(tgate, pack, monkeypatch, caplog):
    from fovea_attention.attention import tgate as room

    peaks, release = [], room.TGateRun.release
    monkeypatch.setattr(room.TGateRun, "release", lambda self: peaks.append(self.cache_peak_bytes) or release(self))
    model = small_model()
    sample(tgate(model))
    sample(tgate(model), sampler="dpm_fast")
    assert peaks[1] == peaks[0] > 0
    assert "attention was stored only in step" in caplog.text


# --- steps and noise levels -----------------------------------------------------------------------------------------------


def schedule(name: str, sigmas: torch.Tensor) -> torch.Tensor:
    if name == "flipped":
        flipped = sigmas.flip(0)
        flipped[0] = 1e-4
        return flipped
    if name == "restarted":
        return torch.cat([sigmas[:6], sigmas[3:8]])
    return torch.cat([sigmas[:5], sigmas[4:]])


@pytest.mark.parametrize(
    ("name", "sampler"),
    [("flipped", "euler"), ("restarted", "euler"), ("repeated", "euler"), ("restarted", "heun"), ("flipped", "dpmpp_2m")],
)
def test_the_gate_follows_the_samplers_progress(tgate, caplog, name, sampler):
    model = small_model()
    sigmas = schedule(name, comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS))
    steps = len(sigmas) - 1
    gate = round(0.4 * steps)
    with Counter(model) as counter:
        result = along(tgate(model), sigmas, sampler)
    assert f"cross-attention reused in {steps - gate} of {steps} steps, negative prompt skipped in {steps - gate}" in caplog.text
    if sampler != "heun":
        assert counter.network == [(0, 1)] * gate + [(0,)] * (steps - gate)
    assert torch.isfinite(result).all()


@pytest.mark.parametrize(
    ("sigmas", "evaluations"),
    [
        ((8.0, 4.0, 2.0, 1.0, 0.0), [(8.0, 0, 0), (6.0, 1, 0), (4.0, 1, 1), (1.0, 9, 3)]),
        ((1.0, 2.0, 4.0, 8.0), [(1.0, 0, 0), (1.5, 1, 0), (2.0, 1, 1), (4.0, 2, 2), (8.0, 3, 2)]),
        ((8.0, 2.0, 4.0, 1.0, 0.0), [(8.0, 0, 0), (2.0, 1, 1), (3.0, 2, 1), (4.0, 2, 2), (2.5, 3, 2), (1.0, 3, 3)]),
        ((8.0, 4.0, 4.0, 1.0), [(8.0, 0, 0), (4.0, 1, 1), (4.0, 2, 2), (1.0, 3, 2)]),
        ((8.0, 0.0), [(8.0, 0, 0), (0.0, 1, 0)]),
    ],
)
def test_sigma_decides_only_inside_a_step(pack, sigmas, evaluations):
    from fovea_attention.attention.host import StepClock

    clock = StepClock(sigmas)
    assert [clock.step_at(sigma, done) for sigma, done, _ in evaluations] == [step for *_, step in evaluations]


# --- the gate on the noise schedule ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuts", "kept"),
    [([0, 6, 10], KEPT[0]), ([0, 2, 6, 10], PUBLISHED), (list(range(11)), PUBLISHED)],
    ids=["two", "three", "ten"],
)
def test_slices_open_the_gate_where_one_run_does(tgate, scenes, caplog, cuts, kept):
    model, positive, negative = scenes
    gated = tgate(model, gate_on="whole noise schedule", cfg_after_gate=kept)
    node = host_node("KSamplerAdvanced")

    def in_slices(patched, cuts):
        samples = {"samples": torch.zeros(1, 3, 32, 32)}
        with torch.inference_mode():
            for start, end in pairwise(cuts):
                noise = "enable" if start == 0 else "disable"
                samples = node(patched, noise, 3, 10, 7.0, "euler", "normal", positive, negative, samples, start, end, "enable")[
                    0
                ]
        return samples["samples"]

    plain, whole = in_slices(model, [0, 10]), in_slices(gated, [0, 10])
    with Counter(model) as counter:
        sliced = in_slices(gated, cuts)
    assert [len(prompts) for prompts in counter.network] == [2] * 4 + [1] * 6
    assert counter.from_the_negative_alone == 0
    assert distance(sliced, whole) < 0.5 * distance(whole, plain)


def test_low_denoise_lies_behind_the_gate_of_the_schedule(tgate, caplog):
    sample(tgate(small_model(), gate_on="whole noise schedule"), denoise=0.3, latent_image=latent() + 1)
    assert "negative prompt skipped in 10" in caplog.text
    caplog.clear()
    sample(tgate(small_model(), gate_on="whole noise schedule"), steps=20, last_step=5)
    assert "no step of this run lies between the gate and the end" in caplog.text


@pytest.mark.parametrize("gate_on", ["steps of this run", "whole noise schedule"])
def test_the_last_steps_are_computed_in_full(tgate, caplog, gate_on):
    model = small_model()
    plain = sample(model)
    with Counter(model) as counter:
        result = sample(tgate(model, gate_on=gate_on, full_at_end=0.3))
    assert counter.network == [(0, 1)] * 4 + [(0,)] * 3 + [(0, 1)] * 3
    assert "cross-attention reused in 3 of 10 steps, negative prompt skipped in 3" in caplog.text
    assert distance(result, plain) < distance(sample(tgate(model)), plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"full_at_end": 1.0}, "full_at_end is 1"), ({"gate_at": 0.6, "full_at_end": 0.4}, "no step is left between them")],
)
def test_bad_values_of_the_end(tgate, settings, message):
    with pytest.raises(ValueError, match=message):
        tgate(small_model(), **settings)


# --- the plan of an evaluation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "changes", "expected"),
    [
        ({}, {"step": 2}, ("compute", None)),
        ({}, {"step": 3}, ("compute and store", None)),
        ({}, {"step": 4, "holds_mean": True}, ("reuse", 0)),
        ({"cfg_after_gate": PUBLISHED}, {"step": 4, "holds_mean": True}, ("reuse", 1)),
        ({"cfg_after_gate": PUBLISHED}, {"step": 4}, ("compute and store", None)),
        ({"cfg_after_gate": PUBLISHED}, {"step": 4, "active": (("p",), ())}, ("reuse", 0)),
        ({}, {"step": 4, "active": ((), ("n",))}, ("reuse", None)),
        ({}, {"step": 4, "needs_uncond": True}, ("reuse", None)),
        ({}, {"step": 4, "reuses_text": False}, ("reuse", 0)),
        ({"refresh_every": 2}, {"step": 5, "holds_mean": True, "has_guidance": True}, ("compute and store", None)),
        ({"refresh_every": 2}, {"step": 4, "holds_mean": True}, ("compute and store", None)),
        ({"refresh_every": 2}, {"step": 6, "last": 4, "holds_mean": True, "has_guidance": True}, ("compute and store", None)),
        ({"refresh_every": 2}, {"step": 6, "last": 5, "holds_mean": True, "has_guidance": True}, ("reuse", 0)),
        ({"refresh_every": 3}, {"step": 6, "last": 6, "holds_mean": True, "has_guidance": True}, ("compute and store", None)),
        ({}, {"step": 8, "holds_mean": True, "full_from": 8}, ("compute", None)),
        ({}, {"step": 0, "gate": 0}, ("reuse", 0)),
    ],
)
def test_plan_of_an_evaluation(pack, settings, changes, expected):
    from fovea_attention.attention import tgate as room

    kept = room.CfgAfterGate(settings.pop("cfg_after_gate", KEPT[0]))
    now = {"gate": 4, "full_from": 10, "prompts": (("p",), ("n",)), "active": (("p",), ("n",)), **changes}
    plan = room.plan_evaluation(room.TGateSettings(sp_interval=1, cfg_after_gate=kept, **settings), room.Situation(**now))
    assert (plan.attention.cross_attention.value, plan.kept) == expected


@pytest.mark.parametrize(("last", "expected"), [(4, "compute and store"), (5, "reuse"), (None, "reuse")])
def test_self_attention_that_was_not_stored_in_time_is_stored_next(pack, last, expected):
    """Step 5 of intervals of 5 would have stored it, and another cache skipped that step."""
    from fovea_attention.attention import tgate as room

    now = room.Situation(step=6, gate=9, full_from=12, prompts=(("p",), ("n",)), active=(("p",), ("n",)), last=last)
    plan = room.plan_evaluation(room.TGateSettings(sp_interval=5), now)
    assert plan.attention.self_attention.value == expected
