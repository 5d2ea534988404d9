"""Who may commit: stopped processes that wake up, wrong clocks, machines that take turns."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import msgspec
import pytest

from cloudfs.backup.publish import Publisher
from cloudfs.cli.errors import explain
from cloudfs.core.errors import CloudfsError, Held
from cloudfs.db.cache import boot_id
from cloudfs.format import names
from cloudfs.repo import lease as leases
from cloudfs.repo.history import KEEP_MANIFESTS, History
from cloudfs.repo.lease import STALE_S, LeaseContent, acquire
from cloudfs.repo.repository import Repository
from cloudfs.store.open import open_store
from tests.cli.conftest import Machine, machine
from tests.engine.rig import SECRET, Rig, contents_of_tree, difference
from tests.fuse.conftest import wait_until

__all__ = ["machine"]  # the fixture

DAY_S = 86_400.0


def grow(tree: Path, turn: int) -> None:
    """Make or change a few files."""
    dice = random.Random(turn)
    for number in range(5):
        (tree / f"f{dice.randrange(8)}").write_bytes(dice.randbytes(6000 + number))
    (tree / "turn").write_text(str(turn))


@contextlib.contextmanager
def later(seconds: float) -> Iterator[None]:
    """This process's clock that only goes on, put forward."""
    with pytest.MonkeyPatch.context() as patch:
        real = time.monotonic
        patch.setattr(time, "monotonic", lambda: real() + seconds)
        yield


def leases_of(rig: Rig) -> list[str]:
    """The names of leases in the store."""
    return [i.name for i in rig.store.list(names.head(rig.record.id)) if "/lease-" in i.name]


# -- a process that is really stopped -----------------------------------------------------------

WHERE = ["before the lease is checked", "after the lease was checked"]


def stopped_sync(base: Path, where: str, quick_beat: bool, answer: Event) -> None:
    """A sync in a process of its own that stops itself just before its commit; then exits with the
    code that the command line would exit with."""
    if quick_beat:
        leases.BEAT_S = 0.2
    rig = Rig(base, machine="stopped")
    original, commit = Publisher.publish, History.commit

    def stop() -> None:
        answer.set()
        os.kill(os.getpid(), signal.SIGSTOP)

    def publish(self: Publisher, *args: object) -> object:
        stop()
        return original(self, *args)  # type: ignore[arg-type]

    def stopped_commit(self: History, manifest: object) -> None:
        stop()
        commit(self, manifest)  # type: ignore[arg-type]

    if where == WHERE[0]:
        Publisher.publish = publish  # type: ignore[method-assign,assignment]
    else:
        History.commit = stopped_commit  # type: ignore[method-assign]
    try:
        rig.sync()
    except CloudfsError as error:
        explained = explain(error)
        assert explained is not None
        print(explained[0], flush=True)
        os._exit(explained[1])
    os._exit(0)


@contextlib.contextmanager
def asleep(base: Path, where: str, *, quick_beat: bool) -> Iterator[Callable[[], int]]:
    """A sync that stopped just before its commit. The value wakes it, and returns its exit code."""
    context = multiprocessing.get_context("forkserver")
    answer = context.Event()
    process = context.Process(target=stopped_sync, args=(base, where, quick_beat, answer))
    process.start()
    assert process.pid is not None
    pid = process.pid

    def wake() -> int:
        os.kill(pid, signal.SIGCONT)
        process.join(30)
        assert process.exitcode is not None, "it did not end"
        return process.exitcode

    try:
        assert answer.wait(30)
        wait_until(lambda: ") T " in Path(f"/proc/{pid}/stat").read_text())
        yield wake
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("quick_beat", [False, True])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("commits", [1, 2 * KEEP_MANIFESTS + 2])
def test_a_stopped_sync_wakes_up_after_others_took_over(
    tmp_path: Path, where: str, quick_beat: bool, commits: int
) -> None:
    """Even when so many committed since that the number it wants to commit under is free again."""
    rig = Rig(tmp_path)
    grow(rig.tree, 0)
    rig.sync()
    models = {1: contents_of_tree(rig.tree)}
    grow(rig.tree, 1)
    with asleep(tmp_path, where, quick_beat=quick_beat) as wake:
        with pytest.raises(Held, match="is being synced by"):
            rig.sync(force=True)
        for turn in range(commits):
            grow(rig.tree, 2 + turn)
            # Only the first of them has to wait until the lease is stale.
            with later(STALE_S + 1) if not turn else contextlib.nullcontext():
                result = rig.sync(force=True)
            assert result.snapshot is not None
            if turn in (0, commits - 1):
                models[result.snapshot.number] = contents_of_tree(rig.tree)
        assert wake() == 11
    assert not leases_of(rig)
    last = 1 + commits
    check(rig, models, last)
    grow(rig.tree, 1000)
    rig.machine = "stopped"  # the machine that was asleep goes on
    rig.repository = Repository.open(rig.store, SECRET, rig.local())
    assert rig.sync().snapshot is not None
    check(rig, models | {last + 1: contents_of_tree(rig.tree)}, last + 1)


