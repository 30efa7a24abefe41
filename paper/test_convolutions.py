"""Convolutions and what goes with them: derivatives, and values by hand."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

import autograd as ag
from autograd import Tensor, grad
from paper.convolutions import (
    avg_pool2d,
    batch_norm,
    batch_statistics,
    conv2d,
    fold,
    max_pool2d,
    power_iteration,
    resize_bilinear,
    spectral_norm,
    unfold,
    upsample_nearest,
)
from test_transgan import check, close, normal, seeds, tensors

strides = st.integers(1, 3)
sizes = st.integers(1, 3)


@st.composite
def windowed(draw):
    """A picture's shape (B, C, H, W), and kernel, stride and padding of windows that fit into it."""
    kernel, stride = draw(st.tuples(sizes, sizes)), draw(st.tuples(strides, strides))
    padding = tuple(draw(st.integers(0, k - 1)) for k in kernel)
    height, width = (k + draw(st.integers(0, 4)) for k in kernel)
    return (draw(st.integers(1, 2)), draw(sizes), height, width), kernel, stride, padding


def windows_by_hand(x, kernel, stride, padding, fill=0.0):
    """Yields (row, column, window (B, C, kh, kw)) one after another, as the definition reads."""
    x = np.pad(x, ((0, 0), (0, 0), *((p, p) for p in padding)), constant_values=fill)
    for row, top in enumerate(range(0, x.shape[2] - kernel[0] + 1, stride[0])):
        for column, left in enumerate(range(0, x.shape[3] - kernel[1] + 1, stride[1])):
            yield row, column, x[:, :, top : top + kernel[0], left : left + kernel[1]]


@settings(max_examples=40)
@given(drawn=windowed(), outputs=sizes, seed=seeds, with_bias=st.booleans())
def test_conv2d_derivatives(drawn, outputs, seed, with_bias):
    shape, kernel, stride, padding = drawn
    inputs = normal(seed, shape, (outputs, shape[1], *kernel), *([(outputs,)] if with_bias else []))
    x, weight = inputs[:2]
    check(lambda *a: conv2d(*a, stride=stride, padding=padding), inputs)
    out = ag.to_numpy(conv2d(*tensors(*inputs), stride=stride, padding=padding))
    for row, column, window in windows_by_hand(x, kernel, stride, padding):
        expected = np.einsum("bcij,ocij->bo", window, weight) + (inputs[2] if with_bias else 0)
        close(out[:, :, row, column], expected)


@settings(max_examples=40)
@given(drawn=windowed(), seed=seeds)
def test_unfold_and_fold_are_each_others_derivative(drawn, seed):
    shape, kernel, stride, padding = drawn
    (x,) = normal(seed, shape)
    check(lambda x: unfold(x, kernel, stride, padding), [x])
    windows = unfold(Tensor(ag.xp.asarray(x)), kernel, stride, padding)
    for row, column, window in windows_by_hand(x, kernel, stride, padding):
        close(windows.data[..., row, column], window)
    (y,) = normal(seed + 1, windows.shape)
    check(lambda y: fold(y, shape, stride, padding), [y])
    plain, folded = unfold(Tensor(x), kernel, stride, padding), fold(Tensor(y), shape, stride, padding)
    one, other = (ag.to_numpy(z) for z in (plain, folded))
    assert (one * y).sum() == pytest.approx((x * other).sum())  # <unfold x, y> = <x, fold y>


@settings(max_examples=40)
@given(drawn=windowed(), seed=seeds)
def test_pooling_derivatives(drawn, seed):
    shape, kernel, stride, padding = drawn
    # No two pixels are near each other, and all are below the 0 of a margin.
    x = np.random.default_rng(seed).permutation(math.prod(shape)).reshape(shape) / -10.0 - 0.1
    check(lambda x: max_pool2d(x, kernel, stride, padding), [x])
    check(lambda x: avg_pool2d(x, kernel, stride, padding), [x])
    (tensor,) = tensors(x)
    largest = max_pool2d(tensor, kernel, stride, padding).data
    mean = avg_pool2d(tensor, kernel, stride, padding).data
    for row, column, window in windows_by_hand(x, kernel, stride, padding, np.nan):
        close(mean[:, :, row, column], np.nanmean(window, axis=(2, 3)))
    for row, column, window in windows_by_hand(x, kernel, stride, padding, -np.inf):
        close(largest[:, :, row, column], window.max(axis=(2, 3)))


