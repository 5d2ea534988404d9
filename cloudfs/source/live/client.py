"""Talking to a live mount."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import msgspec

from cloudfs.core.errors import SourceError
from cloudfs.source.live.protocol import HEAD_BYTES, SOCKET, Answer, Change, End, Question

TIMEOUT_S = 600.0
"""How long an answer may take: a mount that is busy answers late, one that is gone at once."""


_decode_change = msgspec.msgpack.Decoder(Change).decode


class NotMounted(SourceError):
    """No live mount answers."""


class Line:
    """A connection to the live mount of a directory."""

    def __init__(self, directory: Path, timeout_s: float = TIMEOUT_S) -> None:
        """Raises NotMounted."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        try:
            fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                # By descriptor: the path of a socket may have 107 bytes, that of a directory more.
                self._socket.connect(f"/proc/self/fd/{fd}/{SOCKET}")
            finally:
                os.close(fd)
        except OSError:
            self._socket.close()
            raise NotMounted("it is not mounted live") from None

    def __enter__(self) -> Line:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; a freeze that was asked for on this line ends."""
        self._socket.close()

    def ask(self, question: Question) -> Answer:
        """One question and its answer. Raises NotMounted, SourceError."""
        self._send(question)
        answer = msgspec.msgpack.decode(self._message(), type=Answer)
        if answer.error:
            raise SourceError(answer.error)
        return answer

    def changes(self) -> Iterator[Change]:
        """All that changed up to the freeze. Raises NotMounted where the line breaks."""
        self._send(Question("changes"))
        while True:
            change = _decode_change(self._message())
            yield change
            if isinstance(change, End):
                return

    def _send(self, question: Question) -> None:
        encoded = msgspec.msgpack.encode(question)
        try:
            self._socket.sendall(len(encoded).to_bytes(HEAD_BYTES, "big") + encoded)
        except OSError:
            raise NotMounted("the live mount is gone") from None

    def _message(self) -> bytes:
        return self._receive(int.from_bytes(self._receive(HEAD_BYTES), "big"))

    def _receive(self, length: int) -> bytes:
        received = bytearray()
        try:
            while len(received) < length:
                part = self._socket.recv(min(length - len(received), 1 << 20))
                if not part:
                    raise NotMounted("the live mount is gone")
                received += part
        except TimeoutError:
            raise NotMounted("the live mount does not answer") from None
        except OSError:
            raise NotMounted("the live mount is gone") from None
        return bytes(received)
