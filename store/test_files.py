"""The promises of store/files.py: whole files, and arrays that claim no more than there is."""

import errno
import io
import json
import os
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np  # isort: skip
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import data
from data import UserError
from store import files
from store.support import files_of_at_most, holds, leftovers


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), files.whole_file(path) as part:
        part.write_text("half")
        assert path.read_text() == "before"
        raise KeyboardInterrupt
    assert (path.read_text(), leftovers(tmp_path)) == ("before", ["file"])
    with files.whole_file(path) as part:
        part.write_text("after")
    assert (path.read_text(), leftovers(tmp_path)) == ("after", ["file"])


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder"
    said = pytest.raises(UserError, match="cannot write .*folder: full; free some space")
    with said, files.being_made(path), files.whole_file(path) as part:
        part.mkdir()
        (part / "file").write_text("half")
        raise OSError(28, "full")
    assert leftovers(tmp_path) == []
    with files.whole_file(path) as part:
        part.mkdir()
        (part / "file").write_text("all")
    assert leftovers(tmp_path) == ["folder", "folder/file"]


HOLD = """
import sys, time
from pathlib import Path
from store import files
with files.belongs_to_one(Path(sys.argv[1]), "taken"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_what_belongs_to_one_process_is_free_again_when_that_ends_or_is_killed(tmp_path):
    path = tmp_path / "x.lock"
    command, root = [sys.executable, "-c", HOLD, path], Path(files.__file__).parents[1]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root)
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="^taken$"), files.belongs_to_one(path, "taken"):
            pass
        assert path.exists()  # the second has not removed the first one's
    finally:
        other.kill()
        other.communicate()
    with files.belongs_to_one(path, "taken"), pytest.raises(UserError), files.belongs_to_one(path, "taken"):
        pass
    assert leftovers(tmp_path) == []


def test_only_files_are_opened_to_be_read(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file", tmp_path / "nothing", tmp_path / "file" / "within"):
        assert files.plain(path) == path
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "link").symlink_to("/dev/zero")
        for name in ("pipe", "link"):
            with pytest.raises(OSError, match="a pipe or a device"):
                files.plain(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs another user")
def test_the_lock_of_another_users_killed_process_is_in_nobodys_way(tmp_path, monkeypatch):
    path, real = tmp_path / "x.lock", Path.open

    def opened(self, mode="r", *rest):
        if mode == "ab" and self.exists():
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, mode, *rest)

    path.touch()
    monkeypatch.setattr(Path, "open", opened)
    with files.belongs_to_one(path, "taken"), pytest.raises(UserError, match="taken"), files.belongs_to_one(path, "taken"):
        pass
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(("number", "advised"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False)])
def test_space_is_to_be_freed_where_it_is_lacking(number, advised, tmp_path):
    with pytest.raises(UserError, match="choose another --data-dir") as caught, files.writing(tmp_path / "file"):
        raise OSError(number, os.strerror(number))
    assert ("free some space" in str(caught.value)) == advised


def test_a_lock_that_its_owner_removes_in_between_is_taken_anew(tmp_path, monkeypatch):
    path, real, seen = tmp_path / "x.lock", files.lock, []

    def late(file):
        if not seen:
            path.unlink()
        seen.append(file)
        real(file)

    monkeypatch.setattr(files, "lock", late)
    with files.belongs_to_one(path, "taken"), pytest.raises(UserError), files.belongs_to_one(path, "taken"):
        pass
    assert len(seen) == 3


def test_a_file_that_its_owner_removes_meanwhile_is_no_device(tmp_path, monkeypatch):
    path, look = tmp_path / "made.lock", Path.stat
    path.touch()

    def last_look(self, **kwargs):
        found = look(self, **kwargs)
        if self == path:  # and no other, for pytest looks at its own files meanwhile
            path.unlink(missing_ok=True)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", last_look)
        files.plain(path)
    assert not os.path.lexists(path)


def test_a_grid_is_replaced_whole_or_not_at_all(tmp_path):
    path, pictures = tmp_path / "grid.png", np.random.default_rng(0).uniform(-1, 1, (4, 3, 16, 16))
    files.save_grid(pictures, path)
    data.save_grid(pictures, tmp_path / "book.png")
    before = path.read_bytes()
    assert holds(tmp_path / "book.png", before)
    with pytest.raises(OSError, match="File too large"), files_of_at_most(1000):
        files.save_grid(-pictures, path)
    assert holds(path, before)
    assert leftovers(tmp_path) == ["book.png", "grid.png"]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("flowers", "flowers"),
        ('a<b>c:d"e|f?g*h\\i', "a_b_c_d_e_f_g_h_i"),
        ("a\nb\x00", "a_b_"),
        ("v1.2", "v1.2"),
        ("ends. . ", "ends"),
        ("con", "_con"),
        ("Lpt1.jpg-S", "_Lpt1.jpg-S"),
        ("COM² .x", "_COM² .x"),
        ("console", "console"),
        ("com10", "com10"),
    ],
)
def test_names_of_files_are_such_as_any_system_takes(name, kept):
    assert files.portable(name) == kept


def test_a_fingerprint_tells_every_byte_and_shape():
    pictures = np.random.default_rng(0).integers(0, 256, (10, 3, 2, 2), dtype=np.uint8)
    first, last = pictures.copy(), pictures.copy()
    first[0, 0, 0, 0] ^= 1
    last[-1, -1, -1, -1] ^= 1
    others = [first, last, pictures[:9], pictures.reshape(10, 3, 4, 1), pictures.view(np.int8), pictures[::-1]]
    found = {files.fingerprint(x) for x in [pictures, *others]}
    assert len(found) == 1 + len(others)
    assert files.fingerprint(pictures.copy()) == files.fingerprint(pictures)
    assert files.fingerprint(pictures, first) != files.fingerprint(first, pictures)


def npz(content, compression=zipfile.ZIP_DEFLATED):
    """A zip file, open, with one member: x.npy."""
    file = zipfile.ZipFile(io.BytesIO(), "w", compression)
    file.writestr("x.npy", content)
    return file


def npy(claim, content=b""):
    """An .npy file whose header claims this shape."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": claim})
    return out.getvalue() + content


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: npz(npy((1 << 24,), bytes(1 << 26))), "claims 67108864 bytes, more than 100"),
        (lambda: npz(npy((1 << 60,))), "claims"),
        (lambda: npz(npy((-1,), bytes(8))), "claims -4"),
        (lambda: npz(npy((4,), bytes(1 << 26))), "cannot reshape|buffer size"),
        (lambda: npz(npy((4,), bytes(8))), "cannot reshape|buffer"),
        (lambda: npz(npy((4,), bytes(16)), zipfile.ZIP_BZIP2), "in a way that NumPy does not use"),
        (lambda: npz(b"\x93NUMPY\3\0" + bytes(99)), "another version"),
        (lambda: npz(npy((1,), bytes(8)).replace(b"'<f4'", b"'O'  ")), "OBJECT"),
    ],
)
def test_an_array_that_claims_too_much_is_not_read(make, message):
    with make() as file:
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match=message):
                files.read_array(file, "x", 100)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


