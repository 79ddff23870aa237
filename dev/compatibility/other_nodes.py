"""Try every node of the pack in a graph with one of ComfyUI's own nodes, the command `python dev beside`.

    python dev beside [--only WORD] [--write] [--json FILE]

ComfyUI's own nodes patch, guide, cache or prompt a tiny random model, which then goes through real sampling with each node of
the pack, and is judged as in ``trial``. The table is in docs/other-nodes.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from host_inprocess import ROOT, host_node, load_pack

from compatibility.tables import COLUMNS, WORKS, Cell, Line, Outcome, Page, publish
from compatibility.trial import CFG, Log, Trial, quiet

PAGE = Page("beside", ROOT / "docs" / "other-nodes.md", "node")

Patch = Callable[[Any], Any]
MAKES_GUIDERS = Cell(
    Outcome.REFUSED, message="Both nodes make the guider of the run. Use Attend-and-Excite (Model) with this one."
)


def node(module: str, name: str) -> Callable[..., Any]:
    """Return a function for the first output of a node of ``comfy_extras`` (or of ``nodes``), by its class's name."""
    run = host_node(name, f"comfy_extras.nodes_{module}" if module else "nodes")
    return lambda *values, **named: run(*values, **named)[0]


@dataclass(frozen=True)
class OtherNode:
    """Another node, and how it enters the graph.

    Attributes:
        module: of ``comfy_extras`` that has it; a release without it is not asked.
        model: what it makes of a model.
        prompt: what it makes of the positive prompt (given the encodings of two).
        guider: the guider it makes of a model and three prompts.
        family: on which it is tried.
        steady: every step asks the model as often as the last.
        masked: only a part of the latent is sampled.
    """

    name: str
    module: str = ""
    model: Patch = lambda model: model
    prompt: Callable[[Any, Any], Any] = lambda first, second: first
    guider: Callable[[Any, Any, Any, Any], Any] | None = None
    family: str = "sd15"
    steady: bool = True
    masked: bool = False

    def known(self) -> bool:
        """Return whether this ComfyUI has it."""
        return not self.module or find_spec(f"comfy_extras.nodes_{self.module}") is not None


# --- the nodes -----------------------------------------------------------------------------------------------------------


def _lora(model: Any) -> Any:
    """Patch attention weights, as LoraLoader does."""
    patched, generator = model.clone(), torch.Generator().manual_seed(5)
    patches = {}
    for name, weight in model.model.named_parameters():
        if name.endswith(("to_q.weight", "to_v.weight")):
            patches[name] = ("diff", (torch.randn(weight.shape, generator=generator) * 0.02,))
    patched.add_patches(patches, 1.0)
    return patched


def _merged(model: Any) -> Any:
    from families import FAMILIES

    return node("model_merging", "ModelMergeSimple")(model, FAMILIES["sd15"].build(seed=4), 0.7)


def _halves(first: Any, second: Any) -> Any:
    """Combine ConditioningSetMask on both halves."""
    mask = torch.zeros(1, 16, 12)
    mask[:, :, :6] = 1
    (left,), (right,) = (
        node("", "ConditioningSetMask")(cond, half, "default", 1.0) for cond, half in ((first, mask), (second, 1 - mask))
    )
    return [left, right]


def _areas(first: Any, second: Any) -> Any:
    (left,) = node("", "ConditioningSetArea")(first, 48, 128, 0, 0, 1.0)
    (right,) = node("", "ConditioningSetArea")(second, 48, 128, 48, 0, 1.0)
    return [left, right]


def _in_turn(first: Any, second: Any) -> Any:
    """Use one prompt for the first steps and another for the rest, with ConditioningSetTimestepRange."""
    ranges = ((first, 0.0, 0.3), (second, 0.3, 1.0))
    return [cond for prompt, start, end in ranges for cond in node("", "ConditioningSetTimestepRange")(prompt, start, end)]


