"""Pictures of what a trained run can do and what it looks at, made from its checkpoint.

python transgan.py --from runs/NAME --sample 64           new samples; another --seed gives others
python transgan.py --from runs/NAME --interpolate 8       a walk through noise, over 8 points and back to the first
python transgan.py --from runs/NAME --attention           where both networks look, block by block, head by head
python transgan.py --from runs/NAME --nearest 8           samples beside the training pictures most like them
python transgan.py --from runs/NAME --export FILE         keep the generator alone; --from FILE does all of the above
"""

import argparse
import contextlib
import math

import numpy as np

import autograd as ag
import data
import transgan
from autograd import Tensor
from data import UserError
from look import drawing
from look.drawing import INK, MUTED, RED, Sheet
from store import arguments, files, output

# --- 1. Walks ---------------------------------------------------------------------------------------------------------


def slerp(a, b, t):
    """Spherical interpolation from a to b, vectors (Z,) of any length but 0, at t in [0, 1], (n,): (n, Z).

    On the way the direction turns evenly and the length goes evenly from |a| to |b|. Normal noise of many dimensions lies
    near a sphere; a straight line between two of its points would lead through the inside, where the generator was never
    trained. (Shoemake 1985; White 2016, for latent vectors.) Where a and b are parallel, that line is the way.
    """
    t = np.asarray(t)[:, None]
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    a, b = a / lengths[0], b / lengths[1]
    angle = np.arccos(np.clip(a @ b, -1, 1))
    if np.sin(angle) < 1e-6:
        direction = (1 - t) * a + t * b
    else:
        direction = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    return direction * ((1 - t) * lengths[0] + t * lengths[1])


STRIP, BETWEEN = 8, 16  # steps from one point of a walk to the next, in the strip of pictures and in the animation


def walk(points, steps):
    """Noise from each of the points (n, Z) to the next, from the last to the first: (n, steps, Z), all but the arrival."""
    t = np.arange(steps) / steps
    return np.stack([slerp(a, b, t) for a, b in zip(points, np.roll(points, -1, axis=0), strict=True)])


