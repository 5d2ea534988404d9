"""The programs that are compared, each behind the same few methods.

Every program gets an empty repository and empty caches on the same file system as the data, no
questions, and its own default of compression, or zstd where its default is none.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benching.measure import Cost, Failed, run

SECRET = "correct horse battery staple"


class Program:
    """One backup program working on one repository below ``base``."""

    name = ""

    def __init__(self, base: Path) -> None:
        self.base = base / self.name
        self.s3: dict[str, str] = {}  # endpoint and keys, when the repository is to lie there
        self.bucket = ""

    @property
    def version(self) -> str:
        """Name and version."""
        return self.name

    @property
    def env(self) -> dict[str, str]:
        """The environment of all runs."""
        return {**os.environ, **self.s3, **self._own()}

    def _own(self) -> dict[str, str]:
        return {}

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

    def restore(self, source: Path, target: Path) -> Path:
        """The command of a restore goes to :meth:`restore_command`; where the tree then lies."""
        return target

    def restore_command(self, source: Path, target: Path) -> list[str]:
        """Restore the last backup."""
        raise AssertionError

    def mount(self, mountpoint: Path) -> tuple[Cost, Path] | None:
        """Mount; the cost until the backup can be listed, and where it lies. None: cannot."""
        return None

    def unmount(self, mountpoint: Path) -> None:
        """Unmount."""
        subprocess.run(["fusermount3", "-u", str(mountpoint)], check=False, capture_output=True)

    def serving_pid(self) -> int:
        """The process that serves the mount."""
        return self._process.pid if getattr(self, "_process", None) else 0

    def _serve(self, command: list[str], mountpoint: Path, find: str) -> tuple[Cost, Path]:
        started = time.perf_counter()
        self._process = subprocess.Popen(
            command, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while time.perf_counter() - started < 60:
            found = sorted(mountpoint.glob(find)) if os.path.ismount(mountpoint) else []
            if found:
                return Cost(time.perf_counter() - started, 0, 0), found[-1]
            time.sleep(0.01)
        raise Failed(f"{self.name} did not mount in a minute")

    def repository_mb(self) -> float:
        """The size of the repository in MB; 0 where it lies elsewhere."""
        place = self.base / "repository"
        sizes = (p.stat().st_size for p in place.rglob("*") if p.is_file())
        return round(sum(sizes) / 1e6, 1)


class Cloudfs(Program):
    """cloudfs, as it is installed in this checkout."""

    name = "cloudfs"

    def _own(self) -> dict[str, str]:
        return {
            "CLOUDFS_PASSPHRASE": SECRET,
            "CLOUDFS_CONFIG_DIR": str(self.base / "config"),
            "CLOUDFS_STATE_DIR": str(self.base / "state"),
            "CLOUDFS_CACHE_DIR": str(self.base / "cache"),
        }

    @property
    def program(self) -> str:
        """The program beside this interpreter, or on the PATH."""
        beside = Path(sys.executable).with_name("cloudfs")
        venv = Path(__file__).resolve().parents[2] / ".venv/bin/cloudfs"
        return str(next((p for p in (beside, venv) if p.exists()), "cloudfs"))

    @property
    def url(self) -> str:
        """Where the repository lies."""
        return f"s3://{self.bucket}/cloudfs" if self.bucket else f"file://{self.base}/repository"

    def init(self, source: Path) -> None:
        endpoint = ["--endpoint-url", self.s3["ENDPOINT"]] if self.bucket else []
        self.quietly(
            self.program, "policy", "create", "bench", "--source", str(source),
            "--repo", self.url, *endpoint,
        )  # fmt: skip

    def backup(self, source: Path) -> Cost:
        return run([self.program, "sync", "bench"], self.env)

    def requests_of_backup(self) -> dict[str, float]:
        """Run a sync and tell what it asked of the store."""
        done = subprocess.run(
            [self.program, "sync", "bench", "--json"], env=self.env, capture_output=True, check=True
        )
        summary = json.loads(done.stdout.splitlines()[-1])
        return {kind: summary[kind] for kind in ("requests", "puts", "gets")}

    def forget_local(self) -> None:
        """Be another machine."""
        for part in ("state", "cache"):
            shutil.rmtree(self.base / part, ignore_errors=True)

    def restore_command(self, source: Path, target: Path) -> list[str]:
        return [self.program, "restore", "bench", "--target", str(target)]

    def mount(self, mountpoint: Path) -> tuple[Cost, Path]:
        cost = run([self.program, "mount", "bench", str(mountpoint)], self.env)
        started = time.perf_counter()
        latest = mountpoint / "latest"
        os.listdir(latest)
        wall = cost.wall_s + time.perf_counter() - started
        return Cost(wall, cost.peak_mb, cost.cpu_s), latest.resolve()

    def serving_pid(self) -> int:
        found = subprocess.run(["pgrep", "-f", "cloudfs.*mount"], capture_output=True, check=False)
        return max((int(pid) for pid in found.stdout.split()), default=0)

    def unmount(self, mountpoint: Path) -> None:
        self.quietly(self.program, "umount", str(mountpoint))


class Restic(Program):
    """restic with its default compression."""

    name = "restic"

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
        return _first_words(["restic", "version"], 2)

    def init(self, source: Path) -> None:
        self.quietly("restic", "init")

    def backup(self, source: Path) -> Cost:
        return run(["restic", "-q", "backup", "."], self.env, cwd=source)

    def restore_command(self, source: Path, target: Path) -> list[str]:
        return ["restic", "-q", "restore", "latest", "--target", str(target)]

    def restore(self, source: Path, target: Path) -> Path:
        return target

    def mount(self, mountpoint: Path) -> tuple[Cost, Path]:
        return self._serve(["restic", "-q", "mount", str(mountpoint)], mountpoint, "snapshots/2*")


class Kopia(Program):
    """kopia with zstd, since it does not compress by default."""

    name = "kopia"

    def _own(self) -> dict[str, str]:
        return {
            "KOPIA_PASSWORD": SECRET,
            "KOPIA_CHECK_FOR_UPDATES": "false",
            "KOPIA_CONFIG_PATH": str(self.base / "config"),
            "KOPIA_LOG_DIR": str(self.base / "logs"),
            "KOPIA_CACHE_DIRECTORY": str(self.base / "cache"),
        }

    @property
    def version(self) -> str:
        return "kopia " + _first_words(["kopia", "--version"], 1)

    def init(self, source: Path) -> None:
        place = ["filesystem", f"--path={self.base}/repository"]
        if self.bucket:
            host = self.s3["ENDPOINT"].removeprefix("http://")
            place = [
                "s3", f"--bucket={self.bucket}", "--prefix=kopia/", f"--endpoint={host}",
                "--disable-tls", f"--access-key={self.s3['AWS_ACCESS_KEY_ID']}",
                f"--secret-access-key={self.s3['AWS_SECRET_ACCESS_KEY']}",
            ]  # fmt: skip
        self.quietly("kopia", "repository", "create", *place)
        self.quietly("kopia", "policy", "set", "--global", "--compression=zstd")

    def backup(self, source: Path) -> Cost:
        return run(["kopia", "snapshot", "create", str(source)], self.env)

    def restore_command(self, source: Path, target: Path) -> list[str]:
        return ["kopia", "restore", self._last(source), str(target)]

    def _last(self, source: Path) -> str:
        done = subprocess.run(
            ["kopia", "snapshot", "list", "--json", str(source)],
            env=self.env, capture_output=True, check=True,
        )  # fmt: skip
        return str(json.loads(done.stdout)[-1]["id"])

    def mount(self, mountpoint: Path) -> tuple[Cost, Path]:
        return self._serve(["kopia", "mount", "all", str(mountpoint)], mountpoint, "*/*/*")


class Rustic(Program):
    """rustic with its default compression."""

    name = "rustic"

    def _own(self) -> dict[str, str]:
        return {
            "RUSTIC_PASSWORD": SECRET,
            "RUSTIC_REPOSITORY": f"{self.base}/repository",
            "RUSTIC_CACHE_DIR": str(self.base / "cache"),
            "HOME": str(self.base),
        }

    def init(self, source: Path) -> None:
        self.quietly("rustic", "init")

    def backup(self, source: Path) -> Cost:
        return run(["rustic", "backup", "."], self.env, cwd=source)

    def restore_command(self, source: Path, target: Path) -> list[str]:
        return ["rustic", "restore", "latest", str(target)]


class Borg(Program):
    """borg 1 with zstd at level 3."""

    name = "borg"

    def _own(self) -> dict[str, str]:
        return {
            "BORG_PASSPHRASE": SECRET,
            "BORG_REPO": f"{self.base}/repository",
            "BORG_BASE_DIR": str(self.base / "own"),
        }

    @property
    def version(self) -> str:
        return _first_words(["borg", "--version"], 2)

    def init(self, source: Path) -> None:
        self._count = 0
        self.quietly("borg", "init", "-e", "repokey-blake2")

    def backup(self, source: Path) -> Cost:
        self._count += 1
        command = ["borg", "create", "-C", "zstd,3", f"::{self._count}", "."]
        return run(command, self.env, cwd=source)

    def restore_command(self, source: Path, target: Path) -> list[str]:
        inner = f"cd '{target}' && exec borg extract ::{self._count}"
        return ["sh", "-c", inner]


def _first_words(command: list[str], count: int) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return " ".join(done.stdout.split()[:count])


def find_programs(base: Path, peers: list[str]) -> list[Program]:
    """cloudfs, and those of the peers that are on the PATH."""
    known: list[type[Program]] = [Restic, Kopia, Rustic, Borg]
    found = [kind(base) for kind in known if kind.name in peers and shutil.which(kind.name)]
    return [Cloudfs(base), *found]
