"""The developer commands, without a network: archives and environments made of a few bytes, and the real host."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import demo
import environment
import host_server
import psutil
import pytest
import suite
import tomlkit
import yaml
from environment import archives, front_ends, own_comfyui, packages, pythons, releases, setup
from environment.archives import ensure_host
from environment.releases import HostPin
from environment.stages import SetupError, Stages
from host_server import HostServer, ServerError, WorkflowError

from workflows import workflow_files

pytestmark = pytest.mark.newest

DEV = environment.DEV
VERSION = "9.9.9"


# ------------------------------------------------------------------------------------------ host archives


def host_files(version: str = VERSION) -> dict[str, bytes]:
    """The fewest files that look like a whole ComfyUI."""
    files = {name: f"# {name}\n".encode() for name in archives.HOST_FILES}
    return {**files, "comfyui_version.py": f'__version__ = "{version}"\n'.encode()}


def make_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def make_zip(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as bundle:
        for name, content in files.items():
            bundle.writestr(name, content)


def make_pin(archive: Path, /, **changes: Any) -> HostPin:
    known = {"version": VERSION, "requirement": "tiny==1", "archive": archive.name, "folder": "tiny-1/ComfyUI"}
    return HostPin(**{**known, "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(), **changes})


def no_download(pin: HostPin, folder: Path) -> None:
    raise AssertionError("nothing should be downloaded")


def copying(archive: Path) -> Callable[[HostPin, Path], None]:
    """A download that brings a file from the disk."""
    return lambda pin, folder: (folder / archive.name).write_bytes(archive.read_bytes()) and None


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A source archive with a tiny host in it, and files around it that do not belong to it."""
    path = tmp_path / "tiny-1.tar.gz"
    inside = {f"tiny-1/ComfyUI/{name}": content for name, content in host_files().items()}
    make_tar(path, {**inside, "tiny-1/ComfyUI/stray.yaml": b"base: /nowhere", "tiny-1/setup.py": b"raise SystemExit"})
    return path


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_a_host_is_unpacked_whole_and_nothing_else(make: Callable[[Path, dict[str, bytes]], None], tmp_path: Path) -> None:
    path = tmp_path / ("tiny-1.tar.gz" if make is make_tar else "tiny-1-py3-none-any.whl")
    files = {f"tiny-1/ComfyUI/{name}": content for name, content in host_files().items()}
    make(path, {**files, "tiny-1/ComfyUI/stray.yaml": b"x", "tiny-1/other.py": b"x"})
    folder, ready = ensure_host(make_pin(path, leave_out=("stray.yaml",)), tmp_path, copying(path))
    found = {str(p.relative_to(folder).as_posix()) for p in folder.rglob("*") if p.is_file()}
    assert not ready
    assert found == {*host_files(), "fovea-stamp.json"}
    assert all((folder / name).read_bytes() == content for name, content in host_files().items())
    assert archives.host_version_of(folder) == VERSION


def test_a_host_that_is_there_is_used_again(archive: Path, tmp_path: Path) -> None:
    pin = make_pin(archive)
    first, _ = ensure_host(pin, tmp_path, copying(archive))
    assert ensure_host(pin, tmp_path, no_download) == (first, True)


def test_an_archive_with_another_sha256_is_refused(archive: Path, tmp_path: Path) -> None:
    pin = make_pin(archive, sha256="0" * 64)
    with pytest.raises(SetupError, match=f"expected {'0' * 64}") as caught:
        ensure_host(pin, tmp_path, copying(archive))
    assert hashlib.sha256(archive.read_bytes()).hexdigest() in str(caught.value)
    assert not (tmp_path / "hosts").exists()
    assert not list((tmp_path / "downloads").rglob("*.tar.gz")), "a refused file must not stay where it could be used"


def test_another_file_than_the_pinned_one_is_refused(archive: Path, tmp_path: Path) -> None:
    pin = make_pin(archive, archive="tiny-2.tar.gz")
    with pytest.raises(SetupError, match=r"tiny-1.tar.gz.*instead of tiny-2.tar.gz"):
        ensure_host(pin, tmp_path, copying(archive))


