"""Files that others publish: fetched, resumed where a download broke off, and checked."""

import contextlib
import dataclasses
import hashlib
import http.client
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from data import UserError
from store.files import being_made, need_space, plain
from store.output import Progress, note


@dataclasses.dataclass(frozen=True)
class Archive:
    """A file that a data set is published as."""

    name: str
    url: str
    digest: str  # as published: the algorithm, and the first hexadecimal digits or all of them
    page: str  # where a person can fetch it by hand
    most: int = 1 << 28  # bytes that it can have


def fetch(archive, data_dir):
    """The path of an archive in the folder data_dir, downloaded if it is not there, and checked. Raises UserError."""
    path = Path(data_dir) / archive.name
    if not path.exists():
        with being_made(path):
            if not path.exists():  # another process has fetched it in the meantime
                download(archive, path)
                return path
    check_digest(path, archive, path)
    return path


def download(archive, path):
    """Fetch an Archive to `path`, showing progress on standard error, and check its sum.

    What arrives is kept in path.part, so that the next call goes on where a connection broke off or a disk filled up (an
    HTTP range request). The file appears under its own name only when it is whole and right. Raises UserError.
    """
    part = path.with_name(path.name + ".part")
    try:
        with plain(part).open("ab") as out:
            receive(archive, out, path)
        try:
            check_digest(part, archive, archive.url)
        except UserError:
            part.unlink()
            raise
        part.replace(path)
    except (OSError, ValueError, http.client.HTTPException) as error:  # a malformed URL is a ValueError
        reason = getattr(error, "reason", None) or error
        advice = f"start again to go on from what has arrived, or fetch {archive.page} by hand and save it as {path}"
        raise UserError(f"cannot download {archive.url} to {path}: {reason}; {advice}") from None
    finally:
        with contextlib.suppress(OSError):
            if not part.stat().st_size:
                part.unlink()


PATIENCE = 60.0  # seconds within which a server has to send SLOWEST bytes a second
SLOWEST = 1000


def receive(archive, out, path):
    """Append to the open file `out` what it lacks of an archive. Raises whatever goes wrong with that.

    Another thread does so, because a server that sends a byte now and then keeps one waiting in places that know no time.
    This one gives that up, with TimeoutError, when less than SLOWEST comes: it ends when `out`, closed, is written to.
    """
    received, failure = 0, None

    def work():
        nonlocal received, failure
        try:
            for size in append(archive, out, path, progress):
                received += size
        except Exception as error:
            failure = error

    with Progress() as progress:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        since, before = time.monotonic(), 0
        while thread.is_alive():
            thread.join(1)
            if (now := time.monotonic()) - since > PATIENCE:
                if received - before < SLOWEST * PATIENCE and thread.is_alive():
                    raise TimeoutError(f"it sends less than {SLOWEST} bytes a second")
                since, before = now, received
    if failure:
        raise failure


def append(archive, out, path, progress):
    """What `receive` has a thread do: yields the size of each block that was appended. Raises whatever goes wrong."""
    done = out.tell()
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        answer = urllib.request.urlopen(request, timeout=PATIENCE)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # nothing comes after these bytes: they are all
            return
        raise
    with answer:
        length, block = max(0, int(answer.headers.get("Content-Length") or 0)), answer.read1(1 << 18)
        if answer.status != 206:  # the file from its beginning, whatever was asked for
            if block.lstrip()[:1] == b"<":
                raise ValueError(f"it answered with a web page, not with {archive.name}")
            out.truncate(done := 0)
        total = done + length
        need_space(path, length, f"{archive.name} needs more room")
        note(f"downloading {archive.url}, {length / 1e6:.0f} MB, to {path}")
        while block:
            if max(total, done + len(block)) > archive.most:
                out.truncate(0)
                raise ValueError(f"it sends more than {archive.name} can have")
            out.write(block)
            done += len(block)
            progress(f"{archive.name}: {done / 1e6:.0f} MB" + (f" ({100 * done / total:.0f}%)" if total else ""))
            yield len(block)
            block = answer.read1(1 << 18)
    if done < total:
        raise ConnectionError(f"it broke off after {done} of {total} bytes")


def check_digest(path, archive, source):
    """Raise UserError, naming `source`, where the file at `path` came from, unless it has the archive's digest."""
    algorithm, expected = archive.digest.split(":")
    digest = hashlib.new(algorithm, usedforsecurity=False)
    try:
        with plain(path).open("rb") as file, Progress() as progress:
            while block := file.read(1 << 20):
                digest.update(block)
                progress(f"checking {path}: {file.tell() / 1e6:.0f} MB")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; move it away, or choose another --data-dir") from None
    if not digest.hexdigest().startswith(expected):
        raise UserError(
            f"{source} is not the file expected ({algorithm} {digest.hexdigest()}, not {expected}); "
            f"move it away if it lies here, and start again, or fetch {archive.page} by hand into --data-dir"
        )
