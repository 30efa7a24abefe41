"""The promises of paper/networks.py, as properties: derivatives, parity with PyTorch, training and its resumption."""

import json

import test_transgan as base

import numpy as np  # isort: skip
import pytest
from hypothesis import given, settings

import autograd as ag
import transgan
from autograd import Tensor, grad
from look import summary
from paper import convolutions, networks
from paper.test_published import Zeros, count
from program import checkpoints, main, options, support

PEERS = ("autogan", "resnet")
PAIRS = [("autogan", "autogan"), ("resnet", "resnet"), ("transgan", "autogan"), ("autogan", "transgan")]
COUNTS = {"autogan": (4_405_251, 1_053_824), "resnet": (1_204_483, 1_053_825)}  # of the same layers in PyTorch


def small_pair(name, dtype=np.float64, seed=0, side=8):
    init = networks.PeerInit(np.random.default_rng(seed), "glorot", dtype)
    generator = {"autogan": networks.AutoGANGenerator, "resnet": networks.ResNetGenerator}[name](side, 3, init)
    return generator, networks.ResidualDiscriminator(side, 2, init, name == "autogan")


@pytest.mark.parametrize("name", PEERS)
@settings(max_examples=2)
@given(seed=base.seeds)
def test_derivatives_of_whole_networks(name, seed):
    generator, discriminator = small_pair(name, seed=seed)
    z, x = base.normal(seed, (3, networks.LATENT_DIM), (2, 3, 8, 8))
    for network, inputs in ((generator, z), (discriminator, x)):
        smooth = [ag.xp.asarray(a) for a in (inputs, *(ag.to_numpy(p) for p in network.parameters().values()))]
        filled, _ = base.as_function(network, lambda network: network, seed)

        def function(x, *values, filled=filled):
            return filled(*values)(x)

        assert ag.gradient_check(function, smooth, order=2, coordinates=1, step=1e-6) < 1e-4


@pytest.mark.parametrize("name", PEERS)
def test_parameter_counts_as_the_published_code_has_them(name):
    rng = Zeros()
    generator = networks.make_generator(name, "S", 32, rng)
    discriminator = networks.make_discriminator(name, "S", 32, rng)
    assert (count(generator), count(discriminator)) == COUNTS[name]
    totals = [row[5] for row in summary.summary_rows(generator, discriminator) if row[1] == "total"]
    assert totals == list(COUNTS[name])


@settings(max_examples=3)
@given(seed=base.seeds)
def test_first_weights_are_as_the_authors_draw_them(seed):
    """Uniform laws with bound b, so deviation b / sqrt(3); of AutoGAN's batch norm, N(1, 0.02^2)."""
    rng = np.random.default_rng(seed)

    def drawn(make, name):
        return {key: ag.to_numpy(p) for key, p in make(name, "S", 32, rng).parameters().items()}

    glorot, he = (drawn(networks.make_generator, name) for name in PEERS)
    default, critic = (drawn(networks.make_discriminator, name) for name in PEERS)
    for network, name, bound in (
        (glorot, "cells.0.conv1.weight", (6 / (512 * 9)) ** 0.5),
        (glorot, "cells.2.skips.1.weight", (6 / 512) ** 0.5),
        (glorot, "cells.0.conv1.bias", (256 * 9) ** -0.5),
        (glorot, "project.weight", 128**-0.5),
        (default, "blocks.1.conv1.weight", (128 * 9) ** -0.5),  # deviation 0.0170
        (default, "blocks.1.shortcut.weight", 128**-0.5),
        (he, "blocks.0.conv1.weight", (12 / (256 * 9)) ** 0.5),
        (he, "blocks.0.shortcut.weight", (6 / 256) ** 0.5),
        (he, "to_rgb.weight", (6 / (131 * 9)) ** 0.5),
        (he, "project.weight", (6 / (128 + 2048)) ** 0.5),
        (critic, "blocks.1.conv2.weight", (12 / (256 * 9)) ** 0.5),
    ):
        values = network[name]
        assert abs(values).max() <= bound * (1 + 1e-6), name
        assert values.std() == pytest.approx(bound / 3**0.5, rel=3 * values.size**-0.5), name  # 0.45 a deviation of it
    for network in (he, critic):
        assert not any(values.any() for key, values in network.items() if key.endswith("bias"))
    assert (he["norm.weight"] == 1).all()
    assert glorot["norm.weight"].mean() == pytest.approx(1, abs=0.008)  # six deviations of the mean of 256
    assert glorot["norm.weight"].std() == pytest.approx(0.02, rel=0.25)


