"""Sides that are timed against each other, each in a process of its own, as its users run it: they take turns.

So whatever else the machine does meets all of them. Nothing of this project is imported here: a side's process holds what
that side needs, and no more.
"""

import multiprocessing
import statistics
import time


def work(make, arguments, pipe):
    """A side's process: answers the number of a task with its seconds and its result, or with why there are none."""
    tasks = None
    while (task := pipe.recv()) is not None:
        try:
            tasks = tasks or make(*arguments)
            start = time.perf_counter()
            result = tasks[task]()
            pipe.send((time.perf_counter() - start, result))
        except Exception as error:  # whatever a side finds to say
            pipe.send((str(error).splitlines() or [type(error).__name__])[0])
            return


def take_turns(sides, tasks, rounds, untimed=1):
    """Run the first `tasks` tasks of all `sides` in turn, `rounds` times after some that are not timed.

    sides: {name: (function that returns a side's tasks, its arguments ...)}; the function runs in the side's process.
    Returns {name: [(median seconds, last result) of each task]} and, of the sides that failed, {name: why}.
    """
    context, pipes, failed = multiprocessing.get_context("spawn"), {}, {}
    for name, (make, *arguments) in sides.items():
        pipes[name], other = context.Pipe()
        context.Process(target=work, args=(make, arguments, other), daemon=True).start()
        other.close()  # so that a process that ends early is heard of
    answers = {name: [[] for _ in range(tasks)] for name in sides}
    for _ in range(untimed + rounds):
        for task in range(tasks):
            for name in list(pipes):
                try:
                    pipes[name].send(task)
                    answer = pipes[name].recv()
                except (EOFError, OSError):
                    answer = "ended early"
                if isinstance(answer, str):
                    failed[name] = answer
                    del pipes[name]
                else:
                    answers[name][task].append(answer)
    for pipe in pipes.values():
        pipe.send(None)
    measured = {
        name: [(statistics.median(seconds for seconds, _ in runs[untimed:]), runs[-1][1]) for runs in answers[name]]
        for name in pipes
    }
    return measured, failed
