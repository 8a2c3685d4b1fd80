"""The fields of a recipe: a table that is closed to keys which it does not know, and values whose one mistake says all that is allowed."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

from model.errors import closest

__all__ = [
    "Count",
    "Fraction",
    "KeptShare",
    "Layer",
    "Mode",
    "NotNegative",
    "Part",
    "Positive",
    "Seed",
    "Share",
    "Switch",
    "Table",
    "Text",
    "Word",
    "allowed",
    "with_tuples",
]


def allowed(words: str) -> WrapValidator:
    """Whatever is wrong with a value, its one mistake says all that is allowed in the words of a recipe; pydantic's own tell types and bounds."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise PydanticCustomError("not_allowed", "{allowed}", {"allowed": words}) from error

    return WrapValidator(check)


Mode = Literal["blind", "global", "local", "both"]


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), allowed("a finite number greater than 0")]


NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), allowed("a finite number from 0 up")]


Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), allowed("a finite number from 0 up and less than 1")]


KeptShare = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), allowed("a finite number greater than 0 and at most 1; 1 keeps every token")]


Part = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False), allowed("a finite number greater than 0 and less than 1")]


Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), allowed("a finite number from 0 to 1")]


Count = Annotated[int, Field(ge=1), allowed("a whole number from 1 up")]


Layer = Annotated[int, Field(ge=0), allowed("a layer's number, from 0 up")]


Seed = Annotated[int, Field(ge=0, lt=2**32), allowed("a whole number from 0 to 4294967295")]


Text = Annotated[str, allowed("text in quotes")]


Word = Annotated[str, Field(min_length=1), allowed("text in quotes, of at least 1 character")]


Switch = Annotated[bool, allowed("true or false")]


def with_tuples(value: Any) -> Any:
    """TOML's arrays as tuples: strict validation, which refuses "3" for 3, refuses a list for a tuple as well."""
    match value:
        case dict():
            return {key: with_tuples(item) for key, item in value.items()}
        case list():
            return tuple(with_tuples(item) for item in value)
        case _:
            return value


class Table(BaseModel):
    """A TOML table: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_by_alias=True)

    @model_validator(mode="before")
    @classmethod
    def _know_every_key(cls, data: Any) -> Any:
        if isinstance(data, dict):
            allowed = [field.alias or name for name, field in cls.model_fields.items()]
            for key in data:
                if key not in allowed:
                    raise PydanticCustomError(
                        "unknown_key",
                        "found the unknown key {key}; {hint}allowed here: {allowed}",
                        {"key": repr(key), "hint": closest(str(key), allowed), "allowed": ", ".join(allowed)},
                    )
        return data
