"""The project's promises, as properties: python -m pytest

Every derivative is held against central differences in float64, in first and second order, over drawn shapes; every fused
operation against its composition; the whole of training against PyTorch, where PyTorch is installed. On a machine with a
GPU and CuPy the same tests run there.

Contents
    1. Setting up             device, hypothesis profiles, what tests draw, damage at random
    2. Primitive operations   first and second derivatives, extreme values, errors
    3. Fused operations       derivatives, and equality with their compositions
    4. Pictures               convolution, pooling, resizing, batch and spectral norm
    5. The engine             deep graphs, many paths, memory, modes, gradient_check, Adam
    6. The networks           pixel shuffle, derivatives of whole networks, parameter counts, losses
    7. Training               augmentation, resuming to the bit, threads, a rehearsal of the GPU
    8. Data                   archives, pickles, downloads, drawn shapes, grids
    9. Command line           what a person can get wrong
    10. Losing nothing        kills, signals, full disks, checkpoints that are damaged, numbers that are not finite
    11. Parity with PyTorch   outputs, gradients, five training steps
    12. The README            its links, commands and programs
"""

import ast
import contextlib
import csv
import ctypes
import dataclasses
import functools
import gzip
import hashlib
import http.server
import importlib
import io
import json
import math
import operator
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tracemalloc
import types
import warnings
import zipfile
from concurrent import futures
from pathlib import Path

import transgan  # before NumPy: it decides how many threads NumPy's matrix products use

import numpy as np  # isort: skip
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, mutually_broadcastable_shapes
from PIL import Image

import autograd as ag
import data
from autograd import Tensor, grad, gradient_check
from data import UserError

# --- 1. Setting up ----------------------------------------------------------------------------------------------------

DEVICE = ag.use_device("auto")
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="about the CPU")
_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("local", max_examples=100, **_common)
settings.register_profile("ci", max_examples=100, derandomize=True, **_common)
settings.load_profile("ci" if os.environ.get("CI") else "local")

AGREES = 1e-6  # largest relative error of a derivative against central differences in float64
seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([0.1, 1.0, 3.0])
shapes = array_shapes(min_dims=0, max_dims=4, min_side=1, max_side=4)

MODEST = 1 << 27  # bytes that reading a small file, whatever it says, may take


