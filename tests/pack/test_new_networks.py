"""A network that a new ComfyUI brings: every node says what it does not know of it, before sampling where it can do nothing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from compatibility.matrix import builders
from compatibility.tables import PLACES, WORDS, Cell, Outcome
from compatibility.trial import CFG, Trial, quiet
from families import FAMILIES, sample

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


def test_what_an_unknown_block_shows_twice_is_two_layers(node_classes: dict[str, Any]) -> None:
    family = FAMILIES["wan_t2v"]
    model = family.build()
    network = model.model.diffusion_model
    block_class = type(network.blocks[0])

    def forward(self: Any, x: Any, e: Any, freqs: Any, context: Any, **kwargs: Any) -> Any:
        return block_class.forward(self, x + self.cross_attn(x, context, **kwargs), e, freqs, context, **kwargs)

    for block in network.blocks:
        block.__class__ = type("Block", (block_class,), {"forward": forward})
    network.__class__ = of_a_new_release(type(network))
    seen, maps = node_classes["AttnMapCapture"].execute(model).args
    with quiet():
        sample(family, seen, steps=2)
    layers = maps.of().layers
    assert sorted(layers) == ["block.0", "block.0.1", "block.1", "block.1.1"]
    for layer in layers.values():  # of two steps
        torch.testing.assert_close(layer.maps.float().sum(2) / 2, torch.ones_like(layer.maps.float().sum(2)), atol=2e-3, rtol=0)


def with_a_guide(network: Any) -> None:
    """Let a Wan's blocks attend to the text for the tokens of a pose video first, as those of WAN Animate 2 do."""
    from fovea_attention.attention.networks.blocks import BlockLayout
    from fovea_attention.attention.networks.table import NetworkLayout

    block_class, network_class = type(network.blocks[0]), type(network)

    def forward(self: Any, x: Any, e: Any, freqs: Any, context: Any, **kwargs: Any) -> Any:
        self.cross_attn(-x[:, :48], context, **kwargs)  # of 96
        return block_class.forward(self, x, e, freqs, context, **kwargs)

    layout = BlockLayout((), ("cross_attn",), "o", guided=True)
    members = {"forward": forward, "block_layout": layout, "__module__": block_class.__module__}
    for block in network.blocks:
        block.__class__ = type("Block", (block_class,), members)
    known = NetworkLayout("Wan", (("blocks", "block"),), guided=True, no_gradient="writes keys in place")
    network.__class__ = type("Network", (network_class,), {"network_layout": known, "__module__": network_class.__module__})


@pytest.mark.parametrize(
    ("sampler", "settings"), [("euler", {}), ("euler", {"cfg_after_gate": "keep"}), ("heun", {"mode": "auto"})], ids=str
)
def test_what_a_network_computes_for_a_guide_is_neither_reused_nor_recorded(
    node_classes: dict[str, Any], settings: dict[str, Any], sampler: str
) -> None:
    family, found = FAMILIES["wan_t2v"], []
    for guided in (False, True):
        model = family.build()
        if guided:
            with_a_guide(model.model.diffusion_model)
        calls: list[int] = []
        cross = model.model.diffusion_model.blocks[0].cross_attn.o
        cross.register_forward_hook(lambda module, inputs, output, calls=calls: calls.append(output.shape[1]))
        gated = node_classes["TGateCache"].execute(model, gate_at=0.5, **settings)[0]
        seen, maps = node_classes["AttnMapCapture"].execute(gated).args
        with quiet() as log:
            image = sample(family, seen, steps=4, sampler=sampler)
            said = next(line for line in log.lines if line.startswith("T-GATE"))
        found.append((image, said, maps.of().layers, maps.notes, calls.count(96), calls.count(48)))
    (plain, line, layers, notes, own, none), (image, other_line, other_layers, other_notes, other_own, guide) = found
    assert torch.equal(image, plain) and other_line == line and "reused in 2 of 4" in line
    assert other_notes == notes and other_layers.keys() == layers.keys()
    assert all(torch.equal(other_layers[name].maps, layer.maps) for name, layer in layers.items())
    assert other_own == own and none == 0 and guide > own  # the guide's own are computed in every step


def test_a_network_with_a_guide_says_what_it_cannot_do(pack: Any) -> None:
    family = FAMILIES["wan_t2v"]
    model = family.build()
    with_a_guide(model.model.diffusion_model)
    with quiet() as log:
        cells = Trial(family, model, log).cells()
    assert cells["T-GATE Cache"] == Cell(Outcome.WORKS) and cells[WORDS] == Cell(Outcome.WORKS)
    for node, reason in (
        (PLACES, "Self-attention cannot be recorded: Network computes it together with that of its pose video"),
        ("Attend-and-Excite", "this model writes keys in place, so no gradient can be taken through it"),
        ("Attention Distillation", "does not know where Network attends to the image"),
    ):
        assert cells[node].outcome is Outcome.REFUSED and reason in cells[node].message, cells[node]


@pytest.mark.parametrize("name", ["sd15", "minimax"])
def test_a_gradient_is_taken_where_a_masked_run_looks(node_classes: dict[str, Any], name: str) -> None:
    """Newer releases blend the known image of some models in a way of its own, for which they need the mask."""
    if name not in builders():
        pytest.skip("this ComfyUI does not know the model")

    class Masked(Trial):
        noise_mask = torch.ones(1, 1, 2, 8, 6) if name == "minimax" else torch.ones(1, 1, 16, 12)
        noise_mask[..., :3, :], noise_mask[..., 5:, 4:] = 0, 0.3  # not along the model's patches

    family, seen = builders()[name], []
    with quiet() as log:
        trial = Masked(family, family.build(), log)

        def look(module: Any, inputs: Any) -> None:
            seen.append((inputs[0] if torch.is_tensor(inputs[0]) else inputs[0][0])[:1].detach().clone())

        with trial.network.register_forward_pre_hook(look):
            trial.sampled()
            first, count = seen[0], len(seen)
            settings = {"thresholds": "", "guide_until": 1 / 3, "attention_grid": 4}
            guider = node_classes["AttendExciteGuider"].execute(trial.model, trial.positive, trial.negative, CFG, **settings)[0]
            trial.sampled(guider)
    assert torch.allclose(seen[count], first, atol=1e-6) and not torch.allclose(seen[count + 1], first, atol=1e-6)


def test_t_gate_denies_cross_attention_only_where_the_network_is_known(node_classes: dict[str, Any]) -> None:
    family, said = FAMILIES["flux"], []
    for known in (True, False):
        model = family.build()
        network = model.model.diffusion_model
        network.__class__ = type(network) if known else of_a_new_release(type(network))
        with quiet() as log:
            sample(family, node_classes["TGateCache"].execute(model, gate_at=0.5)[0])
            said.append(log.lines[-1])
    assert "Flux has no separate cross-attention, so only" in said[0]
    assert "Flux has no separate cross-attention that T-GATE knows, so only" in said[1]
