"""What `loupe import-weights` and `loupe convert-weights` do: make others' weights into ones that a recipe can name, and say how it names them."""

from collections.abc import Sequence
from pathlib import Path

from model.errors import HubError, ModelError
from pipelines.errors import NothingThereError, RecipeError
from pipelines.recipe_files import RecipeFile
from pipelines.stages import shown_path
from pipelines.wording import bytes_text

__all__ = ["convert", "import_for_recipe"]


def import_for_recipe(sources: Sequence[Path], file: RecipeFile, root: str, *, connector_only: bool, dry_run: bool) -> None:
    """Import released weights for a recipe, and print the report.

    Only the recipe's connector and the shape of its encoder are looked at, and nothing is fetched: the encoder's weights need not be here, and the
    language model that it names may be the one that the import makes.

    Args:
        sources: the folder of a released model, or its files.
        file: the recipe.
        root: where the import goes.
        connector_only: leave a whole model's language model out.
        dry_run: write nothing.

    Raises:
        RecipeError: no sources, or the recipe's connector does not fit its encoder.
        ModelError: the weights are refused.
    """
    if not sources:
        raise RecipeError("import-weights: found no files to import; give the folder of a released model, or its .bin or .safetensors files")
    from model.encoder import plan_encoder
    from workers.importing import import_weights
    from workers.storage import Store

    try:
        encoder = plan_encoder(file.recipe.encoder.model)
        connector = file.recipe.connector_spec(encoder)
    except ModelError as error:
        raise RecipeError(f"recipe {file.path}: {error}") from error
    store = Store(root)
    places = [source.expanduser() for source in sources]
    record = import_weights(places, connector, encoder, file.recipe.view_spec(), store, connector_only=connector_only, write=not dry_run)
    for line in record.report.lines():
        print(line)
    if dry_run and not record.files:
        print("Nothing was written.")
        return
    print()
    print(f"Put into {file.path}:")
    print(f'  [connector]       weights = "{shown_path(store.url(record.connector))}"')
    model = record.language_model
    if model is None:
        return
    print(f'  [language_model]  model = "{shown_path(store.url(f"{record.folder}/language_model"))}"')
    print(f"({model.model_type}, {model.num_tensors} tensors, {bytes_text(model.num_bytes)})")
    if store.local_path() is None:
        print("A language model is loaded from a folder: copy it from the root to this machine, and name that folder.")


def convert(source: str, target: Path) -> None:
    """Convert a model's .bin weights to safetensors, and say where they are.

    Args:
        source: a folder, or a hub id, of which the hub's client fetches what is needed.
        target: the folder to write.

    Raises:
        NothingThereError: there is no such folder, and the hub gives none.
        ReleasedWeightsError: the weights are refused, or the target holds something.
    """
    from model.conversion import convert_folder

    target = target.expanduser()
    made = convert_folder(_model_folder(source), target)
    print(f"{made.num_tensors} tensors, {made.num_values / 1e6:,.2f} M numbers, {bytes_text(made.num_bytes)}, as {', '.join(made.files)}")
    print(f'Put into the recipe:  model = "{target}"')


def _model_folder(source: str) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    from model.conversion import HUB_PATTERNS
    from model.weights import fetch_snapshot

    try:
        return fetch_snapshot(source, HUB_PATTERNS)
    except HubError as error:
        raise NothingThereError(f"convert-weights {source}: {error}") from error
