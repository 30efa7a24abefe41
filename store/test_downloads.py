"""The promises of store/downloads.py: what is published comes whole and right, whatever happens on the way."""

import contextlib
import dataclasses
import os
import shutil
import socketserver
import sys
import threading
import types

import pytest  # isort: skip

import data
from data import UserError
from store import datasets, downloads, files
from store.support import (  # noqa: F401 (a fixture)
    PUBLISHED,
    assert_pictures,
    each_data_set,
    files_of_at_most,
    holds,
    leftovers,
    no_proxy,
    of,
    server,
)


@each_data_set
def test_a_published_data_set_is_downloaded_checked_and_read_once(name, tmp_path, capsys):
    published, make, load = PUBLISHED[name]
    content, *expected = make()
    folder = tmp_path / "data"
    with server(content) as (url, requests):
        for _ in range(2):
            pictures = load(folder, of(published, content, url))
            assert_pictures(pictures, *expected)
    assert requests == [None]
    assert f"downloading {url}" in capsys.readouterr().err
    assert holds(folder / published.name, content)
    rest = [f"{data.CIFAR10_FOLDER}/{x}" for x in sorted(datasets.CIFAR10_FILES)]
    made = [data.CIFAR10_FOLDER, *rest] if name == "cifar10" else [path.name for path in folder.glob(f"{name}-*.pictures")]
    assert len(made) == (len(rest) + 1 if name == "cifar10" else 1)
    assert leftovers(folder) == sorted([published.name, *made])


@each_data_set
def test_an_archive_that_lies_there_is_used_and_what_was_made_of_it_too(name, tmp_path):
    published, make, load = PUBLISHED[name]
    content, *expected = make()
    (tmp_path / published.name).write_bytes(content)
    assert_pictures(load(tmp_path, of(published, content)), *expected)
    (tmp_path / published.name).unlink()
    assert_pictures(load(tmp_path, published), *expected)


CONTENT = bytes(range(256)) * 40


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_broke_off_goes_on_where_it_did(ranges, tmp_path):
    half, most = len(CONTENT) // 2, len(CONTENT) * 3 // 4
    with server(CONTENT, cuts=[half, most - half if ranges else most], ranges=ranges) as (url, requests):
        archive = of(datasets.CIFAR10, CONTENT, url)
        for done in (half, most):
            with pytest.raises(UserError, match=f"broke off after {done} of {len(CONTENT)} bytes; start again to go on"):
                downloads.fetch(archive, tmp_path)
            assert leftovers(tmp_path) == [archive.name + ".part"]
            assert holds(tmp_path / leftovers(tmp_path)[0], CONTENT[:done])
        assert holds(downloads.fetch(archive, tmp_path), CONTENT)
    assert requests == [None, f"bytes={half}-", f"bytes={most}-"]
    assert leftovers(tmp_path) == [archive.name]


def test_a_part_that_is_the_whole_is_taken_and_a_wrong_one_thrown_away(tmp_path):
    part = tmp_path / (datasets.CIFAR10.name + ".part")
    for kept, fits in ((CONTENT + b"more", False), (b"x" + CONTENT[1:-9], False), (CONTENT, True)):
        part.write_bytes(kept)
        with server(CONTENT) as (url, requests):
            archive = of(datasets.CIFAR10, CONTENT, url)
            if not fits:
                with pytest.raises(UserError, match="is not the file expected"):
                    downloads.fetch(archive, tmp_path)
                assert leftovers(tmp_path) == []
                continue
            assert holds(downloads.fetch(archive, tmp_path), CONTENT)
            assert requests == [f"bytes={len(CONTENT)}-"]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {"announced": 5000}, "broke off after 0 of 5000 bytes"),
        (b"\x1f\x8b wrong", {}, "is not the file expected .* fetch .* by hand"),
        (b" <html>try later</html>", {}, "answered with a web page, not with .*, or fetch .* by hand and save it as"),
        (b"gone", {"status": 404}, "Not Found.* fetch .* by hand"),
        (b"", {"status": 503}, "Service Unavailable"),
    ],
)
def test_a_bad_download_says_so_and_leaves_nothing(tmp_path, content, options, message):
    with server(content, **options) as (url, _), pytest.raises(UserError, match=message) as caught:
        downloads.fetch(of(datasets.CIFAR10, CONTENT, url), tmp_path)
    assert "\n" not in str(caught.value)
    assert "by hand" not in message or datasets.CIFAR10.page in str(caught.value)
    assert leftovers(tmp_path) == []