def fuzz(examples):
    """The settings of a test that reads damaged bytes: FUZZ=10000 python -m pytest -k fuzz has more of them."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=int(os.environ.get("FUZZ", examples)), suppress_health_check=checks, deadline=20_000)


def fuzzed(content, seed):
    """Bytes after one to four changes, half of them where a part of an archive, an array or a picture says what it is."""
    rng, content = random.Random(seed), bytearray(content)
    for _ in range(rng.randint(1, 4)):
        heads = [m.start() for m in re.finditer(rb"PK|NUMPY|ustar|numpy|labels|torch|IHDR|JFIF", content)]
        at = rng.choice(heads) + rng.randint(0, 80) if heads and rng.random() < 0.5 else rng.randint(0, len(content))
        count, elsewhere = rng.choice((1, 2, 4, 8, 512)), rng.randint(0, len(content))
        flipped = bytes(x ^ 1 << rng.randrange(8) for x in content[at : at + 1])
        junk = rng.choice((b"\0", b"\xff", b"\x7f", b"9")) * count
        match rng.choice(("flip", "write", "junk", "insert", "remove", "copy", "cut")):
            case "flip":
                content[at : at + 1] = flipped
            case "write":
                content[at : at + count] = rng.randbytes(count)
            case "junk":
                content[at : at + count] = junk
            case "insert":
                content[at:at] = rng.randbytes(count)
            case "remove":
                del content[at : at + count]
            case "copy":
                content[at : at + count] = content[elsewhere : elsewhere + count]
            case "cut":
                del content[at:]
    return bytes(content)


@contextlib.contextmanager
def one_line_at_most():
    """Within this context, only a UserError of one line may be raised, which ends it, and MODEST memory be taken."""
    tracemalloc.start()
    try:
        yield
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MODEST


def normal(seed, *shapes, scale=1.0):
    """A list of float64 arrays of these shapes, drawn from a normal distribution."""
    rng = np.random.default_rng(seed)
    return [np.asarray(scale * rng.standard_normal(shape)) for shape in shapes]


def check(function, inputs, order=2, **options):
    """Hold derivatives up to `order` against central differences, at a few random coordinates of each input."""
    inputs = [ag.xp.asarray(x) for x in inputs]
    before = [ag.to_numpy(x).copy() for x in inputs]
    assert gradient_check(function, inputs, order=order, **({"coordinates": 5} | options)) < AGREES
    for x, untouched in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(ag.to_numpy(x), untouched)  # nothing was computed in place of an input


def tensors(*arrays):
    return [Tensor(ag.xp.asarray(x), requires_grad=True) for x in arrays]


def close(a, b, tolerance=1e-10):
    np.testing.assert_allclose(ag.to_numpy(a), ag.to_numpy(b), rtol=tolerance, atol=tolerance)


# --- 2. Primitive operations ------------------------------------------------------------------------------------------

ELEMENTWISE = {  # the operation, and what brings normal numbers into its domain and away from kinks
    "negative": (ag.negative, None),
    "exp": (ag.exp, lambda x: x / 3),  # the check adds up squares: beyond e^5 their rounding is all it would see
    "log": (ag.log, lambda x: np.abs(x) + 0.1),
    "sqrt": (ag.sqrt, lambda x: np.abs(x) + 0.1),
    "tanh": (ag.tanh, None),
    "sigmoid": (ag.sigmoid, None),
    "softplus": (ag.softplus, None),
    "relu": (ag.relu, lambda x: x + np.copysign(0.01, x)),
    "normal_cdf": (ag.normal_cdf, None),
    "gelu": (ag.gelu, None),
    "reciprocal": (lambda x: x**-1, lambda x: np.abs(x) + 0.5),
    "constant": (lambda x: x**0, None),
    "identity": (lambda x: x**1, None),
    "square": (lambda x: x**2, None),
    "cube": (lambda x: x**3, None),
    "to the 1.5": (lambda x: x**1.5, lambda x: np.abs(x) + 0.1),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
@given(shape=shapes, seed=seeds, scale=scales)
def test_elementwise_derivatives(name, shape, seed, scale):
    function, prepare = ELEMENTWISE[name]
    (x,) = normal(seed, shape, scale=scale)
    check(function, [prepare(x) if prepare else x])


BINARY = {"add": ag.add, "subtract": ag.subtract, "multiply": ag.multiply, "divide": ag.divide}


@pytest.mark.parametrize("name", BINARY)
@given(drawn=mutually_broadcastable_shapes(num_shapes=2, max_dims=4, max_side=4), seed=seeds, scale=scales)
@example(drawn=types.SimpleNamespace(input_shapes=((3, 1, 2), (5, 1))), seed=0, scale=1.0)
@example(drawn=types.SimpleNamespace(input_shapes=((), (2, 3))), seed=0, scale=1.0)
def test_binary_derivatives_with_broadcasting(name, drawn, seed, scale):
    a, b = normal(seed, *drawn.input_shapes, scale=scale)
    check(BINARY[name], [a, np.abs(b) + 0.5 if name == "divide" else b])


@pytest.mark.parametrize("name", BINARY)
@given(shape=shapes, seed=seeds, number=st.floats(0.5, 3))
def test_binary_derivatives_with_numbers_arrays_and_the_same_tensor_twice(name, shape, seed, number):
    x, array = normal(seed, shape, shape)
    x, array, function = np.abs(x) + 0.5, ag.xp.asarray(np.abs(array) + 0.5), BINARY[name]
    for call in (lambda x: function(x, number), lambda x: function(number, x), lambda x: function(x, x)):
        check(call, [x])
    check(lambda x: function(x, array) * function(array, x), [x])


@given(shape=array_shapes(min_dims=1, max_dims=4, max_side=4), seed=seeds, keepdims=st.booleans(), draw=st.data())
@pytest.mark.parametrize("name", ["sum", "mean", "max"])
def test_reduction_derivatives(name, shape, seed, keepdims, draw):
    (x,) = normal(seed, shape)
    one = st.integers(-len(shape), len(shape) - 1)
    several = st.sets(st.integers(0, len(shape) - 1)).map(tuple)
    axis = draw.draw(st.one_of(st.none(), one, several))
    check(lambda x: getattr(x, name)(axis=axis, keepdims=keepdims), [x])
    result = getattr(Tensor(ag.xp.asarray(x)), name)(axis=axis, keepdims=keepdims)
    close(result, getattr(x, name)(axis=axis, keepdims=keepdims))


def test_max_shares_its_gradient_among_equals():
    (x,) = tensors([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    (g,) = grad(x.max(axis=1).sum(), [x])
    close(g, [[0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]], 1e-6)


@given(shape=array_shapes(min_dims=1, max_dims=4, max_side=4), seed=seeds, draw=st.data())
def test_transpose_and_reshape_derivatives(shape, seed, draw):
    (x,) = normal(seed, shape, scale=1 / 3)  # for exp, as above
    axes = draw.draw(st.permutations(range(len(shape))))
    signed = [a - len(shape) if draw.draw(st.booleans()) else a for a in axes]
    check(lambda x: ag.exp(x.transpose(*signed)).reshape(-1) * ag.exp(x.reshape(x.size)), [x])
    close(Tensor(ag.xp.asarray(x)).transpose(*signed), x.transpose(axes))
    close(Tensor(ag.xp.asarray(x)).T, x.T)


@given(shape=array_shapes(min_dims=1, max_dims=3, max_side=5), seed=seeds, draw=st.data())
def test_getitem_derivatives(shape, seed, draw):
    (x,) = normal(seed, shape)
    index = []
    for n in shape[: draw.draw(st.integers(0, len(shape)))]:
        index.append(draw.draw(st.one_of(st.integers(-n, n - 1), st.slices(n))))
    index.insert(draw.draw(st.integers(0, len(index))), None)
    index += draw.draw(st.sampled_from([[], [Ellipsis]]))
    check(lambda x: x[tuple(index)], [x])
    close(Tensor(ag.xp.asarray(x))[tuple(index)], x[tuple(index)])


@given(shape=array_shapes(min_dims=1, max_dims=3, max_side=4), seed=seeds, count=st.integers(1, 3), draw=st.data())
def test_concatenate_derivatives(shape, seed, count, draw):
    axis = draw.draw(st.integers(-len(shape), len(shape) - 1))
    sizes = draw.draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    drawn = [(*shape[: axis % len(shape)], n, *shape[axis % len(shape) + 1 :]) for n in sizes]
    arrays = normal(seed, *drawn)
    check(lambda *parts: ag.concatenate(parts, axis), arrays)
    check(lambda x: ag.concatenate([x, x * 2], axis), arrays[:1])


@given(drawn=mutually_broadcastable_shapes(num_shapes=1, base_shape=(2, 3, 1, 4), max_dims=4, max_side=4), seed=seeds)
def test_broadcast_to_derivatives(drawn, seed):
    assume(len(drawn.result_shape) <= 4)
    (x,) = normal(seed, drawn.input_shapes[0])
    check(lambda x: ag.broadcast_to(x, drawn.result_shape), [x])


@given(
    drawn=mutually_broadcastable_shapes(signature="(n,k),(k,m)->(n,m)", max_dims=3, max_side=3), seed=seeds, scale=scales
)
@example(drawn=types.SimpleNamespace(input_shapes=((2, 3, 4, 5), (5, 2))), seed=0, scale=1.0)
@example(drawn=types.SimpleNamespace(input_shapes=((4, 5), (2, 1, 5, 3))), seed=0, scale=1.0)
@example(drawn=types.SimpleNamespace(input_shapes=((2, 1, 3, 4), (5, 4, 2))), seed=0, scale=1.0)
def test_matmul_derivatives_with_any_leading_axes(drawn, seed, scale):
    a, b = normal(seed, *drawn.input_shapes, scale=scale)
    check(ag.matmul, [a, b])
    close(Tensor(ag.xp.asarray(a)) @ Tensor(ag.xp.asarray(b)), a @ b)
    check(lambda x: x @ ag.xp.asarray(b), [a])  # operands may be plain arrays
    check(lambda x: ag.xp.asarray(a) @ x, [b])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extreme_values_stay_finite_and_right(dtype):
    """At logits of 10^4 and more, where the textbook formulas overflow or divide 0 by 0, values and slopes are exact."""
    big = ag.xp.asarray(np.array([-3e4, -100, -40, 0, 40, 100, 3e4], dtype))
    tiny = np.finfo(dtype).tiny
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", "underflow")
        (x,) = tensors(big)
        for function, values, slopes in (
            (
                ag.sigmoid,
                [0, math.exp(-100), math.exp(-40), 0.5, 1, 1, 1],
                [0, math.exp(-100), math.exp(-40), 0.25, math.exp(-40), math.exp(-100), 0],
            ),
            (
                ag.softplus,
                [0, math.exp(-100), math.exp(-40), math.log(2), 40, 100, 3e4],
                [0, 0, math.exp(-40), 0.5, 1, 1, 1],
            ),
            (ag.tanh, [-1, -1, -1, 0, 1, 1, 1], [0, 0, 0, 1, 0, 0, 0]),
            (ag.gelu, [0, 0, 0, 0, 40, 100, 3e4], [0, 0, 0, 0.5, 1, 1, 1]),
            (ag.relu, [0, 0, 0, 0, 40, 100, 3e4], [0, 0, 0, 0, 1, 1, 1]),
        ):
            y = function(x)
            (slope,) = grad(y.sum(), [x], create_graph=True)
            (curvature,) = grad(slope.sum(), [x]) if slope.requires_grad else (slope,)
            np.testing.assert_allclose(ag.to_numpy(y), values, rtol=1e-6, atol=tiny)
            np.testing.assert_allclose(ag.to_numpy(slope), slopes, rtol=1e-6, atol=1e-19)
            assert np.isfinite(ag.to_numpy(curvature)).all()
        y = ag.softmax(x)
        close(y, [0, 0, 0, 0, 0, 0, 1], 1e-7)
        (slope,) = grad((y * y).sum(), [x], create_graph=True)
        assert np.isfinite(ag.to_numpy(slope)).all()
        assert np.isfinite(ag.to_numpy(grad((slope * slope).sum(), [x])[0])).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t(2, 3) + t(4), r"add of shapes \(2, 3\), \(4,\)"),
        (lambda t: 1.0 - t(2) * t(3), r"multiply of shapes \(2,\), \(3,\)"),
        (lambda t: t(2, 3) @ t(4, 5), r"matmul of shapes \(2, 3\), \(4, 5\)"),
        (lambda t: t(2, 3) @ t(3), r"matmul of shapes \(2, 3\), \(3,\): both operands need at least two axes"),
        (lambda t: t(7, 2, 3) @ t(4, 5), r"matmul of shapes \(7, 2, 3\), \(4, 5\)"),
        (lambda t: t(6).reshape(4, 2), r"reshape of shapes \(6,\)"),
        (lambda t: t(6).transpose(1, 0), r"transpose of shapes \(6,\)"),
        (lambda t: t(6).sum(axis=1), r"reduce_sum of shapes \(6,\)"),
        (lambda t: t(0).mean(), r"reduce_mean of shapes \(0,\): there is no mean of no elements"),
        (lambda t: ag.concatenate([t(2, 3), t(2, 4)]), r"concatenate of shapes \(2, 3\), \(2, 4\)"),
        (lambda t: ag.broadcast_to(t(2), (3,)), r"broadcast_to of shapes \(2,\)"),
        (lambda t: ag.linear(t(2, 3), t(4, 5)), r"linear of shapes \(2, 3\), \(4, 5\)"),
        (lambda t: ag.linear(t(2, 3), t(3, 4), t(1)), r"linear of shapes \(2, 3\), \(3, 4\), \(1,\)"),
        (lambda t: ag.linear(t(2, 3), t(3, 4), t(2, 4)), r"linear of shapes \(2, 3\), \(3, 4\), \(2, 4\)"),
        (lambda t: ag.softmax(t(2, 3), ag.xp.ones((2, 4), bool)), r"softmax of shapes \(2, 3\), \(2, 4\)"),
        (lambda t: ag.softmax(t(2, 3), ag.xp.ones((4, 2, 3), bool)), r"\(4, 2, 3\): the mask, .* must broadcast to x"),
        (lambda t: ag.softmax(t(2, 1), ag.xp.ones(3, bool)), r"\(2, 1\), \(3,\): the mask, .* must broadcast to x"),
        (lambda t: ag.layer_norm(t(2, 3), t(2), t(3)), r"layer_norm of shapes \(2, 3\), \(2,\), \(3,\)"),
        (lambda t: ag.layer_norm(t(2, 3), t(3), t(1)), r"layer_norm of shapes \(2, 3\), \(3,\), \(1,\)"),
        (lambda t: ag.layer_norm(t(2, 3), t(3), t(2, 3)), r"layer_norm of shapes \(2, 3\), \(3,\), \(2, 3\)"),
        (lambda t: ag.attention(t(1, 2, 9), 2), r"attention of shapes \(1, 2, 9\).*2 heads"),
        (lambda t: ag.attention(t(1, 2, 6), 2, ag.xp.ones((3, 3), bool)), r"attention .*\(3, 3\), must be \(2, 2\)"),
        (lambda t: ag.pixel_shuffle(t(1, 6, 2, 2), 2), r"pixel_shuffle of shapes \(1, 6, 2, 2\).*6 channels"),
        (lambda t: ag.pixel_unshuffle(t(1, 3, 3, 2), 2), r"pixel_unshuffle of shapes \(1, 3, 3, 2\)"),
    ],
)
def test_errors_name_the_operation_and_the_shapes(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(lambda *shape: Tensor(ag.xp.ones(shape)))
    assert "\n" not in str(caught.value)


def test_empty_batches_pass_through():
    x, w, b = tensors(np.ones((0, 5, 6)), np.ones((6, 3)), np.ones(3))
    for y in (ag.linear(x, w, b), x @ w, ag.attention(x, 2), ag.gelu(x), ag.softmax(x)):
        assert y.shape[:2] == (0, 5)
        assert [g.shape for g in grad(y.sum(), [x, w])] == [(0, 5, 6), (6, 3)]
    with pytest.raises(ValueError, match="attention of shapes"):
        ag.attention(x, 0)


def test_other_errors_are_clear_too():
    x = Tensor(ag.xp.ones((2, 3)), requires_grad=True)
    with pytest.raises(IndexError, match=r"getitem of shapes \(2, 3\)"):
        x[5]
    with pytest.raises(TypeError, match="an index may hold"):
        x[[0, 1]]
    with pytest.raises(TypeError, match="the exponent must be a number"):
        x**x
    with pytest.raises(TypeError, match="float32 and float64 meet"):
        Tensor(ag.xp.ones(3, np.float32)) * Tensor(ag.xp.ones(3, np.float64))


@given(seed=seeds, scale=st.sampled_from([1e-30, 1.0, 1e30]), precision=st.sampled_from(["tf32", "bfloat16"]))
def test_precision_rounds_to_its_bits(seed, scale, precision):
    """To the nearest number with so many bits of fraction, at most half a unit of the last away; float64 is let be."""
    x = normal(seed, 50, scale=scale)[0].astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ag, "_precision", precision)
        rounded, bits = ag._rounded(x), ag.PRECISIONS[precision]
        exact = x.astype(np.float64)
        assert ag._rounded(exact) is exact
    fraction, _ = np.frexp(rounded.astype(np.float64))
    np.testing.assert_array_equal(fraction * 2 ** (bits + 1), np.round(fraction * 2 ** (bits + 1)))
    unit = np.exp2(np.floor(np.log2(np.abs(exact))) - bits)
    assert (np.abs(rounded - exact) <= unit / 2).all()
    special = np.array([0, np.inf, -np.inf, np.nan], np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ag, "_precision", precision)
        np.testing.assert_array_equal(ag._rounded(special), special)


@on_cpu
@pytest.mark.parametrize("precision, error", [("float32", 1e-6), ("tf32", 3e-3), ("bfloat16", 3e-2)])
def test_matrix_products_are_as_exact_as_asked(precision, error):
    x, w = (Tensor(a.astype(np.float32)) for a in normal(0, (4, 50, 60), (60, 70)))
    products = [lambda: x @ w, lambda: ag.linear(x, w),
                lambda: ag.conv2d(x[None], Tensor(w.data[:36].reshape(70, 4, 3, 3)))]  # fmt: skip
    for product in products:
        ag.use_precision("float32")
        exact = product().data
        ag.use_precision(precision)
        try:
            found = np.abs(product().data - exact).max() / np.abs(exact).max()
        finally:
            ag.use_precision("float32")
        assert error / 100 * (precision != "float32") <= found < error
    with pytest.raises(ValueError, match="float32, tf32, bfloat16, not 'half'"):
        ag.use_precision("half")


# --- 3. Fused operations ----------------------------------------------------------------------------------------------


def check_same(fused, composed, arrays, tolerance=1e-9):
    """Two functions agree in value, in first derivative both with and without a recorded graph, and in second."""
    upstream = None
    results = []
    for function in (fused, composed):
        inputs = tensors(*arrays)
        y = function(*inputs)
        upstream = ag.xp.asarray(normal(1, y.shape)[0]) if upstream is None else upstream
        first = grad(y, inputs, Tensor(upstream), create_graph=True)
        second = grad(sum((g * g * 0.5).sum() for g in first), inputs)
        bare = grad(function(*inputs), inputs, Tensor(upstream))
        results.append([y, *first, *bare, *second])
    for a, b in zip(*results, strict=True):
        size = max(1.0, float(abs(ag.to_numpy(b)).max()))
        np.testing.assert_allclose(ag.to_numpy(a) / size, ag.to_numpy(b) / size, rtol=0, atol=tolerance)


masks = st.sampled_from(["none", "some", "whole rows", "all"])


def draw_mask(kind, shape, seed):
    """A boolean mask whose last axis are the keys: none of them hidden, some, all of some rows, or all of every row."""
    if kind == "none":
        return None
    mask = np.random.default_rng(seed).random(shape) < 0.6
    if kind == "whole rows":
        mask[..., ::2, :] = False
    return ag.xp.asarray(mask & (kind != "all"))


@given(shape=array_shapes(min_dims=2, max_dims=4, max_side=5), seed=seeds, scale=st.sampled_from([0.1, 1, 10]), mask=masks)
@example(shape=(2, 1), seed=0, scale=1, mask="some")
def test_softmax_derivatives(shape, seed, scale, mask):
    (x,) = normal(seed, shape, scale=scale)
    mask = draw_mask(mask, shape[-2:], seed)
    check(lambda x: ag.softmax(x, mask), [x])
    y = ag.to_numpy(ag.softmax(Tensor(ag.xp.asarray(x)), mask))
    seen = np.ones(shape, bool) if mask is None else np.broadcast_to(ag.to_numpy(mask), shape)
    assert (y[~seen] == 0).all()
    np.testing.assert_allclose(y.sum(-1), seen.any(-1), atol=1e-12)
    if mask is None:
        check_same(ag.softmax, ag.softmax_composed, [x])


@given(shape=array_shapes(min_dims=1, max_dims=4, max_side=6), seed=seeds, scale=scales)
@example(shape=(3, 1), seed=0, scale=1.0)
def test_layer_norm_derivatives(shape, seed, scale):
    x, weight, bias = normal(seed, shape, shape[-1:], shape[-1:], scale=scale)
    assume(x.shape[-1] == 1 or x.std(axis=-1).min() > 0.02)  # nearer to constant rows the steps of differences are too wide
    check(ag.layer_norm, [x, weight, bias], step=2e-6)
    check_same(ag.layer_norm, ag.layer_norm_composed, [x, weight, bias])


@given(rows=st.integers(1, 4), seed=seeds, offset=st.sampled_from([0.0, 5.0, -300.0]))
def test_layer_norm_of_constant_and_offset_rows(rows, seed, offset):
    (x,) = normal(seed, (rows, 6))
    x[0] = 1.0
    y = ag.to_numpy(ag.layer_norm(*(Tensor(ag.xp.asarray(a)) for a in (x + offset, np.ones(6), np.zeros(6)))))
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, expected, atol=1e-8)
    (single,) = tensors((x + offset).astype(np.float32))
    weight, bias = Tensor(ag.xp.ones(6, np.float32)), Tensor(ag.xp.zeros(6, np.float32))
    np.testing.assert_allclose(ag.to_numpy(ag.layer_norm(single, weight, bias))[1:], expected[1:], atol=2e-2)


@given(shape=shapes, seed=seeds, scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_gelu_equals_its_composition(shape, seed, scale):
    check_same(ag.gelu, ag.gelu_composed, normal(seed, shape, scale=scale))


def test_gelu_in_float32_is_exact_to_float32s_precision():
    x = np.linspace(-12, 12, 20001)
    exact = np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x])
    value = ag.to_numpy(ag.gelu(Tensor(ag.xp.asarray(x.astype(np.float32)))))
    assert np.abs(value - exact).max() < 8e-7
    (leaf,) = tensors(x.astype(np.float32))
    slope = grad(ag.gelu(leaf).sum(), [leaf])[0]
    exact = [0.5 * math.erfc(-v / math.sqrt(2)) + v * math.exp(-v * v / 2) / math.sqrt(2 * math.pi) for v in x]
    assert np.abs(ag.to_numpy(slope) - exact).max() < 5e-7


@given(leading=array_shapes(min_dims=0, max_dims=3, max_side=3), k=st.integers(1, 5), m=st.integers(1, 5), seed=seeds)
def test_linear_derivatives(leading, k, m, seed):
    x, weight, bias = normal(seed, (*leading, k), (k, m), (m,))
    check(ag.linear, [x, weight, bias])
    check(ag.linear, [x, weight])
    check(ag.linear_gelu, [x, weight, bias])
    check(ag.linear_gelu, [x, weight])
    check_same(ag.linear_gelu, ag.linear_gelu_composed, [x, weight, bias])
    if leading:
        check_same(ag.linear, lambda x, w, b: x @ w + b, [x, weight, bias])


@given(shape=shapes, seed=seeds, cache=st.sampled_from([1, 5, 1 << 15]))
def test_gelu_with_a_bias_is_that_of_the_sum(shape, seed, cache):
    """Also where a row has more elements than a piece, or several rows have."""
    assume(shape)
    x, bias = normal(seed, shape, shape[-1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ag, "_CACHE", cache)
        check_same(lambda x: ag.gelu(x, ag.xp.asarray(bias)), lambda x: ag.gelu(x + ag.xp.asarray(bias)), [x])


@given(n=st.integers(1, 4), m=st.integers(1, 4), seed=seeds)
def test_linear_map_derivatives(n, m, seed):
    matrix, x = (ag.xp.asarray(a) for a in normal(seed, (n, m), (m, 3)))
    check(lambda x: ag.linear_map(x, lambda a: ag.xp.matmul(matrix, a), lambda a: ag.xp.matmul(matrix.T, a)), [x])


@given(
    batch=st.integers(1, 2), tokens=st.integers(1, 5), heads=st.integers(1, 3), width=st.integers(1, 3), seed=seeds,
    scale=st.sampled_from([0.3, 1.0, 3.0]), mask=masks, block=st.sampled_from([1, 3, 8, 1 << 17]),
    few=st.sampled_from([0, 0, 0, 128]),
)  # fmt: skip
@example(batch=1, tokens=1, heads=1, width=2, seed=0, scale=1.0, mask="none", block=1, few=0)  # all axes but two of size 1
def test_attention_derivatives(batch, tokens, heads, width, seed, scale, mask, block, few):
    (qkv,) = normal(seed, (batch, tokens, 3 * heads * width), scale=scale)
    mask = draw_mask(mask, (tokens, tokens), seed)
    with pytest.MonkeyPatch.context() as patch:  # small blocks, so that scores really are taken piece by piece
        patch.setattr(ag, "_SCORES", block)
        patch.setattr(ag, "_FEW_TOKENS", few)
        check(lambda x: ag.attention(x, heads, mask), [qkv])
        if mask is not None:
            band = mask & ag.xp.asarray(np.tri(tokens, k=1, dtype=bool) & ~np.tri(tokens, k=-2, dtype=bool))
            check_same(lambda x: ag.attention(x, heads, band), lambda x: ag.attention_composed(x, heads, band), [qkv])
        check_same(lambda x: ag.attention(x, heads, mask), lambda x: ag.attention_composed(x, heads, mask), [qkv])


@pytest.mark.parametrize("scale", [1e2, 1e3, 1e4])
def test_attention_of_large_logits_stays_as_small_as_its_composition(scale, monkeypatch):
    """Logits up to 10^9, whose rounding alone is more than 1: probabilities must stay probabilities on the way back too."""
    monkeypatch.setattr(ag, "_FEW_TOKENS", 0)
    (qkv,) = normal(0, (2, 65, 3 * 64), scale=scale)
    (x,) = tensors(qkv.astype(np.float32))
    sizes = []
    for function in (ag.attention, ag.attention_composed):
        out = function(x, 2)
        (g,) = grad((out * out).sum(), [x])
        sizes.append([float(abs(ag.to_numpy(y)).max()) for y in (out, Tensor(g.data[..., 128:]))])
    assert np.isfinite(sizes).all()
    assert sizes[0][0] <= 1.01 * sizes[1][0]
    assert sizes[0][1] <= 3 * sizes[1][1]


# --- 4. Pictures ------------------------------------------------------------------------------------------------------

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
@given(drawn=windowed(), outputs=sizes, seed=seeds, with_bias=st.booleans(), columns=st.sampled_from([1, 30, 1 << 18]))
def test_conv2d_derivatives(drawn, outputs, seed, with_bias, columns):
    shape, kernel, stride, padding = drawn
    inputs = normal(seed, shape, (outputs, shape[1], *kernel), *([(outputs,)] if with_bias else []))
    x, weight = inputs[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ag, "_COLUMNS", columns)
        check(lambda *a: ag.conv2d(*a, stride=stride, padding=padding), inputs)
        check_same(lambda *a: ag.conv2d(*a, stride=stride, padding=padding),
                   lambda *a: ag.conv2d_composed(*a, stride=stride, padding=padding), inputs)  # fmt: skip
        out = ag.to_numpy(ag.conv2d(*tensors(*inputs), stride=stride, padding=padding))
    for row, column, window in windows_by_hand(x, kernel, stride, padding):
        expected = np.einsum("bcij,ocij->bo", window, weight) + (inputs[2] if with_bias else 0)
        close(out[:, :, row, column], expected)


@settings(max_examples=40)
@given(drawn=windowed(), seed=seeds)
def test_unfold_and_fold_are_each_others_derivative(drawn, seed):
    shape, kernel, stride, padding = drawn
    (x,) = normal(seed, shape)
    check(lambda x: ag.unfold(x, kernel, stride, padding, fill=7.0), [x])
    windows = ag.unfold(Tensor(ag.xp.asarray(x)), kernel, stride, padding, fill=7.0)
    for row, column, window in windows_by_hand(x, kernel, stride, padding, 7.0):
        close(windows.data[..., row, column], window)
    (y,) = normal(seed + 1, windows.shape)
    check(lambda y: ag.fold(y, shape, stride, padding), [y])
    plain, folded = ag.unfold(Tensor(x), kernel, stride, padding), ag.fold(Tensor(y), shape, stride, padding)
    assert (plain.data * y).sum() == pytest.approx(float((x * folded.data).sum()))  # <unfold x, y> = <x, fold y>


@settings(max_examples=40)
@given(drawn=windowed(), seed=seeds, count_padding=st.booleans())
def test_pooling_derivatives(drawn, seed, count_padding):
    shape, kernel, stride, padding = drawn
    # No two pixels are near each other, and all are below the 0 of a margin that counts.
    x = np.random.default_rng(seed).permutation(math.prod(shape)).reshape(shape) / -10.0 - 0.1
    check(lambda x: ag.max_pool2d(x, kernel, stride, padding), [x])
    check(lambda x: ag.avg_pool2d(x, kernel, stride, padding, count_padding), [x])
    (tensor,) = tensors(x)
    largest = ag.max_pool2d(tensor, kernel, stride, padding).data
    mean = ag.avg_pool2d(tensor, kernel, stride, padding, count_padding).data
    fill = 0.0 if count_padding else np.nan
    for row, column, window in windows_by_hand(x, kernel, stride, padding, fill):
        close(mean[:, :, row, column], np.nanmean(window, axis=(2, 3)))
    for row, column, window in windows_by_hand(x, kernel, stride, padding, -np.inf):
        close(largest[:, :, row, column], window.max(axis=(2, 3)))


def test_max_pooling_shares_its_gradient_among_equals():
    (x,) = tensors(np.ones((1, 1, 2, 3)))
    (g,) = grad(ag.max_pool2d(x, 2, 1).sum(), [x])
    close(g, np.array([[[[0.25, 0.5, 0.25], [0.25, 0.5, 0.25]]]]))
    (x,) = tensors(np.zeros((1, 1, 2, 2)))  # and a margin has no part in it
    (g,) = grad(ag.max_pool2d(x, 2, 1, 1).sum(), [x])
    close(g, np.full((1, 1, 2, 2), 1 + 0.5 + 0.5 + 0.25))


@settings(max_examples=30)
@given(shape=array_shapes(min_dims=4, max_dims=4, max_side=3), seed=seeds, factor=st.integers(1, 3),
       height=st.integers(1, 7), width=st.integers(1, 7))  # fmt: skip
def test_resizing_derivatives(shape, seed, factor, height, width):
    (x,) = normal(seed, shape)
    check(lambda x: ag.upsample_nearest(x, factor), [x])
    check(lambda x: ag.resize_bilinear(x, height, width), [x])
    (tensor,) = tensors(x)
    close(ag.upsample_nearest(tensor, factor), x.repeat(factor, 2).repeat(factor, 3))
    resized = ag.to_numpy(ag.resize_bilinear(tensor, height, width))
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

    def trained(x, weight, bias):
        return ag.batch_norm(x, *ag.batch_statistics(x), weight, bias, eps=0.01)

    check(trained, [x, weight, bias])
    y = ag.to_numpy(ag.batch_norm(Tensor(ag.xp.asarray(x)), *ag.batch_statistics(Tensor(ag.xp.asarray(x))),
                                  *tensors(np.ones(shape[1]), np.zeros(shape[1]))))  # fmt: skip
    variance = x.var(axis=(0, 2, 3))
    close(y.mean(axis=(0, 2, 3)), np.zeros(shape[1]))
    close(y.var(axis=(0, 2, 3)), variance / (variance + 1e-5), 1e-9)
    running = normal(seed + 1, (1, shape[1], 1, 1), (1, shape[1], 1, 1))
    check(lambda x, mean, root: ag.batch_norm(x, mean, root * root, *tensors(weight, bias), eps=0.01), [x, *running])


@settings(max_examples=30)
@given(outputs=st.integers(1, 4), rest=array_shapes(min_dims=1, max_dims=3, max_side=3), seed=seeds)
def test_spectral_norm_derivatives(outputs, rest, seed):
    weight, u = normal(seed, (outputs, *rest), (outputs,))
    u /= np.linalg.norm(u)
    assume(np.linalg.norm(u @ weight.reshape(outputs, -1)) > 0.1)
    for _ in range(300):
        u = ag.to_numpy(ag.power_iteration(ag.xp.asarray(weight), ag.xp.asarray(u)))
    values = np.linalg.svd(weight.reshape(outputs, -1), compute_uv=False)
    (tensor,), direction = tensors(weight), ag.xp.asarray(u)
    if len(values) == 1 or values[1] < 0.9 * values[0]:
        close(ag.spectral_norm(tensor, direction), weight / values[0], 1e-6)
    check(lambda w: ag.spectral_norm(w, direction), [weight])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ag.conv2d(*tensors(np.ones((1, 2, 4, 4)), np.ones((3, 3, 2, 2)))), r"conv2d of shapes .*expected \(B, C"),
        (lambda: ag.conv2d(*tensors(np.ones((1, 2, 2, 2)), np.ones((3, 2, 3, 3)))), "windows of 3x3 do not fit into 2x2"),
        (lambda: ag.max_pool2d(*tensors(np.ones((1, 2, 2, 2))), 3, 1), "max_pool2d of shapes .* do not fit"),
    ],
)
def test_errors_of_pictures_name_operation_and_shapes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_operations_on_pictures_agree_with_pytorch():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    x, weight, bias = normal(0, (2, 3, 9, 8), (4, 3, 3, 2), (4,))
    scale, shift = normal(1, (3,), (3,))
    for ours, theirs, inputs in (
        (lambda x, w, b: ag.conv2d(x, w, b, (2, 1), (1, 0)), lambda x, w, b: functional.conv2d(x, w, b, (2, 1), (1, 0)),
         (x, weight, bias)),
        (lambda x: ag.max_pool2d(x, 3, 2, 1), lambda x: functional.max_pool2d(x, 3, 2, 1), (x,)),
        (lambda x: ag.avg_pool2d(x, 3, 2, 1), lambda x: functional.avg_pool2d(x, 3, 2, 1), (x,)),
        (lambda x: ag.avg_pool2d(x, 3, 1, 1, False),
         lambda x: functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False), (x,)),
        (lambda x: ag.upsample_nearest(x, 2), lambda x: functional.interpolate(x, scale_factor=2), (x,)),
        (lambda x: ag.resize_bilinear(x, 23, 5),
         lambda x: functional.interpolate(x, (23, 5), mode="bilinear", align_corners=False), (x,)),
        (lambda x, w, b: ag.batch_norm(x, *ag.batch_statistics(x), w, b),
         lambda x, w, b: functional.batch_norm(x, None, None, w, b, training=True), (x, scale, shift)),
    ):  # fmt: skip
        mine, leaves = tensors(*inputs), [torch.tensor(a, requires_grad=True) for a in inputs]
        y, z = ours(*mine), theirs(*leaves)
        close(y, z.detach().numpy())
        gradients = torch.autograd.grad((z * z).sum(), leaves)
        for a, b in zip(grad((y * y).sum(), mine), gradients, strict=True):
            close(a, b.numpy(), 1e-9)


# --- 5. The engine ----------------------------------------------------------------------------------------------------


def test_deep_graphs_do_not_recurse():
    """20,000 operations in a row: first and second derivative, and the freeing of the graph, need no deep stack."""
    (x,) = tensors([0.5])
    y = x
    for _ in range(20_000):
        y = y * 0.9999
    (g,) = grad(y, [x], create_graph=True)
    close(g, [0.9999**20_000])
    y = x
    for _ in range(3_000):
        y = ag.tanh(y) * 1.1
    (g,) = grad(y, [x], create_graph=True)
    (h,) = grad(g, [x])
    assert np.isfinite(h.item())
    del y, g


def test_each_node_is_visited_once():
    """2^400 paths lead through this graph; walking each of them would never end."""
    (x,) = tensors([1.0])
    y = x
    for _ in range(400):
        y = (y + y) * 0.5
    close(grad(y, [x])[0], [1.0])


def test_a_gradient_is_summed_over_all_uses_without_touching_others():
    """Accumulating in place must not write into an array that something else still holds."""
    (a,) = normal(0, (3, 4))

    def function(x):
        y = x * 2
        z = y + x  # the gradient of z is handed to y and x unchanged
        return z * y + ag.exp(z) + y.reshape(4, 3).transpose(1, 0).reshape(3, 4) + x[:, ::-1] + z

    check(function, [a])
    (x,) = tensors(a)
    upstream = Tensor(ag.xp.ones((3, 4)))
    first = grad(function(x), [x], upstream)[0]
    close(upstream, np.ones((3, 4)))
    close(first, grad(function(x), [x], upstream, create_graph=True)[0])


def test_inputs_in_the_middle_unused_inputs_and_repeated_inputs():
    x, unused = tensors([2.0], np.ones((2, 2)))
    middle = x * x
    gradients = grad(middle**3, [middle, x, unused, x])
    close(gradients[0], [48.0])
    close(gradients[1], [192.0])
    close(gradients[2], np.zeros((2, 2)))
    close(gradients[3], [192.0])


def test_grad_says_what_is_wrong():
    (x,) = tensors([1.0, 2.0])
    assert grad(x * 2, []) == []
    with pytest.raises(ValueError, match=r"output of shape \(2,\) is not a single number"):
        grad(x * 2, [x])
    with pytest.raises(ValueError, match="output_grad of shape"):
        grad(x * 2, [x], Tensor(ag.xp.ones(3)))
    with pytest.raises(ValueError, match="requires_grad=True"):
        grad((x * 2).sum(), [Tensor(ag.xp.ones(2))])
    y = (x * 2).sum()
    grad(y, [x])
    with pytest.raises(RuntimeError, match="let go"):
        grad(y, [x])
    y = (x * x).sum()
    close(grad(y, [x], create_graph=True)[0], grad(y, [x])[0])


def test_no_grad_and_detach_remember_nothing():
    (x,) = tensors([3.0])
    with ag.no_grad():
        assert not (x * x).requires_grad
        with ag.recording(True):
            assert (x * x).requires_grad
        assert not (x * x).requires_grad  # as it was before, not as it is at first
    assert (x * x).requires_grad
    close(grad(x * x.detach(), [x])[0], [3.0])


def test_modes_belong_to_their_thread():
    seen = []
    with ag.no_grad():
        thread = threading.Thread(target=lambda: seen.append((tensors([1.0])[0] * 2).requires_grad))
        thread.start()
        thread.join()
    assert seen == [True]


@on_cpu
def test_memory_falls_while_walking_back():
    """A chain holds an array for each operation on the way forward, and next to nothing more on the way back."""
    size, depth = 100_000, 50
    (x,) = tensors(np.ones(size) * 0.1)
    tracemalloc.start()
    y = x
    for _ in range(depth):
        y = ag.exp(y * 0.1)
    loss = y.sum()
    del y
    forward, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    grad(loss, [x])
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    array = size * 8
    assert forward > depth * array
    assert peak < forward + 6 * array
    assert now < 4 * array


def test_a_profile_counts_every_operation_once_and_changes_nothing():
    (x,) = tensors(np.ones((4, 6)))

    def numbers():
        y = ag.gelu(x @ x.T) + ag.softmax(x.sum(axis=1)).sum()
        return y.sum(), grad(y.sum(), [x])[0]

    plain = numbers()
    with ag.profile() as times, ag.profile() as inner:
        profiled = numbers()
    for a, b in zip(plain, profiled, strict=True):
        np.testing.assert_array_equal(ag.to_numpy(a), ag.to_numpy(b))
    calls = {key: entry[1] for key, entry in times.items()}
    assert calls == {("matmul", "forward"): 1, ("transpose", "forward"): 1, ("gelu", "forward"): 1,
                     ("softmax", "forward"): 1, ("reduce_sum", "forward"): 4, ("add", "forward"): 1,
                     ("matmul", "backward"): 2, ("transpose", "backward"): 1, ("gelu", "backward"): 1,
                     ("softmax", "backward"): 1, ("reduce_sum", "backward"): 3, ("add", "backward"): 2}  # fmt: skip
    assert times["matmul", "forward"][2] == 4 * 4 * 8
    assert inner.keys() == times.keys()
    assert all(seconds > 0 for seconds, _, _ in times.values())
    numbers()
    assert {key: entry[1] for key, entry in times.items()} == calls  # outside of the context nothing is counted
    lines = ag.profile_table(times).splitlines()
    assert len(lines) == 1 + len(times)
    assert lines[0].split() == ["operation", "direction", "seconds", "share", "calls", "MB"]
    seconds = [float(line.split()[2]) for line in lines[1:]]
    assert seconds == sorted(seconds, reverse=True)
    assert sum(float(line.split()[3].rstrip("%")) for line in lines[1:]) == pytest.approx(100, abs=1)


def test_float32_by_default_float64_on_request():
    assert Tensor([1, 2]).dtype == np.float32
    assert Tensor(np.arange(3)).dtype == np.float32
    assert Tensor([1.0], dtype=np.float64).dtype == np.float64
    for dtype in (np.float32, np.float64):
        x = Tensor(ag.xp.ones((2, 4, 12), dtype), requires_grad=True)
        weight = Tensor(ag.xp.ones(4, dtype))
        y = ag.gelu(ag.layer_norm(ag.attention(x * 0.5 + 1, 2), weight, weight)) ** 2
        y = ag.softmax(y).mean() + ag.sqrt(ag.softplus(ag.sigmoid(y))).max()
        (g,) = grad(y, [x], create_graph=True)
        assert y.dtype == g.dtype == grad((g * g).sum(), [x])[0].dtype == dtype


def test_gradient_check_finds_a_derivative_that_is_wrong_when_recorded():
    def wrong(x):
        return ag._result(x.data * 1.0, (x, lambda g: g * (1.001 if ag._mode.enabled else 1.0)))

    assert gradient_check(wrong, normal(0, (3,)), order=1) > 1e-4


@pytest.mark.parametrize("order", [1, 2])
def test_gradient_check_finds_a_wrong_derivative(order):
    """A derivative that is off by a thousandth, or one that is right but not differentiable again, is reported."""

    def wrong(x):
        vjp = (lambda g: g * 1.001) if order == 1 else (lambda g: Tensor(g.data * 3 * x.data * x.data))
        return ag._result(x.data if order == 1 else x.data**3, (x, vjp))

    (x,) = normal(0, (3,))
    assert gradient_check(wrong, [x], order=order) > 1e-4
    if order == 2:
        assert gradient_check(wrong, [x], order=1) < AGREES
    with pytest.raises(TypeError, match="float64"):
        gradient_check(wrong, [x.astype(np.float32)])


@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.9, 0.999)])
@given(seed=seeds, rate=st.floats(1e-4, 0.5), scale=st.floats(0.1, 2), cache=st.integers(1, 8))
def test_adam_follows_its_formula(seed, rate, scale, cache, betas, decay):
    """Minimise 1/2 sum c (p - target)^2, beside algorithm 1 of the paper written out in plain Python numbers.

    The gradient comes in two parts, for parameters of two shapes that are updated in pieces of `cache`.
    """
    c, target, start = (x.tolist() for x in normal(seed, 7, 7, 7))
    parameters = tensors(np.array(start[0]), np.array(start[1:]).reshape(2, 3))
    adam, plain, m, v = ag.Adam(parameters, betas, decay=decay), list(start), [0.0] * 7, [0.0] * 7
    average = list(start)
    for t in range(1, 8):
        p = ag.concatenate([x.reshape(-1) for x in parameters])
        loss = ((p - ag.xp.asarray(target)) ** 2 * ag.xp.asarray(c)).sum() * 0.5
        gradients = grad(loss, parameters)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ag, "_CACHE", cache)
            for share in (0.25, 0.75):
                adam.add([g * share for g in gradients])
            adam.step(rate, scale)
        for i in range(7):
            g = scale * c[i] * (plain[i] - target[i])
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g * g
            plain[i] -= rate * (m[i] / (1 - betas[0] ** t)) / (math.sqrt(v[i] / (1 - betas[1] ** t)) + 1e-8)
            average[i] = (decay or 0) * average[i] + (1 - (decay or 0)) * plain[i]
    for flat, expected in ((adam.p, plain), (adam.v, v), (adam.m, m), (adam.average, average)):
        if flat is not None:
            np.testing.assert_allclose(ag.to_numpy(flat), expected, rtol=1e-9, atol=1e-12)
    assert (adam.m is None, adam.average is None) == (not betas[0], decay is None)
    for part, x in zip(adam.parts(adam.p), parameters, strict=True):
        np.testing.assert_array_equal(ag.to_numpy(part), ag.to_numpy(x))


def test_adam_finds_a_minimum():
    (p,) = tensors(np.array([3.0, -2.0]))
    adam = ag.Adam([p], betas=(0.9, 0.999))
    for i in range(2000):
        adam.add(grad(((p - ag.xp.asarray([1.0, 2.0])) ** 2).sum(), [p]))
        adam.step(0.05 * (1 - i / 2000))
    close(p, [1.0, 2.0], 1e-3)


@given(size=st.integers(1, 50), seed=seeds, bound=st.floats(0.01, 100))
def test_clipping_by_global_norm(size, seed, bound):
    (x,) = normal(seed, size)
    expected = math.sqrt((x**2).sum())
    factor, norm = ag.clip_by_global_norm(ag.xp.asarray(x), bound)
    assert float(norm) == pytest.approx(expected)
    assert float(factor) * expected <= bound
    assert float(factor) == (1 if expected + 1e-6 <= bound else pytest.approx(bound / expected, rel=1e-3 / expected))


def test_choosing_a_device():
    with pytest.raises(ValueError, match="auto, cpu or gpu"):
        ag.use_device("tpu")
    if DEVICE == "cpu":
        with pytest.raises(RuntimeError, match="no GPU to use"):
            ag.use_device("gpu")
    assert ag.use_device("auto") == DEVICE


# --- 6. The networks --------------------------------------------------------------------------------------------------


@given(batch=st.integers(1, 2), channels=st.integers(1, 3), height=st.integers(1, 3), width=st.integers(1, 3),
       factor=st.integers(1, 3), seed=seeds)  # fmt: skip
def test_pixel_shuffle_is_its_definition_and_has_an_inverse(batch, channels, height, width, factor, seed):
    (x,) = normal(seed, (batch, channels * factor**2, height, width))
    y = ag.pixel_shuffle(Tensor(ag.xp.asarray(x)), factor)
    defined = np.empty((batch, channels, height * factor, width * factor))
    for b, c, h, w in np.ndindex(batch, channels, height, width):
        for i, j in np.ndindex(factor, factor):
            defined[b, c, h * factor + i, w * factor + j] = x[b, c * factor**2 + i * factor + j, h, w]
    close(y, defined, 0)
    close(ag.pixel_unshuffle(y, factor), x, 0)
    close(ag.pixel_shuffle(ag.pixel_unshuffle(y, factor), factor), defined, 0)
    check(lambda x: ag.pixel_shuffle(x, factor), [x])
    check(lambda x: ag.pixel_unshuffle(x, factor), [defined])


def test_upscale_puts_each_token_into_four_neighbours_around_its_place():
    x = np.arange(2 * 9 * 8, dtype=np.float32).reshape(2, 9, 8)  # 3x3 tokens of width 8
    y = ag.to_numpy(transgan.upscale(Tensor(ag.xp.asarray(x))))  # 6x6 tokens of width 2
    assert y.shape == (2, 36, 2)
    for b, row, column, i, j, c in np.ndindex(2, 3, 3, 2, 2, 2):
        assert y[b, (2 * row + i) * 6 + 2 * column + j, c] == x[b, row * 3 + column, 4 * c + 2 * i + j]


def as_function(network, call, seed, scale=0.4):
    """(function, arrays): call(network) as a function of all the network's parameters, which start at random values.

    Values as large as these, unlike those of training, make every derivative large enough to be seen.
    """
    parameters = network.parameters()

    def function(*values):
        for name, value in zip(parameters, values, strict=True):
            *path, last = name.split(".")
            setattr(functools.reduce(lambda m, p: m[int(p)] if p.isdigit() else getattr(m, p), path, network), last, value)
        return call(network)

    return function, normal(seed, *(p.shape for p in parameters.values()), scale=scale)


def small_generator(**options):
    """Its stages are 64, 16 and 4 wide: in layer norms of width 2 differences are too coarse to check by."""
    return transgan.Generator(8, 64, (1, 1, 1), np.random.default_rng(0), num_heads=2, dtype=np.float64, **options)


def small_discriminator():
    return transgan.Discriminator(8, 4, 8, 2, np.random.default_rng(1), num_heads=2, dtype=np.float64)


LAYERS = {
    "linear": (lambda init: transgan.Linear(3, 5, init), 3),
    "linear without bias": (lambda init: transgan.Linear(3, 5, init, bias=False), 3),
    "layer norm": (lambda init: transgan.LayerNorm(4, init), 4),
    "attention": (lambda init: transgan.Attention(4, 2, init), 4),
    "mlp": (lambda init: transgan.MLP(3, init), 3),
    "block": (lambda init: transgan.Block(4, 2, init), 4),
    "stage": (lambda init: transgan.Stage(2, 4, 2, 2, init), 4),
}


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=5)
@given(seed=seeds, batch=st.integers(1, 2))
def test_layer_derivatives(name, seed, batch):
    make, width = LAYERS[name]
    layer = make(transgan.Init(np.random.default_rng(seed), "uniform", np.float64))
    parameters = len(layer.parameters())
    (x,) = normal(seed, (batch, 4, width))
    holder = []
    function, values = as_function(layer, lambda layer: layer(holder[0]), seed)

    def of_input_and_parameters(x, *values):
        holder[:] = [x]
        return function(*values)

    assert len(values) == parameters > 0
    check(of_input_and_parameters, [x, *values], coordinates=3)


def test_generator_derivatives():
    z = Tensor(ag.xp.asarray(normal(3, (2, 64))[0]))
    check(*as_function(small_generator(), lambda g: g(z), seed=4), coordinates=2)


def test_super_resolution_error_derivatives():
    real = ag.xp.asarray(normal(3, (2, 3, 8, 8))[0])

    def call(generator):
        return transgan.super_resolution_error(generator, real)

    check(*as_function(small_generator(co_training=True), call, seed=4), coordinates=2)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_what_is_restored_comes_from_the_second_stages_resolution(stages):
    generator = transgan.Generator(8, 128, (1,) * stages, np.random.default_rng(0), 2, np.float64, co_training=True)
    real, side = ag.xp.asarray(normal(3, (2, 3, 8, 8))[0]), 2 * generator.start
    small = real.reshape(2, 3, side, 8 // side, side, 8 // side).mean(axis=(3, 5))
    restored = generator.super_resolve(Tensor(small)).data
    close(transgan.super_resolution_error(generator, real), ((restored - real) ** 2).mean(axis=(1, 2, 3)))


def test_discriminator_derivatives():
    x = Tensor(ag.xp.asarray(normal(3, (2, 3, 8, 8))[0]))
    check(*as_function(small_discriminator(), lambda d: d(x), seed=4), coordinates=2)


@pytest.mark.parametrize("loss", transgan.LOSSES)
def test_discriminator_loss_derivatives(loss):
    """With wgangp-eps the first derivative is one of the penalty, so a second of the network; the second, a third."""
    real, fake, mix = (ag.xp.asarray(x) for x in normal(5, (2, 3, 8, 8), (2, 3, 8, 8), (2, 1, 1, 1)))

    def call(discriminator):
        scores = transgan.discriminator_scores(discriminator, real, fake, mix, loss)
        return transgan.discriminator_loss(scores, loss)[0]

    check(*as_function(small_discriminator(), call, seed=6), coordinates=2, step=3e-6)


@pytest.mark.parametrize("loss", transgan.LOSSES)
def test_generator_loss_derivatives(loss):
    z = Tensor(ag.xp.asarray(normal(7, (2, 64))[0]))
    discriminator = small_discriminator()
    function, values = as_function(discriminator, lambda d: None, seed=8)
    function(*(Tensor(ag.xp.asarray(x)) for x in values))

    def call(generator):
        return transgan.generator_loss(discriminator(generator(z)).reshape(1, -1), loss)

    check(*as_function(small_generator(), call, seed=9), coordinates=2, order=1)


def test_losses_are_their_formulas():
    scores = np.array([[0.5, -2.0, 3.0], [1.5, -0.5, 0.25], [0.1, 1.0, 2.5]])
    real, fake, norms = scores
    tensor = Tensor(ag.xp.asarray(scores))
    loss, penalty = transgan.discriminator_loss(tensor, "wgangp-eps")
    close(penalty, 10 * np.mean((norms - 1) ** 2))
    close(loss, fake.mean() - real.mean() + 10 * np.mean((norms - 1) ** 2) + 1e-3 * real.mean() ** 2)
    hinge = np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean()
    close(transgan.discriminator_loss(tensor, "hinge")[0], hinge)
    standard = -np.log(1 / (1 + np.exp(-real))).mean() - np.log(1 - 1 / (1 + np.exp(-fake))).mean()
    close(transgan.discriminator_loss(tensor, "standard")[0], standard)
    for loss in ("wgangp-eps", "hinge"):
        close(transgan.generator_loss(tensor[1:2], loss), -fake.mean())
    close(transgan.generator_loss(tensor[1:2], "standard"), -np.log(1 / (1 + np.exp(-fake))).mean())
    close(transgan.gradient_penalty(Tensor(ag.xp.asarray(norms)), target=2.0), 2.5 * np.mean((norms - 2) ** 2))
    with pytest.raises(ValueError, match="loss must be one of wgangp-eps, hinge, standard"):
        transgan.discriminator_loss(tensor, "mse")


@given(seed=seeds, batch=st.integers(1, 3))
def test_what_is_asked_of_a_discriminator_that_is_known(seed, batch):
    """Of D(x) = |x|^2 / 2, whose slope is x itself, when every picture of row r comes in r + 2 times as bright."""
    real, fake, mix = normal(seed, (batch, 3, 2, 2), (batch, 3, 2, 2), (batch, 1, 1, 1))

    def discriminator(x):
        return (x * x).sum(axis=(1, 2, 3)) * 0.5

    def brighter(x, row):
        return x * (row + 2)

    arrays = map(ag.xp.asarray, (real, fake, mix))
    found = transgan.discriminator_scores(discriminator, *arrays, "wgangp-eps", brighter)
    between = mix * real + (1 - mix) * fake
    squares = [(x**2).sum(axis=(1, 2, 3)) for x in (real, fake, between)]
    close(found, np.stack([2**2 * squares[0] / 2, 3**2 * squares[1] / 2, 4**2 * np.sqrt(squares[2])]))


def test_a_flat_discriminator_has_a_finite_penalty_gradient():
    """Where D does not depend on its picture the slope is 0, and the norm there has no derivative: not a NaN."""
    (x,) = normal(0, (2, 3, 8, 8))
    (w,) = tensors(0.0)
    norms = transgan.slope_norm(lambda pictures: (pictures * w).sum(axis=(1, 2, 3)), ag.xp.asarray(x))
    assert np.isfinite(ag.to_numpy(grad(transgan.gradient_penalty(norms), [w])[0])).all()


COUNTS = {"S": 18_639_531, "M": 33_083_619, "L": 74_318_163, "XL": 133_592_515}  # paper.md's table of sizes


def count(network):
    return sum(p.size for p in network.parameters().values())


class Zeros:
    """Stands in for a random generator where only shapes matter."""

    standard_normal = staticmethod(np.zeros)

    def uniform(self, low, high, shape):
        return np.zeros(shape, np.float32)


@pytest.mark.parametrize("size", transgan.SIZES)
def test_parameter_counts_to_the_last_one(size):
    dimensions = transgan.SIZES[size]
    generator = count(transgan.Generator(32, dimensions.embed_dim, dimensions.depths, Zeros()))
    discriminator = count(transgan.Discriminator(32, 4, dimensions.disc_embed_dim, dimensions.disc_depth, Zeros()))
    if size != "tiny":
        assert (generator, discriminator) == (COUNTS[size], 12_458_497)
    totals = re.findall(r"total +([\d,]+)", transgan.summary(transgan.Options(size=size)))
    assert [int(total.replace(",", "")) for total in totals] == [generator, discriminator]


def test_the_papers_sizes_of_pictures():
    """48x48 starts from 12x12 in three stages, 64x64 from 8x8 in four, of 5, 4, 4, 2 blocks for XL; patches make 8x8."""
    for preset, start, depths, widths in (
        ("cifar10-S", 8, (5, 2, 2), (384, 96, 24)),
        ("stl10-XL", 12, (5, 4, 2), (1024, 256, 64)),
        ("celeba-XL", 8, (5, 4, 4, 2), (1024, 256, 64, 16)),
    ):
        options, _ = transgan.choose_options(transgan.make_parser().parse_args(["--preset", preset]))
        size, side = transgan.SIZES[options.size], options.image_size
        assert transgan.stage_depths(options.size, side) == depths
        generator = transgan.Generator(side, size.embed_dim, depths, Zeros())
        assert generator.start == start
        positions = [stage.position.shape for stage in generator.stages]
        assert positions == [(1, (start * 2**k) ** 2, width) for k, width in enumerate(widths)]
        assert [len(stage.blocks) for stage in generator.stages] == list(depths)
        discriminator = transgan.Discriminator(side, options.patch_size, size.disc_embed_dim, size.disc_depth, Zeros())
        assert discriminator.position.shape == (1, 65, 384)
        totals = [int(x.replace(",", "")) for x in re.findall(r"total +([\d,]+)", transgan.summary(options))]
        assert totals == [count(generator), count(discriminator)]
    assert transgan.stage_depths("M", 64) == (5, 2, 2, 2)
    assert transgan.stage_depths("S", 64) == (5, 2, 2)  # 384 / 64 = 6 does not divide among four heads


def test_summary_counts_multiply_adds_as_a_forward_pass_makes_them(monkeypatch):
    made, linear, attention, matmul = [], ag.linear, ag.attention, Tensor.__matmul__

    def counting_linear(x, weight, bias=None):
        made.append(x.size * weight.shape[1])
        return linear(x, weight, bias)

    def counting_attention(qkv, num_heads, mask=None):
        batch, tokens, width = qkv.shape
        made.append(2 * batch * tokens**2 * width // 3)  # q k^T and p v
        return attention(qkv, num_heads, mask)

    def counting_matmul(a, b):
        result = matmul(a, b)
        made.append(result.size * a.shape[-1])
        return result

    monkeypatch.setattr(Tensor, "__matmul__", counting_matmul)
    monkeypatch.setattr(ag, "linear", counting_linear)
    monkeypatch.setattr(ag, "attention", counting_attention)
    size, totals = transgan.SIZES["tiny"], []
    with ag.no_grad():
        transgan.Generator(16, size.embed_dim, size.depths, Zeros())(Tensor(ag.xp.zeros((1, 128), np.float32)))
        totals.append(sum(made))
        made.clear()
        pictures = Tensor(ag.xp.zeros((1, 3, 16, 16), np.float32))
        transgan.Discriminator(16, 4, size.disc_embed_dim, size.disc_depth, Zeros())(pictures)
        totals.append(sum(made))
    table = transgan.summary(transgan.Options(size="tiny", image_size=16, patch_size=4))
    assert [int(x.replace(",", "")) for x in re.findall(r"total .* ([\d,]+)$", table, re.M)] == totals


@settings(max_examples=20)
@given(batch=st.integers(1, 2), tokens=st.integers(1, 5), heads=st.integers(1, 3), seed=seeds, masked=st.booleans(),
       draw=st.data())  # fmt: skip
def test_a_block_for_its_first_tokens_alone_is_the_whole_blocks_beginning(batch, tokens, heads, seed, masked, draw):
    n = draw.draw(st.integers(1, tokens))
    block = transgan.Block(4 * heads, heads, transgan.Init(np.random.default_rng(seed), "uniform", np.float64))
    mask = draw_mask("some", (tokens, tokens), seed) if masked else None
    (x,) = normal(seed, (batch, tokens, 4 * heads))
    holder = []
    functions = [as_function(block, call, seed) for call in (lambda block: block(holder[0], mask, n),
                                                             lambda block: block(holder[0], mask)[:, :n])]  # fmt: skip

    def of_input_and_parameters(function):
        return lambda x, *values: holder.__setitem__(slice(None), [x]) or function(*values)

    (few, values), (whole, _) = functions
    check_same(of_input_and_parameters(few), of_input_and_parameters(whole), [x, *values], 1e-8)
    check(of_input_and_parameters(few), [x, *values], order=1, coordinates=2)


@given(seed=st.integers(0, 100))
@settings(max_examples=3)
def test_initial_values(seed):
    normal_rule = transgan.Init(np.random.default_rng(seed), "normal")
    weight, bias = (ag.to_numpy(x) for x in normal_rule.linear(400, 300))
    assert weight.dtype == np.float32
    assert (bias == 0).all()
    assert weight.std() == pytest.approx(0.02, rel=0.02)
    assert abs(weight.mean()) < 3e-4
    weight, bias = (ag.to_numpy(x) for x in transgan.Init(np.random.default_rng(seed), "uniform").linear(400, 300))
    for x, tolerance in ((weight, 0.02), (bias, 0.2)):
        assert np.abs(x).max() <= 0.05
        assert x.std() == pytest.approx(0.05 / math.sqrt(3), rel=tolerance)


def test_networks_refuse_pictures_they_cannot_make_or_cut():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="picture of 30 pixels cannot be doubled up to in 3 stages"):
        transgan.Generator(30, 64, (1, 1, 1), rng)
    with pytest.raises(ValueError, match="embed_dim 40 must divide"):
        transgan.Generator(32, 40, (1, 1, 1), rng)
    with pytest.raises(ValueError, match="patches of 5 pixels do not tile a picture of 32"):
        transgan.Discriminator(32, 5, 64, 1, rng)


# --- 7. Training ------------------------------------------------------------------------------------------------------


def make_small(patch):
    """Make the size `tiny` smaller still, and `shapes` a few pictures of 8x8, so that a step takes milliseconds."""
    patch.setitem(transgan.SIZES, "tiny", transgan.Size(64, (1, 1, 1), 16, 2))
    patch.setattr(data, "SHAPES_COUNT", 40)
    patch.setattr(transgan, "JUDGED", 16)


@pytest.fixture
def small(monkeypatch):
    make_small(monkeypatch)


def small_trainer(threads=None, dtype=np.float32, **options):
    chosen = {"dataset": "shapes", "size": "tiny", "image_size": 8, "patch_size": 2, "steps": 6, "disc_steps": 2,
              "batch_size": 6, "gen_batch_size": 5, "learning_rate": 1e-3, "sr_weight": 2.0,
              "locality": "2:800"}  # fmt: skip
    options = transgan.Options(**(chosen | options))
    return transgan.Trainer(options, data.draw_shapes(40, options.image_size), threads, dtype)


def state_of(trainer):
    return {name: ag.to_numpy(x).copy() for name, x in trainer._state().items()}


def assert_same_state(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=tolerance, atol=tolerance, err_msg=name)


POLICY = "translation,cutout,color"


@st.composite
def draws_of_augmentation(draw, side):
    batch, seed = draw(st.integers(1, 3)), draw(seeds)
    return transgan.draw_augmentation((batch,), side, np.random.default_rng(seed)), seed


def augmented(x, name, draws):
    return ag.to_numpy(transgan.diff_augment(Tensor(ag.xp.asarray(x)), name, ag.xp.asarray(draws)))


@pytest.mark.parametrize("policy", ["translation", "cutout", "color", POLICY, "color,cutout,translation"])
@settings(max_examples=25)
@given(drawn=draws_of_augmentation(6))
def test_augmentation_derivatives(policy, drawn):
    draws, seed = drawn
    (x,) = normal(seed, (len(draws), 3, 6, 6))
    check(lambda x: transgan.diff_augment(x, policy, ag.xp.asarray(draws)), [x])


@given(drawn=draws_of_augmentation(10))
def test_translation_moves_each_picture_by_its_draw(drawn):
    draws, seed = drawn
    (x,) = normal(seed, (len(draws), 3, 10, 10))
    moved = augmented(x, "translation", draws)
    assert np.abs(draws[:, 3:5]).max() <= 2
    for picture, result, (down, right) in zip(x, moved, draws[:, 3:5].astype(int), strict=True):
        for i, j in np.ndindex(10, 10):
            inside = 0 <= i - down < 10 and 0 <= j - right < 10
            np.testing.assert_array_equal(result[:, i, j], picture[:, i - down, j - right] if inside else 0)


@pytest.mark.parametrize("side", [7, 8, 16])
@given(row=st.integers(0, 16), column=st.integers(0, 16))
def test_cutout_clears_a_square_of_half_the_side(side, row, column):
    assume(max(row, column) <= side)
    draws = np.array([[0, 1, 1, 0, 0, row, column], [0, 1, 1, 0, 0, -2 * side, -2 * side]], float)
    cut, whole = augmented(np.ones((2, 3, side, side)), "cutout", draws)
    size = (side + 1) // 2
    expected = np.ones((3, side, side))
    expected[:, max(0, row - size // 2) : max(0, row - size // 2 + size),
             max(0, column - size // 2) : max(0, column - size // 2 + size)] = 0  # fmt: skip
    np.testing.assert_array_equal(cut, expected)
    if size // 2 <= min(row, column) and max(row, column) <= side - (size - size // 2):
        assert (cut == 0).sum() == 3 * size**2
    np.testing.assert_array_equal(whole, 1)


@given(drawn=draws_of_augmentation(5))
def test_color_is_its_formulas(drawn):
    draws, seed = drawn
    (x,) = normal(seed, (len(draws), 3, 5, 5))
    brightness, saturation, contrast = (draws[:, i, None, None, None] for i in range(3))
    y = x + brightness
    y = (y - y.mean(1, keepdims=True)) * saturation + y.mean(1, keepdims=True)
    y = (y - y.mean((1, 2, 3), keepdims=True)) * contrast + y.mean((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(augmented(x, "color", draws), y, atol=1e-12)
    np.testing.assert_allclose(y.mean((1, 2, 3)), x.mean((1, 2, 3)) + draws[:, 0], atol=1e-12)


@given(drawn=draws_of_augmentation(8))
def test_augmentation_is_a_pure_function_of_each_picture_and_its_draw(drawn):
    draws, seed = drawn
    (x,) = normal(seed, (len(draws), 3, 8, 8))
    together = augmented(x, POLICY, draws)
    np.testing.assert_array_equal(together, augmented(x, POLICY, draws))
    for i in range(len(x)):
        np.testing.assert_allclose(augmented(x[i : i + 1], POLICY, draws[i : i + 1])[0], together[i], atol=1e-12)
    np.testing.assert_array_equal(augmented(x, "none", draws), x)


def test_what_augmentation_draws():
    rng = np.random.default_rng(0)
    draws = transgan.draw_augmentation((20_000,), 32, rng)
    for column, (low, high) in enumerate([(-0.5, 0.5), (0, 2), (0.5, 1.5)]):
        assert low <= draws[:, column].min() < draws[:, column].max() <= high
        assert draws[:, column].mean() == pytest.approx((low + high) / 2, abs=0.02)
    assert set(draws[:, 3]) == set(draws[:, 4]) == set(range(-6, 7))
    for side, furthest in ((7, 1), (8, 2)):  # a fifth of the side, rounded
        assert np.abs(transgan.draw_augmentation((100,), side, rng)[:, 3:5]).max() == furthest
    centres = [transgan.draw_augmentation((2,), 32, rng)[..., 5:] for _ in range(3000)]
    cut = [centre for centre in centres if (centre >= 0).all()]
    assert len(cut) / len(centres) == pytest.approx(0.3, abs=0.03)
    assert set(np.ravel(cut)) == set(range(33))
    for columns in (draws[:, :5], np.concatenate(cut)):  # no two numbers of a picture follow from each other
        assert np.abs(np.corrcoef(columns.T) - np.eye(columns.shape[1])).max() < 0.1
    assert all((centre == -64).all() for centre in centres if (centre < 0).any())
    several = transgan.draw_augmentation((4, 3000), 32, rng)[..., 5:]  # 3000 batches of 4
    assert (several >= 0).all(axis=(0, 2)).mean() == pytest.approx(0.3, abs=0.03)
    assert (several < 0).all(axis=(0, 2)).mean() == pytest.approx(0.7, abs=0.03)
    odd = [transgan.draw_augmentation((50,), 10, rng)[:, 5:] for _ in range(20)]  # a square of 5 has a pixel for its centre
    assert set(np.ravel(odd)) == {-20, *range(10)}


@pytest.mark.parametrize("loss", transgan.LOSSES)
def test_every_picture_is_augmented_on_its_way_into_the_discriminator(loss, small, monkeypatch):
    """Real, generated and mixed ones in the discriminator's step, generated ones in the generator's, by their own draws."""
    seen = []

    def diff_augment(x, policy, draws):
        assert policy == "color"
        seen.append(ag.to_numpy(draws))
        return x

    monkeypatch.setattr(transgan, "diff_augment", diff_augment)
    trainer = small_trainer(1, loss=loss, disc_steps=1, diff_aug="color")
    trainer.train_step()
    assert [len(draws) for draws in seen] == [6] * (3 if loss == "wgangp-eps" else 2) + [5]
    drawn = np.concatenate(seen)[:, :3]
    assert len(np.unique(drawn, axis=0)) == len(drawn)


@given(batch=st.integers(1, 3), side=st.integers(1, 4), factor=st.integers(1, 3), seed=seeds)
def test_downsampling_averages_squares(batch, side, factor, seed):
    (x,) = normal(seed, (batch, 3, side * factor, side * factor))
    small = ag.to_numpy(transgan.downsample(ag.xp.asarray(x), factor))
    for i, j in np.ndindex(side, side):
        square = x[:, :, i * factor : (i + 1) * factor, j * factor : (j + 1) * factor]
        np.testing.assert_allclose(small[:, :, i, j], square.mean(axis=(2, 3)), atol=1e-12)


@pytest.mark.parametrize("loss", transgan.LOSSES)
def test_co_training_adds_its_weighted_error_to_the_generators_loss(loss, small, monkeypatch):
    """The first generator step's loss, with co-training and without, from the same weights, noise and pictures."""
    monkeypatch.setattr(transgan.Trainer, "discriminator_step", lambda *args: {})
    values = {}
    for weight in (1e-30, 3.0):
        trainer = small_trainer(1, np.float64, loss=loss, sr_weight=weight, diff_aug="none")
        before = state_of(trainer)
        values[weight] = {name: float(x) for name, x in trainer.train_step().items()}
        moved = np.abs(state_of(trainer)["generator/from_rgb.weight"] - before["generator/from_rgb.weight"]).max()
        assert (moved > 1e-6) == (weight == 3.0)
    error = values[3.0]["sr_loss"]
    assert error == pytest.approx(values[1e-30]["sr_loss"]) != 0
    assert values[3.0]["gen_loss"] == pytest.approx(values[1e-30]["gen_loss"] + 3.0 * error)
    trainer = small_trainer(1, sr_weight=0.0, gen_batch_size=50)  # more than there are real pictures to restore
    assert trainer.train_step()["sr_loss"] is None
    assert not any("from_rgb" in name for name in state_of(trainer))


