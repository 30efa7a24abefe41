"""How one tests derivatives, and the paper's equations as tests: python -m pytest

Every derivative is held against central differences in float64, in first and second order, over drawn shapes and values;
values against the definition written out by hand, whole networks' against the published code's (paper/test_golden.py).
These tests run once as the book is written, and once more with the fast forms in use (fast/test_book.py). All else is
tested beside what it is of, in the folders.

Contents
    1. Setting up             device, hypothesis profiles, what tests draw
    2. Primitive operations   first and second derivatives, extreme values
    3. Parts of networks      softmax, layer norm, linear, attention
    4. The engine             many paths, gradients' sums, grad's errors, gradient_check, Adam
    5. The networks           pixel shuffle, derivatives of whole networks, losses
    6. Training               augmentation, co-training, average, clipping, windows
    7. Data                   drawn shapes, batches, grids
"""

import functools
import math
import os
import statistics
import types
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, mutually_broadcastable_shapes
from PIL import Image

import autograd as ag
import data
import transgan
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


def check_same(one, other, arrays, tolerance=1e-9):
    """Two functions agree in value, in first derivative both with and without a recorded graph, and in second."""
    upstream = None
    results = []
    for function in (one, other):
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
    "constant": (lambda x: x**0, lambda x: x * 0),
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


@given(x=st.floats(0.01, 8))
def test_elementwise_values(x):
    below = statistics.NormalDist().cdf(x)
    (y,) = tensors(np.array([x, -x]))
    for function, values in (
        (ag.exp, [math.exp(x), math.exp(-x)]),
        (ag.normal_cdf, [below, 1 - below]),
        (ag.gelu, [x * below, x * (below - 1)]),
        (lambda y: ag.log(y[:1]), [math.log(x)]),
        (lambda y: ag.sqrt(y[:1]), [math.sqrt(x)]),
        (lambda y: y[:1] ** 1.5, [x**1.5]),
    ):
        close(function(y), values)


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
@pytest.mark.parametrize("name", ["sum", "mean"])
def test_reduction_derivatives(name, shape, seed, keepdims, draw):
    (x,) = normal(seed, shape)
    one = st.integers(-len(shape), len(shape) - 1)
    several = st.sets(st.integers(0, len(shape) - 1)).map(tuple)
    axis = draw.draw(st.one_of(st.none(), one, several))
    check(lambda x: getattr(x, name)(axis=axis, keepdims=keepdims), [x])
    result = getattr(Tensor(ag.xp.asarray(x)), name)(axis=axis, keepdims=keepdims)
    close(result, getattr(x, name)(axis=axis, keepdims=keepdims))


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


# --- 3. Parts of networks ---------------------------------------------------------------------------------------------


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
    weights = np.exp(x - x.max()) * seen
    close(y, weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300))


@given(shape=array_shapes(min_dims=1, max_dims=4, max_side=6), seed=seeds, scale=scales)
@example(shape=(3, 1), seed=0, scale=1.0)
def test_layer_norm_derivatives(shape, seed, scale):
    x, weight, bias = normal(seed, shape, shape[-1:], shape[-1:], scale=scale)
    assume(x.shape[-1] == 1 or x.std(axis=-1).min() > 0.02)  # nearer to constant rows the steps of differences are too wide
    check(ag.layer_norm, [x, weight, bias], step=2e-6)
    deviation = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    close(ag.layer_norm(*tensors(x, weight, bias)), (x - x.mean(axis=-1, keepdims=True)) / deviation * weight + bias, 1e-8)


@given(leading=array_shapes(min_dims=0, max_dims=3, max_side=3), k=st.integers(1, 5), m=st.integers(1, 5), seed=seeds)
def test_linear_derivatives(leading, k, m, seed):
    x, weight, bias = normal(seed, (*leading, k), (k, m), (m,))
    check(ag.linear, [x, weight, bias])
    check(ag.linear, [x, weight])
    close(ag.linear(*tensors(x, weight, bias)), x @ weight + bias)


@given(batch=st.integers(1, 2), tokens=st.integers(1, 5), heads=st.integers(1, 3), width=st.integers(1, 3), seed=seeds,
       scale=st.sampled_from([0.3, 1.0, 3.0]), mask=masks)  # fmt: skip
@example(batch=1, tokens=1, heads=1, width=2, seed=0, scale=1.0, mask="none")  # all axes but two of size 1
def test_attention_derivatives(batch, tokens, heads, width, seed, scale, mask):
    (qkv,) = normal(seed, (batch, tokens, 3 * heads * width), scale=scale)
    mask = draw_mask(mask, (tokens, tokens), seed)
    check(lambda x: ag.attention(x, heads, mask), [qkv])


