"""The book's Trainer as the program uses it, with the networks that its options name; and a Sampler, what is left of it."""

import numpy as np

import autograd as ag
import data
import transgan
from autograd import Tensor
from data import UserError
from fast import cublas
from paper import networks
from paper.convolutions import Stateful
from program.update import Ahead, Played, Update, threads_that_pay
from store import files


def make_networks(options, dtype=np.float32, rng=None):
    """The generator and the discriminator of a run, their weights drawn from `rng`, or else from the run's seed.

    Raises UserError for pictures that they cannot make or cut.
    """
    rng, made = rng or data.random_stream("weights", options.seed), []
    try:
        for name, own, peer in (
            (options.generator, transgan.make_generator, networks.make_generator),
            (options.discriminator, transgan.make_discriminator, networks.make_discriminator),
        ):
            ours = name == "transgan"
            made.append(own(options, rng, dtype) if ours else peer(name, options.size, options.image_size, rng, dtype))
    except ValueError as error:
        patches = " or --patch-size" if made and options.discriminator == "transgan" else ""  # the generator was made
        raise UserError(f"{error}; choose another --image-size{patches}") from None
    return made


def make_trainer(options, pictures, threads=None, dtype=np.float32, group=None):
    """The Trainer of a run, whose batches are shared among threads, or GPUs if there is a `group`.

    Its `learns_from` is the fingerprint of the pictures. Raises UserError.
    """
    generator, discriminator = make_networks(options, dtype)
    threads = min(threads or threads_that_pay(options), options.batch_size, options.gen_batch_size)
    kind = transgan.Trainer if options.generator == options.discriminator == "transgan" else PeerTrainer
    if cublas.records() and kind is transgan.Trainer and options.accumulate == 1 and not group:
        update = Played()
    else:
        update = Update(threads if ag.xp is np else 1, options.accumulate, group)
    trainer = kind(options, pictures, generator, discriminator, update, update.map)
    if isinstance(update, Played):
        update.phase = lambda: trainer.half_width
    trainer.inputs, trainer.learns_from = Ahead(trainer.inputs), files.fingerprint(pictures)
    return trainer


def modules(network):
    """The modules of a network that have more than parameters, see paper/convolutions.py: none of TransGAN's."""
    return network.modules() if isinstance(network, Stateful) else []


def buffers(**networks):
    """What training changes of networks beside their parameters, {"generator/NAME": array, ...}: nothing of TransGAN's."""
    peers = {kind: network for kind, network in networks.items() if isinstance(network, Stateful)}
    return {f"{kind}/{name}": x for kind, network in peers.items() for name, x in network.buffers().items()}


class PeerTrainer(transgan.Trainer):
    """Sees to what convolutional networks have beside parameters: batch and spectral normalization, paper/convolutions.py.

    Batch normalization, which has buffers, looks at a whole batch, which then cannot be shared out in the generator.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.whole = bool(buffers(generator=self.generator))
        if self.whole:
            self.update.whole = self.gen_adam

    def discriminator_step(self, inputs, rate):
        for module in modules(self.discriminator):
            module.prepare()
        if self.whole:  # the pictures take the place of their noise, before the batch is shared out
            real, noise, *rest = inputs
            inputs = [real, super().generated(self.array(noise)), *rest]
        return super().discriminator_step(inputs, rate)

    def generated(self, noise):
        return noise if self.whole else super().generated(noise)

    def averaged(self, function, inputs):
        for module in modules(self.generator):
            module.training = False
        try:
            return super().averaged(function, inputs)
        finally:
            for module in modules(self.generator):
                module.training = True

    def state(self):
        return super().state() | buffers(generator=self.generator, discriminator=self.discriminator)


class Sampler:
    """What is left of a Trainer without its training: options, step and the averaged generator, set to make pictures.

    All pictures, walks and scores of a run are made of it.

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
        for module in modules(generator):
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
