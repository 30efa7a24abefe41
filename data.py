"""Pictures for the GAN: drawn or read, shuffled into batches, and written back as grids.

Every data set becomes one array of bytes, (N, 3, H, W) in red, green, blue; only a batch is ever turned into floats.

Contents
    1. Errors and chance   UserError, first_line, random_stream
    2. CIFAR-10            load_cifar10, from its files or their archive; its pickles are never executed
    3. Shapes              draw_shapes, pictures that need no download
    4. Batches and grids   Batches, scale, to_bytes, save_grid
"""

from __future__ import annotations

import contextlib
import io
import pickle
import pickletools
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Bytes: TypeAlias = NDArray[np.uint8]  # pictures as they are kept and written, 0 to 255
Floats: TypeAlias = NDArray[np.floating[Any]]  # pictures as networks have them, about [-1, 1]
Labels: TypeAlias = NDArray[np.int_]  # the pictures' classes, from 0

# --- 1. Errors and chance ---------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something a person can put right; its message is one line that says what is wrong and what to do."""


def first_line(error: BaseException) -> str:
    """What an exception says in its first line, or else its name."""
    return (str(error).splitlines() or [type(error).__name__])[0]


PURPOSES = ("shapes", "order", "weights", "step", "judge", "co-training order", "evaluate", "classifier", "look")


def random_stream(purpose: str, seed: int, number: int = 0) -> np.random.Generator:
    """A NumPy random generator of its own for each purpose, seed (whole, at least 0) and number, such as an epoch's.

    So whatever is random in a run follows from its seed and from where it stands, and no two uses share their draws.
    Raises ValueError for a purpose that is not in PURPOSES.
    """
    return np.random.default_rng((seed, PURPOSES.index(purpose) + 1, number))


# --- 2. CIFAR-10 ------------------------------------------------------------------------------------------------------
# Krizhevsky 2009: 50,000 training and 10,000 test pictures of 32x32 in ten classes. TransGAN trains on the former.

CIFAR10_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
CIFAR10_ARCHIVE = "cifar-10-python.tar.gz"
CIFAR10_FOLDER = "cifar-10-batches-py"
CIFAR10_TRAIN = [f"data_batch_{i}" for i in range(1, 6)]
MAX_FILE = 64 << 20  # bytes of one file; the real ones hold 31 MB


def load_cifar10(data_dir: str | Path) -> Bytes:
    """CIFAR-10's 50,000 training pictures: bytes, (50000, 3, 32, 32).

    Uses data_dir/cifar-10-batches-py as it lies, or if there is none data_dir/cifar-10-python.tar.gz. Raises UserError for
    whatever is wrong with archive or files.
    """
    return np.concatenate([read_batch(path, content)[0] for path, content in cifar10_files(data_dir, CIFAR10_TRAIN)])


def cifar10_files(data_dir: str | Path, names: Sequence[str]) -> Iterator[tuple[Path, bytes]]:
    """Where each of these files of CIFAR-10 lies, in data_dir's folder or archive, and the bytes that it holds.

    Files are asked for by name, so nothing that an archive says can name a path outside. Raises UserError.
    """
    folder, archive = Path(data_dir) / CIFAR10_FOLDER, Path(data_dir) / CIFAR10_ARCHIVE
    if folder.is_dir():
        for path in (folder / name for name in names):
            try:
                with path.open("rb") as file:
                    yield path, file.read(MAX_FILE + 1)
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}; move {folder} away to fetch it anew") from None
        return
    if not archive.exists():
        raise UserError(
            f"there is neither {CIFAR10_FOLDER} nor {CIFAR10_ARCHIVE} in {archive.parent}; fetch it from {CIFAR10_PAGE}"
        )
    found = {}
    with reading(archive), tarfile.open(archive, "r:gz") as tar:  # read once, from beginning to end
        for member in tar:
            if (name := member.name.removeprefix(f"{CIFAR10_FOLDER}/")) in names:
                source = tar.extractfile(member) if member.isfile() and member.size <= MAX_FILE else None
                if source is None:
                    raise UserError(f"{archive}: {name} is not a plain file of CIFAR-10's size; move it away")
                found[name] = source.read()
    for name in names:
        if name not in found:
            raise UserError(f"{archive} is not CIFAR-10: it holds no {name}; move it away and start again")
        yield archive / name, found[name]


