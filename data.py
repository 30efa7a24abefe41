"""Pictures for the GAN: fetched or drawn, checked, shuffled into batches, and written back as grids.

Every data set becomes one array of bytes, (N, 3, H, W) in red, green, blue; only a batch is ever turned into floats.

Contents
    1. Errors and randomness  UserError, random_stream
    2. CIFAR-10               download, load_cifar10, its archive and its pickles, which are never executed
    3. Shapes                 draw_shapes, pictures that need no download
    4. Batches and grids      load_pictures, Batches, save_grid
"""

import hashlib
import http.client
import io
import os
import pickle
import pickletools
import shutil
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# --- 1. Errors and randomness -----------------------------------------------------------------------------------------


class UserError(Exception):
    """Something a person can put right; its message is one line that says what is wrong and what to do."""


PURPOSES = ("shapes", "order", "weights", "step", "judge", "co-training order")


def random_stream(purpose, seed, number=0):
    """A NumPy random generator of its own for each purpose, seed (whole, at least 0) and number, such as an epoch's.

    So whatever is random in a run follows from its seed and from where it stands, and no two uses share their draws.
    Raises ValueError for a purpose that is not in PURPOSES.
    """
    return np.random.default_rng((seed, PURPOSES.index(purpose) + 1, number))


# --- 2. CIFAR-10 ------------------------------------------------------------------------------------------------------
# Krizhevsky 2009: 50,000 training and 10,000 test pictures of 32x32 in ten classes. TransGAN trains on the former.

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_MD5 = "c58f30108f718f92721af3b95e74349a"
CIFAR10_FOLDER = "cifar-10-batches-py"
CIFAR10_TRAIN = [f"data_batch_{i}" for i in range(1, 6)]
CIFAR10_FILES = [*CIFAR10_TRAIN, "test_batch", "batches.meta"]
MAX_FILE = 64 << 20  # bytes of one extracted file; the real ones hold 31 MB


def load_cifar10(data_dir, url=CIFAR10_URL, md5=CIFAR10_MD5):
    """CIFAR-10's 50,000 training pictures: bytes, (50000, 3, 32, 32).

    Uses data_dir/cifar-10-batches-py as it lies; if there is none, checks and extracts data_dir's archive, downloading
    it first where that is missing too. Raises UserError for whatever is wrong with network, archive or files.
    """
    folder = Path(data_dir) / CIFAR10_FOLDER
    if not folder.is_dir():
        archive = Path(data_dir) / "cifar-10-python.tar.gz"
        if archive.exists():
            check_md5(archive, md5, archive)
        else:
            download(url, archive, md5)
        extract_cifar10(archive, folder)
    return np.concatenate([read_cifar10(folder / name) for name in CIFAR10_TRAIN])


def download(url, path, md5):
    """Fetch `url` to `path`, showing progress on standard error, and check its md5 sum (hexadecimal).

    The file appears under its name only when it is whole and right. Raises UserError, having removed the part it had.
    """
    path, part = Path(path), None
    live = bool(sys.stderr and sys.stderr.isatty())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            urllib.request.urlopen(url, timeout=60) as answer,
            tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name + ".", delete=False) as out,
        ):
            part = Path(out.name)
            total, done, shown = int(answer.headers.get("Content-Length") or 0), 0, 0.0
            print(f"downloading {url}, {total / 1e6:.0f} MB, to {path.parent}", file=sys.stderr, flush=True)
            while block := answer.read(1 << 18):
                out.write(block)
                done += len(block)
                if live and time.monotonic() - shown > 0.2:
                    shown = time.monotonic()
                    percent = f" ({100 * done / total:.0f}%)" if total else ""
                    print(f"\r{done / 1e6:.0f} MB{percent}", end="", file=sys.stderr, flush=True)
        if live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        if done < total:
            raise UserError(f"the download of {url} broke off after {done} of {total} bytes; start again to retry")
        check_md5(part, md5, url)
        part.replace(path)
    except (OSError, ValueError, http.client.HTTPException) as error:  # a malformed URL is a ValueError
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"cannot download {url} to {path}: {reason}; check the connection and the folder, "
            "or train without a download: --dataset shapes"
        ) from None
    finally:
        if part:
            part.unlink(missing_ok=True)


