"""Maps of the contiguous United States with exact regions: some states coloured, a digit printed small on each."""

import numpy as np

from workers.dataset.rendering.canvas import COLOURS, Canvas, load_font
from workers.dataset.rendering.material import State, load_states
from workers.dataset.samples import Turn

__all__ = ["draw"]

_BORDER = (90, 90, 90)
_LAND = (228, 226, 220)
_MIN_RADIUS_DEGREES = 1.35
"""A state whose largest inner circle is smaller cannot carry a digit of 16 px at 11 px per degree."""


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
    large = [state for state in states if state.radius_degrees >= _MIN_RADIUS_DEGREES]
    chosen = [large[position] for position in rng.permutation(len(large))[: int(rng.integers(5, 8))]]
    colours = [list(COLOURS)[position] for position in rng.permutation(len(COLOURS))[: len(chosen)]]
    scale = width / 58.5 * float(rng.uniform(0.94, 1.0))
    shift_x = (width - 58.0 * scale) * float(rng.uniform(0.2, 0.8))
    shift_y = float(rng.uniform(20, 60))

    def project(longitude: float, latitude: float) -> tuple[float, float]:
        # Equirectangular with the standard parallel at 37 degrees: 1 / cos(37 deg) = 1.25.
        return shift_x + (longitude + 125.0) * scale, shift_y + (49.5 - latitude) * scale * 1.25

    fills = {state.name: colour for state, colour in zip(chosen, colours, strict=True)}
    for state in states:
        for ring in state.rings:
            canvas.polygon([project(*point) for point in ring], fills.get(state.name, _LAND), outline=_BORDER)
    font = load_font("sans-bold", int(rng.integers(20, 23)))
    turns: list[Turn] = []
    for state, colour in zip(chosen, colours, strict=True):
        digit = str(int(rng.integers(10)))
        ink = (255, 255, 255) if sum(canvas.shade(colour)) < 330 else (0, 0, 0)
        box = canvas.text(*project(*state.label), digit, font, ink)
        evidence = (box.left, box.top, box.right, box.bottom)
        by_colour = (f"What number is printed on the {colour} state?", f"Which number stands on the {colour} state?")[int(rng.integers(2))]
        turns.append(Turn(question=by_colour, answer=digit, kind="maps/number of colour", detail="small", evidence=evidence))
        turns.append(
            Turn(question=f"What number is printed on {state.name}?", answer=digit, kind="maps/number of state", detail="small", evidence=evidence)
        )
        turns.append(Turn(question=f"Which colour is {state.name}?", answer=colour, kind="maps/colour", detail="large", evidence=None))
    turns.append(Turn(question="How many states are coloured?", answer=str(len(chosen)), kind="maps/count", detail="large", evidence=None))
    turns.extend(_extremes(chosen, colours))
    return turns, "public domain (US Census Bureau)"


def _extremes(chosen: list[State], colours: list[str]) -> list[Turn]:
    """The coloured state furthest west and east, where no other comes within two degrees of it."""
    turns = []
    for word, sign in (("west", 1.0), ("east", -1.0)):
        ordered = sorted(zip(chosen, colours, strict=True), key=lambda pair: sign * pair[0].label[0])
        if abs(ordered[0][0].label[0] - ordered[1][0].label[0]) > 2.0:
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
