"""Stage build-dataset: sources -> images, samples, quarantine.

The items of all sources stand in one frozen order, cut into units of a fixed number. A unit is a plain task: it writes its images
(content-addressed) and stages its candidate rows as one file. When all units are staged, this process merges duplicates of an image, writes the
samples' files and commits them at once: a dataset is in the table whole or not at all. Invariant: items = samples + duplicates + quarantined.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from model.specs import fingerprint
from workers.commits import Stage, from_json, to_json
from workers.dataset.rendering import FAMILIES, render
from workers.dataset.samples import SAMPLES_SCHEMA, SAMPLES_TABLE, Sample, samples_to_table
from workers.dataset.sources import Item, Renderer, load_item, read_records
from workers.dataset.spec import DatasetSpec, LlavaJsonSourceSpec, RenderedSourceSpec, source_label
from workers.errors import IncompleteError, ObjectNotFoundError, SourceError
from workers.execution import ExecutionSettings, Progress
from workers.quarantine import QuarantineRow, check_budget, commit_quarantine
from workers.runtime import Cluster, stream_tasks
from workers.storage import Store
from workers.tables import Table, TableFile

__all__ = ["DatasetRecord", "build_dataset", "samples_table"]

_SAMPLES_PER_FILE = 4096
_FROZEN = "frozen.json"
"""Names the staged units that make the dataset; made once, before the tables are written. Whoever comes later takes these and no others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetRecord:
    """What build-dataset did."""

    dataset_fingerprint: str
    num_items: int
    num_samples: int
    num_train: int
    num_train_by_source: dict[str, int]
    """By the source's label; an image of several sources counts for the first one."""
    num_held_out: int
    num_text_only: int = 0
    """Samples without an image, on both sides; they count in the numbers above too. None in datasets of before there were such."""
    num_train_text_only_by_source: dict[str, int] = field(default_factory=dict)
    """By the source's label; sources without such are left out."""
    num_turns: int
    num_small_turns: int
    num_duplicates: int
    """Items whose image another item with a lower index has; their other questions were added to that one's sample. And text-only items that say
    what another one says."""
    num_quarantined: int
    quarantined_by_reason: dict[str, int]
    samples_by_family: dict[str, int]
    image_bytes: int
    num_units: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _UnitJob:
    """One unit of work, as it travels to a task."""

    spec: DatasetSpec
    root: str
    prefix: str
    """Where the unit's rows are staged, without the digest of what they say."""
    items: tuple[Item, ...]
    renderer: Renderer


