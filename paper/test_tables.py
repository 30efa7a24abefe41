"""The promises of paper/tables.py: every row is the run that it says it is, and is run once."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest  # isort: skip

import transgan
from data import UserError
from paper import scores, tables
from paper.inception import WEIGHTS
from paper.networks import NAMES
from program import support
from program.checkpoints import newest_checkpoint
from store import datasets
from store.files import CHECKPOINTS

PUBLISHED = transgan.Options()
QUICK = ["--dataset", "shapes", "--size", "tiny", "--steps", "1", "--seeds", "1", "--num-images", "20", "--jobs", "2",
         "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder that holds a classifier of the shapes, of one step's training, so that no run trains its own."""
    from paper import classifier

    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        train = classifier.train_classifier
        patch.setattr(classifier, "train_classifier", lambda *given: train(*given, steps=1))
        classifier.load_classifier(datasets.load_pictures("shapes", folder, 16), "shapes", folder)
    return folder


def printed_rows(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")][1:]


def test_the_table_of_tricks(tmp_path, data_dir, capsys):
    """Four rows a seed, each with one trick more; repeated, the command trains and scores nothing again."""
    command = ["3", *QUICK, "--out", str(tmp_path), "--data-dir", str(data_dir)]
    assert tables.main([*command, "--", "--batch-size", "4", "--gen-batch-size", "4"]) == 0
    printed = capsys.readouterr().out
    assert ", with --batch-size 4 --gen-batch-size 4.\n" in printed
    (folder,) = tmp_path.iterdir()
    runs = {path.name: newest_checkpoint(path)[1] for path in folder.iterdir()}
    assert {name: (run.diff_aug, run.sr_weight, run.locality) for name, run in runs.items()} == {
        "baseline-0": ("none", 0, "none"),
        "augmentation-0": (PUBLISHED.diff_aug, 0, "none"),
        "co-training-0": (PUBLISHED.diff_aug, PUBLISHED.sr_weight, "none"),
        "locality-0": (PUBLISHED.diff_aug, PUBLISHED.sr_weight, PUBLISHED.locality),
    }
    assert {run.batch_size for run in runs.values()} == {4}
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert tables.main([*command, "--", "--batch-size", "4", "--gen-batch-size", "4"]) == 0
    assert capsys.readouterr().out == printed
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times
    published = tables.TABLES[3][1]
    for row, (name, ((score, fid), _)) in zip(printed_rows(printed), published.items(), strict=True):
        run = folder / f"{name.strip('+ ')}-0"
        (entry,) = json.loads((run / "scores.json").read_text())
        assert row[:3] == [name, f"{score:.2f}", f"{fid:.2f}"]
        assert row[3:] == [f"{entry['is_own']:.3f}", f"{entry['fid_own']:.3f}",
                           f"{float(support.read_log(run)[-1]['distance']):.3f}"]  # fmt: skip
    (folder / "baseline-0" / "log.csv").write_text("step,distance\nx,y\n")
    assert tables.main([*command, "--", "--batch-size", "4", "--gen-batch-size", "4"]) == 2
    assert "log.csv is damaged" in capsys.readouterr().err
    for name in CHECKPOINTS:
        (folder / "baseline-0" / name).write_text("no checkpoint")
    assert tables.main([*command, "--", "--batch-size", "4", "--gen-batch-size", "4"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"transgan: cannot read .*baseline-0", error)


def test_a_table_takes_scores_that_fit(tmp_path, monkeypatch, capsys):
    """Measured by the same network against the same pictures, the data set's own, of the generator that is there."""
    command = ["3", *QUICK, "--rows", "baseline,+ locality", "--out", str(tmp_path), "--data-dir", str(tmp_path)]
    measured = {"images": 20, "against": "pictures", "reference": "r", "statistics": None, "weights": "w", "network": "n",
                "resizing": "none"}  # fmt: skip
    wrong, evaluated = {"fid_own": 99.0, "is_own": 99.0}, []

    def evaluate(_, folder, *words):
        entry = {"step": 1, "generator": folder.name, "fid_own": len(folder.name) / 7, "is_own": 2.0} | measured
        known = [x for x in scores.read_scores(folder / "scores.json") if not scores.agree(x, entry, scores.MADE_OF)]
        (folder / "scores.json").write_text(json.dumps([*known, entry]))
        evaluated.append(folder.name)

    monkeypatch.setattr(tables, "program", evaluate)
    monkeypatch.setattr(tables, "train", lambda *_: {"distance": 1.0, "seconds": 1.0})
    monkeypatch.setattr(tables, "reached", lambda folder: (1, folder.name))

    def printed():
        evaluated.clear()
        assert tables.main(command) == 0
        return capsys.readouterr().out

    first = printed()
    path = next(tmp_path.glob("*/locality-0/scores.json"))
    (entry,) = json.loads(path.read_text())
    others = ({"images": 30}, {"statistics": "mine.npz"}, {"generator": "another"}, {"generator": None}, {"step": 2})
    path.write_text(json.dumps([entry, *(entry | wrong | other for other in others)]))
    assert printed() == first
    assert evaluated == []
    path.write_text(json.dumps([entry | {"distance": "x", "seconds": -1, "row": "another"}]))
    assert printed() == first
    for name in ("fid_own", "is_own"):  # half of the numbers are none
        path.write_text(json.dumps([{key: x for key, x in (entry | wrong).items() if key != name}]))
        assert printed() == first
        assert evaluated == ["locality-0"]
    path.write_text(json.dumps([entry | {"fid_own": -5.0}]))
    assert tables.main(command) == 2
    assert "its fid_own cannot be -5.0; move it away" in capsys.readouterr().err.replace(")", "")
    for other in ("network", "reference", "weights", "resizing", "against"):  # the rows differ: measured anew
        path.write_text(json.dumps([entry | wrong | {other: "another"}]))
        assert printed() == first, other
        assert evaluated == ["baseline-0", "locality-0"]
        assert [x["fid_own"] for x in json.loads(path.read_text())] == [99.0, entry["fid_own"]]
    del entry["network"]  # as of a version that did not say
    path.write_text(json.dumps([entry | wrong]))
    assert printed() == first
    measured["network"] = "m"  # a whole table of another network stays as it is
    assert printed() == first
    assert evaluated == []


def test_what_scores_need_is_asked_for_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "program", lambda *_: pytest.fail("it trains first"))
    (tmp_path / "file").write_text("no folder")
    command = [*QUICK, "--out", str(tmp_path / "out"), "--data-dir"]
    assert tables.main(["3", *command, str(tmp_path / "file" / "x")]) == 2
    assert "choose another --data-dir" in capsys.readouterr().err
    (tmp_path / WEIGHTS.name).write_text("no weights")
    assert tables.main(["3", *command, str(tmp_path), "--features", "inception"]) == 2
    assert "is not the file expected" in capsys.readouterr().err


@pytest.mark.parametrize("last", ["1,nan,9", "1,inf,9", "1,,9", "1,2,nan", "1,2", "1"])
def test_a_last_row_without_a_distance_is_no_number(last, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "reached", lambda _: (1, ""))
    (tmp_path / "log.csv").write_text(f"step,distance,seconds\n{last}\n")
    with pytest.raises(UserError, match="is damaged"):
        tables.train(tmp_path, [], [], 1)


@pytest.mark.parametrize("number", tables.TABLES)
def test_rows_are_the_papers_pairs(number):
    """Every row's options are such that transgan.py takes, and make what the row's name says."""
    for name, (_, options) in tables.TABLES[number][1].items():
        if options is None:
            assert name.startswith("StyleGAN")
            continue
        chosen = support.parsed("--dataset", "cifar10", "--size", "tiny", *options)
        assert ("augmentation" in name or number == 4 or name[0] == "+") == (chosen.diff_aug == PUBLISHED.diff_aug)
        if number == 1:
            names = {value: key for key, value in NAMES.items()}
            assert (chosen.generator, chosen.discriminator) == tuple(names[part] for part in name.split(" x "))
        if number == 2:
            kind = {"WGAN-GP": "resnet", "AutoGAN": "autogan", "TransGAN": "transgan"}[name.split(" +")[0]]
            assert (chosen.generator, chosen.discriminator) == (kind, kind)
        if number == 4:
            assert chosen.size == name.split("-")[1]
            assert (chosen.sr_weight, chosen.locality) == (PUBLISHED.sr_weight, PUBLISHED.locality)


@pytest.fixture
def begun(monkeypatch):
    """The folders of runs that a table would have begun, and their options."""
    runs = {}

    def train(folder, options, *_):
        runs[folder] = options
        folder.mkdir(parents=True)
        return {"distance": 1.0, "seconds": 1.0}

    monkeypatch.setattr(tables, "train", train)
    monkeypatch.setattr(tables, "score", lambda *_: {"fid_own": 1.0, "is_own": 1.0})
    return runs


def test_data_sets_of_one_name_and_other_options_have_runs_of_their_own(begun, tmp_path, capsys):
    out, long = tmp_path / "out", ["--learning-rate", f"0.{'0' * 300}1"]
    folders = [tmp_path / name / "train" for name in ("cats", "dogs")]
    for number, (dataset, extra) in enumerate([(folders[0], []), (folders[1], []), (folders[0], long[:1]),
                                               ("shapes", long), ("cifar10", long), ("shapes", [*long[:1], long[1] + "1"]),
                                               ("shapes", [*long, *long])]):  # fmt: skip
        if dataset in folders:
            dataset.mkdir(parents=True, exist_ok=True)
        command = ["3", *QUICK, "--rows", "baseline", "--out", str(out), "--dataset", str(dataset), "--", *extra]
        assert tables.main(command) == 0, capsys.readouterr().err
        assert len(begun) == number + 1
        assert [*begun.values()][-1][: len(extra)] == extra
    assert tables.main(["3", *QUICK, "--rows", "baseline", "--out", str(out), "--", "--batch-size", "4"]) == 0
    assert (out / "table-3-shapes-tiny-1---batch-size-4" / "baseline-0").is_dir()  # as it always was


@pytest.mark.parametrize("word", [
    "--seed=5", "--see", "--steps=9", "--size=M", "--out=DIR", "--device", "--threads", "--data-dir", "--sample-every",
    "--diff-aug", "--sr-weight=0", "--locality", "--json", "--quiet", "--preset=cifar10-S", "--pre", "--resume", "--help",
    "-h", "--", "--evaluate", "--num-images", "--features", "--batch",
])  # fmt: skip
def test_what_a_table_sets_itself_is_not_taken_after_its_options(word, begun, tmp_path, capsys):
    assert tables.main(["3", *QUICK, "--out", str(tmp_path), "--", "--batch-size=4", word, "1"]) == 2
    message = capsys.readouterr().err
    assert f"transgan: {word.partition('=')[0]} is the table's, or no run's option; after -- may stand --acc" in message
    assert message.count("\n") == 1
    assert not begun


def test_the_table_of_sizes_has_its_own(begun, tmp_path, capsys):
    quick = [word for word in QUICK if word not in ("--size", "tiny")]
    assert tables.main(["4", *QUICK, "--out", str(tmp_path)]) == 2
    assert "--size does nothing here" in capsys.readouterr().err
    assert tables.main(["4", *quick, "--out", str(tmp_path)]) == 0
    assert [support.parsed(*options).size for options in begun.values()] == ["S", "M", "L", "XL"]


def test_only_some_rows_and_what_was_not_run_is_not_printed(tmp_path, data_dir, capsys):
    command = ["2", *QUICK, "--rows", "TransGAN", "--out", str(tmp_path), "--data-dir", str(data_dir)]
    assert tables.main([*command, "--", "--batch-size", "4", "--gen-batch-size", "4"]) == 0
    rows = {row[0]: row for row in printed_rows(capsys.readouterr().out)}
    assert len(rows) == 8
    assert [name for name, row in rows.items() if "not" not in row[3]] == ["TransGAN"]
    assert rows["StyleGAN v2"] == ["StyleGAN v2", "9.18", "11.07", *["not built here"] * 3]
    assert rows["AutoGAN"][3:] == ["not run"] * 3
    for flag in ("--seed", "--out", "--dataset"):
        assert tables.main([*command, "--", flag, "5"]) == 2
        assert f"{flag} is the table's" in capsys.readouterr().err
    assert tables.main(["2", "--rows", "BigGAN"]) == 2
    assert "table 2 has no row 'BigGAN': WGAN-GP, " in capsys.readouterr().err
    assert tables.main(["2", "--rows", "StyleGAN v2"]) == 2
    assert "nothing to run" in capsys.readouterr().err
    assert tables.main([*command, "--", "--learning-rate", "7"]) == 2
    assert "must be from 0 to 1" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
    """A command, as a program, whose runs are done."""
    out = tmp_path_factory.mktemp("out")
    command = ["3", *QUICK, "--rows", "baseline", "--out", str(out), "--data-dir", str(data_dir), "--", "--batch-size", "4"]
    assert tables.main(command) == 0
    return [sys.executable, "-m", "paper.tables", *command]


ROOT = Path(transgan.__file__).parent
on_posix = pytest.mark.skipif(os.name != "posix", reason="about POSIX's shell and signals")


@on_posix
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [('exec "$@"', 0, ""), ('exec "$@" >&-', 0, ""), ('exec "$@" | true; exit ${PIPESTATUS[0]}', 2, "Broken pipe")]
    + [('exec "$@" >/dev/full', 2, "No space left on device")] * os.path.exists("/dev/full"),
)
@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"},
                                 {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}])  # fmt: skip
