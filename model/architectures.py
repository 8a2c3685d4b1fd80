"""Shapes of well-known encoders and language models, so that a run can be planned where their files are not.

Input: a hub id. Output: an EncoderSpec without a digest, or a LanguageModelShape; numbers of parameters follow by formula. Needs the standard library
alone. Invariant: what stands here describes and never identifies: the digest of a known encoder's weights is an UnknownDigest, which no key takes.

Source: the models' published configurations; tests hold every entry to transformers' own classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

from model.errors import closest
from model.specs import EncoderFamily, EncoderSpec, UnknownDigest

__all__ = [
    "LanguageModelArchitecture",
    "encoder_flops",
    "family_mean_std",
    "known_encoder",
    "known_encoders",
    "known_language_model",
    "known_language_models",
    "num_encoder_parameters",
    "prefix_tokens",
    "swiglu_width",
    "unknown_text",
]

Triple = tuple[float, float, float]


def family_mean_std(family: EncoderFamily) -> tuple[Triple, Triple]:
    """Mean and deviation of the pixels that a family was trained on, as its own preprocessor has them.

    Args:
        family: of encoders.

    Returns:
        Mean and deviation by channel, of pixels in 0..1.
    """
    match family:
        case "clip":
            return (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        case "siglip" | "siglip2":
            return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
        case "dinov2" | "dinov2_with_registers":
            return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        case _:
            assert_never(family)


def prefix_tokens(family: EncoderFamily, num_registers: int = 0) -> int:
    """Tokens before the patches.

    Args:
        family: of encoders.
        num_registers: register tokens, which only dinov2_with_registers has.

    Returns:
        CLS and registers; 0 for families without.
    """
    match family:
        case "clip" | "dinov2":
            return 1
        case "siglip" | "siglip2":
            return 0
        case "dinov2_with_registers":
            return 1 + num_registers
        case _:
            assert_never(family)


def swiglu_width(mlp_width: int) -> int:
    """Width of a SwiGLU part that stands for an MLP of this width: two thirds of it, rounded up to a multiple of 8.

    Args:
        mlp_width: what the MLP would have.

    Returns:
        Its width.

    Source: DINOv2's giant models.
    """
    return (int(mlp_width * 2 / 3) + 7) // 8 * 8


@dataclass(frozen=True, kw_only=True, slots=True)
class _Size:
    """What the encoders of one size have in common."""

    width: int
    num_blocks: int
    num_heads: int
    mlp_width: int
    activation: str


_CLIP_BASE = _Size(width=768, num_blocks=12, num_heads=12, mlp_width=3072, activation="quick_gelu")
_CLIP_LARGE = _Size(width=1024, num_blocks=24, num_heads=16, mlp_width=4096, activation="quick_gelu")

_CLIP: dict[str, tuple[_Size, int, int]] = {
    "openai/clip-vit-base-patch32": (_CLIP_BASE, 224, 32),
    "openai/clip-vit-base-patch16": (_CLIP_BASE, 224, 16),
    "openai/clip-vit-large-patch14": (_CLIP_LARGE, 224, 14),
    "openai/clip-vit-large-patch14-336": (_CLIP_LARGE, 336, 14),
}
"""Size, view_px, patch_px; so too below."""

_SIGLIP_BASE = _Size(width=768, num_blocks=12, num_heads=12, mlp_width=3072, activation="gelu_pytorch_tanh")
_SIGLIP_LARGE = _Size(width=1024, num_blocks=24, num_heads=16, mlp_width=4096, activation="gelu_pytorch_tanh")
_SIGLIP_SO400M = _Size(width=1152, num_blocks=27, num_heads=16, mlp_width=4304, activation="gelu_pytorch_tanh")
_SIGLIP_GIANT = _Size(width=1536, num_blocks=40, num_heads=16, mlp_width=6144, activation="gelu_pytorch_tanh")

_SIGLIP: dict[str, tuple[_Size, int, int]] = {
    **{f"google/siglip-base-patch16-{view_px}": (_SIGLIP_BASE, view_px, 16) for view_px in (224, 256, 384, 512)},
    **{f"google/siglip-large-patch16-{view_px}": (_SIGLIP_LARGE, view_px, 16) for view_px in (256, 384)},
    "google/siglip-so400m-patch14-384": (_SIGLIP_SO400M, 384, 14),
    # SigLIP 2 at a fixed resolution has the first one's architecture, and says so in its model_type.
    "google/siglip2-base-patch32-256": (_SIGLIP_BASE, 256, 32),
    **{f"google/siglip2-base-patch16-{view_px}": (_SIGLIP_BASE, view_px, 16) for view_px in (224, 256, 384, 512)},
    **{f"google/siglip2-large-patch16-{view_px}": (_SIGLIP_LARGE, view_px, 16) for view_px in (256, 384, 512)},
    **{f"google/siglip2-so400m-patch14-{view_px}": (_SIGLIP_SO400M, view_px, 14) for view_px in (224, 384)},
    **{f"google/siglip2-so400m-patch16-{view_px}": (_SIGLIP_SO400M, view_px, 16) for view_px in (256, 384, 512)},
    **{f"google/siglip2-giant-opt-patch16-{view_px}": (_SIGLIP_GIANT, view_px, 16) for view_px in (256, 384)},
}

_SIGLIP2: dict[str, tuple[_Size, int, int]] = {
    "google/siglip2-base-patch16-naflex": (_SIGLIP_BASE, 256, 16),
    "google/siglip2-so400m-patch16-naflex": (_SIGLIP_SO400M, 256, 16),
}

_DINO_SIZES = {
    "small": _Size(width=384, num_blocks=12, num_heads=6, mlp_width=1536, activation="gelu"),
    "base": _Size(width=768, num_blocks=12, num_heads=12, mlp_width=3072, activation="gelu"),
    "large": _Size(width=1024, num_blocks=24, num_heads=16, mlp_width=4096, activation="gelu"),
    "giant": _Size(width=1536, num_blocks=40, num_heads=24, mlp_width=swiglu_width(6144), activation="swiglu"),
}
_DINO: dict[str, tuple[_Size, int, int]] = {f"facebook/dinov2-{name}": (size, 224, 14) for name, size in _DINO_SIZES.items()}
_DINO_REGISTERS: dict[str, tuple[_Size, int, int]] = {f"facebook/dinov2-with-registers-{name}": (size, 224, 14) for name, size in _DINO_SIZES.items()}
_NUM_REGISTERS = 4

_DINO_TRAINED_PX = 518
"""Side of the grid of places that DINOv2's files hold, in pixels; their preprocessor cuts views of 224 px, for which it is interpolated."""

