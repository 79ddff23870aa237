"""A network that a new ComfyUI brings: every node says what it does not know of it, before sampling where it can do nothing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
from compatibility.tables import WORDS, Cell, Outcome
from compatibility.trial import Trial, quiet
from families import FAMILIES

pytestmark = pytest.mark.newest


def of_a_new_release(cls: type) -> type:
    """Return a subclass that may do anything, as WAN Animate 2 is one of Wan: its ``forward`` is its own."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return cls.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    return type(f"{cls.__name__}2", (cls,), {"forward": forward, "__module__": "comfy.ldm.of_a_new_release"})


@pytest.mark.parametrize(
    ("name", "network", "t_gate"),
    [
        ("wan_t2v", "comfy.ldm.wan.model.WanModel", Cell(Outcome.WORKS)),  # its blocks are known
        ("flux", "comfy.ldm.flux.model.Flux", Cell(Outcome.PART, "negative prompt skipped")),
    ],
)
def test_what_each_node_says_of_a_network_that_it_does_not_know(pack: Any, name: str, network: str, t_gate: Cell) -> None:
    family = FAMILIES[name]
    model = family.build()
    module, _, cls = network.rpartition(".")
    model.model.diffusion_model.__class__ = of_a_new_release(getattr(import_module(module), cls))
    with quiet() as log:
        cells = Trial(family, model, log).cells()
    assert cells["T-GATE Cache"] == t_gate
    unknown = f"{cls}2 is not in Fovea's table of networks, so it is not known which tokens of its attention are words"
    assert cells[WORDS].outcome in (Outcome.PART, Outcome.REFUSED) and unknown in cells[WORDS].message
    for node, said in (
        ("Attend-and-Excite", f"cannot guide {cls}2: it is not known where this model looks at its text"),
        ("Attention Distillation", f"does not know where {cls}2 attends to the image"),
    ):
        assert cells[node].outcome is Outcome.REFUSED and said in cells[node].message, cells[node]
