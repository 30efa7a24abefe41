"""Losing nothing: kills, signals, full disks, damaged checkpoints, numbers that are not finite."""

import contextlib
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np  # isort: skip
import pytest

import data
import transgan
from data import UserError
from program import checkpoints, options, run, signals
from program.log import Log
from program.support import (
    TRAIN,
    assert_same_state,
    at_step,
    fails,
    flip_a_bit,
    fork,
    on_posix,
    poison,
    read_log,
    run_main,
    same_arrays,
    small_trainer,
    state_of,
    step_of,
)
from program.trainer import make_trainer
from store import datasets, files
from store.files import CHECKPOINTS
from store.support import encoded, files_of_at_most, holds, leftovers, slope
from test_transgan import on_cpu


def test_a_checkpoint_that_is_missing_or_damaged_gives_way_to_the_one_before(small, tmp_path, capsys):
    assert run_main(*TRAIN, "--out", tmp_path / "unbroken") == 0
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-9]), flip_a_bit):
        out = tmp_path / "run"
        assert run_main(*TRAIN, "--out", out, "--save-every", 1) == 0
        damage(out / "checkpoint.npz")
        damaged = leftovers(out).count("checkpoint.npz")
        capsys.readouterr()
        assert run_main("--resume", out) == 0
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert re.match(r"transgan: .*[^-]checkpoint.npz.*; going on from checkpoint-previous.npz\n", error)
        assert step_of(out) == 4
        assert same_arrays(tmp_path / "unbroken/checkpoint.npz", out / "checkpoint.npz")
        assert [row["step"] for row in read_log(out)] == list("01234")
        assert leftovers(out).count("checkpoint-damaged.npz") == damaged
        for path in out.glob("*.npz"):
            path.write_text("nothing")
        assert re.search(
            r"checkpoint.npz: .*, and .*checkpoint-previous.npz: .*; start a new", fails(capsys, "--resume", out)
        )
        shutil.rmtree(out)


