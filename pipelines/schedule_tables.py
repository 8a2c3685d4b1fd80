"""A recipe's `[schedule]`: phases, presets, repeats, and what they are over a connector's blocks and a dataset's sources."""

import tomllib
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal, assert_never

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from model.errors import SpecError, closest
from model.specs import BLOCKS, CONNECTOR_BLOCKS, Block, BranchMix, ChatTemplate, ConnectorSpec, PhaseSpec, sees_text_only
from pipelines.recipe_fields import Count, Fraction, Mode, NotNegative, Positive, Share, Switch, Table, Text, Word, allowed, with_tuples

__all__ = [
    "SCHEDULES_FOLDER",
    "Phase",
    "Schedule",
    "Shares",
    "preset_phases",
    "schedule_presets",
]

SCHEDULES_FOLDER = Path(__file__).parent / "schedules"


class Shares(Table):
    """Which share of a phase's samples sees which visual input."""

    both: Share = 0.0
    global_only: Share = Field(alias="global", default=0.0)
    local_only: Share = Field(alias="local", default=0.0)
    blind: Share = 0.0


class Phase(Table):
    """One phase of the schedule."""

    name: Text | None = None
    """When absent, the trained blocks' names; `sft` for the last phase."""
    train: Annotated[
        tuple[Literal["global_mlp", "local_mlp", "resampler", "gate", "compression", "newline", "selector", "language_model", "connector"], ...],
        Field(min_length=1),
    ]
    """Blocks; `connector` stands for all blocks of the connector."""
    branch: Mode | Shares
    """What samples see: one word for all, or a table of shares."""
    steps: Count | None = None
    epochs: Positive | None = None
    """Passes over the training images, instead of steps."""
    batch_size: Count = 32
    """Images in an optimizer step."""
    evidence_weight: NotNegative = 0.0
    """Weight of the loss that draws local tokens to the words that a question's evidence shows."""
    experts: Literal["mixture", "mlp", "resampler"] = "mixture"
    """Which of the global branch's experts count in this phase."""
    selector: Switch | None = None
    """Whether the selector drops tokens; when absent, not in alignment, and in fine-tuning where there is one."""
    sources: Annotated[tuple[Word, ...], Field(min_length=1)] | None = None
    """Which of the dataset's sources the phase sees; all when absent."""
    template: ChatTemplate | None = None
    """How questions and answers become text in this phase; the language model's when absent."""
    learning_rate: Positive
    language_model_learning_rate: Positive | None = None
    warmup_fraction: Fraction = 0.03
    max_grad_norm: Positive = 1.0

    @field_validator("train")
    @classmethod
    def _name_each_block_once(cls, train: tuple[str, ...]) -> tuple[str, ...]:
        twice = len(set(train)) != len(train) or ("connector" in train and set(train) & set(CONNECTOR_BLOCKS))
        if twice:
            raise PydanticCustomError("not_allowed", "each block once; connector stands for all blocks of the connector")
        return train

    @model_validator(mode="after")
    def _have_one_length(self) -> "Phase":
        if (self.steps is None) == (self.epochs is None):
            found = "neither" if self.steps is None else "both"
            raise PydanticCustomError("told", "found {found} of steps and epochs; allowed: exactly one", {"found": found})
        return self

    @property
    def shown_name(self) -> str:
        """Its name, or what it trains."""
        return self.name or "+".join(self.train)

    def blocks(self, connector: ConnectorSpec) -> tuple[Block, ...]:
        """The blocks to train.

        Args:
            connector: whose blocks they are.

        Returns:
            Blocks in the order of BLOCKS.

        Raises:
            SpecError: a block that this connector does not have would silently train nothing.
        """
        asked: set[str] = set(self.train)
        if "connector" in asked:
            asked = (asked - {"connector"}) | set(connector.blocks)
        present = {*connector.blocks, "language_model"}
        if missing := sorted(asked - present):
            raise SpecError(
                f"train names {', '.join(missing)}, which this connector does not have; it has {', '.join(connector.blocks)}, "
                "and language_model can be trained in schedule.sft"
            )
        return tuple(block for block in BLOCKS if block in asked)

    def mix(self) -> BranchMix:
        """The shares as a spec."""
        match self.branch:
            case "both":
                return BranchMix(both=1.0)
            case "global":
                return BranchMix(global_only=1.0)
            case "local":
                return BranchMix(local_only=1.0)
            case "blind":
                return BranchMix(blind=1.0)
            case Shares() as shares:
                return BranchMix(both=shares.both, global_only=shares.global_only, local_only=shares.local_only, blind=shares.blind)
            case _:
                assert_never(self.branch)

    def source_labels(self, labels: Sequence[str]) -> tuple[str, ...]:
        """The sources that the phase names, by their labels.

        Args:
            labels: of all of the dataset's sources.

        Returns:
            In order; empty for all.

        Raises:
            SpecError: there is no such source, or more than one.
        """
        found = set()
        for name in self.sources or ():
            matching = [label for label in labels if name in (label, label.partition("/")[2])]
            if len(matching) != 1:
                raise SpecError(f"sources: found {name!r}, which names {len(matching)} of the dataset's sources; allowed: {', '.join(labels)}")
            found.add(matching[0])
        return tuple(sorted(found))

    def spec(
        self,
        connector: ConnectorSpec,
        *,
        labels: Sequence[str],
        num_train_images: Mapping[str, int] | None,
        num_train_text_only: Mapping[str, int],
        fine_tunes: bool,
    ) -> PhaseSpec:
        """The phase over this connector's blocks.

        Args:
            connector: whose blocks are trained.
            labels: of the dataset's sources.
            num_train_images: training images by source; needed for a phase that counts in epochs, None while unknown.
            num_train_text_only: training samples without an image by source; they count in phases that see them.
            fine_tunes: whether it is the last phase, schedule.sft.

        Returns:
            The phase's spec.

        Raises:
            SpecError: a block, branch or selector that the connector lacks, a block that nothing would train, or epochs of an unknown number of
                samples.
        """
        mix = self.mix()
        if self.selector and connector.selector is None:
            raise SpecError("selector is on, but the recipe has no connector.local.selector; add it, or leave selector out")
        if connector.local_branch is None and mix.shows_local:
            raise SpecError("branch uses local views, but the recipe has no [connector.local]; use 'global', or add the local branch")
        own_projector = connector.local_branch is not None and connector.local_branch.projector == "own"
        if own_projector and mix.shows_local and not mix.shows_global and "global_mlp" in self.blocks(connector):
            raise SpecError(
                "branch leaves global_mlp of train without effect: samples see local views at most, and those have a projector of their own; "
                "leave it out of train (for connector, name the other blocks), or give global or both a share of branch"
            )
        sources = self.source_labels(labels)
        if self.steps is not None:
            steps = self.steps
        elif num_train_images is None:
            raise SpecError(
                "the length is in epochs, and the number of training images is known only once the dataset is built; run `loupe build-dataset` first"
            )
        else:
            assert self.epochs is not None
            counts = [num_train_images]
            if sees_text_only(self.blocks(connector), self.template or "own"):
                counts.append(num_train_text_only)
            num_samples = sum(number for count in counts for label, number in count.items() if not sources or label in sources)
            if not num_samples:
                shown = f"the sources {', '.join(sources)}, which have" if sources else "sources with"
                raise SpecError(f"the phase sees {shown} no training image; give it others, or a smaller held_out_fraction to the dataset")
            steps = ceil(self.epochs * num_samples / self.batch_size)
        return PhaseSpec(
            name=self.shown_name,
            train=self.blocks(connector),
            branch=mix,
            steps=steps,
            batch_size=self.batch_size,
            sources=sources,
            learning_rate=self.learning_rate,
            language_model_learning_rate=self.language_model_learning_rate,
            warmup_fraction=self.warmup_fraction,
            max_grad_norm=self.max_grad_norm,
            evidence_weight=self.evidence_weight,
            experts=self.experts,
            selector=fine_tunes and connector.selector is not None and mix.shows_local if self.selector is None else self.selector,
            template=self.template or "own",
        )


