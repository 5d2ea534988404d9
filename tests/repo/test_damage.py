"""Damage as a product: every kind of object, every way to spoil it, every place in it.

Whatever was done to the store, who opens the repository, lists it and reads everything gets an
error of cloudfs or the same bytes; never other bytes, never another exception.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloudfs.core.errors import CloudfsError, Damaged, Held, NoRepository, RolledBack, WrongKey
from cloudfs.core.manifest import Manifest
from cloudfs.core.rows import Table
from cloudfs.db.local import LocalState
from cloudfs.format import names
from cloudfs.format.tables import FILE_HEADER, read_tail
from cloudfs.repo import keys
from cloudfs.repo.history import History
from cloudfs.repo.keys import Secret
from cloudfs.repo.lease import STALE_S, _is_stale, acquire
from cloudfs.repo.repository import Repository
from tests.engine.rig import contents_of_tree, contents_of_view
from tests.repo import sample
from tests.repo.conftest import Sample
from tests.repo.sample import KINDS, Machine, Objects, read_all

SEALED_KINDS = [kind for kind in KINDS if kind != "config"]


def judge(
    made: Sample, objects: Objects, local: LocalState | None = None, *, partly: bool = False
) -> type[CloudfsError] | None:
    """The error that reading everything ends with; None when all of it was true.

    ``partly``: a snapshot or policy may be missing (the store may forget what a machine that
    never saw it cannot miss), but what is shown is true.
    """
    try:
        found = read_all(objects, local or Machine())
    except CloudfsError as error:
        assert str(error).endswith((".", "?")), f"not a sentence: {error}"
        return type(error)
    assert found == made.truth or (partly and sample.part_of(found, made.truth))
    return None


def warm(made: Sample) -> Machine:
    """A machine that has read everything, and remembers what it saw."""
    local = Machine()
    assert read_all(made.objects, local) == made.truth
    return local


def aged(made: Sample) -> Machine:
    """The same machine after its cache was thrown away: only the rollback memory is left."""
    local = warm(made)
    local.fake.values.clear()
    return local


def flipped(data: bytes, place: int, mask: int) -> bytes:
    return data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]


def one_of_each(made: Sample, kind: str) -> list[str]:
    """The objects of a kind that belong to the first policy only: those of the others are alike."""
    found = made.of_kind(kind)
    if kind in ("config", "policy"):
        return found[:1]
    first = found[0].split("/")[1]
    return [name for name in found if name.split("/")[1] == first]


def places(kind: str, data: bytes, stride: int) -> Iterator[int]:
    """All places of a small object; of a pack its header, its index, and some in its frames."""
    if kind != "pack":
        yield from range(len(data))
        return
    _, index_size = read_tail(data, "pack")
    frames_end = len(data) - index_size
    yield from range(FILE_HEADER.size)
    yield from range(FILE_HEADER.size, frames_end, stride)
    yield from range(frames_end, len(data))


# -- bytes flipped ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_no_flipped_bit_is_believed(made: Sample, kind: str) -> None:
    for name in one_of_each(made, kind):
        data = made.objects[name]
        for place in places(kind, data, 61):
            damaged = made.objects | {name: flipped(data, place, 1 << (place % 8))}
            judge(made, damaged)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [0xFF, *(1 << bit for bit in range(8))])
def test_no_flipped_bit_anywhere_is_believed(made: Sample, kind: str, mask: int) -> None:
    for name in one_of_each(made, kind):
        data = made.objects[name]
        for place in places(kind, data, 1):
            judge(made, made.objects | {name: flipped(data, place, mask)})


@pytest.mark.parametrize("kind", ["manifest", "policy"])
def test_every_flipped_bit_of_what_is_read_whole_is_noticed(made: Sample, kind: str) -> None:
    name = one_of_each(made, kind)[0]  # the newest manifest
    data = made.objects[name]
    for place in range(len(data)):
        damaged = made.objects | {name: flipped(data, place, 1)}
        assert judge(made, damaged) is Damaged, f"byte {place}"


@pytest.mark.parametrize("kind", ["segment", "pack"])
def test_every_flipped_bit_of_the_sealed_parts_is_noticed(made: Sample, kind: str) -> None:
    for name in one_of_each(made, kind):
        data = made.objects[name]
        end = len(data) - (read_tail(data, name)[1] if kind == "pack" else 0)
        for place in range(FILE_HEADER.size, end, 131 if kind == "pack" else 7):
            damaged = made.objects | {name: flipped(data, place, 0x10)}
            assert judge(made, damaged) is Damaged, f"byte {place} of {name}"


def test_flips_under_a_passphrase_stay_within_the_bounds(
    made: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("MEMORY_KIB", 8192), ("PASSES", 1), ("LANES", 1)):
        monkeypatch.setattr(keys, f"ARGON2_{name}", value)
    store, secret = sample.opened({}), Secret.passphrase(b"correct horse")
    Repository.create(store, secret, Machine(), label="x")
    data = store.get(names.CONFIG)
    for place in range(len(data)):
        for mask in (1, 0x10):
            store.put(names.CONFIG, [flipped(data, place, mask)])
            with contextlib.suppress(CloudfsError):
                repository = Repository.open(store, secret, Machine())
                assert repository.keyring.repository_id.hex() == repository.id


# -- cut, emptied, doubled, deleted ----------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_no_cut_object_is_believed(made: Sample, kind: str) -> None:
    for name in one_of_each(made, kind):
        data = made.objects[name]
        lengths = {*range(0, len(data), max(1, len(data) // 150)), len(data) - 1}
        for length in sorted(lengths):
            judge(made, made.objects | {name: data[:length]})


@pytest.mark.parametrize("kind", SEALED_KINDS)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data + data,
        lambda data: data + b"\0",
        lambda data: b"\0" + data,
        lambda data: data[1:],
        lambda data: bytes(len(data)),
        lambda data: data[: len(data) // 2] + data[len(data) // 2 + 1 :],
    ],
    ids=["emptied", "doubled", "longer", "shifted", "beheaded", "zeroed", "a byte lost"],
)
def test_no_spoilt_object_is_believed(
    made: Sample, kind: str, spoil: Callable[[bytes], bytes]
) -> None:
    for name in one_of_each(made, kind):
        judge(made, made.objects | {name: spoil(made.objects[name])})


@pytest.mark.parametrize("kind", ["segment", "pack"])
def test_what_is_missing_is_named(made: Sample, kind: str) -> None:
    for name in one_of_each(made, kind):
        left = {other: data for other, data in made.objects.items() if other != name}
        with pytest.raises(Damaged, match="missing") as caught:
            read_all(left, Machine())
        assert name in str(caught.value)


def test_without_its_configuration_there_is_no_repository(made: Sample) -> None:
    left = {name: data for name, data in made.objects.items() if name != names.CONFIG}
    assert judge(made, left) is NoRepository


@pytest.mark.parametrize("kind", ["policy", "lease", "manifest"])
def test_what_was_hidden_changes_nothing_of_what_is_shown(made: Sample, kind: str) -> None:
    for name in made.of_kind(kind):
        left = {other: data for other, data in made.objects.items() if other != name}
        assert judge(made, left, partly=True) is None


# -- swapped and replayed --------------------------------------------------------------------


@pytest.mark.parametrize("kind", SEALED_KINDS)
def test_no_object_stands_for_another_of_its_kind(made: Sample, kind: str) -> None:
    found = made.of_kind(kind)
    assert len(found) > 1
    for one, other in zip(found, found[1:] + found[:1], strict=True):
        swapped = made.objects | {one: made.objects[other], other: made.objects[one]}
        error = judge(made, swapped)
        assert error is Damaged or kind == "lease"


@pytest.mark.parametrize("kind", SEALED_KINDS)
def test_no_object_stands_for_one_of_another_kind(made: Sample, kind: str) -> None:
    for other in SEALED_KINDS:
        if other != kind:
            name, donor = one_of_each(made, kind)[0], one_of_each(made, other)[0]
            error = judge(made, made.objects | {name: made.objects[donor]})
            assert error is Damaged or kind == "lease"


def test_objects_of_another_repository_are_refused(made: Sample, tmp_path: Path) -> None:
    _, other, _ = sample.make(tmp_path)
    for kind in SEALED_KINDS:
        name, donor = (
            one_of_each(made, kind)[0],
            next(n for n in other if sample.kind_of(n) == kind),
        )
        error = judge(made, made.objects | {name: other[donor]})
        assert error is Damaged or kind == "lease"
    mixed = made.objects | {names.CONFIG: other[names.CONFIG]}
    assert judge(made, mixed) is Damaged  # it opens: the secret is the same. Nothing else does


def test_an_older_manifest_under_the_newest_name_is_refused(made: Sample) -> None:
    newest, older = one_of_each(made, "manifest")
    assert judge(made, made.objects | {newest: made.objects[older]}) is Damaged


def test_a_machine_that_saw_more_refuses_a_store_that_went_back(made: Sample) -> None:
    back = made.early | {names.CONFIG: made.objects[names.CONFIG]}
    assert judge(made, back, warm(made)) is RolledBack
    assert judge(made, back, aged(made)) is RolledBack
    assert judge(made, back, partly=True) is None  # who never saw more sees the older state


def test_a_machine_refuses_a_store_that_hides_the_newest_manifest(made: Sample) -> None:
    newest = one_of_each(made, "manifest")[0]
    left = {name: data for name, data in made.objects.items() if name != newest}
    assert judge(made, left, warm(made)) is RolledBack


def test_a_machine_refuses_a_store_that_hides_every_manifest(made: Sample) -> None:
    left = {name: data for name, data in made.objects.items() if "/manifest-" not in name}
    assert judge(made, left, warm(made)) is RolledBack


def test_an_older_configuration_opens_with_its_own_keys_only(made: Sample) -> None:
    store = sample.opened(made.objects)
    repository = Repository.open(store, sample.SECRET, Machine())
    new = Secret.key_file(b"n" * 40)
    repository.change_key(sample.SECRET, new)
    changed = sample.objects_of(store)
    assert judge(made, changed) is WrongKey
    assert judge(made, changed | {names.CONFIG: made.objects[names.CONFIG]}) is None


def test_an_open_repository_refuses_the_configuration_of_another(
    made: Sample, tmp_path: Path
) -> None:
    store = sample.opened(made.objects)
    repository = Repository.open(store, sample.SECRET, Machine())
    other = sample.opened({})
    Repository.create(other, sample.SECRET, Machine(), label="other")
    store.put(names.CONFIG, [other.get(names.CONFIG)])
    with pytest.raises(Damaged, match="another repository"):
        repository.add_key(Secret.key_file(b"n" * 40), "new")
    assert store.get(names.CONFIG) == other.get(names.CONFIG)


# -- the local cache -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["segment", "pack"])
def test_what_is_in_the_cache_is_read_without_the_store(made: Sample, kind: str) -> None:
    local = warm(made)
    left = {name: data for name, data in made.objects.items() if sample.kind_of(name) != kind}
    assert read_all(left, local) == made.truth


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: flipped(data, len(data) // 2, 4),
        lambda data: bytes(len(data)),
        lambda data: data + b"more",
    ],
    ids=["emptied", "cut", "flipped", "zeroed", "longer"],
)
def test_a_damaged_cache_heals(made: Sample, spoil: Callable[[bytes], bytes]) -> None:
    local = warm(made)
    whole = dict(local.fake.values)
    local.fake.values = {key: spoil(value) for key, value in whole.items()}
    assert read_all(made.objects, local) == made.truth
    healed = local.fake.values
    # Of a chunk of a pack only the frames matter: it also holds the pack's index.
    assert not [k for k in whole if healed[k] != whole[k] and not k.startswith(b"chunk")]


def test_values_swapped_in_the_cache_heal(made: Sample) -> None:
    local = warm(made)
    keys_in_order = sorted(local.fake.values)
    moved = [local.fake.values[key] for key in keys_in_order[1:] + keys_in_order[:1]]
    local.fake.values = dict(zip(keys_in_order, moved, strict=True))
    assert read_all(made.objects, local) == made.truth


def test_whole_tables_are_read_past_a_damaged_cache(made: Sample) -> None:
    local = warm(made)
    repository = Repository.open(sample.opened(made.objects), sample.SECRET, local)
    history = History(repository, repository.policies()[0])
    whole = {table: list(history.rows(table)) for table in Table}
    local.fake.values = {k: flipped(v, len(v) // 2, 4) for k, v in local.fake.values.items()}
    again = History(repository, repository.policies()[0])
    assert {table: list(again.rows(table)) for table in Table} == whole
    local.fake.values = {k: flipped(v, len(v) // 2, 4) for k, v in local.fake.values.items()}
    again = History(repository, repository.policies()[0])
    pages = [page for run in again.manifest.runs for page in again.tables.coded_pages(run)]
    assert sum(page.rows for page in pages) == sum(len(rows) for rows in whole.values())


def test_a_cache_whose_file_is_garbage_is_thrown_away(made: Sample, tmp_path: Path) -> None:
    for _ in range(2):
        local = LocalState(tmp_path / "c", tmp_path / "s")
        assert read_all(made.objects, local) == made.truth
        local.close()
        data = next((tmp_path / "c").rglob("data.mdb"))
        data.write_bytes(b"garbage" * 4000)


# -- what a sync makes of it -----------------------------------------------------------------


SPOILS: dict[str, Callable[[bytes], bytes | None]] = {
    "flipped": lambda data: flipped(data, len(data) // 2, 1),
    "flipped at the end": lambda data: flipped(data, len(data) - 10, 1),
    "cut": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "deleted": lambda data: None,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spoil", SPOILS)
def test_a_sync_over_damage_fails_or_makes_a_true_snapshot(
    made: Sample, kind: str, spoil: str, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    for turn, name in enumerate(one_of_each(made, kind)):
        sample.grow(tree, 40 + turn)
        after = SPOILS[spoil](made.objects[name])
        damaged = {other: data for other, data in made.objects.items() if other != name}
        if after is not None:
            damaged[name] = after
        store, machine = sample.opened(damaged), tmp_path / f"m{turn}"
        local = LocalState(machine / "c", machine / "s", cache_bytes=8 << 20)
        try:
            repository = Repository.open(store, sample.SECRET, local)
            record = repository.policies()[0]
            done = sample.run_sync(repository, record, tree, tags=["after"])
            assert done.snapshot is not None
            history = History(repository, record)
            new = history.view(done.snapshot.number)
            assert contents_of_view(new) == contents_of_tree(tree)
        except CloudfsError:
            pass
        finally:
            local.close()
        after_all = sample.objects_of(store)
        judge_old(made, after_all)
        shutil.rmtree(machine, ignore_errors=True)


def judge_old(made: Sample, objects: Objects) -> None:
    """What the sample held is still true, or refused."""
    with contextlib.suppress(CloudfsError):
        repository = Repository.open(sample.opened(objects), sample.SECRET, Machine())
        for record in repository.policies():
            history = History(repository, record)
            for snapshot in history.snapshots:
                known = made.truth[record.name].get(snapshot.number)
                with contextlib.suppress(CloudfsError):
                    held = contents_of_view(history.view(snapshot.number))
                    assert known is None or snapshot.tags or held == known


def test_a_damaged_lease_is_that_of_a_stranger(
    made: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever of it is damaged: it is respected, the sentence says what to do, and it is taken
    over when it did not change for long."""
    name = one_of_each(made, "lease")[0]
    data = made.objects[name]
    now = time.monotonic()
    for place in range(len(data)):
        monkeypatch.setattr(time, "monotonic", lambda: now)
        store = sample.opened(made.objects | {name: flipped(data, place, 1)})
        machine = Machine(tmp_path / str(place))
        repository = Repository.open(store, sample.SECRET, machine)
        record = repository.policy(names.policy(name.split("/")[1]))
        with pytest.raises(Held, match=f"^{name}.* is damaged.*delete that object.*--wait"):
            acquire(History(repository, record))
        monkeypatch.setattr(time, "monotonic", lambda: now + STALE_S + 1)
        lease, took_over = acquire(History(repository, record))
        assert took_over
        lease.release()
        assert not [n for n in sample.objects_of(store) if n.startswith(name[:-4])]


