"""The promises of store/datasets.py: pictures of any kind are read right, and nothing that a file holds does any harm."""

import contextlib
import dataclasses
import errno
import functools
import gzip
import io
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import types
import warnings
import zipfile
from pathlib import Path

import test_transgan as base

import numpy as np  # isort: skip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data
from data import UserError
from store import datasets, files, reading
from store.support import (
    PUBLISHED,
    assert_pictures,
    celeba_archive,
    cifar_archive,
    cifar_batch,
    each_data_set,
    encoded,
    files_of_at_most,
    fuzz,
    fuzzed,
    leftovers,
    of,
    one_line_at_most,
    python2_pickle,
    slope,
    stl10_archive,
    tarred,
)

# --- 1. Archives ------------------------------------------------------------------------------------------------------


def test_files_that_a_person_extracted_are_used(tmp_path):
    content, *expected = stl10_archive()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        (tmp_path / "stl10_binary").mkdir()
        (tmp_path / datasets.STL10_FILE).write_bytes(tar.extractfile(datasets.STL10_FILE).read())
    assert_pictures(datasets.load_stl10(tmp_path), *expected)
    content, *expected = celeba_archive()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(tmp_path)
    assert_pictures(datasets.load_celeba(tmp_path), *expected)


@each_data_set
def test_a_disk_that_fills_up_while_reading_leaves_nothing_half_written(name, tmp_path):
    published, make, load = PUBLISHED[name]
    content, *expected = make()
    (tmp_path / published.name).write_bytes(content)
    with files_of_at_most(10_000), pytest.raises(UserError, match="File too large") as caught:
        load(tmp_path, of(published, content))
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == [published.name]
    assert_pictures(load(tmp_path, of(published, content)), *expected)


def bad_archives():
    yield "truncated", cifar_archive()[:-2000], "cannot read"
    yield "not an archive", b"hello" * 100, "cannot read"
    yield "empty", b"", "cannot read"
    yield "incomplete", cifar_archive(4), "is not CIFAR-10"
    yield "links", cifar_archive(kind=tarfile.SYMTYPE), "not a plain file"
    yield "folders", cifar_archive(kind=tarfile.DIRTYPE), "not a plain file"


@pytest.mark.parametrize(("content", "message"), [pytest.param(c, m, id=n) for n, c, m in bad_archives()])
def test_a_bad_archive_says_so_and_leaves_nothing_half_written(tmp_path, content, message):
    (tmp_path / datasets.CIFAR10.name).write_bytes(content)
    with pytest.raises(UserError, match="is not the file expected") as caught:
        datasets.load_cifar10(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message) as caught:
        datasets.load_cifar10(tmp_path, of(datasets.CIFAR10, content))
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == [datasets.CIFAR10.name]


