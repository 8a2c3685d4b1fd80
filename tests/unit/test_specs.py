"""Identity: what has a fingerprint, and what has none because its bytes are not here."""

from dataclasses import dataclass, replace

import pytest

from model.errors import CanonicalisationError
from model.specs import LanguageModelSpec, UnknownDigest, canonical_json, fingerprint, fingerprint_if_known


@dataclass(frozen=True, kw_only=True, slots=True)
class OuterSpec:
    """A spec that holds others."""

    models: tuple[LanguageModelSpec, ...]
    name: str = "outer"


KNOWN = LanguageModelSpec(model="here", weights_sha256="a" * 64)
UNKNOWN = LanguageModelSpec(model="away", weights_sha256=UnknownDigest("the weights of away"))


def test_what_is_known_has_one_fingerprint():
    spec = OuterSpec(models=(KNOWN,))
    assert fingerprint_if_known(spec) == fingerprint(spec)
    assert not isinstance(fingerprint_if_known(spec), UnknownDigest)


def test_an_unknown_digest_anywhere_leaves_no_fingerprint():
    spec = OuterSpec(models=(KNOWN, UNKNOWN))
    for refused in (fingerprint, canonical_json):
        with pytest.raises(CanonicalisationError, match=r"OuterSpec\.models\[1\]\.weights_sha256: the weights of away are not on this machine"):
            refused(spec)
    found = fingerprint_if_known(spec)
    assert isinstance(found, UnknownDigest)
    assert found == "the weights of away"
    # What depends on it in turn has none either.
    with pytest.raises(CanonicalisationError):
        fingerprint(OuterSpec(models=(), name=found))


def test_its_text_alone_is_no_unknown_digest():
    """The same words as plain text are text: only the type tells."""
    assert len(fingerprint(replace(UNKNOWN, weights_sha256=str(UNKNOWN.weights_sha256)))) == 64


def test_what_is_no_spec_is_refused_whether_known_or_not():
    for wrong in (UnknownDigest("x"), 3, OuterSpec):
        with pytest.raises(CanonicalisationError):
            fingerprint(wrong)
