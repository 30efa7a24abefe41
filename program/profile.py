"""Where the time goes: every operation of the engine is timed through the one hook that it has for this."""

import contextlib
import threading
import time

import numpy as np

import autograd as ag
from look.summary import in_columns
from store import output


@contextlib.contextmanager
def profile():
    """Within this context every operation is timed; yields {(name, direction): [seconds, calls, bytes]}.

    Seconds are summed over threads; the bytes are those of the results. An operation made of others is one. On a GPU each
    is waited for, which makes the whole slower. Within another such context, both see what is done.
    """
    times, thread, lock, outer = {}, threading.local(), threading.Lock(), ag.hook

    def timed(name, direction, function, *args, **kwargs):
        if getattr(thread, "busy", False):  # within an operation that is being timed: this one is part of it
            return function(*args, **kwargs)
        thread.busy = True
        wait()
        start = time.perf_counter()
        try:
            made = outer(name, direction, function, *args, **kwargs) if outer else function(*args, **kwargs)
            wait()
        finally:
            thread.busy = False
        seconds = time.perf_counter() - start
        with lock:
            entry = times.setdefault((name, direction), [0.0, 0, 0])
            entry[0] += seconds
            entry[1] += 1
            entry[2] += made.data.nbytes if made is not None else 0  # Adam's works in place
        return made

    ag.hook = timed
    try:
        yield times
    finally:
        ag.hook = outer


def wait():
    """Let a GPU finish."""
    if ag.xp is not np:
        ag.xp.cuda.Device().synchronize()


def tell_profile(times, waited, total):
    """Print what `profile` found, the operations in falling order of the time they took, and how many of `total` seconds
    were waited for data."""
    names = ("operation", "direction", "seconds", "calls", "bytes")
    operations = [dict(zip(names, (*key, *entry), strict=True)) for key, entry in times.items()]
    rows, measured = [("operation", "direction", "seconds", "share", "calls", "MB")], sum(x[0] for x in times.values())
    for (name, direction), (seconds, calls, size) in sorted(times.items(), key=lambda item: -item[1][0]):
        share = f"{100 * seconds / max(measured, 1e-12):.1f}%"
        rows.append((name, direction, f"{seconds:.3f}", share, f"{calls:,}", f"{size / 1e6:,.1f}"))
    text = f"{in_columns(rows, '<<>>>>')}\nwaiting for data: {waited:.3f} s of {total:.1f} s, {100 * waited / total:.2f}%"
    output.tell(text, event="profile", operations=operations, waited=waited, seconds=total)
