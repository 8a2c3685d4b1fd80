"""A small export under the real lmms-eval, on a task and a dataset of our own. Skipped where the extra `lmms-eval` is not installed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TASK = """
task: loupe_squares
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function squares.to_visual
doc_to_text: !function squares.to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 4
  temperature: 0
  do_sample: false
  until:
    - "\\n\\n"
process_results: !function squares.score
metric_list:
  - metric: same
    aggregation: mean
    higher_is_better: true
"""

FUNCTIONS = """
def to_visual(doc):
    return [doc["image"].convert("RGB")]

def to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def score(doc, results):
    return {"same": float(results[0] == doc["answer"])}
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, tiny_encoder_folder: Path, tiny_language_model_folder: Path) -> Path:
    """The tiny models with a connector as it is before training."""
    from tests.tiny_training import write_tiny_export

    return write_tiny_export(tmp_path_factory.mktemp("export"), tiny_encoder_folder, tiny_language_model_folder)


def test_the_plugin_is_found_by_its_entry_point() -> None:
    from lmms_eval.models import get_model

    from pipelines.lmms_eval_model import LoupeExport

    assert get_model("loupe") is LoupeExport


def test_a_task_is_answered_as_the_export_answers(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from model.export import load_export
    from tests.tiny_training import draw_square

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    exported = load_export(export)
    rows: list[dict[str, Any]] = []
    for number in range(7):
        drawn = draw_square("charts", number, None)
        question = f"{drawn.turns[number % 2].question}{' Say it.' * (number % 3)}"
        rows.append({"image": {"bytes": drawn.png, "path": None}, "question": question})
        rows[-1]["answer"] = exported.ask(drawn.png, question, max_new_tokens=4).text if number else "something else"
    features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "test.parquet")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "squares.py").write_text(FUNCTIONS)
    (tasks / "squares.yaml").write_text(TASK.format(data=tmp_path / "test.parquet"))
    results = simple_evaluate(
        model="loupe",
        model_args=f"pretrained={export}",
        tasks=["loupe_squares"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False, model_name="loupe"),
        batch_size=3,
        device="cpu",
        log_samples=True,
    )
    found = results["results"]["loupe_squares"]
    assert found["same,none"] == pytest.approx(6 / 7), json.dumps(found, default=str)
    assert os.environ.get("WORLD_SIZE", "1") == "1"
