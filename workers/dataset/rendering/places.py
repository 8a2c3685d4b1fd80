"""Words for places in a picture: thirds across and thirds down, said the same way by every family."""

__all__ = ["PLACES"]

PLACES: tuple[str, ...] = (
    "top left", "top centre", "top right", "middle left", "middle centre", "middle right", "bottom left", "bottom centre", "bottom right",
)  # fmt: skip
"""The ninths of a picture, row by row."""