def schedule_presets() -> dict[str, Path]:
    """The schedules that come with Loupe, by name."""
    return {path.stem: path for path in sorted(SCHEDULES_FOLDER.glob("*.toml"))}


def _from_preset(schedule: dict[str, Any]) -> dict[str, Any]:
    """A schedule that names a preset, with the preset's phases as if they were written out, and changed as it says."""
    presets, name = schedule_presets(), schedule["preset"]
    if name not in presets:
        hint = closest(str(name), list(presets)) if isinstance(name, str) else ""
        text = "preset: found {found}; {hint}allowed: {allowed}"
        raise PydanticCustomError("told", text, {"found": repr(name), "hint": hint, "allowed": ", ".join(presets)})
    if written := [key for key in ("align", "sft") if key in schedule]:
        text = (
            "found {key} beside preset = {name}, which has its own phases; change those with [schedule.change.NAME], or leave preset out. Of a "
            'recipe that this one extends, they are left out by without = ["schedule"]'
        )
        raise PydanticCustomError("told", text, {"key": written[0], "name": repr(name)})
    by_name = preset_phases(name)
    changes = schedule.get("change", {})
    for phase_name, change in changes.items() if isinstance(changes, dict) else ():
        if phase_name not in by_name:
            text = "change: found {found}; {hint}phases of preset {name}: {allowed}"
            context = {"found": repr(phase_name), "hint": closest(phase_name, list(by_name)), "name": repr(name), "allowed": ", ".join(by_name)}
            raise PydanticCustomError("told", text, context)
        if isinstance(change, dict):
            by_name[phase_name].update(change)
            for given, other in (("steps", "epochs"), ("epochs", "steps")):
                if given in change and other not in change:
                    by_name[phase_name].pop(other, None)
    *align, sft = by_name.values()
    repeats = tomllib.loads(presets[name].read_text(encoding="utf-8")).get("repeats", 1)
    return {"repeats": repeats, **schedule, **with_tuples({"align": align, "sft": sft})}


