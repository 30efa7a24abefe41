"""The command line: what it makes and says, and what a person can get wrong."""

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np  # isort: skip
import pytest
from hypothesis import given
from PIL import Image

import autograd as ag
import transgan
from data import UserError
from paper.networks import NAMES
from program import VERSION, checkpoints, main, run
from program.log import Log
from program.options import (
    Options,
    choose_options,
    commands,
    flag,
    flags,
    long_command,
    program,
    refuse_idle_options,
)
from program.presets import PAPERS
from program.support import (
    POLICY,
    TRAIN,
    assert_same_state,
    at_step,
    fails,
    objects,
    parsed,
    read_log,
    run_main,
    same_arrays,
    small_trainer,
    state_of,
)
from store import arguments, datasets, files, output
from store.files import CHECKPOINTS
from store.support import encoded, fuzz, fuzzed, holds, leftovers, one_line_at_most, slope
from test_transgan import DEVICE, seeds


def test_a_run_writes_samples_log_and_checkpoint(small, tmp_path, capsys):
    out = tmp_path / "run"
    assert run_main(*TRAIN, "--out", out, "--sample-every", 2) == 0
    printed = capsys.readouterr().out
    losses = r"D -?\d.*  G -?\d.*  distance \d.*  penalty \d.*"
    assert re.search(rf"step 4/4  0:00:00 left  {losses}  0:00:\d\d elapsed  \d+ pictures/s", printed)
    assert "\r" not in printed
    files = [*sorted(CHECKPOINTS), "curves.png", "log.csv", "progress.gif", "report.html", "samples"]
    assert leftovers(out) == files + [f"samples/step-00000{i}.png" for i in (0, 2, 4)]
    rows = read_log(out)
    assert [row["step"] for row in rows] == list("01234")
    assert [bool(row["distance"]) for row in rows] == [True, False, True, False, True]
    assert all(float(row["disc_loss"]) and float(row["penalty"]) and float(row["gen_loss"]) for row in rows[1:])
    with np.load(out / "checkpoint.npz") as saved:
        names = set(saved)
        assert json.loads(str(saved["options"]))["steps"] == 4
    for prefix in ("generator/", "discriminator/", "average/", "generator/adam.v/", "discriminator/adam.v/"):
        assert any(name.startswith(prefix) for name in names)


@pytest.mark.parametrize("decay", [0, 1 - 1e-12])
def test_a_runs_grids_and_distance_are_of_the_averaged_generator(decay, small, tmp_path):
    """They stay as they were at first if the average does, whatever became of the weights in training."""
    flags = ("--sample-every", 4, "--learning-rate", 0.01, "--sr-weight", 1, "--ema-decay", decay)
    assert run_main(*TRAIN, "--out", tmp_path / "run", *flags) == 0
    for kind in ("step", "restored"):
        first, last = ((tmp_path / "run" / "samples" / f"{kind}-00000{step}.png").read_bytes() for step in (0, 4))
        assert (first == last) == (decay > 0)
    rows = read_log(tmp_path / "run")
    assert (rows[0]["distance"] == rows[4]["distance"]) == (decay > 0)


def test_long_steps_are_sampled_and_saved_by_the_clock(small, tmp_path, monkeypatch):
    saved, save = [], checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda trainer, path: saved.append(trainer.step) or save(trainer, path))
    for patience, steps in ((math.inf, [0, 4]), (0, [0, 1, 2, 3, 4])):
        saved.clear()
        monkeypatch.setattr(run, "PATIENCE", patience)
        out = tmp_path / str(patience)
        assert run_main(*TRAIN, "--out", out, "--sample-every", 100, "--save-every", 100) == 0
        assert saved == steps
        assert [int(p.stem[5:]) for p in sorted((out / "samples").iterdir())] == steps


def test_co_training_shows_what_it_restores(small, tmp_path, capsys):
    out = tmp_path / "run"
    assert run_main(*TRAIN, "--out", out, "--sr-weight", 10) == 0
    assert re.search(r"step 4/4 .* SR \d", capsys.readouterr().out)
    assert all(float(row["sr_loss"]) > 0 for row in read_log(out)[1:])
    grid = np.asarray(Image.open(out / "samples" / "restored-000004.png")).astype(int)
    assert grid.shape == ((3 * 9 + 1) * 12, (8 * 9 + 1) * 12, 3)  # three rows of eight pictures of 8x8, enlarged
    small, original = (grid[top : top + 96 : 12, 12:108:12] for top in (12, 12 * 19))
    np.testing.assert_array_equal(small[::2, ::2], small[1::2, 1::2])
    blocks = original.reshape(4, 2, 4, 2, 3).mean(axis=(1, 3))
    assert np.abs(blocks - small[::2, ::2]).max() <= 1


def test_a_folder_of_anybodys_pictures_is_learnt(small, tmp_path, capsys):
    folder, out = tmp_path / "my pictures", tmp_path / "run"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.png").write_bytes(encoded(slope(20 + i, 30, i % 6)))
    (folder / "notes.txt").write_text("no picture")
    train = ("--size", "tiny", *TRAIN, "--diff-aug", "none", "--data-dir", tmp_path / "data", "--save-every", 2)
    assert run_main("--dataset", folder, *train, "--out", out) == 0
    printed = capsys.readouterr()
    assert f"on {folder} 8x8, 12 pictures" in printed.out
    assert "skipped 'notes.txt'" in printed.err
    moved = folder.rename(tmp_path / "elsewhere")
    resume = ("--resume", out, "--steps", 6, "--data-dir", tmp_path / "data")
    assert "there is no folder" in fails(capsys, *resume)
    assert run_main(*resume, "--dataset", moved) == 0
    assert "the pictures are not those" not in capsys.readouterr().err
    assert [row["step"] for row in read_log(out)] == list("0123456")
    (moved / "3.png").write_bytes(encoded(slope(20, 30, 1)))
    for steps, said in ((7, True), (8, False)):  # once: the next checkpoint is of the new ones
        assert run_main("--resume", out, "--steps", steps, "--data-dir", tmp_path / "data") == 0
        assert (f"the pictures are not those that {out} has learnt from so far" in capsys.readouterr().err) == said
    options, where = choose_options(main.make_parser().parse_args(["--dataset", str(moved)]))
    assert (options.size, options.image_size, options.steps, where.as_posix()) == ("S", 32, 500_000, "runs/elsewhere-S")


