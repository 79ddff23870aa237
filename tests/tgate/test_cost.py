"""What T-GATE costs in Python, where a GPU would wait for it: counts, which are the same on every machine."""

from __future__ import annotations

from typing import Any

import pytest
from bench.launches import calls_of
from families import FAMILIES, sample

pytestmark = pytest.mark.newest

STEPS = 10
# Of plain sampling's Python calls: what a run of so many steps may add.
MOST_ADDED = 0.35


def test_a_run_adds_little_python(pack: Any, node_classes: Any) -> None:
    model = FAMILIES["sd15"].build()

    def calls(watched: Any) -> int:
        sample(FAMILIES["sd15"], watched, steps=1)  # what is looked up once
        return calls_of(lambda: sample(FAMILIES["sd15"], watched, steps=STEPS))

    plain = calls(model)
    added = {gate: calls(node_classes["TGateCache"].execute(model, gate_at=gate)[0]) / plain - 1 for gate in (0.5, 1.0)}
    assert added[0.5] <= MOST_ADDED and added[1.0] <= 0.01, added
