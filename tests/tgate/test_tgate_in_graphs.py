"""T-GATE beside ComfyUI's own nodes: the image that the plain reference gives in the same graph, or a stated limit.

Where a node leaves the reference's hooks free, equality is asked for. Where it does not, T-GATE must say that it stands
back, and then the image must be that of the graph without it.
"""

from __future__ import annotations

import importlib

import comfy.cldm.cldm
import comfy.controlnet
import comfy.samplers
import comfy_extras.nodes_apg as apg
import comfy_extras.nodes_cfg as cfg_nodes
import comfy_extras.nodes_context_windows as windows
import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_differential_diffusion as differential
import comfy_extras.nodes_easycache as easycache
import comfy_extras.nodes_hypertile as hypertile
import comfy_extras.nodes_mahiro as mahiro
import comfy_extras.nodes_model_advanced as model_advanced
import comfy_extras.nodes_pag as pag
import comfy_extras.nodes_perpneg as perpneg
import comfy_extras.nodes_sag as sag
import comfy_extras.nodes_tomesd as tomesd
import node_helpers
import pytest
import torch
from families import FAMILIES
from families import sample as sample_family
from host_inprocess import host_node
from scenes import evaluate
from tgate_reference import Reference, assert_same_image, relative_difference
from tiny_unet import UNET_CONFIG, cond, latent, randomise, sample, small_model

import nodes

STEPS, GATE = 8, 3
REUSED = f"cross-attention reused in {STEPS - GATE} of {STEPS} steps"
DROPPED = f"negative prompt skipped in {STEPS - GATE}"


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level("INFO", logger="fovea")


@pytest.fixture
def tgate(node_classes):
    def apply(model, **settings):
        return node_classes["TGateCache"].execute(model, gate_at=GATE / STEPS, **{"sp_interval": 1, **settings})[0]

    return apply


@pytest.fixture(scope="module")
def model():
    return small_model()


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- conditioning ---------------------------------------------------------------------------------------------------


def areas():
    left = node_helpers.conditioning_set_values(cond(1), {"area": (8, 4, 0, 0), "strength": 1.0, "set_area_to_bounds": False})
    right = node_helpers.conditioning_set_values(cond(4), {"area": (8, 4, 0, 4), "strength": 1.0, "set_area_to_bounds": False})
    return left + right


def masks():
    mask = torch.zeros(1, 8, 8)
    mask[:, :, :4] = 1
    (left,) = nodes.ConditioningSetMask().append(cond(1), mask, "default", 1.0)
    (right,) = nodes.ConditioningSetMask().append(cond(4), 1 - mask, "default", 1.0)
    return left + right


def combined():
    return nodes.ConditioningCombine().combine(cond(1), cond(4))[0]


@pytest.mark.parametrize("prompts", [areas, masks, combined])
@pytest.mark.parametrize("published", [False, True], ids=["keep positive", "as published"])
def test_several_positive_prompts(tgate, caplog, model, prompts, published):
    """Each keeps its own cache; the mean with the negative prompt exists for a single pair only."""
    settings = {"cfg_after_gate": "drop (keep negative, as published)"} if published else {}
    result = sample(tgate(model, **settings), prompts(), steps=STEPS)
    assert_same_image(result, sample(Reference(GATE, mean=False).apply(model), prompts(), steps=STEPS))
    assert REUSED in caplog.text and DROPPED in caplog.text
    assert ("several prompts act together" in caplog.text) is published


def test_prompts_that_change_at_a_percentage(tgate, caplog, model):
    """The second prompt appears after the gate: it is computed and stored when it first appears."""
    (early,) = nodes.ConditioningSetTimestepRange().set_range(cond(1), 0.0, 0.7)
    (late,) = nodes.ConditioningSetTimestepRange().set_range(cond(4), 0.7, 1.0)
    result = sample(tgate(model), early + late, steps=STEPS)
    assert torch.isfinite(result).all() and DROPPED in caplog.text
    plain = sample(model, early + late, steps=STEPS)
    assert relative_difference(result, plain) < 0.2
    only_first = sample(tgate(model), cond(1), steps=STEPS)
    assert relative_difference(result, only_first) > 1e-4


def test_batch_of_prompts(tgate, model):
    start = latent(batch=2)
    prompts = cond(1, batch=2)
    result = sample(tgate(model), prompts, steps=STEPS, latent_image=start)
    assert_same_image(result, sample(Reference(GATE).apply(model), prompts, steps=STEPS, latent_image=start))


