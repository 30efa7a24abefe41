"""One training step of this project against the same step in PyTorch: time and peak memory, side by side.

    python benchmarks/step.py [--size S] [--batch-size 16] [--rounds 7]        (needs: pip install -e '.[test,parity]')

The same networks, weights, loss (wgangp-eps with its penalty), clipping and Adam on both sides. PyTorch runs eagerly, with
all cores and with attention written out, because its fused attention has no second derivative. Each side lives in a process
of its own, as its users run it; the two take turns, step by step, and the medians are compared. Memory is the process's
peak resident memory during the steps above what it held before the first, networks and optimisers already made.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import transgan  # first: it decides how many threads NumPy's matrix products use

import numpy as np  # isort: skip

import autograd as ag
import test_transgan as reference

STEPS = ("discriminator step", "generator step")
STATUS = Path("/proc/self/status")  # where Linux keeps a process's resident memory


def make_trainer(args):
    plain = {"diff_aug": "none", "sr_weight": 0.0, "locality": "none"}  # as the step in PyTorch is
    options = transgan.Options(size=args.size, batch_size=args.batch_size, gen_batch_size=args.batch_size, **plain)
    pictures = np.random.default_rng(0).integers(0, 256, (args.batch_size, 3, 32, 32), dtype=np.uint8)
    return transgan.Trainer(options, pictures)


def our_steps(args):
    """Our two steps on random pictures: functions that return when their results are there, in the order of STEPS."""
    ag.keep_freed_memory()
    trainer = make_trainer(args)
    rng, real = np.random.default_rng(0), trainer.batches[0]

    def run(step, *arguments):
        return [float(x) for x in step(*arguments, 1e-4, rng).values() if x is not None]  # on a GPU, wait for it

    return lambda: run(trainer.discriminator_step, real), lambda: run(trainer.generator_step)


def torch_steps(args):
    """The same two steps in PyTorch."""
    import torch

    torch.set_num_threads(transgan.CORES)  # which importing transgan had made one
    peer = reference.TorchTrainer(make_trainer(args))
    device = "cuda" if ag.xp is not np else "cpu"
    real = peer.tensor(peer.batches[0])

    def noise():
        return torch.randn(args.batch_size, peer.size.embed_dim, device=device)

    def discriminator_step():
        with torch.no_grad():
            fake = peer.generate(noise())
        mix = torch.rand(args.batch_size, 1, 1, 1, device=device)
        loss = reference.torch_discriminator_loss(peer.discriminate, real, fake, "wgangp-eps", mix)
        return peer.update(loss, peer.d, peer.adams[1])

    def generator_step():
        loss = reference.torch_generator_loss(peer.discriminate(peer.generate(noise())), "wgangp-eps")
        return peer.update(loss, peer.g, peer.adams[0])

    return discriminator_step, generator_step


def resident(field):
    """A line of this process's status in MB: VmRSS, resident memory now, or VmHWM, its peak."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1000


def work(side, args, pipe):
    """One side's process: run the step that is asked for and answer with its seconds; at last, with its megabytes."""
    ag.use_device(args.device)
    steps = {"ours": our_steps, "PyTorch": torch_steps}[side](args)
    before = resident("VmRSS") if STATUS.exists() else 0
    while (step := pipe.recv()) is not None:
        start = time.perf_counter()
        steps[step]()
        pipe.send(time.perf_counter() - start)
    pipe.send(round(resident("VmHWM") - before) if STATUS.exists() and ag.xp is np else None)


def main():
    """Print the table, and the same as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=transgan.SIZES, default="S")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds after one that is not (default 7)")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    args = parser.parse_args()

    context, pipes = multiprocessing.get_context("spawn"), {}
    for side in ("ours", "PyTorch"):
        pipes[side], other = context.Pipe()
        context.Process(target=work, args=(side, args, other), daemon=True).start()
        other.close()  # so that a process that ends early is heard of
    try:
        rows = measure(pipes, args.rounds)
    except (EOFError, ConnectionError):
        sys.exit("step.py: one side ended early; what it said stands above")
    print(f"size {args.size}, batch {args.batch_size}, {ag.use_device(args.device)}, {transgan.CORES} cores, "
          f"median of {args.rounds} rounds")  # fmt: skip
    print(f"{'':20}{'ours':>12}{'PyTorch':>12}{'ratio':>8}")
    for name, row in rows.items():
        numbers = [f"{x:.3f} s" if name in STEPS else f"{x} MB" for x in row.values()]
        print(f"{name:20}{numbers[0]:>12}{numbers[1]:>12}{row['ours'] / row['PyTorch']:8.2f}")
    print(json.dumps(rows))


def measure(pipes, rounds):
    """{step: {side: median seconds}}, and {"peak memory": {side: megabytes}} where that is known."""
    times = {step: {side: [] for side in pipes} for step in STEPS}
    for round_ in range(rounds + 1):
        for i, step in enumerate(STEPS):
            for side, pipe in pipes.items():
                pipe.send(i)
                seconds = pipe.recv()
                if round_:
                    times[step][side].append(seconds)
    rows = {step: {side: statistics.median(x) for side, x in times[step].items()} for step in STEPS}
    for pipe in pipes.values():
        pipe.send(None)
    memory = {side: pipe.recv() for side, pipe in pipes.items()}
    if None not in memory.values():
        rows["peak memory"] = memory
    return rows


if __name__ == "__main__":
    main()