def check_md5(path, md5, source):
    """Raise UserError, naming `source`, where the file at `path` came from, unless it has this md5 sum (hexadecimal)."""
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with Path(path).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; delete it, or choose another --data-dir") from None
    if digest.hexdigest() != md5:
        raise UserError(
            f"{source} is not the file expected (md5 {digest.hexdigest()}, not {md5}); "
            f"delete it if it lies here, and start again, or fetch {CIFAR10_URL} by hand into --data-dir"
        )


def extract_cifar10(archive, folder):
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
                if not member.isfile() or member.size > MAX_FILE:
                    raise UserError(f"{archive}: {member.name} is not a plain file of CIFAR-10's size; delete {archive}")
                with tar.extractfile(member) as source, (temporary / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
        temporary.chmod(0o755)
        temporary.replace(folder)
    except KeyError as error:
        raise UserError(f"{archive} is not CIFAR-10: {error.args[0]}; delete it and start again") from None
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(f"cannot extract {archive}: {error}; if it is damaged, delete it and start again") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_cifar10(path):
    """The pictures of one CIFAR-10 batch file: bytes, (N, 3, 32, 32).

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
        raise UserError(f"{path} is not a batch of CIFAR-10 ({error}); delete its folder and start again") from None
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.shape[1] != 3072 or not len(rows):
        raise UserError(f"{path}: expected rows of 3072 bytes, found {getattr(rows, 'shape', type(rows).__name__)}")
    if not isinstance(labels, list) or len(labels) != len(rows):
        raise UserError(f"{path}: expected a list of {len(rows)} labels")
    if not all(isinstance(label, int) and 0 <= label <= 9 for label in labels):
        raise UserError(f"{path}: labels must be whole numbers from 0 to 9")
    return rows.reshape(-1, 3, 32, 32)


def _refuse_bombs(content):
    """Raise ValueError for a pickle that could exhaust memory, time or the stack without calling anything.

    Tuples inside tuples can double without end, or be nested deeper than C can hash; and a memo number makes the reader
    allocate that many places. A batch holds a handful of tuples, those of its array.
    """
    if len(content) > MAX_FILE:
        raise ValueError(f"it is larger than {MAX_FILE} bytes")
    tuples = 0
    for opcode, argument, _ in pickletools.genops(content):
        tuples += "TUPLE" in opcode.name or opcode.name == "FROZENSET"
        if tuples > 16 or ("PUT" in opcode.name and argument > len(content)):
            raise ValueError("it is built to exhaust this machine")


class _Array:
    """What a pickle's `numpy.ndarray` becomes here: it only remembers what it is told."""

    state = None

    def __setstate__(self, state):
        self.state = state

    def to_numpy(self):
        _, shape, dtype, fortran, content = self.state
        plain = isinstance(dtype, _Dtype) and dtype.name in (b"u1", "u1") and isinstance(content, bytes)
        if not plain or fortran:
            raise ValueError("its array does not hold plain unsigned bytes")
        return np.frombuffer(content, np.uint8).reshape(shape)


class _Dtype:
    """What a pickle's `numpy.dtype` becomes here: its name."""

    def __init__(self, name, *_):
        self.name = name

    def __setstate__(self, state):
        pass


class _CifarUnpickler(pickle.Unpickler):
    """Reads a pickle without executing what it asks for.

    A pickle may name any function and have it called. This one knows the three names an array needs and puts harmless
    stand-ins of ours in their place, so that not even numpy's own code runs on the file's word.
    """

    def find_class(self, module, name):
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return _Array if name == "ndarray" else _Dtype
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")):
            return lambda *_: _Array()
        raise pickle.UnpicklingError(f"it asks for {module!r}.{name!r}, which no picture needs")


# --- 3. Shapes --------------------------------------------------------------------------------------------------------

PALETTE = [(225, 45, 45), (245, 200, 40), (50, 185, 75), (45, 105, 230), (240, 240, 240), (165, 60, 200)]
GROUNDS = [(25, 25, 35), (20, 45, 85), (70, 35, 30), (25, 65, 45)]


def draw_shapes(count, image_size=16, seed=0):
    """`count` pictures of one filled circle, square or triangle on a plain or graded ground: bytes, (count, 3, S, S).

    The same arguments give the same pictures. Drawn four times too large and averaged down, for smooth edges.
    """
    rng = random_stream("shapes", seed, image_size)
    large = 4 * image_size
    pictures = np.empty((count, 3, image_size, image_size), np.uint8)
    ramp = np.linspace(0, 1, large)[:, None, None]
    for i in range(count):
        ground = np.array(GROUNDS[rng.integers(len(GROUNDS))], float)
        to = ground * 2.2 if rng.random() < 0.5 else ground
        picture = np.broadcast_to(ground + (to - ground) * ramp, (large, large, 3)).round().astype(np.uint8)
        canvas = Image.fromarray(picture)
        radius = large * rng.uniform(0.28, 0.38)
        x, y = large * rng.uniform(0.44, 0.56, 2)
        box = [x - radius, y - radius, x + radius, y + radius]
        colour, draw = PALETTE[rng.integers(len(PALETTE))], ImageDraw.Draw(canvas)
        kind = rng.integers(3)
        if kind == 0:
            draw.ellipse(box, colour)
        elif kind == 1:
            draw.rectangle(box, colour)
        else:
            draw.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], colour)
        pictures[i] = np.asarray(canvas.resize((image_size, image_size), Image.Resampling.BOX)).transpose(2, 0, 1)
    return pictures