_ENCODERS: dict[EncoderFamily, dict[str, tuple[_Size, int, int]]] = {
    "clip": _CLIP,
    "siglip": _SIGLIP,
    "siglip2": _SIGLIP2,
    "dinov2": _DINO,
    "dinov2_with_registers": _DINO_REGISTERS,
}


def known_encoders() -> tuple[str, ...]:
    """The encoders whose shapes are known, by hub id."""
    return tuple(name for group in _ENCODERS.values() for name in group)


def unknown_text(name: str, known: Sequence[str]) -> str:
    """What to say of a model that a plan has nothing of.

    Args:
        name: that was asked for.
        known: names whose shapes are known.

    Returns:
        What was expected, the closest known name, and what to do.
    """
    return (
        f"expected a folder here, a model in the hub's cache here, or a known one, found neither; {closest(name, known)}a plan asks no network, and "
        f"takes a folder with its config.json. Known are {', '.join(known)}"
    )


def known_encoder(name: str) -> EncoderSpec | None:
    """What is known of an encoder without its files.

    Args:
        name: a hub id.

    Returns:
        Its spec with an unknown digest; None for one that is not known.
    """
    for family, group in _ENCODERS.items():
        if name in group:
            size, view_px, patch_px = group[name]
            mean, std = family_mean_std(family)
            return EncoderSpec(
                model=name,
                weights_sha256=UnknownDigest(f"the weights of {name}"),
                family=family,
                # so400m/14 at 384 px: 27 whole patches on a side, and 6 px that none of them covers.
                view_px=view_px,
                patch_px=patch_px,
                width=size.width,
                num_blocks=size.num_blocks,
                prefix_tokens=prefix_tokens(family, _NUM_REGISTERS),
                mean=mean,
                std=std,
                num_heads=size.num_heads,
                mlp_width=size.mlp_width,
                activation=size.activation,
                norm_eps=1e-5 if family == "clip" else 1e-6,
            )
    return None


