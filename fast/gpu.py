"""The functions of fast/cpu.py on CuPy arrays, most of them by one launch of a kernel.

On a GPU an elementwise operation of arrays is a launch and a pass over memory of its own. So each function has a kernel
that does the whole in one: a function in CUDA C++, in the files of fast/kernels, which NVIDIA's NVRTC compiles when it is
first called. Arrays are float32 or float64.
"""

import functools
import math
from pathlib import Path

import numpy as np

import autograd as ag
from fast import cublas

KERNELS = Path(__file__).parent / "kernels"
WIDEST_HEAD = 32  # a thread keeps its rows of D numbers in registers; wider heads have few tokens, so few scores to hold


_precision = "float32"


def start(precision):
    """Make ready: products of `precision`, see fast.install."""
    global _precision
    from cupy._core import _routines_linalg as linalg  # CuPy has no other door to this

    kind = {"float32": "DEFAULT", "tf32": "TF32", "bfloat16": "BF16"}[precision]
    linalg.set_compute_type(np.float32, getattr(linalg, f"COMPUTE_TYPE_{kind}"))  # of CuPy's own products
    _precision = precision


# --- Launching --------------------------------------------------------------------------------------------------------


def source(file, dtype, **constants):
    """The CUDA source of fast/kernels/`file`.cu for arrays of `dtype`, with `constants` in place of their names."""
    constants |= {"real": "double" if dtype == np.float64 else "float", "LOWEST": f"real({np.finfo(dtype).min!s})"}
    lines = [f"#define {name} {value}" for name, value in constants.items()]
    text = (KERNELS / f"{file}.cu").read_text()
    return "\n".join([*lines, text.replace('#include "common.cuh"', (KERNELS / "common.cuh").read_text())])


@functools.cache
def kernel(file, name, dtype, **constants):
    """The kernel `name` of that source, compiled."""
    return ag.xp.RawKernel(source(file, dtype, **constants), name)


def launch(file, name, grid, block, *arguments, **constants):
    """Run the kernel `name` of fast/kernels/`file`.cu in a grid of blocks of threads.

    arguments: arrays, of which the first says what `real` is, and must lie in rows if they are written to; None for an
    array that is not there; numbers, an int as a `count`, a float as a `real`. constants are compiled into the kernel.
    """
    dtype = arguments[0].dtype

    def passed(x):
        if isinstance(x, ag.xp.ndarray):
            return ag.xp.ascontiguousarray(x)
        if x is None:
            return np.uintp(0)  # a null pointer
        return np.int64(x) if isinstance(x, int) else dtype.type(x)

    kernel(file, name, dtype, **constants)(grid, block, tuple(map(passed, arguments)))


