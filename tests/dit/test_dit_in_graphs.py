"""The pack's other nodes on a DiT: T-GATE's self-attention intervals and dropped guidance, and self-attention views."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import torch
from tgate_reference import assert_same_image, relative_difference
from tiny_dit import bare, dit_sampling, labels, latent, load_dit, sample, sites, tiny, write

# T-GATE's published schedule for 25 steps, gate 10, intervals 5 and 1, warm-up 2: C compute, S compute and store, R reuse.
TRUTH_SELF = "CCSRRSRRRC" + "C" * 15

DESIGNS = pytest.mark.parametrize("design", ["adaLN-Zero", "in-context", "cross-attention"])


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Any]:
    def model(design: str = "adaLN-Zero", **options: Any) -> Any:
        return load_dit(write(tmp_path / f"{design}.safetensors", bare(tiny(conditioning=design))), **options)

    return model


@pytest.fixture
def tgate(node_classes: dict[str, Any]) -> Callable[..., Any]:
    return lambda model, **settings: node_classes["TGateCache"].execute(model, **settings)[0]


@DESIGNS
def test_only_the_images_attention_to_itself_is_a_site(load: Callable[..., Any], design: str) -> None:
    network = load(design).model.diffusion_model
    assert [(site.name, site.kind) for site in sites.attention_sites(network)] == [(f"blocks.{i}.attn", "self") for i in range(3)]
    layers = sites.attention_layers(network)
    assert [(layer.name, layer.kind) for layer in layers] == [(f"block.{i}", "self") for i in range(3)]
    layout = sites.network_layout(network)
    assert layout is not None and layout.family == "DiT"


# --- T-GATE -----------------------------------------------------------------------------------------------------------


class Calls:
    """Batch of every self-attention that was really computed, by step."""

    def __init__(self, model: Any) -> None:
        self.step = 0
        self.batches: dict[int, list[int]] = {}
        for block in model.model.diffusion_model.blocks:
            block.attn.qkv.register_forward_hook(self._hook)

    def _hook(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        self.batches.setdefault(self.step, []).append(len(output))

    def next_step(self, step: int, *_: Any) -> None:
        self.step = step + 1


def test_self_attention_intervals_and_dropped_guidance_by_counting(
    load: Callable[..., Any], tgate: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="fovea")
    model = load()
    calls = Calls(model)
    sample(tgate(model, gate_at=0.4), steps=25, callback=calls.next_step)
    expected = {step: [2 if step < 10 else 1] * 3 for step, mark in enumerate(TRUTH_SELF) if mark != "R"}
    assert calls.batches == expected
    assert "cross-attention reused in 0 of 25 steps, negative prompt skipped in 15, self-attention reused in 5" in caplog.text
    assert (
        "DiTModel has no separate cross-attention, so only self-attention is reused and the negative prompt is dropped"
        in caplog.text
    )


class Restated:
    """Hooks that compute every self-attention and overwrite it where the schedule reuses it, and the published guidance."""

    def __init__(self, model: Any, gate: int, sp: int, fi: int, warm_up: int, drop: bool) -> None:
        self.gate, self.sp, self.fi, self.warm_up = gate, sp, fi, warm_up
        self.step, self.stored, self.kinds = 0, {}, []
        self.model = model.clone()
        self.model.add_wrapper_with_key("apply_model", "restated", self._note)
        if drop:
            self.model.set_model_sampler_post_cfg_function(
                lambda args: args["cond_denoised"] if self.step >= gate else args["denoised"]
            )
        blocks = model.model.diffusion_model.blocks
        self.handles = [block.attn.register_forward_hook(self._hook(index)) for index, block in enumerate(blocks)]

    def _note(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        self.kinds = args[5]["cond_or_uncond"]
        return executor(*args, **kwargs)

    def _hook(self, index: int) -> Callable[..., torch.Tensor]:
        def overwrite(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            if self.step < self.gate - 1:
                reuse = self.sp > 1 and self.step > self.warm_up and self.step % self.sp != 0
            else:
                reuse = self.step >= self.gate and self.step % self.fi != 0
            chunks = []
            for kind, chunk in zip(self.kinds, output.chunk(len(self.kinds)), strict=True):
                if not reuse:
                    self.stored[index, kind] = chunk
                chunks.append(self.stored[index, kind])
            return torch.cat(chunks)

        return overwrite

    def sample(self, **options: Any) -> torch.Tensor:
        def next_step(step: int, *_: Any) -> None:
            self.step = step + 1

        try:
            return sample(self.model, callback=next_step, **options)
        finally:
            for handle in self.handles:
                handle.remove()


@DESIGNS
@pytest.mark.parametrize(
    ("gate", "sp", "fi", "warm_up", "cfg_after_gate"),
    [
        (4, 1, 1, 2, "drop (keep positive)"),
        (5, 2, 2, 0, "drop (keep positive)"),
        (6, 3, 3, 1, "drop (keep negative, as published)"),
        (5, 2, 3, 0, "keep"),
    ],
)
def test_t_gate_equals_its_restatement(
    load: Callable[..., Any],
    tgate: Callable[..., Any],
    design: str,
    gate: int,
    sp: int,
    fi: int,
    warm_up: int,
    cfg_after_gate: str,
) -> None:
    model = load(design)
    settings = {"sp_interval": sp, "fi_interval": fi, "warm_up": warm_up, "cfg_after_gate": cfg_after_gate}
    result = sample(tgate(model, gate_at=gate / 10, **settings), steps=10)
    expected = Restated(model, gate, sp, fi, warm_up, drop=cfg_after_gate != "keep").sample(steps=10)
    assert_same_image(result, expected)
    assert relative_difference(result, sample(model, steps=10)) > 1e-4


def test_after_the_gate_every_channel_is_the_positive_classs(load: Callable[..., Any], tgate: Callable[..., Any]) -> None:
    model, steps = load(), []
    sample(
        tgate(model, gate_at=0.25, sp_interval=1),
        steps=4,
        cfg=6.0,
        callback=lambda step, denoised, x, total: steps.append((x.clone(), denoised.clone())),
    )
    sampling, network = model.model.model_sampling, model.model.diffusion_model
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 4)
    with torch.inference_mode():
        for (x, denoised), sigma, gated in zip(steps, sigmas, (False, True, True, True), strict=False):
            noise = network(x / (1 + sigma**2) ** 0.5, sampling.timestep(sigma[None]), y=torch.tensor([207]))
            distance = relative_difference(denoised, x - sigma * noise)
            assert (distance < 1e-6) is gated, (float(sigma), distance)


def test_after_the_gate_the_scale_changes_nothing(load: Callable[..., Any], tgate: Callable[..., Any]) -> None:
    model = load()
    post = model.model_options["sampler_post_cfg_function"]
    cond = torch.randn(1, 4, 8, 8)
    with torch.inference_mode():
        for scale in (1.0, 4.0, 7.5):
            guided = comfy.samplers.cfg_function(
                model.model, cond, cond, scale, cond, torch.ones(1), {"sampler_post_cfg_function": post}
            )
            assert torch.equal(guided, cond)


def test_keeping_guidance_with_nothing_to_reuse_is_an_error(load: Callable[..., Any], tgate: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="nothing would get faster"):
        tgate(load(), cfg_after_gate="keep", sp_interval=1)


def test_t_gate_with_the_learned_variance_sampler(load: Callable[..., Any], tgate: Callable[..., Any]) -> None:
    model = load()
    sigmas = torch.cat([model.model.model_sampling.sigmas[[999, 700, 400, 200, 0]], torch.zeros(1)])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def run(patched: Any, negative: Any, cfg: float) -> torch.Tensor:
        with torch.inference_mode():
            return comfy.sample.sample_custom(
                patched,
                noise,
                cfg,
                dit_sampling.dit_sampler(),
                sigmas,
                labels(1),
                negative,
                torch.zeros_like(noise),
                disable_pbar=True,
                seed=3,
            )

    gated = run(tgate(model, gate_at=0.4, sp_interval=1, fi_interval=2), labels(-1), 4.0)
    assert torch.isfinite(gated).all() and not torch.equal(gated, run(model, labels(-1), 4.0))


# --- attention maps ---------------------------------------------------------------------------------------------------


@DESIGNS
@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
def test_self_attention_is_seen_and_the_image_stays(
    load: Callable[..., Any], node_classes: dict[str, Any], design: str, size: tuple[int, int]
) -> None:
    model = load(design)
    watched, maps = node_classes["AttnMapCapture"].execute(model, self_attention=True)
    start = latent(*size)
    assert torch.equal(sample(watched, start=start), sample(model, start=start))
    assert maps.has_self_attention
    x, y = 0.4, 0.6
    seen = maps.self_attention(x, y, prompt="positive")
    grid = size[0] // 2, size[1] // 2
    assert tuple(seen.shape[-2:]) == grid
    expected = _attention_of(model, size, (int(y * grid[0]), int(x * grid[1])), start)
    torch.testing.assert_close(seen.reshape(grid).float(), expected, rtol=1e-4, atol=1e-6)


def _attention_of(model: Any, size: tuple[int, int], query: tuple[int, int], start: torch.Tensor) -> torch.Tensor:
    """What one token looks at in the image, mean over blocks, heads and steps, of the positive class's half."""
    rows = []

    def override(function: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, **kwargs: Any) -> torch.Tensor:
        if q.shape[1] == k.shape[1]:
            index = kwargs["transformer_options"]["cond_or_uncond"].index(0)
            q1, k1 = (part.chunk(len(part))[index].unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k))
            weights = (q1 @ k1.transpose(-1, -2) / q1.shape[-1] ** 0.5).softmax(-1)
            width = size[1] // 2
            tokens = size[0] // 2 * width
            rows.append(weights[0, :, query[0] * width + query[1], :tokens].mean(0).reshape(-1, width))
        return function(q, k, v, heads, **kwargs)

    watched = model.clone()
    watched.model_options["transformer_options"]["optimized_attention_override"] = override
    sample(watched, start=start)
    return torch.stack(rows).mean(0)


