"""Ask an exported model about an image."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipelines.errors import NothingThereError
from workers.errors import ObjectNotFoundError
from workers.storage import Store, open_url

if TYPE_CHECKING:
    from model.export import Answer

__all__ = ["ask_export"]


def ask_export(export: str, image: str, question: str, mode: Literal["blind", "global", "local", "both"]) -> "Answer":
    """Load an export and ask it one question.

    Args:
        export: folder or URL of the export.
        image: path or URL of an image file.
        question: what to ask.
        mode: which views the model sees.

    Returns:
        The answer.

    Raises:
        NothingThereError: no such export or image.
        StorageError: one of them cannot be read.
    """
    images, name = open_url(image)
    try:
        image_bytes = images.read_bytes(name)
    except ObjectNotFoundError as error:
        raise NothingThereError(f"ask: found no image file {image}; give the path or URL of a PNG or JPEG") from error
    store = Store(export)
    local = store.local_path()
    if local is not None and not local.is_dir():
        raise NothingThereError(f"ask: found no export folder {local}; `loupe export RECIPE` writes one and prints its path")
    from model.export import load_export

    if local is not None:
        return load_export(local).ask(image_bytes, question, mode=mode)
    with tempfile.TemporaryDirectory(prefix="loupe-export-") as folder:
        store.download_folder("", Path(folder))
        return load_export(Path(folder)).ask(image_bytes, question, mode=mode)
