"""A run at a glance: its curves, its pictures over time, and one page that shows both.

`Report.update` is called by training whenever there is a new grid of samples, and reads only what already lies in the run's
folder: log.csv and samples/. It writes curves.png, progress.gif and report.html, each of them whole or not at all.
"""

import base64
import contextlib
import datetime
import html
import string
import time
from pathlib import Path

import numpy as np
from PIL import Image

import autograd as ag
from data import first_line
from look import drawing
from look.drawing import BLUE, GREEN, ORANGE, RED
from look.plot import plot
from look.summary import size
from store import files
from store.output import clock, warn

# --- 1. Curves --------------------------------------------------------------------------------------------------------

# (title, columns of log.csv and their legend, colour): one panel each, drawn where the log has numbers for it.
PANELS = (
    ("losses", {"disc_loss": ("discriminator", BLUE), "gen_loss": ("generator", RED)}),
    ("gradient penalty", {"penalty": ("penalty", BLUE)}),
    ("co-training, error of the restored pixels", {"sr_loss": ("mean square", ORANGE)}),
    ("distance of generated from real pictures, low is good", {"distance": ("sliced Wasserstein", GREEN)}),
    ("FID-own, low is good", {"fid_own": ("FID-own", GREEN)}),
    ("IS-own, high is good", {"is_own": ("IS-own", GREEN)}),
)
LABELS = {"distance": "distance", "fid_own": "FID-own", "is_own": "IS-own"}  # what is measured, in few rows: all are shown


def read_log(path):
    """The finite numbers in a run's log.csv by column: {"disc_loss": (steps, values), ...}, float arrays of one length."""
    with files.plain(path).open(encoding="utf-8", errors="replace") as file:
        rows = np.genfromtxt(file, delimiter=",", names=True, comments=None, ndmin=1)  # NaN for what is no number
    return {name: np.stack([rows["step"], rows[name]])[:, np.isfinite(rows[name])] for name in rows.dtype.names}


def lines_of(log):
    """What `read_log` returned by panel, of those that have numbers: {title: {(legend, colour): (steps, values)}}."""
    found = {title: {look: log[name] for name, look in columns.items() if name in log and log[name].size}
             for title, columns in PANELS}  # fmt: skip
    return {title: lines for title, lines in found.items() if lines}


def curves(log, path):
    """Draw `lines_of` a log into a PNG, over steps; nothing without numbers."""
    panels = lines_of(log)
    if panels:
        end = max(1, *(steps[-1] for lines in panels.values() for steps, _ in lines.values()))
        plot([(title, "step", end, lines) for title, lines in panels.items()], path)


# --- 2. Progress ------------------------------------------------------------------------------------------------------

FRAMES = 60  # of an animation, at most
PIXELS = 300_000  # of all its frames before they are enlarged: less than a megabyte in the file


def by_step(samples, kind):
    """The grids samples/KIND-STEP.png in order of their steps, of which some have more digits than others."""
    grids = [path for path in samples.glob(f"{kind}-*.png") if path.stem[len(kind) + 1 :].isdecimal() and path.is_file()]
    return sorted(grids, key=lambda path: int(path.stem[len(kind) + 1 :]))


