"""Try every node of the pack on every family of models that ComfyUI knows, the command `python dev matrix`.

    python dev matrix [--only WORD] [--write] [--json FILE]

A tiny random model of each family goes through real sampling with each node, and what is said of it is measured: attention
modules that were not called, maps of the right mass, a latent that moved, a loss that fell, a model that was left as it was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from host_inprocess import ROOT, load_pack

from compatibility.tables import BUILD, Cell, Line, Outcome, Page, publish
from compatibility.trial import Log, Trial, quiet

PAGE = Page("matrix", ROOT / "docs" / "compatibility.md", "family")


# --- which families ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Families under one name. Those that answer differently get lines of their own.

    Attributes:
        families: names of the builders, ``families``.
        same: classes of ``comfy.supported_models`` that differ from the first family's in sizes only.
    """

    name: str
    families: tuple[str, ...]
    same: tuple[str, ...] = ()


ROWS = (
    Row("SD1.5", ("sd15", "sd15_edit")),
    Row("Stable Zero123", ("zero123",)),
    Row("SD2", ("sd2", "sd2_unclip", "sd_x4"), ("SD21UnclipH",)),
    Row("Lotus", ("lotus",)),
    Row("SDXL", ("sdxl", "sdxl_refiner"), ("SDXL_instructpix2pix", "SSD1B", "KOALA_700M", "KOALA_1B", "Segmind_Vega")),
    Row("SVD, SV3D", ("svd", "sv3d"), ("SV3D_p",)),
    Row("Stable Cascade", ("cascade", "cascade_b")),
    Row("SD3, SD3.5", ("sd3", "sd35_medium")),
    Row("AuraFlow", ("auraflow",)),
    Row("PixArt", ("pixart",), ("PixArtSigma",)),
    Row("HunyuanDiT", ("hunyuan_dit",), ("HunyuanDiT1",)),
    Row("Flux", ("flux", "flux_kontext", "longcat"), ("FluxInpaint", "FluxSchnell")),
    Row("Flux.2", ("flux2",)),
    Row("Chroma", ("chroma", "chroma_radiance")),
    Row("Lens", ("lens",)),
    Row("Mochi", ("mochi",)),
    Row("LTX-Video", ("ltxv", "ltxav")),
    Row("MiniMax H3", ("minimax",)),
    Row("HunyuanVideo", ("hunyuan_video", "hunyuan_video_i2v"), ("HunyuanVideoSkyreelsI2V",)),
    Row("HunyuanVideo 1.5", ("hunyuan_video15", "hunyuan_video15_sr")),
    Row("HunyuanImage 2.1", ("hunyuan_image", "hunyuan_image_refiner")),
    Row("Cosmos 1", ("cosmos1",), ("CosmosI2V",)),
    Row("Cosmos-Predict2, Anima", ("cosmos_predict2", "anima"), ("CosmosI2VPredict2",)),
    Row("Lumina 2", ("lumina2",)),
    Row("Z-Image", ("z_image", "z_image_pixel")),
    Row("PixelDiT", ("pixeldit", "pid")),
    Row("Wan 2.1, 2.2", ("wan_t2v", "wan_i2v", "wan22", "wan_flowrvs"), ("WAN21_FunControl2V",)),
    Row("Wan VACE, camera", ("wan_vace", "wan_camera"), ("WAN22_Camera",)),
    Row("Wan with sound or pose", ("wan_humo", "wan_s2v", "wan_animate", "wan_scail", "wan_dancer"), ("WAN21_SCAIL2",)),
    Row("Wan causal", ("wan_causal",)),
    Row("HiDream", ("hidream",)),
    Row("HiDream-O1", ("hidream_o1",)),
    Row("OmniGen2", ("omnigen2", "omnigen2_edit")),
    Row("Boogu", ("boogu",)),
    Row("Qwen-Image", ("qwen_image", "qwen_image_edit")),
    Row("MageFlow", ("mage_flow",)),
    Row("JoyImage", ("joyimage", "joyimage_edit")),
    Row("Ideogram 4", ("ideogram4",)),
    Row("Krea 2", ("krea2",)),
    Row("Kandinsky 5", ("kandinsky5", "kandinsky5_video")),
    Row("ERNIE-Image", ("ernie_image",)),
    Row("CogVideoX", ("cogvideox", "cogvideox_i2v"), ("CogVideoX_Inpaint",)),
    Row("SeedVR2", ("seedvr2",)),
    Row("DiT", ("dit",)),
    Row("SiT", ("sit",)),
)

