"""The processes of a run: one alone, or those that torchrun has started."""

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

BEYOND = 2**40  # images
TIMEOUT = datetime.timedelta(days=7)  # from one rank's last image to the next one's


class Ranks:
    """A process that is alone."""

    rank, world = 0, 1

    def __init__(self) -> None:
        self._claims = itertools.count()
        self._finished = itertools.count(1)

    def claim(self) -> int:
        """The next number that no rank has claimed, from 0."""
        return next(self._claims)

    def stop(self) -> None:
        """Let no rank claim anything any more."""
        self._claims = itertools.count(BEYOND)

    def count(self) -> int:
        """Count an image that is finished; how many are by now, of all ranks."""
        return next(self._finished)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on each of them."""
        return [value]

    def agree(self, error: Exception | None) -> None:
        """Raise on the first rank what went wrong on any; the others end without a word."""
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
        """The device that this rank is to run on; None where that is open."""
        return None

    def close(self) -> None:
        """Part from the others."""


class Torchrun(Ranks):
    """One of several processes, which take images from one counter as they get to them.

    They exchange numbers and short texts only, through the store and gloo; on GPUs there is nccl,
    as torch expects it, but no tensor for it to send.
    """

    calls = itertools.count()  # the store keeps what earlier ones in this process have left

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
        """The next number that no rank has claimed, from 0."""
        return int(self._store.add("claimed", 1)) - 1

    def stop(self) -> None:
        """Let no rank claim anything any more."""
        self._store.add("claimed", BEYOND)

    def count(self) -> int:
        """Count an image that is finished; how many are by now, of all ranks."""
        return int(self._store.add("finished", 1))

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on each of them."""
        values: list[Any] = [None] * self.world
        try:
            distributed.all_gather_object(values, value)
        except RuntimeError as error:
            raise ArgumentError(
                "another process of this run has ended: the same command resumes"
            ) from error
        return values

    def device(self) -> str | None:
        """A GPU of its own on this machine, where there are GPUs."""
        if not torch.cuda.is_available():
            return None
        return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % torch.cuda.device_count()}"

    def close(self) -> None:
        """Part from the others."""
        distributed.destroy_process_group()


def connect() -> Ranks:
    """The processes of this run."""
    started = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    return Torchrun() if started else Ranks()