def test_a_damaged_download_is_fetched_again(archive: Path, tmp_path: Path) -> None:
    pin = make_pin(archive)
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / archive.name).write_bytes(archive.read_bytes()[:-20])
    folder, _ = ensure_host(pin, tmp_path, copying(archive))
    assert archives.host_is_valid(pin, folder)


def _lose_a_file(folder: Path) -> None:
    (folder / "comfy" / "sd.py").unlink()


def _cut_a_file(folder: Path) -> None:
    (folder / "nodes.py").write_bytes(b"")


def _lose_the_stamp(folder: Path) -> None:
    (folder / "fovea-stamp.json").unlink()


def _spoil_the_stamp(folder: Path) -> None:
    (folder / "fovea-stamp.json").write_text("[1, 2")


def _become_another_version(folder: Path) -> None:
    (folder / "comfyui_version.py").write_bytes(host_files("9.9.8")["comfyui_version.py"])


BREAKAGES = [_lose_a_file, _cut_a_file, _lose_the_stamp, _spoil_the_stamp, _become_another_version]


@pytest.mark.parametrize("damage", BREAKAGES)
def test_a_broken_host_is_made_again_without_a_download(damage: Callable[[Path], None], archive: Path, tmp_path: Path) -> None:
    pin = make_pin(archive)
    folder, _ = ensure_host(pin, tmp_path, copying(archive))
    damage(folder)
    again, ready = ensure_host(pin, tmp_path, no_download)
    assert (again, ready) == (folder, False)
    assert all((folder / name).read_bytes() == content for name, content in host_files().items())


def test_a_half_unpacked_host_is_not_mistaken_for_one(archive: Path, tmp_path: Path) -> None:
    leftover = tmp_path / "hosts" / f"{VERSION}.unfinished"
    leftover.mkdir(parents=True)
    (leftover / "half.py").write_text("x")
    folder, _ = ensure_host(make_pin(archive), tmp_path, copying(archive))
    assert not leftover.exists() and not (folder / "half.py").exists()


def test_an_archive_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "tiny-1.tar.gz"
    make_tar(path, {"tiny-1/ComfyUI/main.py": b"x", "tiny-1/ComfyUI/../../escaped.py": b"x"})
    with pytest.raises(SetupError, match="escaped.py"):
        ensure_host(make_pin(path), tmp_path, copying(path))
    assert not list(tmp_path.rglob("escaped.py"))


def test_links_in_an_archive_are_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "tiny-1.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        entry = tarfile.TarInfo("tiny-1/ComfyUI/models")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(entry)
        entry = tarfile.TarInfo("tiny-1/ComfyUI/main.py")
        tar.addfile(entry, io.BytesIO(b""))
    assert set(archives.unpack(path, "tiny-1/ComfyUI", tmp_path / "out")) == {"main.py"}
    assert not (tmp_path / "out" / "models").is_symlink()


def test_an_archive_without_the_folder_says_so(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="holds no folder elsewhere"):
        ensure_host(make_pin(archive, folder="elsewhere"), tmp_path, copying(archive))


def test_the_host_under_test_is_the_pinned_release(host_path: Path, host_version: str) -> None:
    """Only for our own hosts; somebody's own ComfyUI may be any version."""
    pin = next((pin for pin in releases.HOSTS if host_path == environment.home() / "hosts" / pin.version), None)
    if pin is None:
        pytest.skip("this ComfyUI is not one of the pinned hosts")
    assert archives.host_is_valid(pin, host_path)
    assert host_version == pin.version


# ------------------------------------------------------------------------------------------ the environment


@pytest.fixture(scope="module")
def new_venv(tmp_path_factory: pytest.TempPathFactory) -> pythons.Venv:
    """A real, empty virtual environment, made once."""
    folder = tmp_path_factory.mktemp("environment")
    made = pythons.Venv(folder / "venv")
    made.create("this python", folder / "venv.log")
    return made


