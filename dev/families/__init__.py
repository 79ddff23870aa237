"""Tiny random models of every family of networks that ComfyUI knows.

``FAMILIES`` are those that the tests run one by one; ``others`` has the rest of ComfyUI's list and
``dit`` the pack's own DiT and SiT.
"""

from families.family import Conditioning, Extras, Family, randomise, sample
from families.tested import FAMILIES

__all__ = ["FAMILIES", "Conditioning", "Extras", "Family", "randomise", "sample"]
