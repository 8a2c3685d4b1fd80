"""AnyRes against transformers' LLaVA-NeXT: the grid, the pixels of every tile, the order of tokens with its unpadding; and padded global views."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import unpad_image

from model.adapters import resized_grid
from model.errors import SpecError
from model.images import cut_views
from model.merging import NEWLINE, merged_order, most_local_tokens, unpadded_cells
from model.specs import CompressionSpec, LocalBranchSpec, SCISpec, SingleSpec, STISpec
from model.views import LLAVA_NEXT_GRIDS, ViewSpec, plan_views

SIDE = 28
SIZES = [(1, 1), (28, 28), (40, 28), (100, 37), (300, 61), (61, 300), (61, 61), (200, 199), (57, 29), (1024, 768)]


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def local_branch(**changes):
    values = {"fusion": SingleSpec(layer=1), "compression": None}
    return LocalBranchSpec(**(values | changes))


@given(width=st.integers(1, 3000), height=st.integers(1, 3000), side=st.sampled_from([14, 224, 336, 384]))
@settings(deadline=None)
def test_the_grid_is_llava_next_s(width, height, side):
    plan = plan_views(width, height, side, ViewSpec.anyres())
    pinpoints = [(rows * side, columns * side) for columns, rows in LLAVA_NEXT_GRIDS]
    assert (plan.rows * side, plan.columns * side) == tuple(select_best_resolution((height, width), pinpoints))


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_every_view_is_llava_next_s_to_the_pixel(width, height):
    image = picture(width, height)
    plan = plan_views(width, height, SIDE, ViewSpec.anyres())
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=[[rows * SIDE, columns * SIDE] for columns, rows in LLAVA_NEXT_GRIDS],
        do_rescale=False,
        do_normalize=False,
        do_center_crop=False,
    )
    theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
    assert np.array_equal(cut_views(image, plan), theirs.astype(np.uint8))


def slow_order(plan, rows, columns, merge, *, newline):
    """Line by line over the canvas, token by token."""
    places = []
    for line in range(plan.rows * rows):
        row = []
        for column in range(plan.columns * columns):
            view = line // rows * plan.columns + column // columns
            row.append((line, column, view * rows * columns + line % rows * columns + column % columns))
        places.append(row)
    if merge == "flat":
        return list(range(plan.rows * plan.columns * rows * columns))
    if merge == "spatial_unpad":
        raster = torch.tensor([[place for _, _, place in row] for row in places])[None]
        kept = set(unpad_image(raster, (plan.image_height_px, plan.image_width_px)).flatten().tolist())
        places = [[cell for cell in row if cell[2] in kept] for row in places]
        places = [row for row in places if row]
    return [place for row in places for place in [*(cell[2] for cell in row), *([NEWLINE] if newline else [])]]


@pytest.mark.parametrize("grid", [2, 3, 12])
@pytest.mark.parametrize(
    ("merge", "newline"), [("flat", False), ("spatial", False), ("spatial", True), ("spatial_unpad", False), ("spatial_unpad", True)]
)
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_order_of_tokens(width, height, merge, newline, grid):
    plan = plan_views(width, height, SIDE, ViewSpec.anyres())
    spec = local_branch(compression=CompressionSpec(queries=grid * grid), merge=merge, newline=newline)
    order = merged_order(plan, spec, 4)
    assert order.tolist() == slow_order(plan, grid, grid, merge, newline=newline)
    assert len(order) <= most_local_tokens(ViewSpec.anyres(), spec, 4)


@pytest.mark.parametrize(("queries", "rows", "columns"), [(6, 2, 3), (20, 4, 5), (5, 1, 5), (8, 2, 4)])
@pytest.mark.parametrize(("merge", "newline"), [("flat", False), ("spatial", False), ("spatial", True)])
def test_the_order_of_tokens_on_a_grid_that_is_no_square(queries, rows, columns, merge, newline):
    plan = plan_views(300, 500, SIDE, ViewSpec.anyres())
    spec = local_branch(compression=CompressionSpec(queries=queries), merge=merge, newline=newline)
    assert spec.view_grid(4) == (rows, columns)
    order = merged_order(plan, spec, 4)
    assert order.tolist() == slow_order(plan, rows, columns, merge, newline=newline)
    assert len(order) <= most_local_tokens(ViewSpec.anyres(), spec, 4)


@pytest.mark.parametrize("size", [(7000, 100), (100, 7000)])
def test_of_a_very_thin_picture_its_middle_stays(size):
    """At 2 x 6 tokens LLaVA-NeXT's unpadding leaves nothing of it."""
    plan = plan_views(*size, 336, ViewSpec.anyres())
    assert unpad_image(torch.zeros(1, plan.rows * 2, plan.columns * 2), size[::-1]).numel() == 0
    spec = local_branch(compression=CompressionSpec(queries=4), merge="spatial_unpad", newline=True)
    assert sum(place >= 0 for place in merged_order(plan, spec, 4)) == 2 * 6


