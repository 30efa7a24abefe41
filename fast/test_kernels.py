"""The kernels of fast/kernels, run thread by thread on a CPU, and a rehearsal of the GPU: python -m pytest fast

Each function of fast/gpu.py is held against that of fast/cpu.py; the forms made of them against the definitions; and the
kernels' sources against NVIDIA's own compiler, where that is installed.
"""

import contextlib
import operator
import re
import sys
import types
import weakref
from pathlib import Path

import transgan

import numpy as np  # isort: skip
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes

import autograd as ag
import fast
from autograd import Tensor, grad
from fast import augment, compile, cpu, cublas, gpu, recording
from fast.rehearsal import DeviceArray, FakeCuPy, rehearsal
from program import checkpoints
from program.support import small_trainer, state_of
from program.update import Played, Update
from test_transgan import DEVICE, ELEMENTWISE, check, normal, on_cpu, seeds, tensors

POLICY = "translation,cutout,color"
dtypes = st.sampled_from([np.float32, np.float64])


# --- Each function, by its kernel -------------------------------------------------------------------------------------

FUNCTIONS = {  # of fast/cpu.py and fast/gpu.py, and their arguments: shapes of arrays from (rows, width), and what follows
    "normal_cdf": lambda n, c: [(n, c)],
    "gelu": lambda n, c: [(n, c)],
    "gelu_curvature": lambda n, c: [(n, c), (n, c)],
    "softmax": lambda n, c: [(n, c), None],
    "softmax of masked rows": lambda n, c: [(2, n, c), np.tri(n, c, -1, dtype=bool)],
    "softmax with one mask": lambda n, c: [(2, n, c), np.arange(n)[:, None] > 0],
    "softmax_vjp": lambda n, c: [(n, c), (n, c)],
    "layer_norm": lambda n, c: [(n, c), (c,), (c,), 1e-5],
    "layer_norm_vjp": lambda n, c: [(n, c), (n, 1), (n, c)],
    "layer_norm_vjp with a weight": lambda n, c: [(n, c), (n, 1), (n, c), (c,)],
}


def softmax(x, mask):
    x = x if mask is None else np.where(mask, x, -np.inf).astype(x.dtype)
    weights = np.exp(x - np.maximum(x.max(axis=-1, keepdims=True), np.finfo(x.dtype).min))
    return weights / np.maximum(weights.sum(axis=-1, keepdims=True), np.finfo(x.dtype).tiny)


def softmax_vjp(p, g):
    return (g - (g * p).sum(axis=-1, keepdims=True)) * p


NUMPY_FORMS = types.SimpleNamespace(**vars(cpu), softmax=softmax, softmax_vjp=softmax_vjp)  # for a CPU these are composed


def called(module, name, arguments):
    """What a function of fast.cpu or fast.gpu returns, and what it leaves of its arguments, as a list of NumPy arrays."""
    own = [ag.xp.asarray(x.copy()) if isinstance(x, np.ndarray) else x for x in arguments]
    results = getattr(module, name)(*own)
    results = results if isinstance(results, (list, tuple)) else [results]
    return [ag.to_numpy(x) for x in (*results, *own) if isinstance(x, ag.xp.ndarray)]


def by_both(name, arguments):
    """The same of fast.gpu and of fast.cpu, in pairs."""
    with rehearsal():
        ag.use_device("gpu")
        found = called(gpu, name, arguments)
    return list(zip(found, called(NUMPY_FORMS, name, arguments), strict=True))


def agree(found, expected):
    tolerance = 1e-12 if expected.dtype == np.float64 else 2e-5
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * max(1, np.abs(expected).max(initial=0)))


@on_cpu
@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=20)
@given(rows=st.integers(1, 9), width=st.sampled_from([1, 2, 31, 32, 33, 70, 300]), seed=seeds,
       scale=st.sampled_from([1e-3, 1.0, 1e3]), dtype=dtypes)  # fmt: skip