@given(tokens=st.integers(1, 4), heads=st.integers(1, 3), width=st.integers(1, 3), seed=seeds, masked=st.booleans())
def test_attention_is_its_formula_for_every_head_and_query(tokens, heads, width, seed, masked):
    (qkv,) = normal(seed, (1, tokens, 3 * heads * width))
    mask = ag.to_numpy(draw_mask("some", (tokens, tokens), seed)) if masked else np.ones((tokens, tokens), bool)
    q, k, v = qkv.reshape(tokens, 3, heads, width).transpose(1, 2, 0, 3)  # (H, N, D) each
    expected = np.zeros((tokens, heads, width))
    for h, i in np.ndindex(heads, tokens):
        weights = np.exp(k[h] @ q[h, i] / math.sqrt(width)) * mask[i]
        expected[i, h] = weights @ v[h] / weights.sum() if mask[i].any() else 0
    close(ag.attention(Tensor(ag.xp.asarray(qkv)), heads, ag.xp.asarray(mask)), expected.reshape(1, tokens, -1), 1e-9)


# --- 4. The engine ----------------------------------------------------------------------------------------------------


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


def test_gradient_check_finds_a_derivative_that_is_wrong_when_recorded():
    def wrong(x):
        return ag.result(x.data * 1.0, (x, lambda g: g * (1.001 if ag.is_recording() else 1.0)))

    assert gradient_check(wrong, normal(0, (3,)), order=1) > 1e-4


@pytest.mark.parametrize("order", [1, 2])
def test_gradient_check_finds_a_wrong_derivative(order):
    """A derivative that is off by a thousandth, or one that is right but not differentiable again, is reported."""

    def wrong(x):
        vjp = (lambda g: g * 1.001) if order == 1 else (lambda g: Tensor(g.data * 3 * x.data * x.data))
        return ag.result(x.data if order == 1 else x.data**3, (x, vjp))

    (x,) = normal(0, (3,))
    assert gradient_check(wrong, [x], order=order) > 1e-4
    if order == 2:
        assert gradient_check(wrong, [x], order=1) < AGREES
        assert gradient_check(lambda x: ag.result(x.data, (x, lambda g: Tensor(g.data))), [x]) > 1e-4  # g's own lost
    with pytest.raises(TypeError, match="float64"):
        gradient_check(wrong, [x.astype(np.float32)])
    with np.errstate(all="ignore"):
        assert gradient_check(ag.sqrt, [np.zeros(2)], order=1) == math.inf  # what is not a number agrees with nothing


@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.9, 0.999)])
@given(seed=seeds, rate=st.floats(1e-4, 0.5), scale=st.floats(0.1, 2))
def test_adam_follows_its_formula(seed, rate, scale, betas, decay):
    """Minimise 1/2 sum c (p - target)^2, beside algorithm 1 of the paper written out in plain Python numbers.

    The gradient comes in two parts, for parameters of two shapes.
    """
    c, target, start = (x.tolist() for x in normal(seed, 7, 7, 7))
    parameters = tensors(np.array(start[0]), np.array(start[1:]).reshape(2, 3))
    adam, plain, m, v = ag.Adam(parameters, betas, decay=decay), list(start), [0.0] * 7, [0.0] * 7
    average = list(start)
    for t in range(1, 8):
        p = ag.concatenate([x.reshape(-1) for x in parameters])
        loss = ((p - ag.xp.asarray(target)) ** 2 * ag.xp.asarray(c)).sum() * 0.5
        gradients = grad(loss, parameters)
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


@given(size=st.integers(1, 50), seed=seeds, bound=st.floats(0.01, 100))
def test_clipping_by_global_norm(size, seed, bound):
    (x,) = normal(seed, size)
    expected = math.sqrt((x**2).sum())
    factor, norm = ag.clip_by_global_norm(ag.xp.asarray(x), bound)
    assert float(norm) == pytest.approx(expected)
    assert float(factor) * expected <= bound
    assert float(factor) == (1 if expected + 1e-6 <= bound else pytest.approx(bound / (expected + 1e-6), rel=1e-9))


# --- 5. The networks --------------------------------------------------------------------------------------------------


@given(batch=st.integers(1, 2), channels=st.integers(1, 3), height=st.integers(1, 3), width=st.integers(1, 3),
       factor=st.integers(1, 3), seed=seeds)  # fmt: skip
def test_pixel_shuffle_is_its_definition(batch, channels, height, width, factor, seed):
    (x,) = normal(seed, (batch, channels * factor**2, height, width))
    y = ag.pixel_shuffle(Tensor(ag.xp.asarray(x)), factor)
    defined = np.empty((batch, channels, height * factor, width * factor))
    for b, c, h, w in np.ndindex(batch, channels, height, width):
        for i, j in np.ndindex(factor, factor):
            defined[b, c, h * factor + i, w * factor + j] = x[b, c * factor**2 + i * factor + j, h, w]
    close(y, defined, 0)
    check(lambda x: ag.pixel_shuffle(x, factor), [x])


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

    check(*as_function(small_generator(), call, seed=9), coordinates=1)


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


