"""Recipes that extend others: a study's variants differ in a few lines, and say only those.

    extends = "demo"                     a recipe that comes with Loupe, or a path relative to this file
    without = ["connector.local"]        keys of it that are left out, before this file's own are laid over it

Tables are merged key by key; everything else, lists among them, replaces what was there. A name and a description are of one recipe alone, and are
not taken over: a run under another's name would be taken for it. Invariant: what comes out is a recipe as if it had been
written whole; identity knows nothing of how it was written.
"""

import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import closest
from pipelines.errors import RecipeError

__all__ = ["RecipeText", "read_recipe"]


_OWN = ("name", "description")
"""Keys that a recipe has of itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeText:
    """A recipe's file and all that it extends, merged."""

    text: str
    """Its own text, and behind it that of what it extends."""
    data: dict[str, Any]
    """As parsed, without `extends` and `without`."""


def read_recipe(path: Path, locate: Callable[[str], Path]) -> RecipeText:
    """Read a recipe's file and whatever it extends.

    Args:
        path: of the file.
        locate: where the recipe lies that `extends` names, if it is no path relative to the file.

    Returns:
        The merged recipe, unchecked.

    Raises:
        RecipeError: a file that is not there, no TOML, extends itself, or leaves out what is not there.
    """
    return _read(path, locate, ())


def _read(path: Path, locate: Callable[[str], Path], extending: tuple[Path, ...]) -> RecipeText:
    text, data = _parsed(path)
    name, without = data.pop("extends", None), data.pop("without", None)
    if name is None:
        if without is not None:
            raise RecipeError(f"recipe {path}: found without, but nothing that it extends; add extends, or leave without out")
        return RecipeText(text=text, data=data)
    if not isinstance(name, str) or not name:
        raise RecipeError(f"recipe {path}: extends: found {name!r}; allowed: the name of a recipe that comes with Loupe, or a path")
    beside = path.parent / name
    base_path = beside if beside.is_file() else locate(name)
    chain = (*extending, path.resolve())
    if base_path.resolve() in chain:
        raise RecipeError(f"recipe {path}: extends: found {name!r}, which extends this one in turn; write one of them whole")
    base = _read(base_path, locate, chain)
    for own in _OWN:
        base.data.pop(own, None)
    return RecipeText(
        text=f"{text.rstrip()}\n\n# What it extends: {name}\n{base.text}", data=_merged(_left_out(base.data, without or [], path, base_path), data)
    )


def _parsed(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path} is no UTF-8 text: {error.reason} at byte {error.start}. Save it as UTF-8.") from error
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read ({error.strerror}); check its permissions") from error
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe {path} is no valid TOML: {error}. Mend that place; strings need quotes, tables their brackets.") from error


def _left_out(data: dict[str, Any], without: Any, path: Path, base_path: Path) -> dict[str, Any]:
    """The base without some keys, given by their dotted paths."""
    if not isinstance(without, list) or not all(isinstance(key, str) for key in without):
        raise RecipeError(f'recipe {path}: without: found {without!r}; allowed: a list of keys, such as ["connector.local"]')
    for dotted in without:
        *tables, key = dotted.split(".")
        here: Any = data
        for table in tables:
            here = here.get(table) if isinstance(here, dict) else None
        if not isinstance(here, dict) or key not in here:
            raise RecipeError(
                f"recipe {path}: without: found {dotted!r}, which {base_path} does not have; {_closest_key(dotted, data)}allowed: keys that it has"
            )
        del here[key]
    return data


def _closest_key(dotted: str, data: dict[str, Any]) -> str:
    def keys(table: dict[str, Any], before: str = "") -> Iterator[str]:
        for key, value in table.items():
            yield before + key
            if isinstance(value, dict):
                yield from keys(value, f"{before}{key}.")

    return closest(dotted, list(keys(data)))


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        there = merged.get(key)
        # A table that names another kind is another thing: keys of the old kind have no place in it.
        replaces = isinstance(value, dict) and isinstance(there, dict) and value.get("kind", there.get("kind")) != there.get("kind")
        merged[key] = _merged(there, value) if isinstance(value, dict) and isinstance(there, dict) and not replaces else value
    return merged
