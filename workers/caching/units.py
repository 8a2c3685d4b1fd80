"""The plan of a feature cache: its units, its files, its bytes; and the CPU half of a unit's work, from image bytes to views.

A unit is a contiguous slice of the frozen sample order, sized by the bytes it writes. The plan is made once and kept, so a resumed run cuts where
the first one did. Loads neither torch nor Ray.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8

from model.errors import ImageError
from model.images import cut_views, decode_image
from model.quality import MapQuality
from model.specs import FeatureSpec, MapSpec, fingerprint
from model.views import Branch, ViewPlan, plan_views
from workers.commits import Stage
from workers.dataset.samples import Sample
from workers.errors import IncompleteError, StorageError
from workers.quarantine import QuarantineRow, store_reason
from workers.storage import Store
from workers.tables import Table, TableFile

__all__ = [
    "BRANCHES",
    "FeatureUnit",
    "PreparedUnit",
    "UnitJob",
    "UnitOutcome",
    "UnitPlan",
    "feature_bytes",
    "features_table",
    "file_metadata",
    "load_views",
    "map_fields",
    "plan_units",
    "prepare_unit",
    "view_plan",
]

BRANCHES: tuple[Branch, ...] = ("global", "local")

_ARROW_DTYPE = {"fp32": "float32", "fp16": "float16", "int8": "int8"}


def view_plan(spec: FeatureSpec, sample: Sample) -> ViewPlan:
    """The views of a sample's image."""
    return plan_views(sample.width_px, sample.height_px, spec.encoder.view_px, spec.views)


def num_views(spec: FeatureSpec, sample: Sample, branch: Branch) -> int:
    """Views that the cache holds of a sample in a branch; none of text alone, and none when the spec asks for no map there."""
    if sample.text_only or not spec.maps(branch):
        return 0
    plan = view_plan(spec, sample)
    return 1 if branch == "global" else plan.rows * plan.columns


def feature_bytes(spec: FeatureSpec, samples: Sequence[Sample]) -> int:
    """Feature bytes of all views of some samples, without the files' small overhead."""
    return sum(num_views(spec, sample, branch) * spec.view_bytes(branch) for sample in samples for branch in BRANCHES)


def file_schema(spec: FeatureSpec, branch: Branch) -> pa.Schema:
    """Columns of a branch's files: what a view is, then one opaque column per map."""
    return pa.schema([*_VIEW_FIELDS, *(field for item in spec.maps(branch) for field in map_fields(spec, branch, item))])


_VIEW_FIELDS = [
    pa.field("image_sha256", pa.string(), nullable=False),
    pa.field("sample_index", pa.int64(), nullable=False),
    pa.field("view_index", pa.int32(), nullable=False),
    pa.field("row", pa.int32(), nullable=False),
    pa.field("column", pa.int32(), nullable=False),
    pa.field("left_px", pa.float64(), nullable=False),
    pa.field("top_px", pa.float64(), nullable=False),
    pa.field("right_px", pa.float64(), nullable=False),
    pa.field("bottom_px", pa.float64(), nullable=False),
]


def file_metadata(spec: FeatureSpec, digest: str) -> dict[str, str]:
    """What every file of a cache says of itself.

    Args:
        spec: of the cache.
        digest: its fingerprint.
    """
    return {
        "loupe.features": digest,
        "loupe.dataset": spec.dataset_fingerprint,
        "loupe.encoder_sha256": spec.encoder.weights_sha256,
        "loupe.format_version": str(spec.format_version),
    }


def steps_column(item: MapSpec) -> str:
    """The column that holds a map's steps."""
    return f"{item.name}__steps"


def map_fields(spec: FeatureSpec, branch: Branch, item: MapSpec) -> tuple[pa.Field, ...]:
    """The columns of a map of a branch: its numbers, and of int8 its tokens' steps.

    Opaque bytes of a fixed size: Arrow's list and tensor types are 13 to 40 times slower to read.
    """
    tokens, precision = item.num_tokens(spec.encoder.num_patches), spec.stored_as(branch, item)
    metadata = {
        "map": item.name,
        "layers": json.dumps(list(item.layers)),
        "dtype": _ARROW_DTYPE[precision],
        "pool": str(item.pool),
        "shape": json.dumps([tokens, spec.encoder.width]),
    }
    values = pa.field(item.name, pa.binary(spec.value_bytes(branch, item)), metadata=metadata)
    if precision != "int8":
        return (values,)
    steps = {"steps_of": item.name, "dtype": "float16", "shape": json.dumps([tokens]), "calibration_sha256": str(spec.calibration_sha256)}
    return values, pa.field(steps_column(item), pa.binary(spec.step_bytes(branch, item)), metadata=steps)


def features_table(store: Store, spec: FeatureSpec, key: str | None = None) -> Table:
    """The cache's table: one row per view, a column per map, partitioned by branch. Maps that a branch does not have are null there.

    Args:
        store: where it lies.
        spec: of the cache.
        key: its folder's name; None is the spec's own.
    """
    fields = {field.name: field for branch in BRANCHES for item in spec.maps(branch) for field in map_fields(spec, branch, item)}
    schema = pa.schema([*_VIEW_FIELDS, *fields.values()])
    return Table(store, f"features/{fingerprint(spec)[:16] if key is None else key}", schema, ("branch",))


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureUnit:
    """A contiguous slice of the frozen sample order."""

    number: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitPlan:
    """All units of a cache, as first planned."""

    num_images: int
    images_per_unit: int
    samples_sha256: str
    """Over the image hashes in their order: the plan is of this dataset and no other."""
    planned_bytes: int

    @property
    def units(self) -> tuple[FeatureUnit, ...]:
        """The units in order."""
        starts = range(0, self.num_images, self.images_per_unit)
        return tuple(
            FeatureUnit(number=number, start=start, stop=min(start + self.images_per_unit, self.num_images)) for number, start in enumerate(starts)
        )


