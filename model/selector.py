"""Selection: which of an image's local tokens a question needs.

Input: visual tokens and the text's input embeddings, in the language model's width. Output: a mask of the tokens to keep. Invariants: at least one
token is kept where there is any; top_p = 1 keeps all; nothing here draws random numbers, noise is an argument; the [tokens, text, hidden] product
that cosines are often taken by is never formed, since a sum of cosines is one product with the sum of the normalised text.

Source: SliME (arXiv 2406.08487) section 2.3 and the authors' code.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

__all__ = ["LearnableSelector", "keep_probabilities", "kept_tokens", "straight_through", "text_direction", "token_scores"]

NORM_EPS = 1e-8
"""Least norm of a vector in a cosine, as torch's cosine_similarity has it."""


def _inverse_norms(vectors: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch tokens"]:
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return 1 / norms.clamp(min=NORM_EPS)


def text_direction(
    text: Float[Tensor, "batch text hidden"], in_text: Bool[Tensor, "batch text"], reduce: Literal["sum", "mean"]
) -> Float[Tensor, "batch hidden"]:
    """The sum or mean of the normalised text: its product with a normalised token is the token's score.

    Args:
        text: input embeddings, fp32.
        in_text: which of them count; a row without any gives zeros.
        reduce: over the text.

    Returns:
        One vector per sequence.
    """
    weights = _inverse_norms(text) * in_text
    if reduce == "mean":
        weights = weights / in_text.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.bmm(weights[:, None], text).squeeze(1)


def token_scores(tokens: Float[Tensor, "batch tokens hidden"], direction: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch tokens"]:
    """The sum or mean of every token's cosines with the text.

    Args:
        tokens: fp32.
        direction: from `text_direction`.

    Returns:
        Scores.

    Source: SliME section 2.3. Differs: the authors' code broadcasts tokens against text, which for 1,008 tokens and 1,024 of text at a width of
    4,096 takes 8.5 GB in half precision; this takes as much as the tokens do.
    """
    return torch.bmm(tokens, direction[:, :, None]).squeeze(2) * _inverse_norms(tokens)


def keep_probabilities(
    scores: Float[Tensor, "batch tokens"], candidates: Bool[Tensor, "batch tokens"], temperature: float
) -> Float[Tensor, "batch tokens"]:
    """Softmax of the scores over each sequence's candidates.

    Args:
        scores: as from `token_scores`, noise added in training.
        candidates: which tokens may be dropped at all.
        temperature: scores are divided by it.

    Returns:
        Probabilities; 0 for all others, and throughout a sequence without candidates.
    """
    none = ~candidates.any(dim=1, keepdim=True)
    eligible = scores.masked_fill(~candidates, -math.inf).masked_fill(none, 0.0)
    # The largest is moved to 0 first: divided by a small temperature it would overflow, and leave nothing to keep.
    logits = (eligible - eligible.amax(dim=1, keepdim=True).detach()) / temperature
    return torch.softmax(logits, dim=-1).masked_fill(~candidates, 0.0)


@torch.no_grad()
def kept_tokens(probabilities: Float[Tensor, "batch tokens"], candidates: Bool[Tensor, "batch tokens"], top_p: float) -> Bool[Tensor, "batch tokens"]:
    """The likeliest candidates whose sum stays within top_p, and one more.

    Args:
        probabilities: from `keep_probabilities`.
        candidates: the same as there.
        top_p: share to keep; from 1 up, every candidate stays, whatever rounding says.

    Returns:
        A mask in the tokens' order; never more than the candidates.
    """
    if top_p >= 1:
        return candidates.clone()
    ranked, order = probabilities.double().masked_fill(~candidates, -1.0).sort(dim=1, descending=True, stable=True)
    before = ranked.clamp(min=0).cumsum(dim=1) - ranked.clamp(min=0)
    kept = torch.zeros_like(candidates)
    kept.scatter_(1, order, before <= top_p)
    return kept & candidates


def straight_through(probabilities: Float[Tensor, "batch tokens"], candidates: Bool[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
    """Zeros that carry the gradient of the log-probabilities, to add to the attention logits that every position gives to a token.

    A token that is dropped gets a weight of 0 in every softmax of attention, one that is kept its own: so the probability of keeping it enters as a
    factor there, its logarithm as a bias. Weighing the token's embedding instead carries next to no gradient, since the first norm of a language
    model takes every scale away.

    Args:
        probabilities: from `keep_probabilities`, with their graph.
        candidates: the same as there.

    Returns:
        Exactly 0 everywhere; without a gradient at what is no candidate.
    """
    logs = probabilities.masked_fill(~candidates, 1.0).clamp(min=torch.finfo(probabilities.dtype).tiny).log()
    return logs - logs.detach()


class LearnableSelector(nn.Module):
    """Scores in a space that learns: (A t)(B d) / |t| of a token t and the text's direction d, whose words are normalised already.

    Norms are those of before the matrices, so these are cosines at the start alone: at full width exactly, in a narrower space about.
    Both matrices start equal, with orthogonal rows, so that the first scores are those cosines as seen in a random subspace.
    """

    def __init__(self, hidden: int, width: int, generator: torch.Generator) -> None:
        """Build and initialise.

        Args:
            hidden: the language model's width.
            width: channels of the space; cut to `hidden`.
            generator: where the initial numbers come from.
        """
        super().__init__()
        width = min(width, hidden)
        rows, _ = torch.linalg.qr(torch.randn(hidden, width, generator=generator))
        start = rows.T.contiguous() * math.sqrt(hidden / width)
        self.from_tokens = nn.Parameter(start.clone())
        self.from_text = nn.Parameter(start.clone())

    def forward(self, tokens: Float[Tensor, "batch tokens hidden"], direction: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch tokens"]:
        """Scores of tokens.

        Args:
            tokens: fp32.
            direction: from `text_direction`.

        Returns:
            Scores, with their graph.
        """
        wanted = F.linear(F.linear(direction, self.from_text), self.from_tokens.T)
        return torch.bmm(tokens, wanted[:, :, None]).squeeze(2) * _inverse_norms(tokens)
