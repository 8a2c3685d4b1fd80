"""The report's reading of records: seeds side by side, groups in order, the view that holds the answer."""

import pytest

from model.views import ViewSpec, plan_views
from pipelines.report import accuracy_rows, answer_view
from workers.dataset.samples import Turn
from workers.evaluation import AccuracyCount, EvaluationRecord


def evaluation(right: int) -> EvaluationRecord:
    groups = [("", ""), ("", "small"), ("", "large"), ("charts", ""), ("maps", ""), ("charts", "small")]
    counts = [
        AccuracyCount(
            mode=mode, family=family, detail=detail, kind="", correct=right + shift, total=20, fraction=(right + shift) / 20, low=0.0, high=1.0
        )
        for mode, shift in (("blind", 0), ("both", 8), ("majority", 1))
        for family, detail in groups
    ]
    counts.append(
        AccuracyCount(mode="both", family="charts", detail="small", kind="charts/value", correct=1, total=2, fraction=0.5, low=0.0, high=1.0)
    )
    return EvaluationRecord(
        training_fingerprint="t",
        dataset_fingerprint="d",
        split="held_out",
        modes=("blind", "both"),
        num_images=4,
        num_questions=20,
        num_quarantined=0,
        quarantined_by_reason={},
        counts=tuple(counts),
        answers="answers.parquet",
        normalisation="casefold; then equality",
        seconds=1.0,
        answers_per_second=1.0,
    )


def test_rows_are_in_order_and_hold_every_seed() -> None:
    rows = accuracy_rows([evaluation(2), evaluation(4)], ("blind", "both"))
    assert [(row.group, row.label) for row in rows] == [
        ("overall", "all questions"),
        ("detail", "small detail"),
        ("detail", "large detail"),
        ("family", "charts"),
        ("family", "maps"),
    ]
    assert rows[0].cells["both"].num_right == (10, 12)
    assert rows[0].cells["both"].mean == pytest.approx(0.55)
    assert rows[0].cells["blind"].spread == pytest.approx(0.05)
    assert rows[0].majority == pytest.approx(3 / 20)
    assert rows[0].num_questions == 20


@pytest.mark.parametrize(
    ("evidence", "place"),
    [((10.0, 10.0, 40.0, 30.0), 1), ((500.0, 300.0, 540.0, 320.0), 6), ((200.0, 10.0, 300.0, 30.0), 2), (None, 1)],
)
def test_the_view_that_holds_the_answer(evidence: tuple[float, float, float, float] | None, place: int) -> None:
    assert answer_view(plan_views(672, 448, 112, ViewSpec()), evidence).index == place


def test_small_details_with_a_place_are_shown_first() -> None:
    from pipelines.report import _shown_turns

    def turn(detail: str, evidence: tuple[float, float, float, float] | None) -> Turn:
        return Turn(question="q", answer="a", kind="k", detail=detail, evidence=evidence)

    box = (0.0, 0.0, 1.0, 1.0)
    assert _shown_turns([turn("large", box), turn("small", None), turn("small", box)]) == [2, 0, 1]