# --- 4. Batches and grids ---------------------------------------------------------------------------------------------

SHAPES_COUNT = 8192


def load_pictures(dataset, data_dir, image_size):
    """All pictures of a data set, "cifar10" or "shapes": bytes, (N, 3, image_size, image_size). Raises UserError."""
    if dataset == "shapes":
        return draw_shapes(SHAPES_COUNT, image_size)
    if image_size != 32:
        raise UserError(f"CIFAR-10's pictures are 32 pixels a side, not {image_size}; leave out --image-size")
    return load_cifar10(data_dir)


class Batches:
    """An endless row of batches: the pictures are shuffled afresh for each epoch, from (purpose, seed, epoch) alone.

    So batch `index` is the same whether or not the batches before it were ever asked for, and a resumed run needs to
    remember nothing but how many it has used. The rest of an epoch that fills no batch is left out.
    """

    def __init__(self, pictures, batch_size, seed=0, purpose="order"):
        if batch_size > len(pictures):
            raise UserError(
                f"a batch of {batch_size} is more than the {len(pictures)} pictures; lower --batch-size or --gen-batch-size"
            )
        self.pictures, self.batch_size, self.seed, self.purpose = pictures, batch_size, seed, purpose
        self.per_epoch = len(pictures) // batch_size
        self._epoch = self._order = None

    def __getitem__(self, index):
        """Batch number `index`, scaled to [-1, 1]: float32, (batch_size, 3, H, W)."""
        epoch, within = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = random_stream(self.purpose, self.seed, epoch).permutation(len(self.pictures))
        chosen = self._order[within * self.batch_size : (within + 1) * self.batch_size]
        return scale(self.pictures[chosen])


def scale(pictures):
    """Bytes 0..255 to float32 in [-1, 1], any shape."""
    return pictures.astype(np.float32) / np.float32(127.5) - np.float32(1)


def save_grid(pictures, path, columns=8):
    """Write float pictures in [-1, 1], (N, 3, H, W), as one PNG, `columns` wide, small ones enlarged to be seen.

    Values outside the range are clipped. The file appears only when it is whole.
    """
    pictures = ((np.clip(pictures, -1, 1) + 1) * 127.5).round().astype(np.uint8)
    count, _, height, width = pictures.shape
    rows = -(-count // columns)
    grid = np.zeros((rows * (height + 1) + 1, columns * (width + 1) + 1, 3), np.uint8)
    for i, picture in enumerate(pictures):
        top, left = 1 + i // columns * (height + 1), 1 + i % columns * (width + 1)
        grid[top : top + height, left : left + width] = picture.transpose(1, 2, 0)
    factor = max(1, 96 // height)
    path = Path(path)
    part = path.with_name(path.name + ".part")
    Image.fromarray(grid.repeat(factor, 0).repeat(factor, 1)).save(part, "PNG")
    os.replace(part, path)
