"""The engine's operations again, arranged for a processor: an appendix to autograd.py, which runs without it.

`install` enters forms of equal results into `autograd.faster`, which run wherever the program says `softmax` or
`attention`. `cpu` and `gpu` hold them on bare arrays, `kernels/` what a GPU runs, `forms` makes operations of both.
"""

import autograd as ag

PRECISIONS = ("float32", "tf32", "bfloat16")  # of matrix products, see cpu.PRECISIONS


def install(precision="float32"):
    """Let the fast forms run from now on, on the device that is in use; returns its name for them, "cpu" or "gpu".

    precision: how exact the matrix products of float32 arrays are, one of PRECISIONS. A GPU multiplies shorter numbers many
    times faster, and still adds their products up in float32. On a CPU this is emulated, by rounding what enters a product:
    slower, and there to see what it does to training. Call it after `autograd.use_device`. Raises ValueError for another
    precision.
    """
    from fast import cpu, forms

    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if ag.xp is cpu.np:
        forms.arrays = cpu
    else:
        from fast import gpu

        forms.arrays = gpu
    forms.arrays.start(precision)
    ag.faster.update(forms.FORMS)
    return forms.arrays.__name__.removeprefix("fast.")


def uninstall():
    """Run on the definitions alone again, in full precision."""
    from fast import forms

    if forms.arrays:
        forms.arrays.start("float32")
    ag.faster.clear()
