"""The language model inside a released model, as a folder of its own that transformers reads.

LLaVA's code subclasses a language model and saves everything as one: `model.layers.*` beside `model.mm_projector.*`, under a config of model_type
`llava_llama`. Here the former is copied out, group of tensors by group, so that a 13 GB model needs about a gigabyte of memory.

Input: the files of a released model and its folder. Output: config.json, safetensors with an index, tokenizer files. Invariant: every tensor that
the language model's class has is there, in its shape and stored type, finite; else nothing is written.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.errors import ReleasedWeightsError, first_line
from model.released_weights import by_canonical_name, part_left
from model.tensor_files import SHARD_BYTES, StoredTensor, TensorFiles, write_shards

__all__ = ["CheckedLanguageModel", "LanguageModelFiles", "check_language_model", "released_config", "tokenizer_files", "write_language_model"]

_CLASSES = {
    "llava_llama": ("llama", "LlamaForCausalLM"),
    "llava": ("llama", "LlamaForCausalLM"),
    "llava_mistral": ("mistral", "MistralForCausalLM"),
}
"""Model types of the authors' code, and what each is without its eyes."""

_ADDED = (
    "auto_map", "freeze_mm_mlp_adapter", "image_aspect_ratio", "image_crop_resolution", "image_grid_pinpoints", "image_split_resolution", "is_video",
    "if_pool", "seperator", "tokenizer_model_max_length", "tokenizer_padding_side", "tune_mm_mlp_adapter", "unfreeze_mm_vision_tower",
    "use_global_only", "use_local_only", "vision_tower",
)  # fmt: skip
"""Keys that the authors' code adds to the language model's config, beside `mm_*` and `use_mm_*`; `seperator` is how they spell it."""

_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
_BESIDE = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "LICENSE", "LICENSE.txt",
    "USE_POLICY.md",
)  # fmt: skip
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageModelFiles:
    """What was written."""

    model_type: str
    num_tensors: int
    num_values: int
    num_bytes: int
    ignored: tuple[str, ...]
    """Tensors that its class computes by itself."""


def released_config(folder: Path) -> dict[str, Any] | None:
    """The config.json of a released model.

    Args:
        folder: that may hold one.

    Returns:
        Its values; None where there is none.

    Raises:
        ReleasedWeightsError: it is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ReleasedWeightsError(f"{path} cannot be read ({first_line(error)}); copy or fetch it again") from error
    if not isinstance(values, dict):
        raise ReleasedWeightsError(f"{path}: expected a JSON object, found a {type(values).__name__}; copy or fetch it again")
    return values


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that make its tokenizer, and what a language model's folder holds beside.

    Args:
        folder: of a released model.

    Returns:
        Files.

    Raises:
        ReleasedWeightsError: there is no tokenizer.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER):
        raise ReleasedWeightsError(
            f"{folder} holds a language model without a tokenizer (expected one of {', '.join(_TOKENIZER)}); copy its files there, or import the "
            "connector alone with --connector-only"
        )
    return [folder / name for name in (*_TOKENIZER, *_BESIDE) if (folder / name).is_file()]


def write_language_model(
    files: TensorFiles, config: Mapping[str, Any], source: Path, target: Path, *, shard_bytes: int = SHARD_BYTES
) -> LanguageModelFiles:
    """Write the language model of a released one as a folder in transformers' layout.

    Args:
        files: of the released model.
        config: of its config.json.
        source: its folder, for the tokenizer.
        target: an empty folder.
        shard_bytes: of a file, at most, unless one tensor is larger; about what this takes of memory.

    Returns:
        What was written.

    Raises:
        ReleasedWeightsError: its class is not known, a tensor is missing, too much, of another shape or not finite, or there is no tokenizer.
    """
    found = check_language_model(files, config)
    names, held, values = found.names, found.held, found.config
    beside = tokenizer_files(source)
    num_bytes = write_shards(files, {canonical: names[canonical] for canonical in held}, target, shard_bytes=shard_bytes)
    _write_json(target / "config.json", values)
    # Theirs sets a temperature without sampling, which newer transformers refuse to save; greedy decoding needs the tokens alone.
    _write_json(target / "generation_config.json", {name: values[name] for name in _TOKEN_IDS if values.get(name) is not None})
    for file_beside in beside:
        shutil.copyfile(file_beside, target / file_beside.name)
    return LanguageModelFiles(
        model_type=str(values["model_type"]),
        num_tensors=len(held),
        num_values=sum(tensor.num_values for tensor in held.values()),
        num_bytes=num_bytes,
        ignored=found.ignored,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedLanguageModel:
    """A language model that is all there, as far as names, shapes and types tell."""

    config: dict[str, Any]
    """Of its config.json, without what the authors' code added."""
    names: dict[str, str]
    """Names in the files by canonical name."""
    held: dict[str, StoredTensor]
    """Its tensors by canonical name."""
    ignored: tuple[str, ...]


