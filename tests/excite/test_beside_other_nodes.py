"""Guided beside nodes that wrap samplers, compute several prompts at once, or scale features."""

from __future__ import annotations

import comfy.samplers
import pytest
import tiny_unet
import torch
from host_inprocess import host_node
from tiny_unet import cond, small_model

STEPS = 4


@pytest.fixture(scope="module")
def excite(pack):
    import fovea_attention.attention.excite as excite

    return excite


@pytest.fixture
def passes(excite, monkeypatch):
    """Loss and gradient of every pass, and the latent that it was taken at."""
    found = []
    measure = excite.ExciteRun._gradient

    def watched(self, seen, sigma, rows):
        gradient = measure(self, seen, sigma, rows)
        found.append((gradient.loss.clone(), gradient.latent.clone(), float(sigma[0])))
        return gradient

    monkeypatch.setattr(excite.ExciteRun, "_gradient", watched)
    return found


@pytest.fixture
def run(node_classes):
    def sample(model, sampler="euler", size=(16, 16), batch=1, steps=STEPS, **settings):
        settings = {"subjects": "2, 5", "thresholds": "", "scale_factor": 200.0, **settings}
        with torch.inference_mode():
            guider = node_classes["AttendExciteGuider"].execute(model, cond(1), cond(2), **settings)[0]
            sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
            sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
            noise = torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(3))
            return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=3)

    return sample


# --------------------------------------------------------------------------------------------------- wrapped samplers


def shifted(function, factor, *, copies=False):
    """A sampler that shows its model a changed noise level, as Detail Daemon and Lying Sigma do."""

    def shifting_sampler(model, x, sigmas, *, inner_sampler=None, **kwargs):
        def model_wrapper(x, sigma, **extra):
            return model(x.clone() if copies else x, sigma * factor, **extra)

        model_wrapper.inner_model, model_wrapper.sigmas = model.inner_model, model.sigmas
        return function(inner_sampler)(model_wrapper, x, sigmas, **kwargs)

    return shifting_sampler


def wrapping(name, factor):
    inner = comfy.samplers.sampler_object(name)
    return comfy.samplers.KSAMPLER(shifted(lambda sampler: sampler.sampler_function, factor), {"inner_sampler": inner})


@pytest.mark.newest
@pytest.mark.parametrize("name", ["heun", "dpm_2"])
def test_a_wrapped_sampler_is_guided_at_its_own_steps(run, passes, name):
    model = small_model()
    run(model, name)
    alone = list(passes)
    passes.clear()
    run(model, wrapping(name, 0.9))
    assert len(passes) == len(alone) == 2
    assert [sigma for *_, sigma in passes] == [sigma for *_, sigma in alone]
    assert torch.equal(passes[0][1], alone[0][1])


@pytest.mark.newest
def test_a_wrapper_inside_a_wrapper(run, passes):
    outer = comfy.samplers.KSAMPLER(
        shifted(lambda sampler: lambda *a, **k: sampler.sampler_function(*a, **k, **sampler.extra_options), 0.95),
        {"inner_sampler": wrapping("heun", 0.9)},
    )
    run(small_model(), outer)
    assert len(passes) == 2


@pytest.mark.newest
def test_a_wrapper_that_shows_no_sampler_is_guided_by_the_order_of_its_calls(run, passes):
    euler = comfy.samplers.sampler_object("euler").sampler_function
    model = small_model()
    run(model)
    alone = list(passes)
    passes.clear()
    run(model, comfy.samplers.KSAMPLER(shifted(lambda _: euler, 0.9)))
    assert [sigma for *_, sigma in passes] == [sigma for *_, sigma in alone]
    assert torch.equal(passes[0][1], alone[0][1])


def test_a_wrapper_that_hides_the_latent_is_named_before_the_first_step(run, passes):
    euler = comfy.samplers.sampler_object("euler").sampler_function
    with pytest.raises(ValueError, match="shifting_sampler shows the model other noise levels and latents.*wraps"):
        run(small_model(), comfy.samplers.KSAMPLER(shifted(lambda _: euler, 0.9, copies=True)))
    assert not passes
    with pytest.raises(ValueError, match="uni_pc hides its latent"):
        run(small_model(), wrapping("uni_pc", 0.9))


@pytest.mark.newest
def test_noise_that_a_sampler_adds_itself(run, passes):
    """Euler's s_churn: the step's own latent and noise level are those with the added noise."""
    run(small_model(), comfy.samplers.ksampler("euler", {"s_churn": 2.0}))
    assert len(passes) == 2