@pytest.mark.parametrize("quick_beat", [False, True])
@pytest.mark.parametrize("where", WHERE)
def test_a_stopped_sync_wakes_up_while_its_heir_is_at_work(
    tmp_path: Path, where: str, quick_beat: bool
) -> None:
    """To take over is enough: the heir need not have committed anything of its own yet."""
    rig = Rig(tmp_path)
    grow(rig.tree, 0)
    rig.sync()
    models = {1: contents_of_tree(rig.tree)}
    grow(rig.tree, 1)
    with asleep(tmp_path, where, quick_beat=quick_beat) as wake:
        heir = Rig(tmp_path, machine="heir")
        history = History(heir.repository, heir.record)
        with pytest.raises(Held):
            acquire(history)
        with later(STALE_S + 1):
            lease, took_over = acquire(history)
        assert took_over
        assert wake() == 11
        assert leases_of(rig) == [names.lease(rig.record.id, lease.epoch)]
        lease.release()
        heir.repository.local.close()
    check(rig, models, 1)
    assert rig.sync().snapshot is not None
    check(rig, models | {2: contents_of_tree(rig.tree)}, 2)


def check(rig: Rig, models: dict[int, dict[bytes, object]], last: int) -> None:
    """The snapshots are numbered without gap or double, and hold what they should."""
    history = rig.history()
    numbers = [record.number for record in history.snapshots]
    history.repository.local.close()
    assert numbers == list(range(1, last + 1))
    for number, model in models.items():
        assert not difference(rig.contents(number), model), f"snapshot {number}"


