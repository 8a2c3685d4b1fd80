"""The frozen vision encoder: from uint8 views to named maps.

Loads CLIP, SigLIP, SigLIP 2 and DINOv2 vision towers in the Hugging Face format, cut off behind the deepest layer that a map needs: later blocks,
final norms, pooling heads and text towers are neither held nor run. Maps are reduced on the device in fp32, with the prefix tokens stripped: nobody
downstream knows that a CLS token or a register exists.

Layer numbering as in model.specs: 0 = embedding output (for CLIP behind its first norm), k = output of block k. No final norm touches any map.

A family of encoders is a word of `EncoderFamily`; what differs among them stands in the `match` statements of this module and of
model.architectures, and each ends in `assert_never`.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields
from math import isqrt
from pathlib import Path
from typing import Any, assert_never

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from model.architectures import family_mean_std, known_encoder, known_encoders, prefix_tokens, swiglu_width, unknown_text
from model.errors import EncoderError, HubError, first_line
from model.specs import Compute, EncoderFamily, EncoderSpec, MapSpec, UnknownDigest, deepest_layer
from model.weights import absent_shards, cached_snapshot, fetch_snapshot, unreadable_weights

__all__ = ["Encoder", "compute_dtype", "describe_encoder", "encoder_folder", "load_encoder", "plan_encoder", "resolve_encoder"]

BUILTIN_PREFIX = "builtin:"

_FAMILIES: dict[str, EncoderFamily] = {
    "clip": "clip",
    "clip_vision_model": "clip",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "siglip2": "siglip2",
    "siglip2_vision_model": "siglip2",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2_with_registers",
}
"""`model_type` in config.json to the family. A full model's vision part is taken."""

_HUB_PATTERNS = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")
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
        try:
            folder = fetch_snapshot(resolved, _HUB_PATTERNS)
        except HubError as error:
            raise EncoderError(f"encoder {name!r}: {error}") from error
    if not (folder / "config.json").is_file():
        raise EncoderError(
            f"encoder {name!r}: expected config.json and *.safetensors in {folder}, found no config.json; point to a complete model folder"
        )
    _check_weights(folder, name)
    return folder


def _check_weights(folder: Path, name: str) -> None:
    if not list(folder.glob("*.safetensors")):
        if unsafe := _unsafe_weights(folder):
            raise EncoderError(
                f"encoder {name!r}: expected weights as *.safetensors in {folder}, found {', '.join(unsafe)}. Pickled weights can run code when they "
                f"are loaded, so Loupe never does; `loupe convert-weights {name} FOLDER` makes safetensors of them, reading tensors alone"
            )
        raise EncoderError(
            f"encoder {name!r}: expected weights as *.safetensors (for example model.safetensors) in {folder}, found none; copy the weights there, "
            f"point to a complete model folder, or, of a model that is published as .bin files, `loupe convert-weights {name} FOLDER` once"
        )
    if absent := absent_shards(folder):
        raise EncoderError(f"encoder {name!r}: expected all weights that the index in {folder} names, found no {absent[0]}; copy or fetch it")
    if fault := unreadable_weights(folder):
        raise EncoderError(f"encoder {name!r}: in {folder}, {fault}")


def describe_encoder(model: str) -> EncoderSpec:
    """The identity and shape of an encoder, from its config and the bytes of its weights.

    Args:
        model: builtin name, folder or hub id.

    Returns:
        The spec; `weights_sha256` is the digest of the weight file, or over the digests of several in name order.

    Raises:
        EncoderError: a folder without config or weights, an unknown family, views that are not square or less than a patch.
    """
    folder = encoder_folder(model)
    return _described(model, folder, _weights_sha256(folder))


def plan_encoder(model: str) -> EncoderSpec:
    """What is known of an encoder on this machine without fetching anything: for a plan, which needs shapes and no weights.

    Args:
        model: as `resolve_encoder` takes it.

    Returns:
        The spec as `describe_encoder` gives it where the weights are here. Where there is a config.json alone, or a hub id whose architecture is
        known and nothing else, `weights_sha256` is an UnknownDigest.

    Raises:
        EncoderError: as for `describe_encoder`; a hub id that is neither known nor in the hub's cache here.
    """
    resolved = resolve_encoder(model)
    is_folder = Path(resolved).is_dir()
    folder = Path(resolved) if is_folder else cached_snapshot(resolved)
    if folder is None or (not is_folder and not (folder / "config.json").is_file()):
        known = known_encoder(resolved)
        if known is None:
            raise EncoderError(f"encoder {model!r}: {unknown_text(model, known_encoders())}")
        return known
    has_weights = any(folder.glob("*.safetensors")) and not absent_shards(folder)
    if not has_weights and (folder / "config.json").is_file() and not (is_folder and _unsafe_weights(folder)):
        return _described(model, folder, UnknownDigest(f"the weights of {model}"))
    if is_folder:
        return describe_encoder(model)
    _check_weights(folder, model)
    return _described(model, folder, _weights_sha256(folder))


