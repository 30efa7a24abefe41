"""The promises of paper/inception.py: python -m pytest paper/test_inception.py

The network is held against the same one in PyTorch, written down here a second time, under random weights in a file like
the published one. Each rule that implementations disagree about is then broken on PyTorch's side, which the comparison must
notice.
"""

import dataclasses
import functools
import hashlib
import re

import test_transgan as base

import numpy as np  # isort: skip
import pytest

import autograd as ag
from data import UserError
from paper import inception
from paper.weights import read_weights
from program import support
from store.support import server, slope

try:
    import torch
    from torch.nn import functional as F
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="compares with PyTorch")

# --- 1. The same network in PyTorch -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Rules:
    """Where implementations of Inception-v3 differ, as FID has it."""

    eps: float = 0.001
    count_padding: bool = False
    last_pool: str = "max"
    align_corners: bool = False
    antialias: bool = False
    darkest: float = -1.0
    classifier_bias: bool = False


class Reference:
    """The network in PyTorch's words. Weights are drawn, in float32, when a layer first looks for them."""

    def __init__(self, weights=None, **rules):
        self.weights, self.rules = {} if weights is None else weights, Rules(**rules)
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, name, outputs, inputs, kernel):
        """He's weights and statistics that leave a normal distribution about as wide as it was."""

        def uniform(low, high):
            return low + (high - low) * torch.rand(outputs, generator=self.generator)

        shape = (outputs, inputs, *((kernel, kernel) if isinstance(kernel, int) else kernel))
        weight = torch.randn(shape, generator=self.generator) * (2 / np.prod(shape[1:])) ** 0.5
        self.weights |= {
            f"{name}.conv.weight": weight,
            f"{name}.bn.weight": uniform(0.7, 1.3),
            f"{name}.bn.bias": uniform(-0.3, 0.3),
            f"{name}.bn.running_mean": uniform(-0.3, 0.3),
            f"{name}.bn.running_var": uniform(0.5, 1.5),
            f"{name}.bn.num_batches_tracked": torch.tensor(7),
        }

    def conv(self, block, x, name, outputs, kernel, stride=1, padding=0):
        name = block + name
        if f"{name}.conv.weight" not in self.weights:
            self.draw(name, outputs, x.shape[1], kernel)
        weight, gamma, beta, mean, variance = (
            self.weights[f"{name}.{part}"].to(x.dtype)
            for part in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
        )
        y = F.conv2d(x, weight, None, stride, padding)
        return F.relu(F.batch_norm(y, mean, variance, gamma, beta, eps=self.rules.eps))

    def mean(self, x):
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=self.rules.count_padding)

    def a(self, block, x, pool_features):
        conv = functools.partial(self.conv, f"Mixed_{block}.")
        y = conv(conv(x, "branch5x5_1", 48, 1), "branch5x5_2", 64, 5, padding=2)
        z = conv(conv(x, "branch3x3dbl_1", 64, 1), "branch3x3dbl_2", 96, 3, padding=1)
        z = conv(z, "branch3x3dbl_3", 96, 3, padding=1)
        return torch.cat([conv(x, "branch1x1", 64, 1), y, z, conv(self.mean(x), "branch_pool", pool_features, 1)], 1)

    def b(self, block, x):
        conv = functools.partial(self.conv, f"Mixed_{block}.")
        z = conv(conv(x, "branch3x3dbl_1", 64, 1), "branch3x3dbl_2", 96, 3, padding=1)
        z = conv(z, "branch3x3dbl_3", 96, 3, stride=2)
        return torch.cat([conv(x, "branch3x3", 384, 3, stride=2), z, F.max_pool2d(x, 3, stride=2)], 1)

    def c(self, block, x, c7):
        conv = functools.partial(self.conv, f"Mixed_{block}.")
        y = conv(conv(x, "branch7x7_1", c7, 1), "branch7x7_2", c7, (1, 7), padding=(0, 3))
        y = conv(y, "branch7x7_3", 192, (7, 1), padding=(3, 0))
        z = conv(conv(x, "branch7x7dbl_1", c7, 1), "branch7x7dbl_2", c7, (7, 1), padding=(3, 0))
        z = conv(z, "branch7x7dbl_3", c7, (1, 7), padding=(0, 3))
        z = conv(z, "branch7x7dbl_4", c7, (7, 1), padding=(3, 0))
        z = conv(z, "branch7x7dbl_5", 192, (1, 7), padding=(0, 3))
        return torch.cat([conv(x, "branch1x1", 192, 1), y, z, conv(self.mean(x), "branch_pool", 192, 1)], 1)

    def d(self, block, x):
        conv = functools.partial(self.conv, f"Mixed_{block}.")
        y = conv(conv(x, "branch3x3_1", 192, 1), "branch3x3_2", 320, 3, stride=2)
        z = conv(conv(x, "branch7x7x3_1", 192, 1), "branch7x7x3_2", 192, (1, 7), padding=(0, 3))
        z = conv(z, "branch7x7x3_3", 192, (7, 1), padding=(3, 0))
        z = conv(z, "branch7x7x3_4", 192, 3, stride=2)
        return torch.cat([y, z, F.max_pool2d(x, 3, stride=2)], 1)

    def e(self, block, x, pool):
        conv = functools.partial(self.conv, f"Mixed_{block}.")
        y = conv(x, "branch3x3_1", 384, 1)
        y = [conv(y, "branch3x3_2a", 384, (1, 3), padding=(0, 1)), conv(y, "branch3x3_2b", 384, (3, 1), padding=(1, 0))]
        z = conv(conv(x, "branch3x3dbl_1", 448, 1), "branch3x3dbl_2", 384, 3, padding=1)
        z = [
            conv(z, "branch3x3dbl_3a", 384, (1, 3), padding=(0, 1)),
            conv(z, "branch3x3dbl_3b", 384, (3, 1), padding=(1, 0)),
        ]
        x = [conv(x, "branch1x1", 320, 1), *y, *z, conv(pool(x), "branch_pool", 192, 1)]
        return torch.cat(x, 1)

    def __call__(self, pictures, dtype=None):
        """Bytes (B, 3, H, W) -> features (B, 2048), logits (B, 1008), all NumPy; float32 if no dtype is given."""
        dtype, rules, conv = dtype or torch.float32, self.rules, functools.partial(self.conv, "")
        x = torch.from_numpy(pictures).to(dtype) / 255
        x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=rules.align_corners, antialias=rules.antialias)
        x = rules.darkest + (1 - rules.darkest) * x
        x = conv(conv(x, "Conv2d_1a_3x3", 32, 3, stride=2), "Conv2d_2a_3x3", 32, 3)
        x = F.max_pool2d(conv(x, "Conv2d_2b_3x3", 64, 3, padding=1), 3, stride=2)
        x = F.max_pool2d(conv(conv(x, "Conv2d_3b_1x1", 80, 1), "Conv2d_4a_3x3", 192, 3), 3, stride=2)
        for block, pool_features in ("5b", 32), ("5c", 64), ("5d", 64):
            x = self.a(block, x, pool_features)
        x = self.b("6a", x)
        for block, c7 in ("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192):
            x = self.c(block, x, c7)
        x = self.e("7b", self.d("7a", x), self.mean)
        maximum = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
        features = self.e("7c", x, maximum if rules.last_pool == "max" else self.mean).mean((2, 3))
        for name, shape in ("fc.weight", (1008, 2048)), ("fc.bias", (1008,)):
            if name not in self.weights:
                self.weights[name] = torch.randn(shape, generator=self.generator) * 2048**-0.5
        weight, bias = (self.weights[name].to(dtype) for name in ("fc.weight", "fc.bias"))
        return features.numpy(), F.linear(features, weight, bias if rules.classifier_bias else None).numpy()


# --- 2. Parity --------------------------------------------------------------------------------------------------------


def drawn(count, height, width):
    """Pictures of a slope and of noise by turns: bytes (count, 3, height, width)."""
    pictures = np.random.default_rng(height).integers(0, 256, (count, 3, height, width), np.uint8)
    pictures[::2] = [slope(height, width, i % 6).transpose(2, 0, 1) for i in range(0, count, 2)]
    return pictures


def apart(ours, theirs):
    """How far two pairs of features and logits lie apart, relative to what tells the pictures apart: two numbers."""
    return [np.linalg.norm(a - b) / np.linalg.norm(b - b.mean(0)) for a, b in zip(ours, theirs, strict=True)]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A state dict, as PyTorch holds it and as it is read from PyTorch's file."""
    reference = Reference()
    reference(drawn(1, 32, 32))
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(reference.weights, path)
    weights = read_weights(path)
    path.unlink()  # 96 MB, which pytest would keep
    return reference.weights, weights


@pytest.fixture(scope="module")
def plain():
    """Weights drawn without PyTorch, by inception's own table."""
    rng, weights = np.random.default_rng(0), {}
    for name, shape in inception.SHAPES.items():
        spread = float(2 / np.prod(shape[1:])) ** 0.5  # He's
        weights[f"{name}.conv.weight"] = spread * rng.standard_normal(shape, np.float32)
        weights |= {f"{name}.bn.{part}": np.full(shape[0], 0.1, np.float32) for part in ("bias", "running_mean")}
        weights |= {f"{name}.bn.{part}": np.ones(shape[0], np.float32) for part in ("weight", "running_var")}
    return weights | {"fc.weight": rng.standard_normal((1008, 2048), np.float32)}


@needs_torch
@pytest.mark.parametrize("size", [(32, 32), (48, 64), (320, 301)])
def test_features_and_logits_are_those_of_pytorch(published, size):
    pictures = drawn(2, *size)
    features, logits = inception.Inception(published[1])(pictures)
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)
    assert features.dtype == logits.dtype == np.float32
    assert max(apart((features, logits), Reference(published[0])(pictures))) < 1e-4


