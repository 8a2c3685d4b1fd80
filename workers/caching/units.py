"""The plan of a feature cache: its units and their bytes; and the CPU half of a unit's work, from image bytes to views.

A unit is some images of the frozen sample order that lack the same maps, sized by the bytes it writes. The plan is made once, from what the table
holds then, and kept, so a resumed run cuts where the first one did. Loads neither torch nor Ray.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from uuid import uuid4

import numpy as np
from jaxtyping import UInt8

from model.errors import ImageError
from model.images import cut_views, decode_image
from model.quality import MapQuality
from model.specs import FeatureSpec
from model.views import Branch, ViewPlan, plan_views
from workers.caching.layout import BRANCHES
from workers.commits import Stage, from_json, to_json
from workers.dataset.samples import Sample
from workers.errors import IncompleteError, StorageError
from workers.quarantine import QuarantineRow, image_reason, quarantine_table
from workers.storage import Store
from workers.tables import TableFile

__all__ = [
    "FeatureUnit",
    "HeldMaps",
    "PreparedUnit",
    "UnitJob",
    "UnitOutcome",
    "UnitPlan",
    "UnitSize",
    "feature_bytes",
    "forget_plan",
    "load_views",
    "num_views",
    "plan_groups",
    "plan_units",
    "prepare_unit",
    "read_outcome",
    "refuse",
    "unit_job",
    "view_plan",
]

_DELETES_AT_ONCE = 16

HeldMaps = Mapping[str, np.ndarray]
"""By place, as `local/layer_7`, which images' maps a table holds: bool [images]."""


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
    return _views_bytes(spec, _branch_views(spec, samples))


def _views_bytes(spec: FeatureSpec, views: Mapping[Branch, int]) -> int:
    return sum(count * spec.view_bytes(branch) for branch, count in views.items())


def _branch_views(spec: FeatureSpec, samples: Sequence[Sample]) -> dict[Branch, int]:
    """Views of some samples in each branch."""
    # By size, of which there are few: a million images take a second.
    shown = [sample for sample in samples if not sample.text_only]
    counts = Counter((sample.width_px, sample.height_px) for sample in shown)
    one_of_each = {(sample.width_px, sample.height_px): sample for sample in shown}
    return {branch: sum(counts[size] * num_views(spec, sample, branch) for size, sample in one_of_each.items()) for branch in BRANCHES}


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitSize:
    """How large units are made; what is reached first counts."""

    feature_bytes: int
    """That are written."""
    pixel_bytes: int
    """Of views, as they travel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureUnit:
    """Some images, and the maps that they lack."""

    number: int
    images: tuple[int, ...]
    """Places in the order of `read_images`."""
    global_maps: tuple[str, ...]
    local_maps: tuple[str, ...]
    plan: str
    """Name of its plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitGroup:
    """Images that lack the same maps."""

    global_maps: tuple[str, ...]
    local_maps: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    """From which place up to which, exclusively."""
    images_per_unit: int

    @property
    def places(self) -> Iterator[int]:
        """Of the images, in order."""
        return (place for start, stop in self.spans for place in range(start, stop))


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitPlan:
    """All units of a cache, as first planned, or as planned anew."""

    num_images: int
    """Distinct ones of the dataset."""
    samples_sha256: str
    """Over the image hashes in their order: the plan is of this dataset and no other."""
    num_held: int
    """Images of which the table had every map before."""
    planned_bytes: int
    """Of the features that are still to be written."""
    groups: tuple[UnitGroup, ...]
    name: str = ""
    """Its own: the units of two plans of a cache have the same numbers and other images. Plans on record from before there were names have none."""

    @property
    def units(self) -> tuple[FeatureUnit, ...]:
        """The units in order."""
        units: list[FeatureUnit] = []
        for group in self.groups:
            places = group.places
            while images := tuple(islice(places, group.images_per_unit)):
                number = len(units)
                units.append(FeatureUnit(number=number, images=images, global_maps=group.global_maps, local_maps=group.local_maps, plan=self.name))
        return tuple(units)


