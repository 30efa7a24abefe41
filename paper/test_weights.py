"""The promises of paper/weights.py, as properties: python -m pytest paper/test_weights.py

Files are made here, instruction by instruction, so that nothing but NumPy is needed, and so that they can be wrong. Where
PyTorch is installed, it writes files for the reader, too, and reads those made here.
"""

import contextlib
import copy
import io
import math
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
from typing import Any, NamedTuple

import test_transgan as base

import numpy as np  # isort: skip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import UserError
from paper import weights
from paper.weights import read_weights
from store.support import fuzz, fuzzed, one_line_at_most

# --- 1. Making files --------------------------------------------------------------------------------------------------

COMMON = {"deadline": None, "derandomize": bool(os.environ.get("CI"))}
KINDS = {"f4": "Float", "f8": "Double", "f2": "Half", "i8": "Long", "i4": "Int", "u1": "Byte", "b1": "Bool"}
MAGIC = 0x1950A86A20F9469CFC6C


class Raw(bytes):
    """Instructions, as they are."""


class Name(str):
    """A function or class: "module name"."""


class Call(NamedTuple):
    function: Any
    arguments: Any = ()


class Persistent(NamedTuple):
    identity: Any


def code(value):
    """The instructions that put a value on the stack."""
    match value:
        case Raw():
            return value
        case Name():
            return b"c" + "\n".join(value.split(" ")).encode() + b"\n"
        case Call():
            return code(value.function) + code(value.arguments) + b"R"
        case Persistent():
            return code(value.identity) + b"Q"
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case None | True | False:
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case int():
            size = value.bit_length() // 8 + 1
            return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
        case tuple():
            return b"(" + b"".join(code(x) for x in value) + b"t"
        case list():
            return b"](" + b"".join(code(x) for x in value) + b"e"
        case dict():
            return b"}(" + b"".join(code(x) for item in value.items() for x in item) + b"u"
    raise TypeError(value)


def pickled(value):
    return b"\x80\x02" + code(value) + b"."


class Look(NamedTuple):
    """How a tensor looks at the storage of this key."""

    key: str
    offset: int
    shape: tuple
    strides: tuple


def storage(array, key="0", *view, count=None):
    """What stands for a storage; view: nothing in the zip format; in the older one None, or (key, first, count)."""
    kind = Name(f"torch {KINDS[array.dtype.str[1:]]}Storage")
    return Persistent(("storage", kind, key, "cpu", array.size if count is None else count, *view))


def tensor(stored, offset, shape, strides, *more):
    arguments = (stored, offset, shape, strides, False, Call(Name("collections OrderedDict")), *more)
    return Call(Name("torch._utils _rebuild_tensor_v2"), arguments)


def state(storages, looks, *view):
    return {name: tensor(storage(storages[x.key], x.key, *view), *x[1:]) for name, x in looks.items()}


def zip_file(content, storages, **members):
    """A file of today's format around a pickle's value, or the bytes of one."""
    content = content if type(content) is bytes else pickled(content)
    raw = {f"data/{key}": x.tobytes() for key, x in storages.items()}
    members = {"data.pkl": content, "version": b"3\n", **raw, **members}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, member in members.items():
            archive.writestr(f"a name/{name}", member)
    return out.getvalue()


def row_file(value, storages, keys=None, version=1001, magic=MAGIC):
    """A file of the format before that: pickles in a row."""
    keys = sorted(storages) if keys is None else keys
    values = magic, version, {"little_endian": True}, value, keys
    return b"".join(map(pickled, values)) + b"".join(block(storages[x]) for x in storages)


def block(array, count=None):
    return struct.pack("<q", array.size if count is None else count) + array.tobytes()


def any_file(form, storages, looks):
    if form == "row":
        return row_file(state(storages, looks, None), storages)
    return zip_file(state(storages, looks), storages)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("weights") / "x.pth"


def reading(path, content):
    path.write_bytes(content)
    return read_weights(path)


def same(got, expected):
    """Whether two dicts hold the same arrays under the same names, in the same order, to the bit."""
    arrays = [[(name, x.dtype, x.shape, x.tobytes()) for name, x in many.items()] for many in (got, expected)]
    return arrays[0] == arrays[1]


# --- 2. Right files ---------------------------------------------------------------------------------------------------


