"""The engine alone, beside other small ones and PyTorch: first derivatives of a network, and second ones.

    python benchmarks/engines.py [--rounds 7]          (needs one or more of: pip install dezero autograd tinygrad torch)

The network is tanh(tanh(x W1) W2) W3, widths 784, 512, 512, 1, on a batch of 256 in float32 on the CPU. Two tasks:
    first   the gradients of the sum of its results towards all weights
    second  the gradients towards all weights of the penalty that WGAN-GP makes of its slope, mean (|dD/dx| - 1)^2
Every engine is used as its documentation says, by itself in a process, with all cores; they take turns. Those that are not
installed, or cannot do a task, say so; all that answer must agree.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import turns

WIDTHS, BATCH = (784, 512, 512, 1), 256


def numbers():
    """x (256, 784) and the three weights, float32."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape) / shape[0] ** 0.5 for shape in zip(WIDTHS, WIDTHS[1:], strict=False)]
    return [x.astype(np.float32) for x in (rng.standard_normal((BATCH, WIDTHS[0])), *weights)]


def tasks(tensor, tanh, matmul, gradients, array):
    """Both tasks in an engine's words, as functions that return gradients as NumPy's arrays.

    tensor: of an array, one that gradients are wanted of; gradients: of y towards each of xs, from which one can go on;
    array: of such a gradient, NumPy's.
    """
    x, *weights = (tensor(a) for a in numbers())

    def run(x, w1, w2, w3):
        return matmul(tanh(matmul(tanh(matmul(x, w1)), w2)), w3).sum()

    def first():
        return [array(g) for g in gradients(run(x, *weights), weights)]

    def second():
        (slope,) = gradients(run(x, *weights), [x], create_graph=True)
        norm = (slope * slope).sum(axis=1) ** 0.5
        return [array(g) for g in gradients(((norm - 1) ** 2).sum() / BATCH, weights)]

    return first, second


def ours():
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import autograd as ag
    import fast

    ag.use_device("cpu")
    fast.install()
    return tasks(lambda a: ag.Tensor(a, requires_grad=True), ag.tanh, ag.matmul, ag.grad, ag.to_numpy)


def pytorch():
    import torch

    return tasks(lambda a: torch.tensor(a, requires_grad=True), torch.tanh, torch.matmul, torch.autograd.grad, np.asarray)


def dezero():
    setattr(np, "int", int)  # noqa: B010  # DeZero 0.0.13 is from before NumPy dropped the name
    import dezero
    import dezero.functions as F

    leaves = []

    def tensor(a):
        leaves.append(dezero.Parameter(a))
        return leaves[-1]

    def gradients(y, xs, create_graph=False):
        for leaf in leaves:
            leaf.cleargrad()
        y.backward(create_graph=create_graph)
        return [x.grad for x in xs]

    return tasks(tensor, F.tanh, F.matmul, gradients, lambda g: g.data)


def hips():
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent.parent]  # its name is ours
    import autograd  # isort: skip
    import autograd.numpy as anp  # isort: skip

    x, *weights = numbers()

    def run(x, w1, w2, w3):
        return anp.dot(anp.tanh(anp.dot(anp.tanh(anp.dot(x, w1)), w2)), w3).sum()

    def penalty(weights):
        slope = autograd.grad(run)(x, *weights)
        return ((anp.sqrt((slope**2).sum(axis=1)) - 1) ** 2).mean()

    first, second = autograd.grad(lambda weights: run(x, *weights)), autograd.grad(penalty)
    return lambda: first(weights), lambda: second(weights)


def tinygrad():
    from tinygrad import Tensor, TinyJit

    def compiled(task):
        run = TinyJit(lambda: tuple(task()))
        return lambda: [g.numpy() for g in run()]

    def gradients(y, xs, create_graph=True):  # which it does anyway
        return y.gradient(*xs)

    return [compiled(task) for task in tasks(Tensor, Tensor.tanh, Tensor.matmul, gradients, Tensor.realize)]


ENGINES = {"this project": ours, "PyTorch": pytorch, "HIPS autograd": hips, "DeZero": dezero, "tinygrad": tinygrad}


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds after three that are not (default 7)")
    if (rounds := parser.parse_args().rounds) < 1:
        parser.error("--rounds must be from 1")
    measured, failed = turns.take_turns({name: (make,) for name, make in ENGINES.items()}, 2, rounds, untimed=3)
    print(f"{'':16}{'first':>22}{'second':>22}   (in brackets: times as long as this project)")
    for name in ENGINES:
        if name in failed:
            print(f"{name:16}{failed[name]}")
            continue
        cells = ""
        for (seconds, gradients), (own, expected) in zip(measured[name], measured["this project"], strict=True):
            for a, b in zip(gradients, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max(), err_msg=name)
            cells += f"{f'{1000 * seconds:.1f} ms ({seconds / own:.2f})':>22}"
        print(f"{name:16}{cells}")


if __name__ == "__main__":
    main()
