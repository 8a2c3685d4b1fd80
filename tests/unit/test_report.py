"""The report's reading of records: seeds side by side, groups in order, the view that holds the answer."""

from dataclasses import replace
from pathlib import Path

import pytest

from model.views import ViewSpec, plan_views
from pipelines.cache_plan import note_cache_plan
from pipelines.cache_plan_text import OPTION_HEADINGS
from pipelines.recipe_files import load_recipe
from pipelines.report import _asked_words, _planned_options, _planned_rows, accuracy_rows, answer_view, metric_rows
from pipelines.stages import Experiment, open_experiment
from tests.evaluation_records import evaluation
from tests.tiny import tiny_recipe
from workers.caching.build import cache_features
from workers.dataset.build import build_dataset
from workers.dataset.samples import Turn
from workers.evaluation import ClassificationFigure
from workers.execution import ExecutionSettings, SilentProgress
from workers.runtime import InlineCluster
from workers.storage import Store


def test_rows_are_in_order_and_hold_every_seed() -> None:
    rows = accuracy_rows([evaluation(2), evaluation(4)], ("blind", "both"))
    assert [(row.group, row.label) for row in rows] == [
        ("overall", "all questions"),
        ("detail", "small detail"),
        ("detail", "large detail"),
        ("family", "charts"),
        ("family", "maps"),
    ]
    assert rows[0].cells["both"].points == (10, 12)
    assert rows[0].cells["both"].interval == pytest.approx((0.55 - 0.1, 0.55 + 0.2))
    assert rows[0].cells["both"].mean == pytest.approx(0.55)
    assert rows[0].cells["blind"].spread == pytest.approx(0.05)
    assert rows[0].majority == pytest.approx(3 / 20)
    assert rows[0].num_questions == 20


def test_further_metrics_stand_in_rows_of_their_own() -> None:
    figures = tuple(
        ClassificationFigure(metric="yes_no", name=name, mode=mode, fraction=0.5, low=0.25, high=0.75)
        for mode in ("blind", "both")
        for name in ("precision", "f1")
    )
    rows = metric_rows([evaluation(2, figures=figures), evaluation(4, figures=figures)])
    assert [row.label for row in rows] == ["anls", "yes_no: precision", "yes_no: f1"]
    assert rows[0].cells["both"] == pytest.approx(((10.5 + 12.5) / 40, (10.5 + 12.5) / 40 - 0.1, (10.5 + 12.5) / 40 + 0.2))
    assert (rows[0].rule, rows[0].num_questions) == ("near", 20)
    assert rows[2].cells["blind"] == (0.5, 0.25, 0.75)
    assert metric_rows([evaluation(2, metrics=("exact_match",))]) == ()


def test_what_was_asked_is_said() -> None:
    assert _asked_words(evaluation(2)) == "Held-out pictures"
    assert _asked_words(evaluation(2, of_training_dataset=False)) == "4 pictures of a dataset of their own"
    partly = evaluation(2, of_training_dataset=False, num_images_trained_on=3, num_questions_trained_on=7)
    assert _asked_words(partly) == "4 pictures of a dataset of their own, less 3 that are in the training split (7 questions)"


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
    turns = [turn("large", box), turn("small", None), turn("small", box), turn("small", box)]
    assert _shown_turns(turns, range(3)) == [2, 0, 1]
    assert _shown_turns(turns, [3, 1]) == [3, 1], "and what nobody asked is not shown in place of what was asked"


@pytest.fixture
def experiment(tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """Of a dataset that is built."""
    monkeypatch.setattr("workers.probing._ENOUGH_S", 0.01)
    path = tmp_path / "tiny.toml"
    path.write_text(tiny_recipe(tiny_encoder_folder, tiny_language_model_folder))
    found = open_experiment(load_recipe(str(path)), Store(str(tmp_path / "root")), ExecutionSettings(device="cpu"))
    build_dataset(found.dataset, found.store, ExecutionSettings(), SilentProgress(), cluster=InlineCluster())
    return found


def test_a_plan_stands_beside_what_came_of_it(experiment: Experiment, tmp_path: Path) -> None:
    note_cache_plan(experiment)
    cache_features(experiment.features, experiment.store, ExecutionSettings(), SilentProgress(), cluster=InlineCluster())
    views, size, time = _planned_rows(experiment)
    assert (views.what, views.planned, views.difference) == ("views", views.found, "+0.0 %")
    assert (size.what, time.what) == ("bytes", "time, with starting")
    assert abs(float(size.difference.split()[0])) < 2
    told = _planned_options(experiment)
    assert told is not None
    assert (told.facts[0][0], told.headings) == ("images", OPTION_HEADINGS)
    assert [row[0] for row in told.rows] == ["fp16", "int8", "fp32", "int8, global view only"]
    other = tmp_path / "other.toml"  # another recipe over the same cache
    other.write_text(experiment.file.text.replace('name = "tiny"', 'name = "other"').replace("seeds = [0, 1]", "seeds = [0]"))
    reported = _planned_options(open_experiment(load_recipe(str(other)), experiment.store, ExecutionSettings(device="cpu")))
    assert reported is not None
    assert reported.facts == (("planned for", "recipe tiny, which uses the same cache"), *told.facts)


def test_a_plan_of_the_whole_is_not_held_against_a_part_that_was_missing(experiment: Experiment) -> None:
    whole = experiment.features
    part = replace(whole, global_maps=whole.global_maps[:1], local_maps=whole.local_maps)
    cache_features(part, experiment.store, ExecutionSettings(), SilentProgress(), cluster=InlineCluster())
    note_cache_plan(experiment)
    record = cache_features(whole, experiment.store, ExecutionSettings(), SilentProgress(), cluster=InlineCluster())
    assert (record.num_held, record.num_cached) == (0, 16)
    assert _planned_rows(experiment) == ()
