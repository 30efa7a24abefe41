"""The engine's costly operations on NumPy arrays: in few passes over memory, and in pieces that stay in a core's cache.

fast/forms.py makes operations of these functions, as of their namesakes in fast/gpu.py. Arrays are float32 or float64.
"""

import contextlib
import copy
import ctypes
import math
import os

import numpy as np

import autograd as ag

CACHE = 1 << 15  # elements in a piece of an elementwise chain: a few arrays of it stay in a core's cache
SCORES = 1 << 17  # of attention in a block: half a megabyte, in a core's cache together with its product
FEW_TOKENS = 128  # whose scores a CPU may as well hold: to compute them again takes longer than to fetch them
PEAK = 1 / math.sqrt(2 * math.pi)  # of the normal density phi, at 0
PRECISIONS = {"float32": 23, "tf32": 10, "bfloat16": 7}  # bits of a number's fraction that enter a matrix product
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_precision = "float32"


def start(precision):
    """Make ready: products of `precision`, see PRECISIONS, and memory that stays with the process."""
    global _precision
    _precision = precision
    keep_freed_memory()


def keep_freed_memory():
    """Tell glibc to keep freed arrays for the next allocation instead of returning their pages to the system.

    A training step frees and allocates the same hundreds of megabytes over and over. To have every page zeroed and mapped
    again cost up to a quarter of the step where other programs were busy, and a fifth where a step frees more than 2 GB.
    M_MMAP_MAX = 0 puts large arrays on the heap, and an M_TRIM_THRESHOLD of -1 keeps the heap's end whatever its size.
    Does nothing where the C library is another one.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, -1)  # M_TRIM_THRESHOLD
        mallopt(-8, 1)  # M_ARENA_MAX: one heap, so that threads reuse each other's memory


def matmul(a, b):
    """a @ b in the precision that is chosen, which a CPU emulates by rounding what enters the product."""
    return np.matmul(_rounded(a), _rounded(b))


def _rounded(x):
    """A float32 array with fractions as short as the precision has them, rounded to nearest; others as they are.

    The last 23 bits of a float32 are its fraction, so it is rounded as the whole number that its bits make.
    """
    if x.dtype != np.float32:
        return x
    dropped = 23 - PRECISIONS[_precision]
    bits = np.ascontiguousarray(x).view(np.uint32) + np.uint32(1 << (dropped - 1))
    return (bits >> np.uint32(dropped) << np.uint32(dropped)).view(np.float32)


# --- GELU -------------------------------------------------------------------------------------------------------------
# It needs Phi(x) and phi(x) = exp(-x^2/2) / sqrt(2 pi) of every element of the widest arrays there are.


def normal_cdf(x):
    return _in_pieces(lambda x: _normal(x)[:1], x)[0]


def gelu(x):
    """x Phi(x) and its derivative Phi(x) + x phi(x), which comes almost free."""

    def piece(x):
        cdf, density = _normal(x)
        density *= x
        density += cdf
        cdf *= x
        return cdf, density

    return _in_pieces(piece, x, results=2)


def gelu_curvature(x, g):
    """g times the second derivative, (2 - x^2) phi(x), using phi'(x) = -x phi(x)."""

    def piece(x, g):
        square = x * x
        density = np.exp(square * -0.5)
        density *= PEAK
        np.subtract(2.0, square, out=square)
        density *= square
        density *= g
        return (density,)

    return _in_pieces(piece, x, g)[0]


def _in_pieces(function, *arrays, results=1):
    """`results` new arrays from function(*arrays), arrays of one shape, a piece of the cache's size at a time."""
    made = [np.empty(arrays[0].shape, arrays[0].dtype) for _ in range(results)]
    flat, flat_made = ([x.reshape(-1) for x in group] for group in (arrays, made))
    for i in range(0, flat[0].size, CACHE):
        piece = slice(i, i + CACHE)
        for part, values in zip(flat_made, function(*(x[piece] for x in flat)), strict=True):
            part[piece] = values
    return made


