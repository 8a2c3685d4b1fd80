"""From a dataset's sources to its items, and from one item to a candidate sample or a quarantine row.

An item is one input in the frozen order: picture `number` of a rendered family, or record `number` of a LLaVA JSON file. Everything here is a pure
function of the spec and the source's bytes, so any item may be loaded twice, anywhere.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, assert_never

from model.errors import ImageError, first_line
from model.images import decode_image, detail_score
from model.specs import UnknownDigest
from workers.dataset.rendering import Rendered
from workers.dataset.samples import ImageRef, Sample, Split, Turn, conversation_sha256
from workers.dataset.spec import DatasetSpec, LlavaJsonSourceSpec, RenderedSourceSpec, SourceSpec, source_label
from workers.errors import SourceError, StorageError
from workers.quarantine import QuarantineRow, StoreReason, store_reason
from workers.storage import Store, open_url

__all__ = [
    "Item",
    "PlannedSource",
    "Renderer",
    "describe_llava_json",
    "image_name",
    "image_path",
    "is_text_only",
    "load_item",
    "normalise_conversation",
    "plan_llava_json",
    "read_records",
    "split_of",
]

Renderer = Callable[[str, int, DatasetSpec], Rendered]
"""family, number, spec -> picture."""

RecordReason = Literal["bad_record", "bad_conversation", "bad_path", "placeholder_without_image"] | StoreReason
"""What can be wrong with a record before its image is decoded; beside model.images.REASONS."""

PLACEHOLDER = "<image>"
UNKNOWN_LICENCE = "unknown"


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One input of a dataset."""

    index: int
    """Place in the frozen order over all sources."""
    source: SourceSpec
    number: int
    """Place within its source."""
    record: str | None = None
    """The record's JSON text, for sources that have records."""


