"""Parity with PyTorch: outputs, all gradients and five whole training steps agree with benchmarks/reference.py."""

import numpy as np
import pytest

import autograd as ag
import transgan
from autograd import Tensor, grad
from program.support import small_trainer
from test_transgan import normal

POLICY = "translation,cutout,color"
torch = pytest.importorskip("torch")
from benchmarks import reference  # noqa: E402 (it needs PyTorch)


def assert_close_to_torch(ours, theirs, name="", tolerance=1e-8):
    """Relative to the largest number of the array: rounding is relative to what was added up, not to what is left."""
    ours, theirs = ag.to_numpy(ours), theirs.detach().cpu().numpy()
    ours = ours.T if reference.is_matrix(name, ours) else ours
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max(), err_msg=name)


def check_gradients(loss, parameters, torch_loss, leaves):
    assert_close_to_torch(loss, torch_loss)
    ours = grad(loss, parameters.values())
    for (name, g), theirs in zip(zip(parameters, ours, strict=True), torch.autograd.grad(torch_loss, leaves.values()),
                                 strict=True):  # fmt: skip
        assert_close_to_torch(g, theirs, name)


@pytest.mark.parametrize("loss", transgan.LOSSES)
@pytest.mark.parametrize("size", ["tiny", "S"])
def test_outputs_losses_and_all_gradients_agree_with_pytorch(size, loss):
    dimensions, rng = transgan.SIZES[size], np.random.default_rng(11)
    generator = transgan.Generator(32, dimensions.embed_dim, dimensions.depths, rng, dtype=np.float64)
    discriminator = transgan.Discriminator(32, 4, dimensions.disc_embed_dim, dimensions.disc_depth, rng, dtype=np.float64)
    for p in discriminator.parameters().values():
        p.data = p.data * 3  # steep enough that hinge and penalty have something to say
    z, real, mix = (ag.xp.asarray(x) for x in normal(12, (2, dimensions.embed_dim), (2, 3, 32, 32), (2, 1, 1, 1)))
    g, d = reference.parameters(generator.parameters()), reference.parameters(discriminator.parameters())
    torch_z, torch_real, torch_mix = (
        torch.as_tensor(ag.to_numpy(x), device=g["to_rgb.bias"].device) for x in (z, real, mix)
    )

    def discriminate(x):
        return reference.discriminator(d, x, dimensions.disc_depth, 4)

    fake, torch_fake = generator(Tensor(z)), reference.generator(g, torch_z, dimensions.depths)
    assert_close_to_torch(fake, torch_fake)
    assert_close_to_torch(discriminator(fake), discriminate(torch_fake))
    ours = transgan.generator_loss(discriminator(fake).reshape(1, -1), loss)
    check_gradients(ours, generator.parameters(), reference.generator_loss(discriminate(torch_fake), loss), g)
    scores = transgan.discriminator_scores(discriminator, real, fake.data, mix, loss)
    theirs = reference.discriminator_loss(discriminate, torch_real, torch_fake.detach(), loss, torch_mix)
    check_gradients(transgan.discriminator_loss(scores, loss)[0], discriminator.parameters(), theirs, d)


@pytest.mark.parametrize("diff_aug", ["none", POLICY])
@pytest.mark.parametrize("loss", transgan.LOSSES)
def test_five_training_steps_agree_with_pytorch(loss, diff_aug):
    """Augmentation, co-training, locality, penalty, clipping, Adam, decay of the rate, average, five discriminator steps.

    At the paper's rate: at ten times that, Adam's quotients of tiny gradients magnify rounding by 10^9 within the five.
    """
    trainer = small_trainer(
        None, np.float64, loss=loss, diff_aug=diff_aug, image_size=16, patch_size=4, disc_steps=5, learning_rate=1e-4,
        beta2=0.9,
        ema_decay=0.9,
        decay="linear",
    )  # fmt: skip
    peer = reference.Trainer(trainer)
    for _ in range(5):
        ours, theirs = trainer.train_step(), peer.train_step()
        for name, value in theirs.items():
            assert float(ours[name]) == pytest.approx(value, rel=1e-8), name
    assert max(peer.norms) > 5  # clipping is part of what agrees
    for parameters, leaves in ((trainer.gen_parameters, peer.g), (trainer.disc_parameters, peer.d),
                               (trainer.average, peer.average)):  # fmt: skip
        for name, p in parameters.items():
            assert_close_to_torch(p, leaves[name], name)