def test_most_local_tokens_is_reached():
    spec = local_branch(merge="spatial_unpad", newline=True)
    assert most_local_tokens(ViewSpec.anyres(), spec, 4) == len(merged_order(plan_views(56, 56, SIDE, ViewSpec.anyres()), spec, 4)) == 4 * (4 + 1)
    assert most_local_tokens(ViewSpec.slime(), local_branch(compression=CompressionSpec(queries=144)), 576) == 7 * 144
    assert most_local_tokens(ViewSpec.slime_paper(), local_branch(compression=CompressionSpec(queries=144)), 576) == 36 * 144
    assert most_local_tokens(ViewSpec.slime(), None, 576) == 0


@given(width=st.integers(1, 4000), height=st.integers(1, 4000), grid=st.integers(1, 24))
@settings(deadline=None)
def test_unpadding_never_takes_everything(width, height, grid):
    plan = plan_views(width, height, 336, ViewSpec.anyres())
    top, bottom, left, right = unpadded_cells(plan, grid)
    theirs = unpad_image(torch.zeros(1, plan.rows * grid, plan.columns * grid), (height, width)).shape[1:]
    assert 0 < bottom - top == theirs[0] or theirs[0] == 0
    assert 0 < right - left == theirs[1] or theirs[1] == 0


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_padded_global_view_is_llava_s(width, height):
    """The picture on a square of the mean colour, centred (the odd pixel behind), then scaled as a whole."""
    image, colour = picture(width, height), (122, 116, 104)
    plan = plan_views(width, height, SIDE, ViewSpec.slime(global_fit="pad"))
    side = max(width, height)
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = colour
    for y in range(height):
        for x in range(width):
            square[y + (side - height) // 2, x + (side - width) // 2] = image.getpixel((x, y))
    expected = np.asarray(Image.fromarray(square).resize((SIDE, SIDE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(cut_views(image, plan, "global", mean_colour=colour)[0], expected)
    with pytest.raises(SpecError, match="pass mean_colour"):
        cut_views(image, plan, "global")


def test_what_the_padded_view_shows_is_where_its_plan_says():
    plan = plan_views(300, 100, SIDE, ViewSpec.slime(global_fit="pad"))
    whole = plan.global_view.source
    assert (whole.left, whole.top, whole.right, whole.bottom) == (0, -100, 300, 200)
    place = plan.global_view.project(whole)
    assert (place.left, place.bottom) == (0, SIDE)


@pytest.mark.parametrize(("grid", "output_grid"), [(24, 12), (27, 9), (8, 4), (5, 3), (4, 4), (3, 5)])
def test_resizing_is_bilinear_without_aligned_corners(grid, output_grid):
    tokens = torch.randn(2, grid * grid, 3, generator=torch.Generator().manual_seed(0))
    found = resized_grid(tokens, output_grid)
    scale = grid / output_grid

    def sources(place):
        centre = max((place + 0.5) * scale - 0.5, 0.0)
        first = min(int(centre), grid - 1)
        return [(first, 1 - (centre - first)), (min(first + 1, grid - 1), centre - first)]

    for b in range(2):
        for y in range(output_grid):
            for x in range(output_grid):
                expected = sum(wy * wx * tokens[b, sy * grid + sx] for sy, wy in sources(y) for sx, wx in sources(x))
                torch.testing.assert_close(found[b, y * output_grid + x], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"newline": True}, "merge = 'flat' does not have"),
        ({"fusion": STISpec(base=5, layers=(1,)), "merge": "spatial"}, "sti gives no square grid"),
        ({"compression": CompressionSpec(queries=6), "merge": "spatial_unpad"}, "6 queries form a grid of 2 x 3; use a square number"),
        ({"fusion": STISpec(base=5, layers=(1,)), "compression": CompressionSpec(queries=4)}, "fusion cannot be sti"),
        ({"fusion": STISpec(base=5, layers=(1,)), "output_grid": 2}, "which sti does not give"),
        ({"compression": CompressionSpec(queries=4), "output_grid": 2}, "leave one out"),
        ({"output_grid": 0}, "at least 1"),
    ],
)
def test_local_branches_that_cannot_be(values, message):
    with pytest.raises(SpecError, match=message):
        local_branch(**values)


def test_shared_projectors_need_equal_widths_and_not_equal_numbers_of_maps():
    from model.specs import ConnectorSpec, GlobalBranchSpec, MLPSpec

    sti = GlobalBranchSpec(fusion=STISpec(base=5, layers=(1, 2)), adapters=MLPSpec())
    assert ConnectorSpec(global_branch=sti, local_branch=local_branch()).blocks == ("global_mlp",)
    with pytest.raises(SpecError, match=r"made of 1 map\(s\) and one of the local branch of 3; set projector"):
        ConnectorSpec(global_branch=sti, local_branch=local_branch(fusion=SCISpec(base=5, layers=(1, 2))))
