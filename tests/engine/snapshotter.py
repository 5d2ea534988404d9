"""A made-up snapshotter, as a program: an ext4 in a file, snapshots that are copies of that file.

    snapshotter.py BASE COMMAND ARGUMENT...

``BASE/image`` is mounted at ``BASE/live``; a snapshot is frozen, copied (a reflink, where the file
system of BASE has them) and mounted read-only. So inode numbers are the same in all snapshots, and
are used again, as with LVM. What changed is found out by comparing two snapshots, and told in the
way that ``BASE/way`` names, since sources differ in what they tell:

full    renames, each item, ranges of bytes
plain   no renames and no ranges: what moved is deleted there and created here, item by item
tops    as plain, but of a directory that came or went only the directory itself
lists   directories that have changed, without the names in them, and inode numbers of files
inodes  inode numbers only
"""

from __future__ import annotations

import json
import os
import signal
import stat as st
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

PIECE = 4096


class Item(NamedTuple):
    inode: int
    born_ns: int
    kind: int
    ctime_ns: int
    nlink: int

    @property
    def identity(self) -> tuple[int, int, int]:
        return self.inode, self.born_ns, self.kind

    @property
    def is_dir(self) -> bool:
        return st.S_ISDIR(self.kind)


Items = dict[bytes, Item]


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def make(base: Path) -> Path:
    """Make the file system; returns the directory to be backed up."""
    (base / "live").mkdir(parents=True)
    (base / "snapshots").mkdir()
    (base / "way").write_text("full")
    with (base / "image").open("wb") as file:
        file.truncate(64 << 20)
    run("mkfs.ext4", "-q", "-O", "^has_journal", "-I", "256", base / "image")
    run("mount", "-o", "loop", base / "image", base / "live")
    tree = base / "live" / "tree"
    tree.mkdir()
    return tree


def remove(base: Path) -> None:
    """Unmount all of it."""
    for place in [*(base / "snapshots").glob("*[!.img]"), base / "live"]:
        if os.path.ismount(place):
            run("umount", "-l", place)


def snapshot(base: Path, source: str, name: str) -> None:
    image, place = base / "snapshots" / f"{name}.img", base / "snapshots" / name
    run("fsfreeze", "-f", base / "live")
    try:
        run("cp", "--sparse=always", "--reflink=auto", base / "image", image)
    finally:
        run("fsfreeze", "-u", base / "live")
    place.mkdir()
    run("mount", "-o", "loop,ro", image, place)
    below = os.path.relpath(source, base / "live")
    print(json.dumps({"path": str(place / below), "id": name}))


def release(base: Path, name: str, _source: str) -> None:
    place = base / "snapshots" / name
    if os.path.ismount(place):
        run("umount", place)
    if place.exists():
        place.rmdir()
    (base / "snapshots" / f"{name}.img").unlink(missing_ok=True)


# -- what differs ---------------------------------------------------------------------------------


def items_of(top: bytes) -> Items:
    """All that is below a directory."""
    from cloudfs.source.inode import StatReader

    found: Items = {}
    reader = StatReader()
    stack = [b""]
    while stack:
        path = stack.pop()
        fd = os.open(os.path.join(top, path), os.O_RDONLY | os.O_DIRECTORY)
        try:
            for name in map(os.fsencode, os.listdir(fd)):
                s = reader.of(fd, name)
                below = os.path.join(path, name)
                found[below] = Item(s.ino, s.btime_ns, st.S_IFMT(s.mode), s.ctime_ns, s.nlink)
                if st.S_ISDIR(s.mode):
                    stack.append(below)
        finally:
            os.close(fd)
    return found


