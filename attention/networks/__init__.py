"""What attention calls a network has: its blocks, layers, token order and grids. Torch only."""

from .blocks import AttentionSite, attention_sites
from .grids import Grid, layer_grid, token_grid
from .layer_names import list_layers, parse_layers
from .layers import AttentionLayer, attention_layers, check_differentiable, checkpoint_blocks
from .table import NetworkLayout, network_layout, unknown_network_message

__all__ = [
    "AttentionSite",
    "AttentionLayer",
    "Grid",
    "NetworkLayout",
    "attention_sites",
    "attention_layers",
    "check_differentiable",
    "checkpoint_blocks",
    "layer_grid",
    "list_layers",
    "network_layout",
    "parse_layers",
    "token_grid",
    "unknown_network_message",
]
