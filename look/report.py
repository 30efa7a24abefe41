"""A run at a glance: its curves, its pictures over time, and one page that shows both.

`update` is called by training whenever there is a new grid of samples, and reads only what already lies in the run's
folder: log.csv and samples/. It writes curves.png, progress.gif and report.html, each of them whole or not at all.

Contents
    1. Curves      read_log, curves
    2. Progress    progress
    3. The page    page, Report
"""

import base64
import contextlib
import csv
import dataclasses
import datetime
import html
import math
import time
from pathlib import Path

import numpy as np
from PIL import Image

import autograd as ag
from data import first_line
from look import drawing
from look.drawing import BLUE, FAINT, GREEN, INK, MUTED, ORANGE, RED, Sheet
from look.summary import size
from store import files
from store.output import clock, one_line, warn

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
LOG_BYTES = 2_000_000  # of a longer log only every second row is read, every third, and so on
POINTS = 125  # a curve through more numbers is averaged down to so many


def read_log(path):
    """The finite numbers in a run's log.csv by column: {"disc_loss": (steps, values), ...}, float arrays of one length."""
    stride = 1 + path.stat().st_size // LOG_BYTES
    with files.plain(path).open(newline="") as file:
        reader = csv.reader(file)
        names = next(reader)
        measured = [names.index(name) for name in LABELS]
        rows = [row for i, row in enumerate(reader) if i % stride == 0 or any(row[column] for column in measured)]
    columns = {name: np.zeros((2, 0)) for name in names}
    for name, values in zip(names, zip(*rows, strict=True), strict=False):
        pairs = np.array([(float(row[0]), float(x)) for row, x in zip(rows, values, strict=True) if x]).reshape(-1, 2)
        columns[name] = pairs[np.isfinite(pairs[:, 1])].T
    return columns


def averaged(steps, values):
    """A curve's (steps, values) in at most POINTS points, means over as many rows each, and each one's spread: the values
    below and above which a tenth of its rows lie."""
    parts = [np.array_split(x, min(POINTS, len(x))) for x in (steps, values)]
    spread = [np.percentile(part, (10, 90)) for part in parts[1]]
    return np.array([part.mean() for part in parts[0]]), np.array([part.mean() for part in parts[1]]), np.array(spread)


