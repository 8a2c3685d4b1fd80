"""Who asks S3: what botocore's whole chain finds, or fsspec's own configuration, for the clients that do not find it by themselves.

s3fs and delta-rs follow the whole chain: environment, profile, a role that a profile assumes, process, machine. Arrow's chain knows no role that a
profile assumes, and takes plain keys that it finds or none, without a word; obstore reads no profile at all. Keys of fsspec's configuration reach
s3fs alone. So Arrow and obstore are given what is found here, and delta-rs where it is fsspec's.
"""

import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from workers.errors import CredentialsError

__all__ = ["FsspecConfig", "Keys", "S3Credentials", "given_keys", "read_fsspec_config"]

_NAMED_BY_AWS = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_DEFAULT_PROFILE")
"""Variables that say who asks, and win over fsspec's configuration."""
_S3FS_ALONE = {"anon": False, "profile": None, "requester_pays": False, "s3_additional_kwargs": None, "use_ssl": True, "version_aware": False}
"""What fsspec's configuration may say of a bucket and s3fs alone would follow, with what is as good as unsaid."""
_ADVICE = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, in its place: all clients follow those."


@dataclass(frozen=True, kw_only=True, slots=True)
class Keys:
    """Keys that never change."""

    access_key: str
    secret_key: str = field(repr=False)
    token: str | None = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class FsspecConfig:
    """What fsspec's own configuration says of S3: the variables FSSPEC_S3_* and the files in ~/.config/fsspec."""

    keys: Keys | None
    endpoint_url: str | None
    region: str | None


def read_fsspec_config() -> FsspecConfig:
    """What fsspec's own configuration says of S3, as every client can follow it.

    Returns:
        What it says; all None where it says nothing.

    Raises:
        CredentialsError: it says something that s3fs alone would follow, or half of a pair of keys.
    """
    import fsspec.config

    found: dict[str, Any] = {}
    for protocol in ("s3", "s3a"):  # s3fs answers to both
        found |= fsspec.config.conf.get(protocol, {})
    if alone := [name for name, unsaid in _S3FS_ALONE.items() if found.get(name, unsaid) != unsaid]:
        raise CredentialsError(
            f"fsspec's configuration of S3 sets {alone[0]} (FSSPEC_S3_{alone[0].upper()}, or in ~/.config/fsspec), which s3fs alone would follow; "
            f"remove it. {_ADVICE}"
        )
    # Values of variables are read as JSON, so that a key of digits is a number.
    key, secret, token = (str(value) if (value := found.get(name)) else None for name in ("key", "secret", "token"))
    if (key is None) != (secret is None):
        raise CredentialsError(
            "fsspec's configuration of S3 has one of FSSPEC_S3_KEY and FSSPEC_S3_SECRET (or of key and secret in ~/.config/fsspec), expected both or "
            f"none. {_ADVICE}"
        )
    client = found.get("client_kwargs")
    client = client if isinstance(client, dict) else {}
    return FsspecConfig(
        keys=None if key is None or secret is None else Keys(access_key=key, secret_key=secret, token=token),
        endpoint_url=found.get("endpoint_url") or client.get("endpoint_url"),
        region=client.get("region_name"),
    )


def given_keys() -> Keys | None:
    """The keys of fsspec's configuration, unless the AWS environment names others.

    Raises:
        CredentialsError: that configuration is one that not every client can follow.
    """
    keys = read_fsspec_config().keys
    return None if any(os.environ.get(name) for name in _NAMED_BY_AWS) else keys


class S3Credentials:
    """The credentials of this process, found when they are first asked for and renewed where they expire.

    Sent to another process it finds that one's own: no secret travels.
    """

    def __reduce__(self) -> tuple[type["S3Credentials"], tuple[()]]:
        return (S3Credentials, ())

    def current(self) -> Any:
        """The credentials that are good now, and for ten minutes at least: access_key, secret_key and token; None where there are none.

        Raises:
            CredentialsError: fsspec's configuration is one that not every client can follow.
        """
        return None if self._found is None else self._found.get_frozen_credentials()

    @property
    def expire(self) -> bool:
        """Whether they are to be asked for again."""
        import botocore.credentials

        return isinstance(self._found, botocore.credentials.RefreshableCredentials)

    @cached_property
    def _found(self) -> Any:
        import botocore.credentials
        import botocore.session

        keys = given_keys()
        if keys is not None:
            return botocore.credentials.Credentials(keys.access_key, keys.secret_key, keys.token)
        return botocore.session.get_session().get_credentials()
