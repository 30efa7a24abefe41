"""The promises of look/: what is drawn is what was logged and learnt, whole, in time, and never at the run's expense."""

import base64
import csv
import html.parser
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import test_transgan as base

import numpy as np  # isort: skip
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

import autograd as ag
import data
import transgan
from autograd import Tensor
from look import architecture, drawing, pictures, plot, report
from program import VERSION, checkpoints, options, support
from program.log import FIELDS
from program.support import fails, run_main
from store import datasets, output
from store.support import encoded, holds, leftovers, slope

# --- 1. Setting up ----------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run of four steps, a grid at each, with everything that a report can show."""
    out = tmp_path_factory.mktemp("runs") / "a <run> & more"
    with pytest.MonkeyPatch.context() as patch:
        support.make_small(patch)
        patch.setattr(report.Report, "SHARE", 1e9)
        assert run_main(*support.TRAIN, "--image-size", 16, "--sr-weight", 1, "--sample-every", 1, "--out", out) == 0
    return out


@pytest.fixture
def texts(monkeypatch):
    """All that is written on sheets during a test."""
    written, text = [], drawing.Sheet.text

    def write(self, x, y, words, *rest):
        written.append(words)
        text(self, x, y, words, *rest)

    monkeypatch.setattr(drawing.Sheet, "text", write)
    return written


def trainer_of(run, side=16):
    """A trainer of the run's options, with its checkpoint's weights."""
    path, options = checkpoints.newest_checkpoint(run)
    trainer = support.make_trainer(options, data.draw_shapes(40, side), 1)
    checkpoints.load(trainer, path)
    return trainer


def write_log(path, rows):
    """A log.csv of rows {column: text or number}."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


class Page(html.parser.HTMLParser):
    """The text, the tags and the attributes of a page; it must close what it opens."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text.append(text)


# --- 2. The report ----------------------------------------------------------------------------------------------------


def test_the_page_holds_all_that_it_shows(run):
    content = (run / "report.html").read_text("utf-8")
    page = Page(content)
    text, images = " ".join(page.text), [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    shown = ["progress.gif", "samples/step-000004.png", "curves.png", "samples/restored-000004.png"]
    kinds = {"gif": b"GIF89a", "png": b"\x89PNG"}
    for name, image in zip(shown, images, strict=True):
        kind, _, coded = image.removeprefix("data:image/").partition(";base64,")
        assert kind == name[-3:]
        assert base64.b64decode(coded) == (run / name).read_bytes()
        assert (run / name).read_bytes().startswith(kinds[kind])
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        assert all(not value.startswith(("http", "//", "file")) for value in attributes.values() if value)
        assert tag == "img" or not {"src", "href", "srcset"} & attributes.keys()
    assert "url(" not in content
    assert "@import" not in content
    assert "prefers-color-scheme: dark" in content
    for name, value in vars(checkpoints.newest_checkpoint(run)[1]).items():
        assert re.search(rf"<dt>{name.replace('_', ' ')}</dt><dd>{re.escape(str(value))}</dd>", content)
    last = support.read_log(run)[-1]
    assert "Step 4 of 4, finished" in text
    assert f"<dd>{float(last['distance']):.3f}</dd>" in content
    assert f"<dt>elapsed</dt><dd>{output.clock(float(last['seconds']))}</dd>" in content
    made = f"{options.program()} --steps 4 --batch-size 4 --gen-batch-size 4 --sr-weight 1.0 --out '{run}'"
    assert made in text
    assert re.search(rf"{options.program()} --resume '{run}'.* --steps 8", text)


@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium")
def test_a_browser_shows_the_page(run, tmp_path):
    """Every picture is decoded, nothing is wider than a phone, and dark mode is dark."""
    asks = "<script>document.title = [...document.images].every(i => i.naturalWidth > 100) + ' ' + "
    asks += "(document.documentElement.scrollWidth - innerWidth)</script></body>"
    page = (run / "report.html").read_text("utf-8")
    (tmp_path / "page.html").write_text(page.replace("</body>", asks), "utf-8")
    for scheme, width, *dump in ((1, 500), (0, 1100), (1, 500, "--dump-dom")):
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                   "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
                   f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}",
                   f"--window-size={width},1500", *(dump or [f"--screenshot={tmp_path / f'{scheme}.png'}"]),
                   (tmp_path / "page.html").as_uri()]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert re.search(r"<title>true 0</title>", done.stdout)
    for scheme, least, most in ((0, 0, 40), (1, 235, 255)):
        corner = np.asarray(Image.open(tmp_path / f"{scheme}.png").convert("L"))[-100:, :8]
        assert least <= corner.min() <= corner.max() <= most


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["--steps", "7"], ["--size", "S", "--seed", "3"], ["--dataset", "cifar10"], ["--preset", "celeba-XL"],
        ["--preset", "cifar10-L", "--sr-weight", "0", "--locality", "none"], ["--image-size", "24", "--patch-size", "3"],
        ["--dataset", "cifar10", "--generator", "autogan", "--discriminator", "autogan"],
        ["--generator", "resnet", "--loss", "hinge", "--beta2", "0.5"], ["--dataset", ".", "--size", "tiny"],
    ],
)  # fmt: skip
def test_the_command_of_a_run_makes_that_run(arguments):
    chosen = support.parsed(*arguments)
    words = shlex.split(options.command(chosen))
    assert words[:2] == shlex.split(options.program())
    assert support.parsed(*words[2:]) == chosen
    for i in range(2, len(words), 2):  # and each of its options is needed
        try:
            assert support.parsed(*words[2:i], *words[i + 2 :]) != chosen
        except data.UserError as error:
            assert "does not divide" in str(error)


