"""Folding: a trained connector becomes, exactly, the projector of transformers' own LLaVA or LLaVA-NeXT.

Both read several hidden states side by side, then Linear, GELU, Linear. A fusion of means, the standardisation and the tokens' scale are affine maps
in front of the first linear layer and behind the second, so they fold into the two:

    fused map m = mean of its layers     weight of layer l = sum over the maps that hold l of W1[m] * scale[m] / size of m
    (x - mean) * scale                   bias = b1 - W1 * scale * mean
    tokens * token_scale                 W2 * token_scale, b2 * token_scale

Input: a connector. Output: the layers to read, ascending, each once, and the two linear layers. Invariant: what cannot be folded exactly is refused
with every reason; nothing is approximated. Computed in double precision, given in single. Not folded, since stock models do not do it: the rounding
of features to fp16 that a cache applies in training.

Source: transformers' LlavaMultiModalProjector and LlavaNextMultiModalProjector, whose `vision_feature_layer` takes a list.
"""

from dataclasses import dataclass
from typing import assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from model.connector import Connector
from model.errors import FoldingError
from model.specs import ConnectorSpec, EncoderSpec, MLPSpec, STISpec, StockForm
from model.views import ViewSpec

__all__ = ["STOCK_CLASSES", "STOCK_TOWERS", "FoldedProjector", "check_foldable", "fold_connector"]

STOCK_CLASSES: dict[StockForm, str] = {"llava-hf": "LlavaForConditionalGeneration", "llava-next-hf": "LlavaNextForConditionalGeneration"}
"""The class in transformers that each form is written for."""

STOCK_TOWERS: dict[str, str] = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel", "dinov2": "Dinov2Model"}
"""The class in transformers of every encoder family that takes plain pixels and gives hidden states, as both stock models want it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldedProjector:
    """What stock LLaVA's projector holds."""

    layers: tuple[int, ...]
    """Hidden states to read, ascending, each once; 0 = embedding output."""
    weight_1: Float[Tensor, "hidden wide"]
    """Columns layer by layer."""
    bias_1: Float[Tensor, "hidden"]
    weight_2: Float[Tensor, "hidden hidden"]
    bias_2: Float[Tensor, "hidden"]
    newline: Float[Tensor, "hidden"] | None
    """LLaVA-NeXT's image_newline."""


def check_foldable(form: StockForm, connector: ConnectorSpec, encoder: EncoderSpec, views: ViewSpec) -> None:
    """Refuse what no training could make foldable, before anything is trained.

    Args:
        form: which stock model.
        connector: what is trained.
        encoder: whose maps it reads.
        views: how pictures are cut.

    Raises:
        FoldingError: with every reason, what is allowed, and what to do.
    """
    reasons = [*_encoder_reasons(encoder), *_global_reasons(connector)]
    match form:
        case "llava-hf":
            if connector.local_branch is not None:
                reasons.append("found [connector.local], but stock LLaVA shows one view of a picture; allowed: none")
        case "llava-next-hf":
            reasons += _next_reasons(connector, views)
        case _:
            assert_never(form)
    if reasons:
        raise FoldingError(
            f"{STOCK_CLASSES[form]} does not compute this connector: {'; '.join(reasons)}. Train a recipe that is so, or take "
            "--to loupe, which holds every connector"
        )


def _encoder_reasons(encoder: EncoderSpec) -> list[str]:
    if encoder.family not in STOCK_TOWERS:
        return [f"encoder {encoder.model} is of the family {encoder.family}; allowed: {', '.join(STOCK_TOWERS)}"]
    if encoder.prefix_tokens > 1:
        return [f"encoder {encoder.model} has {encoder.prefix_tokens} tokens before its patches, of which stock models drop one; allowed: 0 or 1"]
    return []


