"""Every name of an object in the store, and nothing else.

::

    cloudfs.json                            repository configuration: id, format, wrapped keys
    policy/<policy id>                      sealed copy of a policy
    data/<policy id>/head/lease-<epoch>     who is syncing
    data/<policy id>/head/manifest-<n>      manifests
    data/<policy id>/segment/<id>           tables
    data/<policy id>/pack/<xx>/<id>         blocks, with the rows that describe them

Ids are 32 hexadecimal digits of randomness. Epochs and manifest numbers are written as
2^64-1 minus the number, in 16 hexadecimal digits, so that the newest sorts first and one
listing with a small limit finds it, however many there are.
"""

from __future__ import annotations

CONFIG = "cloudfs.json"
POLICIES = "policy/"

_TOP = 2**64 - 1


def policy(policy_id: str) -> str:
    """The sealed copy of a policy."""
    return f"{POLICIES}{policy_id}"


def head(policy_id: str) -> str:
    """The prefix below which a policy's leases and then its manifests lie, newest first."""
    return f"data/{policy_id}/head/"


def lease(policy_id: str, epoch: int) -> str:
    """The lease of one epoch."""
    return f"{head(policy_id)}lease-{_TOP - epoch:016x}"


def manifest(policy_id: str, number: int) -> str:
    """The manifest of one number."""
    return f"{head(policy_id)}manifest-{_TOP - number:016x}"


def parse_head(policy_id: str, name: str) -> tuple[str, int] | None:
    """("lease", epoch) or ("manifest", number) of a name below :func:`head`; None if foreign."""
    kind, _, digits = name.removeprefix(head(policy_id)).partition("-")
    if kind not in ("lease", "manifest") or len(digits) != 16:
        return None
    try:
        return kind, _TOP - int(digits, 16)
    except ValueError:
        return None


def segment(policy_id: str, segment_id: bytes) -> str:
    """A segment of a policy's tables."""
    return f"data/{policy_id}/segment/{segment_id.hex()}"


def packs(policy_id: str) -> str:
    """The prefix of all packs of a policy."""
    return f"data/{policy_id}/pack/"


def pack(policy_id: str, pack_id: bytes) -> str:
    """A pack."""
    digits = pack_id.hex()
    return f"{packs(policy_id)}{digits[:2]}/{digits}"


def parse_pack(name: str) -> bytes | None:
    """The id in a pack's name; None if it is not one."""
    digits = name.rpartition("/")[2]
    try:
        pack_id = bytes.fromhex(digits)
    except ValueError:
        return None
    return pack_id if len(pack_id) == 16 and digits == pack_id.hex() else None
