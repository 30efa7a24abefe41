"""A small automatic-differentiation engine on NumPy or CuPy arrays, written to be read from top to bottom.

The story of this chapter: a `Tensor` is an array that remembers how it was computed. A primitive operation returns a new
Tensor together with one formula for each operand, the *vector-Jacobian product* (vjp): given the gradient of some final
number with respect to the operation's result, it returns the gradient with respect to that operand. `grad` walks the
remembered operations backwards, once each, applying those formulas: that is the chain rule, and all of backpropagation.
The formulas are themselves written in Tensor operations, so a gradient can remember how *it* was computed and be
differentiated again. TransGAN's loss needs exactly that, because it penalises the norm of a gradient.

Contents
    1. Where arrays live      xp, use_device, to_numpy
    2. Tensor                 Tensor, Node, recording, result, operation
    3. Walking back           grad, unbroadcast
    4. Primitive operations   add ... concatenate
    5. Parts of networks      linear, gelu, softmax, layer_norm, attention, pixel_shuffle, as their definitions read
    6. Checking               gradient_check of derivatives; check_arguments, of the KINDS that operations take
    7. Modules                Module, Linear, LayerNorm
    8. Optimisation           clip_by_global_norm, Adam over flat arrays

All of it is written to be understood. The folder fast/ holds some operations again, arranged for a processor, and enters
them into the table `faster`; each is tested to equal its definition here, which knows nothing of them.

Errors: every operation raises ValueError (IndexError for an index out of range), naming itself or the one within it that
failed, and the shapes it was given; TypeError when float32 and float64 meet or an argument is of another kind than KINDS
says. The docstrings below name only what goes beyond.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from types import EllipsisType
from typing import Any, ParamSpec, TypeAlias, TypeVar

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
P = ParamSpec("P")  # the parameters of a function that gets wrapped
R = TypeVar("R")

# --- 1. Where arrays live ---------------------------------------------------------------------------------------------

xp = np  # the array library in use: numpy, or cupy after use_device found a GPU; only speed and rounding depend on which


def use_device(device: str = "auto") -> str:
    """Choose where arrays live, and return the choice in words: "cpu" or the GPU's name.

    device: "cpu" (NumPy), "gpu" (CuPy), or "auto", the GPU where CuPy is installed and finds one, else the CPU. Call it
    before the first Tensor is made. Raises RuntimeError where "gpu" is asked for and there is none, ValueError for others.
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


def to_numpy(array: Tensor | Array) -> NDArray[Any]:
    """An array (or a Tensor's) as a NumPy array of the same shape and dtype: a copy from a GPU, itself on the CPU."""
    array = array.data if isinstance(array, Tensor) else array
    return np.asarray(array.get() if hasattr(array, "get") else array)


# --- 2. Tensor --------------------------------------------------------------------------------------------------------

_order = itertools.count()  # numbers the Nodes as they are made
_recording: ContextVar[bool] = ContextVar("recording", default=True)  # each thread has its own


def is_recording() -> bool:
    """Whether operations remember how they were computed, here and now."""
    return _recording.get()


@contextlib.contextmanager
def recording(enabled: bool) -> Iterator[None]:
    """Within this context operations of this thread remember how they were computed (enabled=True) or do not."""
    before = _recording.set(enabled)
    try:
        yield
    finally:
        _recording.reset(before)


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

    def __reduce__(self) -> tuple[Any, ...]:
        return Node, (self.edges,)  # a copy, also one that is read from a file, counts from where it is made