def test_a_web_page_does_not_cost_what_has_arrived(tmp_path):
    part = tmp_path / (datasets.CIFAR10.name + ".part")
    part.write_bytes(CONTENT[:1000])
    with server(b"<!doctype html>", ranges=False) as (url, _), pytest.raises(UserError, match="web page"):
        downloads.fetch(of(datasets.CIFAR10, CONTENT, url), tmp_path)
    assert holds(part, CONTENT[:1000])


def test_a_disk_that_fills_up_during_a_download_costs_nothing(tmp_path):
    with server(CONTENT) as (url, _):
        archive = of(datasets.CIFAR10, CONTENT, url)
        full = pytest.raises(UserError, match="cannot download .* File too large; start")
        with files_of_at_most(len(CONTENT) // 2), full:
            downloads.fetch(archive, tmp_path)
        assert leftovers(tmp_path) == [archive.name + ".part"]
        assert holds(downloads.fetch(archive, tmp_path), CONTENT)


def test_a_disk_too_small_is_noticed_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=5_000_000))
    small = pytest.raises(UserError, match="needs more room: 9 MB, and .* has 5; free")
    with server(b"x", announced=9_000_000) as (url, _), small:
        downloads.fetch(of(datasets.CIFAR10, b"x", url), tmp_path)
    assert leftovers(tmp_path) == []


def test_two_runs_do_not_make_the_same_file(tmp_path):
    archive = of(datasets.CIFAR10, CONTENT)
    with files.being_made(tmp_path / archive.name), pytest.raises(UserError, match="another process is making"):
        downloads.fetch(archive, tmp_path)
    assert leftovers(tmp_path) == []


def head(length):
    return b"HTTP/1.1 200 OK\r\n" + (f"Content-Length: {length}\r\n\r\n".encode() if length else b"\r\n")


@pytest.mark.parametrize(
    ("first", "block", "pause", "message"),
    [
        (b"HTTP/1.1 200 O", b"K", 0.01, "sends less than 1000 bytes a second"),  # its answer has no end
        (head(9000), b"\x1f", 0.01, "sends less than 1000 bytes a second"),
        (head(9000), b"", 0.01, "sends less than 1000 bytes a second|timed out"),
        (head(None), bytes(1 << 16), 0, "sends more than cifar-10-python.tar.gz can have"),
        (head(1 << 40), bytes(1 << 16), 0, "sends more than|needs more room"),
    ],
)
def test_a_server_that_never_ends_is_given_up(first, block, pause, message, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "PATIENCE", 1.0)
    ended = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(1 << 16)
            with contextlib.suppress(OSError):
                self.request.sendall(first)
                while not ended.wait(pause):
                    self.request.sendall(block)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as endless:
        threading.Thread(target=endless.serve_forever, args=(0.01,), daemon=True).start()
        timer = threading.Timer(5, ended.set)
        timer.start()  # so that who waits for ever fails
        try:
            archive = of(datasets.CIFAR10, b"x", f"http://127.0.0.1:{endless.server_address[1]}/x")
            with pytest.raises(UserError, match=message) as caught:
                downloads.fetch(dataclasses.replace(archive, most=1 << 22), tmp_path)
        finally:
            timer.cancel()
            ended.set()
            endless.shutdown()
    assert "\n" not in str(caught.value)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1000


def test_on_windows_the_same_byte_is_locked(tmp_path, monkeypatch):
    """A stand-in for its msvcrt: what is locked starts where the file stands."""
    locked = []

    def locking(number, mode, count):
        byte = os.lseek(number, 0, os.SEEK_CUR)
        if (byte, count) in locked:
            raise PermissionError(13, "Permission denied")
        locked.append((byte, count))

    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(sys, "platform", "win32")
    with (tmp_path / "x.lock").open("ab") as first, (tmp_path / "x.lock").open("ab") as second:
        assert files.lock(first)
        with pytest.raises(BlockingIOError):
            files.lock(second)


@each_data_set
def test_no_server_no_address_no_folder(name, tmp_path):
    published, _, load = PUBLISHED[name]
    for url in ("http://127.0.0.1:9/x", "http://[::1", "nonsense"):
        with pytest.raises(UserError, match="cannot download .* by hand and save it as"):
            load(tmp_path, dataclasses.replace(published, url=url))
        assert leftovers(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write in"):
        load(tmp_path / "file" / "data", of(published, b""))
    (tmp_path / published.name).mkdir()
    with pytest.raises(UserError, match="cannot read .* choose another --data-dir"):
        load(tmp_path, published)
