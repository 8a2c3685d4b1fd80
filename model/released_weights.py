"""The authors' weights become a connector of ours: their names, their layout, and a report of what went where.

    model.mm_projector.{0,2}.*                          -> global_mlp                LLaVA, Dense Connector (mlp2x_gelu)
    model.mm_projector.projection.{0,2}.*               -> global_mlp                SliME's gated projector: the expert that both share
    model.mm_projector.attn.*                           -> resampler                 its other expert, whose name for the attention is `attn` as well
    model.mm_projector.{w_gate,w_noise}                 -> gate
    model.sampler.post_qformer.*                        -> compression
    model.image_newline                                 -> newline

Input: tensors by the authors' names (or their shapes), and a connector built from a recipe. Output: the connector's state, and a `LoadReport`.
Invariant: all or nothing: a tensor that is missing, too much, of another shape or not finite refuses the whole import; what is ignored is named with
its reason. Imported weights reproduce the authors' outputs: nothing is standardised, and tokens are not scaled.

Source: Dense Connector (arXiv 2405.13800), SliME (arXiv 2406.08487) and LLaVA, by the names that their training code saves.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from model.compression import HEAD_WIDTH, Resampler
from model.connector import Connector
from model.errors import ReleasedWeightsError
from model.load_report import IgnoredTensor, ImportedTensor, LeftPart, LoadReport, NamedShape, ShapeMismatch
from model.specs import (
    ConnectorSpec,
    DCISpec,
    EncoderSpec,
    FusionSpec,
    SCISpec,
    SingleSpec,
    STISpec,
    TextGuidedSelectorSpec,
)
from model.tensor_files import StoredTensor, TensorFiles, dtype_name
from model.views import ViewSpec

__all__ = [
    "AUTHORS_NEWLINE",
    "AUTHORS_POOL",
    "AUTHORS_PROJECTOR",
    "AUTHORS_SAMPLER",
    "Imported",
    "ReleasedFacts",
    "authors_fusion",
    "authors_heads",
    "by_canonical_name",
    "canonical_name",
    "import_connector",
    "load_released",
    "part_left",
    "released_facts",
    "spec_mismatches",
    "view_mismatches",
]

AUTHORS_POOL = 8
"""Tokens of the flattened raster that become one in the authors' STI."""

AUTHORS_PROJECTOR = "model.mm_projector"
AUTHORS_SAMPLER = "model.sampler.post_qformer"
AUTHORS_NEWLINE = "model.image_newline"

_TABLE_TOLERANCE = 2**-8
"""How far a stored position table may be from ours: the rounding of bfloat16, in which whole models are stored, of numbers up to 1."""

_LEFT: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("LoRA matrices", lambda name: "lora_" in name),
    ("vision tower", lambda name: name.startswith("model.vision_tower.")),
    ("language model", lambda name: name.startswith(("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head."))),
)
"""Parts that are no connector, by the names of their tensors."""

_LORA_NOTE = "LoRA matrices are not merged into the language model; the authors' merge_lora_weights.py does that"


def canonical_name(name: str) -> str:
    """A tensor's name as a whole model has it, whichever file it comes from.

    Args:
        name: in a file; LoRA training writes `base_model.model.` in front, some scripts leave `model.` out.

    Returns:
        The name, such as `model.mm_projector.0.weight`.
    """
    name = name.removeprefix("base_model.model.")
    return f"model.{name}" if name.startswith(("mm_projector.", "sampler.", "vision_tower.", "image_newline")) else name


def part_left(name: str) -> str | None:
    """Which part that is no connector a tensor belongs to; None if to none of them."""
    return next((part for part, holds in _LEFT if holds(name)), None)


# -- what the files are


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleasedFacts:
    """What the files themselves tell of their connector."""

    projector: Literal["mlp2x_gelu", "gated"]
    width: int
    """Channels that the projector reads."""
    hidden: int
    """Channels of its tokens: the language model's width."""
    resampler_queries: int | None
    compression_queries: int | None
    newline: bool
    config: Mapping[str, Any] = field(default_factory=dict)
    """The `mm_*` and other fields of the model's config.json, where there is one."""


