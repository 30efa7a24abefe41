"""Every data set by its name: downloaded where it is missing, checked, and decoded once into a cache."""

import contextlib
import errno
import glob
import hashlib
import io
import json
import multiprocessing
import os
import stat
import tarfile
import zipfile
from concurrent import futures
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

import data
from data import UserError, first_line
from store.downloads import Archive, fetch
from store.files import CHECKPOINTS, MADE, being_made, need_space, plain, short_name, sweep, whole_file
from store.output import Progress, one_line, warn
from store.reading import Room, fit, hushed, is_passing, lean, read_picture

SHAPES_COUNT = 8192
CHUNK = 1024  # pictures that are decoded or averaged at once
SIDES = {"cifar10": 32, "stl10": 48, "celeba": 64}  # pixels a side of the published data sets, as the paper has them
COUNTS = {"cifar10": 50_000, "stl10": 100_000, "celeba": 202_599}  # how many pictures they have

CIFAR10 = Archive(
    data.CIFAR10_ARCHIVE,
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "md5:c58f30108f718f92721af3b95e74349a",
    data.CIFAR10_PAGE,
)
CIFAR10_FILES = [*data.CIFAR10_TRAIN, "test_batch", "batches.meta"]
STL10 = Archive(
    "stl10_binary.tar.gz",
    "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
    "md5:91f7769df0f17e558f3565bffb0c7dfb",
    "https://cs.stanford.edu/~acoates/stl10/",
    3 << 30,
)
_CELEBA_KEY = "resourcekey=0-dYn9z10tMJOBAkviAcfdyQ"
CELEBA = Archive(
    "img_align_celeba.zip",
    "https://drive.usercontent.google.com/download?export=download&confirm=t"
    f"&id=0B7EVK8r0v71pZjFTYXZWM3FlRnM&{_CELEBA_KEY}",
    "md5:00d2c5bc6d35e252742224ab0c1e8fcb",
    f"https://drive.google.com/file/d/0B7EVK8r0v71pZjFTYXZWM3FlRnM/view?{_CELEBA_KEY}",
    2 << 30,
)


def load_pictures(dataset, data_dir, image_size):
    """All pictures of a data set: bytes, (N, 3, image_size, image_size).

    dataset: "shapes", one of SIDES, whose side image_size must divide, or the path of a folder. Raises UserError.
    """
    if dataset == "shapes":
        return data.draw_shapes(SHAPES_COUNT, image_size)
    if dataset in SIDES:
        load = {"cifar10": load_cifar10, "stl10": load_stl10, "celeba": load_celeba}[dataset]
        return average_squares(load(data_dir), image_size)
    return load_folder(dataset, data_dir, image_size)


def average_squares(pictures, side):
    """Pictures (N, 3, H, H) made smaller, to (N, 3, side, side), by the mean of each square of H / side pixels a side."""
    factor = pictures.shape[-1] // side
    if factor == 1:
        return pictures
    small = np.empty((len(pictures), 3, side, side), np.uint8)
    for first in range(0, len(pictures), CHUNK):  # a few at a time, because all may be more than memory holds
        squares = pictures[first : first + CHUNK].reshape(-1, 3, side, factor, side, factor)
        small[first : first + CHUNK] = squares.mean(axis=(3, 5)).round()
    return small


LABELLED = ("shapes", "cifar10")


def load_labels(dataset, data_dir, image_size):
    """The class of each picture of `load_pictures`, whole numbers (N,) from 0, or None for what is not LABELLED.

    CIFAR-10 comes with ten classes; of the shapes, kind and colour make one. Raises UserError.
    """
    if dataset == "shapes":
        return data.draw_labelled_shapes(SHAPES_COUNT, image_size, seed=0)[1]
    if dataset == "cifar10":
        need_plain_batches(data_dir)
        files = data.cifar10_files(data_dir, data.CIFAR10_TRAIN)
        return np.concatenate([data.read_batch(path, content)[1] for path, content in files])
    return None


