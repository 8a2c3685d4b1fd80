"""Which samples a run trains on: every conversation is tokenised once, in the template of every phase that sees it, before the first step.

Input: the train split. Output: a Screening, whose rows are in the quarantine under stage train-connector and the run's key. A sample that one of the
phases that see it cannot be trained on is left out of all of them. Invariant: the first screening on record stands, so every rank and every resume
leaves out the same samples and sees the others in the same order.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.chat import with_template
from model.connector import Connector, build_connector
from model.errors import ConversationError
from model.language_model import context_tokens, load_tokenizer
from model.specs import ChatTemplate, FeatureSpec, PhaseSpec
from workers.commits import Stage, from_json, to_json
from workers.dataset.samples import Sample, read_samples
from workers.execution import ExecutionSettings, Progress
from workers.language_models import verified_folder
from workers.quarantine import QuarantineRow, check_budget, commit_quarantine
from workers.storage import Store
from workers.training.batches import sample_conversation
from workers.training.spec import TrainingSpec

__all__ = ["Screening", "refusals", "screen"]

_SAMPLES_AT_ONCE = 1000
"""Between two looks at the error budget."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Screening:
    """What a run leaves out."""

    num_samples: int
    """In the train split."""
    rows: tuple[QuarantineRow, ...]

    @property
    def refused(self) -> frozenset[int]:
        """Indices of the samples that are left out."""
        return frozenset(row.index for row in self.rows)

    @property
    def by_reason(self) -> dict[str, int]:
        """Number of refused samples by reason code."""
        return dict(sorted(Counter(row.reason for row in self.rows).items()))


def screen(spec: TrainingSpec, store: Store, execution: ExecutionSettings, progress: Progress) -> Screening:
    """Find out which samples cannot be trained on, or read what was found before; and put them into the quarantine.

    Args:
        spec: of the run.
        store: where the dataset is.
        execution: max_quarantined_fraction counts.
        progress: told in samples.

    Returns:
        The screening on record.

    Raises:
        ErrorBudgetError: too many samples of a source are refused, or all; nothing is on record then.
        LanguageModelError: the language model is missing, or cannot speak a phase's template.
    """
    stage = Stage.open(store, "train-connector", spec)
    path = stage.path("screening.json")
    if not store.exists(path):
        store.create_json(path, to_json(_screened(spec, store, execution, progress)))  # another rank may have been faster
    screening = from_json(Screening, store.read_json(path), where=store.url(path))
    commit_quarantine(stage, screening.rows)
    return screening


def _screened(spec: TrainingSpec, store: Store, execution: ExecutionSettings, progress: Progress) -> Screening:
    samples = read_samples(store, spec.dataset_fingerprint, "train")
    folder = verified_folder(spec.language_model)
    tokenizer = load_tokenizer(folder, None)
    tokenizers = {phase.template: with_template(tokenizer, phase.template) for phase in spec.schedule.phases}
    # How many tokens it makes does not depend on its width.
    connector = build_connector(spec.connector, spec.features.encoder, hidden=1, embedding_rms=1.0, seed=0)
    max_tokens = spec.longest_sequence(context_tokens(folder))
    expected = Counter(sample.source for sample in samples)
    rows: list[QuarantineRow] = []
    by_source: dict[str, list[QuarantineRow]] = {}
    progress.start("reading conversations", len(samples))
    try:
        for start in range(0, len(samples), _SAMPLES_AT_ONCE):
            some = samples[start : start + _SAMPLES_AT_ONCE]
            for row in refusals(some, spec.schedule.phases, tokenizers, spec.features, connector, max_tokens):
                rows.append(row)
                by_source.setdefault(row.source, []).append(row)
            check_budget(by_source, expected, execution.max_quarantined_fraction)
            progress.advance(len(some), quarantined=len(rows))
    finally:
        progress.finish()
    return Screening(num_samples=len(samples), rows=tuple(rows))


def refusals(
    samples: Sequence[Sample],
    phases: Sequence[PhaseSpec],
    tokenizers: Mapping[ChatTemplate, Any],
    features: FeatureSpec,
    connector: Connector,
    max_tokens: int,
) -> Iterator[QuarantineRow]:
    """The samples whose conversation cannot be trained on.

    Args:
        samples: to look at.
        phases: tell which samples are seen in which template.
        tokenizers: by the template that they speak.
        features: tell how many local views an image has.
        connector: tells how many tokens a view makes.
        max_tokens: the language model's longest sequence.

    Yields:
        At most one row for each, by the first template that refuses it.
    """
    for sample in samples:
        for template in dict.fromkeys(phase.template for phase in phases if phase.sees(sample.source, text_only=sample.text_only)):
            try:
                sample_conversation(sample, tokenizers[template], features, connector, max_tokens)
            except ConversationError as error:
                detail = f"in the template {template}: {error}"
                yield QuarantineRow(
                    reason=error.reason, source=sample.source, item=sample.sample_id, index=sample.index, bytes_sha256=None, detail=detail
                )
                break