def interpolate(sampler, points, path):
    """Write a closed walk over the points of noise, (n, Z): a GIF, and a PNG with a row from each point to the next."""
    frames = drawing.channels_last(sampler.sample(walk(points, BETWEEN).reshape(-1, points.shape[1])))
    drawing.save_animation(frames, path.with_suffix(".gif"), max(1, 256 // frames.shape[1]), len(frames) * [80])
    rows = np.concatenate([walk(points, STRIP), np.roll(points, -1, axis=0)[:, None]], axis=1)  # each row arrives, too
    files.save_grid(sampler.sample(rows.reshape(-1, points.shape[1])), path.with_suffix(".png"), columns=STRIP + 1)


# --- 2. Attention -----------------------------------------------------------------------------------------------------


def token_at(query, side, grid):
    """The number of the token, of grid*grid, that holds the pixel `query` (row, column) of a picture of side*side."""
    return query[0] * grid // side * grid + query[1] * grid // side


def attention_probabilities(qkv, num_heads, mask, rows):
    """The rows, a slice, of what `ag.attention` multiplies v by: Tensor (B, N, 3C) -> Tensor (B, H, R, N).

    Each is a distribution over the keys. With few of them, many tokens do not need all (B, H, N, N).
    """
    heads = ag.split_heads(qkv, 3 * num_heads)  # (B, 3H, N, D)
    q, k = heads[:, :num_heads, rows], heads[:, num_heads : 2 * num_heads]
    return ag.softmax(q * q.shape[-1] ** -0.5 @ ag.swap_last(k), None if mask is None else mask[rows])


@contextlib.contextmanager
def watched(query, side):
    """Within this context, a list of what tokens look at in each block that runs, in order: NumPy (H, R, n, n) each.

    The attention probabilities, of the first picture's n*n parts, of the [cls] token, if there is one, and of that which
    holds the pixel `query` of side*side.
    """
    seen, call = [], transgan.Attention.__call__

    def watching(self, x, mask=None, n=None):
        grid = math.isqrt(x.shape[1])
        token = token_at(query, side, grid)
        # [cls] is number 0, and the others follow
        rows = slice(0, token + 2, token + 1) if x.shape[1] > grid**2 else slice(token, token + 1)
        looks = ag.to_numpy(attention_probabilities(self.qkv(x), self.num_heads, mask, rows))
        seen.append(looks[0, ..., -(grid**2) :].reshape(self.num_heads, -1, grid, grid))
        return call(self, x, mask, n)

    transgan.Attention.__call__ = watching
    try:
        yield seen
    finally:
        transgan.Attention.__call__ = call


HEAT = np.array([(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)])  # dark to light


def overlay(pixels, weights):
    """A grey copy of a picture, bytes (S, S, 3), in the light of weights (n, n), at least 0, of its n*n parts: bytes again.

    The largest weight is the brightest. n must divide S.
    """
    factor = len(pixels) // len(weights)
    heat = (weights / max(weights.max(), 1e-12)).repeat(factor, 0).repeat(factor, 1)
    colours = np.stack([np.interp(heat, np.linspace(0, 1, len(HEAT)), HEAT[:, i]) for i in range(3)], axis=-1)
    grey = pixels.mean(axis=-1, keepdims=True)
    return np.clip(0.85 * colours + 0.3 * grey, 0, 255).astype(np.uint8)


def views(sampler, noise, query):
    """What both networks look at while they make and judge the picture of noise (1, Z).

    Returns the picture, floats (3, S, S), and {(network, who looks): [weights of the picture's parts, (H, n, n), of each
    block]}, for the discriminator's [cls] token and the token of the pixel `query` in either network. What is missing from
    1 in the discriminator's is what its token looks at [cls]. A network that is missing or has no attention is left out.
    """
    side, pixel, found = sampler.options.image_size, f"the token of pixel {query[0]}, {query[1]}", {}
    with watched(query, side) as makes:
        picture = sampler.sample(noise)
    with watched(query, side) as judges, ag.no_grad():
        if sampler.discriminator:
            sampler.discriminator(Tensor(sampler.array(picture)))
    for number, who in enumerate(("the [cls] token", pixel)):
        if judges:
            found["discriminator", who] = [looks[:, number] for looks in judges]
    if makes:
        found["generator", pixel] = [looks[:, 0] for looks in makes]
    return picture[0], found


def attention(sampler, noise, query, path):
    """Draw `views` as maps over the picture, a row for each block and a column for each head, and their mean."""
    picture, found = views(sampler, noise, query)
    if not found:
        raise UserError("--attention looks into TransGAN's networks, and there is none of them here; leave it out")
    pixels, side = drawing.channels_last(picture), picture.shape[-1]
    factor = max(1, 64 // side)
    heads = [*(f"head {k + 1}" for k in range(len(next(iter(found.values()))[0]))), "mean"]
    width, tall = 90 + len(heads) * (factor * side + 8), factor * side + 60
    ends = {network: 16 for network, _ in found}  # of what is drawn of each, one beside the other
    sheet = Sheet(width * len(ends), tall * (3 + sum(len(maps) + 1 for maps in found.values())))
    for (network, who), maps in found.items():
        left, top = 16 + width * list(ends).index(network), ends[network]
        rows = [((f"block {k + 1}", f"{weights.shape[-1]}x{weights.shape[-1]}"),
                 [(overlay(pixels, part), f"{part.max():.1%}") for part in (*weights, weights.mean(axis=0))])
                for k, weights in enumerate(maps)]  # fmt: skip
        sheet.text(left, top + 14, f"{network}: {who}", 15, INK, "ls")
        top = ends[network] = sheet.grid(left, top + 28, heads, rows, factor)
    size = 2 * factor  # of a pixel of the picture, which comes last
    sheet.text(left, top + 14, "the picture", 15, INK, "ls")
    sheet.picture(left, top + 36, pixels, size)
    sheet.box(left + size * query[1] - 2, top + 34 + size * query[0], size + 4, size + 4, None, RED, 0, 2)
    notes = ("made by the generator; red: the pixel whose token looks", "over the maps, light: what it looks at most",
             "under them: the largest weight, of 100% over all tokens")  # fmt: skip
    for line, note in enumerate(notes):
        sheet.text(left, top + 48 + size * side + 18 * line, note, 12, MUTED)
    sheet.save(path, max(*ends.values(), top + 120 + size * side))
    if not sampler.discriminator:
        output.note("--attention shows the generator's maps alone, because there is no discriminator in an export")


# --- 3. Nearest neighbours --------------------------------------------------------------------------------------------

BLOCK = 1 << 22  # numbers of training pictures in memory at once: 32 MB in float64


def nearest_pictures(queries, pictures, count):
    """The `count` pictures that are nearest to each query, or their mirror images: bytes (Q, 3, S, S) and (N, 3, S, S).

    Returns which they are, (Q, count), whether it is the mirror image, and the distances, nearest first: the root of the
    mean square difference over a picture, of 255 levels. By |a - b|^2 = |a|^2 + |b|^2 - 2 ab, in float64, where sums of
    whole numbers are exact. A query's mirror image is as far from a picture as the query from the picture's.
    """
    size = queries[0].size
    both = np.stack([queries, queries[..., ::-1]]).reshape(2, len(queries), size).astype(np.float64)
    squares = np.empty((2, len(queries), len(pictures)))
    rows = max(1, BLOCK // size)
    for first in range(0, len(pictures), rows):
        block = pictures[first : first + rows].reshape(-1, size).astype(np.float64)
        squares[..., first : first + rows] = (block**2).sum(axis=1) - 2 * (both @ block.T)
    squares += (both**2).sum(axis=2, keepdims=True)
    which = np.argsort(squares.min(axis=0), axis=1, kind="stable")[:, :count]
    plain, mirrored = np.take_along_axis(squares, which[None], 2)
    return which, mirrored < plain, np.sqrt(np.minimum(plain, mirrored) / size)


NEIGHBOURS = 5
COMPARED = 64  # training pictures whose own nearest neighbours are the measure of what is near


def nearest(sampler, noise, pictures, seed, path):
    """Draw what the averaged generator makes of noise (n, Z), each beside its nearest of the training pictures."""
    made = data.to_bytes(sampler.sample(noise))
    found = nearest_pictures(made, pictures, NEIGHBOURS)
    some = data.random_stream("look", seed, 1).choice(len(pictures), min(COMPARED, len(pictures)), replace=False)
    apart = nearest_pictures(pictures[np.sort(some)], pictures, 2)[2][:, 1:]  # the nearest of all is the picture itself
    rows = []
    for i, sample in enumerate(made):
        shown = [(sample.transpose(1, 2, 0), "")]
        for number, mirrored, distance in zip(*(part[i] for part in found), strict=True):
            near = pictures[number].transpose(1, 2, 0)
            shown.append((near[:, ::-1], f"{distance:.1f} m") if mirrored else (near, f"{distance:.1f}"))
        rows.append((("sample", str(i + 1)), shown))
    factor, half = max(1, 64 // made.shape[-1]), len(rows) if len(rows) < 4 else -(-len(rows) // 2)
    heads = ["made", "nearest", "second", "third", "fourth", "fifth"][: len(rows[0][1])]
    width = 90 + (NEIGHBOURS + 1) * (factor * made.shape[-1] + 8)
    sheet = Sheet(width * -(-len(rows) // half), 120 + half * (factor * made.shape[-1] + 24))
    ends = [sheet.grid(16 + width * (first // half), 16, heads, rows[first : first + half], factor)
            for first in range(0, len(rows), half)]  # fmt: skip
    note = f"To the nearest, median: samples {np.median(found[2][:, 0]):.1f}"
    note += f", training pictures among themselves {np.median(apart):.1f}" if apart.size else ""
    sheet.text(16, ends[0] - 12, "Under each training picture: root mean square difference, of 255 levels; m: mirrored", 12)
    sheet.text(16, ends[0] + 6, note, 12)
    sheet.save(path, ends[0] + 36)


# --- 4. Command line --------------------------------------------------------------------------------------------------

KINDS = ("sample", "interpolate", "attention", "nearest")  # of pictures, and the options that ask for them


def pixel(text):
    """An argument type: ROW,COLUMN, whole numbers from 0."""
    try:
        row, column = map(int, text.split(","))
    except ValueError:
        row = column = -1
    if min(row, column) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a row and a column, counted from 0, like 8,8")
    return row, column


def add_options(parser):
    """What the command line of transgan.py knows of this chapter."""
    looks = parser.add_argument_group("pictures of a run, see look/pictures.py")
    looks.add_argument("--from", type=arguments.folder, dest="begun", metavar="RUN",
                       help="make what is asked for below of the run in the folder RUN, into RUN/look or --out; or of a "
                       "file of --export, into runs/FILE-look or --out; --seed is that of the pictures (default: the "
                       "run's)")  # fmt: skip
    looks.add_argument("--export", type=arguments.folder, metavar="FILE",
                       help="write the averaged generator alone, its weights as float16, with its options and where it "
                       "comes from; an earlier export of the same run is replaced, no other file is")  # fmt: skip
    looks.add_argument("--sample", type=arguments.number(int, 1, 1024), metavar="N", help="N new samples")
    looks.add_argument("--interpolate", type=arguments.number(int, 2, 100), metavar="N",
                       help="a walk through noise over N points and back, as a GIF and a strip of pictures")  # fmt: skip
    looks.add_argument("--attention", action="store_true",
                       help="where both networks look, in each block and head, as maps over a sample")  # fmt: skip
    looks.add_argument("--query", type=pixel, metavar="ROW,COLUMN",
                       help="the pixel whose token looks, beside [cls] (default: in the middle)")  # fmt: skip
    looks.add_argument("--nearest", type=arguments.number(int, 1, 100), metavar="N",
                       help="N samples beside the training pictures that are most like them")  # fmt: skip


def make(args, sampler, load, out):
    """Write what the command line asks for into the folder `out`, and print the path of each. Raises UserError.

    load: gives the training pictures, bytes (N, 3, S, S), of which --nearest alone makes use.
    """
    side, seed = sampler.options.image_size, sampler.options.seed if args.seed is None else args.seed
    query = args.query or (side // 2, side // 2)
    if max(query) >= side:
        raise UserError(
            f"--query {query[0]},{query[1]} is outside of {side}x{side} pixels; they count from 0 to {side - 1}"
        )

    def noise(count):  # the first samples of a seed are the same, whatever is made of them
        return sampler.noise(count, data.random_stream("look", seed))

    files.need_folder(out, "--out")
    try:
        pictures = load() if args.nearest else None
    except UserError as error:
        raise UserError(f"--nearest looks among the training pictures: {error}") from None
    if args.nearest and sampler.pictures not in (None, files.fingerprint(pictures)):
        output.warn("transgan: the pictures are not those that the run has learnt from; the nearest are of these")
    for name, draw in (
        ("sample", lambda path: files.save_grid(sampler.sample(noise(args.sample)), path, math.isqrt(args.sample - 1) + 1)),
        ("interpolate", lambda path: interpolate(sampler, noise(args.interpolate), path)),
        ("attention", lambda path: attention(sampler, noise(1), query, path)),
        ("nearest", lambda path: nearest(sampler, noise(args.nearest), pictures, seed, path)),
    ):
        if getattr(args, name):
            path = out / f"{name}-{sampler.step:06d}-seed{seed}.png"
            draw(path)
            for made in (path.with_suffix(".gif"), path) if name == "interpolate" else (path,):
                output.tell(str(made), event="picture", path=str(made))
