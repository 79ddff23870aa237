"""T-GATE equals the official implementation, and computes no more than the schedule says."""

from __future__ import annotations

import collections

import comfy.samplers
import pytest
import torch
from tgate_reference import Reference, assert_same_image, relative_difference
from tiny_unet import cond, latent, reference_cases, sample, small_model, vector_model

CASES = reference_cases("tgate")
AS_PUBLISHED = "drop (keep negative, as published)"

# The published schedule for 25 steps, gate 10, sp 5, fi 1, warm-up 2: C compute, S compute and store, R reuse.
TRUTH_SELF = "CCSRRSRRRC" + "C" * 15
TRUTH_CROSS = "C" * 9 + "S" + "R" * 15
TRUTH_BATCH = [2] * 10 + [1] * 15


@pytest.fixture(scope="module")
def tgate(node_classes):
    def apply(model, **settings):
        return node_classes["TGateCache"].execute(model, **settings)[0]

    return apply


def run_case(model, case) -> torch.Tensor:
    """The latent after each step, in sigma units."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds([[case["cond"], {}]], [[case["uncond"], {}]])
    guider.set_cfg(case["cfg"])
    before = []
    with torch.inference_mode():
        last = guider.sample(
            case["noise"], torch.zeros_like(case["noise"]), comfy.samplers.sampler_object(case["sampler"]), case["sigmas"],
            callback=lambda step, denoised, x, steps: before.append(x.clone()), disable_pbar=True, seed=0,
        )  # fmt: skip
    return torch.stack([*before[1:], model.model.latent_format.process_in(last)])


def assert_equal_to_official(result: torch.Tensor, official: torch.Tensor, sigmas: torch.Tensor) -> None:
    """Both measures of the vectors' notes: a nearly right schedule passes the first and fails the second."""
    assert (result - official).abs().max() / official.abs().max() < 1e-4
    intervals = (sigmas[1:] - sigmas[:-1])[1:].view(-1, 1, 1, 1, 1)
    eps, official_eps = ((x[1:] - x[:-1]) / intervals for x in (result, official))
    errors = (eps - official_eps).abs().flatten(1).amax(1) / official_eps.abs().flatten(1).amax(1)
    assert errors.max() < 2e-3


def separate_calls(model) -> None:
    """Make ComfyUI believe that two conds never fit into memory together, as on a small GPU."""
    model.model.memory_required = lambda *args, **kwargs: float("inf")


