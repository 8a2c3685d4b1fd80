"""Maps in int8: per token, behind a centre and a scale per channel; and how true what is stored is to what was computed.

Input: a map's tokens [..., width] in fp32. Output: codes, int8 [..., width], with one fp16 step per token, and back: code * step * scale + centre.
Invariant: quantising and dequantising are functions of one token and the calibration alone, so a cache's numbers do not depend on batches.

Hidden states of vision transformers have a few channels tens of times wider than the rest (arXiv 2510.04547). With one step per token those channels
set the step, and what varies in the others falls below it; behind a centre and a scale per channel all channels are alike. Differs from quantised
inference: here numbers are rounded once, outside of the network, so no error grows from block to block.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float16, Float32, Float64, Int8
from torch import Tensor

from model.quality import MapQuality

__all__ = ["ChannelCalibration", "ChannelMoments", "PackedMap", "dequantise", "map_quality", "quantise"]

LARGEST_CODE = 127
"""-128 is not used: codes are symmetric, as the step is."""

_FLAT = 1e-6
"""A channel whose deviation is below this share of the mean deviation is constant: its centre says all, and dividing by it would blow up noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelCalibration:
    """Centre and scale of a map's channels."""

    centre: Float32[Tensor, "width"]
    scale: Float32[Tensor, "width"]
    """Above 0."""

    @classmethod
    def identity(cls, width: int) -> "ChannelCalibration":
        """No centring and no scaling: plain int8 per token.

        Args:
            width: channels.
        """
        return cls(centre=torch.zeros(width), scale=torch.ones(width))

    def to(self, device: torch.device | str) -> "ChannelCalibration":
        """The same on a device."""
        return ChannelCalibration(centre=self.centre.to(device), scale=self.scale.to(device))


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedMap:
    """A map of some views as it is stored: it travels to its device so, and becomes fp32 there. Of int8 that is a quarter of the bytes."""

    values: Tensor
    """[views, tokens, width], fp32 or fp16, or int8 codes."""
    steps: Float16[Tensor, "views tokens"] | None = None
    """Of codes alone."""
    calibration: ChannelCalibration | None = None
    """Of codes alone, on the device of the values."""

    def to(self, device: torch.device | str) -> "PackedMap":
        """The same on a device, still packed."""
        return PackedMap(
            values=self.values.to(device, non_blocking=True),
            steps=None if self.steps is None else self.steps.to(device, non_blocking=True),
            calibration=None if self.calibration is None else self.calibration.to(device),
        )

    def dense(self) -> Float32[Tensor, "views tokens width"]:
        """The numbers, where they are."""
        if self.steps is None or self.calibration is None:
            return self.values.float()
        return dequantise(self.values, self.steps, self.calibration)


class ChannelMoments:
    """Mean and variance of each channel over any number of tokens, seen in parts.

    Parts may be gathered apart and merged; sums are in fp64, so their order matters little. Source: Chan, Golub and LeVeque (1979), eq. 2.1.

    Args:
        width: channels.
    """

    def __init__(self, width: int) -> None:
        self.num_tokens = 0
        self.mean: Tensor = torch.zeros(width, dtype=torch.float64)
        self.squares: Tensor = torch.zeros(width, dtype=torch.float64)
        """Sum of squared distances from the mean: fp64 [width], as `mean`."""

    def update(self, tokens: Float[Tensor, "*batch width"]) -> None:
        """Take in tokens.

        Args:
            tokens: on any device.
        """
        flat = tokens.detach().reshape(-1, tokens.shape[-1]).double()
        if not len(flat):
            return
        mean = flat.mean(dim=0)
        self._merge(len(flat), mean.cpu(), (flat - mean).square().sum(dim=0).cpu())

    def merge(self, other: "ChannelMoments") -> None:
        """Take in what another one has seen.

        Args:
            other: of the same map.
        """
        if other.num_tokens:
            self._merge(other.num_tokens, other.mean, other.squares)

    def _merge(self, num_tokens: int, mean: Float64[Tensor, "width"], squares: Float64[Tensor, "width"]) -> None:
        total = self.num_tokens + num_tokens
        step = mean - self.mean
        self.squares = self.squares + squares + step.square() * (self.num_tokens * num_tokens / total)
        self.mean = self.mean + step * (num_tokens / total)
        self.num_tokens = total

    @property
    def deviation(self) -> Float64[Tensor, "width"]:
        """Standard deviation of each channel; zeros before anything was seen."""
        return (self.squares / max(1, self.num_tokens)).sqrt()

    def calibration(self) -> ChannelCalibration:
        """Centre and scale for what was seen: mean and deviation; a channel that does not vary has the mean deviation, or 1 where none varies."""
        deviation = self.deviation
        usual = deviation.mean()
        usual = usual if usual > 0 else torch.ones_like(usual)
        return ChannelCalibration(centre=self.mean.float(), scale=torch.where(deviation > _FLAT * usual, deviation, usual).float())


