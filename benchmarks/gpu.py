"""Everything that is to be measured on a GPU, by one command, which ends in a table of what passed:

    python benchmarks/gpu.py --data-dir data [--out runs/gpu] [--stages suite,twice,step,profile,train] [--minutes 10]

    suite     the whole test suite, on CuPy (in parallel where pytest-xdist is installed)
    twice     the same seed twice gives the same run, to the bit
    step      benchmarks/step.py against PyTorch, eager, fused and compiled, float32 and tf32, sizes S and XL
    profile   where the time of a step of size S goes in float32, tf32 and bfloat16, and pictures a second
    train     size S on CIFAR-10 for so many minutes, stopped as by Ctrl-C, so that it can be gone on with
The pictures are CIFAR-10's, downloaded into --data-dir unless they are there. What each command prints is kept in the
folder --out, in a file of its name, and runs in folders beside it.
"""

import argparse
import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("suite", "twice", "step", "profile", "train")


def jobs(args):
    """(stage, name, command without the interpreter, seconds after which it is interrupted or None) of everything."""
    train = ["transgan.py", "--device", "gpu", "--dataset", "cifar10", "--data-dir", args.data_dir, "--size", args.size]
    workers = ["-n", "auto"] if importlib.util.find_spec("xdist") else []
    yield "suite", "suite", ["-m", "pytest", "-p", "no:cacheprovider", *workers, *args.tests], None
    for name in ("first", "second"):
        yield "twice", name, [*train, "--steps", "10", "--sample-every", "10", "--out", str(args.out / name)], None
    for precision in ("float32", "tf32"):
        for size in ("S", "XL"):
            command = ["benchmarks/step.py", "--sizes", size, "--batch-sizes", "32,128", "--precision", precision,
                       "--sides", "ours,eager,fused,compiled"]  # fmt: skip
            yield "step", f"step-{size}-{precision}", command, None
    for precision in ("float32", "tf32", "bfloat16"):
        for more in ([], ["--profile"]):
            name = f"{'profile' if more else 'speed'}-{precision}"
            yield "profile", name, [*train, "--steps", "20", "--sample-every", "20", "--precision", precision,
                                    "--out", str(args.out / name), *more], None  # fmt: skip
    yield "train", "train", [*train, "--precision", "tf32", "--out", str(args.out / "train")], 60 * args.minutes


def run(command, log, seconds):
    """Run one command, keeping what it prints; returns its exit code, 0 if it was interrupted well, and its seconds."""
    start = time.monotonic()
    with open(log, "w") as file:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # the step is finished, and the run saved
            code = {130: 0}.get(process.wait(), 1)
    return code, time.monotonic() - start


def differing(one, other):
    """The names of what is not the same, to the bit, in two checkpoints."""
    with np.load(one) as a, np.load(other) as b:
        both = {*a.files} & {*b.files}
        changed = {name for name in both if a[name].tobytes() != b[name].tobytes()}
        return sorted({*a.files, *b.files} - both | changed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--stages", default=",".join(STAGES), help=f"of {','.join(STAGES)} (default all)")
    parser.add_argument("--size", default="S", help="of the networks that are trained (default S)")
    parser.add_argument("--minutes", type=float, default=10, help="of training (default 10)")
    parser.add_argument("tests", nargs="*", help="for pytest (default the whole suite)")
    args = parser.parse_args()
    stages = args.stages.split(",")
    if not set(stages) <= set(STAGES):
        parser.error(f"stages are {', '.join(STAGES)}")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for stage, name, command, seconds in jobs(args):
        if stage not in stages:
            continue
        log = args.out / f"{name}.log"
        code, spent = run(command, log, seconds)
        lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
        print(f"== {name}: exit code {code} after {spent:.0f} s: {' '.join(command)}", *lines[-25:], sep="\n", flush=True)
        rows.append(f"{name:20}{'passed' if code == 0 else 'FAILED':8}{spent:6.0f} s")
    if "twice" in stages:
        found = differing(*(args.out / name / "checkpoint.npz" for name in ("first", "second")))
        rows.append(f"{'the same run':20}{'FAILED: ' + ', '.join(found[:5]) if found else 'passed'}")
    print("", *rows, sep="\n")
    return int(any("FAILED" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
