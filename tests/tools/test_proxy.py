"""The counting proxy of tools/bench: what passes is unchanged and counted."""

from __future__ import annotations

import http.client
import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.servers import http_server

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

from benching.proxy import Proxy, Tally

BIG = bytes(range(256)) * 20_000


class Handler(BaseHTTPRequestHandler):
    """Says what it got: the Host header, the method and the body."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/bucket/until-the-end":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"all of it")
            self.close_connection = True
        elif self.path == "/bucket/chunked":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"5\r\nfirst\r\n6;x=y\r\nsecond\r\n0\r\nTrailer: 1\r\n\r\n")
        else:
            self._answer(200, BIG if "big" in self.path else self.headers["Host"].encode())

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "12345")
        self.end_headers()

    def do_DELETE(self) -> None:
        self.send_response(204)
        self.end_headers()

    def do_PUT(self) -> None:
        self._answer(200, self._body())

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def handle_expect_100(self) -> bool:
        if "refused" not in self.path:
            return super().handle_expect_100()
        self._answer(403, b"no")
        return False

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """A proxy before a server."""
    with http_server(Handler) as url, Proxy(url) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: Proxy) -> Iterator[http.client.HTTPConnection]:
    """A connection to the proxy."""
    connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=10)
    yield connection
    connection.close()


def ask(
    client: http.client.HTTPConnection, method: str, target: str, **more: object
) -> tuple[int, bytes]:
    client.request(method, target, **more)  # type: ignore[arg-type]
    response = client.getresponse()
    return response.status, response.read()


def raw(proxy: Proxy, request: bytes) -> bytes:
    """Send bytes and return all that comes."""
    server = urlsplit(proxy.url)
    with socket.create_connection((server.hostname, server.port), timeout=10) as sock:
        sock.sendall(request)
        sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def test_requests_of_one_connection_are_counted_by_kind(
    proxy: Proxy, client: http.client.HTTPConnection
) -> None:
    assert ask(client, "PUT", "/bucket/a", body=b"12345") == (200, b"12345")
    assert ask(client, "GET", "/bucket/big", headers={"Range": "bytes=1-2"}) == (200, BIG)
    assert ask(client, "GET", "/bucket?list-type=2&prefix=a/b")[0] == 200
    assert ask(client, "HEAD", "/bucket/a") == (200, b"")
    assert ask(client, "DELETE", "/bucket/a") == (204, b"")
    exchanges = proxy.take()
    assert [(one.method, one.of_object) for one in exchanges] == [
        ("PUT", True),
        ("GET", True),
        ("GET", False),
        ("HEAD", True),
        ("DELETE", True),
    ]
    assert exchanges[1].extent == "bytes=1-2"
    host = len(urlsplit(proxy.url).netloc)
    assert Tally.of(exchanges) == Tally(5, 1, 1, 5, 5 + len(BIG) + host)
    assert proxy.take() == []


def test_the_host_header_stays(proxy: Proxy, client: http.client.HTTPConnection) -> None:
    assert ask(client, "GET", "/")[1].decode() == urlsplit(proxy.url).netloc
    assert ask(client, "GET", "/", headers={"Host": "signed.example"})[1] == b"signed.example"


def test_chunked_bodies_pass_both_ways(proxy: Proxy, client: http.client.HTTPConnection) -> None:
    pieces = [b"abc", b"d" * 70_000]
    sent = ask(client, "PUT", "/bucket/a", body=iter(pieces), encode_chunked=True)
    assert sent == (200, b"".join(pieces))
    assert ask(client, "GET", "/bucket/chunked") == (200, b"firstsecond")
    assert ask(client, "GET", "/bucket/until-the-end") == (200, b"all of it")
    assert Tally.of(proxy.take()) == Tally(3, 2, 1, 70_003, 70_003 + 11 + 9)


def test_a_large_body_may_be_asked_for_or_refused(proxy: Proxy) -> None:
    head = (
        b"PUT /bucket/%s HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
    )
    answer = raw(proxy, head % b"asked" + b"12345")
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")
    assert answer.endswith(b"12345")
    answer = raw(proxy, head % b"refused")
    assert answer.startswith(b"HTTP/1.1 403")
    assert [one.status for one in proxy.take()] == [200, 403]


def test_each_request_waits_by_itself(proxy: Proxy) -> None:
    proxy.delay_s = 0.2

    def get() -> None:
        connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=10)
        ask(connection, "GET", "/bucket/a")
        ask(connection, "GET", "/bucket/a")
        connection.close()

    threads = [threading.Thread(target=get) for _ in range(4)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.4 <= time.monotonic() - started < 1.4
    assert Tally.of(proxy.take()).gets == 8


def test_it_ends_in_silence_while_clients_are_connected(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with http_server(Handler) as url, Proxy(url) as proxy:
        connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=10)
        assert ask(connection, "GET", "/bucket/a")[0] == 200
    connection.close()
    assert capfd.readouterr().err == ""
    assert caplog.messages == []
