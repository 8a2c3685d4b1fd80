"""Weights files: safetensors only, and whole."""

from pathlib import Path

__all__ = ["unreadable_weights"]


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