def test_a_damaged_lease_that_still_changes_is_respected(
    made: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder is alive and writes it again and again, though none of that can be opened."""
    name = one_of_each(made, "lease")[0]
    store = sample.opened(made.objects)
    repository = Repository.open(store, sample.SECRET, Machine())
    history = History(repository, repository.policy(names.policy(name.split("/")[1])))
    watch: dict[int, tuple[bytes, float]] = {}
    for beat in range(5):
        monkeypatch.setattr(time, "monotonic", lambda beat=beat: beat * (STALE_S + 1))
        store.put(name, [flipped(made.objects[name], beat, 1)])
        assert not _is_stale(history, 7, watch)


def test_damage_in_one_file_leaves_the_others_readable(made: Sample) -> None:
    repository = Repository.open(sample.opened(made.objects), sample.SECRET, Machine())
    record = repository.policies()[0]
    history = History(repository, record)
    first = history.view(1)
    big, text = first.resolve(b"/big"), first.resolve(b"/below/text")
    second = history.view(2)
    pack = second.blocks(second.resolve(b"/big").lin, 0, 1)[0]
    assert pack is not None
    name = names.pack(record.id, pack.pack)
    damaged = made.objects | {name: flipped(made.objects[name], pack.frame_offset + 20, 1)}
    history = History(Repository.open(sample.opened(damaged), sample.SECRET, Machine()), record)
    view = history.view(1)
    for meta in (big, text):
        assert view.blocks_reader.read(view, meta, 0, meta.size)
    view = history.view(2)
    with pytest.raises(Damaged, match="does not verify"):
        view.blocks_reader.read(view, view.resolve(b"/big"), 0, 10)


def test_the_sample_is_what_it_should_be(made: Sample) -> None:
    assert {sample.kind_of(name) for name in made.objects} == set(KINDS)
    assert Manifest().number == 0
    for kind in SEALED_KINDS:
        assert len(made.of_kind(kind)) > 1, kind