def test_a_checkpoint_of_other_networks_is_refused_by_what_differs(small, tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    checkpoints.save(small_trainer(), path)
    for size, message in (
        (
            transgan.Size(64, (1, 1, 1), 32, 2),
            "discriminator/embed.weight is float32 of shape (12, 16), not float32 of shape",
        ),
        (transgan.Size(64, (1, 2, 1), 16, 2), "it has no generator/stages.1.blocks.1"),
        (transgan.Size(64, (1, 1, 1), 16, 1), "these networks have no 'discriminator/adam.v/blocks.1"),
    ):
        monkeypatch.setitem(transgan.SIZES, "tiny", size)
        trainer = small_trainer()
        before = state_of(trainer)
        with pytest.raises(UserError, match="cannot read .*" + re.escape(message)):
            checkpoints.load(trainer, path)
        assert_same_state(state_of(trainer), before)


@on_cpu
@on_posix
def test_a_kill_at_any_moment_of_saving_leaves_a_whole_checkpoint(small, tmp_path, capsys):
    """The process is killed before the first file that it opens, renames or removes, then before the second, and so on."""
    trainer, found = small_trainer(1), []
    for moment in range(99):
        folder = tmp_path / str(moment)
        folder.mkdir()
        for trainer.step in range(2):
            checkpoints.save(trainer, folder / "checkpoint.npz")
        left = iter(range(moment))

        def kill(event, args, folder=str(folder), left=left):
            if event in ("open", "os.rename", "os.remove") and str(args[0]).startswith(folder) and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        def save(folder=folder, kill=kill):
            trainer.step = 2
            sys.addaudithook(kill)
            checkpoints.save(trainer, folder / "checkpoint.npz")

        code = fork(save)
        found.append((step_of(folder), "going on from" in capsys.readouterr().err))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert found[0] == (1, False)
    assert found[-1] == (2, False)
    assert (1, True) in found  # between the two renames
    assert sorted(found, key=lambda step: step[0]) == found


@on_cpu
@on_posix
def test_a_training_that_is_killed_again_and_again_loses_nothing(small, tmp_path, capsys):
    """At random moments, KILLS times; it comes to where it would have been, to the bit.

    One in three is killed while it starts, the others after they wrote a checkpoint.
    """
    out, rng, steps = tmp_path / "run", random.Random(0), [-1]

    def last_written():
        with contextlib.suppress(FileNotFoundError):  # which it may be for a moment
            return (out / CHECKPOINTS[0]).stat().st_mtime_ns

    always = ("--device", "cpu", "--threads", 1, "--save-every", 1, "--sample-every", 100_000)
    first = ("--image-size", 8, "--steps", 100_000, "--batch-size", 2, "--gen-batch-size", 2, "--disc-steps", 1)
    for kill in range(int(os.environ.get("KILLS", 6))):
        begun = any((out / name).exists() for name in CHECKPOINTS)
        written = last_written()
        pid = os.fork()
        if not pid:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os._exit(run_main(*always, *(("--resume", out) if begun else (*first, "--out", out))))
        patience = time.monotonic() + 60 * (kill % 3 > 0)
        while last_written() == written and time.monotonic() < patience:
            time.sleep(0.005)
        time.sleep(rng.uniform(0.01, 0.3))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        if any((out / name).exists() for name in CHECKPOINTS):
            steps.append(step_of(out))
    assert sorted(steps) == steps
    before = steps[-1]
    assert before > 0
    path, options = checkpoints.newest_checkpoint(out)
    unbroken = make_trainer(options, data.draw_shapes(40, 8), 1)
    losses = [unbroken.train_step() for _ in range(before)]
    resumed = make_trainer(options, data.draw_shapes(40, 8), 1)
    checkpoints.load(resumed, path)
    assert_same_state(state_of(resumed), state_of(unbroken))
    Log(out / "log.csv", before, options.steps).close()
    rows = read_log(out)
    assert [int(row["step"]) for row in rows] == list(range(before + 1))
    assert [row["gen_loss"] for row in rows[1:]] == [f"{float(step['gen_loss']):.6g}" for step in losses]


def test_what_stands_in_the_way_is_said_before_pictures_are_read(small, tmp_path, monkeypatch, capsys):
    """Which may be downloaded first, or decoded for an hour."""
    out = tmp_path / "run"
    assert run_main(*TRAIN, "--out", out) == 0
    monkeypatch.setattr(datasets, "load_pictures", lambda *_: pytest.fail("it reads the pictures first"))
    assert "is finished; ask for more with --steps above 4" in fails(capsys, "--resume", out)
    for words in ([*TRAIN, "--out", tmp_path / "new"], ["--resume", out, "--steps", 9]):
        assert "asks for more GPUs than the" in fails(capsys, *words, "--gpus", 64)


def test_a_run_with_fewer_pictures_than_a_batch_is_told_what_it_can_do(small, tmp_path, capsys):
    """Its batches stay as they are: to lower them is no advice."""
    folder, where = tmp_path / "few", ("--data-dir", tmp_path / "data")
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.png").write_bytes(encoded(slope(9, 9, i)))
    begun = [*TRAIN, "--dataset", folder, "--size", "tiny", "--out", tmp_path / "run", *where]
    assert run_main(*begun) == 0
    (folder / "0.png").rename(tmp_path / "0.png")
    more = ("--resume", tmp_path / "run", *where, "--steps")
    assert run_main(*more, 5) == 0
    for i in range(1, 3):
        (folder / f"{i}.png").rename(tmp_path / f"{i}.png")
    message = fails(capsys, *more, 6)
    assert "holds 3 pictures, and the run's batches are of 4; add some" in message
    (folder / "0.png").write_bytes(encoded(slope(9, 9)))
    assert run_main(*more, 6) == 0


def test_what_a_killed_run_was_writing_is_removed(small, tmp_path):
    out = tmp_path / "run"
    assert run_main(*TRAIN, "--out", out) == 0
    for name in ("checkpoint.npz.1.part", "samples/step-000000.png.1.part", "mine.part", "mine.mp4.1.part"):
        (out / name).write_text("half")
    assert run_main("--resume", out, "--steps", 5) == 0
    assert [name for name in leftovers(out) if "part" in name] == ["mine.mp4.1.part", "mine.part"]


@pytest.mark.parametrize("call", range(3))
def test_whatever_fails_while_saving_the_last_checkpoint_stays(call, small, tmp_path, monkeypatch, capsys):
    out, calls = tmp_path / "run", []
    assert run_main(*TRAIN, "--out", out, "--save-every", 2) == 0

    def failing(function):
        def call_or_fail(path, *args):
            if path.name.startswith("checkpoint"):
                calls.append(path)
                if len(calls) > call:
                    raise PermissionError(13, "Permission denied", str(path))
            return function(path, *args)

        return call_or_fail

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", failing(files.sync))
        patch.setattr(Path, "replace", failing(Path.replace))
        assert "checkpoint.npz" in fails(capsys, "--resume", out, "--steps", 6)
    assert len(calls) == call + 1
    assert step_of(out) == 4
    assert not list(out.glob("*.part"))
    assert run_main("--resume", out, "--steps", 6) == 0


@on_cpu
@on_posix
def test_a_folder_that_may_not_be_written_to_keeps_its_run(small, capfd):
    with tempfile.TemporaryDirectory() as top:
        out = Path(top) / "run"
        assert run_main(*TRAIN, "--out", out) == 0
        before = {path: path.read_bytes() for path in out.glob("*.*")}
        for path in (Path(top), out, out / "samples"):
            path.chmod(0o555)

        def resume():
            if os.getuid() == 0:  # whom no folder refuses
                os.setuid(65534)
            return run_main("--resume", out, "--steps", 6)

        try:
            assert fork(resume) == 2
        finally:
            for path in (Path(top), out, out / "samples"):
                path.chmod(0o755)
        assert "cannot write in" in capfd.readouterr().err
        assert {path: path.read_bytes() for path in out.glob("*.*")} == before
        assert step_of(out) == 4


def test_a_disk_that_is_full_keeps_the_last_checkpoint(small, tmp_path, capsys):
    out = tmp_path / "run"
    assert run_main(*TRAIN, "--out", out, "--save-every", 2) == 0
    before = (out / "checkpoint.npz").read_bytes()
    for size in (0, 100, 10_000, len(before) - 1):
        with files_of_at_most(size):
            assert "free some space" in fails(capsys, "--resume", out, "--steps", 6)
        assert holds(out / "checkpoint.npz", before)
        assert not list(out.glob("checkpoint*.part"))
        assert step_of(out) == 4
    assert run_main("--resume", out, "--steps", 6) == 0
    assert [row["step"] for row in read_log(out)] == list("0123456")


@on_posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(number, code, small, tmp_path, capsys, monkeypatch):
    before = signal.getsignal(number)
    assert run_main(*TRAIN, "--out", tmp_path / "unbroken", "--threads", 2) == 0
    out, more = tmp_path / "a run", ("--data-dir", tmp_path / "my data", "--threads", 2, "--on-nan", "rewind")
    with monkeypatch.context() as patch:
        at_step(2, lambda *_: os.kill(os.getpid(), number), patch)
        assert run_main(*TRAIN, "--out", out, *more) == code
    assert signal.getsignal(number) == before
    assert step_of(out) == 2
    assert [row["step"] for row in read_log(out)] == list("012")
    command = capsys.readouterr().err.strip().partition("go on with: ")[2]
    assert shlex.split(command)[2:] == ["--resume", *map(str, (out, *more))]
    assert run_main(*shlex.split(command)[2:]) == 0
    assert same_arrays(tmp_path / "unbroken/checkpoint.npz", out / "checkpoint.npz")


@on_posix
def test_a_second_ctrl_c_stops_at_once_and_one_at_the_end_does_nothing(small, tmp_path, monkeypatch):
    def twice(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        at_step(3, twice, patch)
        assert run_main(*TRAIN, "--out", tmp_path / "run", "--save-every", 2) == 130
    assert step_of(tmp_path / "run") == 2
    with monkeypatch.context() as patch:
        at_step(4, lambda *_: os.kill(os.getpid(), signal.SIGINT), patch)
        assert run_main("--resume", tmp_path / "run") == 0


@on_posix
def test_signals_that_are_ignored_and_other_threads_are_left_alone(small, tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert stop.asked is None
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run_main(*TRAIN, "--out", tmp_path / "run")))
    thread.start()
    thread.join()
    assert codes == [0]


@on_posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_as_a_program_it_ends_with_the_signals_exit_code(number, code, tmp_path):
    program = [sys.executable, str(Path(transgan.__file__)), "--image-size", "8", "--batch-size", "2",
               "--gen-batch-size", "2", "--device", "cpu", "--out", str(tmp_path / "run")]  # fmt: skip
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert any("step 1/" in line for line in process.stdout)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"go on with: {options.program()} --resume {tmp_path / 'run'} --device cpu\n" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("what", "message"),
    [("loss", "disc_loss is nan at step 3"), ("weight", "generator/to_rgb.bias is not finite after step 3")],
)
def test_what_is_not_finite_stops_the_run_and_reaches_no_checkpoint(what, message, small, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    at_step(3, poison(what), monkeypatch)
    line = fails(capsys, *TRAIN, "--out", out, "--save-every", 1, *(("--sample-every", 1) if what == "loss" else ()))
    assert message in line
    assert not (out / "samples/step-000003.png").exists()
    assert re.search(rf"--resume {out} .*--on-nan rewind\n", line)
    assert "--learning-rate 0.0005" in line
    assert step_of(out) == 2
    with np.load(out / "checkpoint.npz") as saved:
        assert all(np.isfinite(saved[name]).all() for name in saved if name != "options")


@pytest.mark.parametrize("what", ["loss", "weight"])
def test_rewinding_halves_the_rate_and_goes_on_exactly(what, small, tmp_path, capsys, monkeypatch):
    out, by_hand = tmp_path / "run", small_trainer(1)
    with monkeypatch.context() as patch:
        at_step(3, poison(what), patch)
        assert run_main(*TRAIN, "--out", out, "--save-every", 2, "--on-nan", "rewind", "--threads", 1) == 0
    error = capsys.readouterr().err
    assert "back to step 2, at 0.5 of the learning rate\n" in error
    assert "back to step 2, at 0.25 of the learning rate\n" in error
    assert error.count("\n") == 2
    assert [row["step"] for row in read_log(out)] == list("01234")
    by_hand = make_trainer(checkpoints.newest_checkpoint(out)[1], data.draw_shapes(40, 8), 1)
    for by_hand.update.rate_scale in (1.0, 1.0, 0.25, 0.25):
        by_hand.train_step()
    checkpoints.save(by_hand, tmp_path / "by-hand.npz")
    assert same_arrays(tmp_path / "by-hand.npz", out / "checkpoint.npz")
    assert run_main("--resume", out, "--steps", 5) == 0
    assert np.load(out / "checkpoint.npz")["rate_scale"] == 0.25


def test_rewinding_gives_up_when_it_does_not_help(small, tmp_path, capsys, monkeypatch):
    def break_it(trainer, losses):
        losses["gen_loss"] = losses["gen_loss"] * math.nan

    at_step(1, break_it, monkeypatch)
    assert run_main(*TRAIN, "--out", tmp_path / "run", "--on-nan", "rewind") == 2
    error = capsys.readouterr().err
    assert error.count("back to step 0") == options.REWINDS
    assert re.search("gen_loss is nan at step 1; .* 5 times half the learning rate did not help", error.splitlines()[-1])
    assert step_of(tmp_path / "run") == 0


def test_a_branch_rewinds_to_where_it_began(small, tmp_path, capsys, monkeypatch):
    run, branch = tmp_path / "run", tmp_path / "branch"
    assert run_main(*TRAIN, "--out", run) == 0
    shutil.copy(run / "checkpoint.npz", run / "checkpoint-previous.npz")
    flip_a_bit(run / "checkpoint.npz")
    before = (run / "checkpoint.npz").read_bytes()
    at_step(5, poison("weight"), monkeypatch)
    assert run_main("--resume", run, "--out", branch, "--steps", 6, "--on-nan", "rewind") == 0
    assert capsys.readouterr().err.count("back to step 4") == 2
    assert [row["step"] for row in read_log(branch)] == list("56")
    assert holds(run / "checkpoint.npz", before)  # a branch changes nothing where it comes from


def test_a_score_that_is_not_finite_stops_the_run_and_what_is_not_finite_gets_none(small, tmp_path, monkeypatch):
    trainer, scores = small_trainer(1), iter(({"fid_own": 1.0}, {"fid_own": math.nan}))
    (tmp_path / "samples").mkdir()
    with pytest.raises(checkpoints.NotFinite, match="fid_own is nan at step 2"):
        run.train(trainer, tmp_path, 9, 1, evaluate_every=2, measure=lambda: next(scores))
    assert step_of(tmp_path) == 1
    assert [row["step"] for row in read_log(tmp_path)] == list("012")
    checkpoints.load(trainer, tmp_path / "checkpoint.npz")
    at_step(3, poison("loss"), monkeypatch)
    with pytest.raises(checkpoints.NotFinite, match="disc_loss is nan at step 3"):
        run.train(trainer, tmp_path, 9, 9, evaluate_every=3, measure=lambda: next(scores))
