"""The same training in this project and in PyTorch, side by side: the distance to real pictures over steps and seconds.

    python benchmarks/training.py [--data-dir DIR] [--steps 2000] [--seeds 1,2,0] [--short 500] [--out FOLDER]
                                                            [--nudge N] [--float64]    (needs: pip install '.[test,parity]')

Both begin with the same weights and use the same batches, noise and augmentations, on one thread of the CPU; they take
turns, step by step. PyTorch is as it is, eager, in benchmarks/reference.py. The last seed makes --steps, those before it
--short. Should they part, two more runs tell whether that is rounding: with --nudge N there are N further sides, ours once
more with each first weight moved by about its last digit, which part from ours as far; with --float64 they part later.

FOLDER gets distances.csv, a row of each side after every measurement, and training.png, its curves. Seconds are the
processor's, and of training alone, so that other programs matter little.
"""

import argparse
import csv
import time
from pathlib import Path

from start import fast  # isort: skip

import numpy as np

import data
import transgan
from data import UserError
from look.drawing import BLUE, GREEN, ORANGE
from look.plot import plot
from program import options
from program.run import JUDGED
from program.trainer import make_networks
from store import arguments, datasets

COLUMNS = ("seed", "step", "side", "seconds", "distance")
COLOURS = {"ours": BLUE, "PyTorch": ORANGE}  # and green for all that are nudged
NUDGE = 1e-7  # relative: float32 has a little over seven digits
ONE_SIDED = {"generator", "discriminator", "accumulate", "precision", "locality_stages", "locality_shape"}  # options


def make_sides(chosen, pictures, nudge, dtype):
    """{name: trainer} with the same first weights, or nearly so."""
    import torch

    from benchmarks import reference

    torch.set_num_threads(1)
    ours, *nudged = (transgan.Trainer(chosen, pictures, *make_networks(chosen, dtype)) for _ in range(1 + nudge))
    for number, trainer in enumerate(nudged):
        for adam in (trainer.gen_adam, trainer.disc_adam):
            adam.p *= 1 + NUDGE * np.random.default_rng(number).standard_normal(len(adam.p))
    sides = {f"nudged {number}": trainer for number, trainer in enumerate(nudged, 1)}
    return {"ours": ours, "PyTorch": reference.Trainer(ours)} | sides


def compare(chosen, pictures, every, nudge, dtype):
    """Train all sides; hands out a row of each, in COLUMNS, before the first step, after every `every`, and at the end."""
    sides, rng = make_sides(chosen, pictures, nudge, dtype), data.random_stream("judge", chosen.seed)
    noise = sides["ours"].noise(JUDGED, rng)
    real = data.scale(pictures[rng.choice(len(pictures), JUDGED, replace=len(pictures) < JUDGED)])
    seconds = dict.fromkeys(sides, 0.0)
    for step in range(chosen.steps + 1):
        for name, side in sides.items() if step else ():
            start = time.process_time()
            side.train_step()
            seconds[name] += time.process_time() - start
        if step % every == 0 or step == chosen.steps:
            distances = {name: transgan.sliced_wasserstein(side.sample(noise), real) for name, side in sides.items()}
            yield [(chosen.seed, step, name, seconds[name], distances[name]) for name in sides]


def draw(curves, path):
    """For each seed, the distance over steps and over seconds. curves: {seed: {side: [(step, seconds, distance), ...]}}."""
    panels = []
    for seed, sides in curves.items():
        for i, x in enumerate(("step", "seconds")):
            lines = {(name, COLOURS.get(name, GREEN)): np.array(rows).T[[i, 2]] for name, rows in sides.items()}
            panels.append((f"seed {seed}: distance", x, max(1, *(line[0, -1] for line in lines.values())), lines))
    plot(panels, path)


def seeds(text):
    """An argument type: seeds, separated by commas, each of them such as --seed would take."""
    return [options.OPTIONS["seed"].values(seed) for seed in text.split(",")]


def main():
    """Print a line after every measurement; the files are as new as that."""
    parser = arguments.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=seeds, default="1,2,0", help="separated by commas (default 1,2,0)")
    parser.add_argument("--short", type=options.WHOLE, default=500, help="steps of all seeds but the last (default 500)")
    parser.add_argument("--every", type=options.WHOLE, default=100, help="steps between measurements (default 100)")
    parser.add_argument("--nudge", type=arguments.number(int, 0, 16), default=0, metavar="N",
                        help="sides more, ours with first weights that differ in the last digit (default 0)")  # fmt: skip
    parser.add_argument("--float64", action="store_true", help="in twice the digits, for about twice the time")
    parser.add_argument("--preset", choices=options.PRESETS, default="cifar10-laptop", help="(default cifar10-laptop)")
    parser.add_argument("--data-dir", type=arguments.folder, default=Path("data"), help="of data sets (default data)")
    parser.add_argument("--out", type=arguments.folder, default=Path("training"), help="(default training)")
    options.add_options(parser, {name: x for name, x in options.OPTIONS.items() if name not in ONE_SIDED | {"seed"}})
    args = parser.parse_args()
    given = {name: value for name in options.OPTIONS if (value := getattr(args, name, None)) is not None}
    try:
        lengths = [args.short] * (len(args.seeds) - 1) + [args.steps or 2000]
        runs = [options.check_options(options.fill_in(given | {"seed": seed, "steps": steps}, args.preset))
                for seed, steps in zip(args.seeds, lengths, strict=True)]  # fmt: skip
        make_networks(runs[0])  # which refuse what they cannot make
        pictures = datasets.load_pictures(runs[0].dataset, args.data_dir, runs[0].image_size)
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, UserError) as error:
        parser.error(str(error))
    fast.install()
    curves = {}
    with (args.out / "distances.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for chosen in runs:
            for measured in compare(chosen, pictures, args.every, args.nudge, np.float64 if args.float64 else np.float32):
                table.writerows(measured)
                file.flush()
                for seed, step, side, seconds, distance in measured:
                    curves.setdefault(seed, {}).setdefault(side, []).append((step, seconds, distance))
                    print(f"seed {seed}, step {step:>5}: {side:12} {seconds:8.1f} s, distance {distance:.4f}", flush=True)
                draw(curves, args.out / "training.png")


if __name__ == "__main__":
    main()
