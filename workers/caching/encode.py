"""The device half of a unit's work: forward, reduce, check, quantise, write.

The process that encodes writes the unit's files itself and tells only counts: features pass neither through Ray's object store nor through the
driver. Batches are formed within a unit, so a unit's numbers do not depend on what ran before it.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import UInt8

from model.encoder import Encoder, compute_dtype, load_encoder
from model.encoder_execution import BatchSize
from model.specs import FeatureSpec, MapSpec, fingerprint
from model.views import Branch
from workers.caching.batching import EncodedViews, PendingViews, ViewEncoder
from workers.caching.codec import FeatureCodec, StoredMap, read_calibrations
from workers.caching.index import index_rows, map_checksum, write_index_rows
from workers.caching.layout import (
    BRANCHES,
    features_table,
    file_metadata,
    file_name,
    file_schema,
    index_table,
    map_fields,
    map_set,
    map_sets,
)
from workers.caching.units import PreparedUnit, UnitOutcome, num_views, refuse, view_plan
from workers.dataset.samples import Sample
from workers.devices import choose_device
from workers.execution import ExecutionSettings
from workers.quarantine import QuarantineRow, quarantine_table, quarantine_to_table
from workers.storage import Store
from workers.tables import TableFile

__all__ = [
    "ComputingThread",
    "UnitEncoder",
    "encode_views",
    "load_unit_encoder",
    "row_groups",
    "write_features",
]


_Loaded = TypeVar("_Loaded")
_Result = TypeVar("_Result")


def encode_views(
    encoder: Encoder,
    views: UInt8[np.ndarray, "views 3 px px"],
    branch: Branch,
    maps: Sequence[MapSpec],
    codec: FeatureCodec,
    batch_views: int | BatchSize | None,
    *,
    num_compared: int = 0,
) -> EncodedViews:
    """Encode views of a branch into maps as they are stored.

    Args:
        encoder: loaded deep enough.
        views: uint8 [views, 3, view_px, view_px].
        branch: which.
        maps: which, of the branch.
        codec: of the cache.
        batch_views: views in one forward pass; None is automatic. A BatchSize remembers where memory ended.
        num_compared: so many of the first views are read back, to tell how true they are.

    Returns:
        The maps by name.
    """
    pending = ViewEncoder(encoder, codec, batch_views, once=True).submit({branch: views}, {branch: maps}, {branch: num_compared})
    return pending.result()[branch]


def load_unit_encoder(spec: FeatureSpec, execution: ExecutionSettings, threads: int | None) -> Encoder:
    """The encoder of a process that works on units, as deep as the cache needs it.

    Args:
        spec: of the cache.
        execution: device counts.
        threads: torch threads; None leaves torch's own choice.

    Raises:
        EncoderError: it cannot be loaded, or its device does not compute as the spec says.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    device = str(choose_device(execution.device))
    return load_encoder(spec.encoder, spec.deepest_layer, device, compute_dtype(spec.compute, device))


class ComputingThread(Generic[_Loaded]):
    """The one thread of a process that computes: it loads what units need while the first of them is prepared, then works on one after the other.

    OpenMP gives each thread that computes a team of its own, and where the teams of a process outnumber its cores their members sleep between any two
    parts of the work: on two cores the shipped encoder made 162 views/s, and 145 from the moment on that a second thread had computed once.

    What goes wrong with loading is told with every unit: an error in an actor's constructor reaches the driver without its type.

    Args:
        load: called once.
    """

    def __init__(self, load: Callable[[], _Loaded]) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loupe-compute")
        self._loaded = self._thread.submit(load)

    def run(self, work: Callable[[_Loaded], _Result]) -> _Result:
        """Wait for the thread to do some work.

        Args:
            work: on what was loaded.

        Returns:
            What the work gives.
        """
        return self._thread.submit(lambda: work(self._loaded.result())).result()


