"""What the scripts beside it import first: so they find the project, and NumPy's matrix products run on as many threads as
fast/ decides, which has to be known before NumPy is imported."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fast  # noqa: F401  # isort: skip

import autograd as ag
from store.arguments import number  # noqa: F401


def device(text):
    """An argument type: auto, cpu or gpu, where there is one."""
    try:
        ag.use_device(text)
    except (RuntimeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
