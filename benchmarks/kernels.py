"""Where a recorded step's time goes on a GPU, kernel by kernel, as PyTorch's profiler sees it from beside.

    python benchmarks/kernels.py [--size S] [--batch-size 32] [--precision tf32] [--rounds 10]    (needs PyTorch)

The two steps of benchmarks/step.py, ours: the mean of all rounds, while the profiler looks; busy is the sum of the kernels'
times, of which those that take the most are listed. `--profile` of the program cannot see this: it times the engine's
operations, for which the steps are not recorded.
"""

import argparse
import collections
import json
import re
import tempfile
import time
from pathlib import Path

import step

from start import fast, number  # isort: skip

import autograd as ag
import transgan

MOST = 20  # kernels in a table
PRODUCTS = re.compile("gemm|gemv|cutlass|nvjet|splitk|cublas", re.IGNORECASE)  # names that cuBLAS's kernels have


def by_kernel(trace):
    """The seconds and the launches of each kernel in a trace of PyTorch's, a Counter each, all of cuBLAS's as one."""
    seconds, launches = collections.Counter(), collections.Counter()
    for event in trace["traceEvents"]:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            name = "matrix products" if PRODUCTS.search(event["name"]) else event["name"]
            seconds[name] += event["dur"] / 1e6
            launches[name] += 1
    return seconds, launches


def watched(profiler, run, rounds):
    """What PyTorch's profiler saw of run(), called so often, and the seconds that took."""
    with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as seen:
        start = time.perf_counter()
        for _ in range(rounds):
            run()
        seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        return json.loads(path.read_text()), seconds


def main():
    """Print a table for each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S", choices=transgan.SIZES)
    parser.add_argument("--batch-size", type=number(int, 1), default=32)
    parser.add_argument("--precision", choices=fast.PRECISIONS, default="tf32", help="of matrix products")
    parser.add_argument("--rounds", type=number(int, 1), default=10, help="of each step, after two (default 10)")
    args = parser.parse_args()
    try:
        from torch import profiler

        name = ag.use_device("gpu")
    except (ImportError, RuntimeError) as error:
        parser.error(str(error))
    print(f"{name}, size {args.size}, batch {args.batch_size}, {args.precision}, {args.rounds} of each step")
    *runs, _ = step.tasks("ours", args.size, args.batch_size, "gpu", args.precision)
    for what, run in zip(step.STEPS, runs, strict=True):
        for _ in range(2):  # recorded, then played
            run()
        trace, took = watched(profiler, run, args.rounds)
        seconds, launches = by_kernel(trace)
        busy = seconds.total()
        print(f"{what}: {1000 * took / args.rounds:.2f} ms, busy {1000 * busy / args.rounds:.2f} ms")
        for kernel, spent in seconds.most_common(MOST):
            each = f"{spent / busy:7.1%}{1000 * spent / args.rounds:9.3f} ms{launches[kernel] / args.rounds:8.1f} times"
            print(f"{each}  {kernel[:60]}", flush=True)


if __name__ == "__main__":
    main()