@pytest.mark.parametrize("together", [True, False], ids=["one call", "separate calls"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_official_implementation(tgate, name, together):
    case = CASES[name]
    model = vector_model()
    if not together:
        separate_calls(model)
    gated = tgate(
        model,
        gate_at=case["gate_step"] / case["steps"],
        cfg_after_gate=AS_PUBLISHED,
        sp_interval=case["sp_interval"],
        fi_interval=case["fi_interval"],
        warm_up=case["warm_up"],
    )
    assert_equal_to_official(run_case(gated, case), case["x"], case["sigmas"])


@pytest.mark.newest
def test_the_reference_cases_are_sampled_as_they_were_recorded(tgate):
    """Without T-GATE ComfyUI equals the recorded plain run, so a difference above is T-GATE's own."""
    case = CASES["n12_g4_sp1_fi1_w2_b1"]
    assert_equal_to_official(run_case(vector_model(), case), case["base_x"], case["sigmas"])


def test_a_second_run_equals_the_first(tgate):
    gated = tgate(small_model(), sp_interval=2, fi_interval=2)
    assert torch.equal(sample(gated), sample(gated))


def test_keeping_the_positive_prompt_equals_keeping_the_negative_where_text_enters_by_cross_attention_only(tgate):
    model = small_model()
    positive = sample(tgate(model))
    negative = sample(tgate(model, cfg_after_gate=AS_PUBLISHED))
    assert_same_image(positive, negative)


def attention_blocks(model) -> list[str]:
    return [name for name, _ in model.model.diffusion_model.named_modules() if name.endswith(".attn2")]


class CallCounter:
    """What really ran in each step: projections of attention modules, and the batch they saw."""

    def __init__(self, model):
        self.step = 0
        self.calls = collections.Counter()
        self.batches: dict[int, int] = {}
        self.handles = []
        for name, module in model.model.diffusion_model.named_modules():
            if name.endswith(("attn1", "attn2")):
                self.handles.append(module.to_q.register_forward_hook(self._hook(name.rsplit(".", 1)[1])))

    def _hook(self, kind):
        def count(module, inputs, output):
            self.calls[self.step, kind] += 1
            self.batches[self.step] = inputs[0].shape[0]

        return count

    def next_step(self, step, *_):
        self.step = step + 1

    def computed(self, kind: str, steps: int) -> list[int]:
        return [self.calls[step, kind] for step in range(steps)]


def test_truth_table_by_counting_module_calls(tgate):
    model = small_model()
    counter = CallCounter(model)
    sample(tgate(model, gate_at=0.4), steps=25, callback=counter.next_step)
    blocks = len(attention_blocks(model))
    assert counter.computed("attn1", 25) == [0 if mark == "R" else blocks for mark in TRUTH_SELF]
    assert counter.computed("attn2", 25) == [0 if mark == "R" else blocks for mark in TRUTH_CROSS]
    assert [counter.batches[step] for step in range(25) if step in counter.batches] == [
        batch for step, batch in enumerate(TRUTH_BATCH) if counter.calls[step, "attn1"] or counter.calls[step, "attn2"]
    ]


def test_plan_is_the_published_table(pack):
    from fovea_attention.attention.tgate import Action, TGateSettings, plan

    marks = {Action.COMPUTE: "C", Action.STORE: "S", Action.REUSE: "R"}
    settings = TGateSettings()
    plans = [plan(step, 10, settings) for step in range(25)]
    assert "".join(marks[p.self_attention] for p in plans) == TRUTH_SELF
    assert "".join(marks[p.cross_attention] for p in plans) == TRUTH_CROSS


@pytest.mark.newest
@pytest.mark.parametrize(
    ("gate", "settings"),
    [
        (4, {"sp_interval": 1}),
        (5, {"sp_interval": 2, "fi_interval": 2}),
        (6, {"sp_interval": 3, "fi_interval": 3, "warm_up": 0}),
        (1, {"sp_interval": 1}),
        (9, {"sp_interval": 4, "warm_up": 1}),
        (4, {"sp_interval": 5, "cfg_after_gate": "keep"}),
        (4, {"sp_interval": 2, "fi_interval": 2, "cfg_after_gate": "keep"}),
        (4, {"sp_interval": 1, "positive_share": 1.0}),
        (5, {"sp_interval": 2, "positive_share": 2.0}),
        (4, {"sp_interval": 1, "positive_share": 0.0}),
        (4, {"sp_interval": 1, "refresh_every": 3}),
        (4, {"sp_interval": 1, "refresh_every": 2, "positive_share": 0.0}),
        (3, {"sp_interval": 2, "fi_interval": 2, "refresh_every": 4}),
        (1, {"sp_interval": 1, "refresh_every": 2}),
        (6, {"sp_interval": 3, "warm_up": 0, "refresh_every": 2}),
        (4, {"sp_interval": 1, "refresh_every": 3, "cfg_after_gate": "keep"}),
    ],
)
def test_equals_the_plain_reference(tgate, gate, settings):
    model = small_model()
    reference = Reference(
        gate,
        sp=settings["sp_interval"],
        fi=settings.get("fi_interval", 1),
        warm_up=settings.get("warm_up", 2),
        drop=settings.get("cfg_after_gate") != "keep",
        share=settings.get("positive_share", 0.5),
        refresh=settings.get("refresh_every", 0),
    )
    expected = sample(reference.apply(model))
    result = sample(tgate(model, gate_at=gate / 10, **settings))
    assert_same_image(result, expected)
    assert relative_difference(result, sample(model)) > 1e-4  # the schedule shows in the image


@pytest.mark.parametrize("kept", ["drop (keep positive)", AS_PUBLISHED, "keep"])
def test_the_more_full_steps_after_the_gate_the_nearer_to_the_plain_image(tgate, kept):
    model = small_model()
    plain = sample(model)
    never, third, second = (
        (sample(tgate(model, gate_at=0.4, sp_interval=1, cfg_after_gate=kept, refresh_every=every)) - plain).norm()
        for every in (0, 3, 2)
    )
    assert second < third < never and second < 0.5 * never


def test_guidance_goes_on_along_a_line_over_log_sigma_and_not_far(pack):
    from fovea_attention.attention.host import StepClock
    from fovea_attention.attention.tgate import TGateRun, TGateSettings

    run = TGateRun(TGateSettings(refresh_every=3), StepClock.from_sigmas(torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.0])), True)

    def full_step(sigma: float, noise: float) -> None:
        run.begin_evaluation(sigma, torch.Size((1, 1)))
        run.keep_guidance([torch.tensor([[7.0 + noise * sigma]]), torch.tensor([[7.0]])])

    full_step(8.0, 1.0)
    assert run.guidance.at(2.0).item() == pytest.approx(1.0 * 2.0), "as it was, where one step is all that is known"
    full_step(4.0, 1.5)
    assert [run.guidance.at(sigma).item() / sigma for sigma in (4.0, 2.83, 2.0)] == pytest.approx([1.5, 1.75, 2.0], rel=1e-3)
    assert run.guidance.at(0.5).item() == pytest.approx(2.0 * 0.5), "as far beyond as the two are apart"
    full_step(3.0, 1.6)  # the sampler evaluates its second step once more
    assert run.guidance.before.sigma == 8.0 and run.guidance.at(3.0).item() == pytest.approx(1.6 * 3.0)
    full_step(8.0, 5.0)
    assert run.guidance.before is None, "the noise level went up"


