"""A figure of both networks, with the numbers of any size: python -m look.architecture docs/architecture.png

What it shows is asked of the networks themselves, by the rows of look/summary.py. The picture in it is a drawn shape.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

import data
import transgan
from look import summary
from look.drawing import BLUE, FAINT, GREEN, INK, MUTED, PAPER, RED, Sheet
from store import files
from store.arguments import Parser, folder, number

WIDTH, LEFT = 1000, 24  # pixels
ICON, BAR = 96, 11  # side of a picture, height of a bar that stands for a block
VIOLET = (108, 79, 163)


class Column(NamedTuple):
    """What a network holds at one place, and how it comes there from the column before."""

    pixels: np.ndarray  # bytes (H, W, 3)
    caption: str
    note: str
    arrow: tuple = ()  # its label and note
    cell: int = 0  # pixels a side of what is one token: there are white lines between them
    blocks: tuple = ()  # how many follow, how wide they are as a share of the widest, and their parameters


def resized(pixels, width, height):
    """A picture of another size, by means over areas: (H, W, 3) -> (height, width, 3)."""
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX))


def generator(options, picture):
    """The generator's parameters, and its columns."""
    noise, *stages, rgb = rows = summary.generator_rows(transgan.make_generator(options, summary.Zeros()))
    grey = np.random.default_rng(0).integers(30, 226, (12, 1, 1), np.uint8).repeat(3, -1)
    widest, arrow = stages[0][2], ("Linear", amount(noise[4]))
    columns = [Column(grey, "noise z", f"{widest} numbers")]
    for name, tokens, width, depth, parameters, _ in stages:
        side, blocks = math.isqrt(tokens), (depth, width / widest, parameters)
        caption, note = f"{name} = {tokens:,} tokens", f"of width {width}, + position"
        columns.append(Column(resized(picture, side, side), caption, note, arrow, 1, blocks))
        arrow = "UpScale", "C to C/4"
    columns.append(Column(picture, "picture", f"3 x {len(picture)} x {len(picture)}", ("Linear", amount(rgb[4]))))
    return sum(row[4] for row in rows), columns


def discriminator(options, picture):
    """The discriminator's parameters, and its columns."""
    patches, blocks, head = rows = summary.discriminator_rows(transgan.make_discriminator(options, summary.Zeros()))
    side, p, (_, count, width, *_) = len(picture), options.patch_size, patches
    n = side // p
    tokens, one = np.full((n, n + 1, 3), (238, 176, 152), np.uint8), np.ones((1, 1, 3), np.uint8)
    tokens[:, 0], tokens[0, 0] = PAPER, GREEN  # [cls] stands before the others
    return sum(row[4] for row in rows), [
        Column(picture, "picture", f"3 x {side} x {side}"),
        Column(picture, f"{n}x{n} = {count} patches", f"of 3 x {p} x {p} numbers", ("cut", ""), p),
        Column(tokens, f"[cls] + {count} = {count + 1} tokens", f"of width {width}, + position",
               ("Linear", amount(patches[4])), 1, (blocks[3], 1, blocks[4])),
        Column(one * np.uint8(GREEN), "[cls] after all blocks", f"1 x {width}", ("take [cls]", "")),
        Column(one * np.uint8(INK), "D(x), one number", "high for real pictures", ("LayerNorm, Linear", amount(head[4]))),
    ]  # fmt: skip


def amount(count):
    """A number of parameters, short: 9.05 M."""
    return f"{count / 1e6:.3g} M" if count >= 1e6 else f"{count / 1e3:.3g} K" if count >= 1e3 else str(count)


def title(sheet, y, name, note, colour):
    """A heading, a name on the left and a note on the right."""
    sheet.box(LEFT, y - 13, 5, 17, colour, radius=2)
    sheet.text(LEFT + 14, y, name, 18, INK, "ls")
    sheet.text(WIDTH - LEFT, y, note, 14, MUTED, "rs")


def arrow(sheet, x, end, y, label="", note=""):
    """From x to end, with a label above and a note below."""
    sheet.line([(x, y), (end - 5, y)], MUTED, 1.5)
    sheet.shape([(end, y), (end - 8, y - 4.5), (end - 8, y + 4.5)], MUTED)
    sheet.text((x + end) / 2, y - 9, label, 13, INK, "ms")
    sheet.text((x + end) / 2, y + 19, note, 12, MUTED, "ms")


def captions(sheet, middle, y, line, note):
    """Two lines of text around `middle`, the first darker."""
    sheet.text(middle, y, line, 14, INK, "ms")
    sheet.text(middle, y + 18, note, 13, MUTED, "ms")