def load_cifar10(data_dir, archive=CIFAR10):
    """CIFAR-10's 50,000 training pictures: bytes, (50000, 3, 32, 32).

    Uses data_dir/cifar-10-batches-py as it lies; if there is none, checks and extracts data_dir's archive, downloading
    it first where that is missing too. Raises UserError for whatever is wrong with network, archive or files.
    """
    folder = Path(data_dir) / data.CIFAR10_FOLDER
    sweep(folder.parent)
    if not folder.is_dir():
        fetch(archive, data_dir)
        with being_made(folder):
            if not folder.is_dir():  # made by another process in the meantime
                with whole_file(folder) as part:
                    part.mkdir()
                    for path, content in data.cifar10_files(data_dir, CIFAR10_FILES):
                        (part / path.name).write_bytes(content)
    need_plain_batches(data_dir)
    return whole("cifar10", data.load_cifar10(data_dir), folder)


def need_plain_batches(data_dir):
    """Raise UserError where a pipe or a device lies in place of a file of CIFAR-10, which the book would wait for."""
    folder = Path(data_dir) / data.CIFAR10_FOLDER
    with data.reading(folder):
        for name in data.CIFAR10_TRAIN:
            plain(folder / name)


def whole(name, pictures, source, made=""):
    """The pictures of a published data set; if they are not as many as it has, that is said on standard error.

    made: the names of caches that would take the place of a `source` that is moved away.
    """
    if len(pictures) != COUNTS[name]:
        away = f"{made}, and {source} if it is there," if made else "it"
        warn(f"transgan: {source} is not the whole of {name}: it gives {len(pictures):,} pictures, not {COUNTS[name]:,}; "
             f"if it broke off, move {away} away and start again")  # fmt: skip
    return pictures


# What is decoded once is kept in a file: the pictures, byte after byte, what is to be told of them, and how long that is.

CACHE = ".pictures"  # how the name of a cache ends
READING = 3  # to be raised when pictures are read in another way, so that no cache of the old way is used


def cached(data_dir, stem, state, side, source, count, results):
    """The pictures of `source`, kept in a file of data_dir: bytes, (N, 3, side, side), on disk until used (a memory map).

    The file goes by `stem`, the source's `state` and how pictures are read; older ones of that stem are removed. A source
    that is no longer there has what was made of it, in whatever state it was. Where the file is missing or damaged, or
    lacks a picture that can be read now, it is made of what results() yields: names, each with a picture or with the
    exception that says what is wrong with it; at most `count` pictures. results(names) tries these alone. If it only lacks
    some and cannot be made, it is used as it is. What was skipped is named. Raises UserError.
    """
    sweep(data_dir)
    path = data_dir / f"{stem}-{_digest(f'{state} {READING} {PIL.__version__}')}{CACHE}"
    caches = sorted(data_dir.glob(f"{glob.escape(stem)}-{'[0-9a-f]' * 16}{CACHE}"))
    if caches and path not in caches and not source.exists():
        path = caches[0]
    first = not multiprocessing.parent_process()  # of processes that share a run, which alone tries again
    again = results if first and source.exists() else None
    if not (cache := kept(path, side, again)):
        try:
            with being_made(path):
                cache = kept(path, side, again) or make(path, side, source, count, results())
        except UserError:
            if not (cache := kept(path, side)):
                raise
    pictures, skipped = cache
    name_skipped(path.with_suffix(".skipped.txt"), source, skipped)
    for old in {*caches} - {path}:
        with contextlib.suppress(OSError):  # one that another run is reading may stay, where the system says so
            old.unlink()
            old.with_suffix(".skipped.txt").unlink(missing_ok=True)
    return pictures


def kept(path, side, results=None):
    """What a cache holds: pictures, bytes (N, 3, side, side), on disk until used; and what was skipped, {name: why}.

    None if there is none, it is damaged, or lacks what `results`, if they are given, now have. Raises UserError for one
    that cannot be read.
    """
    try:
        content = np.memmap(plain(path), np.uint8, "r").view(np.ndarray)
        length = int.from_bytes(content[-8:].tobytes(), "little")
        told = json.loads(content[-8 - length : -8].tobytes())
        skipped = {str(name): str(reason) for name, reason in told["skipped"].items()}
        pictures = content[: -8 - length].reshape(told["pictures"], 3, side, side)
        again = [str(name) for name in told["again"]]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; move it away, or choose another --data-dir") from None
    except Exception:  # a damaged file can raise anything at all
        return None
    if again and results:  # these alone, for what cannot be read for long is no reason to decode all at each start
        with hushed(), lean(), contextlib.closing(results(again)) as tried:
            if any(not isinstance(result, Exception) for _, result in tried):
                return None
    return pictures, skipped


