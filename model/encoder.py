"""The frozen vision encoder: from uint8 views to named maps.

Loads CLIP and SigLIP vision towers in the Hugging Face format, cut off behind the deepest layer that a map needs, so later blocks are neither held
nor run. Maps are reduced on the device in fp32, with the prefix tokens stripped: nobody downstream knows that a CLS token exists.

Layer numbering as in model.specs: 0 = embedding output (for CLIP behind its first norm), k = output of block k.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from model.errors import EncoderError, first_line
from model.specs import EncoderSpec, MapSpec
from model.weights import unreadable_weights

__all__ = ["Encoder", "describe_encoder", "encoder_folder", "load_encoder", "resolve_encoder"]

Family = Literal["clip", "siglip"]

BUILTIN_PREFIX = "builtin:"

_FAMILIES: dict[str, Family] = {
    "clip": "clip",
    "clip_vision_model": "clip",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
}
"""`model_type` in config.json to the family. A full model's vision part is taken."""

_PREFIX_TOKENS: dict[Family, int] = {"clip": 1, "siglip": 0}

_DEFAULT_MEAN_STD: dict[Family, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Of the families' own preprocessors, for folders without a preprocessor_config.json."""

_UNSAFE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def resolve_encoder(name: str) -> str:
    """Where an encoder's name points.

    Args:
        name: `builtin:vision-encoder`, a folder, or a hub id such as `openai/clip-vit-large-patch14-336`.

    Returns:
        A folder's path, or the hub id as it is.

    Raises:
        EncoderError: a builtin that does not exist, or a path to nothing.
    """
    if name.startswith(BUILTIN_PREFIX):
        assets = Path(__file__).parent / "assets"
        folder = assets / name.removeprefix(BUILTIN_PREFIX)
        if not (folder / "config.json").is_file():
            known = sorted(BUILTIN_PREFIX + path.parent.name for path in assets.glob("*/config.json") if _is_vision_config(path))
            raise EncoderError(
                f"there is no encoder {name!r}; builtin encoders are {known or 'none in this installation'}, or give a folder or a hub id"
            )
        return str(folder)
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    is_hub_id = name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not path.exists()
    if not is_hub_id or not name:
        raise EncoderError(
            f"encoder {name!r}: expected a folder with config.json and *.safetensors, a hub id or a builtin name, found no such folder"
        )
    return name


def encoder_folder(name: str) -> Path:
    """The local folder of an encoder; a hub id is fetched into the Hugging Face cache, safetensors only.

    Args:
        name: as `resolve_encoder` takes it.

    Returns:
        A folder with config.json and at least one *.safetensors file.

    Raises:
        EncoderError: the folder is incomplete or its weights are no whole safetensors, or the hub does not give it.
    """
    resolved = resolve_encoder(name)
    folder = Path(resolved)
    if not folder.is_dir():
        folder = _fetch(resolved)
    if not (folder / "config.json").is_file():
        raise EncoderError(
            f"encoder {name!r}: expected config.json and *.safetensors in {folder}, found no config.json; point to a complete model folder"
        )
    if not list(folder.glob("*.safetensors")):
        unsafe = sorted(path.name for pattern in _UNSAFE_PATTERNS for path in folder.glob(pattern))
        if unsafe:
            raise EncoderError(
                f"encoder {name!r}: expected weights as *.safetensors in {folder}, found {', '.join(unsafe)}. Pickled weights can run code when they "
                "are loaded, so Loupe never does; convert them with save_pretrained where you trust them, or choose a repository with safetensors."
            )
        raise EncoderError(
            f"encoder {name!r}: expected weights as *.safetensors (for example model.safetensors) in {folder}, found none; "
            "copy the weights there or point to a complete model folder"
        )
    if fault := unreadable_weights(folder):
        raise EncoderError(f"encoder {name!r}: in {folder}, {fault}")
    return folder


def describe_encoder(model: str) -> EncoderSpec:
    """The identity and shape of an encoder, from its config and the bytes of its weights.

    Args:
        model: builtin name, folder or hub id.

    Returns:
        The spec; `weights_sha256` is the digest of the weight file, or over the digests of several in name order.

    Raises:
        EncoderError: a folder without config or weights, an unknown family, views that are not square or not whole patches.
    """
    folder = encoder_folder(model)
    family = _family(_read_json(folder / "config.json"), folder)
    loaded = _vision_config(folder, family)
    view_px, patch_px = int(loaded.image_size), int(loaded.patch_size)
    if view_px % patch_px:
        raise EncoderError(f"encoder {model!r}: views of {view_px} px are not whole patches of {patch_px} px; such an encoder is not supported")
    mean, std = _mean_std(folder, family)
    return EncoderSpec(
        model=model,
        weights_sha256=_weights_sha256(folder),
        family=family,
        view_px=view_px,
        patch_px=patch_px,
        width=int(loaded.hidden_size),
        num_blocks=int(loaded.num_hidden_layers),
        prefix_tokens=_PREFIX_TOKENS[family],
        mean=mean,
        std=std,
        num_heads=int(loaded.num_attention_heads),
        mlp_width=int(loaded.intermediate_size),
        activation=str(loaded.hidden_act),
        norm_eps=float(loaded.layer_norm_eps),
    )


class Encoder(nn.Module):
    """A vision tower cut off behind the deepest layer that is needed. Make it with `load_encoder`.

    Args:
        tower: a CLIP or SigLIP vision model, still whole; it is cut in place.
        spec: its description.
        deepest_layer: highest layer number that a map may ask for.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, tower: Any, spec: EncoderSpec, deepest_layer: int) -> None:
        super().__init__()
        if not 0 <= deepest_layer <= spec.num_blocks:
            raise EncoderError(f"{spec.model} has layers 0..{spec.num_blocks}, asked for {deepest_layer}")
        self.spec = spec
        self.deepest_layer = deepest_layer
        self.embeddings: nn.Module = tower.embeddings
        # SigLIP has no norm in front of its blocks.
        self.first_norm: nn.Module = getattr(tower, "pre_layrnorm", None) or nn.Identity()
        tower.encoder.layers = tower.encoder.layers[:deepest_layer]
        self.encoder: nn.Module = tower.encoder
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks that were kept, shallow to deep."""
        return list(self.encoder.get_submodule("layers").children())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mean.device

    def normalise(self, views_uint8: UInt8[Tensor, "batch 3 px px"]) -> Float[Tensor, "batch 3 px px"]:
        """Pixels as the tower wants them: scaled to 0..1, minus the mean, over the deviation, on the tower's device in its dtype.

        Args:
            views_uint8: [batch, 3, view_px, view_px].

        Returns:
            [batch, 3, view_px, view_px] in the tower's dtype.
        """
        scaled = views_uint8.to(self.device).to(torch.float32) * (1 / 255)
        return ((scaled - self.mean) / self.std).to(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.embeddings.parameters()).dtype

    @torch.inference_mode()
    def forward(self, views_uint8: UInt8[Tensor, "batch 3 px px"], maps: Sequence[MapSpec]) -> dict[str, Float[Tensor, "batch patches width"]]:
        """Encode views and reduce the hidden states to maps.

        Args:
            views_uint8: [batch, 3, view_px, view_px].
            maps: which maps; each map's layers must lie within 0..deepest_layer.

        Returns:
            fp32 [batch, patches, width] by map name, on the tower's device, prefix tokens stripped.

        Raises:
            EncoderError: a map needs a layer that was cut off, or the views have another size.
        """
        if views_uint8.shape[-1] != self.spec.view_px:
            raise EncoderError(f"{self.spec.model} sees views of {self.spec.view_px} px, found {views_uint8.shape[-1]}")
        deepest = max((layer for item in maps for layer in item.layers), default=0)
        if deepest > self.deepest_layer:
            raise EncoderError(f"this encoder was loaded up to layer {self.deepest_layer}, but a map needs layer {deepest}; load it deeper")
        sums: dict[str, Tensor] = {}

        def reduce(layer: int, state: Tensor) -> None:
            wanted = [item for item in maps if layer in item.layers]
            if not wanted:
                return
            patches = state[:, self.spec.prefix_tokens :].to(torch.float32)
            for item in wanted:
                sums[item.name] = patches if item.name not in sums else sums[item.name] + patches

        hooks = [
            block.register_forward_hook(
                lambda _module, _inputs, output, layer=layer: reduce(layer, output[0] if isinstance(output, tuple) else output)
            )
            for layer, block in enumerate(self.blocks, start=1)
        ]
        try:
            embedded = self.first_norm(self.embeddings(self.normalise(views_uint8)))
            reduce(0, embedded)
            if deepest > 0:
                self.encoder(inputs_embeds=embedded)
        finally:
            for hook in hooks:
                hook.remove()
        return {item.name: (sums[item.name] / len(item.layers)).contiguous() for item in maps}


def load_encoder(spec: EncoderSpec, deepest_layer: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Encoder:
    """Load a tower as its spec describes it, after proving that its weights are the ones in the spec.

    Args:
        spec: from `describe_encoder`.
        deepest_layer: highest layer number that a map will ask for; blocks behind it are dropped.
        device: torch device.
        dtype: of weights and activations; maps are fp32 whatever this is.

    Returns:
        The encoder, in evaluation mode, without gradients.

    Raises:
        EncoderError: the folder is incomplete, its weights or its config are others than the spec's, or tensors are missing in them.
    """
    from transformers import CLIPVisionModel, SiglipVisionModel
    from transformers.utils import logging

    transformers_logging: Any = logging
    folder = encoder_folder(spec.model)
    found = describe_encoder(spec.model)
    if found != spec:
        changed = ", ".join(
            f"{field.name} {getattr(spec, field.name)!s:.16} to {getattr(found, field.name)!s:.16}"
            for field in fields(spec)
            if getattr(spec, field.name) != getattr(found, field.name)
        )
        raise EncoderError(
            f"encoder {spec.model!r}: {folder} was changed after the spec was made ({changed}); restore it, or take it as another one (a new cache)"
        )
    kinds: dict[Family, Any] = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it lists a full model's unused text weights; missing ones are checked below
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        tower, report = kinds[spec.family].from_pretrained(
            folder, config=_vision_config(folder, spec.family), use_safetensors=True, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise EncoderError(f"encoder {spec.model!r} cannot be loaded from {folder}: {first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()
    # A tensor that is missing would be left at random values: features without meaning, and no sign of it.
    needed = [name for name in report["missing_keys"] if not name.startswith("head.") and "post_layernorm" not in name and "position_ids" not in name]
    if needed or report.get("mismatched_keys"):
        first = min(map(str, needed or report["mismatched_keys"]))
        raise EncoderError(
            f"encoder {spec.model!r}: the weights in {folder} lack tensors of the vision tower, first {first}; the folder's config.json and weights "
            "do not belong together"
        )
    return Encoder(tower, spec, deepest_layer).to(device)


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(hub_id, allow_patterns=["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"])
        )
    except Exception as error:
        # The hub client raises its own, httpx's and OS errors; for a user they are one: it cannot be had.
        raise EncoderError(
            f"encoder {hub_id!r}: expected a folder here or a model on the hub, found neither ({type(error).__name__}: "
            f"{first_line(error)}). Check the name, or download the model and give its folder."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EncoderError(f"{path} should be JSON but cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise EncoderError(f"{path} should hold a JSON object, found {type(value).__name__}")
    return value


def _is_vision_config(path: Path) -> bool:
    return _read_json(path).get("model_type") in _FAMILIES


def _family(config: dict[str, Any], folder: Path) -> Family:
    model_type = config.get("model_type")
    if model_type not in _FAMILIES:
        raise EncoderError(
            f"{folder}/config.json: expected a model_type out of {sorted(_FAMILIES)}, found {model_type!r}; only CLIP and SigLIP towers load"
        )
    return _FAMILIES[model_type]


def _vision_config(folder: Path, family: Family) -> Any:
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    kinds: dict[Family, Any] = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
    try:
        # A full model's config.json holds the vision part in `vision_config`; from_pretrained takes it out.
        return kinds[family].from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise EncoderError(f"{folder}/config.json describes no {family} vision tower: {first_line(error)}") from error


def _mean_std(folder: Path, family: Family) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    mean, std = _DEFAULT_MEAN_STD[family]
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return mean, std
    config = _read_json(path)

    def triple(key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
        value = config.get(key)
        if value is None:
            return default
        if not isinstance(value, list) or len(value) != 3:
            raise EncoderError(f"{path}: {key} should be three numbers, found {value!r}")
        red, green, blue = (float(item) for item in value)
        return (red, green, blue)

    return triple("image_mean", mean), triple("image_std", std)


def _weights_sha256(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
    if len(digests) == 1:
        return digests[0][1]
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in digests).encode()).hexdigest()
