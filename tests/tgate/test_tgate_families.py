"""T-GATE on every family of networks: separate cross-attention is reused, joint attention only loses the negative prompt."""

from __future__ import annotations

import pytest
from families import FAMILIES, Family, sample
from tgate_reference import ModuleReference, assert_same_image, relative_difference

STEPS, GATE = 6, 3

UNET = {"attn1": "self", "attn2": "cross"}
WITH_CROSS_ATTENTION = {
    "sd15": UNET,
    "sd2": UNET,
    "sdxl": UNET,
    "svd": UNET,
    "pixart": {"attn": "self", "cross_attn": "cross"},
    "hunyuan_dit": UNET,
    "wan_t2v": {"self_attn": "self", "cross_attn": "cross"},
    "wan_i2v": {"self_attn": "self", "cross_attn": "cross"},
    "ltxv": UNET,
    "cosmos_predict2": {"self_attn": "self", "cross_attn": "cross"},
}

separate = pytest.mark.parametrize(
    "family", [f for name, f in FAMILIES.items() if name in WITH_CROSS_ATTENTION], ids=lambda family: family.name
)
joint = pytest.mark.parametrize(
    "family", [f for name, f in FAMILIES.items() if name not in WITH_CROSS_ATTENTION], ids=lambda family: family.name
)


@pytest.fixture
def tgate(node_classes):
    def apply(model, **settings):
        return node_classes["TGateCache"].execute(model, gate_at=GATE / STEPS, **settings)[0]

    return apply


def reference_image(family: Family, model, **schedule):
    reference = ModuleReference(GATE, **schedule)
    patched = reference.apply_to(model, WITH_CROSS_ATTENTION.get(family.name, {}))
    try:
        return sample(family, patched, steps=STEPS)
    finally:
        reference.remove()


@pytest.mark.newest
@separate
@pytest.mark.parametrize(
    "settings",
    [{"sp_interval": 1}, {"sp_interval": 2, "fi_interval": 2, "warm_up": 0}, {"sp_interval": 1, "refresh_every": 3}],
    ids=["v1", "v2", "refreshed"],
)
def test_separate_cross_attention_is_reused(tgate, caplog, family, settings):
    caplog.set_level("INFO", logger="fovea")
    model = family.build()
    result = sample(family, tgate(model, **settings), steps=STEPS)
    schedule = {"sp": settings["sp_interval"], "fi": settings.get("fi_interval", 1), "warm_up": settings.get("warm_up", 2)}
    schedule["refresh"] = settings.get("refresh_every", 0)
    assert_same_image(result, reference_image(family, model, **schedule))
    assert relative_difference(result, sample(family, model, steps=STEPS)) > 1e-4
    reused = STEPS - GATE - bool(schedule["refresh"])
    assert f"cross-attention reused in {reused} of {STEPS} steps, negative prompt skipped in {reused}" in caplog.text


@separate
def test_cross_attention_modules_are_not_called_after_the_gate(tgate, family):
    model = family.build()
    calls = {"self": 0, "cross": 0}
    handles = []
    for name, module in model.model.diffusion_model.named_modules():
        kind = WITH_CROSS_ATTENTION[family.name].get(name.rsplit(".", 1)[-1])
        if kind:
            projections = [child for child in module.modules() if type(child).__name__ == "Linear"]

            def count(*_, kind=kind):
                calls[kind] += 1

            handles.append(projections[0].register_forward_hook(count))
    per_step = {kind: sum(kinds == kind for kinds in _kinds(family, model)) for kind in ("self", "cross")}
    try:
        sample(family, tgate(model, sp_interval=1), steps=STEPS)
    finally:
        for handle in handles:
            handle.remove()
    assert calls == {"self": STEPS * per_step["self"], "cross": GATE * per_step["cross"]}
    assert per_step["cross"] > 0


def test_pixart_with_its_published_schedule(node_classes, caplog):
    """Gate at step 15 of 20, self-attention every third step after two warm-up steps (the authors' PixArt example)."""
    caplog.set_level("INFO", logger="fovea")
    steps, gate = 20, 15
    family = FAMILIES["pixart"]
    model = family.build()
    patched = node_classes["TGateCache"].execute(model, gate_at=gate / steps, sp_interval=3, warm_up=2)[0]
    reference = ModuleReference(gate, sp=3, warm_up=2)
    overwritten = reference.apply_to(model, WITH_CROSS_ATTENTION["pixart"])
    try:
        expected = sample(family, overwritten, steps=steps)
    finally:
        reference.remove()
    assert_same_image(sample(family, patched, steps=steps), expected)
    # Of the steps 2 to 13, those that three divides compute, and step 2 does; step 14 fills the cache.
    assert "cross-attention reused in 5 of 20 steps, negative prompt skipped in 5, self-attention reused in 7" in caplog.text


def _kinds(family: Family, model) -> list[str]:
    names = [name.rsplit(".", 1)[-1] for name, _ in model.model.diffusion_model.named_modules()]
    return [WITH_CROSS_ATTENTION[family.name][name] for name in names if name in WITH_CROSS_ATTENTION[family.name]]


@pytest.mark.newest
@joint
@pytest.mark.parametrize("refresh", [0, 3])
def test_joint_attention_only_loses_the_negative_prompt(tgate, caplog, family, refresh):
    caplog.set_level("INFO", logger="fovea")
    model = family.build()
    # One prompt a call on both sides: deep networks turn the rounding of another batch size into a visible difference.
    model.model.memory_required = lambda *args, **kwargs: float("inf")
    result = sample(family, tgate(model, refresh_every=refresh), steps=STEPS)
    assert_same_image(result, reference_image(family, model, refresh=refresh))
    skipped = STEPS - GATE - bool(refresh)
    assert f"cross-attention reused in 0 of {STEPS} steps, negative prompt skipped in {skipped}" in caplog.text
    assert "has no separate cross-attention" in caplog.text


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_joint_attention_always_keeps_the_positive_prompt(tgate, caplog, name):
    """As published the negative is kept, and the cache holds the positive's half; without a cache nothing would be left of it."""
    caplog.set_level("INFO", logger="fovea")
    family = FAMILIES[name]
    model = family.build()
    published = sample(family, tgate(model, cfg_after_gate="drop (keep negative, as published)"), steps=STEPS)
    assert_same_image(published, sample(family, tgate(model), steps=STEPS))
    assert "the positive prompt is kept instead of the negative" in caplog.text


@joint
def test_joint_attention_with_cfg_kept_is_an_error_on_the_node(tgate, family):
    with pytest.raises(ValueError, match="cfg_after_gate is 'keep'.*no separate cross-attention"):
        tgate(family.build(), cfg_after_gate="keep")


@pytest.mark.parametrize("family", [FAMILIES["sdxl"], FAMILIES["hunyuan_dit"]], ids=lambda family: family.name)
def test_where_text_enters_twice_the_kept_prompt_matters(tgate, family):
    """SDXL's pooled text and HunyuanDiT's: keeping the positive or the negative prompt are different images."""
    model = family.build()
    positive = sample(family, tgate(model), steps=STEPS)
    negative = sample(family, tgate(model, cfg_after_gate="drop (keep negative, as published)"), steps=STEPS)
    assert relative_difference(positive, negative) > 1e-4
