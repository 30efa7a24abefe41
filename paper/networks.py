"""The convolutional peers of the paper's tables: AutoGAN, and the residual networks of WGAN-GP.

The story of this chapter: what TransGAN does without. A convolution gives every place of a picture the same small filter;
a generator of convolutions doubles its picture between them, a discriminator halves it. Both kinds here are made of
residual blocks; they differ in how these are wired, and in what keeps the discriminator's slope in bounds: AutoGAN divides
every weight by its largest singular value, WGAN-GP leaves that to the gradient penalty in the loss.

In comments on shapes: B batch, C channels, H and W height and width, Z latent_dim.
"""

import math

import numpy as np

import autograd as ag
from autograd import Linear, Tensor
from paper.convolutions import (
    Stateful,
    avg_pool2d,
    batch_norm,
    batch_statistics,
    conv2d,
    power_iteration,
    resize_bilinear,
    spectral_norm,
    upsample_nearest,
)
from transgan import Init

NAMES = {"transgan": "TransGAN", "autogan": "AutoGAN", "resnet": "ResNet"}  # of either network; the last is WGAN-GP's
LATENT_DIM = 128

# --- 1. Layers --------------------------------------------------------------------------------------------------------


class PeerInit(Init):
    """First weights of convolutions, drawn from U(-b, b) as each network's authors have it, by the rule `convolution`:

    glorot   b^2 = 6 / (fan_in + fan_out), biases from U(-1/sqrt(fan_in), 1/sqrt(fan_in)): AutoGAN's generator
    default  b^2 = 1 / fan_in, biases likewise, PyTorch's own: AutoGAN's discriminator, for which Glorot's was meant
    he       b^2 = 12 / (fan_in + fan_out), biases 0, and as Glorot's in a shortcut and the layer to RGB: WGAN-GP

    with fan_in = inputs * kernel^2, fan_out = outputs * kernel^2. Under he, linear layers are Glorot's with biases of 0.
    """

    def __init__(self, rng, convolution, dtype=np.float32):
        super().__init__(rng, "uniform", dtype)
        self.convolution_rule = convolution

    def convolution(self, inputs, outputs, kernel, plain=False):
        """The weight (outputs, inputs, kernel, kernel) and bias (outputs,); plain: of a shortcut or the layer to RGB."""
        fan_in, fan_out, rule = inputs * kernel**2, outputs * kernel**2, self.convolution_rule
        square = {"glorot": 6 / (fan_in + fan_out), "default": 1 / fan_in, "he": (6 if plain else 12) / (fan_in + fan_out)}
        bound, bias = math.sqrt(square[rule]), 0 if rule == "he" else fan_in**-0.5
        weight = self.rng.uniform(-bound, bound, (outputs, inputs, kernel, kernel))
        return self.parameter(weight), self.parameter(self.rng.uniform(-bias, bias, outputs))

    def linear(self, inputs, outputs):
        if self.convolution_rule != "he":
            return super().linear(inputs, outputs)
        bound = math.sqrt(6 / (inputs + outputs))
        return self.parameter(self.rng.uniform(-bound, bound, (inputs, outputs))), self.parameter(np.zeros(outputs))


class Conv2d(Stateful):
    """Convolution that keeps the picture's size: (B, inputs, H, W) -> (B, outputs, H, W), for an odd kernel.

    spectral=True divides the weight by its largest singular value, as `u`, an array (outputs,), sees it. plain: see
    `PeerInit.convolution`.
    """

    def __init__(self, inputs, outputs, kernel, init, spectral=False, plain=False):
        self.weight, self.bias = init.convolution(inputs, outputs, kernel, plain)
        self.padding = kernel // 2
        if spectral:
            self.u = start_of_power_iteration(self.weight, init)

    def __call__(self, x):
        weight = spectral_norm(self.weight, self.u) if hasattr(self, "u") else self.weight
        return conv2d(x, weight, self.bias, padding=self.padding)

    def prepare(self):
        if hasattr(self, "u"):
            self.u[...] = power_iteration(self.weight.data, self.u)


class SpectralLinear(Stateful):
    """A linear layer without bias to one number, its weight as `Conv2d`'s with spectral=True: (B, inputs) -> (B, 1)."""

    def __init__(self, inputs, init):
        self.weight = init.linear(inputs, 1)[0]  # (inputs, 1)
        self.u = start_of_power_iteration(self.weight, init)

    def __call__(self, x):
        return x @ spectral_norm(self.weight, self.u)

    prepare = Conv2d.prepare


