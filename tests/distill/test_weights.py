"""The node with every way in which a network holds its weights, against the same network with the same numbers in float32."""

from __future__ import annotations

import pytest
import torch
from distill_runs import distill, features, fresh_cache, node, run  # noqa: F401
from families import weights

WAYS = [(name, "guided sampling") for name in weights.WAYS if name != "plain"]


@pytest.mark.parametrize(("way", "method"), [*WAYS, ("packed", "optimise"), ("LoRA at call time", "optimise")])
def test_the_image_is_that_of_the_plain_numbers(node, way, method):  # noqa: F811
    with torch.inference_mode():
        model, plain = weights.pair(way)
    (found, report), (expected, reference) = (run(node, each, steps=1, method=method) for each in (model, plain))
    assert (found - expected).norm() <= 1e-3 * expected.norm()
    for own, other in zip(report["steps"], reference["steps"], strict=True):
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-3)


@pytest.mark.newest
@pytest.mark.parametrize("way", ["packed", "fp8"])
def test_low_memory_too(node, way):  # noqa: F811
    with torch.inference_mode():
        model, plain = weights.pair(way)
    (found, _), (expected, _) = (run(node, each, steps=1, memory="low") for each in (model, plain))
    assert (found - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.newest
def test_weights_change_the_image(node):  # noqa: F811
    """Else the tests above would show nothing."""
    with torch.inference_mode():
        model, _ = weights.pair("LoRA at call time")
    found, expected = (run(node, each, steps=1)[0] for each in (model, weights.FAMILY.build()))
    assert (found - expected).norm() > 0.01 * expected.norm()
