"""What convolutional networks are made of, as operations of the engine: TransGAN needs none of this, its peers do.

Pictures are (B, C, H, W); kernel, stride and padding are numbers, or pairs of one for the rows and one for the columns.
Errors are those of autograd.py's operations.
"""

import itertools
import math

import numpy as np

import autograd as ag
from autograd import Module, Tensor, operation, result

# --- 1. Operations ----------------------------------------------------------------------------------------------------


SIZES = ("kernel", "stride", "padding")
PAIR = "{} must be a whole number, or a pair of them (for rows, for columns)"
ag.KINDS |= dict.fromkeys(SIZES, ((int, np.integer), "", PAIR)) | dict.fromkeys(("height", "width"), ag.KINDS["factor"])
ag.SEVERAL |= dict.fromkeys(SIZES, tuple)
ag.LEAST |= {"kernel": 1, "stride": 1, "padding": 0, "height": 1, "width": 1}
ag.KINDS |= dict.fromkeys(("mean", "variance"), ag.KINDS["x"])


def _check_pictures(shape):
    if len(shape) != 4:
        raise ValueError("expected pictures (B, C, H, W)")
    return shape


def _check_pixels(shape):
    if 0 in _check_pictures(shape)[2:]:
        raise ValueError("pictures without a pixel have no largest, no mean and nothing between")
    return shape


