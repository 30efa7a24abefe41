"""Inception-v3, the network through whose eyes Inception Score and FID look at pictures: its forward pass.

The story of this chapter: how good generated pictures are is judged by a network that learned to tell the thousand classes
of ImageNet apart. Its last features before the classifier say what is in a picture and how it looks; FID compares the
features of generated and of real pictures, the Inception Score asks how sure and how diverse the classes are. Scores can be
compared only where the network is the same to the last detail, so this is the one that FID's authors used (Szegedy et al.
2015, arXiv 1512.00567; Heusel et al. 2017, arXiv 1706.08500): TensorFlow's graph of 2015-12-05, with the weights as
pytorch-fid publishes them. The network is a table; two short walks over it say which weights it needs, and run it.

In comments on shapes: B batch, C channels, H and W height and width.
"""

import functools
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

import numpy as np

import autograd as ag
from autograd import Tensor
from data import UserError
from fast import CORES
from paper import convolutions
from paper.weights import read_weights
from store import downloads, files

# --- 1. The table -----------------------------------------------------------------------------------------------------
# A chain is a list of steps, one after another: a convolution, a pooling function, or a fork into chains that all read the
# same picture and whose results are stacked as channels. Names are those of torchvision and so of the weights.


class Conv(NamedTuple):
    """A convolution without bias, then batch normalization, then max(x, 0)."""

    name: str
    outputs: int
    kernel: tuple  # rows, columns
    stride: int = 1
    padding: tuple = (0, 0)


class Fork:
    """Chains side by side; `name` stands before the names of all that is in them."""

    def __init__(self, name, *chains):
        self.name, self.chains = name, chains


