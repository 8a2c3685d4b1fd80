"""How S3 is reached: endpoint, region, addressing and trusted certificates, found once and told to all four clients in their own words.

The clients read the AWS environment by themselves, but not alike: only botocore reads `endpoint_url` of a profile, only Arrow and obstore read
AWS_REGION, obstore reads no profile at all, only botocore knows AWS_CA_BUNDLE. So what `resolve_s3_settings` finds is what every client is given.
Who asks is the matter of `s3_credentials`.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, cast

import pyarrow.fs

from workers.errors import CertificateError, CredentialsError, StorageError
from workers.s3_credentials import S3Credentials, given_keys, read_fsspec_config

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
    """Where and how a bucket is reached. May be sent to another process: it holds no secret, and `credentials` finds that process's own."""

    endpoint_url: str | None
    """None is AWS itself."""
    region: str
    addressing_style: AddressingStyle
    """Whether the bucket is in the path of a URL or in its host."""
    ca_bundle: str | None = None
    """File with the certificates of the authorities that are trusted, as PEM; None leaves that to each client. delta-rs has no such setting and reads
    SSL_CERT_FILE alone, which is not set for it here: other libraries of this process would then trust nobody else."""
    credentials: S3Credentials = field(default_factory=S3Credentials, repr=False, compare=False)

    def s3fs(self) -> Any:
        """s3fs over this, for control objects and listings."""
        import s3fs

        keys = given_keys()
        filesystem = s3fs.S3FileSystem(
            # Listings are never cached: another process may have written. Ranges bypass s3fs, so it needs no read-ahead either.
            use_listings_cache=False,
            default_cache_type="none",
            endpoint_url=self.endpoint_url,
            # Told where there are none, too, since fsspec fills in what is left out.
            key=keys.access_key if keys else None,
            secret=keys.secret_key if keys else None,
            token=keys.token if keys else None,
            client_kwargs={"region_name": self.region, "verify": self.ca_bundle},
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
        """Arrow's file system over this, with the credentials that are good now."""
        options: dict[str, Any] = {
            "region": self.region,
            "retry_strategy": pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=_ARROW_TRIES),
            "tls_ca_file_path": self.ca_bundle,
        }
        if (found := self.credentials.current()) is not None:
            options |= {"access_key": found.access_key, "secret_key": found.secret_key, "session_token": found.token}
        # Arrow addresses by path only where it is told an endpoint.
        endpoint = self.endpoint_url or (f"https://s3.{self.region}.amazonaws.com" if self.addressing_style == "path" else None)
        if endpoint is not None:
            scheme, _, host = endpoint.partition("://")
            options |= {"endpoint_override": host, "scheme": scheme, "force_virtual_addressing": self.addressing_style == "virtual"}
        return pyarrow.fs.S3FileSystem(**options)

    def lasting_arrow(self) -> pyarrow.fs.FileSystem:
        """Arrow's file system over this for as long as anybody holds it, here or in another process: its credentials are renewed."""
        return pyarrow.fs.PyFileSystem(_RenewedArrow(self))

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
                **({"root_certificate": Path(self.ca_bundle).read_bytes()} if self.ca_bundle else {}),
            },
            retry_config={"max_retries": _OBSTORE_RETRIES, "retry_timeout": timedelta(seconds=300)},
            credential_provider=_obstore_provider(self.credentials),
        )

    def delta_options(self, bucket: str) -> dict[str, str]:
        """Storage options for deltalake and polars. delta-rs retries a busy store ten times with jitter, which needs no changing.

        They hold no credentials but keys of fsspec's configuration: all others delta-rs finds, and renews, by itself.
        """
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
        if (keys := given_keys()) is not None:
            options |= {"aws_access_key_id": keys.access_key, "aws_secret_access_key": keys.secret_key}
            if keys.token is not None:
                options["aws_session_token"] = keys.token
        return options

    def _bucket_endpoint(self, bucket: str) -> str | None:
        """As the Rust clients want it: with the bucket in the host where it is addressed so."""
        if self.endpoint_url is None or self.addressing_style == "path":
            return self.endpoint_url
        scheme, _, host = self.endpoint_url.partition("://")
        return f"{scheme}://{bucket}.{host}"