@pytest.fixture
def venv(new_venv: pythons.Venv, tmp_path: Path) -> pythons.Venv:
    """A copy of it for one test."""
    return pythons.Venv(shutil.copytree(new_venv.folder, tmp_path / "venv", symlinks=True))


def test_an_environment_is_used_only_when_whole(venv: pythons.Venv) -> None:
    assert venv.is_usable("this python")
    assert not venv.is_usable("another python"), "made by another Python version"
    with venv.working_on("torch", "2.11"):
        assert not venv.has("torch", "2.11"), "not finished yet"
    assert venv.has("torch", "2.11") and not venv.has("torch", "2.12")
    venv.python.unlink()
    assert not venv.is_usable("this python"), "its Python is gone"


def test_an_interrupted_stage_makes_the_environment_unusable(venv: pythons.Venv) -> None:
    with pytest.raises(KeyboardInterrupt), venv.working_on("packages", "1"):
        raise KeyboardInterrupt
    assert not venv.is_usable("this python")


def test_a_stage_that_pip_refused_can_be_tried_again(venv: pythons.Venv) -> None:
    with pytest.raises(SetupError), venv.working_on("packages", "1"):
        raise SetupError("no network")
    assert venv.is_usable("this python") and not venv.has("packages", "1")


def test_a_broken_environment_is_made_again(
    new_venv: pythons.Venv,
    archive: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The whole of `ensure`, with pip and the final check replaced: neither may run without a network."""

    def create(self: pythons.Venv, fingerprint: str, log: Path) -> None:
        shutil.copytree(new_venv.folder, self.folder, symlinks=True)
        self.note.write_text(json.dumps({"python": fingerprint}))

    pip_calls: list[str] = []
    answers = iter([True, False, True])
    monkeypatch.setenv("FOVEA_HOME", str(tmp_path))
    monkeypatch.setattr(pythons.Venv, "create", create)
    for module in (setup, packages):
        monkeypatch.setattr(module, "pip", lambda python, *arguments, log: pip_calls.append(arguments[0]))
    monkeypatch.setattr(setup, "environment_works", lambda python: next(answers))
    (tmp_path / "downloads").mkdir()
    archive.rename(tmp_path / "downloads" / archive.name)
    pin = make_pin(tmp_path / "downloads" / archive.name)
    monkeypatch.setattr(setup, "HOSTS", (pin,))

    made = environment.ensure((pin,))
    assert made == environment.Environment(pythons.venv_python(tmp_path / "venv"), (tmp_path / "hosts" / VERSION,))
    assert pip_calls == ["install"] * 3, "torch, packages, comfy-cli"
    mark = tmp_path / "venv" / "mark"
    mark.write_text("the first environment")
    capsys.readouterr()

    assert environment.ensure((pin,)) == made
    printed = capsys.readouterr().out
    assert "is broken; making it again" in printed
    assert printed.count("ready") == 5, printed  # 4 before the check failed, and ComfyUI once more
    assert not mark.exists() and pip_calls == ["install"] * 6


def test_packages_are_installed_again_for_a_changed_line_but_not_for_a_comment(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    found = []
    for text in ("torch\nnumpy>=1", "# newer\ntorch  # with CUDA\n\nnumpy>=1\n", "torch\nnumpy>=2"):
        requirements.write_text(text)
        found.append(packages.packages_fingerprint(tmp_path))
    assert found[0] == found[1] != found[2]


def test_hosts_are_chosen_by_version() -> None:
    versions = [pin.version for pin in releases.chosen_hosts("all")]
    assert versions == ["0.30.0", "0.16.3", "0.3.75"]
    assert [pin.version for pin in releases.chosen_hosts(None)] == [versions[0], versions[-1]]
    assert [pin.version for pin in releases.chosen_hosts("0.16.3")] == ["0.16.3"]
    with pytest.raises(SetupError, match="no pinned ComfyUI 0.17"):
        releases.chosen_hosts("0.17")


def test_a_host_keeps_its_own_front_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment holds one version; another one lies beside it, whole or not at all."""
    monkeypatch.setenv("FOVEA_HOME", str(tmp_path))
    host, log = tmp_path / "host", tmp_path / "log"
    host.mkdir()
    (host / "requirements.txt").write_text("comfyui-frontend-package==1.2.3\ntorch\n")
    assert front_ends.front_end_arguments(host) == ()

    def pip(python: Path, command: str, *arguments: str, log: Path) -> None:
        assert arguments[-1] == "comfyui-frontend-package==1.2.3"
        pages = Path(arguments[arguments.index("--target") + 1], "comfyui_frontend_package", "static")
        pages.mkdir(parents=True)
        if broken:
            raise SetupError("no network")

    monkeypatch.setattr(front_ends, "pip", pip)
    broken = True
    with pytest.raises(SetupError):
        front_ends.ensure_front_end(Path("python"), host, log)
    assert front_ends.front_end_arguments(host) == ()
    broken = False
    assert not front_ends.ensure_front_end(Path("python"), host, log)
    assert front_ends.ensure_front_end(Path("python"), host, log), "it is there already"
    root = front_ends.front_end_folder("1.2.3") / "comfyui_frontend_package" / "static"
    assert front_ends.front_end_arguments(host) == ("--front-end-root", str(root))


def test_a_failed_stage_says_which_why_and_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", "print('no space left on the moon'); raise SystemExit(3)"]
    with pytest.raises(SetupError) as caught, Stages(2).stage("torch 2.11.0"):
        pythons.run_logged(command, tmp_path / "torch.log", "Free some space.")
    assert capsys.readouterr().out == "[1/2] torch 2.11.0 ... failed\n"
    assert str(caught.value).startswith("torch 2.11.0: ")
    assert "code 3" in str(caught.value) and "no space left on the moon" in str(caught.value)
    assert str(tmp_path / "torch.log") in str(caught.value)
    assert caught.value.advice == "Free some space."


def test_two_set_ups_do_not_work_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\nfrom environment import setup\n"
        "with setup.only_one(pathlib.Path(sys.argv[1])):\n print('in', flush=True)\n time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=DEV, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        with open(tmp_path / "lock", "a+") as handle:
            assert not setup._try_lock(handle)
        other.kill()
        other.wait()
        with setup.only_one(tmp_path):
            pass  # a killed process holds nothing
    finally:
        other.kill()
        other.wait()


def test_somebodys_own_comfyui_is_used_as_it_is(host_path: Path) -> None:
    assert environment.existing(host_path, Path(sys.executable)) == environment.Environment(Path(sys.executable), (host_path,))


@pytest.mark.parametrize("place", [".venv", "venv"])
def test_the_python_of_a_comfyui_is_found_beside_it(place: str, tmp_path: Path) -> None:
    python = pythons.venv_python(tmp_path / "ComfyUI" / place)
    python.parent.mkdir(parents=True)
    python.touch()
    assert own_comfyui.find_python(tmp_path / "ComfyUI") == python


def test_the_portable_python_is_found(tmp_path: Path) -> None:
    (tmp_path / "python_embeded").mkdir()
    (tmp_path / "python_embeded" / "python.exe").touch()
    assert own_comfyui.find_python(tmp_path / "ComfyUI") == tmp_path / "python_embeded" / "python.exe"
    assert own_comfyui.find_python(tmp_path / "nowhere" / "ComfyUI") == Path(sys.executable)


# ------------------------------------------------------------------------------------------ the command line


def dev(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **extra}
    return subprocess.run([sys.executable, str(DEV), *arguments], capture_output=True, text=True, env=env, timeout=300)


def test_a_folder_that_is_no_comfyui_is_said_plainly(tmp_path: Path) -> None:
    result = dev("demo", "--comfyui", str(tmp_path))
    assert result.returncode == 1
    assert f"{tmp_path} is not a ComfyUI folder" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_python_that_cannot_run_comfyui_is_said_plainly(host_path: Path, tmp_path: Path) -> None:
    result = dev("demo", "--comfyui", str(host_path), "--python", str(tmp_path / "python"))
    assert result.returncode == 1
    assert "cannot import torch" in result.stderr and "--python" in result.stderr


@pytest.mark.parametrize(
    ("line", "complaint"), [(["demo", "--twice"], "--twice"), (["test", "-k", "x"], "arguments for pytest go after --")]
)
def test_unknown_arguments_are_refused(line: list[str], complaint: str) -> None:
    result = dev(*line)
    assert result.returncode == 2
    assert complaint in result.stderr


def test_commands_that_take_no_more_refuse_it() -> None:
    for command in ("check", "thumbnails", "screenshots"):
        result = dev(command, "--twice")
        assert result.returncode == 2
        assert "--twice" in result.stderr


def test_every_command_has_its_script() -> None:
    command_line = runpy.run_path(str(DEV / "__main__.py"))
    assert [script for script in command_line["SCRIPTS"].values() if not (DEV / script).is_file()] == []
    assert set(command_line["SCRIPTS"]) <= set(re.findall(r"\w+", command_line["build_parser"]().format_help()))


@pytest.mark.parametrize("checks", [(0, 0), (1, 0), (0, 1)])
def test_check_runs_ruff_and_mypy_and_reports_either(checks: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name, code in zip(("check_style", "check_types"), checks, strict=True):
        monkeypatch.setattr(suite, name, lambda python, name=name, code=code: ran.append(name) or code)
    assert suite.check(Path(sys.executable)) == max(checks)
    assert ran == ["check_style", "check_types"]


def test_test_results_are_counted_from_pytests_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEA_HOME", str(tmp_path))
    file = tmp_path / "test_few.py"
    file.write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): pass\ndef test_c(): assert False\n"
        "@pytest.mark.skip\ndef test_d(): pass\n"
        "@pytest.fixture\ndef broken(): raise OSError\ndef test_e(broken): pass\n"
    )
    one, two = tmp_path / "one", tmp_path / "two"
    counts = suite.run_tests(Path(sys.executable), [one, two], [str(file)])
    assert list(counts) == ["one", "two"]
    assert counts["one"] == counts["two"]
    count = counts["one"]
    assert str(count) == "2 passed, 2 failed, 1 skipped"
    assert str(count + suite.Count(passed=3)) == "5 passed, 2 failed, 1 skipped"


