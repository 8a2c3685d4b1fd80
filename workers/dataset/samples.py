"""The rows of a dataset: one sample is one image with its conversation, or a conversation about no image.

Samples live in one Delta table, partitioned by the dataset's fingerprint, and are read back in one frozen order: by index. A sample without an image
has nulls in the columns image_sha256, image_path, width_px and height_px, so it joins with no row of the features.
"""

import contextlib
import gc
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import pyarrow as pa

from workers.errors import TableError
from workers.storage import Store
from workers.tables import read_partition

__all__ = [
    "SAMPLES_SCHEMA",
    "SAMPLES_TABLE",
    "Detail",
    "ImageRef",
    "Sample",
    "Split",
    "Turn",
    "conversation_sha256",
    "read_images",
    "read_samples",
    "samples_to_table",
]

Detail = Literal["small", "large"]
Split = Literal["train", "held_out"]

SAMPLES_TABLE = "samples"

TURN_TYPE = pa.struct(
    [
        pa.field("question", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("evidence_left_px", pa.float64()),
        pa.field("evidence_top_px", pa.float64()),
        pa.field("evidence_right_px", pa.float64()),
        pa.field("evidence_bottom_px", pa.float64()),
        pa.field("shown", pa.list_(pa.field("element", pa.string(), nullable=False)), nullable=False),
    ]
)

SAMPLES_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("index", pa.int64(), nullable=False),
        pa.field("image_sha256", pa.string()),
        pa.field("image_path", pa.string()),
        pa.field("width_px", pa.int32()),
        pa.field("height_px", pa.int32()),
        pa.field("family", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("licence", pa.string(), nullable=False),
        pa.field("detail_score", pa.float64(), nullable=False),
        pa.field("turns", pa.list_(pa.field("element", TURN_TYPE, nullable=False)), nullable=False),
    ]
)
"""Columns of a samples file. The partition column `dataset` (first 16 characters of the fingerprint) is in the path alone, as Delta has it."""


_IMAGE_COLUMNS = ("image_sha256", "image_path", "width_px", "height_px")
_PLAIN_COLUMNS = tuple(name for name in SAMPLES_SCHEMA.names if name not in ("turns", *_IMAGE_COLUMNS))


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One question about an image, and its answer."""

    question: str
    """Without the image placeholder; the chat template places it."""
    answer: str
    kind: str
    """Which kind of question, e.g. `charts/value`."""
    detail: Detail
    """`small`: readable in the local views and too small in the global one. `large`: readable in both."""
    evidence: tuple[float, float, float, float] | None = None
    """Where in the image the answer stands: left, top, right, bottom in image pixels."""
    shown: tuple[str, ...] = ()
    """Words that the evidence shows, e.g. its text and its colour: what a visual token at that place should mean."""


def conversation_sha256(turns: Sequence[Turn]) -> str:
    """The identity of a conversation: sha256 (hex) over what is said in it.

    Args:
        turns: questions and answers in order; nothing else of them counts.

    Returns:
        The digest.
    """
    said = json.dumps([[turn.question, turn.answer] for turn in turns], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(said.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRef:
    """An image, by its bytes and by where they are."""

    sha256: str
    """sha256 (hex) of the image file's bytes: the image's identity everywhere."""
    path: str
    """Relative to the root, or an absolute URL of an image that stays where it is."""
    width_px: int
    height_px: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image with its conversation, or a conversation about no image."""

    sample_id: str
    index: int
    """Place in the frozen order. Ascending and unique; gaps are inputs that were quarantined or duplicates."""
    image: ImageRef | None
    """None: text alone."""
    family: str
    source: str
    split: Split
    licence: str
    detail_score: float
    """0 to 1: how much of what the image holds its global view does not show; 0 without an image."""
    turns: tuple[Turn, ...]

    @property
    def text_only(self) -> bool:
        """Whether it is about no image."""
        return self.image is None

    @property
    def identity(self) -> str:
        """sha256 (hex) of its image's bytes, or of its conversation where there is none: what decides its split, and what no two samples share."""
        return conversation_sha256(self.turns) if self.image is None else self.image.sha256

    @property
    def image_sha256(self) -> str:
        """The image's identity. Like all of an image, not to be asked for of text alone."""
        return self._image.sha256

    @property
    def image_path(self) -> str:
        """Where the image lies, see ImageRef."""
        return self._image.path

    @property
    def width_px(self) -> int:
        """Of the image."""
        return self._image.width_px

    @property
    def height_px(self) -> int:
        """Of the image."""
        return self._image.height_px

    @property
    def _image(self) -> ImageRef:
        assert self.image is not None, f"sample {self.sample_id} ({self.source}) is text alone, but its image was asked for"
        return self.image


def samples_to_table(samples: list[Sample]) -> pa.Table:
    """The Arrow table of some samples, columns as in SAMPLES_SCHEMA."""
    rows = []
    for sample in samples:
        turns = []
        for turn in sample.turns:
            left, top, right, bottom = turn.evidence if turn.evidence is not None else (None, None, None, None)
            turns.append(
                {
                    "question": turn.question,
                    "answer": turn.answer,
                    "kind": turn.kind,
                    "detail": turn.detail,
                    "evidence_left_px": left,
                    "evidence_top_px": top,
                    "evidence_right_px": right,
                    "evidence_bottom_px": bottom,
                    "shown": list(turn.shown),
                }
            )
        rows.append(
            {
                "sample_id": sample.sample_id,
                "index": sample.index,
                "image_sha256": None if sample.image is None else sample.image.sha256,
                "image_path": None if sample.image is None else sample.image.path,
                "width_px": None if sample.image is None else sample.image.width_px,
                "height_px": None if sample.image is None else sample.image.height_px,
                "family": sample.family,
                "source": sample.source,
                "split": sample.split,
                "licence": sample.licence,
                "detail_score": sample.detail_score,
                "turns": turns,
            }
        )
    return pa.Table.from_pylist(rows, schema=SAMPLES_SCHEMA)


