"""What the command lines of this project have in common: one-line errors, numbers, folders, data sets."""

import argparse
import os
from pathlib import Path

from store import datasets, files, output

NAMES = (*datasets.SIDES, "shapes")
MANY = 2**31 - 1


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as any other end is said, and exits with 2."""

    def error(self, message):
        output.end(f"{message}; see --help", 2)
        self.exit(2)


def number(kind, least, most=MANY):
    """An argument type: an int or a float from `least` to `most`."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} must be from {least} to {most}")
        return value

    return convert


def folder(text):
    """An argument type: a path. One from ~ on is in somebody's home, also where the shell has not seen to it: --out=~/x."""
    if not text:
        raise argparse.ArgumentTypeError("the name of a folder is empty")
    path = os.path.expanduser(text)
    if not files.is_possible(path):
        raise argparse.ArgumentTypeError(f"{text!r:.99} is no name that a file could have")
    return Path(path)


def pictures(text):
    """An argument type: the name of a data set, or a folder that is there, as its full path."""
    if text in NAMES:
        return text
    if not text or not folder(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a folder nor one of {', '.join(NAMES)}")
    return str(folder(text).resolve())
