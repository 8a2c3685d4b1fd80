"""Collages of small named objects: pictographs in named colours, one or none in each ninth of the picture."""

import numpy as np

from workers.dataset.rendering.canvas import COLOURS, OBJECTS, Canvas, on_lattice
from workers.dataset.rendering.places import PLACES
from workers.dataset.samples import Turn

__all__ = ["draw"]


def draw(canvas: Canvas, rng: np.random.Generator) -> tuple[list[Turn], str]:
    """Draw five to eight different objects over faint large shapes.

    Args:
        canvas: where to draw.
        rng: every choice comes from here.

    Returns:
        All questions that the collage answers, and the licence of the pictographs.
    """
    width, height = canvas.image.size
    for _ in range(int(rng.integers(3, 7))):
        x, y = float(rng.uniform(0, width)), float(rng.uniform(0, height))
        reach = float(rng.uniform(60, 180))
        tint = tuple(int(level) for level in rng.integers(222, 244, size=3))
        canvas.polygon([(x + reach, y), (x, y + reach), (x - reach, y), (x, y - reach)], (tint[0], tint[1], tint[2]))
    num_objects = int(rng.integers(5, 9))
    ninths = rng.permutation(9)[:num_objects]
    names = [list(OBJECTS)[position] for position in rng.permutation(len(OBJECTS))[:num_objects]]
    colours = [list(COLOURS)[position] for position in rng.integers(0, len(COLOURS), size=num_objects)]
    turns: list[Turn] = []
    for ninth, name, colour in zip(ninths, names, colours, strict=True):
        row, column = divmod(int(ninth), 3)
        # A fifth of a third stays free at each side, so that a place is never in doubt.
        x = on_lattice((column + float(rng.uniform(0.2, 0.8))) * width / 3)
        y = on_lattice((row + float(rng.uniform(0.2, 0.8))) * height / 3)
        box = canvas.pictograph(x, y, name, int(rng.integers(27, 31)), colour)
        evidence = (box.left, box.top, box.right, box.bottom)
        place = PLACES[int(ninth)]
        turns.append(
            Turn(
                question=f"Which object is at the {place}?",
                answer=name,
                kind="collages/object at place",
                detail="small",
                evidence=evidence,
                shown=(name, colour),
            )
        )
        turns.append(
            Turn(
                question=f"Where is the {name}?",
                answer=place,
                kind="collages/place of object",
                detail="small",
                evidence=evidence,
                shown=(name, colour),
            )
        )
        turns.append(
            Turn(
                question=f"Which colour is the {name}?",
                answer=colour,
                kind="collages/colour of object",
                detail="small",
                evidence=evidence,
                shown=(name, colour),
            )
        )
        turns.append(
            Turn(
                question=f"Which colour is the object at the {place}?", answer=colour, kind="collages/colour at place", detail="large", evidence=None
            )
        )
        if colours.count(colour) == 1:
            turns.append(
                Turn(
                    question=f"Which object is {colour}?",
                    answer=name,
                    kind="collages/object of colour",
                    detail="small",
                    evidence=evidence,
                    shown=(name, colour),
                )
            )
    turns.append(Turn(question="How many objects are there?", answer=str(num_objects), kind="collages/count", detail="large", evidence=None))
    return turns, "DejaVu fonts licence"