def test_kernels_equal_their_numpy_forms(name, rows, width, seed, scale, dtype):
    drawn = FUNCTIONS[name](rows, width)
    arguments = [normal(seed + i, x, scale=scale)[0].astype(dtype) if isinstance(x, tuple) else x
                 for i, x in enumerate(drawn)]  # fmt: skip
    for found, expected in by_both(name.split()[0], arguments):
        agree(found, expected)


@on_cpu
@settings(max_examples=30)
@given(batch=st.integers(1, 2), tokens=st.integers(1, 140), heads=st.integers(1, 3), seed=seeds, masked=st.booleans(),
       head=st.sampled_from([3, 20]), dtype=dtypes)  # fmt: skip
@example(batch=1, tokens=129, heads=2, seed=0, masked=False, head=3, dtype=np.float64)
@example(batch=1, tokens=65, heads=2, seed=0, masked=True, head=20, dtype=np.float64)
def test_attentions_kernels_equal_its_numpy_forms(batch, tokens, heads, seed, masked, head, dtype):
    """With more tokens than a block has threads, and masks that let some rows see nothing."""
    qkv, g = (x.astype(dtype) for x in normal(seed, (batch, tokens, 3 * heads * head), (batch, tokens, heads * head)))
    mask = np.random.default_rng(seed).random((tokens, tokens)) < min(0.3, 3 / tokens) if masked else None
    (found, out), (found_sum, log_sum), *_ = by_both("attention", [qkv, heads, mask])
    agree(found, out)
    sees = slice(None) if mask is None else mask.any(axis=1)
    agree(found_sum[:, sees], log_sum[:, sees])  # of nothing there is no logarithm, and nobody reads it
    agree(*by_both("attention_vjp", [qkv, heads, mask, out, log_sum, g])[0])


@on_cpu
@pytest.mark.parametrize("b1", [0.0, 0.9])
@pytest.mark.parametrize("averaged", [False, True])
@given(seed=seeds, size=st.sampled_from([1, 255, 600]), dtype=dtypes)
@settings(max_examples=10)
def test_adams_kernel_equals_its_definition(b1, averaged, seed, size, dtype):
    def updated(update):
        arrays = (ag.xp.asarray(x.astype(dtype)) for x in normal(seed, *[(size,)] * 5))
        adam = ag.Adam([Tensor(next(arrays), requires_grad=True)], (b1, 0.99), decay=0.9 if averaged else None)
        adam.gradient, adam.v, adam.t = next(arrays), next(arrays) ** 2, 3
        adam.m, adam.average = (x if used else None for x, used in zip(arrays, (b1, averaged), strict=True))
        update(adam, 0.01, 0.5)
        return [ag.to_numpy(x) for x in (adam.p, adam.gradient, adam.v, adam.m, adam.average) if x is not None]

    with rehearsal():
        ag.use_device("gpu")
        found = updated(gpu.adam_update)
    for pair in zip(found, updated(ag.adam_update.__wrapped__), strict=True):
        agree(*pair)


# --- The forms on a GPU, against the definitions ----------------------------------------------------------------------


@on_cpu
@pytest.mark.parametrize("policy", ["translation", "cutout", "color", "translation,color", POLICY, "color,cutout", "none"])
@settings(max_examples=10)
@given(side=st.sampled_from([1, 5, 8, 17]), batch=st.integers(1, 3), seed=seeds, cut=st.booleans(), dtype=dtypes)
def test_augmentations_kernel_equals_its_definition(policy, side, batch, seed, cut, dtype):
    """In value, gradient and that gradient's gradient, with shifts up to out of the picture."""
    rng = np.random.default_rng(seed)
    draws = transgan.draw_augmentation((batch,), side, rng)
    draws[0, 3:5] = rng.integers(-side - 1, side + 2, 2)
    if cut:
        draws[:, 5:] = rng.integers(0, side + 1, (batch, 2))
    arrays = [x.astype(dtype) for x in normal(seed, (batch, 3, side, side), (2 * batch, 3, side, side))]

    def derivatives():
        x, weights = tensors(*arrays)
        y = transgan.diff_augment(x, policy, ag.xp.asarray(draws.astype(dtype)))
        (slope,) = grad((y**3).sum(), [x], create_graph=True)
        both = ag.concatenate([y, slope])
        return [ag.to_numpy(z) for z in (both, *grad((both * weights).sum(), [x]))]

    expected = derivatives()
    with rehearsal():
        ag.use_device("gpu")
        augment.install()
        for a, b in zip(derivatives(), expected, strict=True):
            agree(a, b)