@contextlib.contextmanager
def reading(archive: Path) -> Iterator[None]:
    """Within this context, whatever a damaged archive makes Python raise, which can be anything, becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"cannot read {archive}: {first_line(error)}; if it is damaged, move it away and start again"
        ) from None


def read_batch(path: Path, content: bytes) -> tuple[Bytes, Labels]:
    """The pictures of one CIFAR-10 batch file, bytes (N, 3, 32, 32), and their classes, whole numbers (N,).

    Checks shape, type, and that there is a label from 0 to 9 for every picture. Raises UserError, which names `path`.
    """
    try:
        _refuse_bombs(content)
        batch = _CifarUnpickler(io.BytesIO(content), encoding="bytes").load()
        rows, labels = batch[b"data"], batch[b"labels"]
        if isinstance(rows, _StandIn):
            rows = rows.to_numpy()
    except Exception as error:  # a damaged pickle can raise anything at all
        raise UserError(
            f"{path} is not a batch of CIFAR-10 ({first_line(error)}); move {path.parent} away and start again"
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


class _StandIn:
    """What a pickle's `numpy.ndarray` or `numpy.dtype` becomes here: it only remembers what it is told."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def to_numpy(self) -> Bytes:
        _, shape, dtype, fortran, content = self.state
        if dtype.arguments[0] not in (b"u1", "u1") or fortran or not isinstance(content, bytes):
            raise ValueError("its array does not hold plain unsigned bytes")
        return np.frombuffer(content, np.uint8).reshape(shape)


class _CifarUnpickler(pickle.Unpickler):
    """Reads a pickle without executing what it asks for.

    A pickle may name any function and have it called. This one knows the three names an array needs and puts a harmless
    stand-in of ours in their place, so that not even numpy's own code runs on the file's word.
    """

    def find_class(self, module: str, name: str) -> Any:
        asked = f"{module}.{name}".replace("._core.", ".core.")  # NumPy 2's name for NumPy 1's
        if asked in ("numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct"):
            return _StandIn
        raise pickle.UnpicklingError(f"it asks for {module!r}.{name!r}, which no picture needs")


# --- 3. Shapes --------------------------------------------------------------------------------------------------------

PALETTE = [(225, 45, 45), (245, 200, 40), (50, 185, 75), (45, 105, 230), (240, 240, 240), (165, 60, 200)]
GROUNDS = [(25, 25, 35), (20, 45, 85), (70, 35, 30), (25, 65, 45)]


def draw_shapes(count: int, image_size: int = 16, seed: int = 0) -> Bytes:
    """`count` pictures of one filled circle, square or triangle on a plain or graded ground: bytes, (count, 3, S, S).

    The same arguments give the same pictures. Drawn four times too large and averaged down, for smooth edges.
    """
    return draw_labelled_shapes(count, image_size, seed)[0]


def draw_labelled_shapes(count: int, image_size: int = 16, seed: int = 0) -> tuple[Bytes, Labels]:
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


# --- 4. Batches and grids ---------------------------------------------------------------------------------------------


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


def save_grid(pictures: Floats, path: str | Path, columns: int = 8) -> None:
    """Write float pictures in [-1, 1], (N, 3, H, W), as one PNG, `columns` wide, small ones enlarged to be seen.

    Values outside the range are clipped.
    """
    count, _, height, width = pictures.shape
    rows = -(-count // columns)
    grid = np.zeros((rows * (height + 1) + 1, columns * (width + 1) + 1, 3), np.uint8)
    for i, picture in enumerate(to_bytes(pictures)):
        top, left = 1 + i // columns * (height + 1), 1 + i % columns * (width + 1)
        grid[top : top + height, left : left + width] = picture.transpose(1, 2, 0)
    factor = max(1, 96 // height)
    Image.fromarray(grid.repeat(factor, 0).repeat(factor, 1)).save(path, "PNG")