def _unsafe_weights(folder: Path) -> list[str]:
    return sorted(path.name for pattern in _UNSAFE_PATTERNS for path in folder.glob(pattern))


def _described(model: str, folder: Path, weights_sha256: str) -> EncoderSpec:
    family = _family(_read_json(folder / "config.json"), folder)
    config = _vision_config(folder, family)
    patch_px = _side(config.patch_size, "patch_size", folder)
    view_px = _view_px(config, family, patch_px, folder)
    if view_px < patch_px:
        raise EncoderError(f"encoder {model!r}: expected views of at least one patch, found views of {view_px} px and patches of {patch_px} px")
    mean, std = _mean_std(folder, family)
    mlp_width, activation = _mlp(config, family)
    return EncoderSpec(
        model=model,
        weights_sha256=weights_sha256,
        family=family,
        view_px=view_px,
        patch_px=patch_px,
        width=int(config.hidden_size),
        num_blocks=int(config.num_hidden_layers),
        prefix_tokens=prefix_tokens(family, int(config.num_register_tokens) if family == "dinov2_with_registers" else 0),
        mean=mean,
        std=std,
        num_heads=int(config.num_attention_heads),
        mlp_width=mlp_width,
        activation=activation,
        norm_eps=float(config.layer_norm_eps),
    )


def _side(value: Any, key: str, folder: Path) -> int:
    """A side that a config gives as one number or as two equal ones."""
    match value:
        case {"height": height, "width": width}:
            sides = [height, width]
        case [height, width]:
            sides = [height, width]
        case _:
            sides = [value, value]
    side = sides[0]
    if not isinstance(side, int) or isinstance(side, bool) or side < 1 or side != sides[1]:
        raise EncoderError(f"encoder in {folder}: {key} should be a side in pixels, the same both ways, found {value!r}; views are square")
    return side


def _view_px(config: Any, family: EncoderFamily, patch_px: int, folder: Path) -> int:
    """Side of the square view that an encoder sees."""
    match family:
        case "clip" | "siglip":
            return _side(config.image_size, "image_size", folder)
        case "siglip2":
            # It takes any shape of as many patches; its own positions are a square grid, for which nothing has to be interpolated.
            grid = isqrt(int(config.num_patches))
            if grid**2 != config.num_patches:
                raise EncoderError(f"encoder in {folder}: num_patches should be a square number, found {config.num_patches}; views are square")
            return grid * patch_px
        case "dinov2" | "dinov2_with_registers":
            # Trained at 518 px, used at the preprocessor's 224 px: transformers interpolates the positions.
            path = folder / "preprocessor_config.json"
            crop = _read_json(path).get("crop_size") if path.is_file() else None
            return _side(config.image_size, "image_size", folder) if crop is None else _side(crop, "crop_size", folder)
        case _:
            assert_never(family)


def _mlp(config: Any, family: EncoderFamily) -> tuple[int, str]:
    """Width and activation of a block's MLP."""
    match family:
        case "clip" | "siglip" | "siglip2":
            return int(config.intermediate_size), str(config.hidden_act)
        case "dinov2" | "dinov2_with_registers":
            width = int(config.hidden_size * config.mlp_ratio)
            return (swiglu_width(width), "swiglu") if config.use_swiglu_ffn else (width, str(config.hidden_act))
        case _:
            assert_never(family)


