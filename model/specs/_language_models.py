"""Language models, how conversations are written for them, and adapters that fine-tuning trains in their place."""

from dataclasses import dataclass
from typing import Literal

from model.errors import SpecError

__all__ = ["ChatTemplate", "LanguageModelSpec", "LoraSpec"]

ChatTemplate = Literal["own", "vicuna_v1", "llama3", "plain", "chatml"]
"""How questions and answers become text: `own` is the tokenizer's, the others are the files in model/templates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageModelSpec:
    """Which language model, told by its bytes."""

    model: str
    """Folder, hub id or name: where it is loaded from. Part of the identity too."""
    weights_sha256: str
    """sha256 (hex) over the names and bytes of weights, config, tokenizer and chat template."""
    template: ChatTemplate = "own"
    """In which questions are asked of it: in evaluation, of the export, and in every phase that names no other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSpec:
    """Low-rank adapters that fine-tuning trains in place of the language model: W x becomes W x + (alpha / rank) B A x, with W left as it is.

    Source: LoRA (arXiv 2106.09685); LLaVA's recipe has rank 128, alpha 256, dropout 0.05 on every linear layer but the head.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    """Share of an adapter's inputs that is zeroed in training. Which ones is a function of (seed, position in the run, layer), so a resumed run and
    one on other workers drop the same."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """The linear layers that get one: every one but the head, or those that end in these names (`q_proj`)."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise SpecError(f"language_model.lora.rank must be at least 1, found {self.rank}; leave lora out to fine-tune every weight")
        if not 0 < self.alpha < float("inf") or not 0 <= self.dropout < 1:
            raise SpecError(
                f"language_model.lora: found alpha {self.alpha:g} and dropout {self.dropout:g}; allowed: a finite alpha above 0, a dropout from 0 up "
                "and below 1"
            )
        names = () if isinstance(self.targets, str) else self.targets
        if self.targets != "all-linear" and (not names or len(set(names)) != len(names) or not all(names)):
            raise SpecError(f"language_model.lora.targets: found {self.targets!r}; allowed: 'all-linear', or names of layers, each once")