@st.composite
def views(draw):
    """Storages by key, tensors that look at them, and the arrays that these are."""
    storages, looks, arrays = {}, {}, {}
    for i in range(draw(st.integers(1, 3))):
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        dtype = np.dtype(draw(st.sampled_from(list(KINDS))))
        spare = draw(st.integers(0, 3))
        content = draw(st.randoms(use_true_random=False)).randbytes((math.prod(shape) + spare) * dtype.itemsize)
        numbers = np.frombuffer(content, "u1")
        storages[str(i)] = whole = (numbers & 1 if dtype.kind == "b" else numbers).view(dtype)
        for _ in range(draw(st.integers(1, 3))):
            array = whole[spare:].reshape(shape).transpose(draw(st.permutations(range(len(shape)))))
            array = array[(*(slice(draw(st.integers(0, 2)), None, draw(st.integers(1, 3))) for _ in shape), ...)]
            address = array.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
            strides = tuple(x // dtype.itemsize for x in array.strides)
            name = f"layer.{len(looks)} é"
            looks[name] = Look(str(i), address // dtype.itemsize, array.shape, strides)
            arrays[name] = array
    return storages, looks, arrays


FORMS = ["zip", "row"]


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60, **COMMON)
@given(case=views())
def test_tensors_of_every_dtype_and_view_in_every_format(path, form, case):
    storages, looks, arrays = case
    got = reading(path, any_file(form, storages, looks))
    assert same(got, arrays)
    for x in got.values():
        assert type(x) is np.ndarray and x.flags.c_contiguous and x.flags.writeable and x.flags.owndata


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=30, **COMMON)
@given(case=views())
def test_torch_reads_these_files_alike(path, form, case):
    torch = pytest.importorskip("torch")
    storages, looks, arrays = case
    path.write_bytes(any_file(form, storages, looks))
    assert same({name: x.numpy() for name, x in torch.load(path, weights_only=False).items()}, arrays)


NUMBERS = np.arange(12, dtype="f4")
STORAGES = {"0": NUMBERS}
WHERE = 2, (2, 3), (5, 1)  # the offset, the shape and the strides of ODD
ODD = np.array([[2, 3, 4], [7, 8, 9]], "f4")
ORDERED = Name("collections OrderedDict")
NEW, OLD = tensor(storage(NUMBERS), *WHERE), tensor(storage(NUMBERS, "0", None), *WHERE)


def odd_files():
    """Files that hold ODD, and something that only some versions of PyTorch and Python wrote."""
    versions = {"_metadata": Call(ORDERED, ([["", {"version": 1}]],))}
    yield "versions of modules", zip_file(Raw(code(Call(ORDERED)) + code({"w": NEW})[1:] + code(versions) + b"b"), STORAGES)
    yield "one item alone", zip_file(Raw(b"}" + code("w") + code(NEW) + b"s"), STORAGES)
    yield "a dict of Python 2", row_file(Call(ORDERED, ([["w", OLD]],)), STORAGES)
    yield "appended alone", row_file(Call(ORDERED, ([Raw(b"]" + code("w") + b"a" + code(OLD) + b"a")],)), STORAGES)
    yield "text of Python 2", row_file({Raw(b"U\x01w"): OLD}, STORAGES)
    yield "long text of Python 2", row_file({Raw(b"T\x01\0\0\0w"): OLD}, STORAGES)
    old = Call(Name("torch._utils _rebuild_tensor"), OLD.arguments[:4])
    yield "fewer arguments", row_file({"w": old}, STORAGES)
    yield "more arguments", zip_file({"w": Call(NEW.function, (*NEW.arguments, {}))}, STORAGES)
    yield "parameter", zip_file({"w": Call(Name("torch._utils _rebuild_parameter"), (NEW, True, {}))}, STORAGES)
    parameter = code(Call(Name("torch.nn.parameter Parameter"), (OLD,))) + code((False, False, {})) + b"b"
    yield "old parameter", row_file({"w": Raw(parameter)}, STORAGES)
    yield "view", row_file({"w": tensor(storage(NUMBERS, "0", ("1", 1, 9)), 1, *WHERE[1:])}, STORAGES)
    yield "little", zip_file({"w": NEW}, STORAGES, byteorder=b"little")
    yield "big", zip_file({"w": NEW}, {"0": NUMBERS.astype(">f4")}, byteorder=b"big")
    begin = b"\x80\x04\x95" + bytes(8) + b"\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x94\x93\x94)R\x94\x8c\x01w\x94"
    new = Call(NEW.function, (*NEW.arguments[:5], Raw(b"h\x02)R")))  # the place of OrderedDict in the memo
    yield (
        "protocol 4",
        zip_file(begin.replace(bytes(8), struct.pack("<Q", len(begin + code(new)) - 9)) + code(new) + b"s.", STORAGES),
    )
    yield "no end", row_file({"w": OLD}, STORAGES) + b"more"


