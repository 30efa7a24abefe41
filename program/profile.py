"""Where a training's time goes: every operation of the engine is timed through the hook that it has for this."""

import autograd as ag
from store import output

measured = ag.profile  # until branch `engine`


def tell(times, waited, total):
    """Print which operations took how long of `total` seconds, and how many of these were waited for data."""
    operations = [(*key, *entry) for key, entry in times.items()]
    names = ("operation", "direction", "seconds", "calls", "bytes")
    output.tell(f"{ag.profile_table(times)}\n"
                f"waiting for data: {waited:.3f} s of {total:.1f} s, {100 * waited / total:.2f}%",
                event="profile", operations=[dict(zip(names, row, strict=True)) for row in operations], waited=waited,
                seconds=total)  # fmt: skip
