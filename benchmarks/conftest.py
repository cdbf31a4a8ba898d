"""Benchmark plumbing: sides timed in alternation, and a table with the machine's description."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dagcore import native

RESULTS = Path(__file__).with_name("results")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="cpu or cuda")
    parser.addoption("--save", default=None, help="name of the table in benchmarks/results")


def machine(device: str) -> dict[str, object]:
    """The machine in words, and the versions."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((s.split(":")[1].strip() for s in lines if "model name" in s), processor)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
    ).stdout.strip()
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": native.module.simd_in_use() if native.module else "none",
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
    }


class Sides:
    """Times several callables in alternation, so that a drifting machine hits all of them alike."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.rows: list[dict[str, object]] = []

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object]) -> float:
        self.synchronize()
        begin = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - begin

    def add(self, op: str, case: str, seconds: dict[str, list[float]]) -> dict[str, object]:
        """Note a row: each side's median and quartiles in ms, and ratios to the first side."""
        row: dict[str, object] = {"op": op, "case": case, "rounds": len(seconds["native"])}
        native_median = statistics.median(seconds["native"])
        for name, values in seconds.items():
            low, _, high = statistics.quantiles(values, n=4)
            middle = statistics.median(values)
            row[name] = {"ms": middle * 1e3, "quartiles": [low * 1e3, high * 1e3]}
            if name != "native":
                row[f"{name} / native"] = middle / native_median
        self.rows.append(row)
        return row


def table(rows: list[dict[str, object]]) -> str:
    """Rows of `Sides` as Markdown."""
    sides = [name for name, cell in rows[0].items() if isinstance(cell, dict)]
    others = sides[1:]
    head = ["op", "case", *(f"{s} ms" for s in sides), *(f"{s} / native" for s in others)]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in rows:
        cells = [str(row["op"]), str(row["case"])]
        for side in sides:
            cell = row[side]
            assert isinstance(cell, dict)
            low, high = cell["quartiles"]
            cells.append(f"{cell['ms']:.2f} ({low:.2f} to {high:.2f})")
        cells += [f"{row[f'{side} / native']:.2f}" for side in others]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


COLLECTED = pytest.StashKey[Sides]()


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda was asked for, and torch sees no GPU")
    config.stash[COLLECTED] = Sides(device)


@pytest.fixture
def sides(request: pytest.FixtureRequest) -> Sides:
    return request.config.stash[COLLECTED]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    collected = config.stash[COLLECTED]
    if not collected.rows:
        return
    text = table(collected.rows)
    terminalreporter.write_line(f"\n{text}")
    name = config.getoption("--save")
    if name:
        RESULTS.mkdir(exist_ok=True)
        about = machine(collected.device)
        words = ", ".join(f"{key} {value}" for key, value in about.items())
        note = "Medians in milliseconds (quartiles), all sides of a row in alternation."
        (RESULTS / f"{name}.md").write_text(f"{note}\n\nMachine: {words}.\n\n{text}\n")
        record = {"machine": about, "rows": collected.rows}
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
