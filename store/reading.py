"""One picture of any kind: read right, or refused with a reason; in bounded memory, and without a library's chatter.

Pillow opens some forty formats. What it decodes is taken where it is certain what the numbers mean: bytes, and 16 bits of
grey whose black and white are known. Floats, 32 bits and numbers with a sign say nowhere what is white.
"""

import contextlib
import ctypes
import functools
import io
import logging
import mmap
import os
import sys
import threading
import warnings

import numpy as np
from PIL import Image, ImageOps

MEMORY = 870_000_000  # bytes that pictures may take together while they are decoded
SMALL = 1 << 20  # bytes of a file that is read as a whole
LARGE = 1 << 22  # pixels of a picture's square from which on it is averaged down before it is resized
BAND = 1 << 18  # pixels of a larger one that are converted at once

SAMPLES = {"1": 1, "L": 1, "P": 1, "LA": 4, "La": 4, "PA": 4, "RGB": 4, "RGBA": 4, "RGBa": 4, "RGBX": 4, "CMYK": 4,
           "YCbCr": 4, "LAB": 4, "HSV": 4}  # fmt: skip  # Pillow's modes of bytes, and how many a pixel takes in memory
GREY16 = {"PNG": ("I;16", "I;16B", "I"), "TIFF": ("I;16", "I;16B", "I;16L", "I;16N"), "JPEG2000": ("I;16",), "PPM": ("I",)}

# Bytes for a pixel that decoders take beside the picture, as measured.
DECODERS = {"PNG": 0, "BMP": 2, "DIB": 2, "GIF": 0, "PPM": 0, "TGA": 0, "PCX": 0, "WEBP": 13, "AVIF": 8}

PNG = b"\x89PNG\r\n\x1a\n"  # how such a file begins


