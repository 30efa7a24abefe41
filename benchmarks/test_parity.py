"""Parity with PyTorch: five whole training steps agree with benchmarks/reference.py, in losses and in all weights."""

import numpy as np
import pytest

import autograd as ag
import transgan
from program.support import small_trainer

POLICY = "translation,cutout,color"
torch = pytest.importorskip("torch")
from benchmarks import reference  # noqa: E402 (it needs PyTorch)


def assert_close_to_torch(ours, theirs, name="", tolerance=1e-8):
    """Relative to the largest number of the array: rounding is relative to what was added up, not to what is left."""
    ours, theirs = ag.to_numpy(ours), theirs.detach().cpu().numpy()
    ours = ours.T if reference.is_matrix(name, ours) else ours
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max(), err_msg=name)


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
