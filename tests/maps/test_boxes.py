"""`FoveaMaskBox`: the box around a mask, at every size, margin and place, and what it says where it cannot be as asked."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import pytest
import torch
from host_inprocess import host_node
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.newest

Marks = tuple[int, int, int, int]  # first column, first row, columns, rows


@pytest.fixture(scope="module")
def node(node_classes: dict[str, type]) -> Any:
    return node_classes["FoveaMaskBox"].execute


@pytest.fixture(scope="module")
def boxes(pack: Any) -> Any:
    return importlib.import_module("fovea_attention.attention.maps.boxes")


def mask_of(width: int, height: int, *marks: Marks, value: float = 1.0) -> torch.Tensor:
    """A MASK of one image with rectangles."""
    mask = torch.zeros(1, height, width)
    for x, y, columns, rows in marks:
        mask[:, y : y + rows, x : x + columns] = value
    return mask


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_the_box_is_inside_the_image_and_holds_the_marks(boxes: Any, data: st.DataObject) -> None:
    """With the margin that was asked for where there is room, no larger than it must be, and square where it can be."""
    width, height = data.draw(st.integers(1, 70), "width"), data.draw(st.integers(1, 70), "height")
    columns, rows = data.draw(st.integers(1, width), "columns"), data.draw(st.integers(1, height), "rows")
    left, top = data.draw(st.integers(0, width - columns), "left"), data.draw(st.integers(0, height - rows), "top")
    multiple = data.draw(st.integers(1, min(width, height, 16)), "multiple_of")
    margin = data.draw(st.sampled_from([0.0, 0.1, 0.25, 1.0, 10.0, 1e30]), "margin")
    square = data.draw(st.booleans(), "square")
    mask = mask_of(width, height, (left, top, columns, rows))
    box = boxes.box_around(mask, boxes.BoxSettings(margin, multiple_of=multiple, square=square))

    assert all(type(number) is int for number in (box.x, box.y, box.width, box.height))
    assert 0 <= box.x and box.x + box.width <= width and 0 <= box.y and box.y + box.height <= height
    assert box.width > 0 and box.width % multiple == 0 and box.height > 0 and box.height % multiple == 0
    grow = round(min(margin * max(columns, rows), 1000))
    fits = max(columns, rows) <= min(width, height) // multiple * multiple
    told = "; ".join(box.notes)
    assert ("not square" in told) == (square and box.width != box.height)
    assert not (square and fits) or box.width == box.height
    lost = False
    for start, size, first, marked, side in (
        (box.x, box.width, left, columns, width),
        (box.y, box.height, top, rows, height),
    ):
        most = side // multiple * multiple
        begin, end = max(first - grow, 0), min(first + marked + grow, side)
        if marked <= most:
            assert start <= first and first + marked <= start + size
        else:
            assert size == most and first <= start and start + size <= first + marked
            lost = True
        if not square:
            assert size == min(-(-(end - begin) // multiple) * multiple, most)
            assert end - begin > most or (start <= begin and end <= start + size)
    assert ("are left out" in told) == lost


def test_the_box_follows_the_object(node: Any) -> None:
    """The same object elsewhere has the same box elsewhere, away from the edges."""
    here = node(mask_of(256, 192, (100, 60, 20, 12)), multiple_of=1).args
    there = node(mask_of(256, 192, (150, 100, 20, 12)), multiple_of=1).args
    assert here == (95, 55, 30, 22) and there == (145, 95, 30, 22)


def result(output: Any) -> tuple[Any, ...]:
    """Return the outputs of a node of ComfyUI, which are defined in two ways."""
    return getattr(output, "args", output)


def test_core_nodes_crop_and_paste_with_it(node: Any) -> None:
    """What is cropped, scaled up and back, and pasted covers the marked pixels and no other place of the image."""
    scale = host_node("ImageScale")
    crop_mask, paste = (host_node(name, "comfy_extras.nodes_mask") for name in ("CropMask", "ImageCompositeMasked"))
    image, mask = torch.rand(1, 90, 150, 3), mask_of(150, 90, (111, 13, 25, 31))
    x, y, width, height = node(mask, square=True).args
    assert width == height == 48
    crop = image[:, y : y + height, x : x + width]
    (part,) = result(crop_mask(mask=mask, x=x, y=y, width=width, height=height))
    assert crop.shape == (1, 48, 48, 3) and part.sum() == mask.sum()
    (large,) = result(scale(image=1 - crop, upscale_method="nearest-exact", width=96, height=96, crop="disabled"))
    (back,) = result(scale(image=large, upscale_method="area", width=width, height=height, crop="disabled"))
    (pasted,) = result(paste(destination=image, source=back, x=x, y=y, resize_source=False, mask=part))
    assert torch.allclose(pasted, torch.where(mask[..., None] > 0, 1 - image, image), atol=1e-6)


@pytest.mark.parametrize("form", ["(h, w)", "(1, h, w)", "(1, 1, h, w)", "(1, h, w, 1)", "half", "bool"])
def test_every_form_of_a_mask(node: Any, form: str) -> None:
    mask = mask_of(64, 40, (24, 9, 10, 14))
    given_mask = {
        "(h, w)": mask[0], "(1, h, w)": mask, "(1, 1, h, w)": mask[None], "(1, h, w, 1)": mask[..., None],
        "half": mask.half(), "bool": mask > 0,
    }[form]  # fmt: skip
    assert node(given_mask, 0.0, multiple_of=1).args == (24, 9, 10, 14)


def test_several_masks_have_one_box(node: Any) -> None:
    masks = torch.cat([mask_of(64, 40, (4, 5, 6, 7)), mask_of(64, 40, (50, 20, 3, 4)), mask_of(64, 40)])
    assert node(masks, 0.0, multiple_of=1).args == (4, 5, 49, 19)
    assert node(masks[:, None], 0.0, multiple_of=1).args == (4, 5, 49, 19)


def test_a_threshold_counts_its_own_value(node: Any) -> None:
    mask = torch.maximum(mask_of(64, 64, (10, 10, 40, 40), value=0.5), mask_of(64, 64, (20, 20, 8, 8)))
    assert node(mask, 0.0, 0.5).args == (10, 10, 40, 40)
    assert node(mask, 0.0, 0.51).args == (20, 20, 8, 8)


def test_a_margin_gives_way_to_a_square_and_a_square_to_the_object(node: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="fovea")
    assert node(mask_of(512, 256, (200, 100, 200, 60)), 1.0, square=True).args == (172, 0, 256, 256)
    assert node(mask_of(512, 256, (100, 100, 400, 60)), 0.0, square=True).args == (100, 0, 400, 256)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "Box around a Mask: 256 x 256 pixels at x 172, y 0"
    assert lines[1].endswith("; not square: the image has no room for it")


@pytest.mark.parametrize(
    ("mask", "changed", "message"),
    [
        (mask_of(64, 64), {}, "mask marks nothing, .* highest value is 0, and threshold is 0.5. Lower threshold"),
        (mask_of(64, 64, (1, 1, 4, 4), value=0.25), {}, "highest value is 0.25"),
        (mask_of(64, 64, (1, 1, 4, 4), value=float("nan")), {}, "mask holds values that are no numbers"),
        (torch.ones(1, 64, 64, 3), {}, r"mask has the shape \(1, 64, 64, 3\)"),
        (torch.ones(0, 64, 64), {}, "mask has the shape"),
        (mask_of(64, 40, (1, 1, 4, 4)), {"multiple_of": 64}, "multiple_of is 64, .* 64 x 40 pixels. Use 40 or less"),
        (mask_of(64, 64, (1, 1, 4, 4)), {"multiple_of": 0}, "multiple_of is 0. Use 1"),
        (mask_of(64, 64, (1, 1, 4, 4)), {"margin": float("nan")}, "margin is nan. Use 0 or more"),
        (mask_of(64, 64, (1, 1, 4, 4)), {"margin": -0.1}, "margin is -0.1"),
        (mask_of(64, 64, (1, 1, 4, 4)), {"threshold": 0.0}, "threshold is 0. Use a value above 0"),
    ],
)  # fmt: skip
def test_bad_input_is_named_with_what_to_do(node: Any, mask: torch.Tensor, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        node(mask, **changed)
