"""Inception Score and FID: two numbers that papers compare generators by.

The story of this chapter: a network that was trained to classify pictures looks at generated ones. The Inception Score asks
that it be sure of each (sharp objects) and see many classes over all (variety). The Frechet Inception Distance compares the
layer before the classes, as it answers to generated and to real pictures, each taken for a normal distribution: how far
apart do mean and covariance lie? Both are computed in one pass over the pictures, in float64.
"""

import contextlib
import datetime
import functools
import itertools
import json
import math
import time
import zipfile
from pathlib import Path

import numpy as np

import data
from data import UserError, first_line
from paper import classifier
from paper.inception import FEATURES, load_inception
from store import files, output

# --- 1. One pass ------------------------------------------------------------------------------------------------------


class Statistics:
    """Mean (D,) and covariance (D, D) of features that come a batch at a time, in float64.

    Two batches' sums of squares about their own means add up to that about the common mean with a correction for how far
    these lie apart (Chan et al. 1979), so that nothing is lost to rounding as in mean(x x^T) - mean(x) mean(x)^T.
    """

    def __init__(self, dims):
        self.count, self.mean, self.scatter = 0, np.zeros(dims), np.zeros((dims, dims))

    def add(self, features):
        """Take in a batch of features, (B, D)."""
        features = np.asarray(features, np.float64)
        batch, mean = len(features), features.mean(axis=0)
        centred, apart, total = features - mean, mean - self.mean, self.count + batch
        self.scatter += centred.T @ centred + np.outer(apart, apart) * (self.count * batch / total)
        self.mean += apart * (batch / total)
        self.count = total

    @property
    def covariance(self):
        """(D, D), of two pictures or more, with N - 1 for divisor, as pytorch-fid has it."""
        return self.scatter / (self.count - 1)