def progress(samples, image_size, path):
    """Animate the grids samples/step-*.png, evenly thinned, the last one held; nothing without any. Shows their first 4
    rows and columns of small pictures, fewer of larger ones; passes over what is no picture, or not of most grids' size."""
    grids = by_step(samples, "step")
    across, factor = min(4, max(2, 100 // image_size)), max(1, 96 // image_size)
    side = across * (image_size + 1) + 1
    most = min(FRAMES, max(8, PIXELS // side**2))
    grids = [grids[i] for i in np.unique(np.linspace(0, len(grids) - 1, most).round().astype(int))] if grids else []
    cut = slice(0, side * factor, factor)
    by_size = {}
    for grid in grids:
        with contextlib.suppress(Exception), Image.open(grid) as image:  # a damaged one can raise anything at all
            frame = np.asarray(image.convert("RGB"))[cut, cut]
            by_size.setdefault(image.size, []).append((f"step {int(grid.stem[5:]):,}", frame))
    if by_size:
        captions, frames = zip(*max(by_size.values(), key=len), strict=True)
        durations = [*(len(frames) - 1) * [max(60, min(400, 6000 // len(frames)))], 2500]
        drawing.save_animation(np.stack(frames), path, max(1, 300 // side), durations, captions)


# --- 3. The page ------------------------------------------------------------------------------------------------------


def embedded(path, caption, kind=""):
    """A picture as a figure of HTML that holds its bytes, or nothing where there is none."""
    if path is None or not path.exists():
        return ""
    content = base64.b64encode(files.plain(path).read_bytes()).decode()
    image = f'<img class="{kind}" src="data:image/{path.suffix[1:]};base64,{content}" alt="{html.escape(caption)}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


def listed(pairs, kind):
    """Names and values as a list of HTML."""
    rows = (f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd></div>" for name, value in pairs)
    return f'<dl class="{kind}">{"".join(rows)}</dl>'


def legend(log):
    """The curves' names, colours and newest values as HTML, which takes as many lines as a narrow window needs."""
    words = [f'<span><b style="background: rgb{colour}"></b>{html.escape(label)}, now {values[-1]:.4g}</span>'
             for lines in lines_of(log).values() for (label, colour), (_, values) in lines.items()]  # fmt: skip
    return f'<p class="legend">{"".join(words)}</p>'


def key_numbers(log, step, steps):
    """What a person asks first, (name, value) as text each: how fast, how long, how good."""
    if not log["seconds"].size:
        return []
    numbers, recent = [("elapsed", clock(log["seconds"][1, -1]))], log["seconds"][:, -100:]
    if recent.shape[1] > 1:
        done, seconds = recent[:, -1] - recent[:, 0]
        numbers += [("left", clock(seconds / done * (steps - step)))] if step < steps else []
        numbers += [("a step takes", f"{seconds / done:.3g} s"),
                    ("real pictures a second", f"{log['pictures_per_second'][1, -100:].mean():,.0f}")]  # fmt: skip
    for name, label in LABELS.items():
        if log[name].size:
            first, last = log[name][1, [0, -1]]
            numbers.append((f"{label}, from {first:.3f}", f"{last:.3f}"))
    return numbers


def page(trainer, out, log, commands, stopped=False):
    """The report of a run in the folder `out` as HTML that needs no other file; `commands` as `options.commands` has them.

    While training goes on, a browser loads it anew now and then.
    """
    options, step, threads = trainer.options, trainer.step, trainer.update.threads
    state = "stopped" if stopped else "finished" if step >= options.steps else "training"
    grids = {kind: next(reversed(by_step(out / "samples", kind)), None) for kind in ("step", "restored")}
    pictures = embedded(out / "progress.gif", "The same noise, over time", "pixels")
    if grids["step"]:
        drawn = int(grids["step"].stem[5:])
        pictures += embedded(grids["step"], f"Step {drawn:,}: what the averaged generator makes of it")
    restored = embedded(grids["restored"], "Real pictures made small, what the generator makes of them, the originals")
    begin, resume, look = (html.escape(command) for command in commands)
    return string.Template(Path(__file__).with_name("page.html").read_text("utf-8")).substitute(
        title=html.escape(f"{options.pair} on {Path(options.dataset).name}"),
        refresh='<meta http-equiv="refresh" content="30">' if state == "training" else "",
        step=f"{step:,}",
        steps=f"{options.steps:,}",
        share=f"{100 * step / options.steps:.2f}",
        state=state,
        now=f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        count=f"{len(trainer.batches.pictures):,}",
        pixels=f"{options.image_size}x{options.image_size}",
        device="GPU" if ag.xp is not np else f"CPU, {threads} thread{'s' * (threads > 1)}",
        weights=f"{size(trainer.generator):,} of the generator, {size(trainer.discriminator):,} of the discriminator",
        numbers=listed(key_numbers(log, step, options.steps), "numbers"),
        pictures=pictures,
        legend=legend(log),
        curves=embedded(out / "curves.png", "Bands: four fifths of the steps. Far numbers lie on the edge", "drawn"),
        restored=f"<section><h2>Restored</h2>{restored}</section>" if restored else "",
        begin=begin,
        resume=resume + (f" --steps {2 * options.steps}" if state == "finished" else ""),
        look=look,
        options=listed(((name.replace("_", " "), value) for name, value in vars(options).items()), "options"),
    )


class Report:
    """Keeps curves.png, progress.gif and report.html of a run up to date. commands: see `page`."""

    SHARE = 0.05  # of a run's time may go into drawing: where grids come faster, some of them wait for the next

    def __init__(self, trainer, out, commands):
        self.trainer, self.out, self.commands, self.due = trainer, out, commands, 0.0

    def update(self, stopped=False, quiet=False):
        """Draw all; not again within a moment, while the run goes on. What goes wrong costs no run; unless `quiet`, it is
        said."""
        begun, options, path = time.monotonic(), self.trainer.options, self.out / "report.html"
        if begun < self.due and self.trainer.step < options.steps and not stopped:
            return
        try:
            log = read_log(self.out / "log.csv")
            curves(log, self.out / "curves.png")
            progress(self.out / "samples", options.image_size, self.out / "progress.gif")
            with files.whole_file(path) as part:
                part.write_text(page(self.trainer, self.out, log, self.commands, stopped), "utf-8", "backslashreplace")
        except Exception as error:
            if not quiet:
                goes_on = "; the run goes on" * (self.trainer.step < options.steps)
                warn(f"transgan: {path} could not be drawn: {first_line(error)}{goes_on}")
        now = time.monotonic()
        self.due = now + (now - begun) / self.SHARE
