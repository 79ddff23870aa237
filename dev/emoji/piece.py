"""Train one part for one piece: until the samples are done or the time is over, with a state to go on from."""

from __future__ import annotations

import collections
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emoji.compose import Composer
from emoji.optimise import Optimiser, Plan
from emoji.state import PARTS, PartState

LOG_EVERY = 10.0  # seconds


@dataclass
class Setting:
    """Hold what the parts share."""

    device: torch.device
    composer: Composer
    seed: int = 0
    compiled: bool = False
    crop: int = 0  # side of the middle that the VAE is trained on; 0: whole images
    pool: int = 32768  # latents that the model is trained from
    reuse: int = 4  # how often a scene is trained on, on average


class Part(ABC):
    """Train a network: how its loss is made. What is drawn for a step depends on the seed and the step alone."""

    name: str
    network: nn.Module  # on the device

    def __init__(self, setting: Setting, plan: Plan) -> None:
        self.setting, self.plan = setting, plan

    def seed(self, step: int, stream: int = 0) -> int:
        """Return the seed of a step; streams of one step do not share numbers."""
        return ((self.setting.seed * 8 + stream) << 40) + (PARTS.index(self.name) << 32) + step

    @abstractmethod
    def loss(self, step: int, samples: int) -> Tensor:
        """Return the loss of a step, ``samples`` samples into the training."""

    def figures(self) -> dict[str, Any]:
        """Measure the network as it would be shipped."""
        return {}

    def finish(self, state: PartState) -> PartState:
        """Return the state of the network as it is shipped, once it is trained to the end."""
        return state

    def compile(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Compile a function for the GPU; one that does not compile costs one step and not the run."""
        if not self.setting.compiled:
            return function
        compiled: Callable[..., Tensor] | None = torch.compile(function, dynamic=False)

        def call(*inputs: Tensor) -> Tensor:
            nonlocal compiled
            if compiled is not None:
                try:
                    return compiled(*inputs)
                except torch.cuda.OutOfMemoryError:
                    raise
                except Exception:
                    traceback.print_exc()
                    print("this does not compile: eager from here on", flush=True)
                    compiled = None
            return function(*inputs)

        return call


class Meter:
    """Say every ten seconds where the training is. At most two steps are in flight, so that the clock is honest."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.cuda = name, device.type == "cuda"
        self.events: collections.deque[torch.cuda.Event] = collections.deque()
        self.total = torch.zeros((), device=device)
        self.steps, self.since = 0, time.monotonic()
        self.last = float("nan")

    def step(self, loss: Tensor) -> None:
        if self.cuda:
            event = torch.cuda.Event()
            event.record()
            self.events.append(event)
            if len(self.events) > 2:
                self.events.popleft().synchronize()
        self.total += loss.detach().float().nan_to_num()
        self.steps += 1

    @property
    def due(self) -> bool:
        return time.monotonic() - self.since > LOG_EVERY

    def report(self, optimiser: Optimiser) -> None:
        """Print a line.

        Raises:
            FloatingPointError: no step since the last line had a finite gradient.
        """
        if not self.steps:
            return
        now, left_out = time.monotonic(), int(optimiser.left_out.item())
        self.last = (self.total / self.steps).item()
        speed = self.steps * optimiser.plan.batch / max(now - self.since, 1e-9)
        rate = optimiser.plan.rate(optimiser.steps, optimiser.samples)
        without = f", {left_out} steps left out" if left_out else ""
        print(
            f"{self.name}: step {optimiser.steps}, {optimiser.samples} of {optimiser.plan.samples} samples, "
            f"{speed:.0f} a second, loss {self.last:.4f}, learning rate {rate:.2e}{without}",
            flush=True,
        )
        if left_out == self.steps:
            raise FloatingPointError(f"{self.name}: no step since the last line had a finite gradient")
        optimiser.left_out.zero_()
        self.total.zero_()
        self.steps, self.since = 0, now


def run(
    part: Part,
    state: PartState | None,
    until: float,
    save: Callable[[PartState], None],
    *,
    most_steps: int | None = None,
    save_every: float = 120.0,
) -> PartState:
    """Train a part from ``state`` (``None``: from nothing) and return the state to go on from.

    It ends when the part is trained to the end, when ``time.monotonic()`` is ``until``, or after ``most_steps`` steps.
    """
    started = saved = time.monotonic()
    before = state.seconds if state else 0.0
    if state:
        state.load_into(part.network)
    part.network.train()
    optimiser = Optimiser(part.network, part.plan, state)
    meter = Meter(part.name, part.setting.device)

    def result() -> PartState:
        made = optimiser.state()
        made.seconds = round(before + time.monotonic() - started, 1)
        made.figures = {"loss": round(meter.last, 5)}
        return made

    last = float("inf") if most_steps is None else optimiser.steps + most_steps
    while not optimiser.finished and time.monotonic() < until and optimiser.steps < last:
        loss = part.loss(optimiser.steps, optimiser.samples)
        loss.backward()
        optimiser.step(part.plan.batch)
        meter.step(loss)
        if meter.due:
            meter.report(optimiser)
        if time.monotonic() - saved > save_every:
            save(result())
            saved = time.monotonic()
    meter.report(optimiser)
    made = result()
    if made.finished:
        made = part.finish(made)
    save(made)  # measuring takes a while
    averaged = made.average or made.weights
    weights = [parameter.detach().clone() for parameter in part.network.parameters()]
    PartState(averaged, made.buffers).load_into(part.network)
    part.network.eval()
    made.figures |= part.figures()
    PartState(weights).load_into(part.network)
    return made
