"""Matrix products by cuBLAS itself, without the copies that CuPy's make, and where launches are being recorded.

CuPy copies whatever does not lie in rows, such as a transposed matrix, when there are several to multiply, and refuses to
call cuBLAS at all while a stream is captured (its issue 6290). So the one function of cuBLAS that multiplies matrices is
called by its C interface here.
"""

import ctypes
import functools
import sys

import numpy as np

import autograd as ag

WORKSPACE = 32 << 20  # bytes, what NVIDIA advises for Hopper; a workspace of its own is what recording asks for
KINDS = {np.dtype(np.float32): (0, ctypes.c_float), np.dtype(np.float64): (1, ctypes.c_double)}  # CUDA_R_32F, CUDA_R_64F
COMPUTE = {"float32": 68, "tf32": 77, "bfloat16": 75}  # CUBLAS_COMPUTE_32F, and ..._FAST_TF32 and ..._FAST_16BF of it
COMPUTE_64F = 70
POINTER, INT, LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong
ARRAY = [POINTER, INT, INT, LONG]  # where it lies, its type, from one column to the next, and from one matrix to the next


@functools.cache
def library():
    """cuBLAS's product of matrices with a handle of ours, and that handle; None where it cannot be found."""
    from cupy.cuda import device, runtime

    device.get_cublas_handle()  # so that CuPy has loaded it from wherever it is
    major = runtime.runtimeGetVersion() // 1000
    try:
        cublas = ctypes.CDLL(f"cublas64_{major}.dll" if sys.platform == "win32" else f"libcublas.so.{major}")
    except OSError:
        return None
    handle = POINTER()
    check(cublas.cublasCreate_v2(ctypes.byref(handle)))
    function = cublas.cublasGemmStridedBatchedEx
    function.argtypes = [POINTER, *[INT] * 5, POINTER, *ARRAY, *ARRAY, POINTER, *ARRAY, INT, INT, INT]
    return Handle(cublas, handle)


class Handle:
    """cuBLAS, on the stream that is CuPy's current one."""

    def __init__(self, cublas, handle):
        self.cublas, self.handle, self.stream = cublas, handle, None
        self.workspace = ag.xp.empty(WORKSPACE, np.uint8)

    def multiply(self, *arguments):
        """cublasGemmStridedBatchedEx of all arguments but the handle."""
        stream = ag.xp.cuda.get_current_stream().ptr
        if stream != self.stream:
            self.stream = stream
            check(self.cublas.cublasSetStream_v2(self.handle, POINTER(stream)))
            check(
                self.cublas.cublasSetWorkspace_v2(self.handle, POINTER(self.workspace.data.ptr), ctypes.c_size_t(WORKSPACE))
            )
        check(self.cublas.cublasGemmStridedBatchedEx(self.handle, *arguments))


def check(status):
    if status:
        raise RuntimeError(f"cuBLAS failed with status {status}")


def records():
    """Whether products can be recorded, see fast/recording.py: those of the fast form on a GPU, with cuBLAS at hand."""
    return ag.xp is not np and ag.matmul in ag.faster and library() is not None


def matmul(a, b, precision):
    """a @ b of arrays (..., n, k) and (..., k, m) of one dtype; a float32 product of this `precision`, see fast.install."""
    (n, k), m = a.shape[-2:], b.shape[-1]
    if b.shape[-2] != k:
        raise ValueError(f"{k} columns meet {b.shape[-2]} rows")
    batch = a.shape[:-2]
    if b.shape[:-2] != batch:
        batch = np.broadcast_shapes(batch, b.shape[:-2])
    out = ag.xp.empty((*batch, n, m), a.dtype)
    if not out.size or not k:
        return out if k else ag.xp.zeros_like(out)
    (a, *laid_a), (b, *laid_b) = laid_out(a, batch), laid_out(b, batch)
    kind, number = KINDS[a.dtype]
    one, zero = ctypes.byref(number(1)), ctypes.byref(number(0))

    def array(x, step, stride):
        return x.data.ptr, kind, step, stride

    # To cuBLAS, which counts down columns, a matrix in rows is its transpose: so it is asked for out^T = b^T a^T.
    arrays = one, *array(b, *laid_b[1:]), *array(a, *laid_a[1:]), zero, *array(out, m, n * m)
    compute = COMPUTE_64F if kind else COMPUTE[precision]
    library().multiply(laid_b[0], laid_a[0], m, n, k, *arrays, out.size // (n * m), compute, -1)
    return out


def laid_out(x, batch):
    """x (..., rows, columns), stretched to `batch`, for cuBLAS to read: (x, whether it lies in columns, step, stride).

    step: elements from one row (or column) to the next; stride: from one matrix to the next, 0 if it is the same again.
    Only what lies neither in rows nor in columns, or whose matrices have no one distance, is copied.
    """
    rows, columns = x.shape[-2:]
    if x.shape[:-2] != batch:
        x = ag.xp.broadcast_to(x, (*batch, rows, columns))
    *outer, down, across = (stride // x.itemsize for stride in x.strides)
    if columns == 1:
        across = 1  # an axis of one element may say anything
    if rows == 1:
        down = columns if across == 1 else 1
    stride = distance(batch, outer)
    if stride is not None and across == 1 and down >= columns:
        return x, 0, down, stride
    if stride is not None and down == 1 and across >= rows:
        return x, 1, across, stride
    return ag.xp.ascontiguousarray(x), 0, columns, rows * columns


def distance(shape, strides):
    """The one distance between elements of these axes, row by row; None if there is none."""
    found, whole = 0, None
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n > 1:
            if stride < 0 or whole not in (None, stride):
                return None
            found, whole = found if whole is not None else stride, stride * n
    return found
