"""Pools of processes that end with the process that started them."""

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
    """Return the number of cores that this process may use."""
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
    """Open a pool of spawned processes; if the block fails, terminate those that still run.

    Each process has `threads` threads; if that is None, the processes share the cores.
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
    """Exit once the parent is killed: it cannot end its processes, which would wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
