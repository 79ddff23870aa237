"""Which classes the tables of networks speak for: the exact class, and subclasses that leave its computation alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from families.dit import tiny

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def networks(pack: Any) -> Any:
    from fovea_attention.attention import networks

    return networks


@pytest.fixture(scope="module", params=["sd15", "wan_t2v", "flux", "pixart"])
def network(request: pytest.FixtureRequest) -> torch.nn.Module:
    return FAMILIES[request.param].build().model.diffusion_model


def as_subclass(network: torch.nn.Module, **members: Any) -> torch.nn.Module:
    """Return the same network, its class replaced by a subclass with these members."""
    other = network.__class__.__new__(network.__class__)
    other.__dict__ = dict(network.__dict__)
    other.__class__ = type("Another", (type(network),), {"__module__": "another_pack.network", **members})
    return other


def test_a_subclass_that_only_builds_differently_is_its_parent(networks: Any, network: torch.nn.Module) -> None:
    layout = networks.network_layout(network)
    assert layout is not None
    assert networks.network_layout(as_subclass(network)) is layout
    assert networks.network_layout(as_subclass(network, __init__=lambda self: None, extra=lambda self: 1)) is layout


def test_a_subclass_with_a_method_of_its_own_in_place_of_the_parents_is_unknown(networks: Any, network: torch.nn.Module) -> None:
    changed = as_subclass(network, forward=lambda self, x, *args, **kwargs: x)
    assert networks.network_layout(changed) is None
    assert "Another is not in Fovea's table" in networks.unknown_network_message(changed)
    assert all(layer.kind == "unknown" for layer in networks.attention_layers(changed))


def test_blocks_of_another_pack_make_a_network_unknown(networks: Any) -> None:
    network = FAMILIES["flux"].build().model.diffusion_model
    block = network.double_blocks[0]
    block.__class__ = type("Block", (type(block),), {"__module__": "another_pack.blocks"})
    assert networks.network_layout(network) is None


def test_a_block_with_a_forward_of_its_own_has_no_sites(networks: Any) -> None:
    network = FAMILIES["sd15"].build().model.diffusion_model
    sites = networks.attention_sites(network)
    blocks = [module for module in network.modules() if type(module).__name__ == "BasicTransformerBlock"]
    blocks[0].__class__ = type("Block", (type(blocks[0]),), {"forward": lambda self, x, **kwargs: x})
    assert len(networks.attention_sites(network)) == len(sites) - 2


def test_the_packs_own_network_carries_its_layout(networks: Any) -> None:
    network = tiny()
    assert networks.network_layout(network).family == "DiT"
    assert networks.network_layout(as_subclass(network, forward=lambda self, x: x)).family == "DiT"
    assert [site.kind for site in networks.attention_sites(network)] == ["self"] * len(network.blocks)