def start_of_power_iteration(weight, init):
    """A direction (outputs,) of unit length, turned towards the first singular vector of `weight`."""
    u = ag.xp.asarray(init.rng.standard_normal(len(weight)).astype(weight.dtype))
    for _ in range(15):  # as PyTorch starts it
        u = power_iteration(weight.data, u)
    return u


class BatchNorm(Stateful):
    """Batch normalization, eps 1e-5: (B, C, H, W) -> the same. While `training`, by the batch's own mean and variance, of
    which running averages are kept (a tenth of the new one each time); else by these averages. First weights are 1, or
    with deviation > 0 from N(1, deviation^2), as AutoGAN's are."""

    def __init__(self, channels, init, deviation=0.0):
        self.weight = init.parameter(1 + deviation * init.rng.standard_normal(channels))
        self.bias = init.parameter(np.zeros(channels))
        self.mean = ag.xp.zeros((1, channels, 1, 1), init.dtype)
        self.variance = ag.xp.ones((1, channels, 1, 1), init.dtype)

    def __call__(self, x):
        mean, variance = Tensor(self.mean), Tensor(self.variance)
        if self.training:
            mean, variance = batch_statistics(x)
            count = x.size // x.shape[1]
            for running, new in ((self.mean, mean.data), (self.variance, variance.data * (count / max(count - 1, 1)))):
                running *= 0.9
                running += 0.1 * new
        return batch_norm(x, mean, variance, self.weight, self.bias)


# --- 2. Generators ----------------------------------------------------------------------------------------------------


class PeerGenerator(Stateful):
    """Noise (B, Z) -> pictures (B, 3, S, S) in [-1, 1], which three blocks double. Raises ValueError unless 8 divides S."""

    deviation = 0.0  # of the last norm's first weights

    def __init__(self, image_size, channels, init):
        if image_size % 8:
            raise ValueError(f"image_size {image_size} must divide by 8: the picture doubles three times")
        self.latent_dim, self.start, self.channels = LATENT_DIM, image_size // 8, channels
        self.project = Linear(LATENT_DIM, self.start**2 * channels, init)
        self.set_blocks(channels, init)
        self.norm = BatchNorm(channels, init, self.deviation)
        self.to_rgb = Conv2d(channels, 3, 3, init, plain=True)

    def __call__(self, z):
        x = self.project(z).reshape(len(z), self.channels, self.start, self.start)  # (B, C, S/8, S/8)
        return ag.tanh(self.to_rgb(ag.relu(self.norm(self.grow(x)))))  # (B, C, S, S) -> (B, 3, S, S)


class Cell(Stateful):
    """A cell of AutoGAN: (B, C, H, W) -> (B, C, 2H, 2W), and its skip feature of that shape, which it adds to a list.

    h = conv(upsample(relu(x))), plus conv1x1(upsampled skip feature) for each of the cells before: with what was added, it
    is the skip feature of this one. The result is conv(relu(h)), plus conv1x1(upsample(x)) where there is a shortcut.
    """

    def __init__(self, channels, upsample, skips, shortcut, init):
        self.upsample = upsample
        self.conv1, self.conv2 = Conv2d(channels, channels, 3, init), Conv2d(channels, channels, 3, init)
        self.shortcut = Conv2d(channels, channels, 1, init) if shortcut else None
        self.skips = [Conv2d(channels, channels, 1, init) for _ in range(skips)]

    def __call__(self, x, features):
        side = 2 * x.shape[2]
        h = self.conv1(self.upsample(ag.relu(x), side))  # (B, C, 2H, 2W)
        for conv, feature in zip(self.skips, features, strict=True):
            h = h + conv(self.upsample(feature, side))
        features.append(h)
        out = self.conv2(ag.relu(h))
        return out if self.shortcut is None else out + self.shortcut(self.upsample(x, side))