@pytest.mark.parametrize("name", ["stl10", "celeba"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "other", "cut picture", "no picture"])
def test_a_damaged_archive_makes_no_cache(name, damage, tmp_path, capsys):
    published, make, load = PUBLISHED[name]
    content, *_ = make()
    if name == "stl10":
        cut = b"x" * (27647 if damage == "cut picture" else 0)
        other = tarred({"other" if damage == "other" else datasets.STL10_FILE: cut})
    else:
        with zipfile.ZipFile(out := io.BytesIO(), "w") as archive:
            archive.writestr("other" if damage == "other" else "img_align_celeba/1.jpg", b"x")
        other = out.getvalue()
    content = {"truncated": content[:-300], "text": b"hello" * 100, "empty": b""}.get(damage, other)
    (tmp_path / published.name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(tmp_path, of(published, content))
    assert "\n" not in str(caught.value)
    assert "cannot write" not in str(caught.value)  # it is not the cache that is wrong
    assert "move it away and start again" in str(caught.value)
    assert leftovers(tmp_path) == [published.name]


def test_a_file_too_large_is_not_extracted(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_FILE", 100)
    (tmp_path / datasets.CIFAR10.name).write_bytes(archive := cifar_archive())
    with pytest.raises(UserError, match="size"):
        datasets.load_cifar10(tmp_path, of(datasets.CIFAR10, archive))
    assert leftovers(tmp_path) == [datasets.CIFAR10.name]
    content, *_ = celeba_archive()
    (tmp_path / datasets.CELEBA.name).write_bytes(content)
    with pytest.raises(UserError, match="no picture that can be read .*too large for a face"):
        datasets.load_celeba(tmp_path, of(datasets.CELEBA, content))


made_once = functools.cache(lambda make: make()[0])


@each_data_set
@fuzz(40)
@given(seed=base.seeds)
def test_a_fuzzed_archive_only_ever_raises_our_own_error(name, seed):
    """Half of the damage is done inside of the compression; and nothing appears but what belongs there."""
    published, make, load = PUBLISHED[name]
    content = made_once(make)
    if seed % 2 and name != "celeba":
        content = gzip.compress(fuzzed(gzip.decompress(content), seed), 1)
    else:
        content = fuzzed(content, seed)
    folder = [data.CIFAR10_FOLDER, *(f"{data.CIFAR10_FOLDER}/{file}" for file in datasets.CIFAR10_FILES)]
    with tempfile.TemporaryDirectory() as top:
        where = Path(top) / "data"
        where.mkdir()
        (where / published.name).write_bytes(content)
        with one_line_at_most():
            pictures = load(where, of(published, content))
            assert pictures.dtype == np.uint8
            assert pictures.shape[1:] == (3, *[{"cifar10": 32, "stl10": 48, "celeba": 64}[name]] * 2)
            assert len(pictures)
        made = {*leftovers(where)} - {published.name, *(folder if name == "cifar10" else ())}
        assert all(re.fullmatch(rf"{name}-\d\d-[0-9a-f]{{16}}\.(pictures|skipped\.txt)", file) for file in made)
        assert os.listdir(top) == ["data"]


# --- 2. CIFAR-10's pickles --------------------------------------------------------------------------------------------


def read(content):
    return data.read_batch(Path("folder/batch"), content)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (cifar_batch(0) | {b"data": np.zeros((8, 3071), np.uint8)}, r"rows of 3072 bytes, found \(8, 3071\)"),
        (cifar_batch(0) | {b"data": np.zeros((0, 3072), np.uint8)}, "rows of 3072 bytes"),
        (cifar_batch(0) | {b"data": np.zeros((8, 3072), np.float32)}, "plain unsigned bytes"),
        (cifar_batch(0) | {b"data": np.zeros((8, 3072), np.int8)}, "plain unsigned bytes"),
        (cifar_batch(0) | {b"data": np.zeros((3072, 8), np.uint8).T}, "plain unsigned bytes"),
        (cifar_batch(0) | {b"data": [1, 2, 3]}, "rows of 3072 bytes, found list"),
        (cifar_batch(0) | {b"labels": [1, 2]}, "a list of 8 labels"),
        (cifar_batch(0) | {b"labels": [0] * 7 + [10]}, "from 0 to 9"),
        (cifar_batch(0) | {b"labels": [0] * 7 + [-1]}, "from 0 to 9"),
        (cifar_batch(0) | {b"labels": [0] * 7 + ["cat"]}, "from 0 to 9"),
        ({b"data": np.zeros((8, 3072), np.uint8)}, "labels"),
        ([1, 2], "is not a batch"),
    ],
)
def test_wrong_contents_say_so(value, message):
    with pytest.raises(UserError, match=message) as caught:
        read(python2_pickle(value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}N" + b"\x85" * 1_000_000 + b"Ns.",  # a tuple nested too deep to be hashed
        b"\x80\x02}N" + b"2\x86" * 60 + b"Ns.",  # one that doubles sixty times
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # a place in the memo that would take 34 GB
    ],
)
def test_pickles_built_to_exhaust_the_machine_are_refused(content):
    with pytest.raises(UserError, match="built to exhaust"):
        read(content)


