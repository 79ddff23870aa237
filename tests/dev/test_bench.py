"""The benchmarks themselves, on a tiny network: what they count and compare, not how long it took."""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from bench import cache, distill, dit, excite, gradient, launches, maps, overhead, page, pareto, peers, profile, scaling, tgate
from bench.memory import AllocatedMemory, HeldTensors, bytes_of
from bench.models import CPU, TINY
from environment import DEV

pytestmark = pytest.mark.newest

MIB = 2**20


@pytest.fixture(scope="module")
def setup() -> excite.Setup:
    """Our tiny model, and diffusers' pipeline with its weights."""
    pytest.importorskip("diffusers")
    return excite.Setup(TINY)


def dev_commands() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fovea_dev_commands", DEV / "__main__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_file_of_the_folder_is_a_benchmark_or_known_to_be_shared():
    commands = dev_commands()
    found = set(commands.benchmarks())
    assert {*map(page.benchmark_of, page.PARTS), "page"} == found
    assert all("def main(" in (DEV / "bench" / f"{name}.py").read_text(encoding="utf-8") for name in found)
    assert all((DEV / "bench" / f"{name}.py").is_file() for name in commands._SHARED_BY_BENCHMARKS)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("measure", [HeldTensors, AllocatedMemory])
def test_memory_is_what_was_made_and_held(measure, inference):
    before = torch.zeros(MIB // 4)
    with torch.inference_mode(inference), measure() as memory:
        first = before + 1
        second = first.view(2, -1) + 1
        first.mul_(2)  # a view and a change in place are no tensors of their own
        del first
        third = second * 2
        fourth = third * 2  # three of them now
        del second, third
    assert memory.peak == pytest.approx(3 * MIB, abs=1024)
    assert memory.kept == pytest.approx(MIB, abs=1024)
    assert bytes_of({"some": [fourth], "other": (fourth, "text")}) == 2 * MIB


def test_memory_has_what_a_graph_keeps():
    weights = torch.randn(256, 1024, requires_grad=True)
    memory = HeldTensors()
    memory.start()
    total = (weights * 2).exp().exp().sum()  # each exp keeps its result
    assert memory.kept == 2 * MIB + 4
    assert torch.autograd.grad(total, weights)[0].shape == weights.shape
    memory.stop()
    assert memory.peak >= 3 * MIB
    assert memory.kept <= 4  # of the graph, nothing


def test_only_the_allocator_knows_of_a_kernels_scratch():
    image, weights = torch.randn(1, 64, 32, 32), torch.randn(64, 64, 3, 3)
    with HeldTensors() as held:
        torch.nn.functional.conv2d(image, weights, padding=1)
    with AllocatedMemory() as allocated:
        torch.nn.functional.conv2d(image, weights, padding=1)
    assert held.peak == 4 * 64 * 32 * 32 <= allocated.peak


def test_both_sides_of_the_excite_benchmark_do_the_same_work(setup):
    case = excite.Case(TINY, size=128, steps=8, refinements=1)
    assert (case.guided, case.threshold_steps, case.steps_of(True), case.steps_of(False)) == (4, [0, 2, 3], [1], [4, 5, 6, 7])
    assert excite.check_networks(setup, case) < excite.SAME_NETWORK
    runs, forwards = excite.measure_time(setup, case, ["fast"], 1, say=lambda text: None)
    theirs, ours = runs["diffusers"][0], runs["ours, fast"][0]
    assert excite.difference(ours.latent, theirs.latent) < 1e-4
    # A step has one forward that keeps a graph, a refined step one more for the refinement and one to look at the result.
    assert theirs.passes.forwards == 8 + 3 * 2
    assert ours.passes.forwards == 1 + 3 * 2
    assert len(ours.passes.seconds) == len(theirs.passes.seconds) == 4 + 3
    assert len(ours.stamps) == len(theirs.stamps) == 1 + 8
    assert all(seconds is not None and math.isfinite(seconds) for seconds in ours.figures(case).values())
    text = excite.time_table(case, runs, forwards) + excite.count_table(case, runs)
    assert "| diffusers | 3 | 14 | 7 |" in text and "| ours, fast | 3 | 7 | 7 |" in text


def test_memory_of_the_excite_benchmark(setup):
    found = excite.measure_memory(setup, excite.Case(TINY, size=128))
    theirs, fast, low = (found[name] for name in ("diffusers", "ours, fast", "ours, low"))
    assert 0 < low.held < fast.held < theirs.held
    assert 0 < low.allocated < fast.allocated < theirs.allocated
    assert all(peaks.held <= peaks.allocated for peaks in found.values())
    assert all(peaks.step > peaks.allocated for peaks in (theirs, fast, low))
    assert found[excite.PLAIN_FORWARD].step is None
    assert excite.memory_table(found).count("100 %") == 3


def test_kinds_of_steps_that_a_short_run_lacks_are_left_out(setup):
    case = excite.Case(TINY, size=128, steps=1, refinements=0, guide_until=1.0)
    passes = excite.Passes()
    stamps, latent = setup.ours(case, passes, "fast")
    ran = excite.Ran(stamps, passes, latent)
    assert ran.figures(case)["guided step"] is None
    text = excite.time_table(case, {"diffusers": [ran], "ours, fast": [ran]}, {"forward, ours": excite.Timings([1.0])})
    assert "guided step" not in text and "1.00 (1.00 to 1.00)" in text


def test_maps_benchmark_on_a_unet():
    text, measured = maps.unet_part(TINY, 128, 2, 1)
    assert set(measured.sums) == set(maps.SETTINGS)
    assert measured.kept["capture, per_step off"] < measured.kept["capture"] < measured.kept["capture, self_attention on"]
    assert text.count("\n| capture") == 3 and "| plain |" in text


def test_maps_benchmark_on_the_embedded_model():
    text, measured = maps.embedded_part(1, 1)
    assert all(0 < size < 512 * MIB for size in measured.sums.values())
    assert "Embedded model" in text


def test_both_sides_of_the_distill_benchmark_do_the_same_work():
    setup, case = distill.Setup(TINY), distill.Case(TINY, size=64, steps=2, iterations=2)
    runs = distill.measure_time(setup, case, 1, say=lambda text: None)
    theirs = runs[distill.THEIRS][0]
    for ran in (runs[name][0] for name in (distill.FIRST, distill.AGAIN, distill.LOW)):
        first, latent = distill.difference(ran, theirs)
        assert first < 1e-5 and latent < 1e-2
        assert len(ran.distilling) == len(theirs.distilling) == 2 and 0 < sum(ran.distilling) < ran.whole
    text = distill.time_table(case, runs)
    assert f"| {distill.FIRST} |" in text and "1.00 (1.00 to 1.00)" in text
    peaks = distill.measure_memory(setup, case)
    for low, fast, others in zip(*(peaks[name].values() for name in (distill.LOW, distill.AGAIN, distill.THEIRS)), strict=True):
        assert 0 < low < fast < others
    assert "100 %" in distill.memory_table(peaks)


# --- T-GATE beside others -------------------------------------------------------------------------------------------------


def found_at(speed: float, psnr: float, name: str) -> pareto.Found:
    return pareto.Found(pareto.Variant(pareto.T_GATE, name), [True], 1.0, psnr, 1.0, (speed, speed, speed))


def test_the_front_is_what_no_other_beats():
    points = [
        found_at(1.0, 90, "a"),
        found_at(1.5, 20, "b"),
        found_at(1.4, 25, "c"),
        found_at(1.4, 22, "d"),
        found_at(1.3, 25, "e"),
    ]
    assert {name.removeprefix("T-GATE, ") for name in pareto.front(points)} == {"a", "b", "c"}


def test_similarity_of_images():
    from bench.similarity import peak_signal_to_noise, structural_similarity

    picture = torch.rand(2, 176, 176, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(peak_signal_to_noise(picture, picture + 0.1), torch.tensor(20.0), atol=1e-3)
    same, other = (structural_similarity(picture, each) for each in (picture, picture.roll(5, 1)))
    assert torch.allclose(same, torch.ones(2)) and (other < 0.9).all()


def test_a_variant_without_reuse_finds_no_attention_to_reuse(pack):
    from fovea_attention.attention.tgate import run

    found = run.attention_sites
    with next(variant for variant in pareto.VARIANTS if not variant.reuses).sampling():
        assert run.attention_sites(None) == []
    assert run.attention_sites is found


def test_pareto_on_the_embedded_model(tmp_path):
    """Every kind of variant runs, and is faster in the sense that it computes less."""
    chosen = [pareto.VARIANTS[0], *(next(one for one in pareto.VARIANTS[1:] if one.kind == kind) for kind in pareto.KINDS)]
    found = pareto.measure_images(chosen, 2, steps=8, cfg=5.0)
    assert [one.variant.kind for one in found] == [pareto.PLAIN, *pareto.KINDS]
    assert found[0].ms_ssim == pytest.approx(1) and all(
        one.psnr < 60 for one in found if one.variant.kind in ("T-GATE", "fewer steps")
    )
    pareto.plot(found, tmp_path / "front.svg")
    assert (tmp_path / "front.svg").read_text(encoding="utf-8").count("<svg") == 1
    written = pareto.report(found, 2, 1, steps=8, cfg=5.0)
    assert all(f"| {one.variant.name} |" in written for one in found)


# --- the others -------------------------------------------------------------------------------------------------------------


def test_both_sides_of_the_dit_benchmark_do_the_same_work():
    """Else it refuses to go on."""
    pytest.importorskip("diffusers")
    written = dit.report(dit.TINY, 64, 2, 1)
    assert all(f"| {side} |" in written for side in (dit.OURS, dit.GATED, dit.THEIRS))


def test_both_sides_of_the_t_gate_benchmark_do_the_same_work():
    """Else it refuses to go on: our 'as published' is the published schedule in diffusers."""
    pytest.importorskip("diffusers")
    shared = {"shape": "sd15", "tiny": True, "size": 128, "steps": 5, "embedded_steps": 5, "repeats": 1, "peer": []}
    args = argparse.Namespace(**shared, target=CPU)
    written = tgate.speed_of(tgate.networks(args)[0], args)
    assert all(f"| {side} |" in written for side in (tgate.PLAIN, tgate.AS_PUBLISHED, tgate.THEIR_PLAIN, tgate.THEIR_GATE))


@pytest.mark.parametrize("loss", [gradient.WORDS, gradient.STYLE])
@pytest.mark.parametrize("name", ["sd15", "pixart"])
def test_both_sides_of_the_gradient_benchmark_find_the_same(name, loss):
    """Else it refuses to go on."""
    shape = tgate.tiny(tgate.SHAPES[name])
    sides = gradient.Sides(tgate.host_network(shape), shape, shape.side(64), loss, CPU)
    sides.require_the_same()
    assert all(found.abs().max() > 0 for found in sides.found.values())


def test_memory_of_the_gradient_benchmark():
    sides = gradient.Sides(tgate.host_network(TINY), TINY, 64, gradient.WORDS, CPU)
    peaks = sides.peaks()
    for low, fast, plain in zip(*(peaks[side] for side in (gradient.LOW, gradient.FAST, gradient.PLAIN)), strict=True):
        assert 0 < low < fast < plain


def test_a_profile_counts_each_operation_once_and_what_is_read():
    weight, picture = torch.randn(8, 8, 3, 3), torch.randn(1, 8, 16, 16)
    found = profile.profile_of(lambda: float(torch.conv2d(picture, weight).sum()) + torch.zeros(2)[0].item(), CPU)
    assert found.reads == 2
    assert found.kinds["convolutions"] > 0 == found.kinds["attention"]
    assert sum(found.kinds.values()) < 1
    assert "| values read | 2 |" in profile.profiles_table({"one": found})


PACK = """
class Gate:
    RETURN_TYPES, FUNCTION = ("MODEL",), "apply"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "start_at": ("FLOAT", {"default": 0.5}), "rate": ("INT", {"default": 3})}}

    def apply(self, model, start_at, rate):
        return ((model, start_at, rate),)


class Sampler:
    RETURN_TYPES, FUNCTION = ("LATENT", "HEATMAP"), "sample"

    @classmethod
    def INPUT_TYPES(cls):
        names = ("model", "positive", "negative", "latent_image")
        return {"required": {name: (name.upper(),) for name in names}, "hidden": {"graph": "PROMPT", "own": "UNIQUE_ID"}}

    def sample(self, graph, own, **inputs):
        return [own, index] if (index := 1) in [used[1] for node in graph.values() for used in node["inputs"].values()] else None


NODE_CLASS_MAPPINGS = {"old": Gate, "gate": Gate, "sampler": Sampler}
NODE_DISPLAY_NAME_MAPPINGS = {"old": "Gate (deprecated)"}
"""


def test_another_pack_is_known_by_what_its_nodes_do(tmp_path, capsys):
    (tmp_path / "__init__.py").write_text(PACK, encoding="utf-8")
    named = [f"Other={tmp_path}"]

    class Model:
        def clone(self):
            return "a clone"

    assert tgate.peers(named)["Other"](Model()) == ("a clone", 0.4, 3)
    sampler = maps.peers(named)["Other"]
    assert peers.call(sampler) == ["1", 1]  # its second output is told to be in use
    assert dit.peers(named) == {} and "has no DiT nodes" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="not a folder of nodes"):
        tgate.peers([f"Other={tmp_path / 'nothing'}"])


def test_dit_sides_that_differ_are_not_compared(monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(dit, "NULL_CLASS", 0)  # theirs alone
    with pytest.raises(SystemExit, match="cannot be compared"):
        dit.runs(dit.TINY, 64, 2)


def test_the_packs_own_time_is_a_part_of_the_run_and_nothing_without_it():
    model = overhead.host_network(TINY)
    plain = overhead.per_step(lambda model: model, model, 3, repeats=1)
    gated = overhead.per_step(overhead.variants()["T-GATE Cache, defaults"], model, 3, repeats=1)
    assert plain == 0 and 0 < gated < 1000


def test_a_longer_run_reads_no_more_values():
    """On a GPU each read waits for all that was asked of it. Auto mode reads how far attention moved, until its gate."""
    model = overhead.host_network(TINY)
    plain = overhead.reads_per_step(lambda model: model, model, 5)
    reads = {name: overhead.reads_per_step(apply, model, 5) - plain for name, apply in overhead.variants().items()}
    auto = reads.pop("T-GATE Cache, auto")
    assert 0 < auto <= 1 and reads == dict.fromkeys(reads, 0)


def test_all_ways_to_read_a_tensor_are_counted():
    some = torch.ones(3)
    ways = [some[0].item, some.tolist, some.cpu, lambda: float(some[0]), lambda: bool(some[0] > 0), lambda: some.to("cpu")]
    ways += [lambda: some.to(device="cpu", dtype=torch.float16), some.numpy, lambda: torch.equal(some, some), some.nonzero]
    for number, way in enumerate(ways):
        with overhead.ValueReads() as reads:
            way()
            some.half(), some.to(torch.float64), some + 1
        assert reads.count >= 1, number
    with overhead.ValueReads() as reads:
        some.half(), some.to(torch.float64), some + 1
    assert reads.count == 0


def test_what_t_gate_keeps_is_a_mean_for_every_token_and_layer():
    """SD1.5 at 128 px: the tokens of each layer times its channels, in half precision."""
    kept = cache.measure(cache.SHAPES["sd15"], 128, 5, sp_interval=1)
    tokens_times_channels = 5 * (256 * 320 + 64 * 640 + 16 * 1280) + 4 * 1280
    assert kept.peak == kept.after_gate == 2 * tokens_times_channels
    assert cache.measure(cache.SHAPES["sd15"], 128, 10) == kept  # intervals: a mean of self-attention, until the gate stores
    of_both = cache.measure(cache.SHAPES["sd15"], 128, 10, cfg_after_gate="drop (keep negative, as published)")
    assert of_both.after_gate == kept.peak and of_both.peak == 2 * kept.peak
    smaller = cache.measure(cache.SHAPES["sdxl"], 512, 5, smaller=2, sp_interval=1)
    assert smaller == cache.measure(cache.SHAPES["sdxl"], 512, 5, sp_interval=1)


def test_a_straight_line_is_told_from_a_curve():
    assert scaling.line([1, 2, 4], [3, 5, 9]) == pytest.approx((1, 2, 0))
    assert scaling.line([1, 2, 4, 8], [1, 4, 16, 64])[2] > 0.1


@pytest.mark.parametrize(
    ("part", "sides"), [("maps", ("plain", "capture", "capture, 16 rows of words")), ("tgate", ("plain", "T-GATE", "off"))]
)
def test_launches_of_sampling_are_counted(part, sides, monkeypatch):
    monkeypatch.setattr(launches, "STEPS", 6)
    written = launches.written_parts([part], ["sd15"], 1, CPU)[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in written.splitlines() if line.startswith("| ")][1:]
    operations = {row[0]: int(row[-1].replace(",", "")) for row in rows}
    assert tuple(operations) == sides
    assert operations.get("off", operations["plain"]) == operations["plain"]
    assert operations.get("T-GATE", 0) < operations["plain"] < operations.get("capture", operations["plain"] + 1)


def test_every_series_runs():
    from scenes import evaluate

    for title, points in scaling.series(evaluate.load()[0]):
        amounts = [point.amount for point in points]
        assert amounts == sorted(set(amounts)) and len(amounts) > 2, title
        points[0].run()


# --- the page ---------------------------------------------------------------------------------------------------------------


def test_a_part_of_a_page_is_replaced_and_the_others_stay():
    once = page.with_part(page.with_part("", "distill", "first"), "excite", "nudged | 1.5 |")
    again = page.with_part(once, "distill", "second")
    assert page.part_of(again, "excite") == "nudged | 1.5 |" and page.part_of(again, "distill") == "second"
    assert again.index("nudged") < again.index("second") and "first" not in again
    assert page.part_of(again, "gradient") is None


def test_every_part_is_on_one_page():
    parts = [part for _, parts in page.CONTENTS.values() for part in parts]
    assert sorted(parts) == sorted(page.PARTS)


def test_commands_on_the_page_name_no_machine(tmp_path):
    words = ["--plot", f"{tmp_path}/docs/benchmarks/pareto.svg", "--peer", "Other=/some/where", "--daam", "/x/bin/python"]
    assert page.shown_command("pareto", words, tmp_path) == (
        "python dev bench pareto --plot docs/benchmarks/pareto.svg --peer Other=PATH --daam PYTHON"
    )


def test_a_trial_of_the_page_has_the_parts_of_the_real_one():
    def chosen(words: Sequence[str]) -> dict[str, str]:
        return {word: words[place + 1] for place, word in enumerate(words) if word in ("--parts", "--shape")}

    assert {*page.TINY} <= {*page.PARTS}
    assert {name: chosen(page.TINY[name]) for name in page.TINY} == {name: chosen(page.PARTS[name]) for name in page.TINY}


def test_a_part_for_want_of_daam_is_left_out(tmp_path, capsys):
    page.main(["--only", page.WITH_DAAM, "--pages", str(tmp_path / "pages")])
    assert "needs --daam" in capsys.readouterr().out
    assert not (tmp_path / "pages").exists()


FIGURES = re.compile(r"<!-- figures of ([\w, -]+) -->\n(.*?)<!-- end of figures -->", re.S)


def test_figures_in_the_docs_are_those_of_the_benchmarks():
    """Every number with decimals, and every percentage, between the marks of a page is in the part that it names."""
    pages = [DEV.parent / "README.md", *(DEV.parent / "docs").glob("*.md")]
    spans = [span for path in pages for span in FIGURES.findall(path.read_text(encoding="utf-8"))]
    assert {name for names, _ in spans for name in names.split(", ")} >= {
        "tgate", "tgate-sdxl", "tgate-pixart", "tgate-auto", "pareto", "cache", "gradient", "maps", "maps-daam", "excite",
        "distill", "dit",
    }  # fmt: skip
    for names, text in spans:
        measured = "\n".join(measured_part(name) for name in names.split(", "))
        for number in re.findall(r"\d+\.\d+|\d+ %", text):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", measured), f"{number} is not in the part {names}"


def measured_part(name: str) -> str:
    path = page.PAGES / f"{page.page_of(name)}.md"
    part = page.part_of(path.read_text(encoding="utf-8"), name)
    assert part is not None, f"{path.name} has no part {name}"
    return part