class Tensor:
    """An array `data` of floats, and the Node that computed it, or None if no gradient is to flow into it.

    data: what xp.asarray makes an array of real numbers of, else TypeError (ValueError for rows of different lengths).
    Float arrays keep their dtype, everything else becomes float32; dtype= overrides. requires_grad=True makes a leaf, whose
    gradient can be asked for. The array is not copied: do not write into it between an operation and `grad`, which reads
    it again and does not notice. The methods are operations of section 4.
    """

    __slots__ = ("data", "node")
    __array_ufunc__ = None  # so that array * Tensor asks Tensor.__rmul__, not NumPy

    def __init__(self, data: Any, requires_grad: bool = False, dtype: DTypeLike | None = None):
        if type(data) is not xp.ndarray or dtype is not None or data.dtype.kind != "f" or not data.dtype.isnative:
            given = getattr(data, "dtype", np.dtype(object))
            wanted = np.dtype(dtype or (given if given.kind == "f" else np.float32)).newbyteorder("=")
            data = xp.asarray(data)
            if data.dtype.kind not in "biuf" or wanted.kind != "f":
                raise TypeError(f"a Tensor holds real numbers, as floats, not {data.dtype} as {wanted}")
            data = data.astype(wanted, copy=False)
        self.data: Array = data
        self.node = Node() if requires_grad else None

    # fmt: off
    @property
    def shape(self) -> Shape: return self.data.shape
    @property
    def ndim(self) -> int: return self.data.ndim
    @property
    def size(self) -> int: return self.data.size
    @property
    def dtype(self) -> np.dtype[Any]: return self.data.dtype
    @property
    def requires_grad(self) -> bool: return self.node is not None
    @property
    def T(self) -> Tensor: return transpose(self)
    # fmt: on

    def detach(self) -> Tensor:
        """The same array, without its history: no gradient flows back through the result."""
        return Tensor(self.data)

    def item(self) -> float:
        """The value of a Tensor of one element as a Python float (on a GPU this waits for the device)."""
        return float(self.data.item())

    def __repr__(self) -> str:
        return f"Tensor({self.data!r}{', requires_grad=True' if self.node else ''})"

    # fmt: off
    def __len__(self) -> int: return len(self.data)
    def __iter__(self) -> Iterator[Tensor]: return (self[i] for i in range(len(self)))
    def __bool__(self) -> bool: return bool(self.data)  # of one element; ValueError of several, as NumPy has it
    def __eq__(self, b: object) -> bool: raise TypeError("a Tensor is compared by its array: x.data == ..., x.data < ...")
    def __array__(self, *_: Any, **__: Any) -> Array: raise TypeError("NumPy would lose a Tensor's history; use to_numpy")
    __array_function__ = __array__  # of numpy.sum, numpy.concatenate, ...
    __hash__ = object.__hash__
    def __add__(self, b: Operand) -> Tensor: return add(self, b)
    def __radd__(self, a: Operand) -> Tensor: return add(a, self)  # a + self, where a is a number or an array
    def __sub__(self, b: Operand) -> Tensor: return subtract(self, b)
    def __rsub__(self, a: Operand) -> Tensor: return subtract(a, self)
    def __mul__(self, b: Operand) -> Tensor: return multiply(self, b)
    def __rmul__(self, a: Operand) -> Tensor: return multiply(a, self)
    def __truediv__(self, b: Operand) -> Tensor: return divide(self, b)
    def __rtruediv__(self, a: Operand) -> Tensor: return divide(a, self)
    def __matmul__(self, b: Operand) -> Tensor: return matmul(self, b)
    def __rmatmul__(self, a: Operand) -> Tensor: return matmul(a, self)
    def __neg__(self) -> Tensor: return negative(self)
    def __pow__(self, exponent: float) -> Tensor: return power(self, exponent)
    def __getitem__(self, index: Index | tuple[Index, ...]) -> Tensor: return getitem(self, index)
    def sum(self, axis: Axis = None, keepdims: bool = False) -> Tensor: return reduce_sum(self, axis, keepdims)
    def mean(self, axis: Axis = None, keepdims: bool = False) -> Tensor: return reduce_mean(self, axis, keepdims)
    def reshape(self, *shape: int | Sequence[int]) -> Tensor: return reshape(self, *shape)
    def transpose(self, *axes: int) -> Tensor: return transpose(self, *axes)
    # fmt: on


def array_of(x: Any) -> Any:
    """An operand's array; a NumPy number becomes Python's, which has no dtype to insist on; all else passes as it is."""
    return x.data if isinstance(x, Tensor) else x.item() if isinstance(x, np.generic) else x


def result(data: Array | float, *edges: tuple[Operand | None, Vjp]) -> Tensor:
    """The Tensor of an operation's result; `edges` are (operand, vjp) pairs.

    A vjp takes the gradient of the result and returns the operand's, Tensor to Tensor. Operands that are plain numbers or
    arrays have none to receive. Raises TypeError where Tensors of another dtype than the result's meet in it.
    """
    made = Tensor(data)
    tensors = [(x, vjp) for x, vjp in edges if isinstance(x, Tensor)]
    for x, _ in tensors:
        if x.dtype != made.dtype:
            arrays = "".join(f", by {describe(y)}" for y, _ in edges if isinstance(y, xp.ndarray))
            raise TypeError(f"operands of {x.dtype} and {made.dtype} meet{arrays}: convert one, Tensor(x.data, dtype=...)")
    if is_recording():
        kept = tuple((x.node, x.shape, vjp) for x, vjp in tensors if x.node is not None)
        if kept:
            made.node = Node(kept)
    return made


