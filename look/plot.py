"""Line plots: numbers over steps or seconds, in panels above one another, many of them as a mean and a band around it."""

import math

import numpy as np

from look import drawing
from look.drawing import FAINT, INK, MUTED, Sheet

WIDTH, HEIGHT, LEFT, RIGHT = 1000, 200, 84, 36  # pixels: a panel, and its margins at the sides
POINTS = 125  # a curve through more numbers is averaged down to so many


def averaged(x, y):
    """A curve's (x, y) in at most POINTS points, means over as many numbers each, and each one's spread: the values below
    and above which a tenth of its numbers lie."""
    parts = [np.array_split(numbers, min(POINTS, len(x))) for numbers in (x, y)]
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


def plot(panels, path):
    """Draw panels into a PNG: each a title, the name of x, where its axis ends, and {(legend, colour): (x, y), arrays}."""
    sheet = Sheet(WIDTH, 16 + HEIGHT * len(panels))
    for i, panel in enumerate(panels):
        draw_panel(sheet, 8 + HEIGHT * i, *panel)
    sheet.save(path)


def draw_panel(sheet, top, title, name, end, lines):
    """Draw one panel of `plot` from `top` on."""
    upper, lower, right = top + 26, top + HEIGHT - 34, WIDTH - RIGHT
    drawn = {look: averaged(*line) for look, line in lines.items()}
    low, high = limits(np.concatenate([spread.ravel() for _, _, spread in drawn.values()]))

    def places(x, y):
        """Where numbers lie on the sheet, those beyond the axis on its edge: [(x, y), ...] in pixels."""
        across = LEFT + np.divide(x, end) * (right - LEFT)
        down = lower - (np.clip(y, low, high) - low) / (high - low) * (lower - upper)
        return list(zip(across, down, strict=True))

    sheet.text(LEFT, top + 18, title, 15, INK, "ls")
    sheet.text(LEFT - 10, lower + 6, name, 13, MUTED, "ra")
    for x in ticks(0, end, 8):
        (across, _), _ = points = places((x, x), (low, high))
        sheet.line(points, FAINT)
        sheet.text(across, lower + 6, f"{x:,.6g}", 13, MUTED, "ma")
    for y in ticks(low, high, 4):
        (_, down), _ = points = places((0, end), (y, y))
        sheet.line(points, FAINT)
        sheet.text(LEFT - 10, down, f"{y:.6g}", 13, MUTED, "rm")
    for (_, colour), (x, _, spread) in drawn.items():
        if len(x) == POINTS:
            edges = places(x, spread[:, 0]) + places(x[::-1], spread[::-1, 1])
            sheet.shape(edges, tuple((level + 4 * 255) // 5 for level in colour))
    begun = right  # of the legend, from right to left
    for (legend, colour), (x, y, _) in reversed(drawn.items()):
        points = places(x, y)
        sheet.line(points, colour, 2)
        for point in points if len(points) <= 40 else ():
            sheet.dot(*point, 3, colour)
        label = f"{legend}, now {lines[legend, colour][1][-1]:.4g}"
        sheet.text(begun, top + 18, label, 13, INK, "rs")
        begun -= drawing.font(13).getlength(label) + 28
        sheet.line([(begun, top + 14), (begun + 18, top + 14)], colour, 3)
        begun -= 24
    sheet.box(LEFT, upper, right - LEFT, lower - upper, outline=(190, 196, 203))
