"""Capture records what every family of networks really attends to, and leaves the image and the model as they were."""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from types import SimpleNamespace

import comfy.samplers
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from families import FAMILIES, sample
from families.others import MORE_FAMILIES
from torch.nn.functional import interpolate

# Attention calls of one forward, and which of them is the first that looks at the text in a recorded layer.
CALLS = {
    "sd15": (14, 1), "sd2": (14, 1), "sdxl": (16, 1), "svd": (28, 1), "sd3": (2, 0), "sd35_medium": (3, 0), "flux": (4, 0),
    "flux_kontext": (4, 0), "chroma": (4, 0), "pixart": (4, 1), "hunyuan_dit": (8, 1), "auraflow": (3, 0), "lumina2": (4, 2),
    "z_image": (4, 2), "qwen_image": (2, 0), "qwen_image_edit": (2, 0), "wan_t2v": (4, 1), "wan_i2v": (6, 2), "ltxv": (4, 1),
    "hidream": (4, 0), "hunyuan_video": (6, 2), "cosmos_predict2": (4, 1), "cascade": (4, 0), "omnigen2": (4, 2),
    "ernie_image": (2, 0), "krea2": (6, 4), "flux2": (4, 0), "lens": (2, 0), "joyimage": (2, 0), "mage_flow": (2, 0),
    "boogu": (6, 2), "pixeldit": (3, 0), "cogvideox": (2, 0), "kandinsky5": (5, 2), "hunyuan_image": (6, 2),
    "hunyuan_video15": (6, 2), "omnigen2_edit": (5, 3), "joyimage_edit": (2, 0),
}  # fmt: skip

# Variants that put other tokens before or behind the image's, or have blocks of their own: their first such call.
VARIANTS = {
    "wan_humo": 1, "wan_scail": 2, "wan_animate": 2, "wan_vace": 1, "wan_camera": 2, "wan_dancer": 2,
    "chroma_radiance": 0, "z_image_pixel": 2, "pid": 0, "hunyuan_video15_sr": 2, "anima": 1, "kandinsky5_video": 2,
    "mochi": 0, "ideogram4": 0, "cosmos1": 1, "minimax": 0, "hidream_o1": 0,
}  # fmt: skip
SEEN = {**FAMILIES, **{name: family for name, family in MORE_FAMILIES.items() if name in VARIANTS}}
CONVOLUTIONAL = {"sd15", "sd2", "sdxl", "svd", "cascade"}
SWAPPED = {"pixart": "comfy.ldm.pixart.blocks", "hunyuan_dit": "comfy.ldm.hydit.attn_layers"}


@pytest.fixture(scope="module")
def built():
    """One model of each family for all tests."""
    models: dict[str, ModelPatcher] = {}

    def built(name: str) -> ModelPatcher:
        if name not in models:
            models[name] = SEEN[name].build()
        return models[name]

    yield built
    models.clear()


@pytest.fixture(scope="module")
def engine(pack):
    import fovea_attention.attention.maps as maps

    return maps


@pytest.fixture(scope="module")
def watch(pack, engine):
    """(model, settings) -> the watched model and its maps."""
    from fovea_attention.attention import host
    from fovea_attention.attention.maps import AttnMaps

    def watch(model, **settings):
        capture = engine.Capture(engine.CaptureSettings(**settings), AttnMaps())
        return host.attach(model, capture.key, capture), capture.maps

    return watch


def with_override(model, override):
    """A clone on which another node has already put an attention override."""
    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    return clone


class Probe:
    """Another node's override: what every attention call of a run got and gave, on its own terms."""

    def __init__(self):
        self.calls: list[SimpleNamespace] = []

    def install(self, model):
        def override(func, q, k, v, heads, mask=None, *args, **kwargs):
            out = func(q, k, v, heads, mask, *args, **kwargs)
            options = dict(kwargs.get("transformer_options") or {})  # networks write to it as they go
            self.calls.append(SimpleNamespace(q=q, k=k, v=v, heads=heads, mask=mask, out=out, options=options, **_layout(kwargs)))
            return out

        return with_override(model, override)


