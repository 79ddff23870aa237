"""Optimise all parts: AdamW whose learning rate follows the samples, with averaged weights, and a state to go on from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emoji.state import Moments, PartState

BETAS = (0.9, 0.99)
EMA_DECAY = 0.999


@dataclass(frozen=True)
class Plan:
    """Say how a part is trained. The learning rate depends on samples alone, so it does not matter in how many pieces."""

    samples: int  # of the whole training
    batch: int
    lr: float  # at its highest
    warm_up: int = 250  # steps
    settling: float = 0.3  # last share of the samples, in which the learning rate falls to nothing
    weight_decay: float = 0.01
    clip: float = 1.0  # norm of the gradient
    averaged: bool = False  # whether averages of the weights are what is shipped

    def rate(self, steps: int, samples: int) -> float:
        """Return the learning rate of the step after ``steps``."""
        left = (1 - samples / self.samples) / self.settling
        return self.lr * min(1.0, (steps + 1) / self.warm_up) * (0.5 - 0.5 * math.cos(math.pi * min(1.0, max(0.0, left))))


class Optimiser:
    """Step over a network's parameters. A step whose gradient is not finite is left out, without waiting for the device."""

    def __init__(self, network: nn.Module, plan: Plan, state: PartState | None) -> None:
        self.network, self.plan = network, plan
        self.everything = list(network.parameters())
        self.parameters = [parameter for parameter in self.everything if parameter.requires_grad]
        self.steps, self.samples = (state.steps, state.samples) if state else (0, 0)
        self.adamw = torch.optim.AdamW(self.parameters, lr=plan.lr, betas=BETAS, weight_decay=plan.weight_decay, fused=True)
        device = self.everything[0].device
        if state and state.moments:
            self._resume(state.moments, state.steps)
        self.average: list[Tensor] | None = None
        if plan.averaged:
            start = state.average if state and state.average else self.everything
            self.average = [value.detach().float().clone().to(device) for value in start]
        self.left_out = torch.zeros((), device=device)  # steps since the last report

    @torch.no_grad()
    def _resume(self, moments: Moments, steps: int) -> None:
        for parameter, momentum, variance in zip(self.everything, moments.momentum, moments.variance, strict=True):
            if parameter.requires_grad:
                self.adamw.state[parameter] = {
                    "step": torch.tensor(float(steps), device=parameter.device),
                    "exp_avg": torch.empty_like(parameter).copy_(momentum),
                    "exp_avg_sq": torch.empty_like(parameter).copy_(variance),
                }

    def step(self, samples: int) -> None:
        """Take a step along the gradients of ``samples`` samples."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.plan.clip)
        refused = (~torch.isfinite(norm)).float()
        self.left_out += refused
        for group in self.adamw.param_groups:
            group["lr"] = self.plan.rate(self.steps, self.samples)
        self.adamw.found_inf = refused  # type: ignore[attr-defined]  # what the fused step asks a gradient scaler for
        self.adamw.grad_scale = None  # type: ignore[attr-defined]
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.steps, self.samples = self.steps + 1, self.samples + samples
        if self.average is not None:
            decay = min(EMA_DECAY, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.everything], 1 - decay)

    @property
    def finished(self) -> bool:
        return self.samples >= self.plan.samples

    def state(self) -> PartState:
        """Return what is needed to go on; a finished part is only what is shipped."""
        shipped = self.average if self.finished and self.average is not None else self.everything
        state = PartState([value.detach() for value in shipped], {name: value for name, value in self.network.named_buffers()})
        state.steps, state.samples, state.finished = self.steps, self.samples, self.finished
        if not self.finished:
            state.average = self.average
            moments = [self.adamw.state.get(parameter, {}) for parameter in self.everything]
            momentum, variance = (
                [own.get(key, torch.zeros_like(parameter)) for own, parameter in zip(moments, self.everything, strict=True)]
                for key in ("exp_avg", "exp_avg_sq")
            )
            state.moments = Moments(momentum, variance)
        return state