@on_cpu
def test_rehearsal_of_every_operation_on_a_gpu(rehearsed_gpu):
    """What training does not use, too: derivatives of all operations, with masks and plain arrays."""
    assert ag.use_device("gpu") == "a rehearsed GPU"
    assert fast.install() == "gpu"
    augment.install()
    mask = ag.xp.asarray(np.tril(np.ones((3, 3), bool)) & (np.arange(3)[:, None] > 0))
    array = ag.xp.asarray(np.ones((2, 3, 3)) * 1.5)
    x = normal(0, (2, 3, 3))[0]
    for function, prepare in ELEMENTWISE.values():
        check(function, [prepare(x) if prepare else x], coordinates=2)
    for function in (
        lambda x: ag.gelu(x.T),
        lambda x: ag.softmax(x, mask),
        lambda x: ag.attention(x, 1, mask),
        lambda x: ag.layer_norm(x, x[0, 0], x[0, 1]),
        lambda x: ag.linear(x, x[0]) + ag.linear(x, x[0], x[1, 0]) + x @ array,
        lambda x: array / (x * x + 1) - array * x + 2.0 / (x * x + 1) - x / array,
        lambda x: ag.concatenate([x.mean(axis=2), x.sum(axis=0)]),
        lambda x: ag.broadcast_to(x[:, None, ::-1], (4, 2, 3, 3, 3)),
        lambda x: ag.pixel_shuffle(ag.concatenate([x, x]).reshape(1, 4, 3, 3), 2),
        lambda x: transgan.diff_augment(x.reshape(1, 2, 3, 3), POLICY, ag.xp.asarray([[0.1, 1.5, 0.7, 1, -1, 2, 1]])),
    ):
        check(function, [x], coordinates=2)
    with pytest.raises(TypeError, match="NumPy array meets"):
        array + np.ones(3)


@on_cpu
@pytest.mark.parametrize("loss", transgan.LOSSES)
def test_rehearsal_of_training_on_a_gpu(loss, small, tmp_path, rehearsed_gpu):
    """Training, sampling, saving and resuming on arrays that refuse to meet NumPy's come to the CPU's numbers."""

    def trained(path):
        fast.install()
        augment.install()
        trainer = small_trainer(1, np.float64, loss=loss)
        losses = [trainer.train_step()]
        checkpoints.save(trainer, path)
        trainer = small_trainer(1, np.float64, loss=loss)
        checkpoints.load(trainer, path)
        losses.append(trainer.train_step())
        pictures = trainer.sample(trainer.noise(3, np.random.default_rng(0)))
        numbers = [[float(x) for x in step.values() if x is not None] for step in losses]
        return [np.array(numbers), pictures, *state_of(trainer).values()]

    expected = trained(tmp_path / "cpu.npz")
    assert ag.use_device("auto") == "a rehearsed GPU"
    for a, b in zip(trained(tmp_path / "gpu.npz"), expected, strict=True):
        assert type(a) is np.ndarray
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    assert {"matmul", "empty", "concatenate", "vdot"} <= rehearsed_gpu.used


@on_cpu
def test_a_step_does_not_wait_for_the_gpu(small, rehearsed_gpu, monkeypatch):
    """Nothing is fetched from the device within a step, so that its operations queue up there without a gap."""
    ag.use_device("gpu")
    fast.install()
    augment.install()
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
def test_kernels_hide_no_nan(rehearsed_gpu):
    """What is not a number must be seen further on, by whoever watches the losses."""
    x = normal(0, (1, 5, 9))[0]
    x[0, 2, 1] = np.nan
    ag.use_device("gpu")
    fast.install()
    for function in (ag.gelu, ag.softmax, lambda x: ag.attention(x, 1)):
        assert np.isnan(ag.to_numpy(function(Tensor(ag.xp.asarray(x))))).any()


