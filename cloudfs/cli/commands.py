"""The commands that a policy gives for its snapshots: who may have written them, and what they get.

Who can change a policy file can have its commands run by whoever syncs. So they are run only if
nobody else could have written it: the file belongs to root or to the user who syncs, and its group
and others may not write it.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from cloudfs.cli.environment import Environment
from cloudfs.cli.policies import PolicyFile
from cloudfs.core.errors import UsageError
from cloudfs.core.policy import Policy

if TYPE_CHECKING:
    from cloudfs.source.external.command import Commands

KEYS = ("external_snapshot", "external_changes", "external_release")


def external_commands(file: PolicyFile, environment: Environment) -> Commands | None:
    """What the policy's commands are, where it uses any. Raises UsageError for unsafe files."""
    policy = file.policy
    if policy.snapshot != "external":
        return None
    from cloudfs.source.external.command import Commands

    status = file.path.stat()
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        raise UsageError(
            f"the commands in {file.path} are not run: others than you may change that file."
            " Let it belong to you, and `chmod go-w` it."
        )
    return Commands(
        snapshot=policy.external_snapshot,
        changes=policy.external_changes,
        release=policy.external_release,
        timeout_s=policy.external_timeout_s,
        environment={**environment.for_commands, "CLOUDFS_POLICY": policy.name},
    )


def check_commands(policy: Policy) -> None:
    """See that a policy has the commands that it needs, and that this machine has them too.

    Raises UsageError.
    """
    if policy.snapshot != "external":
        return
    if not policy.external_snapshot:
        raise UsageError(
            "--snapshot external needs --external-snapshot COMMAND; see cloudfs-external(7)."
        )
    for key in KEYS:
        command = getattr(policy, key)
        if command and shutil.which(command[0]) is None:
            option = key.replace("_", "-")
            raise UsageError(f"--{option}: there is no program {command[0]} that can be run.")