def check_language_model(files: TensorFiles, config: Mapping[str, Any]) -> CheckedLanguageModel:
    """Refuse a language model that is not whole, before anything is read or written.

    Args:
        files: of the released model.
        config: of its config.json.

    Returns:
        What it is made of.

    Raises:
        ReleasedWeightsError: its class is not known, or a tensor is missing, too much or of another shape.
    """
    model_type, architecture = _class_of(config)
    values = _plain_config(config, model_type, architecture)
    names = {canonical: name for canonical, name in by_canonical_name(files).items() if part_left(canonical) == "language model"}
    ignored = tuple(sorted(name for name in names if name.endswith(".rotary_emb.inv_freq")))
    held = {canonical: files.stored[name] for canonical, name in names.items() if canonical not in ignored}
    _check_tensors(held, _expected_shapes(values, model_type), tied=bool(values.get("tie_word_embeddings")))
    return CheckedLanguageModel(config=values, names=names, held=held, ignored=ignored)


def _class_of(config: Mapping[str, Any]) -> tuple[str, str]:
    found = config.get("model_type")
    if found not in _CLASSES:
        raise ReleasedWeightsError(
            f"config.json has model_type {found!r}; expected one of {', '.join(_CLASSES)}. Import the connector alone with --connector-only, and "
            "name the language model in the recipe"
        )
    return _CLASSES[str(found)]


def _plain_config(config: Mapping[str, Any], model_type: str, architecture: str) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in _ADDED and not key.startswith(("mm_", "use_mm_"))}
    return {**kept, "model_type": model_type, "architectures": [architecture]}


def _expected_shapes(values: Mapping[str, Any], model_type: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the class's tensors, from its config, without memory for them."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        parsed = AutoConfig.for_model(model_type, **{key: value for key, value in values.items() if key != "model_type"})
        with torch.device("meta"):
            network: Any = AutoModelForCausalLM.from_config(parsed)
    except (StrictDataclassError, ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise ReleasedWeightsError(f"config.json is of no {model_type} that transformers can build ({first_line(error)}); fetch it") from error
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _check_tensors(held: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], *, tied: bool) -> None:
    missing = [name for name in expected if name not in held and not (tied and name == "lm_head.weight")]
    lines = [f"missing     {name} {list(expected[name])}" for name in missing]
    for name, tensor in held.items():
        if name not in expected:
            lines.append(f"unexpected  {name} {list(tensor.shape)}")
        elif tensor.shape != expected[name] or not tensor.dtype.startswith(("float", "bfloat")):
            lines.append(f"shape       {name}: expected {list(expected[name])}, found {list(tensor.shape)} of {tensor.dtype}")
    if lines:
        shown = "".join(f"\n  {line}" for line in lines[:12]) + (f"\n  and {len(lines) - 12} more" if len(lines) > 12 else "")
        raise ReleasedWeightsError(f"{len(lines)} of the language model's tensors do not fit its config.json, so nothing is imported:{shown}")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")