def test_the_shortest_command_says_what_differs():
    assert options.command(support.parsed("--steps", 7)) == f"{options.program()} --steps 7"


def colour_rows(path, colour, left, right, near=30):
    """The rows of a figure, between two shares of the panel's width, that hold this colour in the first panel."""
    figure = np.asarray(Image.open(path).convert("RGB")).astype(int)
    wide = plot.WIDTH - plot.LEFT - plot.RIGHT
    part = figure[36:172, plot.LEFT + int(left * wide) : plot.LEFT + int(right * wide)]
    return 36 + np.flatnonzero((np.abs(part - colour).max(axis=-1) < near).any(axis=1))


@pytest.mark.parametrize("strange", [{}, {7: "nan", 60: "inf"}, {9: "1e30", 70: "-1e35"}, {9: ""},
                                     {9: "abc", 70: "\0"}, {9: "\xff"}])  # fmt: skip
def test_curves_rise_where_the_log_does_and_bear_strange_numbers(strange, tmp_path):
    """100 steps at a loss of 0, then 100 at 10: the line is low, then high, whatever single numbers do."""
    rows = [{"step": i, "disc_loss": strange.get(i, 10 * (i > 100)), "gen_loss": 5, "seconds": i} for i in range(1, 201)]
    write_log(tmp_path / "log.csv", rows)
    (tmp_path / "log.csv").write_bytes((tmp_path / "log.csv").read_text("utf-8").encode("latin-1"))
    log = report.read_log(tmp_path / "log.csv")
    assert all(np.isfinite(values).all() for values in log.values())
    report.curves(log, tmp_path / "curves.png")
    quiet = [(0.1, 0.28), (0.4, 0.45)]  # where no strange number is
    low, high = (colour_rows(tmp_path / "curves.png", report.BLUE, *part) for part in (quiet[1], (0.55, 0.9)))
    constant = colour_rows(tmp_path / "curves.png", report.RED, *quiet[0])
    assert len(low) < 6
    assert len(high) < 6
    assert high.mean() + 50 < constant.mean() < low.mean() - 50


def test_a_curve_of_many_numbers_is_averaged():
    steps, values, spread = plot.averaged(np.arange(1250.0), np.arange(1250.0) % 10)
    np.testing.assert_allclose(steps, 10 * np.arange(plot.POINTS) + 4.5)
    np.testing.assert_allclose(values, 4.5)
    np.testing.assert_allclose(spread, [(0.9, 8.1)] * plot.POINTS)  # a tenth of 0 to 9 from either end


def test_few_numbers_are_dots_and_many_have_a_band(tmp_path):
    few = {"disc_loss": np.array([[0, 5, 10], [1, 1, 1.0]])}
    report.curves(few, tmp_path / "few.png")
    dot, line = (colour_rows(tmp_path / "few.png", report.BLUE, *part) for part in ((0.49, 0.51), (0.2, 0.3)))
    assert 2 * len(line) < len(dot) <= 8
    many = {"disc_loss": np.array([np.arange(2000), np.arange(2000) % 8])}
    report.curves(many, tmp_path / "many.png")
    line = colour_rows(tmp_path / "many.png", report.BLUE, 0.1, 0.9)
    band = colour_rows(tmp_path / "many.png", (204, 225, 239), 0.1, 0.9, near=10)
    assert len(line) < 12
    assert len(band) > 8 * len(line)
    assert 37 < band[0] < band[-1] < 171  # the axis, from 34 to 174, has room for it


def test_a_log_without_numbers_draws_nothing(tmp_path):
    write_log(tmp_path / "log.csv", [{"step": 0, "seconds": 0}])
    report.curves(report.read_log(tmp_path / "log.csv"), tmp_path / "curves.png")
    assert leftovers(tmp_path) == ["log.csv"]


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-3, 1e7), most=st.integers(3, 8))
@example(low=0.0, span=1.0, most=5)
def test_ticks_are_few_round_and_inside(low, span, most):
    found = plot.ticks(low, low + span, most)
    assert 1 <= len(found) <= most + 1
    gaps = np.diff(found)
    if len(found) > 1:
        assert found[0] >= low - 1e-6 * span
        assert found[-1] <= low + span * (1 + 1e-6)
        assert re.match(r"[125]\.0+e", f"{gaps[0]:.3e}")
        np.testing.assert_allclose(gaps, gaps[0], rtol=1e-4)


def test_limits_hold_all_but_what_is_far_out():
    values = np.linspace(-3, 5, 50)
    low, high = plot.limits(values)
    assert low < -3 < 5 < high
    assert (low, high) == (pytest.approx(-3.48), pytest.approx(5.48))
    assert plot.limits(np.append(values, [1e12, -1e30])) == (low, high)
    for far in (3 + 7 * 4, 3 + 9 * 4, -1 - 7 * 4, -1 - 9 * 4):  # the middle half goes from -1 to 3, a fence 8 times that
        low, high = plot.limits(np.append(values, far))
        assert (low < far < high) == (abs(far - 1) < 34)
    for same in (0.0, 7.0, -7.0):
        low, high = plot.limits(np.full(9, same))
        assert low < same < high


