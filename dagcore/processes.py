"""Processes side by side, which end with the one that has started them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection
from typing import Any

import torch


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def pool(
    jobs: int,
    initializer: Callable[..., object] | None = None,
    initargs: tuple[Any, ...] = (),
    *,
    threads: int | None = None,
) -> Iterator[ProcessPoolExecutor]:
    """Spawned processes of some threads each; what still runs when the block fails is ended.

    They share the cores if `threads` is None.
    """
    executor = ProcessPoolExecutor(
        jobs,
        multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(threads or max(1, cores() // jobs), initializer, initargs),
    )
    with executor:
        try:
            yield executor
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _begin(threads: int, initializer: Callable[..., object] | None, initargs: Any) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, name="dagcore-parent", daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def _end_with_parent() -> None:
    """A parent that is killed cannot end its processes, which would wait for it forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
