"""The DiT network is the paper's: its sizes, its work, its formulas, and diffusers' numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_dit import TINY, DiT, diffusers_network, dit, dit_diffusers, dit_embeddings, forward, inputs, sincos, tiny

DESIGNS = [design.value for design in dit.Conditioning]

# Table 4 of the paper and its appendix: parameters in millions and multiply-adds ("Gflops" there) at 256 px.
ADALN_ZERO = {
    ("S", 8): (33, 0.36),
    ("S", 4): (33, 1.41),
    ("S", 2): (33, 6.06),
    ("B", 8): (131, 1.42),
    ("B", 4): (130, 5.56),
    ("B", 2): (130, 23.01),
    ("L", 8): (459, 5.01),
    ("L", 4): (458, 19.70),
    ("L", 2): (458, 80.71),
    ("XL", 8): (676, 7.39),
    ("XL", 4): (675, 29.05),
    ("XL", 2): (675, 118.64),
}
XL2 = {"in-context": (449, 119.4), "cross-attention": (598, 137.6), "adaLN": (600, 118.6), "adaLN-Zero": (675, 118.6)}


def meta_network(size: str, patch: int, **changes: Any) -> DiT:
    shape = dit.SIZES[size]
    return DiT(shape.depth, shape.width, shape.heads, patch, device="meta", **changes)


def multiply_adds(network: DiT, side: int) -> float:
    """Billions, for one latent of that side: convolutions, linear layers, attention, and one per normalised value.

    That last is a fiftieth of a percent, and with it the sum is the paper's to one unit of its last digit.
    """
    total = 0

    def count(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        norm = isinstance(module, torch.nn.LayerNorm)
        total += output.numel() * (1 if norm else module.weight[0].numel())  # type: ignore[operator]

    def attention(function: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, **kwargs: Any) -> torch.Tensor:
        nonlocal total
        total += 2 * q.shape[1] * k.shape[1] * q.shape[2]
        return torch.empty_like(q)

    for module in network.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.LayerNorm)):
            module.register_forward_hook(count)
    x = torch.empty(1, 4, side, side, device="meta")
    one = torch.zeros(1, dtype=torch.int64, device="meta")
    network(x, one, one, {"optimized_attention_override": attention})
    return total / 1e9


def parameters(network: DiT) -> int:
    return round(sum(parameter.numel() for parameter in network.parameters()) / 1e6)


@pytest.mark.parametrize(("size", "patch"), [(size, patch) for size in dit.SIZES for patch in dit.PATCHES])
def test_sizes_and_work_are_those_of_the_paper(size: str, patch: int) -> None:
    network = meta_network(size, patch)
    millions, billions = ADALN_ZERO[size, patch]
    assert parameters(network) == millions
    assert multiply_adds(network, 32) == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("design", DESIGNS)
def test_the_four_designs_cost_what_the_paper_says(design: str) -> None:
    network = meta_network("XL", 2, conditioning=design)
    millions, billions = XL2[design]
    assert parameters(network) == millions
    assert round(multiply_adds(network, 32), 1) == billions


def test_512_pixels_cost_what_the_paper_says() -> None:
    assert multiply_adds(meta_network("XL", 2), 64) == pytest.approx(524.60, abs=0.01)


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (10, 6)])
@pytest.mark.parametrize("design", DESIGNS)
def test_every_design_equals_its_formula_on_any_latent(design: str, size: tuple[int, int]) -> None:
    network = tiny(conditioning=design)
    x, t, y = inputs(*size)
    with torch.inference_mode():
        result = network(x, t, y)
        expected = forward(network.state_dict(), TINY["heads"], 2, x, t, y)
    assert result.shape == (3, 8, *size)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patch", dit.PATCHES)
def test_patches_equal_the_formula(patch: int) -> None:
    network = tiny(patch_size=patch)
    x, t, y = inputs(16, 8)
    with torch.inference_mode():
        torch.testing.assert_close(
            network(x, t, y), forward(network.state_dict(), TINY["heads"], patch, x, t, y), rtol=1e-5, atol=1e-5
        )


def test_a_latent_that_is_no_multiple_of_the_patch_keeps_its_size() -> None:
    x, t, y = inputs(7, 9)
    with torch.inference_mode():
        result = tiny()(x, t, y)
    assert result.shape == (3, 8, 7, 9) and torch.isfinite(result).all()


@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (16, 16)])
def test_positions_equal_the_table_of_the_files(grid: tuple[int, int]) -> None:
    assert torch.equal(dit.position_table(*grid, 64), sincos(*grid, 64))


@pytest.mark.parametrize("design", DESIGNS)
def test_bfloat16_stays_near_float32(design: str) -> None:
    network = tiny(conditioning=design)
    x, t, y = inputs()
    with torch.inference_mode():
        expected = network(x, t, y)
        half = DiT(**TINY, conditioning=design, dtype=torch.bfloat16)
        half.load_state_dict(network.state_dict())
        result = half(x.bfloat16(), t, y)
    assert result.dtype == torch.bfloat16
    assert (result.float() - expected).abs().max() / expected.abs().max() < 0.05


# --- diffusers ------------------------------------------------------------------------------------------------------


def test_forward_equals_diffusers() -> None:
    theirs = diffusers_network()
    ours = DiT(**TINY, **dit_diffusers.DIFFUSERS_DETAILS, dtype=torch.float32)
    weights = dit_diffusers.from_diffusers(theirs.state_dict())
    weights.pop("pos_embed", None)
    ours.load_state_dict(weights)
    x, t, y = inputs()
    with torch.inference_mode():
        expected = theirs(x, timestep=t, class_labels=y).sample
        result = ours(x, t, y)
    assert (result - expected).abs().max() < 1e-5
    assert expected.abs().max() > 0.1


def test_the_papers_timestep_differs_from_diffusers_only_in_its_frequencies() -> None:
    """128 of them spread over 1..10000, there one less: at timestep 0 nothing of it is to be seen."""
    theirs = diffusers_network()
    weights = dit_diffusers.from_diffusers(theirs.state_dict())
    weights.pop("pos_embed", None)
    ours = DiT(**TINY, mlp_eps=1e-5, dtype=torch.float32)
    ours.load_state_dict(weights)
    x, t, y = inputs()
    with torch.inference_mode():
        difference = (ours(x, t, y) - theirs(x, timestep=t, class_labels=y).sample).abs().flatten(1).amax(1)
    assert difference[0] < 1e-5 < difference[1:].min()
    assert dit_embeddings.timestep_features(torch.tensor([999.0]))[0, 128:].shape == (128,)


# --- as ComfyUI's other transformers -----------------------------------------------------------------------------------


def test_every_attention_call_passes_the_hosts_override_and_says_its_block() -> None:
    seen = []

    def override(function: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, **kwargs: Any) -> torch.Tensor:
        options = kwargs["transformer_options"]
        seen.append((options["block_type"], options["block_index"], options["total_blocks"], tuple(k.shape), heads))
        return function(q, k, v, heads, **kwargs)

    network = tiny(conditioning="cross-attention")
    x, t, y = inputs()
    with torch.inference_mode():
        plain = network(x, t, y)
        given = {"optimized_attention_override": override}
        assert torch.equal(network(x, t, y, given), plain)
    assert seen == [("double", index, 3, shape, 2) for index in range(3) for shape in ((3, 16, 128), (3, 2, 128))]
    assert list(given) == ["optimized_attention_override"], "the caller's options are not written to"


def test_blocks_can_be_replaced_and_patched() -> None:
    network = tiny()
    x, t, y = inputs()
    calls = []

    def replacement(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, torch.Tensor]:
        calls.append(("replaced", args["transformer_options"]["block_index"]))
        return extra["original_block"](args)

    def patch(args: dict[str, Any]) -> dict[str, torch.Tensor]:
        calls.append(("patched", args["block_index"]))
        return {"img": args["img"]}

    options = {"patches_replace": {"dit": {("double_block", 1): replacement}}, "patches": {"double_block": [patch]}}
    with torch.inference_mode():
        assert torch.equal(network(x, t, y, options), network(x, t, y))
    assert calls == [("patched", 0), ("replaced", 1), ("patched", 1), ("patched", 2)]
