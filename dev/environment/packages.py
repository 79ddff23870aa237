"""Install what ComfyUI and the developer tools need, in the versions that are known to work together."""

from __future__ import annotations

import re
from pathlib import Path

from environment.places import DEV
from environment.pythons import asks, fingerprint_of, pip

TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
# Installed without their dependencies: a part of each is used, and what the rest needs would be 400 MB.
WITHOUT_DEPENDENCIES = ("comfy-cli==1.23.0", "comfy-test==0.4.15")
REQUIREMENTS = DEV / "requirements.txt"
CONSTRAINTS = DEV / "constraints.txt"
TOOLS = (
    *("pytest", "ruff", "mypy", "playwright", "comfy_cli", "comfy_lint", "comfy_test"),
    *("typer", "pathspec", "yaml", "semver", "tomlkit", "tree_sitter_javascript", "websocket"),
)


def packages_fingerprint(host: Path) -> str:
    """Return a fingerprint of everything that is installed; comments do not count."""
    files = (host / "requirements.txt", REQUIREMENTS, CONSTRAINTS)
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    lines = re.sub(r"(^|\s)#.*", "", text, flags=re.MULTILINE).split("\n")
    return fingerprint_of(*TORCH, *WITHOUT_DEPENDENCIES, *filter(None, map(str.strip, lines)))


def install_packages(python: Path, host: Path, log: Path) -> None:
    """Install ComfyUI's own requirements and the developer tools, with torch held where it is."""
    files = ["-r", str(host / "requirements.txt"), "-r", str(REQUIREMENTS), "-c", str(CONSTRAINTS)]
    pip(python, "install", "--no-compile", *TORCH, *files, log=log)
    install_alone(python, log)


def install_alone(python: Path, log: Path) -> None:
    pip(python, "install", "--no-deps", *WITHOUT_DEPENDENCIES, log=log.with_name("comfy-cli.log"))


PROBE = f"""
import importlib.util as find
import torch, torchvision, torchaudio, numpy, PIL.Image, safetensors.torch, aiohttp, transformers
missing = [name for name in {TOOLS!r} if find.find_spec(name) is None]
assert not missing, missing
print(torch.__version__.split("+")[0])
"""


def environment_works(python: Path) -> bool:
    """Check that torch and ComfyUI's main packages really import, and that the developer tools are there."""
    return asks(python, PROBE) == TORCH[0].split("==")[1]