def test_controlnet_on_the_positive_prompt(tgate, caplog, model):
    def controlled(seed):
        config = {key: value for key, value in UNET_CONFIG.items() if key not in ("out_channels", "transformer_depth_output")}
        config.update(num_res_blocks=[1, 1], channel_mult=[1, 2], num_heads=2, transformer_depth=[1, 1], dtype=torch.float32)
        network = comfy.cldm.cldm.ControlNet(hint_channels=3, **config)
        randomise(network, seed)
        cpu = torch.device("cpu")
        control = comfy.controlnet.ControlNet(network, load_device=cpu, manual_cast_dtype=None)
        applied, _ = nodes.ControlNetApplyAdvanced().apply_controlnet(
            cond(1), cond(2), control, torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(1)), 1.0, 0.0, 1.0
        )
        return applied

    result = sample(tgate(model), controlled(7), steps=STEPS)
    assert_same_image(result, sample(Reference(GATE, mean=True).apply(model), controlled(7), steps=STEPS))
    assert relative_difference(result, sample(tgate(model), cond(1), steps=STEPS)) > 1e-4
    assert DROPPED in caplog.text


# --- latents --------------------------------------------------------------------------------------------------------


def test_image_to_image_with_a_mask(tgate, model):
    start = noise(5, 1, 4, 16, 16)
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., :64] = 1
    options = {"steps": STEPS, "latent_image": start, "noise_mask": mask, "denoise": 0.6}
    assert_same_image(sample(tgate(model), **options), sample(Reference(GATE).apply(model), **options))


def test_differential_diffusion(tgate, caplog, model):
    start, mask = noise(5, 1, 4, 16, 16), torch.linspace(0, 1, 128).expand(1, 1, 128, 128)
    soft = differential.DifferentialDiffusion.execute(model)[0]
    options = {"steps": STEPS, "latent_image": start, "noise_mask": mask}
    assert_same_image(sample(tgate(soft), **options), sample(Reference(GATE).apply(soft), **options))
    assert DROPPED in caplog.text


def test_inpaint_model_with_image_conditioning(tgate, caplog):
    model = small_model(in_channels=9)
    image = {"concat_latent_image": noise(6, 1, 4, 16, 16), "concat_mask": torch.ones(1, 1, 128, 128)}
    positive, negative = cond(1, **image), cond(2, **image)
    result = sample(tgate(model), positive, negative, steps=STEPS)
    assert_same_image(result, sample(Reference(GATE).apply(model), positive, negative, steps=STEPS))
    assert DROPPED in caplog.text


# --- samplers and guiders as nodes ----------------------------------------------------------------------------------


def advanced_sample(guider, steps: int = STEPS, sampler: str = "euler") -> torch.Tensor:
    sigmas = custom.BasicScheduler.execute(guider.model_patcher, "normal", steps, 1.0)[0]
    picked = custom.KSamplerSelect.execute(sampler)[0]
    with torch.inference_mode():
        output = custom.SamplerCustomAdvanced.execute(
            custom.RandomNoise.execute(3)[0], guider, picked, sigmas, {"samples": latent()}
        )
    return output[0]["samples"]


def test_sampler_custom_advanced_with_a_cfg_guider(tgate, caplog, model):
    def run(patched):
        return advanced_sample(custom.CFGGuider.execute(patched, cond(1), cond(2), 7.0)[0])

    assert_same_image(run(tgate(model)), run(Reference(GATE).apply(model)))
    assert REUSED in caplog.text and DROPPED in caplog.text


def test_basic_guider_has_one_prompt(tgate, caplog, model):
    def run(patched):
        return advanced_sample(custom.BasicGuider.execute(patched, cond(1))[0])

    assert_same_image(run(tgate(model)), run(Reference(GATE, drop=False).apply(model)))
    assert REUSED in caplog.text and "negative prompt skipped in 0" in caplog.text


def test_dual_cfg_keeps_all_its_prompts(tgate, caplog, model):
    def run(patched):
        return advanced_sample(custom.DualCFGGuider.execute(patched, cond(1), cond(4), cond(2), 5.0, 3.0, "regular")[0])

    assert_same_image(run(tgate(model)), run(Reference(GATE, drop=False).apply(model)))
    assert REUSED in caplog.text and "more than a positive and a negative prompt" in caplog.text