def any_gpu():
    """The GPU that is there, or else a rehearsed one, with the fast forms in use."""
    with contextlib.nullcontext() if DEVICE != "cpu" else rehearsal():
        ag.use_device("gpu")
        fast.install()
        augment.install()
        try:
            yield
        finally:
            fast.uninstall()


on_any_gpu = pytest.fixture(any_gpu)


@settings(max_examples=300)
@given(shapes=mutually_broadcastable_shapes(signature="(n,k),(k,m)->(n,m)", max_dims=3, max_side=4), seed=seeds,
       orders=st.lists(st.permutations(range(5)), min_size=2, max_size=2), dtype=dtypes,
       steps=st.lists(st.sampled_from([1, 2, -1]), min_size=10, max_size=10))  # fmt: skip
def test_products_read_matrices_as_they_lie(shapes, seed, orders, dtype, steps):
    """Arrays whose axes lie in any order, with gaps and backwards, are read as NumPy reads them."""

    def lying(x, order, steps):
        """x in a larger array, its axes in another order in memory."""
        order = [i for i in order if i < x.ndim]
        place = ag.xp.asarray(np.zeros([x.shape[i] * abs(steps[i]) for i in order], x.dtype))
        view = place[tuple(slice(None, None, steps[i]) for i in order)].transpose([int(i) for i in np.argsort(order)])
        view[...] = ag.xp.asarray(x)
        return view

    drawn = [x.astype(dtype) for x in normal(seed, *shapes.input_shapes)]
    with contextlib.contextmanager(any_gpu)():
        a, b = (lying(x, p, s) for x, p, s in zip(drawn, orders, (steps[:5], steps[5:]), strict=True))
        found = ag.to_numpy(cublas.matmul(a, b, "float32"))
    np.testing.assert_allclose(found, np.matmul(*drawn), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", ["wgangp-eps", "hinge"])
def test_a_recorded_step_is_the_step(loss, small, on_any_gpu, monkeypatch, capsys):
    """Over steps with other inputs, through a change of the window, with co-training: to the bit, also if CUDA refuses."""

    def trained(records):
        trainer = small_trainer(1, np.float64, loss=loss, diff_aug=POLICY)
        assert isinstance(trainer.update, Played)
        if not records:
            trainer.update = Update()
        watched = []
        trainer.update.watch = lambda: watched.append(trainer.step)
        losses = [{name: float(x) for name, x in trainer.train_step().items() if x is not None} for _ in range(4)]
        assert watched == [step for step in range(4) for _ in range(trainer.options.disc_steps + 1)]
        return losses, state_of(trainer)

    (losses, state), (expected_losses, expected) = trained(True), trained(False)
    assert losses == expected_losses
    for name, x in expected.items():
        np.testing.assert_array_equal(state[name], x, err_msg=name)

    def refusing(function, inputs):
        function(*inputs)
        raise RuntimeError("not today")

    monkeypatch.setattr("program.update.Recording", refusing)
    recording.pool().malloc(8)
    assert trained(True)[0] == expected_losses
    assert not recording.held  # nor what was recorded before
    assert capsys.readouterr().err == "transgan: this GPU's work cannot be recorded, steps are slower: not today\n"


def test_what_a_failed_recording_held_is_gone_when_the_step_is_made_without(small, on_any_gpu, monkeypatch):
    """A GPU whose memory was too small for it may have enough for the step alone."""

    class Held:
        pass

    alive, make = weakref.WeakSet(), Update.make

    def refusing(function, inputs):
        held = Held()
        alive.add(held)
        raise MemoryError("too little")

    def plain(self, *arguments):
        assert not alive
        return make(self, *arguments)

    monkeypatch.setattr("program.update.Recording", refusing)
    monkeypatch.setattr(Update, "make", plain)
    trainer = small_trainer(1, np.float64)
    trainer.train_step()
    assert (trainer.update.refused, trainer.update.recordings) == (True, {})


def test_what_cannot_be_recorded_is_told_by_its_cause(on_any_gpu):
    """Not by what CUDA says at the end, that something was wrong before; and nothing is left of it."""
    x = ag.xp.asarray(np.ones(1))
    waits, sends = lambda x: [x * float(x.sum())], lambda x: [ag.xp.concatenate([x] * 9)]
    for function in (waits, sends) if isinstance(ag.xp, FakeCuPy) else (waits,):  # CuPy would send its list but once
        with pytest.raises(Exception) as caught:
            recording.Recording(function, [x])
        assert "Invalidated" not in str(caught.value)
    assert recording.Recording(lambda x: [x + 1], [x]).play([x * 2])[0].item() == 3


def test_all_recordings_are_made_on_one_stream_in_memory_that_stays(on_any_gpu):
    """CuPy keeps a pool's memory apart for each stream, and gives back what no array holds; a recording still uses it."""
    one, other = (recording.Recording(lambda x: [x + 1], [ag.xp.asarray(np.ones(3))]) for _ in range(2))
    assert one.stream is other.stream
    before = len(recording.held)
    recording.pool().malloc(1 << 21)
    recording.pool().free_all_blocks()
    assert len(recording.held) == before + 1
    recording.release()
    assert not recording.held


@on_cpu
def test_attention_of_more_heads_than_a_grid_is_high(rehearsed_gpu):
    """65,535 is the most that CUDA takes along any axis but the first."""
    ag.use_device("gpu")
    fast.install()
    qkv = normal(0, (16_400, 1, 12))[0].astype(np.float32)
    np.testing.assert_array_equal(ag.to_numpy(ag.attention(tensors(qkv)[0], 4)), qkv[..., 8:])


# --- CuPy and NVIDIA's compiler ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(path.stem for path in gpu.KERNELS.glob("*.cu")))
def test_kernels_compile(file):
    """By the compiler that a GPU has them from, down to its instructions, within its registers and shared memory."""
    if isinstance(sys.modules.get("cupy"), FakeCuPy):
        pytest.skip("a rehearsed CuPy has no compiler")
    try:
        compile.machine_code('extern "C" __global__ void nothing() {}', 80)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs CuPy and NVRTC, pip install '.[kernels]' ({error})")
    jobs = [constants for name, constants in compile.jobs() if name == file]
    assert jobs
    for constants in jobs:
        for dtype in map(np.dtype, (np.float32, np.float64)):
            compile.machine_code(gpu.source(file, dtype, **constants), 80)


@on_cpu
@pytest.mark.parametrize(("precision", "kind"), [("float32", "DEFAULT"), ("tf32", "TF32"), ("bfloat16", "BF16")])
def test_precision_is_cupys_to_keep(precision, kind, rehearsed_gpu):
    ag.use_device("gpu")
    fast.install(precision)
    assert rehearsed_gpu.precision == kind
    fast.uninstall()
    assert rehearsed_gpu.precision == "DEFAULT"


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
    from cupy._core import _routines_linalg as linalg

    for name in ("set_compute_type", "COMPUTE_TYPE_DEFAULT", "COMPUTE_TYPE_TF32", "COMPUTE_TYPE_BF16"):
        assert hasattr(linalg, name)
    communicator = pytest.importorskip("cupyx.distributed").NCCLBackend
    for name in ("all_gather", "all_reduce"):
        assert hasattr(communicator, name)
    root = Path(__file__).parent.parent
    for source in (*root.glob("*.py"), *root.glob("*/*.py")):
        for name in set(re.findall(r"\bxp\.([\w.]+)", source.read_text())):
            operator.attrgetter(name.rstrip("."))(cupy)
