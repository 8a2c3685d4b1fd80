"""Whether a drawn thing can be read in a view: checked for every question by its geometry, with limits measured on the encoder.

The size of a glyph in a view is the geometric mean of its ink's width and height there, in view pixels: the global view squashes, so that a glyph may
be high enough and yet too narrow. Limits come from the encoder's card, which measures reading accuracy against this size.
"""

from math import sqrt

from model.views import Box, ViewPlan
from workers.dataset.samples import Turn
from workers.dataset.spec import LegibilitySpec

__all__ = ["glyph_size_px", "is_small_detail"]


def glyph_size_px(box: Box) -> float:
    """Geometric mean of a box's sides, in the pixels that the box is given in."""
    return sqrt(box.width_px * box.height_px)


def is_small_detail(turn: Turn, num_characters: int, plan: ViewPlan, limits: LegibilitySpec) -> bool:
    """Whether a question's evidence can be read in one local view and is too small to be read in the global one.

    Args:
        turn: a question with its evidence box in image pixels.
        num_characters: characters side by side in the evidence; 1 for a pictograph.
        plan: the image's views.
        limits: readable from and unreadable below, in view pixels.

    Returns:
        True when a local view holds the whole evidence at `local_min_px` or more a character, and the global view shows it at less than
        `global_max_px`.
    """
    if turn.evidence is None:
        return False
    left, top, right, bottom = turn.evidence
    glyph = Box(left=left, top=top, right=left + (right - left) / num_characters, bottom=bottom)
    whole = Box(left=left, top=top, right=right, bottom=bottom)
    readable = any(view.source.contains(whole) and glyph_size_px(view.project(glyph)) >= limits.local_min_px for view in plan.local_views)
    return readable and glyph_size_px(plan.global_view.project(glyph)) < limits.global_max_px
