"""A GPU's launches, recorded once and played again: a step of thousands of them then costs Python one.

CUDA calls it a graph. What was recorded reads and writes the same memory each time it is played: so its inputs are copied
into arrays that stay, its results lie in arrays that the next time writes over, and memory between has a pool of its own.
"""

import contextlib
import functools

import autograd as ag

held = []  # all memory of `pool`: where it runs short, CuPy frees what no array holds, which recordings still write to


@functools.cache
def pool():
    """The memory that recordings work in, which is nobody else's: a pool of CuPy's. They share it, being played in turn."""

    def malloc(size):
        held.append(ag.xp.cuda.Memory(size))
        return ag.xp.cuda.MemoryPointer(held[-1], 0)

    return ag.xp.cuda.MemoryPool(malloc)


@functools.cache
def stream():
    """Where they are recorded and played: one for all, because CuPy's pools keep a memory for each stream."""
    return ag.xp.cuda.Stream(non_blocking=True)


def release():
    """Give the memory back, when there is no recording any more."""
    stream().synchronize()
    held.clear()
    pool().free_all_blocks()


class Recording:
    """function(*inputs), a list of arrays, recorded with arrays like `inputs`; `play` runs it on others of their shapes.

    function: launches the same work each time, fetches nothing from the device and sends nothing there. It is run once
    before it is recorded, so that its kernels are compiled and its memory is there. Raises whatever CuPy does where
    something cannot be recorded.
    """

    def __init__(self, function, inputs):
        cuda = ag.xp.cuda
        ag.xp.get_default_memory_pool().free_all_blocks()  # what it keeps for later is wanted here
        self.stream = stream()
        self.stream.wait_event(cuda.Stream.null.record())
        with cuda.using_allocator(pool().malloc), self.stream:
            self.inputs = [x.copy() for x in inputs]
            function(*self.inputs)
            self.stream.synchronize()
            self.stream.begin_capture()
            try:
                self.results = function(*self.inputs)
            except BaseException:
                with contextlib.suppress(Exception):  # which says no more than that something was wrong before
                    self.stream.end_capture()
                raise
            self.graph = self.stream.end_capture()

    def play(self, inputs):
        """The results for other inputs: arrays that are written over when it is played again."""
        null = ag.xp.cuda.Stream.null
        self.stream.wait_event(null.record())
        with self.stream:
            for own, x in zip(self.inputs, inputs, strict=True):
                own[...] = x
            self.graph.launch(self.stream)
        null.wait_event(self.stream.record())
        return self.results
