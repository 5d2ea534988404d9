"""What only the S3 store does: real servers, servers that are wrong, and no server at all."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from cloudfs.core.errors import (
    AlreadyExists,
    Denied,
    Full,
    NotFound,
    StoreError,
    Unavailable,
    UsageError,
)
from cloudfs.store.s3 import S3Store
from tests import servers

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in servers.environment("key", "secret").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)


def connect(url: str, prefix: str = "") -> S3Store:
    return S3Store("bucket", prefix, endpoint_url=url, connect_timeout_s=2, read_timeout_s=1)


def test_importing_the_store_package_imports_no_boto() -> None:
    script = (
        "import sys, cloudfs.store.open as o\n"
        "o.open_store('file:///x')\n"
        "print([m for m in sys.modules if m.partition('.')[0] in ('boto3', 'botocore')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("size", [64 << 20])
def test_a_large_object_is_one_request(seaweedfs: servers.S3Server, size: int) -> None:
    store = connect_to(seaweedfs)
    data = os.urandom(size)
    store.put("large", [data[: 1 << 20], memoryview(data)[1 << 20 :]], if_absent=True)
    assert store.get("large") == data
    assert store.get("large", -5000, 77) == data[-5000:-4923]
    assert store.get("large", 33 << 20, 5 << 20) == data[33 << 20 : 38 << 20]
    store.delete(["large"])


def connect_to(server: servers.S3Server, bucket: str = servers.BUCKET) -> S3Store:
    return S3Store(bucket, "own/prefix", endpoint_url=server.endpoint_url)


def test_prefixes_keep_stores_apart(seaweedfs: servers.S3Server) -> None:
    stores = [
        S3Store(seaweedfs.bucket, prefix, endpoint_url=seaweedfs.endpoint_url)
        for prefix in ("apart/a", "apart/ab", "apart/a/b")
    ]
    for number, store in enumerate(stores):
        store.put(f"x{number}", [b"%d" % number])
    assert [[info.name for info in store.list("x")] for store in stores] == [["x0"], ["x1"], ["x2"]]
    assert stores[0].url == "s3://bucket/apart/a"
    for number, store in enumerate(stores):
        store.delete([f"x{number}"])


def test_directory_markers_of_other_tools_are_skipped(moto: servers.S3Server) -> None:
    client = servers.make_client(moto.endpoint_url)
    for key in ("marked/", "marked/sub/", "marked/with space"):
        client.put_object(Bucket=moto.bucket, Key=key, Body=b"")
    store = S3Store(moto.bucket, "marked", endpoint_url=moto.endpoint_url)
    store.put("sub/a", [b"x"])
    assert [info.name for info in store.list("")] == ["sub/a"]


@pytest.mark.parametrize("kind", ["seaweedfs", "moto"])
def test_no_bucket(kind: str, request: pytest.FixtureRequest) -> None:
    store = connect_to(request.getfixturevalue(kind), "no-such-bucket")
    for action in (lambda: store.get("a"), lambda: list(store.list(""))):
        with pytest.raises(NotFound, match="there is no bucket no-such-bucket at S3 at http"):
            action()


@pytest.mark.parametrize(
    ("key", "secret"), [(servers.WEAK_KEY, servers.SECRET), (servers.KEY, "wrong"), ("no-one", "x")]
)
def test_forbidden(
    seaweedfs: servers.S3Server, monkeypatch: pytest.MonkeyPatch, key: str, secret: str
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    store = connect_to(seaweedfs)
    actions = [
        lambda: store.get("a"),
        lambda: store.put("a", [b"x"]),
        lambda: list(store.list("")),
        lambda: store.delete(["a"]),
    ]
    for action in actions:
        with pytest.raises(Denied, match=r"refuses access to .*Check the credentials"):
            action()


def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(Denied, match=r"no usable credentials.*AWS_ACCESS_KEY_ID"):
        connect("http://127.0.0.1:9").get("a")


def test_bad_options() -> None:
    with pytest.raises(UsageError, match="nobody"):
        S3Store("bucket", profile="nobody")
    with pytest.raises(UsageError, match="Invalid endpoint"):
        S3Store("bucket", endpoint_url="not a url")


def test_nobody_listens() -> None:
    (port,) = servers.free_ports(1)
    with pytest.raises(Unavailable, match=f"S3 at http://127.0.0.1:{port} .*connection refused"):
        connect(f"http://127.0.0.1:{port}").get("a")


def test_no_such_host() -> None:
    with pytest.raises(Unavailable, match="its name is not known"):
        connect("http://nowhere.invalid").put("a", [b"x"])


def test_silence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        began = time.monotonic()
        with pytest.raises(Unavailable, match="timed out"):
            connect(f"http://127.0.0.1:{listener.getsockname()[1]}").get("a")
        assert time.monotonic() - began < 5


class Scripted(BaseHTTPRequestHandler):
    """Answers everything with ``answer``: status, headers, body, and how much of it to send."""

    protocol_version = "HTTP/1.1"
    answer: tuple[int, dict[str, str], bytes, int | None]
    seen: list[tuple[str, str, dict[str, str]]]

    def respond(self) -> None:
        self.seen.append((self.command, self.path, dict(self.headers)))
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, headers, body, send = self.answer
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body[:send])

    do_GET = do_PUT = do_POST = respond  # noqa: N815  # the names are http.server's

    def log_message(self, format: str, *args: object) -> None:
        pass


def scripted(
    status: int, body: bytes = b"", headers: dict[str, str] | None = None, send: int | None = None
) -> type[Scripted]:
    return type("Handler", (Scripted,), {"answer": (status, headers or {}, body, send), "seen": []})


def error_body(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>so it is</Message></Error>".encode()


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (503, "SlowDown", Unavailable),
        (500, "InternalError", Unavailable),
        (502, "", Unavailable),
        (429, "TooManyRequests", Unavailable),
        (400, "RequestTimeout", Unavailable),
        (400, "BadDigest", Unavailable),
        (409, "ConditionalRequestConflict", Unavailable),
        (200, "InternalError", Unavailable),
        (412, "PreconditionFailed", AlreadyExists),
        (403, "AccessDenied", Denied),
        (400, "ExpiredToken", Denied),
        (403, "RequestTimeTooSkewed", Denied),
        (403, "QuotaExceeded", Full),
        (507, "XMinioStorageFull", Full),
        (404, "NoSuchBucket", NotFound),
        (301, "PermanentRedirect", StoreError),
        (501, "NotImplemented", StoreError),
        (400, "InvalidArgument", StoreError),
    ],
)
def test_what_answers_mean(status: int, code: str, kind: type) -> None:
    handler = scripted(status, error_body(code) if code else b"<html>Bad gateway</html>")
    with servers.http_server(handler) as url, pytest.raises(StoreError) as caught:
        connect(url).put("a", [b"x"], if_absent=True)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    assert len(handler.seen) == 1  # nothing is tried again down here


@pytest.mark.parametrize("status", [200, 500])
def test_a_page_that_is_no_listing(status: int) -> None:
    handler = scripted(status, b"<html><body>Welcome</body>")
    with servers.http_server(handler) as url, pytest.raises(Unavailable):
        list(connect(url).list(""))


def test_a_listing_that_does_not_say_whether_it_is_whole() -> None:
    handler = scripted(200, b"<ListBucketResult></ListBucketResult>")
    with servers.http_server(handler) as url, pytest.raises(Unavailable, match="whole"):
        list(connect(url).list(""))


def test_a_listing_out_of_order() -> None:
    entries = "".join(f"<Contents><Key>{n}</Key><Size>1</Size></Contents>" for n in "acb")
    body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
    handler = scripted(200, body.encode())
    with servers.http_server(handler) as url, pytest.raises(StoreError, match="order"):
        list(connect(url).list(""))


@pytest.mark.parametrize("offset", [0, 100])
def test_a_body_that_is_cut_short(offset: int) -> None:
    body = b"x" * 5000
    headers = {"Content-Range": "bytes 100-5099/6000"} if offset else {}
    handler = scripted(206 if offset else 200, body, headers, send=4000)
    with servers.http_server(handler) as url, pytest.raises(Unavailable):
        connect(url).get("a", offset, 5000)


def test_a_range_other_than_asked_for() -> None:
    handler = scripted(206, b"x" * 10, {"Content-Range": "bytes 0-9/100"})
    with servers.http_server(handler) as url, pytest.raises(Unavailable, match="another part"):
        connect(url).get("a", 50, 10)


def test_the_whole_object_instead_of_a_range() -> None:
    handler = scripted(200, b"0123456789")
    with servers.http_server(handler) as url:
        store = connect(url)
        assert store.get("a", 3, 4) == b"3456"
        assert store.get("a", -3, 2) == b"78"
        assert store.get("a", 3) == b"3456789"


def test_a_confirmation_that_does_not_come_from_s3() -> None:
    handler = scripted(200)
    with servers.http_server(handler) as url, pytest.raises(Unavailable, match="not confirm"):
        connect(url).put("a", [b"x"])


def test_a_deletion_that_failed_in_part() -> None:
    body = b"<DeleteResult><Error><Key>p/b</Key><Code>AccessDenied</Code></Error></DeleteResult>"
    handler = scripted(200, body)
    with servers.http_server(handler) as url, pytest.raises(Denied, match="access to b in"):
        connect(url, "p").delete(["a", "b"])


def test_what_is_sent() -> None:
    handler = scripted(200, b"", {"ETag": '"x"'})
    with servers.http_server(handler) as url:
        connect(url, "p/q").put("a", [b"da", b"ta"], if_absent=True)
    ((method, path, headers),) = handler.seen
    assert (method, path) == ("PUT", "/bucket/p/q/a")  # the bucket is in the path
    assert headers["If-None-Match"] == "*"
    assert headers["Content-Length"] == "4"  # no trailer, no chunks
    sha256_of_data = "3a6eb0790f39ac87c94f3856b2dd2c5d110e6811602261a9a923d3bb23adc8b7"
    assert headers["X-Amz-Content-SHA256"] == sha256_of_data
    assert not [name for name in headers if "trailer" in name.lower() or "crc" in name.lower()]


def test_only_a_large_object_asks_before_it_is_sent() -> None:
    handler = scripted(200, b"", {"ETag": '"x"'})
    with servers.http_server(handler) as url:
        store = connect(url)
        for size in (0, 1, (1 << 20) - 1, 1 << 20):
            store.put("a", [b"x" * size])
    asked = [headers.get("Expect") for _, _, headers in handler.seen]
    assert asked == [None, None, None, "100-continue"]


def test_a_session_token_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "the-token")
    handler = scripted(200, b"", {"ETag": '"x"'})
    with servers.http_server(handler) as url:
        connect(url).put("a", [b"x"])
    assert handler.seen[0][2]["X-Amz-Security-Token"] == "the-token"


def test_profile_and_region(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    keys = tmp_path / "credentials"
    keys.write_text("[mine]\naws_access_key_id = profile-key\naws_secret_access_key = s\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    handler = scripted(200, b"", {"ETag": '"x"'})
    with servers.http_server(handler) as url:
        store = S3Store("bucket", endpoint_url=url, profile="mine", region="eu-west-9")
        store.put("a", [b"x"])
    assert "Credential=profile-key/" in handler.seen[0][2]["Authorization"]
    assert "/eu-west-9/s3/" in handler.seen[0][2]["Authorization"]


def test_a_server_that_is_killed_and_comes_back_is_seen(tmp_path: Path) -> None:
    """Requests under way when a real server dies fail as Unavailable, and only so."""
    with servers.moto() as server:
        store = S3Store("bucket", endpoint_url=server.endpoint_url)
        store.put("a", [b"x"])
        failures: list[BaseException] = []

        def work() -> None:
            try:
                while True:
                    store.get("a")
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        server.process.kill()
        for thread in threads:
            thread.join()
        assert [type(failure) for failure in failures] == [Unavailable] * 4