def test_networks_refuse_pictures_they_cannot_make_or_cut():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="image_size 30 must divide by 4: the picture doubles"):
        transgan.Generator(30, 64, (1, 1, 1), rng)
    with pytest.raises(ValueError, match="embed_dim 40 must divide"):
        transgan.Generator(32, 40, (1, 1, 1), rng)
    with pytest.raises(ValueError, match="patches of 5 pixels do not tile a picture of 32"):
        transgan.Discriminator(32, 5, 64, 1, rng)


# --- 6. Training ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Make the size `tiny` smaller still, so that a step takes milliseconds."""
    monkeypatch.setitem(transgan.SIZES, "tiny", transgan.Size(64, (1, 1, 1), 16, 2))


def small_trainer(dtype=np.float32, **options):
    chosen = {"dataset": "shapes", "size": "tiny", "image_size": 8, "patch_size": 2, "steps": 6, "disc_steps": 2,
              "batch_size": 6, "gen_batch_size": 5, "learning_rate": 1e-3, "sr_weight": 2.0,
              "locality": "2:800"}  # fmt: skip
    options, rng = transgan.Options(**(chosen | options)), data.random_stream("weights", options.get("seed", 0))
    networks = transgan.make_generator(options, rng, dtype), transgan.make_discriminator(options, rng, dtype)
    return transgan.Trainer(options, data.draw_shapes(40, options.image_size), *networks)


def state_of(trainer):
    return {name: ag.to_numpy(x).copy() for name, x in trainer.state().items()}


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
    row, column = row % (side + 1), column % (side + 1)
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
    trainer = small_trainer(loss=loss, disc_steps=1, diff_aug="color")
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
        trainer = small_trainer(np.float64, loss=loss, sr_weight=weight, diff_aug="none")
        before = state_of(trainer)
        values[weight] = {name: float(x) for name, x in trainer.train_step().items()}
        moved = np.abs(state_of(trainer)["generator/from_rgb.weight"] - before["generator/from_rgb.weight"]).max()
        assert (moved > 1e-6) == (weight == 3.0)
    error = values[3.0]["sr_loss"]
    assert error == pytest.approx(values[1e-30]["sr_loss"]) != 0
    assert values[3.0]["gen_loss"] == pytest.approx(values[1e-30]["gen_loss"] + 3.0 * error)
    trainer = small_trainer(sr_weight=0.0, gen_batch_size=50)  # more than there are real pictures to restore
    assert trainer.train_step()["sr_loss"] is None
    assert not any("from_rgb" in name for name in state_of(trainer))


def test_training_changes_every_weight_and_its_seed_decides(small):
    before, runs = state_of(small_trainer()), []
    for seed in (0, 0):
        trainer = small_trainer(seed=seed)
        trainer.train_step()
        runs.append(state_of(trainer))
    for name, x in runs[0].items():
        np.testing.assert_array_equal(x, runs[1][name])
    assert all((runs[0][name] != before[name]).any() for name in before)
    first, other = small_trainer(), small_trainer(seed=1)
    assert (state_of(first)["generator/project.weight"] != state_of(other)["generator/project.weight"]).any()
    assert (first.batches[0] != other.batches[0]).any()


def test_every_update_has_inputs_of_its_own(small):
    """Pictures, about half of them mirrored, noise, mixing weights, draws: of each update, of each step, of each seed."""
    pictures = data.scale(data.draw_shapes(40, 8))
    drawn, mirrored = ({x.tobytes() for x in kind} for kind in (pictures, pictures[:, :, :, ::-1]))
    trainers = [small_trainer(seed=seed, disc_steps=3, diff_aug=POLICY) for seed in (0, 1)]
    steps = [trainer.inputs(step) for trainer in trainers for step in (0, 1)]
    for updates in ([inputs for disc_inputs, _ in steps for inputs in disc_inputs], [inputs for _, inputs in steps]):
        for kind in zip(*updates, strict=True):
            assert len({x.tobytes() for x in kind}) == len(updates)
    real = [x.tobytes() for disc_inputs, _ in steps for inputs in disc_inputs for x in inputs[0]]
    assert set(real) <= drawn | mirrored
    assert 0.3 < np.mean([x in mirrored for x in real]) < 0.7


def test_the_schedule_of_locality():
    """Half-widths until these epochs, of as many as the authors' run has, in proportion to the steps."""
    options = transgan.Options(steps=3200)
    seen = [transgan.half_width_at(options, 2 * epoch) for epoch in (0, 21, 22, 31, 32, 41, 42, 59, 60, 1599)]
    assert seen == [4, 4, 6, 6, 8, 8, 10, 10, None, None]
    assert transgan.half_width_at(transgan.Options(dataset="celeba", steps=198, locality="8:5"), 5) is None


