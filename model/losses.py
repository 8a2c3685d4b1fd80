"""The loss: cross entropy summed over supervised tokens, to be divided by their number over all ranks and micro-batches.

Input: hidden states at the positions that predict a supervised token, and those tokens. Invariant: sums over parts of a batch add up to the sum over
the batch, so the result does not depend on ranks or accumulation; a mean per micro-batch would.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = ["SupervisedLoss", "evidence_loss", "supervised_loss"]

EVIDENCE_SCALE = 16.0
"""Inverse temperature of the cosines between visual tokens and words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisedLoss:
    """Sums over the supervised tokens of a batch."""

    total: Float[Tensor, ""]
    """Summed cross entropy in nats, with its graph."""
    correct: Int[Tensor, ""]
    """Tokens whose most probable prediction is right."""
    count: int
    """Supervised tokens."""


def supervised_loss(hidden: Float[Tensor, "supervised hidden"], labels: Int[Tensor, "supervised"], head: nn.Module) -> SupervisedLoss:
    """Cross entropy of the predicted tokens.

    Args:
        hidden: the language model's last hidden states, selected before the head: exact, and the head runs on a tenth of the positions.
        labels: the token that each of them should predict.
        head: from hidden states to logits.

    Returns:
        The sums. Without supervised tokens the total is 0, still tied to `hidden`.
    """
    logits: Tensor = head(hidden).float()
    total = F.cross_entropy(logits, labels, reduction="sum")
    with torch.no_grad():
        correct = (logits.argmax(dim=-1) == labels).sum()
    return SupervisedLoss(total=total, correct=correct, count=labels.shape[0])


def evidence_loss(
    tokens: Float[Tensor, "pairs hidden"], words: Int[Tensor, "pairs"], embeddings: Float[Tensor, "vocabulary hidden"]
) -> Float[Tensor, ""]:
    """Cross entropy of the words that visual tokens should mean, by their cosines with all input embeddings.

    Args:
        tokens: visual tokens at the places of evidence; a token that shows several words comes once per word.
        words: vocabulary ids, one per token.
        embeddings: the language model's input embeddings; they get no gradient from here.

    Returns:
        The sum over the pairs, in nats.

    Differs: no paper's; see `PhaseSpec.evidence_weight`.
    """
    logits = EVIDENCE_SCALE * F.normalize(tokens.float(), dim=-1) @ F.normalize(embeddings.detach().float(), dim=-1).T
    return F.cross_entropy(logits, words, reduction="sum")