def test_co_training_learns_to_restore_pictures(small):
    """Eighty steps take away three quarters of the error; without co-training's gradient none would go."""
    trainer = small_trainer(1, steps=80, disc_steps=1, learning_rate=3e-3, sr_weight=50.0, diff_aug="none")
    errors = [float(trainer.train_step()["sr_loss"]) for _ in range(80)]
    assert np.mean(errors[-10:]) < 0.25 * errors[0]
    real = data.scale(trainer.batches.pictures)
    small_pictures = ag.to_numpy(transgan.downsample(ag.xp.asarray(real), 2))
    restored = trainer.restore(small_pictures)
    assert restored.shape == real.shape


@pytest.mark.parametrize(
    "options",
    [
        *({"loss": loss} for loss in transgan.LOSSES),
        *({"accumulate": 2, "loss": loss} for loss in ("wgangp-eps", "hinge")),
        {"diff_aug": "none"},
        {"diff_aug": "color,cutout"},
        {"sr_weight": 0.0},
        {"locality": "none"},
        {"locality": "1:500,2:1200", "locality_stages": 2},
        {"disc_steps": 1, "beta2": 0.9, "ema_decay": 0.5, "seed": 3},
    ],
    ids=str,
)
def test_resuming_is_exact_to_the_bit(options, small, tmp_path):
    """Also in the middle of an epoch: 40 pictures make 6 batches, and a step uses 2 of them."""
    unbroken, first, second = (small_trainer(**options) for _ in range(3))
    for trainer in (unbroken, first):
        trainer.rate_scale = 0.25
    losses = [unbroken.train_step() for _ in range(6)]
    for _ in range(2):
        first.train_step()
    first.save(tmp_path / "checkpoint.npz")
    second.load(tmp_path / "checkpoint.npz")
    assert (second.step, second.rate_scale) == (2, 0.25)
    for expected in losses[2:]:
        for name, value in second.train_step().items():
            assert (value is None and expected[name] is None) or float(value) == float(expected[name])
    assert_same_state(state_of(second), state_of(unbroken))
    assert not list(tmp_path.glob("*.part"))


def test_training_changes_every_weight_and_its_seed_decides(small):
    before, runs = state_of(small_trainer()), []
    for seed in (0, 0):
        trainer = small_trainer(seed=seed)
        trainer.train_step()
        runs.append(state_of(trainer))
    assert_same_state(runs[0], runs[1])
    assert all((runs[0][name] != before[name]).any() for name in before)
    first, other = small_trainer(), small_trainer(seed=1)
    assert (state_of(first)["generator/project.weight"] != state_of(other)["generator/project.weight"]).any()
    assert (first.batches[0] != other.batches[0]).any()


def test_no_two_streams_of_random_numbers_are_the_same():
    streams = [(purpose, seed, number) for purpose in data.PURPOSES
               for seed in (0, 1, 2) for number in (0, 1, 2)]  # fmt: skip
    assert len({data.random_stream(*stream).random() for stream in streams}) == len(streams)


def test_a_steps_draws_follow_from_the_seed(small, monkeypatch):
    drawn, stream = [], data.random_stream
    monkeypatch.setattr(data, "random_stream", lambda *key: drawn.append(key) or stream(*key))
    trainer = small_trainer(seed=3)
    for _ in range(2):
        trainer.train_step()
    own = [("shapes", 0, 8), ("weights", 3), ("step", 3, 0), ("step", 3, 1), ("step", 3, 2)]
    trainer.prepared[1].result()  # what the third step will need
    assert [key for key in drawn if "order" not in key[0]] == own
    assert {("order", 3, 0), ("co-training order", 3, 0)} <= set(drawn)


def test_about_every_second_picture_is_mirrored():
    pictures = np.arange(2000 * 3 * 2 * 3, dtype=np.float32).reshape(2000, 3, 2, 3)
    given = pictures.copy()
    made = transgan.flip(given, np.random.default_rng(0))
    assert made is given
    mirrored = (made == pictures[..., ::-1]).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(made[~mirrored], pictures[~mirrored])
    assert mirrored.mean() == pytest.approx(0.5, abs=0.05)


def test_each_picture_of_a_step_has_its_own_random_numbers(small, monkeypatch):
    """Noise, mixing weights, draws and mirrors: none is one for a whole batch, and all come from the step's own stream."""
    trainer = small_trainer(batch_size=20, gen_batch_size=20, diff_aug="color", sr_weight=1.0)
    disc_inputs, gen_inputs = trainer.inputs(3)
    (real, *first), (_, *second), (*last, restored) = *disc_inputs, gen_inputs
    assert [x.shape for x in first] == [(20, 64), (20, 1, 1, 1), (20, 3, transgan.DRAWS)]
    assert [x.shape for x in last] == [(20, 64), (20, transgan.DRAWS)]
    numbers = np.concatenate([x[..., :3].ravel() for x in (*first, *second, *last)])
    assert len(np.unique(numbers)) == len(numbers)
    assert 0 <= first[1].min() < 0.2 < 0.8 < first[1].max() <= 1
    for made, whole in ((real, trainer.batches[6]), (restored, trainer.co_batches[3])):
        kept = (made == whole).all(axis=(1, 2, 3))
        np.testing.assert_array_equal(made, np.where(kept[:, None, None, None], whole, whole[..., ::-1]))
        assert 0 < kept.sum() < len(kept)

    def all_inputs():
        disc_inputs, gen_inputs = trainer.inputs(3)
        return [x for inputs in (*disc_inputs, gen_inputs) for x in inputs]

    stream = data.random_stream
    before, again = all_inputs(), all_inputs()
    monkeypatch.setattr(data, "random_stream", lambda purpose, seed, *n: stream(purpose, seed + (purpose == "step"), *n))
    for a, b, other in zip(before, again, all_inputs(), strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != other).any()


@on_cpu
@pytest.mark.parametrize("loss", transgan.LOSSES)
def test_threads_share_a_batch_without_changing_the_step(loss, small):
    runs = []
    for threads in (1, 2, 4):
        trainer = small_trainer(threads, np.float64, loss=loss)
        assert trainer.threads == threads
        for _ in range(3):
            trainer.train_step()
        runs.append(state_of(trainer))
    assert_same_state(runs[0], runs[1], 1e-9)
    assert_same_state(runs[0], runs[2], 1e-9)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("loss", transgan.LOSSES)
def test_accumulating_gives_the_gradients_of_the_whole_batch(loss, threads, small):
    """Also those of the loss's (mean D(real))^2, which is no sum over the parts, and with fewer samples than parts."""
    runs = []
    for accumulate in (1, 2, 4, 10**9):
        trainer = small_trainer(threads, np.float64, loss=loss, accumulate=accumulate, diff_aug=POLICY)
        losses = [float(x) for _ in range(3) for x in trainer.train_step().values() if x is not None]
        runs.append(state_of(trainer) | {"losses": np.array(losses)})
    for run in runs[1:]:
        assert_same_state(runs[0], run, 1e-9)


def test_the_next_steps_data_is_prepared_while_this_one_works(small, monkeypatch):
    trainer, asked = small_trainer(), []
    inputs = transgan.Trainer.inputs
    monkeypatch.setattr(transgan.Trainer, "inputs", lambda self, step: asked.append(step) or inputs(self, step))
    for _ in range(3):
        trainer.train_step()
        trainer.prepared[1].result()
    assert asked == [0, 1, 2, 3]
    waited, trainer.step = trainer.waited, 5  # as after going back or on to a checkpoint
    trainer.train_step()
    trainer.prepared[1].result()
    assert asked == [0, 1, 2, 3, 5, 6]
    assert trainer.waited > waited > 0
    assert not any(x.flags.writeable is False or x.dtype != np.float32 for x in inputs(trainer, 0)[0][0])


class Meeting:
    """What several threads share in place of NCCL: whoever calls hands over an array and gets everybody's."""

    def __init__(self, size):
        self.arrays, self.barrier = [None] * size, threading.Barrier(size, timeout=60)

    def communicator(self, size, rank, host, port):
        assert (size, host) == (len(self.arrays), "127.0.0.1")

        def exchange(x):
            self.barrier.wait()
            self.arrays[rank] = x.copy()
            self.barrier.wait()
            return self.arrays

        def all_gather(x, everybody, count):
            assert count == x.size
            everybody[...] = np.stack(exchange(x))

        def all_reduce(x, total):
            total[...] = sum(exchange(x))

        return types.SimpleNamespace(all_gather=all_gather, all_reduce=all_reduce)


@on_cpu
@pytest.mark.parametrize("loss", transgan.LOSSES)
@pytest.mark.parametrize("size, accumulate, threads", [(2, 1, 1), (3, 2, 2)])
def test_several_gpus_make_the_steps_of_one(loss, size, accumulate, threads, small, monkeypatch):
    """The arithmetic of --gpus, in threads that meet where the processes of GPUs do; NCCL itself takes no part."""
    options = {"loss": loss, "gen_batch_size": 6, "diff_aug": POLICY, "accumulate": accumulate}
    single = small_trainer(1, np.float64, **options)
    losses = [single.train_step() for _ in range(3)]
    meeting = Meeting(size)
    distributed = types.SimpleNamespace(init_process_group=meeting.communicator)
    monkeypatch.setitem(sys.modules, "cupyx", types.SimpleNamespace(distributed=distributed))

    def train(rank):
        trainer = small_trainer(threads, np.float64, **options)
        trainer.group = transgan.Group(rank, size, 0)
        return [trainer.train_step() for _ in range(3)], state_of(trainer)

    with futures.ThreadPoolExecutor(size) as pool:
        for found, state in pool.map(train, range(size)):
            assert_same_state(state, state_of(single), 1e-9)
            for a, b in zip(found, losses, strict=True):
                assert {k: float(x) for k, x in a.items() if x is not None} == pytest.approx(
                    {k: float(x) for k, x in b.items() if x is not None}, rel=1e-9
                )


