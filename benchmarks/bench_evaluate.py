"""`dagcore.evaluate` by sea-2024 beside a plain PyTorch implementation of the same protocol.

    python benchmarks/bench_evaluate.py [--networks ...] [--steps 300] [--save evaluate-cpu]

Both attack the same network on the same images within the same radius, with as many steps, from
random points of their own; the plain one, tests/sea_oracle.py, runs the bare network. dagcore does
all images, then the other side does. What is compared is the worst case, and the seconds of
everything: preparing, attacking, judging the examples (dagcore's also in 8-bit files), writing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_real import DEEPLABS, load_network
from common import save
from leaderboard import real_examples

import dagcore
from dagcore import zoo
from dagcore.data import Scenes
from dagcore.evaluation.protocols import SEA
from dagcore.victims import Victim

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import sea_oracle

RADII = {"deeplab_voc": 0.5 / 255, "deeplab_voc_narrow": 0.5 / 255}
NOTE = "Worst cases in percent. Seconds of all attacks on all images, one side after the other."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=["deeplab_voc", "FCN-Alex", "DL-VGG"])
    parser.add_argument("--images", type=int, default=4, help="scenes")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save")
    options = parser.parse_args()
    rows, record = [], []
    for name in options.networks:
        real = name in DEEPLABS
        model = load_network(name) if real else zoo.load(name).eval()
        data: Any = real_examples() if real else Scenes("07", "test", count=options.images)
        pairs = [one if real else (one.image, one.mask) for one in data]
        pairs = [(image, y.long()) for image, y in pairs]
        epsilon = RADII.get(name, 1 / 255)
        ours = evaluated(model, pairs, epsilon, options.steps)
        plain = plainly(model, pairs, epsilon, options.steps)
        record.append({"network": name, "epsilon": epsilon, "dagcore": ours, "plain": plain})
        rows.append(
            {
                "network": name,
                "images": len(pairs),
                "epsilon": f"{epsilon * 255:g}/255",
                "worst aAcc": f"{ours['aAcc']:.2f}",
                "plain": f"{plain['aAcc']:.2f}",
                "worst mIoU": f"{ours['mIoU']:.2f}",
                "plain mIoU": f"{plain['mIoU']:.2f}",
                "s": f"{ours['seconds']:.0f}",
                "plain s": f"{plain['seconds']:.0f}",
                "times as fast": f"{plain['seconds'] / ours['seconds']:.2f}",
            }
        )
    command = f"python benchmarks/bench_evaluate.py --steps {options.steps}"
    save(options.save, "cpu", rows, record, command, NOTE)


def evaluated(model: Any, pairs: list[Any], epsilon: float, steps: int) -> dict[str, float]:
    """The worst case by dagcore, prepared."""
    entries = tuple(dagcore_entry(entry, steps) for entry in SEA.attacks)
    protocol = SEA.__class__(name="sea", attacks=entries, epsilon=epsilon)
    victim = model if isinstance(model, Victim) else Victim(model)
    with tempfile.TemporaryDirectory() as out:
        begin = time.perf_counter()
        summary = dagcore.evaluate(
            victim, pairs, protocol, out=Path(out) / "out", check=0, figures=0
        )
        took = time.perf_counter() - begin
    (worst,) = (one for one in summary["worst_case"] if one["stage"] == "memory")
    return {"aAcc": worst["aAcc"], "mIoU": worst["mIoU"], "seconds": took}


def dagcore_entry(entry: Any, steps: int) -> Any:
    return entry.__class__(
        name=entry.name,
        attack=entry.attack,
        class_weights=entry.class_weights,
        settings={**entry.settings, "steps": steps},
    )


def plainly(model: Any, pairs: list[Any], epsilon: float, steps: int) -> dict[str, float]:
    """The worst case by the plain implementation."""
    torch.manual_seed(0)
    begin = time.perf_counter()
    with torch.no_grad():
        classes = model(pairs[0][0][None]).shape[1]
    weights = sea_oracle.class_weights([labels for _, labels in pairs], classes)
    tables = [
        [
            sea_oracle.table(
                model,
                sea_oracle.attack(model, image, labels, name, weights, epsilon, steps),
                labels,
                classes,
            )
            for image, labels in pairs
        ]
        for name in sea_oracle.LOSSES
    ]
    right = torch.stack([torch.stack(one)[:, :, 0].sum(1) for one in tables]).min(0).values
    true = torch.stack(tables[0])[:, :, 2].sum()
    miou = sea_oracle.worst_miou(tables)
    took = time.perf_counter() - begin
    return {"aAcc": 100 * float(right.sum() / true), "mIoU": miou, "seconds": took}


if __name__ == "__main__":
    main()
