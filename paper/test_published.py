"""What the paper and its published code say of the networks: parameters, first weights, masks."""

import math

import numpy as np  # isort: skip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import autograd as ag
import transgan
from autograd import Tensor
from look.summary import Zeros
from test_transgan import normal

COUNTS = {"S": 18_639_531, "M": 33_083_619, "L": 74_318_163, "XL": 133_592_515}  # counted in the authors' code


def count(network):
    return sum(p.size for p in network.parameters().values())


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts_to_the_last_one(size):
    dimensions = transgan.SIZES[size]
    generator = count(transgan.Generator(32, dimensions.embed_dim, dimensions.depths, Zeros()))
    discriminator = count(transgan.Discriminator(32, 4, dimensions.disc_embed_dim, dimensions.disc_depth, Zeros()))
    assert (generator, discriminator) == (COUNTS[size], 12_458_497)


@given(seed=st.integers(0, 100))
@settings(max_examples=3)
def test_initial_values(seed):
    normal_rule = transgan.Init(np.random.default_rng(seed), "normal")
    weight, bias = (ag.to_numpy(x) for x in normal_rule.linear(400, 300))
    assert weight.dtype == np.float32
    assert (bias == 0).all()
    assert weight.std() == pytest.approx(0.02, rel=0.02)
    assert abs(weight.mean()) < 3e-4
    weight, bias = (ag.to_numpy(x) for x in transgan.Init(np.random.default_rng(seed), "uniform").linear(400, 300))
    for x, tolerance in ((weight, 0.02), (bias, 0.2)):
        assert np.abs(x).max() <= 0.05
        assert x.std() == pytest.approx(0.05 / math.sqrt(3), rel=tolerance)


@pytest.mark.parametrize(("width", "published"), [(384, 0.245), (1024, 0.166)])
def test_first_weights_of_the_layer_to_rgb(width, published):
    """Glorot's: the deviation that the published code showed, of one seed, is among those of a hundred seeds here."""
    layers = [transgan.Generator(4, width, (0, 0, 0), np.random.default_rng(seed)).to_rgb for seed in range(100)]
    weights, biases = (np.stack([ag.to_numpy(getattr(x, name).data) for x in layers]) for name in ("weight", "bias"))
    bound = math.sqrt(6 / (width / 16 + 3))
    assert 0.97 * bound < np.abs(weights).max() <= bound
    assert weights.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert weights.std(axis=(1, 2)).min() < published < weights.std(axis=(1, 2)).max()
    assert 0.97 * (width / 16) ** -0.5 < np.abs(biases).max() <= (width / 16) ** -0.5


@pytest.mark.parametrize("patch", [4, 8])
def test_first_weights_of_the_patches(patch):
    """Glorot's for a convolution: at the paper's 4 pixels, deviations of 0.018 and, of the biases, 0.083 as published."""
    layers = [transgan.Discriminator(32, patch, 384, 0, np.random.default_rng(seed)).embed for seed in range(5)]
    weights, biases = (np.stack([ag.to_numpy(getattr(x, name).data) for x in layers]) for name in ("weight", "bias"))
    bound, bias = math.sqrt(6 / (patch**2 * (3 + 384))), (3 * patch**2) ** -0.5
    assert 0.99 * bound < np.abs(weights).max() <= bound * (1 + 1e-6)
    assert 0.99 * bias < np.abs(biases).max() <= bias * (1 + 1e-6)
    assert weights.std() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert biases.std() == pytest.approx(bias / math.sqrt(3), rel=0.04)
    if patch == 4:
        assert (round(float(weights.std()), 3), biases.std()) == (0.018, pytest.approx(0.083, rel=0.04))


def test_first_pictures_and_scores_spread_as_the_published_networks_do():
    """Size S: pictures of deviation 1.18 (that of other weights was 0.5), scores of random pictures 0.035 (and 0.2)."""
    spreads = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        generator = transgan.Generator(32, 384, (5, 2, 2), rng)
        discriminator = transgan.Discriminator(32, 4, 384, 7, rng)
        z, x = (x.astype(np.float32) for x in normal(seed, (8, 384), (16, 3, 32, 32)))
        with ag.no_grad():
            pictures = generator(Tensor(ag.xp.asarray(z))).data
            scores = discriminator(Tensor(ag.xp.asarray(np.clip(x / 2, -1, 1)))).data
        spreads.append([float(pictures.std()), float(scores.std())])
    assert np.mean(spreads, axis=0) == pytest.approx([1.18, 0.035], rel=0.25)


@given(side=st.integers(1, 6), half_width=st.integers(1, 40))
def test_a_band_reaches_over_the_pictures_edge(side, half_width):
    mask = transgan.window_mask(side, half_width, "band")
    assert [[abs(i - j) <= half_width for j in range(side**2)] for i in range(side**2)] == mask.tolist()


def test_windows_and_bands_have_as_many_keys_as_published():
    for shape, least, most in (("window", 25, 441), ("band", 5, 21)):
        counts = [transgan.window_mask(32, half_width, shape).sum(1) for half_width in (4, 6, 8, 10)]
        assert (counts[0].min(), counts[-1].max()) == (least, most)


def test_a_band_is_for_the_last_block_of_the_last_stage():
    """One block: what a token changes ends at the band. One more before it, which sees all: it ends nowhere."""
    x = normal(0, (1, 256, 4))[0]
    moved = x.copy()
    moved[0, 5 * 16 + 15, 0] += 1.0
    for depth in (1, 2):
        generator = transgan.Generator(16, 64, (1, 1, depth), np.random.default_rng(0), dtype=np.float64)
        generator.attend_within(2, 1, "band")
        assert [mask is None for mask in generator.masks] == [True, True, False]
        a, b = (ag.to_numpy(generator.grow(Tensor(ag.xp.asarray(y)), first=2)) for y in (x, moved))
        (changed,) = np.nonzero((a != b).any(axis=(0, 1)).ravel())
        assert changed.tolist() == (list(range(93, 98)) if depth == 1 else list(range(256)))