class UnitEncoder:
    """Encodes units and writes their files. May be called from two threads: one computes while the other writes.

    Args:
        spec: of the cache.
        root: where everything is.
        execution: device, threads and batch size count.
        threads: torch threads; None leaves torch's own choice.
    """

    def __init__(self, spec: FeatureSpec, root: str, execution: ExecutionSettings, threads: int | None) -> None:
        self._spec = spec
        self._root = root
        self._execution = execution
        self._threads = threads
        self._computing = ComputingThread(self._load)

    def _load(self) -> ViewEncoder:
        codec = FeatureCodec(self._spec, read_calibrations(Store(self._root), self._spec))
        encoder = load_unit_encoder(self._spec, self._execution, self._threads)
        return ViewEncoder(encoder, codec, self._execution.encode_batch_views, compiled=self._execution.encode_compile)

    def __call__(self, prepared: PreparedUnit) -> UnitOutcome:
        """Encode one unit and write its files.

        Args:
            prepared: the unit's views.

        Returns:
            What became of it; its files are written and belong to no table yet.

        Raises:
            EncoderError: the encoder cannot be loaded.
            StorageError: the files cannot be written.
        """
        spec = prepared.job.spec

        def submit(encoder: ViewEncoder) -> tuple[float, PendingViews]:
            began = time.monotonic()
            pending = encoder.submit(
                {branch: prepared.views(branch) for branch in BRANCHES},
                {branch: spec.maps(branch) for branch in BRANCHES},
                # The first image of every unit is read back: a sample of one in a unit's images, spread over the whole dataset.
                {branch: num_views(spec, prepared.samples[0], branch) if prepared.samples else 0 for branch in BRANCHES},
            )
            return began, pending

        started, pending = self._computing.run(submit)
        # A GPU's last batches come back while the next unit's first ones compute.
        encoded = pending.result()
        encode_seconds = time.monotonic() - started
        started = time.monotonic()
        rows, kept = _image_rows(spec, prepared.samples, {branch: encoded[branch].finite for branch in BRANCHES})
        refused = [
            refuse(sample, "non_finite_features", f"a map of this image is not finite at {spec.precision}")
            for sample in prepared.samples
            if sample.image_sha256 not in kept
        ]
        files, index_files = write_features(Store(prepared.job.root), spec, rows, {branch: encoded[branch].maps for branch in BRANCHES})
        quarantined = (*prepared.quarantined, *refused)
        quarantine_files = _write_quarantine(Store(prepared.job.root), self._spec, prepared.job.number, quarantined)
        return UnitOutcome(
            number=prepared.job.number,
            num_images=len(kept),
            num_views=sum(stop - start for branch in BRANCHES for _, start, stop in rows[branch]),
            files=files,
            index_files=index_files,
            quarantine_files=quarantine_files,
            quarantined=quarantined,
            quality={item.place(branch): encoded[branch].quality[item.name] for branch, item in spec.branch_maps},
            prepare_seconds=prepared.seconds,
            encode_seconds=encode_seconds,
            write_seconds=time.monotonic() - started,
            plan=prepared.job.plan,
        )


_Rows = dict[Branch, list[tuple[Sample, int, int]]]


def _image_rows(spec: FeatureSpec, samples: Sequence[Sample], finite: Mapping[Branch, np.ndarray]) -> tuple[_Rows, set[str]]:
    """Where each image's views lie in the unit's arrays, without the images that have a value that is not finite."""
    rows: _Rows = {"global": [], "local": []}
    kept: set[str] = set()
    position: dict[Branch, int] = {"global": 0, "local": 0}
    for sample in samples:
        spans = {}
        for branch in BRANCHES:
            stop = position[branch] + num_views(spec, sample, branch)
            spans[branch] = (position[branch], stop)
            position[branch] = stop
        if all(finite[branch][start:stop].all() for branch, (start, stop) in spans.items()):
            kept.add(sample.image_sha256)
            for branch, (start, stop) in spans.items():
                rows[branch].append((sample, start, stop))
    return rows, kept


