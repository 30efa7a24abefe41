"""Everything that is to be measured on a GPU, by one command, which ends in a table of what passed:

    python benchmarks/gpu.py --data-dir data [--out runs/gpu] [--stages step,kernels,profile,train,suite,twice]

    step      benchmarks/step.py against PyTorch, eager, fused and compiled, float32 and tf32, sizes S and XL
    kernels   benchmarks/kernels.py: which kernels a step's time goes to, batches of 32 and 128
    profile   size S in float32, tf32 and bfloat16: milliseconds a step; and which operations the time goes to, unrecorded
    train     size S on CIFAR-10 for --minutes, stopped as by kill, so that it can be gone on with
    suite     the whole test suite, on CuPy (in parallel where pytest-xdist is installed), with the examples that CI draws;
              of a test that takes five minutes it is told where it is
    twice     the same seed twice gives the same run, to the bit
The first three want the GPU for themselves, and two of them PyTorch; the training goes on beside the last two. The pictures
are CIFAR-10's, downloaded into --data-dir unless they are there. What each command prints is kept in the folder --out, in a
file of its name, and runs in folders beside it: for another round name another, because no run is written over.
"""

import argparse
import csv
import importlib.util
import os
import signal
import subprocess
import sys
import time
import zipfile
from concurrent import futures
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("step", "kernels", "profile", "train", "suite", "twice")


def jobs(args):
    """(stage, name, command without the interpreter, seconds after which it is stopped or None) of everything."""
    train = ["transgan.py", "--device", "gpu", "--dataset", "cifar10", "--data-dir", args.data_dir, "--size", args.size]

    def training(name, *more):
        return name, [*train, "--out", str(args.out / name), *more]

    for precision in ("tf32", "float32"):
        for size in ("S", "XL"):
            command = ["benchmarks/step.py", "--sizes", size, "--batch-sizes", "32,128", "--precision", precision,
                       "--sides", "ours,eager,fused,compiled"]  # fmt: skip
            yield "step", f"step-{size}-{precision}", command, None
    for batch_size in ("32", "128"):
        yield "kernels", f"kernels-{batch_size}", ["benchmarks/kernels.py", "--batch-size", batch_size], None
    for precision in ("tf32", "bfloat16", "float32"):
        short = "--precision", precision, "--sample-every", "100", "--steps"
        yield "profile", *training(f"speed-{precision}", *short, "60"), None
        yield "profile", *training(f"profile-{precision}", *short, "10", "--profile"), None
    yield "train", *training("train", "--precision", "tf32"), 60 * args.minutes
    workers = ["-n", "auto"] if importlib.util.find_spec("xdist") else []
    tests = ["-m", "pytest", "-vv", "--tb=short", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=300", *workers]
    yield "suite", "suite", [*tests, *args.tests], None
    for name in ("first", "second"):
        yield "twice", *training(name, "--steps", "10", "--sample-every", "10"), None


def run(command, log, seconds):
    """Run one command, keeping what it prints; returns its exit code, 0 if it was stopped well, and its seconds."""
    start = time.monotonic()
    with open(log, "w") as file:
        env = os.environ | {"CI": "true"}  # what Hypothesis draws then can be drawn again without a GPU
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # the step is finished, and the run saved; Ctrl-C's signal may be ignored in the background
            code = int(process.wait() != 128 + signal.SIGTERM)
    return code, time.monotonic() - start


def report(name, command, log, done):
    """Print the end of what a command printed; returns its row of the table."""
    code, seconds = done
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    print(f"== {name}: exit code {code} after {seconds:.0f} s: {' '.join(command)}", *lines[-50:], sep="\n", flush=True)
    return f"{name:20}{'passed' if code == 0 else 'FAILED':8}{seconds:6.0f} s{pace(log.parent / name / 'log.csv')}"


def pace(log):
    """The pace of a run from its log, of which the steps up to 20 are not looked at; "" where there are no others."""
    if not log.exists():
        return ""
    with log.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) > 20]
    if len(rows) < 2:
        return ""
    steps, seconds = (float(rows[-1][name]) - float(rows[0][name]) for name in ("step", "seconds"))
    return f"{1000 * seconds / steps:8.1f} ms a step"


def differing(one, other):
    """The names of what is not the same in two checkpoints, by its checksum."""
    with zipfile.ZipFile(one) as a, zipfile.ZipFile(other) as b:
        contents = [{(member.filename, member.CRC) for member in archive.infolist()} for archive in (a, b)]
    return sorted({name for name, _ in contents[0] ^ contents[1]})


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
    args.out, args.data_dir = args.out.resolve(), str(Path(args.data_dir).resolve())  # commands run in ROOT
    args.out.mkdir(parents=True, exist_ok=True)
    rows, beside = [], None
    with futures.ThreadPoolExecutor() as pool:
        for stage, name, command, seconds in jobs(args):
            if stage not in stages:
                continue
            log = args.out / f"{name}.log"
            if stage == "train":
                beside = name, command, log, pool.submit(run, command, log, seconds)
            else:
                rows.append(report(name, command, log, run(command, log, seconds)))
        if beside:
            *what, running = beside
            rows.append(report(*what, running.result()))
    if "twice" in stages:
        ends = [args.out / name / "checkpoint.npz" for name in ("first", "second")]
        found = differing(*ends) if all(map(Path.exists, ends)) else ["there are not two"]
        rows.append(f"{'the same run':20}{'FAILED: ' + ', '.join(found[:5]) if found else 'passed'}")
    print("", *rows, sep="\n")
    return int(any("FAILED" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