def test_a_file_without_end_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_FILE", 1000)
    (tmp_path / data.CIFAR10_FOLDER).mkdir()
    (tmp_path / data.CIFAR10_FOLDER / data.CIFAR10_TRAIN[0]).write_bytes(python2_pickle(cifar_batch(0)))
    with pytest.raises(UserError, match="larger than 1000 bytes"):
        data.load_cifar10(tmp_path)


def test_modern_pickles_and_missing_files(tmp_path):
    for protocol in (3, 4):
        pictures, labels = read(pickle.dumps(cifar_batch(3), protocol))
        assert labels.tolist() == cifar_batch(3)[b"labels"]
        np.testing.assert_array_equal(pictures.reshape(8, -1), cifar_batch(3)[b"data"])
    (tmp_path / data.CIFAR10_FOLDER).mkdir()
    with pytest.raises(UserError, match="cannot read"):
        datasets.load_cifar10(tmp_path)


def test_what_python_says_of_a_pickle_in_two_lines_becomes_one():
    with pytest.raises(UserError, match=r"persistent id instruction was encountered,.*\); move folder away and"):
        read(b"\x80\2K\1Q.")


@fuzz(200)
@given(seed=base.seeds)
def test_a_fuzzed_pickle_only_ever_raises_our_own_error(seed):
    content = fuzzed(python2_pickle({b"labels": [1], b"data": np.zeros((1, 3072), np.uint8)}), seed)
    with one_line_at_most():
        pictures, labels = read(content)
        assert pictures.shape == (1, 3, 32, 32)
        assert pictures.dtype == np.uint8
        assert 0 <= labels <= 9


def test_labels_belong_to_their_pictures(tmp_path):
    pictures, labels = data.draw_labelled_shapes(40, 16)
    np.testing.assert_array_equal(pictures, data.draw_shapes(40, 16))
    for picture, label in zip(pictures, labels, strict=True):
        colour = np.array(data.PALETTE[label % len(data.PALETTE)])
        assert np.abs(picture[:, 8, 8].astype(int) - colour).max() < 8
    for i, name in enumerate(data.CIFAR10_TRAIN):
        (tmp_path / data.CIFAR10_FOLDER).mkdir(exist_ok=True)
        (tmp_path / data.CIFAR10_FOLDER / name).write_bytes(python2_pickle(cifar_batch(i)))
    expected = [label for i in range(5) for label in cifar_batch(i)[b"labels"]]
    assert datasets.load_labels("cifar10", tmp_path, 32).tolist() == expected
    assert datasets.load_labels("/some/folder", tmp_path, 32) is None


# --- 3. Any pictures --------------------------------------------------------------------------------------------------


def load_small(folder, side=4):
    return datasets.load_folder(folder, folder.parent / "data", side)


@fuzz(30)
@given(seed=base.seeds)
def test_a_fuzzed_cache_is_used_or_made_anew(seed, tmp_path):
    """Of its pictures nothing can be told; but there are all that it should have, and what was skipped."""
    folder = tmp_path / "pictures"
    folder.mkdir(exist_ok=True)
    for i in range(3):
        (folder / f"{i}.png").write_bytes(encoded(slope(9, 9, i)))
    (folder / "x.png").write_bytes(b"nothing")
    load_small(folder)
    (path,) = (tmp_path / "data").glob("*.pictures")
    path.write_bytes(fuzzed(path.read_bytes(), seed))
    with one_line_at_most():
        assert load_small(folder).shape == (3, 3, 4, 4)