def make(path, side, source, count, results):
    """Write a cache, and return what it holds, see `kept`. Raises UserError and OSError."""
    need_space(path, count * 3 * side**2, "the decoded pictures need room")
    path.with_suffix(".skipped.txt").unlink(missing_ok=True)
    skipped, again, done = {}, [], 0  # again: the names of what is worth another try; done: how many pictures there are
    with whole_file(path) as part, part.open("wb") as file, hushed(), lean(), contextlib.closing(results):
        for name, result in results:
            if isinstance(result, Exception):
                unknown = isinstance(result, PIL.UnidentifiedImageError)
                reason = getattr(result, "strerror", None) or first_line(result)
                skipped[name] = "it is no picture of a known kind" if unknown else one_line(reason)
                again += [name] if is_passing(result) else []
            else:
                file.write(result.tobytes())
                done += 1
        if not done:
            example = "".join(f" ({name!r}: {reason})" for name, reason in [*skipped.items()][:1])
            advice = "name a folder of pictures as --dataset" if source.is_dir() else "move it away and start again"
            raise UserError(f"{source} holds no picture that can be read{example}; {advice}")
        told = json.dumps({"pictures": done, "skipped": skipped, "again": again}).encode()
        file.write(told + len(told).to_bytes(8, "little"))
    return np.memmap(path, np.uint8, "r", shape=(done, 3, side, side)).view(np.ndarray), skipped


def name_skipped(path, source, skipped):
    """Name what was skipped: all of it in the file `path`, the first ten on standard error."""
    lines, shown = [f"skipped {name!r}: {reason}" for name, reason in skipped.items()], 10
    try:
        if lines and not path.exists():
            with whole_file(path) as part:
                part.write_text("\n".join([f"of {source}:", *lines, ""]), "utf-8", "backslashreplace")
    except OSError:  # where nothing can be written, all are shown
        shown = len(lines)
    if lines[shown:]:
        lines[shown:] = [f"skipped {len(lines) - shown} more of {source}; all {len(lines)} are named in {path}"]
    for line in lines:
        warn(line)


