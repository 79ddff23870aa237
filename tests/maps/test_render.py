"""Attention maps as images: colours, scales, captions and every kind of figure, for any size of input."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.newest

SIZES = [(64, 64), (1, 40), (40, 1), (30, 90), (700, 200)]


def drawing(name: str) -> Any:
    return importlib.import_module(f"fovea_attention.attention.maps.drawing.{name}")


@pytest.fixture(scope="module")
def render(pack: Any) -> Any:
    """What the tests draw with, from its five files."""
    names = {
        "scales": ["Normalize", "Scale", "scales"],
        "pixels": ["resize_heat"],
        "canvas": ["BACKGROUND", "number"],
        "overlay": ["Style", "blend", "draw_point"],
        "layouts": ["Cell", "captioned", "grid", "segments", "strip", "strip_columns"],
    }
    return SimpleNamespace(**{name: getattr(drawing(file), name) for file, found in names.items() for name in found})


@pytest.fixture(scope="module")
def colormaps(pack: Any) -> Any:
    return drawing("colormaps")


@pytest.fixture(scope="module")
def chart(pack: Any) -> Any:
    return drawing("chart")


@pytest.fixture(scope="module")
def text_font(pack: Any) -> Any:
    return drawing("fonts")


def picture(height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.rand(height, width, 3, generator=torch.Generator().manual_seed(height + width))


def blob(x: float, y: float, rows: int = 16, columns: int = 16) -> torch.Tensor:
    """A bump at a place given as fractions."""
    down, across = torch.meshgrid(torch.linspace(0, 1, rows), torch.linspace(0, 1, columns), indexing="ij")
    return torch.exp(-((across - x) ** 2 + (down - y) ** 2) / 0.02)


def ink(image: torch.Tensor, background: tuple[int, int, int]) -> torch.Tensor:
    """Where something was drawn on the sheet."""
    return (image - torch.tensor(background).div(255)).abs().amax(-1) > 0.1


# --- colours ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "place", "color"),
    [  # entries of the published tables of 256 colours
        ("turbo", 0, (48, 18, 59)),
        ("turbo", 128, (164, 252, 60)),
        ("turbo", 255, (122, 4, 3)),
        ("viridis", 0, (68, 1, 84)),
        ("viridis", 128, (33, 145, 140)),
        ("viridis", 255, (253, 231, 37)),
        ("jet", 0, (0, 0, 128)),
        ("jet", 128, (125, 255, 122)),
        ("jet", 255, (128, 0, 0)),
        ("gray", 100, (100, 100, 100)),
    ],
)
def test_palettes_are_the_published_ones(colormaps: Any, name: str, place: int, color: tuple[int, int, int]) -> None:
    found = colormaps.palette(colormaps.Colormap(name))[place] * 255
    assert (found - torch.tensor(color)).abs().max() <= 2.5


def test_every_palette_goes_from_low_to_high(colormaps: Any) -> None:
    for colormap in colormaps.Colormap:
        table = colormaps.palette(colormap)
        assert table.shape == (256, 3) and table.min() >= 0 and table.max() <= 1
        ends = colormaps.colorize(torch.tensor([-1.0, 0.0, 1.0, 7.0, math.nan]), colormap)
        assert torch.equal(ends, table[[0, 0, 255, 255, 0]])


def test_words_have_colours_of_their_own(colormaps: Any) -> None:
    colors = torch.tensor([colormaps.word_color(index) for index in range(75)])
    assert colors.shape == (75, 3) and colors.min() >= 0 and colors.max() <= 1
    first = torch.cdist(colors[:12], colors[:12]) + torch.eye(12)
    assert first.min() > 0.15, "the first words can be told apart"
    assert len(colors.unique(dim=0)) == 75


# --- scales -----------------------------------------------------------------------------------------------------------


def test_scales_of_each_word_of_all_words_and_of_none(render: Any) -> None:
    maps = [torch.tensor([[0.1, 0.2]]), torch.tensor([[0.0, 0.4]])]
    each, both, none = (render.scales(maps, render.Normalize(name)) for name in ("each word", "all words", "none"))
    assert [tuple(scale.apply(heat)[0].tolist()) for scale, heat in zip(each, maps, strict=True)] == [(0, 1), (0, 1)]
    assert [scale.apply(heat)[0].tolist() for scale, heat in zip(both, maps, strict=True)] == [pytest.approx([0.25, 0.5]), [0, 1]]
    assert [scale.apply(heat)[0].tolist() for scale, heat in zip(none, maps, strict=True)] == [
        pytest.approx([0.1, 0.2]),
        pytest.approx([0.0, 0.4]),
    ]


def test_a_flat_or_broken_map_is_cold_everywhere(render: Any) -> None:
    for heat in (torch.full((4, 4), 0.3), torch.zeros(4, 4), torch.full((2, 2), math.nan)):
        assert render.Scale.around(heat).apply(heat).nan_to_num(0).abs().max() == 0


def test_heat_grows_without_undershoot(render: Any) -> None:
    heat = torch.zeros(8, 8)
    heat[3, 3] = 1
    for size in ((64, 32), (3, 3), (1, 1), (8, 8)):
        grown = render.resize_heat(heat, size)
        assert tuple(grown.shape) == size and grown.min() >= 0


@pytest.mark.parametrize("name", ["opacity", "threshold"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_a_style_out_of_range_says_so(render: Any, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value:g}"):
        render.Style(**{name: value})


# --- heat over images -----------------------------------------------------------------------------------------------


def test_opacity_goes_from_the_image_to_the_heat(render: Any, colormaps: Any) -> None:
    shown, heat = picture(32, 48), blob(0.5, 0.5, 32, 48)
    assert torch.equal(render.blend(shown, heat, render.Style(opacity=0)), shown)
    only = render.blend(shown, heat, render.Style(opacity=1, threshold=0))
    assert torch.allclose(only, colormaps.colorize(heat, colormaps.Colormap.TURBO))
    between = render.blend(shown, heat, render.Style(opacity=0.5, threshold=0))
    changed = (between - shown).abs().sum(-1)
    assert changed[16, 24] > 0 and not torch.allclose(between, only)


def test_a_white_line_runs_along_the_threshold_only(render: Any) -> None:
    shown, heat = torch.zeros(64, 64, 3), blob(0.5, 0.5, 64, 64)
    plain = render.blend(shown, heat, render.Style(threshold=0))
    lined = render.blend(shown, heat, render.Style(threshold=0.5))
    line = (lined - plain).amin(-1) > 0.3
    assert line.any() and not line[32, 32] and not line[0, 0]
    values = heat[line]
    assert values.min() >= 0.5 and values.max() < 0.7
    for end in (0, 1):
        assert torch.equal(render.blend(shown, heat, render.Style(threshold=end)), plain)


def test_the_point_that_looks_is_marked(render: Any) -> None:
    for x, y in ((0.25, 0.75), (0, 0), (1, 1)):
        marked = render.draw_point(torch.full((100, 200, 3), 0.5), x, y)
        rows, columns = ((marked - 0.5).abs().amax(-1) > 0.1).nonzero(as_tuple=True)
        if 0 < x < 1:
            assert abs(rows.float().mean() - y * 99) < 2 and abs(columns.float().mean() - x * 199) < 2
        assert rows.numel() > 0


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_captioned_image_of_any_size_shows_it_whole_with_text_below(render: Any, size: tuple[int, int]) -> None:
    scale = render.Scale(0.001, 0.25)
    figure = render.captioned(picture(*size), "red frog", "20 steps", scale, render.Style())
    height, width = figure.image.shape[:2]
    panel = figure.panels[0]
    assert width >= 512 and max(panel.width, panel.height) >= 512
    assert abs(panel.width / panel.height - size[1] / size[0]) < 0.05 * size[1] / size[0] + 1 / panel.height
    assert 0 <= panel.x and panel.x + panel.width <= width and panel.y + panel.height < height
    written = ink(figure.image[panel.height :], render.BACKGROUND)
    assert written[:, : width // 2].any(), "the caption"
    assert written[:, width // 2 :].any(), "the colour bar"


def test_the_colour_bar_has_its_numbers(render: Any) -> None:
    """The same image with other numbers looks different only where the numbers are."""
    one, other = (
        render.captioned(picture(), "cat", "", scale, render.Style()) for scale in (render.Scale(0, 1), render.Scale(0, 0.5))
    )
    rows, columns = ((one.image - other.image).abs().amax(-1) > 0.1).nonzero(as_tuple=True)
    assert rows.min() > one.panels[0].height and columns.min() > one.image.shape[1] * 0.9


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.04336, "0.0434"), (1, "1"), (0.00001234, "1.2e-05"), (1234567, "1.2e+06"), (14.6146, "14.6")]
)
def test_numbers_are_short(render: Any, value: float, text: str) -> None:
    assert render.number(value) == text


@pytest.mark.parametrize("frames", [1, 2, 5, 8])
@pytest.mark.parametrize("size", [(64, 64), (1, 40), (90, 30)])
def test_a_strip_shows_every_frame_in_order(render: Any, frames: int, size: tuple[int, int]) -> None:
    cells = [render.Cell(torch.full((*size, 3), (at + 1) / frames), f"step {at}", "sigma 1") for at in range(frames)]
    figure = render.strip(cells, "cat", "", render.Scale(0, 1), render.Style())
    assert len(figure.panels) == frames
    for at, panel in enumerate(figure.panels):
        inside = figure.image[panel.y : panel.y + panel.height, panel.x : panel.x + panel.width]
        assert inside.shape[:2] == (panel.height, panel.width)
        assert abs(float(inside.mean()) - (at + 1) / frames) < 0.01
        below = figure.image[panel.y + panel.height : panel.y + panel.height + 40, panel.x : panel.x + panel.width]
        assert panel.width < 30 or ink(below, render.BACKGROUND).any(), "its step"
    places = [(panel.y, panel.x) for panel in figure.panels]
    assert places == sorted(places)


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (4, 4), (5, 3), (6, 3), (7, 4), (8, 4)])
def test_strips_have_no_nearly_empty_last_row(render: Any, count: int, columns: int) -> None:
    assert render.strip_columns(count, 1.0) == columns


def test_a_grid_keeps_the_edges_of_the_maps(render: Any) -> None:
    checks = (torch.arange(16).view(4, 4, 1) % 2).float().expand(4, 4, 3)
    rows = [[render.Cell(checks, corner="max 1") for _ in range(3)], [render.Cell(checks)]]
    figure = render.grid(rows, ["input.1", "output.11"], ["a", "b", "c"], "Layers", "")
    assert len(figure.panels) == 4
    panel = figure.panels[3]
    inside = figure.image[panel.y : panel.y + panel.height, panel.x : panel.x + panel.width]
    assert set(inside.unique().tolist()) == {0.0, 1.0}
    assert ink(figure.image[:, :120], render.BACKGROUND)[100:].any(), "the names of the rows"


def test_segments_are_painted_in_the_colours_of_the_legend(render: Any, colormaps: Any) -> None:
    labels = torch.full((40, 40), -1)
    labels[:, :10], labels[:, 30:] = 0, 1
    figure = render.segments(torch.zeros(40, 40, 3), labels, ["cat", "dog"], ["25 %", "25 %"], render.Style(opacity=1), "")
    left, middle, right = (figure.image[256, x] for x in (40, 256, 480))
    assert torch.allclose(left, torch.tensor(colormaps.word_color(0)), atol=0.01)
    assert torch.allclose(right, torch.tensor(colormaps.word_color(1)), atol=0.01)
    assert middle.max() == 0
    legend = figure.image[figure.panels[0].height :].reshape(-1, 3)
    for index in (0, 1):
        assert ((legend - torch.tensor(colormaps.word_color(index))).abs().amax(-1) < 0.01).sum() > 100


@pytest.mark.parametrize("count", [1, 30, 75])
def test_a_legend_of_many_words_fits(render: Any, count: int) -> None:
    labels = (torch.arange(64 * 64) % count).view(64, 64)
    words = [f"word{at}" if at % 7 else "supercalifragilisticexpialidocious" * 3 for at in range(count)]
    figure = render.segments(picture(), labels, words, ["1 %"] * count, render.Style(), "title")
    assert figure.image.shape[1] == 512
    assert not ink(figure.image[figure.panels[0].height :, -4:], render.BACKGROUND).any(), "nothing runs out of the sheet"


# --- charts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [1, 4, 75])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_charts_of_any_number_of_words_and_steps(chart: Any, render: Any, colormaps: Any, words: int, steps: int) -> None:
    series = [
        chart.Series(f"w{at}", colormaps.word_color(at), [(s + 1, math.nan if s == 0 else 1 / s + at / 9) for s in range(steps)])
        for at in range(words)
    ]
    figure = chart.line_chart(
        [chart.Plot("change", series)], "Convergence", "", "step", (1, max(steps, 2)), [chart.Marker(1.5, "gate")]
    )
    assert figure.image.shape[1] == 1024 and torch.isfinite(figure.image).all()
    near = (figure.image - torch.tensor(series[0].color)).abs().amax(-1) < 0.06
    assert near.sum() > 20, "the first word's line or its sign in the legend"


def test_a_line_goes_where_its_values_are(chart: Any) -> None:
    color = (0.0, 1.0, 0.0)
    rising = chart.Series("", color, [(1, 0.0), (11, 1.0)])
    figure = chart.line_chart([chart.Plot("", [rising])], "", "", "", (1, 11))
    rows, columns = ((figure.image - torch.tensor(color)).abs().amax(-1) < 0.2).nonzero(as_tuple=True)
    keep = columns > 110  # without the legend's sign
    slope = np.polyfit(columns[keep].numpy(), rows[keep].numpy(), 1)[0]
    assert slope < -0.1
    assert columns.max() > 980


def test_marks_at_round_numbers(chart: Any) -> None:
    assert chart.ticks(0, 0.83, 4) == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert chart.ticks(1, 25, 9, whole=True) == [5, 10, 15, 20, 25]
    assert chart.ticks(1, 2, 9, whole=True) == [1, 2]
    assert len(chart.ticks(1, 1000, 9, whole=True)) <= 10


# --- text -------------------------------------------------------------------------------------------------------------


def test_text_is_cut_to_its_room(text_font: Any) -> None:
    font = text_font.font_for("cat", 16)
    assert text_font.fit("cat", font, 500) == "cat"
    cut = text_font.fit("a very long word indeed", font, 80)
    assert cut.endswith("...") and font.getlength(cut) <= 80
    assert text_font.fit("cat", font, 1) == ""


@pytest.mark.parametrize("text", ["猫", "🐸", "café", "", " ", "a\tb"])
def test_text_of_any_script_is_drawn_without_an_error(render: Any, text: str) -> None:
    figure = render.captioned(picture(), text, text, render.Scale(0, 1), render.Style())
    assert figure.image.shape[1] == 512
