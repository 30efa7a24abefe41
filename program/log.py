"""What a training shows of itself: log.csv, a row a step, and the line that is to be seen while it runs."""

import csv
import math
import os
import sys
import time

from data import UserError
from look.report import LABELS
from program.checkpoints import NotFinite, holds_a_run
from store import output


class Log:
    """Writes log.csv, a row a step, and shows progress: one live line on a terminal, now and then a line elsewhere.

    Losses arrive as arrays on the device and are read a few at a time, so that a step need not wait for them.
    """

    FIELDS = ("step", "disc_loss", "gen_loss", "penalty", "sr_loss", "distance", "fid_own", "is_own",
              "pictures_per_second", "seconds")  # fmt: skip

    def __init__(self, path, step, steps, resumed=False):
        self.first, self.steps = step, steps
        kept, self.earlier = [], 0.0
        if resumed and path.exists() and step:
            try:
                with path.open(newline="", encoding="utf-8", errors="replace") as file:
                    kept = rows_until(step, csv.DictReader(file))
                self.earlier = float(kept[-1]["seconds"]) if kept else 0.0
                if not math.isfinite(self.earlier):
                    raise ValueError(f"it took {self.earlier} seconds")
            except (ValueError, KeyError, TypeError, csv.Error) as error:
                raise UserError(f"{path} is not a log of this program ({error}); move it away to go on without") from None
        start = path.with_name(path.name + ".part") if resumed else path
        try:
            self.file = start.open("w" if resumed else "x", newline="", encoding="utf-8")
        except FileExistsError:
            raise holds_a_run(path.parent) from None
        self.writer = csv.DictWriter(self.file, self.FIELDS, restval="", extrasaction="ignore")
        self.writer.writeheader()
        self.writer.writerows(kept)
        if resumed:
            self.file.close()
            os.replace(start, path)
            self.file = path.open("a", newline="", encoding="utf-8")
            self.writer.writer = csv.writer(self.file)  # the same columns, in the file that goes on
        self.live = output.mode == "lines" and output.is_live(sys.stdout)
        self.measured = {}
        self.waiting = []  # for the file
        self.written = []  # those in it that were not shown
        self.start = self.shown = self.last = time.monotonic()

    def add(self, step, losses, pictures):
        """Remember a step: its losses, and how many real pictures it used."""
        now = time.monotonic()
        row = {"step": step, "pictures_per_second": pictures / max(now - self.last, 1e-9)}
        self.waiting.append(row | losses | {"seconds": self.earlier + now - self.start})
        self.last = now

    def measure(self, measured):
        """Add the distance or scores that were measured after the last step; the time that took counts for no step."""
        self.waiting[-1] |= measured
        self.measured |= measured
        self.last = time.monotonic()

    def check(self):
        """Read the numbers that wait. Raises NotFinite at the first that is not."""
        for row in self.waiting:
            row |= numbers(row)
            for name in self.FIELDS:
                if not math.isfinite(row.get(name) or 0):
                    raise NotFinite(f"{name} is {row[name]} at step {row['step']}")

    def write(self):
        """Write the rows that wait."""
        for row in map(numbers, self.waiting):
            self.writer.writerow({name: x if name == "step" else f"{x:.6g}" for name, x in row.items()})
            self.written.append(row)
        self.file.flush()
        self.waiting.clear()

    def tick(self):
        """Check and show what there is, if it is time to."""
        row = (self.written + self.waiting)[-1]
        due = time.monotonic() - self.shown > (0.5 if self.live else 10)
        if due or row["step"] in (self.first, self.first + 1, self.steps):
            self.check()
            self.show()

    def show(self):
        """Write the rows that wait and show the newest, or for --json each that was not shown."""
        self.write()
        if not self.written:
            return
        self.shown = time.monotonic()
        if self.live:
            print(f"\r\033[K{self.line()}", end="", flush=True)
        elif output.mode == "json":
            for row in self.written:
                output.tell(None, event="step", **row)
        else:
            output.tell(self.line())
        self.written.clear()

    def line(self):
        """What is worth reading of the rows that were not shown."""
        row, parts = self.written[-1], []
        for name, label in (("disc_loss", "D"), ("gen_loss", "G"), ("penalty", "penalty"), ("sr_loss", "SR")):
            if name in row:
                parts.append(f"{label} {row[name]:.3f}")
        parts += [f"{LABELS[name]} {value:.3f}" for name, value in self.measured.items()]
        step, elapsed = row["step"], self.shown - self.start
        left = elapsed / max(step - self.first, 1) * (self.steps - step)
        speed = (sum(r["pictures_per_second"] for r in self.written) / len(self.written)) if step > self.first else 0
        parts += [f"{speed:.0f} pictures/s", f"{output.clock(elapsed)} elapsed"]
        parts += [f"{output.clock(left)} left"] if step > self.first else []
        return f"step {step}/{self.steps}  " + "  ".join(parts)

    def close(self):
        """Write what waits, and leave the live line standing."""
        self.show()
        if self.live:
            print()
        self.file.close()


def numbers(row):
    """A row of the log with what it has, in Python's numbers: for losses on a device, this waits for them."""
    return {name: x if name == "step" else float(x) for name, x in row.items() if x is not None}


def rows_until(step, reader):
    """A log's rows up to a step, which will go on from there. What comes after, if only half a row, is not looked at."""
    kept = []
    for row in reader:
        if int(row["step"]) <= step:
            kept.append(row)
        if int(row["step"]) >= step:
            break
    return kept