def test_full_steps_after_the_gate_are_as_many_as_they_say(tgate, caplog):
    caplog.set_level("INFO", logger="fovea")
    model = small_model()
    counter = CallCounter(model)
    sample(tgate(model, gate_at=0.4, sp_interval=1, refresh_every=3), steps=10, callback=counter.next_step)
    blocks = len(attention_blocks(model))
    assert counter.computed("attn2", 10) == [blocks] * 4 + [0, 0, blocks, 0, 0, blocks]
    assert [counter.batches[step] for step in range(10)] == [2] * 4 + [1, 1, 2, 1, 1, 2]
    assert "cross-attention reused in 4 of 10 steps, negative prompt skipped in 4, all computed again in 2" in caplog.text


def test_off_is_bit_equal_to_no_node(tgate):
    model = small_model()
    assert torch.equal(sample(tgate(model, gate_at=1.0)), sample(model))


def test_a_second_node_replaces_the_first(tgate):
    model = small_model()
    assert torch.equal(sample(tgate(tgate(model, gate_at=0.2), gate_at=0.6)), sample(tgate(model, gate_at=0.6)))
    assert torch.equal(sample(tgate(tgate(model, gate_at=0.2), gate_at=1.0)), sample(model))


def test_the_incoming_model_is_not_changed(tgate):
    model = small_model()
    plain = sample(model)
    gated = tgate(model)
    assert gated is not model and not model.wrappers.get("apply_model")
    sample(gated)
    assert torch.equal(sample(model), plain)


def test_clones_with_different_gates_do_not_meet(tgate):
    model = small_model()
    early, late = tgate(model, gate_at=0.2), tgate(model, gate_at=0.6)
    expected = sample(early), sample(late)
    assert torch.equal(sample(late), expected[1])
    assert torch.equal(sample(early), expected[0])
    assert not torch.equal(*expected)


@pytest.mark.newest
@pytest.mark.parametrize("batch", [1, 3])
def test_batches_keep_their_items_apart(tgate, batch):
    model = small_model()
    start = latent(batch=batch)
    gated = sample(tgate(model), latent_image=start)
    expected = sample(Reference(4, sp=5).apply(model), latent_image=start)
    assert_same_image(gated, expected)


@pytest.mark.newest
@pytest.mark.parametrize("device", ["auto", "gpu", "cpu"])
def test_the_cache_device_changes_no_bit(tgate, device):
    model = small_model()
    assert torch.equal(sample(tgate(model, cache_device=device)), sample(tgate(model)))


# --- auto mode ------------------------------------------------------------------------------------------------------


def gate_of(caplog) -> int:
    return int(caplog.messages[-1].split("gate opened at step ")[1].split(";")[0])


