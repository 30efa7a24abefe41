"""How the cost of a transformer block grows with batch, tokens and width: time, memory, operations and bytes.

    python benchmarks/growth.py [--rounds 5]

One encoder block, forward and backward (first derivatives of all its weights), on one thread of a CPU or on the GPU; both
networks are made of such blocks. From the second stage of size S's generator, a batch of 16 with 256 tokens of width 96 in
4 heads, one number at a time goes up and down. Columns:
    seconds    the median of the rounds, after one that is not counted
    linear     operations in products with weights, a multiplication and an addition each: forward 2 B 12 N C^2, and twice
               that on the way back, in units of 10^9
    attention  those in q k^T and p v and what belongs to them on the way back, where q k^T is computed once more:
               forward 2 B 2 N^2 C, back 2 B 5 N^2 C
    moved MB   the sizes of the results of all operations, forward and backward: what is written to memory at least once
    peak MB    the most memory that arrays took at once beyond weights and input (on a CPU)
"""

import argparse
import json
import statistics
import timeit
import tracemalloc

from start import device, fast, number  # isort: skip

import numpy as np

import autograd as ag
import transgan
from autograd import Tensor, grad
from program.profile import profile

BASE = {"batch": 16, "tokens": 256, "width": 96}
SWEEPS = {"batch": (4, 16, 64), "tokens": (64, 256, 1024, 2304), "width": (24, 96, 384, 768)}
HEADS = 4
COLUMNS = {"grows": "<8", "batch": ">7", "tokens": ">7", "width": ">7", "seconds": ">10.5f", "linear": ">10.2f",
           "attention": ">11.2f", "moved MB": ">10.1f", "peak MB": ">10.1f"}  # fmt: skip


def make_pass(batch, tokens, width):
    """A function that runs a block forward and back once."""
    rng = np.random.default_rng(0)
    block = transgan.Block(width, HEADS, transgan.Init(rng, "uniform"))
    weights = list(block.parameters().values())
    x = Tensor(rng.standard_normal((batch, tokens, width)), requires_grad=True, dtype=np.float32)

    def run():
        gradients = grad(block(x).sum(), [x, *weights])
        return float(gradients[-1].data.sum())  # on a GPU, wait for it

    return run


def measure(batch, tokens, width, rounds):
    """A row of the table: {column: number}."""
    run = make_pass(batch, tokens, width)
    _, *seconds = timeit.repeat(run, number=1, repeat=rounds + 1)
    with profile() as operations:
        run()
    row = {"batch": batch, "tokens": tokens, "width": width, "seconds": statistics.median(seconds)}
    row["linear"] = 3 * 2 * batch * 12 * tokens * width**2 / 1e9
    row["attention"] = (2 + 5) * 2 * batch * tokens**2 * width / 1e9
    row["moved MB"] = sum(size for _, _, size in operations.values()) / 1e6
    if ag.xp is np:
        tracemalloc.start()
        run()
        row["peak MB"] = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
    return row


def main():
    """Print the table as it is measured, and at last the same as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=number(int, 1), default=5, help="timed passes (default 5)")
    parser.add_argument("--largest", type=number(int, 1), default=10**9, metavar="N", help="leave out numbers above N")
    parser.add_argument("--device", type=device, default="auto", metavar="{auto,cpu,gpu}")
    args = parser.parse_args()
    used = ag.use_device(args.device)
    fast.install()
    rows = []
    print(f"{used}, medians of {args.rounds}")
    print("".join(f"{name:{form.partition('.')[0]}}" for name, form in COLUMNS.items()))
    for name, values in SWEEPS.items():
        for value in (v for v in values if v <= args.largest):
            row = {"grows": name} | measure(**(BASE | {name: value}), rounds=args.rounds)
            rows.append(row)
            print("".join(f"{row[column]:{form}}" for column, form in COLUMNS.items() if column in row), flush=True)
    print(json.dumps({"device": used, "rows": rows}))


if __name__ == "__main__":
    main()