def test_words_are_refused_with_the_reason(load: Callable[..., Any], node_classes: dict[str, Any]) -> None:
    watched, maps = node_classes["AttnMapCapture"].execute(load(), self_attention=True)
    sample(watched)
    with pytest.raises(ValueError, match="self-attention"):
        node_classes["AttnMapPreview"].execute(maps, torch.zeros(1, 64, 64, 3), words="cat")
    with pytest.raises(ValueError, match="self-attention"):
        node_classes["AttnMapPreview"].execute(maps, torch.zeros(1, 64, 64, 3))


def test_the_preview_shows_self_attention(load: Callable[..., Any], node_classes: dict[str, Any]) -> None:
    watched, maps = node_classes["AttnMapCapture"].execute(load(), self_attention=True)
    sample(watched)
    image = node_classes["AttnMapPreview"].execute(maps, torch.rand(1, 64, 64, 3), view="self-attention")[0]
    assert image.shape[0] == 1 and image.std() > 0


def test_capturing_words_alone_on_a_model_without_text_is_an_error(
    load: Callable[..., Any], node_classes: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="self_attention is off, but DiTModel has no text"):
        node_classes["AttnMapCapture"].execute(load())


# --- on a real server ---------------------------------------------------------------------------------------------------


@pytest.mark.server
def test_a_graph_of_the_nodes_makes_images(server: Any, object_info: dict[str, Any]) -> None:
    """Load, label, sample with both kinds of sampler node, decode. (Random weights: the image shows nothing.)"""
    assert object_info["DiTLoader"]["output"] == ["MODEL"]
    folder = server.base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "DiT-test.safetensors"
    write(file, bare(tiny(in_channels=3, out_channels=6, classes=10)))
    checkpoint = object_info["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"]
    names = checkpoint[1]["options"] if checkpoint[0] == "COMBO" else checkpoint[0]
    graph = {
        "1": {
            "class_type": "DiTLoader",
            "inputs": {"model_name": file.name, "prediction": "auto", "cfg_channels": "3 (as published)"},
        },
        "2": {"class_type": "DiTClassLabel", "inputs": {"label": "207: golden retriever", "labels": "3, 7"}},
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 64, "batch_size": 2}},
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": names[0]}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0], "positive": ["2", 0], "negative": ["2", 1], "latent_image": ["3", 0], "seed": 1, "steps": 3,
                "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
            },
        },
        "6": {"class_type": "DiTSampler", "inputs": {}},
        "7": {"class_type": "BasicScheduler", "inputs": {"model": ["1", 0], "scheduler": "normal", "steps": 3, "denoise": 1.0}},
        "8": {
            "class_type": "SamplerCustom",
            "inputs": {
                "model": ["1", 0], "add_noise": True, "noise_seed": 1, "cfg": 4.0, "positive": ["2", 0], "negative": ["2", 1],
                "sampler": ["6", 0], "sigmas": ["7", 0], "latent_image": ["3", 0],
            },
        },
    }  # fmt: skip
    for sampler, number in (("5", 9), ("8", 11)):
        graph[str(number)] = {"class_type": "VAEDecode", "inputs": {"samples": [sampler, 0], "vae": ["4", 2]}}
        graph[str(number + 1)] = {"class_type": "PreviewImage", "inputs": {"images": [str(number), 0]}}
    try:
        images = server.run(graph).images
    finally:
        file.unlink()
    assert sorted(image.node for image in images) == ["10", "10", "12", "12"]
