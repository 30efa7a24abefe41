"""The engine in its corners, as written and with the fast forms: errors, memory, threads, types, devices."""

import math
import threading
import tracemalloc

import fast  # first: it decides how many threads NumPy's matrix products use

import numpy as np  # isort: skip
import pytest
from hypothesis import given
from hypothesis import strategies as st

import autograd as ag
from autograd import Tensor, grad
from test_transgan import DEVICE, close, normal, on_cpu, seeds, tensors


@pytest.fixture(params=["as written", "fast"], scope="module", autouse=True)
def forms(request):
    if request.param == "fast":
        fast.install()
    yield
    fast.uninstall()


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


def test_gelu_in_float32_is_exact_to_float32s_precision():
    x = np.linspace(-12, 12, 20001)
    exact = np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x])
    value = ag.to_numpy(ag.gelu(Tensor(ag.xp.asarray(x.astype(np.float32)))))
    assert np.abs(value - exact).max() < 8e-7
    (leaf,) = tensors(x.astype(np.float32))
    slope = grad(ag.gelu(leaf).sum(), [leaf])[0]
    exact = [0.5 * math.erfc(-v / math.sqrt(2)) + v * math.exp(-v * v / 2) / math.sqrt(2 * math.pi) for v in x]
    assert np.abs(ag.to_numpy(slope) - exact).max() < 5e-7


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


def test_a_hook_sees_every_operation_once_and_changes_nothing(monkeypatch):
    (x,) = tensors(np.ones((4, 6)))

    def numbers():
        y = ag.gelu(x @ x.T) + ag.softmax(x.sum(axis=1)).sum()
        return y.sum(), grad(y.sum(), [x])[0]

    depth, seen = [], []

    def hook(name, direction, function, *args, **kwargs):
        if not depth:
            seen.append((name, direction))
        depth.append(function)
        made = function(*args, **kwargs)
        depth.pop()
        return made

    plain = numbers()
    monkeypatch.setattr(ag, "hook", hook)
    hooked = numbers()
    for a, b in zip(plain, hooked, strict=True):
        np.testing.assert_array_equal(ag.to_numpy(a), ag.to_numpy(b))
    forward = sorted(name for name, direction in seen if direction == "forward" and name != "add")
    assert forward == ["gelu", "matmul", "reduce_sum", "reduce_sum", "reduce_sum", "reduce_sum", "softmax", "transpose"]
    assert {"matmul", "transpose", "reduce_sum", "add"} <= {name for name, direction in seen if direction == "backward"}


def test_float32_by_default_float64_on_request():
    assert Tensor([1, 2]).dtype == np.float32
    assert Tensor(np.arange(3)).dtype == np.float32
    assert Tensor([1.0], dtype=np.float64).dtype == np.float64
    for dtype in (np.float32, np.float64):
        x = Tensor(ag.xp.ones((2, 4, 12), dtype), requires_grad=True)
        weight = Tensor(ag.xp.ones(4, dtype))
        y = ag.gelu(ag.layer_norm(ag.attention(x * 0.5 + 1, 2), weight, weight)) ** 2
        y = ag.softmax(y).mean() + ag.sqrt(ag.softplus(ag.sigmoid(y))).mean()
        (g,) = grad(y, [x], create_graph=True)
        assert y.dtype == g.dtype == grad((g * g).sum(), [x])[0].dtype == dtype


def test_adam_finds_a_minimum():
    (p,) = tensors(np.array([3.0, -2.0]))
    adam = ag.Adam([p], betas=(0.9, 0.999))
    for i in range(2000):
        adam.add(grad(((p - ag.xp.asarray([1.0, 2.0])) ** 2).sum(), [p]))
        adam.step(0.05 * (1 - i / 2000))
    close(p, [1.0, 2.0], 1e-3)


def test_choosing_a_device():
    with pytest.raises(ValueError, match="auto, cpu or gpu"):
        ag.use_device("tpu")
    if DEVICE == "cpu":
        with pytest.raises(RuntimeError, match="no GPU to use"):
            ag.use_device("gpu")
    assert ag.use_device("auto") == DEVICE
