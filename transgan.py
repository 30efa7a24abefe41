"""TransGAN: a GAN made of two transformers and no convolution (Jiang, Chang and Wang, arXiv 2102.07074), from scratch.

The story of this chapter: a generator grows a picture out of noise, as 8x8 tokens, then 16x16, then 32x32; a
discriminator cuts pictures into patches and says how real they look. Both are stacks of the same transformer block. The
discriminator learns to score real pictures above generated ones, the generator to be scored high. A penalty pulls the norm
of the discriminator's gradient towards 1, so that its score has a slope for the generator to climb, neither flat nor a
cliff. Every operation used here stands, beside its derivative, in autograd.py.

This is the paper's first version (February 2021): its networks, its training, and the three tricks that it adds to them:
data augmentation, co-training and locality-aware initialization.

Contents
    1. Building blocks        Linear, LayerNorm, Attention, MLP, Block
    2. The two networks       SIZES, upscale, window_mask, Generator, Discriminator
    3. Losses                 gradient_penalty, discriminator_loss, generator_loss, super_resolution_error
    4. Augmentation           diff_augment, draw_augmentation
    5. Training               Options, Trainer: one step of each network, moving average, checkpoints; Group for more GPUs
    6. Watching it learn      sliced_wasserstein, Log, train, and what stops it: stop_signals, train_on
    7. Command line           summary, the options and what they may be, run, main

In comments on shapes: B batch, N tokens, C width (embed_dim), H and W height and width in tokens or pixels, Z latent_dim,
p patch_size.
"""

from __future__ import annotations

import os

for _library in ("OPENBLAS", "MKL", "VECLIB"):  # before NumPy loads its BLAS: the threads are ours, see Trainer.update
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")

import argparse
import contextlib
import csv
import dataclasses
import functools
import io
import itertools
import json
import math
import multiprocessing
import shlex
import signal
import socket
import sys
import tempfile
import threading
import time
import types
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

import autograd as ag
import data
import fast
from autograd import Array, Init, LayerNorm, Linear, Module, Shape, Tensor, grad
from data import Bytes, Floats, UserError, first_line

Inputs: TypeAlias = list[Array]  # what an update of one network needs from outside, see Trainer.inputs
Losses: TypeAlias = dict[str, Array | None]  # by their names in log.csv, 0-d arrays on the device; None for one not in use
Scores: TypeAlias = Callable[[], dict[str, float]]  # measures a run as it is now, by the names in log.csv
Row: TypeAlias = dict[str, Any]  # of log.csv
StageRow: TypeAlias = tuple[str, Any, Any, Any, int, int]  # of the summary, see generator_rows

# --- 1. Building blocks -----------------------------------------------------------------------------------------------


class Attention(Module):
    """Multi-head self-attention: (B, N, C) -> (B, N, C), or (B, n, C) for the first n tokens alone.

    One matrix without bias makes q, k and v. mask: (N, N), True where the row's token sees the column's, or None for all.
    """

    def __init__(self, embed_dim: int, num_heads: int, init: Init):
        self.num_heads = num_heads
        self.qkv = Linear(embed_dim, 3 * embed_dim, init, bias=False)
        self.projection = Linear(embed_dim, embed_dim, init)

    def __call__(self, x: Tensor, mask: Array | None = None, n: int | None = None) -> Tensor:
        if n is not None:
            return self.projection(self.of_first(x, n, mask))
        qkv = self.qkv(x)  # (B, N, 3C)
        x = ag.attention(qkv, self.num_heads, mask)  # (B, N, C)
        return self.projection(x)

    def of_first(self, x: Tensor, n: int, mask: Array | None) -> Tensor:
        """The same for few queries: (B, N, C) -> (B, n, C)."""
        width, heads = x.shape[-1], self.num_heads
        q = ag.split_heads(ag.linear(x[:, :n], self.qkv.weight[:, :width]), heads)  # (B, H, n, D)
        kv = ag.split_heads(ag.linear(x, self.qkv.weight[:, width:]), 2 * heads)  # (B, 2H, N, D)
        return ag.join_heads(ag.attend(q, kv[:, :heads], kv[:, heads:], None if mask is None else mask[:n]))


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


SIZES = {
    "tiny": Size(128, (2, 1, 1), 128, 3),
    "S": Size(384, (5, 2, 2)),
    "M": Size(512, (5, 2, 2)),
    "L": Size(768, (5, 2, 2)),
    "XL": Size(1024, (5, 4, 2)),
}
NUM_HEADS = 4


def stage_depths(size: str, image_size: int) -> tuple[int, ...]:
    """The generator's blocks per stage: a size's depths, with a stage more for pictures of 64 pixels a side and above.

    So TransGAN-XL has (5, 4, 4, 2) on CelebA, as in the paper. Sizes whose width does not divide among the heads of a
    fourth stage, tiny and S, make these pictures in three, from 16x16 tokens.
    """
    depths, parts = SIZES[size].depths, NUM_HEADS * 4**3  # a fourth stage has 1/4^3 of the width, for NUM_HEADS heads
    return depths[:2] + depths[1:] if image_size >= 64 and SIZES[size].embed_dim % parts == 0 else depths


