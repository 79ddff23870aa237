"""Inputs at and beyond their limits: the right answer or an error of ours, never a traceback from inside torch, never a hang.

Hypothesis looks for what breaks; the same examples are tried in every run.
"""

from __future__ import annotations

import math
import pickle
import string
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import torch
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from saved_maps import files, maps
from tiny_dit import bare, tiny
from tiny_unet import sample, small_model

pytestmark = pytest.mark.newest

__all__ = ["files", "maps"]

CHEAP = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
COSTLY = settings(CHEAP, max_examples=12, phases=[Phase.generate])  # finding the smallest example would take minutes

WILD = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="[]()\\:, abé猫🦊embding<>&\"'", max_size=80),
    st.lists(st.sampled_from(["cat", "(dog:1.2)", "embedding:x", "\\(", "[frog]", "猫", "BREAK", "a" * 50]), max_size=40).map(
        " ".join
    ),
)
NUMBERS = st.one_of(st.floats(), st.sampled_from([0.0, 1.0, -1.0, 1e-9, 1e300, math.nan, math.inf]))


# --- schedules --------------------------------------------------------------------------------------------------------


@CHEAP
@given(st.data())
def test_nothing_is_reused_before_it_is_stored(pack: Any, data: st.DataObject) -> None:
    from fovea_attention.attention import tgate

    steps = data.draw(st.integers(1, 120), "steps")
    chosen = tgate.TGateSettings(
        gate_at=data.draw(st.floats(0, 1, exclude_min=True), "gate_at"),
        sp_interval=data.draw(st.integers(1, 130), "sp_interval"),
        fi_interval=data.draw(st.integers(1, 130), "fi_interval"),
        warm_up=data.draw(st.integers(0, 130), "warm_up"),
    )
    gate = chosen.gate_step(steps)
    assert 1 <= gate <= steps
    stored = {"self": False, "cross": False}
    for step in range(steps):
        plan = tgate.plan(step, gate, chosen)
        for kind in stored:
            action = plan.action(kind)
            stored[kind] |= action is tgate.Action.STORE
            assert action is not tgate.Action.REUSE or stored[kind], (kind, step)
        assert (plan.cross_attention is tgate.Action.REUSE) == (step >= gate)


@CHEAP
@given(
    gate_at=NUMBERS,
    sp=st.integers(-3, 5),
    fi=st.integers(-3, 5),
    warm_up=st.integers(-3, 5),
    tolerance=NUMBERS,
    auto=st.booleans(),
)
def test_settings_outside_their_range_are_named(
    pack: Any, gate_at: float, sp: int, fi: int, warm_up: int, tolerance: float, auto: bool
) -> None:
    from fovea_attention.attention import tgate

    mode = tgate.Mode.AUTO if auto else tgate.Mode.FIXED
    right = {
        "gate_at": 0 < gate_at <= 1,
        "sp_interval": sp >= 1,
        "fi_interval": fi >= 1,
        "warm_up": warm_up >= 0,
        "tolerance": not auto or tolerance > 0,
    }
    try:
        tgate.TGateSettings(gate_at=gate_at, sp_interval=sp, fi_interval=fi, warm_up=warm_up, mode=mode, tolerance=tolerance)
    except ValueError as error:
        assert any(str(error).startswith(f"{name} is") for name, fits in right.items() if not fits)
    else:
        assert all(right.values())


@CHEAP
@given(name=st.sampled_from(["guide_until", "scale_factor", "scale_end", "overlap", "self_overlap", "sigma"]), value=NUMBERS)
def test_the_guiders_numbers(node_classes: Any, name: str, value: float) -> None:
    from fovea_attention.attention import excite
    from fovea_attention.attention.excite import losses as excite_losses

    fields = excite.ExciteSettings.__dataclass_fields__
    kind = excite.ExciteSettings if name in fields else excite_losses.LossSettings
    assume(name in kind.__dataclass_fields__)
    try:
        made = kind(**{name: value})
    except ValueError as error:
        assert name in str(error)
    else:
        assert math.isfinite(getattr(made, name))


