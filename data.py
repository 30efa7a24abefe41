"""Pictures for the GAN: fetched or drawn, checked, shuffled into batches, and written back as grids.

Every data set becomes one array of bytes, (N, 3, H, W) in red, green, blue; only a batch is ever turned into floats. The
first chapter has what the whole program shares: how it speaks to people and to other programs, draws at random, and writes
files that are whole.

Contents
    1. Words, chance, files   UserError, first_line, tell, note, is_live, random_stream, whole_file, portable, sync
    2. Archives               Archive, fetch, download: resumed where it broke off, and checked; Progress
    3. CIFAR-10               load_cifar10, its archive and its pickles, which are never executed
    4. Any pictures           load_folder, load_stl10, load_celeba: cropped, resized and decoded once, into a cache
    5. Shapes                 draw_shapes, pictures that need no download
    6. Batches and grids      load_pictures, load_labels, Batches, save_grid; save_arrays and read_array, for .npz files
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.client
import io
import json
import math
import os
import pickle
import pickletools
import re
import shutil
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from pathlib import Path
from typing import IO, Any, TextIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

Bytes: TypeAlias = NDArray[np.uint8]  # pictures as they are kept and written, 0 to 255
Floats: TypeAlias = NDArray[np.floating[Any]]  # pictures as networks have them, about [-1, 1]
Labels: TypeAlias = NDArray[np.int_]  # the pictures' classes, from 0

# --- 1. Words, chance, files ------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something a person can put right; its message is one line that says what is wrong and what to do."""


def first_line(error: BaseException) -> str:
    """What an exception says in its first line, or else its name."""
    return (str(error).splitlines() or [type(error).__name__])[0]


output = "lines"  # what standard output is given: "lines" for people, "json" for programs, or nothing, "quiet"


def tell(line: str | None, **fields: object) -> None:
    """Say something on standard output: the line, if there is one; or with --json the fields, as one object in one line.

    A number that is not finite becomes null there, because JSON has no word for it.
    """
    if output == "json":
        unknown = {name: None for name, x in fields.items() if isinstance(x, float) and not math.isfinite(x)}
        print(json.dumps(fields | unknown), flush=True)
    elif output == "lines" and line is not None:
        print(line, flush=True)


def note(line: str) -> None:
    """Say on standard error what is going on, unless --quiet wants to hear of errors alone."""
    if output != "quiet":
        print(line, file=sys.stderr, flush=True)


def is_live(stream: TextIO | None) -> bool:
    """Whether a line on this stream may change in place: on a terminal that takes escape sequences, and whose user does.

    TERM=dumb says that the terminal does not, any NO_COLOR but an empty one that the user does not (no-color.org).
    """
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return bool(stream and stream.isatty()) and not plain


PURPOSES = ("shapes", "order", "weights", "step", "judge", "co-training order", "evaluate", "classifier", "look")


def random_stream(purpose: str, seed: int, number: int = 0) -> np.random.Generator:
    """A NumPy random generator of its own for each purpose, seed (whole, at least 0) and number, such as an epoch's.

    So whatever is random in a run follows from its seed and from where it stands, and no two uses share their draws.
    Raises ValueError for a purpose that is not in PURPOSES.
    """
    return np.random.default_rng((seed, PURPOSES.index(purpose) + 1, number))


