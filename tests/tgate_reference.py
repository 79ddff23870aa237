"""T-GATE restated without skipping anything: the whole model always runs, and outputs are overwritten.

It shares no code with the pack. Attention is replaced through ComfyUI's output patches and guidance through its cfg
function, so that it says what the image must be, slowly, in any graph that leaves those hooks free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher


@dataclass
class Reference:
    gate: int
    sp: int = 1
    fi: int = 1
    warm_up: int = 2
    drop: bool = True
    share: float = 0.5  # of the positive prompt in that
    mean: bool = True  # one positive and one negative prompt: their mean is what is stored, at the gate and for intervals before
    refresh: int = 0  # every so many steps from the gate on are computed in full; guidance goes on in between

    stored: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)
    kinds: dict[Any, int] = field(default_factory=dict)  # cond uuid -> 0 positive, 1 negative
    full: list[tuple[int, float, torch.Tensor]] = field(default_factory=list)  # the last two: step, sigma, guidance

    def apply(self, model: ModelPatcher) -> ModelPatcher:
        patched = model.clone()
        patched.set_model_attn1_output_patch(lambda out, extra: self._attention(out, extra, "self"))
        patched.set_model_attn2_output_patch(lambda out, extra: self._attention(out, extra, "cross"))
        if self.drop:
            patched.set_model_sampler_cfg_function(self._guidance)
        return patched

    def _step(self, sigma: torch.Tensor, sigmas: torch.Tensor) -> int:
        return max(int((sigmas[:-1] * 1.0001 >= sigma.max()).sum()) - 1, 0)

    def _is_full(self, step: int) -> bool:
        return step < self.gate or bool(self.refresh) and (step - self.gate) % self.refresh == self.refresh - 1

    def _guidance(self, args: dict[str, Any]) -> torch.Tensor:
        """The cfg function: what it is given and returns is x minus a prediction, which is sigma times the noise's."""
        step = self._step(args["sigma"], args["model_options"]["transformer_options"]["sample_sigmas"])
        sigma = args["sigma"].view(-1, *(1,) * (args["cond"].ndim - 1))
        if self._is_full(step):
            self._note_full(step, float(sigma.max()), (args["cond"] - args["uncond"]) / sigma)
            return args["uncond"] + (args["cond"] - args["uncond"]) * args["cond_scale"]
        return args["cond"] + (args["cond_scale"] - 1) * self._line(float(sigma.max())) * sigma if self.refresh else args["cond"]

    def _note_full(self, step: int, sigma: float, difference: torch.Tensor) -> None:
        """Of a step's evaluations the last one counts; the line begins anew where the noise level went up.

        A step that reuses self-attention is no point of the line.
        """
        if step < self.gate - 1 and step > self.warm_up and step % self.sp:
            return
        earlier = [point for point in self.full if point[0] != step][-1:]
        self.full = [point for point in earlier if point[1] > sigma] + [(step, sigma, difference)]

    def _line(self, sigma: float) -> torch.Tensor:
        """Guidance over log(sigma) through the two points, at most as far beyond them as they are apart."""
        _, last, now = self.full[-1]
        if len(self.full) == 1:
            return now
        _, first, before = self.full[0]
        beyond = math.log(last / max(sigma, last**2 / first)) / math.log(first / last)
        return now + max(beyond, 0) * (now - before)

    def _attention(self, out: torch.Tensor, extra: dict[str, Any], kind: str) -> torch.Tensor:
        step = self._step(extra["sigmas"], extra["sample_sigmas"])
        self.kinds.update(zip(extra["uuids"], extra["cond_or_uncond"], strict=True))
        place = (kind, *extra["block"], extra["block_index"])
        chunks = out.chunk(len(extra["uuids"]))
        return torch.cat([self._one(place, uuid, chunk, step) for uuid, chunk in zip(extra["uuids"], chunks, strict=True)])

    def _one(self, place: tuple[Any, ...], uuid: Any, out: torch.Tensor, step: int) -> torch.Tensor:
        kind = place[0]
        if step < self.gate - 1:
            reuse = kind == "self" and step > self.warm_up and step % self.sp != 0
        elif step == self.gate - 1 or self._is_full(step):
            reuse = False
        else:
            reuse = kind == "cross" or step % self.fi != 0
        if reuse and (place, uuid) in self.stored:
            gated = step >= self.gate and (kind == "cross" or (place, uuid, "refreshed") not in self.stored)
            averaged = step < self.gate and not self.refresh
            if (gated or averaged) and self.mean and self.drop and len(self.kinds) == 2:
                share = 0.5 if step < self.gate else 1.0 if self.refresh else self.share
                shares = {one: 1 - share if kind else share for one, kind in self.kinds.items()}
                return sum(self.stored[place, one] * share for one, share in shares.items())
            return self.stored[place, uuid]
        self.stored[place, uuid] = out.clone()
        self.stored.pop((place, uuid, "refreshed"), None)
        if step >= self.gate and not self._is_full(step):
            self.stored[place, uuid, "refreshed"] = out
        return out


def relative_difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over largest value."""
    return float((result - expected).abs().max() / expected.abs().max())


def assert_same_image(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to float32 rounding: a batch of one and a batch of two are summed in another order, over all steps."""
    assert torch.isfinite(result).all()
    assert relative_difference(result, expected) < 2e-5


class ModuleReference(Reference):
    """The same for any network: attention modules are called, and hooks overwrite what they return.

    ``modules`` maps attribute names to "self" or "cross".
    """

    def apply_to(self, model: ModelPatcher, modules: dict[str, str]) -> ModelPatcher:
        patched = model.clone()
        patched.add_wrapper_with_key("apply_model", "tgate reference", self._note_call)
        patched.set_model_sampler_post_cfg_function(self._guided)
        self.handles = []
        for name, module in model.model.diffusion_model.named_modules():
            kind = modules.get(name.rsplit(".", 1)[-1])
            if kind is not None:
                self.handles.append(module.register_forward_hook(self._hook(kind, name)))
        return patched

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _guided(self, args: dict[str, Any]) -> torch.Tensor:
        """On the prediction itself: a cfg function works on x minus it, and subtracting twice costs digits at large sigma."""
        step = self._step(args["sigma"], args["model_options"]["transformer_options"]["sample_sigmas"])
        sigma = args["sigma"].view(-1, *(1,) * (args["denoised"].ndim - 1))
        if self._is_full(step):
            self._note_full(step, float(sigma.max()), (args["cond_denoised"] - args["uncond_denoised"]) / sigma)
            return args["denoised"]
        change = (args["cond_scale"] - 1) * self._line(float(sigma.max())) * sigma if self.refresh else 0
        return args["cond_denoised"] + change

    def _note_call(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        self.extra = args[5]
        return executor(*args, **kwargs)

    def _hook(self, kind: str, name: str) -> Any:
        def overwrite(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
            tensor = output[0] if isinstance(output, tuple) else output
            tensor = self._attention(tensor, {**self.extra, "block": (name,), "block_index": 0}, kind)
            return (tensor,) if isinstance(output, tuple) else tensor

        return overwrite