def picture_kinds():
    """Files of many formats and modes, all showing the same slope; the tolerance is in steps of brightness."""
    picture = slope(60, 60)
    image = Image.fromarray(picture)
    grey = Image.fromarray(picture[..., 0])
    transparent = image.convert("RGBA")
    transparent.putalpha(0)
    turned, exif = image.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    grey3 = picture[..., :1].repeat(3, axis=2)
    yield "a.png", encoded(image), picture, 1
    yield "b.jpg", encoded(image, "JPEG", quality=95), picture, 8
    yield "c.bmp", encoded(image, "BMP"), picture, 1
    yield "d.webp", encoded(image, "WEBP", lossless=True), picture, 1
    yield "e.tiff", encoded(image, "TIFF"), picture, 1
    yield "f.PNG", encoded(image.convert("P", palette=Image.Palette.ADAPTIVE, colors=256)), picture, 40
    yield "g.gif", encoded(image, "GIF", save_all=True, append_images=[grey]), picture, 60
    yield "h.png", encoded(grey), grey3, 1
    yield "i.jpeg", encoded(image.convert("CMYK"), "JPEG", quality=95), picture, 8
    yield "j.png", encoded(transparent), np.full_like(picture, 255), 0
    yield "k.png", encoded(Image.fromarray(picture[..., 0].astype(np.uint16) * 257)), grey3, 1
    yield "l.jpg", encoded(turned, "JPEG", quality=95, exif=exif), picture, 8
    yield "m.png", encoded(image.convert("1", dither=0)), None, 0
    yield "n", encoded(image), picture, 1  # a file whose name tells nothing


