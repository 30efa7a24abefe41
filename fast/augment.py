"""The augmentation on a GPU: an appendix to transgan.py, as the rest of fast/ is one to autograd.py.

`transgan.diff_augment` is some thirty passes over the pictures. A GPU, where a pass is a launch, does all of them by one
kernel, fast/kernels/augment.cu, if they come in the order of `transgan.AUGMENTATIONS`, the authors'.
"""

import functools

import numpy as np

import autograd as ag
import transgan
from fast import gpu


def install():
    """Enter it into `autograd.faster`; there it leaves to the definition what is on a CPU or in another order."""
    ag.faster[transgan.diff_augment] = diff_augment


def diff_augment(x, policy, draws):
    """A linear map, the kernel, and brightness added: color leaves a picture of one value as it is."""
    names = policy.split(",")
    fits = (len(draws), x.shape[2]) == (len(x), x.shape[3])
    if ag.xp is np or not fits or names != [name for name in transgan.AUGMENTATIONS if name in names]:
        return transgan.diff_augment.__wrapped__(x, policy, draws)
    draws, arguments = ag.xp.ascontiguousarray(draws), constants(names)

    def run(kernel, x):
        batch, channels, _, side = x.shape
        out = gpu.like(x)
        if x.size:
            gpu.launch("augment", kernel, (batch,), (256,), x, draws, out, channels, side, **arguments)
        return out

    x = linear_map(x, functools.partial(run, "augment"), functools.partial(run, "augment_vjp"))
    return x + draws[:, 0].reshape(-1, 1, 1, 1) if "color" in names else x


def constants(names):
    """What the kernel is compiled with for the augmentations `names`."""
    return {name.upper(): int(name in names) for name in transgan.AUGMENTATIONS} | {"DRAWS": transgan.DRAWS}


def linear_map(x, forward, transposed):
    """forward(x) of a function on arrays that is linear: sum(y forward(x)) = sum(transposed(y) x) for all x and y.

    Its derivative is then `transposed`, whose derivative is `forward`, as often as one likes.
    """
    return ag.result(forward(x.data), (x, lambda g: linear_map(g, transposed, forward)))