faster: dict[Callable[..., Any], Callable[..., Any]] = {}  # an operation -> a form of it that runs in its place
hook: Callable[..., Any] | None = None  # for a profiler: hook(operation's name, direction, function, *arguments) runs it


def operation(definition: Callable[P, R]) -> Callable[P, R]:
    """Make a function an operation: what stands in `faster` for it runs in its place, and its errors are clear.

    Its arguments are checked, and the operation's name and the shapes it was given go before whatever is wrong with them
    or its arrays complain about. Its definition stays at hand as `__wrapped__`.
    """
    parameters = inspect.signature(definition).parameters
    names, optional = tuple(parameters), {name for name, parameter in parameters.items() if parameter.default is None}
    # Types for which no closer look is needed; from KINDS, which appendices add to.
    types = functools.cache(lambda: [() if name in LEAST else KINDS.get(name, [object])[0] for name in names])

    @functools.wraps(definition)
    def named(*args: P.args, **kwargs: P.kwargs) -> R:
        form: Callable[P, R] = faster.get(named, definition)
        try:
            if kwargs or not all(map(isinstance, args, types())):
                check_arguments((*zip(names, args, strict=False), *kwargs.items()), optional)
            if hook is None:
                return form(*args, **kwargs)
            return hook(definition.__name__, "forward", form, *args, **kwargs)
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:  # the last: of shapes with a 0, huge numbers
            if getattr(error, "is_clear", False):
                raise
            given = (x if isinstance(x, (list, tuple)) else (x,) for x in (*args, *kwargs.values()))
            shapes = ", ".join(str(x.shape) for x in itertools.chain(*given) if hasattr(x, "shape"))
            kind = next((k for k in (ValueError, IndexError, TypeError) if isinstance(error, k)), ValueError)
            clear: Any = kind(f"{definition.__name__}{shapes and ' of shapes '}{shapes}: {error}")
            clear.is_clear = True
            raise clear from None

    return named


# --- 3. Walking back --------------------------------------------------------------------------------------------------


def grad(
    output: Tensor, inputs: Tensor | Iterable[Tensor], output_grad: Tensor | None = None, create_graph: bool = False
) -> list[Tensor]:
    """Gradients of `output` with respect to each of `inputs`, or to the one: a list of Tensors of their shapes.

    output: a Tensor of one element, or any shape with `output_grad`, a Tensor of that shape, v in v^T d(output)/d(input)
    (then the sum over output's elements weighted by v is what is differentiated). An input that output does not depend
    on gets zeros. create_graph=True remembers how the gradients were computed, so that they can be differentiated, and
    keeps the graph; otherwise the graph is let go node by node, and its memory with it, while the walk goes on. Gradients
    may share memory with each other: read them, do not write into them.

    Reverse mode: visit the operations in falling order of creation, each once, when all that depends on it is done:
        gradient of operand += vjp(gradient of result).
    Operations that lead to none of the inputs are not visited. No recursion, so depth is not limited.
    Raises ValueError for an output_grad that is missing or of another shape and for an input without history, TypeError for
    one of another kind or dtype, RuntimeError if the graph was let go by an earlier walk.
    """
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    check_arguments([("output", output), ("inputs", inputs), ("output_grad", output_grad)], ["output_grad"])
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
    if output_grad.dtype != output.dtype:
        raise TypeError(f"grad: output_grad of {output_grad.dtype} for an output of {output.dtype}")

    wanted: dict[Node, Tensor | None] = dict.fromkeys(nodes)
    useful = _between(output.node, wanted)
    waiting = [(-output.node.order, output.node)] if output.node in useful else []  # a heap: the newest node first
    gradients = {output.node: output_grad}
    with recording(create_graph):
        while waiting:
            node = heapq.heappop(waiting)[1]
            gradient = gradients.pop(node)
            if node in wanted:
                wanted[node] = gradient
            for operand, shape, vjp in node.edges or ():
                if operand in useful:
                    name = vjp.__qualname__.partition(".")[0]  # a vjp is named after its operation
                    piece = hook(name, "backward", _pull, vjp, gradient, shape) if hook else _pull(vjp, gradient, shape)
                    if operand in gradients:
                        gradients[operand] = gradients[operand] + piece
                    else:
                        gradients[operand] = piece
                        heapq.heappush(waiting, (-operand.order, operand))
            if node.edges and not create_graph:
                node.edges = None
    found = [wanted[node] for node in nodes]
    return [Tensor(xp.zeros_like(x.data)) if g is None else g for x, g in zip(inputs, found, strict=True)]