def test_a_stopped_command(machine: Machine, tmp_path: Path) -> None:
    """The program itself, stopped anywhere: nobody takes over, so it goes on as if nothing were."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(40):
        (tree / f"{number}").write_bytes(os.urandom(200_000))
    machine.run("policy", "create", "home", "--source", tree, "--repo", f"file://{tmp_path}/repo")
    with machine.start("sync", "home") as process:

        def held() -> bool:
            return any((tmp_path / "repo").glob("data/*/head/lease-*"))

        wait_until(lambda: held() or process.poll() is not None)
        process.send_signal(signal.SIGSTOP)
        other = Machine(tmp_path / "other")
        shutil.copytree(machine.home / "config", other.home / "config")
        if process.poll() is None and held():
            assert "is being synced by" in other.fails(11, "sync", "home")
        process.send_signal(signal.SIGCONT)
        process.communicate(timeout=60)
        assert process.returncode == 0
    machine.run("restore", "home", "--target", tmp_path / "out")
    assert not difference(contents_of_tree(tmp_path / "out"), contents_of_tree(tree))


# -- time ----------------------------------------------------------------------------------------


def elsewhere(rig: Rig, clock_off_s: float) -> tuple[LeaseContent, int]:
    """A lease of a process of another machine, whose clock is so far off. Its content and epoch."""
    history = rig.history()
    epoch = history.manifest.epoch + 1
    since_ns = time.time_ns() + int(clock_off_s * 1e9)
    content = LeaseContent("elsewhere", "its boot", 77, 5, since_ns, 0, "its id")
    leases._write(history, epoch, content, if_absent=True)
    history.repository.local.close()
    return content, epoch


def beat(rig: Rig, content: LeaseContent, epoch: int, beats: int) -> None:
    history = rig.history()
    changed = msgspec.structs.replace(content, beats=beats)
    leases._write(history, epoch, changed, if_absent=False)
    history.repository.local.close()


CLOCKS = [0.0, -DAY_S, DAY_S, 365 * DAY_S]


@pytest.mark.parametrize("off_s", CLOCKS)
def test_a_living_lease_is_not_stolen(tmp_path: Path, off_s: float) -> None:
    """Whatever the clocks say, and for however long it lives."""
    rig = Rig(tmp_path)
    grow(rig.tree, 0)
    content, epoch = elsewhere(rig, off_s)
    for turn in range(1, 20):
        beat(rig, content, epoch, turn)
        for moment in (0.0, STALE_S - 1):
            with later(turn * STALE_S + moment), pytest.raises(Held, match="elsewhere"):
                rig.sync()
    assert not rig.history().snapshots


@pytest.mark.parametrize("off_s", CLOCKS)
def test_a_dead_lease_is_taken_over(tmp_path: Path, off_s: float) -> None:
    """By whoever comes twice, STALE_S apart, though neither waited."""
    rig = Rig(tmp_path)
    grow(rig.tree, 0)
    elsewhere(rig, off_s)
    with pytest.raises(Held, match="elsewhere"):
        rig.sync()
    with later(STALE_S - 5), pytest.raises(Held):
        rig.sync()
    with later(STALE_S + 1):
        assert rig.sync().snapshot is not None
    check(rig, {1: contents_of_tree(rig.tree)}, 1)


def test_a_waiting_sync_takes_a_dead_lease_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "STALE_S", 1.0)
    monkeypatch.setattr(leases, "_POLL_S", 0.1)
    rig = Rig(tmp_path)
    grow(rig.tree, 0)
    elsewhere(rig, DAY_S)
    began = time.monotonic()
    assert rig.sync(wait_s=20.0).snapshot is not None
    assert 0.9 < time.monotonic() - began < 10


def test_a_boot_makes_what_was_seen_worthless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seconds that were noted were counted from another boot."""
    rig = Rig(tmp_path)
    grow(rig.tree, 0)
    elsewhere(rig, 0.0)
    with pytest.raises(Held):
        rig.sync()
    monkeypatch.setattr(leases, "boot_id", lambda: "another")
    with later(STALE_S + 1), pytest.raises(Held):
        rig.sync()


def test_what_was_seen_is_no_trap(tmp_path: Path) -> None:
    """The note may be garbage, or impossible to write."""
    rig = Rig(tmp_path)
    grow(rig.tree, 0)
    elsewhere(rig, 0.0)
    place = rig.local().state_dir / "leases"
    with pytest.raises(Held):
        rig.sync()
    (note,) = place.iterdir()
    note.write_bytes(b"garbage")
    with pytest.raises(Held):
        rig.sync()
    shutil.rmtree(place)
    place.write_text("a file")
    with pytest.raises(Held):
        rig.sync()


def test_hosts_of_the_same_name(tmp_path: Path) -> None:
    """Two machines called "localhost" are not each other: neither steals at once what lives."""
    rig = Rig(tmp_path)
    grow(rig.tree, 0)
    history = rig.history()
    for epoch, boot in ((1, "another boot"), (2, boot_id())):
        content = LeaseContent(socket.gethostname(), boot, 2**22 + 1, 1, 0, 0, "another id")
        leases._write(history, epoch, content, if_absent=True)
        with pytest.raises(Held):
            rig.sync()
    history.repository.local.close()


def test_the_same_host_after_a_boot(tmp_path: Path) -> None:
    """A lease of this machine from before it was booted is dead, and that is known at once."""
    rig = Rig(tmp_path)
    grow(rig.tree, 0)
    history = rig.history()
    own = leases._machine_id()
    content = LeaseContent(socket.gethostname(), "another boot", 1, 1, 0, 0, own)
    leases._write(history, 1, content, if_absent=True)
    history.repository.local.close()
    assert rig.sync().snapshot is not None
    assert not leases_of(rig)


