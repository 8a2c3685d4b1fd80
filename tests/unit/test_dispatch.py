"""Units belong to places: who gets which, who else gets one that does not come back, and whose answer counts."""

import pytest

from workers.dispatch import Dispatch


class Places:
    """Notes what each place is given, and is the clock."""

    def __init__(self):
        self.given = []
        self.now_s = 1000.0

    def give(self, place, work):
        self.given.append((place, work))
        return len(self.given) - 1

    def dispatch(self, num_places, max_failures=2, latest_s=900.0):
        return Dispatch(self.give, num_places, max_failures=max_failures, latest_s=latest_s, clock=lambda: self.now_s)


@pytest.fixture
def places():
    return Places()


def test_units_are_shared_out_by_what_each_place_has(places):
    dispatch = places.dispatch(3)
    assert not dispatch
    for work in "abcdef":
        dispatch.begin(work)
    assert places.given == [(0, "a"), (1, "b"), (2, "c"), (0, "d"), (1, "e"), (2, "f")]
    assert len(dispatch) == 6
    assert dispatch.references == list(range(6))
    # From place 1 nothing comes back: the others get all that follows.
    for answered in (0, 2, 3, 5):
        dispatch.finish(answered)
        dispatch.begin("later")
    assert {place for place, work in places.given if work == "later"} == {0, 2}
    assert len(dispatch) == 6


def test_overdue_units_go_to_idle_places_and_the_first_answer_counts(places):
    dispatch = places.dispatch(3)
    for work in "abcd":
        dispatch.begin(work)  # a and d at 0, b at 1, c at 2
    places.now_s += 20
    dispatch.finish(1)
    places.now_s += 1
    dispatch.finish(2)
    places.now_s += 20
    dispatch.repeat_overdue()  # the longest took 21 s: 41 are not twice as long
    assert len(places.given) == 4
    places.now_s += 2
    dispatch.repeat_overdue()
    assert places.given[4:] == [(2, "a"), (1, "d")]  # the oldest to the one that answered last
    assert len(dispatch) == 2
    assert sorted(dispatch.references) == [0, 3, 4, 5]
    dispatch.repeat_overdue()  # they have just been given out, and nobody is idle
    assert len(places.given) == 6
    dispatch.finish(4)  # the repetition was faster
    dispatch.finish(3)  # the first one came back all the same
    assert not dispatch
    assert dispatch.references == []
    assert dispatch.owing == [0, 1]  # what nobody waits for any more


def test_a_repetition_that_does_not_come_back_is_repeated_elsewhere(places):
    dispatch = places.dispatch(3)
    for work in "abc":
        dispatch.begin(work)
    places.now_s += 1
    dispatch.finish(1)
    places.now_s += 1
    dispatch.finish(2)
    places.now_s += 14
    dispatch.repeat_overdue()
    assert places.given[3:] == [(2, "a")]  # units of a second are overdue after 15
    places.now_s += 16
    dispatch.repeat_overdue()
    assert places.given[4:] == [(1, "a")]
    places.now_s += 16
    dispatch.repeat_overdue()
    assert len(places.given) == 5  # everybody has it
    dispatch.finish(3)
    assert not dispatch


@pytest.mark.parametrize(("took_s", "overdue_s"), [(None, 900), (1000, 900), (100, 200), (1, 15)])
def test_a_unit_is_overdue_after_twice_what_the_longest_took_within_limits(places, took_s, overdue_s):
    dispatch = places.dispatch(3, latest_s=900)
    if took_s is not None:
        dispatch.begin("done")
        places.now_s += took_s
        dispatch.finish(0)
    dispatch.begin("lost")
    num_given = len(places.given)
    places.now_s += overdue_s
    dispatch.repeat_overdue()
    assert len(places.given) == num_given
    places.now_s += 1
    dispatch.repeat_overdue()
    assert [work for _, work in places.given[num_given:]] == ["lost"]


def test_a_lost_unit_goes_where_it_has_not_failed(places):
    dispatch = places.dispatch(3, max_failures=2)
    dispatch.begin("a")
    assert dispatch.fail(0, "elsewhere")
    assert dispatch.fail(1, "elsewhere")
    assert places.given == [(0, "a"), (1, "a"), (2, "a")]
    assert not dispatch.fail(2, "elsewhere")
    assert not dispatch
    assert dispatch.owing == []
    dispatch.begin("b")
    assert not dispatch.fail(3, "nowhere")
    assert not dispatch


def test_a_unit_is_lost_by_so_many_places_and_no_more(places):
    dispatch = places.dispatch(9, max_failures=1)
    dispatch.begin("a")
    assert dispatch.fail(0, "anywhere")
    assert not dispatch.fail(1, "anywhere")


def test_where_there_is_no_other_place_a_failed_unit_goes_back_and_a_lost_one_does_not(places):
    dispatch = places.dispatch(1, max_failures=1)
    dispatch.begin("a")
    assert dispatch.fail(0, "anywhere")
    assert places.given == [(0, "a")] * 2
    assert not dispatch.fail(1, "anywhere")
    dispatch.begin("b")
    assert not dispatch.fail(2, "elsewhere")


def test_a_place_that_lost_a_unit_gets_none_for_a_while(places):
    dispatch = places.dispatch(2)
    dispatch.begin("a")
    assert dispatch.fail(0, "elsewhere")
    for work in "bc":
        dispatch.begin(work)  # it has nothing to do, and would lose all of it
    assert places.given[1:] == [(1, "a"), (1, "b"), (1, "c")]
    places.now_s += 14
    dispatch.finish(1)
    dispatch.repeat_overdue()
    assert len(places.given) == 4
    places.now_s += 1
    dispatch.begin("d")
    assert places.given[4:] == [(0, "d")]


def test_a_place_that_lost_a_unit_is_not_idle_for_a_while(places):
    dispatch = places.dispatch(3, latest_s=10)
    for work in "ab":
        dispatch.begin(work)
    places.now_s += 11
    assert dispatch.fail(1, "elsewhere")  # b is at place 2 now, and place 1 pauses
    dispatch.repeat_overdue()
    assert places.given == [(0, "a"), (1, "b"), (2, "b")]
    places.now_s += 15
    dispatch.repeat_overdue()
    assert places.given[3:] == [(1, "a")]


def test_a_lost_unit_that_somebody_else_has_is_not_lost(places):
    dispatch = places.dispatch(2, max_failures=0)
    dispatch.begin("a")
    dispatch.begin("b")
    dispatch.finish(1)
    places.now_s += 16
    dispatch.repeat_overdue()
    assert dispatch.fail(0, "nowhere")
    assert len(dispatch) == 1
    dispatch.finish(2)
    assert not dispatch
