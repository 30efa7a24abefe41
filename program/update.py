"""A step's update, shared out: among a CPU's threads, among a machine's GPUs, and over time where memory is small.

`Update` has the signature of the book's `update`, and makes the same step up to rounding; `Played` does so on one GPU,
without asking Python for every launch. `Ahead` has the inputs of the next step ready when this one ends.
"""

import time
from concurrent import futures

import autograd as ag
import transgan
from autograd import Tensor, grad
from data import first_line
from fast import CORES
from fast.recording import Recording, release
from store.output import warn

THREAD_SHARE = 1 << 15  # elements of a layer worth a thread of their own: with fewer, handing over costs what it saves


def threads_that_pay(options):
    """How many threads to share a batch among, where nobody says."""
    elements = (options.image_size // options.patch_size) ** 2 * transgan.SIZES[options.size].disc_embed_dim
    if options.discriminator != "transgan":
        elements = options.image_size**2 * 16  # channels, or more
    return min(CORES, max(1, options.batch_size * elements // THREAD_SHARE))


class Update:
    """The book's update, but the batch is cut into shares.

    Threads work on several at a time, because NumPy runs on one core here; and with accumulate = n only
    one n-th of the batch is in memory at once. Scores are numbers per sample, so shares do not meet before the loss, and
    the graph is cut there:
        d loss / d parameters = sum over shares of (d loss / d s_share) (d s_share / d parameters).
    First the scores of each share are computed; the loss is taken of a copy without history and differentiated towards it;
    then that gradient is carried on from each share's scores to the parameters. Whoever saves memory throws the history of
    the scores away, and computes them a second time for the last part. Several GPUs, joined by a `Group`, tell each other
    their scores, and add up their gradients.

    rate_scale: of the learning rate, halved by each rewind, see program/run.py. map: the threads', for other uses. watch:
    called before each update, by whoever shows what is being done. whole: the Adam of a network that wants whole batches.
    """

    def __init__(self, threads=1, accumulate=1, group=None):
        self.threads, self.accumulate, self.group, self.rate_scale = threads, accumulate, group, 1.0
        self.map = futures.ThreadPoolExecutor(threads).map if threads > 1 else map
        self.watch, self.whole = (lambda: None), None

    def __call__(self, *arguments):
        self.watch()
        return self.make(*arguments)

    def make(self, scores, inputs, loss, adam, rate):
        """The update itself, which `Played` makes in another way."""
        again, group = self.accumulate > 1, self.group
        if group:
            inputs = [ag.xp.array_split(x, group.size)[group.rank] for x in inputs]
        count = 1 if adam is self.whole else min(self.threads * self.accumulate, len(inputs[0]))
        shares = list(zip(*(ag.xp.array_split(x, count) for x in inputs), strict=True))

        def forward(share):
            part = scores(*share)  # (rows, B / shares)
            return part.detach() if again else part

        def backward(share, part, towards):
            return grad(scores(*share) if again else part, adam.parameters, towards)

        parts = list(self.map(forward, shares))
        own = ag.xp.concatenate([part.data for part in parts], axis=1)  # (rows, B), or as much of B as is for this GPU
        leaf = Tensor(group.gather(own) if group else own, requires_grad=True)  # (rows, B)
        values = loss(leaf)
        (slope,), work = grad(values[0], [leaf]), []
        end = own.shape[1] * group.rank if group else 0
        for share, part in zip(shares, parts, strict=True):
            start, end = end, end + part.shape[1]
            work.append((share, part, slope[:, start:end]))
        del parts, part  # so that `work` alone holds the shares' history, and each goes when it is done
        while work:
            for gradients in list(self.map(lambda share: backward(*share), work[: self.threads])):
                adam.add(gradients)
            del work[: self.threads]
        if group:
            group.add_up(adam.gradient)
        factor, _ = ag.clip_by_global_norm(adam.gradient, transgan.MAX_NORM)
        adam.step(self.rate_scale * rate, factor)
        return values


class Played(Update):
    """The book's update on a GPU, all but Adam's, which counts steps, recorded the first time: see fast/recording.py.

    phase: a function that says by which window the generator sees now; with another one all is recorded anew.
    """

    def __init__(self):
        super().__init__()
        self.phase, self.now, self.recordings, self.refused = lambda: None, None, {}, False

    def make(self, scores, inputs, loss, adam, rate):
        if ag.hook or self.refused:  # a profiler wants to see every operation
            return super().make(scores, inputs, loss, adam, rate)
        if self.phase() != self.now:
            self.now = self.phase()
            self.recordings.clear()

        def run(*inputs):
            adam.gradient[...] = 0  # in which whatever ran while it was recorded has left its own
            total, other = loss(scores(*inputs))
            adam.add(grad(total, adam.parameters))
            factor, _ = ag.clip_by_global_norm(adam.gradient, transgan.MAX_NORM)
            return [factor, total.data, *([] if other is None else [other.data])]

        if id(adam) not in self.recordings:
            try:
                self.recordings[id(adam)] = Recording(run, inputs)
            except Exception as error:  # CuPy, CUDA and cuBLAS refuse in many ways; without, a step is slower and the same
                warn(f"transgan: this GPU's work cannot be recorded, steps are slower: {first_line(error)}")
                self.refused = True
        if self.refused:  # here, where the error is gone, and the arrays with it that it held on to
            self.recordings.clear()
            release()
            adam.gradient[...] = 0
            return super().make(scores, inputs, loss, adam, rate)
        factor, *values = self.recordings[id(adam)].play(inputs)
        adam.step(self.rate_scale * rate, factor)
        total, other = [Tensor(x.copy()) for x in values] + [None] * (2 - len(values))
        return total, other


class Group:
    """Joins the processes of several GPUs that train together, one each (data parallel, over NCCL).

    All of them hold the same networks and go through the same steps, each on its part of every batch. rank: which one this
    is, from 0 to size - 1; port: where on this machine they find each other.
    """

    def __init__(self, rank, size, port):
        from cupyx import distributed

        self.rank, self.size = rank, size
        self.communicator = distributed.init_process_group(size, rank, host="127.0.0.1", port=port)
        if store := getattr(self.communicator, "_store", None):  # a process that nobody needs when all have met: it would
            store.stop()  # be waited for at the end, in vain, and hold what is locked after a killed run
            store._process = None

    def gather(self, x):
        """Everybody's arrays (rows, n) side by side, by rank: (rows, size n)."""
        everybody = ag.xp.empty((self.size, *x.shape), x.dtype)
        self.communicator.all_gather(ag.xp.ascontiguousarray(x), everybody, x.size)
        return everybody.transpose(1, 0, 2).reshape(len(x), -1)

    def add_up(self, x):
        """Replace an array by the sum of everybody's."""
        self.communicator.all_reduce(x, x)


class Ahead:
    """A Trainer's `inputs`, of which those of the next step are made while this one is at work.

    waited: seconds that steps have waited for them.
    """

    def __init__(self, inputs):
        self.inputs, self.waited, self.step, self.waiting = inputs, 0.0, None, None
        self.pool = futures.ThreadPoolExecutor(1, thread_name_prefix="data")  # one, because batches know one epoch's order

    def __call__(self, step):
        if step != self.step:  # the first, or after going back or on to a checkpoint
            self.waiting = self.pool.submit(self.inputs, step)
        start = time.perf_counter()
        made = self.waiting.result()
        self.waited += time.perf_counter() - start
        self.step, self.waiting = step + 1, self.pool.submit(self.inputs, step + 1)
        return made
