"""What Ctrl-C and SIGTERM do to a training."""

import contextlib
import os
import signal
import threading
import types


@contextlib.contextmanager
def stop_signals():
    """Within this context, a first Ctrl-C or SIGTERM does no more than to set `asked`, of what this yields, to its number.

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
        with contextlib.suppress(OSError):  # print may be at work in what this interrupts
            os.write(2, b"\nfinishing the step, to save it; Ctrl-C again stops at once\n")

    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
        for number in numbers:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        restore()
