"""A small automatic-differentiation engine on NumPy or CuPy arrays, written to be read from top to bottom.

The story of this chapter: a `Tensor` is an array that remembers how it was computed. Every operation returns a new
Tensor together with one formula for each operand, the *vector-Jacobian product* (vjp): given the gradient of some final
number with respect to the operation's result, it returns the gradient with respect to that operand. `grad` walks the
remembered operations backwards, once each, applying those formulas: that is the chain rule, and all of backpropagation.
The formulas are themselves written in Tensor operations, so a gradient can remember how *it* was computed and be
differentiated again. TransGAN's loss needs exactly that, because it penalises the norm of a gradient.

Contents
    1. Where arrays live      xp, use_device, use_precision, to_numpy
    2. Tensor                 Tensor, Node, no_grad
    3. Walking back           grad, unbroadcast
    4. Primitive operations   add ... concatenate, pixel_shuffle
    5. Fused operations       linear, gelu, softmax, layer_norm, attention, beside the compositions they equal; CUDA kernels
    6. Pictures               conv2d, pooling, upsampling, batch_norm, spectral_norm: what the paper's peers are made of
    7. Checking derivatives   gradient_check
    8. Optimisation, memory   clip_by_global_norm, Adam over flat arrays, keep_freed_memory
    9. Where the time goes    profile, profile_table

Errors: every operation raises ValueError (IndexError for an index out of range) with one line naming the operation and
the shapes it was given, and TypeError when float32 and float64 meet. The docstrings below name only what goes beyond.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import heapq
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple
from numpy.typing import DTypeLike, NDArray

# What the type hints name. Nothing is enforced while the program runs; `mypy` checks them.
Array: TypeAlias = NDArray[Any]  # or cupy.ndarray, which has the same methods
Operand: TypeAlias = "Tensor | Array | float"  # what may stand beside a Tensor in a formula
Vjp: TypeAlias = "Callable[[Tensor], Tensor]"  # the gradient of an operation's result -> the gradient of one operand
Shape: TypeAlias = tuple[int, ...]
Axis: TypeAlias = "int | Shape | None"  # the axes of a reduction; None for all
Edge: TypeAlias = "tuple[Node, Shape, Vjp]"  # from an operation to an operand: its Node, its shape, the vjp towards it
Index: TypeAlias = "int | slice | EllipsisType | None"  # of one axis
Pair: TypeAlias = "int | Shape"  # for the rows and the columns of a picture: one number for both, or two
P = ParamSpec("P")  # the parameters of a function that gets wrapped

# --- 1. Where arrays live ---------------------------------------------------------------------------------------------

xp = np  # the array library in use: numpy, or cupy after use_device found a GPU; only speed ever depends on which
PRECISIONS = {"float32": 23, "tf32": 10, "bfloat16": 7}  # bits of a number's fraction that enter a matrix product
_precision = "float32"


def use_device(device: str = "auto") -> str:
    """Choose where arrays live, and return the choice in words: "cpu" or the GPU's name.

    device: "cpu" (NumPy), "gpu" (CuPy), or "auto", the GPU where CuPy is installed and finds one, else the CPU. Call it
    before the first Tensor is made. Raises RuntimeError where "gpu" is asked for and there is none, ValueError for
    any other word.
    """
    global xp
    if device not in ("auto", "cpu", "gpu"):
        raise ValueError(f"device must be auto, cpu or gpu, not {device!r}")
    xp = np
    if device == "cpu":
        return "cpu"
    try:
        import cupy

        name: str = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
        one = cupy.ones((1, 1), np.float32)
        cupy.exp(cupy.matmul(one, one)).get()  # a GPU without its compiler or its BLAS is none to us
    except Exception as error:  # CuPy raises its own classes for a missing driver, library or device
        if device == "gpu":
            reason = next((line for line in str(error).splitlines() if line.strip("= ")), type(error).__name__)
            raise RuntimeError(f"no GPU to use ({reason}); install CuPy for your CUDA version or use the CPU") from None
        return "cpu"
    xp = cupy
    return name


def use_precision(precision: str) -> None:
    """Choose how exact the matrix products of float32 arrays are: "float32", "tf32" or "bfloat16", see PRECISIONS.

    A GPU multiplies shorter numbers many times faster, and still adds their products up in float32. On a CPU this is
    emulated, by rounding what enters a product: slower, and there to see what it does to training. Raises ValueError for
    another word. Call it after `use_device`.
    """
    global _precision
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    _precision = precision
    if xp is not np:
        from cupy._core import _routines_linalg as linalg  # CuPy has no other door to this

        kind = {"float32": "DEFAULT", "tf32": "TF32", "bfloat16": "BF16"}[precision]
        linalg.set_compute_type(np.float32, getattr(linalg, f"COMPUTE_TYPE_{kind}"))


def _product(a: Array, b: Array) -> Array:
    """a @ b of arrays, in the precision that is chosen."""
    return xp.matmul(a, b) if _precision == "float32" or xp is not np else np.matmul(_rounded(a), _rounded(b))


def _rounded(x: Array) -> Array:
    """A float32 array with fractions as short as the precision has them, rounded to nearest; others as they are.

    The last 23 bits of a float32 are its fraction, so it is rounded as the whole number that its bits make.
    """
    if x.dtype != np.float32:
        return x
    dropped = 23 - PRECISIONS[_precision]
    bits = np.ascontiguousarray(x).view(np.uint32) + np.uint32(1 << (dropped - 1))
    return (bits >> np.uint32(dropped) << np.uint32(dropped)).view(np.float32)


def to_numpy(array: Tensor | Array) -> NDArray[Any]:
    """An array (or a Tensor's) as a NumPy array of the same shape and dtype: a copy from a GPU, itself on the CPU."""
    array = array.data if isinstance(array, Tensor) else array
    return np.asarray(array.get() if hasattr(array, "get") else array)


# --- 2. Tensor --------------------------------------------------------------------------------------------------------

_order = itertools.count()  # numbers the Nodes as they are made


class _Mode(threading.local):
    enabled = True  # whether operations remember how they were computed; each thread has its own


_mode = _Mode()


@contextlib.contextmanager
def recording(enabled: bool) -> Iterator[None]:
    """Within this context operations of this thread remember how they were computed (enabled=True) or do not."""
    before, _mode.enabled = _mode.enabled, enabled
    try:
        yield
    finally:
        _mode.enabled = before


def no_grad() -> contextlib.AbstractContextManager[None]:
    """A context in which nothing is remembered: for sampling, and for whatever must not be differentiated."""
    return recording(False)


class Node:
    """One remembered operation: for each operand that needs a gradient, its Node, its shape and the vjp towards it.

    A Node holds no array of its own. What a derivative needs is held by its vjp, so results that no derivative needs
    are freed at once. `order` counts creation: operands come before results, so falling order is a topological order.
    """

    __slots__ = ("edges", "order")

    def __init__(self, edges: tuple[Edge, ...] = ()):
        self.edges: tuple[Edge, ...] | None = edges  # None once `grad` has let go of it
        self.order = next(_order)


class Tensor:
    """An array `data` of floats, and the Node that computed it, or None if no gradient is to flow into it.

    data: anything that xp.asarray understands. Float arrays keep their dtype, everything else becomes float32; dtype=
    overrides. requires_grad=True makes a leaf whose gradient can be asked for.
    """

    __slots__ = ("data", "node")
    __array_ufunc__ = None  # so that array * Tensor asks Tensor.__rmul__, not NumPy

    def __init__(self, data: Any, requires_grad: bool = False, dtype: DTypeLike | None = None):
        if not isinstance(data, xp.ndarray) or dtype is not None:
            data = xp.asarray(data, dtype=dtype or getattr(data, "dtype", np.float32))
        if data.dtype.kind != "f":
            data = data.astype(np.float32)
        self.data: Array = data
        self.node = Node() if requires_grad else None

    @property
    def shape(self) -> Shape:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.data.dtype

    @property
    def requires_grad(self) -> bool:
        return self.node is not None

    @property
    def T(self) -> Tensor:
        return transpose(self)

    def detach(self) -> Tensor:
        """The same array, without its history: no gradient flows back through the result."""
        return Tensor(self.data)

    def item(self) -> float:
        """The value of a Tensor of one element as a Python float (on a GPU this waits for the device)."""
        return float(self.data.item())

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        return f"Tensor({self.data!r}{', requires_grad=True' if self.node else ''})"

    if TYPE_CHECKING:  # at run time these are the functions of chapter 4, which are attached there

        def __add__(self, b: Operand) -> Tensor: ...
        def __radd__(self, a: Operand) -> Tensor: ...
        def __sub__(self, b: Operand) -> Tensor: ...
        def __rsub__(self, a: Operand) -> Tensor: ...
        def __mul__(self, b: Operand) -> Tensor: ...
        def __rmul__(self, a: Operand) -> Tensor: ...
        def __truediv__(self, b: Operand) -> Tensor: ...
        def __rtruediv__(self, a: Operand) -> Tensor: ...
        def __matmul__(self, b: Operand) -> Tensor: ...
        def __rmatmul__(self, a: Operand) -> Tensor: ...
        def __neg__(self) -> Tensor: ...
        def __pow__(self, exponent: float) -> Tensor: ...
        def __getitem__(self, index: Index | tuple[Index, ...]) -> Tensor: ...
        def sum(self, axis: Axis = None, keepdims: bool = False) -> Tensor: ...
        def mean(self, axis: Axis = None, keepdims: bool = False) -> Tensor: ...
        def max(self, axis: Axis = None, keepdims: bool = False) -> Tensor: ...
        def reshape(self, *shape: int | Sequence[int]) -> Tensor: ...
        def transpose(self, *axes: int) -> Tensor: ...


def _raw(x: Operand) -> Array | float:
    return x.data if isinstance(x, Tensor) else x  # an operand's array; plain numbers and arrays pass as they are


def _result(data: Array | float, *edges: tuple[Operand | None, Vjp]) -> Tensor:
    """The Tensor of an operation's result; `edges` are (operand, vjp) pairs.

    A vjp takes the gradient of the result and returns the operand's, Tensor to Tensor. Operands that are plain numbers or
    arrays have none to receive.
    """
    result = Tensor(data)
    tensors = [(x, vjp) for x, vjp in edges if isinstance(x, Tensor)]
    for x, _ in tensors:
        if x.dtype != result.dtype:
            raise TypeError(f"operands of {x.dtype} and {result.dtype} meet; convert one: Tensor(x.data, dtype=...)")
    if _mode.enabled:
        kept = tuple((x.node, x.shape, vjp) for x, vjp in tensors if x.node is not None)
        if kept:
            result.node = Node(kept)
    return result


def _operation(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Put the operation's name and the shapes it was given before whatever its arrays complain about.

    While `profile` is at work (chapter 9), also time it.
    """

    @functools.wraps(function)
    def named(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        try:
            return _timed(function.__name__, "forward", function, *args, **kwargs) if _times else function(*args, **kwargs)
        except (ValueError, IndexError, TypeError, ZeroDivisionError) as error:  # the last: of shapes with a 0
            if getattr(error, "is_clear", False):
                raise
            operands = itertools.chain.from_iterable(x if isinstance(x, (list, tuple)) else (x,) for x in args)
            shapes = ", ".join(str(x.shape) for x in operands if hasattr(x, "shape"))
            kind = next((k for k in (ValueError, IndexError, TypeError) if isinstance(error, k)), ValueError)
            clear: Any = kind(f"{function.__name__} of shapes {shapes}: {error}")
            clear.is_clear = True
            raise clear from None

    return named


# --- 3. Walking back --------------------------------------------------------------------------------------------------


def grad(
    output: Tensor, inputs: Iterable[Tensor], output_grad: Tensor | None = None, create_graph: bool = False
) -> list[Tensor]:
    """Gradients of `output` with respect to each of `inputs`: a list of Tensors of their shapes.

    output: a Tensor of one element, or any shape with `output_grad`, a Tensor of that shape, v in v^T d(output)/d(input)
    (then the sum over output's elements weighted by v is what is differentiated). An input that output does not depend
    on gets zeros. create_graph=True remembers how the gradients were computed, so that they can be differentiated, and
    keeps the graph; otherwise the graph is let go node by node, and its memory with it, while the walk goes on. Gradients
    may share memory with each other: read them, do not write into them.

    Reverse mode: visit the operations in falling order of creation, each once, when all that depends on it is done:
        gradient of operand += vjp(gradient of result).
    Operations that lead to none of the inputs are not visited. No recursion, so depth is not limited.
    Raises ValueError if output needs output_grad or an input is not a leaf or result with history, RuntimeError if the
    graph was let go by an earlier walk.
    """
    inputs = list(inputs)
    if not inputs:
        return []
    nodes = [x.node for x in inputs if x.node]
    if len(nodes) < len(inputs):
        raise ValueError("grad: every input must be a Tensor with requires_grad=True, or computed from one")
    if output_grad is None:
        if output.size != 1:
            raise ValueError(f"grad: output of shape {output.shape} is not a single number; pass output_grad")
        output_grad = Tensor(xp.ones_like(output.data))
    if output_grad.shape != output.shape:
        raise ValueError(f"grad: output_grad of shape {output_grad.shape} for an output of shape {output.shape}")

    wanted: dict[Node, Tensor | None] = dict.fromkeys(nodes)
    useful = _between(output.node, wanted)
    waiting = [(-output.node.order, output.node)] if output.node in useful else []  # a heap: the newest node first
    gradients = {output.node: (output_grad, False)}  # with whether its array may be written to
    with recording(create_graph):
        while waiting:
            node = heapq.heappop(waiting)[1]
            gradient, _ = gradients.pop(node)
            if node in wanted:
                wanted[node] = gradient
            for operand, shape, vjp in node.edges or ():
                if operand in useful:
                    piece = _pull(vjp, gradient, shape)
                    # A vjp returns the gradient it was given, a view, or a fresh array that nobody else holds. a + b
                    # hands one gradient to both its operands: adding to it for a would spoil it for b. So only a
                    # fresh one may be added to in place, and only when the sum is not to be differentiated.
                    fresh = not create_graph and piece.data is not gradient.data and piece.data.base is None
                    if operand in gradients:
                        gradients[operand] = _accumulate(gradients[operand], (piece, fresh))
                    else:
                        gradients[operand] = piece, fresh
                        heapq.heappush(waiting, (-operand.order, operand))
            if node.edges and not create_graph:
                node.edges = None
    found = [wanted[node] for node in nodes]
    return [Tensor(xp.zeros_like(x.data)) if g is None else g for x, g in zip(inputs, found, strict=True)]


def _pull(vjp: Vjp, gradient: Tensor, shape: Shape) -> Tensor:
    """The gradient of an operand, of its `shape`, from that of the result."""
    if _times and not _depth.inside:
        return _timed(vjp.__qualname__.split(".")[0], "backward", _pull, vjp, gradient, shape)
    return unbroadcast(vjp(gradient), shape)


def _between(start: Node | None, wanted: Iterable[Node]) -> set[Node]:
    """The nodes on some path from `start` down to the nodes `wanted`, both ends included."""
    oldest = min(node.order for node in wanted)  # older nodes cannot depend on any wanted one
    seen, stack = set(), [start]
    while stack:
        node = stack.pop()
        if node is None or node in seen or node.order < oldest:
            continue
        if node.edges is None:
            raise RuntimeError("grad: this graph was let go by an earlier walk; pass create_graph=True to that one")
        seen.add(node)
        stack.extend(operand for operand, _, _ in node.edges)
    useful = set()
    for node in sorted(seen, key=lambda node: node.order):
        if node in wanted or any(operand in useful for operand, _, _ in node.edges or ()):
            useful.add(node)
    return useful


def _accumulate(total: tuple[Tensor, bool], piece: tuple[Tensor, bool]) -> tuple[Tensor, bool]:
    """The sum of two (gradient, fresh) pairs, in the array of whichever is fresh."""
    for (mine, fresh), (other, _) in ((total, piece), (piece, total)):
        if fresh:
            xp.add(mine.data, other.data, out=mine.data)
            return mine, True
    return total[0] + piece[0], not _mode.enabled  # a new array, so fresh from now on, unless it is to be differentiated


def unbroadcast(gradient: Tensor, shape: Shape) -> Tensor:
    """Sum `gradient` over the axes that broadcasting had stretched, back to an operand's `shape`.

    Broadcasting copies an element along an axis; the derivative of a copy is a sum over the copies. This is the only
    place that undoes broadcasting: the formulas below may return a gradient of the result's shape.
    """
    if gradient.shape == shape:
        return gradient
    added = gradient.ndim - len(shape)
    stretched = tuple(i for i, n in enumerate(gradient.shape) if i < added or (shape[i - added] == 1 and n != 1))
    return reshape(reduce_sum(gradient, stretched, keepdims=True), shape)


# --- 4. Primitive operations ------------------------------------------------------------------------------------------
# Each is its value and, for every operand, one line: g, the gradient of the result, to the gradient of that operand.
# To find that line, write down how the result changes, d(ab) = b da + a db, multiply it by g elementwise and sum up: what
# then stands beside da is the gradient of a. A matrix product: sum(g * (da b + a db)) = sum((g b^T) * da + (a^T g) * db).
# Derivatives are written in terms of the operands, never of the result: a result whose history held itself would be a
# cycle, and its memory would wait for the garbage collector.


@_operation
def add(a: Operand, b: Operand) -> Tensor:
    """a + b, elementwise with broadcasting. d(a+b) = da + db."""
    return _result(_raw(a) + _raw(b), (a, lambda g: g), (b, lambda g: g))


@_operation
def subtract(a: Operand, b: Operand) -> Tensor:
    """a - b, elementwise with broadcasting. d(a-b) = da - db."""
    return _result(_raw(a) - _raw(b), (a, lambda g: g), (b, lambda g: -g))


@_operation
def multiply(a: Operand, b: Operand) -> Tensor:
    """a * b, elementwise with broadcasting. d(ab) = b da + a db."""
    return _result(_raw(a) * _raw(b), (a, lambda g: g * b), (b, lambda g: g * a))


@_operation
def divide(a: Operand, b: Operand) -> Tensor:
    """a / b, elementwise with broadcasting. d(a/b) = da/b - (a/b^2) db."""
    return _result(_raw(a) / _raw(b), (a, lambda g: g / b), (b, lambda g: -(g / b) * (a / b)))


@_operation
def negative(x: Tensor) -> Tensor:
    """-x, elementwise."""
    return _result(-x.data, (x, lambda g: -g))


@_operation
def power(x: Tensor, exponent: float) -> Tensor:
    """x ** exponent for a constant number. d(x^p) = p x^(p-1) dx."""
    if isinstance(exponent, Tensor):
        raise TypeError("the exponent must be a number; write exp(b * log(a)) for a ** b")
    exponent = float(exponent)
    if exponent == 0:
        return Tensor(xp.ones_like(x.data))  # a constant; its formula would be 0 * infinity at x = 0
    data = x.data * x.data if exponent == 2 else x.data**exponent
    return _result(data, (x, lambda g: g * exponent * (x if exponent == 2 else power(x, exponent - 1))))


@_operation
def exp(x: Tensor) -> Tensor:
    """e^x, elementwise. d exp(x) = exp(x) dx."""
    return _result(xp.exp(x.data), (x, lambda g: g * exp(x)))


@_operation
def log(x: Tensor) -> Tensor:
    """Natural logarithm, elementwise. d log(x) = dx / x."""
    return _result(xp.log(x.data), (x, lambda g: g / x))


@_operation
def sqrt(x: Tensor) -> Tensor:
    """Square root, elementwise. d sqrt(x) = dx / (2 sqrt(x)), infinite at 0."""
    return _result(xp.sqrt(x.data), (x, lambda g: g * 0.5 / sqrt(x)))


@_operation
def tanh(x: Tensor) -> Tensor:
    """Hyperbolic tangent, elementwise. d tanh(x) = (1 - tanh(x)^2) dx."""
    return _result(xp.tanh(x.data), (x, lambda g: g * (1.0 - tanh(x) ** 2)))


@_operation
def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x), elementwise; for x < 0 as e^x / (1 + e^x), so that exp cannot overflow. d s(x) = s(x) s(-x) dx."""
    small = xp.exp(-xp.abs(x.data))
    data = xp.where(x.data < 0, small, 1) / (1 + small)
    return _result(data, (x, lambda g: g * sigmoid(x) * sigmoid(-x)))


@_operation
def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), elementwise, as max(x, 0) + log(1 + e^-|x|), which cannot overflow. d = sigmoid(x) dx."""
    data = xp.maximum(x.data, 0.0) + xp.log1p(xp.exp(-xp.abs(x.data)))
    return _result(data, (x, lambda g: g * sigmoid(x)))


@_operation
def relu(x: Tensor) -> Tensor:
    """max(x, 0), elementwise; the derivative is 1 where x > 0, else 0."""
    return _result(xp.maximum(x.data, 0.0), (x, lambda g: g * (x.data > 0)))


@_operation
def matmul(a: Operand, b: Operand) -> Tensor:
    """Matrix product (..., n, k) @ (..., k, m) -> (..., n, m); leading axes broadcast.

    d(ab) = da b + a db, so the gradients are g b^T and a^T g. When b is one matrix for a whole batch, all rows of a are
    stacked: one large product runs faster than many small ones, and b's gradient needs no sum over a batch of matrices.
    """
    a, b = (x if isinstance(x, Tensor) else Tensor(x) for x in (a, b))
    if min(a.ndim, b.ndim) < 2:
        raise ValueError("both operands need at least two axes")
    if b.ndim == 2 < a.ndim:
        rows = a.shape[:-1]
        if a.shape[-1] != b.shape[0]:
            raise ValueError("the last axis of the first must equal the first axis of the second")
        data = _product(a.data.reshape(math.prod(rows), a.shape[-1]), b.data).reshape(*rows, b.shape[1])
        return _result(data, (a, lambda g: matmul(g, b.T)), (b, lambda g: matmul(_rows(a).T, _rows(g))))
    data = _product(a.data, b.data)
    return _result(data, (a, lambda g: matmul(g, swap_last(b))), (b, lambda g: matmul(swap_last(a), g)))


def _rows(x: Tensor) -> Tensor:
    return reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))  # (..., c) -> (rows, c)


@_operation
def reduce_sum(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Sum over `axis` (a number, a tuple, or None for all). The gradient of a sum is spread to every summand."""
    axes = range(x.ndim) if axis is None else normalize_axis_tuple(axis, x.ndim)
    kept = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    data = x.data.sum(axis=axis, keepdims=keepdims)
    return _result(data, (x, lambda g: broadcast_to(reshape(g, kept), x.shape)))


@_operation
def reduce_mean(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Mean over `axis` (a number, a tuple, or None for all)."""
    if not x.size:
        raise ValueError("there is no mean of no elements")
    total = reduce_sum(x, axis, keepdims)
    return total * (total.size / x.size)  # x.size / total.size elements went into each sum


@_operation
def reduce_max(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Largest element over `axis`. The gradient goes to it, in equal parts where several are equal."""
    top = x.data.max(axis=axis, keepdims=True)
    is_top = x.data == top
    share = is_top / is_top.sum(axis=axis, keepdims=True).astype(x.dtype)
    data = top if keepdims else x.data.max(axis=axis)
    return _result(data, (x, lambda g: reshape(g, top.shape) * share))


@_operation
def broadcast_to(x: Tensor, shape: Shape) -> Tensor:
    """Stretch axes of size 1 (and add leading ones) to `shape`, without a copy; `unbroadcast` is its derivative."""
    return _result(xp.broadcast_to(x.data, shape), (x, lambda g: g))


@_operation
def reshape(x: Tensor, *shape: int | Sequence[int]) -> Tensor:
    """The same elements in another shape, row by row; one size may be -1."""
    sizes: Any = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    before = x.shape
    return _result(x.data.reshape(sizes), (x, lambda g: reshape(g, before)))


@_operation
def transpose(x: Tensor, *axes: int) -> Tensor:
    """Permute the axes, axes[i] of x becoming axis i; without axes, reverse them. The derivative permutes back."""
    axes = axes or tuple(reversed(range(x.ndim)))
    back = tuple(sorted(range(len(axes)), key=lambda i: axes[i] % max(x.ndim, 1)))
    return _result(x.data.transpose(axes), (x, lambda g: transpose(g, *back)))


def swap_last(x: Tensor) -> Tensor:
    """Transpose the last two axes: (..., n, m) -> (..., m, n)."""
    return transpose(x, *range(x.ndim - 2), x.ndim - 1, x.ndim - 2)


@_operation
def getitem(x: Tensor, index: Index | tuple[Index, ...]) -> Tensor:
    """x[index] for whole numbers, slices, None and ...; the gradient is laid into zeros at the same place."""
    for part in index if isinstance(index, tuple) else (index,):
        if not (part is None or part is Ellipsis or isinstance(part, (int, np.integer, slice))):
            raise TypeError(f"an index may hold whole numbers, slices, None and ..., not {type(part).__name__}")
    return _result(x.data[index], (x, lambda g: _place(g, index, x.shape)))


@_operation
def _place(x: Tensor, index: Index | tuple[Index, ...], shape: Shape) -> Tensor:
    """The derivative of getitem: x laid into zeros of `shape` at `index`."""
    data = xp.zeros(shape, x.dtype)
    data[index] = x.data
    return _result(data, (x, lambda g: g[index]))


@_operation
def concatenate(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Join Tensors along an existing axis; each gets its own part of the gradient."""
    ends = list(itertools.accumulate(x.shape[axis] for x in tensors))

    def part(i: int) -> Vjp:
        index = [slice(None)] * tensors[i].ndim
        index[axis] = slice(ends[i] - tensors[i].shape[axis], ends[i])
        return lambda g: g[tuple(index)]

    data = xp.concatenate([x.data for x in tensors], axis=axis)
    return _result(data, *((x, part(i)) for i, x in enumerate(tensors)))


for _name, _function in {"add": add, "sub": subtract, "mul": multiply, "truediv": divide, "matmul": matmul}.items():
    setattr(Tensor, f"__{_name}__", _function)
    # a + b with an array or number a is b.__radd__(a); the default value keeps each lambda's own function
    setattr(Tensor, f"__r{_name}__", lambda b, a, _function=_function: _function(a, b))
for _name, _method in {"__neg__": negative, "__pow__": power, "__getitem__": getitem, "sum": reduce_sum, "max": reduce_max,
                       "mean": reduce_mean, "reshape": reshape, "transpose": transpose}.items():  # fmt: skip
    setattr(Tensor, _name, _method)


@_operation
def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """(B, C*r*r, H, W) -> (B, C, H*r, W*r) with r = factor: channels become resolution.

    out[b, c, h*r + i, w*r + j] = x[b, c*r*r + i*r + j, h, w] (Shi et al. 2016, eq. 4, in PyTorch's order of channels);
    the paper's UpScale between the generator's stages.
    """
    batch, channels, height, width = x.shape
    if channels % factor**2:
        raise ValueError(f"{channels} channels do not divide by factor^2 = {factor**2}")
    x = reshape(x, batch, channels // factor**2, factor, factor, height, width)
    x = transpose(x, 0, 1, 4, 2, 5, 3)  # (B, C, H, r, W, r)
    return reshape(x, batch, channels // factor**2, height * factor, width * factor)


@_operation
def pixel_unshuffle(x: Tensor, factor: int) -> Tensor:
    """(B, C, H*r, W*r) -> (B, C*r*r, H, W): the inverse of `pixel_shuffle`."""
    batch, channels, height, width = x.shape
    if height % factor or width % factor:
        raise ValueError(f"{height}x{width} does not divide by factor {factor}")
    x = reshape(x, batch, channels, height // factor, factor, width // factor, factor)
    x = transpose(x, 0, 1, 3, 5, 2, 4)  # (B, C, r, r, H, W)
    return reshape(x, batch, channels * factor**2, height // factor, width // factor)


# --- 5. Fused operations ----------------------------------------------------------------------------------------------
# What a step spends its time in. Each computes on bare arrays what the composition beside it defines; the tests hold the
# two equal in value, first and second derivative. Where speed asks for it a vjp has two forms: on arrays when the walk is
# not recorded, in Tensor operations when its result is to be differentiated again.
#
# On a GPU an elementwise operation of arrays is a launch and a pass over memory of its own. So each array form here has a
# kernel beside it that does the whole in one: a function in CUDA C, run by very many threads at once, each of which knows
# by blockIdx and threadIdx which one it is. `real` is float or double, as the arrays are.

_CUDA = """
typedef long long count;

__device__ real warp_sum(real x) {  // over the 32 threads of a warp, to each of them
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    return x;
}

__device__ real warp_max(real x) {
    for (int step = 16; step; step /= 2) x = max(x, __shfl_xor_sync(0xffffffff, x, step));
    return x;
}
"""


@functools.cache
def _kernel(source: str, name: str, dtype: np.dtype[Any], **constants: object) -> Any:
    """The kernel `name` of a CUDA source, compiled for arrays of `dtype` and with `constants` in place of their names."""
    constants |= {"LOWEST": f"real({np.finfo(dtype).min!s})"}
    lines = [f"#define {key} {value}" for key, value in constants.items()]
    lines.append(f"typedef {'double' if dtype == np.float64 else 'float'} real;")
    cupy: Any = xp
    return cupy.RawKernel("\n".join([*lines, _CUDA, source]), name)


def launch(source: str, name: str, grid: Shape, block: Shape, *arguments: Any, **constants: object) -> None:
    """Run the kernel `name` of a CUDA source in a grid of blocks of threads.

    arguments: arrays, of which the first says what `real` is, and must lie in rows if they are written to; None for an
    array that is not there; numbers, an int as a `count`, a float as a `real`. constants are compiled into the kernel.
    """
    dtype = arguments[0].dtype

    def passed(x: Any) -> Any:
        if isinstance(x, xp.ndarray):
            return xp.ascontiguousarray(x)
        if x is None:
            return np.uintp(0)  # a null pointer
        return np.int64(x) if isinstance(x, int) else dtype.type(x)

    _kernel(source, name, dtype, **constants)(grid, block, tuple(map(passed, arguments)))


def _launch_elements(source: str, name: str, size: int, *arguments: Any) -> None:
    """A thread for each of `size` elements."""
    if size:
        launch(source, name, (-(-size // 256),), (256,), *arguments, size)


def _launch_rows(source: str, name: str, x: Array, *arguments: Any) -> None:
    """A warp of 32 threads for each row of an array x (..., width), four of them in a block; the row is theirs to share."""
    if x.size:
        width = x.shape[-1]
        rows = x.size // width
        launch(source, name, (-(-rows // 4),), (32, 4), x, *arguments, rows, width)


@_operation
def linear_map(x: Tensor, forward: Callable[[Array], Array], transposed: Callable[[Array], Array]) -> Tensor:
    """forward(x) of a function on arrays that is linear: sum(y forward(x)) = sum(transposed(y) x) for all x and y.

    Its derivative is then `transposed`, whose derivative is `forward`, as often as one likes.
    """
    return _result(forward(x.data), (x, lambda g: linear_map(g, transposed, forward)))


@_operation
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight + bias: (..., k), (k, m), (m,) -> (..., m), the sum written into the product's own array."""
    if x.shape[-1:] != weight.shape[:1] or (bias is not None and bias.shape != weight.shape[1:]):
        raise ValueError("expected (..., k), (k, m) and (m,)")
    data = _product(x.data.reshape(math.prod(x.shape[:-1]), x.shape[-1]), weight.data)
    if bias is not None:
        data += bias.data
    return _result(
        data.reshape(*x.shape[:-1], weight.shape[1]),
        (x, lambda g: linear(g, weight.T)),
        (weight, lambda g: matmul(_rows(x).T, _rows(g))),
        (bias, lambda g: g),
    )


# GELU needs the normal distribution, its density phi(x) = exp(-x^2/2) / sqrt(2 pi) and its cumulative probability
# Phi(x) = (1 + erf(x / sqrt 2)) / 2, for every element of the widest arrays there are. So it comes in cache-sized pieces.
_CACHE = 1 << 15  # elements in a piece of an elementwise chain: a few arrays of it stay in a core's cache
_PEAK = 1 / math.sqrt(2 * math.pi)  # phi(0)


_NORMAL_CUDA = """
__device__ real cdf(real x) { return real(0.5) + real(0.5) * erf(x * real(0.7071067811865476)); }
__device__ real density(real x) { return exp(real(-0.5) * x * x) * real(0.3989422804014327); }

#define EACH(i) count i = count(blockIdx.x) * blockDim.x + threadIdx.x; if (i >= size) return
#define SUM(x, bias, i) (bias ? x[i] + bias[i % width] : x[i])

extern "C" __global__ void normal_cdf(const real* x, const real* bias, real* out, count width, count size) {
    EACH(i);
    out[i] = cdf(SUM(x, bias, i));
}

extern "C" __global__ void gelu(const real* x, const real* bias, real* out, count width, count size) {
    EACH(i);
    real sum = SUM(x, bias, i);
    out[i] = sum * cdf(sum);
}

extern "C" __global__ void gelu_with_slope(const real* x, const real* bias, real* out, real* slope, count width,
                                           count size) {
    EACH(i);
    real sum = SUM(x, bias, i), p = cdf(sum);
    out[i] = sum * p;
    slope[i] = p + sum * density(sum);
}

extern "C" __global__ void gelu_curvature(const real* x, const real* g, const real* bias, real* out, count width,
                                          count size) {
    EACH(i);
    real sum = SUM(x, bias, i);
    out[i] = (2 - sum * sum) * density(sum) * g[i];
}
"""


def _elementwise(
    kernel: Callable[..., tuple[Array, ...]], *arrays: Array, bias: Array | None = None, results: int = 1
) -> list[Array]:
    """`results` new arrays from kernel(*arrays), arrays of one shape; to the first a bias (C,) is added on the way, if any.

    In cache-sized pieces on the CPU, by the kernel of its name on a GPU.
    """
    made = [xp.empty(arrays[0].shape, arrays[0].dtype) for _ in range(results)]
    width = 1 if bias is None else bias.size
    if xp is not np:
        _launch_elements(_NORMAL_CUDA, kernel.__name__.strip("_"), made[0].size, *arrays, bias, *made, width)
        return made
    (first, *others), made_rows = ([a.reshape(-1, width) for a in group] for group in (arrays, made))  # (rows, width)
    step = max(1, _CACHE // width)
    for i in range(0, len(first), step):
        rows = slice(i, i + step)
        x = first[rows] if bias is None else first[rows] + bias
        for piece, values in zip(made_rows, kernel(x, *(a[rows] for a in others)), strict=True):
            piece[rows] = values
    return made


def _normal(x: Array) -> tuple[Array, Array]:
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
    density *= _PEAK
    return cdf, density


@_operation
def normal_cdf(x: Tensor) -> Tensor:
    """Phi(x), elementwise: the probability that a standard normal number is below x. d Phi(x) = phi(x) dx."""
    (data,) = _elementwise(_normal_cdf, x.data)
    return _result(data, (x, lambda g: g * exp(x * x * -0.5) * _PEAK))


def _normal_cdf(x: Array) -> tuple[Array, ...]:  # for its kernel: named alike but for the _, as are those below
    return _normal(x)[:1]


def gelu_composed(x: Tensor) -> Tensor:
    """GELU as its definition reads: x Phi(x)."""
    return x * normal_cdf(x)


@_operation
def gelu(x: Tensor, bias: Array | None = None) -> Tensor:
    """Gaussian error linear unit in its exact form, x Phi(x), elementwise (Hendrycks and Gimpel 2016).

    Its derivatives: x Phi(x)  ->  Phi(x) + x phi(x)  ->  (2 - x^2) phi(x), using phi'(x) = -x phi(x). The first comes
    almost free with the value, so it is kept for the way back. bias: an array (C,) for x (..., C), to take x + bias for x;
    no gradient goes to it from here, see `linear_gelu`.
    """
    if not (_mode.enabled and x.requires_grad):
        return Tensor(_elementwise(_gelu, x.data, bias=bias)[0])
    value, slope = _elementwise(_gelu_with_slope, x.data, bias=bias, results=2)
    return _result(value, (x, lambda g: g * (_gelu_slope(x, slope, bias) if _mode.enabled else slope)))


def linear_gelu_composed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer, then GELU."""
    return gelu(linear(x, weight, bias))


@_operation
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """gelu(x @ weight + bias): (..., k), (k, m), (m,) -> (..., m), the bias added in the pass that computes GELU.

    So x @ weight + bias is written down nowhere. On the way back `product` stands for it, and the gradient that arrives
    there is the bias's too.
    """
    product = linear(x, weight)
    if bias is None:
        return gelu(product)
    if bias.shape != product.shape[-1:]:
        raise ValueError("expected (..., k), (k, m) and (m,)")
    product = _result(product.data, (product, lambda g: g), (bias, lambda g: g))
    return gelu(product, bias.data)


def _gelu(x: Array) -> tuple[Array]:
    cdf, _ = _normal(x)
    cdf *= x
    return (cdf,)


def _gelu_with_slope(x: Array) -> tuple[Array, Array]:
    cdf, density = _normal(x)
    density *= x
    density += cdf
    cdf *= x
    return cdf, density


@_operation
def _gelu_slope(x: Tensor, slope: Array, bias: Array | None) -> Tensor:
    """The array `slope` = Phi(x) + x phi(x) as an operation on x, with its derivative (2 - x^2) phi(x)."""

    def vjp(g: Tensor) -> Tensor:
        if _mode.enabled:
            y = x if bias is None else x + bias
            return g * (2.0 - y * y) * exp(y * y * -0.5) * _PEAK
        return Tensor(_elementwise(_gelu_curvature, x.data, g.data, bias=bias)[0])

    return _result(slope, (x, vjp))


def _gelu_curvature(x: Array, g: Array) -> tuple[Array]:
    square = x * x
    density = np.exp(square * -0.5)
    density *= _PEAK
    np.subtract(2.0, square, out=square)
    density *= square
    density *= g
    return (density,)


def softmax_composed(x: Tensor) -> Tensor:
    """Softmax as its definition reads: exp(x) / sum exp(x). Overflows for large x, which `softmax` does not."""
    weights = exp(x)
    return weights / weights.sum(axis=-1, keepdims=True)


_SOFTMAX_CUDA = """
extern "C" __global__ void softmax(const real* x, const bool* mask, real* p, count mask_rows, count rows, count width) {
    count row = count(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    x += row * width;
    p += row * width;
    if (mask) mask += row % mask_rows * width;
    real top = LOWEST, total = 0;
    for (count i = threadIdx.x; i < width; i += 32)
        if (!mask || mask[i]) top = max(top, x[i]);
    top = warp_max(top);
    for (count i = threadIdx.x; i < width; i += 32) {
        p[i] = mask && !mask[i] ? real(0) : exp(x[i] - top);
        total += p[i];
    }
    total = warp_sum(total);
    for (count i = threadIdx.x; i < width; i += 32)
        if (total != 0) p[i] /= total;
}

extern "C" __global__ void softmax_vjp(const real* p, const real* g, real* out, count rows, count width) {
    count row = count(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    real inner = 0;
    for (count i = row * width + threadIdx.x; i < (row + 1) * width; i += 32) inner += p[i] * g[i];
    inner = warp_sum(inner);
    for (count i = row * width + threadIdx.x; i < (row + 1) * width; i += 32) out[i] = p[i] * (g[i] - inner);
}
"""


@_operation
def softmax(x: Tensor, mask: Array | None = None) -> Tensor:
    """exp(x) / sum exp(x) over the last axis: (..., n) -> (..., n), rows that sum to 1.

    The row's maximum is subtracted first, which cancels in the quotient and keeps exp from overflowing. mask: a boolean
    array that broadcasts to x's shape, False where an element is to get weight 0, as if its x were -inf (the paper's
    locality-aware initialization); a row with nothing left is all zeros.
    With p the result, dp = p (dx - sum(p dx)) row by row, so the gradient of x is p (g - sum(p g)).
    """
    if mask is not None and np.broadcast_shapes(x.shape, mask.shape) != x.shape:
        raise ValueError(f"the mask, of shape {mask.shape}, must broadcast to x")
    p = _softmax(x.data, mask) if xp is np else _softmax_gpu(x.data, mask)

    def vjp(g: Tensor) -> Tensor:
        if _mode.enabled:
            y = softmax(x, mask)
            return y * (g - (g * y).sum(axis=-1, keepdims=True))
        if xp is not np:
            made = xp.empty_like(p)
            _launch_rows(_SOFTMAX_CUDA, "softmax_vjp", p, g.data, made)
            return Tensor(made)
        inner = (g.data * p).sum(axis=-1, keepdims=True)
        return Tensor((g.data - inner) * p)

    return _result(p, (x, vjp))


def _softmax(x: Array, mask: Array | None) -> Array:
    p = x if mask is None else np.where(mask, x, -np.inf).astype(x.dtype)
    p = p - _finite(p.max(axis=-1, keepdims=True))
    np.exp(p, out=p)
    p /= _positive(p.sum(axis=-1, keepdims=True))
    return p


def _softmax_gpu(x: Array, mask: Array | None) -> Array:
    p, rows = xp.empty(x.shape, x.dtype), 1
    if mask is not None:
        mask = mask.astype(bool)
        if mask.shape != x.shape[x.ndim - mask.ndim :]:  # else its rows come again in the same order
            mask = xp.broadcast_to(mask, x.shape)
        rows = max(mask.size // max(x.shape[-1], 1), 1)
    _launch_rows(_SOFTMAX_CUDA, "softmax", x, mask, p, rows)
    return p


def _finite(top: Array) -> Array:
    return xp.maximum(top, xp.finfo(top.dtype).min)  # a row's maximum, also where the whole row is masked (-inf)


def _positive(total: Array) -> Array:
    return xp.maximum(total, xp.finfo(total.dtype).tiny)  # a row's sum, also where the whole row is masked (0)


def layer_norm_composed(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer norm as its definition reads."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    return centred / sqrt(variance + eps) * weight + bias


_LAYER_NORM_CUDA = """
extern "C" __global__ void layer_norm(const real* x, const real* weight, const real* bias, real* out, real* h, real* r,
                                      real eps, count rows, count width) {
    count row = count(blockIdx.x) * blockDim.y + threadIdx.y, at = row * width;
    if (row >= rows) return;
    real mean = 0, square = 0;
    for (count i = threadIdx.x; i < width; i += 32) mean += x[at + i];
    mean = warp_sum(mean) / width;
    for (count i = threadIdx.x; i < width; i += 32) square += (x[at + i] - mean) * (x[at + i] - mean);
    real scale = 1 / sqrt(warp_sum(square) / width + eps);
    for (count i = threadIdx.x; i < width; i += 32) {
        h[at + i] = (x[at + i] - mean) * scale;
        out[at + i] = h[at + i] * weight[i] + bias[i];
    }
    if (threadIdx.x == 0) r[row] = scale;
}

extern "C" __global__ void layer_norm_vjp(const real* h, const real* r, const real* g, const real* weight, real* dx,
                                          count rows, count width) {
    count row = count(blockIdx.x) * blockDim.y + threadIdx.y, at = row * width;
    if (row >= rows) return;
    real mean = 0, inner = 0;
    for (count i = threadIdx.x; i < width; i += 32) {
        real u = weight ? g[at + i] * weight[i] : g[at + i];
        mean += u;
        inner += u * h[at + i];
    }
    mean = warp_sum(mean) / width;
    inner = warp_sum(inner) / width;
    for (count i = threadIdx.x; i < width; i += 32) {
        real u = weight ? g[at + i] * weight[i] : g[at + i];
        dx[at + i] = r[row] * (u - mean - h[at + i] * inner);
    }
}
"""


@_operation
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer normalization over the last axis: (..., C), (C,), (C,) -> (..., C) (Ba et al. 2016).

    h = (x - mean(x)) r with r = (mean((x - mean(x))^2) + eps)^-1/2, and the result is h weight + bias.
    With means over the last axis, dr = -r^2 mean(h dx) and dh = r (dx - mean(dx) - h mean(h dx)): a symmetric map, so that
    the gradient of x is the same of u = g weight,  r (u - mean(u) - h mean(h u)).
    """
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError("weight and bias must have the shape of x's last axis")
    forward = _layer_norm if xp is np else _layer_norm_gpu
    data, h, r = forward(x.data, weight.data, bias.data, eps)

    def vjp_x(g: Tensor) -> Tensor:
        if _mode.enabled:
            return _normalize_vjp(x, eps, h, r, g * weight)
        return Tensor(_normalize_vjp_arrays(h, r, g.data, weight.data))

    def vjp_weight(g: Tensor) -> Tensor:
        return g * (_normalized(x, eps, h, r) if _mode.enabled else h)  # whose sum over the rows is left to unbroadcast

    return _result(data, (x, vjp_x), (weight, vjp_weight), (bias, lambda g: g))


def _row_sum(x: Array) -> Array:
    """(..., C) -> (..., 1), as a product with a vector of ones: BLAS sums rows several times faster than ufuncs do."""
    return xp.matmul(x, xp.ones((x.shape[-1], 1), x.dtype))


def _layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> tuple[Array, Array, Array]:
    """The result of `layer_norm` and its arrays h (..., C) and r (..., 1)."""
    width = x.shape[-1]
    h = x - _row_sum(x) / width
    r = xp.einsum("...i,...i->...", h, h)[..., None]
    r *= 1 / width
    r += eps
    xp.sqrt(r, out=r)
    xp.reciprocal(r, out=r)
    h *= r
    data = h * weight
    data += bias
    return data, h, r


def _layer_norm_gpu(x: Array, weight: Array, bias: Array, eps: float) -> tuple[Array, Array, Array]:
    data, h, r = xp.empty(x.shape, x.dtype), xp.empty(x.shape, x.dtype), xp.empty((*x.shape[:-1], 1), x.dtype)
    _launch_rows(_LAYER_NORM_CUDA, "layer_norm", x, weight, bias, data, h, r, eps)
    return data, h, r


def _normalize_vjp_arrays(h: Array, r: Array, g: Array, weight: Array | None = None) -> Array:
    """r (u - mean(u) - h mean(h u)) of u = g weight, or of u = g."""
    if xp is not np:
        dx = xp.empty_like(h)
        _launch_rows(_LAYER_NORM_CUDA, "layer_norm_vjp", h, r, g, weight, dx)
        return dx
    u, width = g if weight is None else g * weight, g.shape[-1]
    inner = xp.einsum("...i,...i->...", h, u)[..., None]
    inner *= 1 / width
    dx = h * inner
    xp.subtract(u, dx, out=dx)
    dx -= _row_sum(u) / width
    dx *= r
    return dx


def _normalize_vjp(x: Tensor, eps: float, h: Array, r: Array, u: Tensor) -> Tensor:
    """dx of `layer_norm` in Tensor operations, so that it can be differentiated: h and r are operations on x again."""
    h_x, r_x = _normalized(x, eps, h, r), _inverse_deviation(x, eps, h, r)
    return r_x * (u - u.mean(axis=-1, keepdims=True) - h_x * (u * h_x).mean(axis=-1, keepdims=True))


@_operation
def _normalized(x: Tensor, eps: float, h: Array, r: Array) -> Tensor:
    """The array h of `layer_norm` as an operation on x."""

    def vjp(g: Tensor) -> Tensor:
        if _mode.enabled:
            return _normalize_vjp(x, eps, h, r, g)
        return Tensor(_normalize_vjp_arrays(h, r, g.data))

    return _result(h, (x, vjp))


@_operation
def _inverse_deviation(x: Tensor, eps: float, h: Array, r: Array) -> Tensor:
    """The array r of `layer_norm` as an operation on x. dr = -r^2 sum(h dx) / C."""

    def vjp(g: Tensor) -> Tensor:
        if _mode.enabled:
            return g * _inverse_deviation(x, eps, h, r) ** 2 * _normalized(x, eps, h, r) * (-1 / x.shape[-1])
        return Tensor(g.data * r * r * (-1 / x.shape[-1]) * h)

    return _result(r, (x, vjp))


def attention_composed(qkv: Tensor, num_heads: int, mask: Array | None = None) -> Tensor:
    """Multi-head attention as its definition reads: softmax(q k^T / sqrt(D)) v for each head, then heads side by side."""
    batch, tokens, width = qkv.shape
    head = width // 3 // num_heads
    qkv = qkv.reshape(batch, tokens, 3, num_heads, head).transpose(2, 0, 3, 1, 4)  # (3, B, H, N, D)
    q, k, v = qkv[0], qkv[1], qkv[2]
    scores = matmul(q * head**-0.5, swap_last(k))  # (B, H, N, N)
    out = matmul(softmax(scores, mask), v)  # (B, H, N, D)
    return out.transpose(0, 2, 1, 3).reshape(batch, tokens, width // 3)


_ATTENTION_CUDA = """
// A block of TILE threads takes TILE queries (or keys) of one head, a thread each, and goes through all keys (or queries)
// TILE at a time, which the threads first fetch together into memory that they share. D is a head's width; blockIdx.y
// numbers the heads of the whole batch.
#define HEAD(array, parts, part) (array + (count(blockIdx.y / heads) * tokens * parts + part) * heads * D \\
                                  + blockIdx.y % heads * D)  // of the first token; the next is parts * heads * D further

extern "C" __global__ void attention(const real* qkv, const bool* mask, real* out, real* log_sum,
                                     count tokens, count heads) {
    __shared__ real k[TILE][D], v[TILE][D];
    count i = count(blockIdx.x) * TILE + threadIdx.x, next = 3 * heads * D;
    real q[D], sum[D], top = LOWEST, total = 0;
    for (int d = 0; d < D; d++) {
        q[d] = i < tokens ? HEAD(qkv, 3, 0)[i * next + d] * real(SCALE) : real(0);
        sum[d] = 0;
    }
    for (count start = 0; start < tokens; start += TILE) {
        count own = min(start + threadIdx.x, tokens - 1);
        for (int d = 0; d < D; d++) {
            k[threadIdx.x][d] = HEAD(qkv, 3, 1)[own * next + d];
            v[threadIdx.x][d] = HEAD(qkv, 3, 2)[own * next + d];
        }
        __syncthreads();
        for (count j = start; j < min(start + TILE, tokens); j++) {
            if (i >= tokens || (mask && !mask[i * tokens + j])) continue;
            real s = 0;
            for (int d = 0; d < D; d++) s += q[d] * k[j - start][d];
            if (s > top) {  // what was added up so far was measured from a smaller maximum
                real shrink = exp(top - s);
                total *= shrink;
                for (int d = 0; d < D; d++) sum[d] *= shrink;
                top = s;
            }
            real p = exp(s - top);
            total += p;
            for (int d = 0; d < D; d++) sum[d] += p * v[j - start][d];
        }
        __syncthreads();
    }
    if (i >= tokens) return;
    for (int d = 0; d < D; d++) HEAD(out, 1, 0)[i * heads * D + d] = total == 0 ? real(0) : sum[d] / total;
    log_sum[blockIdx.y * tokens + i] = total == 0 ? real(0) : top + log(total);
}

extern "C" __global__ void attention_vjp_query(const real* qkv, const bool* mask, const real* out, const real* log_sum,
                                               const real* g, real* result, count tokens, count heads) {
    __shared__ real k[TILE][D], v[TILE][D];
    count i = count(blockIdx.x) * TILE + threadIdx.x, next = 3 * heads * D;
    real q[D], slope[D], dq[D], inner = 0;
    for (int d = 0; d < D; d++) {
        q[d] = i < tokens ? HEAD(qkv, 3, 0)[i * next + d] * real(SCALE) : real(0);
        slope[d] = i < tokens ? HEAD(g, 1, 0)[i * heads * D + d] : real(0);
        inner += i < tokens ? slope[d] * HEAD(out, 1, 0)[i * heads * D + d] : real(0);
        dq[d] = 0;
    }
    for (count start = 0; start < tokens; start += TILE) {
        count own = min(start + threadIdx.x, tokens - 1);
        for (int d = 0; d < D; d++) {
            k[threadIdx.x][d] = HEAD(qkv, 3, 1)[own * next + d];
            v[threadIdx.x][d] = HEAD(qkv, 3, 2)[own * next + d];
        }
        __syncthreads();
        for (count j = start; j < min(start + TILE, tokens); j++) {
            if (i >= tokens || (mask && !mask[i * tokens + j])) continue;
            real s = 0, e = 0;
            for (int d = 0; d < D; d++) {
                s += q[d] * k[j - start][d];
                e += slope[d] * v[j - start][d];
            }
            e = (e - inner) * exp(min(s - log_sum[blockIdx.y * tokens + i], real(0)));
            for (int d = 0; d < D; d++) dq[d] += e * k[j - start][d];
        }
        __syncthreads();
    }
    if (i >= tokens) return;
    for (int d = 0; d < D; d++) HEAD(result, 3, 0)[i * next + d] = dq[d] * real(SCALE);
}

extern "C" __global__ void attention_vjp_key(const real* qkv, const bool* mask, const real* out, const real* log_sum,
                                             const real* g, real* result, count tokens, count heads) {
    __shared__ real q[TILE][D], slope[TILE][D], inner[TILE], total[TILE];
    count j = count(blockIdx.x) * TILE + threadIdx.x, next = 3 * heads * D;
    real k[D], v[D], dk[D], dv[D];
    for (int d = 0; d < D; d++) {
        k[d] = j < tokens ? HEAD(qkv, 3, 1)[j * next + d] : real(0);
        v[d] = j < tokens ? HEAD(qkv, 3, 2)[j * next + d] : real(0);
        dk[d] = dv[d] = 0;
    }
    for (count start = 0; start < tokens; start += TILE) {
        count own = min(start + threadIdx.x, tokens - 1);
        inner[threadIdx.x] = 0;
        total[threadIdx.x] = log_sum[blockIdx.y * tokens + own];
        for (int d = 0; d < D; d++) {
            q[threadIdx.x][d] = HEAD(qkv, 3, 0)[own * next + d] * real(SCALE);
            slope[threadIdx.x][d] = HEAD(g, 1, 0)[own * heads * D + d];
            inner[threadIdx.x] += slope[threadIdx.x][d] * HEAD(out, 1, 0)[own * heads * D + d];
        }
        __syncthreads();
        for (count i = start; i < min(start + TILE, tokens); i++) {
            if (j >= tokens || (mask && !mask[i * tokens + j])) continue;
            real s = 0, e = 0;
            for (int d = 0; d < D; d++) {
                s += q[i - start][d] * k[d];
                e += slope[i - start][d] * v[d];
            }
            real p = exp(min(s - total[i - start], real(0)));
            e = (e - inner[i - start]) * p;
            for (int d = 0; d < D; d++) {
                dv[d] += p * slope[i - start][d];
                dk[d] += e * q[i - start][d];
            }
        }
        __syncthreads();
    }
    if (j >= tokens) return;
    for (int d = 0; d < D; d++) {
        HEAD(result, 3, 1)[j * next + d] = dk[d];
        HEAD(result, 3, 2)[j * next + d] = dv[d];
    }
}
"""


@_operation
def attention(qkv: Tensor, num_heads: int, mask: Array | None = None) -> Tensor:
    """Scaled dot-product self-attention of H = num_heads heads of width D = C / H: (B, N, 3C) -> (B, N, C).

    qkv holds query, key and value of every token side by side. mask: boolean (N, N), True where query i may see key j.
    Scores are taken a block of rows at a time (on a GPU key by key), so that many tokens never need all (B, H, N, N):
        s = q k^T D^-1/2,   p = exp(s - L) with L = max(s) + log(sum(exp(s - max(s)))) of the row,   out = p v.
    On the way back each block of p is computed again from q, k and L. With g the gradient of out, the gradients are
        of v: p^T g,   of s: e = p (g v^T - sum(g out)),   of q: e k D^-1/2,   of k: e^T q D^-1/2;
    softmax's sum(p (g v^T)) over the keys is sum(g out) over the head's width, since out = p v. If this is to be
    differentiated itself, the engine differentiates the composition instead, which does hold all scores. Few tokens on a
    CPU and wide heads on a GPU are composed from the start.
    (Vaswani et al. 2017, eq. 1; blocks after Dao et al. 2022.)
    """
    batch, tokens, width = qkv.shape
    if width % (3 * num_heads):
        raise ValueError(f"the last axis must hold q, k and v of {num_heads} heads, so divide by {3 * num_heads}")
    if mask is not None and mask.shape != (tokens, tokens):
        raise ValueError(f"the mask, of shape {mask.shape}, must be ({tokens}, {tokens})")
    is_small = tokens <= _FEW_TOKENS if xp is np else width // (3 * num_heads) > _WIDEST_HEAD
    if is_small:
        return attention_composed(qkv, num_heads, mask)
    forward, backward = (_attention, _attention_vjp) if xp is np else (_attention_gpu, _attention_vjp_gpu)
    out, log_sum = forward(qkv.data, num_heads, mask)

    def vjp(g: Tensor) -> Tensor:
        if _mode.enabled:
            return grad(attention_composed(qkv, num_heads, mask), [qkv], g, create_graph=True)[0]
        return Tensor(backward(qkv.data, num_heads, mask, out, log_sum, g.data))

    return _result(out, (qkv, vjp))


def _attention(qkv: Array, num_heads: int, mask: Array | None) -> tuple[Array, Array]:
    """out (B, N, C) and the logarithm L (B*H, N, 1) of each query's sum, from qkv (B, N, 3C)."""
    q, k, v = _split_heads(qkv, num_heads)  # (B*H, N, D) each
    k = _swap_copy(k)  # (B*H, D, N)
    out, log_sum = xp.empty_like(q), xp.empty((*q.shape[:2], 1), q.dtype)
    for heads, rows, keys in _blocks(len(q), q.shape[1], mask):
        p = xp.matmul(q[heads, rows], k[heads, :, keys])  # (heads, rows, keys)
        if mask is not None:
            p += _mask_bias(mask[rows, keys], p.dtype)
        top = _finite(p.max(axis=-1, keepdims=True))
        p -= top
        xp.exp(p, out=p)
        total = _positive(_row_sum(p))
        out[heads, rows] = xp.matmul(p, v[heads, keys]) / total
        log_sum[heads, rows] = top + xp.log(total)
    return _join_heads(out[None], len(qkv), num_heads), log_sum


def _attention_vjp(qkv: Array, num_heads: int, mask: Array | None, out: Array, log_sum: Array, g: Array) -> Array:
    """d qkv (B, N, 3C) from g (B, N, C). Subtracting a number from each row of a product is left to the product:
    q k^T - L = [q, -L] [k, 1]^T, which saves a pass over the scores, and likewise g v^T - sum(g out)."""
    q, k, v = _split_heads(qkv, num_heads)  # (B*H, N, D) each
    (inner,) = _split_heads(g * out, num_heads, parts=1)
    (g,) = _split_heads(g, num_heads, parts=1)
    one = xp.ones_like(log_sum)  # (B*H, N, 1)
    q_shifted, k_one = xp.concatenate([q, -log_sum], axis=-1), _swap_copy(xp.concatenate([k, one], axis=-1))
    g_shifted, v_one = xp.concatenate([g, -_row_sum(inner)], axis=-1), _swap_copy(xp.concatenate([v, one], axis=-1))
    result = xp.zeros((3, *q.shape), q.dtype)
    dq, dk, dv = result
    for heads, rows, keys in _blocks(len(q), q.shape[1], mask):
        p = xp.matmul(q_shifted[heads, rows], k_one[heads, :, keys])  # (heads, rows, keys)
        if mask is not None:
            p += _mask_bias(mask[rows, keys], p.dtype)
        xp.minimum(p, 0, out=p)  # rounding of huge logits must not make a probability of more than 1
        xp.exp(p, out=p)
        dv[heads, keys] += xp.matmul(p.swapaxes(1, 2), g[heads, rows])
        ds = xp.matmul(g_shifted[heads, rows], v_one[heads, :, keys])
        ds *= p
        dq[heads, rows] = xp.matmul(ds, k[heads, keys])
        dk[heads, keys] += xp.matmul(ds.swapaxes(1, 2), q[heads, rows])
    dq *= q.shape[-1] ** -0.5  # the scale is part of q here, so dk has it already
    return _join_heads(result, len(out), num_heads)


_FEW_TOKENS = 128  # whose scores a CPU may as well hold: to compute them again takes longer than to fetch them
_WIDEST_HEAD = 32  # a thread keeps its rows of D numbers in registers; wider heads have few tokens, so few scores to hold


def _attention_gpu(qkv: Array, num_heads: int, mask: Array | None) -> tuple[Array, Array]:
    """The same as `_attention` by one kernel, which never writes a score down: its sum, its maximum and the weighted sum
    of values grow key by key, and are scaled down whenever a larger maximum turns up (the online softmax)."""
    batch, tokens, width = qkv.shape
    out, log_sum = xp.empty((batch, tokens, width // 3), qkv.dtype), xp.empty((batch * num_heads, tokens, 1), qkv.dtype)
    _launch_heads("attention", qkv, num_heads, mask, out, log_sum)
    return out, log_sum


def _attention_vjp_gpu(qkv: Array, num_heads: int, mask: Array | None, out: Array, log_sum: Array, g: Array) -> Array:
    """The same as `_attention_vjp` by two kernels, one for queries and one for keys, so that none adds into another's."""
    result = xp.empty(qkv.shape, qkv.dtype)
    for name in ("attention_vjp_query", "attention_vjp_key"):
        _launch_heads(name, qkv, num_heads, mask, out, log_sum, g, result)
    return result


def _launch_heads(name: str, qkv: Array, num_heads: int, mask: Array | None, *arrays: Array) -> None:
    """`launch` in a grid of tiles of tokens by heads, those of all samples."""
    batch, tokens, width = qkv.shape
    head = width // 3 // num_heads
    tile = 128 if head <= 16 else 32  # what they share has to fit into 48 kB
    constants = {"D": head, "TILE": tile, "SCALE": head**-0.5}
    if qkv.size:
        grid = -(-tokens // tile), batch * num_heads
        launch(_ATTENTION_CUDA, name, grid, (tile,), qkv, mask, *arrays, tokens, num_heads, **constants)


def _swap_copy(x: Array) -> Array:
    return xp.ascontiguousarray(x.swapaxes(-1, -2))  # small products run twice as fast on a right side that lies in rows


def _mask_bias(mask: Array, dtype: np.dtype[Any]) -> Array:
    return xp.where(mask, 0, -xp.inf).astype(dtype)


def _split_heads(x: Array, num_heads: int, parts: int = 3) -> Array:
    """(B, N, parts*C) -> (parts, B*H, N, D); of three parts the first, the query, is scaled by D^-1/2."""
    batch, tokens, width = x.shape
    head = width // parts // num_heads
    x = x.reshape(batch, tokens, parts, num_heads, head).transpose(2, 0, 3, 1, 4)  # (parts, B, H, N, D)
    x = x.copy().reshape(parts, batch * num_heads, tokens, head)
    if parts == 3:
        x[0] *= head**-0.5
    return x


def _join_heads(x: Array, batch: int, num_heads: int) -> Array:
    """(parts, B*H, N, D) -> (B, N, parts*C)."""
    parts, _, tokens, head = x.shape
    x = x.reshape(parts, batch, num_heads, tokens, head).transpose(1, 3, 0, 2, 4)  # (B, N, parts, H, D)
    return xp.ascontiguousarray(x).reshape(batch, tokens, parts * num_heads * head)


_SCORES = 1 << 17  # scores in a block: half a megabyte, in a core's cache together with its product


def _blocks(heads: int, tokens: int, mask: Array | None) -> Iterator[tuple[slice, slice, slice]]:
    """Slices (heads, rows, keys) that cover all scores, each at most _SCORES of them.

    keys reaches from the first to the last key that the mask lets any of the rows see: a small window costs less.
    """
    rows = min(tokens, max(1, _SCORES // tokens))
    group = max(1, min(heads, _SCORES // (rows * tokens)))
    starts = range(0, tokens, rows)
    keys = [_visible(mask, slice(r, r + rows)) for r in starts]
    for h in range(0, heads, group):
        for r, visible in zip(starts, keys, strict=True):
            yield slice(h, h + group), slice(r, r + rows), visible


def _visible(mask: Array | None, rows: slice) -> slice:
    if mask is None:
        return slice(None)
    seen = np.flatnonzero(mask[rows].any(axis=0))
    return slice(seen[0], seen[-1] + 1) if len(seen) else slice(0, 1)  # rows that see nothing need a key not to see


# --- 6. Pictures ------------------------------------------------------------------------------------------------------
# TransGAN needs none of this: it is what the convolutional networks are made of that it is compared with. Pictures are
# (B, C, H, W); kernel, stride and padding are numbers, or pairs of one for the rows and one for the columns.


def _pair(n: Pair) -> Shape:
    return n if isinstance(n, tuple) else (n, n)


def _padded(x: Array, padding: Shape, fill: float) -> Array:
    """An array (B, C, H, W) with `padding` rows and columns of `fill` around it; itself where there are none."""
    (rows, columns), (batch, channels, height, width) = padding, x.shape
    if not rows and not columns:
        return x
    data = xp.full((batch, channels, height + 2 * rows, width + 2 * columns), fill, x.dtype)
    data[:, :, rows : rows + height, columns : columns + width] = x
    return data


def _windows(x: Array, kernel: Shape, stride: Shape) -> Array:
    """A view of an array (B, C, H, W) as its windows, (B, C, kh, kw, H', W'), all of them in the same memory."""
    (kh, kw), (down, right), (batch, channels, height, width) = kernel, stride, x.shape
    rows, columns = (height - kh) // down + 1, (width - kw) // right + 1
    if min(rows, columns) < 1:
        raise ValueError(f"windows of {kh}x{kw} do not fit into {height}x{width}")
    strides = (*x.strides, x.strides[2] * down, x.strides[3] * right)
    return xp.lib.stride_tricks.as_strided(x, (batch, channels, kh, kw, rows, columns), strides)


@_operation
def unfold(x: Tensor, kernel: Pair, stride: Pair = 1, padding: Pair = 0, fill: float = 0.0) -> Tensor:
    """All windows of a picture: (B, C, H, W) -> (B, C, kh, kw, H', W'), H' = (H + 2 padding - kh) // stride + 1.

    out[b, c, i, j, y, x] is pixel (i, j) of the window whose corner lies at (y, x) * stride, in the picture with a margin
    of `fill`. An element lies in several windows, so its gradient is a sum: `fold`.
    """
    kernel, stride, padding = _pair(kernel), _pair(stride), _pair(padding)
    data = _windows(_padded(x.data, padding, fill), kernel, stride)
    return _result(data, (x, lambda g: fold(g, x.shape, stride, padding)))


@_operation
def fold(x: Tensor, shape: Shape, stride: Pair = 1, padding: Pair = 0) -> Tensor:
    """Add windows (B, C, kh, kw, H', W') up where `unfold` took them from: a picture of `shape` (B, C, H, W)."""
    kernel, stride, padding = x.shape[2:4], _pair(stride), _pair(padding)
    (down, right), (top, left), (rows, columns) = stride, padding, x.shape[4:]
    total = _padded(xp.zeros(shape, x.dtype), padding, 0)
    for i, j in itertools.product(*map(range, kernel)):
        total[:, :, i : i + down * rows : down, j : j + right * columns : right] += x.data[:, :, i, j]
    data = total[:, :, top : top + shape[2], left : left + shape[3]]
    return _result(data, (x, lambda g: unfold(g, kernel, stride, padding)))


def conv2d_composed(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Pair = 1, padding: Pair = 0) -> Tensor:
    """Convolution as its definition reads: every window, as one row of numbers, times the matrix of the weights."""
    outputs, _, *kernel = weight.shape
    windows = unfold(x, tuple(kernel), stride, padding)  # (B, C, kh, kw, H', W')
    batch, *_, rows, columns = windows.shape
    out = matmul(weight.reshape(outputs, -1), windows.reshape(batch, weight.size // outputs, -1))  # (B, O, H'W')
    out = out.reshape(batch, outputs, rows, columns)
    return out if bias is None else out + bias.reshape(-1, 1, 1)


_COLUMNS = 1 << 18  # numbers in the windows that a CPU lays out at once: a megabyte, which stays in a core's cache


@_operation
def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Pair = 1, padding: Pair = 0) -> Tensor:
    """Convolution (cross-correlation, as all frameworks have it): (B, C, H, W), (O, C, kh, kw), (O,) -> (B, O, H', W').

    out[b, o, y, x] = bias[o] + sum over c, i, j of weight[o, c, i, j] in[b, c, y stride + i, x stride + j]: one matrix
    product for each block of windows, which are laid out as columns of C kh kw numbers. A product is linear in both its
    factors, so each gradient is a product again: of the weights, g times the columns; of the columns, the weights times
    g, and these are then folded.
    """
    kernel, stride, padding = weight.shape[2:], _pair(stride), _pair(padding)
    if x.ndim != 4 or weight.ndim != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError("expected (B, C, H, W) and (O, C, kh, kw)")
    outputs, inner = weight.shape[0], math.prod(weight.shape[1:])
    windows = _windows(_padded(x.data, padding, 0), kernel, stride)  # (B, C, kh, kw, H', W')
    batch, *_, rows, columns = windows.shape
    data, matrix = xp.empty((batch, outputs, rows, columns), x.dtype), weight.data.reshape(outputs, inner)
    for images, lines in _picture_blocks(batch, rows, inner * columns):
        block = windows[images, :, :, :, lines].reshape(-1, inner, (lines.stop - lines.start) * columns)  # the only copy
        data[images, :, lines] = _product(matrix, block).reshape(len(block), outputs, -1, columns)
    if bias is not None:
        data += bias.data.reshape(-1, 1, 1)

    def vjp_x(g: Tensor) -> Tensor:
        spread = matmul(reshape(weight, outputs, inner).T, reshape(g, batch, outputs, -1))  # (B, C kh kw, H'W')
        return fold(reshape(spread, windows.shape), x.shape, stride, padding)

    def vjp_weight(g: Tensor) -> Tensor:
        laid_out = reshape(unfold(x, kernel, stride, padding), batch, inner, -1)  # (B, C kh kw, H'W')
        product = matmul(reshape(g, batch, outputs, -1), swap_last(laid_out))  # (B, O, C kh kw)
        return reshape(reduce_sum(product, 0), weight.shape)

    return _result(data, (x, vjp_x), (weight, vjp_weight), (bias, lambda g: reduce_sum(g, (0, 2, 3))))


def _picture_blocks(batch: int, rows: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Slices (pictures, rows of the result) that cover them all, when a row of the result needs `size` numbers."""
    budget = _COLUMNS if xp is np else 1 << 28  # a GPU wants large products: a gigabyte of float32
    lines = min(rows, max(1, budget // size))
    images = max(1, budget // (size * rows))
    for b in range(0, batch, images):
        for r in range(0, rows, lines):
            yield slice(b, min(b + images, batch)), slice(r, min(r + lines, rows))


def _over_windows(function: np.ufunc, windows: Array) -> Array:
    """A ufunc of two arguments applied over the pixels of each window: array (B, C, kh, kw, H', W') -> (B, C, H', W')."""
    first, *others = (windows[:, :, i, j] for i, j in itertools.product(*map(range, windows.shape[2:4])))
    total = first.copy()
    for x in others:
        function(total, x, out=total)
    return total


@_operation
def max_pool2d(x: Tensor, kernel: Pair, stride: Pair, padding: Pair = 0) -> Tensor:
    """The largest pixel of each window: (B, C, H, W) -> (B, C, H', W'). Its gradient is `reduce_max`'s, then folded."""
    kernel, stride, padding = _pair(kernel), _pair(stride), _pair(padding)
    data = _over_windows(xp.maximum, _windows(_padded(x.data, padding, -xp.inf), kernel, stride))

    def vjp(g: Tensor) -> Tensor:
        is_top = _windows(_padded(x.data, padding, -xp.inf), kernel, stride) == data[:, :, None, None]
        share = is_top / is_top.sum(axis=(2, 3), keepdims=True).astype(x.dtype)
        return fold(g[:, :, None, None] * share, x.shape, stride, padding)

    return _result(data, (x, vjp))


@_operation
def avg_pool2d(x: Tensor, kernel: Pair, stride: Pair, padding: Pair = 0, count_padding: bool = True) -> Tensor:
    """The mean of each window: (B, C, H, W) -> (B, C, H', W'); with count_padding=False of its pixels in the picture."""
    kernel, stride, padding = _pair(kernel), _pair(stride), _pair(padding)
    data = _over_windows(xp.add, _windows(_padded(x.data, padding, 0), kernel, stride))
    inside = _padded(xp.ones((1, 1, *x.shape[2:]), x.dtype), padding, 1 if count_padding else 0)
    share = 1 / _over_windows(xp.add, _windows(inside, kernel, stride))  # (1, 1, H', W')
    data *= share

    def vjp(g: Tensor) -> Tensor:
        spread = broadcast_to((g * share)[:, :, None, None], (*x.shape[:2], *kernel, *data.shape[2:]))
        return fold(spread, x.shape, stride, padding)

    return _result(data, (x, vjp))


@_operation
def upsample_nearest(x: Tensor, factor: int) -> Tensor:
    """Each pixel becomes factor*factor of them: (B, C, H, W) -> (B, C, H factor, W factor)."""
    batch, channels, height, width = x.shape
    x = reshape(x, batch, channels, height, 1, width, 1)
    x = broadcast_to(x, (batch, channels, height, factor, width, factor))
    return reshape(x, batch, channels, height * factor, width * factor)


@_operation
def resize_bilinear(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear interpolation between the centres of pixels: (B, C, H, W) -> (B, C, height, width).

    A product with a matrix from the left for the rows and from the right for the columns. As PyTorch's interpolate with
    align_corners=False has it, without smoothing where a picture shrinks.
    """
    rows, columns = (_interpolation(new, old, x.dtype) for new, old in zip((height, width), x.shape[2:], strict=True))
    return matmul(matmul(Tensor(rows), x), Tensor(columns).T)


def _interpolation(new: int, old: int, dtype: np.dtype[Any]) -> Array:
    """The array (new, old) that interpolates `old` numbers in a line at `new` places, evenly."""
    at = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
    distance = np.abs(at[:, None] - np.arange(old))
    return xp.asarray(np.maximum(1 - distance, 0).astype(dtype))


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over a batch of pictures: (B, C, H, W) -> (1, C, 1, 1) each."""
    mean = x.mean(axis=(0, 2, 3), keepdims=True)
    return mean, ((x - mean) ** 2).mean(axis=(0, 2, 3), keepdims=True)


def batch_norm(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Batch normalization (Ioffe and Szegedy 2015): (x - mean) / sqrt(variance + eps) * weight + bias, a channel each.

    x (B, C, H, W); mean and variance (1, C, 1, 1) of `batch_statistics` while training, later of their running averages;
    weight and bias (C,).
    """
    return (x - mean) * (weight.reshape(1, -1, 1, 1) / sqrt(variance + eps)) + bias.reshape(1, -1, 1, 1)


def spectral_norm(weight: Tensor, u: Array) -> Tensor:
    """weight / s, with s its largest singular value as a matrix W (O, -1), as u sees it (Miyato et al. 2018).

    u: an array (O,), the direction that `power_iteration` improves; it counts as a constant. s = |W^T u|, which is their
    u^T W v for v = W^T u / |W^T u|, and so is its gradient: ds = u^T dW v.
    """
    product = Tensor(u[None]) @ weight.reshape(len(weight), -1)  # (1, -1)
    return weight / sqrt((product * product).sum() + 1e-24)  # W^T u may be 0


def power_iteration(weight: Array, u: Array) -> Array:
    """One step of the power method, u <- W W^T u / |...|, towards the first left singular vector of an array (O, ...)."""
    matrix = weight.reshape(len(weight), -1)
    return _unit(matrix @ _unit(matrix.T @ u))


def _unit(x: Array) -> Array:
    return x / (xp.linalg.norm(x) + 1e-12)


# --- 7. Checking derivatives ------------------------------------------------------------------------------------------


def gradient_check(
    function: Callable[..., Tensor],
    inputs: Sequence[Array],
    order: int = 2,
    step: float = 1e-5,
    coordinates: int = 100,
    seed: int = 0,
) -> float:
    """The largest relative error of `grad` against central differences, over all derivatives up to `order`.

    function: takes Tensors like `inputs` and returns a Tensor of any shape; inputs: float64 arrays. The result y is
    made one number, f = sum(w (y + y^2/2)) with random w, so that the gradient arriving at the function depends on its
    inputs too. Order 1 compares df/dx_i with (f(x_i + step) - f(x_i - step)) / (2 step) at `coordinates` random
    coordinates of each input, both as `grad` gives it and with create_graph=True, because fused operations have a form
    for either. The next order is the same check of f's slope along a random direction u, the function x -> sum(u df/dx),
    whose derivative is a second one of f.
    Errors are relative to the largest derivative, or to 1 where all are smaller; below 1e-6 is agreement in float64.
    Raises TypeError for inputs that are not float64: their rounding would hide the difference.
    """
    inputs = [xp.asarray(x) for x in inputs]
    if any(x.dtype != np.float64 for x in inputs):
        raise TypeError("gradient_check: inputs must be float64")
    rng = np.random.default_rng(seed)

    def number(*tensors: Tensor) -> Tensor:
        y = function(*tensors)
        w = xp.asarray(np.random.default_rng(seed + 1).standard_normal(y.shape))
        return ((y + y * y * 0.5) * w).sum()

    directions = [xp.asarray(rng.standard_normal(x.shape)) for x in inputs]

    def slope_of(number: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def directional(*tensors: Tensor) -> Tensor:
            gradients = grad(number(*tensors), tensors, create_graph=True)
            return sum(((g * u).sum() for g, u in zip(gradients, directions, strict=True)), start=Tensor(0.0, dtype=float))

        return directional

    worst = 0.0
    for _ in range(order):
        worst = max(worst, _first_order_error(number, inputs, step, coordinates, rng))
        number = slope_of(number)
    return worst


def _first_order_error(
    number: Callable[..., Tensor], inputs: list[Array], step: float, coordinates: int, rng: np.random.Generator
) -> float:
    walks = [grad(*_call(number, inputs), create_graph=recorded) for recorded in (False, True)]
    exact = [[to_numpy(g) for g in pair] for pair in zip(*walks, strict=True)]  # of each input, both forms
    worst = 0.0
    for i, x in enumerate(inputs):
        chosen = rng.permutation(x.size)[:coordinates]
        differences = np.empty(len(chosen))
        for at, coordinate in enumerate(chosen):
            values = []
            for sign in (1, -1):
                moved = x.copy()
                moved.reshape(-1)[coordinate] += sign * step
                values.append(_call(number, [*inputs[:i], moved, *inputs[i + 1 :]])[0].item())
            differences[at] = (values[0] - values[1]) / (2 * step)
        for derivative in exact[i] if len(chosen) else ():
            error = np.abs(derivative.reshape(-1)[chosen] - differences).max() / max(1.0, np.abs(differences).max())
            worst = max(worst, float(error) if np.isfinite(error) else math.inf)
    return worst


def _call(number: Callable[..., Tensor], inputs: list[Array]) -> tuple[Tensor, list[Tensor]]:
    tensors = [Tensor(x, requires_grad=True) for x in inputs]
    return number(*tensors), tensors


# --- 8. Optimisation, memory ------------------------------------------------------------------------------------------


def clip_by_global_norm(gradient: Array, max_norm: float) -> tuple[Array, Array]:
    """The factor that scales an array to a Euclidean norm of at most max_norm, and that norm.

    min(1, max_norm / (norm + 1e-6)), the form PyTorch uses. Both are 0-d arrays that stay on the device. The factor is
    for `Adam.step` to apply, which reads the gradient anyway.
    """
    norm = xp.sqrt(xp.vdot(gradient, gradient))
    return xp.minimum(1.0, max_norm / (norm + 1e-6)).astype(gradient.dtype), norm


class Adam:
    """Adam (Kingma and Ba 2014, algorithm 1) on a list of Tensors, and the moving average of what it makes of them.

        m = b1 m + (1-b1) g,   v = b2 v + (1-b2) g^2,   p -= rate  m/(1-b1^t) / (sqrt(v/(1-b2^t)) + eps),
        average = decay average + (1-decay) p

    With b1 = 0, the paper's choice, m is the gradient itself and is not kept; without a decay there is no average. All
    parameters lie in one flat array, of which their Tensors are views from now on; so do gradients, moments and averages.
    A step is then one pass over five arrays, whatever the network. What a checkpoint needs: m, v, average, which `parts`
    cuts up, and the step count t.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        betas: tuple[float, float] = (0.0, 0.99),
        eps: float = 1e-8,
        decay: float | None = None,
    ):
        self.parameters, self.betas, self.eps, self.decay, self.t = list(parameters), betas, eps, decay, 0
        self.p = xp.concatenate([p.data.reshape(-1) for p in self.parameters])
        self.gradient, self.v = xp.zeros_like(self.p), xp.zeros_like(self.p)
        self.m = xp.zeros_like(self.p) if betas[0] else None
        self.average = None if decay is None else self.p.copy()
        for p, part in zip(self.parameters, self.parts(self.p), strict=True):
            p.data = part

    def parts(self, flat: Array) -> list[Array]:
        """One of the flat arrays as a list of views in the parameters' order and shapes."""
        parts, end = [], 0
        for p in self.parameters:
            parts.append(flat[end : end + p.size].reshape(p.shape))
            end += p.size
        return parts

    def add(self, gradients: Iterable[Tensor], map: Callable[..., Iterable[Any]] = map) -> None:
        """Add gradients, Tensors in the parameters' order, to those of the next step. map: the built-in, or a pool's."""

        def add(total: Array, gradient: Tensor) -> None:
            total += gradient.data

        list(map(add, self.parts(self.gradient), gradients))

    def step(self, learning_rate: float, scale: float | Array = 1.0, map: Callable[..., Iterable[Any]] = map) -> None:
        """One update with `scale` times the gradients that were added, which are zero afterwards; scale may be an array."""
        self.t += 1
        b1, b2 = self.betas
        numbers = learning_rate / (1 - b1**self.t), 1 / math.sqrt(1 - b2**self.t), b1, b2, self.eps, self.decay or 0.0
        if xp is not np:
            arrays = self.p, self.gradient, self.v, self.m, self.average, xp.asarray(scale, self.p.dtype)
            _launch_elements(_ADAM_CUDA, "adam", self.p.size, *arrays, *numbers)
            return

        def update(i: int) -> None:
            piece = slice(i, i + _CACHE)
            m, average = (None if x is None else x[piece] for x in (self.m, self.average))
            _adam(self.p[piece], self.gradient[piece], self.v[piece], m, average, scale, *numbers)

        list(map(update, range(0, self.p.size, _CACHE)))


_ADAM_CUDA = """
extern "C" __global__ void adam(real* p, real* gradient, real* v, real* m, real* average, const real* scale, real rate,
                                real correction, real b1, real b2, real eps, real decay, count size) {
    count i = count(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= size) return;
    real g = gradient[i] * scale[0];
    gradient[i] = 0;
    v[i] = b2 * v[i] + (1 - b2) * g * g;
    if (m) g = m[i] = b1 * m[i] + (1 - b1) * g;
    p[i] -= rate * g / (sqrt(v[i]) * correction + eps);
    if (average) average[i] = decay * average[i] + (1 - decay) * p[i];
}
"""


def _adam(
    p: Array, g: Array, v: Array, m: Array | None, average: Array | None, scale: float | Array, *numbers: float
) -> None:
    """The same on arrays (n,) of a size that stays in the cache."""
    rate, correction, b1, b2, eps, decay = numbers
    g *= scale
    work = g * g
    work *= 1 - b2
    v *= b2
    v += work
    if m is not None:
        m *= b1
        g *= 1 - b1
        m += g
    np.sqrt(v, out=work)
    work *= correction
    work += eps
    np.divide(g if m is None else m, work, out=work)
    work *= rate
    p -= work
    if average is not None:
        average *= decay
        np.multiply(p, 1 - decay, out=work)
        average += work
    g[...] = 0


def keep_freed_memory() -> None:
    """Tell glibc to keep freed arrays for the next allocation instead of returning their pages to the system.

    A training step frees and allocates the same hundreds of megabytes over and over. To have every page zeroed and mapped
    again cost up to a quarter of the step where other programs were busy, and nothing where none was. M_MMAP_MAX = 0 puts
    large arrays on the heap, and the largest M_TRIM_THRESHOLD keeps the heap's end. Does nothing where the C library is
    another one.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-8, 1)  # M_ARENA_MAX: one heap, so that threads reuse each other's memory


# --- 9. Where the time goes -------------------------------------------------------------------------------------------

Times: TypeAlias = dict[tuple[str, str], list[float]]  # {(operation, direction): [seconds, calls, bytes]}
_times: list[Times] = []  # one while something is profiled


class _Depth(threading.local):
    inside = False  # whether this thread is within an operation that is being timed: those inside are part of it


_depth, _lock = _Depth(), threading.Lock()


@contextlib.contextmanager
def profile() -> Iterator[Times]:
    """Within this context every operation is timed; yields {(operation, "forward" or "backward"): [seconds, calls, bytes]}.

    Seconds are summed over threads; the bytes are those of the results. An operation made of others is one, but on the way
    back those of `attention` over few tokens are each their own. On a GPU each is waited for, which makes the whole slower.
    """
    times: Times = {}
    _times.append(times)
    try:
        yield times
    finally:
        _times.remove(times)


def _timed(name: str, direction: str, function: Callable[P, Tensor], *args: P.args, **kwargs: P.kwargs) -> Tensor:
    if _depth.inside:
        return function(*args, **kwargs)
    _depth.inside = True
    _wait()
    start = time.perf_counter()
    try:
        result = function(*args, **kwargs)
        _wait()
    finally:
        _depth.inside = False
    seconds = time.perf_counter() - start
    with _lock:
        for times in _times:
            entry = times.setdefault((name, direction), [0.0, 0, 0])
            entry[0] += seconds
            entry[1] += 1
            entry[2] += result.data.nbytes
    return result


def _wait() -> None:
    if xp is not np:
        cupy: Any = xp
        cupy.cuda.Device().synchronize()


def profile_table(times: Times) -> str:
    """What `profile` found, as text: the operations in falling order of the time they took."""
    rows, total = [("operation", "direction", "seconds", "share", "calls", "MB")], sum(x[0] for x in times.values())
    for (name, direction), (seconds, calls, size) in sorted(times.items(), key=lambda item: -item[1][0]):
        share = f"{100 * seconds / max(total, 1e-12):.1f}%"
        rows.append((name, direction, f"{seconds:.3f}", share, f"{calls:,}", f"{size / 1e6:,.1f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    align = "<<>>>>"
    return "\n".join("  ".join(f"{x:{a}{w}}" for x, a, w in zip(row, align, widths, strict=True)) for row in rows)