def test_a_lease_that_others_took_over_is_not_renewed(tmp_path: Path) -> None:
    """The first thing that a woken holder's thread does must not be to bring it back to life."""
    rig = Rig(tmp_path)
    grow(rig.tree, 0)
    one = History(rig.repository, rig.record)
    holder, _ = acquire(one)
    with later(STALE_S / 2 + 1):  # the network was away for long, but nobody took over
        holder.renew()
        holder.check()
    heir = Rig(tmp_path, machine="two")
    with pytest.raises(Held):
        heir.sync()
    with later(2 * STALE_S + 1):
        heir.sync()
        holder.renew()
        with pytest.raises(Held):
            holder.check()
    assert not leases_of(rig)
    with pytest.raises(Held):
        holder.check()
    holder.release()


def test_a_lease_whose_write_failed_holds_nobody_up(tmp_path: Path) -> None:
    """Where the answer to its write was lost it is taken back."""
    from cloudfs.core.errors import Unavailable
    from cloudfs.store.count import CountStore
    from cloudfs.store.fault import Fault, FaultStore
    from cloudfs.store.open import OpenedStore

    rig = Rig(tmp_path)
    grow(rig.tree, 0)
    lost = Fault(Unavailable("no answer."), after=True)
    faulty = FaultStore(
        open_store(rig.url),
        lambda _, kind, name: lost if kind == "put" and "/lease-" in name else None,
    )
    with pytest.raises(Unavailable):
        rig.sync(OpenedStore(faulty, CountStore(faulty)))
    assert not leases_of(rig)
    assert rig.sync().snapshot is not None


# -- two machines --------------------------------------------------------------------------------


def alternate(base: Path, seed: int, turns: int) -> None:
    """Machines of their own, in any order, some of which lose what they kept."""
    dice = random.Random(seed)
    rigs = [Rig(base, machine=name) for name in ("one", "two", "three")]
    models: dict[int, dict[bytes, object]] = {}
    for turn in range(turns):
        grow(rigs[0].tree, seed * 1000 + turn)
        rig = dice.choice(rigs)
        if dice.random() < 0.1:
            rig.forget_local()
        result = rig.sync()
        assert result.snapshot is not None
        assert result.snapshot.number == turn + 1, f"seed {seed}, turn {turn}"
        models[turn + 1] = contents_of_tree(rig.tree)
    check(rigs[0], models, turns)


def test_machines_in_turn(tmp_path: Path) -> None:
    alternate(tmp_path, 1, 12)


@pytest.mark.long
def test_machines_in_turn_for_long(tmp_path: Path) -> None:
    for seed in range(2, 12):
        (tmp_path / str(seed)).mkdir()
        alternate(tmp_path / str(seed), seed, 60)


@pytest.mark.parametrize("turns", [3, pytest.param(30, marks=pytest.mark.long)])
def test_machines_at_once(machine: Machine, tmp_path: Path, turns: int) -> None:
    """Really at the same time: one commits, or both do one after the other; the other says 11."""
    tree = tmp_path / "tree"
    tree.mkdir()
    grow(tree, 0)
    machine.run("policy", "create", "home", "--source", tree, "--repo", f"file://{tmp_path}/repo")
    machines = [machine]
    for name in ("second", "third"):
        machines.append(Machine(tmp_path / name))
        shutil.copytree(machine.home / "config", machines[-1].home / "config")
    made: list[int] = []
    for turn in range(turns):
        grow(tree, turn + 1)
        running = [m.start("sync", "home", "--json", "--force") for m in machines]
        made += [number for process in running for number in outcome(process)]
    assert sorted(made) == list(range(1, len(made) + 1))
    listed = machine.run("snapshots", "home", "--json").objects
    assert sorted(line["number"] for line in listed) == sorted(made)
    machine.run("restore", "home", "--target", tmp_path / "out")
    assert not difference(contents_of_tree(tmp_path / "out"), contents_of_tree(tree))


def outcome(process: subprocess.Popen[str]) -> list[int]:
    """The number of the snapshot that a run made; empty if another one held it."""
    out, err = process.communicate(timeout=60)
    assert process.returncode in (0, 11), err
    assert "Traceback" not in err, err
    if process.returncode:
        return []
    return [msgspec.json.decode(out.splitlines()[-1])["snapshot"]]
