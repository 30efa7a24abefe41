"""Files that are whole, or do not appear; arrays in them that claim no more than there is."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

import data
from data import UserError

CHECKPOINTS = ("checkpoint.npz", "checkpoint-previous.npz")  # of a run's folder, the newest first
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError for which it helps to free some space


@contextlib.contextmanager
def whole_file(path, previous=None):
    """Within this context, a path to write to; what lies there appears as `path` at the end, unless something went wrong.

    That may be a folder, too. So nobody ever meets half a file, and one that was there before stays until the new one is
    whole and on the disk itself. It is then renamed to `previous`, if that is given. If all ends between the two renames,
    `previous` is the newest, and there is no `path`; links would close that gap, but not every file system has them.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        if part.is_file():
            sync(part)
        if previous and path.exists():
            path.replace(previous)
        part.replace(path)
        with contextlib.suppress(OSError):  # Windows and some network file systems cannot
            sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            remove(part)


def remove(path):
    """Remove a file, or a folder and all that is in it. Raises OSError."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def need_folder(folder, option):
    """Make a folder if it is missing, and see that it can be written to: before the work whose result it is for.

    Raises UserError, which advises another one by `option`, the command line's name for it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror}; choose another {option}") from None


@contextlib.contextmanager
def writing(path, option="--data-dir"):
    """Make the folder of `path`; an OSError within this context becomes a UserError, which advises another `option`."""
    need_folder(path.parent, option)
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error}; {'free some space, or ' * (error.errno in FULL)}choose another {option}"
        raise UserError(f"cannot write {path}: {reason}") from None


@contextlib.contextmanager
def belongs_to_one(path, refusal):
    """Within this context, whatever the lock file `path` stands for belongs to this process alone.

    Raises UserError(refusal) where another process has it, and OSError where no file can be made at `path`. The system
    drops the lock of a process however that ends: what a killed one leaves behind, an empty file, is in nobody's way. The
    context's value is whether there are locks at all: some network file systems have none, and all goes on without.
    """
    while True:
        try:
            file = plain(path).open("ab")
        except PermissionError:
            if not path.exists():
                raise
            file = path.open("rb")  # another user's; it may be locked, and removed, without the right to write in it
        try:
            sure = lock(file)
        except BlockingIOError:
            file.close()
            raise UserError(refusal) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # its last owner removed it in between: what is locked now stands for nothing
    try:
        yield sure
    finally:
        with contextlib.suppress(OSError), file:  # Windows removes no open file: there it stays, in nobody's way
            path.unlink()


# Names of what is made in a data directory, of its lock, and of what is there of it so far.
MADE = re.compile(r"(.+-[0-9a-f]{16}\.(?:pictures|npz|skipped\.txt)|cifar-10-batches-py)(\.lock|\.\d+\.part)?")


@contextlib.contextmanager
def being_made(path):
    """Within this context, this process alone makes `path` in its folder, which is made, too.

    Raises UserError, before there was any work, where another process makes it or nothing can be written there; and for
    an OSError within.
    """
    sweep(path.parent)
    refusal = f"another process is making {path}; start again when it has finished"
    with writing(path), belongs_to_one(path.with_name(f"{path.name}.lock"), refusal):
        yield


def need_space(path, size, what):
    """Raise UserError if the disk has no room for `size` bytes at `path`."""
    free = shutil.disk_usage(path.parent).free
    if size > free:
        have = f"{size / 1e6:,.0f} MB, and {path.parent} has {free / 1e6:,.0f}"
        raise UserError(f"{what}: {have}; free some, or choose another --data-dir")


