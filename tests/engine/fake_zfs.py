"""A made-up ``zfs`` over the made-up snapshotter: as much of the command as the example uses.

    fake_zfs.py BASE ARGUMENT...

``diff`` tells of objects as ZFS does: by number, each under one of its names, renamed where that
name is another, with the change of its links alone where those are more or fewer.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.engine import snapshotter

MARKS = {0o040000: "/", 0o100000: "F", 0o120000: "@", 0o010000: "|", 0o020000: "C", 0o060000: "B"}


def escaped(path: bytes) -> str:
    return "".join(chr(c) if 32 < c < 127 and c != 92 else f"\\{c:04o}" for c in path)


class Diff:
    def __init__(self, base: Path, old: str, new: str) -> None:
        self.top = os.fsencode(base / "live")
        found = []
        for name in (old, new):
            place = os.fsencode(base / "snapshots" / name)
            root = os.stat(place)
            items = snapshotter.items_of(place)
            by_number = {item.inode: (path, item) for path, item in items.items()}
            by_number[root.st_ino] = (
                b"",
                snapshotter.Item(root.st_ino, 0, 0o40000, root.st_ctime_ns, 2),
            )
            found.append(by_number)
        self.old, self.new = found

    def say(self, kind: str, item: snapshotter.Item, path: bytes, *more: str) -> None:
        print("\t".join((kind, MARKS[item.kind], escaped(os.path.join(self.top, path)), *more)))

    def run(self) -> None:
        for number in sorted(self.old.keys() | self.new.keys()):
            if number not in self.old:
                self.say("+", self.new[number][1], self.new[number][0])
            elif number not in self.new:
                self.say("-", self.old[number][1], self.old[number][0])
            else:
                self.both(*self.old[number], *self.new[number])

    def both(
        self, old_path: bytes, old: snapshotter.Item, path: bytes, item: snapshotter.Item
    ) -> None:
        links = 0 if old.is_dir or item.is_dir else item.nlink - old.nlink
        if old.identity != item.identity:
            self.say("-", old, old_path)
            self.say("+", item, path)
        elif old.ctime_ns == item.ctime_ns:
            pass
        elif links:
            self.say("M", item, old_path if links > 0 else path, f"({links:+d})")
        elif old_path == path:
            self.say("M", item, path)
        else:
            self.say("R", item, old_path, escaped(os.path.join(self.top, path)))


def main() -> None:
    base, verb, *arguments = sys.argv[1:]
    place = Path(base)
    name = arguments[-1].rpartition("@")[2]
    if verb == "list" and "-t" in arguments:
        sys.exit(not (place / "snapshots" / name).exists())
    elif verb == "list":
        print(f"tank/home\t{place}/live")
    elif verb == "snapshot":
        snapshotter.snapshot(place, str(place / "live"), name)
    elif verb == "destroy":
        snapshotter.release(place, name, "")
    elif verb == "diff":
        Diff(place, arguments[-2].rpartition("@")[2], name).run()
    else:
        sys.exit(f"{verb} is not known")


if __name__ == "__main__":
    main()
