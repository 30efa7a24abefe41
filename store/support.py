"""What the tests share about bad luck and bad files: damage at random, a server, full disks, small published data sets."""

import contextlib
import dataclasses
import hashlib
import http.server
import io
import os
import pickle
import random
import re
import struct
import tarfile
import threading
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

import data
from data import UserError
from store import datasets

MODEST = 1 << 27  # bytes that reading a small file, whatever it says, may take


def fuzz(examples):
    """The settings of a test that reads damaged bytes: FUZZ=10000 python -m pytest -k fuzz has more of them."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=int(os.environ.get("FUZZ", examples)), suppress_health_check=checks, deadline=20_000)


def fuzzed(content, seed):
    """Bytes after one to four changes, half of them where a part of an archive, an array or a picture says what it is."""
    rng, content = random.Random(seed), bytearray(content)
    for _ in range(rng.randint(1, 4)):
        heads = [m.start() for m in re.finditer(rb"PK|NUMPY|ustar|numpy|labels|torch|IHDR|JFIF", content)]
        at = rng.choice(heads) + rng.randint(0, 80) if heads and rng.random() < 0.5 else rng.randint(0, len(content))
        count, elsewhere = rng.choice((1, 2, 4, 8, 512)), rng.randint(0, len(content))
        flipped = bytes(x ^ 1 << rng.randrange(8) for x in content[at : at + 1])
        junk = rng.choice((b"\0", b"\xff", b"\x7f", b"9")) * count
        match rng.choice(("flip", "write", "junk", "insert", "remove", "copy", "cut")):
            case "flip":
                content[at : at + 1] = flipped
            case "write":
                content[at : at + count] = rng.randbytes(count)
            case "junk":
                content[at : at + count] = junk
            case "insert":
                content[at:at] = rng.randbytes(count)
            case "remove":
                del content[at : at + count]
            case "copy":
                content[at : at + count] = content[elsewhere : elsewhere + count]
            case "cut":
                del content[at:]
    return bytes(content)


@contextlib.contextmanager
def one_line_at_most():
    """Within this context, only a UserError of one line may be raised, which ends it, and MODEST memory be taken."""
    tracemalloc.start()
    try:
        yield
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MODEST


@contextlib.contextmanager
def server(content, status=200, announced=None, cuts=(), ranges=True):
    """Serve `content` on 127.0.0.1 under every path: the address, and the range that each request asked for.

    status, announced: what the answer says of itself and of its length. cuts: after how many bytes the first connections
    break. ranges: whether requests for a range are obeyed, or answered with everything.
    """
    requests, cuts = [], list(cuts)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers["Range"]
            requests.append(asked)
            start = int(asked[len("bytes=") : -1]) if asked and ranges else 0
            if start and start >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if start else status)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start if announced is None else announced))
            self.end_headers()
            self.wfile.write(content[start:][: cuts.pop(0) if cuts else None])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{running.server_port}/archive", requests
        finally:
            running.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@contextlib.contextmanager
def files_of_at_most(size):
    """Within this context, the system refuses to let a file grow larger than so many bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def leftovers(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def holds(path, content):
    """Whether a file holds these bytes; pytest would take minutes to print how thousands of them differ."""
    return path.read_bytes() == content


def slope(height, width, number=0):
    """A picture that gets redder downwards and greener to the right: bytes (height, width, 3)."""
    picture = np.empty((height, width, 3), np.uint8)
    picture[..., 0] = np.linspace(0, 250, height)[:, None]
    picture[..., 1] = np.linspace(0, 250, width)
    picture[..., 2] = 40 * number
    return picture


def encoded(picture, kind="PNG", **options):
    out = io.BytesIO()
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(out, kind, **options)
    return out.getvalue()


class Python2Pickler(pickle._Pickler):
    """Writes byte strings as Python 2 wrote its strings, and numpy's names as its old releases had them."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        value = value.encode() if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string


def python2_pickle(value):
    out = io.BytesIO()
    Python2Pickler(out, 2).dump(value)
    return out.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def cifar_batch(seed, rows=8, **changes):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (rows, 3072), dtype=np.uint8)
    return {b"batch_label": b"b", b"labels": [int(x) for x in rng.integers(0, 10, rows)], b"data": pixels} | changes


def tarred(files, kind=tarfile.REGTYPE):
    """A compressed tar file of these contents by name; or of links or folders of these names."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, len(content) if kind == tarfile.REGTYPE else 0
            member.linkname = "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def cifar_archive(count=7, kind=tarfile.REGTYPE):
    """CIFAR-10's archive, or the first members of it, with eight pictures a batch."""
    names = datasets.CIFAR10_FILES[:count]
    return tarred({f"{data.CIFAR10_FOLDER}/{x}": python2_pickle(cifar_batch(i)) for i, x in enumerate(names)}, kind)


def of(archive, content, url="http://127.0.0.1:9/x"):
    """The same archive, but with the sum of `content`, at `url`, where nobody listens by default."""
    return dataclasses.replace(archive, url=url, digest=f"md5:{hashlib.md5(content).hexdigest()}")


# An archive of each published data set; what is to be read from it, (N, 3, S, S); and how far that may be off.


def cifar10_archive():
    return cifar_archive(), np.concatenate([cifar_batch(i)[b"data"] for i in range(5)]).reshape(-1, 3, 32, 32), 0


def stl10_archive():
    """STL-10's, with five unlabeled pictures: each channel column by column, as published."""
    pictures = np.stack([slope(96, 96, i) for i in range(5)])
    columns = pictures.transpose(0, 3, 2, 1).tobytes()
    files = {"test_X.bin": columns[:27648], "test_y.bin": b"\1", "train_X.bin": columns[:27648], "train_y.bin": b"\1",
             "unlabeled_X.bin": columns, "class_names.txt": b"airplane\n", "fold_indices.txt": b"0\n"}  # fmt: skip
    halves = pictures.reshape(5, 48, 2, 48, 2, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2)
    return tarred({f"stl10_binary/{name}": content for name, content in files.items()}), halves, 2


def celeba_archive():
    """CelebA's, with five faces of 178x218, red above and below the square in the middle; and a file that is no picture."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("img_align_celeba/", b"")
        for i in (3, 1, 2, 5, 4):
            face = np.full((218, 178, 3), (255, 0, 0), np.uint8)
            face[20:198] = slope(178, 178, i)
            archive.writestr(f"img_align_celeba/00000{i}.jpg", encoded(face, "JPEG", quality=95))
        archive.writestr("img_align_celeba/readme.txt", b"no picture")
    nearest = np.linspace(1, 176, 64).round().astype(int)
    faces = [slope(178, 178, i)[nearest[:, None], nearest].transpose(2, 0, 1) for i in range(1, 6)]
    return out.getvalue(), np.stack(faces), 12


PUBLISHED = {
    "cifar10": (datasets.CIFAR10, cifar10_archive, datasets.load_cifar10),
    "stl10": (datasets.STL10, stl10_archive, datasets.load_stl10),
    "celeba": (datasets.CELEBA, celeba_archive, datasets.load_celeba),
}
each_data_set = pytest.mark.parametrize("name", PUBLISHED)


def assert_pictures(pictures, expected, tolerance):
    assert pictures.dtype == np.uint8
    assert pictures.shape == expected.shape
    distance = np.abs(pictures.astype(float) - expected)
    if tolerance:  # JPEG and bicubic are near: exactly so away from the edges
        assert distance.mean() < tolerance / 4
        distance = distance[..., 2:-2, 2:-2]
    assert distance.max() <= tolerance
