"""One training step of this project against the same step in PyTorch: time and peak memory, side by side.

    python benchmarks/step.py [--size S] [--batch-size 16] [--rounds 7]

The same networks, weights, loss (wgangp-eps with its penalty), clipping and Adam on both sides; PyTorch runs eagerly with
attention written out, because its fused attention has no second derivative. Both use all cores. Time: the two take
turns in one process, and the medians are compared. Memory: each runs alone in a process of its own, and what is
reported is the process's peak resident memory above what it held before the networks' first step.
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


def our_steps(args):
    """{"discriminator step": function, "generator step": function} of our trainer on drawn pictures."""
    trainer = make_trainer(args)
    rng, real = np.random.default_rng(0), trainer.batches[0]

    def run(step, *arguments):
        losses = step(*arguments, 1e-4, rng)
        return [float(x) for x in losses.values()]  # on a GPU, wait for the result

    return {
        "discriminator step": lambda: run(trainer.discriminator_step, real),
        "generator step": lambda: run(trainer.generator_step),
    }


def torch_steps(args):
    """The same two steps in PyTorch."""
    import torch

    trainer = make_trainer(args)
    size, options = transgan.SIZES[args.size], trainer.options
    g = reference.torch_parameters(trainer.gen_parameters)
    d = reference.torch_parameters(trainer.disc_parameters)
    device = g["project.weight"].device
    adams = [torch.optim.Adam(p.values(), lr=1e-4, betas=(0.0, 0.99)) for p in (g, d)]
    real = torch.tensor(trainer.batches[0], device=device)

    def generate(count):
        z = torch.randn(count, size.embed_dim, device=device)
        return reference.torch_generator(g, z, size.depths)

    def discriminate(x):
        return reference.torch_discriminator(d, x, size.disc_depth, options.patch_size)

    def update(loss, parameters, adam):
        for p, gradient in zip(parameters.values(), torch.autograd.grad(loss, parameters.values()), strict=True):
            p.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters.values(), transgan.MAX_NORM)
        adam.step()
        for p in parameters.values():
            p.grad = None
        return loss.item()

    def discriminator_step():
        with torch.no_grad():
            fake = generate(len(real))
        mix = torch.rand(len(real), 1, 1, 1, device=device)
        return update(reference.torch_discriminator_loss(discriminate, real, fake, "wgangp-eps", mix), d, adams[1])

    def generator_step():
        return update(reference.torch_generator_loss(discriminate(generate(args.batch_size)), "wgangp-eps"), g, adams[0])

    return {"discriminator step": discriminator_step, "generator step": generator_step}


def make_trainer(args):
    options = transgan.Options(size=args.size, batch_size=args.batch_size, gen_batch_size=args.batch_size)
    pictures = np.random.default_rng(0).integers(0, 256, (args.batch_size, 3, 32, 32), dtype=np.uint8)
    return transgan.Trainer(options, pictures)


def peak_memory(side, args, queue):
    """Put the growth of this process's peak resident memory, in MB, over two rounds of both steps."""
    if side == "torch":
        import torch  # noqa: F401  # its libraries' own memory is not the step's

        steps = torch_steps(args)
    else:
        ag.keep_freed_memory()
        steps = our_steps(args)
    before = resident("VmRSS")
    for _ in range(2):
        for step in steps.values():
            step()
    queue.put(resident("VmHWM") - before)


def resident(field):
    """A line of /proc/self/status in MB: VmRSS, resident memory now, or VmHWM, its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1000


def main():
    """Print the table, and the same as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=transgan.SIZES, default="S")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds after one that is not (default 7)")
    args = parser.parse_args()
    device = ag.use_device("auto")

    memory = {}
    if device == "cpu" and Path("/proc/self/status").exists():
        context = multiprocessing.get_context("spawn")
        for side in ("ours", "torch"):
            queue = context.Queue()
            process = context.Process(target=peak_memory, args=(side, args, queue))
            process.start()
            memory[side] = round(queue.get())
            process.join()

    import torch

    ag.keep_freed_memory()
    sides = {"ours": our_steps(args), "torch": torch_steps(args)}
    times = {(side, name): [] for side, steps in sides.items() for name in steps}
    for round_ in range(args.rounds + 1):
        for name in sides["ours"]:
            for side, steps in sides.items():
                time.sleep(0.5)  # until the other side's idle worker threads have stopped spinning
                start = time.perf_counter()
                steps[name]()
                if round_:
                    times[side, name].append(time.perf_counter() - start)
    medians = {key: statistics.median(values) for key, values in times.items()}

    print(f"size {args.size}, batch {args.batch_size}, device {device}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads, median of {args.rounds}")  # fmt: skip
    print(f"{'':22}{'ours':>10}{'PyTorch':>10}{'ratio':>8}")
    for name in sides["ours"]:
        ours, theirs = medians["ours", name], medians["torch", name]
        print(f"{name:22}{ours:8.3f} s{theirs:8.3f} s{ours / theirs:8.2f}")
    if memory:
        print(f"{'peak memory':22}{memory['ours']:7} MB{memory['torch']:7} MB{memory['ours'] / memory['torch']:8.2f}")
    print(json.dumps({"seconds": {f"{s} {n}": t for (s, n), t in medians.items()}, "megabytes": memory}))


if __name__ == "__main__":
    main()
