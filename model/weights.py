"""Weights files: safetensors only, and whole; how they come from the hub, and where its client keeps what it has fetched."""

import json
from collections.abc import Sequence
from pathlib import Path

from model.errors import HubError, first_line

__all__ = ["absent_shards", "cached_snapshot", "fetch_snapshot", "unreadable_weights"]


def absent_shards(folder: Path) -> list[str]:
    """Weights files that a folder's index names and the folder does not hold, as a broken-off download leaves it.

    Args:
        folder: of a model.

    Returns:
        Their names; none where there is no index.
    """
    named: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            named |= {str(name) for name in weight_map.values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            named.add(index.name)  # an index that cannot be read vouches for nothing
            continue
    return sorted(name for name in named if not name.endswith(".safetensors") or not (folder / name).is_file())


def cached_snapshot(hub_id: str) -> Path | None:
    """The folder in which the hub's client has put a model, or a part of it, on this machine. Asks no network.

    Args:
        hub_id: such as `openai/clip-vit-large-patch14-336`.

    Returns:
        The newest revision that was fetched; None when there is none, or the id is none.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def fetch_snapshot(hub_id: str, patterns: Sequence[str]) -> Path:
    """The folder in which the hub's client keeps a model, fetched if need be. The one place that asks the hub for files.

    Args:
        hub_id: such as `openai/clip-vit-large-patch14-336`.
        patterns: of the files' names that are wanted.

    Returns:
        The folder of the revision that is the newest on the hub.

    Raises:
        HubError: the id is none, the hub has no such model or does not answer, or the files cannot be kept.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except Exception as error:
        # The hub's client raises its own, its HTTP client's and OS errors; for a user they are one: it cannot be had.
        raise HubError(
            f"expected a folder here or a model on the hub, found neither ({type(error).__name__}: {first_line(error)}). Check the name and the "
            "connection, or give the folder of a copy"
        ) from error


def unreadable_weights(folder: Path) -> str | None:
    """What is wrong with a folder's weights files, as far as their headers tell: cut-off downloads, pointers that were committed in their place.

    Args:
        folder: with *.safetensors files.

    Returns:
        The first file's name and fault, or None. No tensor is read: a header costs milliseconds.
    """
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{file.name} cannot be read ({error}), {file.stat().st_size} bytes; copy or fetch it again"
    return None
