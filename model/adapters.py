"""Adapters: fused tokens into the language model's width, by a projector alone or by a gated mixture of two experts.

Input: fused tokens [batch, tokens, width]. Output: visual tokens [batch, tokens, hidden]. Invariant: the gate's weights of a token are positive and
sum to 1. Nothing here draws random numbers in a forward pass: the gate's noise is an argument.

Source: LLaVA's mlp2x_gelu; SliME (arXiv 2406.08487) section 2.2.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from model.specs import Start

__all__ = ["NUM_EXPERTS", "Gate", "Newline", "Projector", "init_linear", "resized_grid"]

NUM_EXPERTS = 2
"""The projector on the tokens, and the same projector behind the resampler."""

NOISE_FLOOR = 0.01
"""Least standard deviation of the gate's noise."""


def init_linear(linear: nn.Linear, generator: torch.Generator) -> None:
    """Torch's default initialisation of a linear layer, drawn from a generator of our own.

    Args:
        linear: the layer; changed in place.
        generator: where the numbers come from.
    """
    bound = 1.0 / math.sqrt(linear.in_features)
    with torch.no_grad():
        linear.weight.uniform_(-bound, bound, generator=generator)
        linear.bias.uniform_(-bound, bound, generator=generator)


class Projector(nn.Module):
    """Linear, exact GELU, Linear.

    Source: LLaVA's mlp2x_gelu, which starts from torch's defaults. Differs: with `start = "scaled"` the second layer starts without a bias and such
    that tokens of unit variance come out with a root mean square of 1.
    """

    def __init__(self, width: int, hidden: int, generator: torch.Generator, *, start: Start = "scaled") -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)
        init_linear(self.linear_1, generator)
        init_linear(self.linear_2, generator)
        if start == "authors":
            return
        with torch.no_grad():
            probe = self(torch.randn(256, width, generator=generator))
            self.linear_2.weight /= probe.square().mean().sqrt()
            self.linear_2.bias.zero_()

    def forward(self, tokens: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch hidden"]:
        """Project tokens into the language model's width."""
        projected: Tensor = self.linear_2(F.gelu(self.linear_1(tokens)))
        return projected


class Gate(nn.Module):
    """Weights of the two experts, per token.

    Source: SliME section 2.2. The noise has a matrix of its own, as in the paper, or the gate's, as in the authors' code. Differs: both experts are
    always kept (k = 2 of 2), so nothing is sparse and no load is balanced; their renormalisation with +1e-6 is left out, since a softmax already sums
    to 1.
    """

    def __init__(self, width: int, *, own_noise: bool = True) -> None:
        """Build; both matrices start at zero, so the first weights are a half each.

        Args:
            width: channels of the fused tokens.
            own_noise: whether the noise has a matrix of its own.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, NUM_EXPERTS))
        self.noise_weight = nn.Parameter(torch.zeros(width, NUM_EXPERTS)) if own_noise else None

    def forward(self, tokens: Float[Tensor, "*batch width"], noise: Float[Tensor, "*batch experts"] | None = None) -> Float[Tensor, "*batch experts"]:
        """How much each expert counts for each token.

        Args:
            tokens: fused tokens.
            noise: standard normal numbers in training, None else.

        Returns:
            Weights that sum to 1 over the experts, in fp32.
        """
        logits = (tokens @ self.weight).float()
        if noise is not None:
            spread = self.weight if self.noise_weight is None else self.noise_weight
            logits = logits + noise * (F.softplus((tokens @ spread).float()) + NOISE_FLOOR)
        return torch.softmax(logits, dim=-1)


class Newline(nn.Module):
    """A learned token that ends the lines of a picture.

    Source: LLaVA-NeXT's image_newline, which starts normal with a deviation of 1 / sqrt(hidden). Differs: with `start = "scaled"` it starts with unit
    variance, since it is scaled like every visual token.
    """

    def __init__(self, hidden: int, generator: torch.Generator, *, start: Start = "scaled") -> None:
        super().__init__()
        deviation = 1 / math.sqrt(hidden) if start == "authors" else 1.0
        self.vector = nn.Parameter(deviation * torch.randn(hidden, generator=generator))

    def forward(self) -> Float[Tensor, "1 hidden"]:
        """The token, not scaled yet."""
        return self.vector[None]


def resized_grid(tokens: Float[Tensor, "batch tokens hidden"], output_grid: int) -> Float[Tensor, "batch resized hidden"]:
    """Tokens of a square grid, interpolated bilinearly to another.

    Args:
        tokens: row by row.
        output_grid: tokens on a side afterwards.

    Returns:
        [batch, output_grid ** 2, hidden].

    Source: Dense Connector section 3.3, whose code is not released: neither whether corners are aligned nor whether it smooths first is known. Here
    neither: halving a grid then is the mean of every 2 x 2 tokens.
    """
    grid = math.isqrt(tokens.shape[1])
    raster = tokens.transpose(1, 2).unflatten(2, (grid, grid))
    return F.interpolate(raster, size=(output_grid, output_grid), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