ODD_FILES = dict(odd_files())


@pytest.mark.parametrize("name", ODD_FILES)
def test_what_only_some_versions_wrote(path, name):
    assert same(reading(path, ODD_FILES[name]), {"w": ODD})


@pytest.mark.parametrize("name", ODD_FILES)
def test_torch_reads_what_only_some_versions_wrote(path, name):
    torch = pytest.importorskip("torch")
    path.write_bytes(ODD_FILES[name])
    assert same({key: x.detach().numpy() for key, x in torch.load(path, weights_only=False).items()}, {"w": ODD})


def test_views_of_one_storage_under_names_of_python_2(path):
    first, second = (tensor(storage(NUMBERS, "0", view), 0, (3,), (1,)) for view in (("1", 0, 3), ("2", 5, 7)))
    content = row_file({Raw(b"U\x02\xc3\xa9"): first, Raw(b"T\x03\0\0\0\xe2\x82\xac"): second, "w": OLD}, STORAGES)
    assert same(reading(path, content), {"é": NUMBERS[:3], "€": NUMBERS[5:8], "w": ODD})


def torch_tensors(torch, numbers):
    """One state dict with all that a tensor may be; numbers: 24 random ones."""
    base = torch.from_numpy(numbers).reshape(2, 3, 4)
    types = (torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)
    yield from ((str(dtype), base.to(dtype)) for dtype in types)
    yield from (("scalar", base[1, 2, 3]), ("number", torch.tensor(5)), ("empty", base[:, 3:]), ("none", torch.empty(0)))
    yield from (
        ("transposed", base.permute(2, 0, 1)),
        ("sliced", base[1:, ::2, 1:]),
        ("again", base),
        ("flat", base.view(-1)),
    )
    yield from (("repeated", base[:1, :1].expand(3, 2, 4)), ("diagonal", base[0].diagonal()), ("beyond", base[2:, 1:, 3:]))
    yield from (("parameter", torch.nn.Parameter(base[0])), ("frozen", torch.nn.Parameter(base[1].T, requires_grad=False)))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@settings(max_examples=5, **COMMON)
@given(numbers=st.lists(st.floats(-60, 60), min_size=24, max_size=24))
def test_what_torch_writes(path, zipped, protocol, numbers):
    torch = pytest.importorskip("torch")
    content = dict(torch_tensors(torch, np.array(numbers)))
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert same(read_weights(path), {name: x.detach().numpy() for name, x in content.items()})


@pytest.mark.parametrize("zipped", [True, False])
def test_a_network_that_torch_writes(path, zipped):
    torch = pytest.importorskip("torch")
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    network[2].weight.data = network[0].weight.data[:2, :, 0, 0].T  # a view of another's storage
    content = network.state_dict(keep_vars=True)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert content._metadata and same(read_weights(path), {name: x.detach().numpy() for name, x in content.items()})


@pytest.mark.parametrize("what", ["bfloat16", "network", "negated", "sparse", "mapping", "number"])
def test_what_torch_writes_that_is_not_read(path, what):
    torch = pytest.importorskip("torch")
    x = torch.ones(2, 2)
    content, message = {
        "bfloat16": ({"w": x.bfloat16()}, "'torch BFloat16Storage'"),
        "network": (torch.nn.Linear(2, 2), "'torch.nn.modules.linear Linear'"),
        "negated": ({"w": torch._neg_view(x)}, "signs"),
        "sparse": ({"w": x.to_sparse()}, "'torch._utils _rebuild_sparse_tensor'"),
        "mapping": ({"state_dict": {"w": x}}, "its 'state_dict' is no tensor"),
        "number": ({"w": x, "epoch": 3}, "its 'epoch' is no tensor"),
    }[what]
    torch.save(content, path)
    with pytest.raises(UserError, match=message):
        read_weights(path)