def is_passing(error):
    """Whether what kept a picture from being read is no property of it: memory ran out, or its file could not be read."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and bool(error.errno))


class Room:
    """MEMORY bytes, shared by threads: each takes what its picture needs, and waits until as much is free."""

    def __init__(self):
        self.used, self.changed = 0, threading.Condition()

    @contextlib.contextmanager
    def take(self, size):
        """Within this context, so many bytes are taken. Raises ValueError for more than there are at all."""
        if size > MEMORY:
            raise ValueError(f"it is too large: to decode it takes {size / 1e6:,.0f} MB of memory")
        with self.changed:
            self.changed.wait_for(lambda: self.used + size <= MEMORY)
            self.used += size
        try:
            yield
        finally:
            with self.changed:
                self.used -= size
                self.changed.notify_all()


def read_picture(file, side, room):
    """The picture in an open file, as `fit` makes it: bytes, (3, side, side). Raises whatever Pillow raises."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size <= SMALL:  # so that no decoder meets the disk
        file = io.BytesIO(file.read())
    try:
        return _decode(file, side, room)
    except Exception as error:
        mmap.mmap(-1, MEMORY // 4).close()  # an OSError where little is left, for which decoders have words of their own
        if is_passing(error):
            raise
        try:  # what is said beside the pixels may be damaged, and they fine
            file.seek(0)
            with room.take(2 * size):
                content = bare(file)
            return _decode(io.BytesIO(content), side, room, size)
        except Exception as second:
            raise second if is_passing(second) else error from None


def _decode(file, side, room, held=0):
    with Image.open(file) as picture:
        if picture.format in ("EPS", "WMF"):
            raise ValueError("it is a drawing that another program would have to make a picture of")
        extra, most = extra_memory(picture), 16 * BAND + 4 * min(min(picture.size), max(1 << 11, 8 * side)) ** 2
        picture.draft(None, (2 * side, 2 * side))  # a JPEG may come smaller, if not too small: that is faster
        with room.take(held + extra + picture.width * picture.height * SAMPLES.get(picture.mode, 4) + most):
            return fit(picture, side)


def bare(file):
    """An open PNG or JPEG without what is said of its picture, such as EXIF, profiles or text; b"" if there is none."""
    parts, size = [file.read(8)], file.seek(0, os.SEEK_END)
    if parts[0].startswith(b"\xff\xd8"):
        file.seek(0)
        content = file.read()
        named = functools.reduce(lambda x, name: x.replace(name, b"none"), (b"Exif", b"MPF\0", b"8BIM"), content)
        return named if named != content else b""  # what has no name that is known goes unread
    file.seek(8)
    while parts[0] == PNG and len(head := file.read(8)) == 8:
        body = file.read(int.from_bytes(head[:4], "big") + 4)
        if head[4:] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            parts += [head, body]
    return b"".join(parts) if sum(map(len, parts)) < size else b""


def extra_memory(picture):
    """About how many bytes its decoder takes beside an open picture's own, which has not been loaded."""
    pixels, channels = picture.width * picture.height, len(picture.getbands())
    if picture.format in ("JPEG", "MPO"):
        # Of several passes, all coefficients are there before the first pixel. Others than progressive ones may have them,
        # too, and do not say so; but hardly large ones, which are not to be refused for it.
        return min(2 * channels * pixels, MEMORY if picture.info.get("progressive") else MEMORY // 2)
    if picture.format == "TIFF":
        tags = picture.tag_v2
        rows = min(tags.get(323) or tags.get(278) or picture.height, picture.height)  # of a tile, or of a strip
        turned = 4 * pixels if tags.get(274, 1) != 1 else 0  # Pillow does that itself
        return turned + 2 * rows * min(tags.get(322) or picture.width, picture.width) * channels
    return pixels * (6 * channels if picture.format == "JPEG2000" else DECODERS.get(picture.format, 4))


def fit(picture, side):
    """The largest square in the middle of a Pillow picture, resized (bicubic): bytes, (3, side, side).

    A photograph is turned upright, and what is transparent becomes white. Raises ValueError where it is not certain what
    the picture's numbers mean, and whatever Pillow does.
    """
    white, negative = meaning(picture)
    try:
        orientation = picture.getexif().get(0x0112, 1) if picture.format != "TIFF" else 1  # these, Pillow has turned itself
    except MemoryError:
        raise
    except Exception:  # it is damaged, which does not make it another picture
        orientation = 1
    picture.load()
    square = min(picture.size)
    factor = max(1, square // (4 * side)) if square**2 > LARGE else 1  # averaged down by this first, to save memory
    (left, x), (top, y) = (divmod(length - square, 2) for length in picture.size)  # x and y: half a pixel more
    right, bottom = left + square + x, top + square + y
    small = Image.new("RGB", (-(-(square + x) // factor), -(-(square + y) // factor)))
    step, visible = max(1, BAND // square // factor) * factor, False
    for row in range(top, bottom, step):
        band, shows = to_rgb(picture.crop((left, row, right, min(row + step, bottom))), white, negative)
        small.paste(band.reduce(factor), (0, (row - top) // factor))
        visible |= shows
    if not visible and picture.format in ("TGA", "BMP", "DIB", "PSD"):  # for which a fourth channel may mean nothing
        raise ValueError("all of it is transparent, if its fourth channel says so")
    box = x / 2 / factor, y / 2 / factor, (x / 2 + square) / factor, (y / 2 + square) / factor
    small = small.resize((side, side), Image.Resampling.BICUBIC, box)
    small.getexif()[0x0112] = orientation
    return np.ascontiguousarray(np.asarray(ImageOps.exif_transpose(small)).transpose(2, 0, 1))


def meaning(picture):
    """Which number of 16-bit grey is white, and whether that means black; before the picture is loaded.

    What PNG says of a colour that is transparent is put as Pillow's conversion wants it. Raises ValueError for what is not
    certainly understood.
    """
    tags = picture.tag_v2 if picture.format == "TIFF" else {}
    if any(kind != 1 for kind in np.atleast_1d(tags.get(339, 1))):  # SampleFormat
        raise ValueError("its numbers are floats or have a sign: which of them is white is not known")
    if picture.mode not in SAMPLES and picture.mode not in GREY16.get(picture.format or "", ()):
        raise ValueError(f"its numbers, {picture.mode} to Pillow, are no bytes: which of them is white is not known")
    if picture.mode == "P" and 0 < max(tags.get(320, (0,))) < 256:  # ColorMap
        raise ValueError("its colours are of 8 bits, where such a file has 16")
    transparent = picture.info.get("transparency")
    if picture.format == "PNG" and isinstance(transparent, (int, tuple)) and picture.mode != "P" and picture.tile:
        stored = picture.tile[0][3]
        if stored == "RGB;16B":
            raise ValueError("a colour of 16 bits is transparent, of which Pillow keeps 8")
        picture.info["transparency"] = {"1": 255, "L;2": 85, "L;4": 17}.get(stored, 1) * transparent
    bits = np.atleast_1d(tags.get(258, 16))[0]
    return (1 << int(bits)) - 1, tags.get(262) == 0


def to_rgb(picture, white, negative):
    """A picture of any mode that `meaning` takes, in RGB and without transparency; and whether any of it was visible."""
    if picture.mode.startswith("I"):
        grey = np.clip(np.asarray(picture).astype(np.int64), 0, white)
        hidden = grey == picture.info.get("transparency", -1)
        grey = (white - grey if negative else grey) * 255 // white
        return Image.fromarray(np.where(hidden, 255, grey).astype(np.uint8)).convert("RGB"), not hidden.all()
    if not picture.has_transparency_data:
        return picture.convert("RGB"), True
    picture = picture.convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(ground, picture).convert("RGB"), picture.getextrema()[3] != (0, 0)


when_decoded = int  # called when `lean` ends; for who wants freed memory kept. int does nothing


@contextlib.contextmanager
def lean():
    """Within this context, glibc returns what decoders free, and Room's count is what the process really takes.

    Left to itself, it keeps for each thread what that has ever freed, and a heap without M_MMAP_MAX breaks into pieces: two
    or three times as much as was ever used at once. Does nothing where the C library is another one.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-8, 1)  # M_ARENA_MAX: one heap for all threads
        mallopt(-4, 1 << 16)  # M_MMAP_MAX, and M_MMAP_THRESHOLD: what is large is no part of the heap
        mallopt(-3, 1 << 20)
        mallopt(-1, 1 << 20)  # M_TRIM_THRESHOLD
    try:
        yield
    finally:
        when_decoded()


@contextlib.contextmanager
def hushed():
    """Within this context, what libraries say of odd files (Python's warnings, logs, C's standard error) is not shown.

    What Python prints on sys.stderr is.
    """
    with contextlib.ExitStack() as after:
        after.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        after.callback(logging.disable, logging.root.manager.disable)
        logging.disable()
        with contextlib.suppress(OSError):  # there may be no standard error
            saved = after.enter_context(os.fdopen(os.dup(2), "wb", 0))
            after.callback(os.dup2, saved.fileno(), 2)
            with contextlib.suppress(AttributeError, OSError):  # or Python's may be no file
                if sys.stderr.fileno() == 2:
                    sys.stderr.flush()
                    heard = os.fdopen(os.dup(2), "w", 1, sys.stderr.encoding, "backslashreplace")
                    after.enter_context(contextlib.redirect_stderr(after.enter_context(heard)))
            with open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), 2)
        yield
