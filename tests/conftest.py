"""Start the real host before any test module is imported, and share it.

Every test here runs against a real ComfyUI: its modules are imported into this process (`COMFYUI_PATH` says which one),
and tests marked `server` talk to a real server that is started once per run.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

sys.path[:0] = [str(ROOT / "dev"), str(TESTS)]  # `dev` modules and shared test helpers are imported by their bare names

import host_inprocess  # noqa: E402

HOST = host_inprocess.start_host()

import comfy.model_management  # noqa: E402
import environment  # noqa: E402
import torch  # noqa: E402
from host_server import HostServer  # noqa: E402

# Tiny tensors: a second thread only waits, and more than one run may share the machine.
torch.set_num_threads(1)


# Those that take minutes, the longest first: what comes last should be short, or one process waits for another's file.
LONG = ("server", "test_together", "test_matrix", "test_excite", "test_bench", "test_gradient", "test_tokens")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several processes, what talks to the server stays in one of them, as do the tests of a file."""

    def group(item: pytest.Item) -> str:
        return "server" if "server" in getattr(item, "fixturenames", ()) else item.path.stem

    items.sort(key=lambda item: LONG.index(group(item)) if group(item) in LONG else len(LONG))
    if items and items[0].config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(group(item)))


def pytest_collection_finish() -> None:
    """No collection looks through the libraries' objects again, half a million that live to the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_leftover_models() -> Iterator[None]:
    """Tests share base models, whose patchers end with each test. ComfyUI takes that for a leak, and would collect garbage
    before every later use of any model."""
    yield
    loaded = comfy.model_management.current_loaded_models
    loaded[:] = [each for each in loaded if not each.is_dead()]


@pytest.fixture(scope="session")
def host_path() -> Path:
    """The folder of the ComfyUI under test."""
    return HOST


@pytest.fixture(scope="session")
def host_version() -> str:
    """The version of the ComfyUI under test, such as `0.30.0`."""
    import comfyui_version

    return comfyui_version.__version__


@pytest.fixture(scope="session")
def pack() -> ModuleType:
    """The pack, imported the way ComfyUI imports a custom node folder."""
    return host_inprocess.load_pack()


@pytest.fixture(scope="session")
def node_classes(pack: ModuleType) -> dict[str, type]:
    """The pack's node classes by node id."""
    return host_inprocess.pack_nodes()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostServer]:
    """A real server of ComfyUI under test, with its front end, the pack and the embedded model; one for all tests."""
    with HostServer(HOST, tmp_path_factory.mktemp("server"), arguments=environment.front_end_arguments(HOST)) as running:
        yield running


@pytest.fixture(scope="session")
def startup_log(server: HostServer) -> str:
    """What the server logged until it was ready; later tests make it complain on purpose."""
    return server.startup_log


@pytest.fixture(scope="session")
def object_info(server: HostServer) -> dict[str, Any]:
    """The schema of every node, as the server tells it to the browser."""
    return server.object_info()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """What ComfyUI is asked to have free, and to have free at least, run by run."""
    found: list[tuple[float, float]] = []
    load = comfy.model_management.load_models_gpu

    def noted(models: Any, memory_required: Any = 0, minimum_memory_required: Any = None, **kwargs: Any) -> Any:
        found.append((memory_required, minimum_memory_required))
        return load(models, memory_required=memory_required, minimum_memory_required=minimum_memory_required, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", noted)
    return found
