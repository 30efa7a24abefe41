"""The command line: python transgan.py"""

import argparse
import contextlib
import io
import sys
import warnings
from pathlib import Path

from data import UserError
from look import pictures as looks
from program import options, signals
from program.run import REWINDS, run
from store import output
from store.arguments import Parser, folder, number
from store.output import one_line


def make_parser():
    """The command line, a function for each group of options."""
    parser = Parser(
        prog="transgan.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train TransGAN, a GAN made of two transformers, and watch it learn.\n\n"
        "  python transgan.py                       built-in pictures of shapes, minutes on a laptop\n"
        "  python transgan.py --dataset cifar10     the paper's size S on CIFAR-10 (170 MB, downloaded once)\n"
        "  python transgan.py --dataset PATH        your own pictures, in a folder\n"
        "  python transgan.py --resume runs/NAME    go on where a run was stopped\n"
        "  python transgan.py --evaluate runs/NAME  give its FID and Inception Score\n"
        "  python transgan.py --from runs/NAME ...  make pictures of it: --sample, --interpolate, --attention, --nearest\n"
        "  python transgan.py --from runs/NAME --export FILE    keep its generator alone, and\n"
        "  python transgan.py --from FILE ...       make pictures of that, or --evaluate FILE",
        epilog="A run's folder holds report.html, which shows it all in a browser: samples/ (step-*: grids of the same\n"
        "noise, over time; restored-*: real pictures made small, what the generator makes of them, and the originals),\n"
        "progress.gif, curves.png and log.csv (a row a step; distance is the sliced Wasserstein distance of generated\n"
        "from real pictures); checkpoint.npz and the one before it; and locality.png where there is some. Exit codes: 0\n"
        "done; 2 something to put right, said in one line; 130, 143 and 129 stopped by Ctrl-C, SIGTERM or SIGHUP: the\n"
        "running step is finished and saved. A second Ctrl-C stops at once.",
    )
    add_training(parser)
    add_places(parser)
    add_watching(parser)
    add_scores(parser)
    looks.add_options(parser)
    return parser


def add_training(parser):
    group = parser.add_argument_group("what to train")
    options.add_options(group, options.NETWORKS)
    names = ", ".join(options.PRESETS)
    group.add_argument("--preset", choices=options.PRESETS, metavar="NAME", help="all options of one of the paper's runs, "
                       f"or of one for a laptop: {names}; what else is given goes before; with --summary, what the paper's "
                       "text, the authors' commands and we have where these differ")  # fmt: skip
    title = "how to train; the defaults follow the authors' code for CIFAR-10, and are smaller on a laptop"
    group = parser.add_argument_group(title)
    options.add_options(group, options.TRAINING)
    group.add_argument("--on-nan", choices=("stop", "rewind"), default="stop",
                       help="when a number is no longer finite: stop, or go on from the last checkpoint at half the rate, "
                       f"up to {REWINDS} times (default: stop)")  # fmt: skip


def add_places(parser):
    group = parser.add_argument_group("where")
    group.add_argument("--data-dir", type=folder, default=Path("data"), metavar="DIR",
                       help="where data sets are kept (default: data)")  # fmt: skip
    group.add_argument("--out", type=folder, metavar="DIR", help="the run's folder (default: runs/DATASET-SIZE)")
    group.add_argument("--resume", type=folder, metavar="DIR",
                       help="go on with the run in DIR, with its own options; only --steps, --accumulate and the path "
                       "of a folder of pictures may change")  # fmt: skip
    group.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto",
                       help="gpu needs CuPy (default: auto, the GPU if there is one)")  # fmt: skip
    group.add_argument("--gpus", type=number(int, 1, 64), metavar="N", default=1,
                       help="GPUs of this machine that share a batch (default: 1)")  # fmt: skip
    group.add_argument("--threads", type=number(int, 1, 1024), metavar="N", help="CPU threads that share a batch; another "
                       "number gives the same run up to rounding (default: as many as pay)")  # fmt: skip
    group.add_argument("--plain", action="store_true", help="run on the definitions in autograd.py alone, without the "
                       "faster forms of fast/; the same up to rounding, and practical for tiny: S wants 9 GB")  # fmt: skip


