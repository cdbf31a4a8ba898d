"""`dagcore run` on scenes by one process and by two, of one thread each: images a second.

    python benchmarks/bench_run.py

Both start anew in each round; the time is that from the first image to the last, as the run itself
keeps it. Their folders must not differ in a byte, but for what tells of the processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import save, spread

CHANGING = ("speed.json", ".lock")


def start(out: Path, ranks: int, options: argparse.Namespace) -> float:
    """Run into a new folder; images a second."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(torchrun if ranks > 1 else []), "-m", "dagcore", "run"]
    command += ["--data", "scenes", "--model", options.network, "--out", str(out)]
    command += ["--images", str(options.images), "--max-iter", str(options.max_iter)]
    subprocess.run(
        command,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    (speed,) = json.loads((out / "speed.json").read_text())
    return float(speed["images per second"])


def content(out: Path) -> dict[str, bytes]:
    """Every file's bytes."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name not in CHANGING
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="FCN-VGG")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--max-iter", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save")
    options = parser.parse_args()
    speeds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for k in range(options.rounds):
            outs = {ranks: Path(folder) / f"{k}-{ranks}" for ranks in speeds}
            for ranks, out in outs.items():
                speeds[ranks].append(start(out, ranks, options))
            if content(outs[1]) != content(outs[2]):
                raise SystemExit("the folders of one process and of two differ")
    base = statistics.median(speeds[1])
    rows = [
        {
            "processes": ranks,
            "images/s": spread(found),
            "times as fast": f"{statistics.median(found) / base:.2f}",
        }
        for ranks, found in speeds.items()
    ]
    record = [{"processes": ranks, "images/s": found} for ranks, found in speeds.items()]
    note = "Medians (quartiles); both sides in alternation, each in processes of its own."
    save(options.save, "cpu", rows, record, "python benchmarks/bench_run.py", note)


if __name__ == "__main__":
    main()
