"""Recipes as files: found by name or path, read with what they extend, checked, their mistakes told in the words of a recipe."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from model.errors import closest
from pipelines.errors import RecipeError
from pipelines.inheritance import read_recipe
from pipelines.recipe import Recipe
from pipelines.recipe_fields import with_tuples
from pipelines.schedule_tables import preset_phases

__all__ = [
    "RECIPES_FOLDER",
    "SHOWN_MISTAKES",
    "RecipeFile",
    "load_recipe",
    "recipe_files",
]

RECIPES_FOLDER = Path(__file__).parent / "recipes"


SHOWN_MISTAKES = 8
"""More than these are counted, not told: most of them follow from one misunderstanding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeFile:
    """A checked recipe and the file it came from."""

    path: Path
    text: str
    """Its own text, and behind it that of what it extends."""
    recipe: Recipe


def recipe_files() -> dict[str, Path]:
    """The recipes that come with Loupe, by name; those in a folder, such as `components/sti`, with its name in front."""
    found = {path.relative_to(RECIPES_FOLDER).with_suffix("").as_posix(): path for path in RECIPES_FOLDER.rglob("*.toml")}
    return dict(sorted(found.items(), key=lambda item: ("/" in item[0], item[0])))


def _written_place(location: tuple[int | str, ...], data: Any) -> tuple[int | str, ...]:
    """Where a preset's phase was changed in the file, for a place within that phase."""
    schedule = data.get("schedule") if isinstance(data, dict) else None
    if not isinstance(schedule, dict) or "preset" not in schedule or location[:1] != ("schedule",):
        return location
    match location[1:]:
        case ("sft", *rest):
            number, inside = -1, rest
        case ("align", int(number), *rest):
            inside = rest
        case _:
            return location
    phase = tuple(preset_phases(schedule["preset"]))[number]
    return ("schedule", "change", phase, *inside)


def _field_path(location: tuple[int | str, ...], data: Any, *, names_missing_key: bool) -> str:
    """Dotted path in the file. Pydantic's location also names union members, which stand nowhere in the file; those are left out."""
    path = ""
    here = data
    location = _written_place(location, data)
    for position, part in enumerate(location):
        if isinstance(part, int):
            path += f"[{part}]"
            here = here[part] if isinstance(here, list) and part < len(here) else None
        elif isinstance(here, dict) and part in here:
            path += f".{part}"
            here = here[part]
        elif names_missing_key and position == len(location) - 1:
            path += f".{part}"
    return path.lstrip(".") or "top level"