def quantise(
    tokens: Float[Tensor, "*batch width"], calibration: ChannelCalibration
) -> tuple[Int8[Tensor, "*batch width"], Float16[Tensor, "*batch"]]:
    """Round tokens to int8.

    Args:
        tokens: finite or not.
        calibration: of their map, on their device.

    Returns:
        Codes from -127 to 127, and each token's step: (token - centre) / scale is about code * step. A token that is not finite, or whose step is
        beyond fp16, has a step that is not finite; its codes mean nothing.
    """
    # In place behind the first difference: on a CPU a third of the time is new memory. The numbers are the same.
    normalised = (tokens.float() - calibration.centre).div_(calibration.scale)
    # The step is rounded before it divides, so its own rounding costs nothing; where that rounds it down, the largest code is clipped by < 0.05 %.
    step = (normalised.abs().amax(dim=-1) / LARGEST_CODE).half()
    divisor = torch.where(step > 0, step.float(), torch.ones_like(step, dtype=torch.float32))
    codes = normalised.div_(divisor.unsqueeze(-1)).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
    usable = torch.isfinite(step) & (step > 0)
    return codes.masked_fill_(~usable.unsqueeze(-1), 0).to(torch.int8), step


def dequantise(
    codes: Int8[Tensor, "*batch width"], steps: Float16[Tensor, "*batch"], calibration: ChannelCalibration
) -> Float32[Tensor, "*batch width"]:
    """Tokens out of int8.

    Args:
        codes: as `quantise` gave them.
        steps: likewise.
        calibration: the same.

    Returns:
        code * step * scale + centre, fp32.
    """
    return torch.addcmul(calibration.centre, codes.float() * steps.float().unsqueeze(-1), calibration.scale)


def map_quality(
    computed: Float[Tensor, "*batch width"], stored: Float[Tensor, "*batch width"], calibration: ChannelCalibration | None = None
) -> MapQuality:
    """Compare stored tokens with computed ones.

    Args:
        computed: before they were rounded.
        stored: what a reader gets of them.
        calibration: of the map, over many images. With it one image is judged by how much tokens vary over all of those: a blank picture, whose
            tokens are all alike, has no signal of its own. None takes the variance of these tokens.

    Returns:
        Their quality; add it up over parts.
    """
    before, after = (tokens.detach().reshape(-1, tokens.shape[-1]).double() for tokens in (computed, stored.to(computed.device)))
    if not len(before):
        return MapQuality()
    cosines = torch.nn.functional.cosine_similarity(before, after, dim=-1)
    own = (before - before.mean(dim=0)).square().sum()
    return MapQuality(
        num_tokens=len(before),
        signal=float(own if calibration is None else len(before) * calibration.scale.double().square().sum()),
        error=float((before - after).square().sum()),
        cosines=float(cosines.sum()),
        worst_cosine=float(cosines.min()),
    )
