"""The engine's operations again, arranged for a processor: an appendix to autograd.py, which runs without it.

`install` enters forms of equal results into `autograd.faster`, which then run wherever the program says `softmax` or
`attention`. Modules `cpu` and `gpu` hold them on bare arrays, `kernels/` what a GPU runs, `forms` makes operations of them.
"""

import os

for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
    os.environ.setdefault(name, "1")  # read when NumPy is loaded: the threads are the program's, see program/update.py

import autograd as ag
from fast import cpu, forms

CORES = cpu.CORES
PRECISIONS = tuple(cpu.PRECISIONS)


def install(precision="float32"):
    """Let the fast forms run from now on, for the device that is in use: returns "cpu" or "gpu".

    precision: how exact the matrix products of float32 arrays are, one of PRECISIONS. A GPU multiplies shorter numbers many
    times faster, and still adds their products up in float32. On a CPU this is emulated, by rounding what enters a product:
    slower, and there to see what it does to training. Call it after `autograd.use_device`. Raises ValueError for another
    precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    uninstall()
    if ag.xp is cpu.np:
        forms.arrays = cpu
        left_out = {ag.softmax, ag.reduce_sum} | ({ag.matmul} if precision == "float32" else set())  # NumPy is as fast
    else:
        from fast import gpu

        forms.arrays, left_out = gpu, set()
    forms.arrays.start(precision)
    ag.faster.update({operation: form for operation, form in forms.FORMS.items() if operation not in left_out})
    return forms.arrays.__name__.removeprefix("fast.")


def uninstall():
    """Run on the definitions alone again, in full precision."""
    if forms.arrays:
        forms.arrays.start("float32")
    ag.faster.clear()
