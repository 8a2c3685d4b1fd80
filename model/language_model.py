"""A causal language model from a folder: its identity, its weights, and what a connector has to know of it.

Input: `builtin:language-model`, a folder in transformers' layout, or a hub id. Output: a LanguageModelSpec (what it is) and a LanguageModel (the
loaded thing). Weights are read from safetensors only. Invariant: the spec's digest covers everything that decides an answer: weights, config,
tokenizer and chat template.
"""

import hashlib
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from model.chat import with_template
from model.errors import HubError, LanguageModelError, first_line
from model.specs import ChatTemplate, LanguageModelSpec
from model.weights import absent_shards, cached_snapshot, fetch_snapshot, unreadable_weights

__all__ = [
    "BUILTIN_LANGUAGE_MODEL",
    "LanguageModel",
    "LanguageModelSpec",
    "check_folder",
    "checkpoint_layers",
    "context_tokens",
    "copy_model",
    "decoder",
    "describe_folder",
    "embed",
    "embedding_rms",
    "first_token",
    "hold_in",
    "hold_rounded",
    "load_language_model",
    "load_tokenizer",
    "local_folder",
    "multiplies_bf16",
    "resolve_folder",
]

BUILTIN_LANGUAGE_MODEL = "builtin:language-model"

_IDENTITY_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja",
)  # fmt: skip
_HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageModel:
    """A loaded model with its tokenizer."""

    network: nn.Module
    tokenizer: Any
    max_tokens: int
    """Longest sequence that the model's positions allow."""

    @property
    def hidden(self) -> int:
        """Width of the input embeddings."""
        return int(self.network.get_input_embeddings().weight.shape[1])  # type: ignore[operator]


def resolve_folder(name: str) -> Path:
    """The folder of a language model, fetched from the hub if it is a hub id.

    Args:
        name: `builtin:language-model`, a folder, or a hub id.

    Returns:
        A folder with config.json, safetensors and a tokenizer.

    Raises:
        LanguageModelError: there is no such folder or id, or it lacks a part.
    """
    folder = _named_folder(name)
    if folder is not None:
        return check_folder(folder, name)
    try:
        folder = fetch_snapshot(name, _HUB_PATTERNS)
    except HubError as error:
        raise LanguageModelError(f"language model {name!r}: {error}") from error
    return check_folder(folder, name)


def local_folder(name: str) -> Path | None:
    """Where a language model's files are on this machine, whole or in part. Asks no network.

    Args:
        name: as `resolve_folder` takes it.

    Returns:
        A folder, or what the hub's client has fetched of a hub id; None where there is nothing of it.

    Raises:
        LanguageModelError: the name is neither a folder nor one that a hub id can have.
    """
    return _named_folder(name) or cached_snapshot(name)


def _named_folder(name: str) -> Path | None:
    """The folder that a name stands for; None for a hub id."""
    if name == BUILTIN_LANGUAGE_MODEL:
        return Path(__file__).parent / "assets" / "language-model"
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~", "builtin:")):
        raise LanguageModelError(
            f"language model {name!r}: no such folder. Expected {BUILTIN_LANGUAGE_MODEL!r}, 'smollm2-135m-instruct', a folder in transformers' "
            "layout or "
            "a hub id like 'owner/name'"
        )
    return None


def check_folder(folder: Path, name: str) -> Path:
    """A folder if it has all parts of a language model.

    Args:
        folder: to look at.
        name: how the user called it, for the message.

    Returns:
        The same folder.

    Raises:
        LanguageModelError: a part is missing.
    """
    parts = {
        "config.json": (folder / "config.json").is_file(),
        "weights (*.safetensors)": any(folder.glob("*.safetensors")),
        "a tokenizer (tokenizer.json or tokenizer.model)": any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model")),
    }
    if missing := [part for part, there in parts.items() if not there]:
        raise LanguageModelError(
            f"language model {name!r}: {folder} lacks {', '.join(missing)}; weights as .bin files are not read, "
            f"but `loupe convert-weights {name} FOLDER` makes safetensors of them"
        )
    if absent := absent_shards(folder):
        raise LanguageModelError(f"language model {name!r}: {folder} lacks {absent[0]}, which its index of weights names; copy or fetch it")
    if fault := unreadable_weights(folder):
        raise LanguageModelError(f"language model {name!r}: in {folder}, {fault}")
    return folder


