"""`python dev eval tgate`: the same prompts and noise with and without T-GATE, kept and gone on with."""

from __future__ import annotations

import json

import pytest
from scenes import evaluate, evaluate_tgate

pytestmark = pytest.mark.newest

SETTINGS = ["--steps", "6", "--cfg", "5"]


def run(capsys, *words: str) -> str:
    evaluate_tgate.main([*SETTINGS, *words])
    return capsys.readouterr().out


def test_it_goes_on_where_it_was_and_its_table_is_of_what_was_found(pack, capsys, tmp_path):
    kept = tmp_path / "found.json"
    first = run(capsys, "--prompts", "1", "--json", str(kept))
    found = json.loads(kept.read_text())
    assert found["runs"]["plain"]["0"] == {"right": found["runs"]["plain"]["0"]["right"], "rows": 12.0, "psnr": None}
    default = found["runs"]["default"]["0"]
    assert default["rows"] <= 12 and default["psnr"] > 20
    found["runs"]["plain"]["0"]["rows"] = 24.0
    kept.write_text(json.dumps(found))
    again = run(capsys, "--prompts", "1", "--json", str(kept))
    assert "prompts\n" not in again.split("\n\n")[0] and f"{24 / default['rows']:.3f} |" in again
    assert f"| {default['psnr']:.1f} |" in first and "| default |" in first
    with pytest.raises(SystemExit, match="other settings"):
        evaluate_tgate.main(["--steps", "5", "--json", str(kept)])


def test_the_default_is_that_of_a_new_node(pack):
    model = evaluate.load()[0]
    new, old = evaluate_tgate.RUNS["default"](model), evaluate_tgate.RUNS["as published"](model)
    settings = [_settings(patched) for patched in (new, old)]
    assert [one.schedule.value for one in settings] == ["skip steps", "as published"]
    assert (settings[0].max_error, settings[0].gate_at) == (0.03, 0.4)


def _settings(patched):
    found = [
        getattr(wrapper, "__self__", None)
        for kinds in patched.wrappers.values()
        for wrappers in kinds.values()
        for wrapper in wrappers
    ]
    return next(one.settings for one in found if hasattr(one, "settings"))
