"""Resampling: learnable queries on a grid read a view's tokens by one cross-attention.

Used twice: as the global branch's second expert (as many queries as patches) and as the local branch's compression (fewer queries). Input: tokens of
a square grid [batch, patches, width]. Output: [batch, queries, width], layer-normalised. Invariant: the attention weights of a query sum to 1.

Source: SliME (arXiv 2406.08487) sections 2.2 and 2.3 and the authors' code.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from model.errors import SpecError

__all__ = ["Resampler", "num_heads", "own_cells", "positions_2d"]

NORM_EPS = 1e-6
HEAD_WIDTH = 128
"""Channels of a head in the authors' code; ours is the next width that divides."""

CONTENT_AT_START = 0.005
"""Weight of content against place in queries and keys at a positional start. Content of unit variance would drown the place: neighbours on an 8x8
grid differ by less than 4 in the product of their position codes, while the product of a code with random content has a deviation of 17."""

OWN_CELL_MASS = 0.8
"""Attention that every query gives to its own cell at a positional start, before content adds its little."""


def positions_2d(rows: int, columns: int, width: int) -> Float[Tensor, "patches width"]:
    """Fixed sine-cosine codes of a grid: half the channels per axis, the horizontal axis first.

    Args:
        rows: of cells.
        columns: of cells.
        width: channels, a multiple of 4.

    Returns:
        Codes in row-major order, fp32.

    Raises:
        SpecError: the channels cannot be shared among two axes and two functions.
    """
    if width % 4:
        raise SpecError(f"a resampler needs a width that is a multiple of 4, found {width}")
    quarter = width // 4
    frequencies = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(max(rows, columns), dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)
    horizontal = axis[None, :columns].expand(rows, columns, -1)
    vertical = axis[:rows, None].expand(rows, columns, -1)
    return torch.cat([horizontal, vertical], dim=-1).reshape(rows * columns, width).float()


def own_cells(query_grid: tuple[int, int], key_grid: int) -> Int[Tensor, "patches"]:
    """Which query's cell each patch lies in, both grids laid over the same view.

    Args:
        query_grid: rows and columns of queries.
        key_grid: patches on a side.

    Returns:
        Query numbers, by patch in row-major order.
    """
    rows, columns = query_grid
    middles = 2 * torch.arange(key_grid) + 1
    row, column = (torch.div(middles * cells, 2 * key_grid, rounding_mode="floor") for cells in (rows, columns))
    return (row[:, None] * columns + column[None, :]).reshape(-1)


def place_codes(query_grid: tuple[int, int], key_grid: int, width: int) -> tuple[Float[Tensor, "queries width"], Float[Tensor, "patches width"]]:
    """Where queries and patches stand: the patches' codes are the queries', resized bicubically.

    Args:
        query_grid: rows and columns of queries.
        key_grid: patches on a side.
        width: channels.

    Returns:
        Codes of the queries and of the patches, row by row.
    """
    places = positions_2d(*query_grid, width)
    resized = places.T.reshape(1, width, *query_grid)
    if query_grid != (key_grid, key_grid):
        resized = F.interpolate(resized, size=(key_grid, key_grid), mode="bicubic", align_corners=False)
    return places, resized.reshape(width, key_grid**2).T.contiguous()


