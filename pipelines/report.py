"""Stage report: the committed records of a run, read back and drawn as one HTML page.

Input: an experiment whose other stages are done. Output: `reports/<name>-<key>/report.html` under the root. The page states what the records say;
nothing is computed here but means over seeds.
"""

import hashlib
import io
import json
import math
import shlex
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.metrics import METRICS, is_zero_or_one
from model.quality import EXACT_DB
from model.specs import PhaseSpec, fingerprint
from model.views import Box, View, ViewPlan, plan_views
from pipelines.errors import NothingThereError
from pipelines.report_page import (
    TEMPLATE,
    TEMPLATES,
    AccuracyCell,
    AccuracyRow,
    Curve,
    DatasetRow,
    MetricRow,
    PageSample,
    PageTurn,
    PhaseCurves,
    PlannedOptions,
    PlannedRow,
    ReportPage,
    StageRow,
    data_uri,
    render_page,
)
from pipelines.stages import shown_path
from pipelines.wording import bytes_text, duration_text
from workers.caching.build import CacheRecord
from workers.commits import Stage, from_json
from workers.dataset.samples import Sample, Turn, read_samples
from workers.evaluation import ClassificationFigure, EvaluationRecord, Score
from workers.execution import Progress
from workers.storage import Store
from workers.training.spec import TrainingRecord, TrainingSpec

if TYPE_CHECKING:
    from pipelines.stages import Experiment, StageRun

__all__ = ["ReportRecord", "template_sha256", "write_report"]

SAMPLES_PER_FAMILY = 2
TURNS_PER_SAMPLE = 4

