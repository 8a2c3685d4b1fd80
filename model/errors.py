"""What can go wrong in the model package.

ModelError
|-- SpecError                a spec holds a value that cannot be right
|   |-- CanonicalisationError  a spec holds something that has no canonical form, so no identity
|-- DecodingError            JSON values are not those of the dataclass they should be
|-- HubError                 the hub does not give a model
|-- EncoderError             an encoder folder is missing, incomplete or of an unknown family
|-- LanguageModelError       a language model folder is missing, incomplete or unusable
|-- ImageError               bytes that are not an image Loupe accepts
|-- MissingMapError          a connector asks for a map that the features do not hold
|-- ConversationError        a conversation cannot be tokenised with a correct loss mask
|-- FrozenBlockChangedError  a block that a phase must not train was changed by it
|-- ExportError              an export folder is incomplete or does not fit its encoder
|-- ReleasedWeightsError     released weights cannot be read or are of another model
|-- FoldingError             a connector is not what a stock model of transformers computes
"""

import difflib
from collections.abc import Collection
from typing import Literal

__all__ = [
    "CanonicalisationError",
    "ConversationError",
    "ConversationReason",
    "DecodingError",
    "EncoderError",
    "ExportError",
    "FoldingError",
    "FrozenBlockChangedError",
    "HubError",
    "ImageError",
    "LanguageModelError",
    "MissingMapError",
    "ModelError",
    "ReleasedWeightsError",
    "SpecError",
    "closest",
    "first_line",
]

ConversationReason = Literal["conversation_empty", "conversation_marks", "conversation_template", "conversation_too_long", "conversation_unmasked"]
"""Why a conversation is refused: nothing is said; a mark of the prompt stands in a turn; the template refuses or rewrites it; even its first turn
does not fit; an answer has no tokens of its own, or a border that lies inside a token."""


def closest(found: str, allowed: Collection[str]) -> str:
    """The word that was probably meant, as a part of a message.

    Args:
        found: what stands there.
        allowed: what could.

    Returns:
        `did you mean ...? `, or nothing.
    """
    match = difflib.get_close_matches(found, allowed, n=1)
    return f"did you mean {match[0]!r}? " if match else ""


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its type's name when it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()


class ModelError(Exception):
    """Base of every error that the model package raises on purpose."""


class SpecError(ModelError, ValueError):
    """A spec holds a value that cannot be right; the message names the field, the value and what is allowed."""


class CanonicalisationError(SpecError):
    """A value has no canonical JSON form, so it cannot be part of an identity."""


class HubError(ModelError):
    """A name is no folder here, and the hub gives no model of that name."""


class DecodingError(ModelError):
    """JSON values do not fit the dataclass that they should become; the message names the path."""


class EncoderError(ModelError):
    """An encoder cannot be loaded or does not fit what is asked of it."""


class LanguageModelError(ModelError):
    """A language model cannot be loaded or does not fit what is asked of it."""


class ImageError(ModelError):
    """Bytes are not an image that Loupe accepts.

    Args:
        reason: see below.
        message: for people.

    Attributes:
        reason: closed vocabulary used as the quarantine's reason code.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return (ImageError, (self.reason, str(self)))  # so that it survives the way between processes


class MissingMapError(ModelError):
    """Features do not hold a map that a connector needs. Zeros would train, and be wrong."""


class ConversationError(ModelError):
    """A conversation cannot be tokenised with a loss mask that covers exactly its answers.

    Args:
        reason: see below.
        message: for people.

    Attributes:
        reason: closed vocabulary used as the quarantine's reason code.
    """

    def __init__(self, reason: ConversationReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["ConversationError"], tuple[str, str]]:
        return (ConversationError, (self.reason, str(self)))  # so that it survives the way between processes


class FrozenBlockChangedError(ModelError):
    """A block outside a phase's training set has other bytes at the phase's end than at its start."""


class ExportError(ModelError):
    """An export folder is incomplete, damaged or does not fit its encoder or language model."""


class ReleasedWeightsError(ModelError):
    """Released weights cannot be read, are incomplete, or are of another model than the recipe describes."""


class FoldingError(ModelError):
    """A connector is not what a stock model of transformers computes; the message says what cannot be folded and what can be done."""
