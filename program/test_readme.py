"""The README's and docs/figures.md's promises: links, commands, programs, pictures."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import data
import transgan
from program.main import make_parser
from program.support import read_log, run_main, small  # noqa: F401 (a fixture)
from store import datasets
from store.support import encoded, leftovers, slope

ROOT = Path(__file__).parent.parent
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/figures.md")}
README = TEXTS["README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROGRAMS = [block for language, block in FENCE.findall(README) if language == "python"]


def line_of(name, file):
    """The line on which a file defines a function, a class, a method, as Class.method, or a kernel; None if it does not."""
    text = (ROOT / file).read_text(encoding="utf-8")
    if not file.endswith(".py"):
        kernel = re.search(rf"^.*__global__.*\b{name}\(", text, re.MULTILINE)
        return kernel and text.count("\n", 0, kernel.start()) + 1
    node = ast.parse(text)
    for part in name.split("."):
        node = next((inner for inner in getattr(node, "body", ()) if getattr(inner, "name", None) == part), None)
    return node and node.lineno


def commands(text):
    """All commands in a text, as lists of words: in blocks, and inline, where they may go over lines."""
    lines = [line for language, block in FENCE.findall(text) for line in block.splitlines() if not language]
    lines += [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    parts = (part.strip() for line in lines for part in line.split("&&"))
    return [shlex.split(c) for c in parts if re.match(r"(FUZZ=\d+ |KILLS=\d+ )?(\.venv/bin/)?(python3?|pip) ", c)]


def test_a_line_is_found_by_what_it_defines():
    for name, file in (("Trainer.update", "transgan.py"), ("nothing", "transgan.py"), ("soft", "fast/kernels/softmax.cu")):
        assert line_of(name, file) is None
    lines = (ROOT / "transgan.py").read_text(encoding="utf-8").splitlines()
    assert lines[line_of("Trainer.train_step", "transgan.py") - 1].startswith("    def train_step(")
    kernels = (ROOT / "fast/kernels/softmax.cu").read_text(encoding="utf-8").splitlines()
    assert " softmax_vjp(" in kernels[line_of("softmax_vjp", "fast/kernels/softmax.cu") - 1]


def test_links_lead_to_what_they_name():
    links = re.findall(r"\[`([\w.]+)`\]\(([\w./]+)#L(\d+)\)", README)
    assert len(links) >= 20
    wrong = [f"[`{name}`]({file}#L{line}) is on line {found}" for name, file, line in links
             if (found := line_of(name, file)) != int(line)]  # fmt: skip
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", TEXTS)
def test_files_and_headings_that_are_linked_exist(name):
    for file, heading in re.findall(r"\]\((?!http)([^)#]*)(?:#(?!L\d)([^)]*))?", FENCE.sub("", TEXTS[name])):
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), file
        titles = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
        titles = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]  # as GitHub addresses them
        assert not heading or heading in titles, heading


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_programs_run_by_themselves(number, tmp_path):
    done = subprocess.run([sys.executable, "-c", PROGRAMS[number]], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert leftovers(tmp_path) == (["augmentation.png"] if "augmentation.png" in PROGRAMS[number] else [])


def test_the_change_of_the_loss_works(tmp_path):
    source = (ROOT / "transgan.py").read_text(encoding="utf-8")
    changes = [block for language, block in FENCE.findall(README) if language == "diff"]
    assert changes
    for change in changes:
        before, after = ("".join(line[1:] for line in change.splitlines(True) if line[0] in kept) for kept in (" -", " +"))
        assert source.count(before) == 1
        source = source.replace(before, after)
    (tmp_path / "transgan.py").write_text(source, encoding="utf-8")
    few = ["--loss", "least-squares", "--steps", "1", "--image-size", "8", "--batch-size", "4", "--gen-batch-size", "4"]
    done = subprocess.run([sys.executable, "transgan.py", *few], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read_log(tmp_path / "runs" / "shapes-tiny")[1]["penalty"] == ""


def test_commands_run(small, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Those of this program, with networks and data made small and few steps: all options are taken as they stand."""
    classifier = importlib.import_module("paper.classifier")
    monkeypatch.setattr(classifier.train_classifier, "__defaults__", (3,))  # steps
    for size in ("S", "XL"):
        monkeypatch.setitem(transgan.SIZES, size, transgan.SIZES["tiny"])
    monkeypatch.setattr(datasets, "load_cifar10", lambda folder: data.draw_shapes(200, 32))
    monkeypatch.chdir(tmp_path)
    Path("path/to/folder").mkdir(parents=True)
    for i in range(8):
        Path(f"path/to/folder/{i}.png").write_bytes(encoded(slope(60, 60, i % 6)))
    asked = [words[words.index("transgan.py") + 1 :] for words in commands(README) if "transgan.py" in words]
    assert len(asked) >= 7
    for number, words in enumerate(sorted(asked, key=len)):  # the first, without options, makes the run to look into
        few = []
        if "--evaluate" in words:
            few = ["--num-images", 20]
        elif not {"--from", "--summary"} & set(words):
            few = ["--steps", 1, "--batch-size", 2, "--gen-batch-size", 2, *(["--out", f"runs/{number}"] if number else [])]
        assert run_main(*words, *few) == 0, (words, capsys.readouterr().err)
        if not number:  # the generator that comes with the program is of larger networks than these
            assert run_main("--from", "runs/shapes-tiny", "--export", "trained/cifar10-laptop.npz") == 0
        capsys.readouterr()


@pytest.mark.parametrize("name", TEXTS)
def test_other_commands_are_known(name, tmp_path):
    """What their own tests run is looked for; of long ones it is checked that they take these options."""
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.rglob("test_*.py"))
    for words in commands(TEXTS[name]):
        words = [word for word in words if not re.fullmatch(r"\w+=\d+", word)]
        program, rest = words[0], words[1:]
        if program.endswith("pip"):
            assert rest[0] == "install"
        elif "transgan.py" in words:
            assert name == "README.md" or make_parser().parse_args(rest[1:])  # those of the README are run, see above
        elif rest[0] == "-c":
            done = subprocess.run([sys.executable, *rest], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
            assert done.returncode == 0
        elif rest[:2] == ["-m", "pytest"]:
            assert not rest[2:] or re.search(rf"def test_\w*{rest[3]}", tests)
        elif rest[:2] == ["-m", "venv"]:
            assert rest[2] == ".venv"
        else:
            script = rest[1:] if rest[0] == "-m" else rest
            start = ["-m", script[0]] if rest[0] == "-m" else [str(ROOT / script[0])]
            done = subprocess.run([sys.executable, *start, "--help"], capture_output=True, text=True, cwd=ROOT)
            assert done.returncode == 0, done.stderr
            for word in script[1 : script.index("--") if "--" in script else None]:
                assert not word.startswith("--") or word in done.stdout, (words, word)


def test_options_exist():
    known = make_parser().format_help() + "--rows"  # of paper.tables
    for option in set(re.findall(r"`(--[a-z][a-z0-9-]+)", "".join(TEXTS.values()))):
        assert re.search(rf"{option}\b(?!-)", known), option


def test_pictures_are_small_and_shown():
    pictures = [path for path in (ROOT / "docs").iterdir() if path.suffix != ".md"]
    assert sum(path.stat().st_size for path in pictures) < 3e6
    for path in pictures:
        assert f"](docs/{path.name})" in README or f"]({path.name})" in TEXTS["docs/figures.md"], path