def released_facts(stored: Mapping[str, StoredTensor], config: Mapping[str, Any] | None = None) -> ReleasedFacts:
    """What released files hold, from names and shapes alone.

    Args:
        stored: tensors by canonical name.
        config: of the model's config.json; None where there is none.

    Returns:
        The facts.

    Raises:
        ReleasedWeightsError: there is no projector among them that Loupe knows, or DeepSpeed ZeRO-3 has left its shapes empty.
    """
    if empty := [name for name, tensor in stored.items() if tensor.num_values == 0]:
        raise ReleasedWeightsError(_told_empty(empty))
    first = {"mlp2x_gelu": f"{AUTHORS_PROJECTOR}.0.weight", "gated": f"{AUTHORS_PROJECTOR}.projection.0.weight"}
    second = {"mlp2x_gelu": f"{AUTHORS_PROJECTOR}.2.weight", "gated": f"{AUTHORS_PROJECTOR}.projection.2.weight"}
    kind: Literal["mlp2x_gelu", "gated"] = "gated" if any(name.startswith(f"{AUTHORS_PROJECTOR}.projection.") for name in stored) else "mlp2x_gelu"
    projector = sorted(name for name in stored if name.startswith(AUTHORS_PROJECTOR))
    if not projector:
        has_sampler = any(name.startswith("model.sampler.") for name in stored)
        hint = (
            "they hold SliME's sampler alone, as the mm_projector.bin of its checkpoint-N folders does (its code overwrites the projector before it "
            "saves); take the files that its training wrote at the end"
            if has_sampler
            else "give the folder of a released model, or its mm_projector.bin (and sampler.bin, of SliME)"
        )
        raise ReleasedWeightsError(f"expected tensors named {AUTHORS_PROJECTOR}.*, found none among {len(stored)} tensors; {hint}")
    if first[kind] not in stored or second[kind] not in stored or f"{AUTHORS_PROJECTOR}.4.weight" in stored or len(stored[first[kind]].shape) != 2:
        shown = ", ".join(f"{name} {list(stored[name].shape)}" for name in projector[:4])
        raise ReleasedWeightsError(
            f"expected a projector of two linear layers (mlp2x_gelu) or SliME's gated one, found {shown}{' ...' if len(projector) > 4 else ''}; "
            "other projectors (linear, mlp3x_gelu, qformer) have no counterpart in Loupe"
        )

    def queries(prefix: str) -> int | None:
        found = stored.get(f"{prefix}.query")
        return None if found is None or not found.shape else found.shape[0]

    hidden, width = stored[first[kind]].shape
    return ReleasedFacts(
        projector=kind,
        width=width,
        hidden=hidden,
        resampler_queries=queries(f"{AUTHORS_PROJECTOR}.attn"),
        compression_queries=queries(AUTHORS_SAMPLER),
        newline=AUTHORS_NEWLINE in stored,
        config=dict(config or {}),
    )


def _told_empty(names: list[str]) -> str:
    return (
        f"{len(names)} tensors have no values (such as {names[0]}): DeepSpeed ZeRO-3 keeps every weight in pieces, and these files were saved "
        "without gathering them. Make whole ones with the zero_to_fp32.py that DeepSpeed puts beside its checkpoints, or train with "
        "stage3_gather_16bit_weights_on_model_save = true"
    )


def authors_fusion(kind: str, encoder: EncoderSpec) -> FusionSpec | None:
    """What Dense Connector's code computes under a name for an encoder: its layers are literals, so it is defined for two sizes alone.

    Args:
        kind: `sti`, `sci` or `dci`.
        encoder: whose layers.

    Returns:
        The fusion over layers as Loupe counts them; None for an encoder whose layers their code does not know.

    Source: Dense Connector section 3.1 and its code: CLIP-L's penultimate layer is 23 of 24, SigLIP-SO400M's 26 of 27.
    """
    sizes: dict[tuple[str, int], tuple[int, tuple[tuple[int, int], ...]]] = {
        ("clip", 24): (23, ((0, 11), (12, 23))),
        ("siglip", 27): (26, ((0, 12), (13, 25))),
    }
    if (encoder.family, encoder.num_blocks) not in sizes:
        return None
    base, groups = sizes[encoder.family, encoder.num_blocks]
    match kind:
        case "sti":
            return STISpec(base=base, layers=(7, 15), pool=AUTHORS_POOL)
        case "sci":
            return SCISpec(base=base, layers=(7, 15))
        case "dci":
            return DCISpec(base=base, groups=groups)
        case _:
            return None


