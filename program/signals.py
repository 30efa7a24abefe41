"""What Ctrl-C, SIGTERM and SIGHUP do to a training."""

import contextlib
import os
import signal
import sys
import threading
import types


@contextlib.contextmanager
def stop_signals():
    """Within this context, a first Ctrl-C, SIGTERM or SIGHUP only sets `asked`, of what this yields, to its number.

    The next one acts as usual. Signals that are ignored (nohup) stay so; and only the main thread may ask for signals, so
    in any other nothing changes. Windows has Ctrl-C and Ctrl-Break.
    """
    stop, before = types.SimpleNamespace(asked=None), {}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number, _):
        stop.asked = number
        restore()
        if number == getattr(signal, "SIGHUP", None):
            signal.signal(number, signal.SIG_IGN)  # a terminal that goes says so once for each process before this one
            forget_terminal()
        with contextlib.suppress(OSError):  # print may be at work in what this interrupts; and a closed 2 be the log by now
            os.write(2 if sys.stderr else -1, b"\nfinishing the step, to save it; Ctrl-C again stops at once\n")

    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")):
            if number and signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        restore()


def hang_up():
    """What is to be done when a terminal turns out to be gone: as if SIGHUP had come, which may be on its way."""
    forget_terminal()
    if hasattr(signal, "SIGHUP"):
        signal.raise_signal(signal.SIGHUP)


def forget_terminal():
    """Let what would still be written to a terminal that is gone, where each write fails, vanish."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        try:
            os.write(number, b"")
        except OSError:
            os.dup2(nowhere, number)
    os.close(nowhere)
