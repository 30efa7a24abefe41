"""The forms of the engine's operations that run fast: on bare arrays, a pass over memory where the definition has many.

Each has its definition's signature and computes the same, in value, first and second derivative. Most vjps have two
forms: on arrays when the walk is not recorded, in Tensor operations when its result is to be differentiated again.
`arrays` is the module of array functions in use, fast.cpu or fast.gpu.
"""

import numpy as np

import autograd as ag
from autograd import Tensor, grad, is_recording, result
from fast.cpu import PEAK

arrays = None  # set by fast.install


def definition(operation):
    """What an operation does without any faster form."""
    return operation.__wrapped__


def matmul(a, b):
    """In a precision that is not the arrays' own; the products of its derivatives too."""
    a, b = (x if isinstance(x, Tensor) else Tensor(x) for x in (a, b))
    if min(a.ndim, b.ndim) < 2:
        return definition(ag.matmul)(a, b)
    return result(arrays.matmul(a.data, b.data), (a, lambda g: g @ ag.swap_last(b)), (b, lambda g: ag.swap_last(a) @ g))


def reduce_sum(x, axis=None, keepdims=False):
    """Over several axes before the last, as a bias's gradient is summed: one after another, beginning with the inmost.

    CuPy lets a block of threads sum up 32 columns. Of a gradient (B, N, C), summed over B and N at once, these would be
    C / 32 blocks, for a GPU's hundred processors and more; summed over N first, to (B, C), they are B times as many.
    """
    axes = range(x.ndim) if axis is None else sorted(ag.normalize_axis_tuple(axis, x.ndim))
    if len(axes) < 2 or x.ndim - 1 in axes:
        return definition(ag.reduce_sum)(x, axis, keepdims)
    for inmost in reversed(axes):
        x = definition(ag.reduce_sum)(x, inmost, keepdims)
    return x


def normal_cdf(x):
    return result(arrays.normal_cdf(x.data), (x, lambda g: g * ag.exp(x * x * -0.5) * PEAK))


def gelu(x):
    """Its derivatives: x Phi(x)  ->  Phi(x) + x phi(x)  ->  (2 - x^2) phi(x). The first is kept for the way back."""
    value, slope = arrays.gelu(x.data)
    return result(value, (x, lambda g: g * (_gelu_slope(x, slope) if is_recording() else slope)))


def _gelu_slope(x, slope):
    """The array `slope` = Phi(x) + x phi(x) as an operation on x, with its derivative (2 - x^2) phi(x)."""

    def vjp(g):
        if is_recording():
            return g * (2.0 - x * x) * ag.exp(x * x * -0.5) * PEAK
        return Tensor(arrays.gelu_curvature(x.data, g.data))

    return result(slope, (x, vjp))


def softmax(x, mask=None):
    """With p the result, dp = p (dx - sum(p dx)) row by row, so the gradient of x is p (g - sum(p g))."""
    if mask is not None and np.broadcast_shapes(x.shape, mask.shape) != x.shape:
        return definition(ag.softmax)(x, mask)
    p = arrays.softmax(x.data, mask)

    def vjp(g):
        if is_recording():
            y = softmax(x, mask)
            return y * (g - (g * y).sum(axis=-1, keepdims=True))
        return Tensor(arrays.softmax_vjp(p, g.data))

    return result(p, (x, vjp))


def layer_norm(x, weight, bias, eps=1e-5):
    """h = (x - mean(x)) r with r = (mean((x - mean(x))^2) + eps)^-1/2, and the result is h weight + bias.

    With means over the last axis, dr = -r^2 mean(h dx) and dh = r (dx - mean(dx) - h mean(h dx)): a symmetric map, so that
    the gradient of x is the same of u = g weight,  r (u - mean(u) - h mean(h u)).
    """
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:] or not weight.size:
        return definition(ag.layer_norm)(x, weight, bias, eps)
    data, h, r = arrays.layer_norm(x.data, weight.data, bias.data, eps)

    def vjp_x(g):
        if is_recording():
            return _normalize_vjp(x, h, r, g * weight)
        return Tensor(arrays.layer_norm_vjp(h, r, g.data, weight.data))

    def vjp_weight(g):
        return g * (_normalized(x, h, r) if is_recording() else h)  # whose sum over the rows is left to unbroadcast

    return result(data, (x, vjp_x), (weight, vjp_weight), (bias, lambda g: g))


def _normalize_vjp(x, h, r, u):
    """dx of `layer_norm` in Tensor operations, so that it can be differentiated: h and r are operations on x again."""
    h_x, r_x = _normalized(x, h, r), _inverse_deviation(x, h, r)
    return r_x * (u - u.mean(axis=-1, keepdims=True) - h_x * (u * h_x).mean(axis=-1, keepdims=True))


def _normalized(x, h, r):
    """The array h of `layer_norm` as an operation on x."""

    def vjp(g):
        return _normalize_vjp(x, h, r, g) if is_recording() else Tensor(arrays.layer_norm_vjp(h, r, g.data))

    return result(h, (x, vjp))


def _inverse_deviation(x, h, r):
    """The array r of `layer_norm` as an operation on x. dr = -r^2 sum(h dx) / C."""

    def vjp(g):
        if is_recording():
            return g * _inverse_deviation(x, h, r) ** 2 * _normalized(x, h, r) * (-1 / x.shape[-1])
        return Tensor(g.data * r * r * (-1 / x.shape[-1]) * h)

    return result(r, (x, vjp))


def attention(qkv, num_heads, mask=None):
    """Never holds all scores, see fast.cpu.attention. The definition, which does, runs for few tokens on a CPU, for wide
    heads on a GPU, and where the gradient is to be differentiated itself."""
    _, tokens, width = qkv.shape
    fits = width % (3 * num_heads) == 0 and (mask is None or mask.shape == (tokens, tokens))
    if not fits or arrays.attention_declines(tokens, width // (3 * num_heads)):
        return definition(ag.attention)(qkv, num_heads, mask)
    out, log_sum = arrays.attention(qkv.data, num_heads, mask)

    def vjp(g):
        if is_recording():
            return grad(definition(ag.attention)(qkv, num_heads, mask), [qkv], g, create_graph=True)[0]
        return Tensor(arrays.attention_vjp(qkv.data, num_heads, mask, out, log_sum, g.data))

    return result(out, (qkv, vjp))


def adam_update(adam, learning_rate, scale):
    """In one pass over the flat arrays."""
    arrays.adam_update(adam, learning_rate, scale)


FORMS = {ag.matmul: matmul, ag.reduce_sum: reduce_sum, ag.normal_cdf: normal_cdf, ag.gelu: gelu, ag.softmax: softmax,
         ag.layer_norm: layer_norm, ag.attention: attention, ag.adam_update: adam_update}  # fmt: skip
