"""The command line: python transgan.py"""

import argparse
import contextlib
import io
import signal
import sys
import warnings
from pathlib import Path

from data import UserError
from look import pictures as looks
from program import options
from program.run import run
from store import output
from store.arguments import Parser
from store.files import FULL


def make_parser():
    """The command line."""
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
    for title, group in options.GROUPS.items():
        options.add_options(parser.add_argument_group(title), group)
    looks.add_options(parser)
    return parser


def main(argv=None):
    """Run the command line; returns the exit code: 0, 2 for what the user can put right, 129, 130 or 143 after a signal.

    Raises SystemExit for a command line that is wrong, or asks for help.
    """
    parser, code = make_parser(), 2
    words = sys.argv[1:] if argv is None else argv
    output.mode = "json" if any("--json".startswith(word) and len(word) > 2 for word in words) else "lines"
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
    except UserError as error:
        message = str(error)
    except (MemoryError, OSError, KeyboardInterrupt) as error:
        message = what_stopped(error)
        if isinstance(error, KeyboardInterrupt):
            code = 130
            with contextlib.suppress(OSError):
                output.warn("")  # so that it stands below the terminal's ^C
    output.end(message, code)
    return code


def what_stopped(error):
    """What to say of a MemoryError, OSError or KeyboardInterrupt; a training's knows by which command that `goes_on`."""
    if isinstance(error, KeyboardInterrupt):
        reason = "stopped"
    elif isinstance(error, MemoryError):
        reason = "not enough memory for this; close other programs"
    elif isinstance(error, BrokenPipeError):
        reason = "nobody reads the output any more"
    else:
        advice = "free some space" if error.errno in FULL else "put that right first"
        reason = f"{error.filename2 or error.filename or 'writing'}: {error.strerror or error}; {advice}"
    goes_on = getattr(error, "goes_on", None)
    return f"{reason}; go on from the last checkpoint with: {goes_on}" if goes_on else reason


def console():
    """What `python transgan.py` does; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where the shell closed it
            stream.reconfigure(errors="backslashreplace")  # for names of files that cannot be printed as they are
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of what is not finite: that is refused in our words
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # while it was loaded, Ctrl-C ended it at once
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code
    if code:  # what could not be printed is not to be tried again at the end
        sys.stdout = sys.stderr = None
    return code
