"""A proxy in front of an S3 server that fails on purpose: what a busy store, a bad line and a lost answer look like from the client's side."""

import contextlib
import http.client
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["busy", "conflict", "no upload", "reset", "lost", "slow", "truncated"] | None
"""busy: 503 SlowDown. conflict: 409 as AWS gives it. no upload: 404 as MinIO gives it. reset: the request goes nowhere. lost: it is carried out, and
the answer never comes. slow: the body comes in pieces. truncated: it ends half way, under the length of the whole."""

Plan = Callable[[int, str, str], Fault]
"""Of a request's number from 1 on, its method and its path."""

_BODIES = {
    "busy": (503, b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"),
    "no upload": (404, b"<?xml version='1.0'?><Error><Code>NoSuchUpload</Code><Message>It may have been completed.</Message></Error>"),
    "conflict": (409, b"<?xml version='1.0'?><Error><Code>ConditionalRequestConflict</Code><Message>Another one.</Message></Error>"),
}
_PIECES = 8


class Proxy:
    """What the proxy has seen and what it shall do.

    Args:
        upstream: host and port of the real server.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.plan: Plan = lambda _number, _method, _path: None
        self.faults: list[str] = []
        self.num_requests = 0
        self.signers: set[tuple[str, str | None]] = set()
        """Access key and session token of whoever signed a request."""
        self._lock = threading.Lock()

    def next_fault(self, method: str, path: str) -> Fault:
        with self._lock:
            self.num_requests += 1
            number = self.num_requests
        fault = self.plan(number, method, path)  # which may make requests of its own
        if fault is not None:
            self.faults.append(fault)
        return fault


def every(number: int, fault: Fault) -> Plan:
    """A fault on every so manieth request."""
    return lambda count, _method, _path: fault if count % number == 0 else None


def once(fault: Fault, wanted: str) -> Plan:
    """A fault on the first request of a method only."""
    seen: list[str] = []

    def plan(_number: int, method: str, _path: str) -> Fault:
        if method != wanted or seen:
            return None
        seen.append(method)
        return fault

    return plan


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def handle_any(self) -> None:
        body = self._body()
        signed = re.search(r"Credential=([^/]+)/", self.headers.get("Authorization", ""))
        self.proxy.signers.add((signed.group(1) if signed else "", self.headers.get("X-Amz-Security-Token")))
        fault = self.proxy.next_fault(self.command, self.path)
        if fault == "reset":
            self._reset()
            return
        if fault in _BODIES:
            status, text = _BODIES[fault]
            self._answer(status, [("Content-Type", "application/xml")], text)
            return
        connection = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        # The Host header is signed, so it goes on as the client wrote it.
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "expect", "content-length"):
                connection.putheader(name, value)
        if body or self.command in ("PUT", "POST"):
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        with contextlib.closing(connection):
            answer = connection.getresponse()
            data = answer.read()
            if fault == "lost":
                self._reset()
                return
            headers = [item for item in answer.getheaders() if item[0].lower() not in ("connection", "transfer-encoding", "content-length")]
            # A HEAD's length is of the body that it leaves out.
            length = int(answer.headers["Content-Length"]) if self.command == "HEAD" and "Content-Length" in answer.headers else len(data)
            self._answer(answer.status, headers, data, length=length, fault=fault)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815 - the names that http.server looks for

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, *, length: int | None = None, fault: Fault = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if fault == "truncated":
            self.wfile.write(data[: len(data) // 2])
            self._reset()
        elif fault == "slow":
            step = len(data) // _PIECES + 1
            for start in range(0, len(data), step):
                time.sleep(0.05)
                self.wfile.write(data[start : start + step])
        else:
            self.wfile.write(data)

    def _reset(self) -> None:
        """End the connection as a machine that crashed does, with RST."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: faults are wanted."""

    def finish(self) -> None:
        with contextlib.suppress(OSError):  # a connection that was reset has nothing to flush
            super().finish()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: a client may go away."""


@contextlib.contextmanager
def fault_proxy(endpoint: str, certificate: tuple[Path, Path] | None = None) -> Iterator[tuple[Proxy, str]]:
    """The proxy of a server, and its own endpoint; given a certificate and its key, over TLS."""
    proxy = Proxy(urlsplit(endpoint).netloc)
    handler = type("Handler", (_Handler,), {"proxy": proxy})
    with _Server(("127.0.0.1", 0), handler) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy, f"{'http' if certificate is None else 'https'}://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
