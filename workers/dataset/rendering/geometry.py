"""Triangles drawn to scale: computed side lengths written on coloured tags, computed angles, lettered corners."""

from math import acos, degrees, hypot

import numpy as np

from model.views import Box
from workers.dataset.rendering.canvas import COLOURS, LATTICE_PX, Canvas, load_font
from workers.dataset.samples import Turn

__all__ = ["draw"]

_INK = (20, 20, 20)
_PX_PER_UNIT = 10.0
_STEPS = tuple((x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if x or y)
_LETTERS = "ABCDEFGHKLMNPRSTVXYZ"


def draw(canvas: Canvas, rng: np.random.Generator) -> tuple[list[Turn], str]:
    """Draw one triangle on squared paper, ten pixels to the unit.

    Args:
        canvas: where to draw.
        rng: every choice comes from here.

    Returns:
        All questions that the drawing answers, and its licence.
    """
    width, height = canvas.image.size
    for column in range(0, width, 28):
        canvas.line([(column, 0), (column, height)], (232, 238, 244), 1)
    for row in range(0, height, 28):
        canvas.line([(0, row), (width, row)], (232, 238, 244), 1)
    corners = _corners(width, height, rng)
    letters = [_LETTERS[position] for position in rng.permutation(len(_LETTERS))[:3]]
    colours = [list(COLOURS)[position] for position in rng.permutation(len(COLOURS))[:3]]
    centre = (sum(x for x, _ in corners) / 3, sum(y for _, y in corners) / 3)
    turns: list[Turn] = []
    lengths = []
    for side in range(3):
        canvas.line([corners[side], corners[(side + 1) % 3]], colours[side], 6)
    tag_font = load_font("sans-bold", 20)
    for side in range(3):
        (x0, y0), (x1, y1) = corners[side], corners[(side + 1) % 3]
        length = round(hypot(x1 - x0, y1 - y0) / _PX_PER_UNIT)
        lengths.append(length)
        middle_x, middle_y = (x0 + x1) / 2, (y0 + y1) / 2
        tag = Box(left=middle_x - 16, top=middle_y - 13, right=middle_x + 16, bottom=middle_y + 13)
        canvas.rectangle(tag, colours[side], outline=_INK, radius_px=4)
        ink = (255, 255, 255) if sum(canvas.shade(colours[side])) < 330 else (0, 0, 0)
        box = canvas.text(middle_x, middle_y, str(length), tag_font, ink)
        turns.append(
            Turn(
                question=f"How long is the side that is {colours[side]}?",
                answer=str(length),
                kind="geometry/length",
                detail="small",
                evidence=(box.left, box.top, box.right, box.bottom),
                shown=(str(length), colours[side]),
            )
        )
    letter_font = load_font("sans-bold", 26)
    letter_boxes = []
    for (x, y), letter in zip(corners, letters, strict=True):
        outward = (x - centre[0], y - centre[1])
        step_x, step_y = max(_STEPS, key=lambda step: (step[0] * outward[0] + step[1] * outward[1]) / hypot(*step))
        box = canvas.text(x + step_x * LATTICE_PX, y + step_y * LATTICE_PX, letter, letter_font, _INK)
        letter_boxes.append((box.left, box.top, box.right, box.bottom))
    for word, corner in _named_corners(corners):
        turns.append(
            Turn(
                question=f"Which letter marks the corner {word}?",
                answer=letters[corner],
                kind="geometry/letter",
                detail="small",
                evidence=letter_boxes[corner],
                shown=(letters[corner],),
            )
        )
        angle = _angle(corners, corner)
        exact = abs(angle - 90.0) < 0.5
        if exact or abs(angle - 90.0) >= 12.0:  # between them nobody could tell from the picture
            answer = "right" if exact else "acute" if angle < 90.0 else "obtuse"
            question = f"Is it acute, right or obtuse, the angle {word}?"
            turns.append(Turn(question=question, answer=answer, kind="geometry/angle", detail="large", evidence=None))
    longest = [colour for length, colour in zip(lengths, colours, strict=True) if length == max(lengths)]
    if len(longest) == 1 and max(lengths) - sorted(lengths)[-2] >= 3:
        turns.append(Turn(question="Which colour is the longest side?", answer=longest[0], kind="geometry/longest", detail="large", evidence=None))
    shortest = [colour for length, colour in zip(lengths, colours, strict=True) if length == min(lengths)]
    if len(shortest) == 1 and sorted(lengths)[1] - min(lengths) >= 3:
        turns.append(Turn(question="Which colour is the shortest side?", answer=shortest[0], kind="geometry/shortest", detail="large", evidence=None))
    return turns, "Apache-2.0 (drawn by Loupe)"


def _named_corners(corners: list[tuple[float, float]]) -> list[tuple[str, int]]:
    """The corners that a word tells from the others: at least 40 px further that way."""
    named = []
    for word, axis, sign in (("at the top", 1, 1), ("at the bottom", 1, -1), ("furthest left", 0, 1), ("furthest right", 0, -1)):
        order = sorted(range(3), key=lambda corner: sign * corners[corner][axis])
        if abs(corners[order[0]][axis] - corners[order[1]][axis]) >= 40:
            named.append((word, order[0]))
    return named


def _angle(corners: list[tuple[float, float]], corner: int) -> float:
    """The inner angle at a corner, in degrees."""
    x, y = corners[corner]
    (ax, ay), (bx, by) = corners[(corner + 1) % 3], corners[(corner + 2) % 3]
    cosine = ((ax - x) * (bx - x) + (ay - y) * (by - y)) / (hypot(ax - x, ay - y) * hypot(bx - x, by - y))
    return degrees(acos(max(-1.0, min(1.0, cosine))))


def _corners(width: int, height: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Three corners that make a triangle fit to be lettered; a third of them with a right angle."""
    # Odd and even lattice centres do not mix, so that the middle of every side is a lattice centre too.
    parity_x, parity_y = (int(parity) for parity in rng.integers(2, size=2))
    columns = range(2 + parity_x, width // LATTICE_PX - 2, 2)
    rows = range(2 + parity_y, height // LATTICE_PX - 2, 2)
    while True:
        places = [(columns[int(rng.integers(len(columns)))], rows[int(rng.integers(len(rows)))]) for _ in range(3)]
        if rng.random() < 1 / 3:
            (x0, y0), (x1, y1) = places[0], places[1]
            turn = 1 if rng.random() < 0.5 else -1
            places[2] = (x0 - (y1 - y0) * turn, y0 + (x1 - x0) * turn)
        corners = [((column + 0.5) * LATTICE_PX, (row + 0.5) * LATTICE_PX) for column, row in places]
        inside = all(2 * LATTICE_PX <= x <= width - 2 * LATTICE_PX and 2 * LATTICE_PX <= y <= height - 2 * LATTICE_PX for x, y in corners)
        sides = [hypot(corners[side][0] - corners[(side + 1) % 3][0], corners[side][1] - corners[(side + 1) % 3][1]) for side in range(3)]
        if inside and min(sides) >= 150 and min(_angle(corners, corner) for corner in range(3)) >= 25:
            return corners
