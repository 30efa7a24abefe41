"""One training step of this project against the same step in PyTorch: time and peak memory, side by side.

    python benchmarks/step.py [--sizes S] [--batch-sizes 16] [--rounds 7]      (needs: pip install '.[test,parity]')

The same networks, weights, loss (wgangp-eps with its penalty), clipping and Adam on all sides, which are
    ours       this project
    eager      PyTorch as it is, with attention written out
    fused      PyTorch with its fused attention, wherever that will do: it has no second derivative, so that it cannot stand
               in the discriminator that the penalty is taken of
    compiled   PyTorch through torch.compile, which has no second derivative either, with the same exception
Each side lives in a process of its own, as its users run it, with all cores; they take turns, step by step, and the medians
are compared. Memory is a process's peak resident memory during the steps above what it held before the first, networks and
optimisers already made; on a GPU, what the side's memory pool has taken of the device. A side that runs out of memory is
left out of its row. With --precision tf32, which GPUs have, all sides multiply matrices so.
"""

import argparse
import json
import sys
from pathlib import Path

from start import device, fast, number  # isort: skip

import numpy as np

import autograd as ag
import transgan
from benchmarks import turns
from fast import recording
from program.options import Options
from program.trainer import make_trainer as trainer_of

STEPS = ("discriminator step", "generator step")
TASKS = (*STEPS, "peak memory")
SIDES = ("ours", "eager", "fused", "compiled")
STATUS = Path("/proc/self/status")  # where Linux keeps a process's resident memory


def make_trainer(size, batch_size):
    plain = {"diff_aug": "none", "sr_weight": 0.0, "locality": "none"}  # as the step in PyTorch is
    options = Options(size=size, batch_size=batch_size, gen_batch_size=batch_size, **plain)
    pictures = np.random.default_rng(0).integers(0, 256, (batch_size, 3, 32, 32), dtype=np.uint8)
    return trainer_of(options, pictures)


def memory():
    """Megabytes that this process holds, and at most held; on a GPU, in its memory pools. (0, None) where none can tell."""
    if "torch" in sys.modules and ag.xp is not np:
        cuda = sys.modules["torch"].cuda
        return cuda.memory_allocated() / 1e6, cuda.max_memory_reserved() / 1e6
    if ag.xp is not np:
        pools = ag.xp.get_default_memory_pool(), recording.pool()
        return sum(pool.used_bytes() for pool in pools) / 1e6, sum(pool.total_bytes() for pool in pools) / 1e6
    if not STATUS.exists():
        return 0, None
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return tuple(int(fields[name].removesuffix("kB")) / 1000 for name in ("VmRSS", "VmHWM"))


def tasks(side, size, batch_size, device="cpu", precision="float32"):
    """One side's TASKS, as functions that return when their results are there; the steps are on random pictures."""
    ag.use_device(device)
    if side == "ours":
        fast.install(precision)
    trainer = make_trainer(size, batch_size)
    (disc_inputs, *_), gen_inputs = trainer.inputs(0)
    if side != "ours":
        trainer = in_torch(trainer, side, precision)
    before, _ = memory()

    def run(step, inputs):
        return [float(x) for x in step(inputs, 1e-4).values() if x is not None]  # on a GPU, wait for it

    def peak_memory():
        _, most = memory()
        return most and round(most - before)

    return (lambda: run(trainer.discriminator_step, disc_inputs), lambda: run(trainer.generator_step, gen_inputs),
            peak_memory)  # fmt: skip


def in_torch(trainer, side, precision):
    """The trainer in PyTorch."""
    import torch

    from benchmarks import reference

    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.set_num_threads(fast.CORES)  # which importing fast had made one
    peer = reference.Trainer(trainer, fused=side == "fused")
    if side == "compiled":
        peer.generate, peer.judge = torch.compile(peer.generate), torch.compile(peer.judge)
    return peer


def measure(sides, *job, rounds):
    """{task: {side: number}}: the medians in seconds of both steps, and the megabytes of "peak memory"."""
    measured, failed = turns.take_turns({side: (tasks, side, *job) for side in sides}, len(TASKS), rounds)
    for side, why in failed.items():
        print(f"{side}: {why}", file=sys.stderr)
    rows = {step: {side: row[i][0] for side, row in measured.items()} for i, step in enumerate(STEPS)}
    return rows | {"peak memory": {side: row[-1][1] for side, row in measured.items()}}


def line(size, batch_size, what, row):
    """A row of the table: our number, and everybody else's with what it makes ours in comparison."""
    cells = []
    for side in SIDES:
        value = row.get(side)
        text = "" if value is None else f"{value:.3f} s" if what in STEPS else f"{value} MB"
        if value and side != "ours" and row.get("ours"):
            text += f" ({row['ours'] / value:.2f})"
        cells.append(f"{text:>18}")
    return f"{size:5}{batch_size:>5}  {what:20}" + "".join(cells)


def main():
    """Print the table as it is measured, and at last the same as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="S", help="of the networks, separated by commas (default S)")
    parser.add_argument("--batch-sizes", type=lambda text: [number(int, 1)(word) for word in text.split(",")], default="16",
                        help="separated by commas (default 16)")  # fmt: skip
    parser.add_argument("--sides", default="ours,eager,fused", help=f"of {','.join(SIDES)} (default ours,eager,fused)")
    parser.add_argument("--rounds", type=number(int, 1), default=7, help="timed rounds after one that is not (default 7)")
    parser.add_argument("--device", type=device, default="auto", metavar="{auto,cpu,gpu}")
    parser.add_argument("--precision", choices=("float32", "tf32"), default="float32", help="of matrix products")
    args = parser.parse_args()
    sides, sizes = args.sides.split(","), args.sizes.split(",")
    if not set(sides) <= set(SIDES) or not set(sizes) <= set(transgan.SIZES):
        parser.error(f"sides are {', '.join(SIDES)}, sizes {', '.join(transgan.SIZES)}")
    name = ag.use_device(args.device)
    print(f"{name}, {fast.CORES} cores, {args.precision}, medians of {args.rounds}; in brackets ours divided by theirs")
    print(f"{'size':5}{'batch':>5}  {'':20}" + "".join(f"{side:>18}" for side in SIDES))
    results = []
    for size in sizes:
        for batch_size in args.batch_sizes:
            rows = measure(sides, size, batch_size, args.device, args.precision, rounds=args.rounds)
            for what, row in rows.items():
                print(line(size, batch_size, what, row), flush=True)
            results.append({"size": size, "batch_size": batch_size, "device": name, "precision": args.precision} | rows)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
