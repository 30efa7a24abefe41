"""The weights in a PyTorch file, read without PyTorch and without running what the file says.

The story of this chapter: `torch.save` writes a state dict, which names tensors, in two parts. The *storages* are plain
numbers, each in as many bytes as its type takes. The rest is a pickle, a program for a small machine with a stack, and most
of what it says is "look for the function of this name and call it". Python's own unpickler does so, whatever the function,
so a file from the network could run anything. Here is a smaller machine. It knows only the instructions and the few names
that a state dict needs, and all it makes is a description: which storage each tensor looks at, and how. That is held
against the storages before a single array is made.

Contents
    1. Reading              read_weights
    2. Three formats        a zip file (since 2020), pickles in a row, or a tar file (until 2017)
    3. Storages, tensors    what a pickle describes, checked, and the array that comes of it
    4. The pickle           the names it may use, and the machine that runs it

Errors: whatever is wrong with a file is a ValueError, or what Python happens to raise, until read_weights makes it a
UserError.
"""

import io
import math
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import UserError

# --- 1. Reading -------------------------------------------------------------------------------------------------------

MAX_FILE = 1 << 30  # bytes; the weights of the Inception network take 95 MB
MAX_PICKLE = 1 << 20  # bytes of one pickle; each tensor takes about 100
MAX_OPCODES = 200_000  # of all pickles in a file; each tensor takes about 40
MAX_MEMBERS = 5_000  # of a zip file, one for each storage; Python keeps half a kilobyte about each
MAX_COPIES = 4  # how many times the file's size all arrays may take: tensors may share a storage, or repeat it


