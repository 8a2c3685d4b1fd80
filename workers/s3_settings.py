"""How S3 is reached: endpoint, region, addressing and credentials, found once and told to all four clients in their own words.

The clients read the AWS environment by themselves, but not alike: only botocore reads `endpoint_url` of a profile, only Arrow and obstore read
AWS_REGION, obstore reads no profile at all. So what `resolve_s3_settings` finds is what every client is given. Credentials are not in it: s3fs,
Arrow and delta-rs find them in the environment, the profile or the machine's role by themselves, and obstore asks botocore for them.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, cast

import pyarrow.fs

from workers.errors import CredentialsError, StorageError

__all__ = ["S3Settings", "resolve_s3_settings"]

AddressingStyle = Literal["path", "virtual"]

# Each client retries busy answers and broken connections by itself, with jitter; `persistently` asks again where all of these were in vain. A server
# that is away costs botocore pauses of 1.5 s in the mean and obstore less before the error; Arrow 7.5 s, as nothing asks again for it.
_BOTOCORE_TRIES = 3
_ARROW_TRIES = 5
_OBSTORE_RETRIES = 3
_MAX_CONNECTIONS = 64
"""botocore's own 10 would let 32 requests in flight wait for each other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class S3Settings:
    """Where and how a bucket is reached. Holds no credentials."""

    endpoint_url: str | None
    """None is AWS itself."""
    region: str
    addressing_style: AddressingStyle
    """Whether the bucket is in the path of a URL or in its host."""

    def s3fs(self) -> Any:
        """s3fs over this, for control objects and listings."""
        import s3fs

        filesystem = s3fs.S3FileSystem(
            # Listings are never cached: another process may have written. Ranges bypass s3fs, so it needs no read-ahead either.
            use_listings_cache=False,
            default_cache_type="none",
            endpoint_url=self.endpoint_url,
            client_kwargs={"region_name": self.region},
            config_kwargs={
                "retries": {"mode": "standard", "total_max_attempts": _BOTOCORE_TRIES},
                "max_pool_connections": _MAX_CONNECTIONS,
                "s3": {"addressing_style": self.addressing_style},
            },
        )
        # Its own retries have no jitter and pass most busy codes by; what botocore does not try again, `persistently` does.
        filesystem.retries = 1
        return filesystem

    def arrow(self) -> pyarrow.fs.FileSystem:
        """Arrow's file system over this."""
        options: dict[str, Any] = {"region": self.region, "retry_strategy": pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=_ARROW_TRIES)}
        # Arrow addresses by path only where it is told an endpoint.
        endpoint = self.endpoint_url or (f"https://s3.{self.region}.amazonaws.com" if self.addressing_style == "path" else None)
        if endpoint is not None:
            scheme, _, host = endpoint.partition("://")
            options |= {"endpoint_override": host, "scheme": scheme, "force_virtual_addressing": self.addressing_style == "virtual"}
        return pyarrow.fs.S3FileSystem(**options)

    def obstore(self, bucket: str) -> Any:
        """The client that obstore makes of a bucket."""
        import obstore.store

        endpoint = self._bucket_endpoint(bucket)
        return obstore.store.S3Store(
            bucket,
            config={
                "region": self.region,
                "virtual_hosted_style_request": self.addressing_style == "virtual",
                **({"aws_endpoint_url_s3": endpoint} if endpoint else {}),
            },
            client_options={
                "allow_http": endpoint is not None and endpoint.startswith("http://"),
                "connect_timeout": "10s",
                "timeout": "300s",  # of a whole request: its own 30 s are too few for 64 MiB at 2 MB/s
                "read_timeout": "30s",
            },
            retry_config={"max_retries": _OBSTORE_RETRIES, "retry_timeout": timedelta(seconds=300)},
            credential_provider=_credential_provider(),
        )

    def delta_options(self, bucket: str) -> dict[str, str]:
        """Storage options for deltalake and polars. delta-rs retries a busy store ten times with jitter, which needs no changing."""
        options = {
            "aws_conditional_put": "etag",
            "aws_force_credential_load": "true",  # else a profile counts only where no endpoint is named
            "aws_region": self.region,
            "aws_virtual_hosted_style_request": str(self.addressing_style == "virtual").lower(),
        }
        endpoint = self._bucket_endpoint(bucket)
        if endpoint is not None:
            # AWS_ENDPOINT_URL_S3 of the environment would win over an option of the general name.
            options |= {"aws_endpoint": endpoint, "aws_endpoint_url_s3": endpoint}
            if endpoint.startswith("http://"):
                options["aws_allow_http"] = "true"
        return options

    def _bucket_endpoint(self, bucket: str) -> str | None:
        """As the Rust clients want it: with the bucket in the host where it is addressed so."""
        if self.endpoint_url is None or self.addressing_style == "path":
            return self.endpoint_url
        scheme, _, host = self.endpoint_url.partition("://")
        return f"{scheme}://{bucket}.{host}"


def resolve_s3_settings(bucket: str) -> S3Settings:
    """What the AWS environment and the profile that it names say about reaching a bucket; the environment wins.

    Args:
        bucket: its name; one with dots is addressed by path unless told otherwise, as its host would match no certificate.

    Returns:
        The settings for every client.

    Raises:
        StorageError: an addressing style or an endpoint that is none.
    """
    import botocore.session

    session = botocore.session.get_session()
    profile = session.get_scoped_config()
    endpoint = _endpoint_url(session, profile)
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        raise StorageError(f"the S3 endpoint of the AWS environment or profile is a URL with http:// or https://, found {endpoint!r}")
    style = os.environ.get("AWS_S3_ADDRESSING_STYLE") or _section(profile, "s3").get("addressing_style") or "auto"
    if style == "auto":
        # As botocore does it: servers of one's own seldom have a name for each bucket.
        style = "path" if endpoint is not None or "." in bucket else "virtual"
    if style not in ("path", "virtual"):
        raise StorageError(f"the S3 addressing style of the AWS environment or profile is auto, path or virtual, found {style!r}")
    return S3Settings(
        endpoint_url=endpoint,
        region=os.environ.get("AWS_REGION") or session.get_config_variable("region") or "us-east-1",
        addressing_style=cast("AddressingStyle", style),
    )


def _endpoint_url(session: Any, profile: dict[str, Any]) -> str | None:
    """The configured endpoint, in the order of the AWS tools."""
    if session.get_config_variable("ignore_configured_endpoint_urls"):
        return None
    services = session.full_config.get("services", {}).get(profile.get("services"), {})
    found = (
        os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
        or _section(services, "s3").get("endpoint_url")
        or profile.get("endpoint_url")
    )
    return found.rstrip("/") if found else None


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A nested section of an AWS configuration; a plain value in its place is none."""
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _credential_provider() -> Callable[[], Any]:
    """Credentials for obstore out of botocore's whole chain: environment, profile, role, machine. Renewed where they expire."""
    import botocore.credentials
    import botocore.session

    credentials = botocore.session.get_session().get_credentials()
    if credentials is None:
        raise CredentialsError("no AWS credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")

    def current() -> dict[str, Any]:
        frozen = credentials.get_frozen_credentials()
        # botocore renews what expires ten minutes before it does, so what it gives is good for that long.
        expires = isinstance(credentials, botocore.credentials.RefreshableCredentials)
        expires_at = datetime.now(UTC) + timedelta(minutes=10) if expires else None
        return {"access_key_id": frozen.access_key, "secret_access_key": frozen.secret_key, "token": frozen.token, "expires_at": expires_at}

    return current