def num_encoder_parameters(spec: EncoderSpec, num_blocks: int) -> int:
    """Parameters of an encoder that is cut off: its embeddings, and so many blocks. No final norm, head or mask token is among them.

    Args:
        spec: its shape.
        num_blocks: how many blocks are held.

    Returns:
        Their number. For DINOv2 the positions are those of 518 px, which its published files hold whatever the views are.
    """
    width, mlp = spec.width, spec.mlp_width
    patches = 3 * spec.patch_px**2 * width
    norms_and_attention = 2 * 2 * width + 4 * (width + 1) * width
    match spec.family:
        case "clip":
            embeddings = patches + width + (spec.num_patches + 1) * width + 2 * width  # no bias; CLS; the norm in front of the blocks
            block = norms_and_attention + (width + 1) * mlp + (mlp + 1) * width
        case "siglip" | "siglip2":
            embeddings = patches + width + spec.num_patches * width
            block = norms_and_attention + (width + 1) * mlp + (mlp + 1) * width
        case "dinov2" | "dinov2_with_registers":
            places = (_DINO_TRAINED_PX // spec.patch_px) ** 2 + 1
            embeddings = patches + width + (places + spec.prefix_tokens) * width
            gates = 2 if spec.activation == "swiglu" else 1
            block = norms_and_attention + gates * (width + 1) * mlp + (mlp + 1) * width + 2 * width  # and two layer scales
        case _:
            assert_never(spec.family)
    return embeddings + num_blocks * block


def encoder_flops(spec: EncoderSpec, num_blocks: int) -> int:
    """Floating-point operations of one view's way through an encoder's first blocks: two for every multiplication of a matrix product.

    Args:
        spec: its shape.
        num_blocks: how many blocks run.

    Returns:
        Their number; norms, activations and softmax are not counted. CLIP-L/14-336's 24 blocks take 382e9.
    """
    tokens, width = spec.num_patches + spec.prefix_tokens, spec.width
    matrices = 3 if spec.activation == "swiglu" else 2
    block = tokens * (4 * width**2 + matrices * width * spec.mlp_width) + 2 * tokens**2 * width
    return 2 * (spec.num_patches * 3 * spec.patch_px**2 * width + num_blocks * block)


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageModelArchitecture:
    """The shape of a causal language model."""

    family: Literal["llama", "qwen2", "phi"]
    """`llama`: no biases. `qwen2`: the same with biases at queries, keys and values. `phi`: biases everywhere, an MLP of two matrices, one norm a
    layer."""
    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_width: int
    vocabulary: int
    context_tokens: int
    """Longest sequence that its positions allow."""
    tied_embeddings: bool
    """Whether the head is the table of input embeddings."""

    @property
    def num_parameters(self) -> int:
        """Parameters by formula, tied ones counted once."""
        hidden, mlp = self.hidden, self.mlp_width
        head = hidden // self.num_heads
        queries, keys = self.num_heads * head, self.num_kv_heads * head
        attention = hidden * queries + 2 * hidden * keys + queries * hidden
        table = self.vocabulary * hidden
        match self.family:
            case "llama":
                layer = attention + 3 * hidden * mlp + 2 * hidden
                ends = hidden
            case "qwen2":
                layer = attention + queries + 2 * keys + 3 * hidden * mlp + 2 * hidden
                ends = hidden
            case "phi":
                layer = attention + queries + 2 * keys + hidden + 2 * hidden * mlp + mlp + hidden + 2 * hidden
                ends = 2 * hidden + self.vocabulary  # the last norm, and the head's biases
            case _:
                assert_never(self.family)
        return table + self.num_layers * layer + ends + (0 if self.tied_embeddings else table)


def _llama(
    hidden: int, num_layers: int, num_heads: int, num_kv_heads: int, mlp_width: int, vocabulary: int, context_tokens: int
) -> LanguageModelArchitecture:
    return LanguageModelArchitecture(
        family="llama",
        hidden=hidden,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        mlp_width=mlp_width,
        vocabulary=vocabulary,
        context_tokens=context_tokens,
        tied_embeddings=False,
    )


def _qwen2(
    hidden: int, num_layers: int, num_heads: int, num_kv_heads: int, mlp_width: int, vocabulary: int, *, tied: bool
) -> LanguageModelArchitecture:
    return LanguageModelArchitecture(
        family="qwen2",
        hidden=hidden,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        mlp_width=mlp_width,
        vocabulary=vocabulary,
        context_tokens=32768,
        tied_embeddings=tied,
    )


_LANGUAGE_MODELS: dict[str, LanguageModelArchitecture] = {
    "lmsys/vicuna-7b-v1.5": _llama(4096, 32, 32, 32, 11008, 32000, 4096),
    "lmsys/vicuna-13b-v1.5": _llama(5120, 40, 40, 40, 13824, 32000, 4096),
    "meta-llama/Meta-Llama-3-8B-Instruct": _llama(4096, 32, 32, 8, 14336, 128256, 8192),
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen2(896, 24, 14, 2, 4864, 151936, tied=True),
    "Qwen/Qwen2.5-1.5B-Instruct": _qwen2(1536, 28, 12, 2, 8960, 151936, tied=True),
    "Qwen/Qwen2.5-3B-Instruct": _qwen2(2048, 36, 16, 2, 11008, 151936, tied=True),
    "Qwen/Qwen2.5-7B-Instruct": _qwen2(3584, 28, 28, 4, 18944, 152064, tied=False),
    "microsoft/phi-2": LanguageModelArchitecture(
        family="phi",
        hidden=2560,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        mlp_width=10240,
        vocabulary=51200,
        context_tokens=2048,
        tied_embeddings=False,
    ),
    # Under the name that it has here; it is HuggingFaceTB/SmolLM2-135M-Instruct.
    "smollm2-135m-instruct": LanguageModelArchitecture(
        family="llama",
        hidden=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        mlp_width=1536,
        vocabulary=49152,
        context_tokens=8192,
        tied_embeddings=True,
    ),
}


def known_language_models() -> tuple[str, ...]:
    """The language models whose shapes are known, by name."""
    return tuple(_LANGUAGE_MODELS)


def known_language_model(name: str) -> LanguageModelArchitecture | None:
    """What is known of a language model without its files.

    Args:
        name: a hub id, or `smollm2-135m-instruct`.

    Returns:
        Its shape; None for one that is not known.
    """
    return _LANGUAGE_MODELS.get(name)
