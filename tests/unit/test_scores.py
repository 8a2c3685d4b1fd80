"""Scores of constructed answers: groups, baselines that would be over a part only, and the figures of yes and no."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_training import fake_samples
from workers.evaluation import _Given, _Question, _scores, _yes_no_figures


def question(number, *, expected="yes", kind="k", family="f", detail="small"):
    from dataclasses import replace

    like = fake_samples(1)[0]
    sample = replace(like, sample_id=f"s{number}", image=replace(like.image, sha256=f"{number:064x}"), family=family)
    return _Question(question_id=f"s{number}#0", sample=sample, turn=0, kind=kind, detail=detail, text="Is it?", expected=expected)


def given_answers(pairs, mode="both"):
    return [_Given(question=question(number, expected=true), mode=mode, answer=said) for number, (true, said) in enumerate(pairs)]


def test_a_baseline_over_a_part_of_a_group_is_left_out():
    known, unknown = question(0, kind="known", family="a"), question(1, kind="unknown", family="b")
    answers = [_Given(question=asked, mode="both", answer="yes") for asked in (known, unknown)]
    baseline = [_Given(question=known, mode="majority", answer="no")]
    scores = {
        (score.mode, score.family, score.detail, score.kind): score for score in _scores("exact_match", [*answers, *baseline], ("both", "majority"))
    }
    assert scores["both", "", "", ""].total == 2
    assert ("majority", "", "", "") not in scores
    assert ("majority", "b", "", "") not in scores
    assert scores["majority", "a", "", ""].fraction == 0


def test_questions_that_a_metric_says_nothing_about_are_not_counted():
    answers = given_answers([("yes", "yes"), ("7", "yes"), ("no", "no")])
    (overall,) = [score for score in _scores("yes_no", answers, ("both",)) if not (score.family or score.detail or score.kind)]
    assert (overall.total, overall.points, overall.fraction) == (2, 2, 1)


def slow_figures(pairs):
    """Counted by hand from the definitions."""
    cells = {name: sum(1 for true, said in pairs if rule(true, said)) for name, rule in (
        ("hit", lambda true, said: true == "yes" and said == "yes"),
        ("false alarm", lambda true, said: true == "no" and said == "yes"),
        ("miss", lambda true, said: true == "yes" and said != "yes"),
        ("unclear", lambda true, said: said == "maybe"),
    )}  # fmt: skip
    said_yes, are_yes = cells["hit"] + cells["false alarm"], cells["hit"] + cells["miss"]
    precision = cells["hit"] / said_yes if said_yes else 0.0
    recall = cells["hit"] / are_yes if are_yes else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "yes_share": said_yes / len(pairs), "unclear_share": cells["unclear"] / len(pairs)}


@given(st.lists(st.tuples(st.sampled_from(["yes", "no"]), st.sampled_from(["yes", "no", "maybe"])), min_size=1, max_size=12))
def test_figures_against_their_definitions(pairs):
    figures = {figure.name: figure for figure in _yes_no_figures(given_answers(pairs), ("both",))}
    assert {name: figure.fraction for name, figure in figures.items()} == pytest.approx(slow_figures(pairs))
    assert all(
        0 <= figure.low <= figure.fraction + 1e-9 and figure.fraction - 1e-9 <= figure.high <= 1 for figure in figures.values() if figure.fraction
    )


def test_always_yes_is_told_by_its_figures():
    """What POPE is for: accuracy one half, recall one, and a share of yes that gives it away."""
    pairs = [("yes", "yes"), ("no", "yes")] * 50
    figures = {figure.name: figure for figure in _yes_no_figures(given_answers(pairs), ("both",))}
    assert (figures["precision"].fraction, figures["recall"].fraction, figures["yes_share"].fraction) == (0.5, 1.0, 1.0)
    assert figures["recall"].low < 1  # not certain
    assert figures["precision"].low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02)
    assert np.isclose(figures["f1"].fraction, 2 / 3)