class Schedule(Table):
    """The alternating schedule: alignment phases, `repeats` times in turns, then joint fine-tuning."""

    preset: Literal["alternating", "dense_connector", "slime"] | None = None
    """A schedule that comes with Loupe, in place of `align` and `sft`."""
    change: Annotated[dict[str, dict[str, Any]], allowed("a table for each phase, such as [schedule.change.sft]")] = Field(default_factory=dict)
    """Keys of the preset's phases that are to be other, by the phase's name."""
    align: tuple[Phase, ...] = ()
    repeats: Count = 1
    """How often the alignment phases run, one after the other: 2 turns A, B into A, B, A, B."""
    sft: Phase | None = None

    @model_validator(mode="before")
    @classmethod
    def _write_preset_out(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if "preset" in data:
            return _from_preset(data)
        if "change" in data:
            raise PydanticCustomError("told", "found change without preset, whose phases it would change; add preset, or write the phases themselves")
        return data

    @property
    def align_phases(self) -> tuple[Phase, ...]:
        """The alignment phases in the order they run; from the second time on, their names end in the time's number."""
        again = [phase.model_copy(update={"name": f"{phase.shown_name} {time}"}) for time in range(2, self.repeats + 1) for phase in self.align]
        return (*self.align, *again)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """All phases in the order they run."""
        return self.align_phases if self.sft is None else (*self.align_phases, self.sft)


def preset_phases(name: str) -> dict[str, dict[str, Any]]:
    """The phases of a preset by their names, in order; the last one fine-tunes."""
    preset = tomllib.loads(schedule_presets()[name].read_text(encoding="utf-8"))
    return {phase.get("name", "sft"): phase for phase in (*preset["align"], preset["sft"])}