@pytest.mark.parametrize(("name", "side", "stages"), [("stl10", 48, 3), ("celeba", 64, 4)])
def test_the_larger_data_sets_are_learnt(name, side, stages, tmp_path, monkeypatch, capsys):
    """One step of networks that are small but for their four stages, of pictures that were decoded before."""
    monkeypatch.setitem(transgan.SIZES, "tiny", transgan.Size(256, (1, 1, 1), 16, 1))
    monkeypatch.setattr(run, "JUDGED", 8)
    pictures = np.stack([slope(side, side, i).transpose(2, 0, 1) for i in range(6)])
    cache = tmp_path / f"{name}-{side}-{'0' * 16}.pictures"
    datasets.make(cache, side, tmp_path, len(pictures), ((str(i), x) for i, x in enumerate(pictures)))
    made, grow = [], transgan.Generator.grow

    def counted(self, x, first):
        made.append(len(self.stages))
        return grow(self, x, first)

    monkeypatch.setattr(transgan.Generator, "grow", counted)
    assert run_main("--dataset", name, "--size", "tiny", "--steps", 1, "--disc-steps", 1, "--batch-size", 2,
                    "--gen-batch-size", 2, "--sr-weight", 1, "--locality", "4:198", "--data-dir", tmp_path,
                    "--out", tmp_path / "run") == 0  # fmt: skip
    assert f"{name} {side}x{side}, 6 pictures" in capsys.readouterr().out
    assert set(made) == {stages}
    for kind, rows in (("step", 1), ("restored", 3)):
        grid = Image.open(tmp_path / "run" / "samples" / f"{kind}-000001.png")
        factor = max(1, 96 // side)
        assert grid.size == ((8 * (side + 1) + 1) * factor, (rows * (side + 1) + 1) * factor), kind


@pytest.mark.parametrize("name", PAPERS)
def test_presets_are_the_papers_runs(name, capsys):
    dataset, size = name.split("-")
    options = parsed("--preset", name)
    assert (options.dataset, options.size, options.loss) == (dataset, size, "wgangp-eps")
    assert (options.batch_size, options.gen_batch_size, options.disc_steps, options.steps) == (64, 128, 5, 500_000)
    assert (options.learning_rate, options.decay, options.ema_decay, options.sr_weight) == (1e-4, "none", 0.999, 50)
    assert options.diff_aug == POLICY
    assert options.locality == ("8:5,12:10,16:15,20:20" if dataset == "celeba" else "4:22,6:32,8:42,10:60")
    ends = {"cifar10": (22, 60, 1600), "stl10": (22, 60, 381), "celeba": (5, 20, 198)}[dataset]
    phases = [end for _, end in transgan.locality_phases(options)]
    assert (phases[0], phases[-1]) == pytest.approx([500_000 * ends[i] / ends[2] for i in (0, 1)])
    assert options.patch_size == options.image_size // 8
    changed = parsed("--preset", name, "--steps", 7, "--size", "tiny", "--diff-aug", "none", "--accumulate", 4)
    assert changed == dataclasses.replace(options, steps=7, size="tiny", diff_aug="none", accumulate=4)
    assert run_main("--summary", "--preset", name, "--batch-size", 48) == 0
    command = capsys.readouterr().out.splitlines()[0].split()
    assert command[0] == "transgan.py"
    assert parsed(*command[1:]) == dataclasses.replace(options, batch_size=48)
    assert len(command) == 1 + 2 * len(dataclasses.fields(options))


@pytest.mark.parametrize("name", PAPERS)
def test_a_preset_says_whose_its_values_are(name, capsys):
    """A row each where text and commands differ or one is silent; what is given here is nobody else's."""
    dataset = name.split("-")[0]
    assert run_main("--summary", "--preset", name, "--gen-batch-size", 96) == 0
    lines = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    table = {row[0]: row[1:] for row in (re.split(r" {2,}", line.rstrip()) for line in lines)}
    assert table["value"] == ["here", "paper's text", "authors' command", "our reading"]
    assert table["batch_size"][:3] == ["64", "64", "32" if dataset == "cifar10" else "16"]
    assert table["gen_batch_size"] == ["96", "128", "64" if dataset == "cifar10" else "32", "as you say"]
    assert table["locality_shape"][::2] == ["window", "band"]
    for what, where, command in (("patch_size", ("stl10", "celeba"), "4"), ("size", ("stl10",), "width 768"),
                                 ("pictures", ("stl10",), "105,000"), ("resizing", ("stl10", "celeba"), ""),
                                 ("depths", ("celeba",), "5, 3, 3, 2")):  # fmt: skip
        assert (what in table) == (dataset in where)
        assert command in " ".join(table.get(what, [command]))
    defaults = parsed("--dataset", dataset)  # the authors' batches, without a preset
    assert (defaults.batch_size, defaults.gen_batch_size) == ((32, 64) if dataset == "cifar10" else (16, 32))


def test_the_rate_decays_where_its_authors_had_it_so():
    """What is said goes before."""
    peers = ("--generator", "resnet", "--discriminator")
    authors = ("none", "--dataset", "cifar10"), ("none", *peers, "autogan"), ("linear", *peers, "resnet")
    for decay, *args in (*authors, ("none",), ("linear", "--decay", "linear"), ("none", *peers, "resnet", "--decay=none")):
        assert parsed(*args).decay == decay, args


def test_a_preset_gives_way_to_another_data_set(tmp_path):
    assert parsed("--preset", "cifar10-S", "--dataset", "stl10").image_size == 48
    assert parsed("--preset", "stl10-XL", "--dataset", "celeba").patch_size == 8
    assert parsed("--preset", "cifar10-S", "--dataset", tmp_path, "--image-size", 64).patch_size == 8
    command = flags(dataclasses.asdict(parsed("--dataset", tmp_path / ".." / tmp_path.name)))
    assert shlex.split(command)[1] == str(tmp_path.resolve())


def test_data_sets_sizes_and_networks_go_together():
    """Every combination has defaults that are taken."""
    for dataset, size, generator, discriminator in itertools.product(arguments.NAMES, transgan.SIZES, NAMES, NAMES):
        options = parsed("--dataset", dataset, "--size", size, "--generator", generator, "--discriminator", discriminator)
        assert (options.locality == "none") == (size == "tiny" or generator != "transgan")
        if discriminator != "transgan" and dataset != "shapes":
            assert (options.batch_size, options.gen_batch_size) == (64, 128)
    for idle in (
        ("--discriminator", "autogan", "--patch-size", 4),
        ("--locality-shape", "window"),
        ("--locality-stages", 1),
    ):
        with pytest.raises(UserError, match=f"{idle[-2]} does nothing here"):
            parsed(*idle)
    for pair in ((), ("--discriminator", "autogan"), ("--generator", "resnet"), ("--locality", "4:9")):
        assert parsed(*shlex.split(long_command(parsed(*pair)))[1:]) == parsed(*pair)  # what --summary prints
    assert parsed("--preset", "celeba-XL", "--dataset", "cifar10").locality == Options.locality


@pytest.mark.parametrize(("side", "patch"), [(8, 4), (16, 4), (20, 4), (32, 4), (36, 4), (44, 4), (48, 6), (64, 8)])
def test_patches_keep_the_papers_grid(side, patch):
    assert parsed("--image-size", side).patch_size == patch


def test_a_profile_is_printed_when_the_run_is_done(small, tmp_path, capsys):
    assert run_main(*TRAIN, "--out", tmp_path / "run", "--profile") == 0
    printed = capsys.readouterr().out
    made = {"forward": ("attention", "linear", "layer_norm", "gelu"),
            "backward": ("matmul", "layer_norm", "gelu")}  # fmt: skip
    for direction, operations in made.items():
        for operation in operations:
            assert re.search(rf"^{operation} +{direction} +\d", printed, re.M), (operation, direction)
    assert run_main(*TRAIN, "--out", tmp_path / "plain") == 0
    assert same_arrays(tmp_path / "run/checkpoint.npz", tmp_path / "plain/checkpoint.npz")
    assert "attention" not in capsys.readouterr().out


def test_a_terminal_gets_one_live_line(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert run_main(*TRAIN, "--out", tmp_path / "run", "--loss", "hinge") == 0
    printed = capsys.readouterr().out
    assert printed.count("\r\033[K") >= 2
    assert printed.count("\n") == 3  # the opening line, the live line left standing, and where the picture is
    assert "penalty" not in printed


@pytest.mark.parametrize("loss", transgan.LOSSES)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(loss, small, tmp_path, capsys, monkeypatch):
    arguments = (*TRAIN, "--loss", loss, "--save-every", 2)
    assert run_main(*arguments, "--out", tmp_path / "unbroken") == 0
    train_step = transgan.Trainer.train_step

    def interrupted(self):
        if self.step == 3:
            raise KeyboardInterrupt
        return train_step(self)

    monkeypatch.setattr(transgan.Trainer, "train_step", interrupted)
    assert run_main(*arguments, "--out", tmp_path / "broken") == 130
    monkeypatch.setattr(transgan.Trainer, "train_step", train_step)
    assert run_main("--resume", tmp_path / "broken", "--steps", 4, "--loss", loss) == 0
    assert same_arrays(tmp_path / "unbroken/checkpoint.npz", tmp_path / "broken/checkpoint.npz")
    columns = ("step", "disc_loss", "gen_loss", "penalty", "distance")
    logs = [[[row[c] for c in columns] for row in read_log(tmp_path / run)] for run in ("unbroken", "broken")]
    assert logs[0] == logs[1]
    pictures = [(tmp_path / run / "samples/step-000004.png").read_bytes() for run in ("unbroken", "broken")]
    assert pictures[0] == pictures[1]


def test_a_run_stopped_before_its_first_look_can_be_gone_on_with(small, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(transgan, "sliced_wasserstein", lambda a, b: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run_main(*TRAIN, "--out", tmp_path / "run") == 130
    assert run_main("--resume", tmp_path / "run") == 0
    assert run_main(*TRAIN, "--out", tmp_path / "plain") == 0
    assert [row["disc_loss"] for row in read_log(tmp_path / "run")] == [
        row["disc_loss"] for row in read_log(tmp_path / "plain")
    ]


TRAINS, RUNS, ANY = (
    "training --resume",
    "training --resume --evaluate --from",
    "training --resume --evaluate --from --summary",
)
# For each option that is none of OPTIONS: a value that is not its default, and where it does something.
ACTING = {
    "--preset cifar10-S": "training --summary", "--on-nan rewind": TRAINS, "--gpus 2": TRAINS, "--sample-every 5": TRAINS,
    "--save-every 5": TRAINS, "--evaluate-every 5": TRAINS, "--profile": TRAINS, "--data-dir x": RUNS, "--out x": RUNS,
    "--device cpu": RUNS, "--threads 1": RUNS, "--plain": RUNS, "--features own": "--evaluate",
    "--inception x": "--evaluate", "--fid-stats x": "--evaluate", "--num-images 20": "--evaluate",
    "--interpolate 2": "--from", "--attention": "--from", "--nearest 2": "--from", "--sample 3": "--from",
    "--query 1,1": "", "--export x": "--from", "--resume x": "--summary", "--evaluate x": "", "--from x": "",
    "--summary": "--resume", "--quiet": RUNS, "--json": ANY,
}  # fmt: skip
OTHERS = {
    "dataset": "cifar10", "size": "S", "generator": "resnet", "discriminator": "resnet", "image_size": 24, "patch_size": 2,
    "loss": "hinge", "batch_size": 3, "gen_batch_size": 3, "disc_steps": 7, "learning_rate": 0.5, "decay": "linear",
    "beta2": 0.5, "precision": "tf32", "ema_decay": 0.5, "seed": 7, "diff_aug": "color", "sr_weight": 1.0,
    "locality": "1:1", "steps": 9, "accumulate": 2,
}  # fmt: skip
WITHOUT_LOCALITY = {"locality_stages": 2, "locality_shape": "band"}  # they do nothing


def test_each_option_does_something_or_is_refused_in_every_mode():
    parser, saved = main.make_parser(), parsed()
    modes = {"training": [], "--resume": ["--resume", "x"], "--evaluate": ["--evaluate", "x"], "--summary": ["--summary"],
             "--from": ["--from", "x", "--sample", "2"]}  # fmt: skip

    def taken(mode, *more):
        args = parser.parse_args([*modes[mode], *map(str, more)])
        try:
            refuse_idle_options(args, parser)
            choose_options(args, saved if mode not in ("training", "--summary") else None)
        except UserError as error:
            named = f"leave out {' '.join(map(str, more))}"
            assert any(words in str(error) for words in (named, "leave it out", "leave out one", "--from")), error
            return False
        return True

    known = {text.split()[0] for text in ACTING} | {flag(name) for name in OTHERS | WITHOUT_LOCALITY}
    assert known == {action.option_strings[0] for action in parser._actions} - {"-h"}
    for text, acting in ACTING.items():
        for mode in modes:
            if text.split()[0] not in modes[mode] and not (mode == "training" and text.split()[0] in ANY):
                assert taken(mode, *text.split()) == (mode in acting.split()), (mode, text)
    for name, value in (OTHERS | WITHOUT_LOCALITY).items():
        for mode in modes:
            changes = {"--resume": ("steps", "accumulate"), "--from": ("seed",), "--evaluate": ()}.get(mode, OTHERS)
            assert taken(mode, flag(name), value) == (name in changes), (mode, name)
            if mode not in ("training", "--summary"):  # what a run has already may be said
                assert taken(mode, flag(name), getattr(saved, name)), (mode, name)


def test_options_that_need_another_are_refused_without_it():
    def line(*words):
        parser = main.make_parser()
        with pytest.raises(UserError) as caught:
            refuse_idle_options(parser.parse_args(words), parser)
        return str(caught.value)

    for words, message in (
        ("--num-images 20", "--num-images goes with --evaluate or --evaluate-every; leave it out"),
        ("--from x --sample 2 --query 1,1", "--query goes with --attention; leave it out"),
        (
            "--evaluate x --features own --inception y",
            "--inception and --features own do not go together; leave out one",
        ),
        ("--evaluate x --resume x", "--resume and --evaluate do not go together"),
        ("--from x --resume x --sample 2", "--resume and --from do not go together"),
        ("--from x", "--from wants to know what to make"),
        ("--device gpu --threads 2", "--threads and --device gpu do not go together"),
        ("--quiet --json", "--quiet and --json do not go together"),
        ("--quiet --summary", "--quiet and --summary do not go together"),
        ("--quiet --profile", "--quiet and --profile do not go together"),
        ("--profile --summary", "--profile does nothing here: it goes with a training; leave it out"),
        ("--sample 2", "--sample does nothing here: it goes with --from; leave it out"),
    ):
        assert message in line(*words.split())
    parser = main.make_parser()
    for words in ("--evaluate-every 2 --num-images 20", "--from x --attention --query 1,1", "--summary --sample-every 100",
                  "--evaluate x --inception y", "--evaluate x --features inception --inception y"):  # fmt: skip
        refuse_idle_options(parser.parse_args(words.split()), parser)


def test_options_that_a_person_gets_wrong(small, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "empty").mkdir()
    for args, message in (
        (["--size", "XXL"], "invalid choice: 'XXL'"),
        (["--dataset", "imagenet"], "'imagenet' is neither a folder nor one of cifar10, stl10, celeba, shapes"),
        (["--dataset", ""], "'' is neither a folder nor one of"),
        (["--dataset", tmp_path / "file"], "is neither a folder nor one of"),
        (["--dataset", tmp_path / "empty"], "holds no files"),
        (["--preset", "cifar10-XXL"], "invalid choice: 'cifar10-XXL'"),
        (["--accumulate", "0"], "0 must be from 1"),
        (["--loss", "mse"], "invalid choice: 'mse'"),
        (["--steps", "many"], "'many' is not a whole number"),
        (["--steps", "0"], "0 must be from 1"),
        (["--learning-rate", "nan"], "must be from 0 to 1"),
        (["--learning-rate", "fast"], "'fast' is not a number"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--nonsense\n\x1b[31m"], r"--nonsense\n\x1b[31m"),
        (["--out", ""], "the name of a folder is empty"),
        (["--sr-weight", "-1"], "must be from 0"),
        (["--locality", "near"], "'near' must be none, or pairs"),
        (["--locality", "4:22,4:32"], "both growing"),
        (["--dataset", "cifar10", "--locality", "4:22,6:1601"], "goes on after the 1600 epochs of a run on cifar10"),
        (["--locality-stages", "5"], "must be from 1 to 4"),
        (["--dataset", "celeba", "--locality", "4:199"], "goes on after the 198 epochs of a run on celeba"),
        (["--locality-shape", "band", "--locality-stages", "2"], "is for the last stage alone"),
        (["--diff-aug", "blur"], "'blur' must be none, or some of translation,cutout,color"),
        (["--diff-aug", "color,color"], "each once"),
        (["--diff-aug", "none,color"], "must be none, or some"),
        (["--image-size", "30"], "image_size 30 must divide by 4"),
        (["--image-size", "30", "--summary"], "image_size 30 must divide by 4"),
        (["--patch-size", "5"], "patches of 5 pixels do not tile a picture of 16"),
        (["--batch-size", "1000"], "lower --batch-size"),
        (["--out", tmp_path / "file" / "run"], "choose another --out"),
        (
            ["--dataset", "cifar10", "--image-size", "48"],
            "cifar10 has pictures of 32 pixels a side, which --image-size 48 does not divide; choose one of 32, 16, 8",
        ),
        (["--preset", "stl10-XL", "--image-size", "32"], "choose one of 48, 24, 16, 12, 8"),
        (["--dataset", "cifar10", "--data-dir", tmp_path / "file"], "choose another --data-dir"),
    ):
        if not {"--out", "--summary"} & {*args}:
            args = [*args, "--out", tmp_path / "run"]
        assert message in fails(capsys, *args), args
    if DEVICE == "cpu":
        assert "no GPU to use" in fails(capsys, "--device", "gpu", "--out", tmp_path / "run")


def nonsense_checkpoints(good, kind="generator"):
    """(what is wrong, a function that writes it to a path, a part of the message) for a checkpoint or an export.

    kind: "generator" or "average", whose to_rgb.bias is changed, too.
    """
    bias = f"{kind}/to_rgb.bias"
    with np.load(good) as saved:
        numbers = saved[bias]

    def change(**arrays):
        def write(path):
            with np.load(good) as saved:
                np.savez(path, **(dict(saved) | arrays))

        return write

    def options(**changes):
        with np.load(good) as saved:
            return change(options=json.dumps(json.loads(str(saved["options"])) | changes))

    content = good.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 255
    yield "missing", lambda path: None, "cannot read"
    yield "text", lambda path: path.write_text("hello"), "cannot read"
    yield "empty", lambda path: path.write_bytes(b""), "cannot read"
    yield "truncated", lambda path: path.write_bytes(content[:-5000]), "cannot read"
    yield "a flipped bit", lambda path: path.write_bytes(flipped), "cannot read"
    yield "an array alone", lambda path: np.save(path.open("wb"), np.ones(3)), "cannot read"
    yield "other arrays", lambda path: np.savez(path, a=np.ones(3)), "it has no options"
    yield "objects", change(step=np.array([{}], object)), "cannot read"

    def repeated(path):
        path.write_bytes(content)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("a", b"")
            archive.filelist += 99 * [max(archive.filelist, key=lambda member: member.file_size)]

    yield "members that lie on one another", repeated, "claims more than its size"
    yield "compressed", lambda path: np.savez_compressed(path, **np.load(good)), "claims more than its size"
    yield "another shape", change(**{bias: np.ones(4, numbers.dtype)}), f"its {bias} is"
    yield "another type", change(**{bias: np.ones(3)}), f"its {bias} is"
    for number in (math.nan, -math.inf):
        yield "not finite", change(**{bias: np.full_like(numbers, number)}), f"{bias} is not finite"
    yield "a step of words", change(step=np.array("three")), "its step is"
    yield "a step too far", change(step=np.array(-1)), "its step is below 0"
    yield "options of words", change(options=np.array("{}}")), "options of another version"
    yield "unknown option", options(colour="red"), "options of another version"
    yield "option of another type", options(steps="9"), "its option steps is '9'"
    yield "unknown size", options(size="XXL"), "its option size is 'XXL'"
    yield "size of no text", options(size=["S"]), "its option size is ['S']"
    yield "data set of no text", options(dataset={}), "its option dataset is {}"
    yield "unknown network", options(generator="biggan"), "its option generator is 'biggan'"
    yield "unknown data set", options(dataset="imagenet"), "its option dataset is 'imagenet'"
    yield "data set without a name", options(dataset=""), "its option dataset is ''"
    yield "unknown augmentation", options(diff_aug="blur"), "its option diff_aug is 'blur'"
    yield "augmentation of no text", options(diff_aug=3), "its option diff_aug is 3"
    yield "unknown locality", options(locality="4:4:4"), "its option locality is '4:4:4'"
    yield "impossible size", options(image_size=10), "must divide by 4"
    yield "size out of range", options(image_size=2**30), f"its option image_size is {2**30}"
    yield "rate out of range", options(learning_rate=math.inf), "its option learning_rate is inf"
    yield "steps out of range", options(steps=10**400), "its option steps is"
    yield "options of before", change(options=np.array('{"size": "tiny"}')), "options of another version"
    yield "unknown decay", options(decay="cosine"), "its option decay is 'cosine'"
    yield "unknown shape", options(locality_shape="ring"), "its option locality_shape is 'ring'"
    yield "options nested deep", change(options=np.array("[" * 16_000)), "cannot read"
    yield "a step and a half", change(step=np.array(1.5)), "its step is"
    yield "an endless step", change(step=np.array(math.inf)), "its step is"
    yield "negative batch", options(batch_size=-4), "its option batch_size is -4"


def test_resuming_from_nonsense(small, tmp_path, capsys):
    good, bad = tmp_path / "good", tmp_path / "bad"
    assert run_main(*TRAIN, "--out", good) == 0
    for name, write, message in nonsense_checkpoints(good / "checkpoint.npz"):
        bad.mkdir(exist_ok=True)
        checkpoint = bad / "checkpoint.npz"
        checkpoint.unlink(missing_ok=True)
        write(checkpoint)
        before = checkpoint.read_bytes() if checkpoint.exists() else None
        assert message in fails(capsys, "--resume", bad, "--steps", 9), name
        assert (checkpoint.read_bytes() if checkpoint.exists() else None) == before, name
    assert "leave out --size" in fails(capsys, "--resume", good, "--size", "S")
    assert "leave out --dataset" in fails(capsys, "--resume", good, "--dataset", tmp_path)
    assert "--preset does nothing here" in fails(capsys, "--resume", good, "--preset", "cifar10-S")
    assert "is finished" in fails(capsys, "--resume", good)
    assert "holds a run already" in fails(capsys, *TRAIN, "--out", good)
    (good / "log.csv").write_bytes(b"step\n\xff\xfe")
    assert "log.csv" in fails(capsys, "--resume", good, "--steps", 9)


def test_looking_at_nonsense(small, tmp_path, capsys):
    """At a file of --export, and at the checkpoint in a run's folder; nothing is made of it."""
    run, good, bad, path = tmp_path / "run", tmp_path / "good.npz", tmp_path / "bad", tmp_path / "bad.npz"
    assert run_main(*TRAIN, "--out", run) == run_main("--from", run, "--export", good) == 0
    bad.mkdir()
    for source, place, begun in ((good, path, path), (run / "checkpoint.npz", bad / "checkpoint.npz", bad)):
        for name, write, message in nonsense_checkpoints(source, "average"):
            place.unlink(missing_ok=True)
            write(place)
            for look in ("--sample", 2), ("--export", tmp_path / "new.npz"):
                assert message in fails(capsys, "--from", begun, *look), name
    with np.load(good) as saved:
        np.savez(path, **{name: x for name, x in saved.items() if name != "source"})
    assert "average/" in fails(capsys, "--from", path, "--sample", 2)  # whose weights are too short for a checkpoint's
    assert "name a run's folder, or a file that --export made" in fails(capsys, "--from", tmp_path / "gone", "--sample", 2)
    for place in (good, path, tmp_path / "gone", run / "log.csv"):
        assert "goes on with the training in a run's folder" in fails(capsys, "--resume", place)
    (bad / "checkpoint.npz").write_bytes(good.read_bytes())
    assert "it has no generator/" in fails(capsys, "--resume", bad, "--steps", 9)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert "a pipe or a device" in fails(capsys, "--from", tmp_path / "pipe", "--sample", 2)
        assert "no earlier export" in fails(capsys, "--from", run, "--export", tmp_path / "pipe")
    assert not {"new.npz", "runs"} & {*leftovers(tmp_path)}


GENERATORS = sorted((Path(transgan.__file__).parent / "trained").glob("*.npz"))


@pytest.mark.parametrize("path", GENERATORS, ids=[path.name for path in GENERATORS])
def test_a_generator_that_comes_with_the_program_makes_pictures(path, tmp_path, monkeypatch):
    """Of real size, without any data, and none twice the same."""

    def none(*_):
        raise AssertionError("it asks for the pictures that were learnt")

    monkeypatch.setattr(datasets, "load_pictures", none)
    monkeypatch.chdir(tmp_path)
    assert path.stat().st_size <= 2e6
    assert run_main("--from", path, "--sample", 64, "--interpolate", 2, "--attention") == 0
    made = {file.name.split("-")[0]: np.asarray(Image.open(file)) for file in Path("runs").glob("*-look/*.png")}
    assert {*made} == {"sample", "interpolate", "attention"}
    chosen = checkpoints.newest_checkpoint(path)[1]
    assert chosen.dataset in arguments.NAMES
    side, factor = chosen.image_size, max(1, 96 // chosen.image_size)
    grid = made["sample"][factor::factor, factor::factor][: 8 * (side + 1), : 8 * (side + 1)]
    tiles = grid.reshape(8, side + 1, 8, side + 1, 3).transpose(0, 2, 1, 3, 4)[:, :, :side, :side].reshape(64, -1)
    assert len(np.unique(tiles, axis=0)) == 64
    assert tiles.std(axis=1).min() > 8  # none of one colour
    assert tiles.std(axis=0).mean() > 16  # and none like the next


def test_a_checkpoint_that_is_refused_is_closed(tmp_path, monkeypatch):
    """So that it can be moved out of the way, also on Windows."""
    np.savez(tmp_path / "checkpoint.npz", a=np.ones(3))
    opened = []

    class Recorded(zipfile.ZipFile):
        def __init__(self, *args):
            opened.append(self)
            super().__init__(*args)

    monkeypatch.setattr(zipfile, "ZipFile", Recorded)
    with pytest.raises(UserError, match="it has no options"):
        checkpoints.newest_checkpoint(tmp_path / "checkpoint.npz")
    assert [file.fp for file in opened] == [None]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux which files are open")
def test_no_file_is_replaced_while_it_is_open(small, hasty, tmp_path, monkeypatch):
    """Windows would refuse to; here it is rehearsed."""
    replaced, wrong, replace = set(), [], os.replace

    def strict(source, target):
        opened = {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}
        wrong.extend(opened & {os.path.realpath(source), os.path.realpath(target)})
        replaced.add(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", strict)
    monkeypatch.setattr(Path, "replace", strict)
    out = tmp_path / "run"
    assert run_main(*TRAIN, "--out", out, "--save-every", 2) == 0
    (out / CHECKPOINTS[0]).write_bytes(b"damaged")
    assert run_main("--resume", out) == 0
    assert run_main("--from", out, "--sample", 2, "--interpolate", 2) == 0
    assert run_main("--evaluate", out, "--num-images", 20, "--data-dir", tmp_path) == 0
    assert wrong == []
    assert {*CHECKPOINTS, "checkpoint-damaged.npz", "log.csv", "step-000004.png", "report.html", "progress.gif",
            "scores.json"} <= replaced  # fmt: skip


def test_what_lies_in_a_folder_is_not_overwritten(small, tmp_path, capsys):
    for name in ("log.csv", "samples/step-000000.png", "samples/note.txt", "checkpoint.npz"):
        out = tmp_path / name.replace("/", "-")
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("precious")
        assert fails(capsys, *TRAIN, "--out", out).endswith(f"{out} holds {name} already; choose another --out\n")
        assert (out / name).read_text() == "precious"
    run, other = tmp_path / "run", tmp_path / "other"
    assert run_main(*TRAIN, "--out", run) == run_main(*TRAIN, "--out", other) == 0
    before = (other / "checkpoint.npz").read_bytes()
    assert "holds a run already" in fails(capsys, "--resume", run, "--out", other, "--steps", 6)
    assert holds(other / "checkpoint.npz", before)
    assert run_main("--resume", run, "--out", tmp_path / "branch", "--steps", 5) == 0
    assert [row["step"] for row in read_log(tmp_path / "branch")] == ["5"]


def test_resuming_keeps_the_log_and_its_clock(small, tmp_path, capsys):
    out = tmp_path / "run"
    assert run_main(*TRAIN, "--out", out) == 0
    lines = (out / "log.csv").read_text().splitlines()
    lines = [line + (",note" if line.startswith("step") else ",x") for line in lines]  # a column more than ours
    lines[-1] = lines[-1].rpartition(",")[0].rpartition(",")[0] + ",1000,x"
    (out / "log.csv").write_text("\n".join(lines) + "\n")
    assert run_main("--resume", out, "--steps", 6) == 0
    rows = read_log(out)
    assert [row["step"] for row in rows] == list("0123456")
    assert 1000 < float(rows[5]["seconds"]) < 1010
    assert leftovers(out)[:3] == [*sorted(CHECKPOINTS), "curves.png"]


@pytest.mark.parametrize("torn", [b"1", b"4", b"45,0.1", b"\0" * 100, b"\xff,1", b"6," + b"9" * 200_000])
def test_what_a_log_says_after_the_checkpoint_does_not_matter(torn, small, tmp_path):
    out = tmp_path / "run"
    assert run_main(*TRAIN, "--out", out) == 0
    with (out / "log.csv").open("ab") as file:
        file.write(torn)
    assert run_main("--resume", out, "--steps", 6) == 0
    assert [row["step"] for row in read_log(out)] == list("0123456")


@functools.cache
def saved_once():
    """A small run's checkpoint and log, after three of six steps, and the trainer."""
    trainer = small_trainer(1)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "samples").mkdir()
        run.train(trainer, Path(folder), 6, 3)
        previous = Path(folder, CHECKPOINTS[1])
        return previous.read_bytes(), Path(folder, "log.csv").read_bytes(), trainer


@fuzz(60)
@given(seed=seeds)
def test_a_fuzzed_checkpoint_only_ever_raises_our_own_error(seed, small, tmp_path):
    """Or it is as it was written, because every byte that matters is held against a checksum."""
    content, _, trainer = saved_once()
    path = tmp_path / CHECKPOINTS[0]
    path.write_bytes(content)
    checkpoints.load(trainer, path)
    expected = state_of(trainer)
    path.write_bytes(fuzzed(content, seed))
    with one_line_at_most():
        checkpoints.load(trainer, checkpoints.newest_checkpoint(tmp_path)[0])
        assert trainer.step == 3
    assert_same_state(state_of(trainer), expected)


@functools.cache
def exported_once():
    """The export of that checkpoint's generator."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, path = Path(folder, CHECKPOINTS[0]), Path(folder, "x.npz")
        checkpoint.write_bytes(saved_once()[0])
        checkpoints.export(checkpoints.load_sampler(saved_once()[2].options, checkpoint), path)
        return path.read_bytes()


@fuzz(60)
@given(seed=seeds)
def test_a_fuzzed_export_only_ever_raises_our_own_error(seed, small, tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(exported_once())
    expected = checkpoints.load_sampler(saved_once()[2].options, path).generator.parameters()
    path.write_bytes(fuzzed(exported_once(), seed))
    with one_line_at_most():
        sampler = checkpoints.load_sampler(checkpoints.newest_checkpoint(path)[1], path)
        assert sampler.options == saved_once()[2].options
        for name, weights in sampler.generator.parameters().items():
            np.testing.assert_array_equal(ag.to_numpy(weights), ag.to_numpy(expected[name]))


@fuzz(150)
@given(seed=seeds)
def test_a_fuzzed_log_only_ever_raises_our_own_error(seed, small, tmp_path):
    _, content, _ = saved_once()
    path = tmp_path / "log.csv"
    path.write_bytes(fuzzed(content, seed))
    with one_line_at_most():
        log = Log(path, 3, 6)
        log.add(4, {"disc_loss": 1.0}, 6)
        log.close()
        rows = read_log(tmp_path)
        assert rows[-1]["step"] == "4"
        assert all(int(row["step"]) <= 3 for row in rows[:-1])
        assert math.isfinite(float(rows[-1]["seconds"]))


def test_help_and_summary(capsys):
    assert run_main("--help") == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Options):
        assert f"--{field.name.replace('_', '-')} " in text
    assert run_main("--summary", "--dataset", "cifar10") == 0
    text = capsys.readouterr().out
    assert "18,639,531" in text
    assert "12,458,497" in text


def test_json_tells_a_run_to_programs(small, tmp_path, capsys):
    """An object a line: what the run is, the log's rows, where the picture is, and how it ended."""
    out = tmp_path / "run"
    assert run_main(*TRAIN, "--out", out, "--json", "--loss", "hinge", "--profile") == 0
    first, *steps, profile, picture, page, last = objects(capsys.readouterr().out)
    assert (first["event"], first["options"]["loss"], first["options"]["dataset"]) == ("start", "hinge", "shapes")
    assert (first["device"], first["out"], first["pictures"]) == (DEVICE, str(out), 40)
    assert [step.pop("event") for step in steps] == 5 * ["step"]
    for step, row in zip(steps, read_log(out), strict=True):
        assert {name: f"{x:.6g}" for name, x in step.items()} == {name: x for name, x in row.items() if x}
    assert {"attention", "linear"} <= {row["operation"] for row in profile["operations"]}
    assert picture == {"event": "picture", "path": str(out / "samples" / "step-000004.png")}
    assert page == {"event": "report", "path": str(out / "report.html")}
    assert last == {"event": "end", "exit_code": 0, "error": None}


def test_json_tells_what_else_is_printed(small, hasty, tmp_path, capsys):
    out = tmp_path / "run"
    assert run_main(*TRAIN, "--out", out, "--quiet") == 0
    assert run_main("--from", out, "--sample", 2, "--json") == 0
    picture, last = objects(capsys.readouterr().out)
    assert Image.open(picture["path"]).format == "PNG"
    assert run_main("--from", out, "--export", tmp_path / "x.npz", "--json") == 0
    assert objects(capsys.readouterr().out)[0] == {"event": "export", "path": str(tmp_path / "x.npz")}
    evaluate = ("--evaluate", tmp_path / "x.npz", "--num-images", 20, "--data-dir", tmp_path, "--json")
    assert run_main(*evaluate, "--out", tmp_path / "scores") == 0
    scores, last = objects(capsys.readouterr().out)
    assert scores == {"event": "scores"} | json.loads((tmp_path / "scores" / "scores.json").read_text())[0]
    assert run_main("--evaluate", out, "--num-images", 20, "--data-dir", tmp_path, "--json") == 0
    scores, last = objects(capsys.readouterr().out)
    assert scores == {"event": "scores"} | json.loads((out / "scores.json").read_text())[0]
    assert run_main("--summary", "--dataset", "cifar10", "--json") == 0
    summary, last = objects(capsys.readouterr().out)
    total = {row["network"]: row["parameters"] for row in summary["rows"] if row["stage"] == "total"}
    assert total == {"generator": 18_639_531, "discriminator": 12_458_497}
    assert last == {"event": "end", "exit_code": 0, "error": None}


def test_json_tells_how_a_run_ended(small, tmp_path, capsys, monkeypatch):
    out, train_step = tmp_path / "run", transgan.Trainer.train_step

    def stopped(self):
        signal.raise_signal(signal.SIGINT)
        return train_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(transgan.Trainer, "train_step", stopped)
        assert run_main(*TRAIN, "--out", out, "--json") == 130
    *_, stop, last = objects(capsys.readouterr().out)
    assert (stop["event"], stop["step"], stop["signal"]) == ("stopped", 1, signal.SIGINT)
    assert shlex.split(stop["resume"]) == [*shlex.split(program()), "--resume", str(out)]
    assert last == {"event": "end", "exit_code": 130, "error": None}
    monkeypatch.setattr(transgan.Trainer, "train_step", lambda self: train_step(self) | {"gen_loss": ag.xp.array(math.nan)})
    assert run_main("--resume", out, "--json") == 2
    printed = capsys.readouterr()
    *_, step, last = objects(printed.out)
    assert (step["step"], step["gen_loss"]) == (2, None)
    assert (last["event"], last["exit_code"]) == ("end", 2)
    assert printed.err == f"transgan: {last['error']}\n"


def test_quiet_says_nothing_but_errors(small, hasty, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    out = tmp_path / "run"
    assert run_main(*TRAIN, "--out", out, "--quiet") == 0
    assert run_main("--evaluate", out, "--num-images", 20, "--data-dir", tmp_path, "--quiet") == 0
    assert run_main("--from", out, "--sample", 2, "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert "is finished" in fails(capsys, "--resume", out, "--quiet")
    assert run_main(*TRAIN, "--out", tmp_path / "loud") == 0  # the next run speaks again
    assert "done: " in capsys.readouterr().out
    assert "do not go together" in fails(capsys, "--quiet", "--json")


@pytest.mark.parametrize("words", ["--steps -1", "--summary --evaluate x", "--resume x", "--summary"])
def test_where_standard_error_is_closed_nothing_goes_astray(words, tmp_path, monkeypatch, capsys):
    """To print on None is to print on standard output, among the objects of --json."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stderr", None)
    assert run_main(*words.split(), "--json") == (0 if words == "--summary" else 2)
    output.warn("a warning")
    output.note("a note")
    assert objects(capsys.readouterr().out)[-1]["event"] == "end"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_who_wants_no_escape_sequences_gets_none(name, value, small, tmp_path, capsys, monkeypatch):
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "")  # an empty one says nothing
    monkeypatch.setenv("TERM", "xterm")
    for plain in (False, True):
        if plain:
            monkeypatch.setenv(name, value)
        assert run_main(*TRAIN, "--out", tmp_path / str(plain)) == 0
        with output.Progress() as progress:
            progress("half of it")
        printed = capsys.readouterr()
        assert ("\033" not in printed.out, "\033" not in printed.err) == (plain, plain)
        assert re.search(r"step 4/4 .*\n", printed.out)


def test_a_path_from_the_tilde_on_is_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    (tmp_path / "my pictures").mkdir()
    args = main.make_parser().parse_args(["--out=~/x", "--data-dir=~", "--dataset=~/my pictures"])
    assert (args.out, args.data_dir) == (tmp_path / "x", tmp_path)
    assert args.dataset == str((tmp_path / "my pictures").resolve())
    assert arguments.folder("~nobody-of-that-name/x") == Path("~nobody-of-that-name/x")
    assert arguments.folder("x/~") == Path("x/~")


def test_every_command_that_is_printed_can_be_pasted(small, tmp_path, capsys, monkeypatch):
    """It names the interpreter, the program, and what no checkpoint knows of the command that began the run."""
    out, places = tmp_path / "it's a run", ["--data-dir", str(tmp_path / "my data"), "--threads", "2"]
    assert run_main(*TRAIN, "--out", out, *places) == 0
    begun = [*shlex.split(program()), "--resume", str(out), *places]
    assert Path(begun[0]).samefile(sys.executable)
    assert Path(begun[1]).samefile(transgan.__file__)

    def printed(line):
        return shlex.split(re.search(r": (\S*python.*)", line)[1])

    assert printed(fails(capsys, *TRAIN, "--out", out, *places)) == begun
    monkeypatch.chdir(tmp_path)
    assert Path(shlex.split(program())[1]) == Path(transgan.__file__)
    more = ("--resume", out, "--steps", 6, *places)
    for accident, change in (
        (MemoryError(), ["--accumulate", "2"]), (OSError(28, "No space left on device"), []), (BrokenPipeError(), []),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            at_step(5, lambda *_, accident=accident: (_ for _ in ()).throw(accident), patch)
            assert printed(fails(capsys, *more)) == [*shlex.split(program()), *begun[2:], *change]
    monkeypatch.setattr(transgan.Trainer, "train_step", lambda self: {"gen_loss": ag.xp.array(math.nan)})
    assert printed(fails(capsys, *more)) == [*shlex.split(program()), *begun[2:], "--on-nan", "rewind"]
    monkeypatch.setattr(transgan.Trainer, "train_step", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run_main(*more) == 130
    assert printed(capsys.readouterr().err) == [*shlex.split(program()), *begun[2:]]
    parser = main.make_parser()
    for more in ([], ["--plain"], ["--threads", "2", "--plain"]):
        made = commands(parsed(), out, parser.parse_args(more), parser)
        assert [shlex.split(command)[2:] for command in made] == [
            ["--out", str(out), *more], ["--resume", str(out), *more],
            ["--from", str(out), "--sample", "64", "--interpolate", "8", "--attention", "--nearest", "8", *more],
        ]  # fmt: skip


@pytest.mark.skipif(shutil.which("bash") is None, reason="asks a shell")
@pytest.mark.parametrize(
    "name", ["-dash", "~", "~root", "p\udcff", "a\nb", "it's \\ \x85", "\u00e9 \u00a0", "plain"], ids=ascii
)
@pytest.mark.parametrize("below", ["", "r"])
def test_folders_of_any_name_are_named_as_a_shell_reads_them(name, below):
    """In one line, and to the byte: what is pasted names the same folder."""
    parser = main.make_parser()
    args = parser.parse_args([f"--out=./{name}/{below}", f"--data-dir=./{name}"])
    for command in commands(parsed(), args.out, args, parser):
        words = f"printf '%s\\0' {command.partition('.py ')[2]}"
        assert words.isprintable()
        told = subprocess.run(["bash", "-c", words], capture_output=True, check=True).stdout
        again = parser.parse_args([os.fsdecode(word) for word in told.split(b"\0")[:-1]])
        assert (again.out or again.resume or again.begun, again.data_dir) == (args.out, args.data_dir)


def test_a_runs_folder_and_its_cache_are_named_so(tmp_path, monkeypatch):
    folder = tmp_path / "aux.1"
    folder.mkdir()
    (folder / "1.png").write_bytes(encoded(slope(20, 30, 1)))
    parsed = main.make_parser().parse_args(["--dataset", str(folder)])
    assert choose_options(parsed)[1] == Path("runs", "_aux.1-S")
    datasets.load_folder(folder, tmp_path / "data", 8)
    assert [path.name[:9] for path in (tmp_path / "data").iterdir()] == ["_aux.1-8-"]
    assert files.short_name("a:b") == "a_b"


def test_as_a_program():
    program = [sys.executable, str(Path(transgan.__file__))]
    done = subprocess.run([*program, "--size", "huge"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    done = subprocess.run([*program, "--summary"], capture_output=True, text=True, check=True)
    assert "16x16" in done.stdout


def test_packages_of_the_same_names_do_no_harm(tmp_path):
    """Ours are not installed: wherever the program is started it finds its own, and a package of theirs stays theirs."""
    for name in ("autograd", "data", "transgan", "fast", "store", "paper", "look", "program"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("theirs = True\n")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    program = [sys.executable, str(Path(transgan.__file__)), "--summary"]
    assert subprocess.run(program, capture_output=True, cwd=tmp_path, env=env).returncode == 0
    theirs = [sys.executable, "-c", "import autograd, data, look, paper; assert autograd.theirs and data.theirs"]
    assert subprocess.run(theirs, capture_output=True, cwd=tmp_path, env=env).returncode == 0
    project = (Path(transgan.__file__).parent / "pyproject.toml").read_text()
    assert "py-modules = []\n" in project
    assert f'version = "{VERSION}"\n' in project


@pytest.mark.skipif(os.name != "posix", reason="about a POSIX shell")
@pytest.mark.parametrize("shell", ['exec "$@" --out "$0/caf\xe9" >"$0/out"', 'exec "$@" --out "$0/run" >&-',
                                   'exec "$@" --out "$0/run" 2>&-'])  # fmt: skip
def test_as_a_program_in_odd_surroundings(shell, tmp_path):
    """A name that the terminal cannot show, and an output that is closed, are no reason to stop."""
    program = [sys.executable, str(Path(transgan.__file__)), "--image-size", "8", "--steps", "1",
               "--batch-size", "2", "--gen-batch-size", "2", "--device", "cpu"]  # fmt: skip
    command = ["sh", "-c", shell.encode("latin-1"), str(tmp_path), *program]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