def inception_score(logits, splits=10):
    """exp(mean KL(p(y|x) || p(y))) of pictures' logits (N, K): mean and deviation over `splits` parts of them.

    Within a part the mean divergence is mean_x sum_y p log p - sum_y q log q with q = mean_x p (Salimans et al. 2016).
    """
    scores, ends = [], [len(logits) * i // splits for i in range(splits + 1)]
    for first, end in itertools.pairwise(ends):
        part = np.asarray(logits[first:end], np.float64)
        log_p = part - part.max(axis=1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        q = p.mean(axis=0)
        scores.append(np.exp((p * log_p).sum(axis=1).mean() - (q * np.log(np.maximum(q, 1e-300))).sum()))
    return float(np.mean(scores)), float(np.std(scores))


# --- 2. The distance --------------------------------------------------------------------------------------------------


def frechet_distance(mean1, covariance1, mean2, covariance2):
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), for means (D,) and covariances (D, D) (Heusel et al. 2017).

    The trace of the root needs no root of a matrix that is not symmetric. Write S1 = A A^T and S2 = B B^T, from their
    eigenvectors: the eigenvalues of S1 S2 other than 0 are those of (A^T B)(A^T B)^T, so that the trace of its root is the
    sum of the singular values of A^T B. A covariance of too few pictures has eigenvalues of 0, of which rounding makes
    small numbers of either sign: those below 0 are put back, and nothing is ever divided by one. Nor is a distance below 0
    anything but rounding. Raises OverflowError if it is not finite.
    """
    a, b = _factor(covariance1), _factor(covariance2)
    root = np.linalg.svd(a.T @ b, compute_uv=False).sum()
    apart = mean1 - mean2
    distance = float(apart @ apart + np.trace(covariance1) + np.trace(covariance2) - 2 * root)
    if not math.isfinite(distance):
        raise OverflowError("a distance is too large for a number")
    return max(0.0, distance)


def _factor(covariance):
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0))


# --- 3. A run's scores ------------------------------------------------------------------------------------------------

AT_ONCE = 256  # pictures that are made of noise of their own, or given to a network, which shares them among threads
LARGE = 1 << 26  # bytes of a covariance; Inception's takes half


def look(batches, total, extractor, what):
    """Statistics and logits (N, K) of `total` pictures, which come as bytes (B, 3, S, S) from `batches`. Raises UserError.

    extractor: the network that looks, bytes -> features (B, D), logits (B, K); see paper.inception and paper.classifier.
    """
    statistics, logits = Statistics(extractor.dims), []
    start = time.monotonic()
    with output.Progress() as progress:
        for pictures in batches:
            features, rows = extractor(pictures)
            statistics.add(features)
            logits.append(rows)
            left = (time.monotonic() - start) / statistics.count * (total - statistics.count)
            progress(f"{what}: {statistics.count:,} of {total:,} pictures, {output.clock(left)} left")
    if not all(np.isfinite(x).all() for x in (statistics.mean, statistics.scatter, *logits)):
        raise UserError(f"the network that looks gives numbers for the {what} that are not finite; choose another one with "
                        "--features or --inception")  # fmt: skip
    return statistics, np.concatenate(logits)


def reference_statistics(pictures, dataset, extractor, data_dir):
    """Mean (D,) and covariance (D, D) of a data set's pictures, bytes (N, 3, S, S): kept in a file of data_dir.

    The file goes by the pictures' fingerprint and the network's, and is in the layout of fid_stats_*.npz, with `network`,
    its digest, beside; one that is damaged is made anew. Raises UserError, before the work, if it could not be kept.
    """
    name = classifier.name_of(pictures, dataset)
    path = Path(data_dir) / f"fid-stats{extractor.suffix}-{extractor.digest}-{name}.npz"
    with contextlib.suppress(UserError):
        return read_statistics(path, extractor.dims)[:2]
    with files.being_made(path):
        batches = (pictures[i : i + AT_ONCE] for i in range(0, len(pictures), AT_ONCE))
        statistics, _ = look(batches, len(pictures), extractor, "real pictures")
        files.save_arrays(path, mu=statistics.mean, sigma=statistics.covariance, network=extractor.digest)
    return statistics.mean, statistics.covariance


ROUNDING = 1e-5  # of a covariance's largest number: what float32 and a sum over many pictures leave behind
MOST = 1e100  # of a feature's mean and covariance, whose squares are numbers still


def read_statistics(path, dims):
    """Mean (D,), covariance (D, D), and the digest of the network that looked, or None, from a file in the layout of
    fid_stats_*.npz: mu and sigma, to which this program adds `network`. Raises UserError."""
    try:
        with zipfile.ZipFile(files.plain(path)) as saved:
            mean, covariance = (files.read_numbers(saved, name, LARGE) for name in ("mu", "sigma"))
            network = str(files.read_array(saved, "network", 1 << 10)) if "network.npy" in saved.namelist() else None
        if mean.shape != (dims,) or covariance.shape != (dims, dims):
            found = f"found {mean.shape} and {covariance.shape}"
            raise ValueError(f"expected mu of shape ({dims},) and sigma of ({dims}, {dims}), {found}")
        if max(abs(mean).max(), largest := abs(covariance).max()) > MOST:
            raise ValueError("its numbers are too large for a network's features")
        if abs(covariance - covariance.T).max() > ROUNDING * largest:
            raise ValueError("its sigma is not symmetric, and so no covariance")
        covariance = (covariance + covariance.T) / 2
        if np.linalg.eigvalsh(covariance / (largest or 1))[0] < -ROUNDING:
            raise ValueError("its sigma has variances below 0, and so is no covariance")
    except Exception as error:  # a damaged archive can raise anything at all
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot read {path}: {reason}; name a file with mu and sigma") from None
    return mean, covariance, network


def score_generator(sampler, count, extractor, reference):
    """FID and Inception Score of `count` pictures of a sampler's averaged generator, against the reference statistics.

    Returns {"fid": ..., "is": ..., "is_deviation": ...}. The noise is always the same for a seed and a count.
    """

    def batches():
        for number, first in enumerate(range(0, count, AT_ONCE)):
            rng = data.random_stream("evaluate", sampler.options.seed, number)
            yield data.to_bytes(sampler.sample(sampler.noise(min(AT_ONCE, count - first), rng)))

    statistics, logits = look(batches(), count, extractor, "generated pictures")
    mean, deviation = inception_score(logits)
    return {"fid": frechet_distance(statistics.mean, statistics.covariance, *reference), "is": mean,
            "is_deviation": deviation}  # fmt: skip


DIMS = {"inception": FEATURES, "own": classifier.FEATURES}


def load_extractor(features, load, dataset, data_dir, inception=None):
    """The network that looks: "inception", with weights from a file or downloaded, or "own". Raises UserError.

    load: gives the data set's pictures, bytes (N, 3, S, S), which the own one is of.
    """
    if features == "inception":
        return load_inception(inception, data_dir)
    return classifier.load_classifier(load(), dataset, data_dir)


def need_two(pictures):
    """The pictures. Raises UserError if a single one is all there is, which has no covariance."""
    if len(pictures) < 2:
        raise UserError("FID needs two real pictures or more; add some to the folder")
    return pictures


def own_scores(trainer, count, data_dir):
    """A function that gives a trainer's FID-own and IS-own as they are now, {"fid_own": ..., "is_own": ...}, for its log.

    Trains the classifier first, and has it look at the real pictures, where that was not done before. Raises UserError.
    """
    pictures, dataset = need_two(trainer.batches.pictures), trainer.options.dataset
    extractor = load_extractor("own", lambda: pictures, dataset, data_dir)
    reference = reference_statistics(pictures, dataset, extractor, data_dir)

    def measure():
        scores = score_generator(trainer, count, extractor, reference)
        return {"fid_own": scores["fid"], "is_own": scores["is"]}

    return measure


# What has to be the same of two scores that are compared: how many pictures, against which, through which network.
MEASURED_BY = ("images", "against", "reference", "statistics", "weights", "network", "resizing")
MADE_OF = ("step", "generator", *MEASURED_BY)  # what of two that are one and the same; the rest is numbers and date


def agree(entry, other, names):
    """Whether two entries of scores.json say the same under each of these names."""
    return all(entry.get(name) == other.get(name) for name in names)


def read_scores(path):
    """The entries of a run's scores.json, [] if there is none. Raises UserError, also where it cannot be written."""
    files.need_folder(path.parent, "--out")
    try:
        entries = files.parse_json(files.plain(path).read_text("utf-8")) if path.exists() else []
        if type(entries) is not list:
            raise ValueError(f"it is a {type(entries).__name__}")
        for entry in entries:
            numbers = dict.fromkeys([name for name in entry if name.startswith(("fid", "is"))], float)
            for name, kind in {"step": int, "images": int, "weights": str, **numbers}.items():
                if type(entry[name]) is not kind or (kind is not str and entry[name] < 0):
                    raise ValueError(f"its {name} cannot be {entry[name]!r:.20}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path} is not a list of this program's scores ({reason}); move it away, or choose another --out"
                        ) from None  # fmt: skip
    return entries


def evaluate(run, sampler, load, features, count, data_dir, inception=None, fid_stats=None):
    """Score a run's generator: print the numbers as one line to quote, and add them to scores.json in its folder.

    sampler: program.trainer.Sampler; load: a function that gives the pictures of the run's data set, called only where
    they are needed; features: "inception" or "own"; count: generated pictures; fid_stats: a file to take the reference
    statistics from instead. What is to be read is read before any work is begun. A score takes the place of one that is
    made of the same, see MADE_OF, and of no other. Raises UserError.
    """
    options, path, extractor = sampler.options, run / "scores.json", None
    pictures = functools.cache(lambda: need_two(load()))
    read_scores(path)
    if fid_stats:
        *reference, network = read_statistics(fid_stats, DIMS[features])
        if features == "own":  # which a checkpoint and statistics of this program tell of, so that no picture is needed
            extractor = classifier.kept_classifier(options.dataset, data_dir, sampler.pictures, network)
        extractor = extractor or load_extractor(features, pictures, options.dataset, data_dir, inception)
        if network not in (None, extractor.digest):
            raise UserError(f"{fid_stats} is of another network than {extractor.weights}; name statistics of this one")
        against, digest = f"the statistics in {Path(fid_stats).name}", files.fingerprint(*reference)
    else:
        extractor = load_extractor(features, pictures, options.dataset, data_dir, inception)
        reference = reference_statistics(pictures(), options.dataset, extractor, data_dir)
        against = f"{len(pictures()):,} pictures of {Path(options.dataset).name}"
        digest = files.fingerprint(pictures())
    scores = score_generator(sampler, count, extractor, reference)
    suffix = extractor.suffix
    entry = {"step": sampler.step, "generator": sampler.digest, "images": count, "against": against, "reference": digest,
             "statistics": fid_stats and str(fid_stats), "weights": extractor.weights, "network": extractor.digest,
             "resizing": extractor.resizing, "date": datetime.date.today().isoformat()}  # fmt: skip
    entry |= {f"{name}{suffix.replace('-', '_')}": value for name, value in scores.items()}
    line = (
        f"FID{suffix} {scores['fid']:.2f}, IS{suffix} {scores['is']:.2f} ± {scores['is_deviation']:.2f} ({options.pair}, "
        f"step {sampler.step}; {count:,} pictures against {against}; {extractor.weights}; "
        f"resizing: {extractor.resizing}; reference digest {digest[:8]})"
    )
    try:
        known = [old for old in read_scores(path) if not agree(old, entry, MADE_OF)]
        with files.whole_file(path) as part:
            part.write_text(json.dumps([*known, entry], indent=2, allow_nan=False) + "\n", "utf-8")
    finally:  # either may fail, and the other then has the numbers
        output.tell(line, event="scores", **entry)
