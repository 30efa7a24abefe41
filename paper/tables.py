"""The paper's tables, run again with this program: each row printed beside the paper's numbers, over several seeds.

    python -m paper.tables 3 --dataset shapes --steps 800 --seeds 3

trains each row once for each seed, as runs of transgan.py with the row's options, and prints the table. Nothing is printed
that was not run. Runs are kept in --out, so that a command that was stopped goes on where it was, and one that is repeated
prints at once.

Contents
    1. The rows    ROWS: what the paper reports, and the options that make it here
    2. Running     one run, a whole table
    3. Printing    table
"""

import argparse
import csv
import datetime
import platform
import statistics
import subprocess
import sys
from concurrent import futures
from pathlib import Path

import transgan
from data import UserError

# --- 1. The rows ------------------------------------------------------------------------------------------------------

OFF = ("--diff-aug", "none", "--sr-weight", "0", "--locality", "none")
AUGMENTED = ("--diff-aug", transgan.Options.diff_aug)
CO_TRAINED = (*AUGMENTED, "--sr-weight", str(transgan.Options.sr_weight))
LOCAL = (*CO_TRAINED, "--locality", transgan.Options.locality)

ROWS = {  # name: (the paper's Inception Score and FID of size S on CIFAR-10, options here); each row adds to the one before
    "baseline": ((6.95, 41.41), OFF),
    "+ augmentation": ((8.15, 19.85), (*OFF, *AUGMENTED)),
    "+ co-training": ((8.20, 19.12), (*OFF, *CO_TRAINED)),
    "+ locality": ((8.22, 18.58), (*OFF, *LOCAL)),
}

# --- 2. Running -------------------------------------------------------------------------------------------------------


def train(folder, options, machine, steps):
    """The last row of the log of a run in `folder`, which is begun, taken up again, or only read. Raises UserError.

    options, machine: arguments of transgan.py, those that define the run and those that say where it runs.
    """
    rows = read_log(folder)
    if not rows or int(rows[-1]["step"]) < steps:
        where = ["--resume", folder] if (folder / "checkpoint.npz").exists() else [*options, "--out", folder]
        command = [sys.executable, transgan.__file__, *where, *machine, "--steps", steps]
        done = subprocess.run([str(x) for x in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f"the run in {folder} failed: {(done.stderr.splitlines() or ['it was stopped'])[-1]}")
        rows = read_log(folder)
    return rows[-1]


def read_log(folder):
    """The rows of a run's log.csv, [] if it has none."""
    try:
        with (folder / "log.csv").open(newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


def run_all(args):
    """Train every row for every seed, `args.jobs` runs at a time: {name: [last row of its log for each seed]}."""
    folder = args.out / f"{Path(args.dataset).name}-{args.size}-{args.steps}"
    machine = ["--threads", max(1, transgan.CORES // args.jobs), "--device", args.device, "--data-dir", args.data_dir]

    def one(name, seed):
        options = ["--dataset", args.dataset, "--size", args.size, "--seed", seed, *ROWS[name][1]]
        last = train(folder / f"{name.strip('+ ')}-{seed}", options, machine, args.steps)
        line = f"{name}, seed {seed}: distance {float(last['distance']):.4f}, {transgan.clock(float(last['seconds']))}\n"
        print(line, end="", file=sys.stderr, flush=True)
        return last

    with futures.ThreadPoolExecutor(args.jobs) as pool:
        runs = {(name, seed): pool.submit(one, name, seed) for seed in range(args.seeds) for name in ROWS}
        try:
            return {name: [runs[name, seed].result() for seed in range(args.seeds)] for name in ROWS}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# --- 3. Printing ------------------------------------------------------------------------------------------------------


def table(args, results):
    """The table in Markdown, from `run_all`'s results: the paper's numbers, and our distances with mean and deviation."""
    rows = [("row", "paper: IS", "paper: FID", "distance here", "of each seed")]
    for name, lasts in results.items():
        distances = [float(last["distance"]) for last in lasts]
        spread = f" ± {statistics.stdev(distances):.4f}" if len(distances) > 1 else ""
        (score, fid), _ = ROWS[name]
        each = " ".join(f"{distance:.4f}" for distance in distances)
        rows.append((name, f"{score:.2f}", f"{fid:.2f}", f"{statistics.mean(distances):.4f}{spread}", each))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(f"{x:{w}}" for x, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    where = f"{platform.machine()} with {transgan.CORES} cores" if args.device == "cpu" else args.device
    dataset = Path(args.dataset).name
    return (
        "Table 3: the paper's tricks, one after another. The paper: size S on CIFAR-10, 500,000 steps.\n"
        f"Here: size {args.size} on {dataset}, {args.steps} steps, seeds 0 to {args.seeds - 1}, {where}, "
        f"{datetime.date.today()}.\nDistance: sliced Wasserstein, mean ± deviation over seeds; lower is better.\n\n"
        + "\n".join(lines)
    )


def main(argv=None):
    """Run the command line; returns the exit code, as transgan.py's."""
    parser = transgan.Parser(
        prog="python -m paper.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count, folder = transgan.number, transgan.folder
    parser.add_argument("number", type=int, choices=[3], help="which of the paper's tables")
    parser.add_argument("--dataset", type=transgan.pictures, default="shapes", metavar="NAME",
                        help="as of transgan.py (default: shapes)")  # fmt: skip
    parser.add_argument("--size", choices=transgan.SIZES, default="tiny", help="of the networks (default: tiny)")
    parser.add_argument("--steps", type=count(int, 1), default=800, metavar="N", help="of each run (default: 800)")
    parser.add_argument("--seeds", type=count(int, 1, 100), default=3, metavar="N", help="runs of a row (default: 3)")
    parser.add_argument("--jobs", type=count(int, 1, 64), default=transgan.CORES, metavar="N",
                        help="runs at the same time (default: one a core)")  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="cpu", help="(default: cpu)")
    parser.add_argument("--data-dir", type=folder, default=Path("data"), metavar="DIR",
                        help="where data sets are kept (default: data)")  # fmt: skip
    parser.add_argument("--out", type=folder, default=Path("runs") / "table-3", metavar="DIR",
                        help="where runs are kept (default: runs/table-3)")  # fmt: skip
    args = parser.parse_args(argv)
    try:
        print(table(args, run_all(args)))
        return 0
    except UserError as error:
        print(f"transgan: {transgan.one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the runs' last checkpoints", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
