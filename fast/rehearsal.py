"""A GPU for machines that have none: tests rehearse on it what a GPU would do.

Its arrays are NumPy's, but refuse to meet NumPy's, as CuPy's do. Its kernels are those of fast/kernels, which the machine's
C++ compiler translates beside fast/emulator.cpp, so that a CPU runs them block after block. Its cuBLAS multiplies what lies
at the addresses it is given. While a stream is captured, all of this is noted, to be done again in the same memory.

    def test_something(rehearsed_gpu):
        ag.use_device("gpu")
        fast.install()

`python -m pytest --rehearse` runs the other tests so, too, to see whether they would pass on a GPU: not the programs that
they start, nor what is held against PyTorch on a GPU. It takes long.
"""

import contextlib
import ctypes
import functools
import operator
import re
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest

import autograd as ag
from autograd import Tensor
from fast import cublas, forms, gpu

EMULATOR = Path(__file__).with_name("emulator.cpp")


tape = None  # while a stream is captured, a list of (what was done, the array it made or None)
spoilt = False  # whether something was asked for meanwhile that cannot be captured


def do(run):
    """run(), noted while a stream is captured."""
    made = run()
    if isinstance(made, np.generic):
        made = np.asarray(made)
    if tape is not None:
        tape.append((run, made))
    return made


def fetched():
    """Called by whatever waits for the device or sends to it, which cannot be recorded."""
    global spoilt
    spoilt = tape is not None
    assert not spoilt, "something waits for the device, or sends to it, while a stream is captured"


class Graph:
    """What was noted, done again when it is launched."""

    def __init__(self, noted):
        self.noted = noted

    def launch(self, stream):
        for run, made in self.noted:
            again = run()
            if isinstance(made, np.ndarray) and np.asarray(again).ctypes.data != made.ctypes.data:  # no view
                made[...] = again


class Event:
    """A place in a stream."""

    waited_for = False

    def synchronize(self):
        self.waited_for = True


class Stream:
    """A stream of the device, which here is never behind."""

    ptr = 1

    def __init__(self, non_blocking=False):
        pass

    def record(self):
        return Event()

    def wait_event(self, event):
        pass

    def synchronize(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def begin_capture(self):
        global tape, spoilt
        tape, spoilt = [], False

    def end_capture(self):
        global tape
        noted, tape = tape, None
        if spoilt:
            raise RuntimeError("cudaErrorStreamCaptureInvalidated")
        return Graph(noted)


Stream.null = Stream()


class CuBLAS:
    """In place of cublas.Handle: products of what lies at addresses, which are read as cuBLAS would."""

    def multiply(self, columns_b, columns_a, m, n, k, one, *arrays):
        (b, kind, step_b, stride_b), (a, _, step_a, stride_a), _, (out, _, step, stride), count = (
            arrays[:4], arrays[4:8], arrays[8], arrays[9:13], arrays[13]
        )  # fmt: skip
        number = ctypes.c_double if kind else ctypes.c_float

        def matrices(address, rows, columns, in_columns, step, stride):
            assert step >= (rows if in_columns else columns)
            size = (count - 1) * stride + step * ((columns if in_columns else rows) - 1) + (rows if in_columns else columns)
            flat = np.ctypeslib.as_array((number * size).from_address(address))
            strides = [flat.itemsize * x for x in (stride, *((1, step) if in_columns else (step, 1)))]
            return np.lib.stride_tricks.as_strided(flat, (count, rows, columns), strides)

        left = matrices(a, n, k, columns_a, step_a, stride_a)
        right = matrices(b, k, m, columns_b, step_b, stride_b)
        made = matrices(out, n, m, 0, step, stride)
        do(lambda: np.matmul(left, right, out=made))


class DeviceArray:
    """An array that, like CuPy's, refuses to meet NumPy's or to become one unasked; a rehearsal of the GPU on the CPU."""

    __module__, __qualname__ = "cupy", "ndarray"  # what messages call it
    __array_ufunc__ = None  # so that NumPy's arrays ask this class, which then refuses

    def __init__(self, host):
        self.host = host

    def __array__(self, *args, **options):
        raise TypeError("an array of the device was about to become NumPy's; use xp, or to_numpy")

    def get(self):
        fetched()
        return self.host.copy()

    def item(self):
        fetched()
        return self.host.item()

    def __getitem__(self, index):
        return to_device(do(functools.partial(self.host.__getitem__, to_host(index))))

    def __setitem__(self, index, value):
        do(functools.partial(self.host.__setitem__, to_host(index), to_host(value)))

    def __len__(self):
        return len(self.host)

    def __float__(self):
        fetched()
        return float(self.host)

    def __bool__(self):
        fetched()
        return bool(self.host)

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.host.ctypes.data)


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
        args, options = tuple(map(to_host, args)), {name: to_host(x) for name, x in options.items()}
        if out is None:
            return to_device(do(lambda: function(*args, **options)))
        do(lambda: function(*args, out=to_host(out), **options))
        return out

    return call


