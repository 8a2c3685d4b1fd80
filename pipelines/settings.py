"""Execution settings: `--set key=value` of the command line before what the recipe's `[execution]` suggests before the defaults.

All are checked against the fields of `ExecutionSettings`. Identity is refused here on purpose: what changes a result stands elsewhere in the recipe,
where it enters the fingerprints.
"""

import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from model.errors import closest
from pipelines.errors import SettingError
from pipelines.recipe import Execution, Recipe
from pipelines.recipe_fields import Table
from workers.execution import ExecutionSettings

__all__ = ["execution_settings", "settings_from_words", "size_from_word"]


def settings_from_words(words: Iterable[str]) -> dict[str, str]:
    """`["train_workers=2"]` as `{"train_workers": "2"}`.

    Args:
        words: as given on the command line.

    Returns:
        Texts by key.

    Raises:
        SettingError: a word without `=`, or a key twice.
    """
    settings: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise SettingError(f"--set {word}: found no 'key=value'; write for example --set train_workers=2")
        if key in settings:
            raise SettingError(f"--set {key}: found twice; give each setting once")
        settings[key.strip()] = value.strip()
    return settings


def execution_settings(settings: Mapping[str, str], recipe: Recipe | None = None) -> ExecutionSettings:
    """Settings by name, as text, turned into the type.

    Args:
        settings: names and texts.
        recipe: what it suggests stands for the absent ones; without one, they keep their default.

    Returns:
        The settings.

    Raises:
        SettingError: an unknown name, a recipe's key, or a value that the setting cannot have.
    """
    hints = get_type_hints(ExecutionSettings)
    names = [field.name for field in fields(ExecutionSettings)]
    values: dict[str, Any] = {} if recipe is None else dict(recipe.suggested_settings)
    for key, text in settings.items():
        if key not in names:
            raise SettingError(_unknown(key, names))
        values[key] = _parse(key, text, hints[key])
    try:
        return ExecutionSettings(**values)
    except ValueError as error:
        raise SettingError(f"--set {error}") from error


def _unknown(key: str, names: list[str]) -> str:
    if key.rpartition(".")[2] in _recipe_keys(Recipe):
        return f"--set {key}: this belongs to the experiment, not to its execution; edit the recipe, so that the result gets an identity of its own"
    return f"--set {key}: no such setting; {closest(key, names)}settings are {', '.join(names)}"


def _recipe_keys(model: type[Table]) -> set[str]:
    """Every key that may stand anywhere in a recipe."""
    keys: set[str] = set()
    seen: set[Any] = set()
    waiting: list[Any] = [model]
    while waiting:
        annotation = waiting.pop()
        if isinstance(annotation, type) and issubclass(annotation, Table) and annotation not in (*seen, Execution):
            seen.add(annotation)
            for name, field in annotation.model_fields.items():
                keys.add(field.alias or name)
                waiting.append(field.annotation)
        else:
            waiting.extend(get_args(annotation))
    return keys


def _parse(key: str, text: str, hint: Any) -> Any:
    options = get_args(hint) if get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if type(None) in options and text.lower() == "none":
        return None
    for option in options:
        if get_origin(option) is Literal:
            for value in get_args(option):
                if str(value) == text:
                    return value
        if option is str:
            return text
        if option is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if option in (int, float):
            try:
                return option(text)
            except ValueError:
                continue
    raise SettingError(f"--set {key}: found {text!r}; allowed: {_allowed(options)}")


def _allowed(options: tuple[Any, ...]) -> str:
    words = []
    for option in options:
        if option is type(None):
            words.append("none")
        elif get_origin(option) is Literal:
            words.extend(str(value) for value in get_args(option))
        else:
            words.append({int: "a whole number", float: "a number", bool: "true or false"}.get(option, str(option)))
    return ", ".join(words)


def size_from_word(word: str) -> tuple[int, int]:
    """A picture's size, as `--size` takes it.

    Args:
        word: such as `1024x768`.

    Returns:
        Width and height in pixels.

    Raises:
        SettingError: it is none.
    """
    width, x, height = word.partition("x")
    sides = (width, height)
    if not (x and all(side.isascii() and side.isdigit() and len(side) < 10 and int(side) for side in sides)):
        raise SettingError(f"--size: found {word!r}; allowed: width and height in pixels, such as 1024x768")
    return int(width), int(height)