_FIGURE_WORDS = {
    "precision": "of the answers that say yes, those where it is true",
    "recall": "of the questions where yes is true, those answered so",
    "f1": "harmonic mean of precision and recall",
    "yes_share": "of all answers, those that say yes",
    "unclear_share": "of all answers, those that say neither, or both",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportRecord:
    """Where the report lies."""

    url: str
    path: str
    """Relative to the root."""
    bytes_written: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _SeedRun:
    """What one seed left behind."""

    seed: int
    training_spec: TrainingSpec
    training: TrainingRecord
    evaluation: EvaluationRecord


def write_report(experiment: "Experiment", progress: Progress) -> ReportRecord:
    """Write the report of a finished experiment, or find it written.

    Args:
        experiment: all its other stages are committed.
        progress: told in steps of drawing.

    Returns:
        The record, committed.

    Raises:
        NothingThereError: a stage is not done.
    """
    spec = experiment.report()
    stage = Stage.open(experiment.store, "report", spec)
    if (done := stage.committed(ReportRecord)) is not None:
        return done
    started = time.monotonic()
    progress.start("drawing the report", 2)
    try:
        page = collect_page(experiment)
        progress.advance()
        html = render_page(page).encode()
        path = f"reports/{experiment.file.recipe.name}-{stage.key}/report.html"
        experiment.store.write_bytes(path, html)
        progress.advance()
    finally:
        progress.finish()
    return stage.commit(ReportRecord(url=experiment.store.url(path), path=path, bytes_written=len(html), seconds=time.monotonic() - started))


def _record(experiment: "Experiment", stage: Any, spec: Any) -> dict[str, Any]:
    record = experiment.record(stage, spec)
    if record is None:
        raise NothingThereError(f"the report needs stage {stage}, which is not done in {experiment.store.root}; run `loupe run` on the recipe")
    return record


def collect_page(experiment: "Experiment") -> ReportPage:
    """Read back what the page shows.

    Args:
        experiment: all its other stages are committed.

    Returns:
        The page's data.
    """
    recipe, store = experiment.file.recipe, experiment.store
    dataset = _record(experiment, "build-dataset", experiment.dataset)
    export = _record(experiment, "export", experiment.export())
    runs = [
        _SeedRun(
            seed=seed,
            training_spec=experiment.training(seed),
            training=from_json(TrainingRecord, _record(experiment, "train-connector", experiment.training(seed))),
            evaluation=from_json(EvaluationRecord, _record(experiment, "evaluate", experiment.evaluation(seed))),
        )
        for seed in recipe.seeds
    ]
    samples = {asked: read_samples(store, fingerprint(spec)) for spec, _, asked in experiment.data}
    first = runs[0].evaluation
    modes, metric = first.modes, first.metrics[0]
    accuracy = accuracy_rows([run.evaluation for run in runs], modes)
    stages = _stage_rows(experiment, export, runs)
    shown = _page_samples(experiment, samples[experiment.asked is not None], first)
    refusals: dict[str, dict[str, int]] = {
        run.name: _record(experiment, run.stage, run.spec)["quarantined_by_reason"]
        for run in _data_runs(experiment)
        if run.stage != "calibrate-features"
    }
    # Which conversations and questions are refused depends on no seed.
    refusals |= {"train-connector": runs[0].training.quarantined_by_reason, "evaluate": first.quarantined_by_reason}
    return ReportPage(
        title=recipe.name,
        description=recipe.description,
        headline=_headline(accuracy, metric, dataset, stages),
        facts=_facts(experiment, runs),
        dataset=tuple(row for asked, some in samples.items() for row in _dataset_rows(some, asked=asked)),
        quarantine=tuple((stage, reason, number) for stage, refused in refusals.items() for reason, number in refused.items()),
        phases=_phase_curves(store, runs),
        modes=modes,
        accuracy=accuracy,
        metric=metric,
        metric_is_share=_is_share(metric),
        rule=first.rules[metric],
        more_metrics=metric_rows([run.evaluation for run in runs]),
        asked=_asked_words(first),
        samples=shown,
        stages=stages,
        cache_plan=_planned_rows(experiment),
        cache_options=_planned_options(experiment),
        ask_command=shlex.join(
            ["loupe", "ask", *(shown_path(store.reference_url(export[name])) for name in ("folder", "check_image")), export["check_question"]]
        ),
        recipe_text=experiment.file.text,
        seeds=recipe.seeds,
    )


def template_sha256(*sources: Path) -> str:
    """Digest of everything that collects, words and draws the page, so that a change of it makes a new report.

    Args:
        sources: the files; those of this package when none are given.
    """
    digest = hashlib.sha256()
    for path in sources or (TEMPLATES / TEMPLATE, *(Path(__file__).with_name(name) for name in ("report.py", "report_page.py", "wording.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _data_runs(experiment: "Experiment") -> list["StageRun"]:
    """The stages that build and cache, of the dataset that is trained on and of the one that is asked alone."""
    from pipelines.stages import stage_runs

    return list(stage_runs(experiment, "cache-features"))


def _is_share(metric: str) -> bool:
    return metric in METRICS and is_zero_or_one(metric)


def _asked_words(evaluation: EvaluationRecord) -> str:
    """Which pictures were asked about."""
    if evaluation.of_training_dataset:
        return "Held-out pictures"
    left_out = evaluation.num_images_trained_on
    more = f", less {left_out} that are in the training split ({evaluation.num_questions_trained_on} questions)" if left_out else ""
    return f"{evaluation.num_images} pictures of a dataset of their own{more}"


def accuracy_rows(evaluations: Sequence[EvaluationRecord], modes: Sequence[str]) -> tuple[AccuracyRow, ...]:
    """The accuracy table: all questions, by detail, by family; each seed's scores by the main metric side by side.

    Args:
        evaluations: one per seed, of the same questions.
        modes: columns.

    Returns:
        Rows in the table's order.
    """
    found: dict[tuple[str, str, str], list[Score]] = defaultdict(list)
    for evaluation in evaluations:
        for score in evaluation.scores:
            if score.metric == evaluation.metrics[0] and not score.kind and not (score.family and score.detail):
                found[score.mode, score.family, score.detail].append(score)
    groups = [("all questions", "overall", "", "")]
    groups += [(f"{detail} detail", "detail", "", detail) for detail in ("small", "large")]
    groups += [(family, "family", family, "") for family in sorted({family for _, family, _ in found if family})]
    rows = []
    for label, group, family, detail in groups:
        if (modes[0], family, detail) not in found:
            continue
        cells = {
            mode: AccuracyCell(
                points=tuple(score.points for score in found[mode, family, detail]),
                num_asked=tuple(score.total for score in found[mode, family, detail]),
                ends=tuple((score.low, score.high) for score in found[mode, family, detail]),
            )
            for mode in modes
        }
        majority = found.get(("majority", family, detail))
        rows.append(
            AccuracyRow(
                label=label,
                group=group,
                num_questions=max(cells[modes[0]].num_asked),
                majority=majority[0].fraction if majority else None,
                cells=cells,
            )
        )
    return tuple(rows)


def metric_rows(evaluations: Sequence[EvaluationRecord]) -> tuple[MetricRow, ...]:
    """All questions by each further metric, and the figures of `yes_no`; means over the seeds, of the ends of their intervals too.

    Args:
        evaluations: one per seed, of the same questions.

    Returns:
        Rows in the order of the metrics.
    """
    first, rows = evaluations[0], []

    def cells(found: Sequence[Score | ClassificationFigure]) -> dict[str, tuple[float, float, float]]:
        by_mode = {mode: [item for item in found if item.mode == mode] for mode in first.modes}
        return {
            mode: (_mean([item.fraction for item in items]), _mean([item.low for item in items]), _mean([item.high for item in items]))
            for mode, items in by_mode.items()
        }

    for metric in first.metrics[1:]:
        overall = [
            score
            for evaluation in evaluations
            for score in evaluation.scores
            if score.metric == metric and not (score.family or score.detail or score.kind)
        ]
        rows.append(MetricRow(label=metric, rule=first.rules[metric], num_questions=overall[0].total, cells=cells(overall)))
    for name in dict.fromkeys(figure.name for figure in first.figures):
        figures = [figure for evaluation in evaluations for figure in evaluation.figures if figure.name == name]
        rows.append(MetricRow(label=f"yes_no: {name.replace('_', ' ')}", rule=_FIGURE_WORDS[name], num_questions=None, cells=cells(figures)))
    return tuple(rows)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _headline(accuracy: Sequence[AccuracyRow], metric: str, dataset: dict[str, Any], stages: Sequence[StageRow]) -> tuple[tuple[str, str], ...]:
    overall = accuracy[0].cells
    tiles = []
    both = overall.get("both") or overall.get("global")
    if both is not None and both.mean is not None:
        word = "right" if metric == "exact_match" else metric.replace("_", " ")
        tiles.append((f"both views, {word}" if "both" in overall else f"global view, {word}", f"{100 * both.mean:.1f} %"))
    small = next((row.cells for row in accuracy if row.label == "small detail"), {})
    for cells, mode, words in ((overall, "blind", "points over blind"), (small, "global", "points over global only, small detail")):
        if "both" in cells and mode in cells and (best := cells["both"].mean) is not None and (mean := cells[mode].mean) is not None:
            tiles.append((words, f"{100 * (best - mean):+.1f}"))
    num_text_only = dataset.get("num_text_only", 0)
    tiles.append(("pictures", str(dataset["num_samples"] - num_text_only)))
    if num_text_only:
        tiles.append(("conversations without a picture", str(num_text_only)))
    tiles.append(("questions", str(dataset["num_turns"])))
    tiles.append(("all stages", duration_text(sum(row.seconds for row in stages))))
    return tuple(tiles)


_STORED = {
    "cached": "stored as {}",
    "global_cached": "of the global view stored as {}, of local views encoded whenever one is seen",
    "live": "encoded whenever a view is seen, nothing stored",
}


def _facts(experiment: "Experiment", runs: Sequence[_SeedRun]) -> tuple[tuple[str, str], ...]:
    encoder, features, training = experiment.encoder, experiment.features, runs[0].training
    size = f"{encoder.num_blocks} blocks of {encoder.width}, views of {encoder.view_px} px in {encoder.num_patches} patches"
    return (
        ("Encoder", f"{encoder.model}: {size}"),
        ("Language model", experiment.language_model.model),
        ("Maps of the global view", ", ".join(map_spec.name for map_spec in features.global_maps)),
        ("Maps of the local views", ", ".join(map_spec.name for map_spec in features.local_maps) or "none"),
        ("Trained parameters", ", ".join(f"{block} {number:,}" for block, number in training.parameters.items())),
        ("Training", f"{training.steps} steps, {training.samples} samples seen, {training.samples_per_second:.1f} samples/s on {training.device}"),
        ("Asked", _asked_words(runs[0].evaluation)),
        ("Seeds", ", ".join(str(run.seed) for run in runs)),
        ("Features", _STORED[experiment.file.recipe.features.source].format(features.precision)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in training.versions.items())),
        ("Root", experiment.store.root),
    )


def _dataset_note(dataset: dict[str, Any]) -> str:
    num_text_only = dataset.get("num_text_only", 0)
    text_only = f", {num_text_only} conversations without a picture" if num_text_only else ""
    return f"{dataset['num_samples'] - num_text_only} pictures{text_only}, {dataset['num_turns']} questions"


def _dataset_rows(samples: Sequence[Sample], *, asked: bool) -> tuple[DatasetRow, ...]:
    rows = []
    for family in sorted({sample.family for sample in samples}):
        mine = [sample for sample in samples if sample.family == family]
        splits = Counter(sample.split for sample in mine)
        turns = [turn for sample in mine for turn in sample.turns]
        rows.append(
            DatasetRow(
                family=f"{family} (asked)" if asked else family,
                num_train=splits["train"],
                num_held_out=splits["held_out"],
                num_turns=len(turns),
                num_small_turns=sum(turn.detail == "small" for turn in turns),
            )
        )
    return tuple(rows)


def _data_row(run: "StageRun", record: dict[str, Any]) -> StageRow:
    size: int | None
    if run.stage == "build-dataset":
        size, note = record["image_bytes"], _dataset_note(record)
    elif run.stage == "calibrate-features":
        size, note = None, f"int8 for {len(record['maps']) - len(record['fp16_maps'])} of {len(record['maps'])} maps"
    else:
        # Of text alone nothing is cached, and nothing compared.
        least = min(record["quality"].values(), key=lambda quality: quality["snr_db"], default={"snr_db": EXACT_DB})
        size, note = record["written_bytes"], f"{record['num_global_views']} global and {record['num_local_views']} local views"
        if least["snr_db"] < EXACT_DB:  # both rounded down
            note += f"; what is stored keeps at least {math.floor(10 * least['snr_db']) / 10:.1f} dB of signal over rounding"
            note += f", of the worst token a cosine of {math.floor(1e6 * least['worst_cosine']) / 1e6:.6f}"
    return StageRow(name=run.name, key=run.key, seconds=record["seconds"], num_bytes=size, note=note)


def _stage_rows(experiment: "Experiment", export: dict[str, Any], runs: Sequence[_SeedRun]) -> tuple[StageRow, ...]:
    rows = [_data_row(run, _record(experiment, run.stage, run.spec)) for run in _data_runs(experiment)]
    for run in runs:
        key = fingerprint(run.training_spec)[:16]
        note = f"{run.training.steps} steps, {len(run.training.phases)} phases"
        rows.append(StageRow(name=f"train seed {run.seed}", key=key, seconds=run.training.seconds, num_bytes=run.training.bytes_written, note=note))
    for run in runs:
        key = fingerprint(experiment.evaluation(run.seed))[:16]
        note = f"{run.evaluation.num_questions} questions in {len(run.evaluation.modes)} modes"
        if left_out := run.evaluation.num_images_trained_on:
            note += f"; {left_out} images not asked, trained on"
        rows.append(StageRow(name=f"evaluate seed {run.seed}", key=key, seconds=run.evaluation.seconds, num_bytes=None, note=note))
    rows.append(StageRow(name="export", key=fingerprint(experiment.export())[:16], seconds=export["seconds"], num_bytes=export["num_bytes"], note=""))
    return tuple(rows)


def _planned_rows(experiment: "Experiment") -> tuple[PlannedRow, ...]:
    """The cache's plan beside its outcome; nothing where other runs had made some of it before, or where it is no cache."""
    from pipelines.cache_plan import planned_cache

    if not experiment.caches or (planned := planned_cache(experiment)) is None:
        return ()
    made = from_json(CacheRecord, _record(experiment, "cache-features", experiment.cache))
    if made.num_held or made.written_bytes < made.feature_bytes:  # of images whose other maps were there, only some were written
        return ()
    found_views = made.num_global_views + made.num_local_views
    rows: list[tuple[str, float, float, str, str]] = [
        ("views", planned.num_views, found_views, f"{planned.num_views:,}", f"{found_views:,}"),
        ("bytes", planned.total_bytes, made.written_bytes, bytes_text(planned.total_bytes), bytes_text(made.written_bytes)),
    ]
    if planned.seconds is not None:
        rows.append(("time, with starting", planned.seconds, made.seconds, duration_text(planned.seconds), duration_text(made.seconds)))
    return tuple(
        PlannedRow(what=what, planned=shown, found=shown_found, difference=f"{100 * (found / max(plan, 1e-9) - 1):+.1f} %")
        for what, plan, found, shown, shown_found in rows
    )


def _planned_options(experiment: "Experiment") -> PlannedOptions | None:
    """What the plan counted, where this machine made it."""
    from pipelines.cache_plan import planned_cache

    if not experiment.caches or (planned := planned_cache(experiment)) is None or (text := planned.text) is None:
        return None
    own = experiment.file.recipe.name
    facts = text.facts if planned.recipe in ("", own) else (("planned for", f"recipe {planned.recipe}, which uses the same cache"), *text.facts)
    return PlannedOptions(facts=facts, headings=text.headings, rows=text.options, recommended=text.recommended)


def _phase_curves(store: Store, runs: Sequence[_SeedRun]) -> tuple[PhaseCurves, ...]:
    """Losses per phase, steps counted from 1 in each."""
    losses: dict[str, dict[int, list[float]]] = defaultdict(dict)
    for run in runs:
        if not run.training.phases:
            continue
        text = store.read_bytes(f"runs/train-connector/{fingerprint(run.training_spec)[:16]}/metrics.jsonl").decode()
        for row in map(json.loads, text.splitlines()):
            losses[row["phase"]].setdefault(run.seed, []).append(float(row["loss"]))
    phases: tuple[PhaseSpec, ...] = runs[0].training_spec.schedule.phases
    return tuple(
        PhaseCurves(
            phase=phase.name,
            trained=", ".join(phase.train),
            curves=tuple(
                Curve(seed=seed, steps=tuple(range(1, len(values) + 1)), losses=tuple(values)) for seed, values in losses[phase.name].items()
            ),
        )
        for phase in phases
    )


# -- samples with their views


def _overlap(view: View, box: Box) -> float:
    width = min(view.source.right, box.right) - max(view.source.left, box.left)
    height = min(view.source.bottom, box.bottom) - max(view.source.top, box.top)
    return max(0.0, width) * max(0.0, height)


def answer_view(plan: ViewPlan, evidence: tuple[float, float, float, float] | None) -> View:
    """The local view that shows most of where the answer stands; the first one when that is nowhere in particular."""
    if evidence is None:
        return plan.local_views[0]
    left, top, right, bottom = evidence
    box = Box(left=left, top=top, right=right, bottom=bottom)
    return max(plan.local_views, key=lambda view: _overlap(view, box))


def _clipped(box: Box, plan: ViewPlan) -> tuple[float, float, float, float]:
    width, height = plan.image_width_px, plan.image_height_px
    return max(0.0, box.left), max(0.0, box.top), min(float(width), box.right), min(float(height), box.bottom)


def _shown_turns(turns: Sequence[Turn], asked: Collection[int]) -> list[int]:
    """Of those that were asked. Small details first, since the picture frames the first one's answer."""
    order = sorted(asked, key=lambda place: (turns[place].detail != "small" or turns[place].evidence is None, place))
    return order[:TURNS_PER_SAMPLE]


def _answers(store: Store, evaluation: EvaluationRecord) -> dict[tuple[str, int], dict[str, tuple[str, float | None]]]:
    """(sample, turn) -> mode -> answer and its score by the main metric."""
    import pyarrow.parquet as pq

    metric = evaluation.metrics[0]
    table = pq.read_table(io.BytesIO(store.read_bytes(evaluation.answers)), columns=["sample_id", "turn", "mode", "answer", metric])
    given: dict[tuple[str, int], dict[str, tuple[str, float | None]]] = defaultdict(dict)
    for row in table.to_pylist():
        given[row["sample_id"], row["turn"]][row["mode"]] = (row["answer"], row[metric])
    return given


def _page_samples(experiment: "Experiment", samples: Sequence[Sample], evaluation: EvaluationRecord) -> tuple[PageSample, ...]:
    """The first pictures of each family that questions were asked about; not chosen by how well they went."""
    given = _answers(experiment.store, evaluation)
    asked = {sample_id for sample_id, _ in given}
    shown = []
    for family in sorted({sample.family for sample in samples}):
        mine = [sample for sample in samples if sample.family == family and sample.sample_id in asked]
        shown += [_page_sample(experiment, sample, given, evaluation.modes) for sample in mine[:SAMPLES_PER_FAMILY]]
    return tuple(shown)


def _page_sample(
    experiment: "Experiment", sample: Sample, given: dict[tuple[str, int], dict[str, tuple[str, float | None]]], modes: Sequence[str]
) -> PageSample:
    from PIL import Image

    from model.images import cut_views, decode_image

    image = decode_image(experiment.store.read_reference(sample.image_path))
    plan = plan_views(image.width, image.height, experiment.encoder.view_px, experiment.dataset.views)
    views = cut_views(image, plan, mean_colour=experiment.encoder.mean_colour)
    asked = [place for place in range(len(sample.turns)) if (sample.sample_id, place) in given]  # not all, under `max_questions`
    turns = [(place, sample.turns[place]) for place in _shown_turns(sample.turns, asked)]
    evidence = turns[0][1].evidence
    holder = answer_view(plan, evidence)

    def encoded(picture: Any, kind: str) -> str:
        out = io.BytesIO()
        picture.save(out, kind, **({"quality": 88} if kind == "JPEG" else {"optimize": True}))
        return data_uri(out.getvalue(), f"image/{kind.lower()}")

    return PageSample(
        sample_id=sample.sample_id,
        family=sample.family,
        image_uri=encoded(image, "JPEG"),
        width_px=image.width,
        height_px=image.height,
        grid=tuple(_clipped(view.source, plan) for view in plan.local_views),
        evidence=evidence,
        global_uri=encoded(Image.fromarray(views[0].transpose(1, 2, 0)), "PNG"),
        answer_uri=encoded(Image.fromarray(views[holder.index].transpose(1, 2, 0)), "PNG"),
        answer_view=holder.index,
        turns=tuple(
            PageTurn(
                question=turn.question,
                truth=turn.answer,
                detail=turn.detail,
                answers=tuple((mode, *given[sample.sample_id, place][mode]) for mode in modes if mode in given[sample.sample_id, place]),
            )
            for place, turn in turns
        ),
    )