@needs_torch
def test_they_are_the_same_to_the_last_digits_in_float64(published):
    pictures = drawn(2, 40, 32)
    ours, theirs = inception.Inception(published[1], np.float64)(pictures), Reference(published[0])
    assert max(apart(ours, theirs(pictures, torch.float64))) < 1e-11


@needs_torch
def test_every_special_rule_shows(published):
    """Parity to 1e-4 means that they are kept: without one of them, PyTorch's numbers are others."""
    pictures = drawn(2, 320, 301)
    ours = inception.Inception(published[1])(pictures)
    for name, value in (
        ("eps", 1e-5),
        ("count_padding", True),
        ("last_pool", "mean"),
        ("align_corners", True),
        ("antialias", True),
        ("darkest", 0.0),
    ):
        assert min(apart(ours, Reference(published[0], **{name: value})(pictures))) > 1e-3, name
    features, logits = apart(ours, Reference(published[0], classifier_bias=True)(pictures))
    assert features < 1e-4 and logits > 0.01


@base.on_cpu
def test_what_comes_out_depends_on_the_picture_alone(plain, monkeypatch):
    """However many there are, in whatever order, and however many threads look at them: to the bit."""
    network, pictures, found = inception.Inception(plain), drawn(4, 16, 16), []
    for cores, chosen in (1, [0, 1, 2]), (3, [3, 2, 1, 0]):
        monkeypatch.setattr(inception, "CORES", cores)
        found.append(network(pictures[chosen]))
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b[:0:-1])
        assert np.isfinite(a).all() and (a[0] != a[1]).any()


