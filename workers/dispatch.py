"""Which process has which unit of work, and who else gets one that does not come back.

A unit belongs to the process that it was given to. When that process's machine goes, Ray either tries it there again so soon that all tries are used
up before the loss is noticed, or lets it wait for ever for a machine that does not come. So a unit that was lost is given to another process; and
one that does not come back is given to another as well, once all are given out and that one has nothing left to do. Units may run twice; the first
answer counts. No Ray in here: processes are places by number, and what a place was given is known by a reference to its answer.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Dispatch"]

_PAUSE_S = 15.0
"""For a process to begin anew, after which it is given units again, and before which none is overdue: another would hardly be sooner."""


@dataclass(eq=False)
class _Copy:
    """One time that a unit was given to a place."""

    place: int
    given_s: float


@dataclass(eq=False)
class _Unit:
    """What is to be done, and who has it."""

    work: Any
    copies: dict[Any, _Copy] = field(default_factory=dict)
    """By reference."""
    failed_at: list[int] = field(default_factory=list)


class Dispatch:
    """Units of work that places have under way.

    Args:
        give: gives work to a place, which is a number below `num_places`; returns a reference to its answer.
        num_places: how many there are.
        max_failures: places that may lose a unit.
        latest_s: after which a unit is overdue whatever other units took.
        clock: seconds that only grow.
    """

    def __init__(
        self, give: Callable[[int, Any], Any], num_places: int, *, max_failures: int, latest_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._give_work = give
        self._max_failures = max_failures
        self._latest_s = latest_s
        self._clock = clock
        self._load = [0] * num_places
        self._answered_s = [0.0] * num_places
        self._failed_s: list[float | None] = [None] * num_places
        self._longest_s: float | None = None
        self._units: dict[Any, _Unit] = {}

    def __len__(self) -> int:
        """Units under way, however many places have them."""
        return len(set(self._units.values()))

    @property
    def references(self) -> list[Any]:
        """Of all answers that are waited for."""
        return list(self._units)

    @property
    def owing(self) -> list[int]:
        """Places that have not answered for all that they were given, also where nobody waits for it any more."""
        return [place for place, load in enumerate(self._load) if load]

    def begin(self, work: Any) -> None:
        """Give a new unit to the place that has the fewest.

        A place from which nothing comes back keeps what it has, and so soon gets no more. One that has just lost a unit gets none for a while, since
        it would lose as many as it gets.

        Args:
            work: of the unit.
        """
        self._give(_Unit(work), range(len(self._load)))

    def repeat_overdue(self) -> None:
        """Give overdue units to places that have nothing to do, the oldest unit first."""
        now = self._clock()
        overdue_s = self._latest_s if self._longest_s is None else min(self._latest_s, max(_PAUSE_S, 2 * self._longest_s))
        idle = [place for place, load in enumerate(self._load) if not load and not self._is_pausing(place)]
        given_s = {unit: max(copy.given_s for copy in unit.copies.values()) for unit in self._units.values()}
        overdue = sorted((unit for unit, since_s in given_s.items() if now - since_s > overdue_s), key=given_s.__getitem__)
        # Who answered last is the least likely to be gone.
        for unit, place in zip(overdue, sorted(idle, key=self._answered_s.__getitem__, reverse=True), strict=False):
            self._give(unit, [place])

    def finish(self, reference: Any) -> None:
        """Take a unit for done: whoever else has it is no longer waited for.

        Args:
            reference: of the answer that came.
        """
        unit = self._units[reference]
        copy = self._take(reference)
        self._answered_s[copy.place] = self._clock()
        self._longest_s = max(self._longest_s or 0.0, self._clock() - copy.given_s)
        for other in unit.copies:  # their places still have them to do
            del self._units[other]
        unit.copies.clear()

    def fail(self, reference: Any, again: Literal["nowhere", "elsewhere", "anywhere"]) -> bool:
        """Take note of an answer that is an error and says nothing about the work.

        Args:
            reference: of the answer that came.
            again: where the unit may be tried again, if no other place has it and not too many lost it: where it has not failed, or, if it has
                everywhere, also there.

        Returns:
            Whether the unit is still under way.
        """
        unit = self._units[reference]
        place = self._take(reference).place
        self._failed_s[place] = self._clock()
        unit.failed_at.append(place)
        if not unit.copies and again != "nowhere" and len(unit.failed_at) <= self._max_failures:
            places = [place for place in range(len(self._load)) if place not in unit.failed_at]
            if not places and again == "anywhere":
                places = list(range(len(self._load)))
            if places:
                self._give(unit, places)
        return bool(unit.copies)

    def _give(self, unit: _Unit, places: Sequence[int]) -> None:
        place = min(places, key=lambda place: (self._is_pausing(place), self._load[place]))
        reference = self._give_work(place, unit.work)
        self._load[place] += 1
        self._units[reference] = unit
        unit.copies[reference] = _Copy(place, self._clock())

    def _is_pausing(self, place: int) -> bool:
        failed_s = self._failed_s[place]
        return failed_s is not None and self._clock() - failed_s < _PAUSE_S

    def _take(self, reference: Any) -> _Copy:
        copy = self._units.pop(reference).copies.pop(reference)
        self._load[copy.place] -= 1
        return copy