def test_a_group_without_one_of_its_processes_says_so(monkeypatch):
    distributed = types.SimpleNamespace(init_process_group=lambda *args, **options: None)
    monkeypatch.setitem(sys.modules, "cupyx", types.SimpleNamespace(distributed=distributed))
    group = transgan.Group(0, 2, 0, [types.SimpleNamespace(is_alive=lambda: False)])
    with pytest.raises(UserError, match="one of the GPUs has ended; go on with --resume"):
        group.gather(np.ones((1, 1)))


@on_cpu
def test_accumulating_saves_memory(small):
    peaks = []
    for accumulate in (1, 8):
        trainer = small_trainer(1, image_size=16, batch_size=32, gen_batch_size=32, accumulate=accumulate)
        trainer.train_step()
        tracemalloc.start()
        trainer.train_step()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] / 4


def test_rate_decays_in_a_line_and_the_average_follows(small, monkeypatch):
    trainer, rates = small_trainer(ema_decay=0.9), []
    step = ag.Adam.step
    monkeypatch.setattr(ag.Adam, "step", lambda self, rate, *rest: rates.append(rate) or step(self, rate, *rest))
    average = {name: x.copy() for name, x in trainer.average.items()}
    for _ in range(3):
        trainer.train_step()
        for name, p in trainer.gen_parameters.items():
            average[name] = 0.9 * average[name] + 0.1 * p.data
    np.testing.assert_allclose(rates, np.repeat(1e-3 * (1 - np.arange(3) / 6), 3))
    for name, x in trainer.average.items():
        close(x, average[name], 1e-6)
    z = trainer.noise(70, np.random.default_rng(0))  # more than are made at a time
    own = trainer.generator(Tensor(trainer.array(z))).data
    for name, p in trainer.gen_parameters.items():
        p.data = trainer.average[name]
    averaged = trainer.generator(Tensor(trainer.array(z))).data
    sampled = trainer.sample(z)
    close(sampled, averaged, 1e-6)
    assert abs(sampled - ag.to_numpy(own)).max() > 1e-4


def test_gradients_are_clipped_to_norm_5(small, monkeypatch):
    seen = []
    step = ag.Adam.step

    def watch(self, rate, scale, *rest):
        norm = math.sqrt(float((self.gradient.astype(np.float64) ** 2).sum()))
        seen.append((norm, float(scale) * norm))
        step(self, rate, scale, *rest)

    monkeypatch.setattr(ag.Adam, "step", watch)
    trainer = small_trainer()
    for p in trainer.disc_parameters.values():
        p.data *= 8  # a discriminator steep enough for the penalty to pull hard
    trainer.train_step()
    assert max(norm for norm, _ in seen) > 5
    for norm, clipped in seen:
        assert clipped == pytest.approx(min(5, norm), rel=1e-4)


def test_training_brings_generated_pictures_closer(small):
    """A hundred steps on drawn shapes take away a quarter of the distance to them that untrained pictures have."""
    trainer = small_trainer(
        sr_weight=0.0,
        diff_aug="none",
        seed=1,
        steps=150,
        disc_steps=2,
        learning_rate=5e-4,
        ema_decay=0.9,
        batch_size=8,
        gen_batch_size=8,
    )
    z = trainer.noise(40, np.random.default_rng(0))
    real = data.scale(trainer.batches.pictures)
    before = transgan.sliced_wasserstein(trainer.sample(z), real)
    for _ in range(100):
        trainer.train_step()
    assert transgan.sliced_wasserstein(trainer.sample(z), real) < 0.75 * before


@given(seed=seeds, n=st.integers(1, 20))
def test_sliced_wasserstein_distance(seed, n):
    a, b = (x.astype(np.float32) for x in normal(seed, (n, 1), (n, 1)))
    assert transgan.sliced_wasserstein(a, b) == pytest.approx(np.abs(np.sort(a, 0) - np.sort(b, 0)).mean(), rel=1e-5)
    pictures = normal(seed, (n, 3, 2, 2))[0].astype(np.float32)
    assert transgan.sliced_wasserstein(pictures, pictures[::-1]) < 1e-6
    moved = transgan.sliced_wasserstein(pictures, pictures + 1)  # by sqrt(12); of that a direction sees its mean |cos|
    assert moved == pytest.approx(12**0.5 * math.gamma(6) / math.gamma(6.5) / math.pi**0.5, rel=0.1)
    assert moved == transgan.sliced_wasserstein(pictures, pictures + 1)


@given(side=st.integers(1, 6), half_width=st.integers(1, 6))
def test_a_window_reaches_as_far_in_rows_as_in_columns(side, half_width):
    mask = transgan.window_mask(side, half_width)
    for i, j, k, m in np.ndindex(side, side, side, side):
        assert mask[i * side + j, k * side + m] == (max(abs(i - k), abs(j - m)) <= half_width)


@on_cpu
def test_a_small_window_costs_less_than_all(monkeypatch):
    """Scores computed for 32x32 tokens, forward and back: all without a window, well under half with one of 4."""
    (qkv,) = tensors(normal(0, (1, 1024, 12))[0].astype(np.float32))
    blocks, counts = ag._blocks, []

    def counting(heads, tokens, mask):
        for heads_, rows, keys in blocks(heads, tokens, mask):
            counts[-1] += (rows.stop - rows.start) * len(range(*keys.indices(tokens)))
            yield heads_, rows, keys

    monkeypatch.setattr(ag, "_blocks", counting)
    for mask in (None, transgan.window_mask(32, 4), transgan.window_mask(32, 10)):
        counts.append(0)
        grad(ag.attention(qkv, 1, mask).sum(), [qkv])
    assert counts[0] == 2 * 1024**2
    assert counts[1] < 0.4 * counts[0]
    assert counts[2] < 0.75 * counts[0]


def test_the_generator_looks_only_as_far_as_its_window():
    """A change of one token of the last stage moves the pixels within the window of every block, and no others."""
    generator = transgan.Generator(16, 64, (1, 1, 1), np.random.default_rng(0), dtype=np.float64)
    x = normal(0, (1, 256, 4))[0]
    moved = x.copy()
    moved[0, 5 * 16 + 7, 0] += 1.0
    for half_width in (None, 2):
        generator.attend_within(half_width, 1)
        a, b = (ag.to_numpy(generator.grow(Tensor(ag.xp.asarray(y)), first=2)) for y in (x, moved))
        changed = (a != b).any(axis=(0, 1))
        near = transgan.window_mask(16, 2)[5 * 16 + 7].reshape(16, 16)
        assert changed[near].all()
        assert changed[~near].any() == (half_width is None)
    generator.attend_within(2, 2)
    assert [mask is None for mask in generator.masks] == [True, False, False]
    generator.attend_within(2, 3)
    assert [mask.shape for mask in generator.masks] == [(16, 16), (64, 64), (256, 256)]
    generator.attend_within(100, 3)
    assert generator.masks == [None] * 3


def test_the_window_grows_with_the_schedule_and_goes(small):
    trainer = small_trainer(1, image_size=16, locality="1:320,3:640,5:960", steps=5, disc_steps=1, locality_stages=2)
    assert transgan.locality_phases(trainer.options) == [(1, 1.0), (3, 2.0), (5, 3.0)]
    seen = []
    for _ in range(5):
        trainer.train_step()
        seen.append([None if mask is None else int(ag.to_numpy(mask)[0].sum()) for mask in trainer.generator.masks])
    assert seen == [[None, 4, 4], [None, 16, 16], [None, 36, 36], [None] * 3, [None] * 3]
    published = transgan.locality_phases(transgan.Options())
    assert published == [(h, pytest.approx(e / 1600 * 500_000)) for h, e in ((4, 22), (6, 32), (8, 42), (10, 60))]


def test_resuming_restores_the_window(small, tmp_path):
    first = small_trainer(1, image_size=16, locality="1:800,3:1600", steps=4)
    first.train_step()
    first.save(tmp_path / "checkpoint.npz")
    second = small_trainer(1, image_size=16, locality="1:800,3:1600", steps=4)
    second.load(tmp_path / "checkpoint.npz")
    for _ in range(2):
        first.train_step()
        second.train_step()
    assert second.half_width == 3
    assert_same_state(state_of(first), state_of(second))


def test_locality_is_explained_by_a_picture(small, tmp_path):
    assert run_main(*TRAIN, "--image-size", 16, "--out", tmp_path / "run", "--locality", "2:22,4:60") == 0
    grid = np.asarray(Image.open(tmp_path / "run" / "locality.png")).astype(int)[::6, ::6]
    assert grid.shape == (18, 3 * 17 + 1, 3)
    for i, half_width in enumerate((2, 4, 16)):
        picture = grid[1:17, 1 + 17 * i : 17 + 17 * i]
        seen = transgan.window_mask(16, half_width)[8 * 16 + 8].reshape(16, 16)
        np.testing.assert_array_equal(picture[..., 0] > 100, seen)
        assert picture[8, 8].tolist() == [255, 51, 51]


class DeviceArray:
    """An array that, like CuPy's, refuses to meet NumPy's or to become one unasked; a rehearsal of the GPU on the CPU."""

    __array_ufunc__ = None  # so that NumPy's arrays ask this class, which then refuses

    def __init__(self, host):
        self.host = host

    def __array__(self, *args, **options):
        raise TypeError("an array of the device was about to become NumPy's; use xp, or to_numpy")

    def get(self):
        return self.host.copy()

    def __getitem__(self, index):
        return to_device(self.host[to_host(index)])

    def __setitem__(self, index, value):
        self.host[to_host(index)] = to_host(value)

    def __len__(self):
        return len(self.host)

    def __float__(self):
        return float(self.host)

    def __bool__(self):
        return bool(self.host)


def to_host(x):
    if isinstance(x, (tuple, list)):
        return type(x)(to_host(y) for y in x)
    if isinstance(x, np.ndarray):
        raise TypeError("a NumPy array meets an array of the device")
    return x.host if isinstance(x, DeviceArray) else x


def to_device(x):
    if isinstance(x, (tuple, list)):
        return type(x)(to_device(y) for y in x)
    return DeviceArray(np.asarray(x)) if isinstance(x, (np.ndarray, np.generic)) else x


def on_device(function):
    """A function of NumPy's, or a method of its arrays, made to work on DeviceArrays alone."""

    def call(*args, out=None, **options):
        args, options = map(to_host, args), {name: to_host(x) for name, x in options.items()}
        if out is None:
            return to_device(function(*args, **options))
        function(*args, out=to_host(out), **options)
        return out

    return call


def give_device_arrays_their_operators():
    for name in ("shape", "ndim", "size", "dtype", "base", "strides"):
        setattr(DeviceArray, name, property(lambda self, name=name: getattr(self.host, name)))
    DeviceArray.T = property(lambda self: DeviceArray(self.host.T))
    for name in ("sum", "mean", "max", "reshape", "transpose", "astype", "copy", "swapaxes", "item"):
        setattr(DeviceArray, name, on_device(getattr(np.ndarray, name)))
    for name in ("add", "sub", "mul", "truediv", "pow", "matmul", "gt", "ge", "lt", "eq"):
        function = on_device(getattr(operator, name))

        def forward(a, b, function=function):
            return NotImplemented if isinstance(b, Tensor) else function(a, b)

        def in_place(a, b, name=name):
            getattr(operator, "i" + name)(a.host, to_host(b))
            return a

        setattr(DeviceArray, f"__{name}__", forward)
        if name in ("add", "sub", "mul", "truediv", "pow", "matmul"):
            setattr(DeviceArray, f"__r{name}__", lambda a, b, function=function: function(b, a))
        if name in ("add", "sub", "mul", "truediv"):
            setattr(DeviceArray, f"__i{name}__", in_place)
    DeviceArray.__neg__ = on_device(operator.neg)


give_device_arrays_their_operators()


EMULATOR = r"""
// Runs a CUDA kernel on one core of a CPU: block after block, and the threads of a block one after another, or, if they
// have to wait for each other, as fibres that take turns there.
#include <csetjmp>
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>
using std::erf, std::exp, std::log, std::max, std::min, std::sqrt;

struct Index { unsigned x, y; };
static Index threadIdx, blockIdx, blockDim;
static std::function<void()> body;
static ucontext_t fresh[1024];  // fibres as they begin; later they are entered where they wait
static jmp_buf scheduler, fibres[1024];
static bool begun[1024], finished[1024];

static unsigned own() { return threadIdx.y * blockDim.x + threadIdx.x; }
static void wait_for_others() { if (!_setjmp(fibres[own()])) _longjmp(scheduler, 1); }
static void live() { for (;;) { body(); finished[own()] = true; wait_for_others(); } }

static void begin(unsigned i) {
    static std::vector<char> stacks(1024 << 14);
    begun[i] = true;
    getcontext(&fresh[i]);
    fresh[i].uc_stack.ss_sp = &stacks[i << 14];
    fresh[i].uc_stack.ss_size = 1 << 14;
    makecontext(&fresh[i], live, 0);
    setcontext(&fresh[i]);
}

static void run(unsigned columns, unsigned rows, unsigned width, unsigned height, bool waits) {
    blockDim = {width, height};
    for (blockIdx.y = 0; blockIdx.y < rows; blockIdx.y++) for (blockIdx.x = 0; blockIdx.x < columns; blockIdx.x++) {
        std::fill(finished, finished + width * height, false);
        static bool again;  // static, so that a jump does not forget it
        do {
            again = false;
            for (threadIdx.y = 0; threadIdx.y < height; threadIdx.y++)
                for (threadIdx.x = 0; threadIdx.x < width; threadIdx.x++) {
                    if (!waits) body();
                    else if (!finished[own()]) {
                        if (!_setjmp(scheduler)) begun[own()] ? _longjmp(fibres[own()], 1) : begin(own());
                        again |= !finished[own()];
                    }
                }
        } while (again);
    }
}

template <class T> T __shfl_xor_sync(unsigned, T x, int lane) {
    static T boxes[1024];
    boxes[own()] = x;
    wait_for_others();
    T theirs = boxes[own() ^ lane];
    wait_for_others();
    return theirs;
}

#define __device__
#define __global__
#define __shared__ static
#define __syncthreads wait_for_others
"""


@functools.cache
def emulated(source, name):
    """A kernel of a CUDA source, compiled by the machine's C++ compiler to run on its CPU: f(grid, block, arguments)."""
    parameters, text = re.search(rf'extern "C" __global__ void {name}\((.*?)\) \{{(.*?)\n\}}', source, re.DOTALL).groups()
    waits = str(any(word in text for word in ("__syncthreads", "warp_", "block_"))).lower()
    names = ", ".join(parameter.split()[-1].strip("*") for parameter in parameters.split(","))
    entry = f"""extern "C" void launch(unsigned gx, unsigned gy, unsigned bx, unsigned by, {parameters}) {{
        body = [=] {{ {name}({names}); }};
        run(gx, gy, bx, by, {waits});
    }}"""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cpp"
        path.write_text("\n".join([EMULATOR, source, entry]))
        library = path.with_suffix(".so")
        subprocess.run(["g++", "-shared", "-fPIC", "-std=c++17", "-w", str(path), "-o", str(library)], check=True)
        function = ctypes.CDLL(str(library)).launch

    def launch(grid, block, arguments):
        sizes = [ctypes.c_uint(n) for shape in (grid, block) for n in (*shape, 1)[:2]]
        function(*sizes, *map(passed, arguments))

    def passed(x):
        if isinstance(x, DeviceArray):
            assert x.host.flags.c_contiguous
            return ctypes.c_void_p(x.host.ctypes.data)
        kinds = {"u": ctypes.c_void_p, "i": ctypes.c_longlong, "f": ctypes.c_float if x.itemsize == 4 else ctypes.c_double}
        return kinds[x.dtype.kind](x.item())

    return launch


class FakeCuPy(types.ModuleType):
    """The part of CuPy that this project uses, computed by NumPy on DeviceArrays; `used` collects its functions' names."""

    ndarray, used, RawKernel = DeviceArray, set(), staticmethod(emulated)
    cuda = types.SimpleNamespace(
        runtime=types.SimpleNamespace(
            getDeviceProperties=lambda device: {"name": b"a rehearsed GPU"}, memGetInfo=lambda: (1 << 30, 1 << 31)
        ),
        Device=lambda: types.SimpleNamespace(id=0),
    )

    @staticmethod
    def asarray(x, dtype=None):
        return DeviceArray(np.array(x.host if isinstance(x, DeviceArray) else x, dtype))

    def __getattr__(self, name):
        return self.rehearsed(getattr(np, name), name)

    def rehearsed(self, value, name):
        if name.startswith("__") or isinstance(value, (type, float)):
            return value
        self.used.add(name)
        if isinstance(value, types.ModuleType):
            functions = {inner: self.rehearsed(getattr(value, inner), inner) for inner in ("as_strided", "norm")
                         if hasattr(value, inner)}  # fmt: skip
            parts = {"stride_tricks": self.rehearsed(np.lib.stride_tricks, "stride_tricks")} if name == "lib" else {}
            return types.SimpleNamespace(**functions, **parts)
        return on_device(value)


@contextlib.contextmanager
def rehearsal():
    """Within this context there is a CuPy to find; afterwards all is on the CPU again."""
    if not shutil.which("g++"):
        pytest.skip("the kernels' rehearsal needs g++")
    ag._kernel.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", FakeCuPy("cupy"))
        try:
            yield sys.modules["cupy"]
        finally:
            ag.use_device("cpu")
            ag._kernel.cache_clear()


@pytest.fixture
def rehearsed_gpu():
    with rehearsal() as cupy:
        yield cupy


@on_cpu
@pytest.mark.parametrize("loss", transgan.LOSSES)
def test_rehearsal_of_training_on_a_gpu(loss, small, tmp_path, rehearsed_gpu):
    """Training, sampling, saving and resuming on arrays that refuse to meet NumPy's come to the CPU's numbers."""

    def trained(path):
        trainer = small_trainer(1, np.float64, loss=loss)
        losses = [trainer.train_step()]
        trainer.save(path)
        trainer = small_trainer(1, np.float64, loss=loss)
        trainer.load(path)
        losses.append(trainer.train_step())
        pictures = trainer.sample(trainer.noise(3, np.random.default_rng(0)))
        numbers = [[float(x) for x in step.values() if x is not None] for step in losses]
        return [np.array(numbers), pictures, *state_of(trainer).values()]

    expected = trained(tmp_path / "cpu.npz")
    assert ag.use_device("auto") == "a rehearsed GPU"
    for a, b in zip(trained(tmp_path / "gpu.npz"), expected, strict=True):
        assert type(a) is np.ndarray
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    assert {"matmul", "empty", "concatenate", "exp", "vdot"} <= rehearsed_gpu.used


@on_cpu
def test_a_step_does_not_wait_for_the_gpu(small, rehearsed_gpu, monkeypatch):
    """Nothing is fetched from the device within a step, so that its operations queue up there without a gap."""
    ag.use_device("gpu")
    trainer = small_trainer(1, diff_aug=POLICY, accumulate=2)

    def wait(*_):
        raise AssertionError("the step waits for the device")

    with monkeypatch.context() as patch:
        for name in ("get", "item", "__float__", "__bool__"):
            patch.setattr(DeviceArray, name, wait)
        for _ in range(2):
            losses = trainer.train_step()
    assert all(np.isfinite(float(x)) for x in losses.values())


@on_cpu
def test_rehearsal_of_every_operation_on_a_gpu(rehearsed_gpu):
    """What training does not use, too: derivatives of all operations, with masks and plain arrays."""
    assert ag.use_device("gpu") == "a rehearsed GPU"
    mask = ag.xp.asarray(np.tril(np.ones((3, 3), bool)) & (np.arange(3)[:, None] > 0))
    array = ag.xp.asarray(np.ones((2, 3, 3)) * 1.5)
    x = normal(0, (2, 3, 3))[0]
    for function, prepare in ELEMENTWISE.values():
        check(function, [prepare(x) if prepare else x], coordinates=2)
    for function in (
        lambda x: ag.softmax(x, mask),
        lambda x: ag.attention(x, 1, mask),
        lambda x: ag.layer_norm(x, x[0, 0], x[0, 1]),
        lambda x: ag.linear(x, x[0]) + x @ array,
        lambda x: array / (x * x + 1) - array * x + 2.0 / (x * x + 1) - x / array,
        lambda x: ag.concatenate([x.max(axis=1), x.mean(axis=2), x.sum(axis=0)]),
        lambda x: ag.broadcast_to(x[:, None, ::-1], (4, 2, 3, 3, 3)),
        lambda x: ag.pixel_shuffle(ag.pixel_unshuffle(x.reshape(1, 2, 3, 3), 3), 3),
        lambda x: transgan.diff_augment(x.reshape(1, 2, 3, 3), POLICY, ag.xp.asarray([[0.1, 1.5, 0.7, 1, -1, 2, 1]])),
    ):
        check(function, [x], coordinates=2)
    assert gradient_check(lambda x: ag.gelu(x.T), [ag.xp.asarray(x)]) < AGREES
    with pytest.raises(TypeError, match="NumPy array meets"):
        array + np.ones(3)


KERNELS = {  # an operation with kernels of its own, and the shapes of its operands from (rows, width)
    "gelu": (ag.gelu, lambda n, c: [(n, c)]),
    "normal_cdf": (ag.normal_cdf, lambda n, c: [(n, c)]),
    "curvature": (lambda x, g: grad((grad(ag.gelu(x), [x], g, create_graph=True)[0] * g).sum(), [x])[0],
                  lambda n, c: [(n, c), (n, c)]),
    "softmax": (ag.softmax, lambda n, c: [(n, c)]),
    "masked softmax": (lambda x: ag.softmax(x, ag.xp.asarray(np.tri(*x.shape[1:], -1, dtype=bool))),
                       lambda n, c: [(2, n, c)]),
    "softmax with one mask": (lambda x: ag.softmax(x, ag.xp.asarray(np.arange(x.shape[1])[:, None] > 0)),
                              lambda n, c: [(2, n, c)]),
    "layer_norm": (ag.layer_norm, lambda n, c: [(n, c), (c,), (c,)]),
    "linear_gelu": (ag.linear_gelu, lambda n, c: [(n, 2), (2, c), (c,)]),
    "curvature with a bias": (lambda x, w, b: sum(map(ag.reduce_sum, grad(ag.linear_gelu(x, w, b).sum(), [x, w, b],
                                                                          create_graph=True)), start=0.0),
                              lambda n, c: [(n, 2), (2, c), (c,)]),
}  # fmt: skip


def with_gradients(function, arrays):
    """A function's result and its gradients towards all arrays, weighted by fixed numbers, as NumPy arrays."""
    inputs = tensors(*arrays)
    result = function(*inputs)
    weights = np.cos(np.arange(result.size)).reshape(result.shape).astype(result.dtype)
    return [ag.to_numpy(x) for x in (result, *grad(result, inputs, Tensor(ag.xp.asarray(weights))))]


def compare_with_kernels(function, arrays):
    """The same on the CPU and by the kernels, to a rounding."""
    expected = with_gradients(function, arrays)
    with rehearsal():
        ag.use_device("gpu")
        found = with_gradients(function, arrays)
    tolerance = 1e-12 if arrays[0].dtype == np.float64 else 2e-5
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.abs(b).max()))


@on_cpu
@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=20)
@given(rows=st.integers(1, 9), width=st.sampled_from([1, 2, 31, 32, 33, 70, 300]), seed=seeds,
       scale=st.sampled_from([1e-3, 1.0, 30.0]), dtype=st.sampled_from([np.float32, np.float64]))  # fmt: skip
def test_kernels_equal_their_numpy_forms(name, rows, width, seed, scale, dtype):
    function, operands = KERNELS[name]
    compare_with_kernels(function, [x.astype(dtype) for x in normal(seed, *operands(rows, width), scale=scale)])


@on_cpu
@settings(max_examples=30)
@given(batch=st.integers(1, 2), tokens=st.integers(1, 140), heads=st.integers(1, 3), seed=seeds, masked=st.booleans(),
       head=st.sampled_from([3, 20]), dtype=st.sampled_from([np.float32, np.float64]))  # fmt: skip
@example(batch=1, tokens=129, heads=2, seed=0, masked=False, head=3, dtype=np.float64)
@example(batch=1, tokens=65, heads=2, seed=0, masked=True, head=20, dtype=np.float64)
def test_attentions_kernels_equal_its_numpy_form(batch, tokens, heads, seed, masked, head, dtype):
    """With more tokens than a block has threads, and masks that let some rows see nothing."""
    (qkv,) = normal(seed, (batch, tokens, 3 * heads * head))
    mask = np.random.default_rng(seed).random((tokens, tokens)) < 0.3 if masked else None
    compare_with_kernels(lambda x: ag.attention(x, heads, None if mask is None else ag.xp.asarray(mask)),
                         [qkv.astype(dtype)])  # fmt: skip


@on_cpu
@pytest.mark.parametrize("policy", ["translation", "cutout", "color", "translation,color", POLICY, "color,cutout"])
@settings(max_examples=10)
@given(side=st.sampled_from([1, 5, 8, 17]), batch=st.integers(1, 3), seed=seeds, cut=st.booleans(),
       dtype=st.sampled_from([np.float32, np.float64]))  # fmt: skip
def test_augmentations_kernel_equals_its_composition(policy, side, batch, seed, cut, dtype):
    """In value, gradient and that gradient's gradient, with shifts up to out of the picture."""
    rng = np.random.default_rng(seed)
    draws = transgan.draw_augmentation((batch,), side, rng)
    draws[0, 3:5] = rng.integers(-side - 1, side + 2, 2)
    if cut:
        draws[:, 5:] = rng.integers(0, side + 1, (batch, 2))
    (x,) = normal(seed, (batch, 3, side, side))

    def function(x):
        y = transgan.diff_augment(x, policy, ag.xp.asarray(draws.astype(dtype)))
        (slope,) = grad((y**3).sum(), [x], create_graph=True)
        return ag.concatenate([y, slope])

    compare_with_kernels(function, [x.astype(dtype)])


