"""A connector of ours in the authors' layout: the way back of model/released_weights.py.

    mm_projector.bin    projector, and SliME's resampler and gate; the newline
    sampler.bin         SliME's compression
    config.json         the `mm_*` fields by which the authors' code rebuilds the connector, over those of the language model where they are given

Input: a trained connector. Output: files that the authors' code loads and `torch.load(weights_only=True)` reads. Invariant: their code computes from
them what our connector does, up to rounding; what their code cannot compute is refused, saying why.

Source: the saving and loading code of LLaVA, Dense Connector and SliME.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.compression import Resampler, num_heads, positions_2d
from model.connector import Connector
from model.errors import ExportError
from model.released_weights import AUTHORS_NEWLINE, AUTHORS_PROJECTOR, AUTHORS_SAMPLER, authors_fusion, authors_heads
from model.specs import ConnectorSpec, EncoderSpec, GatedMixtureSpec, LearnableSelectorSpec, SingleSpec
from model.views import ViewSpec

__all__ = ["check_computable", "released_config_fields", "released_tensors", "write_llava_layout"]

_AUTHORS_GATED_TOKENS = 576
"""Their gate counts for views of so many tokens; any other number goes through the projector alone."""

_MODEL_TYPES = {"llama": ("llava_llama", "LlavaLlamaForCausalLM"), "mistral": ("llava_mistral", "LlavaMistralForCausalLM")}


def write_llava_layout(
    folder: Path,
    connector: Connector,
    *,
    encoder: EncoderSpec,
    views: ViewSpec,
    separator_id: int | None,
    language_model_config: Mapping[str, Any] | None = None,
) -> tuple[str, ...]:
    """Write a connector as the authors' training code does at its end.

    Args:
        folder: where; made if need be.
        connector: trained.
        encoder: whose maps it reads.
        views: how its views are cut.
        separator_id: the language model's token between global and local tokens; None where the connector has none.
        language_model_config: of the language model's config.json; with it, config.json is that of the authors' whole model.

    Returns:
        Names of the files.

    Raises:
        ExportError: the authors' code cannot compute what this connector does.
    """
    check_computable(connector.spec, encoder, views)
    files = released_tensors(connector)
    config = dict(language_model_config or {})
    if language_model_config is not None:
        model_type = language_model_config.get("model_type")
        if model_type not in _MODEL_TYPES:
            raise ExportError(
                f"the authors' code is written for language models of type {', '.join(_MODEL_TYPES)}, found {model_type!r}; export to another layout"
            )
        config["model_type"], config["architectures"] = _MODEL_TYPES[model_type][0], [_MODEL_TYPES[model_type][1]]
    config |= released_config_fields(connector, encoder, views, separator_id)
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        torch.save(tensors, folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    return (*files, "config.json")


def released_config_fields(connector: Connector, encoder: EncoderSpec, views: ViewSpec, separator_id: int | None) -> dict[str, Any]:
    """The fields of the authors' config.json that tell of the connector.

    Args:
        connector: trained.
        encoder: whose maps it reads.
        views: how its views are cut.
        separator_id: the language model's token between global and local tokens; None where the connector has none.

    Returns:
        Fields by name.

    Raises:
        ExportError: a separator is there where the authors' code has none, or the other way round.
    """
    spec = connector.spec
    fusion, local, selector = spec.global_branch.fusion, spec.local_branch, spec.selector
    base = fusion.maps[0].layers[0]
    fields: dict[str, Any] = {
        "mm_projector_type": "gated" if connector.resampler is not None else "mlp2x_gelu",
        "mm_hidden_size": connector.global_mlp.linear_1.in_features,
        "mm_vision_tower": encoder.model,
        "mm_vision_select_layer": base - (encoder.num_blocks + 1),
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat" if local is None else local.merge,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": "anyres" if local is not None else "pad" if views.global_fit == "pad" else "square",
        "tune_mm_mlp_adapter": True,
    }
    if connector.resampler is None and connector.compression is None:
        fields["mm_dense_connector_type"] = "none" if fusion.kind == "single" else fusion.kind
    if connector.resampler is not None:
        fields["mm_learnable_gated"] = -1
    if local is not None:
        fields["image_grid_pinpoints"] = [[columns * encoder.view_px, rows * encoder.view_px] for columns, rows in views.candidate_grids]
    separated = local is not None and spec.separator is not None
    if connector.compression is not None:
        if not separated or separator_id is None:
            raise ExportError("SliME's code always puts a separator between global and local tokens, this connector has none")
        fields |= {
            "mm_resampler_type": "cosine",
            "mm_resampler_dim": connector.compression.num_queries,
            "mm_resampler_topp": 1.0 if selector is None else selector.top_p,
            "mm_resampler_temp": 1.0 if selector is None else selector.temperature,
            "seperator": separator_id,
            "use_local_only": False,
            "use_global_only": False,
        }
    elif separated:
        raise ExportError(
            'LLaVA\'s code puts no separator between global and local tokens, this connector has one; train with connector.separator = ""'
        )
    return fields


def released_tensors(connector: Connector) -> dict[str, dict[str, Tensor]]:
    """A connector's tensors by the authors' files and names.

    Args:
        connector: trained; `check_computable` has let it pass.

    Returns:
        Tensors by name, by file; fp32, the position tables fp16 as theirs are.

    Raises:
        ExportError: global and local tokens are standardised by different numbers.
    """
    _check_foldable(connector)
    inner = "" if connector.resampler is None else ".projection"
    scale = connector.token_scale.detach()
    first, second = connector.global_mlp.linear_1, connector.global_mlp.linear_2
    weight, bias = (tensor.to(first.weight) for tensor in connector.global_input.folded_into(first.weight, first.bias))
    projector = {
        f"{AUTHORS_PROJECTOR}{inner}.0.weight": weight,
        f"{AUTHORS_PROJECTOR}{inner}.0.bias": bias,
        f"{AUTHORS_PROJECTOR}{inner}.2.weight": second.weight * scale,
        f"{AUTHORS_PROJECTOR}{inner}.2.bias": second.bias * scale,
    }
    if connector.resampler is not None and connector.gate is not None:
        noise = connector.gate.noise_weight
        projector[f"{AUTHORS_PROJECTOR}.w_gate"] = connector.gate.weight
        projector[f"{AUTHORS_PROJECTOR}.w_noise"] = torch.zeros_like(connector.gate.weight) if noise is None else noise
        projector |= _released_resampler(f"{AUTHORS_PROJECTOR}.attn", connector.resampler)
    if connector.newline is not None:
        projector[AUTHORS_NEWLINE] = connector.newline.vector * scale
    files = {"mm_projector.bin": projector}
    if connector.compression is not None:
        files["sampler.bin"] = _released_resampler(AUTHORS_SAMPLER, connector.compression)
    return {file: {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()} for file, tensors in files.items()}


def _released_resampler(prefix: str, resampler: Resampler) -> dict[str, Tensor]:
    """Ours has a norm each for keys and values, theirs one for both: the values' is folded into the value projection where the two differ.

    With key weights g and value weights v, c: W_v (v * n + c) + b = (W_v * v / g) (g * n) + (b + W_v c). Keys have no biases here; theirs get zeros,
    or the values' norm bias, which moves all logits of a row alike.
    """
    keys, values = resampler.norm_keys.weight.detach(), resampler.norm_values.weight.detach()
    norm_bias, to_values = resampler.norm_values.bias.detach(), resampler.to_values.weight.detach()
    values_bias = resampler.to_values.bias.detach()
    if not torch.equal(keys, values):
        if zeros := int((keys == 0).sum()):
            raise ExportError(
                f"{prefix}: {zeros} of {len(keys)} channels of the keys' norm are 0 and the values' norm differs from it; the authors share one "
                "norm, out of which the values cannot be made any more"
            )
        values_bias = (values_bias.double() + to_values.double() @ norm_bias.double()).to(values_bias.dtype)
        to_values = (to_values.double() * (values.double() / keys.double())).to(to_values.dtype)
        norm_bias = torch.zeros_like(norm_bias)
    return {
        f"{prefix}.query": resampler.queries,
        f"{prefix}.pos_embed": positions_2d(*resampler.query_grid, resampler.width).half(),
        f"{prefix}.attn.in_proj_weight": torch.cat([resampler.to_queries.weight, resampler.to_keys.weight, to_values]),
        f"{prefix}.attn.in_proj_bias": torch.cat([resampler.to_queries.bias, torch.zeros_like(values_bias), values_bias]),
        f"{prefix}.attn.out_proj.weight": resampler.to_output.weight,
        f"{prefix}.attn.out_proj.bias": resampler.to_output.bias,
        f"{prefix}.ln_q.weight": resampler.norm_queries.weight,
        f"{prefix}.ln_q.bias": resampler.norm_queries.bias,
        f"{prefix}.ln_kv.weight": keys,
        f"{prefix}.ln_kv.bias": norm_bias,
        f"{prefix}.ln_post.weight": resampler.norm_output.weight,
        f"{prefix}.ln_post.bias": resampler.norm_output.bias,
    }


def check_computable(spec: ConnectorSpec, encoder: EncoderSpec, views: ViewSpec) -> None:
    """Refuse what the authors' code has no words for, before anything is trained.

    Args:
        spec: of the connector.
        encoder: whose maps it reads.
        views: how pictures are cut: their code cuts them by itself.

    Raises:
        ExportError: with every reason.
    """
    fusion, local = spec.global_branch.fusion, spec.local_branch
    attends = not {"resampler", "compression"}.isdisjoint(spec.blocks)
    faults: list[str] = []
    if attends and spec.standardise_inputs:
        faults.append(
            "a resampler's norm and the gate read the standardised tokens, and the authors have no standardisation to put in front; train with "
            "connector.standardise_inputs = false"
        )
    if attends and not isinstance(fusion, SingleSpec):
        faults.append(f"SliME's resamplers read one map, this connector a {fusion.kind} fusion")
    elif not isinstance(fusion, SingleSpec) and fusion != authors_fusion(fusion.kind, encoder):
        faults.append(f"Dense Connector's code knows its own layers for CLIP-L and SigLIP-SO400M alone, not this {fusion.kind} over {encoder.model}")
    if isinstance(fusion, SingleSpec) and encoder.family == "siglip" and fusion.layer != encoder.num_blocks - 1:
        faults.append(f"their code always reads layer {encoder.num_blocks - 1} of this SigLIP encoder, the connector layer {fusion.layer}")
    if isinstance(spec.global_branch.adapters, GatedMixtureSpec) and encoder.num_patches != _AUTHORS_GATED_TOKENS:
        faults.append(f"SliME's gate counts for views of {_AUTHORS_GATED_TOKENS} patches alone, {encoder.model} has {encoder.num_patches}")
    width = encoder.width * fusion.num_wide
    if attends and num_heads(width) != authors_heads(width):
        faults.append("SliME's attention has one head per 128 channels, this connector another number")
    if fusion.map_pool > 1 or (local is not None and local.fusion.map_pool > 1):
        faults.append("their code averages no patches before the projector (map_pool)")
    if spec.global_branch.output_grid is not None or (local is not None and local.output_grid is not None):
        faults.append("their code resizes no grid of tokens (output_grid)")
    if local is not None:
        if local.projector == "own":
            faults.append("their code has one projector for global and local views (projector = own)")
        if local.fusion != fusion:
            faults.append("their code fuses global and local views alike")
        if isinstance(local.selector, LearnableSelectorSpec):
            faults.append("their cosine selector has no weights (selector learnable)")
        elif local.selector is not None and (local.compression is None or local.selector.reduce != "sum"):
            faults.append("their selector is part of the compression and sums over the text")
        if local.compression is not None and not local.compression.is_square:
            faults.append(f"SliME's queries form a square grid, {local.compression.queries} do not")
        if local.merge == "spatial_unpad" and local.compression is not None:
            faults.append("SliME's code merges flat or spatial (spatial_unpad)")
        if local.merge == "spatial_unpad" and not local.newline:
            faults.append("their spatial_unpad ends every line with a newline token")
        if local.newline and local.merge != "spatial_unpad":
            faults.append(f"their {local.merge} merge has no newline token")
    faults += _view_faults(spec, encoder, views)
    if faults:
        raise ExportError("this connector is not one that the authors' code computes: " + "; ".join(faults))


def _view_faults(spec: ConnectorSpec, encoder: EncoderSpec, views: ViewSpec) -> list[str]:
    """Where their code would show its connector other pixels than this one was trained on."""
    local = spec.local_branch
    if local is None:
        # Unpadded, theirs crops CLIP's view out of the middle; only SigLIP's is squashed.
        fits = views.global_fit == "pad" or encoder.family == "siglip"
        return [] if fits else ['their code crops an unpadded picture for CLIP, this one was squashed; train with views.global_view = "pad"']
    if local.compression is not None:
        fits = views == ViewSpec.slime()
        return [] if fits else ["SliME's code cuts views by its own rule alone, at most 6 slices and a squashed global view (views.rule = slime)"]
    fits = views.rule == "anyres" and views.global_fit == "squash"
    return [] if fits else ["LLaVA's code chooses among listed grids and squashes the global view (views.rule = anyres, global_view = squash)"]


def _check_foldable(connector: Connector) -> None:
    """One projector behind two standardisations folds where they are the same."""
    one, other = connector.global_input, connector.local_input
    if other is not None and not (torch.equal(one.mean, other.mean) and torch.equal(one.scale, other.scale)):
        raise ExportError(
            "this connector is not one that the authors' code computes: global and local tokens are standardised by different numbers in front of "
            "one projector; train with connector.standardise_inputs = false"
        )