def give_device_arrays_their_operators():
    for name in ("shape", "ndim", "size", "nbytes", "dtype", "base", "strides", "itemsize"):
        setattr(DeviceArray, name, property(lambda self, name=name: getattr(self.host, name)))
    DeviceArray.T = property(lambda self: DeviceArray(self.host.T))
    for name in ("sum", "mean", "std", "max", "any", "reshape", "transpose", "astype", "copy", "swapaxes"):
        setattr(DeviceArray, name, on_device(getattr(np.ndarray, name)))
    for name in ("add", "sub", "mul", "truediv", "pow", "matmul", "and", "gt", "ge", "lt", "eq"):
        function = on_device(getattr(operator, f"__{name}__"))

        def forward(a, b, function=function):
            return NotImplemented if isinstance(b, Tensor) else function(a, b)

        def in_place(a, b, name=name):
            do(lambda: getattr(operator, "i" + name)(a.host, to_host(b)))
            return a

        setattr(DeviceArray, f"__{name}__", forward)
        if name in ("add", "sub", "mul", "truediv", "pow", "matmul", "and"):
            setattr(DeviceArray, f"__r{name}__", lambda a, b, function=function: function(b, a))
        if name in ("add", "sub", "mul", "truediv"):
            setattr(DeviceArray, f"__i{name}__", in_place)
    DeviceArray.__neg__ = on_device(operator.neg)


give_device_arrays_their_operators()


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
        path.write_text("\n".join([EMULATOR.read_text(), source, entry]))
        library = path.with_suffix(".so")
        subprocess.run(["g++", "-shared", "-fPIC", "-std=c++17", "-w", str(path), "-o", str(library)], check=True)
        function = ctypes.CDLL(str(library)).launch

    def launch(grid, block, arguments):
        assert max(grid[1:], default=1) <= 65_535  # CUDA's limit, but for the first
        sizes = [ctypes.c_uint(n) for shape in (grid, block) for n in (*shape, 1)[:2]]
        do(lambda: function(*sizes, *map(passed, arguments)))

    def passed(x):
        if isinstance(x, DeviceArray):
            assert x.host.flags.c_contiguous
            return ctypes.c_void_p(x.host.ctypes.data)
        kinds = {"u": ctypes.c_void_p, "i": ctypes.c_longlong, "f": ctypes.c_float if x.itemsize == 4 else ctypes.c_double}
        return kinds[x.dtype.kind](x.item())

    return launch


class FakeCuPy(types.ModuleType):
    """The part of CuPy that this project uses, computed by NumPy on DeviceArrays; `used` collects its functions' names,
    `precision` is what its matrix products were told."""

    ndarray, used, precision, RawKernel = DeviceArray, set(), None, staticmethod(emulated)
    cuda = types.SimpleNamespace(
        runtime=types.SimpleNamespace(
            getDeviceProperties=lambda device: {"name": b"a rehearsed GPU"}, getDeviceCount=lambda: 1
        ),
        Device=lambda: types.SimpleNamespace(id=0, synchronize=lambda: None),
        Stream=Stream,
        get_current_stream=lambda: Stream.null,
        Memory=bytearray,
        MemoryPointer=lambda memory, offset: (memory, offset),
        MemoryPool=lambda malloc: types.SimpleNamespace(malloc=malloc, free_all_blocks=lambda: None),
        using_allocator=lambda allocator: contextlib.nullcontext(),
    )

    @staticmethod
    def get_default_memory_pool():
        return types.SimpleNamespace(free_all_blocks=lambda: None)

    @staticmethod
    def asarray(x, dtype=None):
        if not isinstance(x, DeviceArray):
            fetched()
        return DeviceArray(np.array(x.host if isinstance(x, DeviceArray) else x, dtype))

    @staticmethod
    def concatenate(arrays, axis=0):
        if len(arrays) > 8:  # CuPy sends the device a list of where they lie
            fetched()
        FakeCuPy.used.add("concatenate")
        return on_device(np.concatenate)(arrays, axis=axis)

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


def modules():
    """What is imported of a CuPy, {name: module}, a new one."""
    cupy = FakeCuPy("cupy")
    linalg = {f"COMPUTE_TYPE_{kind}": kind for kind in ("DEFAULT", "TF32", "BF16")}
    linalg["set_compute_type"] = lambda dtype, kind: setattr(cupy, "precision", kind)
    core = types.SimpleNamespace(_routines_linalg=types.SimpleNamespace(**linalg))
    return {"cupy": cupy, "cupy._core": core}


@contextlib.contextmanager
def rehearsal():
    """Within this context there is a CuPy to find, and no fast form in use yet; afterwards all is as it was."""
    if not shutil.which("g++"):
        pytest.skip("the kernels' rehearsal needs g++")
    found = modules()
    gpu.kernel.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ag, "xp", np)
        patch.setattr(ag, "faster", {})
        patch.setattr(forms, "arrays", None)
        patch.setattr(cublas, "library", CuBLAS)
        for name, module in found.items():
            patch.setitem(sys.modules, name, module)
        try:
            yield found["cupy"]
        finally:
            gpu.kernel.cache_clear()


def pytest_addoption(parser):
    parser.addoption("--rehearse", action="store_true", help="run all tests as where there is a GPU, on a rehearsed one")


def pytest_configure(config):
    if config.getoption("--rehearse"):  # before tests ask for a device while they are imported
        sys.modules.update(modules())
        cublas.library = CuBLAS


@pytest.fixture
def rehearsed_gpu():
    with rehearsal() as cupy:
        yield cupy
