"""Which samples a step sees, as pure functions of (seed, position), and their batches.

A position counts samples from the start of the schedule; step k of a phase takes the next `batch_size` positions. From a position follow the image
(a permutation per pass over the images), what is shown of it (BranchMix) and the gate's noise. So a run that resumes, or runs on another number of
workers, sees the same; the whole state of the data is the step's number.

Input: samples, a feature source and a tokenizer. Output: micro-batches of one rank, and the number of supervised tokens over all ranks.
"""

import bisect
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.adapters import NUM_EXPERTS
from model.chat import Conversation, tokenise_conversation, with_template
from model.connector import Connector
from model.errors import ConversationError
from model.quantisation import PackedMap
from model.specs import BranchMix, ChatTemplate, ConnectorSpec, FeatureSpec, MapSpec, PhaseSpec, ScheduleSpec
from model.views import Box, Branch, ViewPlan
from model.vision_language import MODES, Batch, Mode, VisualLayout, lay_out_images, plan_sequences, room_for_text
from workers.caching.reader import FeatureSource
from workers.caching.units import view_plan
from workers.dataset.samples import Sample
from workers.errors import MissingFeaturesError, TrainingError

__all__ = ["BatchBuilder", "Prefetcher", "StepBatches", "branch_mode", "needed_maps", "sample_conversation", "sample_index"]

_ORDER, _BRANCH, _NOISE, _SELECTOR_NOISE, _DROPOUT = 1, 2, 3, 4, 5
"""Streams of random numbers that must not meet."""