def _geometry(shape, kernel, stride, padding):
    """Kernel, stride and padding as pairs, and how many windows lie in pictures of `shape` that way, (H', W')."""
    _check_pictures(shape)
    pairs = (n if isinstance(n, tuple) else (n, n) for n in (kernel, stride, padding))
    kernel, stride, padding = pairs = [tuple(map(int, pair)) for pair in pairs]  # NumPy's small integers overflow
    if [len(pair) for pair in pairs] != [2, 2, 2]:
        raise ValueError("kernel, stride and padding must be a number each, or a pair (for rows, for columns)")
    height, width = (n + 2 * p for n, p in zip(shape[2:], padding, strict=True))
    if not (0 < kernel[0] <= height and 0 < kernel[1] <= width):
        raise ValueError(f"windows of {kernel[0]}x{kernel[1]} do not fit into {height}x{width}")
    return *pairs, ((height - kernel[0]) // stride[0] + 1, (width - kernel[1]) // stride[1] + 1)


def _pool_geometry(shape, kernel, stride, padding):
    """The same, of windows that all have a pixel of the picture in them."""
    kernel, stride, padding, counts = _geometry(_check_pixels(shape), kernel, stride, padding)
    if padding[0] >= kernel[0] or padding[1] >= kernel[1]:
        raise ValueError("the padding must be less than the kernel")
    return kernel, stride, padding, counts


def _padded(x, padding, fill=0):
    """An array (B, C, H, W) with `padding` rows and columns of `fill` around it; itself where there are none."""
    margins = ((0, 0), (0, 0), *((n, n) for n in padding))
    return ag.xp.pad(x, margins, constant_values=fill) if any(padding) else x


def _windows(x, kernel, stride):
    """A view of an array (B, C, H, W) as its windows, (B, C, kh, kw, H', W'), all of them in the same memory."""
    *_, counts = _geometry(x.shape, kernel, stride, 0)
    strides = (*x.strides, x.strides[2] * stride[0], x.strides[3] * stride[1])
    return ag.xp.lib.stride_tricks.as_strided(x, (*x.shape[:2], *kernel, *counts), strides)


@operation
def unfold(x, kernel, stride=1, padding=0):
    """All windows of a picture: (B, C, H, W) -> (B, C, kh, kw, H', W'), H' = (H + 2 padding - kh) // stride + 1.

    out[b, c, i, j, y, x] is pixel (i, j) of the window whose corner lies at (y, x) * stride, in the picture with a margin
    of zeros. An element lies in several windows, so its gradient is a sum: `fold`.
    """
    kernel, stride, padding, _ = _geometry(x.shape, kernel, stride, padding)
    data = _windows(_padded(x.data, padding), kernel, stride)
    return result(data, (x, lambda g: fold(g, x.shape, stride, padding)))


@operation
def fold(x, shape, stride=1, padding=0):
    """Add windows (B, C, kh, kw, H', W') up where `unfold` took them from: a picture of `shape` (B, C, H, W)."""
    kernel, stride, padding, counts = _geometry(shape, x.shape[2:4], stride, padding)
    if x.shape != (*shape[:2], *kernel, *counts):
        raise ValueError(f"pictures of {tuple(shape)} have windows of {(*shape[:2], *kernel, *counts)}")
    (down, right), (top, left), (rows, columns) = stride, padding, counts
    total = _padded(ag.xp.zeros(shape, x.dtype), padding)
    for i, j in itertools.product(*map(range, kernel)):
        total[:, :, i : i + down * rows : down, j : j + right * columns : right] += x.data[:, :, i, j]
    data = total[:, :, top : top + shape[2], left : left + shape[3]]
    return result(data, (x, lambda g: unfold(g, kernel, stride, padding)))


@operation
def conv2d(x, weight, bias=None, stride=1, padding=0):
    """Convolution (cross-correlation, as all frameworks have it): (B, C, H, W), (O, C, kh, kw), (O,) -> (B, O, H', W').

    out[b, o, y, x] = bias[o] + sum over c, i, j of weight[o, c, i, j] in[b, c, y stride + i, x stride + j]: a product
    of the weights with the windows, which are laid out as columns of C kh kw numbers. A product is linear in both its
    factors, so each gradient is a product again: of the weights, g times the columns; of the columns, the weights times
    g, and these are then folded. Columns take kh kw times the memory of x, so they are not kept but laid out again.
    """
    fit = x.ndim == weight.ndim == 4 and x.shape[1] == weight.shape[1]
    if not fit or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError("expected (B, C, H, W), (O, C, kh, kw) and (O,)")
    kernel, stride, padding, (rows, columns) = _geometry(x.shape, weight.shape[2:], stride, padding)
    batch, outputs, inner = len(x), len(weight), math.prod(weight.shape[1:])
    windows = _windows(_padded(x.data, padding), kernel, stride)  # (B, C, kh, kw, H', W'), a view
    laid_out = Tensor(windows.reshape(batch, inner, rows * columns))  # (B, C kh kw, H'W')
    data = (Tensor(weight.data.reshape(outputs, inner)) @ laid_out).data.reshape(batch, outputs, rows, columns)
    shape = windows.shape
    if bias is not None:
        data += bias.data.reshape(-1, 1, 1)

    def vjp_x(g):
        spread = ag.matmul(ag.reshape(weight, outputs, inner).T, ag.reshape(g, batch, outputs, rows * columns))
        return fold(ag.reshape(spread, shape), x.shape, stride, padding)  # of (B, C kh kw, H'W')

    def vjp_weight(g):
        laid_out = ag.reshape(unfold(x, kernel, stride, padding), batch, inner, rows * columns)  # (B, C kh kw, H'W')
        product = ag.matmul(ag.reshape(g, batch, outputs, rows * columns), ag.swap_last(laid_out))  # (B, O, C kh kw)
        return ag.reshape(ag.reduce_sum(product, 0), weight.shape)

    return result(data, (x, vjp_x), (weight, vjp_weight), (bias, lambda g: ag.reduce_sum(g, (0, 2, 3))))


def _over_windows(function, windows):
    """A ufunc of two arguments applied over the pixels of each window: array (B, C, kh, kw, H', W') -> (B, C, H', W')."""
    first, *others = (windows[:, :, i, j] for i, j in itertools.product(*map(range, windows.shape[2:4])))
    total = first.copy()
    for x in others:
        function(total, x, out=total)
    return total


@operation
def max_pool2d(x, kernel, stride, padding=0):
    """The largest pixel of each window: (B, C, H, W) -> (B, C, H', W'). Equal ones share its gradient, which is folded."""
    kernel, stride, padding, _ = _pool_geometry(x.shape, kernel, stride, padding)
    data = _over_windows(ag.xp.maximum, _windows(_padded(x.data, padding, -ag.xp.inf), kernel, stride))

    def vjp(g):
        is_top = _windows(_padded(x.data, padding, ag.xp.nan), kernel, stride) == data[:, :, None, None]  # no margin is
        share = g / ag.xp.maximum(is_top.sum(axis=(2, 3)), 1).astype(x.dtype)
        return fold(ag.where(is_top, share[:, :, None, None], 0.0), x.shape, stride, padding)

    return result(data, (x, vjp))


@operation
def avg_pool2d(x, kernel, stride, padding=0):
    """The mean of each window's pixels in the picture: (B, C, H, W) -> (B, C, H', W')."""
    kernel, stride, padding, _ = _pool_geometry(x.shape, kernel, stride, padding)
    data = _over_windows(ag.xp.add, _windows(_padded(x.data, padding), kernel, stride))
    inside = _padded(ag.xp.ones((1, 1, *x.shape[2:]), x.dtype), padding)
    share = 1 / _over_windows(ag.xp.add, _windows(inside, kernel, stride))  # (1, 1, H', W')
    data *= share

    def vjp(g):
        spread = ag.broadcast_to((g * share)[:, :, None, None], (*x.shape[:2], *kernel, *data.shape[2:]))
        return fold(spread, x.shape, stride, padding)

    return result(data, (x, vjp))


@operation
def upsample_nearest(x, factor):
    """Each pixel becomes factor*factor of them: (B, C, H, W) -> (B, C, H factor, W factor)."""
    batch, channels, height, width = _check_pictures(x.shape)
    x = ag.reshape(x, batch, channels, height, 1, width, 1)
    x = ag.broadcast_to(x, (batch, channels, height, factor, width, factor))
    return ag.reshape(x, batch, channels, height * factor, width * factor)


@operation
def resize_bilinear(x, height, width):
    """Bilinear interpolation between the centres of pixels: (B, C, H, W) -> (B, C, height, width).

    A product with a matrix from the left for the rows and from the right for the columns. As PyTorch's interpolate with
    align_corners=False has it, without smoothing where a picture shrinks.
    """
    sides = zip((height, width), _check_pixels(x.shape)[2:], strict=True)
    rows, columns = (_interpolation(new, old, x.dtype) for new, old in sides)
    return ag.matmul(ag.matmul(Tensor(rows), x), Tensor(columns).T)


def _interpolation(new, old, dtype):
    """The array (new, old) that interpolates `old` numbers in a line at `new` places, evenly."""
    at = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
    distance = np.abs(at[:, None] - np.arange(old))
    return ag.xp.asarray(np.maximum(1 - distance, 0).astype(dtype))


# --- 2. Normalization -------------------------------------------------------------------------------------------------


class Stateful(Module):
    """A module of which training changes more than parameters: batch norm's averages, spectral norm's direction."""

    training = True  # of interest to batch normalization alone

    def named_modules(self, prefix=""):
        """This module and all stateful ones that are part of it, each with what stands before its names: ("", self), ..."""
        yield prefix, self
        for name, value in vars(self).items():
            for part, module in enumerate(value) if isinstance(value, (list, tuple)) else [(None, value)]:
                if isinstance(module, Stateful):
                    yield from module.named_modules(f"{prefix}{name}." if part is None else f"{prefix}{name}.{part}.")

    def modules(self):
        """This module and all stateful ones that are part of it."""
        return [module for _, module in self.named_modules()]

    def buffers(self):
        """All plain arrays by name: what training changes otherwise than by a gradient."""
        arrays = ((prefix + name, x) for prefix, module in self.named_modules() for name, x in vars(module).items())
        return {name: x for name, x in arrays if isinstance(x, ag.xp.ndarray)}

    def prepare(self):
        """What a module does before each of its updates: see `spectral_norm`."""


def batch_statistics(x):
    """Mean and variance of each channel over a batch of pictures: (B, C, H, W) -> (1, C, 1, 1) each."""
    mean = x.mean(axis=(0, 2, 3), keepdims=True)
    return mean, ((x - mean) ** 2).mean(axis=(0, 2, 3), keepdims=True)


@operation
def batch_norm(x, mean, variance, weight, bias, eps=1e-5):
    """Batch normalization (Ioffe and Szegedy 2015): (x - mean) / sqrt(variance + eps) * weight + bias, a channel each.

    x (B, C, H, W); mean and variance (1, C, 1, 1) of `batch_statistics` while training, later of their running averages;
    weight and bias (C,).
    """
    shapes = {mean.shape, variance.shape}, {weight.shape, bias.shape}
    if x.ndim != 4 or shapes != ({(1, x.shape[1], 1, 1)}, {(x.shape[1],)}):
        raise ValueError("expected (B, C, H, W), twice (1, C, 1, 1) and twice (C,)")
    return (x - mean) * (weight.reshape(1, -1, 1, 1) / ag.sqrt(variance + eps)) + bias.reshape(1, -1, 1, 1)


def spectral_norm(weight, u):
    """weight / s, with s its largest singular value as a matrix W (O, -1), as u sees it (Miyato et al. 2018).

    u: an array (O,), the direction that `power_iteration` improves; it counts as a constant. s = |W^T u|, which is their
    u^T W v for v = W^T u / |W^T u|, and so is its gradient: ds = u^T dW v.
    """
    product = Tensor(u[None]) @ weight.reshape(len(weight), -1)  # (1, -1)
    return weight / ag.sqrt((product * product).sum() + 1e-24)  # W^T u may be 0


def power_iteration(weight, u):
    """One step of the power method, u <- W W^T u / |...|, towards the first left singular vector of an array (O, ...)."""
    matrix = weight.reshape(len(weight), -1)
    return _unit(matrix @ _unit(matrix.T @ u))


def _unit(x):
    return x / (ag.xp.linalg.norm(x) + 1e-12)