def plan_units(stage: Stage, spec: FeatureSpec, images: Sequence[Sample], held: Callable[[], HeldMaps], size: Callable[[], UnitSize]) -> UnitPlan:
    """The plan that is on record, or a new one put on record.

    Args:
        stage: the cache's stage.
        spec: of the cache.
        images: as `read_images` gives them.
        held: tells which maps of these images the table has, by place (`local/layer_7`): bool [images] each. Asked for a new plan only.
        size: tells how large units are. Asked for a new plan only.

    Returns:
        The plan that holds from now on.

    Raises:
        IncompleteError: the plan on record was made for another list of samples.
    """
    digest = hashlib.sha256("".join(sample.image_sha256 for sample in images).encode()).hexdigest()
    path = stage.path("units.json")
    if not stage.store.exists(path):
        groups = plan_groups(spec, images, held(), size())
        planned_bytes = sum(feature_bytes(_narrowed(spec, group), [images[place] for place in group.places]) for group in groups)
        num_missing = sum(stop - start for group in groups for start, stop in group.spans)
        fresh = UnitPlan(
            num_images=len(images),
            samples_sha256=digest,
            num_held=len(images) - num_missing,
            planned_bytes=planned_bytes,
            groups=tuple(groups),
            name=uuid4().hex,
        )
        stage.store.create_json(path, to_json(fresh))
    plan = from_json(UnitPlan, stage.store.read_json(path), where=stage.store.url(path))
    if plan.samples_sha256 != digest:
        raise IncompleteError(
            f"{stage.store.url(path)} was planned for {plan.num_images} images with the digest {plan.samples_sha256[:12]}, the dataset now has "
            f"{len(images)} with {digest[:12]}: its table was changed after the cache was begun. Restore the table, or use another root."
        )
    return plan


def forget_plan(stage: Stage) -> None:
    """Let the stage plan anew: without refusals, then without a plan, then without outcomes.

    May be cut off anywhere: while the plan is there its outcomes put back what the quarantine lacks, and without it they count for nothing.

    Args:
        stage: the cache's stage, whose outcomes are in the tables: the next plan is of what those lack.
    """
    quarantine_table(stage.store).replace([], {"stage": stage.name, "key": stage.key})
    stage.store.delete(stage.path("units.json"))
    with ThreadPoolExecutor(_DELETES_AT_ONCE) as pool:
        for _ in pool.map(stage.store.delete, stage.store.list(stage.path("units"))):
            pass


def plan_groups(spec: FeatureSpec, images: Sequence[Sample], held: HeldMaps, size: UnitSize) -> list[UnitGroup]:
    """Images by what they lack: with nothing there a single group, with another map or other images one more for each case.

    Args:
        spec: of the cache.
        images: as `read_images` gives them.
        held: which of their maps are there.
        size: of a unit.

    Returns:
        The groups; none when nothing is missing.
    """
    asked = spec.branch_maps
    missing = np.stack([~held[item.place(branch)] for branch, item in asked], axis=1) if asked else np.zeros((len(images), 0), dtype=np.bool_)
    kinds, kind_of = np.unique(missing, axis=0, return_inverse=True)
    groups = []
    for kind, lacks in enumerate(kinds):
        if not lacks.any():
            continue
        places = np.flatnonzero(kind_of.reshape(-1) == kind)
        breaks = np.flatnonzero(np.diff(places) > 1)
        starts, stops = places[np.r_[0, breaks + 1]], places[np.r_[breaks, len(places) - 1]] + 1
        names = {
            wanted: tuple(item.name for (branch, item), lack in zip(asked, lacks, strict=True) if lack and branch == wanted) for wanted in BRANCHES
        }
        group = UnitGroup(
            global_maps=names["global"],
            local_maps=names["local"],
            spans=tuple((int(start), int(stop)) for start, stop in zip(starts, stops, strict=True)),
            images_per_unit=1,
        )
        narrowed = _narrowed(spec, group)
        views = _branch_views(narrowed, [images[place] for place in group.places])
        fitting = (
            size.feature_bytes * len(places) // max(1, _views_bytes(narrowed, views)),
            size.pixel_bytes * len(places) // max(1, sum(views.values()) * 3 * spec.encoder.view_px**2),
        )
        groups.append(replace(group, images_per_unit=max(1, min(fitting))))
    return groups