def test_progress_shows_the_same_pictures_over_time(tmp_path, monkeypatch):
    """Of many grids so many frames, first and last among them, the last held longest, each with its own colours."""
    (tmp_path / "samples").mkdir()
    monkeypatch.setattr(report, "FRAMES", 11)
    for i in range(41):
        grid = np.full((64, 3, 16, 16), -1.0)
        grid[0, 0], grid[1, 1], grid[63] = i / 20 - 1, 1 - i / 20, 1.0
        data.save_grid(grid, tmp_path / "samples" / f"step-{i:06d}.png")
    report.progress(tmp_path / "samples", 16, tmp_path / "progress.gif")
    image, durations, captions = Image.open(tmp_path / "progress.gif"), [], []
    assert image.n_frames == 11
    assert image.info["loop"] == 0
    for frame in range(11):
        image.seek(frame)
        durations.append(image.info["duration"])
        pixels = np.asarray(image.convert("RGB")).astype(int)
        factor = 300 // 69
        assert pixels.shape == (69 * factor + drawing.CAPTION, 69 * factor, 3)
        np.testing.assert_allclose(pixels[8 * factor, 8 * factor], (25.5 * frame, 0, 0), atol=8)
        np.testing.assert_allclose(pixels[8 * factor, 25 * factor], (0, 255 - 25.5 * frame, 0), atol=8)
        captions.append(pixels[-drawing.CAPTION :])
        assert np.ptp(captions[-1], axis=-1).max() == 0  # grey
        assert captions[-1].min() < 40 < 200 < captions[-1].max()
    assert durations[-1] > 4 * durations[0]
    assert len(np.unique(captions, axis=0)) == 11


@pytest.mark.parametrize("step", [0, 1, 3])
@pytest.mark.parametrize("damage", ["text", "folder", "pipe", "smaller", "larger"])
def test_a_grid_that_is_damaged_is_passed_over(damage, step, tmp_path):
    """Of an animation's; and a run's page is drawn, for which the newest grid is read again."""
    for i in range(4):
        data.save_grid(np.zeros((64, 3, 16, 16)), tmp_path / f"step-{i:06d}.png")
    bad = tmp_path / f"step-{step:06d}.png"
    bad.unlink()
    if damage == "pipe":
        getattr(os, "mkfifo", Path.touch)(bad)
    elif damage == "folder":
        bad.mkdir()
    elif damage == "text":
        bad.write_text("no picture")
    else:
        Image.new("RGB", (90, 90) if damage == "smaller" else (2000, 1000)).save(bad)
    report.progress(tmp_path, 16, tmp_path / "progress.gif")
    with Image.open(tmp_path / "progress.gif") as image:
        assert image.n_frames == 3
    assert (bad in report.by_step(tmp_path, "step")) == (damage not in ("pipe", "folder") or bad.is_file())
    assert report.embedded(report.by_step(tmp_path, "step")[-1], "the newest")


@pytest.mark.parametrize("side", [8, 32, 128])
def test_pictures_of_every_size_make_a_small_animation(side, tmp_path):
    """Of noise, which compresses worst."""
    for i in range(70):
        grid = tmp_path / f"step-{i:06d}.png"
        if i < 3:
            data.save_grid(np.random.default_rng(i).uniform(-1, 1, (64, 3, side, side)), grid)
        else:
            shutil.copy(tmp_path / f"step-{i % 3:06d}.png", grid)
    report.progress(tmp_path, side, tmp_path / "progress.gif")
    with Image.open(tmp_path / "progress.gif") as image:
        assert 200 <= image.width <= 310
        assert 5 < image.n_frames <= report.FRAMES
    assert (tmp_path / "progress.gif").stat().st_size < 1.3e6


# --- 3. The report and the run ----------------------------------------------------------------------------------------


def test_a_drawing_that_fails_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    done, save, update = [], checkpoints.save, report.Report.update
    monkeypatch.setattr(report, "curves", full)
    monkeypatch.setattr(
        checkpoints, "save", lambda trainer, *rest: done.append(("save", trainer.step)) or save(trainer, *rest)
    )
    monkeypatch.setattr(
        report.Report, "update", lambda self, **how: done.append(("draw", self.trainer.step)) or update(self, **how)
    )
    out = tmp_path / "run"
    assert run_main(*support.TRAIN, "--out", out, "--sample-every", 2, "--save-every", 2) == 0
    message = r"transgan: .*report.html could not be drawn: .*No space left.*; the run goes on\n"
    said = capsys.readouterr().err
    assert re.match(message, said)
    assert said.count("could not be drawn") == said.count("; the run goes on") + 1  # but for the last
    assert done == [(kind, step) for step in (0, 2, 4) for kind in ("save", "draw")]  # the checkpoint is safe by then
    assert [row["step"] for row in support.read_log(out)] == list("01234")
    assert "report.html" not in leftovers(out)


def test_a_folder_whose_name_is_no_text_has_a_report(tmp_path):
    out = tmp_path / os.fsdecode(b"\xff\x80")
    assert run_main(*support.TRAIN, "--steps", 1, "--out", out) == 0
    assert r"\xff\x80" in (out / "report.html").read_text("utf-8")