@on_cpu
@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.9, 0.999)])
@pytest.mark.parametrize("decay", [None, 0.9])
def test_adams_kernel_equals_its_numpy_form(betas, decay):
    states = []
    for device in ("cpu", "gpu"):
        with rehearsal():
            ag.use_device(device)
            parameters = tensors(*normal(0, (30, 20), (7,)))
            adam = ag.Adam(parameters, betas, decay=decay)
            for t in range(3):
                adam.add(tensors(*normal(t + 1, (30, 20), (7,))))
                adam.step(0.01, ag.xp.asarray(0.5))
            flats = (adam.p, adam.gradient, adam.v, adam.m, adam.average)
            states.append([ag.to_numpy(x) for x in flats if x is not None])
    for a, b in zip(*states, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@on_cpu
def test_kernels_hide_no_nan():
    """What is not a number must be seen further on, by whoever watches the losses."""
    x = normal(0, (1, 5, 9))[0]
    x[0, 2, 1] = np.nan
    with rehearsal():
        ag.use_device("gpu")
        for function in (ag.gelu, ag.softmax, lambda x: ag.attention(x, 1)):
            assert np.isnan(ag.to_numpy(function(Tensor(ag.xp.asarray(x))))).any()


@on_cpu
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs CUDA's compiler")
def test_kernels_compile(tmp_path, monkeypatch):
    """Through NVIDIA's own compiler, down to the instructions of a GPU, within its registers and its shared memory."""
    monkeypatch.setattr(ag, "xp", types.SimpleNamespace(RawKernel=lambda source, name: source))
    kernels = "\n".join(getattr(ag, name) for name in vars(ag) if name.endswith("_CUDA") and name != "_CUDA")
    kernels += transgan._AUGMENT_CUDA
    constants = {"D": 32, "TILE": 32, "SCALE": 0.177, "DRAWS": 7, "TRANSLATION": 1, "CUTOUT": 1, "COLOR": 1}
    for dtype in map(np.dtype, (np.float32, np.float64)):
        path = tmp_path / f"{dtype}.cu"
        path.write_text(ag._kernel.__wrapped__(kernels, "all of them", dtype, **constants))
        done = subprocess.run(["nvcc", "-cubin", "-arch=sm_90", str(path), "-o", str(path) + ".bin"], capture_output=True)
        assert done.returncode == 0, done.stderr.decode()


@on_cpu
def test_a_gpu_that_cannot_compile_is_none(rehearsed_gpu, monkeypatch):
    def missing(*args):
        raise RuntimeError("==========\nCuPy failed to load libnvrtc\nReinstall it")

    monkeypatch.setattr(FakeCuPy, "exp", missing, raising=False)
    assert ag.use_device("auto") == "cpu"
    with pytest.raises(RuntimeError, match=r"^no GPU to use \(CuPy failed to load libnvrtc\); install"):
        ag.use_device("gpu")


def test_every_array_function_in_use_exists_in_cupy():
    cupy = pytest.importorskip("cupy")
    root = Path(__file__).parent
    from cupy._core import _routines_linalg as linalg

    for name in ("set_compute_type", "COMPUTE_TYPE_DEFAULT", "COMPUTE_TYPE_TF32", "COMPUTE_TYPE_BF16"):
        assert hasattr(linalg, name)
    communicator = pytest.importorskip("cupyx.distributed").NCCLBackend
    for name in ("all_gather", "all_reduce"):
        assert hasattr(communicator, name)
    for source in (root / "autograd.py", root / "transgan.py", *(root / "paper").glob("*.py")):
        for name in set(re.findall(r"\bxp\.([\w.]+)", source.read_text())):
            operator.attrgetter(name.rstrip("."))(cupy)


# --- 8. Data ----------------------------------------------------------------------------------------------------------


class Python2Pickler(pickle._Pickler):
    """Writes byte strings as Python 2 wrote its strings, and numpy's names as its old releases had them."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        value = value.encode() if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string


def python2_pickle(value):
    out = io.BytesIO()
    Python2Pickler(out, 2).dump(value)
    return out.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def cifar_batch(seed, rows=8, **changes):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (rows, 3072), dtype=np.uint8)
    return {b"batch_label": b"b", b"labels": [int(x) for x in rng.integers(0, 10, rows)], b"data": pixels} | changes


def cifar_files():
    return {name: python2_pickle(cifar_batch(i)) for i, name in enumerate(data.CIFAR10_FILES)}


def write_archive(path, files, kind=tarfile.REGTYPE):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{data.CIFAR10_FOLDER}/{name}")
            member.type, member.size = kind, len(content) if kind == tarfile.REGTYPE else 0
            member.linkname = "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            tar.addfile(member, io.BytesIO(content))
    return path.read_bytes()


def of(archive, content, url="http://127.0.0.1:9/x"):
    """The same archive, but with the sum of `content`, at `url`, where nobody listens by default."""
    return dataclasses.replace(archive, url=url, digest=f"md5:{hashlib.md5(content).hexdigest()}")


EXPECTED = np.concatenate([cifar_batch(i)[b"data"] for i in range(5)]).reshape(-1, 3, 32, 32)


@contextlib.contextmanager
def server(content, status=200, announced=None, cuts=(), ranges=True):
    """Serve `content` on 127.0.0.1 under every path: the address, and the range that each request asked for.

    status, announced: what the answer says of itself and of its length. cuts: after how many bytes the first connections
    break. ranges: whether requests for a range are obeyed, or answered with everything.
    """
    requests, cuts = [], list(cuts)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers["Range"]
            requests.append(asked)
            start = int(asked[len("bytes=") : -1]) if asked and ranges else 0
            if start and start >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if start else status)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start if announced is None else announced))
            self.end_headers()
            self.wfile.write(content[start:][: cuts.pop(0) if cuts else None])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{running.server_port}/archive", requests
        finally:
            running.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def leftovers(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def holds(path, content):
    """Whether a file holds these bytes; pytest would take minutes to print how thousands of them differ."""
    return path.read_bytes() == content


def slope(height, width, number=0):
    """A picture that gets redder downwards and greener to the right: bytes (height, width, 3)."""
    picture = np.empty((height, width, 3), np.uint8)
    picture[..., 0] = np.linspace(0, 250, height)[:, None]
    picture[..., 1] = np.linspace(0, 250, width)
    picture[..., 2] = 40 * number
    return picture


def encoded(picture, kind="PNG", **options):
    out = io.BytesIO()
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(out, kind, **options)
    return out.getvalue()


def cifar10_archive():
    """CIFAR-10's archive with eight pictures a batch, and what is to be read from it."""
    with tempfile.TemporaryDirectory() as folder:
        return write_archive(Path(folder) / "x", cifar_files()), EXPECTED, 0


def stl10_archive():
    """STL-10's, with five unlabeled pictures: each channel column by column, as published."""
    out, pictures = io.BytesIO(), np.stack([slope(96, 96, i) for i in range(5)])
    columns = pictures.transpose(0, 3, 2, 1).tobytes()
    files = {"test_X.bin": columns[:27648], "test_y.bin": b"\1", "train_X.bin": columns[:27648], "train_y.bin": b"\1",
             "unlabeled_X.bin": columns, "class_names.txt": b"airplane\n", "fold_indices.txt": b"0\n"}  # fmt: skip
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"stl10_binary/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    halves = pictures.reshape(5, 48, 2, 48, 2, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2)
    return out.getvalue(), halves, 2


def celeba_archive():
    """CelebA's, with five faces of 178x218, red above and below the square in the middle; and a file that is no picture."""
    out, faces = io.BytesIO(), []
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("img_align_celeba/", b"")
        for i in (3, 1, 2, 5, 4):
            face = np.full((218, 178, 3), (255, 0, 0), np.uint8)
            face[20:198] = slope(178, 178, i)
            archive.writestr(f"img_align_celeba/00000{i}.jpg", encoded(face, "JPEG", quality=95))
        archive.writestr("img_align_celeba/readme.txt", b"no picture")
    nearest = np.linspace(1, 176, 64).round().astype(int)
    for i in range(1, 6):
        faces.append(slope(178, 178, i)[nearest[:, None], nearest].transpose(2, 0, 1))
    return out.getvalue(), np.stack(faces), 12


PUBLISHED = {
    "cifar10": (data.CIFAR10, cifar10_archive, data.load_cifar10),
    "stl10": (data.STL10, stl10_archive, lambda folder, archive: data.load_stl10(folder, 48, archive)),
    "celeba": (data.CELEBA, celeba_archive, lambda folder, archive: data.load_celeba(folder, 64, archive)),
}
each_data_set = pytest.mark.parametrize("name", PUBLISHED)


def assert_pictures(pictures, expected, tolerance):
    assert pictures.dtype == np.uint8
    assert pictures.shape == expected.shape
    distance = np.abs(pictures.astype(float) - expected)
    if tolerance:  # JPEG and bicubic are near: exactly so away from the edges
        assert distance.mean() < tolerance / 4
        distance = distance[..., 2:-2, 2:-2]
    assert distance.max() <= tolerance


@each_data_set
def test_a_published_data_set_is_downloaded_checked_and_read_once(name, tmp_path, capsys):
    published, make, load = PUBLISHED[name]
    content, *expected = make()
    folder = tmp_path / "data"
    with server(content) as (url, requests):
        for _ in range(2):
            pictures = load(folder, of(published, content, url))
            assert_pictures(pictures, *expected)
    assert requests == [None]
    assert f"downloading {url}" in capsys.readouterr().err
    assert holds(folder / published.name, content)
    rest = [f"{data.CIFAR10_FOLDER}/{x}" for x in sorted(data.CIFAR10_FILES)]
    rest = {"cifar10": [data.CIFAR10_FOLDER, *rest], "stl10": ["stl10-48.pictures"], "celeba": ["celeba-64.pictures"]}
    assert leftovers(folder) == sorted([published.name, *rest[name]])


@each_data_set
def test_an_archive_that_lies_there_is_used_and_what_was_made_of_it_too(name, tmp_path):
    published, make, load = PUBLISHED[name]
    content, *expected = make()
    (tmp_path / published.name).write_bytes(content)
    assert_pictures(load(tmp_path, of(published, content)), *expected)
    (tmp_path / published.name).unlink()
    assert_pictures(load(tmp_path, published), *expected)


def test_files_that_a_person_extracted_are_used(tmp_path):
    content, *expected = stl10_archive()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        (tmp_path / "stl10_binary").mkdir()
        (tmp_path / data.STL10_FILE).write_bytes(tar.extractfile(data.STL10_FILE).read())
    assert_pictures(data.load_stl10(tmp_path), *expected)
    content, *expected = celeba_archive()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(tmp_path)
    assert_pictures(data.load_celeba(tmp_path), *expected)


@each_data_set
@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_broke_off_goes_on_where_it_did(name, ranges, tmp_path):
    published, make, load = PUBLISHED[name]
    content, *expected = make()
    half, most = len(content) // 2, len(content) * 3 // 4
    with server(content, cuts=[half, most - half if ranges else most], ranges=ranges) as (url, requests):
        archive = of(published, content, url)
        for done in (half, most):
            with pytest.raises(UserError, match=f"broke off after {done} of {len(content)} bytes; start again to go on"):
                load(tmp_path, archive)
            assert leftovers(tmp_path) == [published.name + ".part"]
            assert holds(tmp_path / leftovers(tmp_path)[0], content[:done])
        assert_pictures(load(tmp_path, archive), *expected)
    assert requests == [None, f"bytes={half}-", f"bytes={most}-"]
    assert not list(tmp_path.glob("*.part"))


@each_data_set
def test_a_part_that_is_the_whole_is_taken_and_a_wrong_one_thrown_away(name, tmp_path):
    published, make, load = PUBLISHED[name]
    content, *expected = make()
    part = tmp_path / (published.name + ".part")
    for kept, fits in ((content + b"more", False), (b"x" + content[1:-9], False), (content, True)):
        part.write_bytes(kept)
        with server(content) as (url, requests):
            archive = of(published, content, url)
            if not fits:
                with pytest.raises(UserError, match="is not the file expected"):
                    load(tmp_path, archive)
                assert leftovers(tmp_path) == []
                continue
            assert_pictures(load(tmp_path, archive), *expected)
            assert requests == [f"bytes={len(content)}-"]


@each_data_set
@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {"announced": 5000}, "broke off after 0 of 5000 bytes"),
        (b"\x1f\x8b wrong", {}, "is not the file expected .* fetch .* by hand"),
        (
            b" <html>try later</html>",
            {},
            "answered with a web page, not with .*; try later, or fetch .* by hand and save it as",
        ),
        (b"gone", {"status": 404}, "Not Found.* fetch .* by hand"),
        (b"", {"status": 503}, "Service Unavailable"),
    ],
)
def test_a_bad_download_says_so_and_leaves_nothing(name, tmp_path, content, options, message):
    published, _, load = PUBLISHED[name]
    with server(content, **options) as (url, _), pytest.raises(UserError, match=message) as caught:
        load(tmp_path, of(published, b"another", url))
    assert "\n" not in str(caught.value)
    assert "by hand" not in message or published.page in str(caught.value)
    assert leftovers(tmp_path) == []


def test_a_web_page_does_not_cost_what_has_arrived(tmp_path):
    content, *_ = cifar10_archive()
    part = tmp_path / (data.CIFAR10.name + ".part")
    part.write_bytes(content[:1000])
    with server(b"<!doctype html>", ranges=False) as (url, _), pytest.raises(UserError, match="web page"):
        data.load_cifar10(tmp_path, of(data.CIFAR10, content, url))
    assert holds(part, content[:1000])


@contextlib.contextmanager
def files_of_at_most(size):
    """Within this context, the system refuses to let a file grow larger than so many bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@each_data_set
def test_a_disk_that_fills_up_during_a_download_costs_nothing(name, tmp_path):
    published, make, load = PUBLISHED[name]
    content, *expected = make()
    with server(content) as (url, _):
        archive = of(published, content, url)
        with (
            files_of_at_most(len(content) // 2),
            pytest.raises(UserError, match="cannot download .* File too large; start"),
        ):
            load(tmp_path, archive)
        assert leftovers(tmp_path) == [published.name + ".part"]
        assert_pictures(load(tmp_path, archive), *expected)


@each_data_set
def test_a_disk_that_fills_up_while_reading_leaves_nothing_half_written(name, tmp_path):
    published, make, load = PUBLISHED[name]
    content, *expected = make()
    (tmp_path / published.name).write_bytes(content)
    with files_of_at_most(10_000), pytest.raises(UserError, match="File too large") as caught:
        load(tmp_path, of(published, content))
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == [published.name]
    assert_pictures(load(tmp_path, of(published, content)), *expected)


def test_a_disk_too_small_is_noticed_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=5_000_000))
    with (
        server(b"x", announced=9_000_000) as (url, _),
        pytest.raises(UserError, match="needs 9 MB more and .* has 5; free"),
    ):
        data.load_cifar10(tmp_path, of(data.CIFAR10, b"x", url))
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("content", [b"half", b""])
def test_two_runs_do_not_download_into_one_file(content, tmp_path):
    """Nor does the second remove what the first has only just begun."""
    fcntl = pytest.importorskip("fcntl")
    part = tmp_path / (data.CIFAR10.name + ".part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is downloading"):
            data.load_cifar10(tmp_path)
    assert part.read_bytes() == content


def test_on_windows_the_same_byte_is_locked(tmp_path, monkeypatch):
    """A stand-in for its msvcrt: what is locked starts where the file stands, and bytes are appended all the same."""
    locked = []

    def locking(number, mode, count):
        byte = os.lseek(number, 0, os.SEEK_CUR)
        if (byte, count) in locked:
            raise PermissionError(13, "Permission denied")
        locked.append((byte, count))

    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(sys, "platform", "win32")
    path = tmp_path / "archive.part"
    path.write_bytes(b"half")
    with path.open("ab") as first:
        data.lock(first)
        assert first.tell() == 4
        first.write(b" and more")
        first.flush()
        with path.open("ab") as second, pytest.raises(BlockingIOError):
            data.lock(second)
    assert path.read_bytes() == b"half and more"


@each_data_set
def test_no_server_no_address_no_folder(name, tmp_path):
    published, _, load = PUBLISHED[name]
    for url in ("http://127.0.0.1:9/x", "http://[::1", "nonsense"):
        with pytest.raises(UserError, match="cannot download .* by hand and save it as"):
            load(tmp_path, dataclasses.replace(published, url=url))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot download|cannot keep"):
        load(tmp_path / "file" / "data", of(published, b""))
    (tmp_path / published.name).mkdir()
    with pytest.raises(UserError, match="cannot read .* choose another --data-dir"):
        load(tmp_path, published)


def bad_archives():
    files = cifar_files()
    yield "truncated", lambda path: path.write_bytes(write_archive(path, files)[:-2000]), "cannot extract"
    yield "not an archive", lambda path: path.write_bytes(b"hello" * 100), "cannot extract"
    yield "empty", lambda path: path.write_bytes(b""), "cannot extract"
    yield "incomplete", lambda path: write_archive(path, dict(list(files.items())[:4])), "is not CIFAR-10"
    yield "links", lambda path: write_archive(path, files, tarfile.SYMTYPE), "not a plain file"
    yield "folders", lambda path: write_archive(path, files, tarfile.DIRTYPE), "not a plain file"


@pytest.mark.parametrize(("make", "message"), [pytest.param(m, t, id=n) for n, m, t in bad_archives()])
def test_a_bad_archive_says_so_and_leaves_nothing_half_written(tmp_path, make, message):
    archive = tmp_path / data.CIFAR10.name
    make(archive)
    with pytest.raises(UserError, match="is not the file expected") as caught:
        data.load_cifar10(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message) as caught:
        data.load_cifar10(tmp_path, of(data.CIFAR10, archive.read_bytes()))
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == [data.CIFAR10.name]


@pytest.mark.parametrize("name", ["stl10", "celeba"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "other", "cut picture", "no picture"])
def test_a_damaged_archive_makes_no_cache(name, damage, tmp_path, capsys):
    published, make, load = PUBLISHED[name]
    content, *_ = make()
    other = io.BytesIO()
    if name == "stl10":
        size = 27647 if damage == "cut picture" else 0
        file = "other" if damage == "other" else data.STL10_FILE
        with tarfile.open(fileobj=other, mode="w:gz") as tar:
            member = tarfile.TarInfo(file)
            member.size = size
            tar.addfile(member, io.BytesIO(b"x" * size))
    else:
        with zipfile.ZipFile(other, "w") as archive:
            archive.writestr("other" if damage == "other" else "img_align_celeba/1.jpg", b"x")
    content = {"truncated": content[:-300], "text": b"hello" * 100, "empty": b""}.get(damage, other.getvalue())
    (tmp_path / published.name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(tmp_path, of(published, content))
    assert "\n" not in str(caught.value)
    assert "cannot keep" not in str(caught.value)  # it is not the cache that is wrong
    assert leftovers(tmp_path) == [published.name]


def test_a_file_too_large_is_not_extracted(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_FILE", 100)
    archive = write_archive(tmp_path / data.CIFAR10.name, cifar_files())
    with pytest.raises(UserError, match="size"):
        data.load_cifar10(tmp_path, of(data.CIFAR10, archive))
    assert leftovers(tmp_path) == [data.CIFAR10.name]
    content, *_ = celeba_archive()
    (tmp_path / data.CELEBA.name).write_bytes(content)
    with pytest.raises(UserError, match="no picture that can be read .*too large for a face"):
        data.load_celeba(tmp_path, 64, of(data.CELEBA, content))


class Command:
    """An object whose pickle asks for a function to be called with an argument."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: cifar_batch(0, extra=x), lambda x: {b"data": x}])
def test_a_pickle_that_tries_to_run_code_runs_nothing(tmp_path, protocol, wrap):
    for function, argument in (
        (os.mkdir, str(tmp_path / "ran")),
        (eval, f"__import__('os').mkdir({str(tmp_path / 'ran')!r})"),
    ):
        (tmp_path / "batch").write_bytes(pickle.dumps(wrap(Command(function, argument)), protocol))
        with pytest.raises(UserError, match="it asks for|is not a batch") as caught:
            data.read_cifar10(tmp_path / "batch")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (cifar_batch(0) | {b"data": np.zeros((8, 3071), np.uint8)}, r"rows of 3072 bytes, found \(8, 3071\)"),
        (cifar_batch(0) | {b"data": np.zeros((0, 3072), np.uint8)}, "rows of 3072 bytes"),
        (cifar_batch(0) | {b"data": np.zeros((8, 3072), np.float32)}, "plain unsigned bytes"),
        (cifar_batch(0) | {b"data": np.zeros((8, 3072), np.int8)}, "plain unsigned bytes"),
        (cifar_batch(0) | {b"data": np.zeros((3072, 8), np.uint8).T}, "plain unsigned bytes"),
        (cifar_batch(0) | {b"data": [1, 2, 3]}, "rows of 3072 bytes, found list"),
        (cifar_batch(0) | {b"labels": [1, 2]}, "a list of 8 labels"),
        (cifar_batch(0) | {b"labels": [0] * 7 + [10]}, "from 0 to 9"),
        (cifar_batch(0) | {b"labels": [0] * 7 + [-1]}, "from 0 to 9"),
        (cifar_batch(0) | {b"labels": [0] * 7 + ["cat"]}, "from 0 to 9"),
        ({b"data": np.zeros((8, 3072), np.uint8)}, "labels"),
        ([1, 2], "is not a batch"),
    ],
)
def test_wrong_contents_say_so(tmp_path, value, message):
    (tmp_path / "batch").write_bytes(python2_pickle(value))
    with pytest.raises(UserError, match=message) as caught:
        data.read_cifar10(tmp_path / "batch")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}N" + b"\x85" * 1_000_000 + b"Ns.",  # a tuple nested too deep to be hashed
        b"\x80\x02}N" + b"2\x86" * 60 + b"Ns.",  # one that doubles sixty times
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # a place in the memo that would take 34 GB
    ],
)
def test_pickles_built_to_exhaust_the_machine_are_refused(tmp_path, content):
    (tmp_path / "batch").write_bytes(content)
    with pytest.raises(UserError, match="built to exhaust"):
        data.read_cifar10(tmp_path / "batch")


def test_a_file_without_end_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_FILE", 1000)
    (tmp_path / "batch").write_bytes(python2_pickle(cifar_batch(0)))
    with pytest.raises(UserError, match="larger than 1000 bytes"):
        data.read_cifar10(tmp_path / "batch")


def test_modern_pickles_and_missing_files(tmp_path):
    for protocol in (3, 4):
        (tmp_path / "batch").write_bytes(pickle.dumps(cifar_batch(3), protocol))
        pictures, labels = data.read_cifar10(tmp_path / "batch")
        assert labels.tolist() == cifar_batch(3)[b"labels"]
        np.testing.assert_array_equal(pictures.reshape(8, -1), cifar_batch(3)[b"data"])
    with pytest.raises(UserError, match="cannot read"):
        data.read_cifar10(tmp_path / "missing")
    (tmp_path / data.CIFAR10_FOLDER).mkdir()
    with pytest.raises(UserError, match="cannot read"):
        data.load_cifar10(tmp_path)


def test_what_python_says_of_a_pickle_in_two_lines_becomes_one(tmp_path):
    (tmp_path / "x").write_bytes(b"\x80\2K\1Q.")
    with pytest.raises(UserError, match=r"persistent id instruction was encountered,\); delete"):
        data.read_cifar10(tmp_path / "x")


@fuzz(200)
@given(seed=seeds)
def test_a_fuzzed_pickle_only_ever_raises_our_own_error(seed, tmp_path):
    path = tmp_path / "damaged"
    path.write_bytes(fuzzed(python2_pickle({b"labels": [1], b"data": np.zeros((1, 3072), np.uint8)}), seed))
    with one_line_at_most():
        pictures, labels = data.read_cifar10(path)
        assert pictures.shape == (1, 3, 32, 32)
        assert pictures.dtype == np.uint8
        assert 0 <= labels <= 9


made_once = functools.cache(lambda make: make()[0])


@each_data_set
@fuzz(40)
@given(seed=seeds)
def test_a_fuzzed_archive_only_ever_raises_our_own_error(name, seed):
    """Half of the damage is done inside of the compression; and nothing appears but what belongs there."""
    published, make, load = PUBLISHED[name]
    content = made_once(make)
    if seed % 2 and name != "celeba":
        content = gzip.compress(fuzzed(gzip.decompress(content), seed), 1)
    else:
        content = fuzzed(content, seed)
    caches = {"stl10": "stl10-48.pictures", "celeba": "celeba-64.pictures"}
    folder = [data.CIFAR10_FOLDER, *(f"{data.CIFAR10_FOLDER}/{file}" for file in data.CIFAR10_FILES)]
    made = [caches[name]] if name in caches else folder
    with tempfile.TemporaryDirectory() as top:
        where = Path(top) / "data"
        where.mkdir()
        (where / published.name).write_bytes(content)
        with one_line_at_most():
            pictures = load(where, of(published, content))
            assert pictures.dtype == np.uint8
            assert pictures.shape[1:] == (3, *[{"cifar10": 32, "stl10": 48, "celeba": 64}[name]] * 2)
            assert len(pictures)
        assert set(leftovers(Path(top))) <= {"data", *(f"data/{file}" for file in [published.name, *made])}


@fuzz(100)
@given(seed=seeds)
def test_a_fuzzed_cache_only_ever_raises_our_own_error(seed, tmp_path):
    path = tmp_path / f"x{data.CACHE}"
    path.write_bytes(fuzzed(bytes(4 * 48), seed))
    with one_line_at_most():
        assert data.cached(path, 4, None).nbytes == path.stat().st_size > 0


def picture_kinds():
    """Files of many formats and modes, all showing the same slope; the tolerance is in steps of brightness."""
    picture = slope(60, 60)
    image = Image.fromarray(picture)
    grey = Image.fromarray(picture[..., 0])
    transparent = image.convert("RGBA")
    transparent.putalpha(0)
    turned, exif = image.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    grey3 = picture[..., :1].repeat(3, axis=2)
    yield "a.png", encoded(image), picture, 1
    yield "b.jpg", encoded(image, "JPEG", quality=95), picture, 8
    yield "c.bmp", encoded(image, "BMP"), picture, 1
    yield "d.webp", encoded(image, "WEBP", lossless=True), picture, 1
    yield "e.tiff", encoded(image, "TIFF"), picture, 1
    yield "f.PNG", encoded(image.convert("P", palette=Image.Palette.ADAPTIVE, colors=256)), picture, 40
    yield "g.gif", encoded(image, "GIF", save_all=True, append_images=[grey]), picture, 60
    yield "h.png", encoded(grey), grey3, 1
    yield "i.jpeg", encoded(image.convert("CMYK"), "JPEG", quality=95), picture, 8
    yield "j.png", encoded(transparent), np.full_like(picture, 255), 0
    yield "k.png", encoded(Image.fromarray(picture[..., 0].astype(np.uint16) * 257)), grey3, 1
    yield "l.jpg", encoded(turned, "JPEG", quality=95, exif=exif), picture, 8
    yield "m.png", encoded(image.convert("1", dither=0)), None, 0
    yield "n", encoded(image), picture, 1  # a file whose name tells nothing