def read_weights(path):
    """The tensors of the state dict in the PyTorch file at `path`: a dict of arrays by name, in the file's order.

    Each array has its tensor's shape and dtype; it is contiguous, with memory of its own. Raises UserError for a file that
    cannot be read, is damaged, or holds anything else.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE or not path.is_file():
            raise ValueError(f"it is not a plain file of at most {MAX_FILE} bytes")
        content = path.read_bytes()
        read = _read_zip if content[:2] == b"PK" else _read_tar if content[257:262] == b"ustar" else _read_pickles
        tensors, raw, order = read(content)
        for key, storage in _storages(tensors).items():
            if len(raw[key]) != storage.total * storage.dtype.itemsize:
                raise ValueError(f"storage {key!r:.40} holds {len(raw[key])} bytes for {storage.total} numbers")
        if sum(math.prod(x.shape) * x.storage.dtype.itemsize for x in tensors.values()) > MAX_COPIES * len(content):
            raise ValueError("its tensors are far larger than the file")
        return {name: _array(x, raw[x.storage.key], order) for name, x in tensors.items()}
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot read {path}: {reason}; name another file, or fetch it anew") from None
    except Exception as error:  # a damaged file can raise anything at all
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{path} holds no weights that can be read ({reason}); name another file, or fetch it anew"
        ) from None


# --- 2. Three formats -------------------------------------------------------------------------------------------------
# Each function takes a file's bytes and returns its tensors' descriptions by name, the bytes of each storage by key, and
# the order of the bytes in a number, "<" or ">".


def _read_zip(content):
    """The format since PyTorch 1.6: a zip file, not compressed, that holds NAME/data.pkl and NAME/data/KEY."""
    if content.count(b"PK\1\2") > MAX_MEMBERS:  # so the entry of each member begins
        raise ValueError(f"its zip file has more than {MAX_MEMBERS} members")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {member.filename: member for member in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise ValueError("two members of its zip file have the same name")
        if any(x.compress_type for x in members.values()) or sum(x.file_size for x in members.values()) > len(content):
            raise ValueError("its zip file claims more than its size")
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1 or members[pickles[0]].file_size > MAX_PICKLE:
            raise ValueError(f"its zip file does not hold one data.pkl of at most {MAX_PICKLE} bytes")
        top = pickles[0].removesuffix("data.pkl")
        tensors = _unpickle(io.BytesIO(archive.read(pickles[0])), iter(range(MAX_OPCODES)), _storage)
        order = archive.read(top + "byteorder") if top + "byteorder" in members else b"little"
        if order not in (b"little", b"big"):
            raise ValueError("its order of bytes is neither little nor big")
        raw = {key: archive.read(f"{top}data/{key}") for key in _storages(tensors)}
        return tensors, raw, "<" if order == b"little" else ">"


def _read_pickles(content):
    """The format before that: five pickles in a row, then the storages, each as a count and that many numbers."""
    stream, opcodes = io.BytesIO(content), iter(range(MAX_OPCODES))
    magic, version, _, tensors, keys = [_unpickle(stream, opcodes, _storage) for _ in range(5)]
    if magic != 0x1950A86A20F9469CFC6C or version != 1001:
        raise ValueError("it does not begin as PyTorch's files do")
    storages = _storages(tensors)
    if sorted(_need(key, str) for key in keys) != sorted(storages):
        raise ValueError("the storages it lists are not those of its tensors")
    return tensors, {key: _counted(stream, storages[key].dtype) for key in keys}, "<"


def _read_tar(content):
    """The first format: a tar file of `storages`, `tensors` that look at them, and a `pickle` that gives those names."""
    members, opcodes, storages, tensors, raw = _tar_members(content), iter(range(MAX_OPCODES)), {}, {}, {}
    stream = members[b"storages"]
    for _ in range(_unpickle(stream, opcodes)):
        key, _, dtype = _unpickle(stream, opcodes)
        block = _counted(stream, dtype)
        total = len(block) // dtype.itemsize
        storages[_whole(key)], raw[key] = _Storage(key, dtype, total, 0, total), block
    for key, root, first, length in _unpickle(stream, opcodes):
        storages[_whole(key)] = _view(storages[_whole(root)], first, length)
    stream = members[b"tensors"]
    for _ in range(_unpickle(stream, opcodes)):
        key, storage, _ = _unpickle(stream, opcodes)
        (ndim,) = struct.unpack("<i4x", stream.read(8))
        numbers = struct.unpack(f"<{2 * ndim + 1}q", stream.read(16 * ndim + 8))  # the shape, the strides, the offset
        tensors[_whole(key)] = _tensor(storages[_whole(storage)], numbers[-1], numbers[:ndim], numbers[ndim:-1])
    return _unpickle(members[b"pickle"], opcodes, lambda key: tensors[int(_need(key, str))]), raw, "<"


def _tar_members(content):
    """The plain files in a tar file by name, each as a stream. tarfile could be kept busy for hours by a hostile one."""
    members, at = {}, 0
    while any(content[at : at + 1]):  # an empty block, or the end, comes after the last member
        name, size = content[at : at + 100].rstrip(b"\0"), content[at + 124 : at + 136].strip(b" \0")
        if not size.isdigit() or len(content) < (end := at + 512 + int(size, 8)):
            raise ValueError("its tar file is damaged or ends early")
        if content[at + 156] in b"0\0":
            if name in members:
                raise ValueError("two members of its tar file have the same name")
            members[name] = io.BytesIO(content[at + 512 : end])
        at = end + -end % 512
    if not {b"storages", b"tensors", b"pickle"} <= members.keys():
        raise ValueError("its tar file lacks storages, tensors or the pickle")
    return members


def _counted(stream, dtype):
    """The bytes of the storage that comes next, a count and that many numbers."""
    (count,) = struct.unpack("<q", stream.read(8))
    size = _whole(count) * dtype.itemsize
    if size > MAX_FILE or len(block := stream.read(size)) < size:
        raise ValueError("it ends within a storage")
    return block


# --- 3. Storages, tensors ---------------------------------------------------------------------------------------------
# Arguments come from the pickle and may be anything. Tuples can hold one another so that to compare, hash or print one
# takes for ever or overflows C's stack: ask what a value is before anything else.


class _Storage(NamedTuple):
    """Some of the numbers of a storage: `count` from number `first` on, of the `total` that it holds under its key."""

    key: str
    dtype: np.dtype
    total: int
    first: int
    count: int


class _Tensor(NamedTuple):
    """How a tensor looks at a storage: element (i, j, ...) is its number offset + i * strides[0] + j * strides[1] ..."""

    storage: _Storage
    offset: int
    shape: tuple
    strides: tuple


def _need(value, kind):
    """`value`, if its type is `kind`. Raises ValueError."""
    if type(value) is not kind:
        raise ValueError(f"it has {type(value).__name__} where {kind.__name__} belongs")
    return value


def _whole(value):
    """`value`, if it is an int of at least 0. Raises ValueError."""
    if _need(value, int) < 0:
        raise ValueError("it has a negative number where none belongs")
    return value


def _storage(identity):
    """What stands for a storage: ("storage", type, key, device, count), once followed by None or (key, first, count)."""
    kind, dtype, key, _, total, *view = _need(identity, tuple)
    if kind != "storage" or not isinstance(dtype, np.dtype) or len(view) > 1:
        raise ValueError("it has something else where a storage belongs")
    storage = _Storage(_need(key, str), dtype, _whole(total), 0, total)
    return storage if not view or view[0] is None else _view(storage, *_need(view[0], tuple)[1:])


def _view(storage, first, count):
    if _whole(first) + _whole(count) > storage.count:
        raise ValueError("it looks beyond a storage")
    return storage._replace(first=storage.first + first, count=count)


def _tensor(storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None):
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2, which says more. Raises ValueError."""
    if metadata:
        raise ValueError("it has a tensor whose signs are yet to be turned")
    if not len(_need(shape, tuple)) == len(_need(strides, tuple)) <= 64:
        raise ValueError(f"it has a tensor of {len(shape)} axes and {len(strides)} strides")
    for number in (offset, *shape, *strides):
        _whole(number)
    last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
    if last >= _need(storage, _Storage).count and 0 not in shape:
        raise ValueError("it has a tensor that looks beyond its storage")
    return _Tensor(storage, offset, shape, strides)


