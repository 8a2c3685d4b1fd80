"""Pure geometry: which views of an image an encoder sees, and where a box of the image lands in each.

One global view (the whole image squashed to the encoder's square) and a grid of local views (the image scaled, keeping its aspect, centred on a
black canvas, and cut row by row). Inputs are sizes in pixels, outputs are plans: nothing here touches pixels, so a node without torch, numpy or
Pillow can plan. Invariant: the local views tile the canvas exactly, without gap or overlap.

Source: SliME (arXiv 2406.08487), its slicing rule as the authors' code has it.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal, assert_never

from model.errors import SpecError

__all__ = ["Box", "View", "ViewPlan", "ViewSpec", "plan_views"]

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


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewSpec:
    """How views are cut from an image. Part of a cache's identity.

    Raises:
        SpecError: a number of slices that leaves no grid to choose from.
    """

    rule: Literal["slime"] = "slime"
    """`slime`: the authors' code. Between 2 and `max_slices + 1` local views."""
    max_slices: int = 6
    """Cap on the number of slices that the area asks for; the rule tries one fewer and one more as well."""

    @property
    def max_local_views(self) -> int:
        """Local views of an image at most."""
        return self.max_slices + 1

    def __post_init__(self) -> None:
        if not 2 <= self.max_slices <= 48:
            raise SpecError(f"views.max_slices must lie in 2..48, found {self.max_slices}")


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One square picture that the encoder sees."""

    branch: Branch
    index: int
    """0 for the global view; local views count from 1, row by row."""
    row: int
    column: int
    source: Box
    """What this view shows, in pixels of the original image. Parts outside of the image are black."""
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
        """The whole image, squashed to a square."""
        whole = Box(left=0, top=0, right=self.image_width_px, bottom=self.image_height_px)
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


def _slime_grid(width_px: int, height_px: int, view_px: int, max_slices: int) -> tuple[int, int]:
    """(columns, rows) by the authors' rule: most of the image kept, then least canvas wasted, then first in order."""
    num_slices = min(ceil(width_px * height_px / view_px**2), max_slices)
    counts = (2, 3) if num_slices <= 2 else (num_slices - 1, num_slices, num_slices + 1)
    best: tuple[int, int] | None = None
    best_score = (-1.0, 0.0)
    for count in counts:
        for columns in range(1, count + 1):
            if count % columns:
                continue
            rows = count // columns
            scale = min(view_px * columns / width_px, view_px * rows / height_px)
            scaled_area = int(width_px * scale) * int(height_px * scale)
            effective = min(scaled_area, width_px * height_px)
            wasted = view_px * columns * view_px * rows - effective
            score = (float(effective), -float(wasted))
            if score > best_score:
                best, best_score = (columns, rows), score
    assert best is not None
    return best


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

    Source: SliME section 2.1 and the authors' code (slices from the area, capped; grids by effective, then wasted pixels).
    Differs: the view's side is an argument where the authors' code holds 336.
    """
    if min(width_px, height_px, view_px) < 1:
        raise SpecError(f"sizes must be at least 1 px, found image {width_px}x{height_px}, view {view_px}")
    match spec.rule:
        case "slime":
            columns, rows = _slime_grid(width_px, height_px, view_px, spec.max_slices)
        case _:
            assert_never(spec.rule)
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
    )
