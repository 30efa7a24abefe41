"""The weights in a PyTorch file, read without PyTorch and without running what the file says.

The story of this chapter: `torch.save` writes a state dict, which names tensors, in two parts. The *storages* are plain
numbers, each in as many bytes as its type takes. The rest is a pickle, a program for a small machine with a stack, and most
of what it says is "look for the function of this name and call it". Python's own unpickler does so, whatever the function,
so a file from the network could run anything. Here it is left the instructions that a state dict needs, and for a few names
it gets functions of ours. All they make is a description: which storage each tensor looks at, and how. That is held against
the storages before a single array is made.

The tar files of before are older than FID, and PyTorch refuses them, too, unless it may run what they say. Whatever is
wrong with a file is a ValueError, or what Python happens to raise, until read_weights makes it a UserError.
"""

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import UserError, first_line

# --- 1. Reading -------------------------------------------------------------------------------------------------------

MAX_FILE = 1 << 30  # bytes; the weights of the Inception network take 95 MB
MAX_PICKLED = 1 << 20  # bytes of all pickles that are looked at; each tensor takes about 200
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
        tensors, raw, order = _read_zip(content) if content[:2] == b"PK" else _read_pickles(content)
        views = {name: _view(x, raw, order) for name, x in tensors.items()}
        if sum(x.nbytes for x in views.values()) > MAX_COPIES * len(content):
            raise ValueError("its tensors are far larger than the file")
        return {name: x.astype(tensors[name].storage.dtype, order="C") for name, x in views.items()}
    except Exception as error:  # a damaged file can raise anything at all
        reason = getattr(error, "strerror", None) or first_line(error)[:200]
        raise UserError(f"cannot read weights from {path}: {reason}; name another file, or fetch it anew") from None


# --- 2. Two formats ---------------------------------------------------------------------------------------------------
# Each function takes a file's bytes and returns its tensors' descriptions by name, the bytes of each storage by key, and
# the order of the bytes in a number, "<" or ">".


def _read_zip(content):
    """The format since PyTorch 1.6: a zip file, not compressed, that holds NAME/data.pkl and NAME/data/KEY."""
    if content.count(b"PK\1\2") > MAX_MEMBERS:  # so the entry of each member begins
        raise ValueError(f"its zip file has more than {MAX_MEMBERS} members")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if any(x.compress_type for x in members) or sum(x.file_size for x in members) > len(content):
            raise ValueError("its zip file claims more than its size")
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("its zip file does not hold one data.pkl")
        top = pickles[0].removesuffix("data.pkl")
        tensors = _need_tensors(_unpickle(io.BytesIO(archive.read(pickles[0])[:MAX_PICKLED])))
        order = archive.read(top + "byteorder") if top + "byteorder" in archive.namelist() else b"little"
        keys = {x.storage.key for x in tensors.values()}
        return tensors, {key: archive.read(f"{top}data/{key}") for key in keys}, {b"little": "<", b"big": ">"}[order]


def _read_pickles(content):
    """The format before that: five pickles in a row, then the storages, each as a count and that many numbers."""
    if content[:1] != pickle.PROTO:
        raise ValueError("it is neither a zip file nor pickles, as PyTorch's files are")
    stream = io.BytesIO(content[:MAX_PICKLED])
    magic, version, _, tensors, keys = [_unpickle(stream) for _ in range(5)]
    if magic != 0x1950A86A20F9469CFC6C or version != 1001:
        raise ValueError("it does not begin as PyTorch's files do")
    dtypes = {x.storage.key: x.storage.dtype for x in _need_tensors(tensors).values()}
    rest = io.BytesIO(content)
    rest.seek(stream.tell())
    return tensors, {key: _counted(rest, dtypes[_need(key, str)]) for key in keys}, "<"


def _counted(stream, dtype):
    """The bytes of the storage that comes next, a count and that many numbers."""
    (count,) = struct.unpack("<q", stream.read(8))
    size = count * dtype.itemsize
    if len(block := stream.read(min(size, MAX_FILE))) != size:
        raise ValueError("it ends within a storage")
    return block


# --- 3. Storages, tensors ---------------------------------------------------------------------------------------------
# Arguments come from the pickle and may be anything. Tuples can hold one another so that to compare, hash or print one
# takes for ever or overflows C's stack: ask what a value is before anything else.