def test_peers_train_as_their_authors_did():
    for name, expected in (
        ("autogan", (50_000, 64, 128, 5, 2e-4, 0.9, "hinge", "none", 0.999)),
        ("resnet", (100_000, 64, 128, 5, 2e-4, 0.9, "wgangp-eps", "none", 0.0)),
    ):
        o = options.fill_in({"dataset": "cifar10", "generator": name, "discriminator": name})
        assert (o.steps, o.batch_size, o.gen_batch_size, o.disc_steps, o.learning_rate, o.beta2, o.loss, o.diff_aug,
                o.ema_decay) == expected  # fmt: skip
        assert options.fill_in({"generator": name, "discriminator": name}).steps == 1000  # of shapes, drawn for a laptop


def test_networks_refuse_pictures_that_do_not_halve():
    init = networks.PeerInit(np.random.default_rng(0), "glorot")
    for make in (networks.AutoGANGenerator, networks.ResNetGenerator):
        with pytest.raises(ValueError, match="image_size 20 must divide by 8"):
            make(20, 4, init)
    with pytest.raises(ValueError, match="picture of 18 pixels cannot be halved twice"):
        networks.ResidualDiscriminator(18, 4, init, True)


def test_spectral_norm_makes_every_weight_of_autogan_one_in_norm():
    _, discriminator = small_pair("autogan")
    for _ in range(200):
        discriminator_prepare(discriminator)
    used = [m for m in discriminator.modules() if hasattr(m, "u")]
    assert len(used) == 4 * 2 + 2 + 1  # two convolutions a block, two shortcuts, the score
    for module in used:
        weight = ag.to_numpy(convolutions.spectral_norm(module.weight, module.u))
        values = np.linalg.svd(weight.reshape(len(weight), -1), compute_uv=False)
        assert values[0] == pytest.approx(1, abs=1e-3)
    _, plain = small_pair("resnet")
    assert not [m for m in plain.modules() if hasattr(m, "u")]


def discriminator_prepare(network):
    for module in network.modules():
        module.prepare()


def test_batch_norm_keeps_running_averages_and_uses_them_for_samples():
    init = networks.PeerInit(np.random.default_rng(0), "glorot", np.float64)
    norm, (x,) = networks.BatchNorm(3, init), base.normal(1, (4, 3, 5, 5), scale=2.0)
    y = ag.to_numpy(norm(Tensor(ag.xp.asarray(x))))
    np.testing.assert_allclose(y.mean(axis=(0, 2, 3)), 0, atol=1e-9)
    base.close(norm.mean, 0.1 * x.mean(axis=(0, 2, 3), keepdims=True))
    base.close(norm.variance, 0.9 + 0.1 * x.var(axis=(0, 2, 3), ddof=1, keepdims=True))
    for _ in range(300):
        norm(Tensor(ag.xp.asarray(x)))
    norm.training = False
    one = ag.to_numpy(norm(Tensor(ag.xp.asarray(x[:1]))))  # one picture's result no longer depends on the others
    expected = (x[:1] - x.mean(axis=(0, 2, 3), keepdims=True)) / np.sqrt(
        x.var(axis=(0, 2, 3), ddof=1, keepdims=True) + 1e-5
    )
    np.testing.assert_allclose(one, expected, rtol=1e-6, atol=1e-6)


# --- PyTorch ----------------------------------------------------------------------------------------------------------
# WGAN-GP's networks alone: AutoGAN's are held against what the published code computes, in test_golden.py.