def decode(names, opened, side, source):
    """Yield each name, with the picture in the file `opened(name)`, bytes (3, side, side), or what is wrong with it."""
    room = Room()

    def one(name):
        try:
            with opened(name) as file:
                return read_picture(file, side, room)
        except Exception as error:  # Pillow's many readers raise anything at all on a damaged file
            return error

    with futures.ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 4)) as pool, Progress() as progress:
        for first in range(0, len(names), CHUNK // 8):  # a few at a time: results that wait take memory
            some = names[first : first + CHUNK // 8]
            for done, (name, result) in enumerate(zip(some, pool.map(one, some), strict=True), first + 1):
                yield name, one(name) if is_passing(result) else result
                progress(f"decoding {source}: {done:,} of {len(names):,} pictures")


def load_folder(folder, data_dir, side):
    """All pictures in a folder and its subfolders, but hidden ones: bytes, (N, 3, side, side), in order of their names.

    They are decoded once, into a cache in data_dir that goes by the names, sizes and times of all files, so that it is made
    anew when one changes. Raises UserError.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; say where the pictures are with --dataset")
    files, unread = find_files(folder)
    if not files and not unread:
        raise UserError(f"{folder} holds no files; name a folder of pictures as --dataset")

    def results(again=None):
        yield from decode(again or [*files], lambda name: plain(folder / name).open("rb"), side, folder)
        yield from ((name, ValueError(reason)) for name, reason in unread.items())

    stem, state = f"{short_name(folder)}-{side}-{_digest(str(folder))}", repr([*files.items(), *unread.items()])
    return cached(Path(data_dir), stem, state, side, folder, len(files), results)


def find_files(folder):
    """The files in a folder and its subfolders, sorted by name: size and time of each; and what cannot be read, and why.

    Links are followed, to each folder once. Left out are hidden files, runs of this program, and what it keeps in a data
    directory.
    """
    files = {}
    unread = {}
    seen, waiting = set(), [folder]
    with Progress() as progress:
        while waiting:
            path = waiting.pop()
            name = path.relative_to(folder).as_posix()
            progress(f"looking through {folder}: {len(files):,} files")
            try:
                state = path.stat()
                if not os.access(path, os.R_OK):
                    unread[name] = os.strerror(errno.EACCES)
                elif stat.S_ISREG(state.st_mode):
                    files[name] = (state.st_size, state.st_mtime_ns)
                elif not stat.S_ISDIR(state.st_mode):
                    unread[name] = "it is no file, but a pipe or a device"
                elif (place := (state.st_dev, state.st_ino)) in seen:
                    unread[name] = "it leads to a folder that is read already"
                else:
                    seen.add(place)
                    with os.scandir(path) as entries:
                        inside = {entry.name: entry.is_symlink() for entry in entries if not entry.name.startswith(".")}
                    if not ({*CHECKPOINTS} & {*inside} and {"log.csv", "samples"} & {*inside}):  # no run of this program
                        # links first, and read last: a folder goes by its own name if it has one
                        order = sorted(inside, key=lambda entry: (inside[entry], entry), reverse=True)
                        waiting += [path / entry for entry in order if not MADE.fullmatch(entry)]
            except OSError as error:
                reason = error.strerror or str(error)
                unread[name] = f"it is a link to nothing that can be read ({reason})" if path.is_symlink() else reason
    return dict(sorted(files.items())), dict(sorted(unread.items()))


def _digest(text):
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


STL10_FILE = "stl10_binary/unlabeled_X.bin"


def load_stl10(data_dir, archive=STL10):
    """STL-10's 100,000 unlabeled pictures (Coates et al. 2011), resized: bytes, (100000, 3, 48, 48).

    Read out of data_dir's archive, which is downloaded where it is missing, without extracting it; or out of
    data_dir/stl10_binary/unlabeled_X.bin if that lies there. Raises UserError.
    """
    source, side, state = Path(data_dir) / archive.name, SIDES["stl10"], archive.digest
    if (extracted := Path(data_dir) / STL10_FILE).exists():
        source, state = extracted, repr((extracted.stat().st_size, extracted.stat().st_mtime_ns))

    def results(again=None):  # none of its pictures fails in a way that may pass
        if source != extracted:
            fetch(archive, data_dir)
        size, count = 3 * 96 * 96, 0
        with data.reading(source), contextlib.ExitStack() as stack, Progress() as progress:
            if source == extracted:
                file = stack.enter_context(plain(source).open("rb"))
            else:
                tar = stack.enter_context(tarfile.open(source, "r|gz"))  # a stream, read once from beginning to end
                file = next((tar.extractfile(member) for member in tar if member.name == STL10_FILE), None) or io.BytesIO()
            while block := file.read(CHUNK * size):
                if len(block) % size:
                    raise ValueError(f"{STL10_FILE} ends within a picture")
                columns = np.frombuffer(block, np.uint8).reshape(-1, 3, 96, 96)  # (n, 3, W, H)
                yield from (("", fit(Image.fromarray(x), side)) for x in columns.transpose(0, 3, 2, 1))
                count += len(columns)
                progress(f"decoding {source}: {count:,} pictures")

    pictures = cached(Path(data_dir), f"stl10-{side}", state, side, source, COUNTS["stl10"], results)
    return whole("stl10", pictures, source, f"{Path(data_dir) / f'stl10-{side}-'}*{CACHE}")


def load_celeba(data_dir, archive=CELEBA):
    """CelebA's 202,599 aligned faces (Liu et al. 2015), their middle squares resized: bytes, (202599, 3, 64, 64).

    Read out of data_dir's archive, which is downloaded where it is missing, without extracting it; or out of the folder
    data_dir/img_align_celeba if that lies there. Raises UserError.
    """
    source, side = Path(data_dir) / archive.name, SIDES["celeba"]
    if (folder := Path(data_dir) / "img_align_celeba").is_dir():
        return whole("celeba", load_folder(folder, data_dir, side), folder)

    def results(again=None):
        fetch(archive, data_dir)
        with data.reading(source), zipfile.ZipFile(source) as file:
            faces = {face.filename: face for face in file.infolist() if face.filename.endswith(".jpg")}

            def opened(name):
                if max(faces[name].file_size, faces[name].compress_size) > data.MAX_FILE:
                    raise ValueError("it is too large for a face of CelebA")
                return io.BytesIO(file.read(name))

            yield from decode(again or sorted(faces), opened, side, source)

    pictures = cached(Path(data_dir), f"celeba-{side}", archive.digest, side, source, COUNTS["celeba"], results)
    return whole("celeba", pictures, source, f"{Path(data_dir) / f'celeba-{side}-'}*{CACHE}")