def drawn_after(share, out):
    """The steps of a run after which its report was drawn, of `share` of the time; the log has them all by then."""
    steps, page = [], report.page

    def draw(trainer, out, log, *words):
        assert log["seconds"][0, -1] == trainer.step
        steps.append(trainer.step)
        return page(trainer, out, log, *words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report.Report, "SHARE", share)
        patch.setattr(report, "page", draw)
        assert run_main(*support.TRAIN, "--out", out, "--sample-every", 1) == 0
    return steps


@pytest.mark.parametrize(("share", "drawn"), [(1e9, [0, 1, 2, 3, 4]), (1e-9, [0, 4])])
def test_drawing_takes_no_more_than_its_share_of_the_time(share, drawn, tmp_path):
    assert drawn_after(share, tmp_path / "run") == drawn


@base.on_cpu
def test_on_a_gpu_the_report_has_the_step_that_is_still_at_work(rehearsed_gpu, tmp_path):
    assert drawn_after(1e9, tmp_path / "run") == [0, 1, 2, 3, 4]


def test_a_report_while_the_run_goes_on(run):
    """What is left follows from the last steps' pace; names of files are no tags."""
    trainer, log = trainer_of(run), report.read_log(run / "log.csv")
    trainer.step, log["seconds"] = 1, np.array([[0, 1], [10, 14.5]])
    trainer.options.dataset = "/of/<i>many</i>&amp;"
    content = report.page(trainer, run, log, ("begin", "go on", "look"))
    page = Page(content)
    assert "Step 1 of 4, training" in content
    assert "<dt>left</dt><dd>0:00:13</dd>" in content
    assert "width: 25.00%" in content
    assert "--steps 8" not in content
    assert page.text.count("/of/<i>many</i>&amp;") == 1
    assert "i" not in {tag for tag, _ in page.tags}


# --- 4. Walks ---------------------------------------------------------------------------------------------------------


@given(a=arrays(float, 5, elements=st.floats(-3, 3)), b=arrays(float, 5, elements=st.floats(-3, 3)))
@example(a=np.eye(5)[0], b=np.eye(5)[0] * 2)
def test_slerp_turns_evenly_and_keeps_the_length(a, b):
    if np.linalg.norm(a) < 0.1 or np.linalg.norm(b) < 0.1:
        return
    t = np.linspace(0, 1, 5)
    points = pictures.slerp(a, b, t)
    np.testing.assert_allclose(points[[0, -1]], [a, b], atol=1e-7)
    unit = [x / np.linalg.norm(x) for x in (a, *points[1:-1], b)]
    if abs(unit[0] @ unit[-1]) < 0.999:
        np.testing.assert_allclose(np.linalg.norm(points, axis=1), np.linspace(np.linalg.norm(a), np.linalg.norm(b), 5))
        angles = [math.acos(np.clip(x @ y, -1, 1)) for x, y in zip(unit, unit[1:], strict=False)]
        np.testing.assert_allclose(angles, math.acos(np.clip(unit[0] @ unit[-1], -1, 1)) / 4, atol=1e-6)


def test_a_walk_visits_its_points_and_comes_back(run, tmp_path):
    trainer = trainer_of(run)
    points = trainer.noise(3, np.random.default_rng(0))
    pictures.interpolate(trainer, points, tmp_path / "walk.png")
    at_points = data.to_bytes(trainer.sample(points)).transpose(0, 2, 3, 1)
    strip = np.asarray(Image.open(tmp_path / "walk.png"))
    rows, columns = 3, pictures.STRIP + 1
    assert strip.shape == ((rows * 17 + 1) * 6, (columns * 17 + 1) * 6, 3)
    for row in range(rows):
        for column, point in ((0, row), (columns - 1, (row + 1) % rows)):
            top, left = 6 * (1 + 17 * row), 6 * (1 + 17 * column)
            shown = strip[top : top + 96 : 6, left : left + 96 : 6].astype(int)
            assert np.abs(shown - at_points[point]).max() <= 1
    with Image.open(tmp_path / "walk.gif") as image:
        assert image.n_frames == rows * pictures.BETWEEN
        assert image.size == (256, 256)


# --- 5. Attention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_probabilities_are_those_that_attention_weighs_by(masked):
    rng = np.random.default_rng(0)
    qkv = Tensor(3 * rng.standard_normal((2, 9, 3 * 8)))
    mask = ag.xp.asarray(transgan.window_mask(3, 1)) if masked else None
    p = ag.to_numpy(pictures.attention_probabilities(qkv, 4, mask, slice(None)))
    assert p.shape == (2, 4, 9, 9)
    np.testing.assert_allclose(p.sum(axis=-1), 1)
    v = ag.to_numpy(qkv).reshape(2, 9, 3, 4, 2)[:, :, 2].transpose(0, 2, 1, 3)  # (B, H, N, D)
    out = (p @ v).transpose(0, 2, 1, 3).reshape(2, 9, 8)
    np.testing.assert_allclose(out, ag.to_numpy(ag.attention(qkv, 4, mask)))
    assert masked == bool((p == 0).any())
    two = pictures.attention_probabilities(qkv, 4, mask, slice(0, 8, 7))
    np.testing.assert_allclose(ag.to_numpy(two), p[:, :, [0, 7]])


