"""Run hundreds of prompts on one real server: does anything grow, stay behind or break?

    python dev soak [--prompts N] [--seed N] [--json FILE]

The shipped workflows in random order, with random sizes, batch sizes and seeds and few steps; some are interrupted on the way,
some have a word that is not in the prompt. After every prompt the server tells its resident memory and its live tensors. At the
end both must be flat: the last third no higher than the middle one, within the noise of the middle one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from host_server import DEV, HostServer, WorkflowError, link

from workflows import workflow_files

STATE_NODE = DEV / "custom_nodes" / "fovea_soak_state"
STATE = "/fovea_soak/state"
SIZES = (192, 256, 320)
WRONG_WORD = "zebra"


@dataclass(frozen=True)
class Sample:
    """The state of the server after a prompt."""

    number: int
    workflow: str
    kind: str  # "plain", "interrupted" or "wrong word"
    outcome: str
    resident_mb: float
    tensors: int
    tensor_mb: float
    seconds: float


def shuffled(prompt: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Give the workflow other sizes, batches and seeds, and few steps."""
    prompt = json.loads(json.dumps(prompt))
    size = {"width": rng.choice(SIZES), "height": rng.choice(SIZES)}
    one_per_class = any(node["class_type"] == "DiTClassLabel" for node in prompt.values())
    batch = {} if one_per_class else {"batch_size": rng.choice((1, 1, 1, 2))}
    for node in prompt.values():
        inputs = node["inputs"]
        if node["class_type"] == "EmptyLatentImage":
            inputs |= size | batch
        if "steps" in inputs:
            inputs["steps"] = rng.randint(3, 6)
        for name in ("seed", "noise_seed"):
            if name in inputs:
                inputs[name] = rng.randrange(2**32)
    return prompt


def with_wrong_word(prompt: dict[str, Any]) -> bool:
    """Ask for a word that is not in the prompt, where a node looks at words."""
    for node in prompt.values():
        name = {"AttnMapPreview": "words", "AttendExciteGuider": "subjects"}.get(node["class_type"])
        if name and node["inputs"].get("view") != "self-attention":
            node["inputs"][name] = WRONG_WORD
            return True
    return False


def interrupt_after(server: HostServer, seconds: float) -> Callable[[], None]:
    timer = threading.Timer(seconds, lambda: server.request("/interrupt", {}))
    timer.start()
    return timer.cancel


def run_one(server: HostServer, name: str, prompt: dict[str, Any], kind: str, number: int, rng: random.Random) -> Sample:
    start = time.monotonic()
    stop = interrupt_after(server, rng.uniform(0.2, 6)) if kind == "interrupted" else lambda: None
    try:
        server.run(prompt)
        outcome = "done"
    except WorkflowError as error:
        outcome = str(error)
    finally:
        stop()
    state = server.get(STATE)
    return Sample(
        number, name, kind, outcome, state["resident_mb"], state["tensors"], state["tensor_mb"], time.monotonic() - start
    )


def expected(sample: Sample) -> bool:
    """Return whether a prompt ended as it had to."""
    if sample.kind == "wrong word":
        return WRONG_WORD in sample.outcome
    return sample.outcome == "done" or (sample.kind == "interrupted" and "interrupted" in sample.outcome)


def verdict(samples: Sequence[Sample]) -> list[str]:
    """List what is wrong with a soak; nothing, if it is well."""
    wrong = [f"prompt {s.number} ({s.workflow}, {s.kind}): {s.outcome}" for s in samples if not expected(s)]
    third = len(samples) // 3
    for name in ("resident_mb", "tensors"):
        middle = [getattr(s, name) for s in samples[third : 2 * third]]
        last = [getattr(s, name) for s in samples[2 * third :]]
        if third >= 10 and statistics.median(last) > max(middle):
            wrong.append(
                f"{name} grows: median {statistics.median(middle):.0f} in the middle, {statistics.median(last):.0f} at the end"
            )
    return wrong


def soak(server: HostServer, prompts: int, seed: int) -> list[Sample]:
    rng, info = random.Random(seed), server.object_info()
    shipped = {path.stem: workflow_files.load(path) for path in workflow_files.shipped()}
    workflows = {
        name: workflow_files.convert(each, info) for name, each in shipped.items() if not workflow_files.other_models(each)
    }
    samples: list[Sample] = []
    for number in range(prompts):
        name = rng.choice(list(workflows))
        prompt = shuffled(workflows[name], rng)
        kind = rng.choices(("plain", "interrupted", "wrong word"), (0.7, 0.2, 0.1))[0]
        if kind == "wrong word" and not with_wrong_word(prompt):
            kind = "plain"
        sample = run_one(server, name, prompt, kind, number, rng)
        samples.append(sample)
        mark = "" if expected(sample) else "  UNEXPECTED: " + sample.outcome.splitlines()[0]
        print(
            f"{number:4d}  {sample.resident_mb:7.0f} MB  {sample.tensors:6d} tensors, {sample.tensor_mb:6.0f} MB  "
            f"{sample.seconds:5.1f} s  {kind:11s} {name}{mark}",
            flush=True,
        )
    return samples


def main(argv: list[str] | None = None) -> int:
    """Run ``python dev soak``."""
    parser = argparse.ArgumentParser(prog="python dev soak", description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write every sample here")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as base:
        link(STATE_NODE, Path(base) / "custom_nodes" / STATE_NODE.name)
        # Newer releases keep nodes' outputs as long as there is memory, which would look like a leak: keep the last run's only.
        with HostServer(Path(os.environ["COMFYUI_PATH"]), Path(base), arguments=("--cache-classic",)) as server:
            start = time.monotonic()
            samples = soak(server, args.prompts, args.seed)
            minutes = (time.monotonic() - start) / 60
    wrong = verdict(samples)
    kinds = {kind: sum(s.kind == kind for s in samples) for kind in ("plain", "interrupted", "wrong word")}
    print(f"{len(samples)} prompts in {minutes:.0f} minutes: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    third = len(samples) // 3
    for label, part in (("first", samples[:third]), ("middle", samples[third : 2 * third]), ("last", samples[2 * third :])):
        if part:
            memory, tensors = (statistics.median(getattr(s, name) for s in part) for name in ("resident_mb", "tensors"))
            print(f"  {label} third: median {memory:.0f} MB resident, {tensors:.0f} tensors")
    print(*wrong or ["Nothing grew, nothing broke."], sep="\n")
    if args.json:
        args.json.write_text(json.dumps([vars(s) for s in samples], indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