@contextlib.contextmanager
def whole_file(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """Within this context, a path to write to; what lies there appears as `path` at the end, unless something went wrong.

    So nobody ever meets half a file, and one that was there before stays until the new one is whole and on the disk itself.
    It is then renamed to `previous`, if that is given. If all ends between the two renames, `previous` is the newest, and
    there is no `path`; links would close that gap, but not every file system has them.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        sync(part)
        if previous and path.exists():
            path.replace(previous)
        part.replace(path)
        if os.name == "posix":
            with contextlib.suppress(OSError):  # some network file systems cannot
                sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def portable(name: str) -> str:
    """A name for a file as any system takes it: without what Windows forbids, and none of the names it keeps to itself."""
    name = re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", name).rstrip(". ")
    reserved = re.fullmatch(r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(COM|LPT)[0-9¹²³]) *(\..*)?", name, re.I)
    return f"_{name}" if reserved else name


def sync(path: Path) -> None:
    """Wait until the disk itself holds a file, or the names in a folder."""
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows asks for the latter
    try:
        os.fsync(number)
    finally:
        os.close(number)


# --- 2. Archives ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Archive:
    """A file that a data set is published as."""

    name: str
    url: str
    digest: str  # as published: the algorithm, and the first hexadecimal digits or all of them
    page: str  # where a person can fetch it by hand


CIFAR10 = Archive(
    "cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "md5:c58f30108f718f92721af3b95e74349a",
    "https://www.cs.toronto.edu/~kriz/cifar.html",
)
STL10 = Archive(
    "stl10_binary.tar.gz",
    "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
    "md5:91f7769df0f17e558f3565bffb0c7dfb",
    "https://cs.stanford.edu/~acoates/stl10/",
)
_CELEBA_KEY = "resourcekey=0-dYn9z10tMJOBAkviAcfdyQ"
CELEBA = Archive(
    "img_align_celeba.zip",
    "https://drive.usercontent.google.com/download?export=download&confirm=t"
    f"&id=0B7EVK8r0v71pZjFTYXZWM3FlRnM&{_CELEBA_KEY}",
    "md5:00d2c5bc6d35e252742224ab0c1e8fcb",
    f"https://drive.google.com/file/d/0B7EVK8r0v71pZjFTYXZWM3FlRnM/view?{_CELEBA_KEY}",
)


def fetch(archive: Archive, data_dir: str | Path) -> Path:
    """The path of an archive in the folder data_dir, downloaded if it is not there, and checked. Raises UserError."""
    path = Path(data_dir) / archive.name
    if path.exists():
        check_digest(path, archive, path)
    else:
        download(archive, path)
    return path


class Progress:
    """One line on standard error that changes while something goes on; nothing where it cannot, see `is_live`."""

    def __enter__(self) -> Progress:
        self.live, self.shown = output != "quiet" and is_live(sys.stderr), 0.0
        return self

    def __call__(self, text: str) -> None:
        if self.live and time.monotonic() - self.shown > 0.2:
            self.shown = time.monotonic()
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def download(archive: Archive, path: str | Path) -> None:
    """Fetch an Archive to `path`, showing progress on standard error, and check its sum.

    What arrives is kept in path.part, so that the next call goes on where a connection broke off or a disk filled up (an
    HTTP range request). The file appears under its own name only when it is whole and right. Raises UserError.
    """
    path, locked = Path(path), True
    part, by_hand = path.with_name(path.name + ".part"), f"or fetch {archive.page} by hand and save it as {path}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as out:
            lock(out)
            _receive(archive, out, path, by_hand)
        try:
            check_digest(part, archive, archive.url)
        except UserError:
            part.unlink()
            raise
        part.replace(path)
    except BlockingIOError:
        locked = False  # the part is another's, empty or not
        raise UserError(f"another run is downloading {path}; start again when it has finished") from None
    except (OSError, ValueError, http.client.HTTPException) as error:  # a malformed URL is a ValueError
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"cannot download {archive.url} to {path}: {reason}; start again to go on from what has arrived, {by_hand}"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            if locked and not part.stat().st_size:
                part.unlink()


def lock(file: IO[bytes]) -> None:
    """Lock an open file for this process, until it is closed. Raises BlockingIOError where another has locked it."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(0)  # the one byte from here on is what is locked
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError:
            raise BlockingIOError from None
        file.seek(0, os.SEEK_END)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _receive(archive: Archive, out: IO[bytes], path: Path, by_hand: str) -> None:
    """Append to the open file `out` what it lacks of an archive."""
    done = out.tell()
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # nothing comes after these bytes: they are all
            return
        raise
    with answer, Progress() as progress:
        block = answer.read(1 << 18)
        if answer.status != 206:  # the file from its beginning, whatever was asked for
            if block.lstrip()[:1] == b"<":
                raise UserError(f"{archive.url} answered with a web page, not with {archive.name}; try later, {by_hand}")
            out.truncate(done := 0)
        total = done + int(answer.headers.get("Content-Length") or 0)
        free = shutil.disk_usage(path.parent).free
        if total - done > free:
            raise UserError(
                f"{archive.name} needs {(total - done) / 1e6:.0f} MB more and {path.parent} has {free / 1e6:.0f}; "
                "free some, or choose another --data-dir"
            )
        note(f"downloading {archive.url}, {(total - done) / 1e6:.0f} MB, to {path}")
        while block:
            out.write(block)
            done += len(block)
            progress(f"{done / 1e6:.0f} MB" + (f" ({100 * done / total:.0f}%)" if total else ""))
            block = answer.read(1 << 18)
    if done < total:
        raise UserError(
            f"the download of {archive.url} broke off after {done} of {total} bytes; start again to go on from there"
        )


def check_digest(path: str | Path, archive: Archive, source: str | Path) -> None:
    """Raise UserError, naming `source`, where the file at `path` came from, unless it has the archive's digest."""
    algorithm, expected = archive.digest.split(":")
    digest = hashlib.new(algorithm, usedforsecurity=False)
    try:
        with Path(path).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; delete it, or choose another --data-dir") from None
    if not digest.hexdigest().startswith(expected):
        raise UserError(
            f"{source} is not the file expected ({algorithm} {digest.hexdigest()}, not {expected}); "
            f"delete it if it lies here, and start again, or fetch {archive.page} by hand into --data-dir"
        )


# --- 3. CIFAR-10 ------------------------------------------------------------------------------------------------------
# Krizhevsky 2009: 50,000 training and 10,000 test pictures of 32x32 in ten classes. TransGAN trains on the former.

CIFAR10_FOLDER = "cifar-10-batches-py"
CIFAR10_TRAIN = [f"data_batch_{i}" for i in range(1, 6)]
CIFAR10_FILES = [*CIFAR10_TRAIN, "test_batch", "batches.meta"]
MAX_FILE = 64 << 20  # bytes of one extracted file; the real ones hold 31 MB


def load_cifar10(data_dir: str | Path, archive: Archive = CIFAR10) -> Bytes:
    """CIFAR-10's 50,000 training pictures: bytes, (50000, 3, 32, 32).

    Uses data_dir/cifar-10-batches-py as it lies; if there is none, checks and extracts data_dir's archive, downloading
    it first where that is missing too. Raises UserError for whatever is wrong with network, archive or files.
    """
    folder = Path(data_dir) / CIFAR10_FOLDER
    if not folder.is_dir():
        extract_cifar10(fetch(archive, data_dir), folder)
    return np.concatenate([read_cifar10(folder / name)[0] for name in CIFAR10_TRAIN])


def extract_cifar10(archive: str | Path, folder: str | Path) -> None:
    """Write the seven files CIFAR-10's tar.gz archive must hold into `folder`, which appears only when complete.

    Files are asked for by name and copied by us, so nothing that an archive says can name a path outside. Raises
    UserError if the archive is damaged or incomplete.
    """
    folder = Path(folder)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cannot write in {folder.parent}: {error.strerror}; choose another --data-dir") from None
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for name in CIFAR10_FILES:
                member = tar.getmember(f"{CIFAR10_FOLDER}/{name}")
                source = tar.extractfile(member) if member.isfile() and member.size <= MAX_FILE else None
                if source is None:
                    raise UserError(f"{archive}: {member.name} is not a plain file of CIFAR-10's size; delete {archive}")
                with source, (temporary / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
        temporary.chmod(0o755)
        temporary.replace(folder)
    except KeyError as error:
        raise UserError(f"{archive} is not CIFAR-10: {error.args[0]}; delete it and start again") from None
    except UserError:
        raise
    except Exception as error:  # a damaged archive can raise anything at all
        raise UserError(
            f"cannot extract {archive}: {first_line(error)}; if it is damaged, delete it and start again"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_cifar10(path: str | Path) -> tuple[Bytes, Labels]:
    """The pictures of one CIFAR-10 batch file, bytes (N, 3, 32, 32), and their classes, whole numbers (N,).

    Checks shape, type, and that there is a label from 0 to 9 for every picture. Raises UserError.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_FILE + 1)
        _refuse_bombs(content)
        batch = _CifarUnpickler(io.BytesIO(content), encoding="bytes").load()
        rows, labels = batch[b"data"], batch[b"labels"]
        if isinstance(rows, _Array):
            rows = rows.to_numpy()
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; delete its folder to extract or download it again"
        ) from None
    except Exception as error:  # a damaged pickle can raise anything at all
        raise UserError(
            f"{path} is not a batch of CIFAR-10 ({first_line(error)}); delete its folder and start again"
        ) from None
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.shape[1] != 3072 or not len(rows):
        raise UserError(f"{path}: expected rows of 3072 bytes, found {getattr(rows, 'shape', type(rows).__name__)}")
    if not isinstance(labels, list) or len(labels) != len(rows):
        raise UserError(f"{path}: expected a list of {len(rows)} labels")
    if not all(isinstance(label, int) and 0 <= label <= 9 for label in labels):
        raise UserError(f"{path}: labels must be whole numbers from 0 to 9")
    return rows.reshape(-1, 3, 32, 32), np.array(labels)


def _refuse_bombs(content: bytes) -> None:
    """Raise ValueError for a pickle that could exhaust memory, time or the stack without calling anything.

    Tuples inside tuples can double without end, or be nested deeper than C can hash; and a memo number makes the reader
    allocate that many places. A batch holds a handful of tuples, those of its array.
    """
    if len(content) > MAX_FILE:
        raise ValueError(f"it is larger than {MAX_FILE} bytes")
    tuples = 0
    for opcode, argument, _ in pickletools.genops(content):
        tuples += "TUPLE" in opcode.name or opcode.name == "FROZENSET"
        if tuples > 16 or ("PUT" in opcode.name and (argument or 0) > len(content)):
            raise ValueError("it is built to exhaust this machine")


class _Array:
    """What a pickle's `numpy.ndarray` becomes here: it only remembers what it is told."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def to_numpy(self) -> Bytes:
        _, shape, dtype, fortran, content = self.state
        plain = isinstance(dtype, _Dtype) and dtype.name in (b"u1", "u1") and isinstance(content, bytes)
        if not plain or fortran:
            raise ValueError("its array does not hold plain unsigned bytes")
        return np.frombuffer(content, np.uint8).reshape(shape)


class _Dtype:
    """What a pickle's `numpy.dtype` becomes here: its name."""

    def __init__(self, name: object, *_: object):
        self.name = name

    def __setstate__(self, state: object) -> None:
        pass


class _CifarUnpickler(pickle.Unpickler):
    """Reads a pickle without executing what it asks for.

    A pickle may name any function and have it called. This one knows the three names an array needs and puts harmless
    stand-ins of ours in their place, so that not even numpy's own code runs on the file's word.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return _Array if name == "ndarray" else _Dtype
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")):
            return lambda *_: _Array()
        raise pickle.UnpicklingError(f"it asks for {module!r}.{name!r}, which no picture needs")


# --- 4. Any pictures --------------------------------------------------------------------------------------------------

CACHE = ".pictures"  # how the name of a cache ends
CHUNK = 1024  # pictures that are decoded at once


def fit(picture: Image.Image, side: int) -> Bytes:
    """The largest square in the middle of a Pillow picture of any mode, resized (bicubic): bytes, (3, side, side).

    A photograph is turned upright first, and what is transparent becomes white.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits of grey, of which Pillow would cut off all above 255
        picture = Image.fromarray((np.clip(np.asarray(picture), 0, 65535) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        ground = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(ground, picture.convert("RGBA"))
    picture = ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
    return np.asarray(picture).transpose(2, 0, 1)


def decode(names: list[str], opened: Callable[[str], Path | IO[bytes]], side: int, source: Path) -> Iterator[Bytes]:
    """Yield the pictures `opened(name)`, paths or files that Pillow can open, as bytes (n, 3, side, side), n <= CHUNK.

    Names on standard error what cannot be read, and skips it. Raises UserError, naming `source`, if nothing can.
    """

    def one(name: str) -> Bytes | str:
        try:
            with Image.open(opened(name)) as picture:
                picture.draft(None, (2 * side, 2 * side))  # a JPEG may come smaller, if not too small: that is faster
                return fit(picture, side)
        except Exception as error:  # Pillow's many readers raise anything at all on a damaged file
            return f"{name!r}: {str(error) or type(error).__name__}"

    skipped = []
    with futures.ThreadPoolExecutor() as pool, Progress() as progress:
        for first in range(0, len(names), CHUNK):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, about pictures that are large or odd but can be read
                results = list(pool.map(one, names[first : first + CHUNK]))
            skipped += [result for result in results if isinstance(result, str)]
            if pictures := [result for result in results if not isinstance(result, str)]:
                yield np.stack(pictures)
            progress(f"decoding {source}: {first + len(results):,} of {len(names):,} pictures")
    if len(skipped) == len(names):
        example = f" ({skipped[0]})" if skipped else ""
        raise UserError(f"{source} holds no picture that can be read{example}; name a folder of pictures as --dataset")
    for line in skipped[:10]:
        print(f"skipped {line}", file=sys.stderr)
    if skipped[10:]:
        print(f"skipped {len(skipped) - 10} more of {source}'s {len(names):,} files", file=sys.stderr)


def cached(path: Path, side: int, chunks: Callable[[], Iterable[Bytes]]) -> Bytes:
    """The pictures in the file `path`: bytes, (N, 3, side, side), left on disk until they are used (a memory map).

    The file holds nothing but these bytes. Where it is missing, it is first made of `chunks()`, which yields arrays
    (n, 3, side, side), and appears when it is whole. Raises UserError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with whole_file(path) as part, part.open("wb") as file:
                for pictures in chunks():
                    file.write(pictures.tobytes())
        count, rest = divmod(path.stat().st_size, 3 * side * side)
        if rest:
            raise ValueError("it ends within a picture")
        return np.memmap(path, np.uint8, "r", shape=(count, 3, side, side)).view(np.ndarray)
    except (OSError, ValueError) as error:  # a file without a single picture cannot be mapped
        raise UserError(
            f"cannot keep the decoded pictures in {path}: {getattr(error, 'strerror', None) or error}; "
            "delete it if it is there, free some space, or choose another --data-dir"
        ) from None


def load_folder(folder: str | Path, data_dir: str | Path, side: int) -> Bytes:
    """All pictures in a folder and its subfolders, but hidden ones: bytes, (N, 3, side, side), in order of their names.

    They are decoded once, into a cache in data_dir that goes by the names, sizes and times of all files, so that it is made
    anew when one changes. Raises UserError.
    """

    def skip(error: OSError) -> None:
        print(f"skipped {error.filename!r}: {error.strerror}", file=sys.stderr)

    folder, data_dir, files = Path(folder).resolve(), Path(data_dir), {}
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; say where the pictures are with --dataset")
    try:
        for parent, folders, names in os.walk(folder, onerror=skip):
            if {"checkpoint.npz", "log.csv"} <= {*names}:
                folders.clear()
                continue  # a run of this program, whose grids are no pictures to learn
            folders[:] = [name for name in folders if not name.startswith(".")]
            for path in (Path(parent, name) for name in names if not name.startswith(".") and CACHE not in name):
                if path.is_file():
                    state = path.stat()
                    files[path.relative_to(folder).as_posix()] = (state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}; name another folder as --dataset") from None
    if not files:
        raise UserError(f"{folder} holds no files; name a folder of pictures as --dataset")
    names = sorted(files)
    stem = f"{short_name(folder)}-{side}-{_digest(str(folder))}-"
    cache = data_dir / f"{stem}{_digest(repr([(name, files[name]) for name in names]))}{CACHE}"
    pictures = cached(cache, side, lambda: decode(names, folder.joinpath, side, folder))
    with contextlib.suppress(OSError):  # one that another run is reading may stay, where the system says so
        for old in data_dir.iterdir():
            if old.name.startswith(stem) and old.name.endswith(CACHE) and old != cache:
                old.unlink()
    return pictures


def short_name(dataset: str | Path) -> str:
    """The name of a data set, or the beginning of its folder's, to name files by."""
    return portable(Path(dataset).name[:40])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


STL10_FILE = "stl10_binary/unlabeled_X.bin"
STL10_SIDE = 96  # pixels a side, as published


def load_stl10(data_dir: str | Path, side: int = 48, archive: Archive = STL10) -> Bytes:
    """STL-10's 100,000 unlabeled pictures (Coates et al. 2011), resized: bytes, (100000, 3, side, side).

    Read out of data_dir's archive, which is downloaded where it is missing, without extracting it; or out of
    data_dir/stl10_binary/unlabeled_X.bin if that lies there. Raises UserError.
    """

    def chunks() -> Iterator[Bytes]:
        plain = Path(data_dir) / STL10_FILE
        source = plain if plain.exists() else fetch(archive, data_dir)
        try:
            if source == plain:
                with plain.open("rb") as file:
                    yield from pictures(file, source)
                return
            with tarfile.open(source, "r|gz") as tar:  # a stream, read once from beginning to end
                for member in tar:
                    if member.name == STL10_FILE and member.isfile() and (inside := tar.extractfile(member)):
                        yield from pictures(inside, source)
                        return
            raise UserError(f"{source} is not STL-10: it holds no {STL10_FILE}; delete it and start again")
        except UserError:
            raise
        except Exception as error:  # a damaged archive can raise anything at all
            raise UserError(
                f"cannot read {source}: {first_line(error)}; if it is damaged, delete it and start again"
            ) from None

    def pictures(file: IO[bytes], source: Path) -> Iterator[Bytes]:
        size, count = 3 * STL10_SIDE**2, 0
        with Progress() as progress:
            while block := file.read(CHUNK * size):
                if len(block) % size:
                    raise UserError(f"{source}: {STL10_FILE} ends within a picture; delete it and start again")
                columns = np.frombuffer(block, np.uint8).reshape(-1, 3, STL10_SIDE, STL10_SIDE)  # (n, 3, W, H)
                yield np.stack([fit(Image.fromarray(x), side) for x in columns.transpose(0, 3, 2, 1)])
                count += len(columns)
                progress(f"decoding {source}: {count:,} pictures")
        if not count:
            raise UserError(f"{source}: {STL10_FILE} is empty; delete it and start again")

    return cached(Path(data_dir) / f"stl10-{side}{CACHE}", side, chunks)


def load_celeba(data_dir: str | Path, side: int = 64, archive: Archive = CELEBA) -> Bytes:
    """CelebA's 202,599 aligned faces (Liu et al. 2015), their middle squares resized: bytes, (202599, 3, side, side).

    Read out of data_dir's archive, which is downloaded where it is missing, without extracting it; or out of the folder
    data_dir/img_align_celeba if that lies there. Raises UserError.
    """

    def chunks() -> Iterator[Bytes]:
        path = fetch(archive, data_dir)
        try:
            with zipfile.ZipFile(path) as file:
                faces = {face.filename: face for face in file.infolist() if face.filename.endswith(".jpg")}

                def opened(name: str) -> IO[bytes]:
                    if max(faces[name].file_size, faces[name].compress_size) > MAX_FILE:
                        raise ValueError("it is too large for a face of CelebA")
                    return io.BytesIO(file.read(name))

                yield from decode(sorted(faces), opened, side, path)
        except UserError:
            raise
        except Exception as error:  # a damaged archive can raise anything at all
            raise UserError(
                f"cannot read {path}: {first_line(error)}; if it is damaged, delete it and start again"
            ) from None

    folder = Path(data_dir) / "img_align_celeba"
    if folder.is_dir():
        return load_folder(folder, data_dir, side)
    return cached(Path(data_dir) / f"celeba-{side}{CACHE}", side, chunks)


# --- 5. Shapes --------------------------------------------------------------------------------------------------------

PALETTE = [(225, 45, 45), (245, 200, 40), (50, 185, 75), (45, 105, 230), (240, 240, 240), (165, 60, 200)]
GROUNDS = [(25, 25, 35), (20, 45, 85), (70, 35, 30), (25, 65, 45)]


def draw_shapes(count: int, image_size: int = 16, seed: int = 0) -> Bytes:
    """`count` pictures of one filled circle, square or triangle on a plain or graded ground: bytes, (count, 3, S, S).

    The same arguments give the same pictures. Drawn four times too large and averaged down, for smooth edges.
    """
    return _drawn(count, image_size, seed)[0]


def _drawn(count: int, image_size: int, seed: int) -> tuple[Bytes, Labels]:
    """The pictures of `draw_shapes` and their classes (count,): kind of shape and colour, one number for both."""
    rng = random_stream("shapes", seed, image_size)
    large = 4 * image_size
    pictures, labels = np.empty((count, 3, image_size, image_size), np.uint8), np.empty(count, int)
    ramp = np.linspace(0, 1, large)[:, None, None]
    for i in range(count):
        ground = np.array(GROUNDS[rng.integers(len(GROUNDS))], float)
        to = ground * 2.2 if rng.random() < 0.5 else ground
        picture = np.broadcast_to(ground + (to - ground) * ramp, (large, large, 3)).round().astype(np.uint8)
        canvas = Image.fromarray(picture)
        radius = large * rng.uniform(0.28, 0.38)
        x, y = large * rng.uniform(0.44, 0.56, 2)
        box = [x - radius, y - radius, x + radius, y + radius]
        number, draw = rng.integers(len(PALETTE)), ImageDraw.Draw(canvas)
        colour, kind = PALETTE[number], rng.integers(3)
        labels[i] = kind * len(PALETTE) + number
        if kind == 0:
            draw.ellipse(box, colour)
        elif kind == 1:
            draw.rectangle(box, colour)
        else:
            draw.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], colour)
        pictures[i] = np.asarray(canvas.resize((image_size, image_size), Image.Resampling.BOX)).transpose(2, 0, 1)
    return pictures, labels


# --- 6. Batches and grids ---------------------------------------------------------------------------------------------

SHAPES_COUNT = 8192
SIDES = {"cifar10": 32, "stl10": 48, "celeba": 64}  # pixels a side of the published data sets, as the paper has them


def load_pictures(dataset: str, data_dir: str | Path, image_size: int) -> Bytes:
    """All pictures of a data set: bytes, (N, 3, image_size, image_size).

    dataset: "shapes", one of SIDES, whose image_size that must be, or the path of a folder. Raises UserError.
    """
    if dataset == "shapes":
        return draw_shapes(SHAPES_COUNT, image_size)
    published: dict[str, Callable[[str | Path], Bytes]]
    published = {"cifar10": load_cifar10, "stl10": load_stl10, "celeba": load_celeba}
    return published[dataset](data_dir) if dataset in published else load_folder(dataset, data_dir, image_size)


def load_labels(dataset: str, data_dir: str | Path, image_size: int) -> Labels | None:
    """The class of each picture of `load_pictures`, whole numbers (N,) from 0, or None where none is known.

    CIFAR-10 comes with ten classes; of the shapes, kind and colour make one. Raises UserError.
    """
    if dataset == "shapes":
        return _drawn(SHAPES_COUNT, image_size, seed=0)[1]
    if dataset == "cifar10":
        return np.concatenate([read_cifar10(Path(data_dir) / CIFAR10_FOLDER / name)[1] for name in CIFAR10_TRAIN])
    return None


class Batches:
    """An endless row of batches: the pictures are shuffled afresh for each epoch, from (purpose, seed, epoch) alone.

    So batch `index` is the same whether or not the batches before it were ever asked for, and a resumed run needs to
    remember nothing but how many it has used. The rest of an epoch that fills no batch is left out.
    """

    def __init__(self, pictures: Bytes, batch_size: int, seed: int = 0, purpose: str = "order"):
        if batch_size > len(pictures):
            raise UserError(
                f"a batch of {batch_size} is more than the {len(pictures)} pictures; lower --batch-size or --gen-batch-size"
            )
        self.pictures, self.batch_size, self.seed, self.purpose = pictures, batch_size, seed, purpose
        self.per_epoch = len(pictures) // batch_size
        self._epoch, self._order = -1, np.empty(0, int)  # the epoch whose order is at hand: none yet

    def __getitem__(self, index: int) -> Floats:
        """Batch number `index`, scaled to [-1, 1]: float32, (batch_size, 3, H, W)."""
        epoch, within = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = random_stream(self.purpose, self.seed, epoch).permutation(len(self.pictures))
        chosen = self._order[within * self.batch_size : (within + 1) * self.batch_size]
        return scale(self.pictures[chosen])


def scale(pictures: Bytes) -> Floats:
    """Bytes 0..255 to float32 in [-1, 1], any shape."""
    return pictures.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_bytes(pictures: Floats) -> Bytes:
    """The opposite of `scale`: floats in [-1, 1] to bytes, what lies outside is clipped; any shape."""
    return ((np.clip(pictures, -1, 1) + 1) * 127.5).round().astype(np.uint8)


def fingerprint(*arrays: NDArray[Any]) -> str:
    """Sixteen hexadecimal digits that tell these arrays from others."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype}".encode())
        for first in range(0, len(array), CHUNK):
            digest.update(np.ascontiguousarray(array[first : first + CHUNK]).data)
    return digest.hexdigest()[:16]


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write arrays as an .npz file, which appears when it is whole. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part, part.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free some space or choose another --data-dir") from None


def array_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """What an open .npy file begins with: (shape, whether the first index runs fastest, dtype). Raises ValueError."""
    if np.lib.format.read_magic(member) != (1, 0):
        raise ValueError("an array is of another version")
    return np.lib.format.read_array_header_1_0(member)


def read_array(archive: zipfile.ZipFile, name: str, most: int) -> NDArray[Any]:
    """The array `name` of an .npz file, a ZipFile, read-only; nothing larger than `most` bytes is read or made.

    np.load makes room for whatever a file claims, and reads all that a compressed one unfolds to. Raises ValueError, and
    what a damaged zip file can make Python raise.
    """
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in a way that NumPy does not use")
    with archive.open(info) as member:
        shape, in_columns, dtype = array_header(member)
        size = math.prod(shape) * dtype.itemsize
        if not 0 <= size <= most:
            raise ValueError(f"{name} claims {size} bytes, more than {most}")
        content = member.read(size + 1)  # one more: only at its end is a member held against its checksum
    return np.frombuffer(content, dtype).reshape(shape, order="F" if in_columns else "C")


def save_grid(pictures: Floats, path: str | Path, columns: int = 8) -> None:
    """Write float pictures in [-1, 1], (N, 3, H, W), as one PNG, `columns` wide, small ones enlarged to be seen.

    Values outside the range are clipped. The file appears only when it is whole.
    """
    count, _, height, width = pictures.shape
    rows = -(-count // columns)
    grid = np.zeros((rows * (height + 1) + 1, columns * (width + 1) + 1, 3), np.uint8)
    for i, picture in enumerate(to_bytes(pictures)):
        top, left = 1 + i // columns * (height + 1), 1 + i % columns * (width + 1)
        grid[top : top + height, left : left + width] = picture.transpose(1, 2, 0)
    factor = max(1, 96 // height)
    with whole_file(Path(path)) as part:
        Image.fromarray(grid.repeat(factor, 0).repeat(factor, 1)).save(part, "PNG")
