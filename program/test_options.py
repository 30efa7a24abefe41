"""That options are said once, and that the program decides on threads before NumPy does."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fast
import transgan
from data import UserError
from program import options, support

ROOT = Path(__file__).parent.parent


def test_the_table_names_every_option_and_no_other():
    """Nor may a field be without its place on the command line, or its default be what a checkpoint may not hold."""
    fields = {field.name for field in dataclasses.fields(options.Options)}
    assert options.OPTIONS.keys() == fields
    assert {field.name for field in dataclasses.fields(transgan.Options)} < fields
    for name in fields:
        assert options.is_valid(name, getattr(options.Options, name)), name
    for decided in (options.SHAPES, *options.LARGER.values(), *options.PEER_DEFAULTS.values(), options.TINY_DEFAULTS,
                    *options.PRESETS.values()):  # fmt: skip
        for name, value in decided.items():
            assert options.is_valid(name, value), (name, value)


@pytest.mark.parametrize("name", options.OPTIONS)
@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -1,
        10**400,
        float("nan"),
        float("inf"),
        1e308,
        "",
        "4:4:4",
        b"S",
        ["S"],
        {},
        "a\0b",
        "/a\0b",
        "\ud800",
        "/\ud800",
        5000 * "a",
        "/" + 5000 * "a",
    ],
    ids=lambda value: f"{value!r:.9}",
)
def test_what_no_option_may_be(name, value):
    assert not options.is_valid(name, value)


@pytest.mark.parametrize("missing", options.OPTIONS)
def test_no_default_stands_in_for_an_option_that_a_checkpoint_lacks(missing):
    known = dataclasses.asdict(options.Options())
    assert options.read_options(json.dumps(known), "x.npz") == options.Options()
    del known[missing]
    with pytest.raises(UserError, match="x.npz holds options of another version"):
        options.read_options(json.dumps(known), "x.npz")


@pytest.mark.parametrize("flag", ["--dataset", "--out", "--resume", "--evaluate", "--from", "--data-dir", "--inception"])
@pytest.mark.parametrize("name", [5000 * "a", "/" + 300 * "a", "/\ud800", "a\0b"], ids=lambda name: f"{name!r:.9}")
def test_names_that_no_file_could_have(flag, name, capsys):
    """Of a command line, a shell would not let the last two through."""
    message = support.fails(capsys, flag, name)
    assert ("could have" in message) or flag == "--dataset"
    assert len(message) < 300


@pytest.mark.skipif(not Path("/proc/self/task").exists() or fast.CORES < 2, reason="counts the threads of a Linux process")
@pytest.mark.parametrize("entry", ["transgan", "paper.tables", "look.architecture", "step", "speedups", "growth"])
def test_matrix_products_have_one_thread_wherever_one_begins(entry):
    """Because the program's own threads are as many as there are cores, see program/update.py."""
    code = f"""
import os, runpy, sys
sys.path[:0], sys.argv = [{str(ROOT)!r}, {str(ROOT / "benchmarks")!r}], ["{entry}", "--help"]
try:
    runpy.run_module("{entry}", run_name="__main__")
except SystemExit:
    print("numpy" in sys.modules, len(os.listdir("/proc/self/task")))
"""
    clean = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean, check=True)
    assert done.stdout.splitlines()[-1] == "True 1"
