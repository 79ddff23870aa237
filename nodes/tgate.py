"""The ``TGateCache`` node."""

from __future__ import annotations

from comfy_api.latest import io

from ..attention import host, tgate
from ..attention.tgate import MAX_SHARE, CacheDevice, CfgAfterGate, Mode, TGateSettings
from ._schema import advanced, node_schema


def _values(options: type[CfgAfterGate] | type[Mode] | type[CacheDevice]) -> list[str]:
    return [option.value for option in options]


class TGateCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "TGateCache",
            display_name="T-GATE Cache",
            description=(
                "Makes sampling faster with nearly the same picture: once the model has decided what goes where, the prompt's "
                "attention is reused and the negative prompt is no longer computed. Put it between the model and the sampler."
            ),
            search_aliases=["t-gate", "tgate", "faster", "speed", "speed up", "cache", "accelerate", "skip cfg"],
            inputs=[
                io.Model.Input("model", tooltip="The model to speed up."),
                io.Float.Input(
                    "gate_at",
                    default=0.4,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the steps that are computed in full before the gate. Lower is faster, higher stays closer "
                    "to the plain picture. 1 switches the node off.",
                ),
                io.Combo.Input(
                    "cfg_after_gate",
                    options=_values(CfgAfterGate),
                    default=CfgAfterGate.DROP_KEEP_POSITIVE.value,
                    tooltip="What happens to the negative prompt after the gate. Dropping it gives most of the speed. 'keep' "
                    "leaves CFG on and reuses attention only. Use 'as published' to compare with the paper.",
                ),
                io.Int.Input(
                    "sp_interval",
                    default=5,
                    min=1,
                    max=100,
                    tooltip="Before the gate, compute self-attention only every so many steps. 1 computes it always (T-GATE v1): "
                    "slower, closer to the plain picture.",
                ),
                advanced(
                    io.Int.Input(
                        "fi_interval",
                        default=1,
                        min=1,
                        max=100,
                        tooltip="After the gate, compute self-attention only every so many steps. 1 computes it always. More is "
                        "faster and loses fine detail.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "warm_up",
                        default=2,
                        min=0,
                        max=100,
                        tooltip="Steps at the start that always compute self-attention.",
                    )
                ),
                io.Combo.Input(
                    "mode",
                    options=_values(Mode),
                    default=Mode.FIXED.value,
                    tooltip="fixed: the gate opens at gate_at. auto: it opens as soon as the prompt's attention stops changing, "
                    "at the latest at gate_at.",
                ),
                advanced(
                    io.Float.Input(
                        "tolerance",
                        default=0.05,
                        min=0.0,
                        max=1.0,
                        step=0.005,
                        tooltip="auto only: how little the prompt's attention may change from one step to the next (0.05 = 5 %) "
                        "before the gate opens. Higher opens earlier.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "cache_device",
                        options=_values(CacheDevice),
                        default=CacheDevice.AUTO.value,
                        tooltip="Where stored attention is kept. auto: on the GPU, or in system memory when little VRAM is free.",
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
                        tooltip="What is reused where the negative prompt is dropped: 0.5 is the mean of both prompts' "
                        "attention, as published; 1 the positive prompt's own; above 1 goes away from the negative prompt.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "refresh_every",
                        default=0,
                        min=0,
                        max=100,
                        optional=True,
                        tooltip="After the gate, compute a step in full every so many steps; in between, guidance goes on as it "
                        "went through the last two of them. 0: never, as published. 3 stays much closer to the plain picture "
                        "and keeps half of the speed; 2 is closer still.",
                    )
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with T-GATE. The incoming model is not changed.")],
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
        )
        if gate_at == 1:
            return io.NodeOutput(host.detach(model, tgate.KEY))
        if not settings.drops_cfg and not tgate.reuses_attention(host.diffusion_model(model.model), settings):
            raise ValueError(
                f"cfg_after_gate is 'keep', but {type(model.model).__name__} has no separate cross-attention to reuse, so "
                "nothing would get faster. Choose one of the 'drop' options, or remove T-GATE Cache."
            )
        return io.NodeOutput(host.attach(model, tgate.KEY, tgate.TGate(settings)))