class _RefusedError(Exception):
    """A record that cannot become a sample."""

    def __init__(self, reason: RecordReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def split_of(identity: str, seed: int, held_out_fraction: float) -> Split:
    """The side of a sample, from its own hash alone: adding or losing other samples never moves it.

    Args:
        identity: sha256 (hex) of the image's bytes, or of a conversation about none; see Sample.identity.
        seed: of the dataset.
        held_out_fraction: expected share on the held-out side.

    Returns:
        The side.
    """
    digest = hashlib.sha256(f"split:{seed}:{identity}".encode()).digest()
    return "held_out" if int.from_bytes(digest[:8], "big") < held_out_fraction * 2**64 else "train"


def image_path(image_sha256: str, suffix: str = "png") -> str:
    """Where an image lies, relative to the root: content-addressed, fanned out over 256 folders."""
    return f"images/{image_sha256[:2]}/{image_sha256}.{suffix}"


def describe_llava_json(records: str, images: str) -> LlavaJsonSourceSpec:
    """The spec of a LLaVA source as it lies there now.

    Args:
        records: path or URL of the JSON file.
        images: path or URL of the image folder.

    Returns:
        The spec, with the digest of the records.

    Raises:
        SourceError: the records cannot be read or are no JSON array, or there is no such image folder.
    """
    data = _records_bytes(records)
    _parsed(records, data)
    folder = Store(images).local_path()
    if folder is not None and not folder.is_dir():
        raise SourceError(f"source {records}: expected a folder with its images at {folder}, found {'a file' if folder.exists() else 'nothing'}")
    return LlavaJsonSourceSpec(records=records, images=images, records_sha256=hashlib.sha256(data).hexdigest())


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSource:
    """What is known of a LLaVA source whose files may not be readable from here."""

    spec: LlavaJsonSourceSpec
    """Its digest is the recipe's, or an UnknownDigest, where the records cannot be read."""
    unreadable: str | None
    """Why the records cannot be read."""
    has_images: bool
    """Whether the image folder is there, as far as can be told: one behind a URL counts as there."""


def plan_llava_json(records: str, images: str, records_sha256: str) -> PlannedSource:
    """Describe a LLaVA source for a plan.

    Args:
        records: path or URL of the JSON file.
        images: path or URL of the image folder.
        records_sha256: digest that a recipe gives, or nothing.

    Returns:
        What is known of it.

    Raises:
        SourceError: the records can be read and are no JSON array.
    """
    folder = Store(images).local_path()
    has_images = folder is None or folder.is_dir()
    try:
        data = _records_bytes(records)
    except (SourceError, StorageError) as error:
        digest = records_sha256 or UnknownDigest(f"the records {records}")
        spec = LlavaJsonSourceSpec(records=records, images=images, records_sha256=digest)
        return PlannedSource(spec=spec, unreadable=first_line(error.__cause__ or error), has_images=has_images)
    _parsed(records, data)
    spec = LlavaJsonSourceSpec(records=records, images=images, records_sha256=hashlib.sha256(data).hexdigest())
    return PlannedSource(spec=spec, unreadable=None, has_images=has_images)


def read_records(source: LlavaJsonSourceSpec) -> list[Any]:
    """The records of a LLaVA source, unchecked but for the file's digest.

    Args:
        source: where they are, and their digest.

    Returns:
        At least one record.

    Raises:
        SourceError: the file is not there, changed since it was described, or is no JSON array.
    """
    data = _records_bytes(source.records)
    digest = hashlib.sha256(data).hexdigest()
    if digest != source.records_sha256:
        raise SourceError(
            f"source {source.records}: expected the file with sha256 {source.records_sha256[:16]}..., found {digest[:16]}.... The records were "
            "edited after the recipe fixed them; restore the file, or take the new digest into the recipe (a new dataset)."
        )
    return _parsed(source.records, data)


def _records_bytes(records: str) -> bytes:
    try:
        store, name = open_url(records)
        return store.read_bytes(name)
    except StorageError as error:
        if error.retryable:
            raise
        raise SourceError(f"source {records}: expected a JSON array of LLaVA records there; {error}") from error


def _parsed(records: str, data: bytes) -> list[Any]:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise SourceError(f"source {records} should be a JSON array of LLaVA records, but is no JSON: {error}") from error
    if not isinstance(found, list) or not found:
        raise SourceError(f"source {records} should be a JSON array of at least one LLaVA record, found {data[:40].decode(errors='replace')!r}")
    return found


def load_item(item: Item, spec: DatasetSpec, store: Store, renderer: Renderer) -> tuple[Sample, int] | QuarantineRow:
    """Make one item into a candidate sample; a rendered picture is written to the store.

    Args:
        item: which.
        spec: of the dataset.
        store: where pictures are written.
        renderer: draws pictures.

    Returns:
        The sample and the size of its image in bytes (0 without an image), or why there is none.

    Raises:
        StorageError: the store failed in a way that says nothing about the item.
    """
    match item.source:
        case RenderedSourceSpec() as source:
            return _load_rendered(item, source, spec, store, renderer)
        case LlavaJsonSourceSpec() as source:
            return _load_llava(item, source, spec)
        case _:
            assert_never(item.source)


def _load_rendered(item: Item, source: RenderedSourceSpec, spec: DatasetSpec, store: Store, renderer: Renderer) -> tuple[Sample, int]:
    rendered = renderer(source.family, item.number, spec)
    digest = hashlib.sha256(rendered.png).hexdigest()
    path = image_path(digest)
    # Written even where it lies already: a unit runs again only when it was not synced, and a power cut may have left the file torn. The unit syncs
    # all of its images at its end.
    store.write_bytes(path, rendered.png, sync=False)
    sample = Sample(
        sample_id=f"{source.family}-{item.number:06d}",
        index=item.index,
        image=ImageRef(sha256=digest, path=path, width_px=rendered.width_px, height_px=rendered.height_px),
        family=source.family,
        source=source_label(source),
        split=split_of(digest, spec.seed, spec.held_out_fraction),
        licence=rendered.licence,
        detail_score=float(rendered.detail_score),
        turns=rendered.turns,
    )
    return sample, len(rendered.png)


def _load_llava(item: Item, source: LlavaJsonSourceSpec, spec: DatasetSpec) -> tuple[Sample, int] | QuarantineRow:
    assert item.record is not None
    name, digest = f"record {item.number}", None
    try:
        record = _checked_record(json.loads(item.record))
        if is_text_only(record):
            return _text_only_sample(item, source, spec, normalise_conversation(record["conversations"], has_image=False)), 0
        name = str(record["image"])
        turns = normalise_conversation(record["conversations"])
        data, url = _read_image(source, name)
        digest = hashlib.sha256(data).hexdigest()
        image = decode_image(data)
    except (_RefusedError, ImageError) as error:
        return QuarantineRow(reason=error.reason, source=source_label(source), item=name, index=item.index, bytes_sha256=digest, detail=str(error))
    sample = Sample(
        sample_id=_record_id(item, source),
        index=item.index,
        image=ImageRef(sha256=digest, path=url, width_px=image.width, height_px=image.height),
        family="llava",
        source=source_label(source),
        split=split_of(digest, spec.seed, spec.held_out_fraction),
        licence=UNKNOWN_LICENCE,
        detail_score=detail_score(image, spec.view_px),
        turns=turns,
    )
    return sample, len(data)


def _record_id(item: Item, source: LlavaJsonSourceSpec) -> str:
    """Not the record's own id: ids may be missing, and two files or two records may share one."""
    return f"{PurePosixPath(source.records).stem}-{item.number:07d}"


def _text_only_sample(item: Item, source: LlavaJsonSourceSpec, spec: DatasetSpec, turns: tuple[Turn, ...]) -> Sample:
    return Sample(
        sample_id=_record_id(item, source),
        index=item.index,
        image=None,
        family="text",
        source=source_label(source),
        split=split_of(conversation_sha256(turns), spec.seed, spec.held_out_fraction),
        licence=UNKNOWN_LICENCE,
        detail_score=0.0,
        turns=turns,
    )


def is_text_only(record: Any) -> bool:
    """Whether a record of a LLaVA source is about no image: it has no `image`, or null there."""
    return isinstance(record, dict) and record.get("image") is None


def image_name(record: Any) -> str | None:
    """The image that a record names, as far as it can be one.

    Args:
        record: of a LLaVA source, unchecked.

    Returns:
        Its path below the image folder; None of text alone, and of a record that will be refused.
    """
    try:
        checked = _checked_record(record)
    except _RefusedError:
        return None
    return None if is_text_only(checked) else str(checked["image"])


def _checked_record(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise _RefusedError("bad_record", "a record is an object with a list `conversations`")
    if is_text_only(record):
        return record
    image = record["image"]
    if not isinstance(image, str) or not image:
        raise _RefusedError("bad_record", f"`image` should be a path, found {image!r}")
    parts = PurePosixPath(image).parts
    if image.startswith("/") or ".." in parts or "://" in image or "\0" in image or not _is_text(image):
        raise _RefusedError("bad_path", f"`image` should be a path below the image folder, found {image!r}")
    return record


def _is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: JSON may spell half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_image(source: LlavaJsonSourceSpec, name: str) -> tuple[bytes, str]:
    store = Store(source.images)
    try:
        return store.read_bytes(name), store.url(name)
    except StorageError as error:
        reason = store_reason(error)
        if reason is None:
            raise
        raise _RefusedError(reason, str(error)) from error


def normalise_conversation(conversations: list[Any], *, has_image: bool = True) -> tuple[Turn, ...]:
    """LLaVA's list of {from, value} as turns: alternation checked, the image placeholder taken out (the chat template places it).

    Args:
        conversations: human and gpt alternating, human first; a leading gpt turn is skipped as LLaVA's loader does.
        has_image: whether the record names an image.

    Returns:
        At least one turn, of kind `llava/turn`, or `llava/text` without an image.

    Raises:
        _RefusedError: with reason bad_conversation; or placeholder_without_image, for a question that shows what is not there.
    """
    texts: list[tuple[str, str]] = []
    for place, entry in enumerate(conversations):
        if not isinstance(entry, dict) or entry.get("from") not in ("human", "gpt") or not isinstance(entry.get("value"), str):
            raise _RefusedError("bad_conversation", f"turn {place} should be {{from: human or gpt, value: text}}, found {entry!r:.80}")
        if not _is_text(entry["value"]):
            raise _RefusedError("bad_conversation", f"turn {place} should be text, found half a surrogate pair in {entry['value']!a:.80}")
        texts.append((entry["from"], entry["value"]))
    if texts and texts[0][0] == "gpt":
        texts = texts[1:]
    speakers = [speaker for speaker, _ in texts]
    if not texts or speakers != ["human", "gpt"] * (len(texts) // 2):
        raise _RefusedError("bad_conversation", f"turns should alternate human, gpt, ..., found {speakers[:8]}")
    placeholders = [place for place, (_, text) in enumerate(texts) for _ in range(text.count(PLACEHOLDER))]
    if len(placeholders) > 1 or any(speakers[place] == "gpt" for place in placeholders):
        raise _RefusedError("bad_conversation", f"{PLACEHOLDER} should stand once, in a question, found it in turns {placeholders[:8]}")
    if placeholders and not has_image:
        raise _RefusedError(
            "placeholder_without_image",
            f"turn {placeholders[0]} asks about an image by {PLACEHOLDER}, but the record names none; give the record its `image`, or remove the "
            "placeholder from a question about text alone",
        )
    turns = []
    for place in range(0, len(texts), 2):
        question, answer = texts[place][1].replace(PLACEHOLDER, "").strip(), texts[place + 1][1].strip()
        if not question or not answer:
            raise _RefusedError("bad_conversation", f"turn {place} has an empty question or answer")
        turns.append(Turn(question=question, answer=answer, kind="llava/turn" if has_image else "llava/text", detail="large"))
    return tuple(turns)
