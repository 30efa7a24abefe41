"""What the published code itself computes, number by number: a reference that cannot drift together with ours.

paper/published/*.json hold what the authors' own modules computed (each file says of which repository and commit), made on
2026-11-25 on a CPU with PyTorch 2.13 in float64. The arithmetic was as published; replaced were a module that PyTorch has
dropped, moves to a GPU, and the random generators, which gave the numbers of a formula, `numbers_of`. So whoever fills our
networks by the same formula, and compares, needs NumPy alone.
"""

import json
from pathlib import Path

import transgan

import numpy as np  # isort: skip
import pytest

import autograd as ag
from autograd import Tensor, grad
from paper import convolutions, scores
from paper import networks as peers

POLICIES = ("translation", "cutout", "color", "translation,cutout,color", "color,translation,cutout")
RUNS = (("wgangp-eps", "none"), ("wgangp-eps", "translation,cutout,color"), ("hinge", "none"))


def numbers_of(i, *shape):
    """Numbers in [-1, 1), array `i` of them in float64, from whole numbers modulo 2^32: the j-th, row by row, is u(i, j),

    h = j + 1 + 2654435769 (i + 1);  twice: h = 73244475 (h xor floor(h / 2^16));  h = h xor floor(h / 2^16);
    u = 2 h / 2^32 - 1.
    """
    h = np.arange(1, np.prod(shape, dtype=int) + 1, dtype=np.uint32) + np.uint32(2654435769 * (i + 1) % 2**32)
    for _ in range(2):
        h = np.uint32(73244475) * (h ^ (h >> 16))
    return ((h ^ (h >> 16)) * 2.0**-31 - 1).reshape(shape)


def fill(network, first):
    """Give each parameter of a network the published run's weights; number n has stream first + n.

    first: 0 for a generator, 500 for a discriminator. Weights of two axes (inputs, outputs) and of four (outputs, channels,
    kernel, kernel) are sqrt(3 / inputs) u, those of a normalization 1 + 0.2 u, all else 0.2 u.
    """
    for n, (name, p) in enumerate(network.parameters().items()):
        u = stream(first + n, *p.shape)
        if not name.endswith("weight"):
            p.data[...] = 0.2 * u
        elif p.ndim == 1:
            p.data[...] = 1 + 0.2 * u
        else:
            inputs = p.shape[0] if p.ndim == 2 else np.prod(p.shape[1:])
            p.data[...] = float(np.sqrt(3 / inputs)) * u


def probes(arrays):
    """What stands for arrays too large to keep: float64 (n, 2), for array r its Euclidean norm and its product with stream
    5000 + r. The product tells every transposition, permutation and sign."""
    rows = [ag.to_numpy(x).astype(np.float64).ravel() for x in arrays]
    return np.array([(np.linalg.norm(x), x @ numbers_of(5000 + r, x.size)) for r, x in enumerate(rows)])


def assert_probes(arrays, published, rtol):
    """Assert that arrays agree with the published `probes` (n, 2), to `rtol` of their norm.

    Where nothing but rounding is left, as in the gradient of a bias that is taken away again, the scale is 1e-4 of the
    largest norm.
    """
    published = np.array(published)
    scale = np.maximum(published[:, :1], 1e-4 * published[:, 0].max())
    error = (probes(arrays) - published) / scale
    assert np.abs(error).max() <= rtol, f"array {np.abs(error).max(axis=1).argmax()} of {len(published)}: {error}"


def published(kind):
    """The published numbers of a kind, by name: paper/published/{kind}.json."""
    return json.loads((Path(__file__).parent / "published" / f"{kind}.json").read_text())


def networks(width, depths, disc_width, disc_depth):
    """Both networks for pictures of 32x32, in float64, with the published runs' weights."""
    rng = np.random.default_rng(0)
    generator = transgan.Generator(32, width, depths, rng, dtype=np.float64)
    discriminator = transgan.Discriminator(32, 4, disc_width, disc_depth, rng, dtype=np.float64)
    fill(generator, 0)
    fill(discriminator, 500)
    return generator, discriminator


def stream(*numbers):
    """The published runs' numbers, where arrays live."""
    return ag.xp.asarray(numbers_of(*numbers))


def close(found, expected, rtol=1e-10, **options):
    np.testing.assert_allclose(ag.to_numpy(found), expected, rtol=rtol, **options)


