"""What is to be seen of a run: the line that changes, the time that is left, the page."""

import itertools
import os
import re
import sys

import numpy as np
import pytest

import autograd as ag
from look import report
from program import checkpoints, presets, run, signals
from program import log as logs
from program.log import Log
from program.support import TRAIN, at_step, on_posix, run_main, small_trainer
from store import output

NEWEST = {"disc_loss": -123.456, "gen_loss": -12.345, "penalty": 1.234, "sr_loss": 0.123}


@pytest.fixture
def clock(monkeypatch):
    """Time stands still but for what is added to this list."""
    passed = [1000.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: sum(passed))
    return passed


@pytest.fixture
def terminal(monkeypatch):
    """A call makes standard output a terminal that is so wide."""

    def make(columns):
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)

    return make


def lines(capsys):
    """The states of the live line that were shown."""
    return re.split(r"\r\x1b\[K|\n", capsys.readouterr().out)


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
@pytest.mark.parametrize("doing", [None, "discriminator 3 of 5"])
def test_the_live_line_fits_its_terminal(columns, doing, tmp_path, clock, terminal, capsys):
    """And keeps what is worth most: how far it is, what it does, how long it takes."""
    terminal(columns)
    log = Log(tmp_path / "log.csv", 0, 1_000_000, every=100)
    log.add(0, {}, 0)
    log.measure({"distance": 0.123, "fid_own": 123.456, "is_own": 12.345})
    clock.append(100.0)
    log.add(1, NEWEST, 320)
    log.tick()
    clock.append(10.0)
    if doing:
        log.busy(doing, at_once=True)
    *_, line = lines(capsys)
    assert len(line) < columns
    assert line.startswith("step 1/1000000")
    assert not doing or columns < 40 or doing in line
    assert columns < 40 or doing or "1,157.4 days left" in line
    assert columns < 80 or ("D -123.456" in line and "1,157.4 days left" in line)
    assert columns < 200 or "SR 0.123" in line
    assert log.line(doing).startswith(line)
    assert log.line(doing)[len(line) :][:2] in ("", "  ")  # no word, nor number, is cut
    log.close()


def test_a_long_step_says_what_is_being_done(small, tmp_path, clock, terminal, capsys, monkeypatch):
    """Each update of either network takes a minute here."""
    terminal(80)
    trainer = small_trainer(1, steps=2, disc_steps=2, sr_weight=0.0, locality="none")
    (tmp_path / "samples").mkdir()
    update = trainer.update.__class__.__call__

    def slow(self, *args):
        clock.append(30.0)
        made = update(self, *args)
        clock.append(30.0)
        return made

    monkeypatch.setattr(trainer.update.__class__, "__call__", slow)
    run.train(trainer, tmp_path, 100, 100)
    said = "\n".join(lines(capsys))
    for step, doing in itertools.product((0, 1), ("discriminator 1 of 2", "discriminator 2 of 2", "generator")):
        assert f"step {step}/2  {doing}" in said
    assert "drawing samples" in said


@pytest.mark.parametrize("every", [1, 10, 1000])
def test_the_time_left_is_that_of_steps_and_of_grids_when_they_come(every, tmp_path, clock, monkeypatch):
    """A grid takes 50 s, the first step 5 s more than the others, which take 1 s. On a GPU, see below."""
    monkeypatch.setattr(ag, "xp", np)
    log = Log(tmp_path / "log.csv", 0, 60, every=every)
    assert log.left() is None

    def grid():
        with log.aside("drawing"):
            clock.append(50.0)

    log.add(0, {}, 0)
    grid()
    left = {}
    for step in range(1, 61):
        clock.append(6.0 if step == 1 else 1.0)
        log.add(step, NEWEST, 1)
        if step % every == 0:
            grid()
        left[step] = log.left()
    log.close()
    for step in range(2, 40):
        real = 60 - step + 50 * sum(later % every == 0 for later in range(step + 1, 61))
        assert real / 2 - 5 <= left[step] <= 2 * real + 5, step
    assert left[60] == 0


def test_what_is_done_more_seldom_is_spread_over_more_steps(tmp_path, clock):
    """A step takes 1 s, a grid every 10 steps 2 s, a score every 2000 steps 1000 s."""
    log = Log(tmp_path / "log.csv", 0, 2000, every=10)
    for step in range(11):
        clock.append(1.0)
        log.add(step, {}, 0)
        for what, took, every in (("drawing", 2.0, None), ("scoring", 1000.0, 2000)):
            if step % (every or 10) == 0:
                with log.aside(what, every):
                    clock.append(took)
    assert log.left() == pytest.approx(1990 * (1 + 4 / 10 + 1000 / 2000))
    log.close()