# --- 3. Hostile files -------------------------------------------------------------------------------------------------


def refused(path, content, message):
    """Read what must be refused in one line, soon, and without much memory."""
    path.write_bytes(content)
    began = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message) as caught:
            read_weights(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    assert text.startswith(f"cannot read weights from {path}: ")
    assert text.endswith("; name another file, or fetch it anew")
    assert len(text.splitlines()) == 1 and len(text) < len(str(path)) + 300
    assert peak < 4 * len(content) + (24 << 20) and time.perf_counter() - began < 10


ANY = None
DOUBLED = Raw(b")q\x00" + b"h\x00\x86q\x00" * 60)  # a tuple of 2^60 ends, which takes for ever to compare or to print
NESTED = Raw(b")" + b"\x85" * 150_000)  # one that is too deep to be hashed in C, which crashes


def write(form, value):
    return zip_file(value, STORAGES) if form == "zip" else row_file(value, STORAGES)


@pytest.mark.parametrize("form", ["zip", "row"])
def test_tuples_that_double(path, form):
    good = NEW if form == "zip" else OLD
    identity = good.arguments[0].identity
    for i in range(3):  # but not device and count, which nobody looks at
        wrong = Persistent((*identity[:i], DOUBLED, *identity[i + 1 :]))
        refused(path, write(form, {"w": tensor(wrong, *WHERE)}), ANY)
    for i in range(4):
        arguments = (*good.arguments[:i], DOUBLED, *good.arguments[i + 1 :])
        refused(path, write(form, {"w": Call(good.function, arguments)}), ANY)
    for value in (DOUBLED, {"w": DOUBLED}, {DOUBLED: good}, Persistent(DOUBLED), Raw(DOUBLED + DOUBLED + b"\x93")):
        refused(path, write(form, value), ANY)
    for function in (DOUBLED, ORDERED, Name("torch._utils _rebuild_parameter")):
        refused(path, write(form, Call(function, DOUBLED)), ANY)
        refused(path, write(form, Call(function, (DOUBLED,))), ANY)
    for wrong in (Raw(code(good) + DOUBLED + b"b"), tensor(good.arguments[0], 2, (DOUBLED, 3), (5, 1))):
        refused(path, write(form, {"w": wrong}), ANY)


def test_tuples_that_double_in_other_places(path):
    good = {"w": OLD}
    refused(path, row_file(good, STORAGES, magic=DOUBLED), "does not begin")
    refused(path, row_file(good, STORAGES, version=DOUBLED), "does not begin")
    refused(path, row_file(good, STORAGES, keys=DOUBLED), ANY)
    refused(path, row_file(good, STORAGES, keys=[DOUBLED, DOUBLED]), "tuple where str")


def test_tuples_that_are_too_deep(path):
    for content in (
        zip_file({NESTED: NEW}, STORAGES),
        zip_file({"w": tensor(storage(NUMBERS, NESTED), *WHERE)}, STORAGES),
        row_file({"w": OLD}, STORAGES, keys=[NESTED]),
    ):
        with pytest.raises(UserError, match="tuple where"):
            reading(path, content)


def hostile_tensors():
    """What a tensor may say that is wrong: its storage, offset, shape, strides; and what is to be said of it."""
    yield storage(NUMBERS), 2, (2, 3), (5, 6), "beyond its storage"
    yield storage(NUMBERS), 5, (2, 3), (5, 1), "beyond its storage"
    yield storage(NUMBERS), 12, (), (), "beyond its storage"
    yield storage(NUMBERS), 2**63, (), (), "beyond its storage"
    yield storage(NUMBERS), 0, (13,), (1,), "beyond its storage"
    yield storage(NUMBERS), 0, (2**62, 2**62), (1, 1), "beyond its storage"
    yield storage(NUMBERS), 0, (2,), (2**1000,), "beyond its storage"
    yield storage(NUMBERS.view("u1")), 0, (5,), (2**62,), "beyond its storage"  # 2^64, for which a C program has 0
    yield storage(NUMBERS), -1, (3,), (1,), "no whole numbers"
    yield storage(NUMBERS), 0, (-3,), (1,), "no whole numbers"
    yield storage(NUMBERS), 11, (2,), (-1,), "no whole numbers"
    yield storage(NUMBERS), 0, (0, -3), (1, 1), "no whole numbers"
    yield storage(NUMBERS), -1, (0,), (1,), "no whole numbers"
    yield storage(NUMBERS), True, (3,), (1,), "no whole numbers"
    yield storage(NUMBERS), None, (3,), (1,), "no whole numbers"
    yield storage(NUMBERS), 0, (True,), (1,), "no whole numbers"
    yield storage(NUMBERS), 0, ("3",), (1,), "no whole numbers"
    yield storage(NUMBERS), 0, [3], (1,), "list where tuple"
    yield storage(NUMBERS), 0, 3, (1,), "int where tuple"
    yield storage(NUMBERS), 0, (3,), (1, 1), ANY
    yield storage(NUMBERS), 0, (1,) * 65, (1,) * 65, ANY
    yield storage(NUMBERS), 0, (1,) * 90_000, (1,) * 90_000, ANY
    yield storage(NUMBERS), 0, (10**9,), (0,), "far larger than the file"
    yield storage(NUMBERS), 0, (2**62, 2**62), (0, 0), ANY
    yield storage(NUMBERS), 0, (2**70, 0), (1, 1), ANY
    yield None, 0, (3,), (1,), "NoneType where _Storage"
    yield NEW, 0, (3,), (1,), "_Tensor where _Storage"
    yield storage(NUMBERS, count=13), 12, (), (), "beyond its storage"
    yield storage(NUMBERS, count=2**62), 0, (2**62,), (1,), "beyond its storage"
    yield storage(NUMBERS, 0), 0, (), (), "int where str"
    yield storage(NUMBERS, "1"), 0, (), (), "data/1"
    yield storage(NUMBERS, "../data.pkl"), 0, (), (), "data/../data.pkl"
    yield storage(NUMBERS, "0", ("1", -1, 7)), 0, (3,), (1,), "no whole numbers"
    yield storage(NUMBERS, "0", ("1", 6, 7)), 4, (3,), (1,), "beyond its storage"
    yield storage(NUMBERS, "0", ("1",)), 0, (3,), (1,), ANY
    yield Persistent(("module", *storage(NUMBERS).identity[1:])), 0, (3,), (1,), "something else"
    yield Persistent(("storage", Name("collections OrderedDict"), "0", "cpu", 12)), 0, (3,), (1,), "something else"
    yield Persistent(("storage", "torch FloatStorage", "0", "cpu", 12)), 0, (3,), (1,), "something else"
    yield Persistent("0"), 0, (3,), (1,), "str where tuple"


@pytest.mark.parametrize("case", list(hostile_tensors()), ids=lambda case: str(case[1:])[:60])
def test_tensors_that_are_not_what_they_say(path, case):
    refused(path, zip_file({"w": tensor(*case[:4])}, STORAGES), case[4])
    assert same(reading(path, zip_file({"w": NEW}, STORAGES)), {"w": ODD})


def hostile_pickles():
    before = b"\x80\x02"
    yield Raw(b""), ANY
    yield [NEW], "list where _StateDict"
    yield NEW, "_Tensor where _StateDict"
    yield {"w": storage(NUMBERS)}, "its 'w' is no tensor"
    yield {"w": None}, "its 'w' is no tensor"
    yield {"w": {"v": NEW}}, "its 'w' is no tensor"
    yield {3: NEW}, "int where str"
    yield Call(ORDERED, ((("w", NEW),),)), "tuple where list"
    many = code([(f"{i}", None) for i in range(2000)]) + b"q\0"
    yield Raw(many + (code(ORDERED) + b"h\0\x85R") * 1000 + code(None)), "NoneType"  # two million entries
    yield Raw(b"}(" + code("w") + b"u"), ANY
    yield Raw(b"]" + code("w") + code(NEW) + b"s"), ANY
    yield Raw(b"}" + code("w") + b"a"), ANY
    yield {"w" * 1000 + "\n" + "w": 3}, "is no tensor"
    yield {"\n": 3}, r"its '\\n' is no tensor"
    yield {"w": Raw(code(NEW) + code((storage(NUMBERS), 0, (2,), (1,))) + b"b")}, "changes a tensor"
    yield {"w": Call(NEW.function, (*NEW.arguments, {"neg": True}))}, "signs"
    yield {"w": Call(NEW.function, (*NEW.arguments, {}, {}))}, ANY
    yield {"w": Call(NEW.function)}, ANY
    yield {"w": Call("torch._utils _rebuild_tensor_v2", NEW.arguments)}, ANY
    yield {"w": Call(Name("torch FloatStorage"), (3,))}, ANY
    yield {"w": Call(Name("torch.nn.parameter Parameter"), (3,))}, "int where _Tensor"
    yield Raw(b"h\x05"), ANY
    yield Raw(b"q\x05"), ANY
    yield Raw(b"t"), ANY
    yield Raw(b"(" * 250_000), ANY
    yield {"w" * (1 << 20): NEW}, ANY
    yield Raw(b"X\xff\xff\xff\x7f"), ANY
    yield Raw(b"X\xff\xff\xff\xff"), ANY
    yield Raw(b"\x8d" + b"\xff" * 7 + b"\x7f"), ANY
    yield Raw(b"\x8b\xff\xff\xff\x7f"), ANY
    yield Raw(b"\x8a\xff1"), ANY
    yield Raw(b"\x96" + b"\xff" * 8), ANY
    yield Raw(b"I" + b"9" * 900_000 + b"\n"), ANY
    yield Raw(b"L" + b"9" * 900_000 + b"L\n"), ANY
    yield Raw(b"X\x01\0\0\0\xff"), ANY
    yield Raw(b"U\x01\xff"), ANY
    yield {"w": Name("torch BFloat16Storage")}, "asks for 'torch BFloat16Storage'"
    yield {"w": Name("torch " + 1000 * "x")}, "asks for 'torch xxx"
    yield Raw(b"c" + b"x\xff\n\xffy\n"), ANY
    yield Raw(code("os") + code(3) + b"\x93"), ANY
    others = b"02", b"(0", b"1", b"l", b"d", b"\x8f", b"\x82\x01", b"\x8b\1\0\0\0\1", b"Pname\n", b"G" + bytes(8)
    for instruction in others:
        yield Raw(b"}" + instruction), "that no state dict needs"
    yield Raw(b"\xff" + before), ANY


@pytest.mark.parametrize("case", list(hostile_pickles()), ids=lambda case: str(case)[-60:])
def test_pickles_that_are_no_state_dict(path, case):
    refused(path, zip_file(case[0], STORAGES), case[1])


def hostile_zip_files():
    good = zip_file({"w": NEW}, STORAGES)
    yield "empty", b"", "neither a zip file nor pickles"
    yield "two letters", b"PK", "not a zip file"
    yield "a web page", b"<!DOCTYPE html>", "neither a zip file nor pickles"
    yield "a tar file", b"storages".ljust(257, b"\0") + b"ustar", "neither a zip file nor pickles"
    yield "byte order", zip_file({"w": NEW}, STORAGES, byteorder=b"middle"), "middle"
    yield "no storage", zip_file({"w": NEW}, {}), "no item named 'a name/data/0'"
    yield "a smaller storage", zip_file({"w": NEW}, {"0": NUMBERS[:9]}), "beyond its storage"
    yield "no pickle", good.replace(b"data.pkl", b"data.pk1"), "one data.pkl"
    yield "two pickles", zip_file({"w": NEW}, STORAGES, **{"more/data.pkl": b"N."}), "one data.pkl"
    yield "other numbers", good.replace(NUMBERS.tobytes(), NUMBERS[::-1].tobytes()), "CRC"
    yield "another tensor", good.replace(code("w"), code("v")), "CRC"
    yield "members", zip_file({"w": NEW}, STORAGES, **{f"data/x{i}": b"" for i in range(5001)}), "more than 5000 members"
    for name, at, change, message in (
        ("locked", 8, b"\1\0", "encrypted"),
        ("compressed", 10, b"\x08\0", "claims more"),
        ("both sizes", 20, b"\xff\xff\xff\x7f\xff\xff\xff\x7f", "claims more"),
        ("its size", 24, b"\xff\xff\xff\x7f", "claims more"),
        ("its place", 42, b"\xff\xff\xff\x7f", ANY),
    ):
        entry = good.index(b"PK\1\2") + at
        yield name, good[:entry] + change + good[entry + len(change) :], message


def hostile_rows():
    good = row_file({"w": OLD}, STORAGES)
    yield "magic number", row_file({"w": OLD}, STORAGES, magic=MAGIC + 1), "does not begin"
    yield "version", row_file({"w": OLD}, STORAGES, version=1002), "does not begin"
    yield "one pickle", pickled(MAGIC), "EOFError"
    yield "no key", row_file({"w": OLD}, STORAGES, keys=[]), ANY
    yield "another key", row_file({"w": OLD}, STORAGES, keys=["1"]), ANY
    yield "a key twice", row_file({"w": OLD}, STORAGES, keys=["0", "0"]), ANY
    yield "a key more", row_file({"w": OLD}, STORAGES, keys=["0", "1"]), ANY
    yield "a number as key", row_file({"w": OLD}, STORAGES, keys=[0]), "int where str"
    yield "a byte less", good[:-1], "ends within a storage"
    yield "a count of more", good.replace(block(NUMBERS), block(NUMBERS, 13)), "ends within a storage"
    yield "a count of less", good.replace(block(NUMBERS), block(NUMBERS, 9)), "beyond its storage"
    yield "a negative count", good.replace(block(NUMBERS), block(NUMBERS, -12)), "ends within a storage"
    claim = row_file({"w": tensor(storage(NUMBERS, "0", None, count=2**62), 0, (2**62,), (1,))}, STORAGES)
    yield "a huge count", claim.replace(block(NUMBERS), block(NUMBERS, 2**62)), "ends within a storage"
    yield "a large pickle", row_file({"w" * (1 << 20): OLD}, STORAGES), ANY
    view = row_file({"w": tensor(storage(NUMBERS, "0", ("1", 6, 7)), 4, (3,), (1,))}, STORAGES)
    yield "a view", view, "beyond its storage"


HOSTILE = [*hostile_zip_files(), *hostile_rows()]


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case[0])
def test_files_that_are_not_as_they_should_be(path, case):
    refused(path, *case[1:])