# Of releases after the newest pinned one: rows, and what makes no images.
LATER_ROWS = (Row("Wan Animate 2", ("wan_animate2",)),)
LATER_LEFT_OUT = ("MiniMaxMusic3", "Trellis2")

# Of ComfyUI's list, what makes no images: sound, 3D, and networks that look at images.
LEFT_OUT = (
    "StableAudio", "StableAudio3", "ACEStep", "ACEStep15", "Hunyuan3Dv2", "Hunyuan3Dv2mini", "Hunyuan3Dv2_1", "TripoSplat",
    "RT_DETR_v4", "SAM3", "SAM31", "DepthAnything3",
)  # fmt: skip


def unknown_configs() -> list[str]:
    """Return the classes of this ComfyUI's list of models that no row of the table stands for, such as those of a new release."""
    import comfy.supported_models

    listed = [cls.__name__ for cls in comfy.supported_models.models if cls.__module__ == comfy.supported_models.__name__]
    built = {config for family in builders().values() for config in own_configs(family)}
    same = {config for row in ROWS for config in row.same}
    return sorted(set(listed) - built - same - {*LEFT_OUT, *LATER_LEFT_OUT})


def rows_of_this_release() -> tuple[Row, ...]:
    """Return the rows of the table, and those of a newer release where this ComfyUI is one."""
    known = builders()
    return (*ROWS, *(row for row in LATER_ROWS if all(family in known for family in row.families)))


def builders() -> dict[str, Any]:
    """Return everything that can be built, by name."""
    from families import FAMILIES
    from families.dit import CLASS_FAMILIES
    from families.others import MORE_FAMILIES

    return {**FAMILIES, **MORE_FAMILIES, **CLASS_FAMILIES}


def own_configs(family: Any) -> list[str]:
    """Name its class of ``comfy.supported_models``; DiT has none there."""
    return [family.config] if hasattr(family, "config") else []


# --- all of them ---------------------------------------------------------------------------------------------------------


def try_family(family: Any, log: Log) -> dict[str, Cell]:
    """Measure the cells of one family."""
    try:
        model = family.build()
        trial = Trial(family, model, log)
    except Exception as error:
        return {BUILD: Cell(Outcome.UNBUILT, message=f"{type(error).__name__}: {error}")}
    names = (type(trial.network).__name__, type(model.model).__name__)
    return {node: without_names(cell, *names) for node, cell in trial.cells().items()}


def measure(rows: Sequence[Row], told: Callable[[str], None] = lambda name: None) -> list[Line]:
    """Try every family of every row; those with the same answers share a line. ``told`` gets each name before it is tried."""
    load_pack()
    families = builders()
    lines: list[Line] = []
    with quiet() as log:
        for row in rows:
            found: dict[str, Line] = {}
            for name in row.families:
                told(name)
                family = families[name]
                cells = try_family(family, log)
                line = found.setdefault(
                    json.dumps({node: asdict(cell) for node, cell in cells.items()}), Line(row.name, [], cells)
                )
                line.configs.extend(config for config in own_configs(family) if config not in line.configs)
            next(iter(found.values())).configs.extend(row.same)
            if len(found) > 1:
                found = {key: replace(line, name=f"{row.name} ({', '.join(line.configs)})") for key, line in found.items()}
            lines.extend(found.values())
    return lines


def without_names(cell: Cell, *names: str) -> Cell:
    """Take the names out of a message, so that networks that are told the same get the same cell."""
    message = cell.message
    for name in names:
        message = re.sub(rf"\b{re.escape(name)}\b", "<model>", message)
    return replace(cell, message=message)


def main() -> None:
    publish(PAGE, rows_of_this_release, measure, __doc__ or "", unknown_rows)


def unknown_rows() -> list[str]:
    """Return what a new release asks for: a builder and a row for each class that the table does not know."""
    return [
        f"{name}: this ComfyUI has it, and the table does not. Add a builder in dev/families/ and a row in "
        "dev/compatibility/matrix.py, or name it in LEFT_OUT if it makes no images."
        for name in unknown_configs()
    ]


if __name__ == "__main__":
    main()
