"""What turns a spec into a name: canonical JSON, its sha256, and the differences between two.

Input: specs. Output: texts and digests. Invariant: two specs with the same fingerprint promise the same result, and what has no canonical form is
refused.
"""

import hashlib
import json
from dataclasses import fields, is_dataclass
from math import isfinite
from typing import Any

from model.errors import CanonicalisationError

__all__ = ["UnknownDigest", "canonical_json", "fingerprint", "fingerprint_if_known", "spec_differences"]

SpecValue = None | bool | int | float | str | list[Any] | dict[str, Any]


class UnknownDigest(str):
    """Stands where the digest of bytes would, when those are not on this machine; its text says what they are, such as `the weights of owner/name`.

    It has no canonical form, so nothing that holds it has a fingerprint. What is described without its bytes can be planned, and nothing else: every
    key, table and folder is named by a fingerprint.
    """

    __slots__ = ()


def _canonical(value: Any, path: str) -> SpecValue:
    if isinstance(value, UnknownDigest):
        raise CanonicalisationError(f"{path}: {value} are not on this machine, so what depends on them has no key; put them there")
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _canonical(getattr(value, field.name), f"{path}.{field.name}") for field in fields(value)}
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            if not isfinite(value):
                raise CanonicalisationError(f"{path}: {value} has no canonical form; use a finite number")
            return value
        case tuple() | list():
            return [_canonical(item, f"{path}[{position}]") for position, item in enumerate(value)]
        case dict():
            if bad := [key for key in value if not isinstance(key, str)]:
                raise CanonicalisationError(f"{path}: keys must be strings, found {bad[0]!r}")
            return {key: _canonical(item, f"{path}.{key}") for key, item in value.items()}
        case _:
            raise CanonicalisationError(f"{path}: {type(value).__name__} has no canonical form; a spec holds numbers, strings, tuples and specs only")


def canonical_json(spec: Any) -> str:
    """The one JSON text of a spec: keys sorted, no spaces, floats by shortest repr.

    Args:
        spec: a spec dataclass, or dicts, lists and scalars.

    Returns:
        JSON text in ASCII.

    Raises:
        CanonicalisationError: something in it has no canonical form; the message names its path.
    """
    return json.dumps(_canonical(spec, type(spec).__name__), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def fingerprint(spec: Any) -> str:
    """sha256 (hex) over the canonical JSON of a spec and the spec's type name. Paths use its first 16 characters.

    Args:
        spec: a spec dataclass instance (any frozen dataclass whose name ends in Spec).

    Returns:
        64 hex digits.

    Raises:
        CanonicalisationError: it is no spec, or something in it has no canonical form.
    """
    if not is_dataclass(spec) or isinstance(spec, type) or not type(spec).__name__.endswith("Spec"):
        raise CanonicalisationError(f"only specs have a fingerprint, found {type(spec).__name__}")
    return hashlib.sha256(f"{type(spec).__name__}:{canonical_json(spec)}".encode()).hexdigest()


def fingerprint_if_known(spec: Any) -> str:
    """The fingerprint of a spec, for a plan of what cannot be run yet.

    Args:
        spec: as `fingerprint` takes it.

    Returns:
        64 hex digits, or the first UnknownDigest that the spec holds, again one.

    Raises:
        CanonicalisationError: as for `fingerprint`, but for unknown digests.
    """
    unknown = _first_unknown(spec)
    return fingerprint(spec) if unknown is None else unknown


def _first_unknown(value: Any) -> UnknownDigest | None:
    if isinstance(value, UnknownDigest):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        items = [getattr(value, field.name) for field in fields(value)]
    else:
        items = list(value) if isinstance(value, tuple | list) else []
    return next((unknown for item in items if (unknown := _first_unknown(item)) is not None), None)


def spec_differences(stored: SpecValue, asked: SpecValue, path: str = "") -> list[str]:
    """Field-by-field differences between two canonical values, one line each, for refusals that teach.

    Args:
        stored: what is on record, parsed from JSON.
        asked: what is wanted now, parsed from JSON.
        path: prefix of the field path.

    Returns:
        Lines; none when the values are equal.
    """
    if isinstance(stored, dict) and isinstance(asked, dict):
        lines = []
        for key in sorted(stored.keys() | asked.keys()):
            here = f"{path}.{key}" if path else key
            if key not in stored:
                lines.append(f"{here}: not recorded, asked {json.dumps(asked[key])}")
            elif key not in asked:
                lines.append(f"{here}: recorded {json.dumps(stored[key])}, not asked")
            else:
                lines.extend(spec_differences(stored[key], asked[key], here))
        return lines
    if stored != asked:
        return [f"{path or 'value'}: recorded {json.dumps(stored)}, asked {json.dumps(asked)}"]
    return []