def load_tokenizer(folder: Path, template: ChatTemplate | None = "own") -> Any:
    """The tokenizer of a language model, good for conversations.

    Args:
        folder: in transformers' layout.
        template: in which conversations are written; None leaves that to whoever asks for it by `with_template`.

    Returns:
        It, with an end token and, unless that is left, a chat template.

    Raises:
        LanguageModelError: it cannot be read, has no end token, or cannot speak the template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions for a damaged file
        raise LanguageModelError(f"language model {folder}: its tokenizer cannot be loaded ({first_line(error)})") from error
    if tokenizer.eos_token_id is None:
        raise LanguageModelError(f"language model {folder}: its tokenizer names no end token, so an answer would never end; set eos_token")
    try:
        return tokenizer if template is None else with_template(tokenizer, template)
    except LanguageModelError as error:
        raise LanguageModelError(f"language model {folder}: {error}") from error


def context_tokens(folder: Path) -> int:
    """Longest sequence that a language model's positions allow, by its config alone.

    Args:
        folder: in transformers' layout.

    Returns:
        Number of tokens; 2**20 where the config names no limit.

    Raises:
        LanguageModelError: the config cannot be read, or is of no causal language model that transformers knows.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise LanguageModelError(f"language model {folder}: its config.json cannot be read ({first_line(error)})") from error
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise LanguageModelError(f"language model {folder}: its config.json is of a {config.model_type!r}; it must be a causal language model")
    return _limit(config)


def _limit(config: Any) -> int:
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2**20)


def describe_folder(folder: Path, name: str) -> LanguageModelSpec:
    """The identity of the model in a folder.

    Args:
        folder: in transformers' layout.
        name: how the user calls it.

    Returns:
        The spec.

    Raises:
        LanguageModelError: a part is missing.
    """
    check_folder(folder, name)
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *(folder / part for part in _IDENTITY_FILES if (folder / part).is_file())]):
        with file.open("rb") as stream:
            digest.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()};".encode())
    return LanguageModelSpec(model=name, weights_sha256=digest.hexdigest())


def copy_model(source: Path, target: Path) -> None:
    """A model's files as they are: those that its digest covers, so that the copy has the same, and the index of weights in several files.

    Args:
        source: in transformers' layout.
        target: a folder that is not there yet.
    """
    target.mkdir(parents=True)
    names = [*source.glob("*.safetensors"), *source.glob("*.safetensors.index.json"), *(source / name for name in _IDENTITY_FILES)]
    for file in names:
        if file.is_file():
            shutil.copyfile(file, target / file.name)


