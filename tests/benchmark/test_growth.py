"""Claim guarded: no step of a cache's life grows faster than its images, and a table of a million opens as one of ten thousand does.

Tables of 10^4, 10^5 and 10^6 images of ViT-B/16's maps, 1 + 4 views, in units of 64 MiB: the log of the features and the whole index say what a run
writes there; all but the last commits are larger than a run's, which would take hours. Of the features alone the last units' files are there, and the
batch that is read is theirs. Steps are medians of some rounds.

SIZES gives other numbers of images; with PLOT=FILE.svg the figure of the documents is drawn.
"""

import os
import random
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from model.specs import FeatureSpec
from tests.benchmark.test_reading_speed import PER_UNIT, reading_spec, samples_of, write_ours
from workers.caching.index import FeatureIndex, compact_index, write_index_rows
from workers.caching.layout import BRANCHES, INDEX_SCHEMA, features_table, file_name, index_table, map_set
from workers.caching.reader import CachedFeatures
from workers.caching.units import UnitSize, plan_units
from workers.commits import Stage
from workers.dataset.samples import SAMPLES_SCHEMA, SAMPLES_TABLE, Sample, read_images, read_samples
from workers.storage import Store
from workers.tables import Table, TableFile
from workers.training.batches import sample_index

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(7200)]

SIZES = tuple(int(size) for size in os.environ.get("SIZES", "10000,100000,1000000").split(","))
BATCH, ROUNDS, NUM_COMMITS, UNITS_OF_A_COMMIT, INDEX_FILES = 32, 5, 20, 16, 64
UNIT_BYTES = 64 * 2**20
NUM_REAL = 2 * BATCH
Steps = dict[str, float]
"""Seconds by step."""


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def middle(work: Callable[[], Any], rounds: int = ROUNDS) -> float:
    return median(seconds(work) for _ in range(rounds))


def write_samples(store: Store, spec: FeatureSpec, samples: list[Sample]) -> None:
    """The dataset's table, a turn for each image."""
    table = Table(store, SAMPLES_TABLE, SAMPLES_SCHEMA, ("dataset",))
    table.ensure()
    turn = {"question": "What is written on the sign at the left?", "answer": "Platform nine", "kind": "", "detail": "small", "shown": []}
    files = []
    for number, start in enumerate(range(0, len(samples), 50_000)):
        part = samples[start : start + 50_000]
        columns = {
            "sample_id": [sample.sample_id for sample in part],
            "index": [sample.index for sample in part],
            "image_sha256": [sample.image_sha256 for sample in part],
            "image_path": [sample.image_path for sample in part],
            "width_px": [448] * len(part),
            "height_px": [448] * len(part),
            "family": ["photographs"] * len(part),
            "source": ["source"] * len(part),
            "split": ["train"] * len(part),
            "licence": ["none"] * len(part),
            "detail_score": [0.5] * len(part),
            "turns": [[turn]] * len(part),
        }
        rows = pa.table(columns, schema=SAMPLES_SCHEMA)
        files.append(table.write_file({"dataset": spec.dataset_fingerprint[:16]}, f"part-{number:06d}.parquet", [rows]))
    table.commit(files)


def unit_files(spec: FeatureSpec, samples: list[Sample]) -> list[TableFile]:
    """What a unit would have written."""
    files = []
    for branch in BRANCHES:
        maps = spec.maps(branch)
        partition = {"branch": branch, "maps": map_set(maps)}
        name = file_name(spec.encoding, branch, [sample.image_sha256 for sample in samples], {map_set(maps): []})
        views = len(samples) * (1 if branch == "global" else 4)
        path = f"branch={branch}/maps={partition['maps']}/{name}"
        files.append(TableFile(path=path, num_rows=views, size_bytes=views * spec.view_bytes(branch), partition=partition))
    return files


