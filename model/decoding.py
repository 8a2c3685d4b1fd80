"""JSON values back as dataclasses, by their field types.

Input: parsed JSON and the dataclass it should be. Output: an instance whose own checks have run. Invariant: a field that is missing, unknown or of
another type is an error that names its path; nothing is guessed or dropped. Needs the standard library alone.
"""

import dataclasses
import functools
import types
import typing
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from model.errors import DecodingError

__all__ = ["from_json"]

Decoded = TypeVar("Decoded")


def from_json(wanted: type[Decoded], value: Any, *, where: str = "value") -> Decoded:
    """JSON values back as a dataclass, by its field types. Unions of dataclasses are told apart by their `kind`.

    Args:
        wanted: the dataclass.
        value: parsed JSON.
        where: what to call the value in an error.

    Returns:
        An instance; its own checks have run.

    Raises:
        DecodingError: a field is missing, unknown or of another type.
    """
    return typing.cast("Decoded", _decode(wanted, value, where))


def _decode(wanted: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(wanted), get_args(wanted)
    if wanted is Any:
        return value
    if dataclasses.is_dataclass(wanted) and isinstance(wanted, type):
        return _decode_dataclass(wanted, value, where)
    if origin in (Union, types.UnionType):
        return _decode_union(arguments, value, where)
    if origin is Literal:
        if value not in arguments:
            raise DecodingError(f"{where}: expected one of {list(arguments)}, found {value!r}")
        return value
    if origin in (tuple, list) and isinstance(value, list):
        if origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
            if len(arguments) != len(value):
                raise DecodingError(f"{where}: expected {len(arguments)} values, found {len(value)}")
            return tuple(_decode(kind, item, f"{where}[{place}]") for place, (kind, item) in enumerate(zip(arguments, value, strict=True)))
        decoded = [_decode(arguments[0], item, f"{where}[{place}]") for place, item in enumerate(value)]
        return tuple(decoded) if origin is tuple else decoded
    if origin is dict and isinstance(value, dict):
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if wanted is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    plain = {str, int, bool, type(None)}
    if wanted in plain and type(value) is wanted:
        return value
    raise DecodingError(f"{where}: expected {getattr(wanted, '__name__', wanted)}, found {value!r}")


@functools.cache
def _type_hints(wanted: type) -> dict[str, Any]:
    return typing.get_type_hints(wanted)


def _decode_dataclass(wanted: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise DecodingError(f"{where}: expected the fields of {wanted.__name__}, found {value!r}")
    hints = _type_hints(wanted)
    fields = {field.name: field for field in dataclasses.fields(wanted)}
    if unknown := sorted(value.keys() - fields.keys()):
        raise DecodingError(f"{where}: {wanted.__name__} has no field {unknown[0]!r}; it has {sorted(fields)}")
    missing = [
        name
        for name, field in fields.items()
        if name not in value and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise DecodingError(f"{where}: {wanted.__name__} needs the field {missing[0]!r}")
    return wanted(**{name: _decode(hints[name], item, f"{where}.{name}") for name, item in value.items()})


def _decode_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    kinds = [argument for argument in arguments if argument is not type(None)]
    if isinstance(value, dict) and "kind" in value:
        for kind in kinds:
            if isinstance(kind, type) and dataclasses.is_dataclass(kind) and value["kind"] in get_args(_type_hints(kind).get("kind")):
                return _decode(kind, value, where)
    errors = []
    for kind in kinds:
        try:
            return _decode(kind, value, where)
        except DecodingError as error:
            errors.append(str(error))
    raise DecodingError(f"{where}: fits none of the types it may have: {'; '.join(errors)}")
