"""The kernel's calls for btrfs: laid out as its header says, and doing what the command does."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

from cloudfs.source.btrfs import ioctl, subvolume
from cloudfs.source.choose import hasten
from tests.engine import btrfs

HEADER = """
#include <linux/btrfs.h>
#include <linux/btrfs_tree.h>
#include <stddef.h>
#include <stdio.h>
#define SHOW(what) printf("%s %llu\\n", #what, (unsigned long long)(what))
#define AT(type, field) printf("%s.%s %zu\\n", #type, #field, offsetof(struct type, field))
int main(void) {
    SHOW(BTRFS_IOC_SNAP_DESTROY); SHOW(BTRFS_IOC_SNAP_CREATE_V2); SHOW(BTRFS_IOC_SEND);
    SHOW(BTRFS_IOC_SYNC);
    SHOW(BTRFS_IOC_GET_SUBVOL_INFO); SHOW(BTRFS_IOC_GET_SUBVOL_ROOTREF);
    SHOW(BTRFS_IOC_INO_LOOKUP_USER); SHOW(BTRFS_SUBVOL_RDONLY); SHOW(BTRFS_ROOT_SUBVOL_RDONLY);
    SHOW(BTRFS_SEND_FLAG_NO_FILE_DATA); SHOW(BTRFS_IOC_TREE_SEARCH_V2); SHOW(BTRFS_INODE_ITEM_KEY);
    AT(btrfs_ioctl_vol_args, name);
    AT(btrfs_ioctl_vol_args_v2, flags); AT(btrfs_ioctl_vol_args_v2, name);
    AT(btrfs_ioctl_get_subvol_info_args, ctransid); AT(btrfs_ioctl_get_subvol_info_args, flags);
    AT(btrfs_ioctl_get_subvol_info_args, uuid); AT(btrfs_ioctl_get_subvol_info_args, parent_uuid);
    AT(btrfs_ioctl_get_subvol_info_args, otransid);
    AT(btrfs_ioctl_get_subvol_rootref_args, rootref);
    AT(btrfs_ioctl_get_subvol_rootref_args, num_items);
    AT(btrfs_ioctl_ino_lookup_user_args, treeid); AT(btrfs_ioctl_ino_lookup_user_args, name);
    AT(btrfs_ioctl_ino_lookup_user_args, path);
    AT(btrfs_ioctl_send_args, parent_root); AT(btrfs_ioctl_send_args, flags);
    AT(btrfs_ioctl_search_args_v2, key.min_objectid);
    AT(btrfs_ioctl_search_args_v2, key.min_transid);
    AT(btrfs_ioctl_search_args_v2, key.max_type); AT(btrfs_ioctl_search_args_v2, key.nr_items);
    AT(btrfs_ioctl_search_args_v2, buf_size);
    AT(btrfs_ioctl_search_header, objectid); AT(btrfs_ioctl_search_header, type);
    AT(btrfs_ioctl_search_header, len);
    AT(btrfs_inode_item, transid); AT(btrfs_inode_item, size); AT(btrfs_inode_item, mode);
    return 0;
}
"""

FIELDS = {
    "vol_args": (ioctl.VOL_ARGS, {"name": 1}),
    "vol_args_v2": (ioctl.VOL_ARGS_V2, {"flags": 2, "name": 3}),
    "get_subvol_info_args": (
        ioctl.SUBVOL_INFO_ARGS,
        {"flags": 5, "uuid": 6, "parent_uuid": 7, "ctransid": 9, "otransid": 10},
    ),
    "get_subvol_rootref_args": (ioctl.ROOTREF_ARGS, {"rootref": 1, "num_items": 2}),
    "ino_lookup_user_args": (ioctl.INO_LOOKUP_USER_ARGS, {"treeid": 1, "name": 2, "path": 3}),
    "search_args_v2": (
        ioctl.SEARCH_ARGS_V2,
        {
            "key.min_objectid": 1,
            "key.min_transid": 5,
            "key.max_type": 8,
            "key.nr_items": 9,
            "buf_size": 15,
        },
    ),
    "search_header": (ioctl.SEARCH_HEADER, {"objectid": 1, "type": 3, "len": 4}),
    "send_args": (ioctl.SEND_ARGS, {"parent_root": 3, "flags": 4}),
}
"""Structures, and which field of ours is which of theirs."""


def offset(layout: str, index: int) -> int:
    """Where a field of a layout begins: the size of all before it."""
    fields = re.findall(r"(\d*)([a-zA-Z])", layout)
    sizes, before = [], 0
    for count, kind in fields:
        repeat = int(count or 1)
        single = {"Q": 8, "q": 8, "I": 4, "B": 1, "s": 1, "x": 1}[kind]
        if kind in "sx":
            if kind == "s":
                sizes.append(before)
            before += repeat
        else:
            for _ in range(repeat):
                sizes.append(before)
                before += single
    return sizes[index]


def test_numbers_and_layouts_are_those_of_the_header(tmp_path: Path) -> None:
    (tmp_path / "show.c").write_text(HEADER)
    subprocess.run(["gcc", "-o", tmp_path / "show", tmp_path / "show.c"], check=True)
    shown = subprocess.run([tmp_path / "show"], check=True, capture_output=True, text=True).stdout
    header = {name: int(value) for name, value in map(str.split, shown.splitlines())}
    ours = {
        f"btrfs_ioctl_{struct}.{field}": offset(layout.format, index)
        for struct, (layout, fields) in FIELDS.items()
        for field, index in fields.items()
    } | {
        "BTRFS_IOC_SNAP_DESTROY": ioctl.SNAP_DESTROY,
        "BTRFS_IOC_SNAP_CREATE_V2": ioctl.SNAP_CREATE_V2,
        "BTRFS_IOC_SEND": ioctl.SEND,
        "BTRFS_IOC_SYNC": ioctl.SYNC,
        "BTRFS_IOC_GET_SUBVOL_INFO": ioctl.GET_SUBVOL_INFO,
        "BTRFS_IOC_GET_SUBVOL_ROOTREF": ioctl.GET_SUBVOL_ROOTREF,
        "BTRFS_IOC_INO_LOOKUP_USER": ioctl.INO_LOOKUP_USER,
        "BTRFS_SUBVOL_RDONLY": ioctl.SUBVOL_RDONLY,
        "BTRFS_ROOT_SUBVOL_RDONLY": ioctl.ROOT_SUBVOL_RDONLY,
        "BTRFS_SEND_FLAG_NO_FILE_DATA": ioctl.SEND_FLAG_NO_FILE_DATA,
        "BTRFS_IOC_TREE_SEARCH_V2": ioctl.TREE_SEARCH_V2,
        "BTRFS_INODE_ITEM_KEY": ioctl.INODE_ITEM_KEY,
        "btrfs_inode_item.transid": offset(ioctl.INODE_ITEM.format, 1),
        "btrfs_inode_item.size": offset(ioctl.INODE_ITEM.format, 2),
        "btrfs_inode_item.mode": offset(ioctl.INODE_ITEM.format, 3),
    }
    assert ours == header  # the numbers hold the sizes


def shown_by_the_command(path: Path) -> dict[str, str]:
    done = subprocess.run(
        ["btrfs", "subvolume", "show", path], check=True, capture_output=True, text=True
    )
    found = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return found


def test_a_snapshot_is_what_the_command_says_it_is(volume: Path) -> None:
    tree, place = btrfs.subvolume(volume / "tree"), volume / "snapshot"
    (tree / "file").write_text("x")
    ioctl.snapshot(os.fsencode(tree), os.fsencode(place))
    for path, read_only in ((tree, False), (place, True)):
        found, shown = ioctl.info(os.fsencode(path)), shown_by_the_command(path)
        assert str(found.number) == shown["Subvolume ID"]
        assert found.uuid == shown["UUID"].replace("-", "")
        assert found.read_only == read_only == (shown["Flags"] == "readonly")
    assert ioctl.info(os.fsencode(place)).parent_uuid == ioctl.info(os.fsencode(tree)).uuid
    assert (place / "file").read_text() == "x"
    ioctl.delete(os.fsencode(place))
    assert not place.exists()
    assert subvolume.is_subvolume(os.fsencode(tree))
    assert not subvolume.is_subvolume(os.fsencode(place))
    assert not subvolume.is_subvolume(b"/proc")


def test_subvolumes_are_listed_whatever_they_are_called(volume: Path) -> None:
    """Line breaks, bytes that are no text, more than one answer holds, others inside."""
    tree = btrfs.subvolume(volume / "tree")
    (tree / "a\nb" / "c ").mkdir(parents=True)
    names = [b"a\nb/c /path x", b"\xff\xfe", b"long" * 60, b"within", b"within/it", b"within/it/2"]
    names += [b"%d" % number for number in range(300)]
    for name in names:
        btrfs.subvolume(tree / os.fsdecode(name))
    btrfs.subvolume(volume / "beside")
    found = subvolume.below(os.fsencode(tree))
    assert sorted(found) == sorted(names)
    assert found.index(b"within") < found.index(b"within/it") < found.index(b"within/it/2")


def test_inodes_that_changed_after_a_transaction(volume: Path) -> None:
    """However many there are, and nothing that did not change beside them."""
    tree, place = btrfs.subvolume(volume / "tree"), volume / "snapshot"
    for number in range(3000):
        (tree / f"{number}").write_bytes(b"x" * number)  # some lie within the tree itself
    ioctl.snapshot(os.fsencode(tree), os.fsencode(place))
    made = ioctl.info(os.fsencode(place)).made

    def found() -> set[int]:
        os.sync()
        searches = ioctl.inodes_since(os.fsencode(tree), made)
        inodes = [inode.number for some in searches for inode in some]
        assert len(inodes) == len(set(inodes))
        return set(inodes)

    assert found() == set()
    changed = [tree / f"{number}" for number in range(0, 3000, 100)]
    for path in changed:
        path.write_bytes(b"changed")
    assert found() == {path.stat().st_ino for path in changed}
    for number in range(3000):
        (tree / f"{number}").chmod(0o600)
    assert found() == {(tree / f"{number}").stat().st_ino for number in range(3000)}
    assert tree.stat().st_ino not in found()
    os.listdir(tree)  # which moves a time of the directory, and a sync looks at that too
    assert tree.stat().st_ino in found()


def test_what_a_snapshot_waits_for_begins_before(volume: Path) -> None:
    """What was written is written out while the repository is opened, and nobody waits for it."""
    tree = btrfs.subvolume(volume / "tree")
    top = os.fsencode(tree)
    (tree / "file").write_bytes(b"x" * 100_000)
    os.sync()
    before = ioctl.info(top).changed

    def is_written_out() -> bool:
        return any(ioctl.inodes_since(top, before))

    (tree / "file").write_bytes(b"y" * 100_000)
    hasten("scan", [top])
    time.sleep(0.2)
    assert not is_written_out()
    hasten("auto", [b"/proc", os.fsencode(volume / "none"), top])
    ends = time.monotonic() + 10
    while not is_written_out() and time.monotonic() < ends:
        time.sleep(0.01)
    assert is_written_out()


def test_what_changed_is_counted_with_the_sizes_of_what_was_there_before(volume: Path) -> None:
    tree, place = btrfs.subvolume(volume / "tree"), volume / "snapshot"
    for number in range(3):
        (tree / f"{number}").write_bytes(b"x" * 100_000)
    ioctl.snapshot(os.fsencode(tree), os.fsencode(place))
    made = ioctl.info(os.fsencode(place)).made
    (tree / "0").chmod(0o600)
    with (tree / "1").open("r+b") as file:
        file.write(b"changed")
    (tree / "new").write_bytes(b"x" * 50_000)
    os.sync()
    top = os.fsencode(tree)
    assert subvolume.count_changed(top, made) == (4, 200_000)  # the directory is one
    assert subvolume.count_changed(top, made, apart=[tree.stat().st_ino]) == (3, 200_000)