def torch_layers(nn, g, d):
    """The layers of WGAN-GP's networks with so many channels, (generator's, discriminator's), by our names."""
    generator = {"project": nn.Linear(128, 16 * g), "norm": nn.BatchNorm2d(g), "to_rgb": nn.Conv2d(g, 3, 3, padding=1)}
    for i in range(3):
        generator |= {f"blocks.{i}.conv{k}": nn.Conv2d(g, g, 3, padding=1) for k in (1, 2)}
        generator |= {f"blocks.{i}.norm{k}": nn.BatchNorm2d(g) for k in (1, 2)}
        generator |= {f"blocks.{i}.shortcut": nn.Conv2d(g, g, 1)}
    discriminator = {"score": nn.Linear(d, 1)}
    for i in range(4):
        discriminator |= {f"blocks.{i}.conv1": nn.Conv2d(d if i else 3, d, 3, padding=1)}
        discriminator |= {f"blocks.{i}.conv2": nn.Conv2d(d, d, 3, padding=1)}
        discriminator |= {f"blocks.{i}.shortcut": nn.Conv2d(d if i else 3, d, 1)} if i < 2 else {}
    return generator, discriminator


def torch_generator(f, layers, z):
    """The published generator's forward pass, written with PyTorch's functions."""
    x = layers["project"](z).view(len(z), -1, 4, 4)
    for i in range(3):
        block = f"blocks.{i}"
        h = f.interpolate(f.relu(layers[f"{block}.norm1"](x)), scale_factor=2)
        h = layers[f"{block}.conv2"](f.relu(layers[f"{block}.norm2"](layers[f"{block}.conv1"](h))))
        x = layers[f"{block}.shortcut"](f.interpolate(x, scale_factor=2)) + h
    return f.tanh(layers["to_rgb"](f.relu(layers["norm"](x))))


def torch_discriminator(f, layers, x):
    """The published discriminator's forward pass: averages after the convolutions, but before the first shortcut."""
    for i in range(4):
        block = f"blocks.{i}"
        h = layers[f"{block}.conv2"](f.relu(layers[f"{block}.conv1"](x if i == 0 else f.relu(x))))
        if i < 2:
            h = f.avg_pool2d(h, 2)
            shortcut = layers[f"{block}.shortcut"]
            x = shortcut(f.avg_pool2d(x, 2)) if i == 0 else f.avg_pool2d(shortcut(x), 2)
        x = h + x
    return layers["score"](f.relu(x).mean((2, 3))).reshape(-1)


def test_outputs_and_gradients_agree_with_pytorch(monkeypatch):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layers, f = torch_layers(torch.nn, 5, 4), torch.nn.functional
    monkeypatch.setitem(networks.CHANNELS, "tiny", {"resnet": (5, 4)})
    rng = np.random.default_rng(0)
    ours = [make("resnet", "tiny", 32, rng, np.float64)
            for make in (networks.make_generator, networks.make_discriminator)]  # fmt: skip
    pairs = []
    for network, group in zip(ours, layers, strict=True):
        theirs = {f"{key}.{part}": p for key, layer in group.items() for part, p in layer.double().named_parameters()}
        assert set(network.parameters()) == set(theirs)
        for name, p in network.parameters().items():
            values = torch.tensor(ag.to_numpy(p))
            theirs[name].data = values.T if name.endswith("weight") and p.ndim == 2 else values
            pairs.append((name, p, theirs[name]))
    z, x = rng.standard_normal((3, 128)), rng.uniform(-1, 1, (3, 3, 32, 32))
    made, scores = (network(Tensor(ag.xp.asarray(a))) for network, a in zip(ours, (z, x), strict=True))
    their_made = torch_generator(f, layers[0], torch.tensor(z))
    their_scores = torch_discriminator(f, layers[1], torch.tensor(x))
    for a, b in ((made, their_made), (scores, their_scores)):
        b = b.detach().numpy()
        np.testing.assert_allclose(ag.to_numpy(a), b, rtol=0, atol=1e-8 * np.abs(b).max())
    names, mine, leaves = zip(*pairs, strict=True)
    gradients = torch.autograd.grad((their_made**2).sum() + (their_scores**2).sum(), leaves)
    largest = max(float(g.abs().max()) for g in gradients)  # a bias before a batch norm has none but rounding's
    for name, a, b in zip(names, grad((made * made).sum() + (scores * scores).sum(), mine), gradients, strict=True):
        a = ag.to_numpy(a)
        np.testing.assert_allclose(a if a.shape == b.shape else a.T, b, atol=1e-10 * largest, rtol=1e-7, err_msg=name)


# --- Training ---------------------------------------------------------------------------------------------------------