def test_perp_neg_keeps_all_its_prompts(tgate, caplog, model):
    def run(patched):
        return advanced_sample(perpneg.PerpNegGuider.execute(patched, cond(1), cond(2), cond(8), 7.0, 1.0)[0])

    assert_same_image(run(tgate(model)), run(Reference(GATE, drop=False).apply(model)))
    assert REUSED in caplog.text and "more than a positive and a negative prompt" in caplog.text


def test_ksampler_advanced_in_two_halves(tgate, model):
    """Leftover noise handed from one node to the next: two runs, two gates, nothing shared."""

    def run(patched):
        sampler = nodes.KSamplerAdvanced()
        shared = (8.0, "euler", "normal", cond(1), cond(2))
        with torch.inference_mode():
            (first,) = sampler.sample(patched, "enable", 3, 16, *shared, {"samples": latent()}, 0, 8, "enable")
            (second,) = sampler.sample(patched, "disable", 3, 16, *shared, first, 8, 16, "disable")
        return second["samples"]

    gated = tgate(model)
    assert torch.equal(run(gated), run(gated))
    halves = [Reference(GATE).apply(model) for _ in range(2)]
    sampler, shared = nodes.KSamplerAdvanced(), (8.0, "euler", "normal", cond(1), cond(2))
    with torch.inference_mode():
        (first,) = sampler.sample(halves[0], "enable", 3, 16, *shared, {"samples": latent()}, 0, 8, "enable")
        (second,) = sampler.sample(halves[1], "disable", 3, 16, *shared, first, 8, 16, "disable")
    assert_same_image(run(gated), second["samples"])


# --- guidance nodes -------------------------------------------------------------------------------------------------


POST_CFG = {
    "CFG-Zero*": lambda m: cfg_nodes.CFGZeroStar.execute(m)[0],
    "CFG-Norm": lambda m: cfg_nodes.CFGNorm.execute(m, 1.0)[0],
    "APG": lambda m: apg.APG.execute(m, 1.0, 5.0, 0.0)[0],
    "Mahiro": lambda m: mahiro.Mahiro.execute(m)[0],
    "FreeU": lambda m: host_node("FreeU_V2", "comfy_extras.nodes_freelunch")(m, 1.1, 1.2, 0.9, 0.4)[0],
}


@pytest.mark.parametrize("name", POST_CFG)
def test_nodes_that_work_on_the_guided_result(tgate, caplog, model, name):
    """After the gate they get the same prediction twice, so guidance is the identity, not a multiple of zero."""
    other = POST_CFG[name](model)
    result = sample(tgate(other), steps=STEPS)
    if name == "FreeU":
        assert_same_image(result, sample(Reference(GATE).apply(other), steps=STEPS))
    plain = sample(other, steps=STEPS)
    assert torch.isfinite(result).all() and (result - plain).norm() / plain.norm() < 0.25
    assert DROPPED in caplog.text


def test_rescale_cfg(tgate, caplog, model):
    result = sample(tgate(model_advanced.RescaleCFG().patch(model, 0.7)[0]), steps=STEPS)
    plain = sample(model_advanced.RescaleCFG().patch(model, 0.7)[0], steps=STEPS)
    assert torch.isfinite(result).all() and (result - plain).norm() / plain.norm() < 0.25
    assert DROPPED in caplog.text


def test_perturbed_attention_runs_its_own_pass_in_full(tgate, caplog, model):
    other = pag.PerturbedAttentionGuidance.execute(model, 3.0)[0]
    result = sample(tgate(other), steps=STEPS)
    assert_same_image(result, sample(GuardedReference(GATE).apply(other), steps=STEPS))
    assert REUSED in caplog.text and DROPPED in caplog.text


class GuardedReference(Reference):
    """PAG's extra pass has the cond alone while planning; it must be computed as it stands and not be stored."""

    def apply(self, model):
        patched = super().apply(model)
        patched.add_wrapper_with_key("calc_cond_batch", "reference", self._note)
        return patched

    def _note(self, executor, network, conds, x, timestep, options):
        self.extra_pass = len(conds) == 1
        return executor(network, conds, x, timestep, options)

    def _attention(self, out, extra, kind):
        return out if self.extra_pass else super()._attention(out, extra, kind)