def _layout(kwargs):
    return {"skip": kwargs.get("skip_reshape", False), "skip_out": kwargs.get("skip_output_reshape", False)}


def by_heads(x, call, like=None):
    """(batch, heads, tokens, channels), written without the pack's help."""
    if call.skip:
        return x
    x, width = x.flatten(2), call.q.flatten(2).shape[-1] // call.heads
    return x.view(x.shape[0], x.shape[1], x.shape[2] // width, width).permute(0, 2, 1, 3)


def probabilities(call) -> torch.Tensor:
    """softmax(q k^T / sqrt(d) + mask) in double precision, written out."""
    q, k = by_heads(call.q, call).double(), by_heads(call.k, call).double()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(q.shape[-1])
    if call.mask is not None:
        scores = scores.masked_fill(~call.mask, -math.inf) if call.mask.dtype == torch.bool else scores + call.mask.double()
    return scores.softmax(-1)


def image_rows(maps, name: str, batch: int = 0) -> torch.Tensor:
    """(heads, tokens, frames, height, width) of one layer."""
    return maps.of().layers[name].maps[batch]


# --- one attention call -------------------------------------------------------------------------------------------------


def _boolean(*shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[..., 0] = True
    return mask


def _additive(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize(
    "mask",
    [
        None, _boolean(2, 1, 1, 9), _boolean(1, 1, 6, 9), _boolean(6, 9), _additive(6, 9), _additive(1, 9), _additive(2, 6, 9),
        _additive(1, 1, 9), _additive(2, 4, 6, 9), _additive(2, 1, 1, 9),
    ],
    ids=lambda mask: "none" if mask is None else f"{mask.dtype}-{'x'.join(map(str, mask.shape))}".removeprefix("torch."),
)  # fmt: skip
def test_rows_are_those_of_the_hosts_attention(engine, monkeypatch, mask, key_heads, scale):
    """Every mask form, fewer key heads, another scale, both layouts, in chunks of a few rows."""
    from fovea_attention.attention.maps import probabilities as module

    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 2 * 4 * 9 * 4)
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 6), (key_heads, 9), (key_heads, 9))
    q, k, v = (torch.randn(2, heads, tokens, 8, generator=generator) for heads, tokens in shapes)
    shared = [x.repeat_interleave(4 // key_heads, 1) for x in (k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(q, *shared, attn_mask=_four_dimensions(mask), scale=scale)
    flat = [x.transpose(1, 2).flatten(2) for x in (q, k)]
    for args, skip in (((q, k), True), (flat, False)):
        inputs = engine.probabilities.host.attention_inputs(*args, 4, mask=mask, skip_reshape=skip, scale=scale)
        chunks = list(engine.probabilities.row_probabilities(inputs, slice(1, 6)))
        assert [start for start, _ in chunks] == [0, 4]
        rows = torch.cat([chunk for _, chunk in chunks], 2)
        torch.testing.assert_close(rows @ shared[1], expected[:, :, 1:], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(rows.sum(-1), torch.ones(2, 4, 5))


def _four_dimensions(mask):
    return mask[:, None] if mask is not None and mask.ndim == 3 else mask


# --- every family -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_image_is_bit_identical_and_every_call_is_seen(engine, watch, built, name):
    family, model = FAMILIES[name], built(name)
    plain = sample(family, model)
    probe = Probe()
    watched, maps = watch(probe.install(model), self_attention=True)
    assert torch.equal(sample(family, watched.clone().clone()), plain)

    assert len(probe.calls) == 2 * CALLS[name][0]  # the other node's override is still called, once for every attention
    for call in probe.calls:
        inputs = engine.probabilities.host.attention_inputs(call.q, call.k, call.heads, mask=call.mask, skip_reshape=call.skip)
        rows = torch.cat([chunk for _, chunk in engine.probabilities.row_probabilities(inputs, slice(None))], 2)
        torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]), atol=1e-5, rtol=0)
        v = by_heads(call.v, call)
        out = rows @ v.repeat_interleave(inputs.heads // v.shape[1], 1)
        out = out if call.skip_out else out.transpose(1, 2).flatten(2)
        torch.testing.assert_close(out, call.out, atol=1e-5, rtol=1e-5)

    assert maps.prompts == ["positive", "negative"] and maps.notes == []
    assert maps.recorded_steps() == [0, 1] and maps.has_steps and maps.has_self_attention
    assert maps.tokens() == {"hunyuan_dit": 77 + 24, "hidream": 12 + 9, "pixeldit": 16}.get(name, family.tokens)


def random_latent(family):
    """Noise for a family's latent, always the same; with sound it has two parts."""
    generator, latent = torch.Generator().manual_seed(3), family.latent()
    if not family.audio:
        return torch.randn(latent.shape, generator=generator)
    return type(latent)(tuple(torch.randn(part.shape, generator=generator) for part in latent.unbind()))


def with_another_word(conds, token: int):
    """The same prompt but for one token, in its features or, where the network encodes the text itself, in its ids."""
    ((features, others),) = conds
    if "text_input_ids" in others:
        ids = others["text_input_ids"].clone()
        ids[:, token] += 1
        return [[features, {**others, "text_input_ids": ids}]]
    features = features.clone()
    features[:, token] = torch.randn(features.shape[-1], generator=torch.Generator().manual_seed(9)) * 3
    return [[features, others]]


def brightest(difference: torch.Tensor) -> int:
    """The token that changed most: (batch, heads, tokens, channels)."""
    return int(difference.float().square().sum((0, 1, 3)).argmax())


@pytest.mark.parametrize("name", SEEN)
def test_a_changed_word_and_a_changed_pixel_show_where_the_map_says(watch, built, name):
    """Column and row of one probability are found by changing one token and one pixel, not by knowing the layout."""
    family, model = SEEN[name], built(name)
    first = CALLS[name][1] if name in CALLS else VARIANTS[name]
    probe = Probe()
    watched, maps = watch(probe.install(model), per_head=True)

    def first_text_call(conds, noise):
        probe.calls.clear()
        sample(family, watched, steps=1, cfg=1.0, positive=conds, noise=noise)
        return probe.calls[first]

    token, (y, x) = min(7, family.tokens - 1), (2 * side // 3 for side in family.size)
    conds, (noise, pixel) = family.conds(1), (random_latent(family) for _ in range(2))
    image = pixel.unbind()[0] if family.audio else pixel
    (image[:, :, -1] if family.frames else image)[:, :, y, x] += 30

    plain = first_text_call(conds, noise)
    heat = image_rows(maps, maps.layers[0])
    key = brightest(by_heads(first_text_call(with_another_word(conds, token), noise).k, plain) - by_heads(plain.k, plain))
    query = brightest(by_heads(first_text_call(conds, pixel).q, plain) - by_heads(plain.q, plain))
    expected = probabilities(plain)[0, :, query, key].float()

    frames, height, width = heat.shape[-3:]
    same = ((heat[:, token] - expected[:, None, None, None]).abs() < 1e-6).all(0)
    assert same.sum() == (same.numel() if family.tokens == 1 else 1)
    if family.tokens == 1:  # one token gets all attention everywhere
        return
    frame, row, column = same.nonzero()[0].tolist()
    reach = 1 if name in CONVOLUTIONAL else 0  # a convolution before the layer may spread the pixel
    assert frame == frames - 1
    assert abs(row - y * height // family.size[0]) <= reach and abs(column - x * width // family.size[1]) <= reach


def test_llama_text_of_a_block_counts_with_the_same_words(watch, built):
    """HiDream gives every block its own Llama features behind the last layer's: two columns belong to one word."""
    family, probe = FAMILIES["hidream"], Probe()
    watched, maps = watch(probe.install(built("hidream")), per_head=True)
    sample(family, watched, steps=1, cfg=1.0)
    rows = probabilities(probe.calls[0])[0, :, :48]
    both = (rows[..., 48 + 12 : 48 + 21] + rows[..., 48 + 21 :]).transpose(1, 2).float()
    torch.testing.assert_close(image_rows(maps, "double.0")[:, 12:].flatten(2), both, atol=1e-6, rtol=1e-5)


# --- DAAM ---------------------------------------------------------------------------------------------------------------

DEEP = dataclasses.replace(
    FAMILIES["sd15"],
    unet={
        **FAMILIES["sd15"].unet, "num_res_blocks": [1] * 4, "channel_mult": [1] * 4, "transformer_depth": [1] * 4,
        "transformer_depth_output": [1] * 8,
    },
    size=(16, 16),
)  # fmt: skip


def daam(probe: Probe, side: int, tokens: int) -> torch.Tensor:
    """The published aggregation from trace.py, with nothing of the pack: see the paper notes' six lines."""
    sums: dict[tuple, torch.Tensor] = {}
    for call in probe.calls:
        side_here = math.isqrt(call.q.shape[1])
        crosses = call.k.shape[1] == tokens and call.options["block"][0] != "middle"
        if not crosses or side // side_here == 8:  # no mid block, no factor 8
            continue
        conditional = call.options["cond_or_uncond"].index(0)
        maps = probabilities(call).chunk(len(call.options["cond_or_uncond"]))[conditional][0].float()
        for head, rows in enumerate(maps):
            key = (side // side_here, call.options["block"], head)
            sums[key] = sums.get(key, 0) + rows.T.reshape(tokens, side_here, side_here)
    resized = [interpolate(maps[:, None], size=(side, side), mode="bicubic").clamp_(min=0) for maps in sums.values()]
    return torch.stack(resized).mean(0)[:, 0]


def test_heat_equals_daam(watch):
    probe = Probe()
    watched, maps = watch(probe.install(DEEP.build()))
    sample(DEEP, watched, steps=4)
    assert "input.7" not in maps.layers and "middle" not in maps.layers and "input.5" in maps.layers
    torch.testing.assert_close(maps.heat(), daam(probe, 16, 77), atol=1e-5, rtol=0)
    torch.testing.assert_close(maps.heat().sum(0).mean(), torch.tensor(4.0), atol=0.02, rtol=0)


def test_layers_that_are_named_are_recorded_even_if_daam_leaves_them_out(watch):
    watched, maps = watch(DEEP.build(), layers="middle, input.5-7")
    sample(DEEP, watched, steps=1)
    assert maps.layers == ["input.5", "input.7", "middle"]
    assert maps.grid == (4, 4) and maps.heads("middle") == 1


# --- batches, prompts, steps --------------------------------------------------------------------------------------------


def separate_calls(model):
    """Make ComfyUI believe that two conds never fit into memory together, as on a small GPU."""
    model.model.memory_required = lambda *args, **kwargs: float("inf")


def assert_same_maps(maps, others, prompt="positive", **where):
    assert maps.of(prompt).layers.keys() == others.of(prompt).layers.keys()
    torch.testing.assert_close(maps.heat(prompt, **where), others.heat(prompt), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["sd15", "flux", "pixart"])
def test_prompts_evaluated_one_by_one_give_the_same_maps(watch, name):
    family, model = FAMILIES[name], FAMILIES[name].build()
    together, maps = watch(model)
    sample(family, together)
    alone, others = watch(model)
    separate_calls(model)
    sample(family, alone)
    for prompt in ("positive", "negative"):
        assert_same_maps(maps, others, prompt)


@pytest.mark.parametrize("name", ["sd15", "z_image", "wan_t2v"])
def test_each_image_of_a_batch_has_its_own_maps(watch, built, name):
    family, model = FAMILIES[name], built(name)
    noise = torch.randn(family.latent(2).shape, generator=torch.Generator().manual_seed(8))
    watched, maps = watch(model, self_attention=True)
    sample(family, watched, steps=1, latent_image=family.latent(2), noise=noise)
    assert maps.batch == 2
    for index in range(2):
        single, others = watch(model, self_attention=True)
        sample(family, single, steps=1, noise=noise[index : index + 1])
        for prompt in ("positive", "negative"):
            assert_same_maps(maps, others, prompt, batch=index)
        looks = [maps.self_attention(0.4, 0.7, batch=index), others.self_attention(0.4, 0.7)]
        torch.testing.assert_close(*looks, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(77, 154), (154, 77), (154, 231)])
def test_prompts_of_unequal_length_keep_their_own_tokens(watch, built, lengths):
    """ComfyUI repeats the shorter prompt until both have one length."""
    family, model = FAMILIES["sd15"], built("sd15")
    positive, negative = family.conds(1, lengths[0]), family.conds(2, lengths[1])
    watched, maps = watch(model)
    sample(family, watched, steps=1, positive=positive, negative=negative)
    assert (maps.tokens("positive"), maps.tokens("negative")) == lengths
    for prompt, conds in (("positive", positive), ("negative", negative)):
        alone, others = watch(model)
        sample(family, alone, steps=1, positive=conds, negative=conds)
        assert_same_maps(maps, others, prompt)


def test_frames_of_a_video_are_kept_apart(watch, built):
    family = FAMILIES["wan_t2v"]
    watched, maps = watch(built("wan_t2v"))
    sample(family, watched)
    assert (maps.frames, maps.grid) == (2, (8, 6))
    frames = torch.stack([maps.heat(frame=frame) for frame in range(2)])
    assert not torch.equal(frames[0], frames[1])
    torch.testing.assert_close(frames.mean(0), maps.heat())


def test_combined_prompts_and_areas_have_maps_of_their_own(watch, built):
    family, model = FAMILIES["sd15"], built("sd15")
    left, whole = family.conds(1), family.conds(4)
    left[0][1]["area"] = (16, 6, 0, 0)
    left[0][1]["fovea"] = {"text": "left"}
    watched, maps = watch(model)
    sample(family, watched, positive=left + whole)
    assert maps.count() == 2 and maps.conditioning() == [{"text": "left"}, {}]
    assert maps.grid == (16, 12)
    heat = maps.heat(cond=0)
    assert bool((heat[..., :6].sum(0) > 0).all()) and not bool(heat[..., 6:].any())
    assert bool((maps.heat(cond=1).sum(0) > 0).all())


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_sde", "euler_ancestral", "uni_pc"])
def test_each_step_counts_once_whatever_the_sampler_evaluates(watch, built, sampler):
    family = FAMILIES["sdxl"]
    watched, maps = watch(built("sdxl"))
    sample(family, watched, steps=4, sampler=sampler, scheduler="normal")
    assert maps.recorded_steps() == [0, 1, 2, 3]
    sums = maps.heat().sum(0)
    torch.testing.assert_close(sums, torch.full_like(sums, 4.0), atol=1e-4, rtol=0)


def test_sum_of_steps_is_the_whole_map(watch, built):
    family = FAMILIES["sdxl"]  # one grid, so nothing is resized
    watched, maps = watch(built("sdxl"))
    sample(family, watched, steps=3)
    steps = torch.stack([maps.heat(step=step) for step in range(3)])
    torch.testing.assert_close(steps.sum(0), maps.heat(), atol=1e-3, rtol=1e-3)  # step maps are kept in half precision
    _, change, mass = maps.convergence([[1, 2], [5]])
    expected = (steps[2, 5] - steps[1, 5]).norm() / steps[2, 5].norm()
    assert change[1, 2].item() == pytest.approx(expected.item(), rel=0.02) and math.isnan(change[1, 0])
    torch.testing.assert_close(mass[1], steps[:, 5].mean((1, 2)), atol=1e-4, rtol=1e-3)


def test_options_decide_what_is_kept(watch, built):
    family, model = FAMILIES["flux"], built("flux")
    watched, maps = watch(model, layers="double.1, single", per_step=False, per_head=True)
    sample(family, watched)
    assert maps.layers == ["double.1", "single.0", "single.1"]
    assert not maps.has_steps and not maps.has_self_attention and maps.heads("single.0") == 4
    torch.testing.assert_close(torch.stack([maps.heat(heads=[head]) for head in range(4)]).mean(0), maps.heat())
    assert maps.recorded_steps() == [0, 1] and maps.sigmas[0] == pytest.approx(1.0, abs=1e-3)


# --- what else happens in a run -----------------------------------------------------------------------------------------


def test_evaluations_of_other_nodes_are_not_recorded(watch, built):
    """Perturbed attention, SAG and their kin evaluate the model again after the sampler's own call."""
    family, model = FAMILIES["sd15"], built("sd15")
    extra = []

    def guidance(args):
        run = comfy.samplers.calc_cond_batch
        extra.append(run(args["model"], [args["cond"]], args["input"] * 2, args["sigma"], args["model_options"]))
        return args["denoised"]

    plain, maps = watch(model)
    sample(family, plain)
    guided, others = watch(model)
    guided.set_model_sampler_post_cfg_function(guidance)
    sample(family, guided)
    assert len(extra) == 2
    assert_same_maps(maps, others)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_node_that_leaves_inference_mode_for_some_calls_changes_no_map(watch, built, gradient):
    """As guidance nodes do that take a gradient of some steps."""
    model = built("sd15").clone()
    calls = []

    def wrapper(apply_model, call):
        calls.append(None)
        inference = len(calls) % 2 == 1
        with torch.inference_mode(inference), torch.set_grad_enabled(gradient and not inference):
            x = call["input"].clone().requires_grad_(gradient and not inference)
            return apply_model(x, call["timestep"].clone(), **call["c"]).detach()

    model.set_model_unet_function_wrapper(wrapper)
    (plain, expected), (mixed, found) = watch(built("sd15")), watch(model)
    sample(SEEN["sd15"], plain, steps=6)
    sample(SEEN["sd15"], mixed, steps=6)
    assert len(calls) == 6
    assert found.layers == expected.layers
    torch.testing.assert_close(found.heat(), expected.heat())


def test_private_passes_are_not_recorded(watch, built):
    from fovea_attention.attention.host import INTERNAL_PASS

    watched, maps = watch(built("sd15"))
    watched.model_options["transformer_options"][INTERNAL_PASS] = True
    sample(FAMILIES["sd15"], watched)
    with pytest.raises(ValueError, match="Nothing could be recorded"):
        maps.heat()


def test_replaced_attention_is_still_seen_and_noted(watch, built):
    """IPAdapter and its kin compute a block's attention themselves, past the override."""
    family, model = FAMILIES["sd15"], built("sd15")
    replaced, calls = model.clone(), []

    def own(q, k, v, options):
        calls.append(options["block"])
        q, k, v = (x.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    for block in (("input", 1), ("output", 2)):
        replaced.set_model_attn2_replace(own, *block)
    plain, maps = watch(model)
    sample(family, plain, steps=1)
    watched, others = watch(replaced)
    sample(family, watched, steps=1)
    assert calls and any("replaces attention" in note for note in others.notes)
    assert_same_maps(maps, others)


def test_a_block_that_another_node_replaces_is_named(watch, built, caplog):
    replaced = built("flux").clone()
    replaced.set_model_patch_replace(lambda args, extra: {"img": args["img"], "txt": args["txt"]}, "dit", "double_block", 1)
    watched, maps = watch(replaced)
    with caplog.at_level(logging.INFO, logger="fovea"):
        sample(FAMILIES["flux"], watched)
    assert maps.layers == ["double.0", "single.0", "single.1"] and maps.notes == ["these layers could not be read: double.1"]
    assert [record.message for record in caplog.records if record.name == "fovea"] == [
        "Attention maps: 3 layers in 2 of 2 steps, positive and negative prompt; these layers could not be read: double.1"
    ]


def test_steps_on_a_smaller_image_are_added_on_the_finer_grid(watch, built):
    """Deep shrink computes the first steps on a smaller feature map."""
    family, shrunk, small = FAMILIES["sd15"], built("sd15").clone(), []

    def shrink(h, options):
        if options["block"] != ("input", 1) or options["sigmas"][0] <= options["sample_sigmas"][1]:
            return h
        small.append(interpolate(h, scale_factor=0.5))
        return small[-1]

    def grow(h, skip, options):
        return (h if h.shape[-2:] == skip.shape[-2:] else interpolate(h, size=skip.shape[-2:])), skip

    shrunk.set_model_input_block_patch(shrink)
    shrunk.set_model_output_block_patch(grow)
    watched, maps = watch(shrunk, layers="input.3")
    sample(family, watched, steps=2)
    assert [h.shape[-2:] for h in small] == [(8, 6)]  # before it is halved for input.3
    assert maps.grid == (8, 6) and maps.recorded_steps() == [0, 1]
    assert maps.heat(step=0).shape == maps.heat(step=1).shape == (77, 8, 6)
    torch.testing.assert_close(maps.heat().sum(0).mean(), torch.tensor(2.0), atol=0.02, rtol=0)


def test_tgate_and_capture_compose(watch, built, node_classes, caplog):
    """After the gate cross-attention is not computed: there are no maps to show, and the image is T-GATE's."""
    family, model = FAMILIES["sd15"], built("sd15")
    gated = node_classes["TGateCache"].execute(model, gate_at=0.5)[0]
    image = sample(family, gated, steps=6)
    before, maps = watch(gated)
    after, others = watch(model)
    with caplog.at_level(logging.INFO, logger="fovea"):
        assert torch.equal(sample(family, before, steps=6), image)
        assert torch.equal(sample(family, node_classes["TGateCache"].execute(after, gate_at=0.5)[0], steps=6), image)
    for handle in (maps, others):
        assert handle.recorded_steps() == [0, 1, 2] and handle.meta["tgate_gate"] == 3
        assert any("3 of 6 steps have no maps" in note for note in handle.notes)
    assert_same_maps(maps, others)
    assert any(record.message.startswith("Attention maps: 6 layers in 3 of 6 steps") for record in caplog.records)


def test_two_capture_nodes_on_one_model_are_both_filled(watch, built):
    family = FAMILIES["pixart"]
    first, maps = watch(built("pixart"))
    second, others = watch(first, layers="block.1")
    sample(family, second)
    assert maps.layers == ["block.0", "block.1"] and others.layers == ["block.1"]
    torch.testing.assert_close(maps.heat(layers=["block.1"]), others.heat())


def test_the_last_run_wins(watch, built):
    """A hires-fix samples twice with one model."""
    family = FAMILIES["sd15"]
    watched, maps = watch(built("sd15"))
    sample(family, watched)
    assert maps.grid == (16, 12)
    sample(family, watched, latent_image=family.latent(size=(24, 16)), steps=1)
    assert maps.grid == (24, 16) and maps.steps == 1


class Stop(Exception):
    pass


def is_filled(maps) -> bool:
    try:
        maps.require()
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", ["sd15", "pixart", "flux"])
def test_an_interrupted_run_leaves_nothing(watch, built, name):
    family, model = FAMILIES[name], built(name)
    watched, maps = watch(model)
    before = {key: value for key, value in watched.model_options["transformer_options"].items() if key != "wrappers"}

    def interrupt(func, *args, **kwargs):
        raise Stop

    attention = sys.modules[SWAPPED[name]].optimized_attention if name in SWAPPED else None

    def stop(*args):
        raise Stop

    for run, callback in ((with_override(watched, interrupt), None), (watched, stop)):
        with pytest.raises(Stop):
            sample(family, run, callback=callback)
    assert not is_filled(maps)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.model.modules())
    assert before == {key: value for key, value in watched.model_options["transformer_options"].items() if key != "wrappers"}
    if attention is not None:
        assert sys.modules[SWAPPED[name]].optimized_attention is attention
    sample(family, watched)
    assert is_filled(maps)


def test_several_gpus_at_once_cannot_share_a_swapped_function(watch, built):
    watched, maps = watch(built("pixart"))
    watched.model_options["transformer_options"]["multigpu_thread_device"] = "cuda:1"
    sample(FAMILIES["pixart"], watched)
    assert any("several GPUs" in note for note in maps.notes)
    with pytest.raises(ValueError, match="several GPUs"):
        maps.heat()


def test_unknown_networks_say_so_and_show_what_can_be_told(watch, built, monkeypatch):
    from fovea_attention.attention import networks as sites
    from fovea_attention.nodes.attn_capture import AttnMapCapture

    monkeypatch.delitem(sites.table._NETWORKS, "comfy.ldm.wan.model.WanModel")
    monkeypatch.delitem(sites.table._NETWORKS, "comfy.ldm.flux.model.Flux")
    watched, maps = watch(built("wan_t2v"), self_attention=True)
    sample(FAMILIES["wan_t2v"], watched)
    assert any("WanModel is not in Fovea's table" in note for note in maps.notes)
    assert maps.self_attention(0.5, 0.5).shape == (8, 6) and maps.heat().shape == (20, 8, 6)  # told by their lengths
    watched, maps = watch(built("flux"), self_attention=True)
    sample(FAMILIES["flux"], watched)
    with pytest.raises(ValueError, match="Flux is not in Fovea's table"):
        maps.heat()
    with pytest.raises(ValueError, match="Leave layers empty"):
        AttnMapCapture.execute(built("flux"), layers="double.1")


# --- memory -------------------------------------------------------------------------------------------------------------


def budget_run(engine, steps: int = 4, **settings):
    """A run that gets four layers of 64 x 64 maps with 4 heads in every step, and the most megabytes it held."""
    from fovea_attention.attention.host import StepClock

    conds = [[{"uuid": "u", "cross_attn": torch.zeros(1, 64, 4)}], []]
    run = engine.recorder.CaptureRun(
        engine.CaptureSettings(**settings), StepClock(tuple(range(steps, -1, -1))), SimpleNamespace(conds={})
    )
    run.order = [f"block.{index}" for index in range(4)]
    maps = torch.rand(1, 4, 64, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    peak = 0
    for step in range(steps):
        run.begin_evaluation(1, steps - step)
        with run.main_call(conds, torch.zeros(1, 4, 64, 64)):
            (track,) = run.tracks_for({"cond_or_uncond": [0], "uuids": ["u"]}, 1)
            for name in run.order:
                run.add_text(track, name, 4, maps)
                peak = max(peak, run.memory.bytes())
    return run.recording(), peak / 2**20


def test_memory_does_not_grow_with_steps_unless_they_are_kept(engine):
    (_, short), (_, long) = (budget_run(engine, steps, per_step=False) for steps in (2, 12))
    assert long == short
    (_, short), (_, long) = (budget_run(engine, steps) for steps in (2, 12))
    assert long > short


@pytest.mark.parametrize(
    ("megabytes", "side", "heads", "has_steps", "notes"),
    [
        (64, 64, 4, True, []),
        (9, 32, 4, True, ["lowered to at most 32"]),
        (6, 32, 1, True, ["heads were averaged", "lowered to at most 32"]),
        (3, 32, 1, False, ["heads were averaged", "single steps were dropped", "lowered to at most 32"]),
        (1, 16, 1, False, ["heads were averaged", "single steps were dropped", "lowered to at most 16"]),
    ],
)
def test_resolution_then_heads_then_steps_are_given_up(engine, megabytes, side, heads, has_steps, notes):
    recording, peak = budget_run(engine, steps=24, per_head=True, max_memory_mb=megabytes)
    (maps,) = recording.prompts
    assert {layer.maps.shape for layer in maps.layers.values()} == {(1, heads, 64, 1, side, side)}
    assert (maps.step_maps is not None) == has_steps
    assert len(recording.notes) == len(notes)
    assert all(expected in note for expected, note in zip(notes, recording.notes, strict=True))
    assert peak <= megabytes


# --- the node -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def node(pack):
    from fovea_attention.nodes.attn_capture import AttnMapCapture

    return AttnMapCapture


def test_the_node_gives_a_watched_clone_and_an_empty_handle(node, built):
    model = built("sd15")
    wrappers = str(model.model_options)
    watched, maps = node.execute(model).result
    assert watched is not model and not is_filled(maps) and str(model.model_options) == wrappers
    sample(FAMILIES["sd15"], model)
    assert not is_filled(maps)
    sample(FAMILIES["sd15"], watched)
    assert is_filled(maps) and maps.meta == {"model": "BaseModel", "family": "U-Net"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "middle, input.4"}, r"'input\.4', which this model does not have. Its layers: input\.1, input\.3, middle"),
        ({"max_memory_mb": 0}, "max_memory_mb is 0"),
    ],
)
def test_wrong_settings_are_refused_before_sampling(node, built, settings, message):
    with pytest.raises(ValueError, match=message):
        node.execute(built("sd15"), **settings)
