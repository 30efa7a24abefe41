"""How the program speaks to people and to other programs."""

import contextlib
import datetime
import json
import math
import multiprocessing
import os
import shutil
import sys
import time

mode = "lines"  # what standard output is given: "lines" for people, "json" for programs, or nothing, "quiet"


def tell(line, **fields):
    """Say something on standard output: the line, if there is one; or with --json the fields, as one object in one line.

    A number that is not finite becomes null there, because JSON has no word for it.
    """
    if mode == "json":
        unknown = {name: None for name, x in fields.items() if isinstance(x, float) and not math.isfinite(x)}
        print(json.dumps(fields | unknown), flush=True)
    elif mode == "lines" and line is not None:
        print(line, flush=True)


def note(line):
    """Say on standard error what is going on, unless --quiet wants to hear of errors alone."""
    if mode != "quiet":
        warn(line)


def warn(line):
    """Say on standard error what is not as it should be, though it stops nothing; once, where processes share a run."""
    if sys.stderr and not multiprocessing.parent_process():  # where a shell closed it, print would take standard output
        print(one_line(line), file=sys.stderr, flush=True)


def end(message, code):
    """Say why the program ends with this exit code, unless a terminal is gone, an output full, or nobody reads it."""
    with contextlib.suppress(OSError):
        warn(f"transgan: {message}")
        tell(None, event="end", exit_code=code, error=one_line(message))


def is_live(stream):
    """Whether a line on this stream may change in place: on a terminal that takes escape sequences, and whose user does.

    TERM=dumb says that the terminal does not, any NO_COLOR but an empty one that the user does not (no-color.org).
    """
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return bool(stream and stream.isatty()) and not plain


def one_line(message):
    """A message as one line of printable characters, whatever names of files and damaged contents put into it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)


def clock(seconds):
    """Seconds as h:mm:ss, or as days where there is more than one."""
    days = seconds / 86400
    return f"{days:,.1f} days" if days >= 1 else str(datetime.timedelta(seconds=int(seconds)))


class Progress:
    """Says on standard error what goes on, in a line that changes in place; where none can, see `is_live`, now and then.

    That is after three seconds, and then each time after twice as long, up to a minute.
    """

    def __enter__(self):
        self.live = mode != "quiet" and is_live(sys.stderr)
        self.wait, self.shown = (0.2, 0.0) if self.live else (3.0, time.monotonic())
        return self

    def __call__(self, text):
        if mode == "quiet" or time.monotonic() - self.shown < self.wait:
            return
        self.shown = time.monotonic()
        if self.live:
            text = one_line(text)[: shutil.get_terminal_size().columns - 1]
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        else:
            note(one_line(text))
            self.wait = min(2 * self.wait, 60.0)

    def __exit__(self, *_):
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
