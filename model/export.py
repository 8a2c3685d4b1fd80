"""Exports: a folder that answers questions about images without the store, the cluster or the recipe it came from.

    loupe_config.json         connector, encoder, view rule, precision: everything that turns an image into visual tokens
    connector.safetensors     trained connector
    language_model/           transformers folder with tokenizer and chat template; with adapters, the base model's own files
    adapter/                  trained adapters in peft's layout, where there are any that are not merged
    encoder/                  transformers folder of the vision tower
    preprocessor_config.json  size, mean and deviation, for people and other tools
    README.md                 model card
    manifest.json             sha256 of every other file; written last

Invariant: an export that lacks a file or holds another one is refused, naming it; answers come from exactly the bytes that were evaluated.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from model.chat import Conversation, tokenise_conversation, tokenise_question
from model.connector import Connector
from model.decoding import from_json
from model.encoder import Encoder, compute_dtype, load_encoder
from model.encoder_execution import BatchSize
from model.errors import ExportError, ModelError
from model.images import cut_views, decode_image
from model.language_model import describe_folder, hold_rounded, load_language_model, multiplies_bf16
from model.lora import load_adapters
from model.specs import ChatTemplate, Compute, ConnectorSpec, EncoderSpec, LoraSpec, MapSpec, canonical_json, deepest_layer
from model.views import ViewPlan, ViewSpec, plan_views
from model.vision_language import Batch, Mode, VisionLanguageModel, VisualLayout, lay_out_images, plan_sequences, room_for_text

__all__ = [
    "CONFIG",
    "MANIFEST",
    "AdapterConfig",
    "Answer",
    "ExportConfig",
    "ExportedModel",
    "as_stored",
    "load_export",
    "write_config",
    "write_manifest",
]

CONFIG = "loupe_config.json"
MANIFEST = "manifest.json"
FORMAT_VERSION = 4

_MAX_NEW_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """Adapters and the model that they were trained on."""

    lora: LoraSpec
    base_model: str
    """As the recipe calls it."""
    base_sha256: str
    """Digest of language_model/, as `describe_folder` makes it: adapters on another base answer something, and wrongly."""
    template: ChatTemplate
    """In which questions are asked. By name, since the base's own files, which its digest covers, do not know of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """What an export computes."""

    connector: ConnectorSpec
    encoder: EncoderSpec
    views: ViewSpec
    feature_precision: Literal["fp32", "fp16"]
    """Maps are rounded to it before the connector reads them, as they were in training."""
    precision: Literal["fp32", "bf16"]
    """Of matrix products."""
    language_model_precision: Literal["fp32", "bf16"]
    """Of the language model's weights: bf16 where training held it frozen, so that answers come from the same numbers."""
    adapter: AdapterConfig | None = None
    """What adapter/ holds; None without one."""
    selects: bool = False
    """Whether the connector's selector drops local tokens, as it did in the last phase of training."""
    feature_compute: Compute = "fp32"
    """In which the encoder computed the maps that the connector was trained on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What an exported model said."""

    text: str
    mode: Mode
    seconds: float
    """Decoding, encoding and generating; loading is not in it."""
    num_visual_tokens: int
    """Before any are dropped by a selector."""
    num_answer_tokens: int


def write_config(folder: Path, config: ExportConfig) -> None:
    """Write loupe_config.json and preprocessor_config.json.

    Args:
        folder: of the export.
        config: to write.
    """
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    (folder / CONFIG).write_text(
        json.dumps({"format_version": FORMAT_VERSION, **json.loads(canonical_json(fields))}, indent=1, sort_keys=True) + "\n"
    )
    preprocessor = {
        "size": {"height": config.encoder.view_px, "width": config.encoder.view_px},
        "resample": 3,
        "image_mean": list(config.encoder.mean),
        "image_std": list(config.encoder.std),
        "do_center_crop": False,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=1, sort_keys=True) + "\n")


