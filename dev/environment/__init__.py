"""Make everything that `python dev ...` needs on a bare machine, with the standard library alone."""

from environment.archives import host_version_of
from environment.front_ends import front_end_arguments
from environment.own_comfyui import existing
from environment.places import DEV, ROOT, home
from environment.pythons import clean_env
from environment.releases import HOSTS, chosen_hosts
from environment.setup import Environment, ensure
from environment.stages import SetupError

__all__ = [
    "DEV", "HOSTS", "ROOT", "Environment", "SetupError", "chosen_hosts", "clean_env", "ensure", "existing",
    "front_end_arguments", "home", "host_version_of",
]  # fmt: skip
