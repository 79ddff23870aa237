"""What a capture costs each attention call that it records: counts, which are the same on every machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from bench.launches import calls_of, operations_of
from families import FAMILIES, sample

pytestmark = pytest.mark.newest

# Of one recorded attention call, with its part in the sums of a step.
MOST_OPERATIONS, MOST_PYTHON_CALLS = 20, 150


def of_a_step(count: Callable[[Callable[[], object]], int], model: Any) -> float:
    """Return what a step costs once all is known that stays the same in a run."""

    def run(steps: int) -> Callable[[], object]:
        return lambda: sample(FAMILIES["sd15"], model, steps=steps)

    return (count(run(6)) - count(run(2))) / 4


def test_a_recorded_call_costs_few_operations_and_little_python(pack: Any, node_classes: Any) -> None:
    model = FAMILIES["sd15"].build()
    watched, maps = node_classes["AttnMapCapture"].execute(model, self_attention=False).args
    sample(FAMILIES["sd15"], watched, steps=1)
    recorded = len(maps.layers)
    operations, calls = ((of_a_step(count, watched) - of_a_step(count, model)) / recorded for count in (operations_of, calls_of))
    assert recorded > 1
    assert operations <= MOST_OPERATIONS, f"{operations:.1f} operations for each of {recorded} recorded calls"
    assert calls <= MOST_PYTHON_CALLS, f"{calls:.0f} Python calls for each of {recorded} recorded calls"


def test_comfyui_makes_room_for_the_work_of_a_capture(node_classes: Any, asked: list[tuple[float, float]]) -> None:
    from fovea_attention.attention.maps.probabilities import WORKING_BYTES

    model = FAMILIES["sd15"].build()
    before = dict(model.model.__dict__)
    for watched in (model, node_classes["AttnMapCapture"].execute(model)[0]):
        sample(FAMILIES["sd15"], watched, steps=1)
    assert {after - plain for plain, after in zip(*asked, strict=True)} == {WORKING_BYTES}
    assert model.model.__dict__.keys() == before.keys()
