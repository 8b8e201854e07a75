"Progress and threads."

import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor


def bar(items, total: int, comment: str = ""):
    "The items, with a progress bar in a terminal."
    if not sys.stdout.isatty():
        return items
    from fastprogress.fastprogress import progress_bar

    shown = progress_bar(items, total=total)
    shown.comment = comment
    return shown


def threaded_map(func, items):
    """`func` of each item, in order; each core computes one item by itself, and few are ahead of what was taken.

    Two cores that share each layer of a network wait for each other at its end, and both wait while one decodes images.
    """
    import torch

    threads = torch.get_num_threads()
    streams = min(4, threads)  # each has a batch in memory
    waiting = deque()
    with ThreadPoolExecutor(streams, initializer=torch.set_num_threads, initargs=[threads // streams]) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(func, item))
                if len(waiting) > 2 * streams:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # part of it is the whole process's
