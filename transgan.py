"""TransGAN: a GAN made of two transformers and no convolution (Jiang, Chang and Wang, arXiv 2102.07074), from scratch.

The story of this chapter: a generator grows a picture out of noise, as 8x8 tokens, then 16x16, then 32x32; a
discriminator cuts pictures into patches and says how real they look. Both are stacks of the same transformer block. The
discriminator learns to score real pictures above generated ones, the generator to be scored high. A penalty pulls the norm
of the discriminator's gradient towards 1, so that its score has a slope for the generator to climb, neither flat nor a
cliff. The operations they are made of, and how these are differentiated, stand in autograd.py.

This is the paper's first version (February 2021): its networks, its training, and the three tricks that it adds to them:
data augmentation, co-training and locality-aware initialization.

Contents
    1. Building blocks        Init, Attention, MLP, Block
    2. The two networks       SIZES, upscale, window_mask, Stage, Generator, Discriminator
    3. Losses                 gradient_penalty, discriminator_loss, generator_loss, super_resolution_error
    4. Augmentation           diff_augment, draw_augmentation
    5. Training               Options, update, Trainer: one step of each network, moving average; train, the loop
    6. Watching it learn      sliced_wasserstein

In comments on shapes: B batch, N tokens, C width (embed_dim), H and W height and width in tokens or pixels, Z latent_dim,
p patch_size; in Attention H heads of width D.
"""

from __future__ import annotations

if __name__ == "__main__":  # the program around this book; here, because program/__init__.py has to come before NumPy
    import signal
    import sys

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # until the program says what Ctrl-C does
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from program.main import console

    sys.exit(console())

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

import autograd as ag
import data
from autograd import Array, LayerNorm, Linear, Module, Shape, Tensor, grad
from data import Bytes, Floats

Inputs: TypeAlias = list[Array]  # what an update of one network needs from outside, see Trainer.inputs
Losses: TypeAlias = dict[str, Array | None]  # disc_loss, penalty, gen_loss, sr_loss: 0-d arrays on the device, or None

# --- 1. Building blocks -----------------------------------------------------------------------------------------------