def noise(i, count, width):
    return 3**0.5 * stream(i, count, width)


def mixing_weights(i, count):
    return (1 + stream(i, count, 1, 1, 1)) / 2


@pytest.fixture(scope="module")
def size_s():
    return networks(384, (5, 2, 2), 384, 7)


def test_transgans_generator(size_s):
    numbers, (generator, discriminator) = published("transgan"), size_s
    pictures = generator(Tensor(noise(1000, 2, 384)))
    assert_probes(pictures.data, numbers["pictures"], 1e-10)
    loss = transgan.generator_loss(discriminator(pictures).reshape(1, -1), "wgangp-eps")
    close(loss, numbers["generator_loss"])
    gradients = grad(loss, list(generator.parameters().values()))
    assert_probes([g.data for g in gradients], numbers["generator_gradients"], 1e-9)


@pytest.mark.parametrize("name", ["wgangp", "hinge"])
def test_transgans_discriminator(name, size_s):
    numbers, (_, discriminator) = published("transgan"), size_s
    real, fake, mix = stream(1001, 3, 3, 32, 32), stream(1002, 3, 3, 32, 32), mixing_weights(1003, 3)
    option = {"wgangp": "wgangp-eps"}.get(name, name)
    judged = transgan.discriminator_scores(discriminator, real, fake, mix, option)
    close(judged[:2], numbers["scores"])
    loss, penalty = transgan.discriminator_loss(judged, option)
    close(loss, numbers[f"{name}_loss"])
    if penalty is not None:
        close(penalty, numbers["penalty"])
    gradients = grad(loss, list(discriminator.parameters().values()))
    assert_probes([g.data for g in gradients], numbers[f"{name}_gradients"], 1e-9)


@pytest.fixture
def autogan():
    """Both of AutoGAN's networks, narrow, in float64, with the published runs' weights."""
    rng = np.random.default_rng(0)
    generator = peers.AutoGANGenerator(32, 32, peers.PeerInit(rng, "glorot", np.float64))
    discriminator = peers.ResidualDiscriminator(32, 16, peers.PeerInit(rng, "default", np.float64), True)
    fill(generator, 0)
    fill(discriminator, 500)
    return generator, discriminator


def test_autogans_generator(autogan):
    numbers, (generator, _) = published("autogan"), autogan
    z = Tensor(noise(1000, 3, 128))
    pictures = generator(z)
    assert_probes(pictures.data, numbers["training_pictures"], 1e-10)
    gradients = grad((pictures * stream(1004, *pictures.shape)).sum(), list(generator.parameters().values()))
    assert_probes([g.data for g in gradients], numbers["generator_gradients"], 1e-9)
    averages = generator.buffers()
    assert_probes([averages["norm.mean"], averages["norm.variance"]], numbers["running_averages"], 1e-10)
    for module in generator.modules():
        module.training = False
    assert_probes(generator(z).data, numbers["evaluating_pictures"], 1e-10)


def test_autogans_discriminator(autogan):
    numbers, (_, discriminator) = published("autogan"), autogan
    normalized = [module for module in discriminator.modules() if hasattr(module, "u")]
    for layer, module in enumerate(normalized):  # the last has one output in theirs, and any direction leads to its own
        u = stream(1100 + layer, len(module.u))
        module.u = convolutions.power_iteration(module.weight.data, u / ag.xp.linalg.norm(u))
    close(ag.xp.concatenate([x.u for x in normalized[:-1]]), numbers["directions"], atol=1e-10)
    lengths = [float(ag.xp.linalg.norm(x.weight.data.reshape(len(x.u), -1).T @ x.u)) for x in normalized]
    close(lengths, numbers["singular_values"])
    parameters = list(discriminator.parameters().values())
    on_real, on_fake = (discriminator(Tensor(stream(i, 3, 3, 32, 32))) for i in (1001, 1002))
    judged = ag.concatenate([x.reshape(1, 3) for x in (on_real, on_fake)])
    close(judged, numbers["scores"])
    loss, _ = transgan.discriminator_loss(judged, "hinge")
    close(loss, numbers["hinge_loss"])
    assert_probes([g.data for g in grad(loss, parameters, create_graph=True)], numbers["hinge_gradients"], 1e-9)
    weights = stream(1004, 2, 3)
    weighted = (on_real * weights[0] + on_fake * weights[1]).sum()
    assert_probes([g.data for g in grad(weighted, parameters)], numbers["weighted_gradients"], 1e-9)