@pytest.mark.parametrize("decay", transgan.DECAYS)
def test_rate_stays_or_decays_in_a_line_and_the_average_follows(decay, small, monkeypatch):
    trainer, rates = small_trainer(ema_decay=0.9, decay=decay), []
    step = ag.Adam.step
    monkeypatch.setattr(ag.Adam, "step", lambda self, rate, *rest: rates.append(rate) or step(self, rate, *rest))
    average = {name: x.copy() for name, x in trainer.average.items()}
    for _ in range(3):
        trainer.train_step()
        for name, p in trainer.gen_parameters.items():
            average[name] = 0.9 * average[name] + 0.1 * p.data
    np.testing.assert_allclose(rates, np.repeat(1e-3 * (1 - np.arange(3) / 6 * (decay == "linear")), 3))
    for name, x in trainer.average.items():
        close(x, average[name], 1e-6)
    z = trainer.noise(70, np.random.default_rng(0))  # more than are made at a time
    own, sampled = trainer.generator(Tensor(trainer.array(z))).data, trainer.sample(z)
    for name, p in trainer.gen_parameters.items():
        p.data = trainer.average[name]
    averaged = trainer.generator(Tensor(trainer.array(z))).data
    close(sampled, averaged, 1e-5)  # a product of fewer rows may add up in another order
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


@given(seed=seeds, n=st.integers(1, 20))
def test_sliced_wasserstein_distance(seed, n):
    a, b = (x.astype(np.float32) for x in normal(seed, (n, 1), (n, 1)))
    assert transgan.sliced_wasserstein(a, b) == pytest.approx(np.abs(np.sort(a, 0) - np.sort(b, 0)).mean(), rel=1e-5)
    pictures = normal(seed, (n, 3, 2, 2))[0].astype(np.float32)
    assert transgan.sliced_wasserstein(pictures, pictures[::-1]) < 1e-6
    moved = transgan.sliced_wasserstein(pictures, pictures + 1)  # by sqrt(12); of that a direction sees its mean |cos|
    assert moved == pytest.approx(12**0.5 * math.gamma(6) / math.gamma(6.5) / math.pi**0.5, rel=0.1)
    assert moved == transgan.sliced_wasserstein(pictures, pictures + 1)
    with pytest.raises(ValueError, match="expected two arrays of one shape"):
        transgan.sliced_wasserstein(a[:1], np.concatenate([a, a]))


@given(side=st.integers(1, 6), half_width=st.integers(1, 6))
def test_a_window_reaches_as_far_in_rows_as_in_columns(side, half_width):
    mask = transgan.window_mask(side, half_width)
    for i, j, k, m in np.ndindex(side, side, side, side):
        assert mask[i * side + j, k * side + m] == (max(abs(i - k), abs(j - m)) <= half_width)


def test_the_generator_looks_only_as_far_as_its_window():
    """A change of one token of the last stage moves the pixels within the window of every block, and no others."""
    generator = transgan.Generator(16, 64, (1, 1, 2), np.random.default_rng(0), dtype=np.float64)
    x = normal(0, (1, 256, 4))[0]
    moved = x.copy()
    moved[0, 5 * 16 + 7, 0] += 1.0
    for half_width in (None, 2):
        generator.attend_within(half_width, 1)
        a, b = (ag.to_numpy(generator.grow(Tensor(ag.xp.asarray(y)), first=2)) for y in (x, moved))
        changed = (a != b).any(axis=(0, 1))
        near = transgan.window_mask(16, 4)[5 * 16 + 7].reshape(16, 16)  # two blocks, each of which looks 2 far
        assert changed[near].all()
        assert changed[~near].any() == (half_width is None)
    generator.attend_within(2, 2)
    assert [mask is None for mask in generator.masks] == [True, False, False]
    generator.attend_within(2, 3)
    assert [mask.shape for mask in generator.masks] == [(16, 16), (64, 64), (256, 256)]
    generator.attend_within(100, 3)
    assert generator.masks == [None] * 3


# --- 7. Data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [8, 16, 32])
def test_shapes_are_deterministic_and_varied(image_size):
    pictures = data.draw_shapes(60, image_size)
    assert pictures.shape == (60, 3, image_size, image_size)
    assert pictures.dtype == np.uint8
    np.testing.assert_array_equal(pictures, data.draw_shapes(60, image_size))
    assert len(np.unique(pictures.reshape(60, -1), axis=0)) == 60
    assert (data.draw_shapes(60, image_size, seed=1) != pictures).any()
    assert len(set(data.draw_labelled_shapes(60, image_size)[1])) > 15  # of 18 kinds
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bright.png", "grid.png", "large.png"]