def _pull(vjp: Vjp, gradient: Tensor, shape: Shape) -> Tensor:
    """The gradient of an operand, of its `shape`, from that of the result."""
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


@operation
def add(a: Operand, b: Operand) -> Tensor:
    """a + b, elementwise with broadcasting. d(a+b) = da + db."""
    return result(array_of(a) + array_of(b), (a, lambda g: g), (b, lambda g: g))


@operation
def subtract(a: Operand, b: Operand) -> Tensor:
    """a - b, elementwise with broadcasting. d(a-b) = da - db."""
    return result(array_of(a) - array_of(b), (a, lambda g: g), (b, lambda g: -g))


@operation
def multiply(a: Operand, b: Operand) -> Tensor:
    """a * b, elementwise with broadcasting. d(ab) = b da + a db."""
    return result(array_of(a) * array_of(b), (a, lambda g: g * b), (b, lambda g: g * a))


@operation
def divide(a: Operand, b: Operand) -> Tensor:
    """a / b, elementwise with broadcasting. d(a/b) = da/b - (a/b^2) db."""
    return result(array_of(a) / array_of(b), (a, lambda g: g / b), (b, lambda g: -(g / b) * (a / b)))


@operation
def negative(x: Tensor) -> Tensor:
    """-x, elementwise."""
    return result(-x.data, (x, lambda g: -g))


@operation
def power(x: Tensor, exponent: float) -> Tensor:
    """x ** exponent for a constant number; for a Tensor b, a ** b is exp(b * log(a)). d(x^p) = p x^(p-1) dx."""
    exponent = float(exponent)
    if exponent == 0:
        return Tensor(xp.ones_like(x.data))  # a constant; its formula would be 0 * infinity at x = 0
    data = x.data * x.data if exponent == 2 else x.data**exponent
    return result(data, (x, lambda g: g * exponent * (x if exponent == 2 else power(x, exponent - 1))))


@operation
def exp(x: Tensor) -> Tensor:
    """e^x, elementwise. d exp(x) = exp(x) dx."""
    return result(xp.exp(x.data), (x, lambda g: g * exp(x)))


@operation
def log(x: Tensor) -> Tensor:
    """Natural logarithm, elementwise. d log(x) = dx / x."""
    return result(xp.log(x.data), (x, lambda g: g / x))


@operation
def sqrt(x: Tensor) -> Tensor:
    """Square root, elementwise. d sqrt(x) = dx / (2 sqrt(x)), infinite at 0."""
    return result(xp.sqrt(x.data), (x, lambda g: g * 0.5 / sqrt(x)))


@operation
def tanh(x: Tensor) -> Tensor:
    """Hyperbolic tangent, elementwise. d tanh(x) = (1 - tanh(x)^2) dx."""
    return result(xp.tanh(x.data), (x, lambda g: g * (1.0 - tanh(x) ** 2)))


@operation
def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x), elementwise; for x < 0 as e^x / (1 + e^x), so that exp cannot overflow. d s(x) = s(x) s(-x) dx."""
    small = xp.exp(-xp.abs(x.data))
    data = xp.where(x.data < 0, small, 1) / (1 + small)
    return result(data, (x, lambda g: g * sigmoid(x) * sigmoid(-x)))


@operation
def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), elementwise, as max(x, 0) + log(1 + e^-|x|), which cannot overflow. d softplus(x) = sigmoid(x) dx."""
    data = xp.maximum(x.data, 0.0) + xp.log1p(xp.exp(-xp.abs(x.data)))
    return result(data, (x, lambda g: g * sigmoid(x)))


@operation
def relu(x: Tensor) -> Tensor:
    """max(x, 0), elementwise; the derivative is 1 where x > 0, else 0."""
    return result(xp.maximum(x.data, 0.0), (x, lambda g: where(x.data > 0, g, 0.0)))  # g * 0 is NaN if g is infinite


@operation
def where(mask: Array, a: Operand, b: Operand) -> Tensor:
    """a where the boolean array is True, else b, with broadcasting; the gradient goes to what was taken."""
    data = xp.where(mask, array_of(a), array_of(b))
    return result(data, (a, lambda g: where(mask, g, 0.0)), (b, lambda g: where(mask, 0.0, g)))


