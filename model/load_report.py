"""The report of an import: what became of every tensor, so that nothing is loaded in part and nothing is dropped in silence.

Needs the standard library alone.
"""

from dataclasses import dataclass

__all__ = ["IgnoredTensor", "ImportedTensor", "LeftPart", "LoadReport", "NamedShape", "ShapeMismatch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportedTensor:
    """A tensor and where it went."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    into: tuple[str, ...]
    """The connector's tensors; several for a packed one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedShape:
    """A tensor by name and shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapeMismatch:
    """A tensor of another shape than the connector has, or not of floating point numbers."""

    name: str
    expected: tuple[int, ...]
    found: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class IgnoredTensor:
    """A tensor that decides nothing, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftPart:
    """A part of the model that is no connector."""

    part: str
    num_tensors: int
    num_values: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What an import made of every tensor in the files."""

    imported: tuple[ImportedTensor, ...]
    missing: tuple[NamedShape, ...]
    unexpected: tuple[NamedShape, ...]
    mismatched: tuple[ShapeMismatch, ...]
    not_finite: tuple[str, ...]
    ignored: tuple[IgnoredTensor, ...]
    left: tuple[LeftPart, ...]
    notes: tuple[str, ...]

    @property
    def refused(self) -> bool:
        """Whether something keeps the weights from being used. There is no partial import."""
        return bool(self.missing or self.unexpected or self.mismatched or self.not_finite)

    def lines(self) -> list[str]:
        """The report, a line per tensor, what refuses the import first."""
        lines = [f"missing     {item.name} {list(item.shape)}" for item in self.missing]
        lines += [f"shape       {item.name}: expected {list(item.expected)}, found {list(item.found)} of {item.dtype}" for item in self.mismatched]
        lines += [f"unexpected  {item.name} {list(item.shape)}" for item in self.unexpected]
        lines += [f"not finite  {name}" for name in self.not_finite]
        lines += [f"imported    {item.name} {list(item.shape)} {item.dtype} -> {', '.join(item.into)}" for item in self.imported]
        lines += [f"ignored     {item.name} {list(item.shape)}: {item.reason}" for item in self.ignored]
        lines += [f"left        {item.part}: {item.num_tensors} tensors, {item.num_values:,} values" for item in self.left]
        return lines + [f"note        {note}" for note in self.notes]
