"""A run's averaged generator on its own: all that pictures, walks and scores of a run are made of."""

import numpy as np

import autograd as ag
import transgan
from autograd import Tensor
from data import UserError
from paper.convolutions import Stateful
from program.update import Update, threads_that_pay


class Sampler:
    """What is left of a Trainer without its training: options, step and the averaged generator, set to make pictures.

    generator: holds the averaged weights; it sees as far as the options' locality says for `step`, the generator steps
    that were done. digest: tells its weights from others. pictures: the fingerprint of those it learnt from, or None.
    discriminator: that of the same step, or None where nobody kept it. threads: of a CPU, which share a large sample
    (default: as many as pay).
    """

    noise = transgan.Trainer.noise  # z ~ N(0, I): (count, Z), NumPy

    def __init__(self, options, step, digest, generator, discriminator=None, threads=None, pictures=None):
        self.options, self.step, self.digest, self.pictures = options, step, digest, pictures
        self.generator, self.discriminator = generator, discriminator
        if (half_width := transgan.half_width_at(options, step)) is not None:
            generator.attend_within(half_width, options.locality_stages, options.locality_shape)
        for module in generator.modules() if isinstance(generator, Stateful) else ():
            module.training = False
        self.dtype = next(iter(generator.parameters().values())).dtype
        self.map = Update((threads or threads_that_pay(options)) if ag.xp is np else 1).map

    def array(self, values):
        """A NumPy array as an array on the device, in the networks' dtype."""
        return ag.xp.asarray(values, dtype=self.dtype)

    def sample(self, z):
        """Pictures made of noise (n, Z), as Trainer.sample has it: NumPy (n, 3, H, W), about [-1, 1].

        Raises UserError if they are not finite.
        """
        pictures = transgan.in_parts(lambda z: self.generator(Tensor(self.array(z))), z, self.map)
        if not np.isfinite(pictures).all():
            raise UserError(f"the generator of step {self.step} makes pictures that are not finite; choose another run")
        return pictures