def sweep(folder):
    """Remove from a data directory what killed processes have left half made; what a process is making stays."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if (made := MADE.fullmatch(path.name)) and made[2]:
                with contextlib.suppress(OSError, UserError), belongs_to_one(folder / f"{made[1]}.lock", "in use") as sure:
                    if sure:
                        remove(path)


def lock(file):
    """Lock an open, empty file for this process, until it is closed. Raises BlockingIOError where another has locked it.

    Returns False, and has done nothing, where the file system has no locks.
    """
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # the first byte, though there is none
        except PermissionError:
            raise BlockingIOError from None
    else:
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            return False
    return True


def plain(path):
    """`path` itself; for reading, of which a pipe has no beginning and a device no end.

    Raises OSError, with a strerror to show, where something lies there that is not a file, nor a link to one, nor a folder.
    """
    path = Path(path)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        mode = path.stat().st_mode  # one look: between two the file may be removed
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise OSError(errno.EINVAL, "it is no file, but a pipe or a device", str(path))
    return path


def is_possible(path):
    """Whether there could be a file of this name: without NUL and halves of characters, no longer than the system takes."""
    try:
        os.stat(path)
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    except ValueError:
        return False
    return True


def sync(path):
    """Wait until the disk itself holds a file, or the names in a folder."""
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows asks for the latter
    try:
        os.fsync(number)
    finally:
        os.close(number)


def portable(name):
    """A name for a file as any system takes it: without what Windows forbids, and none of the names it keeps to itself."""
    name = re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", name).rstrip(". ")
    reserved = re.fullmatch(r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(COM|LPT)[0-9¹²³]) *(\..*)?", name, re.I)
    return f"_{name}" if reserved else name


def short_name(dataset):
    """The name of a data set, or the beginning of its folder's, to name files by."""
    return portable(Path(dataset).name[:40])


def fingerprint(*arrays):
    """Sixteen hexadecimal digits that tell these arrays from others."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def save_grid(pictures, path, columns=8):
    """`data.save_grid`, to a file that appears only when it is whole."""
    with whole_file(Path(path)) as part:
        data.save_grid(pictures, part, columns)


def save_arrays(path, option="--data-dir", /, **arrays):
    """Write arrays as an .npz file, which appears when it is whole. Raises UserError, see `writing`."""
    with writing(path, option), whole_file(path) as part, part.open("wb") as file:
        np.savez(file, **arrays)


def read_array(archive, name, most):
    """The array `name` of an .npz file, a ZipFile, read-only; nothing larger than `most` bytes is read or made.

    np.load makes room for whatever a file claims, and reads all that a compressed one unfolds to. Raises ValueError, and
    what a damaged zip file can make Python raise.
    """
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in a way that NumPy does not use")
    with archive.open(info) as member:
        if np.lib.format.read_magic(member) != (1, 0):
            raise ValueError(f"{name} is of another version")
        shape, in_columns, dtype = np.lib.format.read_array_header_1_0(member)
        size = math.prod(shape) * dtype.itemsize
        if not 0 <= size <= most:
            raise ValueError(f"{name} claims {size} bytes, more than {most}")
        content = member.read(size + 1)  # one more: only at its end is a member held against its checksum
    return np.frombuffer(content, dtype).reshape(shape, order="F" if in_columns else "C")


def read_numbers(archive, name, most):
    """`read_array` of real numbers: whole or floating-point, all finite. Raises ValueError for anything else, too."""
    array = read_array(archive, name, most)
    if array.dtype.kind not in "iuf":  # NumPy would make numbers of truth values, dates, words and halves of complex ones
        raise ValueError(f"{name} holds {array.dtype}, not numbers")
    with np.errstate(all="ignore"):
        if not np.isfinite(array := array.astype(np.float64)).all():
            raise ValueError(f"{name} holds numbers that are not finite")
    return array


def checksum(archive, prefix):
    """Sixteen hexadecimal digits that tell the arrays of an .npz file whose names begin so from others."""
    found = sorted((member.filename, member.CRC) for member in archive.infolist() if member.filename.startswith(prefix))
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def parse_json(text):
    """What a JSON text says. Raises ValueError also for numbers that are not finite, which Python would take and no other
    program, and for a text that is nested deeper than Python can go.
    """

    def finite(digits):
        if not math.isfinite(value := float(digits)):
            raise ValueError(f"{digits[:20]} is no number of JSON")
        return value

    try:
        return json.loads(text, parse_float=finite, parse_constant=finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