def nearest(x, side):
    return upsample_nearest(x, side // x.shape[2])


def bilinear(x, side):
    return resize_bilinear(x, side, side)


class AutoGANGenerator(PeerGenerator):
    """The generator that AutoGAN's search found for CIFAR-10 (Gong et al. 2019)."""

    deviation = 0.02

    def set_blocks(self, channels, init):
        self.cells = [Cell(channels, nearest, 0, True, init), Cell(channels, bilinear, 1, True, init),
                      Cell(channels, nearest, 2, False, init)]  # fmt: skip

    def grow(self, x):
        features = []
        for cell in self.cells:
            x = cell(x, features)
        return x


class UpBlock(Stateful):
    """(B, C, H, W) -> (B, C, 2H, 2W): upsample(x) through a 1x1 convolution, plus norm, relu, upsample, conv, norm, relu,
    conv."""

    def __init__(self, channels, init):
        self.norm1, self.norm2 = BatchNorm(channels, init), BatchNorm(channels, init)
        self.conv1, self.conv2 = Conv2d(channels, channels, 3, init), Conv2d(channels, channels, 3, init)
        self.shortcut = Conv2d(channels, channels, 1, init, plain=True)

    def __call__(self, x):
        h = self.conv1(upsample_nearest(ag.relu(self.norm1(x)), 2))
        return self.shortcut(upsample_nearest(x, 2)) + self.conv2(ag.relu(self.norm2(h)))


class ResNetGenerator(PeerGenerator):
    """WGAN-GP's residual generator for CIFAR-10 (Gulrajani et al. 2017, appendix)."""

    def set_blocks(self, channels, init):
        self.blocks = [UpBlock(channels, init) for _ in range(3)]

    def grow(self, x):
        for block in self.blocks:
            x = block(x)
        return x


# --- 3. Discriminators ------------------------------------------------------------------------------------------------


class DownBlock(Stateful):
    """A residual block: relu, conv, relu, conv and, with halve, the mean of 2x2 pixels; plus x, with halve through a 1x1
    convolution and the same mean. The first block of a network sees pixels, which want no relu."""

    def __init__(self, inputs, outputs, halve, init, spectral, first=False):
        self.conv1 = Conv2d(inputs, outputs, 3, init, spectral)
        self.conv2 = Conv2d(outputs, outputs, 3, init, spectral)
        self.shortcut = Conv2d(inputs, outputs, 1, init, spectral, plain=True) if halve else None
        self.first = first

    def __call__(self, x):
        h = self.conv2(ag.relu(self.conv1(x if self.first else ag.relu(x))))
        if self.shortcut is None:
            return h + x
        return avg_pool2d(h, 2, 2) + self.shortcut(avg_pool2d(x, 2, 2))


class ResidualDiscriminator(Stateful):
    """Four residual blocks, of which two halve, then relu, a sum or mean over places, and a score: (B, 3, S, S) -> (B,).

    spectral=True: AutoGAN's discriminator (Gong et al. 2019), with a sum; False: WGAN-GP's critic (Gulrajani et al. 2017,
    appendix), with a mean. Raises ValueError if image_size S does not divide by 4.
    """

    def __init__(self, image_size, channels, init, spectral):
        if image_size % 4:
            raise ValueError(f"a picture of {image_size} pixels cannot be halved twice")
        halving = [True, True, False, False]
        self.blocks = [DownBlock(channels if i else 3, channels, halve, init, spectral, first=not i)
                       for i, halve in enumerate(halving)]  # fmt: skip
        self.score = SpectralLinear(channels, init) if spectral else Linear(channels, 1, init)
        self.pool = ag.reduce_sum if spectral else ag.reduce_mean

    def __call__(self, pictures):
        x = pictures
        for block in self.blocks:
            x = block(x)
        return self.score(self.pool(ag.relu(x), (2, 3))).reshape(-1)  # (B, C, S/4, S/4) -> (B, C) -> (B,)


CHANNELS = {"tiny": {"autogan": (32, 16), "resnet": (16, 16)}}  # of generator and discriminator; others are as published
PUBLISHED = {"autogan": (256, 128), "resnet": (128, 128)}


def make_generator(name, size, image_size, rng, dtype=np.float32):
    """The generator `name`, autogan or resnet, for pictures of image_size. Raises ValueError."""
    kind, rule = {"autogan": (AutoGANGenerator, "glorot"), "resnet": (ResNetGenerator, "he")}[name]
    return kind(image_size, CHANNELS.get(size, PUBLISHED)[name][0], PeerInit(rng, rule, dtype))


def make_discriminator(name, size, image_size, rng, dtype=np.float32):
    """The discriminator `name`, autogan or resnet, for pictures of image_size. Raises ValueError."""
    init = PeerInit(rng, {"autogan": "default", "resnet": "he"}[name], dtype)
    return ResidualDiscriminator(image_size, CHANNELS.get(size, PUBLISHED)[name][1], init, spectral=name == "autogan")
