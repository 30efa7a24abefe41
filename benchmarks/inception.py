"""Features of Inception-v3 by this project and by PyTorch, side by side in one run: seconds for the same pictures.

    python benchmarks/inception.py [--pictures 16] [--rounds 7]        (needs: pip install '.[test,parity]')

The same random weights on both sides, pictures of 32x32, float32, all cores. The two take turns, a process each, after a
round that is not timed, and the medians are compared. PyTorch's network is the one that paper/test_inception.py holds
ours against.
"""

import argparse

from start import fast, number  # isort: skip

import numpy as np

from benchmarks import turns
from paper import inception


def tasks(name, count):
    """One side's task, in its process: the features of so many pictures."""
    import torch

    from paper import test_inception

    torch.set_num_threads(fast.CORES)  # which importing fast had made one
    fast.install()
    pictures = np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    network = test_inception.Reference()
    network(pictures[:1])  # draws the weights, on both sides the same
    if name == "ours":
        network = inception.Inception({name: x.numpy() for name, x in network.weights.items()})
    return [lambda: network(pictures)[0]]


def main():
    """Print both medians, their ratio, and how far the features lie apart."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=number(int, 1), default=16, help="pictures a call (default 16)")
    parser.add_argument("--rounds", type=number(int, 1), default=7, help="timed rounds (default 7)")
    args = parser.parse_args()
    sides = {name: (tasks, name, args.pictures) for name in ("ours", "PyTorch")}
    measured, failed = turns.take_turns(sides, 1, args.rounds)
    for name, why in failed.items():
        parser.error(f"{name}: {why}; this needs pip install '.[test,parity]'")
    ((ours, our_features),), ((theirs, their_features),) = measured["ours"], measured["PyTorch"]
    apart = np.abs(our_features - their_features).max() / np.abs(their_features).max()
    print(f"{args.pictures} pictures, {fast.CORES} cores, medians of {args.rounds}: ours {ours:.2f} s, "
          f"PyTorch {theirs:.2f} s, ratio {ours / theirs:.2f}; features agree to {apart:.0e}")  # fmt: skip


if __name__ == "__main__":
    main()