@base.on_cpu
def test_rehearsal_on_a_gpu(plain, rehearsed_gpu, monkeypatch):
    monkeypatch.setattr(inception, "GPU_BATCH", 2)  # and one that is left over
    pictures = drawn(3, 16, 16)
    network = inception.Inception(plain)
    expected, digest = network(pictures), network.digest
    assert ag.use_device("auto") == "a rehearsed GPU"
    network = inception.Inception(plain)
    found = network(pictures)
    assert max(apart(found, expected)) < 1e-4
    assert all(type(x) is np.ndarray for x in found) and network.digest == digest


# --- 3. Weights -------------------------------------------------------------------------------------------------------


def test_number_of_parameters():
    """That of torchvision's inception_v3(num_classes=1008, aux_logits=False)."""
    convolutions = sum(int(np.prod(shape)) + 2 * shape[0] for shape in inception.SHAPES.values())
    assert len(inception.SHAPES) == 94
    assert convolutions + (inception.FEATURES + 1) * inception.CLASSES == 23_850_960


@needs_torch
def test_shapes_are_those_of_pytorch(published):
    end = ".conv.weight"
    assert {k.removesuffix(end): tuple(v.shape) for k, v in published[0].items() if k.endswith(end)} == inception.SHAPES


def test_wrong_weights_are_named_in_one_line(plain):
    def message(change):
        with pytest.raises(UserError) as raised:
            inception.Inception(plain | change)
        assert "\n" not in str(raised.value) and inception.WEIGHTS.page in str(raised.value)
        return str(raised.value)

    name, last = "Mixed_5b.branch1x1.conv.weight", "Mixed_7c.branch_pool.bn.running_var"
    assert f"have no {name} of shape (64, 192, 1, 1)" in message({name: np.ones(3), last: np.ones(3)})
    assert "have no fc.weight of shape (1008, 2048)" in message({"fc.weight": np.ones(3)})
    for wrong in (None, -np.ones(192), np.full(192, np.nan), np.full(192, "x")):
        assert f"have no {last} of shape (192,)" in message({last: wrong})
    for missing in name, last, "fc.weight":
        with pytest.raises(UserError, match=f"^the weights of Inception-v3 have no {missing} of shape"):
            inception.Inception({key: value for key, value in plain.items() if key != missing})


