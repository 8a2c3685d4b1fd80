"""Exports: a folder that answers questions about images without the store, the cluster or the recipe it came from.

    loupe_config.json         connector, encoder, view rule, precision: everything that turns an image into visual tokens
    connector.safetensors     trained connector
    language_model/           transformers folder with tokenizer and chat template
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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from model.chat import Conversation, tokenise_question
from model.connector import Connector
from model.decoding import from_json
from model.encoder import Encoder, load_encoder
from model.errors import ExportError, ModelError
from model.images import cut_views, decode_image
from model.language_model import hold_in, load_language_model
from model.specs import ConnectorSpec, EncoderSpec, MapSpec, canonical_json
from model.views import ViewSpec, plan_views
from model.vision_language import Batch, Mode, VisionLanguageModel, lay_out_images, plan_sequences, room_for_text

__all__ = ["CONFIG", "MANIFEST", "Answer", "ExportConfig", "ExportedModel", "as_stored", "load_export", "write_config", "write_manifest"]

CONFIG = "loupe_config.json"
MANIFEST = "manifest.json"
FORMAT_VERSION = 3

_MAX_NEW_TOKENS = 64


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What an exported model said."""

    text: str
    mode: Mode
    seconds: float
    """Decoding, encoding and generating; loading is not in it."""
    num_visual_tokens: int
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
    language_model = load_language_model(folder / "language_model")
    if config.language_model_precision == "bf16":
        hold_in(language_model.network, torch.bfloat16)
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
    encoder = load_encoder(encoder_spec, max(layer for map_spec in (*global_maps, *local_maps) for layer in map_spec.layers), device)
    return ExportedModel(config=config, model=model, encoder=encoder)


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

    @torch.no_grad()
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
        started = time.monotonic()
        batch, conversation = self._prompt(image_bytes, question, mode, max_new_tokens)
        tokens = self.model.generate(batch.to(self.model.device), max_new_tokens)[0]
        return Answer(
            text=self.model.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
            mode=mode,
            seconds=time.monotonic() - started,
            num_visual_tokens=int(batch.lengths[0]) - conversation.num_text_tokens,
            num_answer_tokens=len(tokens),
        )

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
            ImageError: as for `ask`; so for the other errors.
        """
        batch, _ = self._prompt(image_bytes, question, mode, 0)
        return self.model.prompt_logits(batch.to(self.model.device), last)[0]

    def _prompt(self, image_bytes: bytes, question: str, mode: Mode, max_new_tokens: int) -> tuple[Batch, Conversation]:
        spec, encoder = self.config.connector, self.config.encoder
        if mode == "local" and spec.local_branch is None:
            raise ExportError("this export has no local branch, so mode 'local' shows nothing; use 'global' or 'blind'")
        image = decode_image(image_bytes)
        plan = plan_views(image.width, image.height, encoder.view_px, self.config.views)
        global_maps = local_maps = None
        colour = encoder.mean_colour
        if mode in ("global", "both"):
            global_maps = self._maps(cut_views(image, plan, "global", mean_colour=colour), spec.global_branch.fusion.maps)
        if mode in ("local", "both") and spec.local_branch is not None:
            local_maps = self._maps(cut_views(image, plan, "local"), spec.local_branch.fusion.maps)
        room = room_for_text(self.model.max_tokens - max_new_tokens, self.model.connector, plan)
        layout = lay_out_images(self.model.connector, [global_maps is not None], [None if local_maps is None else plan])
        conversation = tokenise_question(self.model.tokenizer, question, room)
        batch = plan_sequences(
            [conversation],
            [mode],
            [0],
            layout,
            pad_left=True,
            global_maps=global_maps,
            local_maps=local_maps,
            selects=spec.selector is not None,
        )
        return batch, conversation

    def _maps(self, views: Any, maps: tuple[MapSpec, ...]) -> Mapping[str, Tensor]:
        return as_stored(self.encoder(torch.from_numpy(views), list(dict.fromkeys(maps))), self.config.feature_precision)


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
