"""Every command behind the figures runs, in small."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from test_transgan import on_cpu


def run(script, *arguments):
    """What a script of this folder prints, as lines."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@on_cpu
def test_the_benchmark_runs():
    pytest.importorskip("torch")
    results = json.loads(run("step.py", "--sizes", "tiny", "--batch-sizes", "2", "--rounds", "1")[-1])
    assert [(result["size"], result["batch_size"]) for result in results] == [("tiny", 2)]
    for result in results:
        for what in ("discriminator step", "generator step", "peak memory"):
            assert set(result[what]) == {"ours", "eager", "fused"}
            assert min(result[what].values()) > 0
    with pytest.raises(AssertionError, match="sides are ours"):
        run("step.py", "--sides", "theirs")


@on_cpu
def test_engines_are_compared():
    """Those that are installed; whoever answers at all has to agree, or the script fails."""
    rows = run("engines.py", "--rounds", "1")[1:]
    assert re.fullmatch(r"this project +[\d.]+ ms \(1\.00\) +[\d.]+ ms \(1\.00\)", rows[0])
    assert len(rows) == 5


@on_cpu
def test_every_speed_up_can_be_taken_away():
    lines = run("speedups.py", "--size", "tiny", "--batch-size", "2", "--rounds", "1")[2:]
    rows = [line.rsplit(maxsplit=2) for line in lines]
    assert len(rows) == 9
    assert all(float(ratio) > 0 for _, *ratios in rows for ratio in ratios)


@on_cpu
def test_the_table_of_growth_is_measured():
    rows = json.loads(run("growth.py", "--rounds", "1", "--largest", "64", "--device", "cpu")[-1])["rows"]
    assert [row["grows"] for row in rows] == ["batch"] * 3 + ["tokens", "width"]
    small, base, large, fewer, narrow = rows
    for name in ("linear", "attention", "moved MB", "peak MB"):
        assert large[name] / small[name] == pytest.approx(16, rel=0.1)
    assert base["linear"] / fewer["linear"] == pytest.approx(4)
    assert base["attention"] / fewer["attention"] == pytest.approx(16)
    assert base["linear"] / narrow["linear"] == pytest.approx(16)