def write_features(
    store: Store, spec: FeatureSpec, rows: _Rows, stored: Mapping[Branch, Mapping[str, StoredMap]]
) -> tuple[tuple[TableFile, ...], tuple[TableFile, ...]]:
    """Write a unit's files, and for each the file of the index that tells where in it every image lies.

    Args:
        store: where the tables lie.
        spec: with the maps that the unit computed.
        rows: of each branch every image with where its views lie in the maps.
        stored: the maps, by branch and name.

    Returns:
        Files of the features table and of its index; they belong to no table yet.

    Raises:
        StorageError: one cannot be written.
    """
    table, index = features_table(store, spec), index_table(store, spec.encoding)
    files, index_files = [], []
    for branch in BRANCHES:
        images = [sample.image_sha256 for sample, _, _ in rows[branch]]
        for maps in map_sets(spec.maps(branch)) if images else ():
            checksums = {item.name: [map_checksum(stored[branch][item.name][start:stop].arrays) for _, start, stop in rows[branch]] for item in maps}
            name, partition = file_name(spec.encoding, branch, images, checksums), {"branch": branch, "maps": map_set(maps)}
            blobs = [field.name for item in maps for field in map_fields(spec, branch, item)]
            groups = row_groups(spec, branch, maps, rows[branch], stored[branch])
            metadata = file_metadata(spec.encoding)
            file, footer = table.write_mapped_file(partition, name, groups, blobs=blobs, metadata=metadata)
            by_image = [list(values) for values in zip(*checksums.values(), strict=True)]
            located = index_rows(file, footer, [(sample.image_sha256, stop - start) for sample, start, stop in rows[branch]], by_image)
            files.append(file)
            index_files.append(write_index_rows(index, partition, name, located))
    return tuple(files), tuple(index_files)


def row_groups(
    spec: FeatureSpec, branch: Branch, maps: Sequence[MapSpec], rows: Sequence[tuple[Sample, int, int]], stored: Mapping[str, StoredMap]
) -> Iterator[pa.Table]:
    """One table per image, so that one image is one row group: random access costs nothing, and its views lie together.

    Args:
        spec: of the cache.
        branch: of the file.
        maps: the file's.
        rows: each image with where its views lie in the maps.
        stored: the maps by name.

    Yields:
        Tables of the file's columns.
    """
    schema = file_schema(spec, branch, maps)
    for sample, start, stop in rows:
        plan = view_plan(spec, sample)
        views = (plan.global_view,) if branch == "global" else plan.local_views
        assert len(views) == stop - start
        columns: dict[str, object] = {
            "image_sha256": [sample.image_sha256] * len(views),
            "view_index": [view.index for view in views],
            "row": [view.row for view in views],
            "column": [view.column for view in views],
            "left_px": [view.source.left for view in views],
            "top_px": [view.source.top for view in views],
            "right_px": [view.source.right for view in views],
            "bottom_px": [view.source.bottom for view in views],
        }
        arrays = [pa.array(columns[field.name], field.type) for field in schema if field.name in columns]
        for item in maps:
            part = stored[item.name][start:stop]
            for field, values in zip(map_fields(spec, branch, item), part.arrays, strict=True):
                arrays.append(pa.FixedSizeBinaryArray.from_buffers(field.type, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))]))
        yield pa.Table.from_arrays(arrays, schema=schema)


def _write_quarantine(store: Store, spec: FeatureSpec, number: int, rows: Sequence[QuarantineRow]) -> tuple[TableFile, ...]:
    if not rows:
        return ()
    digest = hashlib.sha256("".join(f"{row.bytes_sha256}:{row.reason};" for row in rows).encode()).hexdigest()
    partition = {"stage": "cache-features", "key": fingerprint(spec)[:16]}
    name = f"unit-{number:06d}-{digest[:12]}.parquet"
    return (quarantine_table(store).write_file(partition, name, [quarantine_to_table(rows)]),)