def launch_elements(file, name, x, *arguments):
    """A thread for each element of an array x."""
    if x.size:
        launch(file, name, (-(-x.size // 256),), (256,), x, *arguments, x.size)


def launch_rows(file, name, x, *arguments):
    """A warp of 32 threads for each row of an array x (..., width), four of them in a block; the row is theirs to share."""
    if x.size:
        rows = x.size // x.shape[-1]
        launch(file, name, (-(-rows // 4),), (32, 4), x, *arguments, rows, x.shape[-1])


def like(x):
    """A new array of x's shape and dtype, which lies in rows whatever x does."""
    return ag.xp.empty(x.shape, x.dtype)


# --- The functions of fast/cpu.py -------------------------------------------------------------------------------------


def matmul(a, b):
    if a.dtype != b.dtype or a.dtype not in cublas.KINDS or not cublas.library():
        return ag.xp.matmul(a, b)
    return cublas.matmul(a, b, _precision)


def normal_cdf(x):
    out = like(x)
    launch_elements("gelu", "normal_cdf", x, out)
    return out


def gelu(x):
    """x Phi(x) and its derivative Phi(x) + x phi(x)."""
    out, slope = like(x), like(x)
    launch_elements("gelu", "gelu", x, out, slope)
    return out, slope


def gelu_curvature(x, g):
    """g times the second derivative, (2 - x^2) phi(x)."""
    out = like(x)
    launch_elements("gelu", "gelu_curvature", x, g, out)
    return out


def softmax(x, mask):
    """exp(x) / sum exp(x) over the last axis, 0 where the mask, boolean or None, is False."""
    p, rows = like(x), 1
    if mask is not None:
        if mask.shape != x.shape[x.ndim - mask.ndim :]:  # else its rows come again in the same order
            mask = ag.xp.broadcast_to(mask, x.shape)
        rows = max(mask.size // max(x.shape[-1], 1), 1)
    launch_rows("softmax", "softmax", x, mask, p, rows)
    return p


def softmax_vjp(p, g):
    """p (g - sum(p g)) of softmax's result p."""
    out = like(p)
    launch_rows("softmax", "softmax_vjp", p, g, out)
    return out


def layer_norm(x, weight, bias, eps):
    """h weight + bias (..., C), and h (..., C) = (x - mean(x)) r and r (..., 1) = (mean((x - mean(x))^2) + eps)^-1/2."""
    out, h, r = like(x), like(x), ag.xp.empty((*x.shape[:-1], 1), x.dtype)
    launch_rows("layer_norm", "layer_norm", x, weight, bias, out, h, r, eps)
    return out, h, r


def layer_norm_vjp(h, r, g, weight=None):
    """r (u - mean(u) - h mean(h u)) of u = g weight, or of u = g."""
    dx = like(h)
    launch_rows("layer_norm", "layer_norm_vjp", h, r, g, weight, dx)
    return dx


def attention_declines(tokens, head_width):
    """Whether attention is better composed of its parts."""
    return head_width > WIDEST_HEAD


def attention(qkv, num_heads, mask):
    """out (B, N, C) and the logarithm L (B*H, N, 1) of each query's sum, from qkv (B, N, 3C); no score is written down."""
    batch, tokens, width = qkv.shape
    out = ag.xp.empty((batch, tokens, width // 3), qkv.dtype)
    log_sum = ag.xp.empty((batch * num_heads, tokens, 1), qkv.dtype)
    _launch_heads("attention", qkv, num_heads, mask, out, log_sum)
    return out, log_sum


def attention_vjp(qkv, num_heads, mask, out, log_sum, g):
    """d qkv (B, N, 3C) from g (B, N, C), by the formulas of fast.cpu.attention_vjp."""
    result = like(qkv)
    for name in ("attention_vjp_query", "attention_vjp_key"):
        _launch_heads(name, qkv, num_heads, mask, out, log_sum, g, result)
    return result


def _launch_heads(name, qkv, num_heads, mask, *arrays):
    """`launch` in a grid of tiles of tokens, head by head, those of all samples."""
    batch, tokens, width = qkv.shape
    constants = attention_constants(width // 3 // num_heads)
    tile = constants["TILE"]
    if qkv.size:
        grid = (-(-tokens // tile) * batch * num_heads,)
        launch("attention", name, grid, (tile,), qkv, mask, *arrays, tokens, num_heads, **constants)


def attention_constants(head_width):
    """What attention's kernels are compiled with: what a block's threads share has to fit into 48 kB."""
    return {"D": head_width, "TILE": 128 if head_width <= 16 else 32, "SCALE": head_width**-0.5}


def adam_update(adam, learning_rate, scale):
    """`autograd.adam_update`; `scale` may stay on the device."""
    b1, b2 = adam.betas
    arrays = adam.gradient, adam.v, adam.m, adam.average, ag.xp.asarray(scale, adam.p.dtype)
    numbers = learning_rate / (1 - b1**adam.t), 1 / math.sqrt(1 - b2**adam.t), b1, b2, adam.eps, adam.decay or 0.0
    launch_elements("adam", "adam", adam.p, *arrays, *numbers)
