"""DiT: class-conditional transformers."""

from .checkpoint import read_dit
from .loading import load_dit
from .model import DiTModel
from .network import PATCHES, SIZES, Conditioning, DiT, position_table
from .sampler import dit_sampler

__all__ = [
    "Conditioning",
    "DiT",
    "DiTModel",
    "PATCHES",
    "SIZES",
    "dit_sampler",
    "load_dit",
    "position_table",
    "read_dit",
]
