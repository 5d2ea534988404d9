"""How tools/bench finds programs and what they cost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

from benching import programs
from benching.measure import Cost, Failed, Results, memory_mb, run
from benching.programs import MARK, Cloudfs, Restic, find_programs
from benching.steps import check_room

HOLD_30_MB = "import sys; held = b'x' * 30_000_000; print('.', flush=True); sys.stdin.read()"


def test_a_peer_may_be_named_with_a_label_and_a_path(tmp_path: Path) -> None:
    peers = ["restic=/bin/true", "restic-0.14=/bin/false", "no-such-program"]
    programs = find_programs(tmp_path, peers)
    assert [type(program) for program in programs] == [Cloudfs, Restic, Restic]
    assert [program.name for program in programs] == ["cloudfs", "restic", "restic-0.14"]
    assert programs[2].path == "/bin/false"
    assert programs[2].base == tmp_path / "restic-0.14"


@pytest.mark.parametrize("peer", ["restic=/no/such/file", "tar=/bin/tar"])
def test_a_peer_that_cannot_be_run_is_an_error(tmp_path: Path, peer: str) -> None:
    with pytest.raises(SystemExit, match=peer):
        find_programs(tmp_path, [peer])


def test_a_detached_process_is_found_and_its_memory_counted(tmp_path: Path) -> None:
    program = Cloudfs(tmp_path)
    assert program.processes() == []
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_30_MB],
        env={**os.environ, MARK: str(program.base)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert program.processes() == [process.pid]
        assert memory_mb([process.pid]) >= 30
        cost = run(["sleep", "0.2"], dict(os.environ), watch=program.processes())
        assert cost.peak_mb >= 30
        assert cost.cpu_s < 0.1  # what it took before is not counted
        process.communicate()


def test_what_fails_or_takes_too_long_is_no_result() -> None:
    with pytest.raises(Failed, match=r"ended with 3: why"):
        run(["sh", "-c", "echo why; exit 3"], dict(os.environ))
    with pytest.raises(Failed, match=r"more than 0\.1 s"):
        run(["sleep", "5"], dict(os.environ), timeout_s=0.1)


def test_figures_stand_beside_what_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    results = Results()
    results.add("s", "time", "cloudfs", Cost(1.5, 10, 2.0), asked=2)
    results.number("s", "requests", "cloudfs", 9, asked=8)
    results.number("s", "requests", "restic", 18)
    results.print("s")
    printed = capsys.readouterr().out
    assert "asked ≤ 2: yes" in printed
    assert "cloudfs 9  restic 18  best peer / cloudfs 2.00  asked ≤ 8: NO" in printed


def test_a_restore_that_would_fill_the_file_system_is_not_begun(tmp_path: Path) -> None:
    program = Cloudfs(tmp_path)
    check_room(program, tmp_path, 1000)
    with pytest.raises(Failed, match="no room"):
        check_room(program, tmp_path, 1 << 60)


def test_a_mount_that_does_not_end_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "END_S", 0.1)
    program = Restic(tmp_path, "restic", "/bin/true")
    program._process = subprocess.Popen(["sleep", "100"])
    process = program._process
    program.unmount(tmp_path / "nothing-is-mounted-here")
    assert process.returncode == -signal.SIGKILL