@pytest.mark.parametrize("side", [8, 9, 32])
@pytest.mark.parametrize("policy", POLICIES)
def test_augmentation(side, policy):
    numbers, k = published("augmentation"), POLICIES.index(policy)
    x = Tensor(stream(1001, 4, 3, side, side), requires_grad=True)
    made = transgan.diff_augment(x, policy, ag.xp.asarray(numbers[f"draws_{side}"]))
    (gradient,) = grad((made * stream(1004, *made.shape)).sum(), [x])
    assert_probes(made.data, numbers[f"pictures_{side}_{k}"], 1e-10)
    assert_probes(gradient.data, numbers[f"gradients_{side}_{k}"], 1e-10)


@pytest.mark.parametrize("run", range(3))
def test_two_rounds_of_training(run):
    """Two updates of the discriminator and one of the generator, twice, from the published runs' weights and inputs."""
    numbers, (generator, discriminator) = published("training"), networks(128, (2, 2, 2), 128, 3)
    loss, policy = RUNS[run]
    options = transgan.Options(loss=loss, diff_aug=policy, batch_size=2, gen_batch_size=3, sr_weight=0, locality="none")
    trainer = transgan.Trainer(options, np.zeros((4, 3, 32, 32), np.uint8), generator, discriminator)
    start = {name: p.data.copy() for network in (generator, discriminator) for name, p in network.parameters().items()}
    losses = []
    for d, draws in enumerate(np.reshape(numbers["draws"], (4, 9, -1))):
        i = 2000 + 10 * d
        inputs = [stream(i, 2, 3, 32, 32), noise(i + 1, 2, 128), mixing_weights(i + 2, 2),
                  draws[:6].reshape(3, 2, -1).swapaxes(0, 1)]  # fmt: skip
        losses.append(trainer.discriminator_step(inputs, rate=1e-4)["disc_loss"])
        if d % 2:  # D, D, G, D, D, G
            losses.append(trainer.generator_step([noise(i + 3, 3, 128), draws[6:]], rate=1e-4)["gen_loss"])
    close([float(x) for x in losses], numbers[f"losses_{run}"])
    for kind, arrays, rtol in (
        ("discriminator", {name: p.data for name, p in discriminator.parameters().items()}, 1e-7),
        ("generator", {name: p.data for name, p in generator.parameters().items()}, 1e-7),
        ("average", trainer.average, 1e-6),  # of a change of 1e-7 fewer digits are left
    ):
        for (name, x), (total, squares, entry) in zip(arrays.items(), numbers[f"{kind}_{run}"], strict=True):
            change, size = ag.to_numpy(x - start[name]).ravel(), np.sqrt(squares)
            close((change**2).sum(), squares, rtol=2 * rtol, err_msg=name)
            close(change.sum(), total, atol=rtol * size * np.sqrt(x.size), rtol=0, err_msg=name)
            close(change[(x.size - 1) // 4], entry, atol=rtol * size, rtol=0, err_msg=name)


@pytest.mark.parametrize("i, dims, counts", [(0, 16, (60, 80)), (1, 48, (200, 150)), (2, 24, (13, 100)), (3, 24, (13, 17))])
def test_fid(i, dims, counts):
    numbers, gaussians = published("scores"), []
    for a, count in zip((2 * i, 2 * i + 1), counts, strict=True):
        own, mix, shift = ((count, dims), (dims, dims), (dims,))
        features = numbers_of(3000 + 3 * a, *own) @ numbers_of(3001 + 3 * a, *mix) + numbers_of(3002 + 3 * a, *shift)
        statistics = scores.Statistics(dims)
        statistics.add(features)
        gaussians += [statistics.mean, statistics.covariance]
    found, singular = scores.frechet_distance(*gaussians), min(counts) <= dims
    np.testing.assert_allclose(found, numbers["fid"][i], rtol=1e-7 if singular else 1e-12)
    np.testing.assert_allclose(found, numbers["fid_exact"][i], rtol=1e-8 if singular else 1e-12)


@pytest.mark.parametrize("i, count, parts", [(0, 500, 10), (1, 503, 10), (2, 97, 7)])
def test_inception_score(i, count, parts):
    found = scores.inception_score(4 * numbers_of(4000 + i, count, 20), parts)
    np.testing.assert_allclose(found, published("scores")["inception_score"][i], rtol=1e-12)