@operation
def matmul(a: Operand, b: Operand) -> Tensor:
    """Matrix product (..., n, k) @ (..., k, m) -> (..., n, m); leading axes broadcast.

    d(ab) = da b + a db, so the gradients are g b^T and a^T g.
    """
    a, b = (x if isinstance(x, Tensor) else Tensor(x) for x in (a, b))
    if min(a.ndim, b.ndim) < 2:
        raise ValueError("both operands need at least two axes")
    return result(xp.matmul(a.data, b.data), (a, lambda g: g @ swap_last(b)), (b, lambda g: swap_last(a) @ g))


@operation
def reduce_sum(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Sum over `axis` (a number, a tuple, or None for all). The gradient of a sum is spread to every summand."""
    axes = range(x.ndim) if axis is None else normalize_axis_tuple(axis, x.ndim)
    kept = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    data = x.data.sum(axis=axis, keepdims=keepdims)
    return result(data, (x, lambda g: broadcast_to(reshape(g, kept), x.shape)))


@operation
def reduce_mean(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Mean over `axis` (a number, a tuple, or None for all)."""
    total = reduce_sum(x, axis, keepdims)
    if total.size and not x.size:
        raise ValueError("there is no mean of no elements")
    return total * (total.size / max(x.size, 1))  # x.size / total.size elements went into each sum


@operation
def broadcast_to(x: Tensor, shape: Shape) -> Tensor:
    """Stretch axes of size 1 (and add leading ones) to `shape`, without a copy; `unbroadcast` is its derivative."""
    return result(xp.broadcast_to(x.data, shape), (x, lambda g: g))


@operation
def reshape(x: Tensor, *shape: int | Sequence[int]) -> Tensor:
    """The same elements in another shape, row by row; one size may be -1."""
    sizes: Any = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    before = x.shape
    return result(x.data.reshape(sizes), (x, lambda g: reshape(g, before)))


@operation
def transpose(x: Tensor, *axes: int) -> Tensor:
    """Permute the axes, axes[i] of x becoming axis i; without axes, reverse them. The derivative permutes back."""
    axes = axes or tuple(reversed(range(x.ndim)))
    back = tuple(sorted(range(len(axes)), key=lambda i: axes[i] % max(x.ndim, 1)))
    return result(x.data.transpose(axes), (x, lambda g: transpose(g, *back)))


def swap_last(x: Tensor) -> Tensor:
    """Transpose the last two axes: (..., n, m) -> (..., m, n)."""
    return transpose(x, *range(x.ndim - 2), x.ndim - 1, x.ndim - 2)


@operation
def getitem(x: Tensor, index: Index | tuple[Index, ...]) -> Tensor:
    """x[index] for whole numbers, slices, None and ...; the gradient is laid into zeros at the same place."""
    return result(x.data[index], (x, lambda g: _place(g, index, x.shape)))


@operation
def _place(x: Tensor, index: Index | tuple[Index, ...], shape: Shape) -> Tensor:
    """The derivative of getitem: x laid into zeros of `shape` at `index`."""
    data = xp.zeros(shape, x.dtype)
    data[index] = x.data
    return result(data, (x, lambda g: g[index]))


@operation
def concatenate(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Join Tensors along an existing axis; each gets its own part of the gradient."""
    ends = list(itertools.accumulate(x.shape[axis] for x in tensors))

    def part(i: int) -> Vjp:
        index = [slice(None)] * tensors[i].ndim
        index[axis] = slice(ends[i] - tensors[i].shape[axis], ends[i])
        return lambda g: g[tuple(index)]

    data = xp.concatenate([x.data for x in tensors], axis=axis)
    return result(data, *((x, part(i)) for i, x in enumerate(tensors)))


# --- 5. Parts of networks ---------------------------------------------------------------------------------------------
# Each as its definition reads. All but normal_cdf are made of the operations above, so that derivatives need no formula.


@operation
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight + bias: (..., k), (k, m), (m,) -> (..., m)."""
    if x.shape[-1:] != weight.shape[:1] or (bias is not None and bias.shape != weight.shape[1:]):
        raise ValueError("expected (..., k), (k, m) and (m,)")
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # (rows, k): one product for all
    product = (rows @ weight).reshape(*x.shape[:-1], weight.shape[1])
    return product if bias is None else product + bias


@operation
def normal_cdf(x: Tensor) -> Tensor:
    """Phi(x) = (1 + erf(x / sqrt 2)) / 2, elementwise: the probability that a standard normal number is below x.

    d Phi(x) = phi(x) dx with the density phi(x) = exp(-x^2/2) / sqrt(2 pi). NumPy has no erf; each element asks Python's.
    """
    erf = np.vectorize(math.erf, otypes=[np.float64])(to_numpy(x) * math.sqrt(0.5))
    data = xp.asarray(0.5 + 0.5 * erf, dtype=x.dtype)
    return result(data, (x, lambda g: g * exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi))))


