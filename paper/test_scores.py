"""The promises of paper/scores.py and paper/classifier.py, as properties."""

import itertools
import json
import re
import shutil
import sys
import types

import test_transgan as base

import numpy as np  # isort: skip
import pytest
from hypothesis import given
from hypothesis import strategies as st

import autograd as ag
import data
from autograd import Tensor
from data import UserError
from paper import classifier, scores
from program import support
from store import datasets, files, output
from store.files import CHECKPOINTS
from store.support import encoded, fuzz, fuzzed, holds, one_line_at_most, slope

# --- 1. One pass ------------------------------------------------------------------------------------------------------


def added(statistics, x, cuts):
    for part in np.split(x, sorted(cuts)):
        if len(part):
            statistics.add(part)
    return statistics


@given(count=st.integers(2, 40), dims=st.integers(1, 6), seed=base.seeds, offset=st.sampled_from([0.0, 3.0, 1e6]),
       cuts=st.lists(st.integers(0, 40), max_size=4))  # fmt: skip
def test_statistics_of_batches_are_those_of_all(count, dims, seed, offset, cuts):
    (x,) = base.normal(seed, (count, dims))
    statistics = added(scores.Statistics(dims), x + offset, cuts)
    assert statistics.count == count
    np.testing.assert_allclose(statistics.mean, x.mean(axis=0) + offset, rtol=1e-9, atol=1e-9)
    expected = np.cov(x, rowvar=False).reshape(dims, dims)  # an offset of a million costs no more than its own rounding
    np.testing.assert_allclose(statistics.covariance, expected, rtol=1e-8, atol=1e-8 if offset < 1e3 else 1e-7)


@given(count=st.integers(10, 60), classes=st.integers(2, 8), splits=st.integers(1, 10), seed=base.seeds,
       scale=st.sampled_from([0.1, 3.0, 1000.0]))  # fmt: skip
