"""The programs that are compared, each behind the same few methods.

Every program gets an empty repository and empty caches on the same file system as the data, no
questions, and its own default of compression, or zstd where its default is none.

A peer is named as it is called, or by a label and a path, ``restic-0.14=/usr/bin/restic``. A label
begins with the name of the program that it stands for.
"""

from __future__ import annotations

import compileall
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benching.measure import Cost, Failed, memory_mb, processor_s, run

SECRET = "correct horse battery staple"
END_S = 10.0
"""How long the process behind a mount may take to end by itself."""
MARK = "CLOUDFS_BENCH"
"""A variable in the environment of all that a program starts, detached processes as well."""


class Program:
    """One backup program working on one repository below ``base``."""

    kind = ""
    speaks_s3 = False
    local: tuple[str, ...] = ("cache",)
    """What is kept below ``base`` beside the repository."""
    files_each = 1
    """Files that a restore makes for each that it restores."""

    def __init__(self, base: Path, label: str, path: str) -> None:
        self.name = label
        self.path = path
        self.base = base / label
        self.s3: dict[str, str] = {}  # endpoint and keys, when the repository is to lie there
        self.bucket = ""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def version(self) -> str:
        """Its label, and what it says of itself."""
        return f"{self.name}: {_first_words([self.path, '--version'], 2)}"

    @property
    def env(self) -> dict[str, str]:
        """The environment of all runs."""
        return {**os.environ, **self.s3, **self._own(), MARK: str(self.base)}

    def _own(self) -> dict[str, str]:
        return {}

    def processes(self) -> list[int]:
        """Those that run now, the one that serves a mount above all."""
        wanted = f"{MARK}={self.base}".encode()
        found = []
        for place in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if wanted in place.read_bytes().split(b"\0"):
                    found.append(int(place.parent.name))
        return found

    def fresh(self, source: Path, bucket: str = "", s3: dict[str, str] | None = None) -> None:
        """Begin with an empty repository, empty caches and nothing remembered."""
        shutil.rmtree(self.base, ignore_errors=True)
        self.base.mkdir(parents=True)
        self.bucket, self.s3 = bucket, s3 or {}
        self.init(source)

    def quietly(self, *command: str) -> None:
        """Run something that is not measured."""
        done = subprocess.run(command, env=self.env, capture_output=True, check=False)
        if done.returncode:
            raise Failed(f"{' '.join(command[:4])}: {done.stderr.decode()[-500:]}")

    def init(self, source: Path) -> None:
        """Make the repository."""
        raise AssertionError

    def backup(self, source: Path) -> Cost:
        """Back the source up."""
        raise AssertionError

    def restore_command(self, source: Path, target: Path) -> list[str]:
        """Restore the last backup."""
        raise AssertionError

    def forget(self) -> None:
        """Be another machine: lose all caches, and what is known of the repository."""
        for part in self.local:
            shutil.rmtree(self.base / part, ignore_errors=True)

    def requests(self, cost: Cost) -> dict[str, float]:
        """How many requests a run says that it sent, by kind; empty where it does not say."""
        return {}

    def mount(self, mountpoint: Path) -> tuple[Cost, Path] | None:
        """Mount; the cost until the backup can be listed, and where it lies. None: cannot."""
        return None

    def unmount(self, mountpoint: Path) -> None:
        """Unmount, and wait until the process has ended; it may be busy with what nobody awaits."""
        subprocess.run(["fusermount3", "-u", str(mountpoint)], check=False, capture_output=True)
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            command = ["fusermount3", "-u", "-z", str(mountpoint)]
            subprocess.run(command, check=False, capture_output=True)
            process.kill()
            process.wait()

    def _serve(self, command: list[str], mountpoint: Path, find: str) -> tuple[Cost, Path]:
        started = time.perf_counter()
        self._process = subprocess.Popen(
            command, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while time.perf_counter() - started < 60:
            found = sorted(mountpoint.glob(find)) if os.path.ismount(mountpoint) else []
            if found and os.listdir(found[-1]):
                wall = time.perf_counter() - started
                pids = [self._process.pid]
                return Cost(wall, memory_mb(pids), sum(processor_s(pids).values())), found[-1]
            time.sleep(0.01)
        raise Failed(f"{self.name} did not mount in a minute")

    def repository_mb(self) -> float:
        """The size of the repository in MB; 0 where it lies elsewhere."""
        place = self.base / "repository"
        sizes = (p.stat().st_size for p in place.rglob("*") if p.is_file())
        return round(sum(sizes) / 1e6, 1)


class Cloudfs(Program):
    """cloudfs, as it is installed in this checkout."""

    kind = "cloudfs"
    speaks_s3 = True
    local = ("config", "state", "cache")

    def __init__(self, base: Path, label: str = kind) -> None:
        beside = Path(sys.executable).with_name("cloudfs")
        checkout = Path(__file__).resolve().parents[2]
        venv = checkout / ".venv/bin/cloudfs"
        # As every installation does; where PYTHONDONTWRITEBYTECODE is set, nothing else would.
        compileall.compile_dir(checkout / "cloudfs", quiet=1)
        path = next((str(p) for p in (beside, venv) if p.exists()), "cloudfs")
        super().__init__(base, label, path)
        self.snapshot = "auto"
        """How the changes of a source are found."""

    def _own(self) -> dict[str, str]:
        return {
            "CLOUDFS_PASSPHRASE": SECRET,
            "CLOUDFS_CONFIG_DIR": str(self.base / "config"),
            "CLOUDFS_STATE_DIR": str(self.base / "state"),
            "CLOUDFS_CACHE_DIR": str(self.base / "cache"),
        }

    @property
    def url(self) -> str:
        """Where the repository lies."""
        return f"s3://{self.bucket}/cloudfs" if self.bucket else f"file://{self.base}/repository"

    @property
    def _endpoint(self) -> list[str]:
        return ["--endpoint-url", self.s3["ENDPOINT"]] if self.bucket else []

    @property
    def _place(self) -> list[str]:
        """How the repository is named: by its policy, where this machine knows it."""
        return ["bench"] if (self.base / "config").exists() else [self.url, *self._endpoint]

    def init(self, source: Path) -> None:
        self.quietly(
            self.path, "policy", "create", "bench", "--source", str(source),
            "--repo", self.url, "--snapshot", self.snapshot, *self._endpoint,
        )  # fmt: skip

    @property
    def sync_command(self) -> list[str]:
        """One sync."""
        return [self.path, "sync", "bench", "--json"]

    def backup(self, source: Path) -> Cost:
        return run(self.sync_command, self.env)

    def summary(self, cost: Cost) -> dict[str, Any]:
        """What a sync said at its end."""
        found: dict[str, Any] = json.loads(cost.output.splitlines()[-1])
        return found

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """A daemon listens to the file system of the source."""
        self.quietly(self.path, "watch", "bench")
        try:
            yield
        finally:
            self._end("watch", "bench", "--stop")

    @contextlib.contextmanager
    def live(
        self, source: Path, place: Path | None = None, *, tracking: bool = True
    ) -> Iterator[Path]:
        """The source is mounted live, over itself or at a place."""
        options = [] if tracking else ["--no-tracking"]
        places = [] if place is None else [str(place)]
        self.quietly(self.path, "mount", "--live", "bench", *places, *options)
        try:
            yield place or source
        finally:
            self._end("umount", str(place or source))

    def _end(self, *command: str) -> None:
        """End a daemon, and make sure of it: what it holds is wanted for what comes next."""
        try:
            self.quietly(self.path, *command)
        except Failed as error:
            print(f"  {error}", file=sys.stderr, flush=True)
        ends = time.monotonic() + END_S
        while (left := self.processes()) and time.monotonic() < ends:
            time.sleep(0.01)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if command[0] == "umount" and os.path.ismount(command[1]) and left:
            subprocess.run(["umount", "-l", command[1]], check=False, capture_output=True)

    def requests(self, cost: Cost) -> dict[str, float]:
        summary = self.summary(cost)
        return {kind: summary[kind] for kind in ("requests", "gets", "puts") if kind in summary}

    def restore_command(self, source: Path, target: Path) -> list[str]:
        return [self.path, "restore", *self._place, "--target", str(target), "--json"]

    def mount(self, mountpoint: Path) -> tuple[Cost, Path]:
        cost = run([self.path, "mount", *self._place, str(mountpoint)], self.env)
        started = time.perf_counter()
        latest = mountpoint / "latest"
        os.listdir(latest)
        wall = cost.wall_s + time.perf_counter() - started
        return Cost(wall, cost.peak_mb, cost.cpu_s), latest.resolve()

    def unmount(self, mountpoint: Path) -> None:
        self.quietly(self.path, "umount", str(mountpoint))


class Restic(Program):
    """restic with its default compression."""

    kind = "restic"
    speaks_s3 = True

    def _own(self) -> dict[str, str]:
        place = f"{self.base}/repository"
        if self.bucket:
            place = f"s3:{self.s3['ENDPOINT']}/{self.bucket}/restic"
        return {
            "RESTIC_PASSWORD": SECRET,
            "RESTIC_REPOSITORY": place,
            "RESTIC_CACHE_DIR": str(self.base / "cache"),
        }

    @property
    def version(self) -> str:
        return f"{self.name}: {_first_words([self.path, 'version'], 2)}"

    def init(self, source: Path) -> None:
        self.quietly(self.path, "init")

    def backup(self, source: Path) -> Cost:
        return run([self.path, "-q", "backup", "."], self.env, cwd=source)

    def restore_command(self, source: Path, target: Path) -> list[str]:
        return [self.path, "-q", "restore", "latest", "--target", str(target)]

    def mount(self, mountpoint: Path) -> tuple[Cost, Path]:
        return self._serve([self.path, "-q", "mount", str(mountpoint)], mountpoint, "snapshots/2*")


class Kopia(Program):
    """kopia with zstd, since it does not compress by default."""

    kind = "kopia"
    speaks_s3 = True
    local = ("config", "cache", "logs")
    files_each = 2  # each content is cached in a file of its own

    def _own(self) -> dict[str, str]:
        return {
            "KOPIA_PASSWORD": SECRET,
            "KOPIA_CHECK_FOR_UPDATES": "false",
            "KOPIA_CONFIG_PATH": str(self.base / "config"),
            "KOPIA_LOG_DIR": str(self.base / "logs"),
            "KOPIA_CACHE_DIRECTORY": str(self.base / "cache"),
        }

    @property
    def _place(self) -> list[str]:
        if not self.bucket:
            return ["filesystem", f"--path={self.base}/repository"]
        host = self.s3["ENDPOINT"].removeprefix("http://")
        return [
            "s3", f"--bucket={self.bucket}", "--prefix=kopia/", f"--endpoint={host}",
            "--disable-tls", f"--access-key={self.s3['AWS_ACCESS_KEY_ID']}",
            f"--secret-access-key={self.s3['AWS_SECRET_ACCESS_KEY']}",
        ]  # fmt: skip

    def forget(self) -> None:
        super().forget()
        (self.base / "config").unlink(missing_ok=True)

    def _connect(self) -> None:
        """Be told where the repository is, where that was forgotten."""
        if not (self.base / "config").exists():
            self.quietly(self.path, "repository", "connect", *self._place)

    def init(self, source: Path) -> None:
        self.quietly(self.path, "repository", "create", *self._place)
        self.quietly(self.path, "policy", "set", "--global", "--compression=zstd")

    def backup(self, source: Path) -> Cost:
        return run([self.path, "snapshot", "create", str(source)], self.env)

    def restore_command(self, source: Path, target: Path) -> list[str]:
        self._connect()
        return [self.path, "restore", self._last(source), str(target)]

    def _last(self, source: Path) -> str:
        done = subprocess.run(
            [self.path, "snapshot", "list", "--json", str(source)],
            env=self.env, capture_output=True, check=True,
        )  # fmt: skip
        return str(json.loads(done.stdout)[-1]["id"])

    def mount(self, mountpoint: Path) -> tuple[Cost, Path]:
        started = time.perf_counter()
        self._connect()
        connected_s = time.perf_counter() - started
        cost, top = self._serve([self.path, "mount", "all", str(mountpoint)], mountpoint, "*/*/*")
        return Cost(connected_s + cost.wall_s, cost.peak_mb, cost.cpu_s), top


class Rustic(Program):
    """rustic with its default compression."""

    kind = "rustic"

    def _own(self) -> dict[str, str]:
        return {
            "RUSTIC_PASSWORD": SECRET,
            "RUSTIC_REPOSITORY": f"{self.base}/repository",
            "RUSTIC_CACHE_DIR": str(self.base / "cache"),
            "HOME": str(self.base),
        }

    def init(self, source: Path) -> None:
        self.quietly(self.path, "init")

    def backup(self, source: Path) -> Cost:
        return run([self.path, "backup", "."], self.env, cwd=source)

    def restore_command(self, source: Path, target: Path) -> list[str]:
        return [self.path, "restore", "latest", str(target)]


class Borg(Program):
    """borg 1 with zstd at level 3."""

    kind = "borg"
    local = ("own",)

    def _own(self) -> dict[str, str]:
        return {
            "BORG_PASSPHRASE": SECRET,
            "BORG_REPO": f"{self.base}/repository",
            "BORG_BASE_DIR": str(self.base / "own"),
        }

    def init(self, source: Path) -> None:
        self._count = 0
        self.quietly(self.path, "init", "-e", "repokey-blake2")

    def backup(self, source: Path) -> Cost:
        self._count += 1
        command = [self.path, "create", "-C", "zstd,3", f"::{self._count}", "."]
        return run(command, self.env, cwd=source)

    def restore_command(self, source: Path, target: Path) -> list[str]:
        inner = f"cd '{target}' && exec '{self.path}' extract ::{self._count}"
        return ["sh", "-c", inner]

    def mount(self, mountpoint: Path) -> tuple[Cost, Path]:
        return self._serve([self.path, "mount", "-f", "::", str(mountpoint)], mountpoint, "*")


def _first_words(command: list[str], count: int) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return " ".join(done.stdout.split()[:count])


def find_programs(base: Path, peers: list[str]) -> list[Program]:
    """cloudfs, and the peers: those on the PATH, and those that are named with their paths."""
    found: list[Program] = [Cloudfs(base)]
    for peer in peers:
        label, _, given = peer.partition("=")
        kind = next(
            (kind for kind in (Restic, Kopia, Rustic, Borg) if label.startswith(kind.kind)), None
        )
        path = shutil.which(given or label)
        if given and (kind is None or path is None):
            sys.exit(f"There is no such peer: {peer}.")
        if kind is not None and path is not None:
            found.append(kind(base, label, path))
    return found