def _normal(x):
    """Phi(x) and phi(x) of an array. NumPy has no erf: float64 asks math.erf for every element, slow and exact, and
    float32 uses Abramowitz and Stegun 7.1.26, whose error of 1.5e-7 is float32's own, and which shares phi's exp."""
    density = np.exp(x * x * -0.5)
    if x.dtype == np.float64:
        erf = np.fromiter(map(math.erf, (x * math.sqrt(0.5)).flat), np.float64, x.size).reshape(x.shape)
        cdf = 0.5 + 0.5 * erf
    else:
        t = np.abs(x)  # to become 1 / (1 + 0.3275911 |x| / sqrt(2))
        t *= 0.3275911 * math.sqrt(0.5)
        t += 1
        np.reciprocal(t, out=t)
        cdf = t * (0.5 * 1.061405429)  # Horner's rule in t
        for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
            cdf += 0.5 * coefficient
            cdf *= t
        cdf *= density  # 1 - Phi(|x|)
        np.subtract(0.5, cdf, out=cdf)
        np.copysign(cdf, x, out=cdf)
        cdf += 0.5
    density *= PEAK
    return cdf, density


# --- Layer norm -------------------------------------------------------------------------------------------------------


def _row_sum(x):
    """(..., C) -> (..., 1), as a product with a vector of ones: BLAS sums rows several times faster than ufuncs do."""
    return np.matmul(x, np.ones((x.shape[-1], 1), x.dtype))


def layer_norm(x, weight, bias, eps):
    """h weight + bias (..., C), and h (..., C) = (x - mean(x)) r and r (..., 1) = (mean((x - mean(x))^2) + eps)^-1/2."""
    width = x.shape[-1]
    h = x - _row_sum(x) / width
    r = np.einsum("...i,...i->...", h, h)[..., None]
    r *= 1 / width
    r += eps
    np.sqrt(r, out=r)
    np.reciprocal(r, out=r)
    h *= r
    data = h * weight
    data += bias
    return data, h, r


def layer_norm_vjp(h, r, g, weight=None):
    """r (u - mean(u) - h mean(h u)) of u = g weight, or of u = g."""
    u, width = g if weight is None else g * weight, g.shape[-1]
    inner = np.einsum("...i,...i->...", h, u)[..., None]
    inner *= 1 / width
    dx = h * inner
    np.subtract(u, dx, out=dx)
    dx -= _row_sum(u) / width
    dx *= r
    return dx


# --- Attention --------------------------------------------------------------------------------------------------------
# Scores are taken a block of rows at a time, so that many tokens never need all (B, H, N, N) (after Dao et al. 2022).


def attention_declines(tokens, head_width):
    """Whether attention is better composed of its parts."""
    return tokens <= FEW_TOKENS


def attention(qkv, num_heads, mask):
    """out (B, N, C) and the logarithm L (B*H, N, 1) of each query's sum, from qkv (B, N, 3C):

    s = q k^T D^-1/2,   p = exp(s - L) with L = max(s) + log(sum(exp(s - max(s)))) of the row,   out = p v.
    """
    q, k, v = _split_heads(qkv, num_heads)  # (B*H, N, D) each
    k = _swap_copy(k)  # (B*H, D, N)
    out, log_sum = np.empty_like(q), np.empty((*q.shape[:2], 1), q.dtype)
    for heads, rows, keys in _blocks(len(q), q.shape[1], mask):
        p = np.matmul(q[heads, rows], k[heads, :, keys])  # (heads, rows, keys)
        if mask is not None:
            p += _mask_bias(mask[rows, keys], p.dtype)
        top = _finite(p.max(axis=-1, keepdims=True))
        p -= top
        np.exp(p, out=p)
        total = _positive(_row_sum(p))
        out[heads, rows] = np.matmul(p, v[heads, keys]) / total
        log_sum[heads, rows] = top + np.log(total)
    return _join_heads(out[None], len(qkv), num_heads), log_sum