@pytest.mark.newest
@pytest.mark.parametrize("together", [True, False], ids=["one call", "separate calls"])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_auto_equals_a_fixed_gate_at_the_step_it_chose(tgate, caplog, sampler, together):
    caplog.set_level("INFO", logger="fovea")
    model = small_model()
    if not together:
        separate_calls(model)
    automatic = sample(tgate(model, mode="auto", tolerance=0.15, gate_at=0.8), steps=20, sampler=sampler)
    gate = gate_of(caplog)
    assert 3 <= gate < 16
    assert torch.equal(automatic, sample(tgate(model, gate_at=gate / 20), steps=20, sampler=sampler))


def test_auto_opens_at_gate_at_when_attention_never_settles(tgate, caplog):
    caplog.set_level("INFO", logger="fovea")
    model = small_model()
    automatic = sample(tgate(model, mode="auto", tolerance=1e-9, gate_at=0.5))
    assert gate_of(caplog) == 5
    assert torch.equal(automatic, sample(tgate(model, gate_at=0.5)))


@pytest.mark.newest
def test_a_looser_tolerance_opens_earlier(tgate, caplog):
    caplog.set_level("INFO", logger="fovea")
    model = small_model()
    gates = []
    for tolerance in (0.001, 0.004, 1.0):
        sample(tgate(model, mode="auto", tolerance=tolerance, gate_at=1 - 1e-9), steps=20)
        gates.append(gate_of(caplog))
    assert gates == sorted(gates, reverse=True) and len(set(gates)) == 3


@pytest.mark.parametrize(
    ("changes", "gate"),
    [
        ([0.30, 0.20, 0.12, 0.04], 6),  # falls from the start: below the tolerance at step 4
        ([0.04, 0.04, 0.12, 0.10, 0.07, 0.04], 8),  # calm while all is noise, then busy, then settled
        ([0.04, 0.04, 0.06, 0.04, 0.04], 10),  # never much busier than at the start: the gate stays where it was put
    ],
)
def test_auto_waits_until_attention_settles(pack, monkeypatch, changes, gate):
    from fovea_attention.attention import tgate
    from fovea_attention.attention.host import StepClock

    settings = tgate.TGateSettings(gate_at=0.5, mode=tgate.Mode.AUTO, tolerance=0.05)
    run = tgate.TGateRun(settings, StepClock.from_sigmas(torch.linspace(10, 0, 21)), True)
    run.first_at_step = True
    for step, change in enumerate(changes, 1):
        run.step = step
        monkeypatch.setattr(run.change, "finish_step", lambda change=change: change)
        tgate.TGate(settings)._watch_convergence(run)
    assert run.gate == gate


# --- errors and words -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate_at": 0.0}, "gate_at is 0"),
        ({"gate_at": 1.5}, "gate_at is 1.5"),
        ({"sp_interval": 0}, "sp_interval is 0"),
        ({"fi_interval": 0}, "fi_interval is 0"),
        ({"warm_up": -1}, "warm_up is -1"),
        ({"mode": "auto", "tolerance": 0.0}, "tolerance is 0"),
        ({"positive_share": -0.1}, "positive_share is -0.1"),
        ({"positive_share": 3.5}, "positive_share is 3.5"),
        ({"refresh_every": -1}, "refresh_every is -1"),
        ({"refresh_every": 1}, "refresh_every is 1: use 0"),
    ],
)
def test_bad_values_are_named_with_what_to_do(tgate, settings, message):
    with pytest.raises(ValueError, match=message):
        tgate(small_model(), **settings)


def test_one_log_line_says_what_was_done(tgate, caplog):
    caplog.set_level("INFO", logger="fovea")
    sample(tgate(small_model()), steps=25)
    lines = [record.getMessage() for record in caplog.records if record.name == "fovea"]
    assert lines == [
        "T-GATE: cross-attention reused in 15 of 25 steps, negative prompt skipped in 15, self-attention reused in 5"
    ]


def test_one_step_is_a_plain_step(tgate):
    model = small_model()
    assert torch.equal(sample(tgate(model), steps=1), sample(model, steps=1))


def test_prompts_of_unequal_length(tgate):
    model = small_model()
    long = cond(5, tokens=154)
    expected = sample(Reference(4, sp=5).apply(model), cond(1), long)
    assert_same_image(sample(tgate(model), cond(1), long), expected)
