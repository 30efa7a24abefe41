"""A figure of both networks, with the numbers of any size: python -m look.architecture docs/architecture.png

What it shows is asked of the networks themselves, by the rows of look/summary.py. The picture in it is a drawn shape.
"""

import sys

import numpy as np

import data
import transgan
from look import summary
from look.drawing import BLUE, FAINT, GREEN, INK, MUTED, RED, Sheet, channels_last
from store.arguments import Parser, folder, number
from store.output import one_line

WIDTH, LEFT = 1000, 24  # pixels
ICON, BAR = 96, 11  # side of a picture, height of a bar that stands for a block
VIOLET = (108, 79, 163)


def amount(count):
    """A number of parameters, short: 9.05 M."""
    return f"{count / 1e6:.3g} M" if count >= 1e6 else f"{count / 1e3:.3g} K" if count >= 1e3 else str(count)


def arrow(sheet, x, end, y, label="", note=""):
    """From x to end, with a label above and a note below."""
    sheet.line([(x, y), (end - 5, y)], MUTED, 1.5)
    sheet.shape([(end, y), (end - 8, y - 4.5), (end - 8, y + 4.5)], MUTED)
    sheet.text((x + end) / 2, y - 9, label, 13, INK, "ms")
    sheet.text((x + end) / 2, y + 19, note, 12, MUTED, "ms")


def resized(pixels, side):
    """Every so many of the pixels (n, n, 3), or some of them twice: (side, side, 3)."""
    chosen = np.arange(side) * len(pixels) // side
    return pixels[chosen][:, chosen]


def icon(sheet, middle, top, pixels, tokens=False):
    """Pixels (n, n, 3) in ICON pixels a side, or as whole squares fill, with lines between tokens."""
    if len(pixels) > ICON:
        pixels = resized(pixels, ICON)
    factor = ICON // len(pixels)
    side = factor * len(pixels)
    left, top = middle - side // 2, top + (ICON - side) // 2
    sheet.picture(left, top, pixels, factor)
    if tokens and factor > 5:
        for k in range(len(pixels) + 1):
            sheet.line([(left, top + k * factor), (left + side, top + k * factor)], (255, 255, 255))
            sheet.line([(left + k * factor, top), (left + k * factor, top + side)], (255, 255, 255))


def captions(sheet, middle, y, lines):
    """Lines of text around `middle`, the first darker than the others."""
    for i, line in enumerate(lines):
        sheet.text(middle, y + 18 * i, line, 14 if i == 0 else 13, MUTED if i else INK, "ms")


def stack(sheet, middle, top, depth, length, colour, parameters):
    """A bar for each block, as long as tokens are wide; below, how many there are, and of how many parameters."""
    for k in range(depth):
        sheet.box(middle - length / 2, top + k * (BAR + 4), length, BAR, colour, radius=3)
    captions(sheet, middle, top + depth * (BAR + 4) + 18, [f"{depth} block{'s' * (depth > 1)}", amount(parameters)])


def columns(count):
    """The middles of so many columns."""
    return [LEFT + (WIDTH - 2 * LEFT) / count * (k + 0.5) for k in range(count)]


def title(sheet, y, name, note, colour):
    """A heading, a name on the left and a note on the right."""
    sheet.box(LEFT, y - 13, 5, 17, colour, radius=2)
    sheet.text(LEFT + 14, y, name, 18, INK, "ls")
    sheet.text(WIDTH - LEFT, y, note, 14, MUTED, "rs")


