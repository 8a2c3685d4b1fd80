"""High-detail pictures with questions whose answers are true by construction, in five families.

`render` is a pure function of (family, number, spec): the same picture on every machine with the same library versions. Every question marked small
has been checked to be readable in a local view and too small for the global one; a candidate that fails the check is never asked.
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from model.views import plan_views
from workers.dataset.rendering import charts, collages, geometry, maps, pages
from workers.dataset.rendering.canvas import Canvas
from workers.dataset.rendering.legibility import is_small_detail
from workers.dataset.samples import Turn
from workers.dataset.spec import RENDERED_HEIGHT_PX, RENDERED_WIDTH_PX, DatasetSpec
from workers.errors import WorkerError

__all__ = ["FAMILIES", "Picture", "Rendered", "choose_turns", "render", "sketch"]

_FAMILIES: dict[str, Callable[[Canvas, np.random.Generator], tuple[list[Turn], str]]] = {
    "charts": charts.draw,
    "maps": maps.draw,
    "collages": collages.draw,
    "pages": pages.draw,
    "geometry": geometry.draw,
}
FAMILIES: tuple[str, ...] = tuple(_FAMILIES)

_MAX_ATTEMPTS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A drawn picture with its record, before questions are chosen."""

    canvas: Canvas
    turns: tuple[Turn, ...]
    """The questions that the picture answers."""
    licence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """A finished picture with the questions that are asked about it."""

    png: bytes
    width_px: int
    height_px: int
    turns: tuple[Turn, ...]
    licence: str
    detail_score: float
    """Share of the questions whose evidence is too small for the global view."""


def sketch(family: str, number: int, seed: int, attempt: int = 0) -> tuple[Picture, np.random.Generator]:
    """Draw one picture with every question that its family can ask, unchecked.

    Args:
        family: one of FAMILIES.
        number: which picture of the family.
        seed: of the dataset.
        attempt: how many drawings of this number were refused before.

    Returns:
        The picture, and the generator in the state that drawing left it in.

    Raises:
        WorkerError: an unknown family.
    """
    if family not in _FAMILIES:
        raise WorkerError(f"unknown family {family!r}; known are {', '.join(FAMILIES)}")
    digest = hashlib.sha256(f"{family}:{number}:{seed}:{attempt}".encode()).digest()
    rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    paper = rng.integers(244, 256, size=3)
    canvas = Canvas(RENDERED_WIDTH_PX, RENDERED_HEIGHT_PX, (int(paper[0]), int(paper[1]), int(paper[2])), rng)
    turns, licence = _FAMILIES[family](canvas, rng)
    return Picture(canvas=canvas, turns=tuple(turns), licence=licence), rng


def _checked(family: str, number: int, spec: DatasetSpec) -> tuple[Picture, np.random.Generator]:
    """The first drawing of a number that leaves two small questions or more, with those that pass the check."""
    plan = plan_views(RENDERED_WIDTH_PX, RENDERED_HEIGHT_PX, spec.view_px, spec.views)
    for attempt in range(_MAX_ATTEMPTS):
        picture, rng = sketch(family, number, spec.seed, attempt)
        kept = tuple(
            turn
            for turn in picture.turns
            if turn.detail == "large" or is_small_detail(turn, _num_characters(picture.canvas, turn), plan, spec.legibility)
        )
        if sum(turn.detail == "small" for turn in kept) >= 2:
            return Picture(canvas=picture.canvas, turns=kept, licence=picture.licence), rng
    raise WorkerError(
        f"no drawing of {family} number {number} in {_MAX_ATTEMPTS} attempts has two questions that are readable from "
        f"{spec.legibility.local_min_px} px in a local view and unreadable below {spec.legibility.global_max_px} px in the global one (views of "
        f"{spec.view_px} px); relax the limits or use larger images"
    )


def _num_characters(canvas: Canvas, turn: Turn) -> int:
    """How many marks lie inside the evidence of a question."""
    if turn.evidence is None:
        return 1
    left, top, right, bottom = turn.evidence
    inside = [
        mark
        for mark in canvas.marks
        if left <= (mark.box.left + mark.box.right) / 2 <= right and top <= (mark.box.top + mark.box.bottom) / 2 <= bottom
    ]
    return max(len(inside), 1)


def render(family: str, number: int, spec: DatasetSpec) -> Rendered:
    """Draw one picture and choose its questions: at least half of them about small detail where the picture has enough.

    Args:
        family: one of FAMILIES.
        number: which picture of the family.
        spec: seed, views, legibility limits and questions per image.

    Returns:
        The picture as PNG bytes with its questions.

    Raises:
        WorkerError: an unknown family, or limits that no drawing meets.
    """
    picture, rng = _checked(family, number, spec)
    turns = choose_turns(picture.turns, spec.turns_per_image, rng)
    buffer = io.BytesIO()
    picture.canvas.image.save(buffer, "PNG", compress_level=4)
    width, height = picture.canvas.image.size
    score = sum(turn.detail == "small" for turn in turns) / len(turns)
    return Rendered(png=buffer.getvalue(), width_px=width, height_px=height, turns=turns, licence=picture.licence, detail_score=score)


def choose_turns(candidates: tuple[Turn, ...], num_turns: int, rng: np.random.Generator) -> tuple[Turn, ...]:
    """Choose questions: two thirds about small detail, spread over the kinds, and no two about the same mark.

    Two questions about one mark would answer each other within a conversation, and the model would read its own words instead of the picture.

    Args:
        candidates: every question that may be asked.
        num_turns: how many to ask; fewer come back when there are fewer.
        rng: order and choice.

    Returns:
        The chosen questions, shuffled.
    """
    shuffled = [candidates[position] for position in rng.permutation(len(candidates))]
    num_small = round(num_turns * 2 / 3)
    chosen: list[Turn] = []
    used: set[tuple[float, float, float, float]] = set()
    for detail, share in (("small", num_small), ("large", num_turns - num_small)):
        wanted = share
        by_kind: dict[str, list[Turn]] = {}
        for turn in shuffled:
            if turn.detail == detail:
                by_kind.setdefault(turn.kind, []).append(turn)
        waiting = list(by_kind.values())
        while wanted and any(waiting):
            for turns in waiting:
                if turns and wanted:
                    turn = turns.pop()
                    if turn.evidence is not None:
                        if turn.evidence in used:
                            continue
                        used.add(turn.evidence)
                    chosen.append(turn)
                    wanted -= 1
    return tuple(chosen[position] for position in rng.permutation(len(chosen)))