def write_index(store: Store, spec: FeatureSpec, files: list[list[TableFile]], units: list[list[Sample]]) -> None:
    """Rows of all images, in as many files as a run leaves before it puts them together."""
    table = index_table(store, spec.encoding)
    table.ensure()
    written = []
    for place, branch in enumerate(BRANCHES):
        num_maps = len(spec.maps(branch))
        share = -(-len(units) // INDEX_FILES)
        for start in range(0, len(units), share):
            told = list(zip(files[start : start + share], units[start : start + share], strict=True))
            images = [bytes.fromhex(sample.image_sha256) for _, unit in told for sample in unit]
            rows = pa.table(
                {
                    "image_sha256": pa.array(images, pa.binary()),
                    "file": pa.array([unit_file[place].path for unit_file, unit in told for _ in unit], pa.string()),
                    "row_group": pa.array([group for _, unit in told for group in range(len(unit))], pa.int32()),
                    "num_views": pa.array([1 if branch == "global" else 4] * len(images), pa.int32()),
                    "offsets": pa.array([np.arange(4, 4 + 2 * num_maps, dtype="<i8").tobytes()] * len(images), pa.binary()),
                    "checksums": pa.array([bytes(8 * num_maps)] * len(images), pa.binary()),
                },
                schema=INDEX_SCHEMA,
            )
            written.append(write_index_rows(table, told[0][0][place].partition, f"{branch}-{start:08d}.parquet", rows))
    table.commit(written)


def steps_of(folder: Path, count: int) -> Steps:
    """Make the tables of so many images and time what is done with them."""
    spec, store = reading_spec(), Store(str(folder))
    samples = samples_of(count)
    synthetic, real = samples[:-NUM_REAL], samples[-NUM_REAL:]
    steps: Steps = {}
    write_samples(store, spec, samples)
    steps["read the dataset"] = seconds(lambda: read_samples(store, spec.dataset_fingerprint))
    steps["read its images"] = seconds(lambda: read_images(store, spec.dataset_fingerprint))
    stage = Stage.open(store, "cache-features", spec)
    none = {item.place(branch): np.zeros(count, dtype=np.bool_) for branch, item in spec.branch_maps}
    steps["plan"] = seconds(
        lambda: plan_units(stage, spec, samples, lambda: none, lambda: UnitSize(feature_bytes=UNIT_BYTES, pixel_bytes=2**30)).units
    )
    table = features_table(store, spec)
    table.ensure()
    units = [synthetic[start : start + PER_UNIT] for start in range(0, len(synthetic), PER_UNIT)]
    files = [unit_files(spec, unit) for unit in units]
    commits = []
    last = len(files) - NUM_COMMITS * UNITS_OF_A_COMMIT
    for start in (*range(0, last, max(1, last // NUM_COMMITS)), *range(last, len(files), UNITS_OF_A_COMMIT)):
        stop = start + UNITS_OF_A_COMMIT if start >= last else min(last, start + max(1, last // NUM_COMMITS))
        added = [file for unit in files[start:stop] for file in unit]
        commits.append(seconds(partial(table.commit, added)))
    steps["commit 16 units"] = median(commits[-NUM_COMMITS:])
    write_index(store, spec, files, units)
    write_ours(store, spec, real)
    steps["list the files"] = middle(lambda: features_table(store, spec).files())
    steps["put the index together"] = seconds(lambda: compact_index(store, spec))
    steps["open the index"] = middle(lambda: FeatureIndex(store, spec))
    steps["open a reader"] = middle(lambda: CachedFeatures(store, spec))
    images = [sample.image_sha256 for sample in samples]
    index = FeatureIndex(store, spec)
    steps["ask for all images"] = middle(lambda: index.held(spec.branch_maps, images), 3)
    chosen = random.Random(0).sample(images, BATCH * 20)
    names = [item.name for item in spec.global_maps]
    batches = [chosen[start : start + BATCH] for start in range(0, len(chosen), BATCH)]
    steps["find a batch"] = median(seconds(partial(index.places, "global", names, batch)) for batch in batches)
    reader = CachedFeatures(store, spec)
    batch = random.Random(1).sample(real, BATCH)
    steps["read a batch"] = middle(lambda: reader.fetch({"global": batch, "local": batch}))
    seeds = iter(range(ROUNDS))
    steps["find a position"] = middle(lambda: sample_index(next(seeds), 3 * count + count // 2, count))
    print(f"{count:9,} images, {2 * len(units):,} files: " + ", ".join(f"{name} {value * 1e3:,.1f} ms" for name, value in steps.items()), flush=True)
    return steps


def draw(found: dict[int, Steps], path: Path) -> None:
    """Both axes logarithmic: what grows as the images do rises as the dotted lines."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "loupe"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.2), layout="constrained")
    axes.set_prop_cycle(color=[*mpl.colormaps["tab10"].colors, "black", "navy"])
    sizes = sorted(found)
    ends = []
    for name in found[sizes[0]]:
        values = [found[size][name] * 1e3 for size in sizes]
        (line,) = axes.plot(sizes, values, marker="o", markersize=4)
        ends.append([float(np.log10(values[-1])), name, line.get_color()])
    ends.sort()
    for below, above in pairwise(ends):  # names that would stand on each other stand above each other
        above[0] = max(above[0], below[0] + 0.21)
    for place, name, colour in ends:
        axes.annotate(f"{name}", (sizes[-1], 10**place), xytext=(10, 0), textcoords="offset points", va="center", color=colour, fontsize=9)
    for start in (1e-1, 1e1, 1e3):
        axes.plot(sizes, [start * size / sizes[0] for size in sizes], linestyle=":", linewidth=0.8, color="0.6", zorder=0)
    low, high = min(min(steps.values()) for steps in found.values()), max(max(steps.values()) for steps in found.values())
    axes.set(xscale="log", yscale="log", xlabel="images", ylabel="milliseconds", ylim=(low * 600, high * 8000))
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="svg", metadata={"Date": None})


def test_no_step_grows_faster_than_the_number_of_images(tmp_path: Path) -> None:
    found = {count: steps_of(tmp_path / str(count), count) for count in SIZES}
    print("| step | " + " | ".join(f"{count:,} images" for count in found) + " |")
    for name in found[SIZES[0]]:
        print(f"| {name} | " + " | ".join(f"{found[count][name] * 1e3:,.3g} ms" for count in found) + " |")
    if path := os.environ.get("PLOT"):
        draw(found, Path(path))