def _storages(tensors):
    """The whole storages of a dict of tensors, by key. Raises ValueError for anything else."""
    storages = {}
    for name, tensor in _need(tensors, dict).items():
        if type(tensor) is not _Tensor:
            raise ValueError(f"its {name!r:.80} is {type(tensor).__name__}, no tensor")
        storage = tensor.storage._replace(first=0, count=tensor.storage.total)
        if storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"it says two things about storage {storage.key!r:.40}")
    return storages


def _array(tensor, content, order):
    """A tensor as a contiguous array of its own; content: the bytes of its storage."""
    storage, offset, shape, strides = tensor
    dtype, size = storage.dtype, storage.dtype.itemsize
    if 0 in shape:
        return np.empty(shape, dtype)
    stored = "u1" if dtype.kind == "b" else dtype.newbyteorder(order)  # a damaged bool may be 2
    view = np.ndarray(shape, stored, content, (storage.first + offset) * size, [size * x for x in strides])
    return view.astype(dtype, order="C")


# --- 4. The pickle ----------------------------------------------------------------------------------------------------


def _fill(target, items):
    for name, value in items:
        if _need(name, str) in _need(target, dict):
            raise ValueError(f"the name {name!r:.80} comes twice")
        target[name] = value
    return target


def _ordered_dict(items=None):
    """collections.OrderedDict, to which Python 2 gave a list of items. Taken out of it, they cannot be copied twice."""
    result = _fill({}, _need(items or [], list))
    if items:
        items.clear()
    return result


def _parameter(tensor, requires_grad=True, hooks=None):
    """torch._utils._rebuild_parameter and torch.nn.Parameter."""
    return _need(tensor, _Tensor)


DTYPES = {"Float": "f4", "Double": "f8", "Half": "f2", "Long": "i8", "Int": "i4", "Byte": "u1", "Bool": "?"}
NAMES = {  # all that a pickle may name, and what it gets for it
    "collections OrderedDict": _ordered_dict,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch.nn.parameter Parameter": _parameter,
    **{f"torch {kind}{what}": np.dtype(code) for kind, code in DTYPES.items() for what in ("Storage", "Tensor")},
}


def _named(name):
    if name not in NAMES:
        raise ValueError(f"it asks for {name!r:.80}, which this program does not read")
    return NAMES[name]


PUSHED = {  # the instructions that only put a value on the stack, and how it comes of their argument
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"), lambda x: x),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING"), lambda x: x.encode("latin-1").decode()),  # Python 2's bytes
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {},
    "GLOBAL": _named,
}


def _unpickle(stream, opcodes, storage=None):
    """Run the pickle that comes next in a stream: its value.

    opcodes: an iterator that ends when there were too many. storage: what makes a value of a persistent id.
    """
    stack, marks, memo, start = [], [], {}, stream.tell()

    def above(mark):
        items = stack[mark:]
        del stack[mark:]
        return items

    for (opcode, argument, _), _ in zip(pickletools.genops(stream), opcodes, strict=False):
        if stream.tell() - start > MAX_PICKLE:
            raise ValueError(f"it has a pickle of more than {MAX_PICKLE} bytes")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case name if name in PUSHED:
                stack.append(PUSHED[name](argument))
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(above(marks.pop())))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(above(-int(opcode.name[-1]))))
            case "APPEND" | "APPENDS":
                items = above(-1 if opcode.name == "APPEND" else marks.pop())
                _need(stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = above(-2 if opcode.name == "SETITEM" else marks.pop())
                _fill(stack[-1], zip(items[::2], items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if argument is None else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "STACK_GLOBAL":
                stack.append(_named(" ".join(above(-2))))
            case "REDUCE":  # a call, and the only functions that can lie on this stack are those in NAMES
                function, arguments = above(-2)
                stack.append(function(*_need(arguments, tuple)))
            case "BUILD":  # more attributes: a dict's versions of modules, an old Parameter's three flags
                state = stack.pop()
                if type(stack[-1]) is not dict and len(_need(state, tuple)) != 3:
                    raise ValueError("it changes a tensor after it was made")
            case "BINPERSID":
                stack.append(storage(stack.pop()))
            case "STOP":
                (value,) = stack
                return value
            case _:
                raise ValueError(f"it contains {opcode.name}, which no state dict needs")
    raise ValueError(f"it takes more than {MAX_OPCODES} instructions")