def plan_units(stage: Stage, spec: FeatureSpec, samples: Sequence[Sample], unit_bytes: int) -> UnitPlan:
    """The plan that is on record, or a new one put on record.

    Args:
        stage: the cache's stage.
        spec: of the cache.
        samples: the dataset's samples that have an image, in their frozen order.
        unit_bytes: feature bytes per unit, for a new plan.

    Returns:
        The plan that holds from now on.

    Raises:
        IncompleteError: the plan on record was made for another list of samples.
    """
    total = feature_bytes(spec, samples)
    per_image = max(1, total // max(1, len(samples)))
    digest = hashlib.sha256("".join(sample.image_sha256 for sample in samples).encode()).hexdigest()
    fresh = {
        "num_images": len(samples),
        "images_per_unit": max(1, unit_bytes // per_image),
        "samples_sha256": digest,
        "planned_bytes": total,
    }
    path = stage.path("units.json")
    stage.store.create_json(path, fresh)
    plan = UnitPlan(**stage.store.read_json(path))
    if plan.samples_sha256 != digest:
        raise IncompleteError(
            f"{stage.store.url(path)} was planned for {plan.num_images} images with the digest {plan.samples_sha256[:12]}, the dataset now has "
            f"{len(samples)} with {digest[:12]}: its table was changed after the cache was begun. Restore the table, or use another root."
        )
    return plan


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitJob:
    """One unit, as it travels to a task."""

    spec: FeatureSpec
    root: str
    number: int
    samples: tuple[Sample, ...]
    """All with an image, and without their turns: features know nothing of questions."""


@dataclass(frozen=True, kw_only=True)
class PreparedUnit:
    """One unit, decoded and cut: what the encoder needs."""

    job: UnitJob
    samples: tuple[Sample, ...]
    """Those whose image could be read, in order."""
    global_views: UInt8[np.ndarray, "images 3 px px"]
    """Empty when the spec has no global maps."""
    local_views: UInt8[np.ndarray, "views 3 px px"]
    """Of all images, one image behind the other."""
    quarantined: tuple[QuarantineRow, ...]
    seconds: float

    def views(self, branch: Branch) -> UInt8[np.ndarray, "views 3 px px"]:
        """The views of a branch."""
        return self.global_views if branch == "global" else self.local_views


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitOutcome:
    """What became of a unit: its files, its refusals, its times. The first outcome on record stands."""

    number: int
    num_images: int
    num_views: int
    files: tuple[TableFile, ...]
    quarantine_files: tuple[TableFile, ...]
    quarantined: tuple[QuarantineRow, ...]
    quality: dict[str, MapQuality]
    """Of the unit's first image, by branch and map, as `local/layer_7`."""
    prepare_seconds: float
    encode_seconds: float
    write_seconds: float


def load_views(spec: FeatureSpec, sample: Sample, store: Store, branch: Branch | None = None) -> UInt8[np.ndarray, "views 3 px px"]:
    """Read one image and cut its views.

    Args:
        spec: of the cache.
        sample: whose image.
        store: where relative image paths start.
        branch: only this branch; None is both, global first.

    Returns:
        uint8 [views, 3, view_px, view_px].

    Raises:
        ImageError: the bytes are not the image that the dataset was built from, or do not decode.
        StorageError: they cannot be read.
    """
    data = store.read_reference(sample.image_path)
    found = hashlib.sha256(data).hexdigest()
    if found != sample.image_sha256:
        raise ImageError("content_changed", f"expected bytes with sha256 {sample.image_sha256[:16]}..., found {found[:16]}...")
    return cut_views(decode_image(data), view_plan(spec, sample), branch, mean_colour=spec.encoder.mean_colour)


def prepare_unit(job: UnitJob) -> PreparedUnit:
    """The CPU half of a unit: read, decode, cut. A pure function of the job; may run twice.

    Args:
        job: the unit.

    Returns:
        Its views, and what was refused.

    Raises:
        StorageError: the store failed in a way that says nothing about one image.
    """
    started = time.monotonic()
    store = Store(job.root)
    side = job.spec.encoder.view_px
    kept: list[Sample] = []
    views: dict[Branch, list[np.ndarray]] = {"global": [], "local": []}
    quarantined: list[QuarantineRow] = []
    for sample in job.samples:
        try:
            both = load_views(job.spec, sample, store)
        except ImageError as error:
            quarantined.append(refuse(sample, error.reason, str(error)))
        except StorageError as error:
            reason = store_reason(error)
            if reason is None:
                raise
            quarantined.append(refuse(sample, reason, str(error)))
        else:
            kept.append(sample)
            if job.spec.global_maps:
                views["global"].append(both[:1])
            if job.spec.local_maps:
                views["local"].append(both[1:])
    empty = np.zeros((0, 3, side, side), dtype=np.uint8)
    return PreparedUnit(
        job=job,
        samples=tuple(kept),
        global_views=np.concatenate(views["global"]) if views["global"] else empty,
        local_views=np.concatenate(views["local"]) if views["local"] else empty,
        quarantined=tuple(quarantined),
        seconds=time.monotonic() - started,
    )


def refuse(sample: Sample, reason: str, detail: str) -> QuarantineRow:
    """The quarantine row of a sample's image."""
    return QuarantineRow(
        reason=reason, source=sample.source, item=sample.image_path, index=sample.index, bytes_sha256=sample.image_sha256, detail=detail
    )