def authors_heads(width: int) -> int:
    """Attention heads of the authors' resampler: one per 128 channels (and one below that, where their code has none)."""
    return max(1, width // HEAD_WIDTH)


def spec_mismatches(facts: ReleasedFacts, spec: ConnectorSpec, encoder: EncoderSpec) -> list[str]:
    """Where a recipe describes another connector than the files hold.

    Args:
        facts: of the files.
        spec: the recipe's connector.
        encoder: the recipe's encoder.

    Returns:
        A line each: the key, what the files hold, what the recipe says, what to do. None when all fits.
    """
    lines: list[str] = []
    branch, local, config = spec.global_branch, spec.local_branch, facts.config

    def expect(key: str, held: str, asked: str, advice: str) -> None:
        if held != asked:
            lines.append(f"{key}: the files hold {held}, the recipe says {asked}; {advice}")

    if spec.standardise_inputs:
        lines.append(
            "connector.standardise_inputs: the authors' connectors read features as they are, the recipe says true; set standardise_inputs = false"
        )
    kinds = {"mlp2x_gelu": "mlp", "gated": "gated_mixture"}
    expect("connector.global.adapters", kinds[facts.projector], branch.adapters.kind, f"set kind = {kinds[facts.projector]!r}")
    if branch.output_grid is not None or (local is not None and local.output_grid is not None):
        lines.append(
            "connector.*.output_grid: the authors released no weights of the efficient variant; leave output_grid out, or train on from the import"
        )
    if branch.fusion.map_pool > 1 or (local is not None and local.fusion.map_pool > 1):
        lines.append("connector.*.fusion.map_pool: the authors average no patches before the projector; leave map_pool out")
    wide = encoder.width * branch.fusion.num_wide
    if facts.width != wide:
        fits = f"{facts.width // encoder.width} maps" if facts.width % encoder.width == 0 else "no whole number of maps"
        lines.append(
            f"connector.global.fusion: the files' projector reads {facts.width} channels, the recipe's {branch.fusion.kind} of {encoder.model} gives "
            f"{wide}; {facts.width} is {fits} of that encoder's width {encoder.width}: choose another fusion or the encoder that they were trained "
            "with"
        )
    elif message := _fusion_mismatch(config, branch.fusion, encoder):
        lines.append(message)
    if facts.resampler_queries is not None and facts.resampler_queries != encoder.num_patches:
        expect("encoder.model", f"{facts.resampler_queries} queries, one per patch", f"{encoder.num_patches} patches", "use the authors' encoder")
    queries = None if local is None or local.compression is None else local.compression.queries

    def told(count: int | None) -> str:
        return "no compression" if count is None else f"{count} queries"

    expect(
        "connector.local.compression",
        told(facts.compression_queries),
        told(queries),
        "give sampler.bin beside mm_projector.bin, or leave compression out"
        if facts.compression_queries is None
        else f"set compression = {{ queries = {facts.compression_queries} }}",
    )
    if local is not None and local.fusion != branch.fusion:
        lines.append(
            "connector.local.fusion: the authors read the same layers of global and local views, the recipe's fusions differ; make them alike"
        )
    if local is not None and local.projector == "own":
        lines.append("connector.local.projector: the authors have one projector for both branches, the recipe says own; set projector = 'shared'")
    if local is not None and local.newline and not facts.newline:
        lines.append(
            f"connector.local.newline: the files hold no {AUTHORS_NEWLINE}, the recipe says true; leave newline out, or give the file that holds it"
        )
    if spec.selector is not None and not isinstance(spec.selector, TextGuidedSelectorSpec):
        lines.append(
            "connector.local.selector: the authors' cosine selector has no weights, the recipe's learnable one does; use kind = 'text_guided'"
        )
    return lines


def _fusion_mismatch(config: Mapping[str, Any], fusion: FusionSpec, encoder: EncoderSpec) -> str | None:
    """Widths tell 1 map from 3, and config.json which; channels in another order would load, and mean something else."""
    if "mm_dense_connector_type" in config:
        kind = str(config["mm_dense_connector_type"] or "none").lower()
        known = kind if kind in ("sti", "sci", "dci") else "single"
    elif "mm_vision_select_layer" in config:
        known = "single"
    else:
        return None
    if fusion.kind != known:
        return f"connector.global.fusion: config.json tells of {known}, the recipe says {fusion.kind}; set kind = {known!r}"
    expected = authors_fusion(known, encoder)
    if expected is not None and fusion != expected:
        return (
            f"connector.global.fusion: the authors' {known} reads {[map_spec.name for map_spec in expected.maps]}, the recipe's "
            f"{[map_spec.name for map_spec in fusion.maps]}; leave base, layers, groups and pool at their defaults"
        )
    selected = config.get("mm_vision_select_layer")
    if isinstance(fusion, SingleSpec) and encoder.family == "clip" and isinstance(selected, int):
        layer = selected if selected >= 0 else encoder.num_blocks + 1 + selected
        if layer != fusion.layer:
            return f"connector.global.fusion.layer: config.json's mm_vision_select_layer {selected} is layer {layer}, the recipe says {fusion.layer}"
    return None


def view_mismatches(facts: ReleasedFacts, encoder: EncoderSpec, views: ViewSpec) -> list[str]:
    """Where a recipe would show the connector other pixels or tokens than its config.json tells of.

    Args:
        facts: of the files.
        encoder: the recipe's encoder.
        views: how the recipe cuts pictures.

    Returns:
        A line each, as `spec_mismatches` gives them. What config.json does not say is taken as it is.
    """
    lines, config = [], facts.config
    selected = config.get("mm_vision_select_feature")
    if selected not in (None, "patch"):
        lines.append(f"mm_vision_select_feature: config.json has {selected}, Loupe reads patches alone; these weights cannot be used")
    aspect = config.get("image_aspect_ratio")
    if aspect == "pad" and views.global_fit != "pad":
        lines.append('views.global_view: config.json tells of padded pictures (image_aspect_ratio pad), the recipe squashes; set global_view = "pad"')
    if aspect == "anyres" and facts.compression_queries is not None and views != ViewSpec.slime():
        lines.append("views: SliME's code cuts views by its own rule (6 slices, squashed global view), the recipe says otherwise; leave [views] out")
    if aspect == "anyres" and facts.compression_queries is None:
        pinpoints = config.get("image_grid_pinpoints")
        asked = [[columns * encoder.view_px, rows * encoder.view_px] for columns, rows in views.candidate_grids]
        if views.rule != "anyres" or (isinstance(pinpoints, list) and sorted(pinpoints) != sorted(asked)):
            lines.append(f"views.grids: config.json lists the canvases {pinpoints}, the recipe has {views.rule} over {asked}; name the same grids")
        if views.global_fit != "squash":
            lines.append('views.global_view: LLaVA\'s AnyRes squashes the whole picture, the recipe pads it; set global_view = "squash"')
    return lines


_LLAMA_3_VOCABULARY = 128_256


def _notes(facts: ReleasedFacts, spec: ConnectorSpec, encoder: EncoderSpec) -> tuple[str, ...]:
    """What no weight shows and the recipe decides by itself, where config.json tells otherwise."""
    config, notes = facts.config, []
    fusion = spec.global_branch.fusion
    if not config:
        notes.append(f"no config.json: whether the weights were trained with {fusion.kind} over these layers cannot be told from them")
    elif fusion.kind != "single" and authors_fusion(fusion.kind, encoder) is None:
        notes.append(f"the authors' {fusion.kind} is defined for CLIP-L and SigLIP-SO400M; which layers these weights want cannot be told")
    if isinstance(config.get("mm_learnable_gated"), int) and config["mm_learnable_gated"] >= 0:
        expert = "mlp" if config["mm_learnable_gated"] == 0 else "resampler"
        notes.append(f"trained with experts = {expert!r} alone (mm_learnable_gated); evaluation and export weigh both")
    tower = config.get("mm_vision_tower")
    if isinstance(tower, str) and tower.rstrip("/").rpartition("/")[2] != encoder.model.rstrip("/").rpartition("/")[2]:
        notes.append(f"trained with the encoder {tower}, the recipe has {encoder.model}")
    if config.get("unfreeze_mm_vision_tower"):
        notes.append("trained its vision tower too (unfreeze_mm_vision_tower), which is not imported: its features are not the recipe's encoder's")
    selector, local = spec.selector, spec.local_branch
    top_p = config.get("mm_resampler_topp")
    if facts.compression_queries is not None and isinstance(top_p, int | float):
        asked = selector.top_p if selector is not None else 1.0
        if asked != top_p:
            notes.append(f"config.json has mm_resampler_topp {top_p:g}, the recipe's selector keeps {asked:g}")
    temperature = config.get("mm_resampler_temp")
    if selector is not None and isinstance(temperature, int | float) and selector.temperature != temperature:
        notes.append(f"config.json has mm_resampler_temp {temperature:g}, the recipe's selector a temperature of {selector.temperature:g}")
    if selector is not None and facts.compression_queries is not None and selector.reduce != "sum":
        notes.append("the authors' selector sums over the text, the recipe's takes the mean; set reduce = \"sum\"")
    if config.get("mm_dense_connector_type") and config.get("vocab_size") == _LLAMA_3_VOCABULARY:
        notes.append(
            "Dense Connector's template for Llama 3 begins the assistant's turns with the system's header, which no template of Loupe's does; "
            "answers may suffer"
        )
    merge = config.get("mm_patch_merge_type")
    if local is not None and isinstance(merge, str) and merge != local.merge:
        notes.append(f"config.json has mm_patch_merge_type {merge}, the recipe's merge is {local.merge}")
    if local is not None and facts.compression_queries is None and spec.separator is not None:
        notes.append(f"LLaVA's code puts no separator between global and local tokens, the recipe has {spec.separator!r}")
    return tuple(notes)


# -- into the connector


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rule:
    """One of the authors' tensors and the parts of the connector's state that it becomes."""

    source: str
    shape: tuple[int, ...]
    into: Mapping[str, slice | None]
    """Our names, with the rows of a packed tensor."""


def _rules(connector: Connector, facts: ReleasedFacts) -> list[_Rule]:
    """Every tensor that the import needs, in the order of the connector's parts."""
    state = connector.state_dict()

    def same(source: str, *names: str) -> _Rule:
        return _Rule(source=source, shape=tuple(state[names[0]].shape), into=dict.fromkeys(names))

    inner = "" if facts.projector == "mlp2x_gelu" else ".projection"
    rules = [
        same(f"{AUTHORS_PROJECTOR}{inner}.{number}.{part}", f"global_mlp.{linear}.{part}")
        for number, linear in ((0, "linear_1"), (2, "linear_2"))
        for part in ("weight", "bias")
    ]
    if connector.gate is not None:
        rules.append(same(f"{AUTHORS_PROJECTOR}.w_gate", "gate.weight"))
        if connector.gate.noise_weight is not None:
            rules.append(same(f"{AUTHORS_PROJECTOR}.w_noise", "gate.noise_weight"))
    for prefix, block, resampler in (
        (f"{AUTHORS_PROJECTOR}.attn", "resampler", connector.resampler),
        (AUTHORS_SAMPLER, "compression", connector.compression),
    ):
        if resampler is not None:
            rules += _resampler_rules(prefix, block, resampler.width, same)
    if connector.newline is not None:
        rules.append(same(AUTHORS_NEWLINE, "newline.vector"))
    return rules


def _resampler_rules(prefix: str, block: str, width: int, same: Callable[..., _Rule]) -> list[_Rule]:
    """Rules of one cross-attention; packed rows are queries, keys, values.

    The authors share one norm among keys and values. Its bias and the keys' bias move all logits of a row alike, which a softmax ignores, so our keys
    have neither.
    """
    queries, keys, values = slice(0, width), slice(width, 2 * width), slice(2 * width, 3 * width)
    return [
        same(f"{prefix}.query", f"{block}.queries"),
        _Rule(
            source=f"{prefix}.attn.in_proj_weight",
            shape=(3 * width, width),
            into={f"{block}.to_queries.weight": queries, f"{block}.to_keys.weight": keys, f"{block}.to_values.weight": values},
        ),
        _Rule(
            source=f"{prefix}.attn.in_proj_bias",
            shape=(3 * width,),
            into={f"{block}.to_queries.bias": queries, f"{block}.to_values.bias": values},
        ),
        same(f"{prefix}.attn.out_proj.weight", f"{block}.to_output.weight"),
        same(f"{prefix}.attn.out_proj.bias", f"{block}.to_output.bias"),
        same(f"{prefix}.ln_q.weight", f"{block}.norm_queries.weight"),
        same(f"{prefix}.ln_q.bias", f"{block}.norm_queries.bias"),
        same(f"{prefix}.ln_kv.weight", f"{block}.norm_keys.weight", f"{block}.norm_values.weight"),
        same(f"{prefix}.ln_kv.bias", f"{block}.norm_values.bias"),
        same(f"{prefix}.ln_post.weight", f"{block}.norm_output.weight"),
        same(f"{prefix}.ln_post.bias", f"{block}.norm_output.bias"),
    ]


def import_connector(
    stored: Mapping[str, StoredTensor], read: Callable[[str], Tensor], connector: Connector, encoder: EncoderSpec, facts: ReleasedFacts
) -> tuple[dict[str, Tensor], LoadReport]:
    """The connector's state out of the authors' tensors.

    Args:
        stored: everything that the files hold, by canonical name.
        read: gives a tensor by canonical name; only the connector's are asked for.
        connector: built from the recipe's spec for the files' hidden width; left as it is.
        encoder: the recipe's encoder.
        facts: of the files; they fit the recipe, see `spec_mismatches`.

    Returns:
        All of the connector's state in fp32, empty when the report refuses; and the report.
    """
    rules = {rule.source: rule for rule in _rules(connector, facts)}
    missing, mismatched, unexpected, ignored, imported, not_finite = [], [], [], [], [], []
    left: dict[str, list[int]] = {}
    state: dict[str, Tensor] = {}
    for source, rule in rules.items():
        if (held := stored.get(source)) is None:
            missing.append(NamedShape(name=source, shape=rule.shape))
        elif held.shape != rule.shape or not held.dtype.startswith(("float", "bfloat")):
            mismatched.append(ShapeMismatch(name=source, expected=rule.shape, found=held.shape, dtype=held.dtype))
        else:
            tensor = read(source).float()
            if not torch.isfinite(tensor).all():
                not_finite.append(source)
            for name, rows in rule.into.items():
                state[name] = (tensor if rows is None else tensor[rows]).clone()
            imported.append(ImportedTensor(name=source, shape=held.shape, dtype=held.dtype, into=tuple(rule.into)))
    for name, held in stored.items():
        if name in rules:
            continue
        if (part := part_left(name)) is not None:
            left.setdefault(part, []).append(held.num_values)
        elif (reason := _irrelevant(name, read, connector, facts)) is not None:
            ignored.append(IgnoredTensor(name=name, shape=held.shape, reason=reason))
        else:
            unexpected.append(NamedShape(name=name, shape=held.shape))
    report = LoadReport(
        imported=tuple(imported),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        mismatched=tuple(mismatched),
        not_finite=tuple(not_finite),
        ignored=tuple(ignored),
        left=tuple(LeftPart(part=part, num_tensors=len(sizes), num_values=sum(sizes)) for part, sizes in left.items()),
        notes=(*_notes(facts, connector.spec, encoder), *([_LORA_NOTE] if "LoRA matrices" in left else [])),
    )
    if report.refused:
        return {}, report
    for name, tensor in connector.state_dict().items():  # what the authors do not have: features as they are, tokens as they come
        if name.endswith("_input.mean"):
            state[name] = torch.zeros_like(tensor)
        elif name.endswith("_input.scale") or name == "token_scale":
            state[name] = torch.ones_like(tensor)
    assert state.keys() == connector.state_dict().keys()
    return state, report


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """A connector out of released files."""

    state: dict[str, Tensor]
    """All of the connector's state, fp32."""
    report: LoadReport
    facts: ReleasedFacts


def by_canonical_name(files: TensorFiles) -> dict[str, str]:
    """The names in the files by canonical name.

    Args:
        files: of a released model.

    Returns:
        Names.

    Raises:
        ReleasedWeightsError: two names mean one tensor.
    """
    names: dict[str, str] = {}
    for name in files.stored:
        if (other := names.get(canonical_name(name))) is not None:
            raise ReleasedWeightsError(
                f"the tensors {other} and {name} mean the same one, and which counts is not known; give the files of one training"
            )
        names[canonical_name(name)] = name
    return names


def load_released(files: TensorFiles, config: Mapping[str, Any] | None, spec: ConnectorSpec, encoder: EncoderSpec, views: ViewSpec) -> Imported:
    """A connector's state out of released files, or why there is none.

    Args:
        files: of the released model; its language model's shards may be among them, and are not read.
        config: of the model's config.json; None where there is none.
        spec: the recipe's connector.
        encoder: the recipe's encoder.
        views: how the recipe cuts pictures.

    Returns:
        The state with its report.

    Raises:
        ReleasedWeightsError: the files hold no connector, another one than the recipe describes, or one with faults; the message is the report.
    """
    names = by_canonical_name(files)
    stored = {canonical: files.stored[name] for canonical, name in names.items()}
    facts = released_facts(stored, config)
    if lines := [*spec_mismatches(facts, spec, encoder), *view_mismatches(facts, encoder, views)]:
        raise ReleasedWeightsError("the recipe describes another connector than the files hold:" + "".join(f"\n  {line}" for line in lines))
    connector = Connector(
        spec,
        encoder_width=encoder.width,
        num_patches=encoder.num_patches,
        hidden=facts.hidden,
        embedding_rms=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    for resampler in (connector.resampler, connector.compression):
        if resampler is not None and resampler.num_heads != authors_heads(resampler.width):
            raise ReleasedWeightsError(
                f"the authors' attention over {resampler.width} channels has {authors_heads(resampler.width)} heads, Loupe's {resampler.num_heads}; "
                "weights of this width cannot be imported"
            )
    state, report = import_connector(stored, lambda name: files.read(names[name]), connector, encoder, facts)
    if report.refused:
        faults = len(report.missing) + len(report.mismatched) + len(report.unexpected) + len(report.not_finite)
        raise ReleasedWeightsError(
            f"{faults} of the connector's tensors do not fit, so nothing is imported:" + "".join(f"\n  {line}" for line in report.lines())
        )
    return Imported(state=state, report=report, facts=facts)


def _irrelevant(name: str, read: Callable[[str], Tensor], connector: Connector, facts: ReleasedFacts) -> str | None:
    """Why a tensor that no rule asks for decides nothing; None if it might."""
    if name == f"{AUTHORS_PROJECTOR}.w_noise" and facts.projector == "gated":
        return "the authors' code never reads it (their noise takes the gate's own matrix)"
    if name in (f"{AUTHORS_PROJECTOR}.mean", f"{AUTHORS_PROJECTOR}.std") and facts.projector == "gated":
        return "a constant of their load balancing, which they do not use"
    if name == AUTHORS_NEWLINE and connector.newline is None:
        return "the recipe has no newline"
    tables: tuple[tuple[str, Resampler | None], ...] = ((f"{AUTHORS_PROJECTOR}.attn", connector.resampler), (AUTHORS_SAMPLER, connector.compression))
    for prefix, resampler in tables:
        if name == f"{prefix}.pos_embed" and resampler is not None:
            return _same_table(read(name), resampler)
    return None


def _same_table(stored: Tensor, resampler: Resampler) -> str | None:
    table = stored.float()
    if table.shape != resampler.query_places.shape:
        return None
    if table.isnan().any():
        return "holds NaN, which their code replaces by the table that Loupe computes"
    difference = float((table - resampler.query_places).abs().max())
    if difference > _TABLE_TOLERANCE:
        return None
    return f"the fixed position table, which Loupe computes in fp32 (largest difference {difference:.1e} to the stored {dtype_name(stored)})"