def test_on_a_gpu_a_steps_losses_are_read_when_the_next_is_handed_over(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(ag, "xp", "not NumPy")
    read, log = [], Log(tmp_path / "log.csv", 0, 60)

    class Loss:
        def __init__(self, step):
            self.step = step

        def __float__(self):
            read.append(self.step)
            return 0.5

    for step in range(1, 6):
        log.add(step, {"disc_loss": Loss(step)}, 1)
        if step > 2:  # the first two are shown at once, and later steps now and then
            assert read == list(range(1, step))
        log.tick()
    log.close()
    assert read == [1, 2, 3, 4, 5]


def test_on_a_gpu_a_steps_seconds_are_counted_in_the_next(tmp_path, clock, monkeypatch):
    """The first is waited for when the second was asked for, which takes no time; from then on each takes 2 s."""
    monkeypatch.setattr(ag, "xp", "not NumPy")
    log = Log(tmp_path / "log.csv", 0, 1000)
    for step, seconds in enumerate([5.0, 0.01, 2.0, 2.0, 2.0], 1):
        clock.append(seconds)
        log.add(step, {}, 1)
        if step > 2:
            assert log.left() == pytest.approx(2 * (1000 - step))
    log.close()


def test_days_are_days():
    assert [output.clock(seconds) for seconds in (5, 86399, 86400, 20 * 86400)] == [
        "0:00:05",
        "23:59:59",
        "1.0 days",
        "20.0 days",
    ]


@pytest.mark.parametrize(("pace", "said"), [(172_800 / 5 + 9000, True), (172_800 / 5 - 9000, False)])
def test_a_run_of_more_than_two_days_says_so_once(pace, said, small, tmp_path, clock, capsys, monkeypatch):
    trainer = small_trainer(1, steps=7, sr_weight=0.0, locality="none")
    (tmp_path / "samples").mkdir()
    for step in range(1, 8):
        at_step(step, lambda *_: clock.append(pace), monkeypatch)
    run.train(trainer, tmp_path, 100, 100)
    found = re.findall("^this run will take about (.*) here; --preset ([^ ,]*)", capsys.readouterr().out, re.M)
    left = 5 - (ag.xp is not np)  # steps, when it is known what one takes
    assert found == ([(output.clock(left * pace), "cifar10-laptop")] if said else [])
    assert "cifar10-laptop" in presets.PRESETS


@on_posix
def test_a_terminal_that_goes_saves_the_run(tmp_path):
    """Its hanging up is met by a write that fails, or by the signal, whichever is first; nothing is left to say it to."""
    import pty
    import subprocess
    from pathlib import Path

    import transgan

    ours, theirs = pty.openpty()
    start = "import os, sys; os.setsid(); import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    start += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    words = [str(Path(transgan.__file__)), "--image-size", "8", "--batch-size", "2", "--gen-batch-size", "2", "--device",
             "cpu", "--steps", "100000", "--save-every", "100000", "--out", str(tmp_path / "run")]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", start, *words], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while not re.search(rb"step \d\d+/", shown):
        shown += os.read(ours, 4096)
    os.close(ours)
    assert process.wait(timeout=60) == 129
    with np.load(tmp_path / "run" / "checkpoint.npz") as saved:
        assert saved["step"] >= 10
    assert "stopped;" in (tmp_path / "run" / "report.html").read_text("utf-8")


def test_a_terminal_that_fails_is_one_that_hung_up(small, tmp_path, monkeypatch):
    """Before its signal came."""
    hung = []
    monkeypatch.setattr(signals, "hang_up", lambda: hung.append(True))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)

    def gone(self, *args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Log, "line", gone)
    assert run_main(*TRAIN, "--out", tmp_path / "run") == 0
    assert hung


# --- The page ---------------------------------------------------------------------------------------------------------


def test_the_page_says_how_its_run_is_and_reloads_while_that_goes_on(small, tmp_path, monkeypatch):
    page, states = report.page, []

    def told(*args):
        content = page(*args)
        states.append((re.search(r"Step (\d) of 4, (\w+)", content).groups(), 'http-equiv="refresh"' in content))
        return content

    monkeypatch.setattr(report, "page", told)
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(2, lambda *_: signals.signal.raise_signal(signals.signal.SIGINT), patch)
        assert run_main(*TRAIN, "--out", out) == 130
    assert states == [(("0", "training"), True), (("2", "stopped"), False)]
    states.clear()
    with monkeypatch.context() as patch:
        at_step(3, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")), patch)
        assert run_main("--resume", out) == 2
    assert states == [(("2", "training"), True), (("3", "stopped"), False)]
    states.clear()
    with monkeypatch.context() as patch:  # of its last step, before that is saved
        save = checkpoints.save

        def full(trainer, path):
            if trainer.step == 4:
                raise OSError(28, "No space left on device")
            save(trainer, path)

        patch.setattr(checkpoints, "save", full)
        assert run_main("--resume", out, "--sample-every", 1) == 2
    assert states[-1] == (("4", "stopped"), False)
    states.clear()
    assert run_main("--resume", out) == 0
    assert states == [(("2", "training"), True), (("4", "finished"), False)]
    content = (out / "report.html").read_text("utf-8")
    assert "low is good" in content
    assert "A healthy run:" in content
    assert "flex-wrap: wrap" in re.search(r"\.legend {(.*?)}", content)[1]  # so that it fits a narrow window
    assert re.search(r'class="legend">.*discriminator, now -?\d.*sliced Wasserstein, now \d', content)


def test_grids_are_in_order_of_their_steps(tmp_path):
    """By number: from a million on, there are more digits."""
    for name in ("step-1000001.png", "step-999999.png", "step-000007.png", "step-1000000.png", "step-x.png", "step-.png",
                 "restored-2000000.png"):  # fmt: skip
        (tmp_path / name).touch()
    found = [path.name for path in report.by_step(tmp_path, "step")]
    assert found == ["step-000007.png", "step-999999.png", "step-1000000.png", "step-1000001.png"]
