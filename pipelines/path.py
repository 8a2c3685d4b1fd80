"""The path of one image through the model, in shapes: views, hidden states, maps, fused tokens, visual tokens, sequence; and what the parts weigh.

Input: an experiment, of which nothing but specs is looked at. Output: facts for people, as (fact, value). Invariant: shapes and counts come from the
code that computes, on a connector without numbers, so a plan for 13B parameters takes seconds and a few megabytes.
"""

from collections.abc import Iterator

from model.architectures import num_encoder_parameters
from model.connector import Connector
from model.counting import LanguageModelShape, count_by_block, count_fixed_numbers, empty_connector
from model.specs import EncoderSpec, FusionSpec, deepest_layer
from model.views import plan_views
from pipelines.stages import Experiment
from workers.language_models import count_adapters

__all__ = ["TYPICAL_SIZES_PX", "image_facts", "parameter_facts", "path_facts", "planned_connector"]

TYPICAL_SIZES_PX = ((336, 336), (640, 480), (1024, 768), (1920, 1080), (3000, 300))
"""Width and height: one view, a snapshot, a page, a screen, a banner."""


def planned_connector(experiment: Experiment, shape: LanguageModelShape) -> Connector:
    """The experiment's connector without its numbers.

    Args:
        experiment: to plan.
        shape: of its language model.

    Returns:
        The connector on the meta device.
    """
    return empty_connector(experiment.connector, experiment.encoder, hidden=shape.hidden)


def path_facts(experiment: Experiment, connector: Connector, shape: LanguageModelShape) -> Iterator[tuple[str, str]]:
    """What one image becomes, step by step.

    Args:
        experiment: to plan.
        connector: its connector.
        shape: of its language model.

    Yields:
        Facts in the order of the path. Shapes are [tokens, channels], of one view where there are several.
    """
    encoder, spec = experiment.encoder, experiment.connector
    yield "a view", f"{encoder.view_px} x {encoder.view_px} px: {encoder.grid} x {encoder.grid} patches of {encoder.patch_px} px"
    yield "hidden states", f"[{encoder.num_patches + encoder.prefix_tokens}, {encoder.width}] each; {_blocks_text(experiment)}"
    branch = spec.global_branch
    yield from _branch_facts("global", branch.fusion, encoder)
    resized = "" if branch.output_grid is None else f", resized to {branch.output_grid} x {branch.output_grid}"
    yield "global tokens", f"[{connector.tokens_per_global_view}, {shape.hidden}] behind {branch.adapters.kind}{resized}"
    if (local := spec.local_branch) is not None:
        yield from _branch_facts("local", local.fusion, encoder)
        if local.compression is not None:
            yield "local compressed", f"[{local.compression.queries}, {encoder.width * local.fusion.num_wide}] of each view"
        resized = "" if local.output_grid is None else f", resized to {local.output_grid} x {local.output_grid}"
        yield "local tokens", f"[{connector.tokens_per_local_view}, {shape.hidden}] of each view, {local.projector} projector{resized}"
        yield "local merge", f"{local.merge}{', a newline behind every line' if local.newline else ''}"
        if local.selector is not None:
            yield (
                "local selector",
                f"{local.selector.kind}, top_p {local.selector.top_p:g}, in the phases that say so; all tokens are counted here",
            )
    up_to = "" if experiment.all_drawn or local is None else "up to "
    yield "sequence", up_to + _sequence_text(experiment, connector, experiment.most_local_tokens())


def _blocks_text(experiment: Experiment) -> str:
    """How many blocks run, in each branch."""
    num_blocks = experiment.encoder.num_blocks
    deepest = {branch: deepest_layer(experiment.features.maps(branch)) for branch in ("global", "local") if experiment.features.maps(branch)}
    if len(set(deepest.values())) == 1:
        layer = next(iter(deepest.values()))
        return f"{layer} of {num_blocks} blocks run"
    return " and ".join(f"{layer} of {num_blocks} blocks run for {branch} views" for branch, layer in deepest.items())


def _branch_facts(branch: str, fusion: FusionSpec, encoder: EncoderSpec) -> Iterator[tuple[str, str]]:
    maps = fusion.maps
    yield (
        f"{branch} maps",
        f"{len(maps)} x [{fusion.map_tokens(encoder.num_patches)}, {encoder.width}]: {', '.join(map_spec.name for map_spec in maps)}",
    )
    yield f"{branch} fused", f"[{fusion.num_tokens(encoder.num_patches)}, {encoder.width * fusion.num_wide}] by {fusion.kind}"


def _sequence_text(experiment: Experiment, connector: Connector, num_local: int) -> str:
    """An image's visual tokens and what they leave of the longest sequence."""
    parts = [f"{connector.tokens_per_global_view} global"]
    has_separator = num_local > 0 and connector.spec.separator is not None
    if has_separator:
        parts.append("1 separator")
    if num_local:
        parts.append(f"{num_local} local")
    total, context = connector.tokens_per_global_view + has_separator + num_local, experiment.max_sequence_tokens
    return f"{' + '.join(parts)} = {total} visual tokens of {context}; {context - total} left for text"


def image_facts(experiment: Experiment, connector: Connector) -> Iterator[tuple[str, str]]:
    """Views and visual tokens of images of typical sizes.

    Args:
        experiment: to plan.
        connector: its connector.

    Yields:
        A fact for each size.
    """
    for width_px, height_px in TYPICAL_SIZES_PX:
        views = plan_views(width_px, height_px, experiment.encoder.view_px, experiment.features.views)
        grid = f"{views.columns} x {views.rows} local views; " if experiment.connector.local_branch is not None else ""
        yield f"{width_px} x {height_px} px", grid + _sequence_text(experiment, connector, len(connector.local_order(views)))


def parameter_facts(experiment: Experiment, connector: Connector, shape: LanguageModelShape) -> Iterator[tuple[str, str]]:
    """How many parameters the parts have.

    Args:
        experiment: to plan.
        connector: its connector.
        shape: of its language model.

    Yields:
        The connector's blocks, the connector, the encoder as far as it is held, the language model, its adapters.
    """
    counts = count_by_block(connector)
    for block, count in counts.items():
        yield block, f"{count:,}"
    yield "connector", f"{sum(counts.values()):,}, and {count_fixed_numbers(connector):,} fixed numbers"
    features = experiment.features
    yield "encoder", f"{num_encoder_parameters(experiment.encoder, features.deepest_layer):,} held, none trained"
    yield "language model", f"{shape.num_parameters:,}"
    if (lora := experiment.file.recipe.language_model.lora_spec()) is not None:
        targets = lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)
        count = count_adapters(experiment.language_model.model, lora)
        yield "adapters", f"{count:,}: rank {lora.rank}, alpha {lora.alpha:g}, on {targets}"