def upscale(x: Tensor) -> Tensor:
    """The paper's UpScale: tokens (B, H*W, C) -> (B, 2H*2W, C/4), twice the resolution for a quarter of the width."""
    batch, tokens, width = x.shape
    side = math.isqrt(tokens)
    x = x.transpose(0, 2, 1).reshape(batch, width, side, side)  # (B, C, H, W)
    x = ag.pixel_shuffle(x, 2)  # (B, C/4, 2H, 2W)
    return x.reshape(batch, width // 4, 4 * tokens).transpose(0, 2, 1)  # (B, 4HW, C/4)


def window_mask(side: int, half_width: int) -> NDArray[np.bool_]:
    """Which of side*side tokens a query may see: NumPy booleans (N, N), N = side^2, True where both row and column of the
    key are within half_width of the query's. The paper's third trick, locality-aware initialization: while it is young, the
    generator may only look around; natural pictures are smooth, so that is where to start."""
    row, column = np.divmod(np.arange(side * side), side)
    return (abs(row[:, None] - row) <= half_width) & (abs(column[:, None] - column) <= half_width)


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
            raise ValueError(f"a picture of {image_size} pixels cannot be doubled up to in {stages} stages")
        if embed_dim % (num_heads * 4 ** (stages - 1)):
            raise ValueError(f"embed_dim {embed_dim} must divide by {num_heads} heads times 4^{stages - 1}")
        init = Init(rng, "uniform", dtype)
        self.project = Linear(embed_dim, self.start**2 * embed_dim, init)
        self.stages = []
        for k, depth in enumerate(depths):
            self.stages.append(Stage(self.start * 2**k, embed_dim // 4**k, depth, num_heads, init))
        self.to_rgb = Linear(embed_dim // 4 ** (stages - 1), 3, init)
        if co_training:
            self.from_rgb = Linear(3, embed_dim // 4, init)
        self.masks: list[Array | None] = [None] * stages

    def attend_within(self, half_width: int | None, stages: int) -> None:
        """From now on, the last `stages` stages see only so many tokens around each, all of them if half_width is None."""
        for k in range(len(self.stages)):
            side = self.start * 2**k
            self.masks[k] = None
            if half_width is not None and half_width < side - 1 and k >= len(self.stages) - stages:
                self.masks[k] = ag.xp.asarray(window_mask(side, half_width))

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
            x = self.stages[k](x, self.masks[k])
        x = self.to_rgb(x)  # (B, HW, C/16) -> (B, HW, 3)
        side = math.isqrt(x.shape[1])
        return x.transpose(0, 2, 1).reshape(len(x), 3, side, side)  # (B, 3, H, W)


class Stage(Module):
    """One resolution of the generator: a learnable position is added to each token, then the blocks follow."""

    def __init__(self, side: int, embed_dim: int, depth: int, num_heads: int, init: Init):
        self.position = init.normal(1, side * side, embed_dim)
        self.blocks = [Block(embed_dim, num_heads, init) for _ in range(depth)]

    def __call__(self, x: Tensor, mask: Array | None = None) -> Tensor:
        x = x + self.position  # (B, N, C)
        for block in self.blocks:
            x = block(x, mask)
        return x


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
        self.embed = Linear(3 * patch_size**2, embed_dim, init)
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
    into D, augment(pictures, row) for those of a row, 0 to 2; the slope is the one before it, as the authors have it.
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
    The first one's last term keeps D(real) from drifting away, since only differences of scores count in the others. Raises
    ValueError for another loss.
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
    U(0.5, 1.5); the shift down and right, whole numbers of up to round(0.2 side) pixels either way; the row and column of
    the cutout's centre, whole numbers from 0 to side. As in the authors' code, only 3 in 10 batches are cut at all; in the
    others the centre lies far outside.
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
    from_edge = (pixel - (draws[:, i].reshape(-1, 1) - size // 2) for i in (5, 6))  # (B, H), counted from the square's
    rows, columns = (((edge >= 0) * (edge < size)).astype(x.dtype) for edge in from_edge)
    return x * (1 - rows[:, None, :, None] * columns[:, None, None, :])


AUGMENTATIONS = {"translation": translation, "cutout": cutout, "color": color}

@ag.operation
def diff_augment(x: Tensor, policy: str, draws: Array) -> Tensor:
    """Pictures (B, 3, side, side) -> the same shape, augmented by each operation of `policy` in turn.

    policy: names in AUGMENTATIONS, separated by commas, or "none". draws: (B, DRAWS) array of `draw_augmentation`. With its
    draws given this is a plain function, differentiable in the picture any number of times.
    """
    names = policy.split(",") if policy != "none" else []
    for name in names:
        x = AUGMENTATIONS[name](x, draws)
    return x


# --- 5. Training ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Options:
    """What defines a run: the same options, on the same kind of machine, give the same run. See --help for each."""

    dataset: str = "cifar10"
    size: str = "S"
    image_size: int = 32
    patch_size: int = 4
    loss: str = "wgangp-eps"
    steps: int = 500_000
    batch_size: int = 32
    gen_batch_size: int = 64
    disc_steps: int = 5
    learning_rate: float = 1e-4
    ema_decay: float = 0.999
    seed: int = 0
    diff_aug: str = "translation,cutout,color"
    sr_weight: float = 50.0
    locality: str = "4:22,6:32,8:42,10:60"
    locality_stages: int = 1
    accumulate: int = 1
    generator: str = "transgan"
    discriminator: str = "transgan"
    beta2: float = 0.99
    precision: str = "float32"


EPOCHS = 1600  # of the authors' run: 500,000 steps of 5 batches of 32 of 50,000 pictures


def locality_phases(options: Options) -> list[tuple[int, float]]:
    """The schedule of locality-aware initialization: [(half_width, step from which it is over), ...], in order.

    `options.locality` counts epochs of a run of EPOCHS, the authors' length; a run of another length goes through the same
    phases in proportion.
    """
    if options.locality == "none":
        return []
    return [(half_width, epoch / EPOCHS * options.steps) for half_width, epoch in locality_pairs(options.locality)]


def locality_pairs(text: str) -> list[tuple[int, float]]:
    """[(half_width, epoch), ...] from "half_width:epoch,...". Raises ValueError for any other text."""
    pairs = (pair.split(":") for pair in text.split(","))
    return [(int(half_width), float(epoch)) for half_width, epoch in pairs]


NAMES = {"transgan": "TransGAN", "autogan": "AutoGAN", "resnet": "ResNet"}  # of either network; the last is WGAN-GP's


def make_generator(options: Options, rng: np.random.Generator, dtype: DTypeLike = np.float32) -> Generator:
    """The generator of a run, its weights drawn from `rng`, TransGAN's or a peer that is used alike.

    Raises ValueError for pictures that it cannot make.
    """
    if options.generator == "transgan":
        depths, width = stage_depths(options.size, options.image_size), SIZES[options.size].embed_dim
        return Generator(options.image_size, width, depths, rng, dtype=dtype, co_training=options.sr_weight > 0)
    from paper import networks

    return networks.make_generator(options.generator, options.size, options.image_size, rng, dtype)


def make_discriminator(options: Options, rng: np.random.Generator, dtype: DTypeLike = np.float32) -> Discriminator:
    """The discriminator of a run, its weights drawn from `rng`, TransGAN's or a peer that is used alike.

    Raises ValueError for pictures that it cannot cut.
    """
    size = SIZES[options.size]
    if options.discriminator == "transgan":
        return Discriminator(options.image_size, options.patch_size, size.disc_embed_dim, size.disc_depth, rng, dtype=dtype)
    from paper import networks

    return networks.make_discriminator(options.discriminator, options.size, options.image_size, rng, dtype)


CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
THREAD_SHARE = 1 << 15  # elements of a layer worth a thread of their own: with fewer, handing over costs what it saves
MAX_NORM = 5.0  # the norm to which each network's gradient is clipped


class Group:
    """Joins the processes of several GPUs that train together, one each (data parallel, over NCCL).

    All of them hold the same networks and go through the same steps, each on its part of every batch. rank: which one this
    is, from 0 to size - 1; port: where on this machine they find each other; processes: those to watch over.
    """

    def __init__(self, rank: int, size: int, port: int, processes: Sequence[BaseProcess] = ()):
        from cupyx import distributed

        self.rank, self.size, self.processes = rank, size, processes
        self.communicator = distributed.init_process_group(size, rank, host="127.0.0.1", port=port)

    def gather(self, x: Array) -> Array:
        """Everybody's arrays (rows, n) side by side, by rank: (rows, size n). Raises UserError if one of them is gone."""
        if not all(process.is_alive() for process in self.processes):
            raise UserError("the process of one of the GPUs has ended; go on with --resume")
        everybody = ag.xp.empty((self.size, *x.shape), x.dtype)
        self.communicator.all_gather(ag.xp.ascontiguousarray(x), everybody, x.size)
        return everybody.transpose(1, 0, 2).reshape(len(x), -1)

    def add_up(self, x: Array) -> None:
        """Replace an array by the sum of everybody's."""
        self.communicator.all_reduce(x, x)


class Trainer:
    """Both networks, their optimisers, the generator's moving average, and how many generator steps were done.

    pictures: bytes (N, 3, image_size, image_size). All that is random in a step follows from the seed and the step's
    number, so the random state of a run is those two numbers. `waited`: seconds that steps have waited for their data.
    group: what joins the Trainers of several GPUs, see `Group`. Raises UserError for a batch larger than the data,
    ValueError for an image_size or patch_size that the networks cannot have.
    """

    rate_scale = 1.0  # of the learning rate: halved by each rewind, see `train_on`

    def __init__(
        self,
        options: Options,
        pictures: Bytes,
        threads: int | None = None,
        dtype: DTypeLike = np.float32,
        group: Group | None = None,
    ):
        seed = options.seed
        self.options, self.dtype, self.step, self.group = options, dtype, 0, group
        self.waited = 0.0
        self.prepared: tuple[int, futures.Future[tuple[list[Inputs], Inputs]] | None] = 0, None
        self.preparing = futures.ThreadPoolExecutor(1, thread_name_prefix="data")
        elements = options.batch_size * (options.image_size // options.patch_size) ** 2 * SIZES[options.size].disc_embed_dim
        if options.discriminator != "transgan":
            elements = options.batch_size * options.image_size**2 * 16  # channels, or more
        threads = threads or min(CORES, max(1, elements // THREAD_SHARE))
        self.threads = min(threads, options.batch_size, options.gen_batch_size) if ag.xp is np else 1
        self.map = futures.ThreadPoolExecutor(self.threads).map if self.threads > 1 else map
        self.batches = data.Batches(pictures, options.batch_size, seed)
        rng = data.random_stream("weights", seed)
        if options.sr_weight:
            self.co_batches = data.Batches(pictures, options.gen_batch_size, seed, "co-training order")
        self.generator = make_generator(options, rng, dtype)
        self.discriminator = make_discriminator(options, rng, dtype)
        # Batch normalization, which has buffers, looks at a whole batch, which then cannot be shared out in the generator.
        self.whole = bool({})
        self.half_width: int | None = None
        self.set_window()
        self.gen_parameters = self.generator.parameters()
        self.disc_parameters = self.discriminator.parameters()
        self.gen_adam = ag.Adam(self.gen_parameters.values(), (0.0, options.beta2), decay=options.ema_decay)
        self.disc_adam = ag.Adam(self.disc_parameters.values(), (0.0, options.beta2))
        assert self.gen_adam.average is not None  # because it was given a decay
        self.average = dict(zip(self.gen_parameters, self.gen_adam.parts(self.gen_adam.average), strict=True))

    def train_step(self) -> Losses:
        """One step: `disc_steps` updates of the discriminator, then one of the generator and its moving average.

        Returns the last losses and penalty as 0-d arrays on the device, so that nothing waits for them.
        """
        options = self.options
        self.set_window()
        disc_inputs, gen_inputs = self.next_inputs()
        rate = self.rate_scale * options.learning_rate * (1 - self.step / options.steps)  # linear decay to 0 over the run
        for inputs in disc_inputs:
            losses = self.discriminator_step(inputs, rate)
        losses |= self.generator_step(gen_inputs, rate)
        self.step += 1
        return losses

    def next_inputs(self) -> tuple[list[Inputs], Inputs]:
        """The `inputs` of this step, which were prepared while the last one was at work; those of the next come after."""
        step, waiting = self.prepared
        start = time.perf_counter()
        inputs = waiting.result() if waiting and step == self.step else self.inputs(self.step)
        self.waited += time.perf_counter() - start
        self.prepared = self.step + 1, self.preparing.submit(self.inputs, self.step + 1)
        return inputs

    def inputs(self, step: int) -> tuple[list[Inputs], Inputs]:
        """All that a step needs from outside, as NumPy arrays: a list for each discriminator step, one for the generator.

        The discriminator's: pictures (B, 3, H, W), noise (B, Z), the mixing weights of the penalty (B, 1, 1, 1) and the
        augmentations' draws (B, 3, DRAWS). The generator's: noise and draws, and pictures if there is co-training.
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
        *disc_inputs, gen_inputs = ([x.astype(self.dtype) for x in inputs] for inputs in (*disc_inputs, gen_inputs))
        return disc_inputs, gen_inputs

    def set_window(self) -> None:
        """Let the generator see as far as the schedule says for this step."""
        phases = locality_phases(self.options)
        half_width = next((half_width for half_width, end in phases if self.step < end), None)
        if half_width != self.half_width:
            self.half_width = half_width
            self.generator.attend_within(half_width, self.options.locality_stages)

    def discriminator_step(self, inputs: Inputs, rate: float) -> Losses:
        """Update the discriminator on real pictures and as many generated ones; for its `inputs` see there."""
        pass

        def generated(noise: Array) -> Array:
            with ag.no_grad():
                return self.generator(Tensor(noise)).data

        if self.whole:  # the pictures take the place of their noise, before the batch is shared out
            inputs = [inputs[0], ag.to_numpy(generated(self.array(inputs[1]))), *inputs[2:]]

        def scores(real: Array, noise: Array, mix: Array, draws: Array) -> Tensor:
            fake = noise if self.whole else generated(noise)

            def augment(pictures: Tensor, row: int) -> Tensor:
                return diff_augment(pictures, self.options.diff_aug, draws[:, row])

            return discriminator_scores(self.discriminator, real, fake, mix, self.options.loss, augment)

        loss, penalty = self.update(
            scores, inputs, discriminator_loss, self.disc_parameters, self.disc_adam, rate, self.threads
        )
        return {"disc_loss": loss.data, "penalty": None if penalty is None else penalty.data}

    def generator_step(self, inputs: Inputs, rate: float) -> Losses:
        """Update the generator through the discriminator's judgement of its pictures; for its `inputs` see there."""
        sr_weight = self.options.sr_weight

        def scores(noise: Array, draws: Array, *real: Array) -> Tensor:
            pictures = diff_augment(self.generator(Tensor(noise)), self.options.diff_aug, draws)
            rows = [self.discriminator(pictures), *(super_resolution_error(self.generator, x) for x in real)]
            return ag.concatenate([row.reshape(1, -1) for row in rows])  # (1 or 2, B)

        def loss(scores: Tensor, name: str) -> tuple[Tensor, Tensor | None]:
            on_fake = generator_loss(scores[:1], name)
            if not sr_weight:
                return on_fake, None
            error = scores[1].mean()
            return on_fake + sr_weight * error, error

        threads = 1 if self.whole else self.threads
        total, error = self.update(scores, inputs, loss, self.gen_parameters, self.gen_adam, rate, threads)
        return {"gen_loss": total.data, "sr_loss": None if error is None else error.data}

    def update(
        self,
        scores: Callable[..., Tensor],
        inputs: Inputs,
        loss: Callable[[Tensor, str], tuple[Tensor, Tensor | None]],
        parameters: dict[str, Tensor],
        adam: ag.Adam,
        rate: float,
        threads: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Move `parameters` down the gradient of loss(scores(*inputs)); returns what `loss` returns.

        In principle: values = loss(scores(*inputs), ...); total = grad(values[0], parameters); clip; Adam's step. But the
        batch is cut into shares. Threads work on several at a time, because NumPy's elementwise operations run on one
        core; and with options.accumulate = n only one n-th of the batch is in memory at once. Scores are numbers per
        sample, so shares do not meet before the loss, and the graph is cut there:
            d loss / d parameters = sum over shares of (d loss / d s_share) (d s_share / d parameters).
        First the scores of each share are computed; the loss is taken of a copy without history and differentiated
        towards it; then that gradient is carried on from each share's scores to the parameters. Whoever saves memory throws
        the history of the scores away, and computes them a second time for the last part. Several GPUs tell each other
        their scores, and add up their gradients.
        """
        accumulate, wanted, group = self.options.accumulate, list(parameters.values()), self.group
        if group:
            inputs = [np.array_split(x, group.size)[group.rank] for x in inputs]
        count = min(threads * accumulate, len(inputs[0]))
        cuts = zip(*(np.array_split(x, count) for x in inputs), strict=True)
        shares = [[self.array(x) for x in cut] for cut in cuts]

        def forward(share: Inputs) -> Tensor:
            part = scores(*share)  # (rows, B / shares)
            return part if accumulate == 1 else part.detach()

        def backward(share: Inputs, part: Tensor, towards: Tensor) -> list[Tensor]:
            return grad(part if accumulate == 1 else scores(*share), wanted, towards)

        parts = list(self.map(forward, shares))
        own = ag.xp.concatenate([part.data for part in parts], axis=1)  # (rows, B), or as much of B as is for this GPU
        leaf = Tensor(group.gather(own) if group else own, requires_grad=True)  # (rows, B)
        values = loss(leaf, self.options.loss)
        (slope,), work = grad(values[0], [leaf]), []
        end = own.shape[1] * group.rank if group else 0
        for share, part in zip(shares, parts, strict=True):
            start, end = end, end + part.shape[1]
            work.append((share, part, slope[:, start:end]))
        del parts, part  # so that `work` alone holds the shares' history, and each goes when it is done
        while work:
            for gradients in list(self.map(lambda share: backward(*share), work[:threads])):
                adam.add(gradients)
            del work[:threads]
        if group:
            group.add_up(adam.gradient)
        factor, _ = ag.clip_by_global_norm(adam.gradient, MAX_NORM)
        adam.step(rate, factor)
        return values

    def array(self, values: Array) -> Array:
        """A NumPy array as an array on the device, in the networks' dtype."""
        return ag.xp.asarray(values, dtype=self.dtype)

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
        return self._averaged(self.generator, z)

    def restore(self, small: Floats) -> Floats:
        """What the averaged generator makes of small pictures (n, 3, h, w), see `super_resolution_error`: NumPy arrays."""
        return self._averaged(self.generator.super_resolve, small)

    def _averaged(self, function: Callable[[Tensor], Tensor], inputs: Array) -> Floats:
        def part(inputs: Array) -> Floats:
            with ag.no_grad():
                return ag.to_numpy(function(Tensor(self.array(inputs))).data)

        own = {name: p.data for name, p in self.gen_parameters.items()}  # put back when the averages have had their turn
        for name, p in self.gen_parameters.items():
            p.data = self.average[name]
        modules = []
        for module in modules:
            module.training = False
        try:
            return np.concatenate(list(self.map(part, (inputs[i : i + 64] for i in range(0, len(inputs), 64)))))
        finally:
            for name, p in self.gen_parameters.items():
                p.data = own[name]
            for module in modules:
                module.training = True

    def _state(self) -> dict[str, Array]:
        """Every array that training changes, by the name it has in a checkpoint."""
        state: dict[str, Array] = {}
        for network, parameters, buffers, adam in (
            ("generator", self.gen_parameters, {}, self.gen_adam),
            ("discriminator", self.disc_parameters, {}, self.disc_adam),
        ):
            state |= {f"{network}/{name}": p.data for name, p in parameters.items()}
            state |= {f"{network}/{name}": x for name, x in buffers.items()}
            for moment, flat in (("m", adam.m), ("v", adam.v)):
                if flat is not None:
                    parts = zip(parameters, adam.parts(flat), strict=True)
                    state |= {f"{network}/adam.{moment}/{name}": x for name, x in parts}
        return state | {f"average/{name}": x for name, x in self.average.items()}

    def save(self, path: Path) -> None:
        """Write a checkpoint: all arrays of training, the step and the options, from which the random state follows.

        The one that lies there is kept as NAME-previous.npz. Raises NotFinite, and writes nothing, for a state that is not.
        """
        arrays: dict[str, Any] = {name: ag.to_numpy(x) for name, x in self._state().items()}
        for name, x in arrays.items():
            if not np.isfinite(x).all():
                raise NotFinite(f"{name} is not finite after step {self.step}")
        options = json.dumps(dataclasses.asdict(self.options))
        with data.whole_file(path, path.with_stem(f"{path.stem}-previous")) as part, part.open("wb") as file:
            np.savez(file, options=options, step=self.step, rate_scale=self.rate_scale, **arrays)

    def load(self, path: Path) -> None:
        """Take a checkpoint's arrays and step. Raises UserError, and takes nothing, if it does not fit these networks."""
        theirs = read_options(path)
        for name, own in dataclasses.asdict(self.options).items():
            if name not in ("steps", "accumulate", "dataset") and getattr(theirs, name) != own:
                raise UserError(f"{path} is of another run: its {name} is {getattr(theirs, name)!r}, not {own!r}")
        state = self._state()
        with open_checkpoint(path) as saved:
            arrays = {name: saved.read(name, x) for name, x in state.items()}
            if more := saved.names - state.keys() - {"options", "step", "rate_scale"}:
                raise UserError(f"{path} does not fit: these networks have no {min(more)!r}")
            step, scale = saved.step(), saved.read("rate_scale") if "rate_scale" in saved.names else np.float64(1)
            if scale.dtype != np.float64 or scale.shape or not 0 < scale <= 1:
                raise ValueError("its rate_scale is no number above 0, up to 1")
        for name, x in state.items():  # in place, because parameters and moments are views of Adam's flat arrays
            x[...] = ag.xp.asarray(arrays[name])
        self.step, self.rate_scale = step, float(scale)
        self.gen_adam.t, self.disc_adam.t = self.step, self.step * self.options.disc_steps
        self.set_window()


def flip(pictures: Floats, rng: np.random.Generator) -> Floats:
    """Mirror about every second one of the pictures, a NumPy array (B, 3, H, W), in place; returns them."""
    flipped = rng.random(len(pictures)) < 0.5
    pictures[flipped] = pictures[flipped, :, :, ::-1]
    return pictures


class NotFinite(UserError):
    """A number of training, named by the message, has become infinite or NaN."""


class open_checkpoint:
    """Within this context, the arrays of a checkpoint's zip file; whatever is wrong with it becomes a UserError.

    names: what it holds. What it says of itself is not trusted: nothing may be compressed, all together may claim no more
    than the file's size, and an array is read only if its header says what it should.
    """

    SMALL = 1 << 16  # bytes of what is no array of the networks

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> open_checkpoint:
        try:
            self.file = zipfile.ZipFile(self.path)
            members = self.file.infolist()
            self.names = {member.filename.removesuffix(".npy") for member in members}
            if not {"options", "step"} <= self.names:
                raise ValueError("it lacks options or step")
            claimed = sum(max(member.file_size, member.compress_size) for member in members)
            if any(member.compress_type for member in members) or claimed > self.path.stat().st_size:
                raise ValueError("it claims more than its size")
        except Exception as error:  # a damaged archive can raise anything at all
            with contextlib.suppress(AttributeError):  # there is none if this is no zip file
                self.file.close()
            reason = getattr(error, "strerror", None) or first_line(error)
            raise UserError(f"cannot read {self.path}: {reason}; name a run's folder") from None
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        self.file.close()
        if isinstance(error, Exception) and not isinstance(error, UserError):
            raise UserError(f"{self.path} is damaged: {first_line(error)}; resume from another run") from None

    def read(self, name: str, like: Array | None = None) -> Array:
        """The array of this name, read-only; of the shape and dtype of `like`, or of at most SMALL bytes."""
        if name not in self.names:
            raise UserError(f"{self.path} does not fit: it has no {name}")
        if like is None:
            return data.read_array(self.file, name, self.SMALL)
        with self.file.open(f"{name}.npy") as member:
            shape, _, dtype = data.array_header(member)
        if (shape, dtype) != (like.shape, like.dtype):
            found, needed = f"{dtype} of shape {shape}", f"{like.dtype} of shape {like.shape}"
            raise UserError(f"{self.path} does not fit: {name} is {found}, not {needed}")
        return data.read_array(self.file, name, math.prod(shape) * dtype.itemsize)

    def step(self) -> int:
        """The number of the generator step after which it was written."""
        step = self.read("step")
        if step.dtype.kind != "i" or step.shape or step < 0:
            raise ValueError("its step is no whole number")
        return int(step)


CHECKPOINTS = ("checkpoint.npz", "checkpoint-previous.npz")  # of a run's folder, the newest first


def newest_checkpoint(folder: Path) -> Path:
    """The path of the newest whole checkpoint in a run's folder; says on standard error if that is the previous one.

    Raises UserError if none can be used.
    """
    newest, previous = (folder / name for name in CHECKPOINTS)
    try:
        return whole_checkpoint(newest)
    except UserError as error:
        if not previous.exists():
            raise
        reason = str(error).rpartition(";")[0]
    try:
        whole_checkpoint(previous)
    except UserError as error:
        raise UserError(f"{reason}, and {str(error).rpartition(';')[0]}; start a new run") from None
    print(f"transgan: {one_line(reason)}; going on from {previous.name}", file=sys.stderr)
    return previous


def whole_checkpoint(path: Path) -> Path:
    """`path`, if a checkpoint lies there whose options can be had and whose every byte is as written. Raises UserError."""
    read_options(path)
    with open_checkpoint(path) as saved:
        saved.step()
        if broken := saved.file.testzip():
            raise ValueError(f"{broken} is not as it was written")
    return path


# --- 6. Watching it learn ---------------------------------------------------------------------------------------------

LABELS = {"distance": "distance", "fid_own": "FID-own", "is_own": "IS-own"}  # what is measured, in the log and in words
GRID = 64  # pictures in a sample grid
JUDGED = 512  # pictures on each side of the distance
PATIENCE = 600  # seconds that training may go without a sample grid and a checkpoint


def sliced_wasserstein(a: Floats, b: Floats, directions: int = 256, seed: int = 0) -> float:
    """How far two sets of as many pictures lie apart, (n, ...) NumPy arrays each: 0 for the same set, without unit.

    The sliced 1-Wasserstein distance of the pixels (Rabin et al. 2011): along a random direction of unit length the
    best match of two sets pairs them in order, so the distance there is mean |sort(a) - sort(b)|; averaged over
    `directions`. It sees colours, brightness and coarse layout, needs no other network, and says nothing about detail.
    """
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    lines = np.random.default_rng(seed).standard_normal((a.shape[1], directions)).astype(np.float32)
    lines /= np.linalg.norm(lines, axis=0)
    return float(np.abs(np.sort(a @ lines, axis=0) - np.sort(b @ lines, axis=0)).mean())


class Log:
    """Writes log.csv, a row a step, and shows progress: one live line on a terminal, now and then a line elsewhere.

    Losses arrive as arrays on the device and are read a few at a time, so that a step need not wait for them.
    """

    FIELDS = ("step", "disc_loss", "gen_loss", "penalty", "sr_loss", "distance", "fid_own", "is_own",
              "pictures_per_second", "seconds")  # fmt: skip

    def __init__(self, path: Path, step: int, steps: int, resumed: bool = False):
        self.first, self.steps = step, steps
        kept, self.earlier = [], 0.0
        if resumed and path.exists() and step:
            try:
                with path.open(newline="", encoding="utf-8", errors="replace") as file:
                    kept = rows_until(step, csv.DictReader(file))
                self.earlier = float(kept[-1]["seconds"]) if kept else 0.0
                if not math.isfinite(self.earlier):
                    raise ValueError(f"it took {self.earlier} seconds")
            except (ValueError, KeyError, TypeError, csv.Error) as error:
                raise UserError(f"{path} is not a log of this program ({error}); move it away to go on without") from None
        start = path.with_name(path.name + ".part") if resumed else path
        try:
            self.file = start.open("w" if resumed else "x", newline="", encoding="utf-8")
        except FileExistsError:
            raise holds_a_run(path.parent) from None
        self.writer = csv.DictWriter(self.file, self.FIELDS, restval="", extrasaction="ignore")
        self.writer.writeheader()
        self.writer.writerows(kept)
        if resumed:
            self.file.close()
            os.replace(start, path)
            self.file = path.open("a", newline="", encoding="utf-8")
            self.writer.writer = csv.writer(self.file)  # the same columns, in the file that goes on
        self.live = data.output == "lines" and data.is_live(sys.stdout)
        self.measured: dict[str, float] = {}
        self.waiting: list[Row] = []  # for the file
        self.written: list[Row] = []  # those in it that were not shown
        self.start = self.shown = self.last = time.monotonic()

    def add(self, step: int, losses: Losses, pictures: int) -> None:
        """Remember a step: its losses, and how many real pictures it used."""
        now = time.monotonic()
        row = {"step": step, "pictures_per_second": pictures / max(now - self.last, 1e-9)}
        self.waiting.append(row | losses | {"seconds": self.earlier + now - self.start})
        self.last = now

    def measure(self, measured: dict[str, float]) -> None:
        """Add the distance or scores that were measured after the last step; the time that took counts for no step."""
        self.waiting[-1] |= measured
        self.measured |= measured
        self.last = time.monotonic()

    def check(self) -> None:
        """Read the numbers that wait. Raises NotFinite at the first that is not."""
        for row in self.waiting:
            row |= numbers(row)
            for name in self.FIELDS:
                if not math.isfinite(row.get(name) or 0):
                    raise NotFinite(f"{name} is {row[name]} at step {row['step']}")

    def write(self) -> None:
        """Write the rows that wait."""
        for row in map(numbers, self.waiting):
            self.writer.writerow({name: x if name == "step" else f"{x:.6g}" for name, x in row.items()})
            self.written.append(row)
        self.file.flush()
        self.waiting.clear()

    def tick(self) -> None:
        """Check and show what there is, if it is time to."""
        row = (self.written + self.waiting)[-1]
        due = time.monotonic() - self.shown > (0.5 if self.live else 10)
        if due or row["step"] in (self.first, self.first + 1, self.steps):
            self.check()
            self.show()

    def show(self) -> None:
        """Write the rows that wait and show the newest, or for --json each that was not shown."""
        self.write()
        if not self.written:
            return
        self.shown = time.monotonic()
        if self.live:
            print(f"\r\033[K{self.line()}", end="", flush=True)
        elif data.output == "json":
            for row in self.written:
                data.tell(None, event="step", **row)
        else:
            data.tell(self.line())
        self.written.clear()

    def line(self) -> str:
        """What is worth reading of the rows that were not shown."""
        row, parts = self.written[-1], []
        for name, label in (("disc_loss", "D"), ("gen_loss", "G"), ("penalty", "penalty"), ("sr_loss", "SR")):
            if name in row:
                parts.append(f"{label} {row[name]:.3f}")
        parts += [f"{LABELS[name]} {value:.3f}" for name, value in self.measured.items()]
        step, elapsed = row["step"], self.shown - self.start
        left = elapsed / max(step - self.first, 1) * (self.steps - step)
        speed = (sum(r["pictures_per_second"] for r in self.written) / len(self.written)) if step > self.first else 0
        parts += [f"{speed:.0f} pictures/s", f"{clock(elapsed)} elapsed"]
        parts += [f"{clock(left)} left"] if step > self.first else []
        return f"step {step}/{self.steps}  " + "  ".join(parts)

    def close(self) -> None:
        """Write what waits, and leave the live line standing."""
        self.show()
        if self.live:
            print()
        self.file.close()


def numbers(row: Row) -> Row:
    """A row of the log with what it has, in Python's numbers: for losses on a device, this waits for them."""
    return {name: x if name == "step" else float(x) for name, x in row.items() if x is not None}


def rows_until(step: int, reader: Iterable[Row]) -> list[Row]:
    """A log's rows up to a step, which will go on from there. What comes after, if only half a row, is not looked at."""
    kept = []
    for row in reader:
        if int(row["step"]) <= step:
            kept.append(row)
        if int(row["step"]) >= step:
            break
    return kept


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def explain_locality(options: Options, path: Path) -> None:
    """Write a picture of each phase of locality-aware initialization: what the token in the middle may see, then all."""
    side, pictures = options.image_size, []
    query = (side + 1) * (side // 2)
    for half_width, _ in [*locality_phases(options), (side, None)]:
        seen = window_mask(side, half_width)[query].reshape(side, side)
        picture = np.where(seen, 0.5, -0.8) * np.ones((3, 1, 1))  # (3, side, side)
        picture[:, side // 2, side // 2] = (1.0, -0.6, -0.6)
        pictures.append(picture)
    data.save_grid(np.stack(pictures), path, columns=len(pictures))


@contextlib.contextmanager
def stop_signals() -> Iterator[types.SimpleNamespace]:
    """Within this context, a first Ctrl-C or SIGTERM does no more than to set `asked`, of what this yields, to its number.

    The next one acts as usual. Signals that are ignored (nohup) stay so; and only the main thread may ask for signals, so
    in any other nothing changes. Windows has Ctrl-C and Ctrl-Break.
    """
    stop = types.SimpleNamespace(asked=None)
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, _: object) -> None:
        stop.asked = number
        restore()
        with contextlib.suppress(OSError):  # print may be at work in what this interrupts
            os.write(2, b"\nfinishing the step, to save it; Ctrl-C again stops at once\n")

    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
        for number in numbers:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        restore()


def look(trainer: Trainer, noise: Array, real: Floats, samples: Path) -> dict[str, float]:
    """Write grids of generated and of restored pictures into the folder `samples`; returns the distance, for the log."""
    pictures = trainer.sample(noise)
    data.save_grid(pictures[:GRID], samples / f"step-{trainer.step:06d}.png")
    if trainer.options.sr_weight:
        factor = 2 ** (len(trainer.generator.stages) - 2)
        small = downsample(real[: GRID // 8], factor)
        rows = [small.repeat(factor, 2).repeat(factor, 3), trainer.restore(small), real[: GRID // 8]]
        data.save_grid(np.concatenate(rows), samples / f"restored-{trainer.step:06d}.png")
    return {"distance": sliced_wasserstein(pictures, real)}


def train(
    trainer: Trainer,
    out: Path,
    sample_every: int,
    save_every: int,
    resumed: bool = False,
    evaluate_every: int | None = None,
    scores: Scores | None = None,
) -> int | None:
    """Train until `trainer.options.steps`, writing samples, log and checkpoints into the folder `out`.

    sample_every, save_every: generator steps between sample grids and between checkpoints. Either is also made when it is
    PATIENCE seconds old, because a step of the large sizes takes a CPU half a minute. evaluate_every: generator steps
    between calls of scores(), which returns more numbers for the log. Returns the number of the signal that stopped it
    before (the step was finished, and saved), or None. Raises NotFinite; the last checkpoint is then from before.
    """
    from look.report import Report

    options, asked = trainer.options, None
    rng = data.random_stream("judge", options.seed)
    noise = trainer.noise(JUDGED, rng)
    pictures = trainer.batches.pictures
    real = data.scale(pictures[rng.choice(len(pictures), JUDGED, replace=len(pictures) < JUDGED)])
    log, report = Log(out / "log.csv", trainer.step, options.steps, resumed), Report(trainer, out)
    if options.locality != "none":
        explain_locality(options, out / "locality.png")
    with contextlib.closing(log), stop_signals() as stop:
        if not resumed:
            trainer.save(out / CHECKPOINTS[0])  # first, so that whatever stops the run can be gone on from
        if trainer.step == 0:
            log.add(0, {}, 0)
            log.measure(look(trainer, noise, real, out / "samples") | (scores() if scores else {}))
            log.tick()
            report.update()
            asked = stop.asked
        sampled = saved = time.monotonic()
        while trainer.step < options.steps and not asked:
            losses = trainer.train_step()
            step, last, now = trainer.step, trainer.step == options.steps, time.monotonic()
            log.add(step, losses, options.batch_size * options.disc_steps)
            if last or step % sample_every == 0 or now - sampled > PATIENCE:
                log.check()
                log.measure(look(trainer, noise, real, out / "samples"))
                sampled = now
            if scores and evaluate_every and (last or step % evaluate_every == 0):
                log.check()
                log.measure(scores())
            asked = stop.asked
            if last or asked or step % save_every == 0 or now - saved > PATIENCE:
                log.check()
                log.write()
                data.sync(out / "log.csv")  # whose rows are not to be older than the checkpoint
                trainer.save(out / CHECKPOINTS[0])
                saved = now
            log.tick()
            if sampled == now:  # in this step
                log.write()
                report.update()
    return asked if trainer.step < options.steps else None


REWINDS = 5  # times that the learning rate may be halved


def train_on(
    trainer: Trainer,
    out: Path,
    sample_every: int,
    save_every: int,
    resumed: bool,
    evaluate_every: int | None = None,
    scores: Scores | None = None,
    on_nan: str = "stop",
) -> int | None:
    """`train`, and with on_nan="rewind" once more from the last checkpoint, at half the learning rate, after NotFinite.

    How often it was halved is part of a checkpoint. Raises UserError, saying what to try, after REWINDS times or at once.
    """
    while True:
        try:
            return train(trainer, out, sample_every, save_every, resumed, evaluate_every, scores)
        except NotFinite as error:
            scale, resumed = trainer.rate_scale / 2, True
            if on_nan != "rewind" or scale < 0.5**REWINDS:
                advice = f"go on from there at half the learning rate with --resume {quoted(out)} --on-nan rewind, or "
                if on_nan == "rewind":
                    advice = f"{REWINDS} times half the learning rate did not help: "
                raise UserError(f"{error}; the last checkpoint is from before: {advice}start a new run with less than "
                                f"--learning-rate {trainer.options.learning_rate}") from None  # fmt: skip
            trainer.load(newest_checkpoint(out))
            trainer.rate_scale = scale
            print(f"transgan: {error}; back to step {trainer.step}, at {scale:g} of the learning rate", file=sys.stderr)


# --- 7. Command line --------------------------------------------------------------------------------------------------

# What --dataset decides where nothing else is said; a folder of pictures is like cifar10.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cifar10": {},
    "stl10": {"size": "XL", "image_size": 48},
    "celeba": {"size": "XL", "image_size": 64},
    "shapes": {"size": "tiny", "image_size": 16, "steps": 1000, "disc_steps": 2, "batch_size": 16, "gen_batch_size": 16,
               "diff_aug": "none"},
}  # fmt: skip
# The peers of the paper's tables, as their authors trained them; a mixed pair is trained as its discriminator asks for.
PEER_DEFAULTS: dict[str, dict[str, Any]] = {
    "autogan": {"loss": "hinge", "learning_rate": 2e-4, "beta2": 0.9, "diff_aug": "none"},
    "resnet": {"learning_rate": 2e-4, "beta2": 0.9, "diff_aug": "none"},
}
# A laptop's run ends long before the paper's average over thousands of steps forgets the first, and has no time to spare.
TINY_DEFAULTS = {"learning_rate": 5e-4, "ema_decay": 0.99, "sr_weight": 0.0, "locality": "none"}
# The paper's own runs, with the batches that its text gives (the authors' code has half of these, our default).
PAPER: dict[str, Any] = {"loss": "wgangp-eps", "steps": 500_000, "batch_size": 64, "gen_batch_size": 128, "disc_steps": 5,
         "learning_rate": 1e-4, "ema_decay": 0.999, "diff_aug": Options.diff_aug, "sr_weight": 50.0,
         "locality": Options.locality, "locality_stages": 1}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {f"{dataset}-{size}": PAPER | {"dataset": dataset, "size": size} for dataset, size in
           [*(("cifar10", size) for size in ("S", "M", "L", "XL")), ("stl10", "XL"), ("celeba", "XL")]}  # fmt: skip


def flags(options: Options) -> str:
    """The command line that gives these options, whatever the defaults."""
    pairs = dataclasses.asdict(options).items()
    return " ".join(f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in pairs)


COLUMNS = ("network", "stage", "tokens", "width", "blocks", "parameters", "multiply-adds")


def summary(options: Options) -> str:
    """Both networks as a table, one line each stage: tokens, width, blocks, parameters, multiply-adds a picture."""
    rows = [COLUMNS, *((*row[:5], *(f"{x:,}" if x else "" for x in row[5:])) for row in summary_rows(options))]
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(COLUMNS))]
    align = "<<>>>>>"
    return "\n".join("  ".join(f"{x!s:{a}{w}}" for x, a, w in zip(row, align, widths, strict=True)) for row in rows)


def summary_rows(options: Options) -> list[tuple[Any, ...]]:
    """The rows of `summary`, in the order of COLUMNS; "" or 0 is for what a row has not."""
    rows: list[tuple[Any, ...]] = []
    for network, own_rows, make in (
        ("generator", generator_rows, make_generator),
        ("discriminator", discriminator_rows, make_discriminator),
    ):
        peer = getattr(options, network) != "transgan"
        own = peer_rows(make(options, np.random.default_rng(0))) if peer else own_rows(options)
        total = [sum(column) for column in zip(*(row[4:] for row in own), strict=True)]
        rows += [*((network, *row) for row in own), (network, "total", "", "", "", *total)]
    if options.sr_weight:
        side, width = first_side(options), SIZES[options.size].embed_dim // 4
        rows.append(("co-training", "from RGB", 4 * side**2, width, "", 4 * width, 4 * side**2 * 3 * width))
    return rows


def first_side(options: Options) -> int:
    """Tokens a side of the generator's first stage."""
    return options.image_size // 2 ** (len(stage_depths(options.size, options.image_size)) - 1)


def block_numbers(tokens: int, width: int, blocks: int) -> tuple[int, int]:
    """Parameters and multiply-adds of encoder blocks: of qkv, projection and the MLP's two layers, and of q k^T and p v."""
    return blocks * (12 * width**2 + 10 * width), blocks * (12 * tokens * width**2 + 2 * tokens**2 * width)


def generator_rows(options: Options) -> list[StageRow]:
    """(stage, tokens, width, blocks, parameters, multiply-adds) of each stage of TransGAN's generator."""
    width, side = SIZES[options.size].embed_dim, first_side(options)
    rows: list[StageRow] = [("noise", side**2, width, "", (width + 1) * side**2 * width, side**2 * width**2)]
    for k, depth in enumerate(stage_depths(options.size, options.image_size)):
        tokens, stage_width = (side * 2**k) ** 2, width // 4**k
        parameters, operations = block_numbers(tokens, stage_width, depth)
        positions = tokens * stage_width
        rows.append((f"{side * 2**k}x{side * 2**k}", tokens, stage_width, depth, parameters + positions, operations))
    return [*rows, ("RGB", tokens, 3, "", 3 * stage_width + 3, tokens * stage_width * 3)]


def discriminator_rows(options: Options) -> list[StageRow]:
    """(stage, tokens, width, blocks, parameters, multiply-adds) of each part of TransGAN's discriminator."""
    width, depth = SIZES[options.size].disc_embed_dim, SIZES[options.size].disc_depth
    patches, inputs = (options.image_size // options.patch_size) ** 2, 3 * options.patch_size**2
    parameters, _ = block_numbers(1 + patches, width, depth)
    _, operations = block_numbers(1 + patches, width, depth - 1)
    operations += 12 * width**2 + 2 * NUM_HEADS * (1 + patches) * width  # the last block, for the [cls] token alone
    return [
        ("patches", patches, width, "", (inputs + 1) * width, patches * inputs * width),
        ("blocks", 1 + patches, width, depth, parameters + (patches + 2) * width, operations),
        ("head", 1, width, "", 3 * width + 1, width),
    ]


def peer_rows(network: Module) -> list[StageRow]:
    """The same of any network, by the names of its parameters; operations are not counted."""
    return [(name, "", " x ".join(map(str, p.shape)), "", p.size, 0) for name, p in network.parameters().items()]


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and exits with 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"transgan: {one_line(message)}; see --help\n")


MANY = 2**31 - 1
# The kind, least and largest value of each option that is a number.
LIMITS: dict[str, tuple[type[int] | type[float], float, float]] = {
    "image_size": (int, 8, 128), "patch_size": (int, 1, 128), "steps": (int, 1, MANY), "batch_size": (int, 1, MANY),
    "gen_batch_size": (int, 1, MANY), "disc_steps": (int, 1, MANY), "learning_rate": (float, 0, 1),
    "ema_decay": (float, 0, 1), "seed": (int, 0, MANY), "sr_weight": (float, 0, MANY), "locality_stages": (int, 1, 4),
    "accumulate": (int, 1, MANY), "beta2": (float, 0, 1 - 1e-6),
}  # fmt: skip


def number(kind: type[int] | type[float], least: float, most: float = MANY) -> Callable[[str], float]:
    """An argument type: an int or a float from `least` to `most`."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} must be from {least} to {most}")
        return value

    return convert


def policy(text: str) -> str:
    """An argument type: names of augmentations, separated by commas, or none."""
    names = [name.strip() for name in text.split(",")]
    if names != ["none"] and (not set(names) <= set(AUGMENTATIONS) or len(set(names)) < len(names)):
        raise argparse.ArgumentTypeError(f"{text!r} must be none, or some of {','.join(AUGMENTATIONS)}, each once")
    return ",".join(names)


def schedule(text: str) -> str:
    """An argument type: half_width:epoch pairs, separated by commas, both growing, or none."""
    if text == "none":
        return text
    try:
        pairs = locality_pairs(text)
    except ValueError:
        pairs = [(0, 0.0)]
    growing = all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise([(0, 0.0), *pairs]))
    if not growing or not pairs[-1][1] <= EPOCHS:
        raise argparse.ArgumentTypeError(f"{text!r} must be none, or pairs half_width:epoch like {Options.locality}, "
                                         f"both growing, epochs up to {EPOCHS}")  # fmt: skip
    return text


def folder(text: str) -> Path:
    """An argument type: a path. One from ~ on is in somebody's home, also where the shell has not seen to it: --out=~/x."""
    if not text:
        raise argparse.ArgumentTypeError("the name of a folder is empty")
    return Path(os.path.expanduser(text))


def pictures(text: str) -> str:
    """An argument type: the name of a data set, or a folder that is there, as its full path."""
    if text in DEFAULTS:
        return text
    if not text or not folder(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a folder nor one of {', '.join(DEFAULTS)}")
    return str(folder(text).resolve())


def make_parser() -> Parser:
    """The command line, a function for each group of options.

    Those that define the run have no default here: `choose_options` knows where theirs is.
    """
    from look import pictures as looks

    parser = Parser(
        prog="transgan.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train TransGAN, a GAN made of two transformers, and watch it learn.\n\n"
        "  python transgan.py                       built-in pictures of shapes, minutes on a laptop\n"
        "  python transgan.py --dataset cifar10     the paper's size S on CIFAR-10 (170 MB, downloaded once)\n"
        "  python transgan.py --dataset PATH        your own pictures, in a folder\n"
        "  python transgan.py --resume runs/NAME    go on where a run was stopped\n"
        "  python transgan.py --evaluate runs/NAME  give its FID and Inception Score\n"
        "  python transgan.py --from runs/NAME ...  make pictures of it: --sample, --interpolate, --attention, --nearest",
        epilog="A run's folder holds report.html, which shows it all in a browser: samples/ (step-*: grids of the same\n"
        "noise, over time; restored-*: real pictures made small, what the generator makes of them, and the originals),\n"
        "progress.gif, curves.png and log.csv (a row a step; distance is the sliced Wasserstein distance of generated\n"
        "from real pictures); checkpoint.npz and the one before it; and locality.png where there is some. Exit codes: 0\n"
        "done; 2 something to put right, said in one line; 130 and 143 stopped by Ctrl-C or SIGTERM: the running step is\n"
        "finished and saved. A second Ctrl-C stops at once.",
    )
    add_networks(parser)
    add_training(parser)
    add_places(parser)
    add_watching(parser)
    add_scores(parser)
    looks.add_options(parser)
    return parser


def add_networks(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to train")
    group.add_argument("--dataset", type=pictures, metavar="NAME", help="pictures to learn: shapes, drawn by the program; "
                       "cifar10, stl10 (2.6 GB) or celeba (1.4 GB); or a folder of any pictures, of which the middle is "
                       "cut out and resized (default: shapes)")  # fmt: skip
    group.add_argument("--preset", choices=PRESETS, metavar="NAME", help="all options as the paper has them: "
                       f"{', '.join(PRESETS)}; what else is given goes before")  # fmt: skip
    group.add_argument("--size", choices=SIZES, help="networks: the paper's S, M, L, XL, or tiny for a laptop "
                       "(default: S; tiny for shapes, XL for stl10 and celeba)")  # fmt: skip
    for network in ("generator", "discriminator"):
        group.add_argument(f"--{network}", choices=NAMES, help="the paper's, or a convolutional one it is compared with: "
                           "AutoGAN's or WGAN-GP's residual network (default: transgan)")  # fmt: skip
    group.add_argument("--image-size", type=number(*LIMITS["image_size"]), metavar="N",
                       help="pixels a side, for a folder (default: 32) and for shapes (default: 16); "
                       "cifar10 has 32, stl10 48, celeba 64")  # fmt: skip
    group.add_argument("--patch-size", type=number(*LIMITS["patch_size"]), metavar="N",
                       help="pixels a side of the discriminator's patches (default: an 8x8 grid, at least 4)")  # fmt: skip


def add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to train; the defaults are the authors', and smaller on a laptop")
    group.add_argument("--loss", choices=LOSSES, help="the adversarial loss (default: wgangp-eps)")
    group.add_argument("--steps", type=number(*LIMITS["steps"]), metavar="N",
                       help="generator steps (default: 500000; for shapes 1000)")  # fmt: skip
    group.add_argument("--batch-size", type=number(*LIMITS["batch_size"]), metavar="N",
                       help="real pictures a discriminator step (default: 32; for shapes 16)")  # fmt: skip
    group.add_argument("--accumulate", type=number(*LIMITS["accumulate"]), metavar="N",
                       help="work through each batch in N parts, in an N-th of the memory, up to half as long again; "
                       "the steps are the same up to rounding (default: 1)")  # fmt: skip
    group.add_argument("--gen-batch-size", type=number(*LIMITS["gen_batch_size"]), metavar="N",
                       help="generated pictures a generator step (default: 64; for shapes 16)")  # fmt: skip
    group.add_argument("--disc-steps", type=number(*LIMITS["disc_steps"]), metavar="N",
                       help="discriminator steps a generator step (default: 5; for shapes 2)")  # fmt: skip
    group.add_argument("--learning-rate", type=number(*LIMITS["learning_rate"]), metavar="R",
                       help="Adam's rate at the start; it falls to 0 in a line (default: 1e-4; for tiny 5e-4)")  # fmt: skip
    group.add_argument("--beta2", type=number(*LIMITS["beta2"]), metavar="R",
                       help="how long Adam remembers squares (default: 0.99; 0.9 for other discriminators)")  # fmt: skip
    group.add_argument("--precision", choices=fast.PRECISIONS, help="of matrix products: a GPU is faster with tf32 or "
                       "bfloat16, a CPU rounds as it would, slowly (default: float32)")  # fmt: skip
    group.add_argument("--ema-decay", type=number(*LIMITS["ema_decay"]), metavar="R",
                       help="decay of the moving average of the generator that makes the samples "
                       "(default: 0.999; for tiny 0.99)")  # fmt: skip
    group.add_argument("--seed", type=number(*LIMITS["seed"]), metavar="N",
                       help="of everything random in training (default: 0)")  # fmt: skip
    group.add_argument("--diff-aug", type=policy, metavar="LIST",
                       help="augmentations of all pictures that the discriminator sees, separated by commas, or none "
                       f"(default: {Options.diff_aug}; for shapes none)")  # fmt: skip
    group.add_argument("--sr-weight", type=number(*LIMITS["sr_weight"]), metavar="W",
                       help="weight of co-training with super-resolution in the generator's loss; 0 is without "
                       "(default: 50; for tiny 0)")  # fmt: skip
    group.add_argument("--locality", type=schedule, metavar="LIST",
                       help="how far a token of the generator sees, in rows and columns, until which epoch of "
                       f"{EPOCHS}, scaled to the run, or none (default: {Options.locality}; for tiny none)")  # fmt: skip
    group.add_argument("--on-nan", choices=("stop", "rewind"), default="stop",
                       help="when a number is no longer finite: stop, or go on from the last checkpoint at half the rate, "
                       f"up to {REWINDS} times (default: stop)")  # fmt: skip
    group.add_argument("--locality-stages", type=number(*LIMITS["locality_stages"]), metavar="N",
                       help="the last N stages are so limited (default: 1)")  # fmt: skip


def add_places(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where")
    group.add_argument("--data-dir", type=folder, default=Path("data"), metavar="DIR",
                       help="where data sets are kept (default: data)")  # fmt: skip
    group.add_argument("--out", type=folder, metavar="DIR", help="the run's folder (default: runs/DATASET-SIZE)")
    group.add_argument("--resume", type=folder, metavar="DIR",
                       help="go on with the run in DIR, with its own options; only --steps, --accumulate and the path "
                       "of a folder of pictures may change")  # fmt: skip
    group.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto",
                       help="gpu needs CuPy (default: auto, the GPU if there is one)")  # fmt: skip
    group.add_argument("--gpus", type=number(int, 1, 64), metavar="N", default=1,
                       help="GPUs of this machine that share a batch (default: 1)")  # fmt: skip
    group.add_argument("--threads", type=number(int, 1, 1024), metavar="N", help="CPU threads that share a batch; another "
                       "number gives the same run up to rounding (default: as many as pay)")  # fmt: skip


def add_watching(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how often to look")
    group.add_argument("--sample-every", type=number(int, 1), metavar="N", default=100,
                       help="steps between sample grids and distances (default: 100, and every 10 minutes)")  # fmt: skip
    group.add_argument("--save-every", type=number(int, 1), metavar="N", default=100,
                       help="steps between checkpoints (default: 100, and every 10 minutes)")  # fmt: skip
    group.add_argument("--evaluate-every", type=number(int, 1), metavar="N",
                       help="steps between FID-own and IS-own in the log (default: never)")  # fmt: skip
    group.add_argument("--profile", action="store_true", help="print which operations took the time, when the run is done")
    group.add_argument("--summary", action="store_true", help="print the networks as a table, and stop")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--quiet", action="store_true", help="print nothing, but errors to standard error")
    either.add_argument("--json", action="store_true", help="print JSON, an object a line with its event: start, step (as "
                        "in log.csv), picture, ...; the last is end, with the exit code and what went wrong")  # fmt: skip


def add_scores(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scores, see paper/scores.py")
    group.add_argument("--evaluate", type=folder, metavar="DIR", help="give FID and Inception Score of the run in DIR")
    group.add_argument("--features", choices=("inception", "own"), help="the network that looks: Inception-v3, as papers "
                       "have it (96 MB, downloaded once), or a small classifier trained here on the data set, whose scores "
                       "are named FID-own and IS-own (default: inception; for shapes own)")  # fmt: skip
    group.add_argument("--num-images", type=number(int, 10), metavar="N",
                       help="generated pictures to look at (default: 50000; for --evaluate-every 2000)")  # fmt: skip
    group.add_argument("--inception", type=folder, metavar="PATH", help="a file with Inception-v3's weights, as "
                       "pytorch-fid publishes them")  # fmt: skip
    group.add_argument("--fid-stats", type=folder, metavar="PATH", help="a fid_stats_*.npz with mean and covariance of the "
                       "real pictures (default: computed of the data set once, and kept)")  # fmt: skip


def choose_options(args: argparse.Namespace, checkpoint: Path | None = None) -> tuple[Options, Path]:
    """(Options, the run's folder) of parsed arguments: the checkpoint's when resuming, else the data set's defaults."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Options) if getattr(args, f.name) is not None}
    if checkpoint:
        begun = args.resume or args.evaluate or args.begun  # the last is --from
        if args.begun:
            given.pop("seed", None)  # of the pictures, not of the run
        if args.preset:
            raise UserError(f"a run has its own options; leave out --preset {args.preset}")
        saved = read_options(checkpoint)
        moved = saved.dataset not in DEFAULTS and given.get("dataset") not in DEFAULTS
        changeable = ({"steps", "accumulate"} if args.resume else set()) | ({"dataset"} if moved else set())
        for name, value in given.items():
            if name not in changeable and value != getattr(saved, name):
                flag = "--" + name.replace("_", "-")
                raise UserError(f"the run in {begun} has {flag} {getattr(saved, name)}; leave out {flag} {value}")
        return check_options(dataclasses.replace(saved, **given)), args.out or (begun / "look" if args.begun else begun)
    preset = PRESETS.get(args.preset, {})
    dataset = given.get("dataset") or preset.get("dataset", "shapes")
    chosen = {"dataset": dataset} | DEFAULTS.get(dataset, {}) | preset | given
    if chosen.get("generator", "transgan") != "transgan":
        chosen = {"sr_weight": 0.0, "locality": "none"} | chosen
    chosen = PEER_DEFAULTS.get(chosen.get("discriminator", "transgan"), {}) | chosen
    if chosen.get("size") == "tiny":
        chosen = TINY_DEFAULTS | chosen
    options = Options(**chosen)
    if "patch_size" not in given:  # an 8x8 grid, as the paper's at 32x32, or 4x4 pixels where these are more
        side = options.image_size
        options.patch_size = max(p for p in range(1, max(4, side // 8) + 1) if side % p == 0)
    pair = [options.generator, options.discriminator]
    name = "-".join([Path(dataset).name, options.size, *(pair if pair != ["transgan", "transgan"] else [])])
    return check_options(options), args.out or Path("runs") / data.portable(name)


def check_options(options: Options) -> Options:
    """The options, if the networks can have them. Raises UserError otherwise."""
    side = data.SIDES.get(options.dataset, options.image_size)
    if options.image_size != side:
        raise UserError(f"{options.dataset} has pictures of {side} pixels a side, not {options.image_size}; "
                        "leave out --image-size")  # fmt: skip
    peer = options.generator != "transgan"
    doubled = 8 if peer else 2 ** (len(stage_depths(options.size, options.image_size)) - 1)
    if options.image_size % doubled:
        raise UserError(f"--image-size {options.image_size} must divide by {doubled}: the picture doubles between stages")
    if peer and (options.sr_weight or options.locality != "none"):
        raise UserError(f"co-training and locality are TransGAN's: --generator {options.generator} wants --sr-weight 0 "
                        "and --locality none, its defaults")  # fmt: skip
    if peer and options.accumulate > 1:
        raise UserError(f"--accumulate cannot be: the batch norm of --generator {options.generator} wants whole batches")
    if options.discriminator != "transgan" and options.image_size % 4:
        raise UserError(f"--image-size {options.image_size} must divide by 4: --discriminator halves the picture twice")
    if options.image_size % options.patch_size:
        raise UserError(f"--patch-size {options.patch_size} does not divide --image-size {options.image_size}")
    return options


def read_options(path: Path) -> Options:
    """The Options in a checkpoint. Raises UserError if they are not such as this program writes."""
    with open_checkpoint(path) as saved:
        text = str(saved.read("options"))
        try:
            options = Options(**json.loads(text))
        except (TypeError, ValueError):
            raise UserError(f"{path} holds options of another version; start a new run") from None
    for name, (kind, least, most) in LIMITS.items():
        value = getattr(options, name)
        if type(value) is not kind or not least <= value <= most:
            raise UserError(f"{path}: its option {name} is {value!r}; start a new run")
    for name, read in (("diff_aug", policy), ("locality", schedule)):
        value = getattr(options, name)
        try:
            fine = isinstance(value, str) and read(value) == value
        except argparse.ArgumentTypeError:
            fine = False
        if not fine:
            raise UserError(f"{path}: its option {name} is {value!r}; start a new run")
    named = {"dataset": None, "size": SIZES, "loss": LOSSES, "generator": NAMES, "discriminator": NAMES,
             "precision": fast.PRECISIONS}  # fmt: skip
    for name, known in named.items():
        value = getattr(options, name)
        if not isinstance(value, str) or (known and value not in known):
            raise UserError(f"{path}: its option {name} is {value!r}; start a new run")
    if options.dataset not in DEFAULTS and not Path(options.dataset).is_absolute():
        raise UserError(f"{path}: its data set {options.dataset!r} is no full path; start a new run")
    return options


def prepare_folder(out: Path, resume: Path | None) -> None:
    """Make the run's folder, and refuse one that holds another run, or anything else that this one would overwrite."""
    try:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        log = out / "log.csv"
        if out != resume:
            if any((out / name).exists() for name in CHECKPOINTS) or (log.exists() and log.stat().st_size):
                raise holds_a_run(out)
            log.unlink(missing_ok=True)  # empty: a run was killed before its first checkpoint
        if out != resume and any((out / "samples").iterdir()):
            raise UserError(f"{out / 'samples'} is not empty; move what it holds away, or choose another --out")
        tempfile.TemporaryFile(dir=out).close()
        for part in (*out.glob(f"{CHECKPOINTS[0]}.*.part"), *out.glob("samples/*.part")) if out == resume else ():
            part.unlink(missing_ok=True)  # what a killed process was writing
    except OSError as error:
        raise UserError(f"cannot write in {out}: {error.strerror}; choose another --out") from None


def go_on(trainer: Trainer, args: argparse.Namespace, checkpoint: Path, out: Path) -> None:
    """Make ready to go on with the run in args.resume, whose checkpoint was loaded. Raises UserError if it is finished.

    If that is the previous one, a damaged newest goes out of its way: it would take its place with the next that is saved.
    """
    if trainer.step >= trainer.options.steps:
        raise UserError(f"the run in {args.resume} is finished; ask for more with --steps above {trainer.step}")
    if checkpoint.name != CHECKPOINTS[0]:
        with contextlib.suppress(FileNotFoundError):
            (out / CHECKPOINTS[0]).replace(out / "checkpoint-damaged.npz")


def resume_command(args: argparse.Namespace, out: Path) -> str:
    """The command that goes on with the run in `out`, which knows its own options, as `args` began it."""
    installed = Path(sys.argv[0]).name.removesuffix(".exe") == "transgan"
    words = [*(["transgan"] if installed else ["python", "transgan.py"]), "--resume", str(out)]
    parser = make_parser()
    for name in (
        "data_dir",
        "device",
        "gpus",
        "threads",
        "on_nan",
        "sample_every",
        "save_every",
        "evaluate_every",
        "num_images",
    ):
        if getattr(args, name) != parser.get_default(name):
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return shlex.join(words)


def quoted(path: Path) -> str:
    """A path as one writes it in a command."""
    return shlex.quote(str(path))


def holds_a_run(out: Path) -> UserError:
    return UserError(f"{out} holds a run already; go on with it by --resume {quoted(out)}, or choose another --out")


def refuse_idle_options(args: argparse.Namespace) -> None:
    """Raise UserError for options that would do nothing beside the others."""
    if args.resume and args.evaluate:
        raise UserError("--resume trains and --evaluate looks; leave out one of them")
    for name in ("features", "inception", "fid_stats"):
        if getattr(args, name) and not args.evaluate:
            raise UserError(f"--{name.replace('_', '-')} goes with --evaluate; leave it out")
    if args.num_images and not (args.evaluate or args.evaluate_every):
        raise UserError("--num-images goes with --evaluate or --evaluate-every; leave it out")
    if (args.evaluate or args.begun) and (args.evaluate_every or args.profile):
        raise UserError("--evaluate-every and --profile watch a training; leave them out")
    if args.evaluate and args.gpus > 1:
        raise UserError("--gpus shares training; leave it out")
    if args.features == "own" and args.inception:
        raise UserError("--features own does not look through --inception; leave out one of them")


def gather_gpus(args: argparse.Namespace, options: Options, checkpoint: Path | None) -> Group:
    """The Group of --gpus N, whose other processes are started here. Raises UserError if this machine has fewer GPUs."""
    cupy: Any = ag.xp
    found = cupy.cuda.runtime.getDeviceCount() if ag.xp is not np else 0
    if found < args.gpus:
        raise UserError(f"--gpus {args.gpus} asks for more GPUs than the {found} in use here; lower it, or leave it out")
    if options.batch_size % args.gpus or options.gen_batch_size % args.gpus:
        raise UserError(f"--batch-size and --gen-batch-size must divide by --gpus {args.gpus}")
    if options.generator != "transgan":
        raise UserError(f"--gpus cannot be: the batch norm of --generator {options.generator} wants whole batches")
    if args.on_nan != "stop":
        raise UserError("--gpus and --on-nan rewind do not go together: only one of the GPUs would go back; leave out one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = []
    for rank in range(1, args.gpus):
        processes.append(context.Process(target=take_part, args=(rank, port, args, options, checkpoint), daemon=True))
        processes[-1].start()
    return Group(0, args.gpus, port, processes)


def take_part(rank: int, port: int, args: argparse.Namespace, options: Options, checkpoint: Path | None) -> None:
    """What the processes of further GPUs do: the same steps as the first, which alone writes and shows anything."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first, with whom this one ends
    data.output = "quiet"
    ag.use_device("gpu")
    cupy: Any = ag.xp
    cupy.cuda.Device(rank).use()
    fast.install(options.precision)
    pictures = data.load_pictures(options.dataset, args.data_dir, options.image_size)
    trainer = Trainer(options, pictures, group=Group(rank, args.gpus, port))
    if checkpoint:
        trainer.load(checkpoint)
    while trainer.step < options.steps:
        trainer.train_step()


def run(args: argparse.Namespace) -> int:
    """What the command line asks for: returns the exit code. Raises UserError."""
    from look import pictures as looks

    refuse_idle_options(args)
    looks.refuse_idle_options(args)
    begun = args.resume or args.evaluate or args.begun
    checkpoint = newest_checkpoint(begun) if begun else None
    options, out = choose_options(args, checkpoint)
    if args.summary:
        tell_summary(options)
        return 0
    try:
        device = ag.use_device(args.device)
    except RuntimeError as error:
        raise UserError(str(error)) from None
    fast.install(options.precision)
    if not (args.evaluate or args.begun):
        prepare_folder(out, args.resume)
    pictures = data.load_pictures(options.dataset, args.data_dir, options.image_size)
    group = gather_gpus(args, options, checkpoint) if args.gpus > 1 else None
    trainer = Trainer(options, pictures, args.threads, group=group)
    if checkpoint:
        trainer.load(checkpoint)
        if args.resume:
            go_on(trainer, args, checkpoint, out)
    if args.evaluate or args.evaluate_every:
        from paper import scores
    if args.evaluate:
        features = args.features or ("own" if options.dataset == "shapes" and not args.inception else "inception")
        line = scores.evaluate(out, trainer, pictures, features, args.num_images or 50_000, args.data_dir, args.inception,
                               args.fid_stats)  # fmt: skip
        data.tell(line, event="scores", **scores.read_scores(out / "scores.json")[-1])
        return 0
    if args.begun:
        looks.make(args, trainer, pictures, out)
        return 0
    threads = f", {trainer.threads} threads" if device == "cpu" else ""
    data.tell(f"{NAMES[options.generator]}-{options.size} on {options.dataset} {options.image_size}x{options.image_size}, "
              f"{len(pictures):,} pictures, {device}{threads}, into {out}",
              event="start", options=dataclasses.asdict(options), step=trainer.step, pictures=len(pictures), device=device,
              threads=trainer.threads, out=str(out))  # fmt: skip
    start = time.monotonic()
    measure = scores.own_scores(trainer, args.num_images or 2000, args.data_dir) if args.evaluate_every else None
    with ag.profile() if args.profile else contextlib.nullcontext() as times:
        asked = train_on(trainer, out, args.sample_every, args.save_every, out == args.resume, args.evaluate_every, measure,
                         args.on_nan)  # fmt: skip
    if times is not None:
        tell_profile(times, trainer.waited, time.monotonic() - start)
    if asked:
        command = resume_command(args, out)
        print(f"stopped after step {trainer.step}, and saved; go on with: {command}", file=sys.stderr)
        data.tell(None, event="stopped", step=trainer.step, signal=asked, resume=command)
        return 128 + asked
    picture = out / "samples" / f"step-{trainer.step:06d}.png"
    data.tell(f"done: {picture}", event="picture", path=str(picture))
    return 0


def tell_summary(options: Options) -> None:
    """Print the networks of these options as a table, below the command line that gives them."""
    rows = [{name: x for name, x in zip(COLUMNS, row, strict=True) if x} for row in summary_rows(options)]
    data.tell(f"transgan.py {flags(options)}\n\n{summary(options)}", event="summary",
              options=dataclasses.asdict(options), rows=rows)  # fmt: skip


def tell_profile(times: ag.Times, waited: float, total: float) -> None:
    """Print which operations took how long of `total` seconds, and how many of these were waited for data."""
    operations = [(*key, *entry) for key, entry in times.items()]
    names = ("operation", "direction", "seconds", "calls", "bytes")
    data.tell(f"{ag.profile_table(times)}\n"
              f"waiting for data: {waited:.3f} s of {total:.1f} s, {100 * waited / total:.2f}%",
              event="profile", operations=[dict(zip(names, row, strict=True)) for row in operations], waited=waited,
              seconds=total)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for what the user can put right, 130 or 143 after a signal."""
    args, code = make_parser().parse_args(argv), 2
    data.output = "json" if args.json else "quiet" if args.quiet else "lines"
    try:
        code = run(args)
        data.tell(None, event="end", exit_code=code, error=None)
        return code
    except UserError as error:
        message = str(error)
    except MemoryError:
        message = "not enough memory for this; lower --batch-size and --gen-batch-size, or choose a smaller --size"
    except OSError as error:
        message = f"{error.filename or 'writing'}: {error.strerror or error}; free some space or choose another --out"
        if isinstance(error, BrokenPipeError):
            message = "nobody reads the output any more; the run goes on from its last checkpoint with --resume"
    except KeyboardInterrupt:
        code, message = 130, "stopped; a run that has begun goes on from its last checkpoint with --resume"
        print(file=sys.stderr)  # so that it stands below the terminal's ^C
    print(f"transgan: {one_line(message)}", file=sys.stderr)
    with contextlib.suppress(OSError):  # of an output that nobody reads
        data.tell(None, event="end", exit_code=code, error=one_line(message))
    return code


def one_line(message: str) -> str:
    """A message as one line of printable characters, whatever names of files and damaged contents put into it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)


def console() -> int:
    """What `python transgan.py` does, and the command `transgan` that pip installs; returns the exit code."""
    sys.modules["transgan"] = sys.modules[__name__]  # for what paper/ imports from here
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where the shell closed it
            stream.reconfigure(errors="backslashreplace")  # for names of files that cannot be printed as they are
    return main()


if __name__ == "__main__":
    sys.exit(console())