def test_members_that_lie_on_one_another(path):
    """A thousand members that are all the same megabyte."""
    numbers, out = np.zeros(1 << 20, "u1"), io.BytesIO()
    value = {f"w{i}": tensor(storage(numbers, str(i)), 0, (1,), (1,)) for i in range(1000)}
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("x/data.pkl", pickled(value))
        archive.writestr("x/data/0", numbers.tobytes())
        for i in range(1, 1000):
            archive.filelist.append(copy.copy(archive.getinfo("x/data/0")))
            archive.filelist[-1].filename = f"x/data/{i}"
    refused(path, out.getvalue(), "claims more")


def test_many_bytes_in_many_pickles(path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_PICKLED", 500)
    long = Raw(b"N" + b"\x85" * 200)
    refused(path, row_file(long, {}, magic=MAGIC, version=long), "does not begin|where _StateDict")
    refused(path, row_file(long, {}, magic=long, version=long), "EOFError")


@pytest.mark.parametrize("form", FORMS)
def test_how_often_a_storage_may_be_repeated(path, form):
    numbers = {"0": np.arange(200_000).astype("u1")}
    for count in (4, 5):
        looks = {f"w{i}": Look("0", 0, (200_000,), (1,)) for i in range(count)}
        content = any_file(form, numbers, looks)
        if count == 4:
            assert same(reading(path, content), dict.fromkeys(looks, numbers["0"]))
        else:
            refused(path, content, "far larger than the file")


def test_whatever_python_says_becomes_one_line(path, monkeypatch):
    def fail(self):
        raise ZeroDivisionError("two" + 1000 * " long" + "\nlines")

    monkeypatch.setattr(weights._Pickles, "load", fail)
    refused(path, zip_file({}, {}), "two long")


def test_a_place_in_the_memo_costs_nothing(path):
    value = Raw(b"}" + code("w") + b"r\xff\xff\xff\x7f" + code(NEW) + b"s")
    tracemalloc.start()
    try:
        assert same(reading(path, zip_file(value, STORAGES)), {"w": ODD})
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_damaged_bool_is_true(path):
    numbers = np.arange(3, dtype="u1").view("?")
    got = reading(path, zip_file({"w": tensor(storage(numbers), 0, (3,), (1,))}, {"0": numbers}))
    assert got["w"].view("u1").tolist() == [0, 1, 1]


@pytest.mark.parametrize("form", FORMS)
def test_no_tensors_at_all(path, form):
    assert reading(path, any_file(form, {}, {})) == {}


def test_what_is_no_file(path, tmp_path, monkeypatch):
    for wrong, message in (
        (tmp_path / "missing.pth", "cannot read weights from .*missing.pth: No such file or directory; .*fetch it anew"),
        (tmp_path, "not a plain file"),
        (tmp_path / "nul\0.pth", "null"),
    ):
        with pytest.raises(UserError, match=message):
            read_weights(wrong)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        for wrong in (str(tmp_path / "pipe"), "/dev/zero"):
            with pytest.raises(UserError, match="not a plain file"):
                read_weights(wrong)
    content = zip_file({"w": NEW}, STORAGES)
    monkeypatch.setattr(weights, "MAX_FILE", len(content))
    assert same(reading(path, content), {"w": ODD})
    refused(path, content + b"x", f"a plain file of at most {len(content)} bytes")


class Command:
    """An object whose pickle asks for a function to be called with an argument."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


def commands(folder):
    """Pickles that make a folder when they are read by pickle.loads."""
    folder = str(folder)
    for protocol in range(6):
        for function, argument in (
            (os.mkdir, folder),
            (os.system, f"mkdir {folder}"),
            (eval, f"__import__('os').mkdir({folder!r})"),
        ):
            for wrap in (lambda x: x, lambda x: {"w": x}, lambda x: {x: 3}):
                yield pickle.dumps(wrap(Command(function, argument)), protocol)
    argument = code(folder)
    yield b"\x80\x02(" + argument + b"ios\nmkdir\n."  # INST
    yield b"\x80\x02(cos\nmkdir\n" + argument + b"o."  # OBJ
    yield b"\x80\x02" + code("os") + code("mkdir") + b"\x93" + code((folder,)) + b"R."
    yield (
        b"\x80\x02cbuiltins\ngetattr\n" + code((Name("os path"), "os")) + b"R" + b"0cos\nmkdir\n" + code((folder,)) + b"R."
    )


def test_files_that_ask_for_code_run_nothing(path, tmp_path):
    ran = tmp_path / "ran"
    for content in commands(ran):
        with contextlib.suppress(TypeError):  # None, of a call, cannot have items
            pickle.loads(content)
        ran.rmdir()  # so it can run
        row = row_file({}, {})
        for file in (
            content,
            zip_file(content, {}),
            row.replace(pickled({}), content),
            row.replace(pickled(MAGIC), content),
        ):
            with pytest.raises(UserError, match="asks for|that no state dict needs|neither a zip file nor pickles"):
                reading(path, file)
            assert not ran.exists()


# --- 4. Damaged files -------------------------------------------------------------------------------------------------

SMALL = {"0": np.arange(6, dtype="f4"), "1": np.arange(2, dtype="i8")}
LOOKS = {"a": Look("0", 1, (2, 2), (3, 1)), "b": Look("1", 0, (), ()), "c": Look("0", 0, (6,), (1,))}


def survives(path, content):
    """Read a file that may be damaged: only UserError may come of it, or arrays that are not too large."""
    with one_line_at_most():
        got = reading(path, content)
        assert all(type(name) is str and type(x) is np.ndarray for name, x in got.items())
        assert sum(x.nbytes for x in got.values()) <= 4 * len(content)
        return True
    return False


@fuzz(300)
@given(seed=base.seeds)
def test_fuzzed_pickles_only_ever_raise_our_own_error(path, seed):
    survives(path, zip_file(fuzzed(pickled(state(SMALL, LOOKS)), seed), SMALL))


@pytest.mark.parametrize("form", FORMS)
@fuzz(150)
@given(seed=base.seeds)
def test_fuzzed_files_only_ever_raise_our_own_error(path, form, seed):
    survives(path, fuzzed(any_file(form, SMALL, LOOKS), seed))


@pytest.mark.parametrize("form", FORMS)
def test_files_that_end_early(path, form):
    content = any_file(form, SMALL, LOOKS)
    assert survives(path, content)
    assert not any(survives(path, content[:cut]) for cut in range(0, len(content), 3))
