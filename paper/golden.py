"""Numbers of the published code for our tests: the formula behind its weights and inputs, and what stands for its arrays.

paper/published/*.json hold what the authors' own modules computed (each file says of which repository and commit), made on
2026-11-25 on a CPU with PyTorch 2.13 in float64. The arithmetic was as published; replaced were a module that PyTorch has
dropped, moves to a GPU, and the random generators, which gave the numbers of this formula. So whoever fills our networks by
the same formula, and compares, needs NumPy alone.
"""

import json
from pathlib import Path

import numpy as np

import autograd as ag


def stream(i, *shape):
    """Numbers in [-1, 1), array `i` of them in float64, from whole numbers modulo 2^32: the j-th, row by row, is u(i, j),

    h = j + 1 + 2654435769 (i + 1);  twice: h = 73244475 (h xor floor(h / 2^16));  h = h xor floor(h / 2^16);
    u = 2 h / 2^32 - 1.
    """
    h = np.arange(1, np.prod(shape, dtype=int) + 1, dtype=np.uint32) + np.uint32(2654435769 * (i + 1) % 2**32)
    for _ in range(2):
        h = np.uint32(73244475) * (h ^ (h >> 16))
    return ((h ^ (h >> 16)) * 2.0**-31 - 1).reshape(shape)


def fill(network, first):
    """Give each parameter of a network the published run's weights; number n has stream first + n.

    first: 0 for a generator, 500 for a discriminator. Weights of two axes (inputs, outputs) and of four (outputs, channels,
    kernel, kernel) are sqrt(3 / inputs) u, those of a normalization 1 + 0.2 u, all else 0.2 u.
    """
    for n, (name, p) in enumerate(network.parameters().items()):
        u = ag.xp.asarray(stream(first + n, *p.shape))
        if not name.endswith("weight"):
            p.data[...] = 0.2 * u
        elif p.ndim == 1:
            p.data[...] = 1 + 0.2 * u
        else:
            inputs = p.shape[0] if p.ndim == 2 else np.prod(p.shape[1:])
            p.data[...] = float(np.sqrt(3 / inputs)) * u


def probes(arrays):
    """What stands for arrays too large to keep: float64 (n, 2), for array r its Euclidean norm and its product with stream
    5000 + r. The product tells every transposition, permutation and sign."""
    rows = [ag.to_numpy(x).astype(np.float64).ravel() for x in arrays]
    return np.array([(np.linalg.norm(x), x @ stream(5000 + r, x.size)) for r, x in enumerate(rows)])


def assert_probes(arrays, published, rtol):
    """Assert that arrays agree with the published `probes` (n, 2), to `rtol` of their norm.

    Where nothing but rounding is left, as in the gradient of a bias that is taken away again, the scale is 1e-4 of the
    largest norm.
    """
    published = np.array(published)
    scale = np.maximum(published[:, :1], 1e-4 * published[:, 0].max())
    error = (probes(arrays) - published) / scale
    assert np.abs(error).max() <= rtol, f"array {np.abs(error).max(axis=1).argmax()} of {len(published)}: {error}"


def published(kind):
    """The published numbers of a kind, by name: paper/published/{kind}.json."""
    return json.loads((Path(__file__).parent / "published" / f"{kind}.json").read_text())
