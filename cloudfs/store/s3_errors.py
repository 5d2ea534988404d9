"""What botocore's many errors mean in the few words of a store."""

from __future__ import annotations

import http.client
import os
import socket

from cloudfs.core.errors import (
    AlreadyExists,
    Denied,
    Full,
    NotFound,
    StoreError,
    Unavailable,
)

_AGAIN = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "XAmzContentSHA256Mismatch",
}
_FULL = {"QuotaExceeded", "StorageFull", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"}
_DENIED = {
    "AccessDenied",
    "AllAccessDisabled",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
}
_ELSEWHERE = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}


class S3Errors:
    """Translates for one bucket at one server."""

    def __init__(self, bucket: str, endpoint_url: str) -> None:
        self._bucket = bucket
        self.server = f"S3 at {endpoint_url}"

    def translate(self, error: Exception, name: str) -> StoreError:
        """The StoreError for what a request about ``name`` raised."""
        from botocore import exceptions as boto

        if isinstance(error, boto.ClientError):
            details = error.response.get("Error", {})
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return self.from_code(details.get("Code", ""), status, name)
        if isinstance(
            error,
            boto.NoCredentialsError
            | boto.PartialCredentialsError
            | boto.CredentialRetrievalError
            | boto.TokenRetrievalError
            | boto.UnauthorizedSSOTokenError,
        ):
            return Denied(
                f"no usable credentials for {self.server} were found ({_text(error)})."
                " Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or choose a --profile."
            )
        if isinstance(error, boto.SSLError):
            return StoreError(f"no secure connection to {self.server} ({_reason(error)}).")
        if isinstance(error, boto.ParamValidationError | boto.ClientError):
            return StoreError(f"{self.server} cannot be asked for {name}: {_text(error)}.")
        if _is_network(error):
            return Unavailable(f"{self.server} does not answer ({_reason(error)}).")
        return StoreError(f"{self.server} failed at {name} ({_text(error)}).")

    def from_code(self, code: str, status: int, name: str) -> StoreError:
        """The StoreError for an error that the server sent: its code and HTTP status."""
        where = f"s3://{self._bucket}"
        said = code if code and not code.isdigit() else f"HTTP status {status}"
        if code == "NoSuchBucket":
            return NotFound(f"there is no bucket {self._bucket} at {self.server}. Create it first.")
        if code == "RequestTimeTooSkewed":
            return Denied(f"{self.server} refuses requests from this clock. Set the clock right.")
        if code in _FULL or status == 507:
            return Full(f"{where} has no room left ({said}). Free some or raise the quota.")
        if code in _ELSEWHERE or status in (301, 307):
            return StoreError(f"{where} is in another region ({said}). Name it with --region.")
        if code in _AGAIN or status == 429 or (status >= 500 and status != 501):
            return Unavailable(f"{self.server} cannot serve requests now ({said}).")
        if status == 412 or code == "PreconditionFailed":
            return AlreadyExists(f"{name} is already in {where}.")
        if code in _DENIED or status in (401, 403):
            return Denied(
                f"{self.server} refuses access to {name} in {where} ({said})."
                " Check the credentials and what they may do."
            )
        if status == 404 or code == "NoSuchKey":
            return NotFound(f"{name} is not in {where}.")
        return StoreError(f"{self.server} failed at {name} in {where} ({said}).")


def _is_network(error: Exception) -> bool:
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    return isinstance(
        error,
        boto.HTTPClientError
        | boto.ConnectionError
        | boto.IncompleteReadError
        | ResponseParserError
        | HTTPError
        | http.client.HTTPException
        | OSError,
    )


def _reason(error: BaseException) -> str:
    """The innermost reason in a chain of network errors, in a few words."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, TimeoutError) or "Timeout" in type(seen).__name__:
            return "timed out"
        if isinstance(seen, socket.gaierror):
            return "its name is not known"
        if isinstance(seen, OSError) and isinstance(seen.errno, int) and seen.errno > 0:
            return os.strerror(seen.errno).lower()
        inner = getattr(seen, "kwargs", {}).get("error")
        seen = inner if isinstance(inner, BaseException) else (seen.__cause__ or seen.__context__)
    return _text(error)


def _text(error: BaseException) -> str:
    """An error's own words on one line."""
    return " ".join(str(error).split()).rstrip(".")[:200]
