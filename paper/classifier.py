"""A small classifier of our own, so that IS and FID can be computed in the features of a network that needs no download.

The story of this chapter: Inception-v3 is a classifier of photographs, and its last layer but one is where FID looks. Any
classifier will do to compare generators by, as long as nobody takes its numbers for those of the papers: ours are called
FID-own and IS-own. It is trained on the data set itself, once, with the engine of this project: on classes where they are
known (CIFAR-10; kind and colour of the shapes), and else on telling by how many quarters a picture was turned (Gidaris et
al. 2018), which takes seeing what is in it. What it has learnt is kept in a file that goes by the pictures' fingerprint.
"""

import contextlib
import time
import zipfile
from concurrent import futures
from pathlib import Path

import numpy as np

import autograd as ag
import data
import transgan
from autograd import Linear, Module, Tensor, grad
from fast import CORES
from paper.convolutions import max_pool2d
from paper.inception import look_in_parts
from paper.networks import Conv2d, PeerInit
from store import datasets, files, output

# --- 1. The network ---------------------------------------------------------------------------------------------------

FEATURES = 128


class Classifier(Module):
    """Three convolutions and a linear layer: pictures (B, 3, S, S) -> features (B, 128) and logits (B, classes).

    The features are the means over all places, after the last relu. S >= 4.
    """

    def __init__(self, classes, rng, dtype=np.float32):
        init = PeerInit(rng, "glorot", dtype)
        self.convs = [Conv2d(inputs, outputs, 3, init) for inputs, outputs in ((3, 32), (32, 64), (64, FEATURES))]
        self.head = Linear(FEATURES, classes, init)

    def __call__(self, x):
        for i, conv in enumerate(self.convs):
            x = ag.relu(conv(max_pool2d(x, 2, 2) if i else x))  # (B, 32, S, S), (B, 64, S/2, S/2), (B, 128, S/4, S/4)
        features = x.mean(axis=(2, 3))
        return features, self.head(features)


# --- 2. Training it ---------------------------------------------------------------------------------------------------

STEPS, BATCH, RATE = 1500, 64, 2e-3
CLASSES = {"shapes": 3 * len(data.PALETTE), "cifar10": 10}  # of other pictures, the four quarter turns


def cross_entropy(logits, labels):
    """-log of the probability of the right class, softmax(logits)[label], for each row: (B, K), NumPy (B,) -> (B,)."""
    logits = logits - logits.data.max(axis=1, keepdims=True)  # cancels in the result, and keeps exp from overflowing
    one_hot = ag.xp.asarray(np.eye(logits.shape[1], dtype=logits.dtype)[labels])
    return ag.log(ag.exp(logits).sum(axis=1)) - (logits * one_hot).sum(axis=1)


def turned(pictures, rng):
    """Square pictures (B, 3, S, S), each turned by 0 to 3 quarters, and by how many (B,)."""
    quarters = rng.integers(0, 4, len(pictures))
    return np.stack([np.rot90(x, k, (1, 2)) for x, k in zip(pictures, quarters, strict=True)]), quarters


