"""The alternating schedule: phases, what each trains and what its samples see.

Source: SliME (arXiv 2406.08487) section 2.3 and its launch scripts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from model.errors import SpecError
from model.specs._connectors import BLOCKS, Block
from model.specs._language_models import ChatTemplate

__all__ = ["BranchMix", "PhaseSpec", "ScheduleSpec", "sees_text_only"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BranchMix:
    """Which share of a phase's samples sees which visual input. Shares sum to 1."""

    both: float = 0.0
    global_only: float = 0.0
    local_only: float = 0.0
    blind: float = 0.0

    @property
    def words(self) -> str:
        """The shares as a recipe calls them, for messages."""
        return f"both {self.both:g}, global {self.global_only:g}, local {self.local_only:g}, blind {self.blind:g}"

    @property
    def parts(self) -> str:
        """The shares that are there: `both`, or `both 0.6, global 0.4`."""
        shares = {"both": self.both, "global": self.global_only, "local": self.local_only, "blind": self.blind}
        there = {name: share for name, share in shares.items() if share > 0}
        return next(iter(there)) if len(there) == 1 else ", ".join(f"{name} {share:g}" for name, share in there.items())

    @property
    def shows_global(self) -> bool:
        """Whether some samples see their global view."""
        return self.both + self.global_only > 0

    @property
    def shows_local(self) -> bool:
        """Whether some samples see their local views."""
        return self.both + self.local_only > 0

    def __post_init__(self) -> None:
        shares = (self.both, self.global_only, self.local_only, self.blind)
        if min(shares) < 0 or abs(sum(shares) - 1.0) > 1e-9:
            raise SpecError(f"branch: found the shares {self.words}, in sum {sum(shares):g}; allowed: shares of 0 or more that sum to 1")