def test_a_picture_of_any_format_and_mode_is_read(tmp_path):
    for name, content, _, _ in picture_kinds():
        (tmp_path / name).write_bytes(content)
    pictures = datasets.load_folder(tmp_path, tmp_path / "cache", 30)
    kinds = list(picture_kinds())
    assert pictures.shape == (len(kinds), 3, 30, 30)
    for picture, (name, _, expected, tolerance) in zip(pictures, kinds, strict=True):
        if expected is not None:
            halves = expected.reshape(30, 2, 30, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
            distance = np.abs(picture - halves)[..., 1:-1, 1:-1]
            assert distance.max() <= tolerance + 3 * (tolerance > 0), name


@given(square=st.integers(16, 90), more=st.integers(0, 60), tall=st.booleans(), side=st.sampled_from([4, 8]))
@settings(max_examples=50)
def test_the_middle_square_of_a_picture_is_taken(square, more, tall, side):
    """A blue square with a green first quarter, red on both sides: the result is the square, and nothing of the red."""
    picture, edge = np.full((square, square + 2 * more, 3), (255, 0, 0), np.uint8), square // 4
    picture[:, more : more + square] = (0, 0, 255)
    picture[:, more : more + edge] = (0, 255, 0)
    fitted = datasets.fit(Image.fromarray(picture.swapaxes(0, 1) if tall else picture), side)
    assert fitted.shape == (3, side, side)
    fitted = fitted.swapaxes(1, 2) if tall else fitted
    assert fitted[0, :, 1:-1].max() < 10
    assert fitted[1, :, 0].min() > 180
    assert fitted[2, :, side // 2 :].min() > 180
    assert fitted[0, :, -1].max() < 90


def test_a_folder_is_decoded_once_and_again_when_it_changes(tmp_path, capsys, monkeypatch):
    folder, cache = tmp_path / "faces [1]", tmp_path / "data"
    (folder / "more" / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    names = ["b.png", "a.png", "more/c.png", "more/deep/d.png"]
    for i, name in enumerate(names):
        (folder / name).write_bytes(encoded(np.full((9, 9, 3), i, np.uint8)))
    for name in (".DS_Store", ".hidden/e.png"):
        (folder / name).write_bytes(encoded(np.full((9, 9, 3), 99, np.uint8)))
    (folder / "notes.txt").write_text("no picture")
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    (folder / "cut.png").write_bytes(encoded(noise)[:700])
    decoded, fit = [], reading.fit
    monkeypatch.setattr(reading, "fit", lambda picture, side: decoded.append(side) or fit(picture, side))

    def load(side=8):
        decoded.clear()
        capsys.readouterr()
        return datasets.load_folder(folder, cache, side)[:, 0, 0, 0].tolist(), len(decoded), capsys.readouterr().err

    first = load()
    assert first[0] == [1, 0, 2, 3]  # in the order of their names
    assert "skipped 'cut.png'" in first[2]
    assert "skipped 'notes.txt'" in first[2]
    assert "hidden" not in first[2]
    assert load() == (first[0], 0, first[2])  # and what was skipped is named again
    (folder / "e.png").write_bytes(encoded(np.full((9, 9, 3), 4, np.uint8)))
    assert load()[0] == [1, 0, 4, 2, 3]
    os.utime(folder / "e.png", ns=(1, 1))
    assert load()[1] == 6
    (folder / "b.png").unlink()
    assert load()[0] == [1, 4, 2, 3]
    assert len(leftovers(cache)) == 2  # the pictures, and what was skipped
    assert load(16)[1] == 5
    assert load()[1] == 0
    assert len(leftovers(cache)) == 4
    assert datasets.load_folder(folder, folder, 8).shape == (4, 3, 8, 8)
    decoded.clear()
    assert datasets.load_folder(folder, folder, 8).shape == (4, 3, 8, 8)  # a cache among the pictures is none of them
    assert decoded == []
    assert len(list(folder.glob("*.pictures"))) == 1


def test_a_runs_own_grids_are_no_pictures_to_learn(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(slope(9, 9)))
    (tmp_path / "runs" / "x" / "samples").mkdir(parents=True)
    for name in ("checkpoint.npz", "log.csv", "samples/step-000000.png", "locality.png"):
        (tmp_path / "runs" / "x" / name).write_bytes(encoded(slope(9, 9)))
    assert len(datasets.load_folder(tmp_path, tmp_path / "data", 8)) == 1


def test_odd_pictures_and_long_names_are_taken_without_a_word(tmp_path, monkeypatch, capsys):
    folder = tmp_path / ("long" * 60)
    folder.mkdir()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # Pillow warns of larger ones
    (folder / "large.png").write_bytes(encoded(slope(20, 20)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert datasets.load_folder(folder, tmp_path, 8).shape == (1, 3, 8, 8)
    assert capsys.readouterr().err == ""


def test_many_unreadable_files_are_counted_and_an_empty_folder_is_refused(tmp_path, capsys):
    folder = tmp_path / "pictures"
    with pytest.raises(UserError, match="there is no folder"):
        datasets.load_folder(folder, tmp_path, 8)
    folder.mkdir()
    with pytest.raises(UserError, match="holds no files"):
        datasets.load_folder(folder, tmp_path, 8)
    for i in range(14):
        (folder / f"{i}.txt").write_text("x")
    with pytest.raises(UserError, match="holds no picture that can be read"):
        datasets.load_folder(folder, tmp_path, 8)
    (folder / "one.png").write_bytes(encoded(slope(9, 9)))
    capsys.readouterr()
    assert len(datasets.load_folder(folder, tmp_path, 8)) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    (named,) = tmp_path.glob("*.skipped.txt")
    assert lines[-1] == f"skipped 4 more of {folder}; all 14 are named in {named}"
    assert all(f"'{i}.txt': it is no picture" in named.read_text() for i in range(14))
    with pytest.raises(UserError, match="cannot write in .* choose another --data-dir"):
        datasets.load_folder(folder, folder / "1.txt", 8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
@fuzz(30)
@given(seed=base.seeds)
def test_a_fuzzed_picture_is_read_or_skipped(kind, seed):
    good, bad = encoded(slope(9, 9)), fuzzed(encoded(slope(20, 20), kind), seed)
    with warnings.catch_warnings(), one_line_at_most():
        warnings.simplefilter("ignore")  # Pillow's, on odd pictures
        contents = {"good": good, "bad": bad}
        results = dict(datasets.decode([*contents], lambda name: io.BytesIO(contents[name]), 8, "x"))
    assert results["good"].shape == (3, 8, 8)
    assert isinstance(results["bad"], Exception) or results["bad"].shape == (3, 8, 8)
    assert not reading.is_passing(results["bad"])


@pytest.fixture
def few(tmp_path):
    """A folder of four pictures, of brightness 0, 1, 2 and 3."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.png").write_bytes(encoded(np.full((9, 9, 3), i, np.uint8)))
    return folder


def brightness(folder):
    return load_small(folder)[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OSError(errno.EIO, "Input/output error"), OSError(errno.EMFILE, "Too many open files"),
     PermissionError(errno.EACCES, "Permission denied"), FileNotFoundError(errno.ENOENT, "No such file or directory")],
)  # fmt: skip
def test_a_passing_trouble_is_no_property_of_a_picture(error, few, capsys, monkeypatch):
    """All are decoded again at the next start, but what there is is used by who cannot do so, or shares a run."""
    real = datasets.read_picture

    def sick(file, *rest):
        if file.name.endswith("2.png"):
            raise error
        return real(file, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "read_picture", sick)
        for _ in range(2):
            assert brightness(few) == [0, 1, 3]
            assert f"skipped '2.png': {error.strerror if error.args else 'MemoryError'}" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing, "parent_process", lambda: True)
        assert brightness(few) == [0, 1, 3]
    (cache,) = (few.parent / "data").glob("*.pictures")
    with files.being_made(cache):  # as by another process
        assert brightness(few) == [0, 1, 3]
    with monkeypatch.context() as patch:  # if it lasts, it is the only one that is tried again
        seen = []
        patch.setattr(datasets, "read_picture", lambda file, *rest: seen.append(file.name) or sick(file, *rest))
        assert brightness(few) == [0, 1, 3]
        assert {Path(name).name for name in seen} == {"2.png"}
    capsys.readouterr()
    assert brightness(few) == [0, 1, 2, 3]
    assert capsys.readouterr().err == ""
    assert len(leftovers(few.parent / "data")) == 1


def test_what_another_process_made_in_the_meantime_is_not_made_again(few, monkeypatch):
    real, decoded = datasets.being_made, []

    @contextlib.contextmanager
    def late(path):
        monkeypatch.setattr(datasets, "being_made", real)
        brightness(few)  # as the other does
        monkeypatch.setattr(datasets, "read_picture", lambda *_: decoded.append(path))
        with real(path):
            yield

    monkeypatch.setattr(datasets, "being_made", late)
    assert brightness(few) == [0, 1, 2, 3]
    assert not decoded


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="about POSIX's files")
def test_whatever_is_left_out_is_named_at_every_start(few, capsys):
    far = few.parent / "far" / "cats"
    far.mkdir(parents=True)
    (far / "x.png").write_bytes(encoded(slope(9, 9)))
    os.mkfifo(few / "pipe.png")
    for name, target in (("zero.png", "/dev/zero"), ("nothing.png", "nowhere"), ("no folder", "nowhere/at/all"),
                         ("round.png", "round.png"), ("cats", far), ("again", far), ("loop", few)):  # fmt: skip
        (few / name).symlink_to(target)
    for i in range(12):
        (few / f"a.pictures{i}.png").write_bytes(b"no picture")
    (few / "b.pictures").write_bytes(encoded(slope(9, 9)))  # a name that is like that of a cache, and is none's
    lost = ["pipe.png", "zero.png", "nothing.png", "no folder", "round.png", "cats", "loop"]
    lost += [f"a.pictures{i}.png" for i in range(12)]
    for _ in range(2):
        assert len(load_small(few)) == 6  # of the linked folder, the first of its names
        lines = capsys.readouterr().err.splitlines()
        (named,) = (few.parent / "data").glob("*.skipped.txt")
        assert all(f"skipped '{name}': " in named.read_text() for name in lost)
        named.unlink()  # it is written again
        assert [line[:7] for line in lines] == ["skipped"] * 11
        assert lines[10] == f"skipped {len(lost) - 10} more of {few}; all {len(lost)} are named in {named}"
    for name in lost:
        (few / name).unlink()
    assert len(load_small(few)) == 6
    assert capsys.readouterr().err == ""
    assert not named.exists()


def test_what_may_not_be_read_is_named_and_the_rest_decoded_once(few, capsys, monkeypatch):
    (few / "closed").mkdir()
    (few / "mine.png").write_bytes(encoded(slope(9, 9)))
    scanned, access, decoded, fit = os.scandir, os.access, [], reading.fit

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scanned(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "mine.png" and access(path, mode))
    monkeypatch.setattr(reading, "fit", lambda picture, side: decoded.append(side) or fit(picture, side))
    for _ in range(2):
        assert len(load_small(few)) == len(decoded) == 4
        assert capsys.readouterr().err == "skipped 'closed': Permission denied\nskipped 'mine.png': Permission denied\n"
    monkeypatch.undo()
    assert len(load_small(few)) == 5
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", [-1, -9, -48, 48, 0])
def test_a_cache_that_is_not_whole_is_made_anew(damage, few):
    assert brightness(few) == [0, 1, 2, 3]
    (cache,) = (few.parent / "data").iterdir()
    cache.write_bytes(cache.read_bytes()[damage:] if damage >= 0 and damage else cache.read_bytes()[:damage])
    assert brightness(few) == [0, 1, 2, 3]


def test_a_cache_goes_by_how_pictures_were_read(few, monkeypatch):
    brightness(few)
    white = lambda *_: np.full((3, 4, 4), 255, np.uint8)  # noqa: E731
    monkeypatch.setattr(reading, "fit", white)
    for patch, expected in (
        ((datasets, "READING", datasets.READING), [0, 1, 2, 3]),
        ((datasets, "READING", -1), [255] * 4),
    ):
        monkeypatch.setattr(*patch)
        assert brightness(few) == expected
    monkeypatch.undo()
    assert brightness(few) == [0, 1, 2, 3]
    monkeypatch.setattr(reading, "fit", white)
    monkeypatch.setattr(datasets.PIL, "__version__", "99.0")  # which may read other kinds
    assert brightness(few) == [255] * 4
    assert len(leftovers(few.parent / "data")) == 1


@each_data_set
def test_a_published_data_set_that_changed_or_is_half_there_is_noticed(name, tmp_path, capsys):
    published, make, load = PUBLISHED[name]
    content, *_ = make()
    (tmp_path / published.name).write_bytes(content)
    found = len(load(tmp_path, of(published, content)))
    said = f"is not the whole of {name}: it gives {found} pictures, not {datasets.COUNTS[name]:,}"
    for _ in range(2):
        assert capsys.readouterr().err.count(said) == 1
        load(tmp_path, of(published, content))
    if name == "cifar10":
        return
    other = tmp_path / "other"
    other.mkdir()
    place = other / (datasets.STL10_FILE if name == "stl10" else "img_align_celeba/1.jpg")
    place.parent.mkdir()
    for grey in (10, 200):
        picture = np.full((96, 96, 3), grey, np.uint8)
        place.write_bytes(picture.tobytes() if name == "stl10" else encoded(picture, "JPEG"))
        assert abs(int(load(other, published)[0].mean()) - grey) < 3
    assert len([*other.glob("*.pictures")]) == 1
    shutil.rmtree(place.parent)
    if name == "stl10":  # as is advised: what was made of a part of it would pass for all
        assert f"move {other / 'stl10-48-*.pictures'}, and {place} if it is there, away" in capsys.readouterr().err
        for cache in other.glob("stl10-48-*.pictures"):
            cache.unlink()
    with pytest.raises(UserError, match="cannot download"):
        load(other, dataclasses.replace(published, url="http://127.0.0.1:1/"))


MAKE = """
import sys, time
from store import datasets, reading
fit = reading.fit
def slow(*words):
    time.sleep(0.5)
    return fit(*words)
reading.fit = slow
datasets.load_folder(*sys.argv[1:], 4)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="about POSIX's signals")
def test_what_a_killed_decoding_leaves_goes_and_what_another_makes_stays(few, tmp_path):
    command, where = [sys.executable, "-c", MAKE, few, tmp_path / "data"], tmp_path / "data"
    for i in range(60):
        (few / f"more{i}.png").write_bytes(encoded(slope(9, 9)))
    other = subprocess.Popen(command, cwd=Path(datasets.__file__).parents[1])
    try:
        while not [*where.glob("*.part")]:
            assert other.poll() is None
        with pytest.raises(UserError, match="another process is making .*; start again when it has finished"):
            load_small(few)
        (tmp_path / "else").mkdir()
        (tmp_path / "else" / "x.png").write_bytes(encoded(slope(9, 9)))
        load_small(tmp_path / "else")
        assert len([*where.glob("*.part")]) == 1
    finally:
        other.kill()
        other.wait()
    for name in ("poetry.lock", "mine.7.part"):
        (where / name).write_text("somebody else's")
    (where / f"fid-stats-x-8-{'0' * 16}.npz.7.part").write_bytes(bytes(1 << 20))
    (where / f"{data.CIFAR10_FOLDER}.7.part").mkdir()
    load_small(tmp_path / "else")
    assert [name for name in leftovers(where) if not name.endswith(".pictures")] == ["mine.7.part", "poetry.lock"]


@contextlib.contextmanager
def not_for_ever():
    """Within this context, whatever waits for three seconds is interrupted."""

    def ring(*_):
        raise AssertionError("it waits or reads for ever")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(3)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="about POSIX's files")
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_in_place_of_files_are_refused(kind, few):
    where = few.parent / "data"

    def put(path):
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
        return path

    brightness(few)
    (cache,) = where.iterdir()
    tries = [(put(cache), lambda: load_small(few))]
    for name, (published, _, load) in PUBLISHED.items():
        for file in (published.name, f"{published.name}.part", f"{published.name}.lock"):
            path = put(few.parent / f"{name} {file}" / file)
            archive = dataclasses.replace(published, url="http://127.0.0.1:9/x")
            tries.append((path, lambda load=load, path=path, archive=archive: load(path.parent, archive)))
    tries.append((put(few.parent / datasets.STL10_FILE), lambda: datasets.load_stl10(few.parent)))
    tries.append((put(few.parent / data.CIFAR10_FOLDER / "data_batch_1"), lambda: datasets.load_cifar10(few.parent)))
    tries.append((few.parent / data.CIFAR10_FOLDER, lambda: datasets.load_labels("cifar10", few.parent, 32)))
    for path, load in tries:
        with not_for_ever(), pytest.raises((UserError, OSError), match="a pipe or a device"):
            load()
            raise AssertionError(path)


def test_a_disk_too_small_is_noticed_before_decoding(few, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))
    with pytest.raises(UserError, match="need room: .* choose another --data-dir"):
        load_small(few)
    assert leftovers(few.parent / "data") == []


def test_cifar10_is_read_from_its_files_or_out_of_their_archive(tmp_path):
    with pytest.raises(UserError, match="there is neither cifar-10-batches-py nor cifar-10-python.tar.gz in"):
        data.load_cifar10(tmp_path)
    rows, folder = np.random.default_rng(0).integers(0, 256, (5, 4, 3072), np.uint8), tmp_path / data.CIFAR10_FOLDER
    folder.mkdir()
    for name, row in zip(data.CIFAR10_TRAIN, rows, strict=True):
        (folder / name).write_bytes(pickle.dumps({b"data": row, b"labels": [3, 1, 4, 1]}, 3))
    with tarfile.open(tmp_path / data.CIFAR10_ARCHIVE, "w:gz") as archive:
        archive.add(folder, folder.name)
    np.testing.assert_array_equal(data.load_cifar10(tmp_path), rows.reshape(20, 3, 32, 32))
    shutil.rmtree(folder)
    np.testing.assert_array_equal(data.load_cifar10(tmp_path), rows.reshape(20, 3, 32, 32))


class Command:
    """An object whose pickle asks for a function to be called with an argument."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {b"labels": [1], b"extra": x}, lambda x: {b"data": x}])
def test_a_pickle_that_tries_to_run_code_runs_nothing(tmp_path, protocol, wrap):
    made = tmp_path / "ran"
    for function, argument in ((os.mkdir, str(made)), (eval, f"__import__('os').mkdir({str(made)!r})")):
        content = pickle.dumps(wrap(Command(function, argument)), protocol)
        with pytest.raises(UserError, match="it asks for|is not a batch") as caught:
            data.read_batch(tmp_path / "batch", content)
        assert "\n" not in str(caught.value)
    assert not made.exists()