def pair_trainer(generator, discriminator, threads=None, dtype=np.float32, **options):
    plain = {} if generator == "transgan" else {"sr_weight": 0.0, "locality": "none"}
    return support.small_trainer(threads, dtype, generator=generator, discriminator=discriminator, **plain, **options)


@pytest.mark.parametrize("pair", PAIRS)
def test_resuming_is_exact_to_the_bit(pair, small, tmp_path):
    loss = "hinge" if pair[1] == "autogan" else "wgangp-eps"
    unbroken, first = (pair_trainer(*pair, loss=loss, diff_aug=support.POLICY) for _ in range(2))
    for _ in range(4):
        unbroken.train_step()
    for _ in range(2):
        first.train_step()
    first.sample(first.noise(3, np.random.default_rng(0)))  # looking changes nothing
    checkpoints.save(first, tmp_path / "checkpoint.npz")
    second = pair_trainer(*pair, loss=loss, diff_aug=support.POLICY)
    checkpoints.load(second, tmp_path / "checkpoint.npz")
    for _ in range(2):
        second.train_step()
    support.assert_same_state(support.state_of(second), support.state_of(unbroken))
    before = support.state_of(pair_trainer(*pair, loss=loss))
    assert [name for name, value in support.state_of(unbroken).items() if (value == before[name]).all()] == []


@base.on_cpu
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("loss", transgan.LOSSES)
def test_threads_share_a_batch_without_changing_the_step(pair, loss, small):
    """Batch norm sees the whole batch, however many threads there are."""
    runs = []
    for threads in (1, 2):
        trainer = pair_trainer(*pair, threads, np.float64, loss=loss)
        for _ in range(2):
            trainer.train_step()
        runs.append(support.state_of(trainer))
    support.assert_same_state(*runs, 1e-8)


@base.on_cpu
@pytest.mark.parametrize("pair", PAIRS)
def test_rehearsal_of_training_on_a_gpu(pair, small, rehearsed_gpu):
    def trained():
        trainer = pair_trainer(*pair, 1, np.float64)
        trainer.train_step()
        return [trainer.sample(trainer.noise(3, np.random.default_rng(0))), *support.state_of(trainer).values()]

    expected = trained()
    assert ag.use_device("auto") == "a rehearsed GPU"
    for a, b in zip(trained(), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs_train_from_the_command_line(pair, small, tmp_path, capsys):
    out = tmp_path / "run"
    assert support.run_main(*support.TRAIN, "--generator", pair[0], "--discriminator", pair[1], "--out", out) == 0
    assert [row["step"] for row in support.read_log(out)] == list("01234")
    with np.load(out / "checkpoint.npz") as saved:
        options = json.loads(str(saved["options"]))
    assert (options["generator"], options["discriminator"]) == pair
    assert (options["loss"], options["beta2"]) == (("hinge", 0.9) if pair[1] == "autogan" else
                                                   ("wgangp-eps", 0.9 if pair[1] == "resnet" else 0.99))  # fmt: skip
    assert support.run_main("--resume", out, "--steps", 5) == 0
    assert "leave out --generator" in support.fails(capsys, "--resume", out, "--steps", 6, "--generator",
                                                 "resnet" if pair[0] == "autogan" else "autogan")  # fmt: skip


def test_each_pair_has_a_folder_of_its_own():
    for pair, name in ((PAIRS[0], "shapes-S-autogan-autogan"), (PAIRS[2], "shapes-S-transgan-autogan"),
                       (("transgan", "transgan"), "shapes-S")):  # fmt: skip
        arguments = ["--size", "S", "--generator", pair[0], "--discriminator", pair[1]]
        _, out = options.choose_options(main.make_parser().parse_args(arguments))
        assert out.as_posix() == f"runs/{name}"


def test_options_that_do_not_go_together(small, tmp_path, capsys):
    for args, message in (
        (["--generator", "autogan", "--sr-weight", "1"], "wants --sr-weight 0 and --locality none"),
        (["--generator", "resnet", "--locality", "4:22"], "wants --sr-weight 0 and --locality none"),
        (["--generator", "autogan", "--accumulate", "2"], "wants whole batches"),
        (["--generator", "autogan", "--image-size", "20"], "must divide by 8"),
        (["--generator", "biggan"], "invalid choice: 'biggan'"),
    ):
        assert message in support.fails(capsys, *args, "--out", tmp_path / "run"), args
