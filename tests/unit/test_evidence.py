"""The evidence loss: what tokens should mean, where, and that it reaches the connector and leaves the reported loss alone."""

import math

import pytest
import torch

from model.errors import SpecError
from model.losses import EVIDENCE_SCALE, evidence_loss
from model.specs import BranchMix, PhaseSpec


def test_evidence_loss_is_cross_entropy_of_cosines():
    embeddings = torch.randn(7, 5)
    tokens, words = torch.randn(3, 5), torch.tensor([1, 1, 6])
    expected = 0.0
    for token, word in zip(tokens, words, strict=True):
        scores = [EVIDENCE_SCALE * float(token @ row) / float(token.norm() * row.norm()) for row in embeddings]
        expected += math.log(sum(math.exp(score) for score in scores)) - scores[word]
    assert float(evidence_loss(tokens, words, embeddings)) == pytest.approx(expected, rel=1e-4)


def test_embeddings_get_no_gradient_from_it():
    embeddings = torch.randn(7, 5, requires_grad=True)
    tokens = torch.randn(2, 5, requires_grad=True)
    evidence_loss(tokens, torch.tensor([0, 3]), embeddings).backward()
    assert embeddings.grad is None
    assert tokens.grad is not None
    assert float(tokens.grad.abs().sum()) > 0


def test_a_negative_weight_is_refused():
    with pytest.raises(SpecError, match="evidence_weight must be 0 or more, found -1"):
        PhaseSpec(name="a", train=("global_mlp",), branch=BranchMix(both=1.0), steps=1, batch_size=1, learning_rate=1e-3, evidence_weight=-1.0)