def load_language_model(folder: Path, template: ChatTemplate = "own") -> LanguageModel:
    """Load a model with its tokenizer, in fp32 on the CPU, dropout off.

    Args:
        folder: in transformers' layout.
        template: in which its tokenizer writes conversations.

    Returns:
        The model.

    Raises:
        LanguageModelError: it cannot be read, cannot speak the template, or its logits are more than its head on its last hidden state.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # its bars would spoil ours
    tokenizer = load_tokenizer(folder, template)
    try:
        network = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, attn_implementation="sdpa"
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise LanguageModelError(f"language model {folder}: transformers cannot load it ({error}); it must be a causal language model") from error
    network.train(mode=False)
    loaded = LanguageModel(network=network, tokenizer=tokenizer, max_tokens=_limit(network.config))
    _check_head(loaded, folder)
    return loaded


@torch.no_grad()
def _check_head(model: LanguageModel, folder: Path) -> None:
    """Soft caps, scales and the like behind the head would silently be lost when hidden states are selected before it."""
    network: Any = model.network
    ids = torch.arange(3)[None] % network.config.vocab_size
    expected = network(input_ids=ids, use_cache=False).logits
    found = network.get_output_embeddings()(decoder(network)(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(expected, found, atol=1e-4, rtol=1e-4):
        raise LanguageModelError(
            f"language model {folder}: a {type(network).__name__} changes its logits behind the head (a soft cap or a scale), which Loupe's loss "
            "does not "
            "follow; use a model without"
        )


def checkpoint_layers(network: nn.Module) -> None:
    """Let the layers of a model forget their activations and compute them again for the backward pass: less memory, one more forward pass.

    Only the layers' own switch is set to training, without which transformers checkpoints nothing; dropout inside of them stays off.

    Args:
        network: a causal language model, in its evaluation mode.

    Raises:
        LanguageModelError: the model has no layers that can, or computes something else in training.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not getattr(network, "supports_gradient_checkpointing", False):
        raise LanguageModelError(f"a {type(network).__name__} cannot compute its layers again; set gradient_checkpointing=false")
    config: Any = network.config
    ids = torch.arange(3, device=next(network.parameters()).device)[None] % config.vocab_size
    with torch.no_grad():
        expected = decoder(network)(input_ids=ids, use_cache=False).last_hidden_state
    # Not reentrant, so that no input needs a gradient; its check of shapes does not know of parameters that ZeRO-3 has put away meanwhile.
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, "determinism_check": "none"})  # type: ignore[operator]
    for layer in layers:
        layer.training = True
    with torch.no_grad():
        found = decoder(network)(input_ids=ids, use_cache=False).last_hidden_state
    if not torch.equal(expected, found):
        raise LanguageModelError(
            f"gradient_checkpointing: the layers of a {type(network).__name__} compute something else in training (dropout, most likely), and "
            "results must not depend on this setting; set gradient_checkpointing=false"
        )


def hold_in(network: nn.Module, dtype: torch.dtype) -> None:
    """Hold a model's weights in another type, in place.

    Args:
        network: a causal language model.
        dtype: of its parameters afterwards. Buffers stay, as where transformers loads a model in a type: rotary frequencies that are rounded to bf16
            are off by up to 0.2 %, so that the angle of position 1000 may be off by a radian.
    """
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)


def multiplies_bf16(device: torch.device | str) -> bool:
    """Whether a device multiplies matrices of bf16 in hardware.

    Args:
        device: cpu or cuda.

    Returns:
        Whether it does: NVIDIA's from Ampere on, x86 with AVX-512 BF16 or AMX, ARM by what oneDNN says. Where it does not, torch still gives an
        answer, element by element: on a CPU with AVX2 alone a matrix product takes 6.3 times as long as in fp32 (4096 x 256 by 256 x 1024, two
        threads: 298 against 47 ms), and a training step of the demo 43 s in place of 3.
    """
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())  # noqa: SLF001 - torch tells it nowhere else
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001


def hold_rounded(network: nn.Module, *, native: bool) -> None:
    """Hold a model's weights as numbers of bf16, in place: the same numbers on every device, in the type that the device is fast with.

    Args:
        network: a causal language model.
        native: whether where it will compute multiplies bf16 in hardware. Else its numbers of bf16 are held in fp32, in twice the memory.
    """
    hold_in(network, torch.bfloat16)
    if not native:
        hold_in(network, torch.float32)


def decoder(network: nn.Module) -> Any:
    """The part of a causal language model below its head."""
    found: Any = getattr(network, str(network.base_model_prefix))
    return found


def embedding_rms(network: nn.Module) -> float:
    """Root mean square of the input embeddings: the scale in which visual tokens must start.

    Args:
        network: a causal language model.

    Returns:
        The root mean square over the whole table.
    """
    table: Float[Tensor, "vocabulary hidden"] = network.get_input_embeddings().weight  # type: ignore[operator]
    return float(table.detach().float().square().mean().sqrt())


def first_token(tokenizer: Any, text: str) -> int:
    """The first token of a text, e.g. of the separator.

    Args:
        tokenizer: whose.
        text: not empty.

    Returns:
        Its id.

    Raises:
        LanguageModelError: the text has no token.
    """
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise LanguageModelError(f"the separator {text!r} has no token in this tokenizer; choose another")
    return ids[0]


def embed(network: nn.Module, ids: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens hidden"]:
    """Input embeddings of tokens."""
    embedded: Tensor = network.get_input_embeddings()(ids)  # type: ignore[operator]
    return embedded
