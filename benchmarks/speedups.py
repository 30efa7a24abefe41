"""What each of our speed-ups gains: a training step with all of them beside steps that go without one each.

    python benchmarks/speedups.py [--size S] [--batch-size 16] [--rounds 7]

The two steps of benchmarks/step.py, on the CPU. Each variant is a process of its own; they take turns, and the medians are
divided by those of the step with everything. 1.30 means that without this speed-up the step would take 1.30 times as long.
"""

import argparse
import functools

import step
from start import number

import autograd as ag
import fast
import transgan
from benchmarks import turns
from fast import cpu, forms


def finish_all_tokens():
    """Also in the last block, of which [cls] alone is read."""
    call = transgan.Block.__call__
    transgan.Block.__call__ = lambda self, x, mask=None, n=None: transgan.first_tokens(call(self, x, mask), n)


# What takes a speed-up away from a process; without its fast form, an operation is its definition.
WITHOUT = {
    **{name: functools.partial(forms.FORMS.pop, getattr(ag, name))
       for name in ("attention", "gelu", "layer_norm", "adam_update")},
    "few tokens' scores held": lambda: setattr(cpu, "FEW_TOKENS", 0),
    "cache-sized pieces": lambda: setattr(cpu, "CACHE", 1 << 40),
    "kept memory": lambda: setattr(cpu, "keep_freed_memory", lambda: None),
    "threads": lambda: setattr(step, "trainer_of", functools.partial(step.trainer_of, threads=1)),
    "[cls] alone in the last block": finish_all_tokens,
}  # fmt: skip


def tasks(name, size, batch_size):
    """A variant's two steps, in its process."""
    if name in WITHOUT:
        WITHOUT[name]()
    return step.tasks("ours", size, batch_size)


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S", choices=transgan.SIZES)
    parser.add_argument("--batch-size", type=number(int, 1), default=16)
    parser.add_argument("--rounds", type=number(int, 1), default=7, help="timed rounds after one that is not (default 7)")
    args = parser.parse_args()
    print(f"size {args.size}, batch {args.batch_size}, {fast.CORES} cores, medians of {args.rounds} rounds")
    print(f"{'without':32}" + "".join(f"{name:>22}" for name in step.STEPS))
    for name in WITHOUT:
        sides = {side: (tasks, side, args.size, args.batch_size) for side in ("everything", name)}
        measured, failed = turns.take_turns(sides, len(step.STEPS), args.rounds)
        if failed:
            parser.error(f"{name}: {'; '.join(failed.values())}")
        pairs = zip(measured[name], measured["everything"], strict=True)
        ratios = [alone / everything for (alone, _), (everything, _) in pairs]
        print(f"{name:32}" + "".join(f"{ratio:>22.2f}" for ratio in ratios), flush=True)


if __name__ == "__main__":
    main()
