"""The truth about a picture, cut up the way an encoder sees it: per patch of a view, which named colours and which glyphs are there."""

from dataclasses import dataclass

import numpy as np

from model.views import Box, View
from workers.dataset.rendering.canvas import COLOURS, OBJECTS, Canvas, Mark
from workers.dataset.rendering.legibility import glyph_size_px

_MIN_OVERLAP = 0.2
"""Share of a glyph's ink box that a patch must hold to be labelled with it; a quarter is what four patches get of a glyph on their common corner."""

__all__ = ["COLOUR_CLASSES", "GLYPH_CLASSES", "READABLE_FROM_PX", "PlacedGlyph", "colour_shares", "place_glyphs"]

READABLE_FROM_PX = 6.0
"""Smaller glyphs carry no label and stand in no layout: at this size a view is not meant to show them legibly. It lies between the largest
glyph of the global views (5.8 px in a thousand pictures) and the smallest of the local ones (6.8 px)."""

COLOUR_CLASSES: tuple[str, ...] = tuple(COLOURS)

GLYPH_CLASSES: tuple[str, ...] = (
    *(f"{digit}@0" for digit in range(10)),
    *(f"{digit}@1" for digit in range(10)),
    *(chr(letter) for letter in range(ord("A"), ord("Z") + 1)),
    *OBJECTS,
)
"""Digits count twice, as the first and as the second character of a number: 27 is not 72."""

_GLYPH_NUMBERS = {name: number for number, name in enumerate(GLYPH_CLASSES)}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedGlyph:
    """A glyph in a view."""

    glyph: int
    """Place in GLYPH_CLASSES."""
    size_px: float
    """Geometric mean of its ink's sides, in view pixels."""
    patches: tuple[int, ...]
    """Patches (row-major) that hold enough of its ink box."""


def _glyph_number(mark: Mark) -> int | None:
    name = f"{mark.word}@{min(mark.role, 1)}" if mark.word.isdigit() else mark.word
    return _GLYPH_NUMBERS.get(name)


def place_glyphs(canvas: Canvas, view: View, grid: int) -> list[PlacedGlyph]:
    """Every recorded glyph whose centre lies in the view.

    Args:
        canvas: a drawn picture.
        view: one view of it.
        grid: cells on a side of the view.

    Returns:
        Glyphs of GLYPH_CLASSES with their sizes and patches.
    """
    cell_px = view.view_px / grid
    placed = []
    for mark in canvas.marks:
        number = _glyph_number(mark)
        box = view.project(mark.box)
        centre_x, centre_y = (box.left + box.right) / 2, (box.top + box.bottom) / 2
        if number is None or not (0 <= centre_x < view.view_px and 0 <= centre_y < view.view_px):
            continue
        area = max(box.width_px * box.height_px, 1e-9)
        rows = range(max(int(box.top // cell_px), 0), min(int(box.bottom // cell_px), grid - 1) + 1)
        columns = range(max(int(box.left // cell_px), 0), min(int(box.right // cell_px), grid - 1) + 1)
        patches = [row * grid + column for row in rows for column in columns if _overlap(box, row, column, cell_px) / area >= _MIN_OVERLAP]
        if patches:
            placed.append(PlacedGlyph(glyph=number, size_px=glyph_size_px(box), patches=tuple(patches)))
    return placed


def _overlap(box: Box, row: int, column: int, cell_px: float) -> float:
    width = min(box.right, (column + 1) * cell_px) - max(box.left, column * cell_px)
    height = min(box.bottom, (row + 1) * cell_px) - max(box.top, row * cell_px)
    return max(width, 0.0) * max(height, 0.0)


def colour_shares(canvas: Canvas, view: View, grid: int, samples_per_cell: int = 7) -> np.ndarray:
    """Share of each cell of a view that each named colour covers, by sampling the colour record on a regular lattice.

    Args:
        canvas: a drawn picture.
        view: one view of it.
        grid: cells on a side.
        samples_per_cell: lattice points on a side of a cell.

    Returns:
        float32 [grid * grid, colours].
    """
    raster = canvas.colour_raster
    height, width = raster.shape
    steps = (np.arange(grid * samples_per_cell) + 0.5) / (grid * samples_per_cell)
    x = np.floor(view.source.left + steps * view.source.width_px).astype(int)
    y = np.floor(view.source.top + steps * view.source.height_px).astype(int)
    inside = ((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))[None, :]
    picked = np.where(inside, raster[np.clip(y, 0, height - 1)[:, None], np.clip(x, 0, width - 1)[None, :]], 0)
    cells = picked.reshape(grid, samples_per_cell, grid, samples_per_cell).transpose(0, 2, 1, 3).reshape(grid * grid, -1)
    return np.stack([(cells == number).mean(axis=1) for number in range(1, len(COLOUR_CLASSES) + 1)], axis=1).astype(np.float32)
