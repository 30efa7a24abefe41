"""The paper's tables, run again with this program: each row printed beside the paper's numbers, over several seeds.

    python -m paper.tables 1 --size tiny --steps 200 --seeds 3        (on CIFAR-10, on its own)
    python -m paper.tables 3 --dataset shapes --steps 800 -- --batch-size 16

trains each row once for each seed, as runs of transgan.py with the row's options (and those after --, for every row),
scores them and prints the table. Nothing is printed that was not run. Runs are kept in --out, so that a command that was
stopped goes on where it was, and one that is repeated prints at once.
"""

import argparse
import contextlib
import csv
import datetime
import hashlib
import math
import platform
import signal
import statistics
import subprocess
import sys
import zipfile
from concurrent import futures
from pathlib import Path

import transgan
from data import UserError
from fast import CORES
from paper import scores
from paper.inception import load_inception
from store import files, output
from store.arguments import NAMES, Parser, folder, number, pictures
from store.files import CHECKPOINTS

# --- 1. The tables ----------------------------------------------------------------------------------------------------

PLAIN = ("--diff-aug", "none", "--sr-weight", "0", "--locality", "none")  # the last two are what AutoGAN cannot have
AUGMENTED = (*PLAIN, "--diff-aug", transgan.Options.diff_aug)
CO_TRAINED = (*AUGMENTED, "--sr-weight", str(transgan.Options.sr_weight))
LOCAL = (*CO_TRAINED, "--locality", transgan.Options.locality)


def pair(generator, discriminator, *options):
    return ("--generator", generator, "--discriminator", discriminator, *options)


# {number: (title, {row: ((the paper's Inception Score, FID), options here)})}; options are None for what is not built here.
TABLES = {
    1: ("generators and discriminators, without any trick", {
        "AutoGAN x AutoGAN": ((8.55, 12.42), pair("autogan", "autogan", *PLAIN)),
        "TransGAN x AutoGAN": ((8.59, 13.23), pair("transgan", "autogan", *PLAIN)),
        "AutoGAN x TransGAN": ((6.17, 49.83), pair("autogan", "transgan", *PLAIN)),
        "TransGAN x TransGAN": ((6.95, 41.41), pair("transgan", "transgan", *PLAIN)),
    }),
    2: ("data augmentation, off and on", {
        "WGAN-GP": ((6.49, 39.68), pair("resnet", "resnet", *PLAIN)),
        "WGAN-GP + augmentation": ((6.29, 37.14), pair("resnet", "resnet", *AUGMENTED)),
        "AutoGAN": ((8.55, 12.42), pair("autogan", "autogan", *PLAIN)),
        "AutoGAN + augmentation": ((8.60, 12.72), pair("autogan", "autogan", *AUGMENTED)),
        "StyleGAN v2": ((9.18, 11.07), None),
        "StyleGAN v2 + augmentation": ((9.40, 9.89), None),
        "TransGAN": ((6.95, 41.41), pair("transgan", "transgan", *PLAIN)),
        "TransGAN + augmentation": ((8.15, 19.85), pair("transgan", "transgan", *AUGMENTED)),
    }),
    3: ("the paper's tricks, one after another", {
        "baseline": ((6.95, 41.41), PLAIN),
        "+ augmentation": ((8.15, 19.85), AUGMENTED),
        "+ co-training": ((8.20, 19.12), CO_TRAINED),
        "+ locality": ((8.22, 18.58), LOCAL),
    }),
    4: ("sizes of TransGAN, with all tricks", {
        "TransGAN-S": ((8.22, 18.58), ("--size", "S", *LOCAL)),
        "TransGAN-M": ((8.36, 16.27), ("--size", "M", *LOCAL)),
        "TransGAN-L": ((8.50, 14.46), ("--size", "L", *LOCAL)),
        "TransGAN-XL": ((8.63, 11.89), ("--size", "XL", *LOCAL)),
    }),
}  # fmt: skip
# Where a peer's training differs from its authors', for the tables that have it.
DIFFERENCES = {
    "AutoGAN": "real pictures are flipped, gradients clipped to norm 5; spectral norm takes a power iteration an update "
               "of the discriminator, theirs one in every pass of it, and divides by |W^T u| of the new u, theirs by |W v| "
               "with the v that made it",
    "WGAN-GP": "gradients are clipped to norm 5; the loss has the term 0.001 (mean D(real))^2",
}  # fmt: skip

