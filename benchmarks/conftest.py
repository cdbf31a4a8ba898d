"""Options of the op benchmarks, and the table at their end."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import save, spread

# The processor's seconds leave out those that other work on a shared machine takes; they add up
# over threads, so that OMP_NUM_THREADS=1 goes with them.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Rows:
    """The rows of the table, the device that they are measured on, and the clock of some."""

    def __init__(self, device: str, clock: Callable[[], float]) -> None:
        self.device = device
        self.clock = clock
        self.rows: list[dict[str, Any]] = []
        self.record: list[dict[str, Any]] = []

    def add(self, op: str, case: str, seconds: dict[str, list[float]]) -> None:
        """Note a case: the sides' medians in ms, and how many times the native one's they are."""
        row: dict[str, Any] = {"op": op, "case": case}
        native = statistics.median(seconds["native"])
        row |= {f"{side} ms": spread(values, 1e3) for side, values in seconds.items()}
        for side, values in seconds.items():
            if side != "native":
                row[f"{side} / native"] = f"{statistics.median(values) / native:.2f}"
        self.rows.append(row)
        self.record.append({"op": op, "case": case, "seconds": seconds})


ROWS = pytest.StashKey[Rows]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="cpu or cuda")
    parser.addoption(
        "--clock", choices=CLOCKS, default="wall", help="of the bilinear cases with real scores"
    )
    parser.addoption("--save", default=None, help="name of the table in benchmarks/results")


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda was asked for, and torch sees no GPU")
    config.stash[ROWS] = Rows(device, CLOCKS[config.getoption("--clock")])


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> Rows:
    return request.config.stash[ROWS]


def pytest_terminal_summary(config: pytest.Config) -> None:
    kept = config.stash[ROWS]
    if kept.rows:
        command = "python -m pytest " + " ".join(map(str, config.invocation_params.args))
        save(config.getoption("--save"), kept.device, kept.rows, kept.record, command)