def add_watching(parser):
    group = parser.add_argument_group("how often to look")
    group.add_argument("--sample-every", type=number(int, 1), metavar="N", default=100,
                       help="steps between sample grids and distances (default: 100, and every 10 minutes)")  # fmt: skip
    group.add_argument("--save-every", type=number(int, 1), metavar="N", default=100,
                       help="steps between checkpoints (default: 100, and every 10 minutes)")  # fmt: skip
    group.add_argument("--evaluate-every", type=number(int, 1), metavar="N",
                       help="steps between FID-own and IS-own in the log (default: never)")  # fmt: skip
    group.add_argument("--profile", action="store_true", help="print which operations took the time, when the run is done")
    group.add_argument("--summary", action="store_true", help="print the networks as a table, and stop")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--quiet", action="store_true", help="print nothing, but errors to standard error")
    either.add_argument("--json", action="store_true", help="print JSON, an object a line with its event: start, step (as "
                        "in log.csv), picture, ...; the last is end, with the exit code and what went wrong")  # fmt: skip


def add_scores(parser):
    group = parser.add_argument_group("scores, see paper/scores.py")
    group.add_argument("--evaluate", type=folder, metavar="RUN", help="give FID and Inception Score of the run in the "
                       "folder RUN, or of a file of --export")  # fmt: skip
    group.add_argument("--features", choices=("inception", "own"), help="the network that looks: Inception-v3, as papers "
                       "have it (96 MB, downloaded once), or a small classifier trained here on the data set, whose scores "
                       "are named FID-own and IS-own (default: inception; for shapes own)")  # fmt: skip
    group.add_argument("--num-images", type=number(int, 10), metavar="N",
                       help="generated pictures to look at (default: 50000; for --evaluate-every 2000)")  # fmt: skip
    group.add_argument("--inception", type=folder, metavar="PATH", help="a file with Inception-v3's weights, as "
                       "pytorch-fid publishes them")  # fmt: skip
    group.add_argument("--fid-stats", type=folder, metavar="PATH", help="a fid_stats_*.npz with mean and covariance of the "
                       "real pictures (default: computed of the data set once, and kept)")  # fmt: skip


def main(argv=None):
    """Run the command line; returns the exit code: 0, 2 for what the user can put right, 129, 130 or 143 after a signal.

    Raises SystemExit for a command line that is wrong, or asks for help.
    """
    parser, args, code = make_parser(), None, 2
    output.mode = "lines"
    try:
        try:
            Path.cwd()
        except OSError as error:
            raise UserError(f"the folder that this was started in: {error.strerror}; change to another") from None
        args = parser.parse_args(argv)
        output.mode = "json" if args.json else "quiet" if args.quiet else "lines"
        code = run(args, parser)
        output.tell(None, event="end", exit_code=code, error=None)
        return code
    except SystemExit as stop:
        words = sys.argv[1:] if argv is None else argv
        if stop.code and any("--json".startswith(word) and len(word) > 2 for word in words):
            output.mode = "json"
            output.tell(None, event="end", exit_code=stop.code, error=parser.mistake)
        raise
    except UserError as error:
        message = str(error)
    except MemoryError:
        message = "not enough memory for this; lower --batch-size and --gen-batch-size, or choose a smaller --size"
        if args and (args.resume or args.evaluate or args.begun):
            message = "not enough memory for this; close other programs"
    except OSError as error:
        message = f"{error.filename or 'writing'}: {error.strerror or error}; free some space or choose another --out"
        if isinstance(error, BrokenPipeError):
            message = "nobody reads the output any more"
    except KeyboardInterrupt as error:
        code, message = 130, str(error) or "stopped"
        with contextlib.suppress(OSError):
            print(file=sys.stderr)  # so that it stands below the terminal's ^C
    with contextlib.suppress(OSError):  # of a terminal that is gone, of an output that nobody reads
        print(f"transgan: {one_line(message)}", file=sys.stderr)
        output.tell(None, event="end", exit_code=code, error=one_line(message))
    return code


def console():
    """What `python transgan.py` does; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where the shell closed it
            stream.reconfigure(errors="backslashreplace")  # for names of files that cannot be printed as they are
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of what is not finite: that is refused in our words
    with signals.interruptible():
        return main()