def limits(values):
    """The least and largest value that an axis shows: of all but those that lie very far from the middle half."""
    first, third = np.percentile(values, (25, 75))
    fence = 8 * (third - first) or math.inf
    inside = values[(values >= first - fence) & (values <= third + fence)]
    low, high = inside.min(), inside.max()
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def ticks(low, high, most):
    """Round numbers from low to high, in steps of 1, 2 or 5 times a power of ten, at most about `most` of them."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


WIDTH, LEFT, RIGHT, TALL, LOW = 1000, 84, 36, 250, 160  # pixels: the figure, its margins, the first panel and the others


def lines_of(log):
    """What `read_log` returned by panel, of those that have numbers: {title: {(legend, colour): (steps, values)}}."""
    found = {title: {look: log[name] for name, look in columns.items() if name in log and log[name].size}
             for title, columns in PANELS}  # fmt: skip
    return {title: lines for title, lines in found.items() if lines}


def curves(log, steps, path):
    """Draw `lines_of` a log as panels above one another, their axis a run of `steps`; nothing without numbers."""
    panels = lines_of(log)
    if not panels:
        return
    top, heights = 14, [TALL if len(lines) > 1 else LOW for lines in panels.values()]
    sheet = Sheet(WIDTH, top + sum(heights) + 42)
    reached = max(steps[-1] for lines in panels.values() for steps, _ in lines.values())
    axis = [step for step in ticks(0, max(1, min(steps, reached * 1.05)), 8) if step == int(step)]
    end = max(1, reached, axis[-1])

    def across(step):
        return LEFT + step / end * (WIDTH - LEFT - RIGHT)

    for (title, lines), height in zip(panels.items(), heights, strict=True):
        panel(sheet, top, height, title, lines, axis, across)
        top += height
    for step in axis:
        sheet.text(across(step), top - 2, f"{step:,.0f}", 13, MUTED, "ma")
    sheet.text(WIDTH - RIGHT, top + 18, "step", 13, MUTED, "ra")
    sheet.save(path)


def panel(sheet, top, height, title, lines, axis, across):
    """One panel of `curves`: a frame from top + 26 to top + height - 10, and lines {(legend, colour): (steps, values)}."""
    upper, lower, right = top + 26, top + height - 10, sheet.image.width / 2 - RIGHT
    drawn = {look: averaged(*line) for look, line in lines.items()}
    low, high = limits(np.concatenate([spread.ravel() for _, _, spread in drawn.values()]))

    def down(value):
        return lower - (min(max(value, low), high) - low) / (high - low) * (lower - upper)

    sheet.text(LEFT, top + 18, title, 15, INK, "ls")
    for step in axis:
        sheet.line([(across(step), upper), (across(step), lower)], FAINT)
    for value in ticks(low, high, 5 if height > LOW else 3):
        sheet.line([(LEFT, down(value)), (right, down(value))], FAINT)
        sheet.text(LEFT - 10, down(value), f"{value:.6g}", 13, MUTED, "rm")
    for (_, colour), (steps, _, spread) in drawn.items():
        if len(steps) == POINTS:
            edges = [(across(step), down(value)) for step, value in zip(steps, spread[:, 0], strict=True)]
            edges += [(across(step), down(value)) for step, value in zip(steps[::-1], spread[::-1, 1], strict=True)]
            sheet.shape(edges, tuple((c + 4 * 255) // 5 for c in colour))
    x = right
    for (legend, colour), (steps, values, _) in reversed(drawn.items()):
        points = [(across(step), down(value)) for step, value in zip(steps, values, strict=True)]
        if len(points) > 1:
            sheet.line(points, colour, 2)
        if len(points) <= 40:
            for point in points:
                sheet.dot(*point, 3, colour)
        label = f"{legend}, now {lines[legend, colour][1][-1]:.4g}"
        sheet.text(x, top + 18, label, 13, INK, "rs")
        x -= drawing.font(13).getlength(label) + 10
        sheet.line([(x - 18, top + 14), (x, top + 14)], colour, 3)
        x -= 42
    sheet.box(LEFT, upper, right - LEFT, lower - upper, outline=(190, 196, 203))


# --- 2. Progress ------------------------------------------------------------------------------------------------------

FRAMES = 60  # of an animation, at most
PIXELS = 300_000  # of all its frames before they are enlarged: less than a megabyte in the file


def by_step(samples, kind):
    """The grids samples/KIND-STEP.png in order of their steps, of which some have more digits than others."""
    grids = [path for path in samples.glob(f"{kind}-*.png") if path.stem[len(kind) + 1 :].isdecimal()]
    return sorted(grids, key=lambda path: int(path.stem[len(kind) + 1 :]))


def progress(samples, image_size, path):
    """Animate the grids samples/step-*.png, evenly thinned, the last one held; nothing without any. Shows their first 4
    rows and columns of small pictures, fewer of larger ones."""
    grids = by_step(samples, "step")
    if not grids:
        return
    across, factor = min(4, max(2, 100 // image_size)), max(1, 96 // image_size)
    side = across * (image_size + 1) + 1
    most = min(FRAMES, max(8, PIXELS // side**2))
    grids = [grids[i] for i in np.unique(np.linspace(0, len(grids) - 1, most).round().astype(int))]
    cut = slice(0, side * factor, factor)
    frames = []
    for grid in grids:
        with Image.open(files.plain(grid)) as image:
            frames.append(np.asarray(image.convert("RGB"))[cut, cut])
    durations = [*(len(grids) - 1) * [max(60, min(400, 6000 // len(grids)))], 2500]
    captions = [f"step {int(grid.stem[5:]):,}" for grid in grids]
    drawing.save_animation(np.stack(frames), path, max(1, 300 // side), durations, captions)


# --- 3. The page ------------------------------------------------------------------------------------------------------


STYLE = """
:root { color-scheme: light dark; --paper: #f4f5f7; --card: #fff; --ink: #212529; --muted: #6c757d; --line: #e0e3e7; --bar: #0068ad }
@media (prefers-color-scheme: dark) {
  :root { --paper: #131518; --card: #1d2024; --ink: #e6e8ea; --muted: #98a1aa; --line: #33383e; --bar: #4fa8e0 }
  img.drawn { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.2 } h2 { margin: 0 0 .75rem; font-size: 1.05rem }
p { margin: .25rem 0 } .muted, figcaption, dt { color: var(--muted) }
section { margin-top: 1rem; padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .6rem }
.bar { height: .5rem; margin: .75rem 0 1rem; background: var(--line); border-radius: 1rem; overflow: hidden }
.bar div { height: 100%; background: var(--bar) }
.numbers, .options { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .75rem; margin: 0 }
.numbers dd { font-size: 1.3rem; line-height: 1.2 } dl div { min-width: 0 } dt { font-size: .85rem }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; font-size: .9rem } .legend b { display: inline-block; width: 1.1rem;
  height: .2rem; margin-right: .4rem; vertical-align: middle }
img { display: block; max-width: 100%; height: auto } img.drawn { width: 100%; min-width: 40rem } figure:has(.drawn) { overflow-x: auto }
.pixels { image-rendering: pixelated }
.pair { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start } figure { margin: 0 } .pair figure { flex: 1 1 18rem }
.pair img { width: 100%; border-radius: .3rem } figcaption { margin-top: .4rem; font-size: .9rem }
pre { margin: .25rem 0 .75rem; padding: .6rem .75rem; background: var(--paper); border-radius: .4rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .88rem }
"""  # noqa: E501


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
    elapsed, recent = log["seconds"][1][-1], log["seconds"][:, -100:]
    if len(log["seconds"][0]) > 2 and recent[0, 0] == 0:  # there the first grid was drawn, too
        recent = recent[:, 1:]
    numbers = [("elapsed", clock(elapsed))]
    if len(recent[0]) > 1:
        pace = (recent[1, -1] - recent[1, 0]) / (recent[0, -1] - recent[0, 0])  # seconds a step
        numbers += [("left", clock(pace * (steps - step)))] if step < steps else []
        numbers += [("a step takes", f"{pace:.3g} s"),
                    ("real pictures a second", f"{log['pictures_per_second'][1, -100:].mean():,.0f}")]  # fmt: skip
    for name, label in LABELS.items():
        if log[name].size:
            numbers.append((f"{label}, from {log[name][1, 0]:.3f}" if log[name].shape[1] > 1 else label,
                            f"{log[name][1, -1]:.3f}"))  # fmt: skip
    return numbers


HEALTHY = """A healthy run: after a restless beginning the gradient penalty stays about 1, but for short jumps, the
discriminator's loss is negative and about even, the generator's wanders, and the distance falls, soon at first, then
slowly: low is good. To worry about are a penalty that keeps growing, and a distance that rises."""


def page(trainer, out, log, commands, stopped=False):
    """The report of a run in the folder `out` as HTML that needs no other file; `commands` as `options.commands` has them.

    While training goes on, a browser loads it anew now and then.
    """
    options, step, threads = trainer.options, trainer.step, trainer.update.threads
    where = "GPU" if ag.xp is not np else f"CPU, {threads} thread{'s' * (threads > 1)}"
    weights = [size(network) for network in (trainer.generator, trainer.discriminator)]
    share, state = 100 * step / options.steps, "finished" if step >= options.steps else "stopped" if stopped else "training"
    again = '<meta http-equiv="refresh" content="30">' if state == "training" else ""
    more = f" --steps {2 * options.steps}" if state == "finished" else ""
    grids = [next(reversed(by_step(out / "samples", kind)), None) for kind in ("step", "restored")]
    about = [(field.name.replace("_", " "), getattr(options, field.name)) for field in dataclasses.fields(options)]
    title = html.escape(f"{options.pair} on {Path(options.dataset).name}")
    pictures = embedded(out / "progress.gif", "The same noise, over time", "pixels")
    if grids[0]:
        pictures += embedded(grids[0], f"Step {int(grids[0].stem[5:]):,}: what the averaged generator makes of it")
    caption = "From log.csv. Bands: four fifths of the steps. Far numbers lie on the edge"
    drawn = embedded(out / "curves.png", caption, "drawn")
    restored = embedded(grids[1], "Co-training: real pictures made small, what the generator makes of them, the originals")
    begin, resume, look = (html.escape(command) for command in commands)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">{again}
<title>{title}, step {step:,}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p class="muted">Step {step:,} of {options.steps:,}, {state}; {datetime.datetime.now():%Y-%m-%d %H:%M}.
{len(trainer.batches.pictures):,} pictures of {options.image_size}x{options.image_size}, {where}. Parameters:
{weights[0]:,} of the generator, {weights[1]:,} of the discriminator.</p>
<div class="bar"><div style="width: {share:.2f}%"></div></div>
{listed(key_numbers(log, step, options.steps), "numbers")}
<section><h2>Pictures</h2><div class="pair">{pictures}</div></section>
<section><h2>Curves</h2>{legend(log)}{drawn}<p class="muted">{html.escape(HEALTHY)}</p></section>
{f"<section><h2>Restored</h2>{restored}</section>" if restored else ""}
<section><h2>Commands</h2><p>Made by</p><pre>{begin}</pre>
<p>Goes on by</p><pre>{resume}{more}</pre>
<p>New pictures of it, a walk between them, and what it looks at</p>
<pre>{look}</pre></section>
<section><h2>Options</h2>{listed(about, "options")}</section>
</body></html>
"""


class Report:
    """Keeps curves.png, progress.gif and report.html of a run up to date. commands: see `page`."""

    SHARE = 0.05  # of a run's time may go into drawing: where grids come faster, some of them wait for the next

    def __init__(self, trainer, out, commands):
        self.trainer, self.out, self.commands, self.due = trainer, out, commands, 0.0
        self.path = out / "report.html"

    def draw(self, stopped=False):
        """Draw all, from what lies in the run's folder."""
        log, options = read_log(self.out / "log.csv"), self.trainer.options
        curves(log, options.steps, self.out / "curves.png")
        progress(self.out / "samples", options.image_size, self.out / "progress.gif")
        with files.whole_file(self.path) as part:
            part.write_text(page(self.trainer, self.out, log, self.commands, stopped), "utf-8", "backslashreplace")

    def update(self):
        """Draw all, unless it was done a moment ago. What goes wrong is said and no more: the run is worth more."""
        begun = time.monotonic()
        if begun < self.due and self.trainer.step < self.trainer.options.steps:
            return
        try:
            self.draw()
        except Exception as error:
            warn(f"transgan: {self.path} could not be drawn: {one_line(first_line(error))}; the run goes on")
        now = time.monotonic()
        self.due = now + (now - begun) / self.SHARE

    def restate(self, stopped=False):
        """Let a page that is there say whether the run goes on, if that is possible."""
        with contextlib.suppress(Exception):
            if self.path.exists():
                self.draw(stopped)
