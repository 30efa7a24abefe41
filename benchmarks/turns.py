"""Sides that are timed against each other, each in a process of its own, as its users run it: they take turns.

So whatever else the machine does meets all of them. Nothing of this project is imported here: a side's process holds what
that side needs, and no more.
"""

import functools
import multiprocessing
import statistics
import time
from concurrent import futures


@functools.cache
def tasks_of(make, *arguments):
    return make(*arguments)


def work(task, *side):
    """In a side's process: the seconds that its task of this number takes, and the result."""
    run = tasks_of(*side)[task]
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def take_turns(sides, tasks, rounds, untimed=1):
    """Run the first `tasks` tasks of all `sides` in turn, `rounds` times after some that are not timed.

    sides: {name: (function that returns a side's tasks, its arguments ...)}; the function runs in the side's process.
    Returns {name: [(median seconds, last result) of each task]} and, of the sides that failed, {name: why}.
    """
    context, failed = multiprocessing.get_context("spawn"), {}
    pools = {name: futures.ProcessPoolExecutor(1, context) for name in sides}
    answers = {name: [[] for _ in range(tasks)] for name in sides}
    for _ in range(untimed + rounds):
        for task in range(tasks):
            for name in list(pools):
                try:
                    answers[name][task].append(pools[name].submit(work, task, *sides[name]).result())
                except Exception as error:  # whatever a side finds to say, or that its process is gone
                    failed[name] = (str(error).splitlines() or [type(error).__name__])[0]
                    pools.pop(name).shutdown()
    measured = {
        name: [(statistics.median(seconds for seconds, _ in runs[untimed:]), runs[-1][1]) for runs in answers[name]]
        for name in pools
    }
    for pool in pools.values():
        pool.shutdown()
    return measured, failed
