"""Running an iterator ahead of its consumer, in a thread."""

from __future__ import annotations

import threading
from collections.abc import Generator
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def background(items: Generator[T, None, None], ahead: int) -> Generator[T, None, None]:
    """Yield what `items` yields, up to `ahead` of them prepared beforehand.

    An exception of `items` is raised here, after the items before it. Closing this generator, or letting go
    of it, ends the thread and closes `items`.
    """
    ready: SimpleQueue[tuple[T | None, BaseException | None, bool]] = SimpleQueue()
    room = threading.Semaphore(ahead)
    closed = threading.Event()

    def work() -> None:
        try:
            for item in items:
                room.acquire()
                if closed.is_set():
                    return
                ready.put((item, None, False))
            ready.put((None, None, True))
        except BaseException as error:
            ready.put((None, error, True))
        finally:
            items.close()

    thread = threading.Thread(target=work, name="nanoworks-loader", daemon=True)
    thread.start()
    try:
        while True:
            item, error, ended = ready.get()
            if error is not None:
                raise error
            if ended:
                return
            room.release()
            yield item  # type: ignore[misc]  # an item there is, unless the iterator ended
    finally:
        closed.set()
        room.release()
        thread.join()