# ------------------------------------------------------------------------------------- several prompts in one attention


def couple(model, others, *, base=0, by_image=False, longer=1):
    """Attention couple: every prompt's keys in one call, the queries once for each; the outputs' mean goes on."""
    model, count = model.clone(), len(others) + 1

    def before(q, k, v, extra):
        parts = []
        size = len(q) // len(extra["cond_or_uncond"])
        for index, which in enumerate(extra["cond_or_uncond"]):
            rows = slice(index * size, (index + 1) * size)
            texts = [k[rows]] if which == 1 else [other.to(q).expand(size, -1, -1) for other in others]
            if which != 1:
                texts.insert(base, k[rows])
            texts = torch.stack([text.repeat(1, longer, 1) for text in texts])  # prompts, images, rows, channels
            queries = q[rows].expand(len(texts), *q[rows].shape)
            if by_image:
                texts, queries = texts.transpose(0, 1), queries.transpose(0, 1)
            parts.append((queries.flatten(0, 1), texts.flatten(0, 1)))
        queries, texts = (torch.cat(values) for values in zip(*parts, strict=True))
        return queries, texts, texts

    def after(out, extra):
        shares = [1 if which == 1 else count for which in extra["cond_or_uncond"]]
        parts = out.split([len(out) // sum(shares) * share for share in shares])
        means = []
        for part, share in zip(parts, shares, strict=True):
            shape = (-1, share) if by_image else (share, -1)
            means.append(part.unflatten(0, shape).mean(1 if by_image else 0))
        return torch.cat(means)

    model.set_model_attn2_patch(before)
    model.set_model_attn2_output_patch(after)
    return model


@pytest.mark.parametrize("arranged", [{}, {"by_image": True, "base": 2, "longer": 2}])
def test_attention_couple_is_guided_by_the_base_prompts_rows(run, passes, arranged):
    """With the base prompt in every region the mean is the plain attention, so loss and gradient are the plain ones."""
    model, own = small_model(), cond(1)[0][0]
    run(model, batch=2)
    alone = list(passes)
    passes.clear()
    run(couple(model, [own, own], **arranged), batch=2, memory="low" if arranged else "fast")
    for found, expected in zip(passes, alone, strict=True):
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-4 * float(expected[1].abs().max()))


@pytest.mark.newest
def test_other_prompts_of_attention_couple_do_not_count(run, passes):
    """The first guided layer looks at the same image, so its maps are the base prompt's whatever the regions say."""
    model, regions = small_model(), [cond(11)[0][0], cond(12)[0][0]]
    for arranged in ({}, {"base": 2}):
        run(couple(model, regions, **arranged), guide_until=0.25)
    torch.testing.assert_close(passes[0][:2], passes[1][:2], rtol=1e-4, atol=1e-6)


def test_attention_couple_without_the_base_prompt_is_refused(run):
    model = couple(small_model(), [])

    def replaced(q, k, v, extra):
        return q.repeat(2, 1, 1), cond(11)[0][0].to(q).expand(2 * len(q), -1, -1), None

    model.model_options["transformer_options"]["patches"]["attn2_patch"] = [replaced]
    with pytest.raises(ValueError, match=r"another node \(.*test_beside_other_nodes.*attention couple"):
        run(model, cfg=1.0)


# ----------------------------------------------------------------------------------------------------- scaled features


def test_deep_shrink_is_guided_on_the_grid_that_arrives(run, passes):
    model = tiny_unet.vector_model()
    node = host_node("PatchModelAddDownscale", "comfy_extras.nodes_model_downscale")
    shrunk = node(model, 3, 2.0, 0.0, 0.35, True, "bicubic", "bicubic")[0]
    run(shrunk, size=(20, 36))
    assert all(loss.isfinite().all() and float(latent.abs().max()) > 0 for loss, latent, _ in passes)
    assert len(passes) == 2


@pytest.mark.newest
def test_a_scaled_grid_keeps_its_shape(pack):
    from fovea_attention.attention.networks.grids import scaled_grid

    for height, width in ((64, 64), (48, 80), (33, 47), (104, 152)):
        for factor in (1.0, 1.5, 2.0, 3.0):
            found = round(height / factor), round(width / factor)
            assert scaled_grid((1, height, width), found[0] * found[1])[1:] == found
    assert scaled_grid((1, 16, 16), 13) is None
    assert scaled_grid((1, 16, 16), 0) is None