def samples_from_table(table: pa.Table) -> list[Sample]:
    """The samples in an Arrow table that `samples_to_table` made.

    By columns: a row's dictionaries and those of its turns would take most of the time. Without the column `turns` there are none.
    """
    samples = []
    with _without_collections():
        for batch in table.to_batches():
            columns = {name: batch.column(name).to_pylist() for name in _PLAIN_COLUMNS}
            if "turns" in batch.schema.names:
                turns = iter(_turns_of(batch.column("turns").flatten()))
                counts = batch.column("turns").value_lengths().to_pylist()
            else:
                turns, counts = iter(()), [0] * batch.num_rows
            images = [
                None if sha256 is None else ImageRef(sha256=sha256, path=path, width_px=width_px, height_px=height_px)
                for sha256, path, width_px, height_px in zip(*(batch.column(name).to_pylist() for name in _IMAGE_COLUMNS), strict=True)
            ]
            for image, count, *values in zip(images, counts, *columns.values(), strict=True):
                samples.append(Sample(image=image, turns=tuple(islice(turns, count)), **dict(zip(columns, values, strict=True))))
    return samples


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Objects by the million, none of which refer in circles: the collector would look at all of them again and again, for half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _turns_of(turns: pa.StructArray) -> Iterator[Turn]:
    columns = [turns.field(name).to_pylist() for name in ("question", "answer", "kind", "detail", "shown")]
    evidence = [turns.field(f"evidence_{side}_px").to_pylist() for side in ("left", "top", "right", "bottom")]
    for question, answer, kind, detail, shown, place in zip(*columns, zip(*evidence, strict=True), strict=True):
        box = None if place[0] is None else place
        yield Turn(question=question, answer=answer, kind=kind, detail=detail, evidence=box, shown=tuple(shown))


def read_samples(store: Store, dataset_fingerprint: str, split: Split | None = None) -> list[Sample]:
    """The samples of one dataset in their frozen order.

    Args:
        store: where the tables are.
        dataset_fingerprint: `fingerprint(dataset_spec)`, all of it or its first 16 characters.
        split: one side of the dataset; None is both.

    Returns:
        Samples by ascending index.

    Raises:
        TableError: the dataset is not there, or holds an index, an image or a conversation about none twice.
    """
    samples = samples_from_table(_rows(store, dataset_fingerprint, SAMPLES_SCHEMA.names))
    _check_single(store, dataset_fingerprint, "conversation", [sample.identity for sample in samples if sample.text_only])
    return _in_order(store, dataset_fingerprint, samples, split)


def read_images(store: Store, dataset_fingerprint: str, split: Split | None = None) -> list[Sample]:
    """The images of one dataset: its samples but those of text alone, without their turns.

    Features know nothing of questions, and turns take most of the time to read.

    Args:
        store: where the tables are.
        dataset_fingerprint: `fingerprint(dataset_spec)`, all of it or its first 16 characters.
        split: one side of the dataset; None is both.

    Returns:
        Samples by ascending index, every image once.

    Raises:
        TableError: the dataset is not there, or holds an index or an image twice.
    """
    rows = _rows(store, dataset_fingerprint, [*_PLAIN_COLUMNS, *_IMAGE_COLUMNS])
    samples = _in_order(store, dataset_fingerprint, samples_from_table(rows), split)
    return [sample for sample in samples if not sample.text_only]


def _rows(store: Store, dataset_fingerprint: str, columns: Sequence[str]) -> pa.Table:
    key = dataset_fingerprint[:16]
    table = read_partition(store, SAMPLES_TABLE, {"dataset": key}, columns)
    if table is None:
        raise TableError(
            f"{store.url(SAMPLES_TABLE)} holds no dataset {key}. Expected the samples that build-dataset commits; "
            "run `loupe build-dataset RECIPE` first."
        )
    return table


def _in_order(store: Store, dataset_fingerprint: str, samples: list[Sample], split: Split | None) -> list[Sample]:
    """A split's samples in the frozen order, when no two of all are the same."""
    samples = sorted(samples, key=lambda sample: sample.index)
    _check_single(store, dataset_fingerprint, "index", [sample.index for sample in samples])
    _check_single(store, dataset_fingerprint, "image", [sample.image_sha256 for sample in samples if not sample.text_only])
    return [sample for sample in samples if split is None or sample.split == split]


def _check_single(store: Store, dataset_fingerprint: str, name: str, values: Sequence[int | str]) -> None:
    if len(set(values)) < len(values):
        twice = next(value for value, count in Counter(values).items() if count > 1)
        raise TableError(
            f"{store.url(SAMPLES_TABLE)}: dataset {dataset_fingerprint[:16]} holds the {name} {twice} more than once; rebuild it under another root"
        )
