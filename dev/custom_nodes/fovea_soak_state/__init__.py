"""Let the server of `python dev soak` say what it holds: memory of the process, and tensors that are alive."""

from __future__ import annotations

import gc
import math

import psutil
import torch
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS: dict[str, type] = {}


@PromptServer.instance.routes.get("/fovea_soak/state")
async def state(request: web.Request) -> web.Response:
    """Return resident memory, and the number and size of all live tensors, after a collection."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    size = sum(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors)
    resident = psutil.Process().memory_info().rss
    return web.json_response({"resident_mb": resident / 2**20, "tensors": len(tensors), "tensor_mb": size / 2**20})
