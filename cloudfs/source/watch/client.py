"""Talking to a watch daemon."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec

from cloudfs.core.errors import SourceError
from cloudfs.source.watch.protocol import MAX_BYTES, SOCKET, Answer, Question

TIMEOUT_S = 60.0


class NoDaemon(SourceError):
    """No watch daemon answers."""


def ask(directory: Path, question: Question, timeout_s: float = TIMEOUT_S) -> Answer:
    """Ask the daemon of a directory. Raises NoDaemon."""
    try:
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        raise NoDaemon("no daemon watches it") from None
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            # By descriptor: the path of a socket may have 107 bytes, that of a directory more.
            connection.connect(f"/proc/self/fd/{fd}/{SOCKET}")
            connection.sendall(msgspec.json.encode(question) + b"\n")
            return msgspec.json.decode(receive(connection), type=Answer)
    except TimeoutError:
        raise NoDaemon("the watch daemon does not answer") from None
    except (OSError, msgspec.DecodeError):
        raise NoDaemon("no daemon watches it") from None
    finally:
        os.close(fd)


def receive(connection: socket.socket) -> bytes:
    """One line. Raises OSError where it does not come."""
    received = b""
    while not received.endswith(b"\n"):
        part = connection.recv(MAX_BYTES)
        if not part or len(received) > MAX_BYTES:
            raise ConnectionResetError("the line was cut")
        received += part
    return received
