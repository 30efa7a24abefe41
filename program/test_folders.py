"""Where a run lies: whose its folder is, what moves with it, and what is never written where it does not belong."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import transgan
from program import checkpoints, main, options
from program.support import TRAIN, fails, fork, objects, on_posix, read_log, run_main, step_of
from store.support import encoded, files_of_at_most, leftovers, slope

SMALL = ("--size", "tiny", *TRAIN, "--diff-aug", "none")


@pytest.fixture
def begin(small, tmp_path, monkeypatch):
    """A function that begins a run on a folder of pictures, which it makes if need be: its exit code."""
    monkeypatch.chdir(tmp_path)

    def call(folder, *more):
        if not Path(folder).exists():
            Path(folder).mkdir(parents=True)
            for i in range(6):
                (Path(folder) / f"{i}.png").write_bytes(encoded(slope(9, 9, i)))
        return run_main("--dataset", folder, *SMALL, *more)

    return call


def test_runs_on_folders_of_one_name_have_folders_of_their_own(begin, capsys):
    for folder, place in (("cats/train", "train-tiny"), ("dogs/train", "train-tiny-2"),
                          ("my/dogs/train", "train-tiny-3"), ("x/shapes", "shapes-tiny")):  # fmt: skip
        assert begin(folder) == 0
        assert checkpoints.dataset_of(Path("runs", place)) == str(Path(folder).resolve())
        assert ("holds a run on" in capsys.readouterr().err) == (place not in ("train-tiny", "shapes-tiny"))
    assert "runs/train-tiny-2 holds a run already" in fails(capsys, "--dataset", "dogs/train", *SMALL)
    assert run_main(*TRAIN) == 0  # the program's own shapes, not the folder of this name
    assert checkpoints.dataset_of(Path("runs", "shapes-tiny-2")) == "shapes"


@on_posix
def test_a_runs_folder_belongs_to_one_process_and_a_killed_ones_to_the_next(small, tmp_path, capsys):
    out = tmp_path / "run"
    with checkpoints.owned(out):
        before = leftovers(out)
        assert f"another process trains in {out}" in fails(capsys, *TRAIN, "--out", out)
        assert leftovers(out) == before

    def die():
        with checkpoints.owned(out):
            os.kill(os.getpid(), signal.SIGKILL)

    assert fork(die) == -signal.SIGKILL
    assert (out / ".lock").exists()
    assert run_main(*TRAIN, "--out", out) == 0
    assert not (out / ".lock").exists()
    with checkpoints.owned(out, resume=out):
        assert "another process trains" in fails(capsys, "--resume", out, "--steps", 6)
        assert run_main("--from", out, "--sample", 2) == 0  # whoever only looks may look
        assert run_main("--resume", out, "--out", tmp_path / "branch", "--steps", 5) == 0


@pytest.mark.parametrize("size", [0, 50, 2000, 20_000, 100_000, 10**6])
def test_whatever_a_full_disk_stops_goes_on_by_the_same_command_or_the_one_it_names(size, small, tmp_path, capsys):
    """From the first file on: a checkpoint has more than 100 kB here, the log less than one."""
    out = tmp_path / "run"
    words = [*TRAIN, "--out", out]
    with files_of_at_most(size):
        code = run_main(*words)
    said = capsys.readouterr().err
    assert (code, "Traceback" in said) == (2 if size < 10**6 else 0, False)
    if code:
        named = re.search(r"with: (.*)", said)
        assert run_main(*(shlex.split(named[1])[2:] if named else words)) == 0, said
    assert [row["step"] for row in read_log(out)] == list("01234")


@pytest.mark.parametrize("elsewhere", [r"C:\Users\me\pictures", r"\\server\share\my pictures", "/home/me/pictures", "D:/p"])
def test_a_run_from_another_system_goes_on_when_told_where_its_pictures_are(elsewhere, begin, tmp_path, capsys):
    """With its folder, its pictures and its --data-dir in other places."""
    assert begin("pictures", "--out", "run", "--data-dir", "data") == 0
    moved = Path("run").rename("moved run")
    with np.load(moved / "checkpoint.npz") as saved:
        content = dict(saved)
    told = json.dumps(json.loads(str(content["options"])) | {"dataset": elsewhere})
    np.savez(moved / "checkpoint.npz", **content | {"options": np.array(told)})
    Path("pictures").rename("photos")
    shutil.rmtree("data")
    assert "there is no folder" in fails(capsys, "--resume", moved, "--steps", 5)
    assert run_main("--from", moved, "--sample", 2) == 0
    assert run_main("--resume", moved, "--dataset", "photos", "--data-dir", "other", "--steps", 5) == 0
    assert step_of(moved) == 5
    page = (moved / "report.html").read_text("utf-8")
    assert "--resume &#x27;moved run&#x27; --data-dir other" in page
    assert run_main("--resume", moved, "--data-dir", "other", "--steps", 6) == 0  # it knows where they are from then on


@pytest.mark.parametrize("change", [(), ("--accumulate", 2), ("--dataset", "photos"), ("--out", "branch")], ids=str)
def test_what_a_resume_is_given_holds_from_then_on(change, begin, monkeypatch, capsys):
    """Also if it is stopped in its first step, and goes on by the command that it prints then."""
    assert begin("pictures", "--out", "run", "--save-every", 2) == 0
    before = Path("run/checkpoint-previous.npz").read_bytes()
    if "photos" in change:
        Path("pictures").rename("photos")
    with monkeypatch.context() as patch:
        patch.setattr(transgan.Trainer, "train_step", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run_main("--resume", "run", "--steps", 6, *change) == 130
    assert Path("run/checkpoint-previous.npz").read_bytes() == before
    command = re.search("with: (.*)", capsys.readouterr().err)[1]
    assert run_main(*shlex.split(command)[2:]) == 0, command
    assert step_of(Path("branch" if "branch" in change else "run")) == 6


@pytest.mark.parametrize("value", ["../pictures", "./x/y", "C:pictures/x", "..\\x", "", "\0"])
def test_a_data_set_in_no_certain_place_is_none(value):
    assert not options.is_valid("dataset", value)


@pytest.mark.parametrize("look", [("--sample", 2), ("--export", "x.npz"), ("--nearest", 2, "--export", "x.npz")], ids=str)
def test_pictures_that_are_not_looked_at_are_not_named(look, begin, capsys):
    """An export says which its generator has learnt."""
    assert begin("pictures", "--out", "run") == begin("other", "--out", "another") == 0
    assert "leave out --dataset" in fails(capsys, "--from", "run", *look, "--dataset", "other")
    assert not Path("x.npz").exists()
    assert run_main("--from", "run", "--nearest", 2, "--dataset", "other") == 0


def test_nothing_is_written_among_the_pictures(begin, capsys):
    assert begin("pictures/sub", "--out", "other") == 0
    shutil.copy("pictures/sub/0.png", "pictures/0.png")
    before = leftovers(Path("pictures"))
    for place in ("pictures", "pictures/sub", "pictures/../pictures"):
        line = fails(capsys, "--dataset", "pictures", *SMALL, "--out", place)
        assert "is among the pictures of --dataset; choose another --out" in line
    assert begin("pictures", "--out", "run") == 0
    for words in (("--from", "run", "--sample", 2), ("--evaluate", "run", "--features", "own")):
        for place in ("pictures", "pictures/new"):
            assert "is among the pictures" in fails(capsys, *words, "--out", place)
    assert leftovers(Path("pictures")) == before
    capsys.readouterr()
    Path("pictures/runs/new/samples").mkdir(parents=True)
    for name in (".lock", "checkpoint.npz.7.part"):  # what is left of a start that was killed is in nobody's way
        Path("pictures/runs/new", name).touch()
    assert begin("pictures", "--out", "pictures/runs/new") == 0  # a folder of its own is known by its checkpoint
    assert not [*Path("pictures/runs/new").glob("*.part")]
    Path("pictures/runs/new/checkpoint.npz").unlink()  # as a kill between the two renames of saving leaves it
    assert run_main("--resume", "pictures/runs/new", "--steps", 5) == 0
    assert run_main("--from", "pictures/runs/new", "--sample", 2) == 0
    assert "not those" not in capsys.readouterr().err


# --- Beginnings and ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mistake", ["--steps -1", "--nosuch", "--size huge", "--dataset nosuch", "--out=", "--resume nosuch", "--quiet",
                "--sample 2", "--evaluate nosuch", "--image-size 30", "--threads"],
)  # fmt: skip
@pytest.mark.parametrize("json_flag", ["--json", "--js"])
def test_every_mistake_has_its_end_object(mistake, json_flag, small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_main(json_flag, *mistake.split()) == 2
    printed = capsys.readouterr()
    (end,) = objects(printed.out)
    assert (end["event"], end["exit_code"]) == ("end", 2)
    assert printed.err.splitlines()[-1] == f"transgan: {end['error']}"


@on_posix
@pytest.mark.parametrize("words", [("--dataset", "x"), TRAIN, ("--resume", "x"), ("--summary",)], ids=str)
def test_a_folder_that_is_gone_is_said_in_one_line(words, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    program = [sys.executable, transgan.__file__, *map(str, words), "--json"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=gone, preexec_fn=gone.rmdir)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the folder that this was started in" in done.stderr
    assert objects(done.stdout) == [{"event": "end", "exit_code": 2, "error": done.stderr[len("transgan: ") : -1]}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="writes to a disk that is always full")
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("words", ["--steps -1", "--nosuch", "--summary --evaluate x", "--resume x", "--summary"])
def test_a_mistake_told_to_a_full_disk_is_one_all_the_same(words, stream):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "wb") as full:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment} | {stream: full}
        done = subprocess.run([sys.executable, transgan.__file__, *words.split(), "--json"], **streams, text=True)
    assert done.returncode == (0 if (words, stream) == ("--summary", "stderr") else 2)
    assert stream == "stderr" or re.fullmatch("transgan: .*\n", done.stderr)


@on_posix
@pytest.mark.parametrize(
    "name", [".lock", "log.csv", "samples/step-000005.png", "locality.png", "checkpoint.npz.{pid}.part"]
)
@pytest.mark.parametrize("thing", ["folder", "pipe", "dead link"])
def test_what_is_no_file_of_a_run_is_said_to_be_none(name, thing, small, tmp_path, capsys):
    """It lacks no space; or it stops nothing."""
    out, path = tmp_path / "run", tmp_path / "run" / name.format(pid=os.getpid())
    assert run_main(*TRAIN, "--out", out, "--locality", "2:800") == 0
    path.unlink(missing_ok=True)
    {"folder": Path.mkdir, "pipe": os.mkfifo, "dead link": lambda path: path.symlink_to("no/where")}[thing](path)
    capsys.readouterr()
    code, said = run_main("--resume", out, "--steps", 5, "--sample-every", 1), capsys.readouterr().err
    assert (code, "free some space" in said) == (2 if said else 0, False)
    assert not said or (path.name in said and said.count("\n") == 1)


@on_posix
@pytest.mark.parametrize("module", ["fast", "numpy", "PIL", "program.run", "argparse"])
def test_ctrl_c_while_the_program_is_loaded_ends_it_without_a_word(module, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(f"""
import os, signal, sys
class Ask:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Ask())
""")
    program = [sys.executable, transgan.__file__, "--summary"]
    done = subprocess.run(program, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_once_it_is_loaded_ctrl_c_interrupts(monkeypatch):
    monkeypatch.setattr(main, "main", lambda: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with warnings.catch_warnings(), pytest.raises(KeyboardInterrupt):
            main.console()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with warnings.catch_warnings():
            main.console()
    finally:
        signal.signal(signal.SIGINT, before)