def test_a_table_in_odd_surroundings(words, code, said, env, finished):
    """A sign that the terminal cannot show is written otherwise; an output that takes nothing is said in a line."""
    command = ["bash", "-c", words, "bash", *finished]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=buffered | env)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert len(done.stderr.splitlines()) == 1 + bool(code)  # beside the numbers of the row
    assert (r"mean \xb1 deviation" in done.stdout) == (words == 'exec "$@"')


@on_posix
def test_sigterm_stops_the_runs_of_a_table(tmp_path, data_dir):
    command = ["3", *QUICK, "--steps", "100000", "--rows", "baseline", "--out", str(tmp_path), "--data-dir", str(data_dir)]
    with subprocess.Popen([sys.executable, "-m", "paper.tables", *command], cwd=ROOT) as begun:
        until = time.monotonic() + 60
        while not (logs := [*tmp_path.glob("*/*/log.csv")]) or logs[0].read_text().count("\n") < 3:
            assert time.monotonic() < until
            time.sleep(0.1)
        begun.terminate()
        try:
            assert begun.wait(60) == 143
        finally:
            begun.kill()
    assert newest_checkpoint(logs[0].parent)[0].name == CHECKPOINTS[0]
    assert not (logs[0].parent / ".lock").exists()
    assert tables.reached(logs[0].parent)[0] == int(support.read_log(logs[0].parent)[-1]["step"])


def test_a_table_gives_the_spread_of_its_seeds():
    args = tables.make_parser().parse_args(["3", "--size=S", "--steps=9", "--device=gpu", "--features=inception"])
    results = {name: [{"fid": x, "is": 1, "distance": 0} for x in (0.1, 0.2, 0.6)] for name in tables.TABLES[3][1]}
    text = tables.table(args, results)
    assert text.count("| 0.300 ± 0.265 |") == 4  # the sample's deviation, n - 1
    assert "FID-own" not in text
    assert "size S on cifar10, 9 steps, 5000 pictures, mean ± deviation of 3 seeds, gpu" in text


@pytest.mark.parametrize("number", tables.TABLES)
def test_a_table_says_how_its_peers_are_trained_otherwise(number):
    args = tables.make_parser().parse_args([str(number)])
    below = tables.table(args, {}).splitlines()[-4:]
    told = [line.split(" here: ")[0] for line in below if " here: " in line]
    assert told == {1: ["AutoGAN"], 2: ["AutoGAN", "WGAN-GP"]}.get(number, [])
