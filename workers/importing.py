"""Import of released weights: the authors' files become a connector that training, evaluation and export can start from.

    imports/<key>/connector.safetensors   the connector, in Loupe's layout: `[connector] weights` of a recipe
    imports/<key>/language_model/         the language model of a whole model, in transformers' layout: `[language_model] model` of a recipe
    imports/<key>/import.json             the report and the digests of what it was made from; written last, so what has none is not whole

Input: folders or files, a recipe's connector and encoder. Invariant: the key is a function of the bytes read and of the recipe's connector, so the
same import is found and not made again; a model that does not fit leaves nothing behind.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch

from model.load_report import LoadReport
from model.released_language_model import LanguageModelFiles, check_language_model, released_config, tokenizer_files, write_language_model
from model.released_weights import canonical_name, load_released, part_left
from model.specs import ConnectorSpec, EncoderSpec, fingerprint
from model.tensor_files import TensorFiles, open_tensor_files, weight_files
from model.views import ViewSpec
from workers.commits import from_json, to_json
from workers.errors import DiskSpaceError
from workers.storage import TEMPORARY_PREFIX, Store

__all__ = ["ImportRecord", "ImportSpec", "import_weights"]

_RECORD = "import.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportSpec:
    """Identity of an import."""

    files: tuple[tuple[str, str], ...]
    """Name and sha256 (hex) of every file that decides what comes out."""
    connector: ConnectorSpec
    encoder: EncoderSpec
    """Its shape: the digest of its weights is left empty, for nothing of them goes into an import, and they may be elsewhere."""
    language_model: bool
    format_version: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportRecord:
    """What an import made."""

    key: str
    folder: str
    """Relative to the root."""
    connector: str
    """Path of the connector's file, relative to the root."""
    connector_sha256: str
    hidden: int
    """Width of the language model that the connector speaks to."""
    language_model: LanguageModelFiles | None
    sources: dict[str, str]
    """sha256 (hex) by file name."""
    files: dict[str, str]
    """sha256 (hex) by path inside the folder."""
    report: LoadReport


def import_weights(
    places: Sequence[Path],
    connector: ConnectorSpec,
    encoder: EncoderSpec,
    views: ViewSpec,
    store: Store,
    *,
    connector_only: bool = False,
    write: bool = True,
) -> ImportRecord:
    """Import released weights, or find them imported.

    Args:
        places: the folder of a released model, or its files.
        connector: the recipe's.
        encoder: the recipe's.
        views: the recipe's.
        store: where the import goes.
        connector_only: leave a whole model's language model out.
        write: False checks everything and writes nothing; the record then tells of no files.

    Returns:
        The record.

    Raises:
        ReleasedWeightsError: the files cannot be read, or are no such connector as the recipe describes; the message is the report.
        DiskSpaceError: the language model does not fit.
    """
    files = weight_files(places)
    opened = open_tensor_files(files)
    folder = places[0] if places[0].is_dir() else places[0].parent
    config = released_config(folder)
    imported = load_released(opened, config, connector, encoder, views)
    whole = _holds_language_model(opened) and not connector_only
    if whole:
        check_language_model(opened, config or {})
    read = [*files, *([folder / "config.json"] if config is not None else []), *(tokenizer_files(folder) if whole else [])]
    sources = {file.name: _sha256(file) for file in read}
    shape = replace(encoder, weights_sha256="")
    spec = ImportSpec(files=tuple(sorted(sources.items())), connector=connector, encoder=shape, language_model=whole)
    key = fingerprint(spec)[:16]
    target = f"imports/{key}"
    if (done := _found(store, target)) is not None:
        return done
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in imported.state.items()}, metadata={"format": "pt"})
    digests = {"connector.safetensors": hashlib.sha256(data).hexdigest()}
    written: LanguageModelFiles | None = None
    if write:
        store.check_writable()
        if whole:
            written, more = _import_language_model(opened, config or {}, folder, store, f"{target}/language_model")
            digests |= {f"language_model/{name}": digest for name, digest in more.items()}
        store.write_bytes(f"{target}/connector.safetensors", data)
    record = ImportRecord(
        key=key,
        folder=target,
        connector=f"{target}/connector.safetensors",
        connector_sha256=digests["connector.safetensors"],
        hidden=imported.facts.hidden,
        language_model=written,
        sources=sources,
        files=digests if write else {},
        report=imported.report,
    )
    if write:
        store.write_json(f"{target}/{_RECORD}", to_json(record))
    return record


def _holds_language_model(files: TensorFiles) -> bool:
    """Whether its layers are there, and not only the embeddings that some adapters are saved with."""
    names = (canonical_name(name) for name in files.stored)
    return any(part_left(name) == "language model" and name.startswith("model.layers.") for name in names)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _found(store: Store, folder: str) -> ImportRecord | None:
    """The record of an earlier import, if its files are what it says."""
    path = f"{folder}/{_RECORD}"
    if not store.exists(path):
        return None
    record = from_json(ImportRecord, store.read_json(path), where=store.url(path))
    if not all(store.exists(f"{folder}/{name}") for name in record.files):
        return None
    whole = hashlib.sha256(store.read_bytes(record.connector)).hexdigest() == record.connector_sha256
    return record if whole else None


def _import_language_model(
    files: TensorFiles, config: dict[str, object], source: Path, store: Store, target: str
) -> tuple[LanguageModelFiles, dict[str, str]]:
    """Write it beside its place and move it in file by file: it may be large, and is not copied twice on one disk."""
    root = store.local_path()
    needed = sum(tensor.num_values * 2 for name, tensor in files.stored.items() if part_left(canonical_name(name)) == "language model")
    free = shutil.disk_usage(root or tempfile.gettempdir()).free
    if needed > free:
        raise DiskSpaceError(
            f"{store.root}: the language model takes about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; free some space, or import the "
            "connector alone with --connector-only"
        )
    with tempfile.TemporaryDirectory(prefix=f"{TEMPORARY_PREFIX}import-", dir=root) as temporary:
        folder = Path(temporary)
        written = write_language_model(files, config, source, folder)
        digests = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
        for name in digests:
            with store.publishing(f"{target}/{name}") as file:
                os.replace(folder / name, file) if root is not None else shutil.copyfile(folder / name, file)  # noqa: PTH105
    return written, digests