def num_heads(width: int) -> int:
    """The most heads of at least HEAD_WIDTH channels that share the position codes' frequencies evenly."""
    quarter = width // 4
    return max(heads for heads in range(1, max(1, width // HEAD_WIDTH) + 1) if quarter % heads == 0)


class Resampler(nn.Module):
    """One cross-attention of learnable queries over a view's tokens, then a layer norm.

    Source: SliME's resampler: q = LN(queries) + place, k = LN(tokens) + place, v = LN(tokens); no feed-forward part, no residual; eps 1e-6; the keys'
    place codes are the queries' grid resized bicubically. Differs: keys and values have a norm of their own (the authors share one, equal weights
    give the same); keys have no biases, which a softmax over the keys ignores; place codes are a buffer computed in fp32 where theirs is a half
    precision parameter; a positional start, see `attention_init`; the algebra is regrouped where that is cheaper, see `forward`.
    """

    key_places: Tensor
    query_places: Tensor

    def __init__(
        self,
        *,
        query_grid: tuple[int, int],
        num_patches: int,
        width: int,
        attention_init: Literal["positional", "authors"],
        generator: torch.Generator,
    ) -> None:
        """Build and initialise.

        Args:
            query_grid: rows and columns of queries.
            num_patches: a square number: patches in a view.
            width: channels of the tokens.
            attention_init: `positional`: each query starts as the mean of its own cell's normalised tokens. `authors`: random.
            generator: where the numbers come from.

        Raises:
            SpecError: a number of patches that is no square, or a width that is no multiple of 4.
        """
        super().__init__()
        key_grid, num_queries = math.isqrt(num_patches), math.prod(query_grid)
        if key_grid**2 != num_patches:
            raise SpecError(f"a resampler reads a square grid of patches, found {num_patches}")
        self.query_grid, self.key_grid, self.width = query_grid, key_grid, width
        self.num_queries, self.num_patches = num_queries, num_patches
        self.num_heads = num_heads(width)
        query_places, key_places = place_codes(query_grid, key_grid, width)
        self.register_buffer("query_places", query_places, persistent=False)
        self.register_buffer("key_places", key_places, persistent=False)
        self.queries = nn.Parameter(torch.empty(num_queries, width))
        self.norm_queries = nn.LayerNorm(width, eps=NORM_EPS)
        self.norm_keys = nn.LayerNorm(width, eps=NORM_EPS, bias=False)
        self.norm_values = nn.LayerNorm(width, eps=NORM_EPS)
        self.to_queries = nn.Linear(width, width)
        self.to_keys = nn.Linear(width, width, bias=False)
        self.to_values = nn.Linear(width, width)
        self.to_output = nn.Linear(width, width)
        self.norm_output = nn.LayerNorm(width, eps=NORM_EPS)
        # Regrouping moves the key and value projections from the patches to the queries of each head: fewer rows, wider intermediate.
        self.regrouped = self.num_heads * num_queries <= 2 * num_patches
        with torch.no_grad():
            nn.init.trunc_normal_(self.queries, std=0.02, generator=generator)
            for linear in (self.to_queries, self.to_values, self.to_output):
                linear.bias.zero_()
            if attention_init == "positional":
                self._start_positional(generator)
            else:
                bound = math.sqrt(6 / (width + 3 * width))  # Xavier over the packed q, k, v matrix, as nn.MultiheadAttention does it
                for linear in (self.to_queries, self.to_keys, self.to_values):
                    linear.weight.uniform_(-bound, bound, generator=generator)
                bound = 1 / math.sqrt(width)
                self.to_output.weight.uniform_(-bound, bound, generator=generator)

    def _start_positional(self, generator: torch.Generator) -> None:
        """Queries look at their own cell, values pass through."""
        heads, quarter = self.num_heads, self.width // 4
        # Each head gets every heads-th frequency, of both axes, sine and cosine: so its products of place codes depend on distance alone and are
        # largest at distance 0. A rotation across heads would not keep that; a random one within a head does.
        frequency_head = (torch.arange(quarter) % heads).repeat(4)
        rotation = torch.zeros(self.width, self.width)
        per_head = self.width // heads
        for head in range(heads):
            orthogonal, triangular = torch.linalg.qr(torch.randn(per_head, per_head, generator=generator))
            channels = torch.nonzero(frequency_head == head).squeeze(1)
            rotation[head * per_head : (head + 1) * per_head].index_copy_(1, channels, orthogonal * triangular.diagonal().sign())
        self.to_queries.weight.copy_(rotation)
        self.to_keys.weight.copy_(rotation)
        for norm in (self.norm_queries, self.norm_keys):
            norm.weight.fill_(CONTENT_AT_START)
        cells = own_cells(self.query_grid, self.key_grid)
        own = cells[None, :] == torch.arange(self.num_queries)[:, None]
        looked_at = own.any(dim=1)
        low, high = 0.0, 20.0  # log2 of the squared gain; the own cell's share grows with it
        products = self._place_logits(self.query_places @ rotation.T)
        for _ in range(40):
            middle = (low + high) / 2
            mass = (torch.softmax(products * 2**middle, dim=-1) * own).sum(-1)[:, looked_at].min()
            low, high = (middle, high) if mass < OWN_CELL_MASS else (low, middle)
        gain = 2 ** (high / 2)
        self.to_queries.weight.mul_(gain)
        self.to_keys.weight.mul_(gain)
        nn.init.eye_(self.to_values.weight)
        nn.init.eye_(self.to_output.weight)

    def _place_logits(self, queries: Float[Tensor, "queries width"]) -> Float[Tensor, "heads queries patches"]:
        """The part of the logits that queries and places alone decide, with every row's largest entry moved to 0 (which a softmax ignores).

        Sine-cosine codes share a large common part: their products lie in the hundreds and differ by less than 1. Half precision does not hold that,
        single precision costs 3e-5 of the output; so they are taken in double, once per batch and not per image.
        """
        keys = self.key_places.double() @ self.to_keys.weight.double().T
        heads = self.num_heads
        split_queries = queries.double().reshape(self.num_queries, heads, -1).transpose(0, 1)
        split_keys = keys.reshape(self.num_patches, heads, -1).transpose(0, 1)
        logits = split_queries @ split_keys.transpose(1, 2) / math.sqrt(self.width // heads)
        return (logits - logits.amax(dim=-1, keepdim=True).detach()).float()

    def attention(self, tokens: Float[Tensor, "batch patches width"]) -> Float[Tensor, "batch heads queries patches"]:
        """Attention weights, for pictures and tests: how much each query takes from each patch."""
        normed = F.layer_norm(tokens.float(), (self.width,), eps=NORM_EPS)
        queries = self.to_queries(self.norm_queries(self.queries) + self.query_places)
        return torch.softmax(self._content_logits(normed, queries) + self._place_logits(queries), dim=-1)

    def _content_logits(
        self, normed: Float[Tensor, "batch patches width"], queries: Float[Tensor, "queries width"]
    ) -> Float[Tensor, "batch heads queries patches"]:
        """The part of the logits that the tokens' content decides: (q W_k) x in place of q (W_k x). Constants of a row are left out."""
        heads, per_head = self.num_heads, self.width // self.num_heads
        split = queries.reshape(self.num_queries, heads, per_head).transpose(0, 1)
        folded = split @ self.to_keys.weight.reshape(heads, per_head, self.width) * self.norm_keys.weight
        folded = folded.reshape(heads * self.num_queries, self.width) / math.sqrt(per_head)
        logits = torch.matmul(normed, folded.T).float()
        return logits.transpose(1, 2).reshape(-1, heads, self.num_queries, self.num_patches)

    def forward(self, tokens: Float[Tensor, "batch patches width"]) -> Float[Tensor, "batch queries width"]:
        """Read a view's tokens with every query.

        Args:
            tokens: a square grid's tokens in row-major order.

        Returns:
            One normalised token per query.

        With few queries the sums are regrouped, (A x) W_v for A (x W_v) and (q W_k) x for q (W_k x): the same numbers, a third of the work.
        """
        heads, per_head, count = self.num_heads, self.width // self.num_heads, tokens.shape[0]
        normed = F.layer_norm(tokens.float(), (self.width,), eps=NORM_EPS)
        with torch.autocast(tokens.device.type, enabled=False):
            queries = F.linear(self.norm_queries(self.queries) + self.query_places, self.to_queries.weight, self.to_queries.bias)
            places = self._place_logits(queries)
        if self.regrouped:
            weights = torch.softmax(self._content_logits(normed, queries) + places, dim=-1)
            pooled = torch.bmm(weights.reshape(count, heads * self.num_queries, self.num_patches), normed)
            pooled = pooled.reshape(count, heads, self.num_queries, self.width) * self.norm_values.weight + self.norm_values.bias
            values = self.to_values.weight.reshape(heads, per_head, self.width)
            taken = torch.einsum("bhqw,hcw->bqhc", pooled, values).reshape(count, self.num_queries, self.width) + self.to_values.bias
        else:
            keys = F.linear(normed * self.norm_keys.weight, self.to_keys.weight)
            values = self.to_values(normed * self.norm_values.weight + self.norm_values.bias)
            split_keys = keys.reshape(count, self.num_patches, heads, per_head).transpose(1, 2)
            split_values = values.reshape(count, self.num_patches, heads, per_head).transpose(1, 2)
            split_queries = queries.reshape(1, self.num_queries, heads, per_head).transpose(1, 2).expand(count, -1, -1, -1).to(split_keys.dtype)
            attended = F.scaled_dot_product_attention(
                split_queries, split_keys, split_values, attn_mask=places.to(split_keys.dtype).expand(count, -1, -1, -1)
            )
            taken = attended.transpose(1, 2).reshape(count, self.num_queries, self.width)
        output: Tensor = self.norm_output(self.to_output(taken).float())
        return output
