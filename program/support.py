"""What tests of the program share: small runs, their folders, and accidents that befall them."""

import csv
import json
import math
import os
import signal
import sys

import numpy as np  # isort: skip
import pytest

import autograd as ag
import data
import fast
import transgan
from fast import augment
from program import checkpoints, main, options, run
from program.trainer import make_trainer
from store import datasets, output

for name, usual in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    number = getattr(signal, name, None)  # Windows has no SIGHUP
    if number and signal.getsignal(number) == signal.SIG_IGN:  # what a background job, or nohup, hands on to the tests
        signal.signal(number, usual)


def make_small(patch):
    """Make the size `tiny` smaller still, and `shapes` a few pictures of 8x8, so that a step takes milliseconds."""
    patch.setitem(transgan.SIZES, "tiny", transgan.Size(64, (1, 1, 1), 16, 2))
    patch.setattr(datasets, "SHAPES_COUNT", 40)
    patch.setattr(run, "JUDGED", 16)


@pytest.fixture(autouse=True)
def as_before():
    """What a run chooses, device, forms and to whom it speaks, is not left to the next test, whichever that is here."""
    device, mode, installed = ag.xp, output.mode, bool(ag.faster)  # by a fixture of the test's module
    yield
    ag.xp, output.mode = device, mode
    if not installed:
        fast.uninstall()


@pytest.fixture
def small(monkeypatch):
    """Small runs, with the fast forms in use, which are gone again afterwards."""
    make_small(monkeypatch)
    fast.install()
    augment.install()
    yield
    fast.uninstall()


def small_trainer(threads=None, dtype=np.float32, **given):
    chosen = {"dataset": "shapes", "size": "tiny", "image_size": 8, "patch_size": 2, "steps": 6, "disc_steps": 2,
              "batch_size": 6, "gen_batch_size": 5, "learning_rate": 1e-3, "sr_weight": 2.0,
              "locality": "2:800"}  # fmt: skip
    chosen = options.Options(**(chosen | given))
    return make_trainer(chosen, data.draw_shapes(40, chosen.image_size), threads, dtype)


def state_of(trainer):
    return {name: ag.to_numpy(x).copy() for name, x in trainer.state().items()}


def assert_same_state(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=tolerance, atol=tolerance, err_msg=name)


def run_main(*args):
    """The exit code of the command line."""
    try:
        return main.main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code


def fails(capsys, *args):
    """The one line on standard error with which the command line refuses, exit code 2."""
    capsys.readouterr()
    assert run_main(*args) == 2
    line = capsys.readouterr().err
    assert line.startswith("transgan: ")
    assert line.count("\n") == 1
    assert line.endswith("\n")
    return line


POLICY = "translation,cutout,color"
TRAIN = ("--image-size", 8, "--steps", 4, "--batch-size", 4, "--gen-batch-size", 4, "--device", "auto")


@pytest.fixture
def hasty(monkeypatch):
    """The classifier of FID-own is trained for a few steps only."""
    from paper import classifier

    monkeypatch.setattr(classifier.train_classifier, "__defaults__", (10,))


def read_log(out):
    with (out / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def parsed(*args):
    return options.choose_options(main.make_parser().parse_args([str(arg) for arg in args]))[0]


def objects(text):
    """The JSON objects of --json's lines."""
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def step_of(folder):
    """The step of the newest checkpoint that can be loaded, into the run's own networks."""
    path, chosen = checkpoints.newest_checkpoint(folder)
    trainer = make_trainer(chosen, data.draw_shapes(40, chosen.image_size), 1)
    checkpoints.load(trainer, path)
    return trainer.step


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def same_arrays(*paths):
    """Whether two checkpoints hold the same, to the bit."""
    with np.load(paths[0]) as a, np.load(paths[1]) as b:
        return set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a)


def fork(function):
    """Call a function in a forked process: its exit code, or minus the signal that ended it."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = function() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


on_posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="about POSIX's processes")


def at_step(step, action, monkeypatch):
    """From now on, Trainer.train_step calls action(trainer, losses) at the end of this generator step."""
    train_step = transgan.Trainer.train_step

    def acting(self):
        losses = train_step(self)
        if self.step == step:
            action(self, losses)
        return losses

    monkeypatch.setattr(transgan.Trainer, "train_step", acting)


def poison(what):
    """An action for `at_step`: a loss, or a number of the generator, becomes NaN, unless the rate was halved twice."""

    def act(trainer, losses):
        if trainer.update.rate_scale > 0.25:
            if what == "loss":
                losses["disc_loss"] = losses["disc_loss"] * math.nan
            else:
                trainer.gen_parameters["to_rgb.bias"].data[1:] = math.inf

    return act
