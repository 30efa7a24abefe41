"""What the figures have in common: a sheet with ink and type, pictures enlarged on it, and animations.

Coordinates are pixels of the finished figure, x to the right and y down. Pixels of pictures are bytes (H, W, 3).
"""

import functools

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import data
from store import files

INK, MUTED, FAINT, PAPER = (33, 37, 41), (108, 117, 125), (228, 231, 235), (255, 255, 255)
BLUE, RED, GREEN, ORANGE = (0, 104, 173), (209, 73, 30), (0, 138, 102), (214, 137, 16)  # apart for colour-blind eyes, too
GUTTER = 60  # for the texts on the left of a grid


@functools.cache
def font(size):
    return ImageFont.load_default(size)  # of Pillow itself, so that no machine needs one


class Sheet:
    """A white sheet of width x height. All is drawn twice as large and averaged down, so that slanted lines are smooth."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (2 * int(width), 2 * int(height)), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x, y, text, size=13, colour=INK, anchor="la"):
        """anchor: l, m or r, then a (top), m or s (baseline), which is where (x, y) lies in the text."""
        self.draw.text((2 * x, 2 * y), text, colour, font(2 * size), anchor)

    def line(self, points, colour=INK, width=1):
        """Through points [(x, y), ...]."""
        self.draw.line([(2 * x, 2 * y) for x, y in points], colour, round(2 * width), "curve")

    def shape(self, points, colour):
        """The inside of a polygon [(x, y), ...]."""
        self.draw.polygon([(2 * x, 2 * y) for x, y in points], colour)

    def box(self, x, y, width, height, fill=None, outline=None, radius=0, line=1):
        corners = (2 * x, 2 * y, 2 * (x + width) - 1, 2 * (y + height) - 1)
        self.draw.rounded_rectangle(corners, 2 * radius, fill, outline, round(2 * line))

    def dot(self, x, y, radius, colour):
        self.box(x - radius, y - radius, 2 * radius, 2 * radius, colour, radius=radius)

    def picture(self, x, y, pixels, factor):
        """Pixels (H, W, 3), each a square of `factor`."""
        self.image.paste(Image.fromarray(enlarged(pixels, 2 * factor)), (round(2 * x), round(2 * y)))

    def grid(self, x, y, heads, rows, factor):
        """Pictures in rows and columns, each pixel a square of `factor`, with `heads` above them; returns where they end.

        rows: [((two lines of text on the left), [(pixels (S, S, 3), text below them), ...]), ...]
        """
        for label, pictures in rows:
            side = factor * len(pictures[0][0])
            self.text(x, y + side / 2 + 14, label[0], 12, INK, "ls")
            self.text(x, y + side / 2 + 30, label[1], 12, MUTED, "ls")
            for column, (head, (pixels, below)) in enumerate(zip(heads, pictures, strict=True)):
                left = x + GUTTER + column * (side + 8)
                self.text(left + side / 2, y + 10, head, 12, MUTED, "ms")
                self.picture(left, y + 16, pixels, factor)
                self.text(left + side / 2, y + side + 30, below, 11, MUTED, "ms")
            y, heads = y + side + 24, len(heads) * [""]
        return y + 36

    def save(self, path, height=None):
        """Write a PNG, of no more than `height`, which appears when it is whole."""
        image = self.image.crop((0, 0, self.image.width, 2 * int(height))) if height else self.image
        with files.whole_file(path) as part:
            image.reduce(2).save(part, "PNG")


def enlarged(pixels, factor):
    """Every pixel as a square: (..., H, W, 3) -> (..., factor * H, factor * W, 3)."""
    return pixels.repeat(factor, -3).repeat(factor, -2)


def channels_last(pictures):
    """Float pictures in [-1, 1], (..., 3, H, W) -> bytes (..., H, W, 3)."""
    return np.moveaxis(data.to_bytes(pictures), -3, -1)


CAPTION = 22  # height of an animation's captions


def save_animation(frames, path, factor, durations, captions=None):
    """Write frames, bytes (n, H, W, 3), as a GIF that repeats, each pixel a square of `factor`.

    durations: milliseconds of each frame; captions: a line of text under each. All frames have the same palette of 256
    colours, so that nothing flickers. The file appears when it is whole.
    """
    made = []
    for number, pixels in enumerate(enlarged(frames, factor)):
        height, width, _ = pixels.shape
        frame = Image.new("RGB", (width, height + (CAPTION if captions else 0)), (17, 17, 17))
        frame.paste(Image.fromarray(pixels))
        if captions:
            ImageDraw.Draw(frame).text((6, height + CAPTION // 2), captions[number], (238, 238, 238), font(14), "lm")
        made.append(frame)
    some = np.concatenate([np.asarray(frame).reshape(-1, 3)[:: 5 * len(made)] for frame in made])  # to choose colours by
    palette = Image.fromarray(some[None]).quantize(256)
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in made)
    with files.whole_file(path) as part:
        first.save(part, "GIF", save_all=True, append_images=others, duration=durations, loop=0)