def train_classifier(pictures, labels, classes, steps=STEPS):
    """A Classifier of bytes (N, 3, S, S) with labels (N,), or of quarter turns if labels is None; and its accuracy.

    Adam (0.9, 0.999) on batches of 64, mirrored at random where turns are not what is asked, the rate falling to 0 in a
    line. The accuracy is that of the last tenth of the steps, on the batches before they were learnt from.
    """
    network = Classifier(classes, data.random_stream("classifier", 0))
    parameters, right = list(network.parameters().values()), []
    adam = ag.Adam(parameters, (0.9, 0.999))
    workers = CORES if ag.xp is np else 1

    def part(share):
        x, y = share
        _, logits = network(Tensor(ag.xp.asarray(x)))
        loss = cross_entropy(logits, y).sum() * (1 / BATCH)
        return (ag.to_numpy(logits).argmax(axis=1) == y).sum(), grad(loss, parameters)

    start = time.monotonic()
    with futures.ThreadPoolExecutor(workers) as pool, output.Progress() as progress:
        for step in range(steps):
            rng = data.random_stream("classifier", 1, step)
            chosen = rng.integers(0, len(pictures), BATCH)
            x, y = data.scale(pictures[chosen]), None if labels is None else labels[chosen]
            x, y = turned(x, rng) if labels is None else (transgan.flip(x, rng), y)
            shares = zip(np.array_split(x, workers), np.array_split(y, workers), strict=True)
            hits, gradients = zip(*pool.map(part, shares), strict=True)
            for pieces in gradients:
                adam.add(pieces)
            adam.step(RATE * (1 - step / steps))
            right.append(sum(hits))
            left = (time.monotonic() - start) / (step + 1) * (steps - step - 1)
            progress(f"training the classifier: step {step + 1}/{steps}, {output.clock(left)} left")
    last = right[-max(1, steps // 10) :]
    return network, sum(last) / (len(last) * BATCH)


# --- 3. Keeping it ----------------------------------------------------------------------------------------------------


class Extractor:
    """The classifier as what `paper.scores` asks of a network: bytes (B, 3, S, S) -> features (B, 128), logits (B, K).

    Features are multiplied by `scale`, so that those of the data set's pictures vary by 1 in the mean: FID-own of random
    networks would else be of any size. dataset, accuracy: what is to be quoted of it.
    """

    suffix, dims, resizing = "-own", FEATURES, "none"

    def __init__(self, network, dataset, accuracy, scale=1.0):
        self.network, self.scale = network, scale
        self.digest = files.fingerprint(np.array([scale], float), *map(ag.to_numpy, network.parameters().values()))
        what = f"{len(network.head.bias)} classes" if dataset in datasets.LABELLED else "quarter turns"
        what = f"{what} of {files.short_name(dataset)}, {100 * accuracy:.0f}% right"
        self.weights = f"own classifier of {what}, digest {self.digest[:8]}"  # two machines make two of the same pictures

    def __call__(self, pictures):
        return look_in_parts(self.look, pictures, 64)

    def look(self, pictures):
        features, logits = self.network(Tensor(ag.xp.asarray(data.scale(pictures))))
        return features * self.scale, logits


def read_classifier(path, dataset):
    """The Extractor in a file. Raises anything at all for one that is missing or damaged."""

    def read(name, like):
        array = files.read_array(saved, name, like.nbytes)
        if (array.shape, array.dtype) != (like.shape, like.dtype) or not np.isfinite(array).all():
            raise ValueError(f"its {name} is not as it was written")
        return array

    with zipfile.ZipFile(files.plain(path)) as saved:
        network = Classifier(CLASSES.get(dataset, 4), data.random_stream("classifier", 0))
        for key, p in network.parameters().items():
            p.data[...] = ag.xp.asarray(read(key, p.data))
        accuracy, scale = (float(read(name, np.empty(()))) for name in ("accuracy", "scale"))
    if not (0 <= accuracy <= 1 and 1e-6 <= scale <= 1e6):
        raise ValueError(f"its accuracy {accuracy} or scale {scale} cannot be")
    return Extractor(network, dataset, accuracy, scale)


def name_of(pictures, dataset):
    """What a file goes by that is made of a data set's pictures, bytes (N, 3, S, S)."""
    return f"{files.short_name(dataset)}-{pictures.shape[-1]}-{files.fingerprint(pictures)}"


def load_classifier(pictures, dataset, data_dir):
    """The Extractor for a data set's pictures, bytes (N, 3, S, S): from its file in data_dir, or trained, some minutes.

    A file that is cut off or damaged is made again. Raises UserError, before the work, if it could not be kept.
    """
    path = Path(data_dir) / f"classifier-{name_of(pictures, dataset)}.npz"
    with contextlib.suppress(Exception):  # a damaged archive can raise anything at all
        return read_classifier(path, dataset)
    with files.being_made(path):
        labels = datasets.load_labels(dataset, data_dir, pictures.shape[-1])
        output.note(f"training a classifier of {files.short_name(dataset)}, once, for FID-own and IS-own")
        network, accuracy = train_classifier(pictures, labels, CLASSES.get(dataset, 4))
        features, _ = Extractor(network, dataset, accuracy)(pictures[:4096])
        scale = 1 / max(float(features.std(axis=0).mean()), 1e-6)
        arrays = {key: ag.to_numpy(p) for key, p in network.parameters().items()}
        files.save_arrays(path, scale=scale, accuracy=accuracy, **arrays)
    return Extractor(network, dataset, accuracy, scale)


def kept_classifier(dataset, data_dir, pictures, digest=None):
    """The Extractor of this digest in data_dir, or without a digest that of pictures of this fingerprint, or None."""
    for path in Path(data_dir).glob("classifier-*.npz" if digest else f"classifier-*-{pictures}.npz"):
        with contextlib.suppress(Exception):  # a damaged archive can raise anything at all
            if digest in (None, (kept := read_classifier(path, dataset)).digest):
                return kept
    return None