@CHEAP
@given(text=st.one_of(st.text(max_size=40), st.text(alphabet="0123456789.:, -einfa", max_size=40)))
@example("0:nan")
@example("inf:0.5")
def test_thresholds(pack: Any, text: str) -> None:
    from fovea_attention.attention.excite import parse_thresholds

    try:
        found = parse_thresholds(text)
    except ValueError as error:
        assert str(error).startswith("thresholds, entry")
    else:
        assert all(0 <= fraction <= 1 and 0 <= wanted <= 1 for fraction, wanted in found)


@CHEAP
@given(text=st.one_of(st.text(max_size=30), st.text(alphabet="inputdlo.0123456789-,; ", max_size=40)))
def test_layers(pack: Any, text: str) -> None:
    from fovea_attention.attention.networks import parse_layers

    names = [*(f"input.{i}" for i in (1, 2, 4, 5)), "middle", *(f"output.{i}.{j}" for i in range(3, 6) for j in range(2))]
    try:
        found = parse_layers(text, names)
    except ValueError as error:
        assert str(error).startswith("layers names")
    else:
        assert found and found == [name for name in names if name in found]


@CHEAP
@given(text=st.one_of(st.text(max_size=30), st.text(alphabet="0123456789,: tabycn", max_size=30)))
def test_class_labels(pack: Any, text: str) -> None:
    from fovea_attention.attention.dit.labels import parse_labels

    try:
        found = parse_labels(text)
    except ValueError as error:
        assert "labels has" in str(error)
    else:
        assert all(index >= 0 for index in found)


# --- words ------------------------------------------------------------------------------------------------------------


@CHEAP
@given(text=WILD)
def test_brackets_mark_subjects_or_are_explained(pack: Any, text: str) -> None:
    from fovea_attention.attention.prompts import parse_subjects

    try:
        plain, subjects = parse_subjects(text)
    except ValueError as error:
        assert "ubject" in str(error) and "\\" in str(error)
    else:
        assert all(0 <= start < end <= len(plain) for start, end in subjects)
        assert not any(plain[start:end].isspace() for start, end in subjects)


@settings(CHEAP, max_examples=60)
@given(text=WILD, words=WILD, encoder=st.sampled_from(["sd1", "sdxl", "pixart"]))
def test_words_have_tokens_or_are_listed(pack: Any, text: str, words: str, encoder: str) -> None:
    from fovea_attention.attention.prompts import tokenize

    tokens = tokenize(tiny_text.tiny(encoder), text)
    try:
        found = tokens.find(words)
    except ValueError as error:
        assert "not in the prompt" in str(error) or "prompt" in str(error)
    else:
        for word in found:
            assert word.positions and all(0 <= position < 10_000 for position in word.positions)


# --- files ------------------------------------------------------------------------------------------------------------


def changed(data: st.DataObject, whole: bytes) -> bytes:
    """Cut, lengthened, or with some bytes of its first part (where the header is) replaced."""
    how = data.draw(st.sampled_from(["cut", "longer", "bytes", "length"]))
    if how == "cut":
        return whole[: data.draw(st.integers(0, len(whole) - 1))]
    if how == "longer":
        return whole + data.draw(st.binary(min_size=1, max_size=64))
    if how == "length":  # of the header: up to more memory than there is
        return data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little") + whole[8:]
    found = bytearray(whole)
    for at in data.draw(st.lists(st.integers(0, min(len(whole), 4000) - 1), min_size=1, max_size=8)):
        found[at] = data.draw(st.integers(0, 255))
    return bytes(found)


