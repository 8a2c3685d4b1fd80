"""Bar charts of real tables: each bar in its own colour, its value written small inside it."""

import numpy as np

from model.views import Box
from workers.dataset.rendering.canvas import COLOURS, LATTICE_PX, Canvas, load_font, on_lattice
from workers.dataset.rendering.material import load_tables
from workers.dataset.samples import Turn

__all__ = ["draw"]

_INK = (25, 25, 25)
_GRID = (215, 215, 215)


def draw(canvas: Canvas, rng: np.random.Generator) -> tuple[list[Turn], str]:
    """Draw one chart of four to six values.

    Args:
        canvas: where to draw.
        rng: every choice comes from here.

    Returns:
        All questions that the chart answers, and the licence of its table.
    """
    tables = load_tables()
    table = tables[int(rng.integers(len(tables)))]
    num_bars = int(rng.integers(4, 7))
    keys = list(table.values)
    chosen = [keys[position] for position in sorted(rng.choice(len(keys), size=num_bars, replace=False))]
    values = [table.values[key] for key in chosen]
    colours = [list(COLOURS)[position] for position in rng.permutation(len(COLOURS))[:num_bars]]
    width, height = canvas.image.size
    left, right, top, bottom = 40.0, width - 16.0, 44.0, height - 34.0
    canvas.prose(left, 10, table.title, load_font("sans", 16), _INK)
    for level in range(0, 101, 25):
        y = bottom - (bottom - top) * level / 100
        canvas.line([(left, y), (right, y)], _GRID, 1)
        canvas.prose(8, y - 7, str(level), load_font("sans", 11), _INK)
    slot_cells = int((right - left) / LATTICE_PX / num_bars)
    slot = LATTICE_PX * slot_cells
    # Bars stand evenly and each on a lattice centre: an odd number of cells has its middle there, an even one half a cell beside.
    first = 2 * LATTICE_PX + (0 if slot_cells % 2 else LATTICE_PX / 2)
    bar_width = slot * float(rng.uniform(0.62, 0.8))
    value_font = load_font("sans-bold", int(rng.integers(19, 21)))
    turns: list[Turn] = []
    for position, (key, value, colour) in enumerate(zip(chosen, values, colours, strict=True)):
        centre = first + slot * (position + 0.5)
        bar_top = bottom - (bottom - top) * value / 100
        canvas.rectangle(Box(left=centre - bar_width / 2, top=bar_top, right=centre + bar_width / 2, bottom=bottom), colour, outline=_INK)
        caption = key if len(key) <= 12 else key[:11] + "."
        caption_font = load_font("sans", 12)
        canvas.prose(centre - caption_font.getlength(caption) / 2, bottom + 6, caption, caption_font, _INK)
        # Black on light, white on dark, as charting tools choose.
        ink = (255, 255, 255) if sum(canvas.shade(colour)) < 330 else (0, 0, 0)
        box = canvas.text(centre, min(on_lattice(bar_top + 26), on_lattice(bottom - LATTICE_PX)), str(value), value_font, ink)
        evidence = (box.left, box.top, box.right, box.bottom)
        question = f"What value is written on the bar that is {colour}?"
        turns.append(Turn(question=question, answer=str(value), kind="charts/value", detail="small", evidence=evidence, shown=(str(value), colour)))
    tallest = [colour for value, colour in zip(values, colours, strict=True) if value == max(values)]
    lowest = [colour for value, colour in zip(values, colours, strict=True) if value == min(values)]
    if len(tallest) == 1:
        turns.append(Turn(question="Which colour is the tallest bar?", answer=tallest[0], kind="charts/tallest", detail="large", evidence=None))
    if len(lowest) == 1:
        turns.append(Turn(question="Which colour is the lowest bar?", answer=lowest[0], kind="charts/lowest", detail="large", evidence=None))
    turns.append(Turn(question="How many bars are there?", answer=str(num_bars), kind="charts/count", detail="large", evidence=None))
    turns.append(Turn(question="Which colour is the leftmost bar?", answer=colours[0], kind="charts/end", detail="large", evidence=None))
    turns.append(Turn(question="Which colour is the rightmost bar?", answer=colours[-1], kind="charts/end", detail="large", evidence=None))
    return turns, table.licence
