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

    def save(self, path):
        """Write a PNG, which appears when it is whole."""
        with files.whole_file(path) as part:
            self.image.reduce(2).save(part, "PNG")


def enlarged(pixels, factor):
    """Every pixel as a square: (..., H, W, 3) -> (..., factor * H, factor * W, 3)."""
    return pixels.repeat(factor, -3).repeat(factor, -2)


def channels_last(pictures):
    """Float pictures in [-1, 1], (..., 3, H, W) -> bytes (..., H, W, 3)."""
    return np.moveaxis(data.to_bytes(pictures), -3, -1)


CAPTION = 22  # height of an animation's captions


def save_animation(frames, path, factor, durations, captions=None):
    """Write frames, bytes (n, H, W, 3), as a GIF that repeats, each pixel a square of `factor`.

    durations: milliseconds of each frame; captions: a line of text under each. One palette of 240 colours serves all
    frames, and 16 greys more the captions. The file appears when it is whole.
    """
    count, height, width, _ = frames.shape
    pixels = frames.reshape(-1, 3)
    some = pixels[np.linspace(0, len(pixels) - 1, 20_000).astype(int)]  # will do to choose colours by
    chosen = Image.fromarray(some[None]).quantize(240)
    tall = Image.fromarray(frames.reshape(-1, width, 3)).quantize(palette=chosen, dither=Image.Dither.NONE)
    palette = (chosen.getpalette() + 720 * [0])[:720] + [level for level in range(0, 256, 17) for _ in range(3)]
    made = []
    for i, indices in enumerate(np.asarray(tall).reshape(count, height, width)):
        indices = indices.repeat(factor, 0).repeat(factor, 1)
        if captions:
            strip = Image.new("L", (indices.shape[1], CAPTION), 17)
            ImageDraw.Draw(strip).text((6, CAPTION // 2), captions[i], 238, font(14), "lm")
            indices = np.concatenate([indices, 240 + np.asarray(strip) // 17])
        made.append(Image.fromarray(indices.astype(np.uint8)))
        made[-1].putpalette(palette)
    with files.whole_file(path) as part:
        made[0].save(part, "GIF", save_all=True, append_images=made[1:], duration=durations, loop=0)
