"A progress bar, and a map over threads."

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from landmarks_fastai.utils.signals import stop_on_signal

THREADS = "landmarks_fastai"  # beginning of the names of the threads
T = TypeVar("T")
R = TypeVar("R")


def bar(items: Iterable[T], total: int, comment: str = "") -> Iterator[T]:
    """Yield `items`, with a progress bar if stdout is a terminal and fastprogress is installed.

    Raises `Stopped` at the next item if a signal's exception was lost.
    """
    shown: Any = items
    if sys.stdout.isatty():
        with suppress(ModuleNotFoundError):
            from fastprogress.fastprogress import progress_bar

            shown = progress_bar(items, total=total)
            shown.comment = comment
    for item in shown:
        stop_on_signal.check()
        yield item


def threaded_map(
    func: Callable[[T], R],
    items: Iterable[T],
    threads: int,
    start: Callable[[], None] = lambda: None,  # each thread calls it first
) -> Iterator[R]:
    "Yield `func(item)` in order, computed by threads. At most two items a thread, and one, are in memory."
    waiting: deque[Future[R]] = deque()
    pool, ended = ThreadPoolExecutor(threads, THREADS, start), False
    try:
        for item in items:
            waiting.append(pool.submit(func, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        ended = True
    except GeneratorExit:
        ended = True
        raise
    finally:  # a read that hangs must not hold an error, or a signal
        pool.shutdown(wait=ended, cancel_futures=True)
