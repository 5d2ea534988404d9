"""The commands that come with cloudfs, with made-up zfs, LVM and filers around them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import stat as st
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cloudfs.source.external.command import Commands
from tests.engine import fake_zfs, snapshotter
from tests.engine.rig import Rig
from tests.engine.test_external import Snapshotted, change_at_random, fs, held, same

__all__ = ["fs"]  # a fixture

TOP = Path(__file__).parents[2]
EXAMPLES = TOP / "share" / "external"


def example(base: Path, name: str, *arguments: str, **environment: str) -> Commands:
    """The commands of an example, with the programs in BASE/bin before all others."""
    program = (str(EXAMPLES / name), *arguments)
    return Commands(
        snapshot=(*program, "snapshot"),
        changes=(*program, "changes"),
        release=(*program, "release"),
        timeout_s=60,
        environment={
            "PATH": f"{base}/bin:{os.environ['PATH']}",
            "PYTHONPATH": str(TOP),
            **environment,
        },
    )


def put(base: Path, name: str, text: str) -> None:
    """Put a made-up program where it is found first."""
    path = base / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


class OnZfs(Snapshotted):
    """The state machine with the example for ZFS."""

    def __init__(self) -> None:
        super().__init__()
        fs = self.base / "fs"
        put(fs, "zfs", f'exec {sys.executable} {fake_zfs.__file__} {fs} "$@"')
        (fs / "live" / ".zfs").mkdir()
        (fs / "live" / ".zfs" / "snapshot").symlink_to(fs / "snapshots")
        self.rig.external = example(fs, "zfs")


def hunt_densely(machine_class: type[Snapshotted], seeds: range, rounds: int) -> int:
    """Much happens between two syncs; returns how many were scanned."""
    scans = 0
    for seed in seeds:
        choose = random.Random(seed)
        machine = machine_class()
        for round_ in range(rounds):
            for _ in range(choose.randint(1, 12 if round_ else 25)):
                change_at_random(machine, choose)
            machine.sync(force=False)
        machine.teardown()
        scans += len(machine.reasons)
    return scans


def test_zfs() -> None:
    assert hunt_densely(OnZfs, range(1), 7) == 0


@pytest.mark.long
def test_zfs_for_long() -> None:
    assert hunt_densely(OnZfs, range(10, 300), 8) < 100


# -- LVM ------------------------------------------------------------------------------------------

LVCREATE = """
while [ "$1" != -n ]; do shift; done
fsfreeze -f {fs}/live && cp --sparse=always {fs}/image {fs}/snapshots/$2.img; fsfreeze -u {fs}/live
"""
LVS = """
case "$*" in
    *pool_lv*) echo "   " ;;
    *vg_name*) echo "  group home" ;;
    *) [ -f {fs}/snapshots/${{1#group/}}.img ] ;;
esac
"""
MOUNT = """
case $3 in /dev/group/*) set -- -o loop,$2 {fs}/snapshots/${{3#/dev/group/}}.img "$4";; esac
exec /bin/mount "$@"
"""


def test_lvm(fs: Path) -> None:
    """Each sync scans a snapshot, which is gone after it."""
    put(fs, "lvcreate", LVCREATE.format(fs=fs))
    put(fs, "lvs", LVS.format(fs=fs))
    put(fs, "lvremove", f"for name; do :; done; rm {fs}/snapshots/${{name#group/}}.img")
    put(fs, "mount", MOUNT.format(fs=fs))
    given = example(fs, "lvm", LVM_SNAPSHOT_MOUNTS=f"{fs}/mounts")
    tree = fs / "live" / "tree"
    (tree / "d").mkdir()
    (tree / "d" / "f").write_text("one")
    rig = Rig(
        fs.parent, [tree], source="external", external=msgspec.structs.replace(given, changes=())
    )
    for number in (1, 2):
        (tree / "d" / "f").write_text(f"{number}")
        result = rig.sync()
        assert rig.notes == []
        assert result.snapshot is not None
        assert result.snapshot.consistent
        same(rig, number)
        assert held(fs) == []
        assert list((fs / "mounts").iterdir()) == []
    put(fs, "mount", "echo wrong fs type >&2; exit 32")
    (tree / "d" / "f").write_text("more")
    rig.sync()
    assert "the tree itself is scanned: lvm failed (wrong fs type)" in rig.notes[0]
    assert held(fs) == []
    same(rig, 3)


# -- CephFS ---------------------------------------------------------------------------------------


def test_cephfs(tmp_path: Path) -> None:
    """Its commands make and remove a directory in .snap, and nothing else."""
    (tmp_path / ".snap").mkdir()
    program = EXAMPLES / "cephfs"
    made = subprocess.run(
        [program, "snapshot", tmp_path, "name"], capture_output=True, text=True, check=True
    )
    assert made.stdout == f"{tmp_path}/.snap/name\n"
    assert (tmp_path / ".snap" / "name").is_dir()
    for known_as in (made.stdout.strip(), "name", "name"):
        subprocess.run([program, "release", known_as, tmp_path], check=True)
        assert not (tmp_path / ".snap" / "name").exists()
    assert subprocess.run([program, "changes"], capture_output=True, check=False).returncode == 1


# -- a filer --------------------------------------------------------------------------------------


class Filer(BaseHTTPRequestHandler):
    """A made-up filer of OneFS's kind: snapshots, jobs, changelists, regions by inode."""

    base: Path
    names: dict[str, str]  # of snapshots, by number
    jobs: dict[str, tuple[str, str, int]]  # base, new, how often it was asked for
    page = 7

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, value: object, code: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refused(self) -> bool:
        if self.headers["Authorization"] == "Basic dXNlcjpzZWNyZXQ=":
            return False
        self.answer({}, 401)
        return True

    def do_POST(self) -> None:
        wish = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        if self.path.endswith("/snapshot/snapshots"):
            number, name = str(len(self.names) + 7), wish["name"]
            with contextlib.redirect_stdout(io.StringIO()):
                snapshotter.snapshot(self.base, str(self.base / "live"), name)
            (self.base / "views" / name).symlink_to(self.base / "snapshots" / name / "tree")
            self.names[number] = name
            self.answer({"id": int(number)})
        else:
            given = wish["changelistcreate_params"]
            job = str(len(self.jobs))
            self.jobs[job] = str(given["older_snapid"]), str(given["newer_snapid"]), 0
            self.answer({"id": int(job)})

    def do_DELETE(self) -> None:
        name = self.names.get(self.path.rpartition("/")[2])
        if self.refused():
            return
        if name is None:
            self.answer({}, 404)
            return
        snapshotter.release(self.base, name, "")
        (self.base / "views" / name).unlink()
        self.answer({})

    def do_GET(self) -> None:
        if self.refused():
            return
        path, _, query = self.path.partition("?resume=")
        parts = path.split("/")
        if "jobs" in parts:
            base, new, asked = self.jobs[parts[-1]]
            self.jobs[parts[-1]] = base, new, asked + 1
            self.answer({"jobs": [{"state": "succeeded" if asked else "running"}]})
            return
        old, new = (
            self.names[number] for number in parts[parts.index("changelists") + 1].split("_")
        )
        differ = snapshotter.Differ(self.base, old, new, str(self.base / "live" / "tree"))
        if "diff-regions" in parts:
            self.answer({"regions": list(regions(differ, int(parts[-1])))})
            return
        found, first = list(entries(differ)), int(query or 0)
        after = first + self.page
        more = {"resume": str(after)} if after < len(found) else {}
        self.answer({"entries": found[first:after], **more})


def regions(differ: snapshotter.Differ, number: int) -> Iterator[dict[str, object]]:
    old = {item.inode: path for path, item in differ.old.items()}
    new = {item.inode: path for path, item in differ.new.items()}
    yield {"start_offset": 0, "byte_count": 1 << 40, "region_type": "unchanged"}
    for start, length in differ.differing(new[number], old[number]):
        yield {"start_offset": start, "byte_count": length, "region_type": "data"}


def entries(differ: snapshotter.Differ) -> Iterator[dict[str, object]]:
    """Names that came and went, in pairs where an inode has got another; what was modified."""
    whats = {st.S_IFDIR: "directory", st.S_IFREG: "regular", st.S_IFLNK: "symlink"}

    def entry(path: bytes, item: snapshotter.Item, *kinds: str) -> dict[str, object]:
        gone = "ENTRY_REMOVED" in kinds
        return {
            "path": os.fsdecode(b"/ifs/home/" + path).rstrip("/"),
            "lin": item.inode,
            "file_type": "(REMOVED)" if gone else whats.get(item.kind, "other"),
            "change_types": list(kinds),
        }

    was = {item.identity for item in differ.old.values()}
    still = {item.identity for item in differ.new.values()}
    for path, item in differ.old.items():
        now = differ.new.get(path)
        if now is None or now.identity != item.identity:
            moved = ["ENTRY_PATH_CHANGED"] if item.identity in still else []
            yield entry(path, item, "ENTRY_REMOVED", *moved)
    for path, item in differ.new.items():
        before = differ.old.get(path)
        if before is None or before.identity != item.identity:
            moved = ["ENTRY_PATH_CHANGED"] if item.identity in was else []
            yield entry(path, item, "ENTRY_ADDED", *moved)
        elif before.ctime_ns != item.ctime_ns:
            yield entry(path, item, "ENTRY_MODIFIED")


@contextlib.contextmanager
def filer(base: Path) -> Iterator[str]:
    """The URL of a filer for a file system with made-up snapshots."""
    made = type("ThisFiler", (Filer,), {"base": base, "names": {}, "jobs": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), made)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class OnFiler(Snapshotted):
    """The state machine with the example for a filer."""

    def __init__(self) -> None:
        super().__init__()
        fs = self.base / "fs"
        (fs / "views").mkdir()
        (fs / "live" / "tree" / ".snapshot").symlink_to(fs / "views")
        (fs / ".netrc").write_text("machine 127.0.0.1 login user password secret\n")
        (fs / ".netrc").chmod(0o600)
        self.ending = contextlib.ExitStack()
        url = self.ending.enter_context(filer(fs))
        self.rig.external = example(fs, "onefs", url, "/ifs/home", HOME=str(fs))

    def remove_all(self) -> None:
        self.ending.close()
        super().remove_all()


def test_a_filer() -> None:
    assert hunt_densely(OnFiler, range(1), 6) <= 1


@pytest.mark.long
def test_a_filer_for_long() -> None:
    assert hunt_densely(OnFiler, range(10, 100), 6) < 60


def test_a_filer_that_is_not_understood(fs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fs / "views").mkdir()
    tree = fs / "live" / "tree"
    (tree / ".snapshot").symlink_to(fs / "views")
    (tree / "f").write_text("one")
    netrc = fs / ".netrc"
    netrc.write_text("machine 127.0.0.1 login user password secret\n")
    netrc.chmod(0o600)
    with filer(fs) as url:
        given = example(fs, "onefs", url, "/ifs/home", HOME=str(fs))
        rig = Rig(fs.parent, [tree], source="external", external=given)
        rig.sync()
        assert rig.notes == []
        (tree / "f").write_text("two")
        monkeypatch.setattr(sys.modules[__name__], "entries", lambda _: [{"odd": 1}])
        rig.sync()
        assert "the snapshot is scanned: onefs failed (KeyError: 'change_types')" in rig.notes[0]
        same(rig, 2)
        netrc.write_text("machine 127.0.0.1 login user password wrong\n")
        (tree / "f").write_text("three")
        rig.sync()
        refused = "the tree itself is scanned: onefs failed (HTTPError: HTTP Error 401"
        assert any(refused in note for note in rig.notes)
        same(rig, 3)