def test_the_views_are_of_the_tokens_that_look(run):
    """Held against the probabilities computed by hand, from the inputs of a block of each network."""
    trainer = trainer_of(run)
    noise, query = trainer.noise(1, np.random.default_rng(0)), (5, 14)
    call = transgan.Attention.__call__
    picture, found = pictures.views(trainer, noise, query)
    assert transgan.Attention.__call__ is call  # as it was
    np.testing.assert_array_equal(picture, trainer.sample(noise)[0])
    assert [[maps.shape for maps in views] for views in found.values()] == [
        [(4, 4, 4)] * 2, [(4, 4, 4)] * 2, [(4, 4, 4), (4, 8, 8), (4, 16, 16)]
    ]  # fmt: skip

    network = trainer.discriminator
    with ag.no_grad():
        patches = picture.reshape(3, 4, 4, 4, 4).transpose(1, 3, 0, 2, 4).reshape(1, 16, 48)
        x = ag.concatenate([network.cls, network.embed(Tensor(patches))], axis=1) + network.position
        block = network.blocks[0]
        p = ag.to_numpy(pictures.attention_probabilities(block.attention.qkv(block.norm1(x)), 4, None, slice(None)))[0]
    for who, token in (("the [cls] token", 0), ("the token of pixel 5, 14", 1 + 4 * (5 // 4) + 14 // 4)):
        np.testing.assert_allclose(found["discriminator", who][0].reshape(4, 16), p[:, token, 1:], rtol=1e-4)

    generator, average = trainer.generator, trainer.average
    for name, weights in generator.parameters().items():
        weights.data = average[name]
    with ag.no_grad():
        x = generator.project(Tensor(noise.astype(np.float32))).reshape(1, 16, -1) + generator.stages[0].position
        block = generator.stages[0].blocks[0]
        p = ag.to_numpy(pictures.attention_probabilities(block.attention.qkv(block.norm1(x)), 4, None, slice(None)))[0]
    maps = found["generator", "the token of pixel 5, 14"][0]
    np.testing.assert_allclose(maps.reshape(4, 16), p[:, 4 * (5 // 4) + 14 // 4], rtol=1e-4)


@given(grid=st.sampled_from([1, 2, 4, 8, 16]), row=st.integers(0, 15), column=st.integers(0, 15))
def test_a_token_holds_its_pixels(grid, row, column):
    numbers = np.arange(grid * grid).reshape(grid, grid).repeat(16 // grid, 0).repeat(16 // grid, 1)
    assert pictures.token_at((row, column), 16, grid) == numbers[row, column]


def test_an_overlay_is_brightest_where_the_weight_is_largest():
    weights = np.arange(16.0).reshape(4, 4)[::-1]
    light = pictures.overlay(np.full((16, 16, 3), 100, np.uint8), weights).sum(axis=-1, dtype=int)
    assert light.shape == (16, 16)
    means = light.reshape(4, 4, 4, 4).mean(axis=(1, 3))
    np.testing.assert_array_equal(np.argsort(means.ravel()), np.argsort(weights.ravel()))
    black = pictures.overlay(np.zeros((16, 16, 3), np.uint8), np.zeros((4, 4)))
    assert black.max() < 10


# --- 6. Nearest neighbours --------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000), count=st.integers(1, 7), block=st.sampled_from([1, 100, 1 << 22]))
def test_the_nearest_pictures_are_the_nearest(seed, count, block):
    rng = np.random.default_rng(seed)
    known, asked = (rng.integers(0, 256, (n, 3, 4, 4), dtype=np.uint8) for n in (6, 3))
    asked[1], asked[2] = known[4], known[2, :, :, ::-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "BLOCK", block)
        which, mirrored, distances = pictures.nearest_pictures(asked, known, count)
    assert which.shape == (3, min(count, 6))
    assert (which[1:, 0].tolist(), mirrored[1:, 0].tolist(), distances[1:, 0].tolist()) == ([4, 2], [False, True], [0, 0])
    both = np.stack([known, known[..., ::-1]]).astype(float)
    true = np.sqrt(((both[:, None] - asked[:, None].astype(float)) ** 2).mean(axis=(3, 4, 5)))  # (2, 3, 6)
    np.testing.assert_allclose(distances, np.sort(true.min(axis=0), axis=1)[:, :count], atol=1e-6)
    rows = np.arange(3)[:, None]
    np.testing.assert_allclose(true[mirrored.astype(int), rows, which], distances, atol=1e-6)


def test_many_pictures_are_compared_in_little_memory(monkeypatch):
    known = np.random.default_rng(0).integers(0, 256, (4000, 3, 16, 16), dtype=np.uint8)
    monkeypatch.setattr(pictures, "BLOCK", 1 << 18)  # 2 MB; all at once in float64 would be 25
    tracemalloc.start()
    which, _, _ = pictures.nearest_pictures(known[[7, 3999]], known, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert which[:, 0].tolist() == [7, 3999]
    assert peak < 8e6


def test_the_figure_shows_the_neighbours(run, texts, tmp_path):
    """The second sample is planted, mirrored, among the training pictures: it lies beside itself, at a distance of 0."""
    trainer = trainer_of(run)
    noise = trainer.noise(3, np.random.default_rng(0))
    known = data.draw_shapes(40, 16)
    known[17] = data.to_bytes(trainer.sample(noise))[1, :, :, ::-1]
    pictures.nearest(trainer, noise, known, 0, tmp_path / "nearest.png")
    figure = np.asarray(Image.open(tmp_path / "nearest.png"))
    row, left = 32 + 64 + 24, 16 + drawing.GUTTER
    np.testing.assert_array_equal(figure[row : row + 64, left : left + 64], figure[row : row + 64, left + 72 : left + 136])
    assert texts.count("0.0 m") == 1
    distances = [float(words.split()[0]) for words in texts if re.fullmatch(r"\d+\.\d( m)?", words)]
    assert len(distances) == 3 * pictures.NEIGHBOURS
    middle = sorted(distances[:: pictures.NEIGHBOURS])[1]
    apart = sorted(pictures.nearest_pictures(known, known, 2)[2][:, 1])[19:21]  # the middle two of 40
    assert f"samples {middle:.1f}, training pictures among themselves {np.mean(apart):.1f}" in texts[-1]


# --- 7. Command line --------------------------------------------------------------------------------------------------


def test_pictures_of_a_run(run, tmp_path, capsys):
    """All four kinds at once, into the run's folder; the same seed gives the same, another one others."""
    asked = ["--sample", 5, "--interpolate", 2, "--attention", "--query", "3,15", "--nearest", 2]
    before = (run / "report.html").read_bytes()
    capsys.readouterr()
    assert run_main("--from", run, *asked) == 0
    printed = capsys.readouterr().out.splitlines()
    kinds = ("sample", "interpolate", "attention", "nearest")
    shown = ("sample.png", "interpolate.gif", "interpolate.png", "attention.png", "nearest.png")
    assert printed == [str(run / "look" / name.replace(".", "-000004-seed0.")) for name in shown]
    assert sorted(p.stem.split("-")[0] for p in (run / "look").iterdir()) == sorted([*kinds, "interpolate"])
    for seed, same in ((0, True), (1, False)):
        out = tmp_path / str(seed)
        assert run_main("--from", run, *asked, "--seed", seed, "--out", out) == 0
        for path in (run / "look").iterdir():
            assert holds(out / path.name.replace("seed0", f"seed{seed}"), path.read_bytes()) == same
    assert (run / "report.html").read_bytes() == before
    grid = np.asarray(Image.open(run / "look" / "sample-000004-seed0.png"))
    assert grid.shape == ((2 * 17 + 1) * 6, (3 * 17 + 1) * 6, 3)
    trainer = trainer_of(run)
    first = data.to_bytes(trainer.sample(trainer.noise(5, data.random_stream("look", 0))))[0].transpose(1, 2, 0)
    assert np.abs(grid[6:102:6, 6:102:6].astype(int) - first).max() <= 1


PEERS = [[], ["--generator", "resnet", "--discriminator", "resnet"],
         ["--generator", "autogan", "--discriminator", "autogan"]]  # fmt: skip


@pytest.mark.parametrize("pair", PEERS)
def test_looking_needs_a_checkpoint_alone(pair, tmp_path, monkeypatch, capsys):
    """Not the pictures that were learnt, nor as many as a batch; what is made is what the run itself would make."""
    out, asked = tmp_path / "run", ["--sample", 5, "--interpolate", 2, *([] if pair else ["--attention"])]
    locality = [] if pair else ["--locality", "2:1600"]  # a window, until its last step
    assert run_main(*support.TRAIN, "--steps", 2, *pair, *locality, "--out", out) == 0
    trainer = trainer_of(out, 8)
    trainer.options.steps = 9
    trainer.set_window()
    noise = trainer.noise(70, np.random.default_rng(0))
    sampler = checkpoints.load_sampler(trainer.options, out / "checkpoint.npz")
    assert (trainer.half_width is None) == bool(pair)
    np.testing.assert_allclose(sampler.sample(noise), trainer.sample(noise), atol=1e-5)  # a GPU may add up otherwise

    def gone(*_):
        raise data.UserError("there is no folder; say where the pictures are")

    monkeypatch.setattr(datasets, "load_pictures", gone)
    assert run_main("--from", out, *asked) == 0
    kinds = {path.name.split("-")[0] for path in (out / "look").iterdir()}
    assert kinds == {"sample", "interpolate", *([] if pair else ["attention"])}
    shutil.rmtree(out / "look")
    message = fails(capsys, "--from", out, *asked, "--nearest", 2)
    assert "--nearest looks among the training pictures: there is no folder" in message
    assert leftovers(out / "look") == []  # said before anything is made


@pytest.mark.parametrize("pair", PEERS)
def test_an_export_is_the_generator_to_half_precision(pair, tmp_path):
    """And nothing but that: as it came out of the run, and with weights large and small; exported again, it is the same."""
    out, path = tmp_path / "run", tmp_path / "new" / "alone.npz"
    assert run_main(*support.TRAIN, "--steps", 2, *pair, "--out", out) == 0
    checkpoint, chosen = checkpoints.newest_checkpoint(out)
    sampler = checkpoints.load_sampler(chosen, checkpoint)
    noise = sampler.noise(70, np.random.default_rng(0))
    made = data.to_bytes(sampler.sample(noise)).astype(int)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        for weights in sampler.generator.parameters().values() if seed else ():
            weights.data[...] = ag.xp.asarray(rng.standard_normal(weights.shape) * 10 ** rng.uniform(-8, 4))
        checkpoints.export(sampler, path)
        assert checkpoints.newest_checkpoint(path) == (path, chosen)
        alone = checkpoints.load_sampler(chosen, path)
        assert (alone.step, alone.discriminator) == (2, None)
        for name, weights in alone.generator.parameters().items():
            own = ag.to_numpy(sampler.generator.parameters()[name])
            np.testing.assert_array_equal(ag.to_numpy(weights), own.astype(np.float16).astype(np.float32))
        if not seed:
            assert np.abs(data.to_bytes(alone.sample(noise)) - made).max() <= 2
    assert leftovers(path.parent) == ["alone.npz"]
    checkpoints.export(alone, tmp_path / "again.npz")
    assert support.same_arrays(path, tmp_path / "again.npz")
    size = sum(2 * weights.size for weights in alone.generator.parameters().values())
    assert path.stat().st_size < size + 400 * len(alone.generator.parameters()) + 8000


def test_an_export_is_looked_at_as_its_run_is(tmp_path, monkeypatch, capsys):
    """Without the run, in another folder; it does not tell where the pictures lay that it learnt from."""
    folder, out, path = tmp_path / "secret place" / "my birds", tmp_path / "run", tmp_path / "kept" / "birds.npz"
    folder.mkdir(parents=True)
    for i in range(9):
        (folder / f"{i}.png").write_bytes(encoded(slope(20, 30, i % 6)))
    learn = ("--dataset", folder, "--data-dir", tmp_path / "data", "--size", "tiny", "--diff-aug", "none")
    assert run_main(*support.TRAIN, *learn, "--out", out) == 0
    capsys.readouterr()
    assert run_main("--from", out, "--export", path) == 0
    assert capsys.readouterr() == (f"{path}\n", "")
    assert leftovers(out.parent / "kept") == ["birds.npz"]
    content = path.read_bytes()
    assert not any(place.encode() in content for place in ("secret", str(tmp_path), os.path.dirname(sys.executable)))
    with np.load(path) as saved:
        source = json.loads(str(saved["source"]))
    assert source.pop("program") == f"transgan-from-scratch {VERSION}"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", source.pop("exported"))
    monkeypatch.chdir(folder.parent)
    chosen = support.parsed(*shlex.split(source.pop("command"))[2:])
    assert source == {"step": 4, "dataset": "./my birds"}
    assert chosen == checkpoints.newest_checkpoint(out)[1]

    near = ("--from", out, "--nearest", 2, "--data-dir", tmp_path / "data")
    assert run_main(*near) == 0
    assert "not those" not in capsys.readouterr().err
    (folder / "10.png").write_bytes(encoded(slope(20, 30)))
    assert run_main(*near) == 0
    assert "the pictures are not those that the run has learnt from; the nearest are of these" in capsys.readouterr().err

    shutil.rmtree(out)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    asked = ["--from", path, "--sample", 5, "--interpolate", 2, "--attention"]
    message = fails(capsys, *asked, "--nearest", 2)
    assert f"there is no folder {tmp_path / 'elsewhere' / 'my birds'}; say where the pictures are with --dataset" in message
    assert run_main(*asked, "--nearest", 2, "--dataset", folder, "--data-dir", tmp_path / "data") == 0
    told = capsys.readouterr()
    assert "generator's maps alone" in told.err
    assert f"{path} is the generator of step 4 of: {options.program()} --dataset" in told.err
    kinds, looked = ["attention", "interpolate", "interpolate", "nearest", "sample"], Path("runs", "birds-look")
    assert [file.stem.split("-")[0] for file in sorted(looked.iterdir())] == kinds
    (looked / "checkpoint.npz").write_text("of a run of this name")
    assert "holds a run; choose another place with --out" in fails(capsys, *asked)
    assert run_main(*asked, "--out", "here") == 0
    assert leftovers(path.parent) == ["birds.npz"]
    assert holds(path, content)


def test_an_export_takes_the_place_of_its_like_alone(run, tmp_path, capsys):
    """Whatever else lies there stays as it is, and numbers too large for the file leave what was there."""
    mine, other, path = tmp_path / "mine", tmp_path / "other", tmp_path / "x.npz"
    assert run_main(*support.TRAIN, "--out", mine) == run_main(*support.TRAIN, "--seed", 1, "--out", other) == 0
    assert run_main("--from", mine, "--export", path) == 0
    first = path.read_bytes()
    assert run_main("--resume", mine, "--steps", 6) == run_main("--from", mine, "--export", path) == 0
    assert checkpoints.newest_checkpoint(path)[1].steps == 6
    assert not holds(path, first)
    (tmp_path / "notes.txt").write_text("precious")
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    for place in (path, other / "checkpoint.npz", tmp_path / "notes.txt", tmp_path, tmp_path / "link"):
        before = place.read_bytes() if place.is_file() else None
        assert "no earlier export of this run" in fails(capsys, "--from", other, "--export", place)
        assert (place.read_bytes() if place.is_file() else None) == before
    assert "choose another --export" in fails(capsys, "--from", other, "--export", tmp_path / "notes.txt" / "x.npz")
    before, (checkpoint, chosen) = path.read_bytes(), checkpoints.newest_checkpoint(mine)
    sampler = checkpoints.load_sampler(chosen, checkpoint)
    sampler.generator.parameters()["to_rgb.bias"].data[1] = 65_520  # what rounds to more than 65504
    with pytest.raises(data.UserError, match="average/to_rgb.bias does not fit into float16"):
        checkpoints.export(sampler, path)
    assert holds(path, before)
    sampler.generator.parameters()["to_rgb.bias"].data[1] = 65_519
    checkpoints.export(sampler, path)


def test_pictures_that_are_not_finite_are_none(tmp_path, capsys):
    """They would be black, or noise, and get a score."""
    out = tmp_path / "run"
    assert run_main(*support.TRAIN, "--steps", 1, "--out", out) == 0
    with np.load(out / "checkpoint.npz") as saved:
        content = dict(saved)
    content["average/project.weight"][:] = 3e38
    np.savez(out / "checkpoint.npz", **content)
    for asked in (["--from", out, "--sample", 2], ["--from", out, "--interpolate", 2], ["--from", out, "--attention"]):
        with np.errstate(all="ignore"):
            assert "step 1 makes pictures that are not finite" in fails(capsys, *asked)
    assert leftovers(out / "look") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "RUN", "--export", "RUN/x.npz", "--seed", 1], "nothing here asks for"),
        (["--from", "RUN", "--export", ""], "is empty"),
        (["--from", "RUN", "--attention", "--query", "16,0"], "count from 0 to 15"),
        (["--from", "RUN", "--attention", "--query", "0"], "must be a row and a column"),
        (["--from", "RUN", "--attention", "--query=-1,2"], "must be a row and a column"),
        (["--from", "RUN", "--sample", 0], "from 1 to 1024"),
        (["--from", "RUN", "--interpolate", 1], "from 2 to 100"),
        (["--from", "RUN", "--nearest", 101], "from 1 to 100"),
        (["--from", "RUN/samples", "--sample", 4], "name a run's folder"),
        (["--from", "RUN", "--sample", 4, "--out", "RUN/log.csv"], "choose another --out"),
    ],
)
def test_mistakes(arguments, message, run, capsys):
    arguments = [str(x).replace("RUN", str(run)) for x in arguments]
    assert message in fails(capsys, *arguments)


def test_networks_without_attention_have_none_to_show(tmp_path, capsys):
    for discriminator, code in (("autogan", 2), ("transgan", 0)):
        out = tmp_path / discriminator
        pair = ["--generator", "resnet", "--discriminator", discriminator]
        assert run_main(*support.TRAIN, "--steps", 1, *pair, "--out", out) == 0
        assert run_main("--from", out, "--attention") == code
    assert "leave it out" in capsys.readouterr().err
    assert leftovers(out / "look") == ["attention-000001-seed0.png"]


@base.on_cpu
def test_rehearsal_of_the_pictures_on_a_gpu(run, tmp_path, rehearsed_gpu):
    """On arrays that refuse to meet NumPy's, the walk is the CPU's and so are the maps."""
    trainer = trainer_of(run)
    noise = trainer.noise(2, np.random.default_rng(0))
    _, expected = pictures.views(trainer, noise[:1], (3, 3))
    assert ag.use_device("gpu") == "a rehearsed GPU"
    trainer = trainer_of(run)
    _, found = pictures.views(trainer, noise[:1], (3, 3))
    for name, maps in expected.items():
        for a, b in zip(found[name], maps, strict=True):
            assert type(a) is np.ndarray
            np.testing.assert_allclose(a, b, rtol=1e-4)
    pictures.interpolate(trainer, noise, tmp_path / "walk.png")
    pictures.nearest(trainer, noise, data.draw_shapes(40, 16), 0, tmp_path / "nearest.png")
    assert leftovers(tmp_path) == ["nearest.png", "walk.gif", "walk.png"]


# --- 8. Architecture --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "side"), [("S", 32), ("tiny", 16), ("tiny", 128), ("XL", 64)])
def test_the_figure_of_both_networks_has_their_numbers(size, side, texts, tmp_path):
    path = tmp_path / "figure.png"
    architecture.main([str(path), "--size", size, "--image-size", str(side)])
    figure, stages = np.asarray(Image.open(path)), len(transgan.stage_depths(size, side))
    assert figure.shape[1] == architecture.WIDTH
    x = architecture.WIDTH - architecture.LEFT - (architecture.WIDTH - 2 * architecture.LEFT) // (stages + 2) // 2
    made = figure[94:154, x - 30 : x + 30]
    assert made.min(axis=-1).max() < 255  # a picture, all of it, stands at the end
    assert len(np.unique(made.reshape(-1, 3), axis=0)) > 2
    if size != "XL":
        chosen = support.parsed("--dataset", "shapes", "--size", size, "--image-size", side, "--sr-weight", 0)
        for make in (transgan.make_generator, transgan.make_discriminator):
            network = make(chosen, np.random.default_rng(0))
            assert f"{sum(p.size for p in network.parameters().values()):,} parameters" in texts
    for depth in (*transgan.stage_depths(size, side), transgan.SIZES[size].disc_depth):
        assert any(words.startswith(f"{depth} block") for words in texts)
    assert sum(words.startswith("of width") for words in texts) == stages + 1


def test_a_figure_that_cannot_be(tmp_path, capsys):
    for words, message in (
        ((tmp_path / "none" / "figure.png",), "name another file"),
        ((tmp_path / "figure.png", "--image-size", "30"), "choose another --image-size"),
        ((".",), "is a folder; name a file"),
        ((tmp_path,), "is a folder; name a file"),
    ):
        with pytest.raises(SystemExit, match="2"):
            architecture.main([str(word) for word in words])
        assert message in capsys.readouterr().err
    assert leftovers(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="about POSIX's pipes")
def test_a_figure_takes_the_place_of_no_pipe(tmp_path, capsys):
    os.mkfifo(path := tmp_path / "figure.png")
    with pytest.raises(SystemExit, match="2"):
        architecture.main([str(path)])
    assert re.search("it is no file, but a pipe .*; name another file", capsys.readouterr().err)
    assert path.is_fifo()
