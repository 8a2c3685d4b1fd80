"""Made-up records of evaluations: a few groups of twenty questions, two modes, two metrics."""

from typing import Any

from workers.evaluation import EvaluationRecord, Score


def score(metric: str, mode: str, family: str, detail: str, points: float, *, kind: str = "", total: int = 20) -> Score:
    fraction = points / total
    return Score(
        metric=metric,
        mode=mode,
        family=family,
        detail=detail,
        kind=kind,
        total=total,
        points=points,
        fraction=fraction,
        low=fraction - 0.1,
        high=fraction + 0.2,
    )


def evaluation(right: int, **changes: Any) -> EvaluationRecord:
    groups = [("", ""), ("", "small"), ("", "large"), ("charts", ""), ("maps", ""), ("charts", "small")]
    scores = [
        score(metric, mode, family, detail, right + shift + more)
        for metric, more in (("exact_match", 0.0), ("anls", 0.5))
        for mode, shift in (("blind", 0), ("both", 8), ("majority", 1))
        for family, detail in groups
    ]
    scores.append(score("exact_match", "both", "charts", "small", 1, kind="charts/value", total=2))
    values: dict[str, Any] = {
        "training_fingerprint": "t",
        "dataset_fingerprint": "d",
        "of_training_dataset": True,
        "split": "held_out",
        "modes": ("blind", "both"),
        "metrics": ("exact_match", "anls"),
        "rules": {"exact_match": "equal", "anls": "near"},
        "num_images": 4,
        "num_quarantined": 0,
        "quarantined_by_reason": {},
        "num_questions": 20,
        "num_images_trained_on": 0,
        "num_questions_trained_on": 0,
        "trained_on": "",
        "scores": tuple(scores),
        "figures": (),
        "answers": "answers.parquet",
        "seconds": 1.0,
        "answers_per_second": 1.0,
    }
    return EvaluationRecord(**(values | changes))