def test_max_pooling_shares_its_gradient_among_equals():
    (x,) = tensors(np.ones((1, 1, 2, 3)))
    (g,) = grad(max_pool2d(x, 2, 1).sum(), [x])
    close(g, np.array([[[[0.25, 0.5, 0.25], [0.25, 0.5, 0.25]]]]))
    (x,) = tensors(np.zeros((1, 1, 2, 2)))  # and a margin has no part in it
    (g,) = grad(max_pool2d(x, 2, 1, 1).sum(), [x])
    close(g, np.full((1, 1, 2, 2), 1 + 0.5 + 0.5 + 0.25))
    (x,) = tensors(np.array([[[[-np.inf, 1], [2, -np.inf]]]]))  # not even if nothing is smaller
    (g,) = grad(max_pool2d(x, 2, 2, 1).sum(), [x])
    close(g, np.ones((1, 1, 2, 2)))


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64])
def test_sizes_may_be_numbers_of_numpy_and_do_not_overflow(kind):
    (x,), (weight,) = tensors(normal(0, (1, 1, 6, 40))[0]), tensors(normal(1, (1, 1, 2, 2))[0])
    two, one = kind(2), kind(1)
    for function in (lambda *n: max_pool2d(x, *n), lambda *n: avg_pool2d(x, *n), lambda *n: unfold(x, *n),
                     lambda n, *more: conv2d(x, weight, None, *more)):  # fmt: skip
        close(function(two, two, one), function(2, 2, 1))
        close(function((two, two), (two, one), (one, one)), function((2, 2), (2, 1), (1, 1)))


@settings(max_examples=30)
@given(shape=array_shapes(min_dims=4, max_dims=4, max_side=3), seed=seeds, factor=st.integers(1, 3),
       height=st.integers(1, 7), width=st.integers(1, 7))  # fmt: skip
def test_resizing_derivatives(shape, seed, factor, height, width):
    (x,) = normal(seed, shape)
    check(lambda x: upsample_nearest(x, factor), [x])
    check(lambda x: resize_bilinear(x, height, width), [x])
    (tensor,) = tensors(x)
    close(upsample_nearest(tensor, factor), x.repeat(factor, 2).repeat(factor, 3))
    resized = ag.to_numpy(resize_bilinear(tensor, height, width))
    for i, j in np.ndindex(height, width):
        y, x_ = ((k + 0.5) * old / new - 0.5 for k, old, new in ((i, shape[2], height), (j, shape[3], width)))
        y, x_ = (float(np.clip(at, 0, old - 1)) for at, old in ((y, shape[2]), (x_, shape[3])))
        top, left = math.floor(y), math.floor(x_)
        bottom, right = min(top + 1, shape[2] - 1), min(left + 1, shape[3] - 1)
        upper = x[:, :, top, left] * (left + 1 - x_) + x[:, :, top, right] * (x_ - left)
        lower = x[:, :, bottom, left] * (left + 1 - x_) + x[:, :, bottom, right] * (x_ - left)
        close(resized[:, :, i, j], upper * (top + 1 - y) + lower * (y - top))


@settings(max_examples=30)
@given(shape=array_shapes(min_dims=4, max_dims=4, max_side=3), seed=seeds, scale=st.sampled_from([0.3, 1.0, 5.0]))
def test_batch_norm_derivatives(shape, seed, scale):
    assume(shape[0] * shape[2] * shape[3] > 2)  # of two numbers, the variance can be as good as none
    x, weight, bias = normal(seed, shape, (shape[1],), (shape[1],), scale=scale)
    assume(x.std(axis=(0, 2, 3)).min() > 0.05)  # nearer to constant channels the steps of differences are too wide

    def trained(x, weight, bias):
        return batch_norm(x, *batch_statistics(x), weight, bias, eps=0.01)

    check(trained, [x, weight, bias])
    y = ag.to_numpy(batch_norm(Tensor(ag.xp.asarray(x)), *batch_statistics(Tensor(ag.xp.asarray(x))),
                                  *tensors(np.ones(shape[1]), np.zeros(shape[1]))))  # fmt: skip
    variance = x.var(axis=(0, 2, 3))
    close(y.mean(axis=(0, 2, 3)), np.zeros(shape[1]))
    close(y.var(axis=(0, 2, 3)), variance / (variance + 1e-5), 1e-9)
    running = normal(seed + 1, (1, shape[1], 1, 1), (1, shape[1], 1, 1))
    check(lambda x, mean, root: batch_norm(x, mean, root * root, *tensors(weight, bias), eps=0.01), [x, *running])


