"""What a run did, and its progress."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..networks.layer_names import list_layers
from .job import DistillJob


@dataclass
class DistillReport:
    """What happened: one entry for each step that was optimised."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    reused: int = 0
    computed: int = 0

    def as_json(self, job: DistillJob) -> dict[str, Any]:
        settings = job.settings
        return {
            "method": settings.method.value,
            "iterations": job.iterations,
            "learning_rate": job.learning_rate,
            "adain": settings.uses_adain,
            "layers": [layer.name for layer in job.layers],
            "references": len(job.references),
            "reference_weights": list(job.reference_weights),
            "reference_per_image": job.one_each,
            "content_weight": settings.content_weight if job.content is not None else None,
            "windows": len(job.windows),
            "reference_features": {"reused": self.reused, "computed": self.computed},
            "notes": [*job.costs, *job.notes],
            "steps": self.steps,
        }

    def summary(self, job: DistillJob) -> str:
        text = f"Attention Distillation: {job.settings.method.value}, "
        notes = "".join(f"; {note}" for note in job.notes)
        if not self.steps:
            return text + "no step of the run was optimised" + notes
        losses = [loss for step in self.steps for loss in step["loss"]]
        text += (
            f"{len(losses)} optimisation steps in {len(self.steps)} steps on {list_layers([layer.name for layer in job.layers])}"
        )
        text += f", loss {losses[0]:.4g} to {losses[-1]:.4g}"
        text += f", reference features reused {self.reused} of {self.reused + self.computed} times"
        if job.one_each:
            text += f", each image with one of {len(job.references)} references"
        if len(job.windows) > 1:
            text += f", in {len(job.windows)} windows"
        missing = set().union(*(regions.missing() for regions in job.regions or ()))
        if missing:
            text += f"; grey values {sorted(missing)} of target_mask are not in reference_mask and were left free"
        return text + notes