def sees_text_only(train: Sequence[Block], template: ChatTemplate) -> bool:
    """Whether samples without an image take part in a phase.

    Args:
        train: the blocks that the phase trains.
        template: in which its conversations are written.

    Returns:
        Only if the language model is trained, since no token of such a sample comes from the connector, and its gradient would be nothing; and not in
        `plain`, which leaves out what is asked.

    Differs: LLaVA's trainer puts a black image through encoder and connector for such a sample and takes none of its tokens. Here it is a blind one.
    """
    return "language_model" in train and template != "plain"


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseSpec:
    """One phase of the schedule: which blocks train, on which input, for how long, how fast.

    Source: SliME section 2.3 and its launch scripts; cosine decay with warm-up per phase, AdamW without weight decay.
    """

    name: str
    train: tuple[Block, ...]
    branch: BranchMix
    steps: int
    batch_size: int
    """Samples (conversations) in an optimizer step, over all ranks."""
    learning_rate: float
    language_model_learning_rate: float | None = None
    """The language model's own rate where it trains; `learning_rate` when absent."""
    warmup_fraction: float = 0.03
    max_grad_norm: float = 1.0
    evidence_weight: float = 0.0
    """Weight of the evidence loss beside the answers': local tokens where evidence stands are drawn to the words that it shows. 0 leaves it out.

    Differs: neither paper has it. Answers alone do not ground a small language model within minutes; this does (see README, Measured)."""
    experts: Literal["mixture", "mlp", "resampler"] = "mixture"
    """Which of the global branch's experts count: SliME trains the first alone, then the second alone, and the gate only in fine-tuning."""
    selector: bool = False
    """Whether the connector's selector drops local tokens. SliME's alignment keeps them all, its fine-tuning does not."""
    sources: tuple[str, ...] = ()
    """Which of the dataset's sources the phase sees, by their labels; empty means all. Both papers align on captions, fine-tune on
    instructions."""
    template: ChatTemplate = "own"
    """In which the phase's conversations are written: the authors align on `plain` captions and fine-tune on `vicuna_v1` or `llama3`."""

    @property
    def sees_text_only(self) -> bool:
        """Whether samples without an image take part; see the function of that name."""
        return sees_text_only(self.train, self.template)

    def sees(self, source: str, *, text_only: bool) -> bool:
        """Whether a sample takes part in the phase.

        Args:
            source: label of the source that it is from.
            text_only: whether it has no image.

        Returns:
            Whether it does.
        """
        return (not self.sources or source in self.sources) and (self.sees_text_only or not text_only)

    @property
    def reached(self) -> tuple[Block, ...]:
        """The blocks that some sample's loss depends on, whichever the connector has.

        Either expert ends in `global_mlp`, and so do the local views where they share it; whether they do, this spec cannot know.
        """
        mix = self.branch
        by_block: dict[Block, bool] = {
            "global_mlp": mix.shows_global or mix.shows_local,
            "local_mlp": mix.shows_local,
            "resampler": mix.shows_global and self.experts != "mlp",
            "gate": mix.shows_global and self.experts == "mixture",
            "compression": mix.shows_local,
            "newline": mix.shows_local,
            "selector": mix.shows_local and self.selector,
            "language_model": True,
        }
        return tuple(block for block in BLOCKS if by_block[block])

    def __post_init__(self) -> None:
        if not self.train or len(set(self.train)) != len(self.train) or set(self.train) - set(BLOCKS):
            raise SpecError(f"phase {self.name!r}: train must name each block once, out of {list(BLOCKS)}; found {list(self.train)}")
        if ("gate" in self.train and self.experts != "mixture") or ("resampler" in self.train and self.experts == "mlp"):
            raise SpecError(f"phase {self.name!r}: experts = {self.experts!r} leaves a block of {list(self.train)} without effect; use 'mixture'")
        if "selector" in self.train and self.branch.shows_local and not self.selector:
            others = [block for block in self.train if block != "selector"]
            raise SpecError(
                f"phase {self.name!r}: train names the selector, but the phase's selector is off, so nothing would train it; set selector = true, or "
                f"name the other blocks: train = {others}"
            )
        if idle := [block for block in self.train if block not in self.reached]:
            raise SpecError(
                f"phase {self.name!r}: branch (found {self.branch.words}) leaves {', '.join(idle)} of train without effect; allowed: "
                "resampler and gate with a share of global or both, compression, local_mlp, newline and selector of local or both, global_mlp with "
                "any. "
                "Leave it out of train (in place of connector, name the other blocks), or change branch"
            )
        if self.selector and not self.branch.shows_local:
            raise SpecError(
                f"phase {self.name!r}: selector is on, but branch shows no local views, of which it drops some; leave it out, or give local or "
                "both a share of branch"
            )
        if self.experts != "mixture" and not self.branch.shows_global:
            raise SpecError(
                f"phase {self.name!r}: found experts = {self.experts!r}, but branch shows no global view, for which there are experts; leave it "
                "out, or give global or both a share of branch"
            )
        if self.language_model_learning_rate is not None and "language_model" not in self.train:
            raise SpecError(
                f"phase {self.name!r}: found language_model_learning_rate {self.language_model_learning_rate:g}, but train is "
                f"{list(self.train)}; allowed: a rate only where language_model trains. Leave it out, or use learning_rate"
            )
        if self.evidence_weight > 0 and not self.branch.shows_local:
            raise SpecError(
                f"phase {self.name!r}: found evidence_weight {self.evidence_weight:g}, but branch shows no local views, on which it works; "
                "allowed: 0. Leave it out, or give local or both a share of branch"
            )
        if list(self.sources) != sorted(set(self.sources)):
            raise SpecError(f"phase {self.name!r}: sources must be in order and each once, found {list(self.sources)}")
        if self.template == "plain" and self.branch.blind > 0:
            raise SpecError(
                f"phase {self.name!r}: template plain leaves out what is asked, so samples without their image (found {self.branch.words}) would "
                "hold nothing to answer from; allowed: no share of blind, or another template"
            )
        if not 0 <= self.evidence_weight < float("inf"):
            raise SpecError(f"phase {self.name!r}: evidence_weight must be 0 or more, found {self.evidence_weight}")
        if self.steps < 1 or self.batch_size < 1 or self.learning_rate <= 0 or not 0 <= self.warmup_fraction < 1 or self.max_grad_norm <= 0:
            raise SpecError(
                f"phase {self.name!r}: steps, batch_size, learning_rate and max_grad_norm must be positive, warmup_fraction in [0, 1); found {self}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleSpec:
    """The alternating schedule: alignment phases over one engine, then fine-tuning on a fresh one. Without phases nothing is trained."""

    align: tuple[PhaseSpec, ...]
    sft: PhaseSpec | None
    seed: int = 0

    def __post_init__(self) -> None:
        for phase in self.align:
            if "language_model" in phase.train:
                raise SpecError(f"align phase {phase.name!r} trains the language model; only sft may")
        names = [phase.name for phase in self.phases]
        if len(set(names)) != len(names):
            raise SpecError(f"phases need different names, found {names}; give each a name")

    @property
    def phases(self) -> tuple[PhaseSpec, ...]:
        """All phases in the order they run."""
        return self.align if self.sft is None else (*self.align, self.sft)