class Init:
    """Draws the parameters' first values from `rng`, a NumPy generator, in `dtype`.

    linear="uniform": weights and biases from U(-1/sqrt(k), 1/sqrt(k)) for k inputs, as the authors' generator has them;
    linear="normal": normal weights of deviation 0.02 and zero biases, as in their discriminator.
    """

    def __init__(self, rng: np.random.Generator, linear: str, dtype: DTypeLike = np.float32):
        self.rng, self.linear_rule, self.dtype = rng, linear, dtype

    def parameter(self, values: Array) -> Tensor:
        return Tensor(values, requires_grad=True, dtype=self.dtype)

    def normal(self, *shape: int) -> Tensor:
        """Mean 0, deviation 0.02. (The authors truncate it at -2 and 2, a hundred deviations out, where nothing falls.)"""
        return self.parameter(0.02 * self.rng.standard_normal(shape))

    def linear(self, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
        """The weight (inputs, outputs) and bias (outputs,) of a linear layer."""
        if self.linear_rule == "normal":
            return self.normal(inputs, outputs), self.parameter(np.zeros(outputs))
        bound = inputs**-0.5
        weight = self.rng.uniform(-bound, bound, (inputs, outputs))
        return self.parameter(weight), self.parameter(self.rng.uniform(-bound, bound, outputs))

    def patches(self, inputs: int, outputs: int, pixels: int) -> tuple[Tensor, Tensor]:
        """The same of a layer that is a convolution in the authors' code, over squares of so many pixels, side by side.

        Weights as Glorot and Bengio (2010, eq. 16) have them, U(-b, b) with b^2 = 6 / (fan_in + fan_out): what a number is
        made of, `inputs`, and what it goes into, pixels * outputs. Biases from U(-1/sqrt(inputs), 1/sqrt(inputs)).
        """
        bound = math.sqrt(6 / (inputs + pixels * outputs))
        weight = self.rng.uniform(-bound, bound, (inputs, outputs))
        return self.parameter(weight), self.parameter(self.rng.uniform(-1, 1, outputs) * inputs**-0.5)


class Attention(Module):
    """Multi-head self-attention: (B, N, C) -> (B, N, C), or (B, n, C) for the first n tokens alone.

    One matrix without bias makes q, k and v. mask: (N, N), True where the row's token sees the column's, or None for all.
    """

    def __init__(self, embed_dim: int, num_heads: int, init: Init):
        self.num_heads = num_heads
        self.qkv = Linear(embed_dim, 3 * embed_dim, init, bias=False)
        self.projection = Linear(embed_dim, embed_dim, init)

    def __call__(self, x: Tensor, mask: Array | None = None, n: int | None = None) -> Tensor:
        if n is None:
            return self.projection(ag.attention(self.qkv(x), self.num_heads, mask))  # (B, N, C) -> (B, N, 3C) -> (B, N, C)
        width, weight = x.shape[-1], self.qkv.weight  # (C, 3C): the columns of q, then of k and v
        q = ag.split_heads(ag.linear(x[:, :n], weight[:, :width]), self.num_heads)  # (B, H, n, D)
        kv = ag.split_heads(ag.linear(x, weight[:, width:]), 2 * self.num_heads)  # (B, 2H, N, D)
        k, v = kv[:, : self.num_heads], kv[:, self.num_heads :]
        return self.projection(ag.join_heads(ag.attend(q, k, v, None if mask is None else mask[:n])))  # (B, n, C)


def first_tokens(x: Tensor, n: int | None) -> Tensor:
    """(B, N, C) -> (B, n, C), or as it is if n is None."""
    return x if n is None else x[:, :n]


class MLP(Module):
    """Two linear layers with an exact GELU between, four times as wide inside: (B, N, C) -> (B, N, C)."""

    def __init__(self, embed_dim: int, init: Init, ratio: int = 4):
        self.expand = Linear(embed_dim, ratio * embed_dim, init)
        self.reduce = Linear(ratio * embed_dim, embed_dim, init)

    def __call__(self, x: Tensor) -> Tensor:
        return self.reduce(ag.gelu(self.expand(x)))  # (B, N, C) -> (B, N, 4C) -> (B, N, C)


class Block(Module):
    """The transformer encoder block of both networks, normalised before each part:

    x += Attention(LayerNorm(x));  x += MLP(LayerNorm(x)).     (B, N, C) -> (B, n, C), mask (N, N) or None

    Tokens meet in the attention alone. So if only the first n are read in what follows, the rest need not be finished.
    """

    def __init__(self, embed_dim: int, num_heads: int, init: Init):
        self.norm1, self.attention = LayerNorm(embed_dim, init), Attention(embed_dim, num_heads, init)
        self.norm2, self.mlp = LayerNorm(embed_dim, init), MLP(embed_dim, init)

    def __call__(self, x: Tensor, mask: Array | None = None, n: int | None = None) -> Tensor:
        x = first_tokens(x, n) + self.attention(self.norm1(x), mask, n)
        return x + self.mlp(self.norm2(x))


# --- 2. The two networks ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Size:
    """The dimensions of a pair of networks (the paper's table of model sizes; `tiny` is ours, for a laptop)."""

    embed_dim: int  # the generator's width at its first stage; also latent_dim
    depths: tuple[int, ...]  # its blocks per stage
    disc_embed_dim: int = 384
    disc_depth: int = 7
    depths_at_64: tuple[int, ...] = ()  # blocks per stage of pictures of 64 pixels a side and above, where published


SIZES = {
    "tiny": Size(128, (2, 1, 1), 128, 3),
    "S": Size(384, (5, 2, 2)),
    "M": Size(512, (5, 2, 2)),
    "L": Size(768, (5, 2, 2)),
    "XL": Size(1024, (5, 4, 2), depths_at_64=(5, 3, 3, 2)),
}
NUM_HEADS = 4


def stage_depths(size: str, image_size: int) -> tuple[int, ...]:
    """The generator's blocks per stage: a size's depths, with a stage more for pictures of 64 pixels a side and above.

    So TransGAN-XL has (5, 3, 3, 2) on CelebA, as in the authors' file; in M and L the second stage's blocks come twice, our
    reading. Sizes whose width does not divide among the heads of a fourth stage, tiny and S, make these pictures in three,
    from a quarter of the side.
    """
    dimensions, parts = SIZES[size], NUM_HEADS * 4**3  # a fourth stage has 1/4^3 of the width, for NUM_HEADS heads
    depths = dimensions.depths
    if image_size < 64 or dimensions.embed_dim % parts:
        return depths
    return dimensions.depths_at_64 or depths[:2] + depths[1:]


def patch_side(image_size: int) -> int:
    """Pixels a side of the discriminator's patches: an 8th of the picture's, at least 4; the largest that tiles it.

    So the grid stays 8x8 above 32x32, where an 8th tiles it: our reading. (The authors' commands keep patches of 4.)
    """
    return max(p for p in range(1, max(4, image_size // 8) + 1) if image_size % p == 0)


def upscale(x: Tensor) -> Tensor:
    """The paper's UpScale: tokens (B, H*W, C) -> (B, 2H*2W, C/4), twice the resolution for a quarter of the width."""
    batch, tokens, width = x.shape
    side = math.isqrt(tokens)
    x = x.transpose(0, 2, 1).reshape(batch, width, side, side)  # (B, C, H, W)
    x = ag.pixel_shuffle(x, 2)  # (B, C/4, 2H, 2W)
    return x.reshape(batch, width // 4, 4 * tokens).transpose(0, 2, 1)  # (B, 4HW, C/4)


LOCALITY_SHAPES = ("window", "band")


def window_mask(side: int, half_width: int, shape: str = "window") -> NDArray[np.bool_]:
    """Which of side*side tokens a query may see: NumPy booleans (N, N), N = side^2. The paper's third trick, locality-aware
    initialization: while it is young, the generator may only look around; natural pictures are smooth, so that is where
    to start.

    window: True where both row and column of the key are within half_width of the query's, as the paper's figure shows it.
    band: as the authors' code has it, where the key's number is within half_width of the query's, tokens being numbered row
    by row: some of the query's row, over the picture's edge into the next. Half-widths of 4 to 10 show a query 5 keys (in a
    corner) to 21 of a band, 25 to 441 of a window. The figure is no picture of the mask, their author says (issue 20 of the
    published code), and one of two dimensions does about as well.
    """
    token = np.arange(side * side)
    if shape == "band":
        return abs(token[:, None] - token) <= half_width
    row, column = np.divmod(token, side)
    return (abs(row[:, None] - row) <= half_width) & (abs(column[:, None] - column) <= half_width)


class Stage(Module):
    """One resolution of the generator: a learnable position is added to each token, then the blocks follow."""

    def __init__(self, side: int, embed_dim: int, depth: int, num_heads: int, init: Init):
        self.position = init.normal(1, side * side, embed_dim)
        self.blocks = [Block(embed_dim, num_heads, init) for _ in range(depth)]

    def __call__(self, x: Tensor, mask: Array | None = None, last_alone: bool = False) -> Tensor:
        x = x + self.position  # (B, N, C)
        for block in self.blocks[:-1]:
            x = block(x, None if last_alone else mask)
        return self.blocks[-1](x, mask)


class Generator(Module):
    """Noise (B, Z) -> pictures (B, 3, image_size, image_size), aimed at [-1, 1] but not forced into it.

    The paper's memory-friendly generator. One stage per entry of `depths`, each at twice the resolution and a quarter of
    the width of the one before; the first starts from image_size / 2^(stages - 1) tokens a side. latent_dim Z equals
    embed_dim. co_training=True adds the layer that `super_resolve` needs. Raises ValueError if width or picture do not
    divide that way.
    """

    def __init__(
        self,
        image_size: int,
        embed_dim: int,
        depths: tuple[int, ...],
        rng: np.random.Generator,
        num_heads: int = NUM_HEADS,
        dtype: DTypeLike = np.float32,
        co_training: bool = False,
    ):
        stages = len(depths)
        self.start, self.latent_dim = image_size // 2 ** (stages - 1), embed_dim
        if self.start * 2 ** (stages - 1) != image_size or not self.start:
            raise ValueError(
                f"image_size {image_size} must divide by {2 ** (stages - 1)}: the picture doubles between stages"
            )
        if embed_dim % (num_heads * 4 ** (stages - 1)):
            raise ValueError(f"embed_dim {embed_dim} must divide by {num_heads} heads times 4^{stages - 1}")
        init = Init(rng, "uniform", dtype)
        self.project = Linear(embed_dim, self.start**2 * embed_dim, init)
        self.stages = []
        for k, depth in enumerate(depths):
            self.stages.append(Stage(self.start * 2**k, embed_dim // 4**k, depth, num_heads, init))
        self.to_rgb = Linear(embed_dim // 4 ** (stages - 1), 3, init, pixels=1)
        if co_training:
            self.from_rgb = Linear(3, embed_dim // 4, init)  # ours, first weights too: the code has none
        self.masks: list[Array | None] = [None] * stages
        self.last_alone = False  # of a stage's blocks, whether only the last has the mask

    def attend_within(self, half_width: int | None, stages: int, shape: str = "window") -> None:
        """From now on, each token of the last `stages` stages sees half_width around it, or all tokens if that is None.

        See `window_mask` for the shape; a band is for the last block of each of these stages alone, as the authors have it.
        """
        self.last_alone = shape == "band"
        for k in range(len(self.stages)):
            side = self.start * 2**k
            self.masks[k] = None
            if half_width is not None and k >= len(self.stages) - stages:
                mask = window_mask(side, half_width, shape)
                self.masks[k] = None if mask.all() else ag.xp.asarray(mask)

    def __call__(self, z: Tensor) -> Tensor:
        x = self.project(z)  # (B, Z) -> (B, N*C), N = 8*8 for CIFAR-10
        return self.grow(x.reshape(len(z), self.start**2, self.latent_dim), first=0)

    def super_resolve(self, pictures: Tensor) -> Tensor:
        """Small pictures (B, 3, h, w) of the second stage's resolution -> the same in full size, (B, 3, H, W).

        Their pixels enter as that stage's tokens, through a linear layer from RGB, as we read the paper's auxiliary task.
        """
        x = pictures.reshape(len(pictures), 3, -1).transpose(0, 2, 1)  # (B, hw, 3)
        return self.grow(self.from_rgb(x), first=1)  # from (B, hw, C/4)

    def grow(self, x: Tensor, first: int) -> Tensor:
        """Tokens on their way into stage `first` -> pictures (B, 3, H, W)."""
        for k in range(first, len(self.stages)):
            if k > first:
                x = upscale(x)  # (B, HW, C) -> (B, 4HW, C/4)
            x = self.stages[k](x, self.masks[k], self.last_alone)
        x = self.to_rgb(x)  # (B, HW, C) -> (B, HW, 3)
        side = math.isqrt(x.shape[1])
        return x.transpose(0, 2, 1).reshape(len(x), 3, side, side)  # (B, 3, H, W)


class Discriminator(Module):
    """Pictures (B, 3, image_size, image_size) -> one logit each, (B,): high for real.

    The paper's discriminator with tokenized input: a picture is cut into patches, each projected to a token; a learnable
    [cls] token in front collects the judgement. Raises ValueError if patches do not tile the picture.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        rng: np.random.Generator,
        num_heads: int = NUM_HEADS,
        dtype: DTypeLike = np.float32,
    ):
        if image_size % patch_size:
            raise ValueError(f"patches of {patch_size} pixels do not tile a picture of {image_size}")
        self.patch_size = patch_size
        init = Init(rng, "normal", dtype)
        self.embed = Linear(3 * patch_size**2, embed_dim, init, pixels=patch_size**2)
        self.cls = init.normal(1, 1, embed_dim)
        self.position = init.normal(1, 1 + (image_size // patch_size) ** 2, embed_dim)
        self.blocks = [Block(embed_dim, num_heads, init) for _ in range(depth)]
        self.norm = LayerNorm(embed_dim, init)
        self.head = Linear(embed_dim, 1, init)

    def __call__(self, pictures: Tensor) -> Tensor:
        batch, _, height, width = pictures.shape
        p = self.patch_size
        x = pictures.reshape(batch, 3, height // p, p, width // p, p)  # rows and columns into (which patch, where in it)
        x = x.transpose(0, 2, 4, 1, 3, 5)  # (B, H/p, W/p, 3, p, p)
        x = x.reshape(batch, -1, 3 * p * p)  # (B, N, 3pp)
        x = self.embed(x)  # (B, N, C)
        cls = ag.broadcast_to(self.cls, (batch, *self.cls.shape[1:]))
        x = ag.concatenate([cls, x], axis=1) + self.position  # (B, 1+N, C)
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, n=1)  # (B, 1, C), the [cls] token
        return self.head(self.norm(x)).reshape(batch)


# --- 3. Losses --------------------------------------------------------------------------------------------------------

LOSSES = ("wgangp-eps", "hinge", "standard")


def slope_norm(discriminator: Callable[[Tensor], Tensor], x: Array) -> Tensor:
    """||d D(x) / dx||_2 of every picture: (B, 3, H, W) array -> Tensor (B,).

    A picture has no say in the others' logits, so the gradient of their sum holds each picture's own. It is taken with its
    history, because its norm is part of the loss: the optimiser's gradient is then a second derivative.
    """
    at = Tensor(x, requires_grad=True)
    (slope,) = grad(discriminator(at).sum(), [at], create_graph=True)  # (B, 3, H, W)
    # sqrt has no derivative at 0; a summand far below rounding makes it 0 there instead of 0 * infinity
    return ag.sqrt((slope * slope).sum(axis=(1, 2, 3)) + 1e-24)


def gradient_penalty(norms: Tensor, target: float = 1.0) -> Tensor:
    """(10 / target^2) mean (norm - target)^2: (B,) -> one number (Gulrajani et al. 2017, eq. 3, with their weight 10)."""
    return ((norms - target) ** 2).mean() * (10.0 / target**2)


def discriminator_scores(
    discriminator: Callable[[Tensor], Tensor],
    real: Array,
    fake: Array,
    mix: Array,
    loss: str,
    augment: Callable[[Tensor, int], Tensor] | None = None,
) -> Tensor:
    """All that the discriminator's loss asks of each sample: Tensor (2 or 3, B).

    Rows: D(real), D(fake) and, for wgangp-eps, the slope's norm at mix * real + (1 - mix) * fake.
    real, fake: (B, 3, H, W) arrays; mix: (B, 1, 1, 1) array in [0, 1]. augment: what is done to every picture on its way
    into D, augment(pictures, row) for those of a row, 0 to 2; the slope is towards pictures not yet augmented, as the
    authors have it.
    """
    augment = augment or (lambda pictures, row: pictures)
    judged = ag.concatenate([augment(Tensor(real), 0), augment(Tensor(fake), 1)])  # (2B, 3, H, W)
    rows = [discriminator(judged).reshape(2, len(real))]
    if loss == "wgangp-eps":
        between = mix * real + (1 - mix) * fake
        rows.append(slope_norm(lambda x: discriminator(augment(x, 2)), between).reshape(1, len(real)))
    return ag.concatenate(rows)


def discriminator_loss(scores: Tensor, loss: str) -> tuple[Tensor, Tensor | None]:
    """The discriminator's loss from `discriminator_scores` (2 or 3, B): (loss, penalty or None), each one number.

    wgangp-eps: mean D(fake) - mean D(real) + gradient_penalty + 0.001 (mean D(real))^2   (the authors' code)
    hinge:      mean max(0, 1 - D(real)) + mean max(0, 1 + D(fake))
    standard:   sigmoid cross-entropy with real as 1 and fake as 0: mean softplus(-D(real)) + mean softplus(D(fake))
    The first one's last term keeps D(real) from drifting away, since its other terms do not change if all scores rise
    alike. Raises ValueError for another loss.
    """
    on_real, on_fake = scores[0], scores[1]  # (B,) each
    if loss == "wgangp-eps":
        penalty = gradient_penalty(scores[2])
        return on_fake.mean() - on_real.mean() + penalty + 1e-3 * on_real.mean() ** 2, penalty
    if loss == "hinge":
        return ag.relu(1.0 - on_real).mean() + ag.relu(1.0 + on_fake).mean(), None
    if loss == "standard":
        return ag.softplus(-on_real).mean() + ag.softplus(on_fake).mean(), None
    raise ValueError(f"loss must be one of {', '.join(LOSSES)}, not {loss!r}")


def generator_loss(scores: Tensor, loss: str) -> Tensor:
    """The generator's loss from D(G(z)), a Tensor (1, B): one number.

    -mean D(G(z)), and for the standard loss mean softplus(-D(G(z))): cross-entropy with the fakes called real.
    """
    return ag.softplus(-scores).mean() if loss == "standard" else -scores.mean()


def downsample(pictures: Array, factor: int) -> Array:
    """Average over squares of factor*factor pixels: array (B, 3, H, W) -> (B, 3, H/factor, W/factor)."""
    batch, channels, height, width = pictures.shape
    squares = pictures.reshape(batch, channels, height // factor, factor, width // factor, factor)  # axes 3 and 5: within
    return squares.mean(axis=5).mean(axis=3)


def super_resolution_error(generator: Generator, real: Array) -> Tensor:
    """The paper's second trick, co-training with a self-supervised auxiliary task (MT-CT): array (B, 3, H, W) -> (B,).

    Real pictures, reduced to the resolution of the generator's second stage, are to be restored by the stages from there
    on; the error is the mean square over a picture. Its gradient teaches these stages what real pictures look like, beside
    what the discriminator tells.
    """
    small = downsample(real, 2 ** (len(generator.stages) - 2))
    difference = generator.super_resolve(Tensor(small)) - real
    return (difference * difference).mean(axis=(1, 2, 3))


# --- 4. Augmentation --------------------------------------------------------------------------------------------------
# The paper's first trick (its section on data augmentation, tables 2 and 3): DiffAugment (Zhao et al. 2020). Pictures are
# jittered before the discriminator sees them, real and generated alike, so that it cannot learn the real ones by heart; and
# in operations that have derivatives, so that the generator still learns through them.

DRAWS = 7  # random numbers of a picture's augmentation


def draw_augmentation(shape: Shape, side: int, rng: np.random.Generator) -> Array:
    """What `diff_augment` needs for pictures of side*side pixels: a NumPy array (*shape, DRAWS), one row for each picture.

    shape: (B,), or (B, n) for n batches at once. Columns: brightness U(-0.5, 0.5), saturation U(0, 2) and contrast
    U(0.5, 1.5); the shift down and right, whole numbers of up to round(0.2 side) pixels either way; the row and column
    of the cutout's centre, whole numbers from 0 to side, or one less if the square's side is odd. As in the authors'
    code, only 3 in 10 batches are cut at all; in the others the centre lies far outside.
    """
    furthest, size = round(0.2 * side), (side + 1) // 2
    draws = np.empty((*shape, DRAWS))
    draws[..., :3] = rng.uniform((-0.5, 0.0, 0.5), (0.5, 2.0, 1.5), (*shape, 3))
    draws[..., 3:5] = rng.integers(-furthest, furthest, (*shape, 2), endpoint=True)
    draws[..., 5:] = rng.integers(0, side - size % 2, (*shape, 2), endpoint=True)
    is_cut = np.asarray(rng.random(shape[1:]) < 0.3)[..., None]  # (1,) or (n, 1)
    draws[..., 5:] = np.where(is_cut, draws[..., 5:], -2 * side)
    return draws


def color(x: Tensor, draws: Array) -> Tensor:
    """Brightness, then saturation about the mean of each pixel's channels, then contrast about the mean of the picture."""
    brightness, saturation, contrast = (draws[:, i].reshape(-1, 1, 1, 1) for i in range(3))
    x = x + brightness
    grey = x.mean(axis=1, keepdims=True)  # (B, 1, H, W)
    x = (x - grey) * saturation + grey
    mean = x.mean(axis=(1, 2, 3), keepdims=True)  # (B, 1, 1, 1)
    return (x - mean) * contrast + mean


def translation(x: Tensor, draws: Array) -> Tensor:
    """Shift down by draws[:, 3] and right by draws[:, 4] pixels; what comes in from outside is 0.

    A shift of rows is a product with a matrix of zeros and ones from the left, of columns from the right.
    """
    pixel = ag.xp.arange(x.shape[-1])
    moved = pixel[:, None] - pixel  # (H, H): how far row k must go to become row i
    down, right = ((moved == draws[:, i].reshape(-1, 1, 1, 1)).astype(x.dtype) for i in (3, 4))  # (B, 1, H, H)
    return down @ x @ right.swapaxes(-1, -2)


def cutout(x: Tensor, draws: Array) -> Tensor:
    """A square of half the picture's side around (draws[:, 5], draws[:, 6]) becomes 0."""
    side = x.shape[-1]
    pixel, size = ag.xp.arange(side), (side + 1) // 2
    from_edge = (pixel - (draws[:, i].reshape(-1, 1) - size // 2) for i in (5, 6))  # (B, H), from the square's own
    rows, columns = ((edge >= 0) * (edge < size) for edge in from_edge)
    return ag.where(rows[:, None, :, None] * columns[:, None, None, :], 0.0, x)


AUGMENTATIONS = {"translation": translation, "cutout": cutout, "color": color}


@ag.operation
def diff_augment(x: Tensor, policy: str, draws: Array) -> Tensor:
    """Pictures (B, 3, side, side) -> the same shape, augmented by each operation of `policy` in turn.

    policy: names in AUGMENTATIONS, separated by commas, or "none". draws: (B, DRAWS) array of `draw_augmentation`. With its
    draws given this is a plain function, differentiable in the picture any number of times.
    """
    if (len(draws), x.shape[2]) != (len(x), x.shape[3]):
        raise ValueError(f"pictures must be square, and draws, of shape {draws.shape}, have a row for each")
    for name in policy.split(",") if policy != "none" else ():
        x = AUGMENTATIONS[name](x, draws)
    return x


# --- 5. Training ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Options:
    """What defines a run: the same options, on the same kind of machine, give the same run."""

    dataset: str = "cifar10"  # what `pictures` are; its EPOCHS are those that `locality` counts
    size: str = "S"  # of the networks, one of SIZES
    image_size: int = 32  # pixels a side of a picture
    patch_size: int = 4  # pixels a side of the discriminator's patches
    loss: str = "wgangp-eps"  # one of LOSSES
    steps: int = 500_000  # of the generator
    batch_size: int = 32  # real pictures, and as many generated ones, in a step of the discriminator
    gen_batch_size: int = 64  # generated pictures in a step of the generator
    disc_steps: int = 5  # steps of the discriminator before each of the generator
    learning_rate: float = 1e-4  # Adam's, at the start
    decay: str = "none"  # of that rate, one of DECAYS
    beta2: float = 0.99  # how long Adam remembers squares; beta1 is 0
    ema_decay: float = 0.999  # of the generator's moving average, which makes the samples
    seed: int = 0  # of everything random
    diff_aug: str = "translation,cutout,color"  # names in AUGMENTATIONS, or "none"
    sr_weight: float = 50.0  # of co-training in the generator's loss; 0 is without
    locality: str = "4:22,6:32,8:42,10:60"  # half_width:epoch, see `locality_phases`, or "none"
    locality_stages: int = 1  # the last so many stages see no farther
    locality_shape: str = "window"  # one of LOCALITY_SHAPES


DECAYS = ("none", "linear")  # of the learning rate over a run: as it is, in every published command; or to 0 in a line
# Of the authors' runs: 500,000 steps of 5 batches, of 32 of 50,000 pictures, of 16 of 105,000, of 16 of 202,599.
EPOCHS = {"cifar10": 1600, "stl10": 381, "celeba": 198}


def epochs_of(dataset: str) -> int:
    """The epochs that a schedule of locality counts: those of the authors' run on this data set, CIFAR-10's for others."""
    return EPOCHS.get(dataset, EPOCHS["cifar10"])


def locality_phases(options: Options) -> list[tuple[int, float]]:
    """The schedule of locality-aware initialization: [(half_width, step from which it is over), ...], in order.

    `options.locality` counts epochs of EPOCHS, the authors' length; a run of another goes through the same phases in
    proportion.
    """
    if options.locality == "none":
        return []
    scale = options.steps / epochs_of(options.dataset)
    return [(half_width, epoch * scale) for half_width, epoch in locality_pairs(options.locality)]


def half_width_at(options: Options, step: int) -> int | None:
    """How far a token sees in generator step number `step`, from 0, as the schedule has it; None is without limit."""
    return next((half_width for half_width, end in locality_phases(options) if step < end), None)


def locality_pairs(text: str) -> list[tuple[int, float]]:
    """[(half_width, epoch), ...] from "half_width:epoch,...". Raises ValueError for any other text."""
    pairs = (pair.split(":") for pair in text.split(","))
    return [(int(half_width), float(epoch)) for half_width, epoch in pairs]


def make_generator(options: Options, rng: np.random.Generator, dtype: DTypeLike = np.float32) -> Generator:
    """TransGAN's generator as the options have it, drawn from `rng`. Raises ValueError as `Generator`."""
    depths, width = stage_depths(options.size, options.image_size), SIZES[options.size].embed_dim
    return Generator(options.image_size, width, depths, rng, dtype=dtype, co_training=options.sr_weight > 0)


def make_discriminator(options: Options, rng: np.random.Generator, dtype: DTypeLike = np.float32) -> Discriminator:
    """TransGAN's discriminator as the options have it, drawn from `rng`. Raises ValueError as `Discriminator`."""
    size = SIZES[options.size]
    return Discriminator(options.image_size, options.patch_size, size.disc_embed_dim, size.disc_depth, rng, dtype=dtype)


MAX_NORM = 5.0  # the norm to which each network's gradient is clipped


def update(
    scores: Callable[..., Tensor],
    inputs: Inputs,
    loss: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    adam: ag.Adam,
    rate: float,
) -> tuple[Tensor, Tensor | None]:
    """Move Adam's parameters down the gradient of loss(scores(*inputs)); returns what `loss` returns.

    scores: of the inputs, arrays (B, ...), a Tensor (rows, B). loss: of these, a number, and another to report. They
    are two functions so that a batch may go through `scores` in parts, while the loss needs them all:
    program/update.py, which shares a batch, has an update of the same signature.
    """
    values = loss(scores(*inputs))
    adam.add(grad(values[0], adam.parameters))
    factor, _ = ag.clip_by_global_norm(adam.gradient, MAX_NORM)
    adam.step(rate, factor)
    return values


class Trainer:
    """Both networks, their optimisers, the generator's moving average, and how many generator steps were done.

    pictures: bytes (N, 3, image_size, image_size). generator, discriminator: those of the paper, or others with the
    same methods and attributes. update: makes a step of one network out of its scores and loss. map: the built-in, or
    one that goes through the parts of a large sample in its own way. All that is random in a step follows from the seed
    and the step's number, so the random state of a run is those two numbers. Raises UserError for a batch larger than
    the data.
    """

    def __init__(
        self,
        options: Options,
        pictures: Bytes,
        generator: Generator,
        discriminator: Discriminator,
        update: Callable[..., tuple[Tensor, Tensor | None]] = update,
        map: Callable[..., Iterable[Any]] = map,
    ):
        self.options, self.generator, self.discriminator, self.update, self.map = (
            options, generator, discriminator, update, map,
        )  # fmt: skip
        self.step = 0
        self.batches = data.Batches(pictures, options.batch_size, options.seed)
        if options.sr_weight:
            self.co_batches = data.Batches(pictures, options.gen_batch_size, options.seed, "co-training order")
        self.gen_parameters, self.disc_parameters = generator.parameters(), discriminator.parameters()
        self.gen_adam = ag.Adam(self.gen_parameters.values(), (0.0, options.beta2), decay=options.ema_decay)
        self.disc_adam = ag.Adam(self.disc_parameters.values(), (0.0, options.beta2))
        assert self.gen_adam.average is not None  # because it was given a decay
        self.average = dict(zip(self.gen_parameters, self.gen_adam.parts(self.gen_adam.average), strict=True))
        self.half_width: int | None = None
        self.set_window()

    def train_step(self) -> Losses:
        """One step: `disc_steps` updates of the discriminator, then one of the generator and its moving average.

        Returns the last losses and penalty as 0-d arrays on the device, for which nothing waits; None for what is not.
        """
        options = self.options
        self.set_window()
        disc_inputs, gen_inputs = self.inputs(self.step)
        rate = options.learning_rate
        if options.decay == "linear":
            rate *= 1 - self.step / options.steps
        for inputs in disc_inputs:
            losses = self.discriminator_step(inputs, rate)
        losses |= self.generator_step(gen_inputs, rate)
        self.step += 1
        return losses

    def inputs(self, step: int) -> tuple[list[Inputs], Inputs]:
        """All that a step needs from outside, as NumPy arrays: a list for each discriminator step, one for the generator.

        The discriminator's: scaled pictures (B, 3, H, W), noise (B, Z), the mixing weights of the penalty (B, 1, 1, 1)
        and the augmentations' draws (B, 3, DRAWS). The generator's: noise and draws, and pictures if there is
        co-training.
        """
        options, rng, disc_inputs = self.options, data.random_stream("step", self.options.seed, step), []
        batch, gen_batch = options.batch_size, options.gen_batch_size
        for i in range(options.disc_steps):
            real = flip(self.batches[step * options.disc_steps + i], rng)
            mix = rng.random((batch, 1, 1, 1))
            disc_inputs.append([real, self.noise(batch, rng), mix, self.draws((batch, 3), rng)])
        gen_inputs = [self.noise(gen_batch, rng), self.draws((gen_batch,), rng)]
        if options.sr_weight:
            gen_inputs.append(flip(self.co_batches[step], rng))
        return disc_inputs, gen_inputs

    def set_window(self) -> None:
        """Let the generator see as far as the schedule says for this step."""
        half_width = half_width_at(self.options, self.step)
        if half_width != self.half_width:
            self.half_width = half_width
            self.generator.attend_within(half_width, self.options.locality_stages, self.options.locality_shape)

    def discriminator_step(self, inputs: Inputs, rate: float) -> Losses:
        """Update the discriminator on real pictures and as many generated ones; its inputs are those of `inputs`."""
        options = self.options

        def scores(real: Array, noise: Array, mix: Array, draws: Array) -> Tensor:
            def augment(pictures: Tensor, row: int) -> Tensor:
                return diff_augment(pictures, options.diff_aug, draws[:, row])

            return discriminator_scores(self.discriminator, real, self.generated(noise), mix, options.loss, augment)

        def loss(scores: Tensor) -> tuple[Tensor, Tensor | None]:
            return discriminator_loss(scores, options.loss)

        total, penalty = self.update(scores, [self.array(x) for x in inputs], loss, self.disc_adam, rate)
        return {"disc_loss": total.data, "penalty": None if penalty is None else penalty.data}

    def generated(self, noise: Array) -> Array:
        """What the discriminator is to tell from real pictures: noise (B, Z) -> (B, 3, H, W), arrays without history."""
        with ag.no_grad():
            return self.generator(Tensor(noise)).data

    def generator_step(self, inputs: Inputs, rate: float) -> Losses:
        """Update the generator through the discriminator's judgement of its pictures; its inputs are those of `inputs`."""
        options = self.options

        def scores(noise: Array, draws: Array, *real: Array) -> Tensor:
            pictures = diff_augment(self.generator(Tensor(noise)), options.diff_aug, draws)
            rows = [self.discriminator(pictures), *(super_resolution_error(self.generator, x) for x in real)]
            return ag.concatenate([row.reshape(1, -1) for row in rows])  # (1 or 2, B)

        def loss(scores: Tensor) -> tuple[Tensor, Tensor | None]:
            on_fake = generator_loss(scores[:1], options.loss)
            if not options.sr_weight:
                return on_fake, None
            error = scores[1].mean()
            return on_fake + options.sr_weight * error, error

        total, error = self.update(scores, [self.array(x) for x in inputs], loss, self.gen_adam, rate)
        return {"gen_loss": total.data, "sr_loss": None if error is None else error.data}

    def array(self, values: Array) -> Array:
        """A NumPy array as an array on the device, in the networks' dtype."""
        return ag.xp.asarray(values, dtype=self.gen_adam.p.dtype)

    def noise(self, count: int, rng: np.random.Generator) -> Array:
        """z ~ N(0, I): (count, Z)."""
        return rng.standard_normal((count, self.generator.latent_dim))

    def draws(self, shape: Shape, rng: np.random.Generator) -> Array:
        """Random numbers of the augmentation, (*shape, DRAWS); none are drawn where there is none."""
        if self.options.diff_aug == "none":
            return np.zeros((*shape, DRAWS))
        return draw_augmentation(shape, self.options.image_size, rng)

    def sample(self, z: Array) -> Floats:
        """Pictures that the averaged generator makes of noise (n, Z): NumPy (n, 3, H, W), about [-1, 1]."""
        return self.averaged(self.generator, z)

    def restore(self, small: Floats) -> Floats:
        """What the averaged generator makes of small pictures (n, 3, h, w), see `super_resolution_error`: NumPy arrays."""
        return self.averaged(self.generator.super_resolve, small)

    def averaged(self, function: Callable[[Tensor], Tensor], inputs: Array) -> Floats:
        """function(inputs), part by part, while the generator's averaged weights stand in for its own."""
        own = {name: p.data for name, p in self.gen_parameters.items()}  # put back when the averages have had their turn
        for name, p in self.gen_parameters.items():
            p.data = self.average[name]
        try:
            return in_parts(lambda x: function(Tensor(self.array(x))), inputs, self.map)
        finally:
            for name, p in self.gen_parameters.items():
                p.data = own[name]

    def state(self) -> dict[str, Array]:
        """Every array that training changes, by name; with `step`, all that a run needs to go on from where it is."""
        state: dict[str, Array] = {}
        for network, parameters, adam in (
            ("generator", self.gen_parameters, self.gen_adam),
            ("discriminator", self.disc_parameters, self.disc_adam),
        ):
            state |= {f"{network}/{name}": p.data for name, p in parameters.items()}
            state |= {f"{network}/adam.v/{name}": x for name, x in zip(parameters, adam.parts(adam.v), strict=True)}
        return state | {f"average/{name}": x for name, x in self.average.items()}


def in_parts(function: Callable[[Array], Tensor], inputs: Array, map: Callable[..., Iterable[Any]] = map) -> Floats:
    """function(inputs), 64 at a time and without history, so that memory is enough for any number: NumPy (n, ...)."""

    def part(inputs: Array) -> Floats:
        with ag.no_grad():
            return ag.to_numpy(function(inputs))

    return np.concatenate(list(map(part, [inputs[i : i + 64] for i in range(0, len(inputs), 64)])))


def train(trainer: Trainer) -> Iterator[tuple[int, Losses]]:
    """The training loop: makes the steps that are left, and hands out the number of each and its losses.

        for step, losses in train(trainer): ...

    What surrounds it, a log, samples, checkpoints, is whoever runs it to add: see program/run.py.
    """
    while trainer.step < trainer.options.steps:
        losses = trainer.train_step()
        yield trainer.step, losses


def flip(pictures: Floats, rng: np.random.Generator) -> Floats:
    """Mirror each of the pictures with probability 1/2, a NumPy array (B, 3, H, W), in place; returns them."""
    flipped = rng.random(len(pictures)) < 0.5
    pictures[flipped] = pictures[flipped, :, :, ::-1]
    return pictures


# --- 6. Watching it learn ---------------------------------------------------------------------------------------------


def sliced_wasserstein(a: Floats, b: Floats, directions: int = 256, seed: int = 0) -> float:
    """How far two sets of as many pictures lie apart, (n, ...) NumPy arrays each: 0 for the same set, in the pixels' unit.

    The sliced 1-Wasserstein distance of the pixels (after Rabin et al. 2011): along a random direction of unit length the
    best match of two sets pairs them in order, so the distance there is mean |sort(a) - sort(b)|; averaged over
    `directions`. It sees colours, brightness and coarse layout, needs no other network, and says nothing about detail.
    """
    if a.shape != b.shape:
        raise ValueError(f"sliced_wasserstein: expected two arrays of one shape, not {a.shape} and {b.shape}")
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    lines = np.random.default_rng(seed).standard_normal((a.shape[1], directions)).astype(np.float32)
    lines /= np.linalg.norm(lines, axis=0)
    return float(np.abs(np.sort(a @ lines, axis=0) - np.sort(b @ lines, axis=0)).mean())
