"""The ``TGateCache`` node."""

from __future__ import annotations

from comfy_api.latest import io

from ..attention import host, tgate
from ..attention.tgate import CacheDevice, CfgAfterGate, GateOn, Mode, Schedule, TGateSettings
from ..attention.tgate.settings import MAX_SHARE
from ._schema import advanced, node_schema


def _values(options: type[CfgAfterGate] | type[Mode] | type[CacheDevice] | type[GateOn] | type[Schedule]) -> list[str]:
    return [option.value for option in options]


class TGateCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "TGateCache",
            display_name="T-GATE Cache",
            description=(
                "Makes sampling faster and keeps nearly the same image: once the composition is settled, steps are skipped where "
                "their result can be predicted from the steps before. 'as published' instead reuses attention to the prompt and "
                "no longer computes the negative prompt. Place it between the model and the sampler."
            ),
            not_idempotent=True,  # its text is its own, from the cache too
            search_aliases=["t-gate", "tgate", "faster", "speed", "speed up", "cache", "accelerate", "skip cfg"],
            inputs=[
                io.Model.Input("model", tooltip="The model to speed up."),
                io.Float.Input(
                    "gate_at",
                    default=0.4,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Fraction of the steps before the gate, which are computed in full. Lower is faster; higher stays "
                    "closer to the image without T-GATE. 1 turns the node off.",
                ),
                advanced(
                    io.Combo.Input(
                        "cfg_after_gate",
                        options=_values(CfgAfterGate),
                        default=CfgAfterGate.DROP_KEEP_POSITIVE.value,
                        tooltip="What happens to the negative prompt after the gate. Dropping it gives most of the speed-up. "
                        "'keep' leaves CFG on and only reuses attention. Use 'as published' to compare with the paper.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "sp_interval",
                        default=5,
                        min=1,
                        max=100,
                        tooltip="Before the gate, self-attention is computed only every N steps. Higher is slightly faster; 1 "
                        "computes it in every step (T-GATE v1) and stays closer to the image without T-GATE.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "fi_interval",
                        default=1,
                        min=1,
                        max=100,
                        tooltip="After the gate, self-attention is computed only every N steps. Higher is faster and loses "
                        "fine detail; 1 computes it in every step.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "warm_up",
                        default=2,
                        min=0,
                        max=100,
                        tooltip="Number of steps at the start in which self-attention is always computed.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "mode",
                        options=_values(Mode),
                        default=Mode.FIXED.value,
                        tooltip="fixed: the gate opens at gate_at. auto: it opens as soon as attention to the prompt stops "
                        "changing, and at gate_at at the latest.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "tolerance",
                        default=0.05,
                        min=0.0,
                        max=1.0,
                        step=0.005,
                        tooltip="auto only: the gate opens when attention to the prompt changes by less than this from one "
                        "step to the next (0.05 = 5 %). Higher opens it earlier.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "cache_device",
                        options=_values(CacheDevice),
                        default=CacheDevice.AUTO.value,
                        tooltip="Where the cached attention is stored. auto: on the GPU, or in system memory when VRAM is low.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "positive_share",
                        default=0.5,
                        min=0.0,
                        max=MAX_SHARE,
                        step=0.05,
                        optional=True,
                        tooltip="Which attention is reused when the negative prompt is dropped: 0.5 is the mean of both "
                        "prompts, as published; 1 is the positive prompt alone; above 1 moves away from the negative prompt.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "refresh_every",
                        default=0,
                        min=0,
                        max=100,
                        optional=True,
                        tooltip="After the gate, every Nth step is computed in full; in between, guidance is extrapolated from "
                        "the last two of them. 0: never, as published. 3 stays much closer to the image without T-GATE and "
                        "keeps half of the speed-up; 2 is closer still.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "gate_on",
                        options=_values(GateOn),
                        default=GateOn.STEPS.value,
                        optional=True,
                        tooltip="What gate_at and full_at_end are fractions of. 'whole noise schedule' opens the gate at the "
                        "same noise level in every run, also where a run has only a part of the steps (KSampler Advanced, "
                        "SplitSigmas, low denoise).",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "full_at_end",
                        default=0.0,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        optional=True,
                        tooltip="Fraction of the steps at the end that is computed in full again. Higher brings back the "
                        "guidance of the last steps and is slower.",
                    )
                ),
                io.Combo.Input(
                    "schedule",
                    options=_values(Schedule),
                    default=Schedule.SKIP.value,
                    optional=True,
                    tooltip="What happens after the gate. 'skip steps' is closest to the image without T-GATE: a step whose "
                    "expected error is at most max_error is predicted from the last ones computed in full; only gate_at, "
                    "gate_on, full_at_end and max_error have an effect. 'as published' is T-GATE, with all inputs but max_error.",
                ),
                io.Float.Input(
                    "max_error",
                    default=0.03,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    optional=True,
                    tooltip="'skip steps' only: the largest error that a skipped step may add to the image, expected from "
                    "the last steps (0.03 = 3 %). Higher skips more steps.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with T-GATE. The input model is not changed.")],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        gate_at: float = 0.4,
        cfg_after_gate: str = CfgAfterGate.DROP_KEEP_POSITIVE.value,
        sp_interval: int = 5,
        fi_interval: int = 1,
        warm_up: int = 2,
        mode: str = Mode.FIXED.value,
        tolerance: float = 0.05,
        cache_device: str = CacheDevice.AUTO.value,
        positive_share: float = 0.5,
        refresh_every: int = 0,
        gate_on: str = GateOn.STEPS.value,
        full_at_end: float = 0.0,
        schedule: str = Schedule.PUBLISHED.value,  # a graph saved without this input keeps its image
        max_error: float = 0.03,
    ) -> io.NodeOutput:
        settings = TGateSettings(
            gate_at=gate_at,
            cfg_after_gate=CfgAfterGate(cfg_after_gate),
            sp_interval=sp_interval,
            fi_interval=fi_interval,
            warm_up=warm_up,
            mode=Mode(mode),
            tolerance=tolerance,
            cache_device=CacheDevice(cache_device),
            positive_share=positive_share,
            refresh_every=refresh_every,
            gate_on=GateOn(gate_on),
            full_at_end=full_at_end,
            schedule=Schedule(schedule),
            max_error=max_error,
        )
        if gate_at == 1:
            host.NodeText().tell("T-GATE: off, because gate_at is 1")
            return io.NodeOutput(host.detach(model, tgate.KEY))
        if settings.schedule is Schedule.SKIP:
            return io.NodeOutput(host.attach(model, tgate.KEY, tgate.StepSkipping(settings)))
        if not settings.drops_cfg and not tgate.reuses_attention(host.diffusion_model(model.model), settings):
            raise ValueError(
                f"cfg_after_gate is 'keep', but {type(model.model).__name__} has no separate cross-attention to reuse, so "
                "nothing would get faster. Choose one of the 'drop' options, or remove T-GATE Cache."
            )
        return io.NodeOutput(host.attach(model, tgate.KEY, tgate.TGate(settings)))
