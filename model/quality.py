"""How true what is stored of a map is to what was computed, as sums that add up over the parts of a run.

Needs the standard library alone: records are read where torch is not loaded. `model.quantisation.map_quality` measures.
"""

import math
from dataclasses import dataclass

__all__ = ["EXACT_DB", "MapQuality", "recorded_db"]

EXACT_DB = 999.0
"""In records, of what is exact: JSON has no infinity."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MapQuality:
    """How true a stored map is to the computed one: sums over tokens, which add up over the parts of a run."""

    num_tokens: int = 0
    signal: float = 0.0
    """How much tokens vary, times their number: as it was calibrated, or else their squared distances from the part's own mean. What is constant
    carries no information."""
    error: float = 0.0
    """Squared differences between what was computed and what a reader gets."""
    cosines: float = 0.0
    """Sum over tokens, of the numbers as they are."""
    worst_cosine: float = 1.0
    """Of the token that suffered most."""

    @property
    def snr_db(self) -> float:
        """Signal over error in decibels; infinite where nothing was lost, and minus infinity where there was nothing to keep and it was lost."""
        if not self.error:
            return math.inf
        return 10 * math.log10(self.signal / self.error) if self.signal else -math.inf

    @property
    def cosine(self) -> float:
        """Mean over tokens; 1 of none."""
        return self.cosines / self.num_tokens if self.num_tokens else 1.0

    def __add__(self, other: "MapQuality") -> "MapQuality":
        """Of both parts."""
        return MapQuality(
            num_tokens=self.num_tokens + other.num_tokens,
            signal=self.signal + other.signal,
            error=self.error + other.error,
            cosines=self.cosines + other.cosines,
            worst_cosine=min(self.worst_cosine, other.worst_cosine),
        )


def recorded_db(quality: MapQuality) -> float:
    """The signal to noise ratio as a record holds it: JSON has no infinity, so what is exact has 999 dB."""
    return max(-EXACT_DB, min(EXACT_DB, quality.snr_db))