def _narrowed(spec: FeatureSpec, part: UnitGroup | FeatureUnit) -> FeatureSpec:
    """The cache's spec with those maps alone that a unit computes."""
    return replace(
        spec,
        global_maps=tuple(item for item in spec.global_maps if item.name in part.global_maps),
        local_maps=tuple(item for item in spec.local_maps if item.name in part.local_maps),
    )


def unit_job(spec: FeatureSpec, root: str, unit: FeatureUnit, images: Sequence[Sample]) -> "UnitJob":
    """A unit as it travels.

    Args:
        spec: of the cache.
        root: where everything is.
        unit: of its plan.
        images: all of the cache, in the order of the plan.
    """
    samples = tuple(images[place] for place in unit.images)
    return UnitJob(spec=_narrowed(spec, unit), root=root, number=unit.number, samples=samples, plan=unit.plan)


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitJob:
    """One unit, as it travels to a task."""

    spec: FeatureSpec
    """With the maps that the unit computes."""
    root: str
    number: int
    samples: tuple[Sample, ...]
    """All with an image, and without their turns: features know nothing of questions."""
    threads: int = 1
    """That decode."""
    plan: str = ""
    """Name of the unit's plan."""


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
    index_files: tuple[TableFile, ...]
    quarantine_files: tuple[TableFile, ...]
    quarantined: tuple[QuarantineRow, ...]
    quality: dict[str, MapQuality]
    """Of the unit's first image, by branch and map, as `local/layer_7`."""
    prepare_seconds: float
    encode_seconds: float
    write_seconds: float
    plan: str = ""
    """Name of the unit's plan. Another driver of the cache may go on with a plan that was forgotten, and put its units on record."""


def read_outcome(store: Store, path: str) -> UnitOutcome:
    """An outcome that is on record.

    Args:
        store: of the root.
        path: of the record.

    Raises:
        RecordError: it is damaged.
        StorageError: it cannot be read.
    """
    return from_json(UnitOutcome, store.read_json(path), where=store.url(path))


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
    wanted = [branch for branch in BRANCHES if job.spec.maps(branch)]
    side = job.spec.encoder.view_px
    kept: list[Sample] = []
    views: dict[Branch, list[np.ndarray]] = {"global": [], "local": []}
    quarantined: list[QuarantineRow] = []
    with ThreadPoolExecutor(job.threads) as pool:  # pillow lets go of the interpreter while it decodes and resizes
        prepared = pool.map(lambda sample: _prepared(job.spec, sample, store, wanted[0] if len(wanted) == 1 else None), job.samples)
        for sample, found in zip(job.samples, prepared, strict=True):
            if isinstance(found, QuarantineRow):
                quarantined.append(found)
                continue
            kept.append(sample)
            num_global = num_views(job.spec, sample, "global")
            views["global"].append(found[:num_global])
            views["local"].append(found[num_global:])
    empty = np.zeros((0, 3, side, side), dtype=np.uint8)
    return PreparedUnit(
        job=job,
        samples=tuple(kept),
        global_views=np.concatenate([empty, *views["global"]]),
        local_views=np.concatenate([empty, *views["local"]]),
        quarantined=tuple(quarantined),
        seconds=time.monotonic() - started,
    )


def _prepared(spec: FeatureSpec, sample: Sample, store: Store, branch: Branch | None) -> UInt8[np.ndarray, "views 3 px px"] | QuarantineRow:
    """An image's views, or why it is refused."""
    try:
        return load_views(spec, sample, store, branch)
    except (ImageError, StorageError) as error:
        reason = image_reason(error)
        if reason is None:
            raise
        return refuse(sample, reason, str(error))


def refuse(sample: Sample, reason: str, detail: str) -> QuarantineRow:
    """The quarantine row of a sample's image."""
    return QuarantineRow(
        reason=reason, source=sample.source, item=sample.image_path, index=sample.index, bytes_sha256=sample.image_sha256, detail=detail
    )