class Encoder(nn.Module):
    """A vision tower cut off behind the deepest layer that is needed. Make it with `load_encoder`.

    Args:
        tower: a vision model of the spec's family, with at least as many blocks as are needed; it is cut in place.
        spec: its description.
        deepest_layer: highest layer number that a map may ask for.

    Attributes:
        blocks: those that were kept, shallow to deep.
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
        self.first_norm: nn.Module | None = tower.pre_layrnorm if spec.family == "clip" else None
        self.blocks = nn.ModuleList(_tower_blocks(tower, spec.family)[:deepest_layer])
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

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
        return ((scaled - self.mean) / self.std).to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and hidden states."""
        return next(self.embeddings.parameters()).dtype

    @torch.inference_mode()
    def forward(self, views_uint8: UInt8[Tensor, "batch 3 px px"], maps: Sequence[MapSpec]) -> dict[str, Float[Tensor, "batch _tokens width"]]:
        """Encode views and reduce the hidden states to maps.

        Args:
            views_uint8: [batch, 3, view_px, view_px].
            maps: which maps; each map's layers must lie within 0..deepest_layer.

        Returns:
            fp32 [batch, tokens, width] by map name, on the tower's device, prefix tokens stripped; as many tokens as patches, or squares of them.

        Raises:
            EncoderError: a map needs a layer that was cut off, or the views have another size.
        """
        if views_uint8.shape[-1] != self.spec.view_px:
            raise EncoderError(f"{self.spec.model} sees views of {self.spec.view_px} px, found {views_uint8.shape[-1]}")
        deepest = deepest_layer(maps)
        if deepest > self.deepest_layer:
            raise EncoderError(f"this encoder was loaded up to layer {self.deepest_layer}, but a map needs layer {deepest}; load it deeper")
        sums: dict[str, Tensor] = {}

        def reduce(layer: int, state: Tensor) -> None:
            wanted = [item for item in maps if layer in item.layers]
            if not wanted:
                return
            patches = state[:, self.spec.prefix_tokens :]
            for item in wanted:
                if item.name in sums:
                    sums[item.name].add_(patches)  # in fp32, whatever is added
                else:
                    sums[item.name] = patches.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

        state = self._embed(self.normalise(views_uint8))
        reduce(0, state)
        for layer, block in enumerate(list(self.blocks)[:deepest], start=1):
            state = block(state, attention_mask=None)
            reduce(layer, state)
        return {item.name: _pooled(sums[item.name].div_(len(item.layers)), item.pool) for item in maps}

    def _embed(self, pixels: Float[Tensor, "batch 3 px px"]) -> Float[Tensor, "batch tokens width"]:
        """Layer 0, prefix tokens included."""
        embedded: Tensor
        match self.spec.family:
            case "clip":
                assert self.first_norm is not None
                embedded = self.first_norm(self.embeddings(pixels))
            case "siglip" | "dinov2" | "dinov2_with_registers":
                embedded = self.embeddings(pixels)
            case "siglip2":
                # Every patch of a square view is real, so the attention mask that NaFlex has for shorter images would hide nothing: there is none.
                grid = torch.tensor([[self.spec.grid, self.spec.grid]], device=pixels.device).expand(len(pixels), 2)
                embedded = self.embeddings(_patchify(pixels, self.spec.patch_px), grid)
            case _:
                assert_never(self.spec.family)
        return embedded


def _pooled(tokens: Float[Tensor, "batch patches width"], pool: int) -> Float[Tensor, "batch tokens width"]:
    """Means of squares of patches, row by row."""
    if pool == 1:
        return tokens
    grid = isqrt(tokens.shape[1]) // pool
    squares: Tensor = tokens.reshape(len(tokens), grid, pool, grid, pool, tokens.shape[2])
    return squares.mean(dim=(2, 4)).flatten(1, 2)


def _tower_blocks(tower: Any, family: EncoderFamily) -> list[nn.Module]:
    match family:
        case "clip" | "siglip" | "siglip2":
            return list(tower.encoder.layers)
        case "dinov2" | "dinov2_with_registers":
            return list(tower.encoder.layer)
        case _:
            assert_never(family)


def _patchify(pixels: Float[Tensor, "batch 3 px px"], patch_px: int) -> Float[Tensor, "batch patches values"]:
    """Whole patches, row by row; within a patch row by row too, with a pixel's channels side by side."""
    count, channels, grid = pixels.shape[0], pixels.shape[1], pixels.shape[-1] // patch_px
    cut = pixels.reshape(count, channels, grid, patch_px, grid, patch_px)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(count, grid * grid, patch_px * patch_px * channels)