def write_manifest(folder: Path) -> dict[str, str]:
    """Write manifest.json over all other files.

    Args:
        folder: of the export, otherwise complete.

    Returns:
        sha256 (hex) by path inside the folder.
    """
    files = _digests(folder)
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1, sort_keys=True) + "\n")
    return files


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST):
        with file.open("rb") as stream:
            digests[file.relative_to(folder).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def load_export(folder: Path | str, *, device: str = "cpu") -> "ExportedModel":
    """Load an export, after checking every file against the manifest.

    Args:
        folder: of the export.
        device: where it computes.

    Returns:
        The model, ready to answer.

    Raises:
        ExportError: the folder is no export, or a file is missing, other than it was, or does not fit the rest.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file() and not (folder / CONFIG).is_file():
        raise ExportError(
            f"{folder} was exported for transformers, which loads it by itself; its README.md shows how. `loupe ask` reads what "
            "`loupe export RECIPE` writes without --to"
        )
    if not (folder / MANIFEST).is_file():
        raise ExportError(f"{folder} is no complete export: it has no {MANIFEST}, which is written last. Export again")
    try:
        recorded: dict[str, str] = json.loads((folder / MANIFEST).read_text())["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{folder / MANIFEST} cannot be read ({error}); export again") from error
    found = _digests(folder)
    if missing := sorted(recorded.keys() - found.keys()):
        raise ExportError(f"{folder} lacks {missing[0]}; copy the export again, or export again")
    if damaged := [name for name in recorded if found[name] != recorded[name]]:
        raise ExportError(f"{folder / damaged[0]} is not the file that was exported: its sha256 differs from the manifest; copy the export again")
    config = _read_config(folder / CONFIG)
    encoder_spec = dataclasses.replace(config.encoder, model=str(folder / "encoder"))
    if config.adapter is not None:
        _check_base(folder, config.adapter)
    language_model = load_language_model(folder / "language_model", "own" if config.adapter is None else config.adapter.template)
    if config.language_model_precision == "bf16":
        hold_rounded(language_model.network, native=multiplies_bf16(device))
    if config.adapter is not None:
        load_adapters(language_model.network, config.adapter.lora, folder / "adapter")
    connector = Connector(
        config.connector,
        encoder_width=config.encoder.width,
        num_patches=config.encoder.num_patches,
        hidden=language_model.hidden,
        embedding_rms=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    try:
        connector.load_state_dict(safetensors.torch.load_file(folder / "connector.safetensors"))
    except RuntimeError as error:
        raise ExportError(f"{folder}/connector.safetensors does not fit {CONFIG} ({str(error).splitlines()[-1].strip()}); export again") from error
    model = VisionLanguageModel(connector, language_model, precision=config.precision).to(device)
    model.requires_grad_(requires_grad=False)
    global_maps = config.connector.global_branch.fusion.maps
    local_maps = () if config.connector.local_branch is None else config.connector.local_branch.fusion.maps
    deepest = deepest_layer((*global_maps, *local_maps))
    encoder = load_encoder(encoder_spec, deepest, device, compute_dtype(config.feature_compute, device, or_wider=True))
    return ExportedModel(config=config, model=model, encoder=encoder)


def _check_base(folder: Path, adapter: AdapterConfig) -> None:
    found = describe_folder(folder / "language_model", adapter.base_model).weights_sha256
    if found != adapter.base_sha256:
        raise ExportError(
            f"{folder / 'language_model'} has the digest {found[:16]}, but the adapters of this export were trained on {adapter.base_model}, digest "
            f"{adapter.base_sha256[:16]}; put that model's files there, or export again"
        )


def as_stored(maps: Mapping[str, Tensor], precision: Literal["fp32", "fp16"]) -> Mapping[str, Tensor]:
    """Maps as a cache gives them back, since the connector was trained on those.

    Args:
        maps: fp32, as the encoder gives them.
        precision: that they are stored in.

    Returns:
        fp32, rounded to the precision.
    """
    return maps if precision == "fp32" else {name: values.half().float() for name, values in maps.items()}


class ExportedModel:
    """An export in memory.

    Args:
        config: what it computes.
        model: connector and language model, trained.
        encoder: loaded deep enough.
    """

    def __init__(self, *, config: ExportConfig, model: VisionLanguageModel, encoder: Encoder) -> None:
        self.config, self.model, self.encoder = config, model, encoder
        self._batch_size = BatchSize(encoder, None)

    def ask(self, image_bytes: bytes, question: str, mode: Mode = "both", *, max_new_tokens: int = _MAX_NEW_TOKENS) -> Answer:
        """Answer a question about an image, greedily.

        Args:
            image_bytes: an image file.
            question: about it.
            mode: which views the language model sees.
            max_new_tokens: the answer ends here at the latest.

        Returns:
            The answer.

        Raises:
            ImageError: the bytes are no image that Loupe accepts.
            ConversationError: the question does not fit, or holds a mark of the prompt.
            ExportError: the mode needs a local branch and there is none.
        """
        return self.ask_many([(image_bytes, question)], mode, max_new_tokens=max_new_tokens)[0]

    @torch.no_grad()
    def ask_many(
        self, asked: Sequence[tuple[bytes | None, str]], mode: Mode = "both", *, max_new_tokens: int = _MAX_NEW_TOKENS, may_end_early: bool = False
    ) -> list[Answer]:
        """Answer questions in one batch, greedily; an answer does not depend on the others.

        Args:
            asked: an image file and a question about it, each; without an image the question is asked blind.
            mode: which views the language model sees.
            max_new_tokens: an answer ends here at the latest.
            may_end_early: answers also end where the language model's longest sequence does; else a question that leaves less room than
                `max_new_tokens` is refused.

        Returns:
            The answers in order; the seconds of each are those of the batch.

        Raises:
            ImageError: as for `ask`.
            ConversationError: as for `ask`.
            ExportError: as for `ask`.
        """
        started = time.monotonic()
        shown = self._show([image for image, _ in asked], mode)
        limit = self.model.max_tokens - (1 if may_end_early else max_new_tokens)
        conversations = [
            tokenise_question(self.model.tokenizer, question, self._room(limit, plan)) for (_, question), plan in zip(asked, shown.plans, strict=True)
        ]
        batch = self._batch(conversations, shown, pad_left=True)
        answers = self.model.generate(batch.to(self.model.device), min(max_new_tokens, self.model.max_tokens - int(batch.lengths.max())))
        seconds = time.monotonic() - started
        return [
            Answer(
                text=self.model.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
                mode=shown.modes[place],
                seconds=seconds,
                num_visual_tokens=int(batch.lengths[place]) - conversations[place].num_text_tokens,
                num_answer_tokens=len(tokens),
            )
            for place, tokens in enumerate(answers)
        ]

    @torch.no_grad()
    def log_likelihood(self, image_bytes: bytes | None, question: str, answer: str, mode: Mode = "both") -> tuple[float, bool]:
        """How likely an answer is.

        Args:
            image_bytes: an image file; None asks blind.
            question: about it.
            answer: whose likelihood.
            mode: which views the language model sees.

        Returns:
            The natural logarithm of the probability of this answer and its end after the question, and whether it is the greedy answer.

        Raises:
            ImageError: as for `ask`.
            ConversationError: as for `ask`.
            ExportError: as for `ask`.
        """
        shown = self._show([image_bytes], mode)
        conversation = tokenise_conversation(self.model.tokenizer, [(question, answer)], self._room(self.model.max_tokens, shown.plans[0]))
        _, loss, correct = self.model(self._batch([conversation], shown, pad_left=False).to(self.model.device))
        return -float(loss), int(correct) == conversation.num_supervised

    @torch.no_grad()
    def prompt_logits(self, image_bytes: bytes, question: str, mode: Mode = "both", *, last: int = 0) -> Float[Tensor, "length vocabulary"]:
        """What the language model predicts at the positions of a question's prompt, visual tokens included.

        Args:
            image_bytes: an image file.
            question: about it.
            mode: which views the language model sees.
            last: so many positions at the end; 0 is all.

        Returns:
            Logits in fp32.

        Raises:
            ImageError: as for `ask`.
            ConversationError: as for `ask`.
            ExportError: as for `ask`.
        """
        batch = self.prompt(image_bytes, question, mode)
        return self.model.prompt_logits(batch.to(self.model.device), last)[0]

    def prompt(self, image_bytes: bytes, question: str, mode: Mode = "both") -> Batch:
        """A question's prompt.

        Args:
            image_bytes: an image file.
            question: about it.
            mode: which views the language model sees.

        Returns:
            A batch of one sequence, padded in front.

        Raises:
            ImageError: as for `ask`.
            ConversationError: as for `ask`.
            ExportError: as for `ask`.
        """
        shown = self._show([image_bytes], mode)
        conversation = tokenise_question(self.model.tokenizer, question, self._room(self.model.max_tokens, shown.plans[0]))
        return self._batch([conversation], shown, pad_left=True)

    def _room(self, limit: int, plan: ViewPlan | None) -> int:
        """Text tokens beside an image's visual ones; all of them where there is no image."""
        return limit if plan is None else room_for_text(limit, self.model.connector, plan)

    def _batch(self, conversations: Sequence[Conversation], shown: "_Shown", *, pad_left: bool) -> Batch:
        return plan_sequences(
            conversations,
            shown.modes,
            range(len(conversations)),
            shown.layout,
            pad_left=pad_left,
            global_maps=shown.global_maps,
            local_maps=shown.local_maps,
            selects=self.config.selects,
        )

    def _show(self, images: Sequence[bytes | None], mode: Mode) -> "_Shown":
        """Decode, cut and encode what a batch shows of its images."""
        spec, encoder = self.config.connector, self.config.encoder
        if mode == "local" and spec.local_branch is None:
            raise ExportError("this export has no local branch, so mode 'local' shows nothing; use 'global' or 'blind'")
        plans: list[ViewPlan | None] = []
        globals_: list[NDArray[np.uint8]] = []
        locals_: list[NDArray[np.uint8]] = []
        for data in images:
            if data is None:
                plans.append(None)
                continue
            image = decode_image(data)
            plan = plan_views(image.width, image.height, encoder.view_px, self.config.views)
            plans.append(plan)
            if mode in ("global", "both"):
                globals_.append(cut_views(image, plan, "global", mean_colour=encoder.mean_colour))
            if mode in ("local", "both") and spec.local_branch is not None:
                locals_.append(cut_views(image, plan, "local"))
        return _Shown(
            plans=plans,
            modes=["blind" if data is None else mode for data in images],
            layout=lay_out_images(
                self.model.connector,
                [bool(globals_) and plan is not None for plan in plans],
                [plan if locals_ else None for plan in plans],
            ),
            global_maps=self.maps_of(np.concatenate(globals_), spec.global_branch.fusion.maps) if globals_ else None,
            local_maps=self.maps_of(np.concatenate(locals_), spec.local_branch.fusion.maps) if locals_ and spec.local_branch is not None else None,
        )

    def maps_of(
        self, views: UInt8[NDArray[np.uint8], "views 3 px px"], maps: Sequence[MapSpec]
    ) -> Mapping[str, Float[Tensor, "views patches width"]]:
        """Encode views as the connector was trained on them.

        Args:
            views: as `cut_views` gives them.
            maps: which.

        Returns:
            Maps by name, rounded as the cache stored them.
        """
        wanted = list(dict.fromkeys(maps))

        def encoded(batch_views: int) -> list[dict[str, Tensor]]:
            return [self.encoder(torch.from_numpy(views[start : start + batch_views]), wanted) for start in range(0, len(views), batch_views)]

        parts = self._batch_size.backing_off(encoded)
        return as_stored({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, self.config.feature_precision)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shown:
    """What a batch shows of its images."""

    plans: list[ViewPlan | None]
    """None where there is no image."""
    modes: list[Mode]
    layout: VisualLayout
    global_maps: Mapping[str, Tensor] | None
    local_maps: Mapping[str, Tensor] | None


def _read_config(path: Path) -> ExportConfig:
    """The config, every field checked by the specs themselves."""
    try:
        values = json.loads(path.read_text())
        version = values.pop("format_version")
        if version != FORMAT_VERSION:
            raise ExportError(f"{path} has format version {version}, this Loupe reads {FORMAT_VERSION}; export again with this version")
        return from_json(ExportConfig, values, where=path.name)
    except (KeyError, TypeError, ValueError, AttributeError, ModelError) as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"{path} cannot be read ({type(error).__name__}: {error}); export again with this version") from error
