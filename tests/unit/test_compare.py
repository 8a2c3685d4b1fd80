"""`loupe compare`: the same questions side by side, differences whose intervals are known, and runs that have nothing in common."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.specs import fingerprint
from pipelines import cli
from pipelines.compare import EvaluatedRun, compare_runs, find_run, find_runs, print_comparison
from pipelines.errors import ComparisonError, NothingThereError
from pipelines.recipe_files import load_recipe
from pipelines.stages import open_experiment
from tests.evaluation_records import evaluation
from tests.tiny import tiny_recipe
from workers.commits import to_json
from workers.execution import ExecutionSettings
from workers.storage import Store


def row(image: str, turn: int, mode: str, right: float, **changes: Any) -> dict[str, Any]:
    """One answer: `yes` or something near it, to a question whose true answer is yes."""
    values: dict[str, Any] = {
        "question_id": f"{image}#{turn}",
        "sample_id": image,
        "turn": turn,
        "image_sha256": f"sha-{image}",
        "family": "charts" if image < "image-5" else "maps",
        "kind": "k",
        "detail": "small" if turn % 2 else "large",
        "mode": mode,
        "question": f"question {turn}?",
        "expected": "yes",
        "answer": "yes" if right else "yep",
        "exact_match": float(right),
    }
    return values | changes


def run(name: str, *answers: list[dict[str, Any]]) -> EvaluatedRun:
    return EvaluatedRun(
        name=name, keys=tuple(f"{name}{place}" for place in range(len(answers))), metrics=("exact_match",), note="", answers=answers_of(answers)
    )


def answers_of(answers: Any) -> tuple[tuple[dict[str, Any], ...], ...]:
    return tuple(tuple(some) for some in answers)


def grid(right: Any, *, modes: tuple[str, ...] = ("blind", "both"), num_images: int = 10, num_turns: int = 4) -> list[dict[str, Any]]:
    """Answers to all questions of some images; `right` says of (image, turn, mode) whether it is."""
    return [
        row(f"image-{image}", turn, mode, float(right(image, turn, mode)))
        for image in range(num_images)
        for turn in range(num_turns)
        for mode in modes
    ]


def test_means_and_differences_are_those_of_the_answers() -> None:
    first = run("first", grid(lambda image, turn, mode: mode == "both" and turn == 0))
    second = run("second", grid(lambda image, turn, mode: mode == "both" and (turn == 0 or image < 5)))
    comparison = compare_runs([first, second])
    assert (comparison.metric, comparison.num_questions, comparison.num_images) == ("exact_match", 40, 10)
    rows = {(found.family, found.detail, found.mode): found for found in comparison.rows}
    assert [key for key in rows if key[2] == "both"] == [
        ("", "", "both"),
        ("", "small", "both"),
        ("", "large", "both"),
        ("charts", "", "both"),
        ("maps", "", "both"),
    ]
    overall = rows["", "", "both"]
    assert [mean.mean for mean in overall.means] == [0.25, (5 * 4 + 5) / 40]
    assert overall.differences[0].difference == pytest.approx(15 / 40)
    assert not overall.differences[0].holds_zero
    assert rows["", "small", "both"].differences[0].difference == pytest.approx(10 / 20)
    assert rows["charts", "", "both"].differences[0].difference == pytest.approx(0.75)
    assert rows["maps", "", "both"].differences[0].holds_zero
    assert rows["", "", "blind"].differences[0].difference == 0
    assert rows["", "", "blind"].differences[0].holds_zero
    assert rows["", "", "blind"].differences[0].high > 0.1  # ten images that never differ prove no equality


def test_seeds_are_averaged() -> None:
    first = run("first", grid(lambda image, turn, mode: True), grid(lambda image, turn, mode: False))
    second = run("second", grid(lambda image, turn, mode: turn == 0))
    overall = compare_runs([first, second]).rows[0]
    assert [mean.mean for mean in overall.means] == [0.5, 0.25]
    assert overall.differences[0].difference == pytest.approx(-0.25)


def test_every_further_run_is_compared_with_the_first() -> None:
    runs = [run(str(number), grid(lambda image, turn, mode, number=number: turn < number)) for number in range(4)]
    overall = compare_runs(runs).rows[0]
    assert [difference.difference for difference in overall.differences] == pytest.approx([0.25, 0.5, 0.75])


def test_only_questions_in_common_count() -> None:
    first = run("first", grid(lambda image, turn, mode: image < 3))
    fewer = run("fewer", [answer for answer in grid(lambda image, turn, mode: False, num_images=6) if answer["turn"] < 2])
    comparison = compare_runs([first, fewer])
    assert (comparison.num_questions, comparison.num_images) == (12, 6)
    assert [told.num_questions for told in comparison.runs] == [40, 12]
    assert comparison.rows[0].means[0].mean == 0.5  # 3 of these 6 images, not 3 of 10


@pytest.mark.parametrize("change", [{"image_sha256": "another"}, {"question": "another?"}, {"expected": "no"}])
def test_a_question_is_another_when_image_text_or_truth_is(change: dict[str, str]) -> None:
    answers = grid(lambda image, turn, mode: True)
    with pytest.raises(ComparisonError, match=r"first, second share no question .*\[evaluation\.dataset\]"):
        compare_runs([run("first", answers), run("second", [answer | change for answer in answers])])


def test_names_of_samples_do_not_matter() -> None:
    answers = grid(lambda image, turn, mode: True)
    renamed = [answer | {"sample_id": "x" + answer["sample_id"], "question_id": "x" + answer["question_id"]} for answer in answers]
    assert compare_runs([run("first", answers), run("second", renamed)]).num_questions == 40


def test_a_question_that_stands_twice_counts_twice() -> None:
    twice = [row("image-1", 0, "both", 1.0), row("image-1", 1, "both", 0.0, question="question 0?")]
    assert compare_runs([run("first", twice), run("second", twice)]).num_questions == 2


def test_modes_in_common() -> None:
    every = run("every", grid(lambda image, turn, mode: True, modes=("blind", "global", "local", "both")))
    some = run("some", grid(lambda image, turn, mode: True, modes=("both", "global")))
    blind = run("blind", grid(lambda image, turn, mode: True, modes=("blind",)))
    assert list(dict.fromkeys(found.mode for found in compare_runs([every, some]).rows)) == ["global", "both"]
    with pytest.raises(ComparisonError, match="no mode in common"):
        compare_runs([some, blind])


def test_a_metric_that_was_not_recorded_is_had_from_the_answers() -> None:
    first, second = run("first", grid(lambda image, turn, mode: True)), run("second", grid(lambda image, turn, mode: turn == 0))
    overall = compare_runs([first, second], "anls").rows[0]
    assert overall.means[1].mean == pytest.approx(0.25 + 0.75 * (1 - 1 / 3))  # "yep" is one letter of three away from "yes"
    assert compare_runs([first, second], "yes_no").rows[0].means[1].mean == 0.25
    with pytest.raises(ComparisonError, match="multiple_choice says nothing about any question of first; give another --metric"):
        compare_runs([first, second], "multiple_choice")


def test_an_interval_that_is_known() -> None:
    """400 images of one question each, a difference of +1, 0 or -1: mean +- 1.96 standard errors."""
    generator = np.random.default_rng(2)
    first, second = generator.random(400) < 0.5, generator.random(400) < 0.6
    answers = [
        [row(f"image-{image}", 0, "both", float(right), detail="large", family="f") for image, right in enumerate(given)] for given in (first, second)
    ]
    (found,) = compare_runs([run("first", answers[0]), run("second", answers[1])]).rows
    above = second.astype(float) - first
    far = 1.96 * above.std(ddof=1) / 20
    assert found.differences[0].low == pytest.approx(above.mean() - far, abs=0.1 * far)
    assert found.differences[0].high == pytest.approx(above.mean() + far, abs=0.1 * far)


def test_pairing_makes_the_interval_of_a_difference_narrow() -> None:
    """Hard images are hard for both: each run's own interval is wide, the difference's is not."""

    def right(image: int, turn: int, mode: str) -> bool:
        return image % 2 == 0

    first, second = run("a", grid(right, num_images=60)), run("b", grid(lambda i, t, m: right(i, t, m) or t == i % 4, num_images=60))
    overall = compare_runs([first, second]).rows[0]
    width = overall.differences[0].high - overall.differences[0].low
    assert width < 0.5 * (overall.means[0].high - overall.means[0].low)
    assert not overall.differences[0].holds_zero


def test_95_percent_intervals_of_differences_hold_the_truth_in_about_95_percent_of_draws() -> None:
    """Images are hard or easy for both runs, the second is better by 0.1 on every one. Of 300 draws the standard error is 0.013."""
    generator = np.random.default_rng(8)
    held = 0
    for _ in range(300):
        ease = generator.beta(1, 1, 40) * 0.9
        luck = {(image, turn, which): generator.random() for image in range(40) for turn in range(3) for which in (0, 1)}
        runs = [
            run(str(which), [
                row(f"image-{image:02d}", turn, "both", float(luck[image, turn, which] < ease[image] + 0.1 * which), detail="large", family="f")
                for image in range(40)
                for turn in range(3)
            ])
            for which in (0, 1)
        ]  # fmt: skip
        difference = compare_runs(runs).rows[0].differences[0]
        held += difference.low <= 0.1 <= difference.high
    assert 0.915 <= held / 300 <= 0.985


def test_the_table_says_what_holds_zero(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    first = replace(run("first", grid(lambda image, turn, mode: turn == 0)), note="seeds 2 are not finished")
    second = run("second", grid(lambda image, turn, mode: turn == 0 or (mode == "both" and turn == 1 + image % 2 and image > 0)))
    print_comparison(compare_runs([first, second]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1. first: 40 questions, evaluate first0; seeds 2 are not finished"
    assert lines[2].startswith("40 questions about 10 images in common, by exact_match, in percent (95 % interval")
    assert lines[3].split("  ")[0] == "questions"
    blind, both = (next(line for line in lines[4:] if f" {mode} " in line) for mode in ("blind", "both"))
    assert re.search(r"25\.0 \(.*\) +25\.0 \(.*\) +\+0\.0 \(-\d+\.\d to \+\d+\.\d\), holds 0$", blind.rstrip())
    assert re.search(r"\+22\.5 \(\+\d+\.\d to \+\d+\.\d\)$", both.rstrip())
    assert re.fullmatch(r"\d of 10 differences have an interval that holds 0: these questions do not tell the runs apart there\.", lines[-1])


def test_json_is_the_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    comparison = compare_runs([run("first", grid(lambda image, turn, mode: True)), run("second", grid(lambda image, turn, mode: False))])
    print_comparison(comparison, as_json=True)
    assert json.loads(capsys.readouterr().out) == to_json(comparison)


# -- what words name


def commit(store: Store, key: str, answers: list[dict[str, Any]]) -> None:
    store.local_path(f"runs/evaluate/{key}").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(answers), store.local_path(f"runs/evaluate/{key}/answers.parquet"))
    record = evaluation(2, answers=f"runs/evaluate/{key}/answers.parquet", metrics=("exact_match",))
    store.write_json(f"runs/evaluate/{key}/COMMITTED.json", to_json(record))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(str(tmp_path / "root"))
    for key, turns in (("aaaa111122223333", 1), ("aaaa444455556666", 2), ("bbbb111122223333", 3)):
        commit(store, key, grid(lambda image, turn, mode, turns=turns: turn < turns))
    store.write_json("runs/evaluate/cccc111122223333/spec.json", {})  # begun
    return store


def test_keys_and_their_beginnings(store: Store) -> None:
    assert find_run("bbbb", store).keys == ("bbbb111122223333",)
    assert find_run("aaaa4444" + "55556666", store).name == "aaaa444455556666"
    assert find_run("bbbb111122223333" + "0" * 48, store).keys == ("bbbb111122223333",)  # a whole fingerprint
    with pytest.raises(ComparisonError, match="2 evaluations have keys that begin with aaaa: aaaa111122223333, aaaa444455556666; give more"):
        find_run("aaaa", store)
    with pytest.raises(NothingThereError, match="no finished evaluation whose key begins with cccc; there are aaaa111122223333, "):
        find_run("cccc", store)
    with pytest.raises(ComparisonError, match="found 1 run; allowed: two or more"):
        find_runs(["bbbb"], store)


def test_a_recipe_names_all_its_finished_seeds(
    store: Store, tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(tiny_recipe(tiny_encoder_folder, tiny_language_model_folder, seeds="[0, 1, 2]"))
    with pytest.raises(NothingThereError, match=rf"holds no finished evaluation of recipe '{path}'; `loupe evaluate {path} --root {tmp_path}/root`"):
        find_run(str(path), store)
    experiment = open_experiment(load_recipe(str(path)), store, ExecutionSettings())
    keys = [fingerprint(experiment.evaluation(seed))[:16] for seed in (0, 1, 2)]
    commit(store, keys[0], grid(lambda image, turn, mode: True))
    commit(store, keys[2], grid(lambda image, turn, mode: False))
    found = find_run(str(path), store)
    assert found.keys == (keys[0], keys[2])
    assert found.note == "seeds 1 are not finished"
    cli.main(["compare", str(path), "bbbb", "--root", str(tmp_path / "root"), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert [part["name"] for part in told["runs"]] == ["tiny", "bbbb111122223333"]
    assert told["rows"][0]["means"][0]["mean"] == 0.5
    assert told["rows"][0]["differences"][0]["difference"] == 0.25