def test_a_picture_of_any_format_and_mode_is_read(tmp_path):
    for name, content, _, _ in picture_kinds():
        (tmp_path / name).write_bytes(content)
    pictures = data.load_folder(tmp_path, tmp_path / "cache", 30)
    kinds = list(picture_kinds())
    assert pictures.shape == (len(kinds), 3, 30, 30)
    for picture, (name, _, expected, tolerance) in zip(pictures, kinds, strict=True):
        if expected is not None:
            halves = expected.reshape(30, 2, 30, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
            distance = np.abs(picture - halves)[..., 1:-1, 1:-1]
            assert distance.max() <= tolerance + 3 * (tolerance > 0), name


@given(square=st.integers(16, 90), more=st.integers(0, 60), tall=st.booleans(), side=st.sampled_from([4, 8]))
@settings(max_examples=50)
def test_the_middle_square_of_a_picture_is_taken(square, more, tall, side):
    """A blue square with a green first quarter, red on both sides: the result is the square, and nothing of the red."""
    picture, edge = np.full((square, square + 2 * more, 3), (255, 0, 0), np.uint8), square // 4
    picture[:, more : more + square] = (0, 0, 255)
    picture[:, more : more + edge] = (0, 255, 0)
    fitted = data.fit(Image.fromarray(picture.swapaxes(0, 1) if tall else picture), side)
    assert fitted.shape == (3, side, side)
    fitted = fitted.swapaxes(1, 2) if tall else fitted
    assert fitted[0, :, 1:-1].max() < 10
    assert fitted[1, :, 0].min() > 180
    assert fitted[2, :, side // 2 :].min() > 180
    assert fitted[0, :, -1].max() < 90


def test_a_folder_is_decoded_once_and_again_when_it_changes(tmp_path, capsys, monkeypatch):
    folder, cache = tmp_path / "faces [1]", tmp_path / "data"
    (folder / "more" / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    names = ["b.png", "a.png", "more/c.png", "more/deep/d.png"]
    for i, name in enumerate(names):
        (folder / name).write_bytes(encoded(np.full((9, 9, 3), i, np.uint8)))
    for name in (".DS_Store", ".hidden/e.png"):
        (folder / name).write_bytes(encoded(np.full((9, 9, 3), 99, np.uint8)))
    (folder / "notes.txt").write_text("no picture")
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    (folder / "cut.png").write_bytes(encoded(noise)[:700])
    decoded, fit = [], data.fit
    monkeypatch.setattr(data, "fit", lambda picture, side: decoded.append(side) or fit(picture, side))

    def load(side=8):
        decoded.clear()
        capsys.readouterr()
        return data.load_folder(folder, cache, side)[:, 0, 0, 0].tolist(), len(decoded), capsys.readouterr().err

    first = load()
    assert first[0] == [1, 0, 2, 3]  # in the order of their names
    assert "skipped 'cut.png'" in first[2]
    assert "skipped 'notes.txt'" in first[2]
    assert "hidden" not in first[2]
    assert load() == ([1, 0, 2, 3], 0, "")
    (folder / "e.png").write_bytes(encoded(np.full((9, 9, 3), 4, np.uint8)))
    assert load()[0] == [1, 0, 4, 2, 3]
    os.utime(folder / "e.png", ns=(1, 1))
    assert load()[1] == 6
    (folder / "b.png").unlink()
    assert load()[0] == [1, 4, 2, 3]
    assert len(leftovers(cache)) == 1
    assert load(16)[1] == 5
    assert load()[1] == 0
    assert len(leftovers(cache)) == 2
    assert data.load_folder(folder, folder, 8).shape == (4, 3, 8, 8)
    decoded.clear()
    assert data.load_folder(folder, folder, 8).shape == (4, 3, 8, 8)  # a cache among the pictures is none of them
    assert decoded == []
    assert len(list(folder.glob("*.pictures"))) == 1


def test_a_runs_own_grids_are_no_pictures_to_learn(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(slope(9, 9)))
    (tmp_path / "runs" / "x" / "samples").mkdir(parents=True)
    for name in ("checkpoint.npz", "log.csv", "samples/step-000000.png", "locality.png"):
        (tmp_path / "runs" / "x" / name).write_bytes(encoded(slope(9, 9)))
    assert len(data.load_folder(tmp_path, tmp_path / "data", 8)) == 1


def test_odd_pictures_and_long_names_are_taken_without_a_word(tmp_path, monkeypatch, capsys):
    folder = tmp_path / ("long" * 60)
    folder.mkdir()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # Pillow warns of larger ones
    (folder / "large.png").write_bytes(encoded(slope(20, 20)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.load_folder(folder, tmp_path, 8).shape == (1, 3, 8, 8)
    assert capsys.readouterr().err == ""


def test_many_unreadable_files_are_counted_and_an_empty_folder_is_refused(tmp_path, capsys):
    folder = tmp_path / "pictures"
    with pytest.raises(UserError, match="there is no folder"):
        data.load_folder(folder, tmp_path, 8)
    folder.mkdir()
    with pytest.raises(UserError, match="holds no files"):
        data.load_folder(folder, tmp_path, 8)
    for i in range(14):
        (folder / f"{i}.txt").write_text("x")
    with pytest.raises(UserError, match="holds no picture that can be read"):
        data.load_folder(folder, tmp_path, 8)
    (folder / "one.png").write_bytes(encoded(slope(9, 9)))
    capsys.readouterr()
    assert len(data.load_folder(folder, tmp_path, 8)) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[-1] == f"skipped 4 more of {folder}'s 15 files"
    with pytest.raises(UserError, match="cannot keep the decoded pictures in .* choose another --data-dir"):
        data.load_folder(folder, folder / "1.txt", 8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
@fuzz(30)
@given(seed=seeds)
def test_a_fuzzed_picture_is_read_or_skipped(kind, seed, capsys):
    good, bad = encoded(slope(9, 9)), fuzzed(encoded(slope(20, 20), kind), seed)
    with warnings.catch_warnings(), one_line_at_most():
        warnings.simplefilter("ignore")  # Pillow's, on odd pictures
        pictures = list(data.decode(["bad", "good"], lambda name: io.BytesIO(good if name == "good" else bad), 8, "x"))
    assert pictures[0].shape in ((1, 3, 8, 8), (2, 3, 8, 8))
    assert ("skipped 'bad': " in capsys.readouterr().err) == (len(pictures[0]) == 1)


@pytest.mark.parametrize("image_size", [8, 16, 32])
def test_shapes_are_deterministic_and_varied(image_size):
    pictures = data.draw_shapes(60, image_size)
    assert pictures.shape == (60, 3, image_size, image_size)
    assert pictures.dtype == np.uint8
    np.testing.assert_array_equal(pictures, data.draw_shapes(60, image_size))
    assert len(np.unique(pictures.reshape(60, -1), axis=0)) == 60
    assert (data.draw_shapes(60, image_size, seed=1) != pictures).any()
    middle = pictures[:, :, image_size // 2, image_size // 2].astype(int)
    corner = pictures[:, :, 0, 0].astype(int)
    assert (np.abs(middle - corner).max(axis=1) > 60).mean() > 0.95  # a shape stands out from its ground
    assert len(np.unique(corner, axis=0)) >= len(data.GROUNDS)


@given(count=st.integers(1, 30), batch_size=st.integers(1, 30), seed=st.integers(0, 5))
def test_batches_are_shuffled_afresh_each_epoch(count, batch_size, seed):
    pictures = np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1)
    if batch_size > count:
        with pytest.raises(UserError, match="lower --batch-size"):
            data.Batches(pictures, batch_size, seed)
        return
    batches = data.Batches(pictures, batch_size, seed)
    epochs = [[np.round((batches[e * batches.per_epoch + i] + 1) * 127.5).ravel() for i in range(batches.per_epoch)]
              for e in range(3)]  # fmt: skip
    for epoch in epochs:
        drawn = np.concatenate(epoch)
        assert len(set(drawn)) == len(drawn) == count // batch_size * batch_size
    for epoch in range(3):  # asked for first of all
        again = data.Batches(pictures, batch_size, seed)[epoch * batches.per_epoch]
        np.testing.assert_array_equal(np.round((again + 1) * 127.5).ravel(), epochs[epoch][0])
    if count == batch_size > 12:
        assert (epochs[0][0] != epochs[1][0]).any()


def test_a_fingerprint_tells_every_byte_and_shape(monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 4)
    pictures = np.random.default_rng(0).integers(0, 256, (10, 3, 2, 2), dtype=np.uint8)
    first, last = pictures.copy(), pictures.copy()
    first[0, 0, 0, 0] ^= 1
    last[-1, -1, -1, -1] ^= 1
    others = [first, last, pictures[:9], pictures.reshape(10, 3, 4, 1), pictures.view(np.int8), pictures[::-1]]
    found = {data.fingerprint(x) for x in [pictures, *others]}
    assert len(found) == 1 + len(others)
    assert data.fingerprint(pictures.copy()) == data.fingerprint(pictures)
    assert data.fingerprint(pictures, first) != data.fingerprint(first, pictures)


def npz(content, compression=zipfile.ZIP_DEFLATED):
    """A zip file, open, with one member: x.npy."""
    file = zipfile.ZipFile(io.BytesIO(), "w", compression)
    file.writestr("x.npy", content)
    return file


def npy(claim, content=b""):
    """An .npy file whose header claims this shape."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": claim})
    return out.getvalue() + content


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: npz(npy((1 << 24,), bytes(1 << 26))), "claims 67108864 bytes, more than 100"),
        (lambda: npz(npy((1 << 60,))), "claims"),
        (lambda: npz(npy((-1,), bytes(8))), "claims -4"),
        (lambda: npz(npy((4,), bytes(1 << 26))), "cannot reshape|buffer size"),
        (lambda: npz(npy((4,), bytes(8))), "cannot reshape|buffer"),
        (lambda: npz(npy((4,), bytes(16)), zipfile.ZIP_BZIP2), "in a way that NumPy does not use"),
        (lambda: npz(b"\x93NUMPY\3\0" + bytes(99)), "another version"),
        (lambda: npz(npy((1,), bytes(8)).replace(b"'<f4'", b"'O'  ")), "OBJECT"),
    ],
)
def test_an_array_that_claims_too_much_is_not_read(make, message):
    with make() as file:
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match=message):
                data.read_array(file, "x", 100)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


@given(array=st.sampled_from([np.arange(6.0), np.arange(6).reshape(2, 3), np.array(3), np.arange(6.0).reshape(3, 2).T]))
def test_an_array_is_read_as_numpy_reads_it(array):
    out = io.BytesIO()
    np.savez(out, x=array)
    got = data.read_array(zipfile.ZipFile(out), "x", 100)
    assert (got.dtype, got.shape, got.tolist()) == (array.dtype, array.shape, array.tolist())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), data.whole_file(path) as part:
        part.write_text("half")
        assert path.read_text() == "before"
        raise KeyboardInterrupt
    assert (path.read_text(), leftovers(tmp_path)) == ("before", ["file"])
    with data.whole_file(path) as part:
        part.write_text("after")
    assert (path.read_text(), leftovers(tmp_path)) == ("after", ["file"])


def test_scaling_and_grids_keep_every_pixel(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (10, 3, 16, 16), dtype=np.uint8)
    scaled = data.scale(pictures)
    assert scaled.dtype == np.float32
    assert data.scale(np.array([0, 255], np.uint8)).tolist() == [-1, 1]
    data.save_grid(scaled, tmp_path / "grid.png", columns=4)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == ((3 * 17 + 1) * 6, (4 * 17 + 1) * 6, 3)
    for i, picture in enumerate(pictures):
        top, left = 6 * (1 + i // 4 * 17), 6 * (1 + i % 4 * 17)
        np.testing.assert_array_equal(grid[top : top + 96 : 6, left : left + 96 : 6], picture.transpose(1, 2, 0))
    data.save_grid(np.array([7.0, -7.0]).reshape(2, 1, 1, 1) * np.ones((2, 3, 4, 4)), tmp_path / "bright.png")
    assert np.asarray(Image.open(tmp_path / "bright.png"))[30, [30, 150]].tolist() == [[255] * 3, [0] * 3]
    data.save_grid(np.zeros((1, 3, 97, 97)), tmp_path / "large.png", columns=1)
    assert Image.open(tmp_path / "large.png").size == (99, 99)
    assert leftovers(tmp_path) == ["bright.png", "grid.png", "large.png"]


# --- 9. Command line --------------------------------------------------------------------------------------------------


def run_main(*args):
    """The exit code of the command line."""
    try:
        return transgan.main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code


def fails(capsys, *args):
    """The one line on standard error with which the command line refuses, exit code 2."""
    capsys.readouterr()
    assert run_main(*args) == 2
    line = capsys.readouterr().err
    assert line.startswith("transgan: ")
    assert line.count("\n") == 1
    assert line.endswith("\n")
    return line


TRAIN = ("--image-size", 8, "--steps", 4, "--batch-size", 4, "--gen-batch-size", 4, "--device", "auto")


@pytest.fixture
def hasty(monkeypatch):
    """The classifier of FID-own is trained for a few steps only."""
    from paper import classifier

    monkeypatch.setattr(classifier.train_classifier, "__defaults__", (10,))


def read_log(out):
    with (out / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_writes_samples_log_and_checkpoint(small, tmp_path, capsys):
    out = tmp_path / "run"
    assert run_main(*TRAIN, "--out", out, "--sample-every", 2) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"step 4/4  D -?\d.*  G -?\d.*  penalty \d.*  distance \d.* pictures/s  0:00:\d\d elapsed  0:00:00 left", printed
    )
    assert "\r" not in printed
    files = [*sorted(transgan.CHECKPOINTS), "curves.png", "log.csv", "progress.gif", "report.html", "samples"]
    assert leftovers(out) == files + [f"samples/step-00000{i}.png" for i in (0, 2, 4)]
    rows = read_log(out)
    assert [row["step"] for row in rows] == list("01234")
    assert [bool(row["distance"]) for row in rows] == [True, False, True, False, True]
    assert all(float(row["disc_loss"]) and float(row["penalty"]) and float(row["gen_loss"]) for row in rows[1:])
    with np.load(out / "checkpoint.npz") as saved:
        names = set(saved)
        assert json.loads(str(saved["options"]))["steps"] == 4
    for prefix in ("generator/", "discriminator/", "average/", "generator/adam.v/", "discriminator/adam.v/"):
        assert any(name.startswith(prefix) for name in names)


@pytest.mark.parametrize("decay", [0, 1 - 1e-12])
def test_a_runs_grids_and_distance_are_of_the_averaged_generator(decay, small, tmp_path):
    """They stay as they were at first if the average does, whatever became of the weights in training."""
    flags = ("--sample-every", 4, "--learning-rate", 0.01, "--sr-weight", 1, "--ema-decay", decay)
    assert run_main(*TRAIN, "--out", tmp_path / "run", *flags) == 0
    for kind in ("step", "restored"):
        first, last = ((tmp_path / "run" / "samples" / f"{kind}-00000{step}.png").read_bytes() for step in (0, 4))
        assert (first == last) == (decay > 0)
    rows = read_log(tmp_path / "run")
    assert (rows[0]["distance"] == rows[4]["distance"]) == (decay > 0)


def test_long_steps_are_sampled_and_saved_by_the_clock(small, tmp_path, monkeypatch):
    saved, save = [], transgan.Trainer.save
    monkeypatch.setattr(transgan.Trainer, "save", lambda self, path: saved.append(self.step) or save(self, path))
    for patience, steps in ((math.inf, [0, 4]), (0, [0, 1, 2, 3, 4])):
        saved.clear()
        monkeypatch.setattr(transgan, "PATIENCE", patience)
        out = tmp_path / str(patience)
        assert run_main(*TRAIN, "--out", out, "--sample-every", 100, "--save-every", 100) == 0
        assert saved == steps
        assert [int(p.stem[5:]) for p in sorted((out / "samples").iterdir())] == steps


def test_co_training_shows_what_it_restores(small, tmp_path, capsys):
    out = tmp_path / "run"
    assert run_main(*TRAIN, "--out", out, "--sr-weight", 10) == 0
    assert re.search(r"step 4/4 .* SR \d", capsys.readouterr().out)
    assert all(float(row["sr_loss"]) > 0 for row in read_log(out)[1:])
    grid = np.asarray(Image.open(out / "samples" / "restored-000004.png")).astype(int)
    assert grid.shape == ((3 * 9 + 1) * 12, (8 * 9 + 1) * 12, 3)  # three rows of eight pictures of 8x8, enlarged
    small, original = (grid[top : top + 96 : 12, 12:108:12] for top in (12, 12 * 19))
    np.testing.assert_array_equal(small[::2, ::2], small[1::2, 1::2])
    blocks = original.reshape(4, 2, 4, 2, 3).mean(axis=(1, 3))
    assert np.abs(blocks - small[::2, ::2]).max() <= 1


def test_a_folder_of_anybodys_pictures_is_learnt(small, tmp_path, capsys):
    folder, out = tmp_path / "my pictures", tmp_path / "run"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.png").write_bytes(encoded(slope(20 + i, 30, i % 6)))
    (folder / "notes.txt").write_text("no picture")
    train = ("--size", "tiny", *TRAIN, "--diff-aug", "none", "--data-dir", tmp_path / "data", "--save-every", 2)
    assert run_main("--dataset", folder, *train, "--out", out) == 0
    printed = capsys.readouterr()
    assert f"on {folder} 8x8, 12 pictures" in printed.out
    assert "skipped 'notes.txt'" in printed.err
    moved = folder.rename(tmp_path / "elsewhere")
    resume = ("--resume", out, "--steps", 6, "--data-dir", tmp_path / "data")
    assert "there is no folder" in fails(capsys, *resume)
    assert run_main(*resume, "--dataset", moved) == 0
    assert [row["step"] for row in read_log(out)] == list("0123456")
    options, where = transgan.choose_options(transgan.make_parser().parse_args(["--dataset", str(moved)]))
    assert (options.size, options.image_size, options.steps, where.as_posix()) == ("S", 32, 500_000, "runs/elsewhere-S")


@pytest.mark.parametrize(("name", "side", "stages"), [("stl10", 48, 3), ("celeba", 64, 4)])
def test_the_larger_data_sets_are_learnt(name, side, stages, tmp_path, monkeypatch, capsys):
    """One step of networks that are small but for their four stages, of pictures that were decoded before."""
    monkeypatch.setitem(transgan.SIZES, "tiny", transgan.Size(256, (1, 1, 1), 16, 1))
    monkeypatch.setattr(transgan, "JUDGED", 8)
    pictures = np.stack([slope(side, side, i).transpose(2, 0, 1) for i in range(6)])
    (tmp_path / f"{name}-{side}.pictures").write_bytes(pictures.tobytes())
    made, grow = [], transgan.Generator.grow

    def counted(self, x, first):
        made.append(len(self.stages))
        return grow(self, x, first)

    monkeypatch.setattr(transgan.Generator, "grow", counted)
    assert run_main("--dataset", name, "--size", "tiny", "--steps", 1, "--disc-steps", 1, "--batch-size", 2,
                    "--gen-batch-size", 2, "--sr-weight", 1, "--locality", "4:1600", "--data-dir", tmp_path,
                    "--out", tmp_path / "run") == 0  # fmt: skip
    assert f"{name} {side}x{side}, 6 pictures" in capsys.readouterr().out
    assert set(made) == {stages}
    for kind, rows in (("step", 1), ("restored", 3)):
        grid = Image.open(tmp_path / "run" / "samples" / f"{kind}-000001.png")
        factor = max(1, 96 // side)
        assert grid.size == ((8 * (side + 1) + 1) * factor, (rows * (side + 1) + 1) * factor), kind


def parsed(*args):
    return transgan.choose_options(transgan.make_parser().parse_args([str(arg) for arg in args]))[0]


@pytest.mark.parametrize("name", transgan.PRESETS)
def test_presets_are_the_papers_runs(name, capsys):
    dataset, size = name.split("-")
    options = parsed("--preset", name)
    assert (options.dataset, options.size, options.loss) == (dataset, size, "wgangp-eps")
    assert (options.batch_size, options.gen_batch_size, options.disc_steps, options.steps) == (64, 128, 5, 500_000)
    assert (options.learning_rate, options.ema_decay, options.sr_weight) == (1e-4, 0.999, 50)
    assert (options.diff_aug, options.locality) == (POLICY, "4:22,6:32,8:42,10:60")
    changed = parsed("--preset", name, "--steps", 7, "--size", "tiny", "--diff-aug", "none", "--accumulate", 4)
    assert changed == dataclasses.replace(options, steps=7, size="tiny", diff_aug="none", accumulate=4)
    assert run_main("--summary", "--preset", name, "--batch-size", 48) == 0
    command = capsys.readouterr().out.splitlines()[0].split()
    assert command[0] == "transgan.py"
    assert parsed(*command[1:]) == dataclasses.replace(options, batch_size=48)
    assert len(command) == 1 + 2 * len(dataclasses.fields(options))


def test_a_preset_gives_way_to_another_data_set(tmp_path):
    assert parsed("--preset", "cifar10-S", "--dataset", "stl10").image_size == 48
    assert parsed("--preset", "cifar10-S", "--dataset", tmp_path, "--image-size", 64).patch_size == 8
    command = transgan.flags(parsed("--dataset", tmp_path / ".." / tmp_path.name))
    assert shlex.split(command)[1] == str(tmp_path.resolve())


@pytest.mark.parametrize(("side", "patch"), [(8, 4), (16, 4), (20, 4), (32, 4), (36, 4), (44, 4), (48, 6), (64, 8)])
def test_patches_keep_the_papers_grid(side, patch):
    assert parsed("--image-size", side).patch_size == patch


def test_a_profile_is_printed_when_the_run_is_done(small, tmp_path, capsys):
    assert run_main(*TRAIN, "--out", tmp_path / "run", "--profile") == 0
    printed = capsys.readouterr().out
    made = {"forward": ("attention", "linear", "layer_norm", "linear_gelu"),
            "backward": ("softmax", "linear", "layer_norm", "gelu")}  # fmt: skip
    for direction, operations in made.items():
        for operation in operations:
            assert re.search(rf"^{operation} +{direction} +\d", printed, re.M), (operation, direction)
    assert run_main(*TRAIN, "--out", tmp_path / "plain") == 0
    with np.load(tmp_path / "run/checkpoint.npz") as a, np.load(tmp_path / "plain/checkpoint.npz") as b:
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    assert "attention" not in capsys.readouterr().out


def test_a_terminal_gets_one_live_line(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert run_main(*TRAIN, "--out", tmp_path / "run", "--loss", "hinge") == 0
    printed = capsys.readouterr().out
    assert printed.count("\r\033[K") >= 2
    assert printed.count("\n") == 3  # the opening line, the live line left standing, and where the picture is
    assert "penalty" not in printed


@pytest.mark.parametrize("loss", transgan.LOSSES)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(loss, small, tmp_path, capsys, monkeypatch):
    arguments = (*TRAIN, "--loss", loss, "--save-every", 2)
    assert run_main(*arguments, "--out", tmp_path / "unbroken") == 0
    train_step = transgan.Trainer.train_step

    def interrupted(self):
        if self.step == 3:
            raise KeyboardInterrupt
        return train_step(self)

    monkeypatch.setattr(transgan.Trainer, "train_step", interrupted)
    assert run_main(*arguments, "--out", tmp_path / "broken") == 130
    monkeypatch.setattr(transgan.Trainer, "train_step", train_step)
    assert run_main("--resume", tmp_path / "broken", "--steps", 4, "--loss", loss) == 0
    with np.load(tmp_path / "unbroken/checkpoint.npz") as a, np.load(tmp_path / "broken/checkpoint.npz") as b:
        assert set(a) == set(b)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    columns = ("step", "disc_loss", "gen_loss", "penalty", "distance")
    logs = [[[row[c] for c in columns] for row in read_log(tmp_path / run)] for run in ("unbroken", "broken")]
    assert logs[0] == logs[1]
    pictures = [(tmp_path / run / "samples/step-000004.png").read_bytes() for run in ("unbroken", "broken")]
    assert pictures[0] == pictures[1]


def test_a_run_stopped_before_its_first_look_can_be_gone_on_with(small, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(transgan, "sliced_wasserstein", lambda a, b: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run_main(*TRAIN, "--out", tmp_path / "run") == 130
    assert run_main("--resume", tmp_path / "run") == 0
    assert run_main(*TRAIN, "--out", tmp_path / "plain") == 0
    assert [row["disc_loss"] for row in read_log(tmp_path / "run")] == [
        row["disc_loss"] for row in read_log(tmp_path / "plain")
    ]


def test_options_that_would_do_nothing_are_refused(small, tmp_path, capsys):
    for args, message in (
        (["--features", "own"], "--features goes with --evaluate"),
        (["--inception", "x"], "--inception goes with --evaluate"),
        (["--fid-stats", "x"], "--fid-stats goes with --evaluate"),
        (["--num-images", "20"], "--num-images goes with --evaluate or --evaluate-every"),
        (["--evaluate", "x", "--profile"], "watch a training"),
        (["--evaluate", "x", "--evaluate-every", "2"], "watch a training"),
        (["--evaluate", "x", "--features", "own", "--inception", "y"], "leave out one of them"),
        (["--evaluate", "x", "--resume", "x"], "leave out one of them"),
    ):
        assert message in fails(capsys, *args), args


def test_options_that_a_person_gets_wrong(small, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "empty").mkdir()
    for args, message in (
        (["--size", "XXL"], "invalid choice: 'XXL'"),
        (["--dataset", "imagenet"], "'imagenet' is neither a folder nor one of cifar10, stl10, celeba, shapes"),
        (["--dataset", ""], "'' is neither a folder nor one of"),
        (["--dataset", tmp_path / "file"], "is neither a folder nor one of"),
        (["--dataset", tmp_path / "empty"], "holds no files"),
        (["--preset", "cifar10-XXL"], "invalid choice: 'cifar10-XXL'"),
        (["--accumulate", "0"], "0 must be from 1"),
        (["--loss", "mse"], "invalid choice: 'mse'"),
        (["--steps", "many"], "'many' is not a whole number"),
        (["--steps", "0"], "0 must be from 1"),
        (["--learning-rate", "nan"], "must be from 0 to 1"),
        (["--learning-rate", "fast"], "'fast' is not a number"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--nonsense\n\x1b[31m"], r"--nonsense\n\x1b[31m"),
        (["--out", ""], "the name of a folder is empty"),
        (["--sr-weight", "-1"], "must be from 0"),
        (["--locality", "near"], "'near' must be none, or pairs"),
        (["--locality", "4:22,4:32"], "both growing"),
        (["--locality", "4:22,6:1601"], "epochs up to 1600"),
        (["--locality-stages", "5"], "must be from 1 to 4"),
        (["--diff-aug", "blur"], "'blur' must be none, or some of translation,cutout,color"),
        (["--diff-aug", "color,color"], "each once"),
        (["--diff-aug", "none,color"], "must be none, or some"),
        (["--image-size", "30"], "--image-size 30 must divide by 4"),
        (["--image-size", "30", "--summary"], "--image-size 30 must divide by 4"),
        (["--patch-size", "5"], "--patch-size 5 does not divide --image-size 16"),
        (["--batch-size", "1000"], "lower --batch-size"),
        (["--out", tmp_path / "file" / "run"], "choose another --out"),
        (["--dataset", "cifar10", "--image-size", "48"], "cifar10 has pictures of 32 pixels a side, not 48"),
        (["--preset", "stl10-XL", "--image-size", "32"], "stl10 has pictures of 48 pixels a side, not 32"),
        (["--dataset", "cifar10", "--data-dir", tmp_path / "file"], "cannot download"),
    ):
        if "--out" not in args:
            args = [*args, "--out", tmp_path / "run"]
        assert message in fails(capsys, *args), args
    if DEVICE == "cpu":
        assert "no GPU to use" in fails(capsys, "--device", "gpu", "--out", tmp_path / "run")


def nonsense_checkpoints(good):
    def change(**arrays):
        def write(path):
            with np.load(good) as saved:
                np.savez(path, **(dict(saved) | arrays))

        return write

    def options(**changes):
        with np.load(good) as saved:
            return change(options=json.dumps(json.loads(str(saved["options"])) | changes))

    content = good.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 255
    yield "missing", lambda path: None, "cannot read"
    yield "text", lambda path: path.write_text("hello"), "cannot read"
    yield "empty", lambda path: path.write_bytes(b""), "cannot read"
    yield "truncated", lambda path: path.write_bytes(content[:-5000]), "cannot read"
    yield "a flipped bit", lambda path: path.write_bytes(flipped), "is damaged"
    yield "an array alone", lambda path: np.save(path.open("wb"), np.ones(3)), "cannot read"
    yield "other arrays", lambda path: np.savez(path, a=np.ones(3)), "lacks options or step"
    yield "objects", change(step=np.array([{}], object)), "is damaged"

    def repeated(path):
        path.write_bytes(content)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("a", b"")
            archive.filelist += 99 * [max(archive.filelist, key=lambda member: member.file_size)]

    yield "members that lie on one another", repeated, "claims more than its size"
    yield "compressed", lambda path: np.savez_compressed(path, **np.load(good)), "claims more than its size"
    yield (
        "another shape",
        change(**{"generator/to_rgb.bias": np.ones(4, np.float32)}),
        "does not fit: generator/to_rgb.bias",
    )
    yield "another type", change(**{"generator/to_rgb.bias": np.ones(3)}), "does not fit: generator/to_rgb.bias"
    yield "a step of words", change(step=np.array("three")), "is damaged"
    yield "a step too far", change(step=np.array(-1)), "is damaged"
    yield "options of words", change(options=np.array("{}}")), "options of another version"
    yield "unknown option", options(colour="red"), "options of another version"
    yield "option of another type", options(steps="9"), "its option steps is '9'"
    yield "unknown size", options(size="XXL"), "its option size is 'XXL'"
    yield "size of no text", options(size=["S"]), "its option size is ['S']"
    yield "data set of no text", options(dataset={}), "its option dataset is {}"
    yield "unknown network", options(generator="biggan"), "its option generator is 'biggan'"
    yield "unknown data set", options(dataset="imagenet"), "its data set 'imagenet' is no full path"
    yield "unknown augmentation", options(diff_aug="blur"), "its option diff_aug is 'blur'"
    yield "augmentation of no text", options(diff_aug=3), "its option diff_aug is 3"
    yield "unknown locality", options(locality="4:4:4"), "its option locality is '4:4:4'"
    yield "impossible size", options(image_size=10), "must divide by 4"
    yield "size out of range", options(image_size=2**30), f"its option image_size is {2**30}"
    yield "rate out of range", options(learning_rate=math.inf), "its option learning_rate is inf"
    yield "steps out of range", options(steps=10**400), "its option steps is"
    yield "options nested deep", change(options=np.array("[" * 16_000)), "is damaged"
    yield "a step and a half", change(step=np.array(1.5)), "is damaged"
    yield "an endless step", change(step=np.array(math.inf)), "is damaged"
    yield "negative batch", options(batch_size=-4), "its option batch_size is -4"


def test_resuming_from_nonsense(small, tmp_path, capsys):
    good, bad = tmp_path / "good", tmp_path / "bad"
    assert run_main(*TRAIN, "--out", good) == 0
    for name, write, message in nonsense_checkpoints(good / "checkpoint.npz"):
        bad.mkdir(exist_ok=True)
        checkpoint = bad / "checkpoint.npz"
        checkpoint.unlink(missing_ok=True)
        write(checkpoint)
        before = checkpoint.read_bytes() if checkpoint.exists() else None
        assert message in fails(capsys, "--resume", bad, "--steps", 9), name
        assert (checkpoint.read_bytes() if checkpoint.exists() else None) == before, name
    assert "leave out --size" in fails(capsys, "--resume", good, "--size", "S")
    assert "leave out --dataset" in fails(capsys, "--resume", good, "--dataset", tmp_path)
    assert "leave out --preset" in fails(capsys, "--resume", good, "--preset", "cifar10-S")
    assert "is finished" in fails(capsys, "--resume", good)
    assert "holds a run already" in fails(capsys, *TRAIN, "--out", good)
    (good / "log.csv").write_bytes(b"step\n\xff\xfe")
    assert "log.csv" in fails(capsys, "--resume", good, "--steps", 9)


def test_a_checkpoint_that_is_refused_is_closed(tmp_path, monkeypatch):
    """So that it can be moved out of the way, also on Windows."""
    np.savez(tmp_path / "checkpoint.npz", a=np.ones(3))
    opened = []

    class Recorded(zipfile.ZipFile):
        def __init__(self, *args):
            opened.append(self)
            super().__init__(*args)

    monkeypatch.setattr(zipfile, "ZipFile", Recorded)
    with pytest.raises(UserError, match="lacks options or step"):
        transgan.whole_checkpoint(tmp_path / "checkpoint.npz")
    assert [file.fp for file in opened] == [None]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux which files are open")
def test_no_file_is_replaced_while_it_is_open(small, hasty, tmp_path, monkeypatch):
    """Windows would refuse to; here it is rehearsed."""
    replaced, wrong, replace = set(), [], os.replace

    def strict(source, target):
        opened = {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}
        wrong.extend(opened & {os.path.realpath(source), os.path.realpath(target)})
        replaced.add(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", strict)
    monkeypatch.setattr(Path, "replace", strict)
    out = tmp_path / "run"
    assert run_main(*TRAIN, "--out", out, "--save-every", 2) == 0
    (out / transgan.CHECKPOINTS[0]).write_bytes(b"damaged")
    assert run_main("--resume", out) == 0
    assert run_main("--from", out, "--sample", 2, "--interpolate", 2) == 0
    assert run_main("--evaluate", out, "--num-images", 20, "--data-dir", tmp_path) == 0
    assert wrong == []
    assert {*transgan.CHECKPOINTS, "checkpoint-damaged.npz", "log.csv", "step-000004.png", "report.html", "progress.gif",
            "scores.json"} <= replaced  # fmt: skip


def test_what_lies_in_a_folder_is_not_overwritten(small, tmp_path, capsys):
    for name in ("log.csv", "samples/step-000000.png", "checkpoint.npz"):
        out = tmp_path / name.replace("/", "-")
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("precious")
        assert "choose another --out" in fails(capsys, *TRAIN, "--out", out)
        assert (out / name).read_text() == "precious"
    run, other = tmp_path / "run", tmp_path / "other"
    assert run_main(*TRAIN, "--out", run) == run_main(*TRAIN, "--out", other) == 0
    before = (other / "checkpoint.npz").read_bytes()
    assert "holds a run already" in fails(capsys, "--resume", run, "--out", other, "--steps", 6)
    assert holds(other / "checkpoint.npz", before)
    assert run_main("--resume", run, "--out", tmp_path / "branch", "--steps", 5) == 0
    assert [row["step"] for row in read_log(tmp_path / "branch")] == ["5"]
    with pytest.raises(UserError, match="holds a run already"):  # one that began while this one loaded its data
        transgan.Log(run / "log.csv", 0, 4)


def test_resuming_keeps_the_log_and_its_clock(small, tmp_path, capsys):
    out = tmp_path / "run"
    assert run_main(*TRAIN, "--out", out) == 0
    lines = (out / "log.csv").read_text().splitlines()
    lines = [line + (",note" if line.startswith("step") else ",x") for line in lines]  # a column more than ours
    lines[-1] = lines[-1].rpartition(",")[0].rpartition(",")[0] + ",1000,x"
    (out / "log.csv").write_text("\n".join(lines) + "\n")
    assert run_main("--resume", out, "--steps", 6) == 0
    rows = read_log(out)
    assert [row["step"] for row in rows] == list("0123456")
    assert 1000 < float(rows[5]["seconds"]) < 1010
    assert leftovers(out)[:3] == [*sorted(transgan.CHECKPOINTS), "curves.png"]


@pytest.mark.parametrize("torn", [b"1", b"4", b"45,0.1", b"\0" * 100, b"\xff,1", b"6," + b"9" * 200_000])
def test_what_a_log_says_after_the_checkpoint_does_not_matter(torn, small, tmp_path):
    out = tmp_path / "run"
    assert run_main(*TRAIN, "--out", out) == 0
    with (out / "log.csv").open("ab") as file:
        file.write(torn)
    assert run_main("--resume", out, "--steps", 6) == 0
    assert [row["step"] for row in read_log(out)] == list("0123456")


def test_resuming_refuses_every_other_option(small, tmp_path, capsys):
    out = tmp_path / "run"
    assert run_main(*TRAIN, "--out", out) == 0
    for flag, value in (("--dataset", "cifar10"), ("--size", "S"), ("--image-size", 16), ("--patch-size", 2), ("--seed", 7),
                        ("--loss", "hinge"), ("--batch-size", 3), ("--gen-batch-size", 3), ("--disc-steps", 3),
                        ("--learning-rate", 0.5), ("--ema-decay", 0.5), ("--diff-aug", "color"),
                        ("--sr-weight", 1.0), ("--locality", "1:1"), ("--locality-stages", 2),
                        ("--discriminator", "autogan"), ("--beta2", 0.5)):  # fmt: skip
        assert f"leave out {flag} {value}" in fails(capsys, "--resume", out, "--steps", 6, flag, value)


@functools.cache
def saved_once():
    """A small run's checkpoint and log, after three of six steps, and the trainer."""
    trainer = small_trainer(1)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "samples").mkdir()
        transgan.train(trainer, Path(folder), 6, 3)
        previous = Path(folder, transgan.CHECKPOINTS[1])
        return previous.read_bytes(), Path(folder, "log.csv").read_bytes(), trainer


@fuzz(60)
@given(seed=seeds)
def test_a_fuzzed_checkpoint_only_ever_raises_our_own_error(seed, small, tmp_path):
    """Or it is as it was written, because every byte that matters is held against a checksum."""
    content, _, trainer = saved_once()
    path = tmp_path / transgan.CHECKPOINTS[0]
    path.write_bytes(content)
    trainer.load(path)
    expected = state_of(trainer)
    path.write_bytes(fuzzed(content, seed))
    with one_line_at_most():
        trainer.load(transgan.newest_checkpoint(tmp_path))
        assert trainer.step == 3
    assert_same_state(state_of(trainer), expected)


@fuzz(150)
@given(seed=seeds)
def test_a_fuzzed_log_only_ever_raises_our_own_error(seed, small, tmp_path):
    _, content, _ = saved_once()
    path = tmp_path / "log.csv"
    path.write_bytes(fuzzed(content, seed))
    with one_line_at_most():
        log = transgan.Log(path, 3, 6, resumed=True)
        log.add(4, {"disc_loss": 1.0}, 6)
        log.close()
        rows = read_log(tmp_path)
        assert rows[-1]["step"] == "4"
        assert all(int(row["step"]) <= 3 for row in rows[:-1])
        assert math.isfinite(float(rows[-1]["seconds"]))


def test_help_and_summary(capsys):
    assert run_main("--help") == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(transgan.Options):
        assert f"--{field.name.replace('_', '-')} " in text
    assert run_main("--summary", "--dataset", "cifar10") == 0
    text = capsys.readouterr().out
    assert "18,639,531" in text
    assert "12,458,497" in text


def objects(text):
    """The JSON objects of --json's lines."""
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def test_json_tells_a_run_to_programs(small, tmp_path, capsys):
    """An object a line: what the run is, the log's rows, where the picture is, and how it ended."""
    out = tmp_path / "run"
    assert run_main(*TRAIN, "--out", out, "--json", "--loss", "hinge", "--profile") == 0
    first, *steps, profile, picture, last = objects(capsys.readouterr().out)
    assert (first["event"], first["options"]["loss"], first["options"]["dataset"]) == ("start", "hinge", "shapes")
    assert (first["device"], first["out"], first["pictures"]) == (DEVICE, str(out), 40)
    assert [step.pop("event") for step in steps] == 5 * ["step"]
    for step, row in zip(steps, read_log(out), strict=True):
        assert {name: f"{x:.6g}" for name, x in step.items()} == {name: x for name, x in row.items() if x}
    assert {"attention", "linear"} <= {row["operation"] for row in profile["operations"]}
    assert picture == {"event": "picture", "path": str(out / "samples" / "step-000004.png")}
    assert last == {"event": "end", "exit_code": 0, "error": None}


def test_json_tells_what_else_is_printed(small, hasty, tmp_path, capsys):
    out = tmp_path / "run"
    assert run_main(*TRAIN, "--out", out, "--quiet") == 0
    assert run_main("--from", out, "--sample", 2, "--json") == 0
    picture, last = objects(capsys.readouterr().out)
    assert Image.open(picture["path"]).format == "PNG"
    assert run_main("--evaluate", out, "--num-images", 20, "--data-dir", tmp_path, "--json") == 0
    scores, last = objects(capsys.readouterr().out)
    assert scores == {"event": "scores"} | json.loads((out / "scores.json").read_text())[0]
    assert run_main("--summary", "--dataset", "cifar10", "--json") == 0
    summary, last = objects(capsys.readouterr().out)
    total = {row["network"]: row["parameters"] for row in summary["rows"] if row["stage"] == "total"}
    assert total == {"generator": 18_639_531, "discriminator": 12_458_497}
    assert last == {"event": "end", "exit_code": 0, "error": None}


def test_json_tells_how_a_run_ended(small, tmp_path, capsys, monkeypatch):
    out, train_step = tmp_path / "run", transgan.Trainer.train_step

    def stopped(self):
        signal.raise_signal(signal.SIGINT)
        return train_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(transgan.Trainer, "train_step", stopped)
        assert run_main(*TRAIN, "--out", out, "--json") == 130
    *_, stop, last = objects(capsys.readouterr().out)
    assert (stop["event"], stop["step"], stop["signal"]) == ("stopped", 1, signal.SIGINT)
    assert shlex.split(stop["resume"])[:4] == ["python", "transgan.py", "--resume", str(out)]
    assert last == {"event": "end", "exit_code": 130, "error": None}
    monkeypatch.setattr(transgan.Trainer, "train_step", lambda self: train_step(self) | {"gen_loss": ag.xp.array(math.nan)})
    assert run_main("--resume", out, "--json") == 2
    printed = capsys.readouterr()
    *_, step, last = objects(printed.out)
    assert (step["step"], step["gen_loss"]) == (2, None)
    assert (last["event"], last["exit_code"]) == ("end", 2)
    assert printed.err == f"transgan: {last['error']}\n"


def test_quiet_says_nothing_but_errors(small, hasty, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    out = tmp_path / "run"
    assert run_main(*TRAIN, "--out", out, "--quiet", "--profile") == 0
    assert run_main("--evaluate", out, "--num-images", 20, "--data-dir", tmp_path, "--quiet") == 0
    assert run_main("--from", out, "--sample", 2, "--quiet") == run_main("--summary", "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert "is finished" in fails(capsys, "--resume", out, "--quiet")
    assert run_main(*TRAIN, "--out", tmp_path / "loud") == 0  # the next run speaks again
    assert "done: " in capsys.readouterr().out
    assert "not allowed with" in fails(capsys, "--quiet", "--json")


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_who_wants_no_escape_sequences_gets_none(name, value, small, tmp_path, capsys, monkeypatch):
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "")  # an empty one says nothing
    monkeypatch.setenv("TERM", "xterm")
    for plain in (False, True):
        if plain:
            monkeypatch.setenv(name, value)
        assert run_main(*TRAIN, "--out", tmp_path / str(plain)) == 0
        with data.Progress() as progress:
            progress("half of it")
        printed = capsys.readouterr()
        assert ("\033" not in printed.out, "\033" not in printed.err) == (plain, plain)
        assert re.search(r"step 4/4 .*\n", printed.out)


def test_a_path_from_the_tilde_on_is_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    (tmp_path / "my pictures").mkdir()
    args = transgan.make_parser().parse_args(["--out=~/x", "--data-dir=~", "--dataset=~/my pictures"])
    assert (args.out, args.data_dir) == (tmp_path / "x", tmp_path)
    assert args.dataset == str((tmp_path / "my pictures").resolve())
    assert transgan.folder("~nobody-of-that-name/x") == Path("~nobody-of-that-name/x")
    assert transgan.folder("x/~") == Path("x/~")


def test_a_printed_command_can_be_pasted(small, tmp_path, capsys, monkeypatch):
    out = tmp_path / "it's a run"
    assert run_main(*TRAIN, "--out", out) == 0
    pattern = r"go on with it by (--resume .*), or choose"
    assert shlex.split(re.search(pattern, fails(capsys, *TRAIN, "--out", out))[1]) == ["--resume", str(out)]
    monkeypatch.setattr(transgan.Trainer, "train_step", lambda self: {"gen_loss": ag.xp.array(math.nan)})
    words = re.search(r"with (--resume .*), or start", fails(capsys, "--resume", out, "--steps", 6))[1]
    assert shlex.split(words) == ["--resume", str(out), "--on-nan", "rewind"]
    args = transgan.make_parser().parse_args([])
    for program, words in (("transgan.py", ["python", "transgan.py"]), ("bin/transgan", ["transgan"]),
                           ("bin/transgan.exe", ["transgan"])):  # fmt: skip
        monkeypatch.setattr(sys, "argv", [program])
        assert shlex.split(transgan.resume_command(args, out)) == [*words, "--resume", str(out)]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("flowers", "flowers"),
        ('a<b>c:d"e|f?g*h\\i', "a_b_c_d_e_f_g_h_i"),
        ("a\nb\x00", "a_b_"),
        ("v1.2", "v1.2"),
        ("ends. . ", "ends"),
        ("con", "_con"),
        ("Lpt1.jpg-S", "_Lpt1.jpg-S"),
        ("COM² .x", "_COM² .x"),
        ("console", "console"),
        ("com10", "com10"),
    ],
)
def test_names_of_files_are_such_as_any_system_takes(name, kept):
    assert data.portable(name) == kept


def test_a_runs_folder_and_its_cache_are_named_so(tmp_path, monkeypatch):
    folder = tmp_path / "aux.1"
    folder.mkdir()
    (folder / "1.png").write_bytes(encoded(slope(20, 30, 1)))
    parsed = transgan.make_parser().parse_args(["--dataset", str(folder)])
    assert transgan.choose_options(parsed)[1] == Path("runs", "_aux.1-S")
    data.load_folder(folder, tmp_path / "data", 8)
    assert [path.name[:9] for path in (tmp_path / "data").iterdir()] == ["_aux.1-8-"]
    assert data.short_name("a:b") == "a_b"


def test_no_function_is_longer_than_a_screen():
    for name in ("autograd.py", "data.py", "transgan.py"):
        for node in ast.walk(ast.parse(Path(__file__).with_name(name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, (name, node.name)


def test_as_a_program():
    program = [sys.executable, str(Path(__file__).with_name("transgan.py"))]
    done = subprocess.run([*program, "--size", "huge"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    done = subprocess.run([*program, "--summary"], capture_output=True, text=True, check=True)
    assert "16x16" in done.stdout


def test_the_command_that_pip_installs(tmp_path):
    """It is the program, from wherever it is called, and all that transgan.py imports is installed with it."""
    root = Path(__file__).parent
    project, source = ((root / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "transgan.py"))
    installed = json.loads(re.search(r"^py-modules = (.*)", project, re.M)[1])
    installed += json.loads(re.search(r"^packages = (.*)", project, re.M)[1])
    imported = set(re.findall(r"^ *(?:from|import) (\w+)", source, re.M))
    assert {name for name in imported if (root / name).is_dir() or (root / f"{name}.py").exists()} <= {*installed}
    module, function = re.search(r'^transgan = "(\w+):(\w+)"', project, re.M).groups()
    program = [sys.executable, "-c", f"import sys, {module}; sys.exit({module}.{function}())"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([*program, "--num-images", "20"], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    done = subprocess.run(
        [*program, "--summary"], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )
    assert "16x16" in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="about a POSIX shell")
@pytest.mark.parametrize("shell", ['exec "$@" --out "$0/caf\xe9" >"$0/out"', 'exec "$@" --out "$0/run" >&-'])
def test_as_a_program_in_odd_surroundings(shell, tmp_path):
    """A name that the terminal cannot show, and an output that is closed, are no reason to stop."""
    program = [sys.executable, str(Path(__file__).with_name("transgan.py")), "--image-size", "8", "--steps", "1",
               "--batch-size", "2", "--gen-batch-size", "2", "--device", "cpu"]  # fmt: skip
    command = ["sh", "-c", shell.encode("latin-1"), str(tmp_path), *program]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")


# --- 10. Losing nothing -----------------------------------------------------------------------------------------------


def step_of(folder):
    """The step of the newest checkpoint that can be loaded, into the run's own networks."""
    path = transgan.newest_checkpoint(folder)
    options = transgan.read_options(path)
    trainer = transgan.Trainer(options, data.draw_shapes(40, options.image_size), 1)
    trainer.load(path)
    return trainer.step


def test_a_checkpoint_that_is_missing_or_damaged_gives_way_to_the_one_before(small, tmp_path, capsys):
    assert run_main(*TRAIN, "--out", tmp_path / "unbroken") == 0
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-9]), flip_a_bit):
        out = tmp_path / "run"
        assert run_main(*TRAIN, "--out", out, "--save-every", 1) == 0
        damage(out / "checkpoint.npz")
        damaged = leftovers(out).count("checkpoint.npz")
        capsys.readouterr()
        assert run_main("--resume", out) == 0
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert re.match(r"transgan: .*[^-]checkpoint.npz.*; going on from checkpoint-previous.npz\n", error)
        assert step_of(out) == 4
        assert same_arrays(tmp_path / "unbroken/checkpoint.npz", out / "checkpoint.npz")
        assert [row["step"] for row in read_log(out)] == list("01234")
        assert leftovers(out).count("checkpoint-damaged.npz") == damaged
        for path in out.glob("*.npz"):
            path.write_text("nothing")
        assert re.search(
            r"checkpoint.npz: .*, and .*checkpoint-previous.npz: .*; start a new", fails(capsys, "--resume", out)
        )
        shutil.rmtree(out)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def same_arrays(*paths):
    """Whether two checkpoints hold the same, to the bit."""
    with np.load(paths[0]) as a, np.load(paths[1]) as b:
        return set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a)


def test_a_checkpoint_of_another_run_is_refused_by_what_differs(small, tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    small_trainer().save(path)
    for options, message in (
        ({"image_size": 16}, "is of another run: its image_size is 8, not 16"),
        ({"loss": "hinge"}, "its loss is 'wgangp-eps', not 'hinge'"),
        ({"sr_weight": 0.0}, "its sr_weight is 2.0, not 0.0"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            small_trainer(**options).load(path)
    small_trainer(steps=9, accumulate=2).load(path)
    for size, message in (
        (
            transgan.Size(64, (1, 1, 1), 32, 2),
            "discriminator/embed.weight is float32 of shape (12, 16), not float32 of shape",
        ),
        (transgan.Size(64, (1, 2, 1), 16, 2), "it has no generator/stages.1.blocks.1"),
        (transgan.Size(64, (1, 1, 1), 16, 1), "these networks have no 'discriminator/adam.v/blocks.1"),
    ):
        monkeypatch.setitem(transgan.SIZES, "tiny", size)
        trainer = small_trainer()
        before = state_of(trainer)
        with pytest.raises(UserError, match="does not fit: .*" + re.escape(message)):
            trainer.load(path)
        assert_same_state(state_of(trainer), before)


def fork(function):
    """Call a function in a forked process: its exit code, or minus the signal that ended it."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = function() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


on_posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="about POSIX's processes")


@on_cpu
@on_posix
def test_a_kill_at_any_moment_of_saving_leaves_a_whole_checkpoint(small, tmp_path, capsys):
    """The process is killed before the first file that it opens, renames or removes, then before the second, and so on."""
    trainer, found = small_trainer(1), []
    for moment in range(99):
        folder = tmp_path / str(moment)
        folder.mkdir()
        for trainer.step in range(2):
            trainer.save(folder / "checkpoint.npz")
        left = iter(range(moment))

        def kill(event, args, folder=str(folder), left=left):
            if event in ("open", "os.rename", "os.remove") and str(args[0]).startswith(folder) and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        def save(folder=folder, kill=kill):
            trainer.step = 2
            sys.addaudithook(kill)
            trainer.save(folder / "checkpoint.npz")

        code = fork(save)
        found.append((step_of(folder), "going on from" in capsys.readouterr().err))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert found[0] == (1, False)
    assert found[-1] == (2, False)
    assert (1, True) in found  # between the two renames
    assert sorted(found, key=lambda step: step[0]) == found


@on_cpu
@on_posix
def test_a_training_that_is_killed_again_and_again_loses_nothing(small, tmp_path, capsys):
    """At random moments, KILLS times; it comes to where it would have been, to the bit.

    One in three is killed while it starts, the others after they wrote a checkpoint.
    """
    out, rng, steps = tmp_path / "run", random.Random(0), [-1]

    def last_written():
        with contextlib.suppress(FileNotFoundError):  # which it may be for a moment
            return (out / transgan.CHECKPOINTS[0]).stat().st_mtime_ns

    always = ("--device", "cpu", "--threads", 1, "--save-every", 1, "--sample-every", 100_000)
    first = ("--image-size", 8, "--steps", 100_000, "--batch-size", 2, "--gen-batch-size", 2, "--disc-steps", 1)
    for kill in range(int(os.environ.get("KILLS", 6))):
        begun = any((out / name).exists() for name in transgan.CHECKPOINTS)
        written = last_written()
        pid = os.fork()
        if not pid:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os._exit(run_main(*always, *(("--resume", out) if begun else (*first, "--out", out))))
        patience = time.monotonic() + 60 * (kill % 3 > 0)
        while last_written() == written and time.monotonic() < patience:
            time.sleep(0.005)
        time.sleep(rng.uniform(0.01, 0.3))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        if any((out / name).exists() for name in transgan.CHECKPOINTS):
            steps.append(step_of(out))
    assert sorted(steps) == steps
    before = steps[-1]
    assert before > 0
    options = transgan.read_options(transgan.newest_checkpoint(out))
    unbroken = transgan.Trainer(options, data.draw_shapes(40, 8), 1)
    losses = [unbroken.train_step() for _ in range(before)]
    resumed = transgan.Trainer(options, data.draw_shapes(40, 8), 1)
    resumed.load(transgan.newest_checkpoint(out))
    assert_same_state(state_of(resumed), state_of(unbroken))
    transgan.Log(out / "log.csv", before, options.steps, resumed=True).close()
    rows = read_log(out)
    assert [int(row["step"]) for row in rows] == list(range(before + 1))
    assert [row["gen_loss"] for row in rows[1:]] == [f"{float(step['gen_loss']):.6g}" for step in losses]


def test_a_run_killed_before_its_first_checkpoint_can_be_begun_again(small, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.csv").touch()
    assert run_main(*TRAIN, "--out", tmp_path / "run") == 0
    assert [row["step"] for row in read_log(tmp_path / "run")] == list("01234")


def test_what_a_killed_run_was_writing_is_removed(small, tmp_path):
    out = tmp_path / "run"
    assert run_main(*TRAIN, "--out", out) == 0
    for name in ("checkpoint.npz.1.part", "samples/step-000000.png.1.part", "mine.part"):
        (out / name).write_text("half")
    assert run_main("--resume", out, "--steps", 5) == 0
    assert [name for name in leftovers(out) if "part" in name] == ["mine.part"]


@pytest.mark.parametrize("call", range(3))
def test_whatever_fails_while_saving_the_last_checkpoint_stays(call, small, tmp_path, monkeypatch, capsys):
    out, calls = tmp_path / "run", []
    assert run_main(*TRAIN, "--out", out, "--save-every", 2) == 0

    def failing(function):
        def call_or_fail(path, *args):
            if path.name.startswith("checkpoint"):
                calls.append(path)
                if len(calls) > call:
                    raise PermissionError(13, "Permission denied", str(path))
            return function(path, *args)

        return call_or_fail

    with monkeypatch.context() as patch:
        patch.setattr(data, "sync", failing(data.sync))
        patch.setattr(Path, "replace", failing(Path.replace))
        assert "checkpoint.npz" in fails(capsys, "--resume", out, "--steps", 6)
    assert len(calls) == call + 1
    assert step_of(out) == 4
    assert not list(out.glob("*.part"))
    assert run_main("--resume", out, "--steps", 6) == 0


@on_cpu
@on_posix
def test_a_folder_that_may_not_be_written_to_keeps_its_run(small, capfd):
    with tempfile.TemporaryDirectory() as top:
        out = Path(top) / "run"
        assert run_main(*TRAIN, "--out", out) == 0
        before = {path: path.read_bytes() for path in out.glob("*.*")}
        for path in (Path(top), out, out / "samples"):
            path.chmod(0o555)

        def resume():
            if os.getuid() == 0:  # whom no folder refuses
                os.setuid(65534)
            return run_main("--resume", out, "--steps", 6)

        try:
            assert fork(resume) == 2
        finally:
            for path in (Path(top), out, out / "samples"):
                path.chmod(0o755)
        assert "cannot write in" in capfd.readouterr().err
        assert {path: path.read_bytes() for path in out.glob("*.*")} == before
        assert step_of(out) == 4


def test_a_disk_that_is_full_keeps_the_last_checkpoint(small, tmp_path, capsys):
    out = tmp_path / "run"
    assert run_main(*TRAIN, "--out", out, "--save-every", 2) == 0
    before = (out / "checkpoint.npz").read_bytes()
    for size in (0, 100, 10_000, len(before) - 1):
        with files_of_at_most(size):
            assert "free some space" in fails(capsys, "--resume", out, "--steps", 6)
        assert holds(out / "checkpoint.npz", before)
        assert not list(out.glob("checkpoint*.part"))
        assert step_of(out) == 4
    assert run_main("--resume", out, "--steps", 6) == 0
    assert [row["step"] for row in read_log(out)] == list("0123456")


def at_step(step, action, monkeypatch):
    """From now on, Trainer.train_step calls action(trainer, losses) at the end of this generator step."""
    train_step = transgan.Trainer.train_step

    def acting(self):
        losses = train_step(self)
        if self.step == step:
            action(self, losses)
        return losses

    monkeypatch.setattr(transgan.Trainer, "train_step", acting)


@on_posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(number, code, small, tmp_path, capsys, monkeypatch):
    before = signal.getsignal(number)
    assert run_main(*TRAIN, "--out", tmp_path / "unbroken", "--threads", 2) == 0
    out, more = tmp_path / "a run", ("--data-dir", tmp_path / "my data", "--threads", 2, "--on-nan", "rewind")
    with monkeypatch.context() as patch:
        at_step(2, lambda *_: os.kill(os.getpid(), number), patch)
        assert run_main(*TRAIN, "--out", out, *more) == code
    assert signal.getsignal(number) == before
    assert step_of(out) == 2
    assert [row["step"] for row in read_log(out)] == list("012")
    command = capsys.readouterr().err.strip().partition("go on with: ")[2]
    assert shlex.split(command) == ["python", "transgan.py", "--resume", *map(str, (out, *more))]
    assert run_main(*shlex.split(command)[2:]) == 0
    assert same_arrays(tmp_path / "unbroken/checkpoint.npz", out / "checkpoint.npz")


@on_posix
def test_a_second_ctrl_c_stops_at_once_and_one_at_the_end_does_nothing(small, tmp_path, monkeypatch):
    def twice(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        at_step(3, twice, patch)
        assert run_main(*TRAIN, "--out", tmp_path / "run", "--save-every", 2) == 130
    assert step_of(tmp_path / "run") == 2
    with monkeypatch.context() as patch:
        at_step(4, lambda *_: os.kill(os.getpid(), signal.SIGINT), patch)
        assert run_main("--resume", tmp_path / "run") == 0


@on_posix
def test_signals_that_are_ignored_and_other_threads_are_left_alone(small, tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with transgan.stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert stop.asked is None
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run_main(*TRAIN, "--out", tmp_path / "run")))
    thread.start()
    thread.join()
    assert codes == [0]


@on_posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_as_a_program_it_ends_with_the_signals_exit_code(number, code, tmp_path):
    program = [sys.executable, str(Path(__file__).with_name("transgan.py")), "--image-size", "8", "--batch-size", "2",
               "--gen-batch-size", "2", "--device", "cpu", "--out", str(tmp_path / "run")]  # fmt: skip
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert any("step 1/" in line for line in process.stdout)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"go on with: python transgan.py --resume {tmp_path / 'run'} --device cpu\n" in error
    assert "Traceback" not in error


def poison(what):
    """An action for `at_step`: a loss, or a number of the generator, becomes NaN, unless the rate was halved twice."""

    def act(trainer, losses):
        if trainer.rate_scale > 0.25:
            if what == "loss":
                losses["disc_loss"] = losses["disc_loss"] * math.nan
            else:
                trainer.gen_parameters["to_rgb.bias"].data[1:] = math.inf

    return act


@pytest.mark.parametrize(
    ("what", "message"),
    [("loss", "disc_loss is nan at step 3"), ("weight", "generator/to_rgb.bias is not finite after step 3")],
)
def test_what_is_not_finite_stops_the_run_and_reaches_no_checkpoint(what, message, small, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    at_step(3, poison(what), monkeypatch)
    line = fails(capsys, *TRAIN, "--out", out, "--save-every", 1, *(("--sample-every", 1) if what == "loss" else ()))
    assert message in line
    assert not (out / "samples/step-000003.png").exists()
    assert f"--resume {out} --on-nan rewind" in line
    assert "--learning-rate 0.0005" in line
    assert step_of(out) == 2
    with np.load(out / "checkpoint.npz") as saved:
        assert all(np.isfinite(saved[name]).all() for name in saved if name != "options")


@pytest.mark.parametrize("what", ["loss", "weight"])
def test_rewinding_halves_the_rate_and_goes_on_exactly(what, small, tmp_path, capsys, monkeypatch):
    out, by_hand = tmp_path / "run", small_trainer(1)
    with monkeypatch.context() as patch:
        at_step(3, poison(what), patch)
        assert run_main(*TRAIN, "--out", out, "--save-every", 2, "--on-nan", "rewind", "--threads", 1) == 0
    error = capsys.readouterr().err
    assert "back to step 2, at 0.5 of the learning rate\n" in error
    assert "back to step 2, at 0.25 of the learning rate\n" in error
    assert error.count("\n") == 2
    assert [row["step"] for row in read_log(out)] == list("01234")
    by_hand = transgan.Trainer(transgan.read_options(out / "checkpoint.npz"), data.draw_shapes(40, 8), 1)
    for by_hand.rate_scale in (1.0, 1.0, 0.25, 0.25):
        by_hand.train_step()
    by_hand.save(tmp_path / "by-hand.npz")
    assert same_arrays(tmp_path / "by-hand.npz", out / "checkpoint.npz")
    assert run_main("--resume", out, "--steps", 5) == 0
    assert np.load(out / "checkpoint.npz")["rate_scale"] == 0.25


def test_rewinding_gives_up_when_it_does_not_help(small, tmp_path, capsys, monkeypatch):
    def break_it(trainer, losses):
        losses["gen_loss"] = losses["gen_loss"] * math.nan

    at_step(1, break_it, monkeypatch)
    assert run_main(*TRAIN, "--out", tmp_path / "run", "--on-nan", "rewind") == 2
    error = capsys.readouterr().err
    assert error.count("back to step 0") == transgan.REWINDS
    assert re.search("gen_loss is nan at step 1; .* 5 times half the learning rate did not help", error.splitlines()[-1])
    assert step_of(tmp_path / "run") == 0


def test_a_branch_rewinds_to_where_it_began(small, tmp_path, capsys, monkeypatch):
    run, branch = tmp_path / "run", tmp_path / "branch"
    assert run_main(*TRAIN, "--out", run) == 0
    shutil.copy(run / "checkpoint.npz", run / "checkpoint-previous.npz")
    flip_a_bit(run / "checkpoint.npz")
    before = (run / "checkpoint.npz").read_bytes()
    at_step(5, poison("weight"), monkeypatch)
    assert run_main("--resume", run, "--out", branch, "--steps", 6, "--on-nan", "rewind") == 0
    assert capsys.readouterr().err.count("back to step 4") == 2
    assert [row["step"] for row in read_log(branch)] == list("56")
    assert holds(run / "checkpoint.npz", before)  # a branch changes nothing where it comes from


def test_a_score_that_is_not_finite_stops_the_run_and_what_is_not_finite_gets_none(small, tmp_path, monkeypatch):
    trainer, scores = small_trainer(1), iter(({"fid_own": 1.0}, {"fid_own": math.nan}))
    (tmp_path / "samples").mkdir()
    with pytest.raises(transgan.NotFinite, match="fid_own is nan at step 2"):
        transgan.train(trainer, tmp_path, 9, 1, evaluate_every=2, scores=lambda: next(scores))
    assert step_of(tmp_path) == 1
    assert [row["step"] for row in read_log(tmp_path)] == list("012")
    trainer.load(tmp_path / "checkpoint.npz")
    at_step(3, poison("loss"), monkeypatch)
    with pytest.raises(transgan.NotFinite, match="disc_loss is nan at step 3"):
        transgan.train(trainer, tmp_path, 9, 9, resumed=True, evaluate_every=3, scores=lambda: next(scores))


def test_half_the_rate_is_half_the_rate(small):
    halved, lower = small_trainer(1, learning_rate=2e-3), small_trainer(1, learning_rate=1e-3)
    halved.rate_scale = 0.5
    for trainer in (halved, lower):
        trainer.train_step()
    assert_same_state(state_of(halved), state_of(lower))


# --- 11. Parity with PyTorch ------------------------------------------------------------------------------------------
# The same networks in PyTorch, as functions of our parameters' names; benchmarks/step.py times itself against them.


def torch_parameters(parameters):
    """Our parameters as PyTorch leaves on the same device; linear weights in PyTorch's (outputs, inputs)."""
    import torch

    device = "cpu" if ag.xp is np else "cuda"
    leaves = {}
    for name, p in parameters.items():
        array = ag.to_numpy(p)
        array = array.T if is_matrix(name, array) else array
        leaves[name] = torch.tensor(np.ascontiguousarray(array), device=device, requires_grad=True)
    return leaves


def is_matrix(name, array):
    return name.endswith("weight") and array.ndim == 2


def torch_linear(p, name, x):
    import torch.nn.functional as F

    return F.linear(x, p[name + ".weight"], p.get(name + ".bias"))


def torch_norm(p, name, x):
    import torch.nn.functional as F

    return F.layer_norm(x, x.shape[-1:], p[name + ".weight"], p[name + ".bias"], 1e-5)


def torch_block(p, name, x, num_heads, fused=False, mask=None):
    import torch.nn.functional as F

    batch, tokens, width = x.shape
    qkv = torch_linear(p, name + ".attention.qkv", torch_norm(p, name + ".norm1", x))
    q, k, v = qkv.reshape(batch, tokens, 3, num_heads, width // num_heads).permute(2, 0, 3, 1, 4).unbind(0)
    if fused:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        scores = (q @ k.transpose(-2, -1)) * (width // num_heads) ** -0.5
        out = (scores if mask is None else scores.masked_fill(~mask, -1e9)).softmax(dim=-1) @ v
    x = x + torch_linear(p, name + ".attention.projection", out.transpose(1, 2).reshape(batch, tokens, width))
    hidden = F.gelu(torch_linear(p, name + ".mlp.expand", torch_norm(p, name + ".norm2", x)))
    return x + torch_linear(p, name + ".mlp.reduce", hidden)


def torch_generator(p, z, depths, num_heads=4, fused=False, small=None, mask=None):
    """Pictures from noise, or, of three stages, from small pictures through the last two; the mask is for the last."""
    import torch.nn.functional as F

    first = 0 if small is None else 1
    if first:
        x = torch_linear(p, "from_rgb", small.flatten(2).transpose(1, 2))
    else:
        x = torch_linear(p, "project", z).reshape(len(z), -1, z.shape[1])
    for k, depth in list(enumerate(depths))[first:]:
        if k > first:
            batch, tokens, width = x.shape
            side = math.isqrt(tokens)
            x = F.pixel_shuffle(x.transpose(1, 2).reshape(batch, width, side, side), 2).flatten(2).transpose(1, 2)
        x = x + p[f"stages.{k}.position"]
        for i in range(depth):
            x = torch_block(p, f"stages.{k}.blocks.{i}", x, num_heads, fused, mask if k == len(depths) - 1 else None)
    x = torch_linear(p, "to_rgb", x)
    side = math.isqrt(x.shape[1])
    return x.transpose(1, 2).reshape(len(x), 3, side, side)


def torch_discriminator(p, pictures, depth, patch_size, num_heads=4, fused=False):
    import torch
    import torch.nn.functional as F

    x = F.unfold(pictures, patch_size, stride=patch_size).transpose(1, 2)  # (B, N, 3pp), channel by channel as ours
    x = torch_linear(p, "embed", x)
    x = torch.cat([p["cls"].expand(len(x), -1, -1), x], dim=1) + p["position"]
    for i in range(depth):
        x = torch_block(p, f"blocks.{i}", x, num_heads, fused)
    return torch_linear(p, "head", torch_norm(p, "norm", x)[:, 0])[:, 0]


def torch_diff_augment(x, policy, draws):
    """Picture by picture, by padding and slicing, in the order of `policy`."""
    import torch
    import torch.nn.functional as F

    side, pictures = x.shape[-1], []
    for picture, (brightness, saturation, contrast, down, right, row, column) in zip(x, draws.tolist(), strict=True):
        for name in policy.split(","):
            if name == "color":
                picture = picture + brightness
                picture = torch.lerp(picture.mean(dim=0, keepdim=True).expand_as(picture), picture, saturation)
                picture = torch.lerp(picture.mean().expand_as(picture), picture, contrast)
            elif name == "translation":
                picture = F.pad(picture, [side] * 4)[:, side - int(down) :, side - int(right) :][:, :side, :side]
            else:
                size = (side + 1) // 2
                keep = torch.ones_like(picture)
                top, left = int(row) - size // 2, int(column) - size // 2
                keep[:, max(0, top) : max(0, top + size), max(0, left) : max(0, left + size)] = 0
                picture = picture * keep
        pictures.append(picture)
    return torch.stack(pictures)


def torch_discriminator_loss(discriminate, real, fake, loss, mix):
    import torch
    import torch.nn.functional as F

    on_real, on_fake = discriminate(real), discriminate(fake)
    if loss == "hinge":
        return F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()
    if loss == "standard":
        one = torch.ones_like(on_real)
        cross_entropy = F.binary_cross_entropy_with_logits
        return cross_entropy(on_real, one) + cross_entropy(on_fake, 0 * one)
    x = (mix * real + (1 - mix) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(discriminate(x).sum(), x, create_graph=True)
    penalty = 10 * ((slope.flatten(1).norm(2, dim=1) - 1) ** 2).mean()
    return on_fake.mean() - on_real.mean() + penalty + 1e-3 * on_real.mean() ** 2


def torch_generator_loss(on_fake, loss):
    import torch
    import torch.nn.functional as F

    if loss == "standard":
        return F.binary_cross_entropy_with_logits(on_fake, torch.ones_like(on_fake))
    return -on_fake.mean()


def assert_close_to_torch(ours, theirs, name="", tolerance=1e-8):
    """Relative to the largest number of the array: rounding is relative to what was added up, not to what is left."""
    ours, theirs = ag.to_numpy(ours), theirs.detach().cpu().numpy()
    ours = ours.T if is_matrix(name, ours) else ours
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max(), err_msg=name)


def check_gradients(loss, parameters, torch_loss, leaves):
    import torch

    assert_close_to_torch(loss, torch_loss)
    ours = grad(loss, parameters.values())
    for (name, g), theirs in zip(zip(parameters, ours, strict=True), torch.autograd.grad(torch_loss, leaves.values()),
                                 strict=True):  # fmt: skip
        assert_close_to_torch(g, theirs, name)


@pytest.mark.parametrize("loss", transgan.LOSSES)
@pytest.mark.parametrize("size", ["tiny", "S"])
def test_outputs_losses_and_all_gradients_agree_with_pytorch(size, loss):
    torch = pytest.importorskip("torch")
    dimensions, rng = transgan.SIZES[size], np.random.default_rng(11)
    generator = transgan.Generator(32, dimensions.embed_dim, dimensions.depths, rng, dtype=np.float64)
    discriminator = transgan.Discriminator(32, 4, dimensions.disc_embed_dim, dimensions.disc_depth, rng, dtype=np.float64)
    for p in discriminator.parameters().values():
        p.data = p.data * 3  # steep enough that hinge and penalty have something to say
    z, real, mix = (ag.xp.asarray(x) for x in normal(12, (2, dimensions.embed_dim), (2, 3, 32, 32), (2, 1, 1, 1)))
    g, d = torch_parameters(generator.parameters()), torch_parameters(discriminator.parameters())
    torch_z, torch_real, torch_mix = (
        torch.as_tensor(ag.to_numpy(x), device=g["to_rgb.bias"].device) for x in (z, real, mix)
    )

    def discriminate(x):
        return torch_discriminator(d, x, dimensions.disc_depth, 4)

    fake, torch_fake = generator(Tensor(z)), torch_generator(g, torch_z, dimensions.depths)
    assert_close_to_torch(fake, torch_fake)
    assert_close_to_torch(discriminator(fake), discriminate(torch_fake))
    ours = transgan.generator_loss(discriminator(fake).reshape(1, -1), loss)
    check_gradients(ours, generator.parameters(), torch_generator_loss(discriminate(torch_fake), loss), g)
    scores = transgan.discriminator_scores(discriminator, real, fake.data, mix, loss)
    theirs = torch_discriminator_loss(discriminate, torch_real, torch_fake.detach(), loss, torch_mix)
    check_gradients(transgan.discriminator_loss(scores, loss)[0], discriminator.parameters(), theirs, d)


class TorchTrainer:
    """transgan.Trainer's steps in PyTorch, from the same first weights and with the same draws."""

    def __init__(self, trainer):
        import torch

        self.batches, self.options, self.size = trainer.batches, trainer.options, transgan.SIZES[trainer.options.size]
        self.co_batches = trainer.co_batches if trainer.options.sr_weight else None
        self.draws = trainer.draws
        self.g, self.d = torch_parameters(trainer.gen_parameters), torch_parameters(trainer.disc_parameters)
        self.average = {name: p.detach().clone() for name, p in self.g.items()}
        self.adams = [torch.optim.Adam(p.values(), betas=(0.0, 0.99)) for p in (self.g, self.d)]
        self.step, self.largest_norm = 0, 0.0

    def tensor(self, array):
        import torch

        return torch.as_tensor(array, dtype=self.g["to_rgb.bias"].dtype, device=self.g["to_rgb.bias"].device)

    def generate(self, z, small=None):
        """With the window of 2 that small_trainer's schedule has in the first half of a run."""
        import torch

        mask, side = None, self.options.image_size
        if self.options.locality == "2:800" and self.step < self.options.steps / 2:
            place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1).double()
            mask = (torch.cdist(place.T, place.T, p=math.inf) <= 2).to(self.g["to_rgb.bias"].device)
        return torch_generator(self.g, z, self.size.depths, small=small, mask=mask)

    def discriminate(self, x, draws=None):
        if self.options.diff_aug != "none":
            x = torch_diff_augment(x, self.options.diff_aug, draws)
        return torch_discriminator(self.d, x, self.size.disc_depth, self.options.patch_size)

    def update(self, loss, parameters, adam):
        import torch

        for p, gradient in zip(parameters.values(), torch.autograd.grad(loss, parameters.values()), strict=True):
            p.grad = gradient
        self.largest_norm = max(self.largest_norm, torch.nn.utils.clip_grad_norm_(parameters.values(), 5.0).item())
        adam.param_groups[0]["lr"] = self.options.learning_rate * (1 - self.step / self.options.steps)
        adam.step()
        adam.zero_grad()
        return loss.item()

    def train_step(self):
        import torch

        options, rng = self.options, data.random_stream("step", self.options.seed, self.step)
        for i in range(options.disc_steps):
            real = self.batches[self.step * options.disc_steps + i]
            flipped = rng.random(len(real)) < 0.5
            real[flipped] = real[flipped, :, :, ::-1]
            mix = self.tensor(rng.random((len(real), 1, 1, 1)))
            z = self.tensor(rng.standard_normal((len(real), self.size.embed_dim)))
            fake, draws = self.generate(z).detach(), iter(self.draws((len(real), 3), rng).swapaxes(0, 1))
            loss = torch_discriminator_loss(
                lambda x, draws=draws: self.discriminate(x, next(draws)), self.tensor(real), fake, options.loss, mix
            )
            disc_loss = self.update(loss, self.d, self.adams[1])
        z = self.tensor(rng.standard_normal((options.gen_batch_size, self.size.embed_dim)))
        on_fake = self.discriminate(self.generate(z), self.draws((options.gen_batch_size,), rng))
        loss = torch_generator_loss(on_fake, options.loss)
        if options.sr_weight:
            real = self.co_batches[self.step]
            flipped = rng.random(len(real)) < 0.5
            real[flipped] = real[flipped, :, :, ::-1]
            real = self.tensor(real)
            small = torch.nn.functional.avg_pool2d(real, 2)
            restored = self.generate(None, small)
            loss = loss + options.sr_weight * torch.nn.functional.mse_loss(restored, real)
        gen_loss = self.update(loss, self.g, self.adams[0])
        with torch.no_grad():
            for name, p in self.g.items():
                self.average[name].lerp_(p, 1 - options.ema_decay)
        self.step += 1
        return {"disc_loss": disc_loss, "gen_loss": gen_loss}


@pytest.mark.parametrize("diff_aug", ["none", POLICY])
@pytest.mark.parametrize("loss", transgan.LOSSES)
def test_five_training_steps_agree_with_pytorch(loss, diff_aug):
    """Augmentation, co-training, locality, penalty, clipping, Adam, decay of the rate, average, five discriminator steps.

    At the paper's rate: at ten times that, Adam's quotients of tiny gradients magnify rounding by 10^9 within the five.
    """
    pytest.importorskip("torch")
    trainer = small_trainer(
        None, np.float64, loss=loss, diff_aug=diff_aug, image_size=16, patch_size=4, disc_steps=5, learning_rate=1e-4,
        ema_decay=0.9,
    )  # fmt: skip
    peer = TorchTrainer(trainer)
    for _ in range(5):
        ours, theirs = trainer.train_step(), peer.train_step()
        for name, value in theirs.items():
            assert float(ours[name]) == pytest.approx(value, rel=1e-8), name
    assert peer.largest_norm > 5  # clipping is part of what agrees
    for parameters, leaves in ((trainer.gen_parameters, peer.g), (trainer.disc_parameters, peer.d),
                               (trainer.average, peer.average)):  # fmt: skip
        for name, p in parameters.items():
            assert_close_to_torch(p, leaves[name], name)


@on_cpu
def test_the_benchmark_runs():
    pytest.importorskip("torch")
    script = Path(__file__).with_name("benchmarks") / "step.py"
    arguments = ["--sizes", "tiny", "--batch-sizes", "2,3", "--rounds", "1"]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert [(result["size"], result["batch_size"]) for result in results] == [("tiny", 2), ("tiny", 3)]
    for result in results:
        for what in ("discriminator step", "generator step", "peak memory"):
            assert set(result[what]) == {"ours", "eager", "fused"}
            assert min(result[what].values()) > 0
    assert subprocess.run([sys.executable, str(script), "--sides", "theirs"], capture_output=True).returncode == 2


@on_cpu
def test_engines_are_compared():
    """Those that are installed; whoever answers at all has to agree, or the script fails."""
    script = Path(__file__).with_name("benchmarks") / "engines.py"
    done = subprocess.run([sys.executable, str(script), "--rounds", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()[1:]
    assert re.fullmatch(r"this project +[\d.]+ ms \(1\.00\) +[\d.]+ ms \(1\.00\)", rows[0])
    assert len(rows) == 5


@on_cpu
def test_every_speed_up_can_be_taken_away():
    script = Path(__file__).with_name("benchmarks") / "speedups.py"
    arguments = ["--size", "tiny", "--batch-size", "2", "--rounds", "1"]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.rsplit(maxsplit=2) for line in done.stdout.splitlines()[2:]]
    assert len(rows) == 13
    assert all(float(ratio) > 0 for _, *ratios in rows for ratio in ratios)


@on_cpu
def test_the_table_of_growth_is_measured():
    script = Path(__file__).with_name("benchmarks") / "growth.py"
    arguments = ["--rounds", "1", "--largest", "64", "--device", "cpu"]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["grows"] for row in rows] == ["batch"] * 3 + ["tokens", "width"]
    small, base, large, fewer, narrow = rows
    for name in ("linear", "attention", "moved MB", "peak MB"):
        assert large[name] / small[name] == pytest.approx(16, rel=0.1)
    assert base["linear"] / fewer["linear"] == pytest.approx(4)
    assert base["attention"] / fewer["attention"] == pytest.approx(16)
    assert base["linear"] / narrow["linear"] == pytest.approx(16)


# --- 12. The README ---------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def readme_commands():
    """All commands in the README, as lists of words: in blocks, and inline, where they may go over lines."""
    lines = [line for language, block in FENCED for line in block.splitlines() if not language]
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
    lines += [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", prose)]
    commands = (part.strip() for line in lines for part in line.split("&&"))
    return [shlex.split(c) for c in commands if re.match(r"(FUZZ=\d+ |KILLS=\d+ )?(\.venv/bin/)?(python3?|pip) ", c)]


def test_the_readmes_links_lead_to_what_they_name():
    root = Path(__file__).parent
    text = (root / "README.md").read_text()
    links = re.findall(r"\[`([\w.]+)`\]\(([\w./]+)#L(\d+)\)", text)
    assert len(links) >= 6
    for name, file, line in links:
        assert re.match(rf"(class|def| +def) {name.split('.')[-1]}\b",
                        (root / file).read_text().splitlines()[int(line) - 1]), (name, file, line)  # fmt: skip
    for file in re.findall(r"\]\(((?!http)[^)#]+)", text):
        assert (root / file).exists(), file


def test_the_readmes_programs_run(tmp_path):
    """One after another, as a reader would type them into one session."""
    programs = [block for language, block in FENCED if language == "python"]
    assert len(programs) >= 3
    done = subprocess.run([sys.executable, "-c", "\n".join(programs)], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert leftovers(tmp_path) == ["augmentation.png"]


def test_the_readmes_change_of_the_loss_works(tmp_path):
    source, changes = (
        (ROOT / "transgan.py").read_text(encoding="utf-8"),
        [b for language, b in FENCED if language == "diff"],
    )
    assert changes
    for change in changes:
        before, after = ("".join(line[1:] for line in change.splitlines(True) if line[0] in kept) for kept in (" -", " +"))
        assert source.count(before) == 1
        source = source.replace(before, after)
    (tmp_path / "transgan.py").write_text(source, encoding="utf-8")
    arguments = [
        "--loss",
        "least-squares",
        "--steps",
        "1",
        "--image-size",
        "8",
        "--batch-size",
        "4",
        "--gen-batch-size",
        "4",
    ]
    done = subprocess.run([sys.executable, "transgan.py", *arguments], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read_log(tmp_path / "runs" / "shapes-tiny")[1]["penalty"] == ""


def test_the_readmes_commands_run(small, tmp_path, monkeypatch, capsys):
    """Those of this program, with networks and data made small and few steps: all options are taken as they stand."""
    classifier = importlib.import_module("paper.classifier")
    monkeypatch.setattr(classifier.train_classifier, "__defaults__", (3,))  # steps
    for size in ("S", "XL"):
        monkeypatch.setitem(transgan.SIZES, size, transgan.SIZES["tiny"])
    monkeypatch.setattr(data, "load_cifar10", lambda folder: data.draw_shapes(200, 32))
    monkeypatch.chdir(tmp_path)
    Path("path/to/folder").mkdir(parents=True)
    for i in range(8):
        Path(f"path/to/folder/{i}.png").write_bytes(encoded(slope(60, 60, i % 6)))
    commands = [words[words.index("transgan.py") + 1 :] for words in readme_commands() if "transgan.py" in words]
    assert len(commands) >= 10
    for number, words in enumerate(sorted(commands, key=len)):  # the first, without options, makes the run to look into
        few = []
        if "--evaluate" in words:
            few = ["--num-images", 20]
        elif not {"--from", "--summary"} & set(words):
            few = ["--steps", 1, "--batch-size", 2, "--gen-batch-size", 2, *(["--out", f"runs/{number}"] if number else [])]
        assert run_main(*words, *few) == 0, (words, capsys.readouterr().err)
        capsys.readouterr()


def test_the_readmes_other_commands_are_known(tmp_path):
    """What their own tests run is looked for; of long ones it is checked that they take these options."""
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.rglob("test_*.py"))
    for words in readme_commands():
        words = [word for word in words if not re.fullmatch(r"\w+=\d+", word)]
        program, rest = words[0], words[1:]
        if "transgan.py" in words or program.endswith("pip"):
            assert not program.endswith("pip") or rest[0] == "install"
        elif rest[0] == "-c":
            done = subprocess.run([sys.executable, *rest], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
            assert done.returncode == 0
        elif rest[:2] == ["-m", "pytest"]:
            assert not rest[2:] or re.search(rf"def test_\w*{rest[3]}", tests)
        elif rest[:2] == ["-m", "venv"]:
            assert rest[2] == ".venv"
        else:
            script = rest[1:] if rest[0] == "-m" else rest
            start = ["-m", script[0]] if rest[0] == "-m" else [str(ROOT / script[0])]
            done = subprocess.run([sys.executable, *start, "--help"], capture_output=True, text=True, cwd=ROOT)
            assert done.returncode == 0, done.stderr
            for word in script[1 : script.index("--") if "--" in script else None]:
                assert not word.startswith("--") or word in done.stdout, (words, word)


def test_the_readmes_options_exist():
    options = transgan.make_parser().format_help() + "--inception --rows --image-size --size"
    for option in set(re.findall(r"`(--[a-z][a-z-]+)", README)):
        assert option in options, option


def test_the_readmes_pictures_are_small():
    pictures = list((ROOT / "docs").iterdir())
    assert sum(path.stat().st_size for path in pictures) < 3e6
    for path in pictures:
        assert f"](docs/{path.name})" in README, path
