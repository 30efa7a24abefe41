"""Files that others publish: fetched, resumed where a download broke off, and checked."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.client
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO

from data import UserError
from store.files import lock
from store.output import Progress, note


@dataclasses.dataclass(frozen=True)
class Archive:
    """A file that a data set is published as."""

    name: str
    url: str
    digest: str  # as published: the algorithm, and the first hexadecimal digits or all of them
    page: str  # where a person can fetch it by hand


def fetch(archive: Archive, data_dir: str | Path) -> Path:
    """The path of an archive in the folder data_dir, downloaded if it is not there, and checked. Raises UserError."""
    path = Path(data_dir) / archive.name
    if path.exists():
        check_digest(path, archive, path)
    else:
        download(archive, path)
    return path


def download(archive: Archive, path: str | Path) -> None:
    """Fetch an Archive to `path`, showing progress on standard error, and check its sum.

    What arrives is kept in path.part, so that the next call goes on where a connection broke off or a disk filled up (an
    HTTP range request). The file appears under its own name only when it is whole and right. Raises UserError.
    """
    path, locked = Path(path), True
    part, by_hand = path.with_name(path.name + ".part"), f"or fetch {archive.page} by hand and save it as {path}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as out:
            lock(out)
            _receive(archive, out, path, by_hand)
        try:
            check_digest(part, archive, archive.url)
        except UserError:
            part.unlink()
            raise
        part.replace(path)
    except BlockingIOError:
        locked = False  # the part is another's, empty or not
        raise UserError(f"another run is downloading {path}; start again when it has finished") from None
    except (OSError, ValueError, http.client.HTTPException) as error:  # a malformed URL is a ValueError
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"cannot download {archive.url} to {path}: {reason}; start again to go on from what has arrived, {by_hand}"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            if locked and not part.stat().st_size:
                part.unlink()


def _receive(archive: Archive, out: IO[bytes], path: Path, by_hand: str) -> None:
    """Append to the open file `out` what it lacks of an archive."""
    done = out.tell()
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # nothing comes after these bytes: they are all
            return
        raise
    with answer, Progress() as progress:
        block = answer.read(1 << 18)
        if answer.status != 206:  # the file from its beginning, whatever was asked for
            if block.lstrip()[:1] == b"<":
                raise UserError(f"{archive.url} answered with a web page, not with {archive.name}; try later, {by_hand}")
            out.truncate(done := 0)
        total = done + int(answer.headers.get("Content-Length") or 0)
        free = shutil.disk_usage(path.parent).free
        if total - done > free:
            raise UserError(
                f"{archive.name} needs {(total - done) / 1e6:.0f} MB more and {path.parent} has {free / 1e6:.0f}; "
                "free some, or choose another --data-dir"
            )
        note(f"downloading {archive.url}, {(total - done) / 1e6:.0f} MB, to {path}")
        while block:
            out.write(block)
            done += len(block)
            progress(f"{done / 1e6:.0f} MB" + (f" ({100 * done / total:.0f}%)" if total else ""))
            block = answer.read(1 << 18)
    if done < total:
        raise UserError(
            f"the download of {archive.url} broke off after {done} of {total} bytes; start again to go on from there"
        )


def check_digest(path: str | Path, archive: Archive, source: str | Path) -> None:
    """Raise UserError, naming `source`, where the file at `path` came from, unless it has the archive's digest."""
    algorithm, expected = archive.digest.split(":")
    digest = hashlib.new(algorithm, usedforsecurity=False)
    try:
        with Path(path).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; delete it, or choose another --data-dir") from None
    if not digest.hexdigest().startswith(expected):
        raise UserError(
            f"{source} is not the file expected ({algorithm} {digest.hexdigest()}, not {expected}); "
            f"delete it if it lies here, and start again, or fetch {archive.page} by hand into --data-dir"
        )
