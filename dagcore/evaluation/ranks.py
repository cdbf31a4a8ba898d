"""The processes of a run: a single one, or those started by torchrun."""

from __future__ import annotations

import datetime
import itertools
import os
from typing import Any

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ..errors import ArgumentError

BEYOND = 2**40  # more images than any data set has
TIMEOUT = datetime.timedelta(days=7)  # between the last images of two ranks


class Ranks:
    """A single process."""

    rank, world = 0, 1

    def __init__(self) -> None:
        self._claims = itertools.count()
        self._finished = itertools.count(1)

    def claim(self) -> int:
        """Return the next number from 0 on that no rank has claimed."""
        return next(self._claims)

    def stop(self) -> None:
        """Stop all ranks from claiming more images."""
        self._claims = itertools.count(BEYOND)

    def count(self) -> int:
        """Count a finished image, and return how many all ranks have finished."""
        return next(self._finished)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, on each rank."""
        return [value]

    def agree(self, error: Exception | None) -> None:
        """Raise on the first rank if any rank has an error. The other ranks exit silently."""
        errors = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None and self.rank == 0:
            raise error
        failed = next((k for k, told in enumerate(errors) if told), None)
        if failed is None:
            return
        if self.rank == 0:
            raise ArgumentError(f"rank {failed}: {errors[failed]}")
        raise SystemExit(2)

    def device(self) -> str | None:
        """Return the device for this rank; None if it may be any."""
        return None

    def close(self) -> None:
        """Disconnect from the other ranks."""


class Torchrun(Ranks):
    """One of several processes, which claim images from a shared counter.

    They exchange only numbers and short texts, through the store and gloo. On GPUs nccl is set up
    too, because torch expects it, but it never sends a tensor.
    """

    calls = itertools.count()  # for new names: the store keeps the values of earlier calls

    def __init__(self) -> None:
        super().__init__()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        whole, self.rank, self.world = next(iter(rendezvous("env://")))
        store = PrefixStore(f"dagcore {next(self.calls)}", whole)
        distributed.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.world, timeout=TIMEOUT
        )
        self._store = PrefixStore("images", store)

    def claim(self) -> int:
        """Return the next number from 0 on that no rank has claimed."""
        return int(self._store.add("claimed", 1)) - 1

    def stop(self) -> None:
        """Stop all ranks from claiming more images."""
        self._store.add("claimed", BEYOND)

    def count(self) -> int:
        """Count a finished image, and return how many all ranks have finished."""
        return int(self._store.add("finished", 1))

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, on each rank."""
        values: list[Any] = [None] * self.world
        try:
            distributed.all_gather_object(values, value)
        except RuntimeError as error:
            raise ArgumentError(
                "another process of this run has ended: run the same command again to resume"
            ) from error
        return values

    def device(self) -> str | None:
        """Return this rank's GPU on its machine; None without GPUs."""
        if not torch.cuda.is_available():
            return None
        return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % torch.cuda.device_count()}"

    def close(self) -> None:
        """Disconnect from the other ranks."""
        distributed.destroy_process_group()


def connect() -> Ranks:
    """Connect to the processes of this run."""
    started = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    return Torchrun() if started else Ranks()