def attention_vjp(qkv, num_heads, mask, out, log_sum, g):
    """d qkv (B, N, 3C) from g (B, N, C). Each block of p is computed again from q, k and L. The gradients are

    of v: p^T g,   of s: ds = p (g v^T - sum(g out)),   of q: ds k D^-1/2,   of k: ds^T q D^-1/2;

    softmax's sum(p (g v^T)) over the keys is sum(g out) over the head's width, since out = p v. Subtracting a number from
    each row of a product is left to the product: q k^T - L = [q, -L] [k, 1]^T, which saves a pass over the scores, and
    likewise g v^T - sum(g out).
    """
    q, k, v = _split_heads(qkv, num_heads)  # (B*H, N, D) each
    (inner,) = _split_heads(g * out, num_heads, parts=1)
    (g,) = _split_heads(g, num_heads, parts=1)
    one = np.ones_like(log_sum)  # (B*H, N, 1)
    q_shifted, k_one = np.concatenate([q, -log_sum], axis=-1), _swap_copy(np.concatenate([k, one], axis=-1))
    g_shifted, v_one = np.concatenate([g, -_row_sum(inner)], axis=-1), _swap_copy(np.concatenate([v, one], axis=-1))
    result = np.zeros((3, *q.shape), q.dtype)
    dq, dk, dv = result
    for heads, rows, keys in _blocks(len(q), q.shape[1], mask):
        p = np.matmul(q_shifted[heads, rows], k_one[heads, :, keys])  # (heads, rows, keys)
        if mask is not None:
            p += _mask_bias(mask[rows, keys], p.dtype)
        np.minimum(p, 0, out=p)  # rounding of huge logits must not make a probability of more than 1
        np.exp(p, out=p)
        dv[heads, keys] += np.matmul(p.swapaxes(1, 2), g[heads, rows])
        ds = np.matmul(g_shifted[heads, rows], v_one[heads, :, keys])
        ds *= p
        dq[heads, rows] = np.matmul(ds, k[heads, keys])
        dk[heads, keys] += np.matmul(ds.swapaxes(1, 2), q[heads, rows])
    dq *= q.shape[-1] ** -0.5  # the scale is part of q here, so dk has it already
    return _join_heads(result, len(out), num_heads)


def _finite(top):
    return np.maximum(top, np.finfo(top.dtype).min)  # a row's maximum, also where the whole row is masked (-inf)


def _positive(total):
    return np.maximum(total, np.finfo(total.dtype).tiny)  # a row's sum, also where the whole row is masked (0)


def _swap_copy(x):
    return np.ascontiguousarray(x.swapaxes(-1, -2))  # small products run twice as fast on a right side that lies in rows


def _mask_bias(mask, dtype):
    return np.where(mask, 0, -np.inf).astype(dtype)


def _split_heads(x, num_heads, parts=3):
    """(B, N, parts*C) -> (parts, B*H, N, D); of three parts the first, the query, is scaled by D^-1/2."""
    batch, tokens, width = x.shape
    head = width // parts // num_heads
    x = x.reshape(batch, tokens, parts, num_heads, head).transpose(2, 0, 3, 1, 4)  # (parts, B, H, N, D)
    x = x.copy().reshape(parts, batch * num_heads, tokens, head)
    if parts == 3:
        x[0] *= head**-0.5
    return x


def _join_heads(x, batch, num_heads):
    """(parts, B*H, N, D) -> (B, N, parts*C)."""
    parts, _, tokens, head = x.shape
    x = x.reshape(parts, batch, num_heads, tokens, head).transpose(1, 3, 0, 2, 4)  # (B, N, parts, H, D)
    return np.ascontiguousarray(x).reshape(batch, tokens, parts * num_heads * head)


def _blocks(heads, tokens, mask):
    """Slices (heads, rows, keys) that cover all scores, each at most SCORES of them.

    keys reaches from the first to the last key that the mask lets any of the rows see: a small window costs less.
    """
    rows = min(tokens, max(1, SCORES // tokens))
    group = max(1, min(heads, SCORES // (rows * tokens)))
    starts = range(0, tokens, rows)
    keys = [_visible(mask, slice(r, r + rows)) for r in starts]
    for h in range(0, heads, group):
        for r, visible in zip(starts, keys, strict=True):
            yield slice(h, h + group), slice(r, r + rows), visible


def _visible(mask, rows):
    if mask is None:
        return slice(None)
    seen = np.flatnonzero(mask[rows].any(axis=0))
    return slice(seen[0], seen[-1] + 1) if len(seen) else slice(0, 1)  # rows that see nothing need a key not to see


# --- Adam -------------------------------------------------------------------------------------------------------------


def adam_update(adam, learning_rate, scale):
    """The definition, on a piece of the flat arrays at a time."""
    for i in range(0, adam.p.size, CACHE):
        piece = copy.copy(adam)
        for name in ("p", "gradient", "v", "m", "average"):
            if (x := getattr(adam, name)) is not None:
                setattr(piece, name, x[i : i + CACHE])
        ag.adam_update.__wrapped__(piece, learning_rate, scale)
