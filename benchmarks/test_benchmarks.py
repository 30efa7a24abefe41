"""Every command behind the figures runs, in small."""

import csv
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gpu, turns
from program.support import on_posix
from test_transgan import DEVICE, on_cpu


def run(script, *arguments):
    """What a script of this folder prints, as lines."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_sides_that_fail_are_left_out():
    """Whether they say why or not; the others go on."""
    sides = {"right": (list, (dict,)), "wrong": (int, "x"), "gone": (os._exit, 3)}
    measured, failed = turns.take_turns(sides, tasks=1, rounds=2)
    assert failed.pop("wrong") == "invalid literal for int() with base 10: 'x'"
    assert list(failed) == ["gone"]
    assert "terminated abruptly" in failed["gone"]
    ((seconds, result),) = measured.pop("right")
    assert (seconds > 0, result, measured) == (True, {}, {})


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


MISTAKES = [
    *(("step.py", "--batch-sizes", wrong) for wrong in ("x", "", "0", "2,-1")),
    *((script, "--rounds", wrong) for script in ("step.py", "speedups.py", "engines.py", "growth.py", "inception.py")
      for wrong in ("0", "-1", "x")),
    *((script, "--device", "tpu") for script in ("step.py", "growth.py")),
    *((script, "--device", "gpu") for script in ("step.py", "growth.py") if DEVICE == "cpu"),
    ("speedups.py", "--batch-size", "0"), ("inception.py", "--pictures", "0"), ("growth.py", "--largest", "0"),
    ("training.py", "--dataset", "shapes", "--image-size", "9"), ("kernels.py", "--rounds", "0"),
    *([("kernels.py",)] if DEVICE == "cpu" else []),
]  # fmt: skip


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_what_a_person_gets_wrong_is_said_at_once_in_one_line(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    monkeypatch.setattr(sys, "argv", list(words))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(Path(__file__).with_name(words[0])), run_name="__main__")
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out, "Traceback" in printed.err) == (2, "", False)
    assert re.search("(error|transgan): .*\n$", printed.err)


@on_posix
def test_a_stage_for_the_gpu_is_ended_as_by_kill(tmp_path):
    """What saves, and says 143, has passed; what does not, or ends by an error before, has failed. Also in the background,
    where Ctrl-C's signal is ignored."""
    waits = "import signal, sys, time; signal.signal(signal.SIGTERM, {}); print(1, flush=True); time.sleep(60)"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for handler, passed in (("lambda *_: sys.exit(143)", True), ("lambda *_: sys.exit(3)", False)):
            code, _ = gpu.run(["-c", waits.format(handler)], tmp_path / "log", 2)
            assert ((tmp_path / "log").read_text(), code == 0) == ("1\n", passed)
    finally:
        signal.signal(signal.SIGINT, before)
    assert gpu.run(["-c", "raise SystemExit(4)"], tmp_path / "log", None)[0] == 4


def test_a_runs_pace_is_that_of_its_log_without_the_first_steps(tmp_path):
    log = tmp_path / "log.csv"
    assert gpu.pace(log) == ""
    log.write_text("step,seconds\n1,9\n20,50\n21,50.5\n")
    assert gpu.pace(log) == ""
    log.write_text("step,seconds\n1,9\n20,50\n21,50.5\n22,50.75\n25,51.5\n")
    assert gpu.pace(log).split() == ["250.0", "ms", "a", "step"]


def test_a_trace_is_summed_up_by_kernel(monkeypatch):
    """All of cuBLAS's are one, and what is no work of the device is left out."""
    events = [("kernel", "gelu", 1e6), ("kernel", "sm90_xmma_gemm_f32", 2e6), ("kernel", "nvjet_tss_64x8", 3e6),
              ("gpu_memset", "Memset", 5e5), ("cuda_runtime", "cudaGraphLaunch", 9e6), ("kernel", "gelu", 1e6)]  # fmt: skip
    trace = {"traceEvents": [{"cat": cat, "name": name, "dur": dur} for cat, name, dur in events] + [{"name": "process"}]}
    monkeypatch.syspath_prepend(Path(__file__).parent)
    by_kernel = runpy.run_path(str(Path(__file__).with_name("kernels.py")))["by_kernel"]
    assert by_kernel(trace) == ({"matrix products": 5.0, "gelu": 2.0, "Memset": 0.5},
                                {"matrix products": 2, "gelu": 2, "Memset": 1})  # fmt: skip


def test_what_failed_on_a_gpu_is_in_the_table(tmp_path, monkeypatch, capsys):
    """Where a run left nothing to compare, too; the training, which goes on beside, is told of last."""

    def run(command, log, seconds):
        log.write_text(f"{seconds}\n")
        return int("--steps" in command), 1.0

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), "--stages", "twice,train", "--minutes", "2"])
    assert gpu.main() == 1
    rows = [line.split()[:2] for line in capsys.readouterr().out.rpartition("\n\n")[2].splitlines()]
    assert rows == [["first", "FAILED"], ["second", "FAILED"], ["train", "passed"], ["the", "same"]]
    assert (tmp_path / "train.log").read_text() == "120.0\n"


def test_two_checkpoints_are_compared_to_the_bit(tmp_path):
    x = np.arange(3.0)
    for name, arrays in {"a": {"x": x, "y": x}, "b": {"x": x, "y": x + 1e-15}, "c": {"x": x}}.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    one, other, less = (tmp_path / f"{name}.npz" for name in "abc")
    assert gpu.differing(one, one) == []
    assert gpu.differing(one, other) == gpu.differing(one, less) == gpu.differing(less, one) == ["y.npy"]


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


@on_cpu
@pytest.mark.parametrize(("precision", "tolerance"), [((), 1e-3), (("--float64",), 1e-9)])
def test_a_training_is_compared_with_pytorchs(precision, tolerance, tmp_path):
    """Both sides' distances change, and to the same; so do ours after a nudge, which is one."""
    pytest.importorskip("torch")
    small = ("--dataset", "shapes", "--image-size", "8", "--batch-size", "4", "--gen-batch-size", "4", "--ema-decay", "0.1")
    lengths = ("--seeds", "1,0", "--short", "1", "--steps", "2", "--every", "1")
    run("training.py", *small, *lengths, *precision, "--nudge", "1", "--out", str(tmp_path))
    with (tmp_path / "distances.csv").open(newline="") as file:
        rows = [(row["seed"], row["step"], row["side"], float(row["distance"])) for row in csv.DictReader(file)]
    assert [row[:2] for row in rows[::3]] == [("1", "0"), ("1", "1"), ("0", "0"), ("0", "1"), ("0", "2")]
    sides = "ours", "PyTorch", "nudged 1"
    ours, theirs, nudged = ([distance for _, _, side, distance in rows if side == name] for name in sides)
    assert abs(ours[4] / ours[2] - 1) > 0.01
    assert theirs == pytest.approx(ours, rel=tolerance)
    assert nudged == pytest.approx(ours, rel=1e-3)
    assert nudged != ours
    assert (tmp_path / "training.png").stat().st_size > 10_000
    with pytest.raises(AssertionError, match="--seeds"):
        run("training.py", "--seeds", "0,x", "--out", str(tmp_path))