@given(array=st.sampled_from([np.arange(6.0), np.arange(6).reshape(2, 3), np.array(3), np.arange(6.0).reshape(3, 2).T]))
def test_an_array_is_read_as_numpy_reads_it(array):
    out = io.BytesIO()
    np.savez(out, x=array)
    got = files.read_array(zipfile.ZipFile(out), "x", 100)
    assert (got.dtype, got.shape, got.tolist()) == (array.dtype, array.shape, array.tolist())


@pytest.mark.parametrize("kind", ["c8", "c16", "M8[s]", "m8[s]", "?", "U3", "S3", "V4", "f4,f4"])
def test_what_are_no_numbers_are_none(kind):
    """NumPy would drop the imaginary half, and count words, dates and truth."""
    out = io.BytesIO()
    np.savez(out, x=np.zeros(3, kind), y=np.array([1.0, np.nan]), z=np.array([-np.inf]), n=np.arange(3, dtype="u1"))
    archive = zipfile.ZipFile(out)
    with pytest.raises(ValueError, match="x holds .*, not numbers"):
        files.read_numbers(archive, "x", 100)
    for name in "yz":
        with pytest.raises(ValueError, match=f"{name} holds numbers that are not finite"):
            files.read_numbers(archive, name, 100)
    assert files.read_numbers(archive, "n", 100).tolist() == [0.0, 1.0, 2.0]


def test_a_checksum_tells_arrays_apart():
    def checksum(**arrays):
        out = io.BytesIO()
        np.savez(out, **arrays)
        return files.checksum(zipfile.ZipFile(out), "a")

    assert checksum(a1=Z, a2=Z, b=Z) == checksum(a2=Z, a1=Z, b=Z + 1) == checksum(a1=Z, a2=Z)
    assert len({checksum(a1=Z, a2=Z), checksum(a1=Z, a3=Z), checksum(a1=Z), checksum(a1=Z, a2=Z + 1)}) == 4


Z = np.zeros(3)
finite = st.floats(allow_nan=False, allow_infinity=False)
plain_json = st.recursive(st.none() | st.booleans() | st.integers(-(10**30), 10**30) | finite | st.text(),
                          lambda x: st.lists(x) | st.dictionaries(st.text(), x))  # fmt: skip


@given(value=plain_json)
def test_json_is_read_as_it_was_written(value):
    assert files.parse_json(json.dumps(value)) == value


@given(text=st.text(alphabet='[]{}",:0123456789.eE+-NaInfity \0\ud800') | st.text())
@example(text="[" * 100_000)
@example(text='{"a":' * 100_000)
@example(text="9" * 10_000)
@example(text="-1e999")
@example(text="[NaN]")
@example(text='{"a": -Infinity}')
def test_what_is_no_json_is_a_value_error(text):
    try:
        value = files.parse_json(text)
    except ValueError:
        return
    assert json.loads(json.dumps(value, allow_nan=False)) == value
