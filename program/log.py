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
# What the line says of a row, what is worth most before what a narrow terminal may cut off.
SHOWN = {"disc_loss": "D", "gen_loss": "G"} | LABELS | {"penalty": "penalty", "sr_loss": "SR"}


class Log:
    """Writes log.csv, a row a step, and shows progress: one live line on a terminal, now and then a line elsewhere.

    A GPU may still work on the last step, whose losses are read when the next is handed over, or when something is to be
    done with them: so it always has something to do.
    every: steps from one to the next of what is done `aside`, which the time left is to take into account.
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
        self.row, self.measured, self.unwritten = {"step": step}, {}, False  # the last is of the row
        self.start = self.shown = self.last = time.monotonic()
        self.working = self.pace = 0.0  # seconds: of all steps that count for the time left, and of one
        self.late = int(ag.xp is not np)  # steps: a GPU's time for one is waited for, and counted, in the next
        self.besides = {}  # {what is no step: (seconds that it took, steps from one to the next)}

    def add(self, step, losses, pictures):
        """Write the row before, and begin a step's: its losses, and how many real pictures it used. Raises NotFinite."""
        self.write()
        losses = {name: x for name, x in losses.items() if x is not None}
        now = time.monotonic()
        seconds = max(now - self.last, 1e-9)
        self.row = {"step": step} | losses | {"pictures_per_second": pictures / seconds}
        self.row["seconds"] = self.earlier + now - self.start
        self.last, self.step, self.unwritten = now, step, True
        counted = step - self.first - 1 - self.late  # not the first, as soon as there is another: much is made once in it
        if counted > 0:
            self.working += seconds
            self.pace = self.working / counted
        elif step == self.first + 1:
            self.pace = seconds

    def measure(self, measured):
        """Add the distance or scores that were measured after the step. Raises NotFinite."""
        self.row |= measured
        self.measured |= measured
        self.check()

    def check(self):
        """Read the row's numbers, for which a GPU has to finish the step. Raises NotFinite for the first that is not."""
        self.row = {name: x if name == "step" else float(x) for name, x in self.row.items()}
        for name, x in self.row.items():
            if not math.isfinite(x):
                raise NotFinite(f"{name} is {x} at step {self.step}")

    @contextlib.contextmanager
    def aside(self, what, every=None):
        """Within this context is done what is no part of any step, `what` in a word or two, and again after `every` steps
        (default: as this log has it). Raises NotFinite."""
        self.check()
        begun = time.monotonic()
        self.busy(what, at_once=True)
        yield
        took = time.monotonic() - begun
        self.last += took
        self.besides[what] = self.besides.get(what, (0.0,))[0] + took, every or self.every

    def busy(self, what, at_once=False):
        """Show what is being done within a step, or beside them, if that takes long."""
        now = time.monotonic()
        pause = self.PAUSES[0 if self.live else 2]
        if now - self.shown > pause and (at_once or now - self.last > 4 * pause):
            self.put(what)

    def left(self):
        """About how many seconds all that is still to do will take; None before there was a step."""
        done = self.step - self.first
        besides = sum(seconds / max(done, every) for seconds, every in self.besides.values())
        return (self.pace + besides) * (self.steps - self.step) if done else None

    def write(self):
        """Write the row if it is not written, with --json to standard output, too. Raises NotFinite, when it is written."""
        if self.unwritten:
            self.unwritten = False
            try:
                self.check()
            finally:
                self.writer.writerow({name: x if name == "step" else f"{x:.6g}" for name, x in self.row.items()})
                self.file.flush()
                output.tell(None, event="step", **self.row)

    def tick(self, at_once=False):
        """Show the row, and write it, if it is time to."""
        due = time.monotonic() - self.shown > self.PAUSES[0 if self.live else 1]
        if ag.xp is np:
            self.write()
        if due or at_once or self.step in (self.first, self.first + 1, self.steps):
            self.write()
            self.put()

    def put(self, doing=None):
        """Print the line; on a terminal that is gone, this is what to hang up for."""
        self.shown = time.monotonic()
        try:
            if self.live:
                room = shutil.get_terminal_size().columns + 1  # for as many parts as fit, and the two spaces after them
                line = f"{self.line(doing)}  "[:room].rpartition("  ")[0]
                print(f"\r\033[K{line}", end="", flush=True)
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
        """Write what was not, and leave the live line standing."""
        with contextlib.suppress(NotFinite):
            self.write()
        if self.live:
            with contextlib.suppress(OSError):  # of a terminal that is gone
                print()
        self.file.close()


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
