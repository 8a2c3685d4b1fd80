"""What a training run is: its identity, as frozen data, and the record of what came out.

Needs neither torch nor Ray, so planning stays fast.
"""

from dataclasses import dataclass
from typing import Literal

from model.errors import SpecError
from model.specs import ConnectorSpec, FeatureOrigin, FeatureSpec, LanguageModelSpec, LoraSpec, MapSpec, ScheduleSpec

__all__ = ["LanguageModelSpec", "PhaseRecord", "TrainingRecord", "TrainingSpec"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSpec:
    """Identity of a trained connector.

    Raises:
        SpecError: the parts do not fit each other: a map that is not cached, a block that does not exist, a branch that nothing computes.
    """

    dataset_fingerprint: str
    features: FeatureSpec
    connector: ConnectorSpec
    schedule: ScheduleSpec
    language_model: LanguageModelSpec
    lora: LoraSpec | None = None
    """What fine-tuning trains of the language model: adapters, or every weight when None. Not part of LanguageModelSpec, which names bytes on a disk:
    those stay the same, and verifiable, with adapters and without."""
    feature_source: FeatureOrigin = "cached"
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of matrix products; trained weights and optimizer state are fp32 always. A frozen language model is held in this type, also below
    adapters."""
    initial_weights_sha256: str | None = None
    """sha256 (hex) of the connector.safetensors that training starts from, kept in the root; None starts from the seed's random weights."""
    max_tokens: int | None = None
    """Longest sequence in training, visual tokens included; None is the language model's own limit. Turns that do not fit are left out whole."""

    @property
    def cache(self) -> FeatureSpec | None:
        """What it reads from a cache; None where nothing is stored."""
        return self.features.cached(self.feature_source)

    @property
    def selects(self) -> bool:
        """Whether answers come from selected tokens: as the last phase was trained. Given weights that are trained no further select."""
        phases = self.schedule.phases
        return self.connector.selector is not None and (not phases or phases[-1].selector)

    def longest_sequence(self, context_tokens: int) -> int:
        """Tokens that a training sequence may have.

        Args:
            context_tokens: the language model's limit.
        """
        return context_tokens if self.max_tokens is None else min(context_tokens, self.max_tokens)

    def __post_init__(self) -> None:
        local = self.connector.local_branch
        branches: list[tuple[str, tuple[MapSpec, ...], tuple[MapSpec, ...]]] = [
            ("global", self.connector.global_branch.fusion.maps, self.features.global_maps)
        ]
        if local is not None:
            branches.append(("local", local.fusion.maps, self.features.local_maps))
        for branch, needed, held in branches:
            if missing := [map_spec.name for map_spec in needed if map_spec not in held]:
                raise SpecError(
                    f"connector.{branch} needs the maps {missing}, but the features hold {[map_spec.name for map_spec in held]}; add them to the "
                    "features"
                )
        if self.feature_source == "global_cached" and local is None:
            raise SpecError(
                "features.source is global_cached, which leaves local views to be encoded in training, but the connector has no local branch; use "
                "cached"
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise SpecError(f"language_model.max_tokens must be at least 1, found {self.max_tokens}")
        if self.dataset_fingerprint != self.features.dataset_fingerprint:
            raise SpecError("training and its features name different datasets; cache the features of the dataset that is trained on")
        if self.lora is not None and (self.schedule.sft is None or "language_model" not in self.schedule.sft.train):
            trained = "there is no schedule.sft" if self.schedule.sft is None else f"schedule.sft trains {list(self.schedule.sft.train)}"
            raise SpecError(
                f"language_model.lora asks for adapters, but {trained}, so nothing would train them; add language_model to schedule.sft.train, or "
                "leave lora out"
            )
        if not self.schedule.phases and self.initial_weights_sha256 is None:
            raise SpecError("the schedule has no phases, and without connector.weights there is nothing to evaluate; add at least one of the two")
        for phase in self.schedule.phases:
            known = (*self.connector.blocks, "language_model")
            if missing_blocks := [block for block in phase.train if block not in known]:
                raise SpecError(f"phase {phase.name!r} trains {missing_blocks}, but this connector has the blocks {list(known)}")
            if local is None and phase.branch.local_only > 0:
                raise SpecError(f"phase {phase.name!r} shows local views alone to some samples, but the connector has no local branch")
            if phase.experts == "resampler" and "resampler" not in self.connector.blocks:
                raise SpecError(f"phase {phase.name!r} runs the resampler alone, but the connector has none; use experts = 'mixture'")


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseRecord:
    """What one phase did."""

    name: str
    train: tuple[str, ...]
    steps: int
    seconds: float
    """Wall seconds of the steps whose results were kept."""
    first_loss: float
    """Mean loss of the first tenth of the steps, in nats per supervised token."""
    last_loss: float
    """Mean loss of the last tenth."""
    samples: int
    hashes_before: dict[str, str]
    """sha256 of every block's bytes at the phase's start."""
    hashes_after: dict[str, str]
    """At its end: equal for every block that the phase does not train."""
    num_missing: int = 0
    """Times that an image's features were gone or damaged, and were computed again or another image's taken (`missing_features`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRecord:
    """What a training run made."""

    training_fingerprint: str
    folder: str
    """Where the weights are, relative to the root."""
    files: dict[str, str]
    """sha256 by file name."""
    phases: tuple[PhaseRecord, ...]
    steps: int
    samples: int
    num_images: int
    """That it trained on."""
    num_text_only: int = 0
    """Samples without an image, of which phases that train the language model learn."""
    num_quarantined: int
    """Samples of the train split that no phase saw, since their conversation cannot be trained on."""
    quarantined_by_reason: dict[str, int]
    parameters: dict[str, int]
    """Number of parameters by block."""
    seconds: float
    samples_per_second: float
    """Over the steps themselves, without starts and checkpoints."""
    bytes_written: int
    workers: int
    threads: int
    device: str
    products: Literal["fp32", "bf16"] = "bf16"
    """In which type matrices were multiplied: fp32 in place of bf16 where the device has no products of bf16."""
    versions: dict[str, str]