@dataclass(frozen=True, kw_only=True, slots=True)
class _StagedUnit:
    """What a unit found: everything that its rows in the tables will say."""

    samples: tuple[Sample, ...]
    image_bytes: tuple[int, ...]
    quarantined: tuple[QuarantineRow, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _UnitReport:
    """What a task tells about its unit."""

    path: str
    num_items: int
    quarantined: tuple[QuarantineRow, ...]


def samples_table(store: Store) -> Table:
    """The table of all datasets' samples."""
    return Table(store, SAMPLES_TABLE, SAMPLES_SCHEMA, ("dataset",))


def build_dataset(
    spec: DatasetSpec, store: Store, execution: ExecutionSettings, progress: Progress, *, cluster: Cluster | None = None, renderer: Renderer = render
) -> DatasetRecord:
    """Build a dataset, or finish one that was interrupted, or find it done.

    Args:
        spec: what it is made of.
        store: where it goes.
        execution: images_per_build_unit, images_in_flight_units, max_quarantined_fraction and Ray's settings count.
        progress: told in items.
        cluster: where units run; None starts Ray.
        renderer: draws the pictures of rendered sources.

    Returns:
        The stage's record.

    Raises:
        SourceError: an unknown family, or records that are not what the spec says.
        ErrorBudgetError: too many items of a source were refused.
        IncompleteError: the books do not balance.
    """
    stage = Stage.open(store, "build-dataset", spec)
    done = stage.committed(DatasetRecord)
    if done is not None:
        return done
    store.check_writable()
    _check_families(spec, renderer)
    try:
        with stage.attempt() as timer:
            sizes = [source.num_images if isinstance(source, RenderedSourceSpec) else len(read_records(source)) for source in spec.sources]
            unit_size = _frozen_plan(stage, sum(sizes), execution.images_per_build_unit)
            if not store.exists(stage.path(_FROZEN)):
                staged = _stage_units(stage, spec, sizes, unit_size, execution, progress, cluster, renderer)
                store.create_json(stage.path(_FROZEN), {"units": staged})
            # Of two runs at once one has frozen its units, and both go on with those.
            units = [_read_unit(store, path) for path in store.read_json(stage.path(_FROZEN))["units"]]
            record = stage.commit(replace(_finish(stage, spec, sum(sizes), units), seconds=timer.seconds))
    except ObjectNotFoundError:
        # The other one of two runs may have committed and cleaned up meanwhile.
        done = stage.committed(DatasetRecord)
        if done is None:
            raise
        return done
    for path in store.list(stage.path("staged")):
        store.delete(path)  # they are in the tables now
    return record


def _check_families(spec: DatasetSpec, renderer: Renderer) -> None:
    if renderer is not render:
        return
    unknown = [source.family for source in spec.sources if isinstance(source, RenderedSourceSpec) and source.family not in FAMILIES]
    if unknown:
        raise SourceError(f"unknown family {unknown[0]!r}; rendered sources can draw {', '.join(FAMILIES)}")


def _frozen_plan(stage: Stage, num_items: int, images_per_unit: int) -> int:
    """Items per unit, as first planned: a resumed run must cut where the first one did."""
    stage.store.create_json(stage.path("units.json"), {"num_items": num_items, "items_per_unit": images_per_unit})
    plan = stage.store.read_json(stage.path("units.json"))
    if plan["num_items"] != num_items:
        raise IncompleteError(
            f"{stage.store.url(stage.path('units.json'))} was planned for {plan['num_items']} items, the sources have {num_items} now"
        )
    return int(plan["items_per_unit"])


def _unit_items(spec: DatasetSpec, sizes: Sequence[int], unit_size: int, wanted: set[int]) -> Iterator[tuple[int, tuple[Item, ...]]]:
    """The wanted units with their items, in order. Records of a source are read once and dropped before the next source."""
    unit: list[Item] = []
    index = 0
    for source, size in zip(spec.sources, sizes, strict=True):
        records = read_records(source) if isinstance(source, LlavaJsonSourceSpec) else None
        for number in range(size):
            record = None if records is None else json.dumps(records[number])
            unit.append(Item(index=index, source=source, number=number, record=record))
            index += 1
            if len(unit) == unit_size or index == sum(sizes):
                place = (index - 1) // unit_size
                if place in wanted:
                    yield place, tuple(unit)
                unit = []


def _staged_place(path: str) -> int:
    """Which unit a staged file is of: `.../unit-000003-<digest>.json` is of the fourth."""
    return int(path.rsplit("-", 2)[1])


def _stage_units(
    stage: Stage,
    spec: DatasetSpec,
    sizes: Sequence[int],
    unit_size: int,
    execution: ExecutionSettings,
    progress: Progress,
    cluster: Cluster | None,
    renderer: Renderer,
) -> list[str]:
    """Run the units that are not staged yet; return where all are staged, in order."""
    store = stage.store
    num_items = sum(sizes)
    num_units = -(-num_items // unit_size)
    prefixes = [stage.path(f"staged/unit-{place:06d}-") for place in range(num_units)]
    expected = {source_label(source): size for source, size in zip(spec.sources, sizes, strict=True)}
    staged: dict[int, str] = {}
    num_done = 0
    for path in store.list(stage.path("staged")):
        unit = _read_unit(store, path)
        place = _staged_place(path)
        # A unit with refused items runs again: whoever resumes may have repaired them.
        if not unit.quarantined and place not in staged:
            staged[place] = path
            num_done += len(unit.samples)
    wanted = set(range(num_units)) - staged.keys()
    if wanted:
        jobs = (
            _UnitJob(spec=spec, root=store.root, prefix=prefixes[place], items=items, renderer=renderer)
            for place, items in _unit_items(spec, sizes, unit_size, wanted)
        )
        progress.start("building images", num_items, num_done)
        try:
            quarantined: dict[str, list[QuarantineRow]] = {}
            for report in stream_tasks(build_unit, jobs, execution, cluster):
                staged[_staged_place(report.path)] = report.path
                for row in report.quarantined:
                    quarantined.setdefault(row.source, []).append(row)
                check_budget(quarantined, expected, execution.max_quarantined_fraction)
                progress.advance(report.num_items, quarantined=sum(map(len, quarantined.values())))
        finally:
            progress.finish()
    return [staged[place] for place in range(num_units)]


def build_unit(job: _UnitJob) -> _UnitReport:
    """Run one unit: write its images, stage its rows. A pure function of the job; may run twice.

    Args:
        job: the unit.

    Returns:
        Counts and refusals.
    """
    store = Store(job.root)
    samples, sizes, quarantined = [], [], []
    for item in job.items:
        loaded = load_item(item, job.spec, store, job.renderer)
        if isinstance(loaded, QuarantineRow):
            quarantined.append(loaded)
        else:
            samples.append(loaded[0])
            sizes.append(loaded[1])
    unit = _StagedUnit(samples=tuple(samples), image_bytes=tuple(sizes), quarantined=tuple(quarantined))
    store.sync([sample.image.path for sample in samples if sample.image is not None and "://" not in sample.image.path])
    # Named by what it says, so that no other run can change a unit that this one has taken.
    rows = to_json(unit)
    path = f"{job.prefix}{hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:12]}.json"
    store.write_json(path, rows)
    return _UnitReport(path=path, num_items=len(job.items), quarantined=unit.quarantined)


def _read_unit(store: Store, path: str) -> _StagedUnit:
    return from_json(_StagedUnit, store.read_json(path), where=store.url(path))


def merge_duplicates(candidates: Sequence[Sample]) -> tuple[list[Sample], int]:
    """One sample per image: the one with the lowest index, with the questions of the others added behind its own.

    Of text-only samples, one per conversation.

    Args:
        candidates: in any order.

    Returns:
        Samples by index, and how many candidates were merged away.
    """
    merged: dict[str, Sample] = {}
    for sample in sorted(candidates, key=lambda candidate: candidate.index):
        identity = sample.identity
        first = merged.get(identity)
        if first is None:
            merged[identity] = sample
        elif not first.text_only:
            asked = {turn.question for turn in first.turns}
            added = tuple(turn for turn in sample.turns if turn.question not in asked)
            merged[identity] = replace(first, turns=(*first.turns, *added))
    samples = sorted(merged.values(), key=lambda sample: sample.index)
    return samples, len(candidates) - len(samples)


def _finish(stage: Stage, spec: DatasetSpec, num_items: int, units: Sequence[_StagedUnit]) -> DatasetRecord:
    """Merge, write and commit the tables, and balance the books."""
    store = stage.store
    samples, num_duplicates = merge_duplicates([sample for unit in units for sample in unit.samples])
    quarantined = [row for unit in units for row in unit.quarantined]
    if len(samples) + num_duplicates + len(quarantined) != num_items:
        raise IncompleteError(
            f"dataset {stage.key}: {num_items} items were expected, found {len(samples)} samples, {num_duplicates} duplicates "
            f"and {len(quarantined)} refused"
        )
    commit_quarantine(stage, quarantined)
    table = samples_table(store)
    table.ensure()
    partition = {"dataset": stage.key}
    files: list[TableFile] = []
    for place, start in enumerate(range(0, len(samples), _SAMPLES_PER_FILE)):
        rows = samples_to_table(samples[start : start + _SAMPLES_PER_FILE])
        files.append(table.write_file(partition, f"part-{place:06d}.parquet", [rows]))
    table.commit(files)
    num_committed = sum(file.num_rows for file in table.files(partition))
    if num_committed != len(samples):
        raise IncompleteError(
            f"{store.url(SAMPLES_TABLE)}: {len(samples)} samples of dataset {stage.key} were written, the table holds {num_committed}"
        )
    sizes = {sample.identity: size for unit in units for sample, size in zip(unit.samples, unit.image_bytes, strict=True)}
    turns = [turn for sample in samples for turn in sample.turns]
    return DatasetRecord(
        dataset_fingerprint=fingerprint(spec),
        num_items=num_items,
        num_samples=len(samples),
        num_train=sum(sample.split == "train" for sample in samples),
        num_train_by_source=dict(Counter(sample.source for sample in samples if sample.split == "train")),
        num_held_out=sum(sample.split == "held_out" for sample in samples),
        num_text_only=sum(sample.text_only for sample in samples),
        num_train_text_only_by_source=dict(Counter(sample.source for sample in samples if sample.split == "train" and sample.text_only)),
        num_turns=len(turns),
        num_small_turns=sum(turn.detail == "small" for turn in turns),
        num_duplicates=num_duplicates,
        num_quarantined=len(quarantined),
        quarantined_by_reason=dict(sorted(Counter(row.reason for row in quarantined).items())),
        samples_by_family=dict(sorted(Counter(sample.family for sample in samples).items())),
        image_bytes=sum(sizes.values()),
        num_units=len(units),
        seconds=0.0,
    )