class Differ:
    def __init__(self, base: Path, old: str, new: str, source: str) -> None:
        below = os.path.relpath(source, base / "live")
        self.old_top = os.fsencode(base / "snapshots" / old / below)
        self.new_top = os.fsencode(base / "snapshots" / new / below)
        self.old, self.new = items_of(self.old_top), items_of(self.new_top)
        self.way = (base / "way").read_text()

    def say(self, kind: str, path: bytes, **more: object) -> None:
        print(json.dumps({"path": os.fsdecode(path), "kind": kind, **more}))

    def tell(self) -> None:
        if self.way in ("inodes", "lists"):
            self.tell_inodes()
        else:
            self.tell_paths()
        print(json.dumps({"complete": True}))

    def tell_paths(self) -> None:
        was = self.find_renames() if self.way == "full" else {path: path for path in self.new}
        kept: set[bytes] = set()
        for path, item in sorted(self.new.items()):
            origin = was[path]
            before = self.old.get(origin) if origin is not None else None
            if before is None or before.identity != item.identity:
                if self.way != "tops" or self.parent_stayed(path):
                    self.say("created", path)
                continue
            kept.add(origin)
            parent = was.get(os.path.dirname(path), b"")  # None: it was not there
            if parent is None or origin != os.path.join(parent, os.path.basename(path)):
                self.say("renamed", path, **{"from": os.fsdecode(origin)})
            if before.ctime_ns != item.ctime_ns:
                self.tell_change(path, origin, item)
        for path in self.old.keys() - kept:
            parent = os.path.dirname(path)
            if self.way != "tops" or not parent or parent in kept:
                self.say("deleted", path)

    def parent_stayed(self, path: bytes) -> bool:
        parent = os.path.dirname(path)
        old, new = self.old.get(parent), self.new.get(parent)
        return not parent or (old is not None and old.identity == new.identity)

    def find_renames(self) -> dict[bytes, bytes | None]:
        """Where each item of the new tree was."""
        names: dict[tuple[int, int, int], list[bytes]] = {}
        for path, item in self.old.items():
            names.setdefault(item.identity, []).append(path)
        was: dict[bytes, bytes | None] = {b"": b""}
        waiting: list[bytes] = []
        for path, item in sorted(self.new.items(), key=lambda pair: pair[0].count(b"/")):
            parent = was[os.path.dirname(path)]
            here = os.path.join(parent, os.path.basename(path)) if parent is not None else None
            known = names.get(item.identity, [])
            if here in known:
                was[path] = here
                known.remove(here)
            elif item.is_dir:
                was[path] = known.pop() if known else None
            else:
                waiting.append(path)
        for path in waiting:
            known = names.get(self.new[path].identity, [])
            was[path] = known.pop() if known else None
        return was

    def tell_change(self, path: bytes, origin: bytes, item: Item) -> None:
        if not st.S_ISREG(item.kind):
            self.say("attributes", path)
            return
        ranges = self.differing(path, origin)
        if not ranges:
            self.say("attributes", path)
        elif self.way == "full":
            self.say("changed", path, ranges=ranges)
        else:
            self.say("changed", path)

    def differing(self, path: bytes, origin: bytes) -> list[tuple[int, int]]:
        with open(os.path.join(self.old_top, origin), "rb") as file:
            a = file.read()
        with open(os.path.join(self.new_top, path), "rb") as file:
            b = file.read()
        longest = max(len(a), len(b))
        return [
            (start, PIECE)
            for start in range(0, longest, PIECE)
            if a[start : start + PIECE] != b[start : start + PIECE]
        ]

    def tell_inodes(self) -> None:
        """As filers do that know no names: all inodes that are not as they were."""
        old = {item.identity: item for item in self.old.values()}
        new = {item.identity: (path, item) for path, item in self.new.items()}
        before = {item.identity: path for path, item in self.old.items()}
        for identity, (path, item) in new.items():
            known = old.get(identity)
            if known is not None and known.ctime_ns == item.ctime_ns:
                continue
            if (
                item.is_dir
                and self.way == "lists"
                and known is not None
                and before[identity] == path
            ):
                self.say("changed", path)
                continue
            line: dict[str, object] = {"lin": item.inode, "kind": "created"}
            if known is not None:
                line["kind"] = "changed"
                if st.S_ISREG(item.kind):
                    line["ranges"] = self.differing(path, before[identity])
            print(json.dumps(line))
        for identity in old.keys() - new.keys():
            print(json.dumps({"lin": old[identity].inode, "kind": "deleted"}))
        print(json.dumps({"lin": os.stat(self.new_top).st_ino, "kind": "changed"}))


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # or the file system might stay frozen
    base, command, *arguments = sys.argv[1:]
    if command == "snapshot":
        snapshot(Path(base), *arguments)
    elif command == "changes":
        Differ(Path(base), *arguments).tell()
    else:
        release(Path(base), *arguments)


if __name__ == "__main__":
    main()
