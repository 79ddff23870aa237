"""DiT: class-conditional transformers."""

from .checkpoint import read_dit
from .embeddings import position_table
from .loading import load_dit
from .model import DiTModel
from .network import PATCHES, SIZES, Conditioning, DiT
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