def test_a_run_that_breaks_before_its_tests_counts_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEA_HOME", str(tmp_path))
    file = tmp_path / "test_broken.py"
    file.write_text("raise SystemExit(7)\n")
    count = suite.run_tests(Path(sys.executable), [tmp_path], [str(file)])[tmp_path.name]
    assert count.failed and not count.passed


# ------------------------------------------------------------------------------------------ the repository's habits


def yaml_of(*path: str) -> dict[Any, Any]:
    return yaml.safe_load(environment.ROOT.joinpath(*path).read_text(encoding="utf-8"))


def steps_of(workflow: dict[Any, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_every_push_and_pull_request_is_tested_as_on_anybodys_machine() -> None:
    workflow = yaml_of(".github", "workflows", "test.yml")
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads the key `on` as true
    assert [step["run"] for step in steps_of(workflow) if "run" in step] == [".ci/run"]
    assert all(job["timeout-minutes"] for job in workflow["jobs"].values())
    assert os.access(environment.ROOT / ".ci" / "run", os.X_OK)


def test_a_version_tag_is_published_by_the_publisher_only() -> None:
    workflow = yaml_of(".github", "workflows", "publish.yml")
    assert workflow[True] == {"push": {"tags": ["v*"]}}
    project = tomlkit.parse((environment.ROOT / "pyproject.toml").read_text(encoding="utf-8")).unwrap()["project"]
    owner = project["urls"]["Repository"].split("/")[-2]
    assert all(f"github.repository_owner == '{owner}'" in job["if"] for job in workflow["jobs"].values())
    (publish,) = [step for step in steps_of(workflow) if step.get("uses", "").startswith("Comfy-Org/publish-node-action@")]
    assert publish["with"] == {"personal_access_token": "${{ secrets.REGISTRY_ACCESS_TOKEN }}"}


def test_a_commit_is_checked_by_a_command_that_exists() -> None:
    hooks = [hook for repository in yaml_of(".pre-commit-config.yaml")["repos"] for hook in repository["hooks"]]
    assert [hook["entry"] for hook in hooks] == ["python dev check"]


# ------------------------------------------------------------------------------------------ the server


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return condition()


def test_a_taken_port_is_said_plainly(host_path: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind((host_server.ADDRESS, 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = HostServer(host_path, tmp_path, port=port)
        with pytest.raises(ServerError, match=f"Port {port} is taken by another program.*--port"), server:
            pytest.fail("it must not start")
    assert server.process is None


def test_a_server_that_dies_shows_the_end_of_its_log(host_path: Path, tmp_path: Path) -> None:
    server = HostServer(host_path, tmp_path, arguments=("--no-such-option",))
    with pytest.raises(ServerError, match=r"stopped before it was ready \(exit code 2\)") as caught, server:
        pytest.fail("it must not start")
    assert "unrecognized arguments: --no-such-option" in str(caught.value)
    assert server.process is None


def test_a_server_that_is_not_ready_in_time_is_stopped(host_path: Path, tmp_path: Path) -> None:
    server = HostServer(host_path, tmp_path, ready_within=1, cpu=True)
    pids: list[int] = []
    check_alive = server.check_alive

    def watched(when: str) -> None:
        assert server.process is not None
        pids.append(server.process.pid)
        check_alive(when)

    server.check_alive = watched  # type: ignore[method-assign]
    with pytest.raises(ServerError, match="did not answer within 1 s"), server:
        pytest.fail("it must not be ready")
    assert pids and not any(map(is_running, pids))


def children_of(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


ENDINGS = [signal.SIGINT, signal.SIGTERM] + ([signal.SIGKILL] if sys.platform == "linux" else [])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.name)
def test_the_demo_leaves_nothing_running_when_it_is_stopped(ending: signal.Signals, host_path: Path, tmp_path: Path) -> None:
    env = {**os.environ, "FOVEA_INSIDE": "1", "COMFYUI_PATH": str(host_path), "FOVEA_HOME": str(tmp_path)}
    command = [sys.executable, str(DEV), "demo", "--port", "0"]
    # Programs in the background of a shell are started with SIGINT ignored, and hand that on.
    heard = {} if os.name == "nt" else {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **heard) as process:
        try:
            assert wait_until(lambda: bool(children_of(process.pid)), 120), "the server's process never started"
            servers = children_of(process.pid)
            process.send_signal(ending)
            printed, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert wait_until(lambda: not any(is_running(server.pid) for server in servers)), printed
    assert "Traceback" not in printed


@pytest.fixture
def prompt(object_info: dict[str, Any]) -> host_server.Prompt:
    """The demo's workflow with few steps, and a seed of its own so that the server cannot reuse another test's run."""
    converted = workflow_files.convert(workflow_files.load(workflow_files.find(demo.WORKFLOW)), object_info)
    for entry in converted.values():
        if entry["class_type"] == "KSampler":
            entry["inputs"].update(steps=3, seed=time.monotonic_ns())
    return converted


def nodes_of(prompt: host_server.Prompt, kind: str) -> list[str]:
    return [node for node, entry in prompt.items() if entry["class_type"] == kind]


@pytest.mark.server
def test_a_refused_workflow_names_the_node_and_the_value(server: HostServer, prompt: host_server.Prompt) -> None:
    """With one of two samplers in order ComfyUI would run half the workflow: that is an error too, and nothing goes on."""
    node = nodes_of(prompt, "KSampler")[0]
    prompt[node]["inputs"]["sampler_name"] = "no_such_sampler"
    with pytest.raises(WorkflowError, match=rf"node {node} \(KSampler.*no_such_sampler"):
        server.run(prompt)
    assert wait_until(lambda: not any(server.get("/queue").values()))


@pytest.mark.server
def test_a_wholly_refused_workflow_names_every_node(server: HostServer, prompt: host_server.Prompt) -> None:
    loader = nodes_of(prompt, "CheckpointLoaderSimple")[0]
    prompt[loader]["inputs"]["ckpt_name"] = "missing.safetensors"
    with pytest.raises(WorkflowError, match=rf"ComfyUI refused the workflow: (.|\n)*node {loader} \(.*missing.safetensors"):
        server.run(prompt)


@pytest.mark.server
def test_a_failing_node_is_named_with_its_message(server: HostServer, prompt: host_server.Prompt) -> None:
    node = nodes_of(prompt, "TGateCache")[0]
    prompt[node]["inputs"]["gate_at"] = 0
    with pytest.raises(WorkflowError, match=rf"node {node} \(TGateCache.*\) failed: .*gate_at"):
        server.run(prompt)


@pytest.mark.server
def test_progress_is_reported_while_a_workflow_runs(server: HostServer, prompt: host_server.Prompt) -> None:
    seen: list[tuple[str, int, int]] = []
    result = server.run(prompt, lambda node, done, total: seen.append((node, done, total)))
    for node in nodes_of(prompt, "KSampler"):
        own = [done for who, done, total in seen if who == node and total == 3]
        assert own == sorted(own) and own[-1] == 3
        assert result.seconds[node] > 0


# ------------------------------------------------------------------------------------------ workflows


def tiny_info() -> dict[str, Any]:
    return {
        "Image": {
            "input": {"required": {"width": ["INT", {"default": 8}]}},
            "input_order": {"required": ["width"]},
            "output": [],
        }
    }


def tiny_workflow(**changes: Any) -> dict[str, Any]:
    return {"nodes": [{"id": 1, "type": "Image", "inputs": [], "outputs": [], "widgets_values": [64]}], "links": [], **changes}


def test_a_workflow_is_converted_with_its_values() -> None:
    assert workflow_files.convert(tiny_workflow(), tiny_info())["1"]["inputs"] == {"width": 64}


def test_what_the_converter_warns_about_is_an_error() -> None:
    with pytest.raises(WorkflowError, match="does not fit this ComfyUI:\n.*group nodes"):
        workflow_files.convert(tiny_workflow(extra={"groupNodes": {"Old": {}}}), tiny_info())


def test_unknown_nodes_are_named() -> None:
    with pytest.raises(WorkflowError, match="needs nodes this ComfyUI does not have: Painting"):
        workflow_files.convert(tiny_workflow(nodes=[{"id": 1, "type": "Painting"}]), tiny_info())


def test_workflows_are_found_by_part_of_their_name() -> None:
    assert workflow_files.find("t-gate - same").stem == demo.WORKFLOW
    with pytest.raises(WorkflowError, match="No workflow is called 'zebra'") as caught:
        workflow_files.find("zebra")
    assert demo.WORKFLOW in str(caught.value)


def test_a_broken_workflow_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text('{"nodes": [')
    with pytest.raises(WorkflowError, match="broken.json is not JSON"):
        workflow_files.load(path)


def test_labels_tell_nodes_apart() -> None:
    prompt = {"7": {"class_type": "KSampler", "_meta": {"title": "Plain run"}}, "8": {"class_type": "KSampler"}}
    assert [host_server.label(prompt, node) for node in ("7", "8", "9")] == [
        'node 7 (KSampler, "Plain run")',
        "node 8 (KSampler)",
        "node 9 (unknown)",
    ]


def test_a_refusal_that_is_no_json_is_still_shown() -> None:
    assert "Bad Gateway" in host_server.refusal({}, b"Bad Gateway")
    body = json.dumps({"error": {"message": "Prompt has no outputs", "details": ""}, "node_errors": []}).encode()
    assert host_server.refusal({}, body) == "ComfyUI refused the workflow: Prompt has no outputs"