class _Storage(NamedTuple):
    """The numbers that a storage holds under its key, from number `first` on."""

    key: str
    dtype: np.dtype
    first: int


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


def _need_tensors(value):
    """`value`, if it is a state dict. Raises ValueError."""
    for name, tensor in _need(value, _StateDict).items():
        if type(tensor) is not _Tensor:
            raise ValueError(f"its {name!r:.80} is no tensor")
    return value


def _tensor(storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None):
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2, which says more. Raises ValueError."""
    if metadata:
        raise ValueError("it has a tensor whose signs are yet to be turned")
    return _Tensor(_need(storage, _Storage), offset, _need(shape, tuple), _need(strides, tuple))


def _view(tensor, raw, order):
    """The array that a tensor is, in the bytes of its storage. Raises ValueError."""
    (key, dtype, first), offset, shape, strides = tensor
    if any(type(number) is not int or number < 0 for number in (first, offset, *shape, *strides)):
        raise ValueError("it has a tensor whose place, shape or strides are no whole numbers")
    last = first + offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
    if 0 in shape:
        return np.empty(shape, dtype)
    if last >= len(raw[key]) // dtype.itemsize:  # NumPy would take a stride of 2^62 for none
        raise ValueError("it has a tensor that looks beyond its storage")
    stored = "u1" if dtype.kind == "b" else dtype.newbyteorder(order)  # a damaged bool may be 2
    return np.ndarray(shape, stored, raw[key], (first + offset) * dtype.itemsize, [dtype.itemsize * x for x in strides])


# --- 4. The pickle ----------------------------------------------------------------------------------------------------


class _StateDict(dict):
    """A dict by words alone, because to hash anything else that a pickle can make may take for ever."""

    def __setitem__(self, name, value):
        super().__setitem__(_need(name, str), value)


def _ordered_dict(items=None):
    """collections.OrderedDict, to which Python 2 gave a list of items. Taken out of it, they cannot be copied twice."""
    result = _StateDict()
    for name, value in _need(items or [], list):
        result[name] = value
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
    **{f"torch {kind}Storage": np.dtype(code) for kind, code in DTYPES.items()},
}
INSTRUCTIONS = (  # all that it may say, by the names that Python's module pickle has for them
    "PROTO FRAME STOP MARK BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 "
    "LONG1 BINUNICODE SHORT_BINUNICODE BINSTRING SHORT_BINSTRING EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND "
    "APPENDS EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID"
)
KNOWN = {getattr(pickle, name)[0] for name in INSTRUCTIONS.split()}


class _Pickles(pickle._Unpickler):  # the one in Python, whose memo is a dict, and whose instructions are in a table
    """A pickle that can make a state dict, and nothing else."""

    def persistent_load(self, identity):
        """What stands for a storage: ("storage", type, key, device, count), once also None or (key, first, count)."""
        kind, dtype, key, _, _, *view = _need(identity, tuple)
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise ValueError("it has something else where a storage belongs")
        storage = _Storage(_need(key, str), dtype, 0)
        return storage if not view or view[0] is None else storage._replace(first=_need(view[0], tuple)[1])

    def find_class(self, module, name):
        if (asked := f"{module} {name}") not in NAMES:
            raise ValueError(f"it asks for {asked!r:.80}, which this program does not read")
        return NAMES[asked]

    def make_dict(self):
        self.append(_StateDict())

    def build(self):
        """More attributes: a dict's versions of modules, or an old Parameter's three flags. Nobody needs them."""
        state = self.stack.pop()
        if type(self.stack[-1]) is not _StateDict and len(_need(state, tuple)) != 3:
            raise ValueError("it changes a tensor after it was made")

    def refuse(self):
        raise ValueError("it contains an instruction that no state dict needs")

    dispatch = dict.fromkeys(range(256), refuse)
    dispatch |= filter(lambda item: item[0] in KNOWN, pickle._Unpickler.dispatch.items())
    dispatch |= {pickle.EMPTY_DICT[0]: make_dict, pickle.BUILD[0]: build}


def _unpickle(stream):
    """The value of the pickle that comes next in a stream of bytes."""
    return _Pickles(stream, encoding="utf-8").load()
