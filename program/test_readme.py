"""The README: its links, commands and programs."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import data
import transgan
from program import main
from program.support import (
    read_log,
    run_main,
)
from store import datasets
from store.support import encoded, leftovers, slope

ROOT = Path(__file__).parent.parent


README = (ROOT / "README.md").read_text(encoding="utf-8")


FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def readme_commands():
    """All commands in the README, as lists of words: in blocks, and inline, where they may go over lines."""
    lines = [line for language, block in FENCED for line in block.splitlines() if not language]
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
    lines += [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", prose)]
    commands = (part.strip() for line in lines for part in line.split("&&"))
    return [shlex.split(c) for c in commands if re.match(r"(FUZZ=\d+ |KILLS=\d+ )?(\.venv/bin/)?(python3?|pip) ", c)]


def test_the_readmes_links_lead_to_what_they_name():
    root = Path(__file__).parent.parent
    text = (root / "README.md").read_text()
    links = re.findall(r"\[`([\w.]+)`\]\(([\w./]+)#L(\d+)\)", text)
    assert len(links) >= 6
    for name, file, line in links:
        assert re.match(rf"(class|def| +def) {name.split('.')[-1]}\b",
                        (root / file).read_text().splitlines()[int(line) - 1]), (name, file, line)  # fmt: skip
    for file in re.findall(r"\]\(((?!http)[^)#]+)", text):
        assert (root / file).exists(), file


def test_the_readmes_programs_run(tmp_path):
    """One after another, as a reader would type them into one session."""
    programs = [block for language, block in FENCED if language == "python"]
    assert len(programs) >= 3
    done = subprocess.run([sys.executable, "-c", "\n".join(programs)], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert leftovers(tmp_path) == ["augmentation.png"]


def test_the_readmes_change_of_the_loss_works(tmp_path):
    source, changes = (
        (ROOT / "transgan.py").read_text(encoding="utf-8"),
        [b for language, b in FENCED if language == "diff"],
    )
    assert changes
    for change in changes:
        before, after = ("".join(line[1:] for line in change.splitlines(True) if line[0] in kept) for kept in (" -", " +"))
        assert source.count(before) == 1
        source = source.replace(before, after)
    (tmp_path / "transgan.py").write_text(source, encoding="utf-8")
    arguments = [
        "--loss",
        "least-squares",
        "--steps",
        "1",
        "--image-size",
        "8",
        "--batch-size",
        "4",
        "--gen-batch-size",
        "4",
    ]
    done = subprocess.run([sys.executable, "transgan.py", *arguments], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read_log(tmp_path / "runs" / "shapes-tiny")[1]["penalty"] == ""


def test_the_readmes_commands_run(small, tmp_path, monkeypatch, capsys):
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
    commands = [words[words.index("transgan.py") + 1 :] for words in readme_commands() if "transgan.py" in words]
    assert len(commands) >= 10
    for number, words in enumerate(sorted(commands, key=len)):  # the first, without options, makes the run to look into
        few = []
        if "--evaluate" in words:
            few = ["--num-images", 20]
        elif not {"--from", "--summary"} & set(words):
            few = ["--steps", 1, "--batch-size", 2, "--gen-batch-size", 2, *(["--out", f"runs/{number}"] if number else [])]
        assert run_main(*words, *few) == 0, (words, capsys.readouterr().err)
        capsys.readouterr()


def test_the_readmes_other_commands_are_known(tmp_path):
    """What their own tests run is looked for; of long ones it is checked that they take these options."""
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.rglob("test_*.py"))
    for words in readme_commands():
        words = [word for word in words if not re.fullmatch(r"\w+=\d+", word)]
        program, rest = words[0], words[1:]
        if "transgan.py" in words or program.endswith("pip"):
            assert not program.endswith("pip") or rest[0] == "install"
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


def test_the_readmes_options_exist():
    options = main.make_parser().format_help() + "--inception --rows --image-size --size"
    for option in set(re.findall(r"`(--[a-z][a-z-]+)", README)):
        assert option in options, option


def test_the_readmes_pictures_are_small():
    pictures = list((ROOT / "docs").iterdir())
    assert sum(path.stat().st_size for path in pictures) < 3e6
    for path in pictures:
        assert f"](docs/{path.name})" in README, path
