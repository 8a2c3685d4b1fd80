"""Merging: in which order the visual tokens of an image's local views follow each other, and where its lines end.

Input: a view plan and a local branch's spec. Output: places among the image's local tokens, which lie view by view, each view row by row; NEWLINE
where the learned newline stands. Nothing here touches a tensor: a merge is an order, so it costs nothing but the indexing step that the batch makes
anyway.

Source: SliME's patch merge (flat, spatial) and LLaVA-NeXT's (spatial_unpad with a newline), both as in the authors' code.
"""

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from model.specs import LocalBranchSpec
from model.views import ViewPlan, ViewSpec

__all__ = ["NEWLINE", "merged_order", "most_local_tokens", "unpadded_cells"]

NEWLINE = -1
"""Stands in an order where the learned newline comes."""


def merged_order(plan: ViewPlan, spec: LocalBranchSpec, num_patches: int) -> Int[NDArray[np.int64], "tokens"]:
    """The order of an image's local tokens in its sequence.

    Args:
        plan: of the image.
        spec: how to merge.
        num_patches: patches in a view.

    Returns:
        Places counted view by view from 0, or NEWLINE.
    """
    places = np.arange(plan.rows * plan.columns * spec.view_tokens(num_patches))
    if spec.merge == "flat":
        return places
    rows, columns = spec.view_grid(num_patches)
    canvas = places.reshape(plan.rows, plan.columns, rows, columns).transpose(0, 2, 1, 3).reshape(plan.rows * rows, plan.columns * columns)
    if spec.merge == "spatial_unpad":
        top, bottom, left, right = unpadded_cells(plan, rows)
        canvas = canvas[top:bottom, left:right]
    if spec.newline:
        canvas = np.concatenate([canvas, np.full((len(canvas), 1), NEWLINE)], axis=1)
    return np.ascontiguousarray(canvas.reshape(-1))


def unpadded_cells(plan: ViewPlan, grid: int) -> tuple[int, int, int, int]:
    """The part of the canvas of tokens that shows the picture and not its padding.

    Args:
        plan: of the image.
        grid: tokens on a side of a view.

    Returns:
        First line, one past the last, first column, one past the last.

    Source: LLaVA-NeXT's unpadding as transformers has it, roundings included: what is cut off is the same on both sides, so a line that shows
    padding in part may stay. Differs: at least one line and column stay, where theirs leaves nothing of a picture that is as thin as 72 to 1.
    """
    lines, columns = plan.rows * grid, plan.columns * grid
    width, height = plan.image_width_px, plan.image_height_px
    if width / height > columns / lines:
        padding = (lines - max(1, int(round(height * (columns / width), 7)))) // 2
        return padding, lines - padding, 0, columns
    padding = (columns - max(1, int(round(width * (lines / height), 7)))) // 2
    return 0, lines, padding, columns - padding


def most_local_tokens(views: ViewSpec, spec: LocalBranchSpec | None, num_patches: int) -> int:
    """Local tokens of an image at most, newlines included: what a sequence must have room for.

    Args:
        views: the rule.
        spec: the local branch; None makes none.
        num_patches: patches in a view.

    Returns:
        Number of tokens.
    """
    if spec is None:
        return 0
    view_tokens = spec.view_tokens(num_patches)
    line_ends = spec.view_grid(num_patches)[0] if spec.newline else 0
    return max(rows * (columns * view_tokens + line_ends) for columns, rows in views.candidate_grids)
