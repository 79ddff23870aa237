"""Several workers behind one queue: each gives what a single one gives, and maps go from one to another by file."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_server import HostServer, Prompt, Result
from PIL import Image

from workflows import workflow_files

pytestmark = [pytest.mark.newest, pytest.mark.server]

TOGETHER = "All together - faster, complete, in a style"
MAPS = "Attention maps - where each word looks"
STEPS = 6


@pytest.fixture(scope="module")
def workers(server: HostServer, host_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[HostServer]]:
    """Two servers, each with a base folder of its own, that share one output folder."""
    shared = ("--output-directory", str(server.base / "output"))
    with HostServer(host_path, tmp_path_factory.mktemp("worker"), arguments=shared) as second:
        yield [server, second]


def short(title: str, seed: int, object_info: dict[str, Any]) -> Prompt:
    """A shipped workflow with few steps and one seed."""
    prompt = workflow_files.convert(workflow_files.load(workflow_files.find(title)), object_info)
    for entry in prompt.values():
        changes = {"steps": STEPS, "seed": seed, "noise_seed": seed, "max_refinements": 2}
        entry["inputs"].update({name: value for name, value in changes.items() if name in entry["inputs"]})
    return prompt


def images(worker: HostServer, result: Result) -> dict[str, list[np.ndarray]]:
    found: dict[str, list[np.ndarray]] = {}
    for picture in result.images:
        with Image.open(io.BytesIO(worker.fetch(picture))) as image:
            found.setdefault(picture.node, []).append(np.asarray(image))
    return found


def test_a_worker_beside_another_gives_what_one_alone_gives(workers: list[HostServer], object_info: dict[str, Any]) -> None:
    """While the other is at work too: the second one's images are what the first makes of the same prompt."""
    first, _ = workers
    jobs = [short(TOGETHER, seed, object_info) for seed in (1, 2)]
    with ThreadPoolExecutor() as pool:
        split = [images(worker, done) for worker, done in zip(workers, pool.map(HostServer.run, workers, jobs), strict=True)]
    together, alone = split[1], images(first, first.run(jobs[1]))
    assert together.keys() == alone.keys() and together
    for node, shown in together.items():
        for picture, expected in zip(shown, alone[node], strict=True):
            assert np.array_equal(picture, expected), node


def test_maps_go_from_one_worker_to_another_by_file(workers: list[HostServer], object_info: dict[str, Any]) -> None:
    first, second = workers
    prompt = short(MAPS, 1, object_info)
    preview = next(node for node, entry in prompt.items() if entry["class_type"] == "AttnMapPreview")
    sources = {name: prompt[preview]["inputs"][name] for name in ("attn_maps", "images")}
    prompt["save"] = {"class_type": "FoveaSaveAttnMaps", "inputs": {**sources, "filename_prefix": "attention/of_first"}}
    result = first.run(prompt)
    expected = images(first, result)[preview]
    (file,) = result.outputs["save"]["text"]
    # The image is made again there: only the maps are taken from the file.
    prompt["load"] = {"class_type": "FoveaLoadAttnMaps", "inputs": {"file": f"{file} [output]"}}
    prompt[preview]["inputs"]["attn_maps"] = ["load", 0]
    keep = {preview, "load"}
    while missing := {link[0] for node in keep for link in prompt[node]["inputs"].values() if isinstance(link, list)} - keep:
        keep |= missing
    shown = images(second, second.run({node: prompt[node] for node in keep}))[preview]
    assert all(np.array_equal(picture, other) for picture, other in zip(shown, expected, strict=True))