def conv(name, outputs, rows, columns, stride=1):
    """A convolution padded with as many zeros as keep the picture's size; with a stride, without padding."""
    return Conv(name, outputs, (rows, columns), stride, (rows // 2, columns // 2) if stride == 1 else (0, 0))


def row(name, *convs):
    """Convolutions one after another, NAME_1, NAME_2, ..., each given as the arguments of `conv`."""
    return [conv(f"{name}_{i}", *arguments) for i, arguments in enumerate(convs, 1)]


# Pooling over 3x3: one that halves, (B, C, H, W) -> (B, C, (H - 1) // 2, (W - 1) // 2), and two that keep the shape. The
# mean is that of the pixels inside the picture; torchvision's counts the zeros around it too.
HALVE = functools.partial(convolutions.max_pool2d, kernel=3, stride=2)
MAX = functools.partial(convolutions.max_pool2d, kernel=3, stride=1, padding=1)
MEAN = functools.partial(convolutions.avg_pool2d, kernel=3, stride=1, padding=1)


def inception_a(name, pool):
    """(B, C, 35, 35) -> (B, 64 + 64 + 96 + pool, 35, 35): windows of four sizes (Szegedy et al. 2015, figures 4 and 5)."""
    return Fork(
        name,
        [conv("branch1x1", 64, 1, 1)],
        row("branch5x5", (48, 1, 1), (64, 5, 5)),
        row("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
        [MEAN, conv("branch_pool", pool, 1, 1)],
    )


def inception_b(name):
    """(B, 288, 35, 35) -> (B, 384 + 96 + 288, 17, 17): half the resolution, convolved and pooled (figure 10)."""
    return Fork(
        name,
        [conv("branch3x3", 384, 3, 3, 2)],
        row("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3, 2)),
        [HALVE],
    )


def inception_c(name, width):
    """(B, 768, 17, 17) -> (B, 4 * 192, 17, 17): windows of 7x7 made of a row and a column (figure 6)."""
    return Fork(
        name,
        [conv("branch1x1", 192, 1, 1)],
        row("branch7x7", (width, 1, 1), (width, 1, 7), (192, 7, 1)),
        row("branch7x7dbl", (width, 1, 1), (width, 7, 1), (width, 1, 7), (width, 7, 1), (192, 1, 7)),
        [MEAN, conv("branch_pool", 192, 1, 1)],
    )


def inception_d(name):
    """(B, 768, 17, 17) -> (B, 320 + 192 + 768, 8, 8): half the resolution again."""
    return Fork(
        name,
        row("branch3x3", (192, 1, 1), (320, 3, 3, 2)),
        row("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3, 2)),
        [HALVE],
    )


def inception_e(name, pool):
    """(B, C, 8, 8) -> (B, 320 + 2 * 384 + 2 * 384 + 192, 8, 8): a row and a column side by side (figure 7)."""

    def both(name):
        return Fork(name, [conv("a", 384, 1, 3)], [conv("b", 384, 3, 1)])

    return Fork(
        name,
        [conv("branch1x1", 320, 1, 1)],
        [*row("branch3x3", (384, 1, 1)), both("branch3x3_2")],
        [*row("branch3x3dbl", (448, 1, 1), (384, 3, 3)), both("branch3x3dbl_3")],
        [pool, conv("branch_pool", 192, 1, 1)],
    )


NETWORK = [  # (B, 3, 299, 299)
    conv("Conv2d_1a_3x3", 32, 3, 3, 2),  # (B, 32, 149, 149)
    Conv("Conv2d_2a_3x3", 32, (3, 3)),  # (B, 32, 147, 147), without padding
    conv("Conv2d_2b_3x3", 64, 3, 3),  # (B, 64, 147, 147)
    HALVE,  # (B, 64, 73, 73)
    conv("Conv2d_3b_1x1", 80, 1, 1),  # (B, 80, 73, 73)
    Conv("Conv2d_4a_3x3", 192, (3, 3)),  # (B, 192, 71, 71), without padding
    HALVE,  # (B, 192, 35, 35)
    inception_a("Mixed_5b.", 32),  # (B, 256, 35, 35)
    inception_a("Mixed_5c.", 64),  # (B, 288, 35, 35)
    inception_a("Mixed_5d.", 64),  # (B, 288, 35, 35)
    inception_b("Mixed_6a."),  # (B, 768, 17, 17)
    inception_c("Mixed_6b.", 128),  # (B, 768, 17, 17)
    inception_c("Mixed_6c.", 160),  # (B, 768, 17, 17)
    inception_c("Mixed_6d.", 160),  # (B, 768, 17, 17)
    inception_c("Mixed_6e.", 192),  # (B, 768, 17, 17)
    inception_d("Mixed_7a."),  # (B, 1280, 8, 8)
    inception_e("Mixed_7b.", MEAN),  # (B, 2048, 8, 8)
    inception_e("Mixed_7c.", MAX),  # (B, 2048, 8, 8); a maximum in this graph, a mean in torchvision
]
SIDE, CLASSES = 299, 1008  # pixels a side of what NETWORK sees; ImageNet's 1000 classes and eight that were never used


def shapes_of(chain, channels, prefix=""):
    """The weights' shapes of all convolutions in a chain, {name: (outputs, inputs, kh, kw)}, and its last channels."""
    shapes = {}
    for step in chain:
        if isinstance(step, Conv):
            shapes[prefix + step.name] = (step.outputs, channels, *step.kernel)
            channels = step.outputs
        elif isinstance(step, Fork):
            parts, widths = zip(*(shapes_of(inner, channels, prefix + step.name) for inner in step.chains), strict=True)
            for part in parts:
                shapes |= part
            channels = sum(widths)
    return shapes, channels


SHAPES, FEATURES = shapes_of(NETWORK, 3)  # FEATURES is 2048

# --- 2. The network ---------------------------------------------------------------------------------------------------

EPS = 0.001  # of the batch normalization
GPU_BATCH = 64  # pictures at once; a thread of a CPU takes one at a time, which is as fast and shares them out evenly


def look_in_parts(look, pictures, size):
    """Features (B, D) and logits (B, K), NumPy, of bytes (B, 3, H, W): look's Tensors of `size` pictures at a time, each in
    a thread of its own on a CPU."""

    def part(first):
        with ag.no_grad():
            return [ag.to_numpy(x) for x in look(pictures[first : first + size])]

    with futures.ThreadPoolExecutor(CORES if ag.xp is np else 1) as pool:
        parts = pool.map(part, range(0, len(pictures), size))
        return tuple(np.concatenate(x) for x in zip(*parts, strict=True))


class Inception:
    """FID's Inception-v3: bytes (B, 3, H, W), NumPy -> features (B, 2048) and logits (B, 1008), NumPy arrays of `dtype`.

    weights: NumPy arrays by name, as in the published file; name: where they come from, to be quoted beside scores, with
    their digest. What comes out for a picture depends on nothing but the picture: on a CPU to the bit, on a GPU up to
    rounding. Raises UserError for the first array that is missing, of a wrong shape or not of numbers, naming it.
    """

    suffix, dims, resizing = "", FEATURES, f"bilinear to {SIDE}x{SIDE}"  # what `paper.scores` asks of a network

    def __init__(self, weights, dtype=np.float32, name="Inception-v3"):
        self.dtype, self.layers = dtype, {}
        for layer, shape in SHAPES.items():
            weight = _take(weights, f"{layer}.conv.weight", shape)
            gamma, beta, mean, variance = (
                _take(weights, f"{layer}.bn.{part}", shape[:1])
                for part in ("weight", "bias", "running_mean", "running_var")
            )
            # (conv(x) - mean) / sqrt(variance + eps) * gamma + beta is a convolution again, with a bias
            scale = gamma / np.sqrt(variance + EPS)
            bias = beta - mean * scale
            self.layers[layer] = Tensor(weight * scale[:, None, None, None], dtype=dtype), Tensor(bias, dtype=dtype)
        self.classifier = Tensor(_take(weights, "fc.weight", (CLASSES, FEATURES)), dtype=dtype)
        arrays = [x for layer in self.layers.values() for x in layer]
        self.digest = files.fingerprint(*map(ag.to_numpy, [*arrays, self.classifier]))
        self.weights = f"{name}, digest {self.digest[:8]}"

    def __call__(self, pictures):
        return look_in_parts(self.look, pictures, 1 if ag.xp is np else GPU_BATCH)

    def look(self, pictures):
        """Features and logits of a few pictures. The logits lack the classifier's bias.

        That is how the Inception Score's own code (Salimans et al. 2016) computes them: it multiplies the features with the
        classifier's matrix again, and leaves it at that.
        """
        x = Tensor(pictures, dtype=self.dtype) / 255  # (B, 3, H, W) in [0, 1]
        x = convolutions.resize_bilinear(x, SIDE, SIDE) * 2 - 1  # (B, 3, 299, 299) in [-1, 1]
        features = self.run(NETWORK, x).mean(axis=(2, 3))  # (B, 2048, 8, 8) -> (B, 2048)
        return features, features @ self.classifier.T

    def run(self, chain, x, prefix=""):
        """A chain of the table on a Tensor (B, C, H, W)."""
        for step in chain:
            if isinstance(step, Conv):
                weight, bias = self.layers[prefix + step.name]
                x = convolutions.conv2d(x, weight, bias, step.stride, step.padding)
                ag.xp.maximum(x.data, 0, out=x.data)  # in place: nobody else has seen this array
            elif isinstance(step, Fork):
                x = ag.concatenate([self.run(inner, x, prefix + step.name) for inner in step.chains], axis=1)
            else:
                x = step(x)
        return x


def _take(weights, name, shape):
    """The array `name`, in float64. Raises UserError unless it is there, has this shape, and holds what it can."""
    try:
        array = np.asarray(weights[name], np.float64)
        possible = array.shape == shape and np.isfinite(array).all() and (array.min() >= 0 or not name.endswith("var"))
    except (KeyError, TypeError, ValueError):
        possible = False
    if not possible:
        raise UserError(f"the weights of Inception-v3 have no {name} of shape {shape}, or impossible numbers in it; fetch "
                        f"{WEIGHTS.name} anew from {WEIGHTS.page}")  # fmt: skip
    return array


# --- 3. Its weights ---------------------------------------------------------------------------------------------------

WEIGHTS = downloads.Archive(
    "pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "sha256:6726825d",  # its first digits, as PyTorch's hub has them in the name
    "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights",
)


def load_inception(path=None, data_dir="data"):
    """The Inception network with the published weights in the file `path`, or else in the folder data_dir.

    There they are downloaded, 96 MB, unless an earlier call did. Raises UserError for whatever is wrong with them.
    """
    path = path or downloads.fetch(WEIGHTS, data_dir)
    return Inception(read_weights(path), name=f"Inception-v3 of {Path(path).name}")