_DTYPES: dict[Compute, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_dtype(compute: Compute, device: str, *, or_wider: bool = False) -> torch.dtype:
    """The type in which an encoder computes.

    Args:
        compute: of a feature spec.
        device: torch device.
        or_wider: fp32 where the device is no good at it: for an export, which has to answer wherever it was carried.

    Returns:
        torch's type.

    Raises:
        EncoderError: fp16 on a CPU. Without instructions for it torch goes through fp32 and back: on an AVX2 core, in fp32's time, products of
            matrices take 5.5 times as long, the patches' convolution 25 times, and its range overflows all the same.
    """
    if compute == "fp16" and torch.device(device).type == "cpu":
        if or_wider:
            return torch.float32
        raise EncoderError(
            "features.compute = 'fp16' needs a GPU: on a CPU torch computes in it several times slower than in fp32; encode on a GPU, or use "
            "compute = 'fp32' or 'bf16'"
        )
    return _DTYPES[compute]


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
    import transformers
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
    if not 0 <= deepest_layer <= spec.num_blocks:
        raise EncoderError(f"{spec.model} has layers 0..{spec.num_blocks}, asked for {deepest_layer}")
    config = _cut_config(_vision_config(folder, spec.family), spec.family, deepest_layer)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it lists a full model's unused text weights; missing ones are checked below
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model_class = getattr(transformers, _class_names(spec.family)[1])
        tower, report = model_class.from_pretrained(
            folder, config=config, use_safetensors=True, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise EncoderError(f"encoder {spec.model!r} cannot be loaded from {folder}: {first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()
    # A tensor that is missing would be left at random values: features without meaning, and no sign of it.
    needed = sorted(str(name) for name in (*report["missing_keys"], *report.get("mismatched_keys", ())) if _is_needed(str(name)))
    if needed:
        raise EncoderError(
            f"encoder {spec.model!r}: the weights in {folder} lack tensors of the vision tower, or have them in another shape, first {needed[0]}; "
            "the folder's config.json and weights do not belong together"
        )
    if torch.device(device).type == "cuda":
        # By default cuDNN convolves fp32 with the ten bits of TF32, and the patches' embedding is a convolution.
        torch.backends.cudnn.allow_tf32 = False
    return Encoder(tower, spec, deepest_layer).to(device)


def _cut_config(config: Any, family: EncoderFamily, deepest_layer: int) -> Any:
    """The config of a tower without what no map needs, so that it is not even read: blocks behind the deepest layer, heads, the mask token."""
    config.num_hidden_layers = deepest_layer
    match family:
        case "clip" | "dinov2_with_registers":
            pass
        case "siglip" | "siglip2":
            config.vision_use_head = False
        case "dinov2":
            config.use_mask_token = False
        case _:
            assert_never(family)
    return config


def _is_needed(tensor: str) -> bool:
    """Whether maps depend on a tensor: not on a final norm, and not on the mask token, which stands for hidden patches in pretraining."""
    return tensor.startswith(("embeddings.", "pre_layrnorm.", "encoder.")) and not tensor.endswith(("mask_token", "position_ids"))


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


def _family(config: dict[str, Any], folder: Path) -> EncoderFamily:
    model_type = config.get("model_type")
    if model_type not in _FAMILIES:
        raise EncoderError(
            f"{folder}/config.json: expected a model_type out of {sorted(_FAMILIES)}, found {model_type!r}; only CLIP, SigLIP, SigLIP 2 "
            "and DINOv2 towers load"
        )
    return _FAMILIES[model_type]


def _class_names(family: EncoderFamily) -> tuple[str, str]:
    """The classes in transformers of the vision part: its config and its model.

    By name, since asking for a model imports it, which takes two seconds that a description has no need of.
    """
    match family:
        case "clip":
            return "CLIPVisionConfig", "CLIPVisionModel"
        case "siglip":
            return "SiglipVisionConfig", "SiglipVisionModel"
        case "siglip2":
            return "Siglip2VisionConfig", "Siglip2VisionModel"
        case "dinov2":
            return "Dinov2Config", "Dinov2Model"
        case "dinov2_with_registers":
            return "Dinov2WithRegistersConfig", "Dinov2WithRegistersModel"
        case _:
            assert_never(family)


def _vision_config(folder: Path, family: EncoderFamily) -> Any:
    import transformers

    try:
        # A full model's config.json holds the vision part in `vision_config`; from_pretrained takes it out.
        return getattr(transformers, _class_names(family)[0]).from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise EncoderError(f"{folder}/config.json describes no {family} vision tower: {first_line(error)}") from error


def _mean_std(folder: Path, family: EncoderFamily) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    mean, std = family_mean_std(family)
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
