"""Attention Distillation restated: the authors' loops as they are, in the units and on the times of a DDIM or flow scheduler.

It shares no code with the pack. The network is a plain copy whose gradient comes from autograd; queries, keys, values and
attention outputs are what hooks see at the projections of each self-attention. Only the random numbers are handed in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


@dataclass(frozen=True)
class Time:
    """z_t = alpha * clean + sigma * noise; ``t`` is what the network is told; ``host`` ComfyUI's name for this noise level."""

    alpha: float
    sigma: float
    t: float
    host: float


def diffusion_time(model_sampling, sigma: float) -> Time:
    """For eps and v models: variance preserving."""
    alpha = (1 + sigma**2) ** -0.5
    return Time(alpha, sigma * alpha, float((model_sampling.sigmas - sigma).abs().argmin()), sigma)


def flow_time(model_sampling, sigma: float) -> Time:
    return Time(1 - sigma, sigma, 1000 * sigma, sigma)


def plain_copy(network: torch.nn.Module) -> torch.nn.Module:
    with torch.inference_mode(False):
        twin = copy.deepcopy(network)
        for module in twin.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[name] = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
    return twin


@dataclass
class Official:
    """The authors' pipeline.

    Attributes:
        layers: (first, last) among the self-attentions in order of execution, as in their ``Controller``.
        prediction: "eps", "v" or "flow".
        noise: (like, sigma of ComfyUI, purpose, place) -> the noise of one reference.
    """

    network: torch.nn.Module
    layers: tuple[int, int]
    prediction: str
    null: Tensor
    references: Tensor
    noise: Callable[[Tensor, float, int, int], Tensor]
    lr: float
    iterations: int
    adain: bool = False
    content: Tensor | None = None
    weight: float = 0.25
    attn_scale: float = 1.0
    target_mask: Tensor | None = None  # (height, width)
    reference_mask: Tensor | None = None
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.network = plain_copy(self.network)
        found = [module for name, module in self.network.named_modules() if name.endswith("attn1")]
        self.attentions = found[slice(*self.layers)]

    def _run(self, z: Tensor, t: float, context: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
        """The network's output, and q, k, v and attention output (batch, heads, tokens, channels) of each layer."""
        seen: list[list[Tensor]] = []
        handles = []

        def split(x: Tensor, heads: int) -> Tensor:
            return x.unflatten(-1, (heads, -1)).transpose(1, 2)

        for module in self.attentions:
            own: list[Tensor] = []
            seen.append(own)
            for projection in (module.to_q, module.to_k, module.to_v):
                handles.append(
                    projection.register_forward_hook(lambda m, i, out, own=own, h=module.heads: own.append(split(out, h)))
                )
            out = module.to_out[0]
            handles.append(out.register_forward_pre_hook(lambda m, i, own=own, h=module.heads: own.append(split(i[0], h))))
        try:
            times = torch.full((len(z),), float(t))
            return self.network(z, times, context=context.expand(len(z), -1, -1)), seen
        finally:
            for handle in handles:
                handle.remove()

    def _denoised(self, z: Tensor, out: Tensor, time: Time) -> tuple[Tensor, Tensor]:
        """Clean latent and noise that the network sees in ``z``."""
        if self.prediction == "eps":
            return (z - time.sigma * out) / time.alpha, out
        if self.prediction == "v":
            return time.alpha * z - time.sigma * out, time.sigma * z + time.alpha * out
        return z - time.sigma * out, z + time.alpha * out

    def _at(self, latents: Tensor, time: Time, purpose: int) -> Tensor:
        noise = [self.noise(latent[None], time.host, purpose, place) for place, latent in enumerate(latents)]
        return time.alpha * latents + time.sigma * torch.cat(noise)

    def _loss(self, seen: list[list[Tensor]], style: list[list[Tensor]], content: list[list[Tensor]] | None) -> Tensor:
        loss = torch.zeros(())
        for layer, (q, _, _, out) in enumerate(seen):
            k, v = (torch.cat(style[layer][which].chunk(len(self.references)), dim=2).repeat(len(q), 1, 1, 1) for which in (1, 2))
            mask = None
            if self.target_mask is not None:
                side = int(q.shape[2] ** 0.5)
                rows, columns = (
                    F.interpolate(m[None, None].float(), size=(side, side)).flatten()
                    for m in (self.target_mask, self.reference_mask)
                )
                mask = rows[:, None] == columns[None, :]
            ideal = F.scaled_dot_product_attention(q * self.attn_scale, k, v, attn_mask=mask)
            loss = loss + F.l1_loss(out, ideal.detach())
            if content is not None:
                loss = loss + self.weight * F.l1_loss(q, content[layer][0].detach())
        return loss

    def _distil(self, z: Tensor, time: Time, style: Tensor, content: Tensor | None, adam: torch.optim.Adam | None) -> Tensor:
        with torch.no_grad():
            of_style = self._run(style, time.t, self.null)[1]
            of_content = None if content is None else self._run(content, time.t, self.null)[1]
        if adam is None:
            z = z.detach().clone().requires_grad_()
            adam = torch.optim.Adam([z], lr=self.lr)
        for _ in range(self.iterations):
            adam.zero_grad()
            loss = self._loss(self._run(z, time.t, self.null)[1], of_style, of_content)
            loss.backward()
            adam.step()
            self.losses.append(loss.item())
        return z

    def sample(self, z: Tensor, times: Sequence[Time], least: Time, positive: Tensor, negative: Tensor, cfg: float) -> Tensor:
        """Guided sampling from ``z`` at ``times[0]``; returns the clean latent. Behind the last time comes ``least``."""
        with torch.inference_mode(False), torch.enable_grad():
            for time, after in zip(times[:-1], times[1:], strict=True):
                with torch.no_grad():
                    with_prompt, without = (self._run(z, time.t, context)[0] for context in (positive, negative))
                    clean, noise = self._denoised(z, without + cfg * (with_prompt - without), time)
                    if after.sigma == 0 and self.prediction != "flow":
                        after, z = least, clean * least.alpha
                    else:
                        z = after.alpha * clean + after.sigma * noise
                    if self.adain:
                        style = self._at(self.references, after, 1)
                        mean, std = z.mean((2, 3), keepdim=True), z.std((2, 3), keepdim=True) + 1e-6
                        z = (z - mean) / std * style.std((0, 2, 3), keepdim=True) + style.mean((0, 2, 3), keepdim=True)
                content = None if self.content is None else self._at(self.content, after, 2)
                z = self._distil(z, after, self._at(self.references, after, 0), content, None).detach()
            return z / after.alpha

    def optimise(self, z: Tensor, times: Sequence[Time]) -> Tensor:
        """No denoising: the clean latent, the clean references and the clean content at each time, and one Adam."""
        with torch.inference_mode(False), torch.enable_grad():
            z = (z if self.content is None else self.content).clone().requires_grad_()
            adam = torch.optim.Adam([z], lr=self.lr)
            for time in times:
                self._distil(z, time, self.references, self.content, adam)
            return z.detach()
