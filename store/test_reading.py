"""The promises of store/reading.py: a picture of any kind is read right, or refused with a reason, in bounded memory."""

import errno
import io
import os
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from store import reading
from store.support import encoded, slope

SIDE = 16
RAMP = np.linspace(0, 1, SIDE)[None].repeat(SIDE, 0)  # black on the left, white on the right


def chunk(kind, body, right=True):
    return len(body).to_bytes(4, "big") + kind + body + (zlib.crc32(kind + body) ^ (not right)).to_bytes(4, "big")


def png(rows, bits, colour, *chunks):
    """A PNG of these rows of bytes, with further chunks before them."""
    head = struct.pack(">IIBBBBB", SIDE, len(rows), bits, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return reading.PNG + chunk(b"IHDR", head) + b"".join(chunks) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def packed(numbers, bits):
    """Rows of whole numbers of so many bits each, as PNG and TIFF have them."""
    return [int("".join(f"{x:0{bits}b}" for x in row), 2).to_bytes(-(-len(row) * bits // 8), "big") for row in numbers]


def tiff(content, bits, photometric=1, sample=1, order="<", channels=1):
    """A TIFF of one strip of numbers, (SIDE, SIDE, channels)."""
    tags = [(256, SIDE), (257, SIDE), (258, bits), (259, 1), (262, photometric), (273, 0), (277, channels), (278, SIDE),
            (279, len(content)), (339, sample)]  # fmt: skip
    start = 8 + 2 + 12 * len(tags) + 4
    words = (
        (tag, 4, 1, start if tag == 273 else value) if tag in (273, 279) else (tag, 3, 1, value) for tag, value in tags
    )
    entries = b"".join(
        struct.pack(f"{order}HHI{'I' if word[1] == 4 else 'HH'}", *word, *[0] * (word[1] == 3)) for word in words
    )
    return {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(tags)) + entries + bytes(4) + content


def numbers(dtype, top):
    return (RAMP * top).round().astype(dtype)


def kinds():
    """Files that all show the ramp, and whether they can be read right."""
    for bits in (1, 2, 4, 8, 16):
        rows, top = packed(numbers(int, 2**bits - 1), bits), 2**bits - 1
        white = chunk(b"tRNS", top.to_bytes(2, "big"))  # so that it is white that is transparent, on white
        yield f"grey{bits}.png", png(rows, bits, 0), True
        yield f"grey{bits}-transparent.png", png(rows, bits, 0, white), True
    for bits in (8, 16):
        top = 2**bits - 1
        both = np.stack([numbers(int, top), np.full((SIDE, SIDE), top)], 2).reshape(SIDE, -1)
        yield f"grey-alpha{bits}.png", png(packed(both, bits), bits, 4), True
        three = numbers(int, top).repeat(3, 1)
        yield f"rgb{bits}.png", png(packed(three, bits), bits, 2), True
        yield f"rgb{bits}-transparent.png", png(packed(three, bits), bits, 2, chunk(b"tRNS", b"\0\7" * 3)), bits == 8
    for order in "<>":
        word = {"<": "little", ">": "big"}[order]
        yield f"16-{word}.tif", tiff(numbers(f"{order}u2", 65535).tobytes(), 16, order=order), True
        negative = numbers(f"{order}u2", 65535)[:, ::-1]
        yield f"16-white-is-0-{word}.tif", tiff(negative.tobytes(), 16, 0, order=order), order == "<"
        yield f"signed16-{word}.tif", tiff(numbers(f"{order}i2", 32767).tobytes(), 16, sample=2, order=order), False
        yield f"32-{word}.tif", tiff(numbers(f"{order}u4", 2**32 - 1).tobytes(), 32, order=order), False
        yield f"signed32-{word}.tif", tiff(numbers(f"{order}i4", 2**31 - 1).tobytes(), 32, sample=2, order=order), False
        yield (
            f"float-{word}.tif",
            tiff(numbers(f"{order}f4", 1e3).astype(f"{order}f4").tobytes(), 32, sample=3, order=order),
            False,
        )
    yield "12.tif", tiff(b"".join(packed(numbers(int, 4095), 12)), 12), True
    yield "8.tif", tiff(numbers("u1", 255).tobytes(), 8), True
    yield "8-white-is-0.tif", tiff(numbers("u1", 255)[:, ::-1].tobytes(), 8, 0), True
    yield "signed8.tif", tiff(numbers("i1", 127).tobytes(), 8, sample=2), False
    yield "float.pfm", f"Pf\n{SIDE} {SIDE}\n-1.0\n".encode() + RAMP.astype("<f4").tobytes(), False
    yield "float64.tif", tiff(RAMP.tobytes(), 64, sample=3), False
    for top in (100, 255, 1000, 65535):
        content = numbers(">u2" if top > 255 else "u1", top).tobytes()
        yield f"{top}.pgm", f"P5 {SIDE} {SIDE} {top}\n".encode() + content, True
    for dtype, top in (("u1", 255), ("u2", 65535)):
        yield f"{top}.jp2", encoded(Image.fromarray(numbers(dtype, top)), "JPEG2000"), True
    yield "drawing.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n", False


@pytest.mark.parametrize(("name", "content", "right"), [pytest.param(*kind, id=kind[0]) for kind in kinds()])
def test_numbers_of_any_kind_are_read_right_or_not_at_all(name, content, right):
    if not right:
        with pytest.raises(Exception, match="not known|Pillow keeps|drawing|cannot identify|unknown"):
            reading.read_picture(io.BytesIO(content), SIDE, reading.Room())
        return
    picture = reading.read_picture(io.BytesIO(content), SIDE, reading.Room())
    expected = (RAMP * 255 > 127) * 255 if name.startswith(("grey1.", "grey1-")) else RAMP * 255
    assert np.abs(picture - expected).max() <= {"grey2": 43, "grey4": 9}.get(name.partition(".")[0].partition("-")[0], 3)


def test_of_16_bits_of_grey_one_that_is_transparent_is_white():
    rows = packed(np.full((SIDE, SIDE), 300), 16)
    read = reading.read_picture(io.BytesIO(png(rows, 16, 0, chunk(b"tRNS", b"\1\x2c"))), SIDE, reading.Room())
    assert read.min() == 255
    for bits, number in ((1, 0), (2, 1), (4, 7)):
        rows = packed(np.full((SIDE, SIDE), number), bits)
        read = reading.read_picture(
            io.BytesIO(png(rows, bits, 0, chunk(b"tRNS", bytes([0, number])))), SIDE, reading.Room()
        )
        assert read.min() == 255


EXIF = {"headless": b"Exif\0\0\0\x08\0\x02\x01\x12\0\x03", "cut": b"Exif\0\0MM\0*\0\0", "empty": b"Exif\0\0",
        "twice": b"Exif\0\0Exif\0\0II*\0\x08\0\0\0\0\0"}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's
def test_what_is_damaged_beside_the_pixels_costs_nothing():
    picture = slope(SIDE, SIDE)
    rows = [row.tobytes() for row in picture]
    files = {f"{kind} {name}": encoded(picture, name, exif=exif, **({"lossless": True} if name == "WEBP" else {}))
             for kind, exif in EXIF.items() for name in ("PNG", "WEBP")}  # fmt: skip
    for kind, body in ((b"eXIf", EXIF["cut"]), (b"tEXt", b"a\0b"), (b"gAMA", b"\0\0\0\1"), (b"iCCP", b"x"), (b"pHYs", b"")):
        files[f"wrong sum of {kind}"] = png(rows, 8, 2, chunk(kind, body, right=False))
        files[f"cut {kind}"] = png(rows, 8, 2, chunk(kind, body[:1]))
    files["text without end"] = png(rows, 8, 2, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26))))
    for name, content in files.items():
        read = reading.read_picture(io.BytesIO(content), SIDE, reading.Room())
        np.testing.assert_array_equal(read, picture.transpose(2, 0, 1), err_msg=name)


def test_a_jpegs_damaged_exif_costs_nothing(tmp_path):
    """Pillow asks it for the resolution, and falls over a text in its place."""
    entries = struct.pack("<HHHI4sHHIHH", 2, 0x11A, 2, 1, bytes(4), 0x128, 3, 1, 2, 0)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + entries + bytes(4)
    plain = encoded(slope(SIDE, SIDE), "JPEG", quality=95)
    without_density = plain[:2] + plain[2 + 2 + int.from_bytes(plain[4:6], "big") :]  # its first segment, JFIF
    content = without_density[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif + without_density[2:]
    read = (reading.read_picture(io.BytesIO(x), SIDE, reading.Room()) for x in (content, plain))
    np.testing.assert_array_equal(*read)


def test_trouble_that_passes_is_not_hidden_by_a_second_try(monkeypatch):
    damaged = png([row.tobytes() for row in slope(SIDE, SIDE)], 8, 2, chunk(b"tEXt", b"a", right=False))
    for error in (MemoryError(), OSError(errno.EIO, "Input/output error")):
        monkeypatch.setattr(reading, "fit", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)) as caught:
            reading.read_picture(io.BytesIO(damaged), SIDE, reading.Room())
        assert reading.is_passing(caught.value)


def test_memory_that_ran_out_is_known_whatever_a_decoder_calls_it(monkeypatch):
    monkeypatch.setattr(reading, "fit", lambda *_: (_ for _ in ()).throw(ValueError("broken data stream")))
    content = encoded(slope(SIDE, SIDE))
    with pytest.raises(ValueError, match="broken data stream"):
        reading.read_picture(io.BytesIO(content), SIDE, reading.Room())
    monkeypatch.setattr(reading, "MEMORY", 1 << 50)
    with pytest.raises(OSError, match="[Mm]emory") as caught:
        reading.read_picture(io.BytesIO(content), SIDE, reading.Room())
    assert reading.is_passing(caught.value)


@pytest.mark.parametrize("kind", ["TGA", "BMP"])
def test_a_fourth_channel_that_hides_all_means_nothing_for_sure(kind):
    picture = Image.fromarray(np.dstack([slope(SIDE, SIDE), np.zeros((SIDE, SIDE), np.uint8)]))
    content = bytearray(encoded(picture, kind))
    if kind == "BMP":  # Pillow writes none of those that have a mask for it
        head = struct.pack("<IiiHHIIiiII4I", 108, SIDE, SIDE, 1, 32, 3, 0, 0, 0, 0, 0, 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
        content = (
            b"BM"
            + struct.pack("<IHHI", 14 + 108 + 4 * SIDE**2, 0, 0, 14 + 108)
            + head.ljust(108, b"\0")
            + bytes(4 * SIDE**2)
        )
    with pytest.raises(ValueError, match="all of it is transparent"):
        reading.read_picture(io.BytesIO(content), SIDE, reading.Room())


def test_colours_of_8_bits_where_there_should_be_16_are_refused():
    palette = Image.fromarray((RAMP * 255).astype(np.uint8))
    palette.putpalette([x for i in range(256) for x in (i, i, i)])
    content = encoded(palette, "TIFF")
    np.testing.assert_array_equal(reading.read_picture(io.BytesIO(content), SIDE, reading.Room())[0], np.asarray(palette))
    colours = struct.pack("<768H", *[i * 256 for _ in range(3) for i in range(256)])
    assert content.count(colours) == 1
    eight = content.replace(colours, struct.pack("<768H", *[i for _ in range(3) for i in range(256)]))
    with pytest.raises(ValueError, match="its colours are of 8 bits"):
        reading.read_picture(io.BytesIO(eight), SIDE, reading.Room())


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's
def test_a_photograph_is_turned_upright(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(slope(36, 36), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(io.BytesIO(content)) as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture).resize((12, 12), Image.Resampling.BICUBIC))
    read = reading.read_picture(io.BytesIO(content), 12, reading.Room())
    assert np.abs(read - expected.transpose(2, 0, 1).astype(int)).max() <= 1


@pytest.mark.parametrize("size", [(90, 61), (61, 90), (64, 64), (65, 64), (200, 37)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "I;16"])
def test_a_large_picture_is_averaged_down_in_bands(size, mode, monkeypatch):
    """As it would be resized at once, about: where there are fewer pixels to average, by those in between."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    if mode == "I;16":
        smooth = Image.fromarray(np.asarray(smooth)[..., 0].astype(np.uint16) * 257)
        smooth.format = "PNG"
    elif mode == "RGBA":
        smooth.putalpha(Image.fromarray(rng.integers(0, 256, (5, 7), np.uint8)).resize(size, Image.Resampling.BICUBIC))
    else:
        smooth = smooth.convert(mode)
    at_once = reading.fit(smooth, 4).astype(int)
    monkeypatch.setattr(reading, "LARGE", 0)
    monkeypatch.setattr(reading, "BAND", 500)
    assert np.abs(reading.fit(smooth, 4) - at_once).max() < 12


def test_memory_is_shared_and_what_needs_more_than_there_is_is_refused(monkeypatch):
    monkeypatch.setattr(reading, "MEMORY", 100)
    room, most, lock = reading.Room(), [], threading.Lock()

    def take(size):
        with room.take(size), lock:
            most.append(room.used)

    threads = [threading.Thread(target=take, args=(size,)) for size in [30, 60, 90, 100] * 25]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) <= 100
    assert room.used == 0
    with pytest.raises(ValueError, match="too large: to decode it takes"), room.take(101):
        pass


@pytest.mark.parametrize(("kind", "least"), [("BMP", 2), ("JPEG", 6)])
def test_what_a_picture_may_take_is_counted_before_it_is_known(kind, least):
    """A BMP may be packed, which Pillow keeps twice; a JPEG may have several passes, between which it keeps numbers."""
    with Image.open(io.BytesIO(encoded(slope(20, 20), kind))) as picture:
        assert reading.extra_memory(picture) >= least * 400


DECODE = """
import os, sys
os.cpu_count = lambda: 64
from store import datasets, reading
reading.MEMORY = 100_000_000
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) // 1000
before = peak()
print(len(datasets.load_folder(sys.argv[1], sys.argv[2], 16)), peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures with Linux's /proc")
def test_decoding_takes_no_more_memory_than_it_may(tmp_path):
    """Ten pictures take 20 MB and more each: a PNG that, a WebP four times as much, a progressive JPEG half more."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    large = Image.new("RGBA", (2000, 2000), (200, 30, 30, 128))
    (folder / "a.png").write_bytes(encoded(large, compress_level=1))
    (folder / "b.webp").write_bytes(encoded(large, "WEBP", quality=10, method=0))
    (folder / "c.jpg").write_bytes(encoded(large.convert("RGB"), "JPEG", progressive=True, subsampling=0))
    for i in range(7):
        os.link(folder / "a.png", folder / f"{i}.png")
    command, root = [sys.executable, "-c", DECODE, folder, tmp_path / "data"], Path(reading.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    count, peak = done.stdout.split()
    assert count == "10", done.stderr
    assert int(peak) < 130


def test_libraries_are_not_heard(capfd):
    picture = bytearray(
        encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), "TIFF", compression="tiff_lzw")
    )
    for at in range(8, len(picture) - 1000, 997):
        picture[at] ^= 0x55
    with reading.hushed(), pytest.raises(OSError, match="decoder error"):
        warnings.warn("odd", stacklevel=1)
        print("heard", file=sys.stderr)
        reading.read_picture(io.BytesIO(picture), 16, reading.Room())
    print("and after", file=sys.stderr)
    assert capfd.readouterr().err == "heard\nand after\n"