@operation
def gelu(x: Tensor) -> Tensor:
    """Gaussian error linear unit in its exact form, x Phi(x), elementwise (Hendrycks and Gimpel 2016)."""
    return x * normal_cdf(x)


@operation
def softmax(x: Tensor, mask: Array | None = None) -> Tensor:
    """exp(x) / sum exp(x) over the last axis: (..., n) -> (..., n), rows that sum to 1.

    The row's maximum is subtracted first, which cancels in the quotient and keeps exp from overflowing. mask: a boolean
    array that broadcasts to x's shape, False where an element is to get weight 0, as if its x were -inf (the paper's
    locality-aware initialization); a row with nothing left is all zeros.
    """
    if mask is not None:
        if np.broadcast_shapes(x.shape, mask.shape) != x.shape:
            raise ValueError(f"the mask, of shape {mask.shape}, must broadcast to x")
        x = where(mask, x, -xp.inf)
    highest = x.data.max(axis=-1, keepdims=True) if x.size else x.data[..., :1]
    top = xp.maximum(highest, xp.finfo(x.dtype).min)  # finite in any row
    weights = exp(x - top)
    total = weights.sum(axis=-1, keepdims=True)
    nothing_left: Array = total.data == 0
    return weights / (total + nothing_left)


@operation
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer normalization over the last axis: (..., C), (C,), (C,) -> (..., C) (Ba et al. 2016).

    (x - mean) / deviation * weight + bias, with deviation sqrt(mean((x - mean)^2) + eps).
    """
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError("weight and bias must have the shape of x's last axis")
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    return centred / sqrt(variance + eps) * weight + bias


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Array | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v: (..., n, D), (..., N, D), (..., N, D) -> (..., n, D) (Vaswani et al. 2017, eq. 1).

    mask: a boolean array that broadcasts to (..., n, N), True where a query may see a key.
    """
    scores = (q * q.shape[-1] ** -0.5) @ swap_last(k)  # (..., n, N)
    return softmax(scores, mask) @ v


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H*D) -> (B, H, N, D)."""
    batch, tokens, width = x.shape
    return x.reshape(batch, tokens, num_heads, width // num_heads).transpose(0, 2, 1, 3)


def join_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H*D), heads side by side."""
    batch, num_heads, tokens, head = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, tokens, num_heads * head)


@operation
def attention(qkv: Tensor, num_heads: int, mask: Array | None = None) -> Tensor:
    """Scaled dot-product self-attention of H = num_heads heads of width D = C / H: (B, N, 3C) -> (B, N, C).

    qkv holds query, key and value of every token side by side. mask: boolean (N, N), True where query i may see key j.
    """
    _, tokens, width = qkv.shape
    if width % (3 * num_heads):
        raise ValueError(f"the last axis must hold q, k and v of {num_heads} heads, so divide by {3 * num_heads}")
    if mask is not None and mask.shape != (tokens, tokens):
        raise ValueError(f"the mask, of shape {mask.shape}, must be ({tokens}, {tokens})")
    heads = split_heads(qkv, 3 * num_heads)  # (B, 3H, N, D)
    q, k, v = heads[:, :num_heads], heads[:, num_heads : 2 * num_heads], heads[:, 2 * num_heads :]
    return join_heads(attend(q, k, v, mask))


@operation
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


