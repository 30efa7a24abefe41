"""The book's Trainer as the program uses it, with the networks that its options name, TransGAN's or its peers'."""

import numpy as np

import autograd as ag
import data
import transgan
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


class PeerTrainer(transgan.Trainer):
    """Sees to what convolutional networks have beside parameters: batch and spectral normalization, paper/convolutions.py.

    Batch normalization, which has buffers, looks at a whole batch, which then cannot be shared out in the generator.
    """

    def __init__(self, *args):
        super().__init__(*args)
        pairs = ("generator", self.generator), ("discriminator", self.discriminator)
        self.peers = {name: network for name, network in pairs if isinstance(network, Stateful)}
        self.modules = {name: list(network.modules()) for name, network in self.peers.items()}
        self.whole = "generator" in self.peers and bool(self.generator.buffers())
        if self.whole:
            self.update.whole = self.gen_adam

    def discriminator_step(self, inputs, rate):
        for module in self.modules.get("discriminator", ()):
            module.prepare()
        if self.whole:  # the pictures take the place of their noise, before the batch is shared out
            real, noise, *rest = inputs
            inputs = [real, super().generated(self.array(noise)), *rest]
        return super().discriminator_step(inputs, rate)

    def generated(self, noise):
        return noise if self.whole else super().generated(noise)

    def averaged(self, function, inputs):
        modules = self.modules.get("generator", ())
        for module in modules:
            module.training = False
        try:
            return super().averaged(function, inputs)
        finally:
            for module in modules:
                module.training = True

    def state(self):
        peers = self.peers.items()
        return super().state() | {f"{name}/{key}": x for name, network in peers for key, x in network.buffers().items()}
