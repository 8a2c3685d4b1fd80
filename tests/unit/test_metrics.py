import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.metrics import Share, exact_match, majority_answers, normalise_answer


@pytest.mark.parametrize(
    ("given_", "expected"),
    [("Two.", "two"), ("  A  big\tcat ", "a big cat"), ("3.5", "3.5"), ("..", "."), ("", ""), ("STRASSE", "strasse"), ("yes .", "yes")],
)
def test_normalisation(given_, expected):
    assert normalise_answer(given_) == expected


def test_nothing_partial_counts():
    assert exact_match(" Oslo. ", "oslo")
    assert not exact_match("Oslo, Norway", "Oslo")


def test_wilson_against_known_values():
    low, high = Share(correct=8, total=10).interval  # 0.4902, 0.9433: Wilson score interval without continuity correction
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)
    assert Share(correct=0, total=0).interval == (0.0, 1.0)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share(pair):
    share = Share(correct=pair[0], total=pair[1])
    low, high = share.interval
    assert 0 <= low <= share.fraction + 1e-12
    assert share.fraction - 1e-12 <= high <= 1


def test_majority_is_stable():
    answers = [("a", "Red"), ("a", "red."), ("a", "blue"), ("b", "y"), ("b", "x")]
    assert majority_answers(answers) == {"a": "red", "b": "x"}
    assert majority_answers(reversed(answers)) == {"a": "red", "b": "x"}
