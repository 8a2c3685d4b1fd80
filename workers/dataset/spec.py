"""What a dataset is made of: its identity, as frozen data.

Needs the standard library alone, so planning a dataset loads neither torch nor Ray.
"""

import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePosixPath
from typing import Literal

from model.errors import SpecError
from model.specs import UnknownDigest
from model.views import ViewSpec

__all__ = [
    "RENDERED_HEIGHT_PX",
    "RENDERED_WIDTH_PX",
    "DatasetSpec",
    "LegibilitySpec",
    "LlavaJsonSourceSpec",
    "RenderedSourceSpec",
    "SourceSpec",
    "material_versions",
    "source_label",
]

RENDERED_WIDTH_PX = 672
RENDERED_HEIGHT_PX = 448
"""Of a picture that the project draws: 3:2, so that the slicing rule's 3 x 2 grid of square local views wastes nothing; 6 and 4 times a view of
112 px."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedSourceSpec:
    """Pictures that the project draws itself, with answers true by construction.

    Raises:
        SpecError: fewer than one image.
    """

    kind: Literal["rendered"] = "rendered"
    family: str
    num_images: int

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise SpecError(f"source {self.family!r}: num_images must be at least 1, found {self.num_images}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LlavaJsonSourceSpec:
    """A JSON array of records in LLaVA's format, and the folder that its image paths start from.

    Raises:
        SpecError: the digest is no sha256.
    """

    kind: Literal["llava_json"] = "llava_json"
    records: str
    """Path or URL of the JSON file."""
    images: str
    """Path or URL of the image folder. Images stay there; samples refer to them."""
    records_sha256: str
    """sha256 (hex) of the JSON file, so that edited records are another dataset."""
    reader_version: int = 2
    """Of what makes samples of records. From 2 on, records without an image are samples too."""

    def __post_init__(self) -> None:
        is_digest = len(self.records_sha256) == 64 and not set(self.records_sha256) - set("0123456789abcdef")
        if not is_digest and not isinstance(self.records_sha256, UnknownDigest):
            raise SpecError(f"source {self.records!r}: records_sha256 must be 64 hex digits, found {self.records_sha256!r}")


SourceSpec = RenderedSourceSpec | LlavaJsonSourceSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class LegibilitySpec:
    """What the encoder can read: glyph sizes (geometric mean of the ink's sides) in the pixels of a view, measured for the encoder.

    Raises:
        SpecError: sizes that are not positive or leave no room for a detail to be small.
    """

    local_min_px: float
    """Readable from this size up."""
    global_max_px: float
    """Unreadable below this size."""

    def __post_init__(self) -> None:
        if not 0 < self.global_max_px <= self.local_min_px:
            raise SpecError(
                f"dataset.legibility: found local_min_px {self.local_min_px:g} and global_max_px {self.global_max_px:g}; allowed: "
                "0 < global_max_px <= local_min_px"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSpec:
    """Identity of a dataset: the same spec gives the same samples, in the same order, with the same split.

    Raises:
        SpecError: no sources, two alike, or a number out of range.
    """

    sources: tuple[SourceSpec, ...]
    seed: int
    held_out_fraction: float
    """Share of the samples kept for evaluation; decided by the hash of each one's image, or of its conversation where there is none, so that none is
    ever on both sides. 1 keeps all: a dataset that is only asked."""
    view_px: int
    """Side of the encoder's view that the images are made for."""
    views: ViewSpec
    legibility: LegibilitySpec
    turns_per_image: int = 6
    generator_version: int = 2
    """Of everything that draws and words; a golden test holds it to what is drawn."""
    material: tuple[str, ...] = ()
    """What rendered pictures are drawn from beside this code, with versions: see `material_versions`."""

    def __post_init__(self) -> None:
        labels = [source_label(source) for source in self.sources]
        if not labels or len(set(labels)) != len(labels):
            raise SpecError(f"dataset.sources must name at least one source and each once, found {labels}")
        if not 0 <= self.held_out_fraction <= 1:
            raise SpecError(f"dataset.held_out_fraction must lie in [0, 1], found {self.held_out_fraction}")
        if self.turns_per_image < 1 or self.view_px < 1:
            raise SpecError(f"dataset.turns_per_image and dataset.view_px must be at least 1, found {self.turns_per_image} and {self.view_px}")


def material_versions() -> tuple[str, ...]:
    """Names and versions of what rendered pictures are drawn from: tables and boundaries of a package, prose of Python's own documentation."""
    try:
        tables = version("bokeh-sampledata")
    except PackageNotFoundError:
        tables = "missing"  # whoever draws from it says what to install
    return (f"bokeh-sampledata {tables}", f"Python {sys.version_info.major}.{sys.version_info.minor}")


def source_label(source: SourceSpec) -> str:
    """A source's name in rows, quarantine and budgets: `rendered/charts`, `llava_json/blip_558k`."""
    if isinstance(source, RenderedSourceSpec):
        return f"rendered/{source.family}"
    return f"llava_json/{PurePosixPath(source.records).stem}"
