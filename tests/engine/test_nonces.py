"""No key seals twice under the same nonce, and no plain name reaches the store.

Every process of the program, worker processes too, imports a ``sitecustomize`` that stands between
the program and AES-GCM and writes each pair of key and nonce to one file: as digests, so that the
file holds no key. It also makes the program share the smallest backup among workers.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.conftest import PASSPHRASE, Machine, machine, other_machine
from tests.engine.rig import contents_of_tree, difference

__all__ = ["machine", "other_machine"]  # the fixtures

RECORD_BYTES = 8 + 16 + 12 + 16

WITNESS = """
import hashlib
import os

from cryptography.hazmat.primitives.ciphers import aead

_log = os.open(os.environ["SEAL_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
_real = aead.AESGCM


def _digest(data):
    return hashlib.blake2b(data, digest_size=16).digest()


class Witness:
    def __init__(self, key):
        self._digest = _digest(key)
        self._real = _real(key)

    def encrypt(self, nonce, data, associated_data):
        assert len(nonce) == 12
        sealed = self._real.encrypt(nonce, data, associated_data)
        record = os.getpid().to_bytes(8, "big") + self._digest + nonce + _digest(sealed)
        os.write(_log, record)  # one write, which the kernel appends whole
        return sealed

    def decrypt(self, nonce, data, associated_data):
        return self._real.decrypt(nonce, data, associated_data)


aead.AESGCM = Witness

if os.environ.get("SEAL_SHARED"):
    from cloudfs.backup import dispatch

    dispatch.INLINE_WORK = 0
    dispatch.FIRST_WORK = dispatch.MIN_WORK = dispatch.MAX_WORK = 1 << 20
"""


@dataclass(frozen=True)
class Seal:
    """One sealing: by which process, under which key (its digest) and nonce, of what (a digest)."""

    process: int
    key: bytes
    nonce: bytes
    sealed: bytes


@dataclass
class Witnessed:
    """What all machines of a test sealed."""

    log: Path
    site: Path

    def watch(self, machine: Machine, *, shared: bool = True) -> Machine:
        """Let a machine be watched; ``shared``: its syncs are shared among workers."""
        paths = [str(self.site), os.environ.get("PYTHONPATH", "")]
        machine.variables |= {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "SEAL_LOG": str(self.log),
            "SEAL_SHARED": "yes" if shared else "",
        }
        return machine

    def seals(self) -> list[Seal]:
        data = self.log.read_bytes()
        assert len(data) % RECORD_BYTES == 0
        return [
            Seal(int.from_bytes(data[at : at + 8]), *_split(data[at + 8 : at + RECORD_BYTES]))
            for at in range(0, len(data), RECORD_BYTES)
        ]

    def judge(self) -> list[Seal]:
        """No pair occurs twice."""
        seals = self.seals()
        pairs = Counter((seal.key, seal.nonce) for seal in seals)
        twice = [pair for pair, count in pairs.items() if count > 1]
        assert not twice, f"{len(twice)} of {len(pairs)} pairs of key and nonce were used again"
        return seals


def _split(record: bytes) -> tuple[bytes, bytes, bytes]:
    return record[:16], record[16:28], record[28:]


@pytest.fixture
def witnessed(tmp_path: Path) -> Witnessed:
    """A log that is empty."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(WITNESS)
    log = tmp_path / "seals"
    log.touch()
    return Witnessed(log, site)


# -- a tree whose every name is known when it is seen ----------------------------------------------

SECRETS = (
    b"Quarterly-Losses",
    b"Unannounced-Merger",
    b"Where-The-Money-Is",
    b"user.whistleblower",
    b"The-Value-Of-It",
    b"Text-That-Nobody-May-Read",
    b"payroll-policy",
    b"a-word-for-the-snapshot",
    PASSPHRASE.encode(),
)


def grow(tree: Path, turn: int, count: int = 60) -> None:
    """Make or change files under telling names, with telling content."""
    dice = random.Random(turn)
    for number in range(count):
        directory = tree / f"Quarterly-Losses-{dice.randrange(6)}"
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"Unannounced-Merger-{dice.randrange(40)}"
        words = b"Text-That-Nobody-May-Read %d\n" % turn
        path.write_bytes(words * dice.randrange(100) + dice.randbytes(50_000 + number))
        os.setxattr(path, b"user.whistleblower", b"The-Value-Of-It %d" % number)
    link = tree / f"link{turn}"
    link.unlink(missing_ok=True)
    link.symlink_to("Where-The-Money-Is")


def nothing_is_plain(repository: Path, tree: Path) -> None:
    """No name, value or text of the tree stands in the store, in names or bytes."""
    words = [*SECRETS, os.fsencode(tree), *(w.hex().encode() for w in SECRETS)]
    files = [path for path in repository.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        shown = os.fsencode(path.relative_to(repository)) + b"\n" + path.read_bytes()
        for word in words:
            assert word.lower() not in shown.lower(), f"{word!r} stands in {path}"


def create(machine: Machine, tree: Path, repository: Path) -> None:
    machine.run(
        *("policy", "create", "payroll-policy", "--source", tree),
        *("--repo", f"file://{repository}"),
    )


def same_home(machine: Machine, other: Machine) -> None:
    """Let another machine know the policy."""
    shutil.copytree(machine.home / "config", other.home / "config")


def restored(machine: Machine, tree: Path, target: Path) -> None:
    machine.run("restore", "payroll-policy", "--target", target)
    assert not difference(contents_of_tree(target), contents_of_tree(tree))


# -- whole runs --------------------------------------------------------------------------------


def test_syncs_with_workers(machine: Machine, witnessed: Witnessed, tmp_path: Path) -> None:
    tree, repository = tmp_path / "tree", tmp_path / "repo"
    witnessed.watch(machine)
    grow(tree, 0)
    create(machine, tree, repository)
    machine.run("sync", "--workers", "4", "--tag", "a-word-for-the-snapshot")
    grow(tree, 1)
    machine.run("sync", "--workers", "3")
    machine.run("sync", "--workers", "3")  # nothing changed: the same epoch again
    machine.run("sync", "--workers", "1", "--force")
    seals = witnessed.judge()
    assert len({seal.process for seal in seals}) >= 1 + 4 + 3, "the workers are not watched"
    nothing_is_plain(repository, tree)
    restored(machine, tree, tmp_path / "out")
    everything_was_seen(seals, repository)


def everything_was_seen(seals: list[Seal], repository: Path) -> None:
    """What a pack ends in, and each whole object, was sealed by who was watched: none is missed."""
    import hashlib

    known = {seal.sealed for seal in seals}
    heads = [*repository.glob("data/*/head/*"), *repository.glob("policy/*")]
    assert heads
    for path in heads:
        sealed = path.read_bytes()[40:]
        assert hashlib.blake2b(sealed, digest_size=16).digest() in known, path
    for path in [*repository.glob("data/*/pack/*/*"), *repository.glob("data/*/segment/*")]:
        data = path.read_bytes()
        footer = int.from_bytes(data[-16:-12], "big")
        sealed = data[-16 - footer : -16]
        assert hashlib.blake2b(sealed, digest_size=16).digest() in known, path


def killed(machine: Machine, witnessed: Witnessed, base: Path, seed: int, kills: int) -> None:
    """Syncs that are killed anywhere, and what comes after them."""
    dice = random.Random(seed)
    tree, repository = base / "tree", base / "repo"
    witnessed.watch(machine)
    grow(tree, 0)
    create(machine, tree, repository)
    for turn in range(kills):
        grow(tree, turn, 30)
        with machine.start("sync", "--workers", "3") as process:
            seen = witnessed.log.stat().st_size
            until = time.monotonic() + 5
            while witnessed.log.stat().st_size == seen and time.monotonic() < until:
                time.sleep(0.005)
            time.sleep(dice.uniform(0, 0.4))
            process.kill()
    machine.run("sync", "--workers", "3", "--force")
    witnessed.judge()
    nothing_is_plain(repository, tree)
    restored(machine, tree, base / "out")


def test_syncs_that_are_killed(machine: Machine, witnessed: Witnessed, tmp_path: Path) -> None:
    killed(machine, witnessed, tmp_path, 1, 2)


@pytest.mark.long
@pytest.mark.parametrize("seed", [2, 3])
def test_syncs_that_are_killed_often(
    machine: Machine, witnessed: Witnessed, tmp_path: Path, seed: int
) -> None:
    killed(machine, witnessed, tmp_path, seed, 25)


def test_two_machines(
    machine: Machine, other_machine: Machine, witnessed: Witnessed, tmp_path: Path
) -> None:
    """In turn, and at once."""
    tree, repository = tmp_path / "tree", tmp_path / "repo"
    grow(tree, 0)
    both = [witnessed.watch(machine, shared=False), witnessed.watch(other_machine, shared=False)]
    create(machine, tree, repository)
    same_home(machine, other_machine)
    for turn in range(2):
        grow(tree, turn + 1, 10)
        both[turn % 2].run("sync")
    grow(tree, 9, 10)
    running = [each.start("sync", "--force") for each in both]
    for process in running:
        _, err = process.communicate(timeout=60)
        assert process.returncode in (0, 11), err
    seals = witnessed.judge()
    nothing_is_plain(repository, tree)
    everything_was_seen(seals, repository)
    restored(other_machine, tree, tmp_path / "out")