def test_self_attention_guidance_needs_the_negative_prompt(tgate, caplog, model):
    other = sag.SelfAttentionGuidance.execute(model, 0.5, 2.0)[0]
    result = sample(tgate(other, sp_interval=2, warm_up=0), steps=STEPS)
    assert torch.isfinite(result).all() and REUSED in caplog.text
    assert "needs the negative prompt" in caplog.text and "self-attention, so it is always computed" in caplog.text
    plain = sample(other, steps=STEPS)
    assert (result - plain).norm() / plain.norm() < 0.2


def test_normalised_attention_guidance_needs_the_negative_prompt(tgate, caplog, model):
    nag = pytest.importorskip("comfy_extras.nodes_nag")
    other = nag.NAGuidance.execute(model, 3.0, 0.5, 2.5)[0]
    result = sample(tgate(other), steps=STEPS)
    assert "needs the negative prompt" in caplog.text and torch.isfinite(result).all()
    again = sample(tgate(other), steps=STEPS)
    assert torch.equal(result, again)  # it writes into attention outputs: the cache must not be what it writes to


# --- other caches and attention patches -----------------------------------------------------------------------------


@pytest.mark.parametrize("node", ["EasyCache", "LazyCache"])
def test_other_caches(tgate, caplog, model, node):
    other = getattr(easycache, f"{node}Node").execute(model, 0.2, 0.15, 0.95, False)[0]
    settings = {"steps": 16, "latent_image": latent(16, 16)}
    result = sample(tgate(other), **settings)
    plain = sample(other, **settings)
    assert torch.isfinite(result).all() and (result - plain).norm() / plain.norm() < 0.25
    assert "negative prompt skipped in 0" not in caplog.text
    assert torch.equal(sample(tgate(other), **settings), result)


@pytest.mark.parametrize("patch", ["ToMe", "HyperTile"])
def test_self_attention_patches_switch_self_attention_reuse_off(tgate, caplog, model, patch):
    """They merge or tile tokens anew in every step, so a stored output would not fit."""
    if patch == "ToMe":
        other = tomesd.TomePatchModel.execute(model, 0.5)[0]
    else:
        other = hypertile.HyperTile.execute(model, 64, 2, 0, False)[0]

    def seeded(patched):
        torch.manual_seed(0)
        return sample(patched, steps=STEPS)

    result = seeded(tgate(other, sp_interval=2, fi_interval=2))
    assert torch.isfinite(result).all()
    assert REUSED in caplog.text and "self-attention, so it is always computed" in caplog.text
    assert (result - seeded(other)).norm() / seeded(other).norm() < 0.25


def test_another_packs_attention_replacement_is_skipped_after_the_gate(tgate, model):
    """IPAdapter-like: attn2 replaced in every block. What it computed is part of what is stored."""
    calls = []

    def replacement(q, k, v, extra):
        calls.append(extra["block"])
        return torch.nn.functional.scaled_dot_product_attention(q, k, v) * 0.9

    other = model.clone()
    for block in (("input", 1), ("input", 3), ("middle", 0), ("output", 0), ("output", 1), ("output", 2), ("output", 3)):
        other.set_model_attn2_replace(replacement, *block)
    result = sample(tgate(other), steps=STEPS)
    assert len(calls) == 7 * GATE
    assert_same_image(result, sample(Reference(GATE).apply(other), steps=STEPS))


