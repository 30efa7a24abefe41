"""Compile all kernels as a GPU would, without one: python -m fast.compile --arch 75,80,90

By NVRTC, NVIDIA's compiler, down to the instructions of each architecture, so that registers and shared memory have to
suffice, too; for float32 and float64, with the constants of the presets' layers. It needs pip install '.[kernels]'.
"""

import argparse
import itertools
import re
import time

import numpy as np

import transgan
from fast import augment, gpu


def jobs():
    """(file, constants) of everything that the presets' training compiles, as a list."""
    plain = [(path.stem, {}) for path in sorted(gpu.KERNELS.glob("*.cu")) if path.stem not in ("attention", "augment")]
    heads = [("attention", gpu.attention_constants(width)) for width in head_widths()]
    augmentation = "augment", augment.constants(transgan.Options().diff_aug.split(","))
    return [*plain, *heads, augmentation]


def head_widths():
    """The widths of the heads that attention's kernels take in any preset's networks, in rising order."""
    found = set()
    for size, image_size in itertools.product(transgan.SIZES, (32, 64)):
        stages = len(transgan.stage_depths(size, image_size))
        found |= {transgan.SIZES[size].embed_dim // 4**i for i in range(stages)} | {transgan.SIZES[size].disc_embed_dim}
    widths = {width // transgan.NUM_HEADS for width in found}
    return sorted(width for width in widths if not gpu.attention_declines(1, width))


def machine_code(text, architecture):
    """The machine code (bytes) of a CUDA source for compute capability `architecture`, such as 80 for 8.0.

    Raises RuntimeError with the compiler's words where it refuses, ImportError where CuPy or NVRTC is not installed.
    """
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(text, "kernels.cu", (), ())
    try:
        nvrtc.compileProgram(program, (f"--gpu-architecture=sm_{architecture}", "--std=c++17"))
        return nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError:
        raise RuntimeError(nvrtc.getProgramLog(program)) from None
    finally:
        nvrtc.destroyProgram(program)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="80", help="compute capabilities, separated by commas (default: %(default)s)")
    for architecture in parser.parse_args().arch.split(","):
        for (file, constants), dtype in itertools.product(jobs(), map(np.dtype, ("float32", "float64"))):
            text, start = gpu.source(file, dtype, **constants), time.perf_counter()
            size = len(machine_code(text, architecture))
            names = re.findall(r"__global__ void (\w+)", text)
            words = " ".join(f"{name}={value}" for name, value in constants.items())
            print(f"sm_{architecture} {dtype} {time.perf_counter() - start:.2f} s {size:,} bytes", *names, words)


if __name__ == "__main__":
    main()
