"""SliME's slicing rule, as the authors' code has it and as the paper says: known grids, and references that list every grid."""

from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import SpecError
from model.views import Box, ViewSpec, plan_views

SIDE = 336


@pytest.mark.parametrize(
    ("width", "height", "columns", "rows"),
    [
        (336, 336, 1, 2),
        (500, 375, 2, 1),
        (640, 480, 2, 2),
        (672, 672, 2, 2),
        (1024, 768, 3, 2),
        (1920, 1080, 3, 2),
        (4000, 3000, 3, 2),
        (1024, 1024, 2, 3),
        (2000, 500, 5, 1),
        (3000, 300, 7, 1),
    ],
)
def test_grids_of_the_authors_code(width, height, columns, rows):
    plan = plan_views(width, height, SIDE, ViewSpec())
    assert (plan.columns, plan.rows) == (columns, rows)


def reference_grid(width, height, side, cap):
    """(columns, rows): most pixels kept, then least canvas wasted, then the fewest slices, then the fewest columns."""
    asked = min(ceil(width * height / side**2), cap)
    counts = [2, 3] if asked <= 2 else [asked - 1, asked, asked + 1]
    ranked = []
    for columns in range(1, cap + 2):
        for rows in range(1, cap + 2):
            if columns * rows not in counts:
                continue
            shrink = min(columns * side / width, rows * side / height)
            kept = min(int(width * shrink) * int(height * shrink), width * height)
            ranked.append((-kept, columns * rows * side * side - kept, columns * rows, columns, rows))
    return min(ranked)[3:]


sizes = st.integers(1, 6000)


@settings(max_examples=400, deadline=None)
@given(width=sizes, height=sizes, side=st.sampled_from([112, 224, 336, 384]), cap=st.integers(2, 12))
def test_any_size_gets_the_grid_of_the_reference(width, height, side, cap):
    plan = plan_views(width, height, side, ViewSpec(max_slices=cap))
    assert (plan.columns, plan.rows) == reference_grid(width, height, side, cap)


@settings(max_examples=200, deadline=None)
@given(width=sizes, height=sizes)
def test_the_image_is_scaled_to_fit_and_centred(width, height):
    plan = plan_views(width, height, SIDE, ViewSpec())
    canvas_width, canvas_height = SIDE * plan.columns, SIDE * plan.rows
    shrink = min(canvas_width / width, canvas_height / height)
    assert plan.scaled_width_px == pytest.approx(width * shrink, abs=1)
    assert plan.scaled_height_px == pytest.approx(height * shrink, abs=1)
    assert plan.scaled_width_px == canvas_width or plan.scaled_height_px == canvas_height
    assert 0 <= canvas_width - plan.scaled_width_px - 2 * plan.offset_x_px <= 1
    assert 0 <= canvas_height - plan.scaled_height_px - 2 * plan.offset_y_px <= 1


@settings(max_examples=200, deadline=None)
@given(width=st.integers(20, 4000), height=st.integers(20, 4000), x=st.floats(0, 1), y=st.floats(0, 1))
def test_a_point_of_the_image_lands_where_the_canvas_has_it(width, height, x, y):
    """Through the view that shows it, row by row from the left, against one affine map of the whole image onto the canvas."""
    plan = plan_views(width, height, SIDE, ViewSpec())
    point = Box(left=x * width, top=y * height, right=x * width, bottom=y * height)
    canvas_x = plan.offset_x_px + x * plan.scaled_width_px
    canvas_y = plan.offset_y_px + y * plan.scaled_height_px
    for number, view in enumerate(plan.local_views):
        assert (view.index, view.row, view.column) == (number + 1, number // plan.columns, number % plan.columns)
        landed = view.project(point)
        assert landed.left == pytest.approx(canvas_x - view.column * SIDE, abs=1e-6 * SIDE * plan.columns)
        assert landed.top == pytest.approx(canvas_y - view.row * SIDE, abs=1e-6 * SIDE * plan.rows)
    squashed = plan.global_view.project(point)
    assert (squashed.left, squashed.top) == (pytest.approx(x * SIDE, abs=1e-6), pytest.approx(y * SIDE, abs=1e-6))


def paper_grid(width, height, side, most):
    """Every grid of 1 to 6 columns and rows, by what it keeps of the picture and then by what it wastes."""
    best, best_kept, best_wasted = None, -1, None
    for columns in range(1, most + 1):
        for rows in range(1, most + 1):
            scale = min(side * columns / width, side * rows / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            wasted = side * columns * side * rows - kept
            if kept > best_kept or (kept == best_kept and wasted < best_wasted):
                best, best_kept, best_wasted = (columns, rows), kept, wasted
    return best


@given(width=st.integers(1, 3000), height=st.integers(1, 3000), side=st.sampled_from([56, 224, 336]), most=st.integers(1, 8))
@settings(deadline=None)
def test_the_paper_s_rule(width, height, side, most):
    plan = plan_views(width, height, side, ViewSpec.slime_paper(max_side=most))
    assert (plan.columns, plan.rows) == paper_grid(width, height, side, most)
    assert len(plan.local_views) <= most * most == ViewSpec.slime_paper(max_side=most).max_local_views


@pytest.mark.parametrize(("width", "height", "grid"), [(336, 336, (1, 1)), (1024, 768, (4, 3)), (4000, 3000, (6, 5)), (3000, 300, (6, 1))])
def test_the_paper_s_rule_on_known_sizes(width, height, grid):
    plan = plan_views(width, height, 336, ViewSpec.slime_paper())
    assert (plan.columns, plan.rows) == grid


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rule": "anyres"}, "found max_slices 6"),
        ({"rule": "anyres", "max_slices": None}, "found no grids"),
        ({"rule": "slime_paper", "max_slices": None, "max_side": 13}, "1..12, found 13"),
        ({"rule": "slime", "max_side": 3}, "found max_side 3"),
        ({"rule": "anyres", "max_slices": None, "grids": ((1, 2), (1, 2))}, "each once"),
        ({"rule": "anyres", "max_slices": None, "grids": ((0, 2),)}, "at least 1"),
        ({"rule": "anyres", "max_slices": None, "grids": ()}, "must list"),
    ],
)
def test_rules_that_cannot_be(values, message):
    with pytest.raises(SpecError, match=message):
        ViewSpec(**values)