def test_inception_score_is_its_definition(count, classes, splits, seed, scale):
    (logits,) = base.normal(seed, (count, classes), scale=scale)
    found = scores.inception_score(logits, splits)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    each = []
    for i in range(splits):
        part = p[count * i // splits : count * (i + 1) // splits]
        ratio = np.where(part > 1e-200, part, 1) / np.where(part > 1e-200, part.mean(axis=0), 1)
        each.append(np.exp((part * np.log(ratio)).sum(axis=1).mean()))
    np.testing.assert_allclose(found, (np.mean(each), np.std(each)), rtol=1e-6, atol=1e-6)


def test_inception_score_of_the_best_and_the_worst():
    sure = np.tile(1000.0 * np.eye(7), (10, 1))  # every picture of one class beyond doubt, all classes alike
    assert scores.inception_score(sure) == pytest.approx((7.0, 0.0))
    assert scores.inception_score(0 * sure) == pytest.approx((1.0, 0.0))


# --- 2. The distance --------------------------------------------------------------------------------------------------


def covariance(seed, dims, rank):
    (x,) = base.normal(seed, (dims, rank))
    return x @ x.T


@given(a=st.lists(st.floats(0, 100), min_size=4, max_size=4), b=st.lists(st.floats(0, 100), min_size=4, max_size=4),
       seed=base.seeds)  # fmt: skip
def test_distance_of_known_gaussians(a, b, seed):
    """Covariances with common eigenvectors Q: |m1 - m2|^2 + sum (sqrt a - sqrt b)^2, whatever Q is."""
    q = np.linalg.qr(base.normal(seed, (4, 4))[0])[0]
    m1, m2 = base.normal(seed + 1, (4,), (4,))
    found = scores.frechet_distance(m1, q * a @ q.T, m2, q * b @ q.T)
    expected = ((m1 - m2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert found == pytest.approx(expected, rel=1e-6, abs=2e-5)  # sqrt of rounding: sqrt(1e-16 * 100 * 100)


@given(dims=st.integers(1, 12), ranks=st.tuples(st.integers(1, 12), st.integers(1, 12)), seed=base.seeds)
def test_distance_is_one_also_where_there_are_fewer_pictures_than_dimensions(dims, ranks, seed):
    s1, s2 = covariance(seed, dims, ranks[0]), covariance(seed + 1, dims, ranks[1])
    m1, m2 = base.normal(seed + 2, (dims,), (dims,))
    size = 1 + np.trace(s1) + np.trace(s2)
    forth, back = scores.frechet_distance(m1, s1, m2, s2), scores.frechet_distance(m2, s2, m1, s1)
    assert forth == pytest.approx(back, abs=1e-7 * size)
    assert forth >= ((m1 - m2) ** 2).sum() - 1e-7 * size
    same = scores.frechet_distance(m1, s1, m1, s1)
    assert same == pytest.approx(0, abs=1e-7 * size)
    assert not f"{same:.2f}".startswith("-")


def test_a_distance_is_a_number_or_none():
    with pytest.raises(OverflowError, match="too large"), np.errstate(over="ignore"):
        scores.frechet_distance(np.full(2, 1e200), np.eye(2), np.zeros(2), np.eye(2))


# --- 3. The classifier ------------------------------------------------------------------------------------------------


@given(rows=st.integers(1, 4), classes=st.integers(1, 5), seed=base.seeds, scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_cross_entropy_derivatives(rows, classes, seed, scale):
    (logits,) = base.normal(seed, (rows, classes), scale=scale)
    labels = np.random.default_rng(seed).integers(0, classes, rows)
    base.check(lambda x: classifier.cross_entropy(x, labels), [logits])
    found = ag.to_numpy(classifier.cross_entropy(Tensor(ag.xp.asarray(logits + 1e4)), labels))
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(found, -np.log(p[np.arange(rows), labels] / p.sum(axis=1)), rtol=1e-8, atol=1e-8)


def test_turned_pictures_know_how_far():
    (x,) = base.normal(0, (40, 3, 5, 5))
    turned, quarters = classifier.turned(x, np.random.default_rng(1))
    assert set(quarters) == {0, 1, 2, 3}
    for before, after, k in zip(x, turned, quarters, strict=True):
        np.testing.assert_array_equal(np.rot90(after, -k, (1, 2)), before)


def test_the_classifier_learns_shapes_and_turns():
    pictures, labels = data.draw_labelled_shapes(600, 8)
    assert len(set(labels)) == 18
    _, accuracy = classifier.train_classifier(pictures, labels, 18, steps=150)
    assert accuracy > 0.5  # guessing gets one in eighteen
    lit = np.zeros((64, 3, 8, 8), np.uint8)
    lit[:, :, :3] = 200  # bright above: which way is up can be told
    _, accuracy = classifier.train_classifier(lit, None, 4, steps=60)
    assert accuracy > 0.9


@pytest.fixture
def quick(monkeypatch, small):
    monkeypatch.setattr(classifier, "STEPS", 3)
    train = classifier.train_classifier
    trained = []

    def counted(pictures, labels, classes, steps=3):
        trained.append(len(pictures))
        return train(pictures, labels, classes, steps)

    monkeypatch.setattr(classifier, "train_classifier", counted)
    return trained


def test_the_classifier_is_trained_once_for_the_same_pictures(quick, tmp_path, capsys):
    pictures, other = data.draw_shapes(datasets.SHAPES_COUNT, 8), data.draw_shapes(datasets.SHAPES_COUNT, 8, seed=1)
    first = classifier.load_classifier(pictures, "shapes", tmp_path)
    assert "training a classifier of shapes" in capsys.readouterr().err
    again = classifier.load_classifier(pictures, "shapes", tmp_path)
    assert (len(quick), first.digest, first.weights) == (1, again.digest, again.weights)
    for a, b in zip(first(pictures), again(pictures), strict=True):
        np.testing.assert_array_equal(a, b)
    assert first(pictures)[0].std(axis=0).mean() == pytest.approx(1, rel=1e-3)
    assert classifier.load_classifier(other, "shapes", tmp_path).digest != first.digest
    (path,) = tmp_path.glob(f"*{files.fingerprint(pictures)}.npz")
    path.write_bytes(path.read_bytes()[:-500])
    assert classifier.load_classifier(pictures, "shapes", tmp_path).digest == first.digest
    assert len(quick) == 3
    assert "quarter turns of dogs" in classifier.load_classifier(pictures, "/my/dogs", tmp_path).weights
    with pytest.raises(UserError, match="cannot write"):
        classifier.load_classifier(pictures, "shapes", path)


@pytest.mark.parametrize("dataset", ["shapes", "/my/dogs"])
def test_a_kept_classifier_that_was_not_made_so_is_made_anew(dataset, quick, tmp_path):
    pictures = data.draw_shapes(datasets.SHAPES_COUNT, 8)
    digest = classifier.load_classifier(pictures, dataset, tmp_path).digest
    (path,) = tmp_path.glob("classifier-*.npz")
    with np.load(path) as saved:
        kept = dict(saved)
    weight, bias = kept["head.weight"], kept["head.bias"]
    damage = [{"head.weight": weight.T}, {"head.weight": weight.astype(np.float64)}, {"head.bias": bias * np.nan}]
    damage += [{"scale": np.float64(x)} for x in (0, -1, 1e-300, 1e30, np.inf, np.nan)]
    damage += [{"scale": x} for x in (1, np.float32(1), np.ones(1), np.True_, "1")]
    damage += [{"accuracy": x} for x in (9.0, -1e300, np.nan, 1, np.full(1, 0.5))]
    damage += [{"head.weight": weight[:, :k], "head.bias": bias[:k]} for k in (0, 1, 3)]
    assert weight.shape == (classifier.FEATURES, len(bias))
    for number, odd in enumerate(damage):
        np.savez(path, **kept | odd)
        for known in (None, digest):
            assert classifier.kept_classifier(dataset, tmp_path, files.fingerprint(pictures), known) is None, odd
        assert classifier.load_classifier(pictures, dataset, tmp_path).digest == digest, odd
        assert len(quick) == 2 + number, odd
    assert classifier.kept_classifier(dataset, tmp_path, files.fingerprint(pictures)).digest == digest


def test_two_classifiers_have_two_names():
    """Also where they are equally often right: another machine's come out a little different."""
    networks = [classifier.Classifier(4, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    one, same, other = (classifier.Extractor(network, "/my/dogs", 0.5, 1.0) for network in networks)
    scaled = classifier.Extractor(networks[0], "/my/dogs", 0.5, 2.0)
    assert (one.weights, one.digest) == (same.weights, same.digest)
    assert len({x.weights for x in (one, other, scaled)}) == len({x.digest for x in (one, other, scaled)}) == 3


# --- 4. A run's scores ------------------------------------------------------------------------------------------------


class Eye:
    """A network that looks at the mean colour of a picture."""

    suffix, dims, digest, weights, resizing = "-eye", 3, "eye", "an eye", "none"
    seen = 0

    def __call__(self, pictures):
        self.seen += len(pictures)
        colour = pictures.mean(axis=(2, 3)) / 255
        return colour, colour * 10


def test_reference_statistics_are_computed_once_and_in_the_usual_layout(tmp_path):
    pictures, eye = data.draw_shapes(70, 8), Eye()
    mean, covariance = scores.reference_statistics(pictures, "shapes", eye, tmp_path)
    colours = pictures.mean(axis=(2, 3)) / 255
    np.testing.assert_allclose(mean, colours.mean(axis=0))
    np.testing.assert_allclose(covariance, np.cov(colours, rowvar=False))
    assert eye.seen == 70
    again = scores.reference_statistics(pictures, "shapes", eye, tmp_path)
    np.testing.assert_array_equal(again[1], covariance)
    assert eye.seen == 70
    scores.reference_statistics(pictures[:69], "shapes", eye, tmp_path)
    assert eye.seen == 139
    for path in tmp_path.glob("fid-stats-eye-eye-shapes-8-*.npz"):
        with np.load(path) as saved:
            assert set(saved) == {"mu", "sigma", "network"}
    with pytest.raises(UserError, match="cannot write"):
        scores.reference_statistics(pictures[:68], "shapes", eye, path)


Z, EYE = np.zeros(3), np.eye(3)


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (Z, None, "sigma"),
        (np.zeros(4), EYE, "expected mu of shape"),
        (Z, np.eye(4), "expected mu of shape"),
        (Z[None], EYE, "expected mu of shape"),
        (Z, EYE * np.nan, "not finite"),
        (np.full(3, np.inf), EYE, "not finite"),
        (np.full(3, 1e308), EYE, "too large"),
        (Z, EYE * 1e200, "too large"),
        (Z, 1e308 * (2 * EYE - 1), "too large"),
        (Z, np.triu(np.ones((3, 3))), "not symmetric"),
        (Z, EYE * 1e-9 + np.triu(np.full((3, 3), 1e-10)), "not symmetric"),  # as small as it is
        (Z, -1e6 * EYE, "variances below 0"),
        (Z, -1e-20 * EYE, "variances below 0"),
        (Z, 1 + EYE * [0, 0, -0.5], "variances below 0"),
        (Z, np.full((3, 3), 2.0) - EYE, "variances below 0"),  # correlations of 2
        *((Z.astype(kind), EYE, "not numbers") for kind in ("c16", "M8[s]", "m8[s]", "?", "U3", "S3", "f4,f4")),
        *((Z, EYE.astype(kind), "not numbers") for kind in ("c8", "M8[D]", "m8[s]", "?", "U3", "S3", "f4,f4")),
        (np.array([{}] * 3, object), EYE, "cannot read"),
        (None, None, "cannot read"),
    ],
)
def test_what_are_no_statistics_give_no_number(tmp_path, mu, sigma, message):
    path = tmp_path / "stats.npz"
    np.savez(path, **{name: x for name, x in (("mu", mu), ("sigma", sigma)) if x is not None})
    if mu is None:
        path.write_text("no statistics")
    with pytest.raises(UserError, match=message) as caught:
        scores.read_statistics(path, 3)
    assert "\n" not in str(caught.value)
    assert "delete" not in str(caught.value)  # it may be somebody's own


@pytest.mark.parametrize("scale", [5e-324, 1e-300, 1e-20, 1.0, 1e90])
@pytest.mark.parametrize("kind", [np.float64, np.float32, np.longdouble])
def test_rounding_makes_no_statistics_wrong(scale, kind, tmp_path):
    """Variances a little below 0, sums in another order, float32: what is then read is symmetric, and has a distance."""
    x = base.normal(0, (3, 9))[0]
    x[2] = x[1]  # a variance of 0
    sigma = np.cov(x) * scale
    sigma[0, 1] *= 1 + 1e-7
    if kind is np.float32 and not 1e-30 < scale < 1e30:
        return
    sigma -= 1e-12 * sigma.max() * EYE
    np.savez(tmp_path / "stats.npz", mu=np.arange(3), sigma=sigma.astype(kind))
    mean, covariance, _ = scores.read_statistics(tmp_path / "stats.npz", 3)
    np.testing.assert_array_equal(covariance, covariance.T)
    np.testing.assert_allclose(covariance, sigma, rtol=1e-5, atol=1e-6 * sigma.max())
    assert 0 <= scores.frechet_distance(mean, covariance, mean, covariance) <= 1e-5 * max(sigma.max(), 1e-300)


@fuzz(100)
@given(seed=base.seeds)
def test_fuzzed_statistics_only_ever_raise_our_own_error(seed, tmp_path):
    """Or they are as they were written, because their bytes are held against a checksum."""
    path, mean, covariance = tmp_path / "stats.npz", np.arange(4.0), np.diag(np.arange(1.0, 5))
    (np.savez_compressed if seed % 2 else np.savez)(path, mu=mean, sigma=covariance)
    path.write_bytes(fuzzed(path.read_bytes(), seed))
    with one_line_at_most():
        for got, expected in zip(scores.read_statistics(path, 4)[:2], (mean, covariance), strict=True):
            np.testing.assert_array_equal(got, expected)


def test_real_pictures_score_better_than_noise(small, monkeypatch):
    trainer, eye = support.small_trainer(), Eye()
    real = trainer.batches.pictures
    statistics, _ = scores.look([real], len(real), eye, "real")
    reference = statistics.mean, statistics.covariance
    noise = scores.score_generator(trainer, 50, eye, reference)
    made = []
    monkeypatch.setattr(trainer, "sample", lambda z: made.append(len(z)) or data.scale(real[: len(z)]))
    best = scores.score_generator(trainer, 40, eye, reference)
    assert best["fid"] == pytest.approx(0, abs=1e-6)
    assert noise["fid"] > 0.01
    assert 1 <= best["is"] <= 3
    assert sum(made) == 40


def test_a_network_of_no_numbers_gives_no_score(small):
    class Blind(Eye):
        def __call__(self, pictures):
            return [x * np.nan for x in super().__call__(pictures)]

    trainer = support.small_trainer()
    with pytest.raises(UserError, match="not finite; choose another"):
        scores.score_generator(trainer, 20, Blind(), (np.zeros(3), np.eye(3)))


def test_every_score_is_kept_with_all_that_it_was_made_of(quick, tmp_path, capsys):
    """Only one that is made of the same takes the place of another."""
    out, kept = tmp_path / "run", []
    assert support.run_main(*support.TRAIN, "--out", out) == 0

    def evaluated(*args, folder="data"):
        assert support.run_main("--evaluate", out, "--data-dir", tmp_path / folder, *args) == 0
        entries = json.loads((out / "scores.json").read_text(), parse_constant=pytest.fail)
        new = [entry for entry in entries if entry not in kept]
        assert [entry for entry in entries if entry in kept] == [entry for entry in kept if entry in entries]
        kept[:] = entries
        return len(entries), new

    assert evaluated("--num-images", 30)[0] == 1
    (stats,) = (tmp_path / "data").glob("fid-stats-own-*.npz")
    assert evaluated("--num-images", 20)[0] == 2
    assert evaluated("--num-images", 20) == (2, [])
    assert (
        evaluated("--num-images", 20, "--fid-stats", stats)[0] == 3
    )  # of the same numbers, but who knows of which pictures
    (tmp_path / "other").mkdir()
    with np.load(stats) as saved:
        np.savez(tmp_path / "other" / stats.name, mu=saved["mu"] + 1, sigma=saved["sigma"])
    count, (entry,) = evaluated("--num-images", 20, "--fid-stats", tmp_path / "other" / stats.name)
    assert (count, entry["against"]) == (4, f"the statistics in {stats.name}")  # another file of the same name
    classifier.train_classifier.__defaults__ = (4,)
    count, (entry,) = evaluated("--num-images", 20, folder="new")  # another classifier of the same pictures
    assert count == 5
    assert entry["weights"] not in [old["weights"] for old in kept[:-1]]
    shutil.copytree(out, tmp_path / "moved")
    for name in CHECKPOINTS:
        (out / name).unlink()
    shutil.rmtree(out / "samples")
    (out / "log.csv").unlink()
    assert support.run_main(*support.TRAIN, "--seed", 1, "--out", out) == 0
    assert evaluated("--num-images", 20)[0] == 6  # another generator of the same step
    assert not any(scores.agree(*pair, scores.MADE_OF) for pair in itertools.combinations(kept, 2))


def test_statistics_of_another_network_are_refused(quick, tmp_path, capsys):
    out = tmp_path / "run"
    assert support.run_main(*support.TRAIN, "--out", out) == 0
    assert support.run_main("--evaluate", out, "--num-images", 20, "--data-dir", tmp_path / "data") == 0
    (stats,) = (tmp_path / "data").glob("fid-stats-own-*.npz")
    classifier.train_classifier.__defaults__ = (4,)
    command = ("--evaluate", out, "--num-images", 20, "--data-dir", tmp_path / "new", "--fid-stats", stats)
    assert support.run_main("--evaluate", out, "--num-images", 20, "--data-dir", tmp_path / "new") == 0
    assert "is of another network than own classifier" in support.fails(capsys, *command)


def test_a_score_that_cannot_be_written_is_printed(quick, tmp_path, monkeypatch, capsys):
    """Hours of work are not lost because a disk is full."""
    out = tmp_path / "run"
    assert support.run_main(*support.TRAIN, "--out", out) == 0

    def full(*_):
        raise OSError(28, "No space left on device", "scores.json")

    monkeypatch.setattr(scores.files, "whole_file", full)
    monkeypatch.setattr(scores, "reference_statistics", lambda *_: (np.zeros(128), np.eye(128)))
    monkeypatch.setattr(scores.files, "save_arrays", lambda *_, **__: None)
    capsys.readouterr()
    assert support.run_main("--evaluate", out, "--num-images", 20, "--data-dir", tmp_path / "data") == 2
    assert capsys.readouterr().out.startswith("FID-own ")


def test_a_score_that_cannot_be_printed_is_written(quick, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert support.run_main(*support.TRAIN, "--out", out) == 0
    tell = output.tell

    def full(line, **fields):
        if fields["event"] == "scores":
            raise OSError(28, "No space left on device")
        tell(line, **fields)

    monkeypatch.setattr(output, "tell", full)
    assert support.run_main("--evaluate", out, "--num-images", 20, "--data-dir", tmp_path / "data") == 2
    assert "No space left" in capsys.readouterr().err
    (entry,) = scores.read_scores(out / "scores.json")
    assert entry["images"] == 20


def test_evaluating_a_run(quick, tmp_path, capsys):
    out, where = tmp_path / "run", ("--data-dir", tmp_path / "data")
    assert support.run_main(*support.TRAIN, "--out", out) == 0
    before = (out / "checkpoint.npz").read_bytes()
    capsys.readouterr()
    lines = []
    for _ in range(2):
        assert support.run_main("--evaluate", out, "--num-images", 30, *where) == 0
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1]
    assert lines[0].startswith("FID-own ")
    for part in (
        "IS-own ",
        " ± ",
        "(TransGAN-tiny, step 4; 30 pictures against 40 pictures of shapes; own classifier of 18 ",
    ):
        assert part in lines[0]
    (entry,) = json.loads((out / "scores.json").read_text())
    assert f"FID-own {entry['fid_own']:.2f}, IS-own {entry['is_own']:.2f} ± {entry['is_deviation_own']:.2f}" in lines[0]
    assert (entry["step"], entry["images"]) == (4, 30)
    assert len(quick) == 1
    assert holds(out / "checkpoint.npz", before)
    stats = next((tmp_path / "data").glob("fid-stats-own-*.npz"))
    assert support.run_main("--evaluate", out, "--num-images", 30, "--fid-stats", stats, *where) == 0
    assert f"against the statistics in {stats.name}" in capsys.readouterr().out
    (out / "checkpoint.npz").replace(out / "checkpoint-previous.npz")
    assert support.run_main("--evaluate", out, "--num-images", 30, *where) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("going on from checkpoint-previous.npz\n")) == (lines[0], 1)
    (out / "checkpoint-previous.npz").replace(out / "checkpoint.npz")
    for args, message in (
        (["--resume", out], "leave out one of them"),
        (["--num-images", 9], "must be from 10"),
        (["--steps", 9], "leave out --steps 9"),
        (["--fid-stats", tmp_path / "none.npz"], "cannot read"),
        (["--inception", tmp_path / "none.pth"], "none.pth"),
        (["--features", "inception"], "is not the file expected"),
    ):
        (tmp_path / "data" / "pt_inception-2015-12-05-6726825d.pth").write_text("not its weights")
        assert message in support.fails(capsys, "--evaluate", out, *where, *args), args
    assert "cannot read" in support.fails(capsys, "--evaluate", tmp_path / "nowhere")
    (out / "scores.json").write_text("[1")
    assert "scores.json is not a list" in support.fails(capsys, "--evaluate", out, "--num-images", 30, *where)


def test_statistics_that_are_given_take_the_place_of_the_pictures(quick, tmp_path, monkeypatch, capsys):
    """The own classifier is known by its digest, which is in them, or by the fingerprint of the pictures it is of."""
    out, where = tmp_path / "run", ("--data-dir", tmp_path / "data", "--num-images", 30)
    assert support.run_main(*support.TRAIN, "--out", out) == 0
    assert support.run_main("--evaluate", out, *where) == 0
    expected = capsys.readouterr().out.splitlines()[-1].split("(")[0]
    (stats,) = (tmp_path / "data").glob("fid-stats-own-*.npz")
    stats = stats.rename(tmp_path / "mine.npz")

    def gone(*_):
        raise UserError("there are no pictures")

    monkeypatch.setattr(datasets, "load_pictures", gone)
    assert support.run_main("--evaluate", out, "--fid-stats", stats, *where) == 0
    assert capsys.readouterr().out.split("(")[0] == expected
    assert "there are no pictures" in support.fails(capsys, "--evaluate", out, *where)
    with np.load(stats) as saved:
        np.savez(tmp_path / "other.npz", mu=saved["mu"], sigma=saved["sigma"])  # which do not say by which network
    other = ("--evaluate", out, "--fid-stats", tmp_path / "other.npz", *where)
    assert support.run_main(*other) == 0  # through that of the pictures that the checkpoint knows
    assert capsys.readouterr().out.split("(")[0] == expected
    (kept,) = (tmp_path / "data").glob("classifier-*.npz")
    kept.rename(kept.with_name("classifier-mine.npz"))
    assert support.run_main("--evaluate", out, "--fid-stats", stats, *where) == 0
    assert "there are no pictures" in support.fails(capsys, *other)
    assert len(quick) == 1
    seen = []
    monkeypatch.setattr(scores, "load_extractor", lambda features, *_: seen.append(features) or Eye())
    monkeypatch.setitem(scores.DIMS, "inception", 3)
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    chosen = "--features", "inception", "--fid-stats", tmp_path / "other.npz"
    assert support.run_main("--evaluate", out, *chosen, *where) == 0
    assert seen == ["inception"]


@pytest.mark.parametrize("command", ["--evaluate", "--evaluate-every"])
def test_a_data_dir_that_takes_nothing_is_said_before_the_work(command, quick, tmp_path, capsys):
    """The work whose result is to be kept there: the classifier, and the statistics of the real pictures."""
    (tmp_path / "file").write_text("no folder")
    where = "--data-dir", tmp_path / "file" / "within"
    assert support.run_main(*support.TRAIN, "--out", tmp_path / "run", *where) == 0  # shapes keep nothing there
    words = [*support.TRAIN, "--out", tmp_path / "new", command, 1] if command[-1] == "y" else [command, tmp_path / "run"]
    message = support.fails(capsys, *words, *where, "--num-images", 10)
    assert re.search("cannot write in .*within: .*; choose another --data-dir", message)
    eye = Eye()
    with pytest.raises(UserError, match="cannot write in"):
        scores.reference_statistics(data.draw_shapes(9, 8), "shapes", eye, where[1])
    assert (quick, eye.seen) == ([], 0)


def test_what_is_wrong_is_said_before_the_work(quick, tmp_path, capsys):
    out, where = tmp_path / "run", ("--data-dir", tmp_path / "data")
    assert support.run_main(*support.TRAIN, "--out", out) == 0
    (tmp_path / "file").write_text("")
    assert "choose another --out" in support.fails(capsys, "--evaluate", out, "--out", tmp_path / "file" / "x", *where)
    (tmp_path / "other").mkdir()
    entry = '[{"step": 1, "images": 2, "weights": "", "fid": %s}]'
    odd = ("{", '{"a": 1}', '[{"step": 1}]', "[1]", "null", '["step"]', "1", "", "[" * 99_999, '[{"a":' * 99_999, "\x00",
           "{}", '""', '"x"', "0", "false", f"[{'9' * 9999}]", '[{"step": -1, "images": 2, "weights": ""}]',
           entry % "-5.0", (entry % "7.0").replace("2", "-2"),
           '[{"step": 1, "images": "2", "weights": ""}]', '{"step": 1, "images": 2, "weights": ""}',
           *(entry % x for x in ("NaN", "Infinity", "-Infinity", "1e999", "null", "true", '"7"', "[7.0]")))  # fmt: skip
    for content in (*(text.encode() for text in odd), b"\xff\xfe[]", (entry % "7.0").encode("utf-16")):
        (tmp_path / "other" / "scores.json").write_bytes(content)
        message = support.fails(capsys, "--evaluate", out, "--out", tmp_path / "other", *where)
        assert re.search("is not a list .*; move it away, or choose another --out", message), content[:60]
        assert holds(tmp_path / "other" / "scores.json", content)
    assert quick == []
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "a.png").write_bytes(encoded(slope(9, 9)))
    one = ("--steps", 1, "--batch-size", 1, "--gen-batch-size", 1)
    alone = ("--dataset", folder, "--size", "tiny", "--image-size", 8, *one)
    run = (*alone, "--out", tmp_path / "alone", *where)
    message = support.fails(capsys, *run, "--evaluate-every", 1)
    assert "two real pictures or more" in message
    assert support.run_main(*alone, "--out", tmp_path / "again", *where) == 0
    assert "two real pictures or more" in support.fails(
        capsys, "--evaluate", tmp_path / "again", "--features", "own", *where
    )


def test_the_noise_of_scores_follows_from_the_seed(small, monkeypatch):
    """A block of 256 after another, each with its own."""
    trainer, drawn = support.small_trainer(), []
    noise = trainer.noise
    monkeypatch.setattr(trainer, "noise", lambda count, rng: drawn.append(noise(count, rng)) or drawn[-1])
    for seed in (0, 0, 1):
        trainer.options.seed = seed
        scores.score_generator(trainer, 300, Eye(), (np.zeros(3), np.eye(3)))
    assert [len(block) for block in drawn] == 3 * [256, 44]
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert (drawn[0][:44] != drawn[1]).all()
    assert (drawn[0] != drawn[-2]).all()


def test_a_log_tells_the_distance_from_the_score(monkeypatch, tmp_path):
    monkeypatch.setattr(scores, "load_extractor", lambda *_: Eye())
    monkeypatch.setattr(scores, "score_generator", lambda *_: {"fid": 1.0, "is": 2.0, "is_deviation": 3.0})
    assert scores.own_scores(support.small_trainer(), 20, tmp_path)() == {"fid_own": 1.0, "is_own": 2.0}


def test_scores_are_logged_while_training(quick, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = (*support.TRAIN, "--evaluate-every", 2, "--num-images", 20, "--data-dir", tmp_path / "data")
    assert support.run_main(*arguments, "--out", out) == 0
    rows = support.read_log(out)
    assert [bool(row["fid_own"]) and bool(row["is_own"]) for row in rows] == [True, False, True, False, True]
    assert "FID-own" in capsys.readouterr().out
    plain = tmp_path / "plain"
    assert support.run_main(*support.TRAIN, "--out", plain) == 0  # looking changes nothing
    with np.load(out / "checkpoint.npz") as a, np.load(plain / "checkpoint.npz") as b:
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize(
    ("part", "work", "said"),
    [
        (scores, lambda: scores.look(np.split(data.draw_shapes(40, 8), 4), 40, Eye(), "pictures"), "10 of 40 pictures"),
        (classifier, lambda: classifier.train_classifier(data.draw_shapes(9, 8), None, 4, steps=4), "step 1/4"),
    ],
)
def test_how_long_the_work_will_take_is_said(part, work, said, monkeypatch, capsys):
    """A quarter of it took five seconds."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(part, "time", types.SimpleNamespace(monotonic=itertools.count(100, 5).__next__))
    work()
    assert f": {said}, 0:00:15 left" in capsys.readouterr().err


@base.on_cpu
def test_rehearsal_of_scores_on_a_gpu(quick, tmp_path, rehearsed_gpu):
    """Classifier, reference statistics and scores on arrays that refuse to meet NumPy's come to the CPU's numbers."""
    pictures = data.draw_shapes(datasets.SHAPES_COUNT, 8)

    def scored(folder):
        extractor = classifier.load_classifier(pictures, "shapes", folder)
        again = classifier.load_classifier(pictures, "shapes", folder)
        assert again.digest == extractor.digest
        reference = scores.reference_statistics(pictures, "shapes", extractor, folder)
        return [*scores.score_generator(support.small_trainer(1), 20, extractor, reference).values()]

    expected = scored(tmp_path / "cpu")
    assert ag.use_device("auto") == "a rehearsed GPU"
    np.testing.assert_allclose(scored(tmp_path / "gpu"), expected, rtol=1e-3)


def test_what_is_kept_is_made_by_one_process_at_a_time(tmp_path):
    pictures = data.draw_shapes(40, 8)
    path = tmp_path / f"classifier-shapes-8-{files.fingerprint(pictures)}.npz"
    with files.being_made(path), pytest.raises(UserError, match="another process is making .*; start again when"):
        classifier.load_classifier(pictures, "shapes", tmp_path)
