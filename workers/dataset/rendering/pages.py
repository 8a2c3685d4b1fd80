"""Pages of real text: paragraphs in two or three columns, each with a numbered tag in its own colour and a drop cap."""

import numpy as np

from model.views import Box
from workers.dataset.rendering.canvas import COLOURS, LATTICE_PX, Canvas, load_font
from workers.dataset.rendering.material import load_paragraphs
from workers.dataset.samples import Turn

__all__ = ["draw"]

_INK = (40, 40, 40)


def draw(canvas: Canvas, rng: np.random.Generator) -> tuple[list[Turn], str]:
    """Set one page of four or six paragraphs.

    Args:
        canvas: where to draw.
        rng: every choice comes from here.

    Returns:
        All questions that the page answers, and the licence of its text.
    """
    width, height = canvas.image.size
    paragraphs = load_paragraphs()
    num_columns = int(rng.integers(2, 4))
    num_paragraphs = 2 * num_columns
    colours = [list(COLOURS)[position] for position in rng.permutation(len(COLOURS))[:num_paragraphs]]
    letters_seen: set[str] = set()
    chosen: list[str] = []
    # First letters differ within a page, so that a letter names one paragraph.
    for position in rng.permutation(len(paragraphs)):
        text = paragraphs[int(position)]
        if text[0] not in letters_seen:
            letters_seen.add(text[0])
            chosen.append(text)
        if len(chosen) == num_paragraphs:
            break
    numbers = rng.permutation(np.arange(10, 100))[:num_paragraphs]
    body = load_font("serif", int(rng.integers(10, 13)))
    cap_font = load_font("serif-bold", 26)
    tag_font = load_font("sans-bold", 20)
    column_width = (width - LATTICE_PX) / num_columns
    row_height = (height - LATTICE_PX) / 2
    turns: list[Turn] = []
    for position, (text, number, colour) in enumerate(zip(chosen, numbers, colours, strict=True)):
        row, column = divmod(position, num_columns)
        left = LATTICE_PX * (1 + column * (width // LATTICE_PX // num_columns))
        top = LATTICE_PX * (1 + row * (height // LATTICE_PX // 2))
        canvas.rectangle(Box(left=left, top=top, right=left + LATTICE_PX, bottom=top + LATTICE_PX), colour)
        ink = (255, 255, 255) if sum(canvas.shade(colour)) < 330 else (0, 0, 0)
        middle = LATTICE_PX / 2
        number_box = canvas.text(left + middle, top + middle, str(number), tag_font, ink)
        cap_box = canvas.text(left + middle, top + LATTICE_PX + middle, text[0], cap_font, _INK)
        line_height = body.size + 4
        x, y = left + 32.0, top + 30.0
        for word in text[1:].split(" ") if text[1] != " " else text[2:].split(" "):
            length = body.getlength(word + " ")
            if x + length > left + column_width - 20:
                x, y = (left + 32.0 if y + line_height < top + 56 else float(left)), y + line_height
                if y > top + row_height - line_height - 16:
                    break
            canvas.prose(x, y, word, body, _INK)
            x += length
        across = ("left", "right") if num_columns == 2 else ("left", "centre", "right")
        where = f"{('top', 'bottom')[row]} {across[column]}"
        number_evidence = (number_box.left, number_box.top, number_box.right, number_box.bottom)
        cap_evidence = (cap_box.left, cap_box.top, cap_box.right, cap_box.bottom)
        turns += [
            Turn(
                question=f"What number is on the tag that is {colour}?",
                answer=str(number),
                kind="pages/number of colour",
                detail="small",
                evidence=number_evidence,
                shown=(str(number), colour),
            ),
            Turn(
                question=f"What number is on the tag at the {where}?",
                answer=str(number),
                kind="pages/number at place",
                detail="small",
                evidence=number_evidence,
                shown=(str(number), colour),
            ),
            Turn(
                question=f"Which letter begins the paragraph at the {where}?",
                answer=text[0],
                kind="pages/letter",
                detail="small",
                evidence=cap_evidence,
                shown=(text[0],),
            ),
            Turn(question=f"Which colour is the tag at the {where}?", answer=colour, kind="pages/colour", detail="large", evidence=None),
        ]
    turns.append(Turn(question="How many paragraphs are on the page?", answer=str(num_paragraphs), kind="pages/count", detail="large", evidence=None))
    return turns, "PSF-2.0 (Python documentation)"