def _global_reasons(connector: ConnectorSpec) -> list[str]:
    branch, reasons = connector.global_branch, []
    if isinstance(branch.fusion, STISpec):
        reasons.append("connector.global.fusion is sti, whose pooled tokens come on top of the patches' own; allowed: single, sci, dci")
    if not isinstance(branch.adapters, MLPSpec):
        reasons.append(f"connector.global.adapters is {branch.adapters.kind}, whose gate weighs two experts for every token; allowed: mlp")
    if branch.fusion.map_pool > 1:
        reasons.append(f"connector.global.fusion.map_pool is {branch.fusion.map_pool}, which averages patches before the projector; allowed: 1")
    if branch.output_grid is not None:
        reasons.append("connector.global.output_grid changes the number of tokens; allowed: absent")
    return reasons


def _next_reasons(connector: ConnectorSpec, views: ViewSpec) -> list[str]:
    """What LLaVA-NeXT has no place for in the local branch."""
    local = connector.local_branch
    if local is None:
        return ["found no [connector.local], but LLaVA-NeXT always shows local views; take --to llava-hf"]
    rules = {
        "connector.local.fusion": (local.fusion == connector.global_branch.fusion, local.fusion.kind, "the global branch's, key by key"),
        "connector.local.compression": (local.compression is None, "a table", "absent"),
        "connector.local.projector": (local.projector == "shared", local.projector, "shared"),
        "connector.local.output_grid": (local.output_grid is None, local.output_grid, "absent"),
        "connector.local.merge": (local.merge == "spatial_unpad", local.merge, "spatial_unpad"),
        "connector.local.newline": (local.newline, "false", "true"),
        "connector.local.selector": (local.selector is None, "a table", "absent"),
        "connector.separator": (connector.separator is None, repr(connector.separator), "empty"),
        "views.rule": (views.rule == "anyres", views.rule, "anyres"),
        "views.global_view": (views.global_fit == "squash", views.global_fit, "squash"),
    }
    return [f"{key}: found {found}; allowed: {allowed}" for key, (fits, found, allowed) in rules.items() if not fits]


@torch.no_grad()
def fold_connector(connector: Connector) -> FoldedProjector:
    """Fold a connector that `check_foldable` has let pass.

    Args:
        connector: trained.

    Returns:
        The projector; its numbers are fp32 on the CPU.

    Raises:
        FoldingError: the two branches are standardised by different numbers, so that no single projector computes both.
    """
    fusion = connector.spec.global_branch.fusion
    local = connector.local_input
    standardiser = connector.global_input
    if local is not None and not (torch.equal(standardiser.mean, local.mean) and torch.equal(standardiser.scale, local.scale)):
        raise FoldingError(
            "the global and the local branch of this connector were standardised by different numbers, and LLaVA-NeXT has one projector for both. "
            "They share them where connector.local has the global branch's fusion and projector and no compression; train such a recipe, or one "
            "with connector.standardise_inputs = false, or take --to loupe"
        )
    first, second = connector.global_mlp.linear_1, connector.global_mlp.linear_2
    scaled, bias = standardiser.folded_into(first.weight, first.bias)
    layers = tuple(sorted({layer for map_spec in fusion.maps for layer in map_spec.layers}))
    width = scaled.shape[1] // len(fusion.maps)
    columns = {layer: scaled.new_zeros(scaled.shape[0], width) for layer in layers}
    for map_spec, block in zip(fusion.maps, scaled.split(width, dim=1), strict=True):
        for layer in map_spec.layers:
            columns[layer] += block / len(map_spec.layers)
    token_scale = connector.token_scale.double().cpu()
    return FoldedProjector(
        layers=layers,
        weight_1=torch.cat([columns[layer] for layer in layers], dim=1).float(),
        bias_1=bias.float(),
        weight_2=(second.weight.detach().double().cpu() * token_scale).float(),
        bias_2=(second.bias.detach().double().cpu() * token_scale).float(),
        newline=None if connector.newline is None else connector.newline_token().detach()[0].float().cpu(),
    )
