"""A store in an S3 bucket, or below a prefix of one: ``s3://bucket/prefix``. The only user of
boto3's machinery.

1. botocore, the lower half of boto3, is used by itself: a third of the time to import, and all
   that is lost is the object-oriented layer. It is imported when a store is made, not before.
2. One ``put`` is one PutObject, whatever its size: it arrives whole or not at all, and there is
   no multipart upload to be left in doubt. Its SHA-256 is part of the signature, so that the
   server refuses what the network changed. Checksum trailers are off: some servers store them as
   data, and others answer a ranged GET with the checksum of the whole object.
3. Nothing is tried again here, by botocore neither: that is the business of RetryStore, which
   knows how to tell an own earlier try from another's object.
4. A small ``put`` does not ask whether it may send: that would be one more round trip. A large
   one does, so that a refusal comes before the bytes have gone.
5. What arrives is measured against what was announced. A body that is cut is Unavailable; a
   server that answers a ranged GET with the whole object is understood.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from cloudfs.core.errors import StoreError, Unavailable, UsageError
from cloudfs.store.base import Buffer, ObjectInfo
from cloudfs.store.naming import check_name, is_name
from cloudfs.store.s3_errors import S3Errors

if TYPE_CHECKING:
    from botocore.client import BaseClient
    from mypy_boto3_s3.client import S3Client

PAGE = 1000
ASK_FIRST_BYTES = 1 << 20
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class S3Store:
    """Objects in ``bucket`` whose keys begin with ``prefix`` and a slash. Thread safe.

    Credentials come from where every S3 client looks for them (environment, shared files with
    ``profile``, the machine's role). With ``endpoint_url`` the bucket is always part of the path.
    Making one sends no request; raises UsageError.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint_url: str | None = None,
        region: str | None = None,
        profile: str | None = None,
        connect_timeout_s: float = 10.0,
        read_timeout_s: float = 60.0,
        connections: int = 32,
    ) -> None:
        self.bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        settings = {
            "connect_timeout": connect_timeout_s,
            "read_timeout": read_timeout_s,
            "max_pool_connections": connections,
            "retries": {"total_max_attempts": 1},
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "s3": {"addressing_style": "path" if endpoint_url else "auto"},
            "tcp_keepalive": True,
        }
        self._client = _make_client(endpoint_url, region, profile, settings)
        self._errors = S3Errors(bucket, self._client.meta.endpoint_url)

    @property
    def url(self) -> str:
        """``s3://``, the bucket and the prefix."""
        return f"s3://{self.bucket}/{self._prefix}".rstrip("/")

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See :meth:`Store.get`."""
        request: dict[str, Any] = {"Bucket": self.bucket, "Key": self._key(name)}
        wanted = _range_header(offset, length)
        if wanted is not None:
            request["Range"] = wanted
        try:
            response = self._client.get_object(**request)
            data = response["Body"].read()
        except Exception as error:
            if wanted is not None and _status(error) == 416:
                return b""  # begins at or behind the end
            raise self._errors.translate(error, name) from error
        if len(data) != response["ContentLength"]:
            raise Unavailable(f"{name} arrived cut short from {self._errors.server}.")
        if response["ResponseMetadata"]["HTTPStatusCode"] != 206:
            return _cut(data, offset, length)  # all of it, asked for or not
        self._check_range(name, offset, response.get("ContentRange", ""), len(data))
        return data if length is None else data[:length]

    def put(self, name: str, chunks: Sequence[Buffer], *, if_absent: bool = False) -> None:
        """See :meth:`Store.put`. Durable as the provider promises with its answer."""
        request: dict[str, Any] = {"Bucket": self.bucket, "Key": self._key(name)}
        if if_absent:
            request["IfNoneMatch"] = "*"
        try:
            response = self._client.put_object(Body=b"".join(chunks), **request)
        except Exception as error:
            raise self._errors.translate(error, name) from error
        if not response.get("ETag"):
            # Every S3 server names what it stored: this answer came from something in between.
            raise Unavailable(f"{self._errors.server} did not confirm that it stored {name}.")

    def list(self, prefix: str, *, limit: int | None = None) -> Iterator[ObjectInfo]:
        """See :meth:`Store.list`."""
        return islice(self._pages(prefix, limit), limit)

    def delete(self, names: Iterable[str]) -> None:
        """See :meth:`Store.delete`."""
        left = iter([self._key(name) for name in names])
        while keys := list(islice(left, PAGE)):
            try:
                response = self._client.delete_objects(
                    Bucket=self.bucket,
                    Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True},
                )
            except Exception as error:
                raise self._errors.translate(error, keys[0]) from error
            for failed in response.get("Errors", []):
                if failed.get("Code") != "NoSuchKey":
                    name = failed.get("Key", keys[0]).removeprefix(self._prefix)
                    raise self._errors.from_code(failed.get("Code", ""), 0, name)

    def close(self) -> None:
        """See :meth:`Store.close`."""
        self._client.close()

    def _key(self, name: str) -> str:
        return self._prefix + check_name(name)

    def _pages(self, prefix: str, limit: int | None) -> Iterator[ObjectInfo]:
        request: dict[str, Any] = {"Bucket": self.bucket, "Prefix": self._prefix + prefix}
        left, last = limit, ""
        while left is None or left > 0:
            request["MaxKeys"] = PAGE if left is None else min(PAGE, left)
            try:
                response = self._client.list_objects_v2(**request)
            except Exception as error:
                raise self._errors.translate(error, prefix) from error
            for item in response.get("Contents", []):
                name = item["Key"].removeprefix(self._prefix)
                if not is_name(name):
                    continue
                if name <= last:
                    raise StoreError(
                        f"{self._errors.server} does not list objects in the order of their names,"
                        " which cloudfs relies on. Use another store."
                    )
                last = name
                yield ObjectInfo(name, item["Size"])
            if "IsTruncated" not in response:
                raise Unavailable(f"{self._errors.server} did not say whether a listing is whole.")
            if not response["IsTruncated"]:
                return
            request["ContinuationToken"] = response["NextContinuationToken"]
            if left is not None:
                left -= len(response.get("Contents", []))

    def _check_range(self, name: str, offset: int, header: str, got: int) -> None:
        """Raise Unavailable unless the server sent the range that was asked for."""
        match = _RANGE.fullmatch(header)
        if match is None:
            return
        first, last = int(match[1]), int(match[2])
        if last - first + 1 != got or (offset >= 0 and first != offset):
            raise Unavailable(f"{self._errors.server} sent another part of {name} than asked for.")


def _make_client(
    endpoint_url: str | None, region: str | None, profile: str | None, settings: dict[str, Any]
) -> S3Client:
    import botocore.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    try:
        session = botocore.session.Session(profile=profile)
        client: BaseClient = session.create_client(
            "s3",
            # Servers other than Amazon's mostly do not care, but a signature needs some region.
            region_name=region or session.get_config_variable("region") or "us-east-1",
            endpoint_url=endpoint_url,
            config=Config(**settings),
        )
    except (BotoCoreError, ValueError) as error:
        text = str(error).rstrip(".")
        raise UsageError(f"S3 cannot be used: {text}. See --endpoint-url and --profile.") from error
    client.meta.events.register_last("before-call.s3", _send_small_at_once)
    return client  # type: ignore[return-value]  # the stubs of botocore do not know services


def _send_small_at_once(params: dict[str, Any], **_: object) -> None:
    """Take back botocore's ``Expect: 100-continue`` (rule 4)."""
    from botocore.utils import determine_content_length

    if (determine_content_length(params.get("body")) or 0) < ASK_FIRST_BYTES:
        params["headers"].pop("Expect", None)


def _range_header(offset: int, length: int | None) -> str | None:
    if offset < 0:
        return f"bytes={offset}"
    if length is not None:
        # A range cannot be empty, but whether the object exists must be found out all the same.
        return f"bytes={offset}-{offset + max(1, length) - 1}"
    return f"bytes={offset}-" if offset else None


def _cut(data: bytes, offset: int, length: int | None) -> bytes:
    start = max(0, len(data) + offset) if offset < 0 else offset
    end = None if length is None else start + length
    return data if start == 0 and end is None else data[start:end]


def _status(error: Exception) -> int:
    response: dict[str, Any] = getattr(error, "response", None) or {}
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
