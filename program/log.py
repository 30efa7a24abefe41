"""What a training shows of itself: log.csv, a row a step, and the line that is to be seen while it runs."""

import contextlib
import csv
import math
import shutil
import sys
import time

import numpy as np

import autograd as ag
from data import UserError
from look.report import LABELS
from program import signals
from program.checkpoints import NotFinite
from store import files, output

FIELDS = ("step", "disc_loss", "gen_loss", "penalty", "sr_loss", "distance", "fid_own", "is_own", "pictures_per_second",
          "seconds")  # fmt: skip
LONG = 2 * 86400  # seconds: a run that takes more is better thought over
LAPTOP = "cifar10-laptop"  # the preset that takes less


def long_run(size, seconds):
    """What to say in the beginning of a run of this size that will take so many seconds here; None if it is not long."""
    if seconds <= LONG:
        return None
    instead = "lower --steps" if size == "tiny" else f"--preset {LAPTOP} is made for a machine like this"
    return f"this run will take about {output.clock(seconds)} here; {instead}"


# What the line says of a row, what is worth most before what a narrow terminal may cut off.
SHOWN = {"disc_loss": "D", "gen_loss": "G"} | LABELS | {"penalty": "penalty", "sr_loss": "SR"}


class Log:
    """Writes log.csv, a row a step, and shows progress: one live line on a terminal, now and then a line elsewhere.

    Losses arrive as arrays on the device and are read a few at a time, so that a step need not wait for them.
    every: steps from one grid of samples to the next, which the time left is to take into account.
    """

    PAUSES = 0.5, 10, 60  # seconds from line to line: live, elsewhere, and elsewhere within a step

    def __init__(self, path, step, steps, every=1):
        self.first, self.step, self.steps, self.every = step, step, steps, every
        kept = rows_until(step, path) if path.exists() and step else []
        self.earlier = float(kept[-1]["seconds"]) if kept else 0.0
        with files.whole_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
        self.file = path.open("a", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, FIELDS, extrasaction="ignore")
        self.live = output.mode == "lines" and output.is_live(sys.stdout)
        self.terminal = bool(sys.stdout and sys.stdout.isatty())
        self.waiting = []  # rows for the file
        self.row = self.seen = {"step": step}  # the last in it, and the last that was shown
        self.measured, self.event = {}, None  # the latter a GPU's, of the last step
        self.start = self.shown = self.last = time.monotonic()
        self.took = self.working = self.besides = 0.0  # seconds: of the first step, of all after it, of what is no step

    def add(self, step, losses, pictures):
        """Remember a step: its losses, and how many real pictures it used.

        A GPU still works on it; but the step before is waited for, so that a row has the time of a step.
        """
        if ag.xp is not np:
            before, self.event = self.event, ag.xp.cuda.get_current_stream().record()
            if before:
                before.synchronize()
        now = time.monotonic()
        seconds = max(now - self.last, 1e-9)
        row = {"step": step} | {name: x for name, x in losses.items() if x is not None}
        row |= {"pictures_per_second": pictures / seconds, "seconds": self.earlier + now - self.start}
        self.waiting.append(row)
        self.last, self.step = now, step
        if step > self.first + 1:
            self.working += seconds
        elif step > self.first:
            self.took = seconds

    def measure(self, measured):
        """Add the distance or scores that were measured after the last step."""
        self.waiting[-1] |= measured
        self.measured |= measured

    @contextlib.contextmanager
    def aside(self, what):
        """Within this context is done what is no part of any step, `what` in a word or two."""
        begun = time.monotonic()
        self.busy(what, at_once=True)
        yield
        took = time.monotonic() - begun
        self.last += took
        self.besides += took

    def busy(self, what, at_once=False):
        """Show what is being done within a step, or beside them, if that takes long."""
        now = time.monotonic()
        pause = self.PAUSES[0 if self.live else 2]
        if now - self.shown > pause and (at_once or now - self.last > 4 * pause):
            self.shown = now
            self.put(what)

    def left(self):
        """About how many seconds all that is still to do will take; None before there was a step.

        The first step counts for nothing as soon as there is another: whatever is made once is made in it.
        """
        done = self.step - self.first
        if not done:
            return None
        pace = self.working / (done - 1) if done > 1 else self.took
        return (pace + self.besides / max(done, self.every)) * (self.steps - self.step)

    def check(self):
        """Read the numbers that wait. Raises NotFinite at the first that is not."""
        for row in self.waiting:
            row |= numbers(row)
            for name, x in row.items():
                if not math.isfinite(x):
                    raise NotFinite(f"{name} is {x} at step {row['step']}")

    def write(self):
        """Write the rows that wait, with --json to standard output, too."""
        while self.waiting:
            self.row = numbers(self.waiting.pop(0))
            self.writer.writerow({name: x if name == "step" else f"{x:.6g}" for name, x in self.row.items()})
            output.tell(None, event="step", **self.row)
        self.file.flush()

    def tick(self):
        """Check and show what there is, if it is time to."""
        due = time.monotonic() - self.shown > self.PAUSES[0 if self.live else 1]
        if due or self.step in (self.first, self.first + 1, self.steps):
            self.check()
            self.show()

    def show(self):
        """Write the rows that wait, and show the newest that was not shown."""
        self.write()
        if self.row is not self.seen:
            self.seen, self.shown = self.row, time.monotonic()
            self.put()

    def put(self, doing=None):
        """Print the line; on a terminal that is gone, this is what to hang up for."""
        try:
            if self.live:
                print(f"\r\033[K{self.line(doing)[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
            elif output.mode == "lines":
                output.tell(self.line(doing))
        except OSError:
            if not self.terminal:
                raise
            signals.hang_up()

    def line(self, doing=None):
        """What is worth reading of the last row and of what was measured."""
        left, found = self.left(), {"pictures_per_second": 0.0} | self.measured | self.row
        parts = [f"step {found['step']}/{self.steps}", *([doing] if doing else [])]
        parts += [f"{output.clock(left)} left"] if left is not None else []
        parts += [f"{label} {found[name]:.3f}" for name, label in SHOWN.items() if name in found]
        parts.append(f"{output.clock(self.shown - self.start)} elapsed")
        return "  ".join([*parts, f"{found['pictures_per_second']:.0f} pictures/s"])

    def say(self, line, **fields):
        """Tell something that is not to be overwritten by the live line."""
        if self.live:
            print("\r\033[K", end="")
        output.tell(line, **fields)

    def close(self):
        """Write what waits, and leave the live line standing."""
        self.show()
        if self.live:
            with contextlib.suppress(OSError):  # of a terminal that is gone
                print()
        self.file.close()


def numbers(row):
    """A row of the log in Python's numbers: for losses on a device, this waits for them."""
    return {name: x if name == "step" else float(x) for name, x in row.items()}


def rows_until(step, path):
    """The rows of a log up to a step, which will go on from there. What comes after, if only half a row, is not looked at.

    Raises UserError for what is no such log.
    """
    kept = []
    try:
        with files.plain(path).open(newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file):
                if int(row["step"]) <= step:
                    kept.append(row)
                if int(row["step"]) >= step:
                    break
        if kept and not math.isfinite(float(kept[-1]["seconds"])):
            raise ValueError(f"it took {kept[-1]['seconds']} seconds")
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} is not a log of this program ({reason}); move it away to go on without") from None
    return kept
