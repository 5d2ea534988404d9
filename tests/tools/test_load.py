"""The load generator of tools/bench, and what is made of its answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

from benching import live
from benching.measure import Failed, Results

MIB = 1 << 20


def load(name: str, top: Path, count: int = 20) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, live.LOAD, name, str(top), "--bytes", str(2 * MIB), "--count", str(count)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    answer: dict[str, float] = json.loads(done.stdout)
    assert answer["load"] == name
    assert answer["seconds"] > 0
    return answer


def test_each_load_does_what_it_says(tmp_path: Path) -> None:
    assert load("write", tmp_path)["amount"] == 2 * MIB
    assert (tmp_path / "stream").stat().st_size == 2 * MIB
    assert load("read", tmp_path)["amount"] == 2 * MIB
    assert load("random", tmp_path)["amount"] == 20
    assert (tmp_path / "random").stat().st_size == 2 * MIB
    assert any((tmp_path / "random").read_bytes())
    assert load("create", tmp_path, 1001)["amount"] == 1001
    files = [path for path in (tmp_path / "files").rglob("*") if path.is_file()]
    assert len(files) == 1001
    assert load("stat", tmp_path, 1001)["amount"] == 1001
    assert load("unlink", tmp_path, 1001)["amount"] == 1001
    assert not any(path.is_file() for path in (tmp_path / "files").rglob("*"))


def test_a_load_that_fails_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"(?s)load\.py stat: .*FileNotFoundError"):
        live._load(live.LOADS["stat"], tmp_path)


def test_the_best_rates_are_set_beside_what_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    rates = live.Rates()
    for mount, found in (
        ("bindfs", (60, 50)), ("live", (400, 420)), ("untracked", (450, 440)),
    ):  # fmt: skip
        for rate in found:
            rates.add("write", mount, rate)
    rates.add("stat", "live", 3000)
    results = Results()
    live._show(rates, results)
    results.print("live")
    printed = " ".join(capsys.readouterr().out.split())
    assert "sequential write, MB/s: live / bindfs cloudfs 7 asked ≥ 5: yes" in printed
    assert "cost of tracking, percent cloudfs 6.7 asked ≤ 15: yes" in printed
    assert "stats/s, cold: live" not in printed  # there is nothing to compare it with
