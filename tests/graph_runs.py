"""Graphs run by ComfyUI's own executor in this process, with the embedded model: what caches and node ids do to techniques."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import host_inprocess
import pytest
import torch

CHECKPOINT = host_inprocess.ROOT / "dev" / "scenes" / "fovea-scenes.safetensors"
Graph = dict[str, dict[str, Any]]


class Server:
    """What the executor tells its progress."""

    client_id = last_node_id = last_prompt_id = loop = None
    sockets_metadata: dict[str, Any] = {}
    number = 0

    def send_sync(self, *args: Any, **kwargs: Any) -> None:
        pass

    queue_updated = send_progress_text = send_sync


class Scenes:
    """Loads the embedded model."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP", "VAE"), "load", "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def load(self) -> tuple[Any, ...]:
        host_inprocess.register_demo_model()
        return comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT), output_vae=True, output_clip=True)[:3]


class Empty:
    """An empty latent of the embedded model."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"side": ("INT", {}), "batch": ("INT", {})}}

    def make(self, side: int, batch: int) -> tuple[dict[str, torch.Tensor]]:
        return ({"samples": torch.zeros(batch, 3, side // 8, side // 8)},)


class Keep:
    """Keeps what it is given, under ``key``."""

    OUTPUT_NODE, RETURN_TYPES, FUNCTION, CATEGORY = True, (), "take", "test"
    seen: dict[str, dict[str, Any]] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        kinds = {"mask": "MASK", "image": "IMAGE", "text": "STRING", "maps": "ATTN_MAPS", "number": "FLOAT"}
        optional = {name: (kind, {"forceInput": True}) for name, kind in kinds.items()}
        return {"required": {"key": ("STRING", {})}, "optional": optional}

    @classmethod
    def IS_CHANGED(cls, **given: Any) -> float:
        return float("nan")

    def take(self, key: str, **given: Any) -> dict[str, Any]:
        Keep.seen[key] = given
        return {}


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """Return a node of a graph in the form of the API."""
    return {"class_type": kind, "inputs": inputs}


def executor(monkeypatch: pytest.MonkeyPatch, cache: str = "CLASSIC") -> Callable[..., dict[str, dict[str, Any]]]:
    """Return ``run(graph, extra_data)`` with the named cache: what each ``Keep`` got, or an error; each run has an id."""
    monkeypatch.syspath_prepend(str(Path(folder_paths.__file__).parent))  # before the folder of its package, which has a utils.py
    import execution
    import server

    import nodes

    ours = {"TestScenes": Scenes, "TestEmpty": Empty, "TestKeep": Keep}
    for name, each in {**host_inprocess.pack_nodes(), **ours}.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, each)
    stub = Server()
    monkeypatch.setattr(server.PromptServer, "instance", stub, raising=False)
    kind = getattr(execution.CacheType, cache)
    running = execution.PromptExecutor(stub, cache_type=kind, cache_args={"lru": 100, "ram": 2.0, "ram_inactive": 64.0})

    def run(graph: Graph, extra_data: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
        Keep.seen = {}
        outputs = [
            key for key, each in graph.items() if getattr(nodes.NODE_CLASS_MAPPINGS[each["class_type"]], "OUTPUT_NODE", False)
        ]
        running.execute(json.loads(json.dumps(graph)), str(uuid.uuid4()), extra_data or {}, outputs)
        errors = [message[1] for message in running.status_messages if message[0] == "execution_error"]
        if errors:
            raise RuntimeError(errors[0]["exception_message"])
        return Keep.seen

    return run