def test_scores_can_tell_networks_apart(plain):
    networks = [inception.Inception(plain | x) for x in ({}, {}, {"fc.weight": plain["fc.weight"] + 1})]
    assert networks[0].digest == networks[1].digest != networks[2].digest
    assert networks[0].dims == 2048 and networks[0].suffix == ""


def test_published_weights_are_downloaded_once(tmp_path, monkeypatch, capsys):
    assert inception.WEIGHTS.url.endswith(inception.WEIGHTS.name)
    assert inception.WEIGHTS.digest == f"sha256:{inception.WEIGHTS.name[-12:-4]}"
    monkeypatch.setattr(inception, "read_weights", lambda path: path.read_bytes())
    monkeypatch.setattr(inception, "Inception", lambda weights, name: (weights, name))
    content = b"not quite 96 MB"
    with server(content) as (url, requests):
        archive = dataclasses.replace(
            inception.WEIGHTS, url=url, digest=f"sha256:{hashlib.sha256(content).hexdigest()[:8]}"
        )
        monkeypatch.setattr(inception, "WEIGHTS", archive)
        for downloads in f"downloading {url}, ", "":
            assert inception.load_inception(data_dir=tmp_path) == (content, f"Inception-v3 of {archive.name}")
            assert capsys.readouterr().err.startswith(downloads) and requests == [None]
        monkeypatch.setattr(inception, "WEIGHTS", dataclasses.replace(archive, digest="sha256:00000000"))
        with pytest.raises(UserError, match="is not the file expected .sha256 .*, not 00000000"):
            inception.load_inception(data_dir=tmp_path)


def test_weights_from_a_file(tmp_path, capsys):
    (tmp_path / "mine.pth").write_bytes(b"no weights")
    for name in "mine.pth", "none.pth":
        with pytest.raises(UserError, match=name):
            inception.load_inception(tmp_path / name)
    assert capsys.readouterr().err == ""


@needs_torch
def test_a_run_is_scored_with_weights_from_a_file(published, small, tmp_path, capsys):
    """From the command line to the quoted line, though there are far fewer pictures than features."""
    weights, out, where = tmp_path / "random.pth", tmp_path / "run", ("--data-dir", tmp_path / "data")
    torch.save(published[0], weights)
    assert support.run_main(*support.TRAIN, "--out", out) == 0
    capsys.readouterr()
    command = ("--evaluate", out, "--features", "inception", "--inception", weights, "--num-images", 12, *where)
    assert support.run_main(*command) == 0
    weights.unlink()  # 96 MB, which pytest would keep
    line = capsys.readouterr().out
    assert re.match(r"FID \d+\.\d\d, IS \d", line)
    digest = "digest [0-9a-f]{8}"
    assert re.search(
        f"12 pictures against 40 pictures of shapes; Inception-v3 of random.pth, {digest}; resizing: bilinear",
        line,
    )
    (stats,) = (tmp_path / "data").glob("fid-stats-*.npz")
    with np.load(stats) as saved:
        assert (saved["mu"].shape, saved["sigma"].shape) == ((2048,), (2048, 2048))