def _describe(error: ErrorDetails, data: Any) -> str:
    path = _field_path(error["loc"], data, names_missing_key=error["type"] == "missing")
    message = error["msg"]
    match error["type"]:
        case "missing":
            return f"{path}: found nothing; this key is required"
        case "unknown_key" | "told":
            return f"{path}: {message}"
        case "union_tag_not_found":
            return f"{path}: found no 'kind'; allowed kinds: {error['ctx']['discriminator'] and _kinds(error)}"
        case "union_tag_invalid":
            allowed = [tag.strip().strip("'") for tag in error["ctx"]["expected_tags"].split(",")]
            tag = error["ctx"]["tag"]
            return f"{path}.kind: found {tag!r}; {closest(tag, allowed)}allowed: {', '.join(allowed)}"
        case "literal_error":
            allowed = error["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
            hint = closest(error["input"], allowed) if isinstance(error["input"], str) else ""
            return f"{path}: found {error['input']!r}; {hint}allowed: {', '.join(allowed)}"
        case "tuple_type" | "model_type" | "model_attributes_type" | "too_short":
            message = _shape(error["type"], path)
    return f"{path}: found {json.dumps(error['input'], default=str)}; allowed: {message}"


_LIST_EXAMPLES = {
    "sources": '[{ kind = "rendered", family = "charts", num_images = 240 }]',
    "layers": "[2, 5]",
    "grids": "[[1, 2], [2, 1], [2, 2]]",
    "train": '["global_mlp"]',
    "metrics": '["exact_match", "anls"]',
    "modes": '["blind", "both"]',
    "seeds": "[0, 1]",
}


def _list_example(path: str, key: str) -> str:
    """Sources are tables in a dataset and labels in a phase."""
    return '["charts"]' if key == "sources" and path.startswith("schedule") else _LIST_EXAMPLES[key]


def _shape(error_type: str, path: str) -> str:
    """How the list or table that belongs at a path is written."""
    key = path.rpartition(".")[2]
    if path.startswith("schedule.") and key.startswith("align"):
        return "any number of tables, each written [[schedule.align]]"
    match error_type:
        case "tuple_type":
            return f"a list, such as {_list_example(path, key)}"
        case "too_short":
            return f"a list of at least 1, such as {_list_example(path, key)}"
        case _:
            return "a table, written { key = value, ... }" if "[" in path else f"a table, written [{path}]"


def _kinds(error: ErrorDetails) -> str:
    """The kinds of the union at an error's place, for tables that name none."""
    match error["loc"][-1]:
        case "fusion":
            return "single, sti, sci, dci"
        case "adapters":
            return "mlp, gated_mixture"
        case "selector":
            return "text_guided, learnable"
        case _:
            return "rendered, llava_json"


def _own_mistakes(errors: list[ErrorDetails]) -> list[ErrorDetails]:
    """Without those that only follow from others.

    Such are a list that a refused element left too short, and what a value would have to be to be another of the types that may stand there.
    """

    def follows(detail: ErrorDetails) -> bool:
        match detail["type"]:
            case "too_short":
                return any(len(other["loc"]) > len(detail["loc"]) and other["loc"][: len(detail["loc"])] == detail["loc"] for other in errors)
            case "model_type":  # a word where a table may stand too
                return any(other["type"] == "literal_error" and other["loc"][:-1] == detail["loc"][:-1] for other in errors)
            case "literal_error":  # a table where a word may stand too
                beside = detail["loc"][:-1]
                return isinstance(detail["input"], dict) and any(other is not detail and other["loc"][: len(beside)] == beside for other in errors)
            case _:
                return False

    return [detail for detail in errors if not follows(detail)]


def _refuse(path: Path, lines: list[str]) -> RecipeError:
    if len(lines) == 1:
        return RecipeError(f"recipe {path}: {lines[0]}")
    first = f", the first {SHOWN_MISTAKES}" if len(lines) > SHOWN_MISTAKES else ""
    return RecipeError(f"recipe {path} has {len(lines)} mistakes{first}:" + "".join(f"\n  {line}" for line in lines[:SHOWN_MISTAKES]))


def _recipe_path(name_or_path: str) -> Path:
    """Where the recipe lies that a word names.

    Args:
        name_or_path: the name of a recipe that comes with Loupe, or a path; `~` is the home folder.

    Returns:
        A file that is there.

    Raises:
        RecipeError: there is no such recipe, or it is a folder.
    """
    shipped = recipe_files()
    if name_or_path in shipped:
        return shipped[name_or_path]
    path, there, folder = Path(name_or_path), False, False
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # a name that no file can have, or the home folder of nobody
        path = path.expanduser()
        there, folder = path.is_file(), path.is_dir()
    if there:
        return path
    advice = f"give the path of a TOML file, or one of: {', '.join(shipped)}."
    if folder:
        raise RecipeError(f"found the folder {path}, but a recipe is a TOML file; {advice}")
    looks_like_path = "/" in name_or_path or name_or_path.endswith(".toml")
    what = f"no file {path}" if looks_like_path else f"no recipe named {name_or_path!r}"
    below = [name for name in shipped if name.rpartition("/")[2] == name_or_path]
    meant = f"did you mean {below[0]!r}? " if below else closest(name_or_path, list(shipped))
    raise RecipeError(f"found {what}; {meant}{advice}")


def load_recipe(name_or_path: str) -> RecipeFile:
    """Read and check a recipe.

    Args:
        name_or_path: the name of a recipe that comes with Loupe, or the path of a TOML file.

    Returns:
        The recipe with its file.

    Raises:
        RecipeError: no such file, no TOML, or something in it, or in what it extends, that is not allowed. The message names file, field, what was
            found and what is allowed.
    """
    path = _recipe_path(name_or_path)
    read = read_recipe(path, _recipe_path)
    text, data = read.text, read.data
    try:
        recipe = Recipe.model_validate(with_tuples(data))
    except ValidationError as error:
        lines = list(dict.fromkeys(_describe(detail, data) for detail in _own_mistakes(error.errors())))
        raise _refuse(path, lines) from error
    return RecipeFile(path=path, text=text, recipe=recipe)