def icon(sheet, x, y, pixels, cell):
    """A column's pixels around (x, y), at most ICON high; returns half their width."""
    height = min(24 * len(pixels), ICON)
    width = height * pixels.shape[1] // len(pixels)
    pitch, shown = cell * height / len(pixels), resized(pixels, width, height)
    if pitch > 5:
        gap = max(1, pitch // 6)
        shown[np.arange(height) % pitch < gap] = PAPER
        shown[:, np.arange(width) % pitch < gap] = PAPER
    sheet.picture(x - width / 2, y - height / 2, shown, 1)
    return width / 2


def network(sheet, top, name, colour, parameters, columns):
    """Draw a network from `top` on, its columns from left to right and their blocks below; returns where it ends."""
    title(sheet, top, name, f"{parameters:,} parameters", colour)
    middle, bars, end = top + 36 + ICON / 2, top + 104 + ICON, 0
    for k, column in enumerate(columns):
        x = LEFT + (WIDTH - 2 * LEFT) / len(columns) * (k + 0.5)
        half = icon(sheet, x, middle, column.pixels, column.cell)
        if column.arrow:
            arrow(sheet, end, x - half - 8, middle, *column.arrow)
        end = x + half + 8
        captions(sheet, x, middle + ICON / 2 + 22, column.caption, column.note)
        if column.blocks:
            depth, share, parameters = column.blocks
            length = max(8, 150 * share)
            for i in range(depth):
                sheet.box(x - length / 2, bars + i * (BAR + 4), length, BAR, colour, radius=3)
            captions(sheet, x, bars + depth * (BAR + 4) + 18, f"{depth} block{'s' * (depth > 1)}", amount(parameters))
    return bars + max(column.blocks[0] for column in columns if column.blocks) * (BAR + 4) + 60


def block(sheet, top):
    """Draw the parts of one block from `top` on; returns where it ends."""
    title(sheet, top, "One block", "tokens (N, C) to tokens (N, C), in both networks", VIOLET)
    x, y = LEFT + 60, top + 66
    sheet.text(LEFT + 14, y + 5, "x", 16, INK, "ls")
    sheet.line([(LEFT + 30, y), (x, y)], MUTED, 1.5)
    for part in (("Attention", f"{transgan.NUM_HEADS} heads", 190), ("MLP", "C, 4C, GELU, C", 190)):
        begun = x + 6
        for name, note, width in (("LayerNorm", "", 120), part):
            arrow(sheet, x, x + 28, y)
            sheet.box(x + 28, y - 24, width, 48, (241, 237, 248), VIOLET, 7, 1.2)
            sheet.text(x + 28 + width / 2, y + (-2 if note else 5), name, 14, INK, "ms")
            sheet.text(x + 28 + width / 2, y + 16, note, 12, MUTED, "ms")
            x += 28 + width
        arrow(sheet, x, x + 28, y)
        sheet.line([(begun, y), (begun, y - 42), (x + 39, y - 42), (x + 39, y - 11)], MUTED, 1.5)
        sheet.box(x + 28, y - 11, 22, 22, PAPER, VIOLET, 11, 1.5)
        sheet.text(x + 39, y + 6, "+", 17, VIOLET, "ms")
        x += 50
    arrow(sheet, x, WIDTH - LEFT - 8, y)
    return y + 44


def draw(options, path):
    """Draw both networks of TransGAN with these options into a PNG."""
    picture = data.draw_shapes(1, options.image_size, seed=3)[0].transpose(1, 2, 0)
    sheet, top = Sheet(WIDTH, 1200), 40
    for name, colour, describe in (("Generator", BLUE, generator), ("Discriminator", RED, discriminator)):
        top = network(sheet, top, name, colour, *describe(options, picture)) + 24
        sheet.line([(LEFT, top - 34), (WIDTH - LEFT, top - 34)], FAINT)
    sheet.save(path, block(sheet, top))


def main(argv=None):
    """Run the command line."""
    parser = Parser(prog="python -m look.architecture", description=__doc__.splitlines()[0])
    parser.add_argument("path", type=folder, help="the PNG to write")
    parser.add_argument("--size", choices=transgan.SIZES, default="S", help="of the networks (default: S)")
    parser.add_argument("--image-size", type=number(int, 8, 128), default=32, metavar="N",
                        help="pixels a side (default: 32)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.path.is_dir():
        parser.error(f"{args.path} is a folder; name a file in it")
    try:
        side = transgan.patch_side(args.image_size)
        options = transgan.Options(size=args.size, image_size=args.image_size, patch_size=side, sr_weight=0.0)
        draw(options, files.plain(args.path))
    except ValueError as error:
        parser.error(f"{error}; choose another --image-size")
    except OSError as error:
        parser.error(f"cannot write {args.path}: {error.strerror}; name another file")


if __name__ == "__main__":
    main()
