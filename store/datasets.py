"""Every data set by its name: downloaded where it is missing, checked, and decoded once into a cache."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

import data
from data import Bytes, Labels, UserError
from store.downloads import Archive, fetch
from store.files import CHUNK, short_name, whole_file
from store.output import Progress

SHAPES_COUNT = 8192
SIDES = {"cifar10": 32, "stl10": 48, "celeba": 64}  # pixels a side of the published data sets, as the paper has them

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
)
_CELEBA_KEY = "resourcekey=0-dYn9z10tMJOBAkviAcfdyQ"
CELEBA = Archive(
    "img_align_celeba.zip",
    "https://drive.usercontent.google.com/download?export=download&confirm=t"
    f"&id=0B7EVK8r0v71pZjFTYXZWM3FlRnM&{_CELEBA_KEY}",
    "md5:00d2c5bc6d35e252742224ab0c1e8fcb",
    f"https://drive.google.com/file/d/0B7EVK8r0v71pZjFTYXZWM3FlRnM/view?{_CELEBA_KEY}",
)


def load_pictures(dataset: str, data_dir: str | Path, image_size: int) -> Bytes:
    """All pictures of a data set: bytes, (N, 3, image_size, image_size).

    dataset: "shapes", one of SIDES, whose side image_size must divide, or the path of a folder. Raises UserError.
    """
    if dataset == "shapes":
        return data.draw_shapes(SHAPES_COUNT, image_size)
    published: dict[str, Callable[[str | Path], Bytes]]
    published = {"cifar10": load_cifar10, "stl10": load_stl10, "celeba": load_celeba}
    if dataset in published:
        return average_squares(published[dataset](data_dir), image_size)
    return load_folder(dataset, data_dir, image_size)


def average_squares(pictures: Bytes, side: int) -> Bytes:
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


def load_labels(dataset: str, data_dir: str | Path, image_size: int) -> Labels | None:
    """The class of each picture of `load_pictures`, whole numbers (N,) from 0, or None for what is not LABELLED.

    CIFAR-10 comes with ten classes; of the shapes, kind and colour make one. Raises UserError.
    """
    if dataset == "shapes":
        return data.draw_labelled_shapes(SHAPES_COUNT, image_size, seed=0)[1]
    if dataset == "cifar10":
        files = data.cifar10_files(data_dir, data.CIFAR10_TRAIN)
        return np.concatenate([data.read_batch(path, content)[1] for path, content in files])
    return None


def load_cifar10(data_dir: str | Path, archive: Archive = CIFAR10) -> Bytes:
    """CIFAR-10's 50,000 training pictures: bytes, (50000, 3, 32, 32).

    Uses data_dir/cifar-10-batches-py as it lies; if there is none, checks and extracts data_dir's archive, downloading
    it first where that is missing too. Raises UserError for whatever is wrong with network, archive or files.
    """
    if not (Path(data_dir) / data.CIFAR10_FOLDER).is_dir():
        fetch(archive, data_dir)
        extract_cifar10(Path(data_dir))
    return data.load_cifar10(data_dir)


def extract_cifar10(data_dir: Path) -> None:
    """Write the seven files that CIFAR-10's archive must hold into a folder beside it, which appears only when complete.

    Raises UserError if the archive is damaged or incomplete.
    """
    folder = data_dir / data.CIFAR10_FOLDER
    try:
        temporary = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=data_dir))
        try:
            for path, content in data.cifar10_files(data_dir, CIFAR10_FILES):
                (temporary / path.name).write_bytes(content)
            temporary.chmod(0o755)
            temporary.replace(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; free some space or choose another --data-dir") from None


CACHE = ".pictures"  # how the name of a cache ends


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
        with data.reading(source):
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
        with data.reading(path), zipfile.ZipFile(path) as file:
            faces = {face.filename: face for face in file.infolist() if face.filename.endswith(".jpg")}

            def opened(name: str) -> IO[bytes]:
                if max(faces[name].file_size, faces[name].compress_size) > data.MAX_FILE:
                    raise ValueError("it is too large for a face of CelebA")
                return io.BytesIO(file.read(name))

            yield from decode(sorted(faces), opened, side, path)

    folder = Path(data_dir) / "img_align_celeba"
    if folder.is_dir():
        return load_folder(folder, data_dir, side)
    return cached(Path(data_dir) / f"celeba-{side}{CACHE}", side, chunks)