def test_a_patch_that_changes_the_batch_inside_attention_switches_tgate_off(tgate, caplog, model):
    """Regional-attention packs run cross-attention with more rows than the model's batch."""
    other = model.clone()
    other.set_model_attn2_patch(
        lambda n, context, value, extra: (n.repeat(2, 1, 1), context.repeat(2, 1, 1), value.repeat(2, 1, 1))
    )
    other.set_model_attn2_output_patch(lambda n, extra: n[: n.shape[0] // 2])
    result = sample(tgate(other), steps=STEPS)
    assert "switched off in this run: another node changes the batch" in caplog.text
    assert torch.equal(result, sample(other, steps=STEPS))


# --- windows, tiles, compile ----------------------------------------------------------------------------------------


def context_windows(model, length: int):
    """Windows over the frames; 0.30.0's node has one more input than 0.3.75's, with a default in the schema only."""
    values = {"context_stride": 1, "closed_loop": False, "fuse_method": "pyramid", "dim": 2}
    if any(widget.id == "freenoise" for widget in windows.ContextWindowsManualNode.define_schema().inputs):
        values["freenoise"] = False
    return windows.ContextWindowsManualNode.execute(model, length, 1, "standard_static", **values)[0]


def test_context_windows_switch_tgate_off(tgate, caplog):
    video = FAMILIES["wan_t2v"]
    model = video.build()
    start = torch.zeros(1, 16, 4, 8, 8)
    other = context_windows(model, length=2)
    result = sample_family(video, tgate(other), steps=4, latent_image=start)
    assert "switched off in this run: context windows" in caplog.text
    assert torch.equal(result, sample_family(video, other, steps=4, latent_image=start))


def test_context_windows_longer_than_the_latent_do_not(tgate, caplog):
    video = FAMILIES["wan_t2v"]
    model = video.build()
    result = sample_family(video, tgate(context_windows(model, length=8)), steps=STEPS)
    assert torch.equal(result, sample_family(video, tgate(model), steps=STEPS))
    assert REUSED in caplog.text and DROPPED in caplog.text


def test_tiles_switch_tgate_off(tgate, caplog, model):
    """Tiled diffusion calls the model once per tile for the same prompt."""

    def tiled(apply_model, args):
        tiles = [apply_model(part.contiguous(), args["timestep"], **args["c"]) for part in args["input"].chunk(2, dim=-1)]
        return torch.cat(tiles, dim=-1)

    other = model.clone()
    other.set_model_unet_function_wrapper(tiled)
    result = sample(tgate(other), steps=STEPS)
    assert "switched off in this run: each step calls the model several times" in caplog.text
    assert torch.equal(result, sample(other, steps=STEPS))


@pytest.mark.newest
def test_a_compiled_model_loses_the_negative_prompt_only(tgate, caplog):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    other = small_model(channel_mult=[1], num_res_blocks=[1], transformer_depth=[1], transformer_depth_output=[1, 1])
    set_torch_compile_wrapper(other, backend="eager")
    result = sample(tgate(other), steps=STEPS)
    assert "cross-attention reused in 0" in caplog.text and DROPPED in caplog.text
    assert "the model is compiled" in caplog.text
    assert torch.isfinite(result).all()


@pytest.mark.newest
def test_a_block_that_another_pack_compiled_in_place(tgate, caplog, monkeypatch):
    """On the embedded model, really compiled: whole steps are skipped as without, and else the negative prompt is dropped."""
    model, clip, _ = evaluate.load()
    prompts = [evaluate.encode(clip, [text]) for text in ("a red circle and a blue square", "a green triangle and a yellow star")]
    network = model.model.diffusion_model
    rows: list[int] = []
    counter = network.input_blocks[0][0].register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))

    def run(**settings):
        rows.clear()
        image = sample(tgate(model, **settings), *prompts, steps=STEPS, latent_image=torch.zeros(1, 3, 32, 32))
        return image, sum(rows)

    skips, published = {"schedule": "skip steps", "max_error": 1.0}, {"cfg_after_gate": "drop (keep negative, as published)"}
    skipped, fewer = run(**skips)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("fovea_attention.attention.tgate.run"), "attention_sites", lambda network: [])
        dropped, single = run(**published)
    path = next(name for name, module in network.named_modules() if type(module).__name__ == "BasicTransformerBlock")
    blocks, place = network.get_submodule(path.rpartition(".")[0]), int(path.rpartition(".")[2])
    block = blocks[place]
    try:
        blocks[place] = torch.compile(block, backend="eager")
        again, counted = run(**skips)
        assert relative_difference(again, skipped) < 1e-3 and counted == fewer < 2 * STEPS
        caplog.clear()
        again, counted = run(**published)
    finally:
        blocks[place] = block
        counter.remove()
    assert relative_difference(again, dropped) < 1e-3 and counted == single == 2 * GATE + STEPS - GATE
    assert "the model is compiled, so only the negative prompt is dropped" in caplog.text


def test_merged_and_lora_patched_weights(tgate, model):
    """Weight patches are ComfyUI's business; the cache holds what the patched network computed."""
    other = model.clone()
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight"
    difference = noise(9, *model.model.get_parameter(name).shape) * 0.1
    other.add_patches({name: ("diff", (difference,))}, 1.0)
    result = sample(tgate(other), steps=STEPS)
    assert_same_image(result, sample(Reference(GATE).apply(other), steps=STEPS))
    assert relative_difference(result, sample(tgate(model), steps=STEPS)) > 1e-6
