"""From a URL to a store that is ready for use.

From the outside in: tries again, keeps to the bandwidth, counts, and does. So a request that is
sent again is paid for and counted again, as it is by the provider.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from cloudfs.core.errors import StoreError, UsageError
from cloudfs.store.base import Store
from cloudfs.store.count import Counts, CountStore
from cloudfs.store.limit import LimitStore
from cloudfs.store.naming import check_name
from cloudfs.store.retry import RetryStore
from cloudfs.store.wrapper import StoreWrapper

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """How to reach a store. Holds no secret and can be pickled, so that workers open it again."""

    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    upload_limit_bytes_s: float | None = None
    download_limit_bytes_s: float | None = None
    retry_s: float = 120.0

    def shared_by(self, processes: int) -> StoreOptions:
        """The options for each of ``processes`` that together keep to the bandwidth."""
        up, down = self.upload_limit_bytes_s, self.download_limit_bytes_s
        return replace(
            self,
            upload_limit_bytes_s=None if up is None else up / processes,
            download_limit_bytes_s=None if down is None else down / processes,
        )


@dataclass(frozen=True, slots=True)
class Place:
    """What a URL says. ``bucket`` is empty for a directory, whose path ``path`` then is."""

    bucket: str
    path: str

    @property
    def url(self) -> str:
        """The one way to write this place."""
        if not self.bucket:
            return f"file://{self.path}"
        return f"s3://{self.bucket}" + (f"/{self.path}" if self.path else "")


class OpenedStore(StoreWrapper):
    """A store with all that belongs around it, and its counts."""

    def __init__(self, inner: Store, counter: CountStore) -> None:
        super().__init__(inner)
        self._counter = counter

    def counts(self) -> Counts:
        """Requests sent and bytes moved by this store since it was opened."""
        return self._counter.counts()


def parse_url(url: str) -> Place:
    """Read ``file:///path``, an absolute path, or ``s3://bucket/prefix``. Raises UsageError.

    Nothing is unquoted: what follows ``file://`` is the path, letter by letter.
    """
    scheme, divider, rest = url.partition("://")
    if url.startswith("/"):
        scheme, rest = "file", url
    elif not divider:
        raise UsageError(
            f'"{url}" is no repository URL. Write file:///path, an absolute path,'
            " or s3://bucket/prefix."
        )
    if scheme == "file":
        return _parse_path(url, rest)
    if scheme == "s3":
        return _parse_bucket(url, rest)
    raise UsageError(f'"{url}": cloudfs knows file:// and s3://, but not {scheme}://.')


def _parse_path(url: str, path: str) -> Place:
    if not path.startswith("/"):
        raise UsageError(f'"{url}": the path must be absolute, with three slashes: file:///path.')
    path = "/" + os.path.normpath(path).lstrip("/")
    if path == "/" or "\0" in path:
        raise UsageError(f'"{url}" cannot hold a repository. Name a directory of its own for it.')
    return Place("", path)


def _parse_bucket(url: str, rest: str) -> Place:
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.strip("/")
    if _BUCKET.fullmatch(bucket) is None:
        raise UsageError(f'"{url}" names no bucket. Write s3://bucket or s3://bucket/prefix.')
    if prefix:
        try:
            check_name(prefix)
        except StoreError:
            raise UsageError(
                f'"{url}": use letters, digits and _=+,@.- in the prefix, and no part that is'
                " empty or begins with a dot."
            ) from None
    return Place(bucket, prefix)


def open_store(url: str, options: StoreOptions | None = None) -> OpenedStore:
    """Open the store at ``url``. Sends no request. Raises UsageError."""
    given = options or StoreOptions()
    place = parse_url(url)
    base = _open_base(place, given)
    counter = CountStore(base)
    limited: Store = counter
    if given.upload_limit_bytes_s or given.download_limit_bytes_s:
        limited = LimitStore(
            counter,
            upload_bytes_s=given.upload_limit_bytes_s,
            download_bytes_s=given.download_limit_bytes_s,
        )
    return OpenedStore(RetryStore(limited, limit_s=given.retry_s), counter)


LEAST_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 60.0
"""How long a store may be silent in the middle of an answer: as long as who asks would try again,
within these bounds."""


def _open_base(place: Place, options: StoreOptions) -> Store:
    if place.bucket:
        from cloudfs.store.s3 import S3Store

        return S3Store(
            place.bucket,
            place.path,
            endpoint_url=options.endpoint_url,
            region=options.region,
            profile=options.profile,
            read_timeout_s=min(READ_TIMEOUT_S, max(LEAST_TIMEOUT_S, options.retry_s)),
        )
    from cloudfs.store.local import LocalStore

    return LocalStore(place.path)