def test_changed_map_files(files: Any, maps: Any, tmp_path: Path) -> None:
    tensors, text = maps.state_dict()
    whole = save(tensors, text)

    @CHEAP
    @given(st.data())
    def check(data: st.DataObject) -> None:
        (tmp_path / "input" / "changed.attn.safetensors").write_bytes(changed(data, whole))
        try:
            loaded = files.FoveaLoadAttnMaps.execute("changed.attn.safetensors").args[0]
        except ValueError as error:
            assert "maps" in str(error) or "damaged" in str(error)
        else:
            loaded.heat()

    check()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_changed_dit_files(pack: Any, tmp_path: Path, suffix: str) -> None:
    from fovea_attention.attention.dit import read_dit

    weights = bare(tiny())
    path = tmp_path / f"dit{suffix}"
    if suffix == ".pt":
        torch.save(weights, path)
    else:
        path.write_bytes(save(weights))
    whole = path.read_bytes()

    @CHEAP
    @given(st.data())
    def check(data: st.DataObject) -> None:
        path.write_bytes(changed(data, whole))
        try:
            read_dit(str(path))
        except ValueError as error:
            assert str(error).startswith(path.name)

    check()


class Planted:
    """A pickle that would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "it ran"))


@pytest.mark.parametrize("layout", ["alone", "beside weights", "in the arguments", "old format"])
def test_code_in_a_checkpoint_does_not_run(pack: Any, tmp_path: Path, layout: str) -> None:
    from fovea_attention.attention.dit import read_dit

    mark, path = tmp_path / "mark", tmp_path / "dit.pt"
    planted = Planted(mark)
    content = {
        "alone": planted,
        "beside weights": {**bare(tiny()), "extra": planted},
        "in the arguments": {"ema": bare(tiny()), "args": planted},
        "old format": planted,
    }[layout]
    if layout == "old format":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="dit.pt"):
        read_dit(str(path))
    assert not mark.exists()


PREFIXES = st.one_of(st.text(max_size=30), st.text(alphabet="./\\~%:ab\0$" + string.digits, max_size=30))


def test_no_prefix_leaves_the_output_folder(files: Any, tmp_path: Path) -> None:
    output = tmp_path / "output"

    @CHEAP
    @given(prefix=PREFIXES)
    def check(prefix: str) -> None:
        try:
            path = files._new_file(prefix, torch.zeros(1, 8, 8, 3))
        except ValueError as error:
            assert str(error).startswith("filename_prefix")
        else:
            assert path.is_relative_to(output.resolve())

    check()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input", "output", "temp"]


# --- whole runs ---------------------------------------------------------------------------------------------------------


@COSTLY
@given(st.data())
def test_runs_end_with_a_image(node_classes: Any, data: st.DataObject) -> None:
    """Any steps, gate, intervals, size and batch, with T-GATE and capture on one model."""
    steps = data.draw(st.integers(1, 6), "steps")
    size = (data.draw(st.integers(2, 6), "height") * 2, data.draw(st.integers(2, 6), "width") * 2)
    model = node_classes["TGateCache"].execute(
        small_model(),
        gate_at=data.draw(st.sampled_from([1e-6, 0.2, 0.5, 0.99, 1.0]), "gate_at"),
        sp_interval=data.draw(st.integers(1, 100), "sp_interval"),
        fi_interval=data.draw(st.integers(1, 100), "fi_interval"),
        warm_up=data.draw(st.integers(0, 100), "warm_up"),
    )[0]
    megabytes, self_attention = data.draw(st.sampled_from([1, 16, 512]), "max_memory_mb"), data.draw(st.booleans(), "self")
    capture = node_classes["AttnMapCapture"].execute
    model, handle = capture(model, max_memory_mb=megabytes, self_attention=self_attention).args[:2]
    latent = torch.zeros(data.draw(st.integers(1, 3), "batch"), 4, *size)
    image = sample(model, steps=steps, latent_image=latent)
    assert torch.isfinite(image).all()
    heat = handle.heat(prompt="positive")
    assert torch.isfinite(heat).all() and heat.min() >= 0
