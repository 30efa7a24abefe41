"""A GPU's launches, recorded once and played again: a step of thousands of them then costs Python one.

CUDA calls it a graph. What was recorded reads and writes the same memory each time it is played: so its inputs are copied
into arrays that stay, its results lie in arrays that the next time writes over, and memory between has a pool of its own.
"""

import functools

import autograd as ag


@functools.cache
def pool():
    """The memory that recordings work in, which is nobody else's: a pool of CuPy's. They share it, being played in turn."""
    return ag.xp.cuda.MemoryPool()


class Recording:
    """function(*inputs), a list of arrays, recorded with arrays like `inputs`; `play` runs it on others of their shapes.

    function: launches the same work each time, fetches nothing from the device and sends nothing there. It is run once
    before it is recorded, so that its kernels are compiled and its memory is there. Raises whatever CuPy does where
    something cannot be recorded.
    """

    def __init__(self, function, inputs):
        cuda = ag.xp.cuda
        self.stream = cuda.Stream(non_blocking=True)
        self.stream.wait_event(cuda.Stream.null.record())
        with cuda.using_allocator(pool().malloc), self.stream:
            self.inputs = [x.copy() for x in inputs]
            function(*self.inputs)
            self.stream.synchronize()
            self.stream.begin_capture()
            try:
                self.results = function(*self.inputs)
            finally:
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
