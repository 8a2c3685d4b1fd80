"""Pure geometry: which views of an image an encoder sees, and where a box of the image lands in each.

One global view (the whole image as the encoder's square, squashed or padded) and a grid of local views (the image scaled, keeping its aspect,
centred on a black canvas, and cut row by row). Inputs are sizes in pixels, outputs are plans: nothing here touches pixels, so a node without torch,
numpy or Pillow can plan. Invariant: the local views tile the canvas exactly, without gap or overlap.

Source: SliME (arXiv 2406.08487), its slicing rule as the authors' code and as the paper has it; LLaVA-NeXT's AnyRes.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, isqrt
from typing import Literal, assert_never

from model.errors import SpecError

__all__ = ["LLAVA_NEXT_GRIDS", "Box", "View", "ViewPlan", "ViewSpec", "most_square_grid", "plan_views"]

Branch = Literal["global", "local"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """An axis-aligned rectangle, in pixels of whatever it is said to be in; right and bottom are exclusive."""

    left: float
    top: float
    right: float
    bottom: float

    def __post_init__(self) -> None:
        if not (self.left <= self.right and self.top <= self.bottom):
            raise SpecError(f"a box needs left <= right and top <= bottom, found {self}")

    @property
    def width_px(self) -> float:
        """Width in pixels."""
        return self.right - self.left

    @property
    def height_px(self) -> float:
        """Height in pixels."""
        return self.bottom - self.top

    def contains(self, other: "Box", *, tolerance_px: float = 1e-6) -> bool:
        """Whether `other` lies inside this box, borders included."""
        return (
            other.left >= self.left - tolerance_px
            and other.top >= self.top - tolerance_px
            and other.right <= self.right + tolerance_px
            and other.bottom <= self.bottom + tolerance_px
        )


LLAVA_NEXT_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""(columns, rows) of LLaVA-NeXT's five canvases, in its order: 336x672, 672x336, 672x672, 1008x336, 336x1008 px at views of 336."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewSpec:
    """How views are cut from an image. Part of a cache's identity.

    Raises:
        SpecError: a rule without what it needs, or with what another one needs.
    """

    rule: Literal["slime", "slime_paper", "anyres"] = "slime"
    """`slime`: SliME's code; the area asks for a number of slices, `max_slices` at most, and one fewer and one more are tried. `slime_paper`: every
    grid of 1 to `max_side` columns and rows, as the paper says. `anyres`: the `grids` that are listed, as in LLaVA-NeXT."""
    max_slices: int | None = 6
    max_side: int | None = None
    grids: tuple[tuple[int, int], ...] | None = None
    """(columns, rows), the first of equally good ones wins."""
    global_fit: Literal["squash", "pad"] = "squash"
    """How the whole image becomes a square. `squash`: both sides scaled by themselves, as in SliME's code. `pad`: laid on a square of the encoder's
    mean colour, as in LLaVA and SliME's paper."""

    @classmethod
    def slime(cls, *, max_slices: int = 6, global_fit: Literal["squash", "pad"] = "squash") -> "ViewSpec":
        """The rule of SliME's code: 2 to `max_slices` + 1 local views."""
        return cls(rule="slime", max_slices=max_slices, global_fit=global_fit)

    @classmethod
    def slime_paper(cls, *, max_side: int = 6, global_fit: Literal["squash", "pad"] = "pad") -> "ViewSpec":
        """The rule of SliME's paper: 1 to `max_side` columns and rows."""
        return cls(rule="slime_paper", max_slices=None, max_side=max_side, global_fit=global_fit)

    @classmethod
    def anyres(cls, *, grids: tuple[tuple[int, int], ...] = LLAVA_NEXT_GRIDS, global_fit: Literal["squash", "pad"] = "squash") -> "ViewSpec":
        """LLaVA-NeXT's rule: the best of a list of grids."""
        return cls(rule="anyres", max_slices=None, grids=grids, global_fit=global_fit)

    @property
    def candidate_grids(self) -> tuple[tuple[int, int], ...]:
        """Every grid (columns, rows) that some image can get."""
        match self.rule:
            case "slime":
                assert self.max_slices is not None
                return tuple(grid for count in range(2, self.max_slices + 2) for grid in _factor_pairs(count))
            case "slime_paper":
                assert self.max_side is not None
                sides = range(1, self.max_side + 1)
                return tuple((columns, rows) for columns in sides for rows in sides)
            case "anyres":
                assert self.grids is not None
                return self.grids
            case _:
                assert_never(self.rule)

    @property
    def max_local_views(self) -> int:
        """Local views of an image at most."""
        return max(columns * rows for columns, rows in self.candidate_grids)

    def __post_init__(self) -> None:
        needed = {"slime": "max_slices", "slime_paper": "max_side", "anyres": "grids"}
        for rule, name in needed.items():
            if (getattr(self, name) is not None) != (rule == self.rule):
                found = getattr(self, name)
                raise SpecError(
                    f"views.rule = {self.rule}: found {name} {found}; allowed: {needed[self.rule]}, and not {name}"
                    if rule != self.rule
                    else f"views.rule = {self.rule}: found no {name}, which it needs"
                )
        if self.max_slices is not None and not 2 <= self.max_slices <= 48:
            raise SpecError(f"views.max_slices must lie in 2..48, found {self.max_slices}")
        if self.max_side is not None and not 1 <= self.max_side <= 12:
            raise SpecError(f"views.max_side must lie in 1..12, found {self.max_side}")
        if self.grids is not None and (not self.grids or len(set(self.grids)) != len(self.grids) or min(min(grid) for grid in self.grids) < 1):
            raise SpecError(f"views.grids must list [columns, rows] of at least 1, each once; found {[list(grid) for grid in self.grids]}")


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One square picture that the encoder sees."""

    branch: Branch
    index: int
    """0 for the global view; local views count from 1, row by row."""
    row: int
    column: int
    source: Box
    """What this view shows, in pixels of the original image. Parts outside of the image are padding: black in local views, the mean colour in the
    global one."""
    view_px: int

    def project(self, box: Box) -> Box:
        """Where a box of the original image lands, in this view's pixels. May lie outside of the view.

        Args:
            box: in pixels of the original image.

        Returns:
            The box in pixels of this view; both axes are scaled by themselves, since the global view squashes.
        """
        scale_x = self.view_px / self.source.width_px
        scale_y = self.view_px / self.source.height_px
        return Box(
            left=(box.left - self.source.left) * scale_x,
            top=(box.top - self.source.top) * scale_y,
            right=(box.right - self.source.left) * scale_x,
            bottom=(box.bottom - self.source.top) * scale_y,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewPlan:
    """All views of one image: the global one and the grid of local ones."""

    image_width_px: int
    image_height_px: int
    view_px: int
    rows: int
    columns: int
    scaled_width_px: int
    """Width of the image once scaled into the local canvas."""
    scaled_height_px: int
    offset_x_px: int
    """Black columns left of the scaled image on the canvas."""
    offset_y_px: int
    global_fit: Literal["squash", "pad"] = "squash"

    @property
    def canvas_width_px(self) -> int:
        """Width of the canvas that the local views tile."""
        return self.columns * self.view_px

    @property
    def canvas_height_px(self) -> int:
        """Height of the canvas that the local views tile."""
        return self.rows * self.view_px

    @property
    def global_view(self) -> View:
        """The whole image as a square: squashed, or with padding on two sides."""
        width, height = self.image_width_px, self.image_height_px
        side_x, side_y = (max(width, height),) * 2 if self.global_fit == "pad" else (width, height)
        left, top = -((side_x - width) // 2), -((side_y - height) // 2)
        whole = Box(left=left, top=top, right=left + side_x, bottom=top + side_y)
        return View(branch="global", index=0, row=0, column=0, source=whole, view_px=self.view_px)

    @property
    def local_views(self) -> tuple[View, ...]:
        """The local views, row by row."""
        scale_x = self.scaled_width_px / self.image_width_px
        scale_y = self.scaled_height_px / self.image_height_px
        views = []
        for row in range(self.rows):
            for column in range(self.columns):
                left = (column * self.view_px - self.offset_x_px) / scale_x
                top = (row * self.view_px - self.offset_y_px) / scale_y
                source = Box(left=left, top=top, right=left + self.view_px / scale_x, bottom=top + self.view_px / scale_y)
                views.append(View(branch="local", index=1 + row * self.columns + column, row=row, column=column, source=source, view_px=self.view_px))
        return tuple(views)

    @property
    def views(self) -> tuple[View, ...]:
        """Global view first, then the local ones row by row: the order of every table and tensor."""
        return (self.global_view, *self.local_views)


def most_square_grid(count: int) -> tuple[int, int]:
    """Rows and columns of so many cells, as close to a square as the number allows, wider than high: 8 make 2 x 4, a prime number one row.

    Args:
        count: of cells, from 1 up.

    Returns:
        Rows, columns.
    """
    rows = next(rows for rows in range(isqrt(count), 0, -1) if count % rows == 0)
    return rows, count // rows


def _factor_pairs(count: int) -> tuple[tuple[int, int], ...]:
    return tuple((columns, count // columns) for columns in range(1, count + 1) if count % columns == 0)


def _slime_candidates(width_px: int, height_px: int, view_px: int, max_slices: int) -> tuple[tuple[int, int], ...]:
    """The grids that SliME's code compares for an image."""
    num_slices = min(ceil(width_px * height_px / view_px**2), max_slices)
    counts = (2, 3) if num_slices <= 2 else (num_slices - 1, num_slices, num_slices + 1)
    return tuple(grid for count in counts for grid in _factor_pairs(count))


