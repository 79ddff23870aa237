"""The sampling runs that one handle keeps, within one limit of memory.

A run is known by what the sampler was given and returned, and by the node of the workflow that sampled. A later run of the same
node takes the place of its earlier one; runs of other nodes stay beside it (hires fix, two samplers on one model).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from ..host import NodeCall
from .recording import LayerMaps, PromptMaps, Recording, SelfAttention
from .sums import grid_of, pooled, pooled_self, size_of

# A node may sample several times in one call: in stages (the last ones count), or tile by tile.
_MOST_OF_A_NODE, _MOST = 4, 16
_SMALLEST_SIDE = 8


@dataclass(eq=False)
class Run:
    """One sampling run.

    Attributes:
        start, result: the latent that the sampler was given, and the one it returned: (batch, channels, [frames,] height, width)
            in half precision on the CPU; None where the run comes from a file.
        seed: of the sampler.
        node: the node that sampled; None outside a queue.
        signature: of the workflow up to that node, once a node that shows the run has told it (see ``origin``).
        number: how many runs the handle had before.
    """

    recording: Recording
    start: Tensor | None = None
    result: Tensor | None = None
    seed: int | None = None
    node: NodeCall | None = None
    signature: str = ""
    number: int = 0

    @property
    def bytes(self) -> int:
        """Return what the run takes of the memory limit."""
        return sum(size_of(tensor) for tensor in _tensors(self.recording))


class KeptRuns:
    """The runs of one handle, and what has been shown of them.

    Attributes:
        runs: the newest last.
        released: nodes whose runs are not kept any more.
        shown: what each node of the workflow showed, by id: the numbers of the runs, and how many the handle had had by then.
    """

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs
        self.released: set[str] = set()
        self.shown: dict[str, tuple[set[int], int]] = {}
        self._count = len(runs)

    def add(self, new: Run, limit: int | None = None) -> None:
        """Take over a finished run; all runs together stay below ``limit`` bytes."""
        self._count += 1
        new.number = self._count
        kept = with_run(self.runs, new)
        self._keep(kept if limit is None else fit(kept, limit))
        if new.node is not None:
            self.released.discard(new.node.node)

    def _keep(self, runs: list[Run]) -> None:
        self.released |= {run.node.node for run in self.runs if run not in runs and run.node is not None}
        self.runs = runs
        self.released -= {run.node.node for run in runs if run.node is not None}

    def note_shown(self, node: str, runs: list[Run], sharing: set[str]) -> None:
        """Remember what a node shows, and let go of runs that no node does, once all that share the handle have shown theirs."""
        self.shown[node] = ({run.number for run in runs}, self._count)
        if all(other in self.shown for other in sharing):
            wanted = set().union(*(self.shown[other][0] for other in sharing))
            since = min(self.shown[other][1] for other in sharing)
            self._keep([run for run in self.runs if run.number in wanted or run.number > since])


def _tensors(recording: Recording) -> Iterator[Tensor]:
    for maps in recording.prompts:
        yield from (layer.maps for layer in maps.layers.values())
        yield from (entry.matrix for entry in maps.self_attention)
        if maps.step_maps is not None:
            yield maps.step_maps


def with_run(runs: list[Run], new: Run) -> list[Run]:
    """Return the runs that are kept once ``new`` has ended, the newest last."""
    kept = [run for run in runs if not _replaced(run, new)]
    same = [run for run in kept if run.node == new.node]
    surplus = same[: max(len(same) - _MOST_OF_A_NODE + 1, 0)]
    return [*(run for run in kept if run not in surplus), new][-_MOST:]


def _replaced(run: Run, new: Run) -> bool:
    """Return whether the same node samples anew, in a later prompt of the queue."""
    if run.node is None or new.node is None:
        return False
    return run.node.node == new.node.node and run.node.list_index == new.node.list_index and run.node.prompt != new.node.prompt


def fit(runs: list[Run], limit: int) -> list[Run]:
    """Return the runs within ``limit`` bytes: those of no node go first, then resolution, then the oldest."""
    kept = list(runs)
    while sum(run.bytes for run in kept) > limit and len(kept) > 1:
        nameless = next((run for run in kept[:-1] if run.node is None), None)
        if nameless is not None:
            kept.remove(nameless)
            continue
        largest = max(kept, key=lambda run: run.bytes)
        side = (max(largest.recording.grid[1:]) + 1) // 2
        if side >= _SMALLEST_SIDE and lowered(largest.recording, side).grid != largest.recording.grid:
            largest.recording = lowered(largest.recording, side)
            note = f"maps were lowered to at most {side} x {side} to keep several runs within {limit // 2**20} MB"
            others = [text for text in largest.recording.notes if not text.endswith(note[note.index("to keep") :])]
            largest.recording.notes = [*others, note]
        else:
            kept.remove(kept[0])
    return kept


def lowered(recording: Recording, side: int) -> Recording:
    """Return the recording with maps of at most ``side`` x ``side``."""
    prompts = [_lowered_prompt(maps, side) for maps in recording.prompts]
    frames, height, width = recording.grid
    while max(height, width) > side:
        height, width = (height + 1) // 2, (width + 1) // 2
    return replace(recording, prompts=prompts, grid=(frames, height, width))


def _lowered_prompt(maps: PromptMaps, side: int) -> PromptMaps:
    layers = {name: LayerMaps(layer.heads, pooled(layer.maps, side)) for name, layer in maps.layers.items()}
    step_maps = None if maps.step_maps is None else pooled(maps.step_maps, side)
    attention = []
    for entry in maps.self_attention:
        matrix, grid = pooled_self(entry.matrix.float(), entry.grid, side * side)
        attention.append(SelfAttention(grid, entry.weight, matrix))
    finest = [grid_of(layer.maps) for layer in layers.values()] or [entry.grid for entry in attention] or [maps.grid]
    grid = max(finest, key=lambda grid: grid[1] * grid[2])
    if step_maps is not None:
        grid = grid_of(step_maps)
    return replace(maps, layers=layers, step_maps=step_maps, self_attention=attention, grid=grid)


def fingerprint(latent: Tensor | None) -> str:
    """Return what a latent is known again by in half precision, as text; empty where there is none."""
    if latent is None:
        return ""
    return hashlib.sha256(latent.detach().half().cpu().contiguous().numpy().tobytes()).hexdigest()