def generator(sheet, top, options, shape):
    """Draw the generator from `top` on; returns where it ends. shape: float picture (3, S, S)."""
    noise, *stages, rgb = rows = summary.generator_rows(transgan.make_generator(options, summary.Zeros()))
    title(sheet, top, "Generator", f"{sum(row[4] for row in rows):,} parameters", BLUE)
    middles, width, upper, side = columns(len(stages) + 2), stages[0][2], top + 36, options.image_size
    middle, bars = upper + ICON / 2, upper + ICON + 68
    values = np.random.default_rng(0).standard_normal((12, 1))
    levels = np.clip(128 + 60 * values, 0, 255).astype(np.uint8)
    sheet.picture(middles[0] - 4, upper, levels[..., None].repeat(3, -1), 8)
    captions(sheet, middles[0], upper + ICON + 22, ["noise z", f"{width} numbers"])
    for k, (name, tokens, own_width, depth, parameters, _) in enumerate(stages):
        x = middles[k + 1]
        made = transgan.downsample(shape[None], side // int(name.split("x")[0]))[0]
        icon(sheet, x, upper, channels_last(made), tokens=True)
        captions(sheet, x, upper + ICON + 22, [f"{name} = {tokens:,} tokens", f"of width {own_width}, + position"])
        stack(sheet, x, bars, depth, max(8, own_width / width * 150), BLUE, parameters)
        edge, label, note = (ICON / 2 + 8, "UpScale", "C to C/4") if k else (16, "Linear", amount(noise[4]))
        arrow(sheet, middles[k] + edge, x - ICON / 2 - 8, middle, label, note)
    icon(sheet, middles[-1], upper, channels_last(shape))
    captions(sheet, middles[-1], upper + ICON + 22, ["picture", f"3 x {side} x {side}"])
    arrow(sheet, middles[-2] + ICON / 2 + 8, middles[-1] - ICON / 2 - 8, middle, "Linear", amount(rgb[4]))
    return bars + max(row[3] for row in stages) * (BAR + 4) + 60


def discriminator(sheet, top, options, shape):
    """Draw the discriminator from `top` on; returns where it ends."""
    patches, blocks, head = rows = summary.discriminator_rows(transgan.make_discriminator(options, summary.Zeros()))
    title(sheet, top, "Discriminator", f"{sum(row[4] for row in rows):,} parameters", RED)
    side, p, width = options.image_size, options.patch_size, patches[2]
    middles, upper, n = columns(5), top + 36, side // p
    middle, bars = upper + ICON / 2, upper + ICON + 74
    for x, lines in zip(middles, (
        ("picture", f"3 x {side} x {side}"), (f"{n}x{n} = {patches[1]} patches", f"of 3 x {p} x {p} numbers"),
        (f"[cls] + {patches[1]} = {blocks[1]} tokens", f"of width {width}, + position"),
        ("[cls] after all blocks", f"1 x {width}"), ("one number", "high for real pictures"),
    ), strict=True):  # fmt: skip
        captions(sheet, x, upper + ICON + 28, lines)
    icon(sheet, middles[0], upper, channels_last(shape))
    shown, pitch = max(1, ICON // n), max(1, ICON // n) + 3  # pixels of a patch in the figure, and to the next
    cut, across = resized(channels_last(shape), n * shown), n * pitch - 3
    for row, column in np.ndindex(n, n):
        patch = cut[row * shown : (row + 1) * shown, column * shown : (column + 1) * shown]
        sheet.picture(middles[1] - across / 2 + column * pitch, middle - across / 2 + row * pitch, patch, 1)
    arrow(sheet, middles[0] + ICON / 2 + 8, middles[1] - across / 2 - 8, middle, "cut")
    tokens(sheet, middles[2], upper, n)
    stack(sheet, middles[2], bars, blocks[3], 150, RED, blocks[4])
    arrow(sheet, middles[1] + across / 2 + 8, middles[2] - ICON / 2 - 22, middle, "Linear", amount(patches[4]))
    sheet.box(middles[3] - 12, middle - 12, 24, 24, GREEN, radius=4)
    arrow(sheet, middles[2] + ICON / 2 + 8, middles[3] - 20, middle, "take [cls]")
    sheet.box(middles[4] - 40, middle - 18, 80, 36, None, INK, 18, 1.5)
    sheet.text(middles[4], middle + 5, "D(x)", 15, INK, "ms")
    arrow(sheet, middles[3] + 20, middles[4] - 48, middle, "LayerNorm, Linear", amount(head[4]))
    return bars + blocks[3] * (BAR + 4) + 60


def tokens(sheet, middle, top, n):
    """n*n tokens as squares, and the [cls] token before them."""
    pitch, left = ICON / n, middle - ICON / 2
    for row, column in np.ndindex(n, n):
        x, y = left + column * pitch + 1, top + row * pitch + 1
        sheet.box(x, y, pitch - 2, pitch - 2, (238, 176, 152), radius=2)
    sheet.box(left - pitch - 3, top + 1, pitch - 2, pitch - 2, GREEN, radius=2)


def block(sheet, top):
    """Draw the parts of one block from `top` on."""
    title(sheet, top, "One block", "tokens (N, C) to tokens (N, C), in both networks", VIOLET)
    y, parts = top + 66, (("LayerNorm", "", 120), ("Attention", f"{transgan.NUM_HEADS} heads", 190), None,
                          ("LayerNorm", "", 120), ("MLP", "C, 4C, GELU, C", 190), None)  # fmt: skip
    x = begun = LEFT + 60
    sheet.text(LEFT + 14, y + 5, "x", 16, INK, "ls")
    sheet.line([(LEFT + 30, y), (begun, y)], MUTED, 1.5)
    for part in parts:
        arrow(sheet, x, x + 28, y)
        if part:
            name, note, width = part
            sheet.box(x + 28, y - 24, width, 48, (241, 237, 248), VIOLET, 7, 1.2)
            sheet.text(x + 28 + width / 2, y + (-2 if note else 5), name, 14, INK, "ms")
            sheet.text(x + 28 + width / 2, y + 16, note, 12, MUTED, "ms")
            x += 28 + width
            continue
        sheet.line([(begun + 6, y), (begun + 6, y - 42), (x + 39, y - 42), (x + 39, y - 11)], MUTED, 1.5)
        sheet.box(x + 28, y - 11, 22, 22, (255, 255, 255), VIOLET, 11, 1.5)
        sheet.text(x + 39, y + 6, "+", 17, VIOLET, "ms")
        x = begun = x + 50
    arrow(sheet, x, WIDTH - LEFT - 8, y)
    return y + 44


def draw(options, path):
    """Draw both networks of TransGAN with these options into a PNG."""
    shape = data.scale(data.draw_shapes(1, options.image_size, seed=3))[0]
    sheet, top = Sheet(WIDTH, 1200), 40
    for part in (generator, discriminator):
        top = part(sheet, top, options, shape) + 24
        sheet.line([(LEFT, top - 34), (WIDTH - LEFT, top - 34)], FAINT)
    bottom = block(sheet, top)
    sheet.image = sheet.image.crop((0, 0, 2 * WIDTH, 2 * int(bottom)))
    sheet.save(path)


def main(argv=None):
    """Run the command line; returns the exit code."""
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
        draw(transgan.Options(size=args.size, image_size=args.image_size, patch_size=side, sr_weight=0.0), args.path)
        return 0
    except ValueError as error:
        message = f"{error}; choose another --image-size"
    except OSError as error:
        message = f"cannot write {args.path}: {error.strerror}; name another file"
    print(f"transgan: {one_line(message)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