# --- 6. Checking ------------------------------------------------------------------------------------------------------


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
    coordinates of each input, and along a random direction, in which every element has a part; both as `grad` gives it
    and with create_graph=True, because an operation may have a form for either. The next order is the same check of f's
    slope along a random direction u, the function x -> sum(u df/dx), whose derivative is a second one of f.
    Errors are relative to the largest derivative, or to 1 where all are smaller; below 1e-6 is agreement in float64.
    Raises TypeError for inputs that are not float64: their rounding would hide the difference.
    """
    inputs = [xp.asarray(x) for x in ([inputs] if isinstance(inputs, xp.ndarray) else inputs)]
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
    leaves = [Tensor(x, requires_grad=True) for x in inputs]
    walks = [grad(number(*leaves), leaves, create_graph=recorded) for recorded in (False, True)]
    exact = [[to_numpy(g) for g in pair] for pair in zip(*walks, strict=True)]  # of each input, both forms
    worst = 0.0
    for i, x in enumerate(inputs):
        rows = []  # along each direction the central difference, and what both forms say
        for coordinate in (*rng.permutation(x.size)[:coordinates], None):
            u = rng.standard_normal(x.shape) if coordinate is None else np.arange(x.size).reshape(x.shape) == coordinate
            u = u / np.linalg.norm(u)
            ends = [[*inputs[:i], x + xp.asarray(move), *inputs[i + 1 :]] for move in (step * u, -step * u)]
            high, low = (number(*(Tensor(x, requires_grad=True) for x in end)).item() for end in ends)
            rows.append([(high - low) / (2 * step), *((g * u).sum() for g in exact[i])])
        differences, *found = np.array(rows).T
        error = np.abs(found - differences).max() / max(1.0, np.abs(differences).max())
        worst = max(worst, float(error) if np.isfinite(error) else math.inf)
    return worst


NUMBER = (int, float, np.bool_, np.integer, np.floating)
KINDS: dict[str, tuple[Any, str, str]] = {  # of a parameter by its name: the types, dtypes of an array, and both in words
    **dict.fromkeys(("x", "weight", "bias", "qkv", "output", "output_grad"), (Tensor, "", "{} must be a Tensor")),
    **dict.fromkeys(("tensors", "inputs", "parameters", "gradients"), (Tensor, "", "{} must be Tensors")),
    **dict.fromkeys(("a", "b"), ((Tensor, *NUMBER), "biuf", "{} must be a Tensor, an array of real numbers or a number")),
    **dict.fromkeys(("num_heads", "factor"), ((int, np.integer), "", "{} must be a whole number")),
    "exponent": (NUMBER, "", "the exponent must be a number (a ** b of Tensors is exp(b * log(a)))"),
    "index": ((int, np.integer, slice, type(None), EllipsisType), "", "an index may hold whole numbers, slices, None, ..."),
    "mask": (np.bool_, "b", "the mask must be a boolean array"),
}
SEVERAL: Any = {"index": tuple, **dict.fromkeys(("tensors", "inputs", "parameters", "gradients"), (tuple, list))}
LEAST = {"num_heads": 1, "factor": 1}  # the smallest a number may be; SEVERAL above: what may hold more than one of a kind


def check_arguments(arguments: Iterable[tuple[str, Any]], optional: Iterable[str] = ()) -> None:
    """Raise TypeError where one of the arguments, pairs (name, value), is not of its parameter's kind, ValueError where a
    number is too small. optional: the names of those that may be None. Appendices enter their own names into KINDS."""
    for name, x in arguments:
        types, dtypes, words = KINDS.get(name, (object, "", ""))
        if x is None and name in optional:
            continue
        for part in x if isinstance(x, SEVERAL.get(name, ())) else (x,):
            if not isinstance(part, types) and not (type(part) is xp.ndarray and part.dtype.kind in dtypes):
                raise TypeError(f"{words.format(name)}, not {describe(x)}")
            if name in LEAST and part < LEAST[name]:
                raise ValueError(f"{name} must be at least {LEAST[name]}, not {x}")


def describe(x: Any) -> str:
    """What somebody has passed, in a few words: its type, and that of what it holds."""
    held = {describe(y) for y in x} if isinstance(x, (list, tuple)) else {str(x.dtype)} if getattr(x, "ndim", 0) else ()
    return str(type(x))[8:-2] + " of " * bool(held) + ", ".join(sorted(held))  # <class 'name'>


# --- 7. Modules -------------------------------------------------------------------------------------------------------
# Their first values are drawn by `init`, such as transgan.Init.


class Module:
    """A part of a network. Its parameters are its attributes: Tensors, and those of Modules, which may stand in lists."""

    def parameters(self) -> dict[str, Tensor]:
        """All parameters by name, in the order they were set: {"blocks.0.mlp.expand.weight": Tensor, ...}."""
        found = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                found[name] = value
            # The parts of a list go by their numbers; anything else is one part, without a number.
            for part, module in enumerate(value) if isinstance(value, (list, tuple)) else [(None, value)]:
                if isinstance(module, Module):
                    prefix = name if part is None else f"{name}.{part}"
                    found.update({f"{prefix}.{inner}": x for inner, x in module.parameters().items()})
        return found


class Linear(Module):
    """x W + b: (..., inputs) -> (..., outputs). pixels: a token's, if `init.patches` is to draw it."""

    def __init__(self, inputs: int, outputs: int, init: Any, bias: bool = True, pixels: int = 0):
        self.weight, drawn = init.patches(inputs, outputs, pixels) if pixels else init.linear(inputs, outputs)
        self.bias = drawn if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class LayerNorm(Module):
    """Layer normalization with weight and bias over the last axis, eps 1e-5: (..., C) -> (..., C)."""

    def __init__(self, embed_dim: int, init: Any):
        self.weight, self.bias = init.parameter(np.ones(embed_dim)), init.parameter(np.zeros(embed_dim))

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias)