def _controlled(first: Any, second: Any) -> Any:
    """Apply a tiny random control network to the positive prompt, as ControlNetApply does."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops
    from families import FAMILIES, randomise

    unused = ("out_channels", "transformer_depth_output")
    config = {key: value for key, value in FAMILIES["sd15"].unet.items() if key not in unused} | {"num_heads": 8}
    network = comfy.cldm.cldm.ControlNet(hint_channels=3, dtype=torch.float32, operations=comfy.ops.disable_weight_init, **config)
    randomise(network, 8)
    control = comfy.controlnet.ControlNet(network.eval(), load_device=torch.device("cpu"), manual_cast_dtype=None)
    hint = torch.rand(1, 128, 96, 3, generator=torch.Generator().manual_seed(6))
    return node("", "ControlNetApply")(first, control, hint, 0.7)


def _hooked(first: Any, second: Any) -> Any:
    """Hook a LoRA to the positive prompt only (CreateHookModelAsLora and its kin)."""
    import comfy.hooks

    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(7)) * 0.02
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=0.0)
    hook.weights, hook.need_weight_init = {name: ("diff", (weight,))}, False
    group = comfy.hooks.HookGroup()
    group.add(hook)
    return [[tensor, {**options, "hooks": group}] for tensor, options in first]


def _windows(model: Any) -> Any:
    import inspect

    cls = import_module("comfy_extras.nodes_context_windows").ContextWindowsManualNode
    values = {
        "context_length": 1, "context_overlap": 0, "context_schedule": "standard_static", "context_stride": 1,
        "closed_loop": False, "fuse_method": "pyramid", "dim": 2, "freenoise": False,
    }  # fmt: skip
    known = inspect.signature(cls.execute).parameters
    return cls.execute(model, **{name: value for name, value in values.items() if name in known})[0]


def _compiled(model: Any) -> Any:
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    patched = model.clone()
    set_torch_compile_wrapper(patched, backend="eager")
    return patched


def _split(model: Any) -> Any:
    """Split as MultiGPU CFG Split does, with a clone on the CPU in place of a second GPU; each runs in a thread of its own."""
    from families import FAMILIES

    model.cached_patcher_init = (FAMILIES["sd15"].build, ())
    clone = model.deepclone_multigpu(new_load_device=torch.device("cpu", 0))
    clone.is_multigpu_base_clone = True
    patched = model.clone()
    patched.set_additional_models("multigpu", [clone])
    patched.match_multigpu_clones()
    return patched


def _dual(model: Any, positive: Any, negative: Any, empty: Any) -> Any:
    return node("custom_sampler", "DualCFGGuider")(model, positive, empty, negative, CFG, CFG, "regular")


def _patching(name: str, module: str, cls: str, *values: Any, **graph: Any) -> OtherNode:
    """Make an entry for a node that takes a model and settings and returns a model."""
    return OtherNode(name, module, lambda model: node(module, cls)(model, *values), **graph)


OTHER_NODES = (
    OtherNode("Load LoRA", model=_lora),
    OtherNode("Model Merge", "model_merging", _merged),
    OtherNode("ControlNet", prompt=_controlled),
    OtherNode("Combine, masks", prompt=_halves),
    OtherNode("Combine, areas", prompt=_areas),
    OtherNode("Combine, timestep ranges", prompt=_in_turn),
    OtherNode("LoRA hooks on a prompt", "hooks", prompt=_hooked),
    OtherNode("Set Latent Noise Mask", masked=True),
    _patching("Differential Diffusion", "differential_diffusion", "DifferentialDiffusion", masked=True),
    _patching("RescaleCFG", "model_advanced", "RescaleCFG", 0.7),
    _patching("CFG-Zero*", "cfg", "CFGZeroStar"),
    _patching("CFG Norm", "cfg", "CFGNorm", 1.0),
    _patching("APG", "apg", "APG", 1.0, 5.0, 0.0),
    _patching("Mahiro", "mahiro", "Mahiro"),
    _patching("TCFG", "tcfg", "TCFG"),
    _patching("Perturbed-Attention Guidance", "pag", "PerturbedAttentionGuidance", 3.0),
    _patching("Self-Attention Guidance", "sag", "SelfAttentionGuidance", 0.5, 2.0),
    _patching("Normalized Attention Guidance", "nag", "NAGuidance", 3.0, 0.5, 2.5),
    _patching("Skip Layer Guidance", "slg", "SkipLayerGuidanceDiT", 3.0, 0.0, 1.0, "0", "", family="sd3"),
    OtherNode("DualCFGGuider", "custom_sampler", guider=_dual),
    OtherNode("PerpNegGuider", "perpneg", guider=lambda model, positive, negative, empty: node("perpneg", "PerpNegGuider")(
        model, positive, negative, empty, CFG, 1.0
    )),
    OtherNode("BasicGuider", "custom_sampler", guider=lambda model, positive, negative, empty: node(
        "custom_sampler", "BasicGuider"
    )(model, positive)),
    _patching("FreeU", "freelunch", "FreeU_V2", 1.1, 1.2, 0.9, 0.4),
    _patching("Token Merging", "tomesd", "TomePatchModel", 0.5),
    _patching("HyperTile", "hypertile", "HyperTile", 64, 2, 0, False),
    _patching("Kohya Deep Shrink", "model_downscale", "PatchModelAddDownscale", 3, 2.0, 0.0, 0.35, True, "bicubic", "bicubic"),
    _patching("EasyCache", "easycache", "EasyCacheNode", 0.2, 0.15, 0.95, False, steady=False),
    _patching("LazyCache", "easycache", "LazyCacheNode", 0.2, 0.15, 0.95, False, steady=False),
    OtherNode("Context Windows", "context_windows", _windows, family="wan_t2v"),
    OtherNode("MultiGPU CFG Split", "multigpu", _split),
    OtherNode("Torch Compile", "torch_compile", _compiled),
)  # fmt: skip

SLOW = OTHER_NODES[-1:]  # a minute; the tests have one of their own for it


# --- the table -----------------------------------------------------------------------------------------------------------


class TrialBeside(Trial):
    """A graph that has the other node in it already when the pack's nodes come."""

    def __init__(self, family: Any, model: Any, log: Log, other: OtherNode) -> None:
        self.other, self.steady = other, other.steady
        if other.masked:
            self.noise_mask = torch.linspace(0, 1, family.size[1]).expand(1, 1, *family.size)
        super().__init__(family, other.model(model), log)

    def prompts(self) -> tuple[Any, Any, Any]:
        positive, negative, null = super().prompts()
        return self.other.prompt(positive, self.family.conds(5)), negative, null

    def guider(self, model: Any) -> Any:
        if self.other.guider is None:
            return super().guider(model)
        return self.other.guider(model, self.positive, self.negative, self.null)

    def excite(self) -> Cell:
        return super().excite() if self.other.guider is None else MAKES_GUIDERS

    def t_gate_cell(self, done: list[str], said: str) -> Cell:
        notes = said.partition("; ")[2]
        if "cross-attention reused" in done and ("negative prompt skipped" in done or 1 not in self.asked) and not notes:
            return WORKS
        if "switched off" in said:
            return Cell(Outcome.REFUSED, message=said)
        return Cell(Outcome.PART, ", ".join(done), notes) if done and notes else super().t_gate_cell(done, said)


def measure(others: Sequence[OtherNode], told: Callable[[str], None] = lambda name: None) -> list[Line]:
    """Measure one line for each node that this ComfyUI has."""
    from families import FAMILIES

    load_pack()
    lines = []
    with quiet() as log:
        for other in others:
            if not other.known():
                continue
            told(other.name)
            family = FAMILIES[other.family]
            torch.manual_seed(0)  # ToMe and HyperTile draw from the global generator
            cells = TrialBeside(family, family.build(), log, other).cells()
            lines.append(Line(other.name, [], {name: cells[name] for name in COLUMNS}))
    return lines


def main() -> None:
    publish(PAGE, lambda: OTHER_NODES, measure, __doc__ or "")


if __name__ == "__main__":
    main()