def _best_grid(width_px: int, height_px: int, view_px: int, grids: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """(columns, rows) by LLaVA-NeXT's score, which SliME shares: most of the image kept, then least canvas wasted, then first in order."""

    def score(grid: tuple[int, int]) -> tuple[int, int]:
        columns, rows = grid
        scale = min(view_px * columns / width_px, view_px * rows / height_px)
        effective = min(int(width_px * scale) * int(height_px * scale), width_px * height_px)
        return effective, effective - view_px * columns * view_px * rows

    return max(grids, key=score)  # the first of equal ones


@lru_cache(maxsize=4096)  # sizes recur, and a batch asks for each several times: 38 us where a look takes 3
def plan_views(width_px: int, height_px: int, view_px: int, spec: ViewSpec) -> ViewPlan:
    """Plan the views of one image.

    Args:
        width_px: image width.
        height_px: image height.
        view_px: side of the encoder's square input.
        spec: the rule.

    Returns:
        The plan. It depends on nothing but the arguments.

    Raises:
        SpecError: a size below one pixel.

    Source: SliME section 2.1 and the authors' code (slices from the area, capped; grids by effective, then wasted pixels); LLaVA-NeXT for anyres.
    Differs: the view's side is an argument where SliME's code holds 336.
    """
    if min(width_px, height_px, view_px) < 1:
        raise SpecError(f"sizes must be at least 1 px, found image {width_px}x{height_px}, view {view_px}")
    match spec.rule:
        case "slime":
            assert spec.max_slices is not None
            grids = _slime_candidates(width_px, height_px, view_px, spec.max_slices)
        case "slime_paper" | "anyres":
            grids = spec.candidate_grids
        case _:
            assert_never(spec.rule)
    columns, rows = _best_grid(width_px, height_px, view_px, grids)
    # Same rounding as LLaVA-NeXT's resize-and-pad: the tight side fills the canvas, the other is rounded up and capped.
    scale_x = view_px * columns / width_px
    scale_y = view_px * rows / height_px
    if scale_x < scale_y:
        scaled_width = view_px * columns
        scaled_height = min(ceil(height_px * scale_x), view_px * rows)
    else:
        scaled_height = view_px * rows
        scaled_width = min(ceil(width_px * scale_y), view_px * columns)
    return ViewPlan(
        image_width_px=width_px,
        image_height_px=height_px,
        view_px=view_px,
        rows=rows,
        columns=columns,
        scaled_width_px=scaled_width,
        scaled_height_px=scaled_height,
        offset_x_px=(view_px * columns - scaled_width) // 2,
        offset_y_px=(view_px * rows - scaled_height) // 2,
        global_fit=spec.global_fit,
    )