# --- 8. Optimisation --------------------------------------------------------------------------------------------------


def clip_by_global_norm(gradient: Array, max_norm: float) -> tuple[Array, Array]:
    """The factor that scales an array to a Euclidean norm of at most max_norm, and that norm.

    min(1, max_norm / (norm + 1e-6)), the form PyTorch uses. Both are 0-d arrays on the device, the factor for `Adam.step`.
    """
    norm = xp.sqrt(xp.vdot(gradient, gradient))
    return xp.minimum(1.0, max_norm / (norm + 1e-6)).astype(gradient.dtype), norm


class Adam:
    """Adam (Kingma and Ba 2014, algorithm 1) on a list of Tensors, and the moving average of what it makes of them.

    With b1 = 0, as TransGAN's authors have it, m is the gradient itself and is not kept; without a decay there is no
    average. All parameters lie in one flat array, of which their Tensors are views from now on; so do gradients,
    moments and averages. A checkpoint needs p, v, average, m if it is kept (`parts` cuts them up), and the step count t.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        betas: tuple[float, float] = (0.0, 0.99),
        eps: float = 1e-8,
        decay: float | None = None,
    ):
        self.parameters, self.betas, self.eps, self.decay, self.t = list(parameters), betas, eps, decay, 0
        check_arguments([("parameters", self.parameters)])
        leaves = {p for p in self.parameters if p.node and p.node.edges == ()}
        if len({p.dtype for p in leaves}) != 1 or len(leaves) < len(self.parameters):
            raise ValueError("Adam: expected Tensors made with requires_grad=True, of one dtype, and each only once")
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

    def add(self, gradients: Iterable[Tensor]) -> None:
        """Add gradients, Tensors in the parameters' order, to those of the next step."""
        gradients, parts = list(gradients), self.parts(self.p)
        check_arguments([("gradients", gradients)])
        views = [(p.shape, p.dtype, p.data.base is x.base) for p, x in zip(self.parameters, parts, strict=True)]
        if [(g.shape, g.dtype, True) for g in gradients] != views:
            raise ValueError("Adam: expected a gradient for each parameter, of its shape and dtype, and its data in adam.p")
        for total, gradient in zip(self.parts(self.gradient), gradients, strict=True):
            total += gradient.data

    def step(self, learning_rate: float, scale: float | Array = 1.0) -> None:
        """One update with `scale` times the gradients that were added, which are zero afterwards; scale may be an array."""
        self.t += 1
        adam_update(self, learning_rate, scale)


@operation
def adam_update(adam: Adam, learning_rate: float, scale: float | Array) -> None:
    """Algorithm 1 for step t = adam.t on its flat arrays, in place, then the moving average:

    m = b1 m + (1-b1) g,   v = b2 v + (1-b2) g^2,   p -= rate  m/(1-b1^t) / (sqrt(v/(1-b2^t)) + eps),
    average = decay average + (1-decay) p
    """
    (b1, b2), g, v, p = adam.betas, adam.gradient, adam.v, adam.p
    g *= scale
    m = g
    if adam.m is not None:
        m = adam.m
        m[...] = b1 * m + (1 - b1) * g
    v[...] = b2 * v + (1 - b2) * g * g
    p -= learning_rate * (m / (1 - b1**adam.t)) / (xp.sqrt(v / (1 - b2**adam.t)) + adam.eps)
    if adam.average is not None and adam.decay is not None:
        adam.average[...] = adam.decay * adam.average + (1 - adam.decay) * p
    g[...] = 0
