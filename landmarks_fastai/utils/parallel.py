"A progress bar, and a map over threads."

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def bar(items: Iterable[T], total: int, comment: str = "") -> Iterable[T]:
    "Show a progress bar while `items` are iterated over, if stdout is a terminal."
    if not sys.stdout.isatty():
        return items
    from fastprogress.fastprogress import progress_bar

    shown: Any = progress_bar(items, total=total)  # Any: fastprogress declares neither `comment` nor iteration
    shown.comment = comment
    return shown


def threaded_map(func: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield `func(item)` in order, computed by up to four threads that share torch's threads.

    Two cores that compute one layer together wait for each other at its end, and both wait while an image is decoded.
    """
    import torch

    threads = torch.get_num_threads()
    streams = min(4, threads)  # each has a batch in memory
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(streams, initializer=torch.set_num_threads, initargs=(threads // streams,)) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(func, item))
                if len(waiting) > 2 * streams:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # a part of the setting is global to the process
