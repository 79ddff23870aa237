"""Attention maps of one sampling run: what was recorded, and how it becomes an image.

Aggregation follows DAAM (Tang et al., "What the DAAM: Interpreting Stable Diffusion Using Cross Attention",
arXiv:2210.04885): attention to one text token is summed over the steps, every head of every layer is resized to the finest
grid with bicubic interpolation and clamped at zero, and the mean is taken over all heads of all layers.

Tensors: maps are (batch, heads, tokens, frames, height, width), in attention probability summed over steps; ``heads`` is 1
where a layer's heads are already averaged. A position of ``tokens`` is a position of the text in the network's context.
Pure torch: this module knows nothing of ComfyUI.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .aggregation import Size, aggregate, checked_index, checked_positions, listed, looked_at, on_canvas, step_map
from .file_format import from_tensors, to_tensors
from .recording import PromptMaps, Recording
from .runs import KeptRuns, Run
from .settings import NO_SELF_ATTENTION


class AttnMaps:
    """The ATTN_MAPS socket: an empty handle until sampling fills it, then the maps of the runs that are kept.

    Everything that asks for maps is answered from the last run; ``matching.maps_of_images`` returns those of another one.
    """

    def __init__(self, recording: Recording | None = None) -> None:
        self.kept = KeptRuns([] if recording is None else [Run(recording)])

    @property
    def runs(self) -> list[Run]:
        """Return the runs that are kept, the newest last."""
        return self.kept.runs

    def __deepcopy__(self, memo: dict[int, Any]) -> AttnMaps:
        """Return the same handle: ComfyUI copies what hangs on a model, and sampling has to fill the one the preview holds."""
        return self

    def fill(self, run: Recording | Run, limit: int | None = None) -> None:
        """Take over a finished run; all runs together stay below ``limit`` bytes."""
        self.kept.add(run if isinstance(run, Run) else Run(run), limit)

    def require(self) -> Recording:
        """Return the recording, or an error that says what to do."""
        if not self.runs:
            raise ValueError(
                "There are no attention maps yet: no sampler has run with the model that comes out of Capture Attention Maps. "
                "Connect that model to the sampler and take the image from this sampler. If the sampler is cached from an "
                "earlier run, change its seed."
            )
        return self.runs[-1].recording

    # What there is

    @property
    def steps(self) -> int:
        """Return steps of the run; ``recorded_steps`` says which of them have a map of their own."""
        return max(len(self.sigmas) - 1, 0)

    @property
    def sigmas(self) -> list[float]:
        """Return the noise levels of the run, steps + 1 numbers."""
        return self.require().sigmas

    @property
    def batch(self) -> int:
        """Return images in the batch."""
        return self.require().batch

    @property
    def grid(self) -> Size:
        """Return height and width of the finest maps."""
        return self.require().grid[1:]

    @property
    def frames(self) -> int:
        """Return the latent frames of a video; 1 for images."""
        return self.require().grid[0]

    @property
    def notes(self) -> list[str]:
        """Return what the user should know: layers that could not be seen, detail that was dropped."""
        return self.require().notes

    @property
    def meta(self) -> dict[str, Any]:
        """Return plain facts: model, family, kind of attention."""
        return self.require().meta

    @property
    def prompts(self) -> list[str]:
        """Return which prompts have maps: "positive", "negative"."""
        return list(dict.fromkeys(maps.prompt for maps in self.require().prompts))

    @property
    def layers(self) -> list[str]:
        """Return names of the recorded layers, in the network's order."""
        return list(dict.fromkeys(name for maps in self.require().prompts for name in maps.layers))

    def count(self, prompt: str = "positive") -> int:
        """Return how many entries of this prompt's conditioning have maps (several where prompts are combined)."""
        return sum(maps.prompt == prompt for maps in self.require().prompts)

    def tokens(self, prompt: str = "positive", cond: int = 0) -> int:
        """Return text tokens: the first dimension of ``heat``."""
        return self.of(prompt, cond).tokens

    def heads(self, layer: str) -> int:
        """Return the heads that are kept apart in a layer; 1 where only their mean is."""
        for maps in self.require().prompts:
            if layer in maps.layers:
                return maps.layers[layer].maps.shape[1]
        raise ValueError(f"Layer '{layer}' was not recorded. Recorded: {listed(self.layers)}.")

    def recorded_steps(self, prompt: str = "positive", cond: int = 0) -> list[int]:
        """Return steps (0 .. steps - 1) that ``convergence`` knows, and ``heat`` where step maps were kept."""
        return self.of(prompt, cond).steps

    @property
    def has_text(self) -> bool:
        """Return whether attention to words was recorded at all."""
        return any(maps.layers for maps in self.require().prompts)

    @property
    def has_steps(self) -> bool:
        """Return whether ``heat(step=...)`` works."""
        return any(maps.step_maps is not None for maps in self.require().prompts)

    @property
    def has_self_attention(self) -> bool:
        """Return whether ``self_attention`` works."""
        return any(maps.self_attention for maps in self.require().prompts)

    def conditioning(self, prompt: str = "positive") -> list[dict[str, Any]]:
        """Return one dict per entry with what the prompt's encoder left there: for ``tokens.prompt_infos``."""
        return [dict(maps.metadata or {}) for maps in self.require().prompts if maps.prompt == prompt]

    def of(self, prompt: str = "positive", cond: int = 0) -> PromptMaps:
        """Return the recording of one entry of a prompt's conditioning."""
        recording = self.require()
        found = [maps for maps in recording.prompts if maps.prompt == prompt]
        if not recording.prompts:
            why = "; ".join(recording.notes) or "the sampler did not call the model"
            raise ValueError(f"Nothing could be recorded in this run: {why}.")
        if not found:
            raise ValueError(
                f"No attention was recorded for the {prompt} prompt; recorded: {listed(self.prompts)}. With cfg 1, or after a "
                "T-GATE gate, the sampler does not compute the negative prompt."
            )
        if not 0 <= cond < len(found):
            raise ValueError(f"The {prompt} prompt has {len(found)} entries; there is no entry {cond}.")
        return found[cond]

    # Views

    def heat(
        self,
        prompt: str = "positive",
        batch: int = 0,
        *,
        cond: int = 0,
        positions: Sequence[int] | None = None,
        layers: Sequence[str] | None = None,
        heads: Sequence[int] | None = None,
        step: int | None = None,
        frame: int | None = None,
        size: Size | None = None,
    ) -> Tensor:
        """Attention to each text token as DAAM aggregates it: (tokens, height, width), float32, not normalised.

        Args:
            batch: which image of the batch.
            positions: only these tokens, in this order.
            layers: only these layers (default: all recorded ones).
            heads: only these heads of each layer (needs ``per_head``).
            step: the map of one step instead of the sum over steps (needs ``per_step``; over all layers).
            frame: one latent frame of a video (default: the mean over frames).
            size: of the result; default ``grid``.
        """
        maps = self.of(prompt, cond)
        index = checked_index(batch, self.batch, "image")
        if step is not None:
            if layers is not None or heads is not None:
                raise ValueError(
                    "The maps of single steps are kept for all captured layers together. To see one layer step by step, name it "
                    "in 'layers' of Capture Attention Maps."
                )
            chosen = step_map(maps, step)[index].float()
            chosen = maps.tokens_of(chosen, None if positions is None else checked_positions(positions, maps.tokens), 0)
        else:
            chosen = aggregate(maps, index, positions, layers, heads)
        chosen = chosen.mean(1) if frame is None else chosen[:, checked_index(frame, chosen.shape[1], "frame")]
        return on_canvas(chosen, maps.area, self.grid, size)

    def self_attention(
        self,
        x: float,
        y: float,
        *,
        prompt: str = "positive",
        batch: int = 0,
        cond: int = 0,
        frame: int = 0,
        size: Size | None = None,
    ) -> Tensor:
        """Return where the point (x, y), as fractions of width and height, looks in the image: (height, width).

        For a video: the point lies in latent frame ``frame``, and so does the answer.
        """
        maps = self.of(prompt, cond)
        if not maps.self_attention:
            raise ValueError(
                next((f"{note}. Choose another view." for note in self.notes if note.startswith(NO_SELF_ATTENTION)), "")
                or "Self-attention was not recorded. Switch on 'self_attention' in Capture Attention Maps and sample again."
            )
        index = checked_index(batch, self.batch, "image")
        return on_canvas(looked_at(maps, index, x, y, frame), maps.area, self.grid, size)[0]

    def convergence(
        self, words: Sequence[Sequence[int]], *, prompt: str = "positive", batch: int = 0, cond: int = 0
    ) -> tuple[list[int], Tensor, Tensor]:
        """Return how words settle, step by step: steps, change (words, steps), mass (words, steps).

        Each word is a list of token positions. ``change`` is the relative L2 distance of the word's maps to those of the
        recorded step before (NaN in the first one), ``mass`` the share of all attention that the word gets.
        """
        maps = self.of(prompt, cond)
        if maps.figures is None or not maps.steps:
            raise ValueError("Nothing was recorded step by step in this run.")
        index = checked_index(batch, self.batch, "image")
        mass, change, norm = (
            maps.tokens_of(getattr(maps.figures, name)[:, index], None, 1) for name in ("mass", "change", "norm")
        )
        rows = [checked_positions(positions, maps.tokens) for positions in words]
        changes = [(change[:, row].sum(1) / norm[:, row].sum(1).clamp_min(1e-30)).sqrt() for row in rows]
        masses = [mass[:, row].sum(1) for row in rows]
        empty = torch.zeros(0, len(maps.steps))
        return maps.steps, torch.stack(changes) if rows else empty, torch.stack(masses) if rows else empty

    # Saving

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return tensors and text metadata of the last run, as a safetensors file takes them."""
        return to_tensors(self.require())

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> AttnMaps:
        """Return the handle that ``state_dict`` described.

        Raises:
            ValueError: the file holds no maps, is damaged, or was written by a newer version.
        """
        return cls(from_tensors(tensors, metadata))
