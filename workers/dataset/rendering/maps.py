"""Maps of the contiguous United States with exact regions: some states coloured, a digit printed small on each."""

import numpy as np
import shapely

from workers.dataset.rendering.canvas import COLOURS, LATTICE_PX, Canvas, load_font
from workers.dataset.rendering.material import State, load_states
from workers.dataset.samples import Turn

__all__ = ["draw"]

_BORDER = (90, 90, 90)
_LAND = (228, 226, 220)
_MIN_CLEARANCE_PX = 11.0
"""A digit of 26 px needs this much land around its centre."""


def draw(canvas: Canvas, rng: np.random.Generator) -> tuple[list[Turn], str]:
    """Draw one map with five to seven coloured states.

    Args:
        canvas: where to draw.
        rng: every choice comes from here.

    Returns:
        All questions that the map answers, and the licence of its boundaries.
    """
    width, _ = canvas.image.size
    states = load_states()
    scale = width / 58.5 * float(rng.uniform(0.94, 1.0))
    shift_x = (width - 58.0 * scale) * float(rng.uniform(0.2, 0.8))
    shift_y = float(rng.uniform(20, 60))

    def project(longitude: float, latitude: float) -> tuple[float, float]:
        # Equirectangular with the standard parallel at 37 degrees: 1 / cos(37 deg) = 1.25.
        return shift_x + (longitude + 125.0) * scale, shift_y + (49.5 - latitude) * scale * 1.25

    labels = {state.name: _label([project(*point) for point in state.rings[0]]) for state in states}
    roomy = [state for state in states if labels[state.name] is not None]
    chosen = [roomy[position] for position in rng.permutation(len(roomy))[: int(rng.integers(5, 8))]]
    colours = [list(COLOURS)[position] for position in rng.permutation(len(COLOURS))[: len(chosen)]]
    fills = {state.name: colour for state, colour in zip(chosen, colours, strict=True)}
    for state in states:
        for ring in state.rings:
            canvas.polygon([project(*point) for point in ring], fills.get(state.name, _LAND), outline=_BORDER)
    font = load_font("sans-bold", int(rng.integers(25, 28)))
    turns: list[Turn] = []
    for state, colour in zip(chosen, colours, strict=True):
        digit = str(int(rng.integers(10)))
        ink = (255, 255, 255) if sum(canvas.shade(colour)) < 330 else (0, 0, 0)
        label = labels[state.name]
        assert label is not None
        box = canvas.text(*label, digit, font, ink)
        evidence = (box.left, box.top, box.right, box.bottom)
        by_colour = f"What number is printed on the state that is {colour}?"
        turns.append(Turn(question=by_colour, answer=digit, kind="maps/number of colour", detail="small", evidence=evidence, shown=(digit, colour)))
        turns.append(
            Turn(
                question=f"What number is printed on {state.name}?",
                answer=digit,
                kind="maps/number of state",
                detail="small",
                evidence=evidence,
                shown=(digit, colour),
            )
        )
        turns.append(Turn(question=f"Which colour is {state.name}?", answer=colour, kind="maps/colour", detail="large", evidence=None))
    turns.append(Turn(question="How many states are coloured?", answer=str(len(chosen)), kind="maps/count", detail="large", evidence=None))
    turns.extend(_extremes(chosen, colours))
    return turns, "public domain (US Census Bureau)"


def _label(ring: list[tuple[float, float]]) -> tuple[float, float] | None:
    """The lattice centre that lies deepest inside a region, or None where none lies deep enough.

    Args:
        ring: the region's outline in image pixels.

    Returns:
        (x, y) in image pixels, or None.
    """
    region = shapely.Polygon(ring)
    left, top, right, bottom = region.bounds
    columns = np.arange(np.floor(left / LATTICE_PX), np.ceil(right / LATTICE_PX)) * LATTICE_PX + LATTICE_PX / 2
    rows = np.arange(np.floor(top / LATTICE_PX), np.ceil(bottom / LATTICE_PX)) * LATTICE_PX + LATTICE_PX / 2
    points = shapely.points(*(axis.ravel() for axis in np.meshgrid(columns, rows)))
    depths = np.where(shapely.contains(region, points), shapely.distance(region.exterior, points), 0.0)
    best = int(depths.argmax())
    return (float(points[best].x), float(points[best].y)) if depths[best] >= _MIN_CLEARANCE_PX else None


def _extremes(chosen: list[State], colours: list[str]) -> list[Turn]:
    """The coloured state furthest west and east, where no other comes within two degrees of it."""
    turns = []
    for word, sign in (("west", 1.0), ("east", -1.0)):
        ordered = sorted(zip(chosen, colours, strict=True), key=lambda pair: sign * pair[0].centre[0])
        if abs(ordered[0][0].centre[0] - ordered[1][0].centre[0]) > 2.0:
            turns.append(
                Turn(
                    question=f"Which colour is the coloured state furthest {word}?",
                    answer=ordered[0][1],
                    kind="maps/furthest",
                    detail="large",
                    evidence=None,
                )
            )
    return turns