def resolve_s3_settings(bucket: str) -> S3Settings:
    """What the AWS environment, fsspec's configuration and the AWS profile say about reaching a bucket; the first of them that says something wins.

    Args:
        bucket: its name; one with dots is addressed by path unless told otherwise, as its host would match no certificate.

    Returns:
        The settings for every client.

    Raises:
        CertificateError: there is no file of certificates where one is named.
        CredentialsError: fsspec's configuration says what s3fs alone would follow.
        StorageError: an addressing style or an endpoint that is none.
    """
    import botocore.session

    session = botocore.session.get_session()
    profile = session.get_scoped_config()
    fsspec_config = read_fsspec_config()
    endpoint = _endpoint_url(session, profile, fsspec_config.endpoint_url)
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        raise StorageError(f"the S3 endpoint of the AWS environment or profile is a URL with http:// or https://, found {endpoint!r}")
    style = os.environ.get("AWS_S3_ADDRESSING_STYLE") or _section(profile, "s3").get("addressing_style") or "auto"
    if style == "auto":
        # As botocore does it: servers of one's own seldom have a name for each bucket.
        style = "path" if endpoint is not None or "." in bucket else "virtual"
    if style not in ("path", "virtual"):
        raise StorageError(f"the S3 addressing style of the AWS environment or profile is auto, path or virtual, found {style!r}")
    ca_bundle = session.get_config_variable("ca_bundle") or None
    if ca_bundle is not None and not Path(ca_bundle).is_file():
        raise CertificateError(f"AWS_CA_BUNDLE, or ca_bundle of the AWS profile, is a file with certificates, found {ca_bundle!r}, which is none")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or fsspec_config.region
    return S3Settings(
        endpoint_url=endpoint,
        region=region or session.get_config_variable("region") or "us-east-1",
        addressing_style=cast("AddressingStyle", style),
        ca_bundle=ca_bundle,
    )


def _endpoint_url(session: Any, profile: dict[str, Any], of_fsspec: str | None) -> str | None:
    """The configured endpoint, in the order of the AWS tools; fsspec's, which they do not know, before the profile's."""
    ignored = session.get_config_variable("ignore_configured_endpoint_urls")
    services = session.full_config.get("services", {}).get(profile.get("services"), {})
    environment = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    of_profile = _section(services, "s3").get("endpoint_url") or profile.get("endpoint_url")
    found = of_fsspec if ignored else environment or of_fsspec or of_profile
    return found.rstrip("/") if found else None


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A nested section of an AWS configuration; a plain value in its place is none."""
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _obstore_provider(credentials: S3Credentials) -> Callable[[], Any]:
    """What obstore asks for credentials, again where they expire."""
    if credentials.current() is None:
        raise CredentialsError("no AWS credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")

    def current() -> dict[str, Any]:
        found = credentials.current()
        expires_at = datetime.now(UTC) + timedelta(minutes=10) if credentials.expire else None
        return {"access_key_id": found.access_key, "secret_access_key": found.secret_key, "token": found.token, "expires_at": expires_at}

    return current


class _RenewedArrow(pyarrow.fs.FileSystemHandler):  # type: ignore[misc] # pyarrow has no types
    """Arrow's S3 file system, made anew when its credentials have been renewed: it takes keys for its whole life.

    Ray Train holds one for as long as a run takes, and sends it to other machines. Files that it opened are Arrow's own: reading them asks nothing
    here.

    Args:
        settings: of the bucket.
    """

    def __init__(self, settings: S3Settings) -> None:
        self._settings = settings
        self._made: tuple[Any, pyarrow.fs.FileSystem] | None = None

    def __reduce__(self) -> tuple[type["_RenewedArrow"], tuple[S3Settings]]:
        return (_RenewedArrow, (self._settings,))

    @property
    def _now(self) -> pyarrow.fs.FileSystem:
        found = self._settings.credentials.current()
        if self._made is None or self._made[0] != found:
            self._made = (found, self._settings.arrow())
        return self._made[1]

    def get_type_name(self) -> str:
        return "s3"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: Sequence[str]) -> Any:
        return self._now.get_file_info(paths)

    def get_file_info_selector(self, selector: pyarrow.fs.FileSelector) -> Any:
        return self._now.get_file_info(selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        self._now.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self._now.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool) -> None:
        self._now.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        self._now.delete_dir_contents("", accept_root_dir=True)

    def delete_file(self, path: str) -> None:
        self._now.delete_file(path)

    def move(self, src: str, dest: str) -> None:
        self._now.move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self._now.copy_file(src, dest)

    # Streams as they are: whoever asked for compression has it put around them.

    def open_input_stream(self, path: str) -> Any:
        return self._now.open_input_stream(path, compression=None)

    def open_input_file(self, path: str) -> Any:
        return self._now.open_input_file(path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return self._now.open_output_stream(path, compression=None, metadata=metadata)

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        return self._now.open_append_stream(path, compression=None, metadata=metadata)
