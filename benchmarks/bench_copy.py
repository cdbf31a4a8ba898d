"""What the hardware sets: bytes a second of a large copy, read and written.

python benchmarks/bench_copy.py [--device cuda] [--save copy-cpu]
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch
from common import alternate, save, spread

SIZES = {"cpu": (2**20, 2**28), "cuda": (2**24, 2**32)}  # bytes: in the caches, and past them


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--save", help="name of the table in benchmarks/results")
    options = parser.parse_args()
    rows, record = [], []
    for size in SIZES[options.device]:
        source = torch.rand(size // 4, device=options.device)
        target = torch.empty_like(source)
        sides = {"copy": lambda to=target, of=source: to.copy_(of)}
        times = alternate(sides, options.rounds, warmup=3, device=options.device)["copy"]
        rate = 2 * size / statistics.median(times) / 1e9
        rows.append({"MiB": size // 2**20, "copy ms": spread(times, 1e3), "GB/s": f"{rate:.0f}"})
        record.append({**rows[-1], "seconds": times})
    command = "python benchmarks/bench_copy.py " + " ".join(sys.argv[1:])
    save(options.save, options.device, rows, record, command)


if __name__ == "__main__":
    main()
