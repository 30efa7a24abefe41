"""Features of Inception-v3 by this project and by PyTorch, side by side in one run: seconds for the same pictures.

    python benchmarks/inception.py [--pictures 16] [--rounds 7]        (needs: pip install '.[test,parity]')

The same random weights on both sides, pictures of 32x32, float32, all cores. The two take turns, after one round that is
not timed, and the medians are compared. PyTorch's network is the one that paper/test_inception.py holds ours against.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fast  # first: it decides how many threads NumPy's matrix products use

import numpy as np  # isort: skip

from paper import inception


def main():
    """Print both medians, their ratio, and how far the features lie apart."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=16, help="pictures a call (default 16)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default 7)")
    args = parser.parse_args()
    try:
        import torch
    except ImportError:
        parser.error("PyTorch is missing: pip install '.[test,parity]'")
    from paper import test_inception  # which needs it too

    torch.set_num_threads(fast.CORES)
    fast.install()
    pictures = np.random.default_rng(0).integers(0, 256, (args.pictures, 3, 32, 32), dtype=np.uint8)
    theirs = test_inception.Reference()
    theirs(pictures[:1])  # draws the weights
    ours = inception.Inception({name: x.numpy() for name, x in theirs.weights.items()})
    times, features = {"ours": [], "PyTorch": []}, {}
    for round_ in range(args.rounds + 1):
        for name, network in (("ours", ours), ("PyTorch", theirs)):
            start = time.perf_counter()
            features[name] = network(pictures)[0]
            if round_:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(x) for name, x in times.items()}
    apart = np.abs(features["ours"] - features["PyTorch"]).max() / np.abs(features["PyTorch"]).max()
    print(f"{args.pictures} pictures, {fast.CORES} cores, medians of {args.rounds}: ours {medians['ours']:.2f} s, "
          f"PyTorch {medians['PyTorch']:.2f} s, ratio {medians['ours'] / medians['PyTorch']:.2f}; features agree to "
          f"{apart:.0e}")  # fmt: skip


if __name__ == "__main__":
    main()