_KEPT_NUMBERS = 2**21
"""Of what is made of samples, in each rank's memory: 98 MB of tokenised conversations, at 47 bytes a token, which is 8,000 of 250 tokens.

All of 20,000 such conversations take 232 MB in each rank, and all of LLaVA's 665,000 would take 7.7 GB. To tokenise one anew takes 2 ms in the thread
that works ahead; after the first pass a rank does so for its own share alone.
"""


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def sample_index(seed: int, position: int, num_samples: int) -> int:
    """Which sample a position sees: every sample once per pass, each pass in an order of its own.

    Args:
        seed: of the schedule.
        position: counted over the whole schedule.
        num_samples: in the training split.

    Returns:
        Its place in the frozen order.
    """
    return int(_permutation(seed, position // num_samples, num_samples)[position % num_samples])


_permutations: dict[tuple[int, int, int], NDArray[np.int64]] = {}


def _permutation(seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    key = (seed, epoch, num_samples)
    if key not in _permutations:
        while len(_permutations) >= 4:  # a batch spans two passes at most, and few seeds are alive in a process
            _permutations.pop(next(iter(_permutations)))
        _permutations[key] = _generator(seed, _ORDER, epoch).permutation(num_samples)
    return _permutations[key]


def branch_mode(mix: BranchMix, seed: int, phase: int, position: int) -> Mode:
    """What a position shows of its image.

    Args:
        mix: the phase's shares.
        seed: of the schedule.
        phase: its index.
        position: counted over the whole schedule.

    Returns:
        One of the modes with a share above 0.
    """
    shares: dict[Mode, float] = {"blind": mix.blind, "global": mix.global_only, "local": mix.local_only, "both": mix.both}
    drawn = _generator(seed, _BRANCH, phase, position).random()
    possible = [mode for mode in MODES if shares[mode] > 0]
    for mode in possible:
        drawn -= shares[mode]
        if drawn < 0:
            return mode
    return possible[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatches:
    """What one rank needs for one optimizer step."""

    micro_batches: tuple[Batch, ...]
    supervised: int
    """Supervised tokens over all ranks and micro-batches: what the summed loss is divided by."""
    samples: int
    """Over all ranks."""
    num_missing: int = 0
    """Of this rank: features that were not there, and were computed or replaced by another image's."""


def needed_maps(connector: ConnectorSpec) -> tuple[tuple[MapSpec, ...], tuple[MapSpec, ...]]:
    """The maps that a connector reads, each once, global and local: the order in which features are fetched for it.

    Args:
        connector: the spec.

    Returns:
        Global and local maps.
    """
    local = () if connector.local_branch is None else connector.local_branch.fusion.maps
    return tuple(dict.fromkeys(connector.global_branch.fusion.maps)), tuple(dict.fromkeys(local))


def sample_conversation(sample: Sample, tokenizer: Any, features: FeatureSpec, connector: Connector, max_tokens: int) -> Conversation:
    """A sample's conversation, beside all of its image's visual tokens if it has an image.

    Args:
        sample: whose turns and image.
        tokenizer: with the template of the phase.
        features: tell how many local views the image has.
        connector: tells how many tokens a view makes.
        max_tokens: the language model's longest sequence.

    Returns:
        Its tokens.

    Raises:
        ConversationError: it cannot be trained on.
    """
    room = max_tokens if sample.text_only else room_for_text(max_tokens, connector, view_plan(features, sample))
    turns = [(turn.question, turn.answer) for turn in sample.turns]
    return tokenise_conversation(tokenizer, turns, room, has_image=not sample.text_only)


Made = TypeVar("Made")


class _Kept(Generic[Made]):
    """What is made of samples: the last ones, and of all of them a count, which every rank needs of the samples of all ranks in every pass.

    Args:
        make: of a sample's index; the same whenever it is asked.
        count: of what was made.
        size: of what was made: how many numbers it holds; at most _KEPT_NUMBERS stay in memory.
        num_samples: how many there are; a count takes 4 bytes each.
    """

    def __init__(self, make: Callable[[int], Made], count: Callable[[Made], int], size: Callable[[Made], int], num_samples: int) -> None:
        self._make, self._count, self._size = make, count, size
        self._counts = np.full(num_samples, -1, dtype=np.int32)
        self._last: OrderedDict[int, Made] = OrderedDict()
        self._num_kept = 0

    def get(self, index: int) -> Made:
        if index in self._last:
            return self._last[index]
        made = self._last[index] = self._make(index)
        self._num_kept += self._size(made)
        while self._num_kept > _KEPT_NUMBERS:
            self._num_kept -= self._size(self._last.popitem(last=False)[1])
        return made

    def count(self, index: int) -> int:
        if self._counts[index] < 0:
            self._counts[index] = self._count(self.get(index))
        return int(self._counts[index])


class BatchBuilder:
    """Makes the batches of any step, in any order.

    Args:
        samples: the training split in its frozen order.
        source: of their features; gives the connector's maps in the order of `needed_maps`.
        features: what the source's features are.
        connector: tells how many tokens a view makes and which maps it needs.
        schedule: phases and seed.
        tokenizer: as loaded from its folder: every phase's template is put on it here.
        max_tokens: the language model's longest sequence.
        substitutes: whether an image, where a branch that is shown of it is gone or damaged, gives way to the next one of the phase that has it. All
            ranks go on in step, and the loss is divided by the tokens that were planned.

    Raises:
        TrainingError: there are no samples with an image, or a phase sees none.
    """

    def __init__(
        self,
        *,
        samples: Sequence[Sample],
        source: FeatureSource,
        features: FeatureSpec,
        connector: Connector,
        schedule: ScheduleSpec,
        tokenizer: Any,
        max_tokens: int,
        substitutes: bool = False,
    ) -> None:
        if all(sample.text_only for sample in samples):
            raise TrainingError("the dataset's train split holds no image; build a dataset with a smaller held_out_fraction or more images")
        self.samples, self.source, self.features, self.connector, self.schedule = samples, source, features, connector, schedule
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._substitutes = substitutes
        self._missing: set[tuple[Branch, str]] = set()
        """Branches of images, by digest, that a fetch found to be gone or damaged. To know of one saves a fetch and must change nothing else."""
        self._tokenizers = {phase.template: with_template(tokenizer, phase.template) for phase in schedule.phases}
        self._seen = {_sight(phase): _seen(samples, phase) for phase in schedule.phases}
        self._conversations = {
            template: _Kept[Conversation](
                partial(self._tokenised, template), lambda made: made.num_supervised, lambda made: made.num_text_tokens, len(samples)
            )
            for template in self._tokenizers
        }
        self._evidence = _Kept[list[tuple[int, int]]](self._pairs, len, lambda pairs: 2 * len(pairs) + 1, len(samples))

    def view_plan(self, sample: Sample) -> ViewPlan:
        """The views of an image, by the view rule alone."""
        return view_plan(self.features, sample)

    def conversation(self, index: int, template: ChatTemplate) -> Conversation:
        """Tokens of a sample's conversation in a phase's template."""
        return self._conversations[template].get(index)

    def _tokenised(self, template: ChatTemplate, index: int) -> Conversation:
        sample = self.samples[index]
        try:
            return sample_conversation(sample, self._tokenizers[template], self.features, self.connector, self._max_tokens)
        except ConversationError as error:  # screening leaves such samples out
            raise TrainingError(f"sample {sample.sample_id} ({sample.source}) cannot be trained on: {error}") from error

    def build(self, phase_index: int, step: int, *, rank: int = 0, world: int = 1, micro_batch_size: int | None = None) -> StepBatches:
        """The batches of one step for one rank.

        Args:
            phase_index: which phase of the schedule.
            step: counted from 0 within the phase.
            rank: whose share.
            world: number of ranks.
            micro_batch_size: most samples in a micro-batch; None puts a rank's share in one.

        Returns:
            Micro-batches of the rank, and the supervised tokens of all ranks.

        Raises:
            TrainingError: the batch cannot be shared evenly.
            MissingFeaturesError: an image has no features, and is not to be replaced.
        """
        phases = self.schedule.phases
        phase = phases[phase_index]
        if phase.batch_size % world:
            raise TrainingError(
                f"phase {phase.name!r} has batch_size {phase.batch_size}, which {world} workers cannot share evenly; change train_workers"
            )
        first = sum(earlier.batch_size * earlier.steps for earlier in phases[:phase_index]) + step * phase.batch_size
        positions = range(first, first + phase.batch_size)
        indices = self._indices(phase_index, step)
        supervised = sum(map(self._conversations[phase.template].count, indices))
        evidence_scale = 0.0
        if phase.evidence_weight > 0:
            shown = [self._mode(phase_index, position, index) in ("local", "both") for position, index in zip(positions, indices, strict=True)]
            num_pairs = sum(self._evidence.count(index) for index, wanted in zip(indices, shown, strict=True) if wanted)
            # The summed loss is divided by the supervised tokens: so the evidence loss joins it as weight times its mean over the pairs.
            evidence_scale = phase.evidence_weight * supervised / max(num_pairs, 1)
        share = phase.batch_size // world
        mine = range(rank * share, (rank + 1) * share)
        size = share if micro_batch_size is None else min(micro_batch_size, share)
        micro_batches = []
        num_missing = 0
        for start in range(mine.start, mine.stop, size):
            chosen = range(start, min(start + size, mine.stop))
            batch, missing = self._batch(phase_index, [positions[k] for k in chosen], [indices[k] for k in chosen], evidence_scale)
            micro_batches.append(batch)
            num_missing += missing
        return StepBatches(micro_batches=tuple(micro_batches), supervised=supervised, samples=phase.batch_size, num_missing=num_missing)

    def _mode(self, phase_index: int, position: int, index: int) -> Mode:
        """What a position shows: text alone is blind, whatever the phase's shares."""
        if self.samples[index].text_only:
            return "blind"
        return branch_mode(self.schedule.phases[phase_index].branch, self.schedule.seed, phase_index, position)

    def _indices(self, phase_index: int, step: int) -> list[int]:
        """The samples of a step. Passes go on where the last phase over the same samples left them, so every sample is seen as often as any other."""
        phases, phase = self.schedule.phases, self.schedule.phases[phase_index]
        shown = self._seen[_sight(phase)]
        done = sum(earlier.batch_size * earlier.steps for earlier in phases[:phase_index] if _sight(earlier) == _sight(phase))
        first = done + step * phase.batch_size
        return [shown[sample_index(self.schedule.seed, place, len(shown))] for place in range(first, first + phase.batch_size)]

    def measuring_maps(self, num_images: int) -> tuple[dict[str, PackedMap], dict[str, PackedMap] | None]:
        """Maps of images at even distances in the frozen order, to measure the connector's inputs on: the first ones are all of one source.

        Args:
            num_images: how many, at most.

        Returns:
            Global and local maps by name; None without a local branch.
        """
        shown = [sample for sample in self.samples if not sample.text_only]
        count = min(num_images, len(shown))
        images = [shown[place * len(shown) // count] for place in range(count)]
        branches: tuple[Branch, ...] = ("global",) if self.connector.spec.local_branch is None else ("global", "local")
        while True:
            try:
                found = self.source.fetch(dict.fromkeys(branches, images))
            except MissingFeaturesError as error:
                self._note_missing(error)
                images = [image for image in images if not self._is_missing(image, branches)]
                if not images:
                    raise
                continue
            return found["global"], found.get("local")

    def evidence(self, index: int) -> list[tuple[int, int]]:
        """What a sample's local tokens should mean.

        Args:
            index: of the sample.

        Returns:
            Pairs of (local token of the image, vocabulary id), each once.
        """
        return self._evidence.get(index)

    def _pairs(self, index: int) -> list[tuple[int, int]]:
        sample, local = self.samples[index], self.connector.spec.local_branch
        if sample.text_only or local is None:
            return []
        pairs: dict[tuple[int, int], None] = {}
        plan = self.view_plan(sample)
        view_tokens = self.connector.tokens_per_local_view
        rows, columns = local.view_grid(self.connector.num_patches)
        for turn in sample.turns:
            if turn.evidence is None:
                continue
            left, top, right, bottom = turn.evidence
            for view in plan.local_views:
                box = view.project(Box(left=left, top=top, right=right, bottom=bottom))
                column, row = (box.left + box.right) / 2 * columns / view.view_px, (box.top + box.bottom) / 2 * rows / view.view_px
                if 0 <= column < columns and 0 <= row < rows:
                    place = (view.index - 1) * view_tokens + int(row) * columns + int(column)
                    for word in turn.shown:
                        pairs |= {(place, token): None for token in self._tokenizer.encode(f" {word}", add_special_tokens=False)}
        return list(pairs)

    def _batch(self, phase_index: int, positions: Sequence[int], planned: Sequence[int], evidence_scale: float = 0.0) -> tuple[Batch, int]:
        """A batch, and how many of its samples' features were not there."""
        phase, seed, spec = self.schedule.phases[phase_index], self.schedule.seed, self.connector.spec
        modes = [self._mode(phase_index, position, index) for position, index in zip(positions, planned, strict=True)]
        wants_global = [mode in ("global", "both") for mode in modes]
        wants_local = [mode in ("local", "both") and spec.local_branch is not None for mode in modes]
        indices, found, num_missing = self._features(phase_index, planned, {"global": wants_global, "local": wants_local})
        plans = [self.view_plan(self.samples[index]) if wanted else None for index, wanted in zip(indices, wants_local, strict=True)]
        noise = None
        if "gate" in phase.train and phase.experts == "mixture" and _is_noisy(self.connector):
            shape = (self.connector.num_global_patches, NUM_EXPERTS)
            drawn = [
                _generator(seed, _NOISE, phase_index, position).standard_normal(shape, dtype=np.float32)
                for position, wanted in zip(positions, wants_global, strict=True)
                if wanted
            ]
            noise = torch.from_numpy(np.stack(drawn) if drawn else np.zeros((0, *shape), dtype=np.float32))
        pairs: list[tuple[int, int]] = []
        layout = lay_out_images(self.connector, wants_global, plans)
        if evidence_scale > 0:
            for place, (index, wanted) in enumerate(zip(indices, wants_local, strict=True)):
                if wanted:
                    start = layout.first_view[place] * layout.tokens_per_local_view
                    pairs += [(start + token, word) for token, word in self.evidence(index)]
        batch = plan_sequences(
            [self.conversation(index, phase.template) for index in indices],
            modes,
            range(len(indices)),
            layout,
            global_maps=found.get("global"),
            local_maps=found.get("local"),
            gate_noise=noise,
            selects=phase.selector,
            selector_noise=self._selector_noise(phase_index, positions, layout) if phase.selector else None,
            evidence_places=torch.tensor([token for token, _ in pairs]) if pairs else None,
            evidence_words=torch.tensor([word for _, word in pairs]) if pairs else None,
            evidence_scale=evidence_scale,
            experts=phase.experts,
            dropout_keys=tuple(int(_generator(seed, _DROPOUT, phase_index, position).integers(2**62)) for position in positions)
            if "language_model" in phase.train
            else None,
        )
        return batch, num_missing

    def _features(
        self, phase_index: int, planned: Sequence[int], wants: Mapping[Branch, Sequence[bool]]
    ) -> tuple[list[int], dict[Branch, dict[str, PackedMap]], int]:
        """The samples of a batch, those replaced whose features are not there; the features; and how many were not there."""
        encoded_before = self.source.num_encoded_live
        branches = [[branch for branch, some in wants.items() if some[place]] for place in range(len(planned))]
        while True:
            indices = [self._with_features(phase_index, index, wanted) for index, wanted in zip(planned, branches, strict=True)]
            # Nothing is read that nobody looks at.
            images: dict[Branch, list[Sample]] = {
                branch: [self.samples[index] for index, wanted in zip(indices, some, strict=True) if wanted] for branch, some in wants.items()
            }
            try:
                found = self.source.fetch(images)
            except MissingFeaturesError as error:
                self._note_missing(error)
                continue
            replaced = sum(index != wanted for index, wanted in zip(indices, planned, strict=True))
            return indices, found, replaced + self.source.num_encoded_live - encoded_before

    def _note_missing(self, error: MissingFeaturesError) -> None:
        """Remember what the error says is missing, or raise it."""
        if not self._substitutes or error.image_sha256 is None or error.branch is None:
            raise error
        self._missing.add((error.branch, error.image_sha256))

    def _is_missing(self, sample: Sample, branches: Sequence[Branch]) -> bool:
        """Whether one of these branches of an image is known to be missing."""
        return any((branch, sample.image_sha256) in self._missing for branch in branches)

    def _with_features(self, phase_index: int, index: int, wanted: Sequence[Branch]) -> int:
        """The sample, or where its features are missing the next one in the frozen order that the phase sees and whose are not known to be.

        Only the branches that the position shows are asked about. Those of a sample that is taken are read next, and it gives way if they turn out to
        be missing: so in the end it is the first one whose branches are whole, whatever was known before, on every rank and after every resume.
        """
        if not self._is_missing(self.samples[index], wanted):
            return index
        seen = self._seen[_sight(self.schedule.phases[phase_index])]
        start = bisect.bisect(seen, index)
        for other in (*seen[start:], *seen[:start]):
            if not self.samples[other].text_only and not self._is_missing(self.samples[other], wanted):
                return other
        raise MissingFeaturesError(f"phase {self.schedule.phases[phase_index].name!r} sees no image any more whose features are there")

    def _selector_noise(self, phase_index: int, positions: Sequence[int], layout: VisualLayout) -> Tensor | None:
        """Standard normal numbers for every sequence's local tokens, a function of the position alone."""
        spec, most = self.connector.spec.selector, max((len(order) for order in layout.local_orders), default=0)
        if spec is None or spec.noise == 0 or most == 0:
            return None
        drawn = np.zeros((len(positions), most), dtype=np.float32)
        for row, (position, order) in enumerate(zip(positions, layout.local_orders, strict=True)):
            generator = _generator(self.schedule.seed, _SELECTOR_NOISE, phase_index, position)
            drawn[row, : len(order)] = generator.standard_normal(len(order), dtype=np.float32)
        return torch.from_numpy(drawn)


def _sight(phase: PhaseSpec) -> tuple[tuple[str, ...], bool]:
    """What tells phases apart that see other samples."""
    return (phase.sources, phase.sees_text_only)


def _seen(samples: Sequence[Sample], phase: PhaseSpec) -> list[int]:
    """Places of the samples that a phase sees."""
    found = [place for place, sample in enumerate(samples) if phase.sees(sample.source, text_only=sample.text_only)]
    if not found:
        raise TrainingError(
            f"phase {phase.name!r} sees the sources {', '.join(phase.sources)} alone, of which the train split holds no image; found those of "
            f"{', '.join(sorted({sample.source for sample in samples if not sample.text_only}))}"
        )
    return found


def _is_noisy(connector: Connector) -> bool:
    adapters = connector.spec.global_branch.adapters
    return adapters.kind == "gated_mixture" and adapters.noise != "none"


Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """Runs an iterator in a thread, a few items ahead. Errors come out where the items would.

    Args:
        make: called in the thread; gives the iterator.
        depth: items ahead.
    """

    def __init__(self, make: Callable[[], Iterator[Item]], depth: int = 2) -> None:
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make,), name="prefetch", daemon=True)
        self._thread.start()

    def _run(self, make: Callable[[], Iterator[Item]]) -> None:
        try:
            for item in make():
                self._put(("item", item))
                if self._stopped.is_set():
                    return
            self._put(("end", None))
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised in the thread that waits for it
            self._put(("error", error))

    def _put(self, message: tuple[str, Any]) -> None:
        while not self._stopped.is_set():
            try:
                self._queue.put(message, timeout=0.1)
            except queue.Full:
                continue
            return

    def __iter__(self) -> Iterator[Item]:
        while True:
            kind, value = self._queue.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stopped.set()
        self._thread.join()