@settings(max_examples=30)
@given(outputs=st.integers(1, 4), rest=array_shapes(min_dims=1, max_dims=3, max_side=3), seed=seeds)
def test_spectral_norm_derivatives(outputs, rest, seed):
    weight, u = normal(seed, (outputs, *rest), (outputs,))
    u /= np.linalg.norm(u)
    assume(np.linalg.norm(u @ weight.reshape(outputs, -1)) > 0.1)
    for _ in range(300):
        u = ag.to_numpy(power_iteration(ag.xp.asarray(weight), ag.xp.asarray(u)))
    values = np.linalg.svd(weight.reshape(outputs, -1), compute_uv=False)
    (tensor,), direction = tensors(weight), ag.xp.asarray(u)
    if len(values) == 1 or values[1] < 0.9 * values[0]:
        close(spectral_norm(tensor, direction), weight / values[0], 1e-6)
    check(lambda w: spectral_norm(w, direction), [weight])


PICTURE = np.ones((1, 2, 4, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conv2d(*tensors(np.ones((1, 2, 4, 4)), np.ones((3, 3, 2, 2)))), r"conv2d of shapes .*expected \(B, C"),
        (lambda: conv2d(*tensors(np.ones((1, 2, 2, 2)), np.ones((3, 2, 3, 3)))), "windows of 3x3 do not fit into 2x2"),
        (lambda: conv2d(*tensors(PICTURE, np.ones((3, 2, 2, 2)), np.ones(1))), r"conv2d of .*, \(1,\): expected .* \(O,\)"),
        (lambda: conv2d(*tensors(PICTURE, np.ones((3, 2, 2, 0)))), "windows of 2x0 do not fit"),
        (lambda: max_pool2d(*tensors(PICTURE), 5, 1), "max_pool2d of shapes .* do not fit"),
        (lambda: max_pool2d(*tensors(PICTURE), 2, 1, 2), "the padding must be less than the kernel"),
        (lambda: avg_pool2d(*tensors(PICTURE), (3, 2), 1, (2, 2)), "the padding must be less than the kernel"),
        (lambda: max_pool2d(*tensors(PICTURE[:, :, :0]), 3, 1, 2), "max_pool2d of .*: pictures without a pixel"),
        (lambda: avg_pool2d(*tensors(PICTURE[..., :0]), 3, 1, 2), "avg_pool2d of .*: pictures without a pixel"),
        (lambda: resize_bilinear(*tensors(PICTURE[..., :0]), 2, 2), "resize_bilinear of .*: pictures without a pixel"),
        (lambda: max_pool2d(*tensors(PICTURE[0]), 2, 1), r"max_pool2d of .*: expected pictures \(B, C, H, W\)"),
        (lambda: upsample_nearest(*tensors(PICTURE[0]), 2), r"upsample_nearest of .*: expected pictures \(B, C, H, W\)"),
        (lambda: resize_bilinear(*tensors(PICTURE[0]), 2, 2), r"resize_bilinear of .*: expected pictures \(B, C, H, W\)"),
        (lambda: fold(*tensors(np.ones((1, 2, 2, 2, 3, 3))), (1, 2, 9, 9)), r"fold of .*: pictures of \(1, 2, 9, 9\) have"),
        (lambda: fold(*tensors(np.ones((1, 2, 2, 2, 1, 1))), (1, 2, 1, 2)), "fold of .* do not fit"),
        (lambda: batch_norm(*tensors(PICTURE, *[np.ones((1, 2, 1, 1))] * 2, np.ones(1), np.ones(2))), r"twice \(1, C"),
        (lambda: batch_norm(*tensors(PICTURE, *[np.ones((1, 1, 1, 1))] * 2, *[np.ones(2)] * 2)), "batch_norm of .* twice"),
    ],
)
def test_errors_of_pictures_name_operation_and_shapes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