# --- 2. Running -------------------------------------------------------------------------------------------------------

RUNNING = []  # processes of transgan.py that were begun
NUMBERS = {"inception": ("is", "fid", "distance"), "own": ("is_own", "fid_own", "distance")}  # of a run, by --features


def program(*arguments):
    """Run transgan.py. Raises UserError with its last line if it fails."""
    command = [sys.executable, transgan.__file__, *map(str, arguments)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, errors="replace")
    RUNNING.append(child)
    said = child.communicate()[1]
    if child.returncode:
        raise UserError((said.splitlines() or ["transgan.py was stopped"])[-1].removeprefix("transgan: "))


def train(folder, options, machine, steps):
    """The last row of the log of a run in `folder`, which is begun, taken up again, or only read. Raises UserError.

    options, machine: arguments of transgan.py, those that define the run and those that say where it runs.
    """
    if reached(folder)[0] < steps:
        begun = any((folder / name).exists() for name in CHECKPOINTS)
        where = ["--resume", folder] if begun else [*options, "--out", folder]
        program(*where, *machine, "--steps", steps, "--sample-every", max(100, steps))
    try:
        with files.plain(folder / "log.csv").open(newline="") as file:
            last = {name: float(value) for name, value in list(csv.DictReader(file))[-1].items() if value}
        if not math.isfinite(last["distance"] + last["seconds"]):
            raise ValueError("its last distance is no number")
        return last
    except (OSError, IndexError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{folder / 'log.csv'} is damaged ({error}); move {folder} away") from None


def reached(folder):
    """(step, checksum of the averaged generator) of a run's newest checkpoint that is whole; (-1, None) without one.

    What is wrong with it is transgan.py's to say.
    """
    for name in CHECKPOINTS:
        with contextlib.suppress(Exception), zipfile.ZipFile(files.plain(folder / name)) as archive:
            if archive.testzip() is None:
                return int(files.read_array(archive, "step", 8)), files.checksum(archive, "average/")
    return -1, None


def score(folder, features, images, machine, steps, anew=False):
    """The scores of a run in `folder` by name, with what they are MEASURED_BY; it is scored if none fit. Raises UserError.

    They are the newest in its scores.json of the generator that is there now, of so many images, and against the data set
    itself. anew: scores the run in any case.
    """
    path, names = folder / "scores.json", NUMBERS[features][:2]
    wanted = {"step": steps, "generator": reached(folder)[1], "images": images, "statistics": None}

    def fitting():
        return [entry for entry in scores.read_scores(path) if wanted.items() <= entry.items() and entry.keys() >= {*names}]

    if anew or not fitting():
        program("--evaluate", folder, "--features", features, "--num-images", images, *machine)
    if not (entries := fitting()):
        raise UserError(f"{path} lacks the scores that were just computed; is another program writing there?")
    return {name: entries[-1].get(name) for name in (*names, *scores.MEASURED_BY)}


def run_all(args, extra):
    """Train and score every row for every seed, `args.jobs` runs at a time: {row: [{name in NUMBERS: ...} of each seed]}.

    All are measured by the same network against the same pictures. extra: arguments of transgan.py for all rows. Raises
    UserError, also for what scores need and is not there, before any training.
    """
    rows = {name: options for name, (_, options) in TABLES[args.number][1].items()
            if options and (not args.rows or name in args.rows)}  # fmt: skip
    if not rows:
        raise UserError(f"of these rows there is nothing to run; choose others of table {args.number}")
    size = "" if args.number == 4 else f"-{args.size}"
    words = [f"table-{args.number}", files.short_name(args.dataset) + size, str(args.steps), *extra]
    name = files.portable("-".join(words))
    if args.dataset not in NAMES or len(name) > 120:  # folders of pictures may have one name, and no file a longer one
        name = f"{name[:120]}-{hashlib.sha256(repr([args.dataset, *words]).encode()).hexdigest()[:8]}"
    folder = args.out / name
    machine = ["--threads", max(1, CORES // args.jobs), "--device", args.device, "--data-dir", args.data_dir]
    runs = {(name, seed): folder / f"{name.strip('+ ')}-{seed}" for seed in range(args.seeds) for name in rows}
    if not all((run / "scores.json").exists() for run in runs.values()):
        if args.features == "inception":
            load_inception(data_dir=args.data_dir)
        elif not any(args.data_dir.glob("classifier-*.npz")):
            files.need_folder(args.data_dir, "--data-dir")

    def measure(run, anew=False):
        return score(runs[run], args.features, args.num_images, machine, args.steps, anew)

    def one(run):
        name, seed = run
        options = [*extra, "--dataset", args.dataset, "--size", args.size, "--seed", seed, *rows[name]]
        last = train(runs[run], options, machine, args.steps)
        done = last | measure(run)
        shown = ", ".join(f"{key} {done[key]:.3f}" for key in NUMBERS[args.features])
        print(f"{name}, seed {seed}: {shown}; {output.clock(last['seconds'])} of training\n",
              end="", file=sys.stderr, flush=True)  # fmt: skip
        return done

    first, *others = runs
    with futures.ThreadPoolExecutor(args.jobs) as pool:
        try:
            # the first alone: it makes the classifier and the reference statistics that all others share
            done = {first: pool.submit(one, first).result()} | dict(zip(others, pool.map(one, others), strict=True))
            if not all(scores.agree(entry, done[first], scores.MEASURED_BY) for entry in done.values()):  # some are older
                anew = [measure(first, True), *pool.map(lambda run: measure(run, True), others)]
                done = {run: done[run] | entry for run, entry in zip(runs, anew, strict=True)}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {name: [done[name, seed] for seed in range(args.seeds)] for name in rows}


# --- 3. Printing ------------------------------------------------------------------------------------------------------


def table(args, results, extra=()):
    """The table in Markdown, from `run_all`'s results: the paper's numbers, and ours with mean and deviation over seeds."""
    suffix = {"inception": "", "own": "-own"}[args.features]
    title, published = TABLES[args.number]
    lines = [("row", "paper: IS", "paper: FID", f"IS{suffix}", f"FID{suffix}", "distance")]
    for name, ((score, fid), options) in published.items():
        if name in results:
            numbers = [spread([run[key] for run in results[name]]) for key in NUMBERS[args.features]]
        else:
            numbers = ["not run" if options else "not built here"] * 3
        lines.append((name, f"{score:.2f}", f"{fid:.2f}", *numbers))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines = ["| " + " | ".join(f"{x:{w}}" for x, w in zip(line, widths, strict=True)) + " |" for line in lines]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    # how the authors trained the peers among the rows otherwise
    differences = "".join(f"\n\n{peer} here: {said}; every row takes --steps." for peer, said in DIFFERENCES.items()
                          if any(peer in row for row in published))  # fmt: skip
    where = f"{platform.machine()} with {CORES} cores" if args.device == "cpu" else args.device
    size = "" if args.number == 4 else f"size {args.size} on "
    options = f", with {' '.join(extra)}" if extra else ""
    return (
        f"Table {args.number}: {title}. The paper: CIFAR-10, 500,000 steps, 50,000 pictures.\n"
        f"Here: {size}{Path(args.dataset).name}, {args.steps} steps, {args.num_images} pictures, mean ± deviation of "
        f"{args.seeds} seeds, {where}, {datetime.date.today()}{options}.\n\n" + "\n".join(lines) + differences
    )


def spread(numbers):
    """Mean and the sample's deviation, as text."""
    deviation = f" ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.3f}{deviation}"


def make_parser():
    """The command line."""
    parser = Parser(
        prog="python -m paper.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("number", type=int, choices=TABLES, help="which of the paper's tables")
    parser.add_argument("--rows", type=lambda text: text.split(","), metavar="LIST",
                        help="only these rows, by name, separated by commas (default: all)")  # fmt: skip
    parser.add_argument("--dataset", type=pictures, default="cifar10", metavar="NAME",
                        help="as of transgan.py (default: cifar10)")  # fmt: skip
    parser.add_argument("--size", choices=transgan.SIZES,
                        help="of the networks, in tables 1 to 3 (default: S; tiny for a laptop)")  # fmt: skip
    parser.add_argument("--steps", type=number(int, 1), default=500_000, metavar="N", help="of a run (default: 500000)")
    parser.add_argument("--seeds", type=number(int, 1, 100), default=3, metavar="N", help="runs of a row (default: 3)")
    parser.add_argument("--features", choices=("inception", "own"), default="own",
                        help="the network that looks, as of transgan.py (default: own)")  # fmt: skip
    parser.add_argument("--num-images", type=number(int, 10), default=5000, metavar="N",
                        help="generated pictures to look at (default: 5000)")  # fmt: skip
    parser.add_argument("--jobs", type=number(int, 1, 64), default=CORES, metavar="N",
                        help="runs at the same time (default: one a core)")  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="cpu", help="as of transgan.py (default: cpu)")
    parser.add_argument("--data-dir", type=folder, default=Path("data"), metavar="DIR",
                        help="where data sets are kept (default: data)")  # fmt: skip
    parser.add_argument("--out", type=folder, default=Path("runs") / "tables", metavar="DIR",
                        help="where runs are kept (default: runs/tables)")  # fmt: skip
    return parser


def main(argv=None):
    """Run the command line; returns the exit code, as transgan.py's."""
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    args, extra = make_parser().parse_args(argv[:cut]), argv[cut + 1 :]
    try:
        if unknown := set(args.rows or ()) - set(rows := TABLES[args.number][1]):
            raise UserError(f"table {args.number} has no row {unknown.pop()!r}: {', '.join(rows)}")
        if args.size and args.number == 4:
            raise UserError("--size does nothing here: each row of table 4 is of its own; leave it out, or choose --rows")
        args.size = args.size or "S"
        free = {f"--{name.replace('_', '-')}" for name in (*vars(transgan.Options()), "accumulate", "precision")}
        free = free.difference(("--dataset", "--size", "--steps", "--seed"), *(words or () for _, words in rows.values()))
        for flag in (word.partition("=")[0] for word in extra):  # in full: argparse would take beginnings of others
            if flag.startswith("-") and flag not in free:
                raise UserError(f"{flag} is the table's, or no run's option; after -- may stand {', '.join(sorted(free))}")
        print(table(args, run_all(args, extra), extra), flush=True)
        return 0
    except (UserError, OSError) as error:  # the latter also of an output that is full, or that nobody reads
        said = f"{error}; the same command goes on from what is there" if isinstance(error, OSError) else str(error)
        with contextlib.suppress(OSError):
            print(f"transgan: {output.one_line(said)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the runs' last checkpoints", file=sys.stderr)
        return 130


def stop(*_):
    """What SIGTERM does: it stops the runs, which save what they have, and this."""
    for child in RUNNING:
        child.terminate()
    sys.exit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    if sys.stdout:  # None where the shell closed it
        sys.stdout.reconfigure(errors="backslashreplace")  # for the ± that not every terminal can show
    if code := main():
        sys.stdout = None  # it may be what failed, and is not to be tried again at the end
        sys.exit(code)
